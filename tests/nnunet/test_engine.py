"""The engine against nnU-Net's own predictor and its resampling, and its parts against plain numpy."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.inference.sliding_window_prediction import compute_gaussian, compute_steps_for_sliding_window
from nnunetv2.preprocessing.cropping.cropping import crop_to_nonzero
from nnunetv2.preprocessing.resampling.default_resampling import resample_data_or_seg_to_shape
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from numpy.typing import NDArray
from scipy import ndimage

from deployments.nnunet import kernels
from deployments.nnunet.accumulate import Accumulator, DeviceAccumulator, Head, Target, compile_kernels
from deployments.nnunet.body import Blocks, needs
from deployments.nnunet.memory import NotEnoughMemory
from deployments.nnunet.plan import build_network, read_plan
from deployments.nnunet.predictor import Network, Precision, Shared, importance, nonzero_box, tile_positions
from deployments.nnunet.resampling import Rule, cells, resample, spline_matrix
from deployments.nnunet.runtimes import OpenVino, Torch, complete_state, has_compiler, has_fast_bf16
from deployments.nnunet.weights import NetworkFolder, read_network_folder
from scangraph.contracts.errors import InvalidModel
from scangraph.memory import free_memory
from tests.conftest import ROOT
from tests.nnunet.folders import ORGANS, flat_folder, results_folder

CPU = torch.device("cpu")
SHAPES = [((9, 20, 31), (9, 20, 31)), ((9, 20, 31), (14, 13, 40)), ((24, 7, 5), (3, 21, 5)), ((1, 8, 8), (3, 5, 9))]
Image = NDArray[np.float32]


def same(slab: torch.Tensor) -> torch.Tensor:
    return slab


def smooth(shape: Sequence[int], seed: int = 0, sigma: float = 2) -> Image:
    noise = np.random.default_rng(seed).normal(0, 1, shape)
    blurred: Image = ndimage.gaussian_filter(noise, [0] * (len(shape) - 3) + [sigma] * 3).astype(np.float32)
    return blurred / np.float32(blurred.std() or 1)


# --- before the network ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "wanted"), SHAPES)
@pytest.mark.parametrize("order", [0, 1, 3])
def test_images_are_resampled_as_skimage_does(shape: tuple[int, ...], wanted: tuple[int, ...], order: int) -> None:
    image = smooth(shape, sigma=0.7)
    expected = resample_data_or_seg_to_shape(image[None], wanted, (1, 1, 1), (1, 1, 1), order=order)[0]
    found = resample(image, wanted, Rule(order), same, CPU).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("order_z", [0, 1])
def test_thick_slices_are_resampled_by_themselves(axis: int, order_z: int) -> None:
    image = smooth((11, 12, 13), sigma=0.7)
    spacing = [1.0, 1.0, 1.0]
    spacing[axis] = 5
    wanted = (7, 17, 20)
    expected = resample_data_or_seg_to_shape(
        image[None], wanted, spacing, (1, 1, 1), order=3, order_z=order_z, force_separate_z=None
    )[0]
    found = resample(image, wanted, Rule(3, axis, order_z), same, CPU).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_matrices_of_splines() -> None:
    for source, target, order in itertools.product((1, 5, 40), (1, 7, 33), (0, 1, 3)):
        matrix = spline_matrix(source, target, order)
        assert matrix.shape == (target, source)
        np.testing.assert_allclose(matrix.sum(1), 1, atol=1e-5)  # what is constant stays so
    for source, target in itertools.product((1, 2, 9), (1, 4, 9, 30)):
        low, high, weight = cells(source, target, 1)
        rebuilt = np.zeros((target, source))
        np.add.at(rebuilt, (np.arange(target), low), 1 - weight)
        np.add.at(rebuilt, (np.arange(target), high), weight)
        np.testing.assert_allclose(rebuilt, spline_matrix(source, target, 1), atol=1e-6)


def test_the_box_of_what_is_not_zero() -> None:
    rng = np.random.default_rng(5)
    for _ in range(20):
        image = np.zeros((2, 12, 9, 10), np.int16)
        low = rng.integers(0, 5, 3)
        high = low + rng.integers(1, 5, 3)
        part = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
        image[0][part] = rng.integers(0, 3, high - low)
        image[1][part] = rng.integers(0, 3, high - low)
        if not image.any():
            continue
        _, _, expected = crop_to_nonzero(image)
        assert [[part.start, part.stop] for part in nonzero_box(list(image))] == [list(map(int, b)) for b in expected]
    assert nonzero_box([np.zeros((3, 4, 5))]) == (slice(0, 3), slice(0, 4), slice(0, 5))


@pytest.mark.parametrize("step_size", [0.25, 0.5, 0.8, 1.0])
def test_tiles_lie_where_nnunet_puts_them(step_size: float) -> None:
    for shape in ((16, 16, 16), (17, 40, 33), (90, 16, 25)):
        expected = list(itertools.product(*compute_steps_for_sliding_window(shape, (16, 16, 16), step_size)))
        tiles = list(tile_positions(shape, (16, 16, 16), step_size))
        assert tiles == expected
        assert [origin[0] for origin in tiles] == sorted(origin[0] for origin in tiles)  # a slice is done once the next begins


@pytest.mark.parametrize("patch", [(16, 16, 16), (12, 20, 33)])
def test_importance_is_nnunets(patch: tuple[int, int, int]) -> None:
    expected = compute_gaussian(patch, sigma_scale=1 / 8, value_scaling_factor=10, device=CPU).float().numpy()
    assert np.array_equal(importance(patch, flat=False), expected)


# --- after the network -------------------------------------------------------------------------------------------------------


def label_slowly(logits: Image, shape: Sequence[int], rule: Rule, *, regions: bool, half: bool) -> NDArray[np.int64]:
    """What nnU-Net does: resample every channel, then decide."""
    if half:
        logits = logits.astype(np.float16).astype(np.float32)
    full = np.stack([resample(channel, shape, rule, same, CPU).numpy().astype(np.float64) for channel in logits])
    if half:
        full = full.astype(np.float16).astype(np.float64)
    if not regions:
        codes: NDArray[np.int64] = full.argmax(0)
        return codes
    codes = np.zeros(full.shape[1:], np.int64)
    for i, channel in enumerate(full):
        codes[channel > 0] = i + 1
    return codes


@pytest.mark.parametrize("kind", ["rings", "device"])
@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(
    ("shape", "rule"),
    [
        ((20, 40, 37), Rule(1)),
        ((33, 14, 20), Rule(1)),
        ((11, 26, 7), Rule(1)),
        ((20, 26, 19), Rule(1, 0)),
        ((9, 9, 40), Rule(1, 2)),
    ],
)
def test_labels_are_those_of_resampled_logits(kind: str, regions: bool, half: bool, shape: Any, rule: Rule) -> None:
    """One tile over everything: what is exported is what interpolating all channels gives."""
    own, classes = (11, 14, 19), 6
    logits = 4 * smooth((classes, *own), seed=2)
    labels = np.zeros(shape, np.uint8)
    target = Target(labels, rule, np.arange(classes + 1, dtype=np.uint8), regions, half)
    whole = [slice(0, n) for n in own]
    sums: Any = (
        Accumulator(own, whole, own[0], classes, None, target)
        if kind == "rings"
        else DeviceAccumulator(own, whole, classes, None, target, CPU)
    )
    tile = np.ascontiguousarray(np.moveaxis(logits, 0, -1))
    sums.add(tile if kind == "rings" else torch.from_numpy(tile), np.ones(own, np.float32), (0, 0, 0))
    for until in (4, 5, own[0]):
        sums.finish(until)
    expected = label_slowly(logits, shape, rule, regions=regions, half=half)
    assert expected.max() > 2
    # Interpolated in another order of additions: a voxel on the very border may fall to the other side.
    assert np.mean(labels != expected) <= (3e-4 if half and kind == "device" else 1e-4)


@pytest.mark.parametrize("kind", ["rings", "bits", "device"])
@pytest.mark.parametrize("late", [False, True])
def test_tiles_add_up_to_their_weighted_mean(kind: str, late: bool) -> None:
    """Overlapping and mirrored tiles, padding, and the last layer before or after: numpy in float64 says the same."""
    rng = np.random.default_rng(8)
    shape, patch, inner = (20, 17, 16), (8, 8, 8), (slice(1, 19), slice(0, 17), slice(2, 14))
    channels, classes = (3, 5) if late else (5, 5)
    head = Head(torch.randn(classes, channels), torch.randn(classes)) if late else None
    gaussian = importance(patch, flat=False)
    labels = np.zeros([part.stop - part.start for part in inner], np.uint8)
    target = Target(labels, Rule(1), np.arange(classes, dtype=np.uint8), False, False)
    sums: Any = (
        DeviceAccumulator(shape, inner, channels, head, target, CPU)
        if kind == "device"
        else Accumulator(shape, inner, patch[0], channels, head, target)
    )
    total, weights = np.zeros((*shape, channels)), np.zeros(shape)
    for origin in tile_positions(shape, patch, 0.5):
        where = tuple(slice(o, o + n) for o, n in zip(origin, patch, strict=True))
        sums.finish(origin[0])
        for number, flips in enumerate([(False, False, False), (True, False, True)]):
            values = rng.normal(0, 3, (*patch, channels)).astype(np.float32)
            given: Any = values
            if kind == "bits":
                given = (values.view(np.uint32) >> 16).astype(np.uint16)
                values = (given.astype(np.uint32) << 16).view(np.float32)
            elif kind == "device":
                given = torch.from_numpy(values)
            sums.add(given, gaussian, origin, flips=flips, share=0.5, count=number == 0)
            total[where] += np.flip(values, tuple(i for i in range(3) if flips[i])) * gaussian[..., None] / 2
            weights[where] += gaussian * (number == 0)
    sums.finish(shape[0])
    mean = (total / weights[..., None])[inner]
    if head is not None:
        mean = mean @ head.weight.numpy().T.astype(float) + head.bias.numpy()
    assert np.mean(labels != mean.argmax(-1)) <= 1e-3


# --- the whole ---------------------------------------------------------------------------------------------------------------


class SinglePrecision(nnUNetPredictor):  # type: ignore[misc]
    """nnU-Net's predictor, adding up in float32.

    Its own sums are float16. Towards a tile's corners the Gaussian is 6e-8, the smallest float16 there is, so at the image's
    corners nnU-Net's logits are rounded to whole numbers; that is nothing to be equal to.
    """

    def _internal_predict_sliding_window_return_logits(
        self, data: torch.Tensor, slicers: Sequence[Any], do_on_device: bool = True
    ) -> torch.Tensor:
        logits = torch.zeros((self.label_manager.num_segmentation_heads, *data.shape[1:]))
        weights = torch.zeros(data.shape[1:])
        gaussian = compute_gaussian(tuple(self.configuration_manager.patch_size), value_scaling_factor=10, device=CPU).float()
        for tile in slicers:
            logits[tile] += self._internal_maybe_mirror_and_predict(data[tile][None].contiguous())[0] * gaussian
            weights[tile[1:]] += gaussian
        return logits / weights


def nnunets_own(
    folder: NetworkFolder, image: Image, spacing_mm: Sequence[float], *, mirroring: bool
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Labels and probabilities of nnU-Net's predictor."""
    plans, network = PlansManager(folder.plans), build_network(folder)
    weights = [complete_state(network, fold) for fold in folder.parameters]
    peer = SinglePrecision(use_mirroring=mirroring, perform_everything_on_device=False, device=CPU, allow_tqdm=False)
    chosen = plans.get_configuration(folder.configuration)
    axes = folder.mirror_axes
    peer.manual_initialization(network, plans, chosen, weights, folder.dataset, folder.trainer, axes)
    labels, probabilities = peer.predict_single_npy_array(
        image.copy(), {"spacing": list(spacing_mm)}, save_or_return_probabilities=True
    )
    return labels, probabilities


def undecided(probabilities: NDArray[Any], *, regions: bool, by: float) -> NDArray[np.bool_]:
    """Where the answer hangs on rounding: the two likeliest classes, or a region and its absence, are nearly as likely."""
    if regions:
        close: NDArray[np.bool_] = np.any(np.abs(probabilities - 0.5) < by / 4, 0)
        return close
    first, second = -np.sort(-probabilities, 0)[:2]
    nearly: NDArray[np.bool_] = second > first * (1 - by)
    return nearly


MANY = {"background": 0, **{f"part {n}": n for n in range(1, 14)}}
REGIONS = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "rim": 3}
CASES: dict[str, dict[str, Any]] = {
    "resampled": {},
    "finer": {"spacing": (0.8, 0.8, 0.9)},
    "as it is": {"spacing": (1.5, 1.0, 1.0)},
    "thick slices in the plans": {"spacing": (6.0, 1.2, 1.2)},
    "more classes than features": {"labels": MANY},
    "folds": {"folds": ("0", "1")},
    "folds of many classes": {"labels": MANY, "folds": ("0", "1")},
    "regions": {"labels": REGIONS, "order": (1, 2, 3)},
    "mirrored": {"mirroring": True},
    "mirrored folds of many classes": {"labels": MANY, "mirroring": True, "folds": ("0", "1")},
    "two channels, one normalised inside": {
        "channels": ("CT", "MR"),
        "normalization_schemes": ["RescaleTo01Normalization", "ZScoreNormalization"],
        "use_mask_for_norm": [False, True],
    },
    "transposed": {"transpose_forward": [2, 0, 1], "transpose_backward": [1, 2, 0]},
    "smaller than the patch": {"shape": (9, 30, 12)},
}


def folder_of(case: dict[str, Any], tmp_path: Path) -> NetworkFolder:
    case = {key: value for key, value in case.items() if key not in {"mirroring", "shape"}}
    transposed: dict[str, Any] = {key: case.pop(key) for key in ("transpose_forward", "transpose_backward") if key in case}
    folder = results_folder(tmp_path, **{"labels": ORGANS, "spacing": (2.2, 1.4, 1.4), **case})
    read = read_network_folder(folder, case.get("folds", ("0",)))
    read.plans.update(transposed)
    return read


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_labels_equal_nnunets(case: dict[str, Any], tmp_path: Path) -> None:
    folder, mirroring = folder_of(case, tmp_path), case.get("mirroring", False)
    shape, spacing = case.get("shape", (30, 34, 28)), (1.5, 1.0, 1.0)
    channels = len(folder.dataset["channel_names"])
    image = np.round(300 * smooth((channels, *shape), seed=4)).astype(np.float32)
    if channels > 1:
        image[:, :3] = image[:, :, :, 25:] = 0  # cropped, and outside of the mask
        image[:, 10, 10, 10] = 0
    expected, probabilities = nnunets_own(folder, image, spacing, mirroring=mirroring)
    network = Network(folder, CPU, mirroring=mirroring)
    found = network.predict(list(image), spacing, lambda *_: None, precision="exact")
    assert found.shape == expected.shape
    assert len(np.unique(expected)) > 1
    assert found.dtype == np.uint8
    regions = "order" in case
    assert not (found != expected)[~undecided(probabilities, regions=regions, by=0.002)].any()
    assert np.mean(found != expected) <= 2e-3
    fast = network.predict(list(image), spacing, lambda *_: None, precision="fast")
    assert not (fast != expected)[~undecided(probabilities, regions=regions, by=0.05)].any()
    whole = np.array([0, *range(101, 100 + 20)], np.uint16)
    renumbered = network.predict(list(image), spacing, lambda *_: None, precision="exact", numbers=whole)
    assert np.array_equal(renumbered, whole[found])


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_sums_kept_on_a_device_give_the_same_labels(case: dict[str, Any], tmp_path: Path) -> None:
    """What runs on GPUs, on this processor: tiles in batches, sums whole, labels in slabs."""
    folder, mirroring = folder_of(case, tmp_path), case.get("mirroring", False)
    image = list(
        np.round(300 * smooth((len(folder.dataset["channel_names"]), *case.get("shape", (30, 34, 28))), seed=4)).astype(
            np.int16
        )
    )
    rings = Network(folder, CPU, mirroring=mirroring)
    whole = Network(folder, CPU, mirroring=mirroring, on_device=True)
    assert whole.runtimes(bf16=False)[0].batch > 1
    seen: list[int] = []
    for within in (None, ball((30, 34, 28)) if "shape" not in case else None):
        expected, found = (
            network.predict(
                image,
                (1.5, 1.0, 1.0),
                lambda done, total: seen.append(done),
                precision="exact",
                shared=Shared(within=within),
            )
            for network in (rings, whole)
        )
        assert len(np.unique(expected)) > 1
        # In another order of additions, in another library: a voxel on the very border may fall to the other side.
        assert np.mean(found != expected) <= 1e-3


def ball(shape: tuple[int, int, int], size: tuple[int, int, int] = (3, 2, 4)) -> Blocks:
    """A mask of blocks that leaves out the corners, and a half of the image along its first axis."""
    blocks = [-(-n // s) for n, s in zip(shape, size, strict=True)]
    z, y, x = np.meshgrid(*[np.linspace(-1, 1, n) for n in blocks], indexing="ij")
    return Blocks(((z + 0.9) ** 2 + (y + 0.3) ** 2 + x**2) < 0.35, size)


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_labels_inside_a_mask_are_the_same_bits(case: dict[str, Any], precision: Precision, tmp_path: Path) -> None:
    folder = folder_of(case, tmp_path)
    shape = case.get("shape", (60, 34, 28))
    image = list(np.round(300 * smooth((len(folder.dataset["channel_names"]), *shape), seed=4)).astype(np.float32))
    network = Network(folder, CPU, mirroring=case.get("mirroring", False))
    whole = network.predict(image, (1.5, 1.0, 1.0), lambda *_: None, precision=precision)
    shared = Shared(within=ball(shape))
    found = network.predict(image, (1.5, 1.0, 1.0), lambda *_: None, precision=precision, shared=shared)
    inside = np.ones(shape, np.uint8)
    ball(shape).clear_outside(inside)
    assert np.array_equal(found, whole * inside)
    assert len(np.unique(found)) > 1
    assert shared.skipped > 0 or min(shape) < 16 or case is CASES["thick slices in the plans"]  # a single layer of tiles
    nothing = Shared(within=Blocks(np.zeros_like(ball(shape).inside), ball(shape).size))
    assert not network.predict(image, (1.5, 1.0, 1.0), lambda *_: None, precision=precision, shared=nothing).any()
    assert nothing.tiles == 0


def test_no_tile_is_left_out_that_a_voxel_depends_on() -> None:
    """Against the voxels themselves, one by one."""
    rng = np.random.default_rng(4)
    for _ in range(200):
        own, image = rng.integers(6, 30, 3), rng.integers(6, 30, 3)
        size = tuple(int(n) for n in rng.integers(1, 5, 3))
        mask = Blocks(rng.random([-(-int(n + 3) // s) for n, s in zip(image, size, strict=True)]) < 0.01, size)  # type: ignore[arg-type]
        along = [cells(int(a), int(b), int(rng.integers(0, 2))) for a, b in zip(own, image, strict=True)]
        offset, inner = (
            rng.integers(0, 4, 3),
            [slice(int(b), int(b + n)) for b, n in zip(rng.integers(0, 3, 3), own, strict=True)],
        )
        patch = rng.integers(2, 7, 3)
        origin = [int(rng.integers(0, part.stop + 1)) for part in inner]
        holds = []
        for axis in range(3):
            low, high = (index + inner[axis].start for index in along[axis][:2])
            held = range(origin[axis], origin[axis] + int(patch[axis]))
            voxels = np.flatnonzero(np.isin(low, held) | np.isin(high, held)) + offset[axis]
            holds.append(voxels // size[axis])
        expected = bool(mask.inside[np.ix_(*holds)].any())
        assert needs(mask, along, offset.tolist(), inner, origin, patch.tolist()) == expected


def test_networks_that_prepare_alike_share_it(tmp_path: Path) -> None:
    """The same image on the network's grid is made once, and is the same bits; where anything differs it is made again."""
    alike = [Network(folder_of({}, tmp_path / str(n)), CPU, mirroring=False) for n in range(2)]
    other = Network(folder_of({"spacing": (2.2, 1.4, 1.2)}, tmp_path / "other"), CPU, mirroring=False)
    image = [np.round(300 * smooth((30, 34, 28), seed=4)).astype(np.float32)]
    shared = Shared()
    made = []
    for network in (*alike, other):
        alone = network.predict(image, (1.5, 1.0, 1.0), lambda *_: None)
        assert np.array_equal(network.predict(image, (1.5, 1.0, 1.0), lambda *_: None, shared=shared), alone)
        assert shared.prepared is not None
        made.append(shared.prepared[1])
    assert made[0] is made[1]
    assert made[2] is not made[1]


def test_all_loops_are_compiled_before_the_first_request(tmp_path: Path) -> None:
    """Whatever is segmented afterwards, there is nothing left to compile."""
    compile_kernels()
    loops: list[Any] = [kernels.add_tile, kernels.take_slice, kernels.decide, kernels.fill_slices]
    before = [len(loop.signatures) for loop in loops]
    assert before == [2, 1, 1, 1]
    image = np.round(300 * smooth((1, 30, 34, 28), seed=4)).astype(np.float32)
    for name in ("folds of many classes", "regions", "transposed"):
        network = Network(folder_of(CASES[name], tmp_path / name), CPU, mirroring=True)
        for precision in ("exact", "fast"):
            network.predict(
                list(image[:, :, ::-1]),
                (1.5, 1.0, 1.0),
                lambda *_: None,
                precision=precision,
                numbers=np.arange(900, 950, dtype=np.uint16),
            )
    assert [len(loop.signatures) for loop in loops] == before


def test_two_dimensional_networks(tmp_path: Path) -> None:
    folder = flat_folder(tmp_path)
    image = np.round(300 * smooth((1, 7, 30, 25), seed=4)).astype(np.float32)
    for mirroring in (False, True):
        axes_folder = NetworkFolder(**{**vars(folder), "mirror_axes": (0, 1)})
        expected, probabilities = nnunets_own(axes_folder, image, (3.0, 1.0, 1.0), mirroring=mirroring)
        found = Network(axes_folder, CPU, mirroring=mirroring).predict(
            list(image), (3.0, 1.0, 1.0), lambda *_: None, precision="exact"
        )
        assert not (found != expected)[~undecided(probabilities, regions=False, by=0.002)].any()


def test_what_the_engine_does_not_have_is_refused(tmp_path: Path) -> None:
    changes: tuple[tuple[dict[str, Any], str], ...] = (
        ({"previous_stage": "3d_lowres"}, "second stage of a cascade and needs '3d_lowres' first"),
        ({"resampling_fn_data": "no_resampling_hack"}, "no_resampling_hack"),
        ({"resampling_fn_probabilities_kwargs": {"order": 3, "order_z": 0}}, "order 3"),
    )
    for n, (change, why) in enumerate(changes):
        with pytest.raises(InvalidModel, match=why):
            read_plan(folder_of(change, tmp_path / str(n)))


def test_torch_takes_over_where_openvino_is_not(tmp_path: Path) -> None:
    """The same tiles from both, with the last layer on and off, and from what was kept by an earlier start."""
    for labels in (ORGANS, MANY):
        folder = folder_of({"labels": labels}, tmp_path / str(len(labels)))
        made = [Network(folder, CPU, mirroring=False, cache=tmp_path / "cache") for _ in range(2)]
        first, second = (network.runtimes(bf16=False)[0] for network in made)
        assert isinstance(first, OpenVino)
        other = Torch(made[0]._networks[0], CPU, 1, (16, 16, 16), flat=False, dtype=torch.float32, compiled=False)
        patch = [smooth((1, 16, 16, 16))]
        (expected,) = other(patch, lambda: None)
        np.testing.assert_allclose(first(patch, lambda: None)[0], expected, atol=2e-4)
        np.testing.assert_allclose(second(patch, lambda: None)[0], expected, atol=2e-4)
    kept = sorted(path.suffix for path in (tmp_path / "cache").iterdir())
    assert kept == [".bin", ".bin", ".xml", ".xml"]


_WITHOUT_OPENVINO = """
import os, sys
sys.modules["openvino"] = None
sys.path.insert(0, sys.argv[1])
if sys.argv[3] == "no compiler":
    os.environ["CXX"] = "there-is-no-such-compiler"
elif sys.argv[3] == "a broken one":
    os.environ["CXX"] = "false"
import numpy as np, torch
from pathlib import Path
from deployments.nnunet.predictor import Network
from deployments.nnunet.weights import read_network_folder
torch.set_num_threads(1)
network = Network(read_network_folder(Path(sys.argv[2]), ("0",)), torch.device("cpu"), mirroring=False)
image = np.load(sys.argv[2] + "/image.npy")
for precision in ("exact", "fast"):
    print(network.engine(precision))
    np.save(f"{sys.argv[2]}/{precision}.npy", network.predict([image], (1.5, 1.0, 1.0), lambda *_: None, precision=precision))
"""


@pytest.mark.parametrize("compiler", ["no compiler", "a broken one", "a compiler"])
def test_without_openvino_torch_computes_as_fast_as_it_can(compiler: str, tmp_path: Path) -> None:
    if compiler == "a compiler" and not has_compiler():
        pytest.skip("there is no C++ compiler on this machine")
    if compiler == "a broken one" and shutil.which("false") is None:
        pytest.skip("there is no `false` on this machine")
    folder = results_folder(tmp_path, spacing=(2.2, 1.4, 1.4))
    image = np.round(300 * smooth((24, 26, 20), seed=4)).astype(np.float32)
    np.save(folder / "image.npy", image)
    command = [sys.executable, "-c", _WITHOUT_OPENVINO, str(ROOT), str(folder), compiler]
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    bf16 = "bfloat16" if has_fast_bf16() else "float32"
    compiled = ", compiled" if compiler == "a compiler" else ""
    assert done.stdout.splitlines() == [f"torch float32 on cpu{compiled}", f"torch {bf16} on cpu{compiled}"]
    network = Network(read_network_folder(folder, ("0",)), CPU, mirroring=False)
    for precision, most in (("exact", 2e-3), ("fast", 2e-2)):
        expected = network.predict([image], (1.5, 1.0, 1.0), lambda *_: None, precision="exact")
        assert np.mean(np.load(folder / f"{precision}.npy") != expected) <= most


def test_what_multiplies_bfloat16_is_known_by_its_flags(tmp_path: Path) -> None:
    for flags, fast in (
        ("fpu avx2 avx512f", False),
        ("avx512_bf16", True),
        ("amx_tile amx_bf16", True),
        ("fp asimd bf16", True),
    ):
        (tmp_path / "cpuinfo").write_text(f"flags : {flags}\n")
        assert has_fast_bf16(tmp_path / "cpuinfo") == fast
    assert not has_fast_bf16(tmp_path / "none")


def test_a_damaged_kept_network_is_made_again(tmp_path: Path) -> None:
    folder = folder_of({}, tmp_path)
    patch, results = smooth((1, 16, 16, 16)), []
    for _ in range(2):
        runtime = Network(folder, CPU, mirroring=False, cache=tmp_path / "cache").runtimes(bf16=False)[0]
        results.append(runtime([patch], lambda: None)[0].copy())
        for kept in (tmp_path / "cache").glob("*.xml"):
            kept.write_text(kept.read_text()[:100])
    np.testing.assert_array_equal(*results)


def test_too_large_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    network = Network(folder_of({}, tmp_path), CPU, mirroring=False)
    side = int((free_memory() * 2) ** (1 / 3))
    huge = np.broadcast_to(np.int16(40), (side, side, side))  # one voxel, many times
    before = free_memory()
    with pytest.raises(NotEnoughMemory) as told:
        network.predict([huge], (2.2, 1.4, 1.4), lambda *_: None)
    assert told.value.needed_mb > told.value.free_mb
    assert before - free_memory() < 500 * 2**20


def test_it_can_be_left_at_any_moment_and_used_again(tmp_path: Path) -> None:
    class LeftError(Exception):
        pass

    network = Network(folder_of({}, tmp_path), CPU, mirroring=False)
    image = np.round(300 * smooth((30, 34, 28), seed=4)).astype(np.float32)
    expected = network.predict([image], (1.5, 1.0, 1.0), lambda *_: None)

    def leave_at(call: int) -> Callable[[int, int], None]:
        calls = itertools.count()

        def on_tile(done: int, total: int) -> None:
            if next(calls) == call:
                raise LeftError

        return on_tile

    for call in (0, 1, 5):
        with pytest.raises(LeftError):
            network.predict([image], (1.5, 1.0, 1.0), leave_at(call))
    assert np.array_equal(network.predict([image], (1.5, 1.0, 1.0), lambda *_: None), expected)


def test_progress_counts_every_pass(tmp_path: Path) -> None:
    network = Network(folder_of({"folds": ("0", "1")}, tmp_path), CPU, mirroring=True)
    seen: list[tuple[int, int]] = []
    with warnings.catch_warnings():
        network.predict([smooth((20, 20, 20))], (2.2, 1.4, 1.4), lambda done, total: seen.append((done, total)))
    totals = {total for _, total in seen if total}
    assert len(totals) == 1
    assert sorted({done for done, total in seen if total}) == list(range(totals.pop() + 1))
