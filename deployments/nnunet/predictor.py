"""The engine: an image and an nnU-Net network to labels, in bounded memory.

The networks and their plans are nnU-Net's (Isensee et al., Nature Methods 2021), and so is what is computed: crop, normalise,
resample, overlapping tiles weighted by a Gaussian, mirrored copies, several folds, back onto the image's grid, the highest
class. How it is computed is not: see `resampling.py` (before the network), `runtimes.py` (the network) and `accumulate.py`
(after it).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage

from deployments.nnunet.accumulate import Accumulator, DeviceAccumulator, Head, Target
from deployments.nnunet.body import Blocks, needs
from deployments.nnunet.memory import Need, check_memory
from deployments.nnunet.plan import Normalization, Plan, build_network, normalize_whole, read_plan
from deployments.nnunet.resampling import Rule, cells, resample
from deployments.nnunet.runtimes import (
    OpenVino,
    Poll,
    Precision,
    Runtime,
    Torch,
    complete_state,
    has_compiler,
    has_fast_bf16,
    last_layer,
    split_head,
)
from deployments.nnunet.weights import NetworkFolder

#: Called before and during every pass as `on_tile(done, total)`; what it raises stops the prediction.
OnTile = Callable[[int, int], None]


#: A GPU computes tiles together up to this many voxels (and tiles): one of 128³, which fills it, but many of a 2-D network's.
_BATCHED_VOXELS = 128**3
_MOST_TILES = 16


@dataclass(frozen=True)
class Manner:
    """How a precision is reached."""

    bf16: bool
    mirroring: bool
    step_size: float
    half: bool


#: `exact` gives nnU-Net's labels up to rounding (its float16 sums included), `fast` computes the network in bfloat16 or
#: float16, `draft` also takes larger steps and no mirrored copies.
MANNERS: dict[Precision, Manner] = {
    "exact": Manner(bf16=False, mirroring=True, step_size=0.5, half=True),
    "fast": Manner(bf16=True, mirroring=True, step_size=0.5, half=False),
    "draft": Manner(bf16=True, mirroring=False, step_size=0.8, half=False),
}


@dataclass
class Shared:
    """What the networks of one model share on one image, and count.

    Parameters
    ----------
    within : Blocks, optional
        A mask on the image's grid: what lies outside is background, and tiles that hold nothing of it are not computed.
    tiles, skipped : int
        Tiles that were computed, and those that were not.
    prepared : (key, Tensor), optional
        The last image on a network's grid: taken again where the next network normalises and resamples alike, to the bit.
    """

    within: Blocks | None = None
    tiles: int = 0
    skipped: int = 0
    prepared: tuple[Any, torch.Tensor] | None = None


class Network:
    """A loaded network, of one or several folds.

    Parameters
    ----------
    folder : NetworkFolder
        Checked plans and weights.
    device : torch.device
        Where it computes.
    mirroring : bool
        Average over mirrored copies along the axes that training mirrored: slower by 2 to the number of axes.
    threads : int
        Of the processor; 0 for torch's setting.
    cache : Path or None
        Folder in which converted networks are kept.
    on_device : bool, optional
        Keep everything on the device, as tensors, as it is done on GPUs (the default there); elsewhere only tests want that.
    """

    def __init__(
        self,
        folder: NetworkFolder,
        device: torch.device,
        *,
        mirroring: bool,
        threads: int = 0,
        cache: Path | None = None,
        on_device: bool | None = None,
    ) -> None:
        self.plan = read_plan(folder)
        self._on_device = device.type == "cuda" if on_device is None else on_device
        self._device, self._threads, self._cache = device, threads or torch.get_num_threads(), cache
        self._mirror_axes = tuple(folder.mirror_axes or ()) if mirroring else ()
        self._networks: list[torch.nn.Module] = []
        self.weight_bytes = sum(tensor.nbytes for weights in folder.parameters for tensor in weights.values())
        for weights in folder.parameters:
            network = build_network(folder)
            # The tensors stay where they are: mapped from a file, they are in memory once for all replicas of a node.
            network.load_state_dict(complete_state(network, weights), assign=True)
            self._networks.append(network)
        features = [_features(network) or 0 for network in self._networks]
        # Whether the last layer's inputs, of all folds, are fewer than the classes.
        self._late = 0 < sum(features) < self.plan.classes and len(set(features)) == 1
        self._width = features[0] if self._late else self.plan.classes
        self._head = self._take_heads() if self._late else None
        self._runtimes: dict[bool, list[Runtime]] = {}

    def _take_heads(self) -> Head:
        """Take the last layers off; return the mean of them, as one layer on all folds' channels side by side."""
        heads = [head for head in map(split_head, self._networks) if head is not None]
        weight = torch.cat([head.weight for head in heads], 1) / len(heads)
        return Head(weight.contiguous(), torch.stack([head.bias for head in heads]).mean(0))

    @property
    def channels(self) -> int:
        """How many images it takes."""
        return self.plan.channels

    @property
    def patch(self) -> tuple[int, int, int]:
        """Shape of a tile, in the network's axes."""
        return self.plan.patch

    def tile_voxels(self, spacing_mm: Sequence[float]) -> tuple[int, ...]:
        """Return how many voxels (z, y, x) of an image of that spacing fill a tile, rounded down, so that one tile will do."""
        back = np.argsort(self.plan.transpose_forward)
        patch, own = (np.array(values, dtype=object)[back] for values in (self.plan.patch, self.plan.spacing_mm))
        return tuple(
            int(n) if step is None else int(n * step / spacing + 1e-9)
            for n, step, spacing in zip(patch, own, spacing_mm, strict=True)
        )

    def runtimes(self, *, bf16: bool) -> list[Runtime]:
        """Return each fold's network, ready; it is made when it is first asked for."""
        if bf16 not in self._runtimes:
            self._runtimes[bf16] = [self._runtime(network, bf16=bf16) for network in self._networks]
        return self._runtimes[bf16]

    def engine(self, precision: Precision) -> str:
        """Say what computes it."""
        return self.runtimes(bf16=MANNERS[precision].bf16)[0].name

    def _runtime(self, network: torch.nn.Module, *, bf16: bool) -> Runtime:
        plan = self.plan
        if self._on_device:
            half = torch.float16 if self._device.type == "cuda" else torch.bfloat16
            return Torch(
                network,
                self._device,
                plan.channels,
                plan.patch,
                flat=plan.flat,
                dtype=half if bf16 else torch.float32,
                compiled=bf16 and self._device.type == "cuda",
                batch=max(1, min(_MOST_TILES, _BATCHED_VOXELS // int(np.prod(plan.patch)))),
                tensors=True,
            )
        bf16 = bf16 and has_fast_bf16()  # elsewhere bfloat16 is emulated: slower than float32, and less precise
        try:
            return OpenVino(
                network,
                plan.channels,
                plan.patch,
                flat=plan.flat,
                bf16=bf16,
                logits=not self._late,
                threads=self._threads,
                cache=self._cache,
            )
        except ImportError:
            dtype = torch.bfloat16 if bf16 else torch.float32
            return Torch(network, self._device, plan.channels, plan.patch, flat=plan.flat, dtype=dtype, compiled=has_compiler())

    def predict(
        self,
        channels: Sequence[NDArray[Any]],
        spacing_mm: Sequence[float],
        on_tile: OnTile,
        step_size: float | None = None,
        precision: Precision = "fast",
        numbers: NDArray[np.unsignedinteger[Any]] | None = None,
        shared: Shared | None = None,
    ) -> NDArray[np.unsignedinteger[Any]]:
        """Segment an image.

        Parameters
        ----------
        channels : sequence of ndarray, shape (z, y, x)
            One per input channel, on one grid.
        spacing_mm : (z, y, x)
            Of that grid; the network works at its own and the labels come back on this one.
        on_tile : callable
            Called several times a second; may raise to stop.
        step_size : float, optional
            Distance of neighbouring tiles as a part of their size; the precision's own by default.
        precision : str
            `exact`, `fast` or `draft`; see `MANNERS`.
        numbers : ndarray of unsigned integers, optional
            What is written for each label of the network; itself by default.
        shared : Shared, optional
            A mask of what matters, and what earlier networks of the same image have made; it is added to.

        Returns
        -------
        ndarray of unsigned integers, shape (z, y, x)

        Raises
        ------
        NotEnoughMemory
            Before anything large is made.
        """
        manner, plan = MANNERS[precision], self.plan
        shared = Shared() if shared is None else shared
        turned = [np.transpose(np.asarray(channel), plan.transpose_forward) for channel in channels]
        spacing = [float(spacing_mm[axis]) for axis in plan.transpose_forward]
        box = nonzero_box(turned)
        cropped = [channel[box] for channel in turned]
        shape, own_spacing = plan.grid(cropped[0].shape, spacing)
        padded, inner = _padding(shape, plan.patch)
        labels_of = np.array(plan.numbers) if numbers is None else numbers[np.array(plan.numbers)]
        written: NDArray[np.unsignedinteger[Any]] = labels_of.astype(np.uint8 if labels_of.max(initial=0) < 256 else np.uint16)
        need = self._need(turned[0].shape, cropped[0].shape, padded, written.itemsize, bf16=manner.bf16)
        check_memory(need, self._device)

        on_tile(0, 0)
        numba.set_num_threads(min(self._threads, numba.config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]
        runtimes = self.runtimes(bf16=manner.bf16)
        image = self._prepared(shared, cropped, shape, plan.image_resampler.rule(spacing, own_spacing), padded, inner)
        labels = np.zeros(np.shape(channels[0]), written.dtype)
        target = Target(
            labels=np.transpose(labels, plan.transpose_forward)[box],
            rule=plan.logit_resampler.rule(own_spacing, spacing),
            numbers=written,
            regions=plan.regions,
            half=manner.half,
        )
        width = self._width * (len(runtimes) if self._late else 1)
        if self._on_device:
            sums: Any = DeviceAccumulator(padded, inner, width, self._head, target, self._device)
        else:
            sums = Accumulator(padded, inner, plan.patch[0], width, self._head, target)
        flips = list(_mirrored(self._mirror_axes if manner.mirroring else (), flat=plan.flat))
        tiles = list(tile_positions(padded, plan.patch, manner.step_size if step_size is None else step_size))
        shared.skipped += len(tiles)
        tiles = self._needed(tiles, shared.within, target, shape, [part.start for part in box], inner)
        shared.skipped -= len(tiles)
        shared.tiles += len(tiles)
        gaussian = importance(plan.patch, flat=plan.flat)
        total, done = len(tiles) * len(flips) * len(runtimes), 0
        share = 1 / len(flips) if self._late else 1 / (len(flips) * len(runtimes))
        batch = runtimes[0].batch
        for group in (tiles[i : i + batch] for i in range(0, len(tiles), batch)):
            sums.finish(group[0][0])  # tiles come in the order of their first slice
            patches = [_cut(image, origin, plan.patch, tensors=self._on_device) for origin in group]
            for number, (fold, flip) in enumerate(itertools.product(range(len(runtimes)), flips)):
                poll = _poll(on_tile, done, total)
                results = runtimes[fold]([_flipped(patch, flip) for patch in patches], poll)
                first = fold * self._width if self._late else 0
                for origin, result in zip(group, results, strict=True):
                    sums.add(result, gaussian, origin, flips=flip, share=share, first_channel=first, count=number == 0)
                done += len(group)
        sums.finish(padded[0])
        if shared.within is not None:
            shared.within.clear_outside(labels)
        on_tile(total, total)
        return labels

    def _needed(
        self,
        tiles: list[tuple[int, int, int]],
        within: Blocks | None,
        target: Target,
        shape: Sequence[int],
        offset: Sequence[int],
        inner: Sequence[slice],
    ) -> list[tuple[int, int, int]]:
        """Leave out tiles on which no voxel of the mask depends."""
        if within is None:
            return tiles
        body = within.transposed(self.plan.transpose_forward)
        along = [cells(shape[i], target.labels.shape[i], target.rule.order_of(i)) for i in range(3)]
        return [origin for origin in tiles if needs(body, along, offset, inner, origin, self.plan.patch)]

    def _prepared(
        self,
        shared: Shared,
        cropped: Sequence[NDArray[Any]],
        shape: Sequence[int],
        rule: Rule,
        padded: Sequence[int],
        inner: Sequence[slice],
    ) -> torch.Tensor:
        """Prepare the image, or take what the network before has prepared in just the same way."""
        plan = self.plan
        key = (plan.normalizations, plan.transpose_forward, tuple(shape), rule, tuple(padded), str(self._device))
        if shared.prepared is None or shared.prepared[0] != key:
            shared.prepared = None  # its memory goes before the next is made
            shared.prepared = (key, self._prepare(cropped, shape, rule, padded, inner))
        return shared.prepared[1]

    def _prepare(
        self,
        cropped: Sequence[NDArray[Any]],
        shape: Sequence[int],
        rule: Rule,
        padded: Sequence[int],
        inner: Sequence[slice],
    ) -> torch.Tensor:
        """Normalise, resample and pad: float32, (channels, z, y, x) on the network's grid."""
        image = torch.zeros((len(cropped), *padded), dtype=torch.float32, device=self._device)
        inside = None
        for index, (channel, scheme) in enumerate(zip(cropped, self.plan.normalizations, strict=True)):
            if scheme.inside_only and inside is None:
                inside = ndimage.binary_fill_holes(np.logical_or.reduce([c != 0 for c in cropped]))
            given, normalize = _normalizer(channel, scheme, inside)
            image[index][tuple(inner)] = resample(given, shape, rule, normalize, self._device)
        return image

    def _need(
        self, shape: Sequence[int], cropped: Sequence[int], padded: Sequence[int], label_bytes: int, *, bf16: bool
    ) -> Need:
        plan, late = self.plan, self._late
        width = self._width * (len(self._networks) if late else 1)
        plane = int(np.prod(padded[1:]))
        middle = cropped[0] * plane * 4
        ring = min(plan.patch[0], padded[0]) * plane * (width + 1) * 4
        slices = plane * (2 * plan.classes + width + 2) * 4
        if self._on_device:  # all sums at once; and what a slab of the image's slices is interpolated through
            ring = padded[0] * plane * (width + 1) * 4
            slices = int(np.prod(cropped[1:])) * (3 * width + 2 * plan.classes) * 4
        first = next((p.shape[0] for p in self._networks[0].parameters() if p.ndim > 1), 32)
        # Measured with OpenVINO: 0.5 GB for 128³ with 32 channels in bfloat16.
        activations = 4 * int(np.prod(plan.patch)) * first * (2 if bf16 else 4)
        if self._on_device:
            activations *= max(1, min(_MOST_TILES, _BATCHED_VOXELS // int(np.prod(plan.patch))))
        weights = sum(p.numel() for p in self._networks[0].parameters()) * 4 * len(self._networks)
        image = int(np.prod(padded)) * 4 * plan.channels
        labels = 2 * int(np.prod(shape)) * label_bytes
        return Need(image=image + max(middle, 0), sums=ring + slices, network=activations + weights, labels=labels)


def nonzero_box(channels: Sequence[NDArray[Any]]) -> tuple[slice, slice, slice]:
    """Return the smallest box outside of which all channels are zero; everything where all of it is.

    Only the planes outside the box and the first inside are read: on CT, whose air is not zero, six planes.
    """
    shape, bounds = channels[0].shape, []
    for axis, length in enumerate(shape):

        def empty(index: int, axis: int = axis) -> bool:
            return not any(np.moveaxis(channel, axis, 0)[index].any() for channel in channels)

        low = next((i for i in range(length) if not empty(i)), None)
        if low is None:
            return slice(0, shape[0]), slice(0, shape[1]), slice(0, shape[2])
        high = next(i for i in range(length - 1, -1, -1) if not empty(i))
        bounds.append(slice(low, high + 1))
    return bounds[0], bounds[1], bounds[2]


def tile_positions(shape: Sequence[int], patch: Sequence[int], step_size: float) -> Iterator[tuple[int, int, int]]:
    """Yield nnU-Net's tile positions: as few as cover the shape with at most `step_size · patch` between them, evenly spread.

    They come in the order of their first axis, so that what lies before a tile's first slice is not touched any more.

    Parameters
    ----------
    shape, patch : (z, y, x)
        The shape is at least the patch.
    step_size : float
        Of the patch's size.
    """
    along = []
    for length, window in zip(shape, patch, strict=True):
        count = int(np.ceil((length - window) / (window * step_size))) + 1
        gap = (length - window) / (count - 1) if count > 1 else 0
        along.append([int(np.round(gap * i)) for i in range(count)])
    yield from itertools.product(along[0], along[1], along[2])


def importance(patch: Sequence[int], *, flat: bool) -> NDArray[np.float32]:
    """Return nnU-Net's weights of a tile's voxels: a Gaussian of an eighth of the tile, in float16's steps."""
    window = tuple(patch[1:]) if flat else tuple(patch)
    point = np.zeros(window)
    point[tuple(n // 2 for n in window)] = 1
    weights = ndimage.gaussian_filter(point, [n / 8 for n in window], 0, mode="constant", cval=0)
    halves = (weights * (10 / weights.max())).astype(np.float16)
    halves[halves == 0] = halves[halves > 0].min()
    result: NDArray[np.float32] = halves.astype(np.float32).reshape(tuple(patch))
    return result


def _features(network: torch.nn.Module) -> int | None:
    """Return the width of the last layer's input, None where that layer is not linear at each voxel."""
    last = last_layer(network)
    return None if last is None else int(last.in_channels)


def _padding(shape: Sequence[int], patch: Sequence[int]) -> tuple[tuple[int, int, int], tuple[slice, slice, slice]]:
    """Return (shape, where the image lies in it) after padding to at least the patch, the same on both sides."""
    sizes = [max(n, p) for n, p in zip(shape, patch, strict=True)]
    below = [(size - n) // 2 for size, n in zip(sizes, shape, strict=True)]
    inner = [slice(b, b + n) for b, n in zip(below, shape, strict=True)]
    return (sizes[0], sizes[1], sizes[2]), (inner[0], inner[1], inner[2])


def _mirrored(axes: Sequence[int], *, flat: bool) -> Iterator[tuple[bool, bool, bool]]:
    """Yield every combination of mirrored axes, none first."""
    own = [axis + flat for axis in axes]
    for count in range(len(own) + 1):
        for chosen in itertools.combinations(own, count):
            yield (0 in chosen, 1 in chosen, 2 in chosen)


def _cut(image: torch.Tensor, origin: Sequence[int], patch: Sequence[int], *, tensors: bool) -> Any:
    part = image[:, *(slice(o, o + n) for o, n in zip(origin, patch, strict=True))]
    return part if tensors else part.numpy()


def _flipped(patch: Any, flip: Sequence[bool]) -> Any:
    axes = [axis + 1 for axis, turned in enumerate(flip) if turned]
    if isinstance(patch, torch.Tensor):
        return torch.flip(patch, axes) if axes else patch
    return np.ascontiguousarray(np.flip(patch, tuple(axes)) if axes else patch)


def _poll(on_tile: OnTile, done: int, total: int) -> Poll:
    on_tile(done, total)
    return lambda: on_tile(done, total)


def _normalizer(
    channel: NDArray[Any], scheme: Normalization, inside: NDArray[np.bool_] | None
) -> tuple[NDArray[Any], Callable[[torch.Tensor], torch.Tensor]]:
    """Return (image, what is still to be done to its slabs)."""
    if scheme.scheme == "CTNormalization":
        lower, upper, mean, std = scheme.lower, scheme.upper, scheme.mean, max(scheme.std, 1e-8)
        return channel, lambda slab: slab.clamp_(lower, upper).sub_(mean).div_(std)
    if scheme.scheme == "NoNormalization":
        return channel, lambda slab: slab
    whole = np.array(channel, dtype=np.float32)
    if scheme.inside_only and inside is not None:
        whole[inside] = normalize_whole(whole[inside], scheme)
    else:
        normalize_whole(whole, scheme)
    return whole, lambda slab: slab


__all__ = ["MANNERS", "Network", "Plan", "Precision", "Shared"]
