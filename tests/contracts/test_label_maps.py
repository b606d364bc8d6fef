"""Masks: counting, volumes, looking up on another grid, painting over each other."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from scangraph.contracts import LabelMap, Volume, merge_label_maps
from scangraph.contracts.errors import InvalidVolume
from tests.contracts.grids import AXCODES, counting, mask, oblique_volumes, to_sitk, volume

UNSIGNED = ("u1", "u2", "u4", "u8", ">u2")


@pytest.mark.parametrize(
    "array", [np.zeros((1, 1, 1), np.int16), np.zeros((1, 1, 1)), np.zeros((1, 1, 1), bool), np.zeros((2, 1, 1, 1), np.uint8)]
)
def test_only_unsigned_numbers_without_channels_are_a_mask(array: Any) -> None:
    with pytest.raises(InvalidVolume):
        LabelMap(array, (1, 1, 1))


def test_labels_are_plain_sorted_and_without_background() -> None:
    labels: Any = np.array([7, 0, 3, 7], np.uint8)
    made = LabelMap(np.zeros((1, 1, 1), np.uint8), (1, 1, 1), labels=labels)
    assert made.labels == (3, 7)
    assert {type(n) for n in made.labels} == {int}


# --- counts and volumes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", UNSIGNED)
def test_counts_are_numpys(dtype: str) -> None:
    values = np.random.default_rng(0).choice([0, 0, 1, 2, 200, 255], size=(5, 6, 7)).astype(dtype)
    counts = LabelMap(values.transpose(2, 0, 1)[:, ::-1], (1, 1, 1)).counts()
    assert counts == {n: int((values == n).sum()) for n in (1, 2, 200, 255)}
    assert {type(v) for item in counts.items() for v in item} == {int}


@pytest.mark.parametrize("dtype", ["u2", "u4"])
def test_counts_of_numbers_past_a_byte(dtype: str) -> None:
    largest = int(np.iinfo(dtype).max)
    assert LabelMap(np.array([[[largest, 256, 256]]], dtype), (1, 1, 1)).counts() == {256: 2, largest: 1}


def test_empty_mask_counts_nothing() -> None:
    assert mask(np.zeros((2, 2, 2))).counts() == {}


def test_volumes_known_answer() -> None:
    cube = np.zeros((10, 10, 10), np.uint8)
    cube[:5], cube[5] = 5, 2
    assert mask(cube, spacing_mm=(2, 1, 0.5)).volumes_ml() == {5: 0.5, 2: 0.1}


# --- another grid -----------------------------------------------------------------------------------------------------


def assert_as_simpleitk(source: LabelMap, target: Volume) -> None:
    peer = sitk.Resample(to_sitk(source), to_sitk(target), sitk.Transform(), sitk.sitkNearestNeighbor, 0.0)
    found = source.on_grid_of(target)
    assert_array_equal(found.array, sitk.GetArrayFromImage(peer))
    assert found.same_grid(target)
    assert found.labels == source.labels
    assert found.array.dtype == source.array.dtype


def random_mask(shape: tuple[int, ...]) -> Any:
    return np.random.default_rng(sum(shape)).integers(0, 5, shape, dtype=np.uint8)


@settings(deadline=None, max_examples=150, derandomize=True)
@given(oblique_volumes(), st.tuples(*[st.integers(2, 12)] * 3), st.floats(0.4, 2.5), st.tuples(*[st.floats(-0.3, 0.3)] * 3))
def test_lookup_on_oblique_grids_is_simpleitks(
    target: Volume, shape: tuple[int, int, int], scale: float, turn: tuple[float, float, float]
) -> None:
    """The mask lies around the target's middle, turned a little against it, finer or coarser."""
    middle = target.index_to_world((np.array(target.shape) - 1) / 2)
    tilt, _ = np.linalg.qr(np.eye(3) + np.cross(np.eye(3), turn))
    direction: Any = tilt @ np.asarray(target.direction)
    spacing = tuple(s * scale for s in target.spacing_mm)
    corner = direction @ (np.array(spacing[::-1]) * (np.array(shape[::-1]) - 1.03) / 2)
    source = mask(random_mask(shape), spacing_mm=spacing, origin_mm=tuple(middle - corner), direction=direction)
    assert_as_simpleitk(source, target)


@pytest.mark.parametrize("axcodes", AXCODES)
def test_lookup_between_orientations_is_reorientation(axcodes: str) -> None:
    source = mask(random_mask((4, 5, 6)), spacing_mm=(3, 0.5, 0.75), origin_mm=(7, -8, 9))
    turned = source.reoriented(axcodes)
    assert_array_equal(source.on_grid_of(turned).array, turned.array)
    assert_as_simpleitk(source, turned)


def test_lookup_known_answers() -> None:
    line = mask([[[1, 2, 3, 4]]])

    def seen_by(origin_x: float, spacing_x: float, n: int) -> list[int]:
        target = Volume(np.zeros((1, 1, n)), (1, 1, spacing_x), (origin_x, 0, 0))
        assert_as_simpleitk(line, target)
        return list(line.on_grid_of(target).array.ravel())

    assert seen_by(0, 0.5, 7) == [1, 2, 2, 3, 3, 4, 4]  # halves go to the higher voxel
    assert seen_by(0.5, 2, 2) == [2, 4]
    assert seen_by(-2, 1, 8) == [0, 0, 1, 2, 3, 4, 0, 0]
    assert seen_by(-0.5, 4, 2) == [1, 0]  # a voxel owns its lower face, not its upper
    assert seen_by(100, 1, 3) == [0, 0, 0]


def test_lookup_on_the_same_grid_is_free() -> None:
    source = mask(np.ones((3, 4, 5)), on=volume())
    assert source.on_grid_of(volume()) is source


# --- merging ----------------------------------------------------------------------------------------------------------


def test_merge_paints_the_last_over_the_first() -> None:
    merged = merge_label_maps([mask([[[5, 5, 5, 0]]]), mask([[[0, 2, 2, 0]]]), mask([[[0, 0, 3, 0]]])])
    assert merged.array.tolist() == [[[5, 2, 3, 0]]]
    assert merged.labels == (2, 3, 5)


def test_merge_looks_up_on_the_grid_of_the_first() -> None:
    first = mask(np.full((2, 2, 2), 5), spacing_mm=(2, 2, 2), origin_mm=(0.5, 0.5, 0.5))
    fine = np.zeros((4, 4, 4), np.uint8)
    fine[:2, :2, :2] = 202
    merged = merge_label_maps(iter([first, mask(fine)]))
    assert merged.same_grid(first)
    assert merged.counts() == {5: 7, 202: 1}


def test_merge_leaves_its_inputs_alone_and_widens_where_needed() -> None:
    small = mask([[[1, 1]]])
    wide = LabelMap(np.array([[[0, 300]]], np.uint16), (1, 1, 1), labels=(300,))
    assert merge_label_maps([small, wide]).array.tolist() == [[[1, 300]]]
    assert small.array.tolist() == [[[1, 1]]]
    assert not np.shares_memory(merge_label_maps([small]).array, small.array)


def test_merge_of_read_only_arrays() -> None:
    arrived = mask([[[1, 0]]])
    arrived.array.flags.writeable = False
    assert merge_label_maps([arrived, mask([[[0, 2]]])]).array.tolist() == [[[1, 2]]]


def test_merge_of_nothing_is_refused() -> None:
    with pytest.raises(InvalidVolume, match="at least one"):
        merge_label_maps([])


def test_masks_hold_every_number_of_a_byte() -> None:
    assert mask(counting((4, 8, 8), "u1")).counts() == dict.fromkeys(range(1, 256), 1)


def test_merging_takes_only_what_is_wanted() -> None:
    grid = {"spacing_mm": (1.0, 1.0, 1.0)}
    first = LabelMap(np.array([[[2, 2, 5, 0]]], np.uint8), labels=(2, 5), **grid)  # type: ignore[arg-type]
    second = LabelMap(np.array([[[201, 0, 202, 201]]], np.uint8), labels=(201, 202), **grid)  # type: ignore[arg-type]
    merged = merge_label_maps([first, second], only=[2, 202])
    assert merged.array.ravel().tolist() == [2, 2, 202, 0]
    assert merged.labels == (2, 202)
