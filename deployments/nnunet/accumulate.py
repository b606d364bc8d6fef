"""From tiles to labels, a few slices at a time.

Tiles arrive in the order of their first axis. As soon as no further tile touches a slice, it is divided by its weights, its
labels on the image's grid are written, and its memory is used again. So neither all logits on the network's grid nor one copy
of them on the image's grid ever exist: nnU-Net's 18 GB (25 classes, 512×512×600) and 81 GB (118 classes).

What is added up is the cheaper one of two things. The network's last layer is linear at each voxel, and so are the weighted
mean over tiles, mirrored passes and folds, and interpolation; so it may be applied after them. Where a network has more classes
than channels before that layer, those channels are added up, and the classes are computed slice by slice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from deployments.nnunet import kernels
from deployments.nnunet.resampling import Rule, cells


class Head(NamedTuple):
    """The last layer, where it is applied late: `logits = values @ weight.T + bias`.

    Parameters
    ----------
    weight : Tensor of float32, shape (classes, channels)
    bias : Tensor of float32, shape (classes,)
    """

    weight: torch.Tensor
    bias: torch.Tensor


class Target(NamedTuple):
    """Where labels go.

    Parameters
    ----------
    labels : ndarray of unsigned integers, shape (z, y, x)
        On the image's grid; may be a view of a larger one.
    rule : Rule
        How logits are brought there; of order 1 or 0.
    numbers : ndarray of unsigned integers
        Label of each class; with regions, of 0 and then of each region in the order in which they are painted.
    regions : bool
        Whether each channel says yes or no for itself.
    half : bool
        Round logits to float16, before and after interpolation, as nnU-Net does.
    """

    labels: NDArray[np.unsignedinteger]
    rule: Rule
    numbers: NDArray[np.unsignedinteger]
    regions: bool
    half: bool


class Accumulator:
    """Sums of tiles on the CPU, and what becomes of them.

    Parameters
    ----------
    shape : (z, y, x)
        Of the network's grid, padding included.
    inner : tuple of slice
        Its part without padding.
    depth : int
        A tile's length along the first axis.
    channels : int
        Of what is added up.
    head : Head or None
        What makes logits of it.
    target : Target
        Where labels go.
    """

    def __init__(
        self, shape: Sequence[int], inner: Sequence[slice], depth: int, channels: int, head: Head | None, target: Target
    ) -> None:
        self._shape, self._depth, self._target, self._head = tuple(shape), min(depth, shape[0]), target, head
        self._ring = np.zeros((self._depth, *shape[1:], channels), np.float32)
        self._weights = np.zeros((self._depth, *shape[1:]), np.float32)
        self._inner = tuple(inner)
        self._done = 0
        sizes = [part.stop - part.start for part in inner]
        along = [cells(sizes[i], target.labels.shape[i], target.rule.order_of(i)) for i in range(3)]
        self._z = along[0]
        self._rows = [
            (kernels.starts(axis.low, size), kernels.highs(axis.low, axis.high, size), axis.weight)
            for axis, size in zip(along[1:], sizes[1:], strict=True)
        ]
        classes = channels if head is None else head.weight.shape[0]
        # Two slices of logits: the labels between them need both.
        self._logits = [np.empty((sizes[1], sizes[2], classes), np.float32) for _ in range(2)]
        self._codes = [np.empty((sizes[1], sizes[2]), np.int32) for _ in range(2)]
        self._values = np.empty((*shape[1:], channels), np.float32)

    def add(
        self,
        tile: NDArray[np.float32] | NDArray[np.uint16],
        gaussian: NDArray[np.float32],
        origin: Sequence[int],
        *,
        flips: Sequence[bool] = (False, False, False),
        share: float = 1,
        first_channel: int = 0,
        count: bool = True,
    ) -> None:
        """Add what one pass over one tile gave; see `kernels.add_tile`. uint16 is bfloat16's bits."""
        add = kernels.add_tile_bf16 if tile.dtype == np.uint16 else kernels.add_tile
        begin, flip = (int(origin[0]), int(origin[1]), int(origin[2])), (bool(flips[0]), bool(flips[1]), bool(flips[2]))
        add(self._ring, self._weights, self._depth, tile, gaussian, begin, flip, np.float32(share), first_channel, count)

    def finish(self, until: int) -> None:
        """Write the labels of all slices below `until`, which no further tile touches."""
        for z in range(self._done, until):
            self._take(z)
        self._done = max(self._done, until)

    def _take(self, z: int) -> None:
        """Turn one slice into logits and codes, and label what lies between it and the one before."""
        at = z % self._depth
        kernels.take_slice(self._ring[at], self._weights[at], self._values)
        depth = self._inner[0]
        if not depth.start <= z < depth.stop:
            return
        index = z - depth.start
        logits, codes = self._logits[index % 2], self._codes[index % 2]
        values = torch.from_numpy(self._values)[self._inner[1], self._inner[2]]
        if self._head is None:
            torch.from_numpy(logits).copy_(values)
        else:
            torch.addmm(
                self._head.bias,
                values.reshape(-1, values.shape[-1]),
                self._head.weight.T,
                out=torch.from_numpy(logits.reshape(-1, logits.shape[-1])),
            )
        target = self._target
        kernels.decide(logits, target.regions, target.half, codes)
        if index > 0:
            self._write(index - 1, index)
        if index == depth.stop - depth.start - 1:
            self._write(index, index)

    def _write(self, low: int, high: int) -> None:
        """Write the image's slices whose lower neighbour is `low`."""
        first, last = np.searchsorted(self._z.low, (low, low + 1))
        if first == last:
            return
        weight = self._z.weight[first:last]
        if int(self._z.high[first]) == low:  # the slice itself
            high = low
        target = self._target
        (y_start, y_high, wy), (x_start, x_high, wx) = self._rows
        kernels.fill_slices(
            self._logits[low % 2],
            self._logits[high % 2],
            self._codes[low % 2],
            self._codes[high % 2],
            weight,
            y_start,
            y_high,
            wy,
            x_start,
            x_high,
            wx,
            target.regions,
            target.half,
            target.numbers,
            target.labels[first:last],
        )


class DeviceAccumulator:
    """The same on a GPU, which has the memory to keep the sums whole and the speed to interpolate everything.

    Parameters
    ----------
    shape, inner, channels, head, target
        As of `Accumulator`.
    device : torch.device
        Where.
    """

    def __init__(
        self,
        shape: Sequence[int],
        inner: Sequence[slice],
        channels: int,
        head: Head | None,
        target: Target,
        device: torch.device,
    ) -> None:
        self._sums = torch.zeros((*shape, channels), dtype=torch.float32, device=device)
        self._weights = torch.zeros((*shape, 1), dtype=torch.float32, device=device)
        self._inner, self._target, self._device = tuple(inner), target, device
        self._head = None if head is None else Head(head.weight.to(device), head.bias.to(device))
        sizes = [part.stop - part.start for part in inner]
        self._along = [
            [torch.as_tensor(part, device=device) for part in cells(size, n, target.rule.order_of(axis))]
            for axis, (size, n) in enumerate(zip(sizes, target.labels.shape, strict=True))
        ]
        self._numbers = torch.as_tensor(target.numbers.astype(np.int32), device=device)
        self._gaussian: torch.Tensor | None = None
        self._ready = self._written = 0

    def add(
        self,
        tile: torch.Tensor,
        gaussian: NDArray[np.float32],
        origin: Sequence[int],
        *,
        flips: Sequence[bool] = (False, False, False),
        share: float = 1,
        first_channel: int = 0,
        count: bool = True,
    ) -> None:
        """Add what one pass over one tile gave."""
        if self._gaussian is None:
            self._gaussian = torch.as_tensor(gaussian, device=self._device)[..., None]
        axes = [axis for axis, turned in enumerate(flips) if turned]
        where = tuple(slice(o, o + n) for o, n in zip(origin, tile.shape[:3], strict=True))
        values = torch.flip(tile, axes) if axes else tile
        into = self._sums[(*where, slice(first_channel, first_channel + tile.shape[3]))]
        into.addcmul_(values.to(torch.float32), self._gaussian, value=share)
        if count:
            self._weights[where] += self._gaussian

    def finish(self, until: int) -> None:
        """Write the labels of the image's slices that need no slice from `until` on."""
        whole = self._sums[self._ready : until]
        weights = self._weights[self._ready : until]
        whole.div_(torch.where(weights > 0, weights, torch.ones_like(weights)))
        self._ready = max(self._ready, until)
        depth = self._inner[0]
        low, high, weight = self._along[0]
        ready = min(until, depth.stop) - depth.start
        last = int((high < ready).sum())
        for z in range(self._written, last):
            self._write(z, int(low[z]) + depth.start, int(high[z]) + depth.start, weight[z])
        self._written = max(self._written, last)

    def _write(self, z: int, low: int, high: int, weight: torch.Tensor) -> None:
        """Interpolate, decide and copy one slice of the image."""
        plane = (self._inner[1], self._inner[2])
        values = _between(self._slice(low, plane), self._slice(high, plane), weight)
        for axis in (1, 2):
            below, above, part = self._along[axis]
            shape = (-1, 1, 1) if axis == 1 else (1, -1, 1)
            values = _between(values.index_select(axis - 1, below), values.index_select(axis - 1, above), part.reshape(shape))
        target = self._target
        logits = (
            values
            if self._head is None
            else torch.addmm(self._head.bias, values.reshape(-1, values.shape[-1]), self._head.weight.T).reshape(
                *values.shape[:2], -1
            )
        )
        if target.half:
            logits = logits.half()
        if target.regions:
            order = torch.arange(1, logits.shape[-1] + 1, device=self._device)
            codes = ((logits > 0) * order).amax(-1)
        else:
            codes = logits.argmax(-1)
        target.labels[z] = self._numbers[codes].cpu().numpy()

    def _slice(self, z: int, plane: tuple[slice, slice]) -> torch.Tensor:
        return self._sums[(z, *plane)]


def _between(low: torch.Tensor, high: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.lerp(low, high, weight.to(low.dtype))
