"""Grids to test with: all 48 ways to lay array axes along the body, and any other rotation."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import SimpleITK as sitk
from hypothesis import strategies as st
from numpy.typing import NDArray

from scangraph.contracts import LabelMap, Volume

#: "LPS", "RPS", …, "SAR": each index axis x, y, z to one end of another world axis.
AXCODES = ["".join(codes) for order in itertools.permutations(("LR", "PA", "SI")) for codes in itertools.product(*order)]
_TOWARDS = {letter: np.eye(3)[k // 2] * (1 if k % 2 == 0 else -1) for k, letter in enumerate("LRPASI")}

#: Shape, spacing and origin that differ on every axis, so that no exchange of axes goes unseen.
SHAPE = (3, 4, 5)
SPACING = (2.5, 0.7, 0.8)
ORIGIN = (-123.25, 45.5, -1007.125)


def direction(axcodes: str) -> Any:
    """Direction matrix whose columns lead where the letters say."""
    return np.stack([_TOWARDS[letter] for letter in axcodes], axis=1)


def counting(shape: tuple[int, ...] = SHAPE, dtype: str = "i2") -> NDArray[Any]:
    """Array in which every voxel has another value."""
    return np.arange(int(np.prod(shape)), dtype=dtype).reshape(shape)


def volume(axcodes: str = "LPS") -> Volume:
    """A small volume on one of the 48 orientations."""
    return Volume(counting(), SPACING, ORIGIN, direction(axcodes))


def rotation(quaternion: tuple[float, ...]) -> Any:
    """Rotation matrix of a quaternion of any length but 0."""
    w, x, y, z = np.asarray(quaternion) / np.linalg.norm(quaternion)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )


def _uniform(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high, allow_nan=False, allow_subnormal=False)


_triples = st.tuples(_uniform(0.3, 5), _uniform(0.3, 5), _uniform(0.3, 5))
_quaternions = st.tuples(*[_uniform(-1, 1)] * 4).filter(lambda q: float(np.linalg.norm(q)) > 0.1)


@st.composite
def oblique_volumes(draw: st.DrawFn) -> Volume:
    """Volumes turned anyhow, half of them mirrored."""
    shape = draw(st.tuples(*[st.integers(1, 6)] * 3))
    turn = rotation(draw(_quaternions)) @ direction(draw(st.sampled_from(AXCODES)))
    origin = draw(st.tuples(*[_uniform(-1000, 1000)] * 3))
    return Volume(counting(shape), draw(_triples), origin, turn)


def to_sitk(grid: Volume) -> Any:
    """The same image in SimpleITK."""
    image = sitk.GetImageFromArray(grid.array)
    image.SetSpacing(grid.spacing_mm[::-1])
    image.SetOrigin(grid.origin_mm)
    image.SetDirection(np.asarray(grid.direction).ravel().tolist())
    return image


def from_sitk(image: Any) -> Volume:
    """The same image as a Volume."""
    return Volume(sitk.GetArrayFromImage(image), image.GetSpacing()[::-1], image.GetOrigin(), image.GetDirection())


def mask(array: Any, *, on: Volume | None = None, **geometry: Any) -> LabelMap:
    """A label map from nested lists, on the grid of `on` or with the geometry given."""
    if on is not None:
        geometry = {"spacing_mm": on.spacing_mm, "origin_mm": on.origin_mm, "direction": on.direction, **geometry}
    values = np.asarray(array, np.uint8)
    labels = tuple(int(v) for v in np.unique(values) if v)
    return LabelMap(values, **{"spacing_mm": (1, 1, 1), "labels": labels, **geometry})


def same_geometry(a: Volume, b: Volume) -> Mapping[str, bool]:
    """Which parts of the geometry are equal up to rounding."""
    return {
        name: bool(np.allclose(getattr(a, name), getattr(b, name), atol=1e-9))
        for name in ("spacing_mm", "origin_mm", "direction")
    }
