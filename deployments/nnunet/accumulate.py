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
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from deployments.nnunet import kernels
from deployments.nnunet.resampling import Rule, cells
from scangraph.compiling import one_compiler


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
        most = int(np.bincount(self._z.low).max(initial=1))
        self._filled = np.empty((most, *target.labels.shape[1:]), np.uint16)
        self._numbers = target.numbers.astype(np.uint16)
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
        bits, shift = (tile, kernels.BF16_SHIFT) if tile.dtype == np.uint16 else (tile.view(np.uint32), 0)
        kernels.add_tile(
            self._ring,
            self._weights,
            self._depth,
            bits,
            np.uint32(shift),
            gaussian,
            (int(origin[0]), int(origin[1]), int(origin[2])),
            (bool(flips[0]), bool(flips[1]), bool(flips[2])),
            np.float32(share),
            first_channel,
            count,
        )

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
        target, filled = self._target, self._filled[: last - first]
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
            self._numbers,
            filled,
        )
        target.labels[first:last] = filled


def compile_kernels() -> None:
    """Compile all loops, or load them from numba's cache: 8 s at the first start on a machine, half a second at any other."""
    shape, part = (2, 2, 2), slice(0, 2)
    target = Target(np.zeros((3, 3, 3), np.uint8), Rule(1), np.arange(2, dtype=np.uint8), False, True)
    tiles: tuple[Any, ...] = (np.zeros((*shape, 2), np.float32), np.zeros((*shape, 2), np.uint16))
    with one_compiler():
        for tile in tiles:
            sums = Accumulator(shape, (part, part, part), 2, 2, None, target)
            sums.add(tile, np.ones(shape, np.float32), (0, 0, 0))
            sums.finish(2)


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
        self._along = []
        for axis in (1, 2):
            found = cells(sizes[axis], target.labels.shape[axis], target.rule.order_of(axis))
            low, high, weight = (torch.as_tensor(part, device=device) for part in found)
            self._along.append((low, high, weight.reshape((-1, 1, 1) if axis == 1 else (1, -1, 1))))
        self._depth_cells = cells(sizes[0], target.labels.shape[0], target.rule.order_of(0))
        # As int32: torch can hardly do anything with uint16.
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
        """Write the labels of the image's slices that need no slice from `until` on; they are copied back together."""
        if until <= self._ready:
            return
        whole = self._sums[self._ready : until]
        weights = self._weights[self._ready : until]
        whole.div_(torch.where(weights > 0, weights, torch.ones_like(weights)))
        self._ready = until
        depth, (low, high, weight) = self._inner[0], self._depth_cells
        last = int((high < min(until, depth.stop) - depth.start).sum())
        slab = range(self._written, last)
        if slab:
            codes = [self._codes(int(low[z]) + depth.start, int(high[z]) + depth.start, float(weight[z])) for z in slab]
            self._target.labels[slab.start : slab.stop] = torch.stack(codes).cpu().numpy()
            self._written = last

    def _codes(self, low: int, high: int, weight: float) -> torch.Tensor:
        """Interpolate and decide one slice of the image; nothing in it waits for the device."""
        plane = (self._inner[1], self._inner[2])
        values = torch.lerp(self._sums[(low, *plane)], self._sums[(high, *plane)], weight)
        for axis, (below, above, part) in enumerate(self._along):
            values = torch.lerp(values.index_select(axis, below), values.index_select(axis, above), part)
        target, head = self._target, self._head
        logits = values
        if head is not None:
            logits = torch.addmm(head.bias, values.flatten(0, 1), head.weight.T).unflatten(0, values.shape[:2])
        if target.half:
            logits = logits.half()
        if target.regions:
            order = torch.arange(1, logits.shape[-1] + 1, device=self._device)
            codes = ((logits > 0) * order).amax(-1)
        else:
            codes = logits.argmax(-1)
        return self._numbers[codes]
