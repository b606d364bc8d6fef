"""What every component does with its inputs: structures by name, grids, sides."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from scangraph.contracts import LabelMap, Volume, check_labels, label_of
from scangraph.contracts.errors import GridsDiffer, LabelsMissing, WrongGrid

KIDNEY_RIGHT, KIDNEY_LEFT, KIDNEY, TUMOR, CYST, PELVIS, BLADDER = 2, 3, 201, 202, 203, 208, 21
CYST_LEFT, CYST_RIGHT = 23, 24
#: `report(done, total, message)`.
Report = Callable[[int, int, str], None]
#: Part of an image that must lie inside another one.
_LEAST_OVERLAP = 0.5


def silent(done: int, total: int, message: str) -> None:
    """Tell nobody."""
    del done, total, message


def occurring(mask: LabelMap) -> tuple[int, ...]:
    """Return the numbers that occur, ascending, without 0; all of them must have a name.

    Raises
    ------
    UnknownLabels
    """
    found = tuple(mask.counts())
    check_labels(found, "mask", mask.names)
    return found


def require(component: str, mask: LabelMap, wanted: Iterable[int], found: Sequence[int], *, any_of: bool = False) -> None:
    """Refuse a mask that lacks a wanted structure, or, with `any_of`, all of them.

    Raises
    ------
    UnknownLabels
        If nobody has given a wanted number a name.
    LabelsMissing
        Naming the structures.
    """
    wanted = list(wanted)
    check_labels(wanted, "structures", mask.names)
    missing = [number for number in wanted if number not in found]
    if missing and (not any_of or len(missing) == len(wanted)):

        def named(numbers: Iterable[int]) -> str:
            return ", ".join(f"{number} {label_of(number, mask.names).name}" for number in numbers) or "nothing"

        needs = f"one of {named(wanted)}" if any_of else named(wanted)
        raise LabelsMissing(name=component, wanted=needs, missing=named(missing), found=named(found))


def describe_grid(volume: Volume) -> str:
    """Shape, spacing, orientation and origin in one line."""
    shape = "×".join(map(str, volume.shape))
    spacing = "×".join(f"{s:g}" for s in volume.spacing_mm)
    origin = ", ".join(f"{o:g}" for o in volume.origin_mm)
    return f"{shape} voxels of {spacing} mm (z, y, x), {volume.axcodes}, from ({origin})"


def same_grid(first: Volume, second: Volume, first_name: str, second_name: str) -> None:
    """Refuse a second input on another grid.

    Raises
    ------
    GridsDiffer
    """
    if not first.same_grid(second):
        raise GridsDiffer(
            first=first_name, second=second_name, first_grid=describe_grid(first), second_grid=describe_grid(second)
        )


def hu_on(mask: LabelMap, image: Volume | None, *, resample: bool) -> NDArray[np.generic] | None:
    """Return the CT's values on the mask's grid; interpolated linearly where it lies on another one and that is allowed.

    Raises
    ------
    GridsDiffer, WrongGrid
    """
    if image is None:
        return None
    if mask.same_grid(image):
        return image.array
    if not resample:
        same_grid(mask, image, "mask", "image")
    overlap = mask.overlap_fraction(image)
    if overlap < _LEAST_OVERLAP:
        raise WrongGrid(
            first="mask",
            second="image",
            overlap_percent=100 * overlap,
            first_extent=describe_grid(mask),
            second_extent=describe_grid(image),
        )
    # From the mask's (z, y, x) index to the image's, one affine map.
    to_own = np.linalg.inv(image.affine_lps) @ mask.affine_lps
    matrix, offset = to_own[2::-1, 2::-1], to_own[2::-1, 3]
    values = ndimage.affine_transform(
        np.asarray(image.array, np.float32), matrix, offset, output_shape=mask.shape, order=1, mode="constant", cval=-1024
    )
    return np.asarray(values)


def writable(mask: LabelMap, labels: Iterable[int] = ()) -> tuple[LabelMap, NDArray[np.unsignedinteger]]:
    """Return a copy of a mask, and its array turned to LPS: a view, so what is written there is in the copy.

    `labels` are numbers that will be added; the array gets wide enough for them.
    """
    numbers = tuple(labels)
    kind = np.promote_types(mask.array.dtype, np.min_scalar_type(max(numbers, default=0)))
    array = np.array(mask.array, dtype=kind)
    copy = LabelMap(array, mask.spacing_mm, mask.origin_mm, mask.direction, (*mask.labels, *numbers), mask.names)
    return copy, copy.reoriented("LPS").array


def midline(array: NDArray[np.unsignedinteger]) -> float:
    """Return the x index (fraction) of the body's middle in an array turned to LPS: right is below, left above.

    From what lies in the middle or on both sides: the kidneys, the spine, the great vessels; else the middle of all labels.
    """
    counts = {number: np.zeros(array.shape[2]) for number in _MIDDLE}
    rows = np.isin(array, _MIDDLE)
    for z in np.flatnonzero(rows.any(axis=(1, 2))):
        plane = array[z]
        for number in np.unique(plane[rows[z]]):
            counts[int(number)] += (plane == number).sum(axis=0)
    x = np.arange(array.shape[2])
    centres = {number: float((x * c).sum() / c.sum()) for number, c in counts.items() if c.sum()}
    spine = [centres[n] for n in _SPINE if n in centres]
    if spine:
        return float(np.median(spine))
    if KIDNEY_RIGHT in centres and KIDNEY_LEFT in centres:
        return (centres[KIDNEY_RIGHT] + centres[KIDNEY_LEFT]) / 2
    if BLADDER in centres:
        return centres[BLADDER]
    columns = np.flatnonzero((array != 0).any(axis=(0, 1)))
    return float(columns.min() + columns.max()) / 2 if len(columns) else (array.shape[2] - 1) / 2


_SPINE = tuple(range(25, 51))
_MIDDLE = (*_SPINE, KIDNEY_RIGHT, KIDNEY_LEFT, BLADDER)
