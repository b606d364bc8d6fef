"""Copies for screens: images and masks of fewer voxels at the same place in the world, and small pictures. Arrays only.

A browser holds four bytes a voxel on the graphics processor, so what it is shown has at most some 300 voxels a side. Blocks of
whole voxels become one: nothing is resampled, and where a block's centre is, is exact.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scangraph.contracts import Image2D, LabelMap, Volume

#: A copy's voxels a side, where nobody says otherwise.
MOST = 300
#: Pixels of a small picture's longer side, and between its two views.
_SIDE, _GAP = 256, 4
#: HU from black to white: soft tissue.
_SOFT = (-160.0, 240.0)
#: What has voxels as dark as this is CT with air in it; anything else is shown between its own percentiles.
_AIR = -500
#: Values that percentiles are taken of.
_SAMPLE = 1 << 20
#: Fewer grey values than this between darkest and brightest are fractions that matter, and stay.
_FEW = 256
_WHITE = 255


def reduced(volume: Volume, most: int = MOST) -> Volume:
    """Make blocks of voxels one voxel each, so that no side has more than `most`.

    Parameters
    ----------
    volume : Volume or LabelMap
        Without channels.
    most : int
        Voxels a side; each axis has its own whole block length.

    Returns
    -------
    Volume or LabelMap
        Of an image the blocks' means, int16, or float32 where rounding would lose what is there. Of a mask the label that most
        of a block's labelled voxels have, or 0 where more than half of the block is 0. The world frame is the same: voxel
        (k, j, i) lies in its block's centre. Blocks at the far sides may be cut; they count what there is of them.
    """
    block = [-(-n // most) for n in volume.shape]
    if math.prod(block) == 1:
        array = volume.array if isinstance(volume, LabelMap) else _in_few_bits(volume.array, volume.array)
    else:
        plane = _labels if isinstance(volume, LabelMap) else _means
        kind = np.dtype(volume.array.dtype if isinstance(volume, LabelMap) else np.float32)
        array = np.empty([-(-n // b) for n, b in zip(volume.shape, block, strict=True)], kind)
        for k, target in enumerate(array):
            plane(volume.array[k * block[0] : (k + 1) * block[0]], block[1:], target)
        if not isinstance(volume, LabelMap):
            array = _in_few_bits(array, volume.array)
    z, y, x = (s * b for s, b in zip(volume.spacing_mm, block, strict=True))
    first = volume.index_to_world([(b - 1) / 2 for b in block])
    origin = (float(first[0]), float(first[1]), float(first[2]))
    return replace(volume, array=array, spacing_mm=(z, y, x), origin_mm=origin)


def intensity(array: NDArray[Any]) -> dict[str, float]:
    """Describe an image's values, HU where it is CT: min and max, and the percentiles p01, p50 and p99 of a million of them."""
    flat = array.reshape(-1)
    if flat.size > _SAMPLE:  # drawn, not every n-th: rows have lengths, and every n-th may be the same column
        flat = flat[np.random.default_rng(0).integers(flat.size, size=_SAMPLE)]
    first, middle, last = (float(value) for value in np.percentile(flat, [1, 50, 99]))
    return {"min": float(array.min()), "max": float(array.max()), "p01": first, "p50": middle, "p99": last}


def small_picture(value: Volume | Image2D) -> Image2D:
    """Draw what it is like in at most 256 pixels a side.

    Parameters
    ----------
    value : Volume, LabelMap or Image2D
        Of an image the middle coronal and axial slices, of a mask those with the most labels; the patient's right is on the
        left, a millimetre is equally long everywhere. Of a 2-D image the first page.

    Returns
    -------
    Image2D
        Grey; RGB of masks and of colour.
    """
    if isinstance(value, Image2D):
        return Image2D((_shrunk_page(value.pages[0]),))
    upright = value.reoriented("LPS")
    depth, height, width = (n * s for n, s in zip(upright.shape, upright.spacing_mm, strict=True))
    scale = min((_SIDE - _GAP) / 2 / width, _SIDE / depth, _SIDE / height)  # pixels a millimetre
    across, down_coronal, down_axial = (min(max(round(mm * scale), 1), _SIDE) for mm in (width, depth, height))
    if isinstance(value, LabelMap):
        axial, coronal = upright.array[_fullest(upright.array, 0)], upright.array[::-1, _fullest(upright.array, 1)]
        draw: Callable[[NDArray[Any], int, int], NDArray[np.uint8]] = _Painter(value)
    else:
        axial, coronal = upright.array[upright.shape[0] // 2], upright.array[::-1, upright.shape[1] // 2]
        draw = _Window(axial, coronal)
    views = draw(coronal, down_coronal, across), draw(axial, down_axial, across)
    page = np.zeros((max(down_coronal, down_axial), 2 * across + _GAP, views[0].shape[2]), np.uint8)
    for view, left in zip(views, (0, across + _GAP), strict=True):
        top = (len(page) - len(view)) // 2
        page[top : top + len(view), left : left + across] = view
    return Image2D((page,))


# --- blocks ----------------------------------------------------------------------------------------------------------------


def _means(slab: NDArray[Any], block: list[int], out: NDArray[np.float32]) -> None:
    """Write the means of a slab's blocks; the slab is as thick as they are."""
    # 2^15 values of 16 bits fit into 32.
    kind = np.float64 if slab.dtype.kind == "f" else np.int32 if len(slab) * math.prod(block) < 2**15 else np.int64
    total = _folded(_folded(slab.sum(axis=0, dtype=kind), 0, block[0], np.add), 1, block[1], np.add)
    rows, columns = (_lengths(n, b) for n, b in zip(slab.shape[1:], block, strict=True))
    np.divide(total, len(slab) * np.outer(rows, columns), out=out, casting="unsafe")


def _labels(slab: NDArray[Any], block: list[int], out: NDArray[Any]) -> None:
    """Write the labels of a slab's blocks. Most blocks hold one number: only the others are counted."""
    low, high = (
        _folded(_folded(fold.reduce(slab, axis=0), 0, block[0], fold), 1, block[1], fold) for fold in (np.minimum, np.maximum)
    )
    out[:] = high
    mixed = np.nonzero(low != high)
    if not len(mixed[0]):
        return
    offsets = np.array(list(itertools.product(range(len(slab)), range(block[0]), range(block[1]))))
    y, x = (m[:, None] * b + offsets[:, 1 + k] for k, (m, b) in enumerate(zip(mixed, block, strict=True)))
    inside = (y < slab.shape[1]) & (x < slab.shape[2])
    z = np.broadcast_to(offsets[:, 0], y.shape)
    values = np.where(inside, slab[z, np.minimum(y, slab.shape[1] - 1), np.minimum(x, slab.shape[2] - 1)], 0)
    out[mixed] = np.where(2 * np.count_nonzero(values, axis=1) >= inside.sum(axis=1), _commonest(values), 0)


def _commonest(values: NDArray[Any]) -> NDArray[Any]:
    """Return the number above 0 that each row has most often, the lowest of several."""
    values = np.sort(values, axis=1)
    found, most = np.zeros(len(values), values.dtype), np.zeros(len(values), np.int64)
    run = np.zeros(len(values), np.int64)
    for k in range(values.shape[1]):
        run = np.where(values[:, k] == values[:, k - 1], run + 1, 1) if k else run + 1
        better = (run > most) & (values[:, k] > 0)
        found[better], most[better] = values[better, k], run[better]
    return found


def _folded(plane: NDArray[Any], axis: int, length: int, fold: np.ufunc) -> NDArray[Any]:
    """Fold every `length` neighbours along an axis into one, the rest at its end into a last one."""
    rows = plane if axis == 0 else plane.T
    out = rows[::length].copy()
    for k in range(1, length):
        more = rows[k::length]
        fold(out[: len(more)], more, out=out[: len(more)])
    return out if axis == 0 else out.T


def _lengths(count: int, length: int) -> NDArray[np.int64]:
    """Return how long each block of an axis is."""
    lengths = np.full(-(-count // length), length, np.int64)
    lengths[-1] = count - length * (len(lengths) - 1)
    return lengths


def _in_few_bits(array: NDArray[Any], source: NDArray[Any]) -> NDArray[Any]:
    """Round to int16, but what does not fit, and fractions in a small range, which are no Hounsfield units."""
    if array.dtype.kind in "iu" and np.can_cast(array.dtype, np.int16):
        return array.astype(np.int16, copy=False)
    low, high = float(array.min()), float(array.max())
    if (source.dtype.kind == "f" and high - low < _FEW) or max(-low, high) > np.iinfo(np.int16).max:
        return array.astype(np.float32, copy=False)
    rounded: NDArray[np.int16] = np.rint(array).astype(np.int16)
    return rounded


# --- small pictures --------------------------------------------------------------------------------------------------------


class _Window:
    """Draws slices of an image as grey.

    Parameters
    ----------
    *slices : ndarray, shape (rows, columns)
        What the window is chosen by.
    """

    def __init__(self, *slices: NDArray[Any]) -> None:
        low, high = _SOFT
        if min(float(s.min()) for s in slices) > _AIR:
            low, high = np.percentile(np.concatenate([s.reshape(-1) for s in slices]), [1, 99])
        self._low, self._width = float(low), max(float(high) - float(low), 1e-6)

    def __call__(self, plane: NDArray[Any], rows: int, columns: int) -> NDArray[np.uint8]:
        grey = (_averaged(plane, rows, columns) - self._low) / self._width
        return np.rint(np.clip(grey, 0, 1) * _WHITE).astype(np.uint8)[..., None]


class _Painter:
    """Draws slices of a mask in its labels' colours."""

    def __init__(self, mask: LabelMap) -> None:
        self._colors = np.zeros((max(mask.labels, default=0) + 1, 3), np.uint8)
        for number in mask.labels:
            self._colors[number] = mask.label(number).color

    def __call__(self, plane: NDArray[Any], rows: int, columns: int) -> NDArray[np.uint8]:
        row, column = (
            ((np.arange(n) + 0.5) * size / n).astype(int) for n, size in zip((rows, columns), plane.shape, strict=True)
        )
        painted: NDArray[np.uint8] = self._colors[plane[np.ix_(row, column)]]
        return painted


def _fullest(array: NDArray[Any], axis: int) -> int:
    """Return the plane across an axis with the most labelled voxels, the middle one where there are none."""
    others = tuple(k for k in range(3) if k != axis)
    counts = np.count_nonzero(array, axis=others)
    return int(counts.argmax()) if counts.any() else array.shape[axis] // 2


def _shrunk_page(page: NDArray[Any]) -> NDArray[np.uint8]:
    """Shrink a page of a 2-D image, never enlarge it; what is not opaque lies on white."""
    scale = min(_SIDE / max(page.shape[:2]), 1)
    rows, columns = (max(round(n * scale), 1) for n in page.shape[:2])
    full = float(np.iinfo(page.dtype).max)
    color = page[..., : 1 if page.shape[2] < 3 else 3] / full
    if page.shape[2] in {2, 4}:
        opaque = page[..., -1:] / full
        color = color * opaque + (1 - opaque)
    small = np.stack([_averaged(color[..., k], rows, columns) for k in range(color.shape[2])], axis=-1)
    return np.rint(small * _WHITE).astype(np.uint8)


def _averaged(plane: NDArray[Any], rows: int, columns: int) -> NDArray[np.float64]:
    """Resize a plane; each pixel is the mean of the area that it covers."""
    smaller: NDArray[np.float64] = _areas(rows, plane.shape[0]) @ plane.astype(np.float64) @ _areas(columns, plane.shape[1]).T
    return smaller


def _areas(count: int, size: int) -> NDArray[np.float64]:
    """Return which part of each of `count` pixels each of `size` voxels covers, (count, size)."""
    edges = np.linspace(0, size, count + 1)[:, None]
    voxels = np.arange(size)
    shared = np.clip(np.minimum(edges[1:], voxels + 1) - np.maximum(edges[:-1], voxels), 0, None)
    weights: NDArray[np.float64] = shared / shared.sum(axis=1, keepdims=True)
    return weights
