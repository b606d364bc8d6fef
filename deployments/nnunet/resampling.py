"""Between the image's grid and the network's: what nnU-Net resamples with skimage, as products with one small matrix an axis.

Interpolation by splines is linear and separable, so along each axis it is a matrix (target × source) in which scipy's prefilter
and taps are folded together. It is taken from scipy itself, by resampling the unit vectors; nothing is assumed about how scipy
treats borders. Products of matrices are what processors do best: 17 times as fast as `skimage.transform.resize`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage

#: Slices that are worked on together.
_SLAB = 16
#: Weights this small are nothing but denormals, which cost eleven times as much to multiply.
_NOTHING = 1e-9

#: Types of voxels that go to a GPU as they are.
_SENT = frozenset(np.dtype(kind) for kind in ("u1", "i1", "i2", "i4", "f4"))

Normalize = Callable[[torch.Tensor], torch.Tensor]


class Rule(NamedTuple):
    """How nnU-Net's plans want an array resampled.

    Parameters
    ----------
    order : int
        Of the spline.
    separate_axis : int or None
        The axis of thick slices, along which `order_separate` is used.
    order_separate : int
        Of the spline along that axis.
    """

    order: int
    separate_axis: int | None = None
    order_separate: int = 0

    def order_of(self, axis: int) -> int:
        """Return the spline's order along an axis."""
        return self.order_separate if axis == self.separate_axis else self.order


class Cells(NamedTuple):
    """Linear interpolation along one axis: target `i` is `(1 - weight[i]) * source[low[i]] + weight[i] * source[high[i]]`."""

    low: NDArray[np.int64]
    high: NDArray[np.int64]
    weight: NDArray[np.float32]


@lru_cache(maxsize=64)
def spline_matrix(source: int, target: int, order: int) -> NDArray[np.float32]:
    """Return what resampling does along one axis, as a matrix.

    Parameters
    ----------
    source, target : int
        Lengths; voxels are aligned at their outer edges, and outside the border voxel goes on.
    order : int
        Of the spline, 0 to 5.

    Returns
    -------
    ndarray of float32, shape (target, source)
    """
    unit = np.eye(source)
    if order == 0:
        nearest = ndimage.map_coordinates(np.arange(source), [coordinates(source, target)], order=0, mode="nearest")
        picked: NDArray[np.float32] = unit[nearest].astype(np.float32)
        return picked
    matrix = ndimage.zoom(unit, (target / source, 1), order=order, mode="nearest", grid_mode=True)
    matrix[np.abs(matrix) < _NOTHING] = 0
    result: NDArray[np.float32] = matrix.astype(np.float32)
    return result


def coordinates(source: int, target: int) -> NDArray[np.float64]:
    """Return where the targets' centres lie among the sources', both grids covering the same length."""
    return (np.arange(target) + 0.5) * source / target - 0.5


def cells(source: int, target: int, order: int) -> Cells:
    """Return interpolation of order 1 or 0 along an axis.

    Where nothing is between two sources, `high` is `low`.
    """
    if order not in (0, 1):
        raise ValueError(f"cells are for orders 0 and 1, not {order}")
    if source == target or order == 0:
        low = np.arange(target)
        if source != target:
            low = ndimage.map_coordinates(np.arange(source), [coordinates(source, target)], order=0, mode="nearest")
        return Cells(low.astype(np.int64), low.astype(np.int64), np.zeros(target, np.float32))
    where = np.clip(coordinates(source, target), 0, source - 1)
    low = np.minimum(where.astype(np.int64), max(source - 2, 0))
    return Cells(low, np.minimum(low + 1, source - 1), (where - low).astype(np.float32))


def resample(image: NDArray[Any], shape: Sequence[int], rule: Rule, normalize: Normalize, device: torch.device) -> torch.Tensor:
    """Normalise an image and bring it to another shape, a slab at a time.

    Parameters
    ----------
    image : ndarray, shape (z, y, x)
        Of any type.
    shape : (z, y, x)
        Wanted.
    rule : Rule
        How.
    normalize : callable
        From a slab's float32 to its normalised values, in place where it likes.
    device : torch.device
        Where it is done.

    Returns
    -------
    Tensor of float32, shape `shape`
        Clipped to the range of the normalised image (with a separate axis: of each slice), as skimage does.
    """
    if tuple(image.shape) == tuple(shape):
        return torch.cat([slab for _, slab in _slabs(image, normalize, device)])
    if rule.separate_axis is not None:
        return _resample_slices(image, shape, rule, normalize, device)
    rows, columns = (_matrix(image.shape[i], shape[i], rule.order, device) for i in (1, 2))
    depth = _matrix(image.shape[0], shape[0], rule.order, device)
    middle = torch.empty((image.shape[0], shape[1], shape[2]), dtype=torch.float32, device=device)
    ranges = []
    for start, slab in _slabs(image, normalize, device):
        ranges.append(torch.stack(torch.aminmax(slab)))
        middle[start : start + _SLAB] = _in_plane(slab, rows, columns)
    least, most = torch.stack(ranges)[:, 0].min(), torch.stack(ranges)[:, 1].max()  # tensors: a GPU need not be waited for
    if depth is None:
        return middle.clamp_(least, most)
    flat = middle.reshape(middle.shape[0], -1)
    result = torch.empty((shape[0], flat.shape[1]), dtype=torch.float32, device=device)
    torch.matmul(depth, flat, out=result)
    return result.clamp_(least, most).reshape(tuple(shape))


def _resample_slices(
    image: NDArray[Any], shape: Sequence[int], rule: Rule, normalize: Normalize, device: torch.device
) -> torch.Tensor:
    """Resample slice by slice, and then along the thick slices' axis."""
    axis = rule.separate_axis or 0
    turned = np.moveaxis(image, axis, 0)
    wanted = [shape[axis], *(n for i, n in enumerate(shape) if i != axis)]
    rows, columns = (_matrix(turned.shape[i], wanted[i], rule.order, device) for i in (1, 2))
    slices = []
    for _, slab in _slabs(turned, normalize, device):
        least, most = slab.amin((1, 2), keepdim=True), slab.amax((1, 2), keepdim=True)
        slices.append(_in_plane(slab, rows, columns).clamp(least, most))
    middle = torch.cat(slices)
    if middle.shape[0] != wanted[0]:
        along = torch.from_numpy(spline_matrix(middle.shape[0], wanted[0], rule.order_separate)).to(device)
        middle = (along @ middle.reshape(middle.shape[0], -1)).reshape(wanted)
    return middle.movedim(0, axis).contiguous()


def _slabs(image: NDArray[Any], normalize: Normalize, device: torch.device) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield (first slice, normalised slab); while one is worked on, the next is on its way to the GPU."""
    starts = range(0, image.shape[0], _SLAB)
    if device.type != "cuda":
        for start in starts:
            part = np.array(image[start : start + _SLAB], dtype=np.float32, order="C")  # a copy: the image may be read-only
            yield start, normalize(torch.from_numpy(part).to(device))
        return
    copying, working = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    kind = image.dtype if image.dtype in _SENT else np.dtype(np.float32)  # int16 is half of the way

    def send(start: int) -> tuple[torch.Tensor, torch.cuda.Event]:
        pinned = torch.from_numpy(np.array(image[start : start + _SLAB], dtype=kind, order="C")).pin_memory()
        with torch.cuda.stream(copying):
            sent = pinned.to(device, non_blocking=True)  # torch keeps pinned memory until the copy has been made
            arrived = torch.cuda.Event()
            arrived.record(copying)
        return sent, arrived

    following = send(0)
    for start in starts:
        sent, arrived = following
        if start + _SLAB < image.shape[0]:
            following = send(start + _SLAB)
        working.wait_event(arrived)
        sent.record_stream(working)  # or its memory would be used again as soon as the copying stream has no more to do
        yield start, normalize(sent.to(torch.float32, copy=True))


def _matrix(source: int, target: int, order: int, device: torch.device) -> torch.Tensor | None:
    return None if source == target else torch.from_numpy(spline_matrix(source, target, order)).to(device)


def _in_plane(slab: torch.Tensor, rows: torch.Tensor | None, columns: torch.Tensor | None) -> torch.Tensor:
    if rows is not None:
        slab = torch.matmul(rows, slab)
    return slab if columns is None else torch.matmul(slab, columns.T)
