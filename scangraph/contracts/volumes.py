"""Images and masks in world space: the arrays that cross process boundaries, and their geometry.

World space is DICOM's and ITK's LPS in millimetres (x towards the patient's left, y posterior, z superior). Arrays are
`(z, y, x)`; `spacing_mm` follows the array, `origin_mm` and `direction` follow ITK (x, y, z).
"""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self, SupportsIndex, TypedDict

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scangraph.contracts.errors import InvalidVolume
from scangraph.contracts.labels import Label, label_of

Vector = tuple[float, float, float]
Matrix = tuple[Vector, Vector, Vector]

#: The letter a world axis has towards its negative and its positive end; index axis x of an "LPS" array grows to the Left.
_NEGATIVE, _POSITIVE = "RAI", "LPS"
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
#: Direction cosines in files carry the error of 32-bit quaternions and of scanners' rounded headers, about 1e-4.
_ORTHONORMAL_TOLERANCE = 2e-3


class NnunetProperties(TypedDict):
    """What nnU-Net's SimpleITK reader hands to its predictor."""

    sitk_stuff: dict[str, tuple[float, ...]]
    spacing: list[float]


def _rebuild(
    cls: type[Volume],
    dtype: str,
    shape: tuple[int, ...],
    data: Any,
    geometry: tuple[Vector, Vector, Matrix],
    extra: tuple[Any, ...],
) -> Volume:
    """Make a volume from what `Volume.__reduce_ex__` wrote. `data` is any buffer, and stays the array's memory."""
    array = np.frombuffer(data, dtype=np.dtype(dtype)).reshape(shape)
    # The values were checked when the volume was made; its bytes are only viewed here, never read.
    volume = object.__new__(cls)
    for name, value in zip(
        ("array", "spacing_mm", "origin_mm", "direction", "labels", "names"), (array, *geometry, *extra), strict=False
    ):
        object.__setattr__(volume, name, value)
    return volume


@dataclass(frozen=True, eq=False)
class Volume:
    """A 3-D image in world space.

    Parameters
    ----------
    array : ndarray, shape (z, y, x) or (c, z, y, x)
        Voxel values, for CT in Hounsfield units. Arrays that came through the object store are read-only views.
    spacing_mm : (z, y, x)
        Distance of neighbouring voxel centres along each array axis.
    origin_mm : (x, y, z)
        LPS position of the centre of voxel (0, 0, 0).
    direction : 3×3
        Columns are the LPS directions of the index axes x, y, z, orthonormal as in ITK.

    Raises
    ------
    InvalidVolume
        If the array has another number of axes, an empty one or no real numbers, or the geometry is not finite, positive and
        orthonormal.

    Notes
    -----
    Pickles without naming any numpy class: numpy 2 writes `numpy._core` names that numpy 1 cannot import, and stages may
    use either. With protocol 5 the bytes travel out of band, so Ray maps them instead of copying.
    """

    array: NDArray[Any]
    spacing_mm: Vector
    origin_mm: Vector = (0.0, 0.0, 0.0)
    direction: Matrix = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))

    def __post_init__(self) -> None:
        array = np.asarray(self.array)
        if array.ndim not in (3, 4) or 0 in array.shape:
            raise InvalidVolume(
                detail=f"expected a (z, y, x) or (c, z, y, x) array with no empty axis, got shape {array.shape}"
            )
        if array.dtype.kind not in "biuf":
            raise InvalidVolume(detail=f"expected an array of real numbers, got {array.dtype}")
        object.__setattr__(self, "array", array)
        object.__setattr__(self, "spacing_mm", _vector("spacing_mm", self.spacing_mm))
        object.__setattr__(self, "origin_mm", _vector("origin_mm", self.origin_mm))
        object.__setattr__(self, "direction", _direction(self.direction))
        if min(self.spacing_mm) <= 0:
            raise InvalidVolume(detail=f"spacing_mm must be positive, got {self.spacing_mm}")

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        contiguous = np.ascontiguousarray(self.array)
        raw = contiguous.reshape(-1).view(np.uint8)
        data = pickle.PickleBuffer(raw.data) if int(protocol) >= 5 else raw.tobytes()
        geometry = (self.spacing_mm, self.origin_mm, self.direction)
        return _rebuild, (type(self), contiguous.dtype.str, contiguous.shape, data, geometry, self._extra())

    def _extra(self) -> tuple[Any, ...]:
        """Fields of a subclass, in order."""
        return ()

    def __repr__(self) -> str:
        size = "×".join(map(str, self.array.shape))
        spacing = "×".join(f"{s:g}" for s in self.spacing_mm)
        return f"<{type(self).__name__} {size} {self.array.dtype} {spacing} mm {self.axcodes}>"

    # --- the grid -----------------------------------------------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels along z, y, x (without channels)."""
        z, y, x = self.array.shape[-3:]
        return (z, y, x)

    @property
    def voxel_volume_mm3(self) -> float:
        """Volume of one voxel."""
        return float(np.prod(self.spacing_mm))

    @property
    def affine_lps(self) -> NDArray[np.float64]:
        """4×4 matrix from index (x, y, z) to LPS millimetres."""
        affine = np.eye(4)
        affine[:3, :3] = np.asarray(self.direction) * np.asarray(self.spacing_mm[::-1])
        affine[:3, 3] = self.origin_mm
        return affine

    @property
    def affine_ras(self) -> NDArray[np.float64]:
        """4×4 matrix from index (x, y, z) to RAS millimetres, as NIfTI stores it."""
        return np.asarray(_LPS_TO_RAS @ self.affine_lps)

    @classmethod
    def from_affine_lps(cls, array: NDArray[Any], affine: ArrayLike, **extra: Any) -> Self:
        """Make a volume from an array and a 4×4 matrix from index (x, y, z) to LPS millimetres, without shear."""
        matrix = np.asarray(affine, dtype=np.float64)
        if matrix.shape != (4, 4) or not np.isfinite(matrix).all():
            raise InvalidVolume(detail=f"the affine must be 4×4 finite numbers, got {matrix.tolist()}")
        spacing = np.linalg.norm(matrix[:3, :3], axis=0)
        if spacing.min() <= 0:
            raise InvalidVolume(detail=f"the affine is not invertible: {matrix.tolist()}")
        direction = _direction(matrix[:3, :3] / spacing)
        return cls(array, _vector("spacing_mm", spacing[::-1]), _vector("origin_mm", matrix[:3, 3]), direction, **extra)

    def index_to_world(self, index_zyx: ArrayLike) -> NDArray[np.float64]:
        """Map (…, 3) array indices (z, y, x), fractions allowed, to (…, 3) LPS millimetres (x, y, z)."""
        xyz = np.asarray(index_zyx, dtype=np.float64)[..., ::-1]
        return np.asarray(xyz @ self.affine_lps[:3, :3].T + self.affine_lps[:3, 3])

    def world_to_index(self, world_mm: ArrayLike) -> NDArray[np.float64]:
        """Map (…, 3) LPS millimetres (x, y, z) to (…, 3) fractional array indices (z, y, x)."""
        inverse = np.linalg.inv(self.affine_lps)
        return np.asarray((np.asarray(world_mm, dtype=np.float64) @ inverse[:3, :3].T + inverse[:3, 3])[..., ::-1])

    def extent_mm(self) -> tuple[Vector, Vector]:
        """Lowest and highest LPS corner of the box around all voxels, their half widths included."""
        corners = self.index_to_world(
            [[(-0.5 if c == 0 else n - 0.5) for c, n in zip(k, self.shape, strict=True)] for k in _CORNERS]
        )
        return _vector("extent", corners.min(axis=0)), _vector("extent", corners.max(axis=0))

    def overlap_fraction(self, other: Volume) -> float:
        """Part (0…1) of this volume's voxels whose centres lie inside `other`, on a lattice of at most 32 points an axis."""
        lattice = np.meshgrid(*(np.linspace(0, n - 1, min(n, 32)) for n in self.shape), indexing="ij")
        index = other.world_to_index(self.index_to_world(np.stack(lattice, axis=-1)))
        inside = (index >= -0.5) & (index <= np.asarray(other.shape) - 0.5)
        return float(inside.all(axis=-1).mean())

    def same_grid(self, other: Volume, tolerance_mm: float = 1e-2) -> bool:
        """Whether every voxel centre of both lies within `tolerance_mm` of its counterpart."""
        if self.shape != other.shape:
            return False
        corners = [[c * (n - 1) for c, n in zip(corner, self.shape, strict=True)] for corner in _CORNERS]
        return bool(np.abs(self.index_to_world(corners) - other.index_to_world(corners)).max() <= tolerance_mm)

    def with_array(self, array: NDArray[Any]) -> Volume:
        """Give the same grid other values, as a plain volume."""
        if array.shape[-3:] != self.shape:
            raise InvalidVolume(detail=f"an array of shape {array.shape} does not fit a grid of {self.shape}")
        return Volume(array, self.spacing_mm, self.origin_mm, self.direction)

    # --- orientation --------------------------------------------------------------------------------------------------

    @property
    def axcodes(self) -> str:
        """Where the index axes x, y, z lead, as nibabel names it: "LPS" for an unrotated ITK image. Oblique: the nearest."""
        return "".join(
            (_POSITIVE if sign > 0 else _NEGATIVE)[world]
            for world, sign in _closest_axes(np.asarray(self.direction, dtype=np.float64))
        )

    def reoriented(self, axcodes: str = "LPS") -> Self:
        """Flip and permute axes so that they lead (nearest) to `axcodes`; no voxel is resampled, no voxel moves in the world.

        Returns a view of the same memory.
        """
        wanted = [_parse_axcode(c) for c in axcodes.upper()]
        if sorted(world for world, _ in wanted) != [0, 1, 2]:
            raise InvalidVolume(detail=f"{axcodes!r} does not name three axes, one each of L/R, P/A, S/I")
        current = _closest_axes(np.asarray(self.direction, dtype=np.float64))
        source = [next(i for i, (world, _) in enumerate(current) if world == w) for w, _ in wanted]  # new x, y, z from old
        flipped = [current[i][1] != sign for i, (_, sign) in zip(source, wanted, strict=True)]
        # Arrays are stored z, y, x: index axis i is the array's axis last - i.
        last = self.array.ndim - 1
        axes = (*range(last - 2), *(last - i for i in reversed(source)))
        array = np.flip(self.array.transpose(axes), axis=tuple(last - i for i, flip in enumerate(flipped) if flip))
        old_first = np.zeros(3)  # where the new voxel (0, 0, 0) was
        for i, flip in zip(source, flipped, strict=True):
            old_first[2 - i] = self.shape[2 - i] - 1 if flip else 0
        return replace(
            self,
            array=array,
            spacing_mm=_vector("spacing_mm", [self.spacing_mm[2 - i] for i in reversed(source)]),
            origin_mm=_vector("origin_mm", self.index_to_world(old_first)),
            direction=_direction(np.asarray(self.direction)[:, source] * np.where(flipped, -1.0, 1.0)),
        )

    def to_nnunet_props(self) -> NnunetProperties:
        """Return what nnU-Net's `SimpleITKIO.read_images` would give for this grid."""
        return {
            "sitk_stuff": {
                "spacing": self.spacing_mm[::-1],
                "origin": self.origin_mm,
                "direction": tuple(itertools.chain.from_iterable(self.direction)),
            },
            "spacing": list(self.spacing_mm),
        }


@dataclass(frozen=True, eq=False, repr=False)
class LabelMap(Volume):
    """A mask: unsigned whole numbers, each of which the label table or the mask itself names; 0 is background.

    Parameters
    ----------
    array, spacing_mm, origin_mm, direction
        As in `Volume`, the array unsigned and without channels.
    labels : tuple of int
        Numbers that may occur, without 0, ascending.
    names : mapping
        Number -> name of those among them that the table lacks.
    """

    labels: tuple[int, ...] = ()
    names: Mapping[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.array.ndim != 3 or self.array.dtype.kind != "u":
            raise InvalidVolume(
                detail=f"a label map is (z, y, x) of unsigned integers, got {self.array.ndim} axes of {self.array.dtype}"
            )
        object.__setattr__(self, "labels", tuple(sorted({int(v) for v in self.labels} - {0})))
        names = {int(number): str(self.names[number]) for number in sorted(self.names) if number in self.labels}
        object.__setattr__(self, "names", names)

    def _extra(self) -> tuple[Any, ...]:
        return (self.labels, dict(self.names))

    def label(self, number: int) -> Label:
        """Return name and colour of one of its numbers."""
        return label_of(number, self.names)

    def counts(self) -> dict[int, int]:
        """Voxels of each number that occurs, without background."""
        if self.array.dtype.itemsize > 2:
            numbers, found = np.unique(self.array, return_counts=True)
            return {int(n): int(c) for n, c in zip(numbers, found, strict=True) if n}
        total = np.zeros(int(np.iinfo(self.array.dtype).max) + 1, np.int64)
        for plane in self.array:  # bincount widens its input to int64: one plane at a time keeps that small
            total += np.bincount(plane.reshape(-1), minlength=total.size)
        return {int(n): int(total[n]) for n in np.flatnonzero(total) if n}

    def volumes_ml(self) -> dict[int, float]:
        """Millilitres of each number that occurs."""
        return {n: count * self.voxel_volume_mm3 / 1000 for n, count in self.counts().items()}

    def on_grid_of(self, target: Volume) -> LabelMap:
        """Look up every voxel centre of `target` (nearest neighbour as in ITK, 0 outside); itself where the grids are equal."""
        if self.same_grid(target):
            return self
        # One matrix from target index to own index; slab by slab, so that 512³ never needs three float arrays of that size.
        to_own = np.linalg.inv(self.affine_lps) @ target.affine_lps
        out = np.zeros(target.shape, self.array.dtype)
        y, x = np.meshgrid(np.arange(target.shape[1]), np.arange(target.shape[2]), indexing="ij")
        first_slab = np.tensordot(to_own[:3, :2], np.stack([x, y]), axes=1) + to_own[:3, 3, None, None]
        bounds = np.asarray(self.shape[::-1])[:, None, None]
        for z in range(target.shape[0]):
            own = np.floor(first_slab + (z * to_own[:3, 2] + 0.5)[:, None, None])  # halves go up, as in ITK
            inside = ((own >= 0) & (own < bounds)).all(axis=0)
            ix, iy, iz = own[:, inside].astype(np.intp)
            out[z][inside] = self.array[iz, iy, ix]
        return LabelMap(out, target.spacing_mm, target.origin_mm, target.direction, self.labels, self.names)


def merge_label_maps(maps: Iterable[LabelMap], only: Iterable[int] | None = None) -> LabelMap:
    """Paint masks over each other on the first one's grid; where several name a voxel, the last one wins.

    With `only`, the numbers that are not in it are not painted.

    Raises
    ------
    InvalidVolume
        If there is none, or two of them have one number for two names.
    """
    iterator: Iterator[LabelMap] = iter(maps)
    try:
        first = next(iterator)
    except StopIteration:
        raise InvalidVolume(detail="nothing to merge: give at least one mask") from None
    wanted = None if only is None else sorted(set(only))
    merged, labels, names = np.zeros_like(first.array), set[int](), dict[int, str]()
    for label_map in itertools.chain([first], iterator):
        array = label_map.on_grid_of(first).array
        merged = merged.astype(np.promote_types(merged.dtype, array.dtype), copy=False)
        np.copyto(merged, array, where=array != 0 if wanted is None else np.isin(array, wanted) & (array != 0))
        labels |= set(label_map.labels if wanted is None else set(label_map.labels) & set(wanted))
        for number, name in label_map.names.items():
            if names.setdefault(number, name).lower() != name.lower():
                raise InvalidVolume(detail=f"label {number} is {names[number]!r} in one mask and {name!r} in another")
    return LabelMap(merged, first.spacing_mm, first.origin_mm, first.direction, tuple(labels), names)


_CORNERS = list(itertools.product((0, 1), repeat=3))


def _vector(name: str, values: Any) -> Vector:
    """Make three plain floats: numpy scalars would carry numpy's module names into pickles."""
    array = np.asarray(values, dtype=np.float64).reshape(-1)
    if array.size != 3 or not np.isfinite(array).all():
        raise InvalidVolume(detail=f"{name} must be three finite numbers, got {values}")
    return (float(array[0]), float(array[1]), float(array[2]))


def _direction(values: Any) -> Matrix:
    """Make 3×3 plain floats with orthonormal columns."""
    rows = np.asarray(values, dtype=np.float64)
    if rows.size != 9 or not np.isfinite(rows).all():
        raise InvalidVolume(detail=f"direction must be 3×3 finite numbers, got {values}")
    rows = rows.reshape(3, 3)
    if np.abs(rows.T @ rows - np.eye(3)).max() > _ORTHONORMAL_TOLERANCE:
        raise InvalidVolume(detail=f"direction must be orthonormal, got {rows.tolist()}")
    x, y, z = (_vector("direction", row) for row in rows)
    return (x, y, z)


def _closest_axes(direction: NDArray[np.float64]) -> list[tuple[int, int]]:
    """For index axes x, y, z: the world axis (0, 1, 2) each is closest to, all different, and its sign there.

    The permutation with the largest sum of cosines, so that a grid turned by 45° still gets three different axes;
    which of two equal fits it takes is a matter of rounding.
    """
    strength = np.abs(direction)
    best = max(itertools.permutations(range(3)), key=lambda p: sum(strength[w, i] for i, w in enumerate(p)))
    return [(w, 1 if direction[w, i] >= 0 else -1) for i, w in enumerate(best)]


def _parse_axcode(letter: str) -> tuple[int, int]:
    if letter in _POSITIVE:
        return _POSITIVE.index(letter), 1
    if letter in _NEGATIVE:
        return _NEGATIVE.index(letter), -1
    raise InvalidVolume(detail=f"{letter!r} is not one of L, R, P, A, S, I")
