"""From volumes to a label map with a model: grids, orientations, label numbers and what is to be said about the result."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import SimpleITK as sitk
import torch
from numpy.typing import NDArray

from deployments.nnunet.body import body_blocks, union
from deployments.nnunet.memory import NotEnoughMemory
from deployments.nnunet.predictor import Network, Precision, Shared
from deployments.nnunet.weights import read_network_folder
from scangraph import metrics
from scangraph.contracts import LabelMap, Volume, label_number, label_table, lookup_table
from scangraph.contracts.errors import InvalidModel, InvalidParameters, OutOfMemory, TooLargeForMemory, WrongGrid
from scangraph.memory import free_memory
from scangraph.models import Model, ModelManifest, choose_model, verify_files

#: Below this part of common space two phases cannot be of one region.
_LEAST_OVERLAP = 0.5
_AIR_HU = -1024
_DEPLOYMENT = "nnunet"
#: With less free memory than this the least recently used models go.
_LEAST_FREE = 2 * 2**30
#: Median HU inside the found structure under which the image is unlikely to be of its phase, per (input, label name).
_ENHANCEMENT_HU = {("image_A", "artery"): 150, ("image_P", "vein"): 90, ("image_D", "ureter"): 150}

OnProgress = Callable[[int, int, str], None]


class ModelStore:
    """Loads models when they are first asked for and keeps the last few.

    Parameters
    ----------
    folders : sequence of Path
        Where models are looked for at every request, so that a swapped folder is noticed without a restart.
    device : torch.device
        Where the networks go.
    held : int
        How many models are kept; fewer where memory is short.
    threads : int
        Of the processor, for one prediction; 0 for torch's setting.
    cache : Path or None
        Folder in which converted networks are kept.
    """

    def __init__(
        self, folders: Sequence[Path], device: torch.device, held: int, threads: int = 0, cache: Path | None = None
    ) -> None:
        self._folders, self._device, self._held = tuple(folders), device, held
        self._threads, self._cache = threads, cache
        self._loaded: OrderedDict[str, list[Network]] = OrderedDict()

    def get(self, task: str, model_id: str | None) -> tuple[Model, list[Network], bool]:
        """Return (model, its networks, whether they had to be loaded).

        Raises
        ------
        ModelNotFound, InvalidModel
            If there is none, or it cannot be trusted.
        """
        try:
            return self._get(task, model_id)
        except InvalidModel:
            # Race: a folder that is exchanged while it is read is of two versions. The second look sees the new one.
            return self._get(task, model_id)

    def _get(self, task: str, model_id: str | None) -> tuple[Model, list[Network], bool]:
        model = choose_model(self._folders, task, model_id)
        fresh = model.digest not in self._loaded
        if fresh:
            verify_files(model)
            while len(self._loaded) >= self._held or (self._loaded and free_memory() < _LEAST_FREE):
                self._loaded.popitem(last=False)
                metrics.MODEL_EVICTIONS.add(deployment=_DEPLOYMENT)
            self._loaded[model.digest] = [self._load(model, i) for i in range(len(model.manifest.networks))]
        self._loaded.move_to_end(model.digest)
        (metrics.MODEL_LOADS if fresh else metrics.MODEL_HITS).add(deployment=_DEPLOYMENT)
        self.tell()
        return model, self._loaded[model.digest], fresh

    def tell(self) -> None:
        """Report how much is held; from any thread, while another one loads."""
        held = list(self._loaded.values())
        metrics.MODELS_HELD.set(len(held), deployment=_DEPLOYMENT)
        stored = sum(network.weight_bytes for networks in held for network in networks)
        metrics.MODELS_HELD_BYTES.set(stored, deployment=_DEPLOYMENT)

    @property
    def held(self) -> list[str]:
        """SHA-256 of the models in memory, the least recently used first."""
        return list(self._loaded)

    def _load(self, model: Model, index: int) -> Network:
        entry = model.manifest.networks[index]
        folder = read_network_folder(model.folder / entry.folder, entry.folds)
        network = Network(folder, self._device, mirroring=model.manifest.mirroring, threads=self._threads, cache=self._cache)
        if network.channels != len(model.manifest.inputs):
            reason = f"{entry.folder} takes {network.channels} channels, the manifest names {len(model.manifest.inputs)} inputs"
            raise InvalidModel(folder=str(model.folder), reason=reason)
        return network


@dataclass(frozen=True)
class Guide:
    """A coarser model that shows where to look.

    Parameters
    ----------
    model : Model
        Which one.
    networks : sequence of Network
        Its networks.
    structures : tuple of int
        What it looks for.
    margin_mm : float
        How far their box is grown, to each side.
    """

    model: Model
    networks: Sequence[Network]
    structures: tuple[int, ...]
    margin_mm: float


class Segmentation(NamedTuple):
    """A mask on exactly the first input's grid, what is to be said about it, and how it was made."""

    mask: LabelMap
    warnings: list[str]
    facts: dict[str, Any]


def segment(
    inputs: Mapping[str, Volume],
    model: Model,
    networks: Sequence[Network],
    *,
    on_progress: OnProgress,
    step_size: float | None = None,
    precision: Precision = "fast",
    structures: Sequence[int] | None = None,
    skip_air: bool = False,
    guide: Guide | None = None,
) -> Segmentation:
    """Segment an image, or several of one patient, with a model.

    Parameters
    ----------
    inputs : mapping
        Volumes by the names of the model's inputs. The result lies on the grid of the first one.
    model : Model
        Which one.
    networks : sequence of Network
        Its networks, in the manifest's order.
    on_progress : callable
        Called as `on_progress(done, total, message)`.
    step_size : float, optional
        Distance of neighbouring tiles as a part of their size; the precision's own by default.
    precision : str
        `exact`, `fast` or `draft`.
    structures : sequence of int, optional
        Label numbers that are wanted; networks that have none of them are not computed.
    skip_air : bool
        Of CT only: what is outside of the body is background, and tiles without any of it are not computed (`body.py`).
    guide : Guide, optional
        Segment only the box around what it finds.

    Returns
    -------
    Segmentation
        Its facts are `tiles`, `tiles_skipped` and, with a guide, `roi`: the model, and the box in voxels (z, y, x) of the first
        input, None where nothing was found.

    Raises
    ------
    InvalidParameters
        If an input of the model is missing or has channels, or a wanted structure is none of the model's.
    WrongGrid
        If the images hardly overlap.
    TooLargeForMemory, OutOfMemory
        If the device has too little: before it begins, or on the way.
    """
    manifest = model.manifest
    names = [entry.name for entry in manifest.inputs]
    for name in names:
        if name not in inputs:
            raise InvalidParameters(component=manifest.task, detail=f"model {manifest.id} needs the input {name!r}")
        if inputs[name].array.ndim != 3:
            raise InvalidParameters(component=manifest.task, detail=f"{name} has channels; expected one CT")
    wanted = set(manifest.labels if structures is None else structures)
    if unknown := sorted(wanted - set(manifest.labels)):
        has = ", ".join(map(str, manifest.labels))
        raise InvalidParameters(
            component=manifest.task, detail=f"model {manifest.id} has no structures {unknown}; it has {has}"
        )
    first = inputs[names[0]]
    warnings = [*model.warnings, *_input_warnings(inputs, manifest)]
    facts: dict[str, Any] = {}
    on_progress(0, 0, "preparing")
    aligned = [first, *(onto_grid(inputs[e.name], first, e.name, names[0], _outside(e.modality)) for e in manifest.inputs[1:])]
    box = None
    if guide is not None:
        box = _region(dict(zip(names, aligned, strict=True)), guide, networks, manifest.orientation, on_progress)
        facts["roi"] = {"model": guide.model.describe(), "structures": list(guide.structures), "margin_mm": guide.margin_mm}
        facts["roi"]["box"] = None if box is None else [[part.start, part.stop] for part in box]
        if box is None:
            found = f"{guide.model.manifest.id} found nothing that shows where to look"
            warnings.append(f"roi: {found}, so the whole image was segmented.")
    turned = [(_crop(volume, box) if box else volume).reoriented(manifest.orientation) for volume in aligned]

    merged: NDArray[np.unsignedinteger] | None = None
    needed = [
        (network, {own: number for own, number in entry.labels.items() if number in wanted})
        for entry, network in zip(manifest.networks, networks, strict=True)
        if wanted & set(entry.labels.values())
    ]
    shared = Shared()
    if skip_air and all(entry.modality == "CT" for entry in manifest.inputs):
        shared.within = union([body_blocks(volume.array, volume.spacing_mm) for volume in turned])
    for index, (network, kept) in enumerate(needed):
        message = f"{manifest.id}, network {index + 1} of {len(needed)}" if len(needed) > 1 else manifest.id

        def on_tile(done: int, total: int, index: int = index, message: str = message) -> None:
            on_progress(index * total + done, len(needed) * total, message)

        shape = "×".join(map(str, turned[0].shape))
        numbers = lookup_table(kept, max(network.plan.numbers) + 1)
        before = shared.tiles - shared.skipped
        arrays, spacing_mm = [volume.array for volume in turned], turned[0].spacing_mm
        try:
            own = network.predict(arrays, spacing_mm, on_tile, step_size, precision=precision, numbers=numbers, shared=shared)
        except NotEnoughMemory as error:
            raise TooLargeForMemory(
                component=manifest.task, device=error.device, needed_mb=error.needed_mb, free_mb=error.free_mb, shape=shape
            ) from None
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            raise OutOfMemory(component=manifest.task, device="GPU", shape=shape) from None
        metrics.TILES.add(shared.tiles - shared.skipped - before, component=manifest.task)
        if merged is None:
            merged = own
        else:
            merged = merged.astype(np.promote_types(merged.dtype, own.dtype), copy=False)
            np.copyto(merged, own, where=own != 0)
    facts |= {"tiles": shared.tiles, "tiles_skipped": shared.skipped}
    if merged is None:  # nothing was wanted
        merged = np.zeros(turned[0].shape, np.uint8)
    labels = tuple(number for number in manifest.labels if number in wanted)
    result = LabelMap(merged, turned[0].spacing_mm, turned[0].origin_mm, turned[0].direction, labels)
    # Turning back only flips and permutes; the input's own geometry is then put in its place to the last bit.
    array = np.ascontiguousarray(result.reoriented(first.axcodes).array)
    if box is not None:
        warnings += _cut_warnings(array, box, first.shape)
        whole = np.zeros(first.shape, array.dtype)
        whole[box] = array
        array = whole
    mask = LabelMap(array, first.spacing_mm, first.origin_mm, first.direction, labels)
    warnings += _result_warnings(mask, dict(zip(names, aligned, strict=True)))
    return Segmentation(mask, warnings, facts)


Box = tuple[slice, slice, slice]


def _region(
    inputs: Mapping[str, Volume], guide: Guide, networks: Sequence[Network], orientation: str, on_progress: OnProgress
) -> Box | None:
    """Return the box around what a coarser model finds in a draft, grown by its margin; None where it finds nothing.

    It is at least as large as a tile of the networks that will look there, where the image is: the tile costs the same, and its
    borders are of the image instead of zeros.
    """
    coarse = guide.model.manifest
    names = [entry.name for entry in coarse.inputs]
    first = next(iter(inputs.values()))
    given = {names[0]: first} if len(names) == 1 else {name: inputs[name] for name in names}
    message = f"{coarse.id} looks for the region"
    found = segment(
        given,
        guide.model,
        guide.networks,
        on_progress=lambda done, total, _: on_progress(0, 0, f"{message}, {done} of {total}" if total else message),
        precision="draft",
        structures=guide.structures,
        skip_air=True,
    ).mask.array
    turned = first.reoriented(orientation)
    tiles = [network.tile_voxels(turned.spacing_mm) for network in networks]
    # The first input's array axis that each axis of the turned image is.
    world = [axis for code in turned.axcodes[::-1] for axis, own in enumerate(first.axcodes[::-1]) if _same_axis(code, own)]
    sides = []
    for axis in range(3):
        there = np.flatnonzero(found.any(tuple(other for other in range(3) if other != axis)))
        if there.size == 0:
            return None
        margin = math.ceil(guide.margin_mm / first.spacing_mm[axis])
        least = max(tile[world.index(axis)] for tile in tiles)
        sides.append(_side(int(there[0]) - margin, int(there[-1]) + 1 + margin, least, first.shape[axis]))
    return sides[0], sides[1], sides[2]


def _same_axis(one: str, other: str) -> bool:
    return any({one, other} <= set(pair) for pair in ("LR", "PA", "SI"))


def _side(low: int, high: int, least: int, length: int) -> slice:
    """Cut an interval to 0…`length`, and grow it to at least `least`, where there is room."""
    low, high = max(0, low), min(length, high)
    size = max(high - low, min(least, length))
    low = min(max(0, low - (size - (high - low)) // 2), length - size)
    return slice(low, low + size)


def _crop(volume: Volume, box: Box) -> Volume:
    """Return a part of a volume, at the same place in the world; a view of the same memory."""
    origin = volume.index_to_world([part.start for part in box])
    return Volume(volume.array[box], volume.spacing_mm, (origin[0], origin[1], origin[2]), volume.direction)


def _cut_warnings(array: NDArray[np.unsignedinteger], box: Box, shape: Sequence[int]) -> list[str]:
    """Say what touches a side of the box beyond which there is more of the image."""
    cut: set[int] = set()
    for axis, (part, length) in enumerate(zip(box, shape, strict=True)):
        for inside, plane in ((part.start > 0, 0), (part.stop < length, -1)):
            if inside:
                cut |= set(np.unique(np.moveaxis(array, axis, 0)[plane]).tolist()) - {0}
    if not cut:
        return []
    numbers = ", ".join(map(str, sorted(cut)))
    return [f"roi: structures {numbers} reach the side of the region and may go on outside of it; try without roi."]


def onto_grid(moving: Volume, fixed: Volume, moving_name: str, fixed_name: str, outside: float = _AIR_HU) -> Volume:
    """Resample a volume onto another one's grid by their geometries (linear; `outside` where there is nothing).

    Raises
    ------
    WrongGrid
        If less than half of `fixed` lies inside `moving`.
    """
    if moving.same_grid(fixed):
        return moving
    overlap = fixed.overlap_fraction(moving)
    if overlap < _LEAST_OVERLAP:
        raise WrongGrid(
            first=fixed_name,
            second=moving_name,
            overlap_percent=100 * overlap,
            first_extent=_extent(fixed),
            second_extent=_extent(moving),
        )
    image = sitk.GetImageFromArray(np.asarray(moving.array, dtype=np.float32))
    image.SetSpacing(moving.spacing_mm[::-1])
    image.SetOrigin(moving.origin_mm)
    image.SetDirection(tuple(c for row in moving.direction for c in row))
    resampler = sitk.ResampleImageFilter()
    resampler.SetSize([int(n) for n in fixed.shape[::-1]])
    resampler.SetOutputSpacing(fixed.spacing_mm[::-1])
    resampler.SetOutputOrigin(fixed.origin_mm)
    resampler.SetOutputDirection(tuple(c for row in fixed.direction for c in row))
    resampler.SetInterpolator(sitk.sitkLinear)
    resampler.SetDefaultPixelValue(outside)
    return fixed.with_array(sitk.GetArrayViewFromImage(resampler.Execute(image)).copy())


def _outside(modality: str) -> float:
    return _AIR_HU if modality == "CT" else 0


def _extent(volume: Volume) -> str:
    low, high = volume.extent_mm()
    return " × ".join(f"{a:.0f}…{b:.0f}" for a, b in zip(low, high, strict=True))


def _input_warnings(inputs: Mapping[str, Volume], manifest: ModelManifest) -> list[str]:
    """Say which declared limits the inputs break without being refused."""
    found, task = [], manifest.task
    names = [entry.name for entry in manifest.inputs]
    first = inputs[names[0]]
    if task == "inference/totalseg" and min(first.spacing_mm) < 1:
        found.append(f"The image is finer than 1 mm ({_spacing(first)} mm); this gives no better result, only a longer wait.")
    if max(first.spacing_mm) > 6:
        found.append(f"The slices are {max(first.spacing_mm):g} mm apart: thin structures between them are lost.")
    for i, name in enumerate(names):
        for other in names[i + 1 :]:
            same = inputs[name].shape == inputs[other].shape and np.array_equal(inputs[name].array, inputs[other].array)
            if same:
                found.append(f"{name} and {other} are the same image; this model was made for two different contrast phases.")
    for name in (entry.name for entry in manifest.inputs if entry.modality == "CT"):
        sample = inputs[name].array[:: max(1, inputs[name].shape[0] // 16)]
        if sample.min() >= 0 or sample.max() < 100:
            found.append(f"{name} does not look like CT in Hounsfield units (values {sample.min():g} to {sample.max():g}).")
    return found


def _result_warnings(mask: LabelMap, images: Mapping[str, Volume]) -> list[str]:
    """Say what the result itself shows: nothing found, or contrast that does not fit the declared phase."""
    counts = mask.counts()
    if not counts:
        return ["Nothing was found."]
    found = []
    for (name, structure), least in _ENHANCEMENT_HU.items():
        number = label_number(structure)
        if name in images and number in counts:
            median = float(np.median(images[name].array[mask.array == number]))
            if median < least:
                title = label_table()[number].title
                found.append(
                    f"The {title}s have {median:.0f} HU on {name}, less than the {least} expected in its contrast phase: "
                    "check that the right series was sent."
                )
    return found


def _spacing(volume: Volume) -> str:
    return "×".join(f"{s:.2f}" for s in volume.spacing_mm)


def pick_device(num_gpus: float) -> torch.device:
    """Return the GPU where a share of one was reserved and one is there, else the CPU."""
    if num_gpus > 0 and torch.cuda.is_available():
        # Ray's fractions are bookkeeping only: without this cap a replica may take its neighbours' memory.
        torch.cuda.set_per_process_memory_fraction(min(1.0, num_gpus), 0)
        return torch.device("cuda", 0)
    return torch.device("cpu")


def pick_threads(wanted: int, cores: int) -> int:
    """Return the threads to use: the setting, or every core. Ray sets OMP_NUM_THREADS to the CPUs a replica reserves."""
    return wanted or max(1, math.floor(cores))
