"""Where voxels are: every orientation and any rotation, compared with nibabel, SimpleITK and nnU-Net."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from numpy.testing import assert_allclose, assert_array_equal

from scangraph.contracts import LabelMap, Volume
from scangraph.contracts.errors import InvalidVolume
from tests.contracts.grids import (
    AXCODES,
    ORIGIN,
    SPACING,
    counting,
    direction,
    from_sitk,
    mask,
    oblique_volumes,
    rotation,
    same_geometry,
    to_sitk,
    volume,
)

every_orientation = pytest.mark.parametrize("axcodes", AXCODES)
oblique = settings(deadline=None, max_examples=100, derandomize=True)


def indices(grid: Volume) -> np.ndarray[Any, np.dtype[np.int64]]:
    """All indices (z, y, x) of a grid, in the array's order."""
    return np.stack(np.meshgrid(*map(np.arange, grid.shape), indexing="ij"), axis=-1).reshape(-1, 3)


def test_there_are_48_orientations() -> None:
    assert len({tuple(direction(codes).ravel()) for codes in AXCODES}) == 48


# --- index and world --------------------------------------------------------------------------------------------------


def assert_agrees_with_simpleitk_and_nibabel(grid: Volume) -> None:
    index, image = indices(grid), to_sitk(grid)
    world = np.array([image.TransformIndexToPhysicalPoint(i[::-1].tolist()) for i in index])
    assert_allclose(grid.index_to_world(index), world, rtol=0, atol=1e-9)
    ras = nib.affines.apply_affine(grid.affine_ras, index[:, ::-1])
    assert_allclose(ras, world * (-1, -1, 1), rtol=0, atol=1e-9)
    assert_allclose(nib.affines.voxel_sizes(grid.affine_ras), np.array(grid.spacing_mm[::-1]), rtol=1e-12)
    between = index + np.array([0.25, -0.5, 0.125])
    world = np.array([image.TransformContinuousIndexToPhysicalPoint(i[::-1].tolist()) for i in between])
    assert_allclose(grid.index_to_world(between), world, rtol=0, atol=1e-9)
    assert_allclose(grid.world_to_index(world), between, rtol=0, atol=1e-8)


@every_orientation
def test_index_and_world_agree_with_simpleitk_and_nibabel(axcodes: str) -> None:
    assert_agrees_with_simpleitk_and_nibabel(volume(axcodes))


@oblique
@given(oblique_volumes())
def test_index_and_world_agree_on_oblique_grids(grid: Volume) -> None:
    assert_agrees_with_simpleitk_and_nibabel(grid)


def test_index_to_world_known_answer() -> None:
    grid = Volume(counting((2, 3, 4)), (5.0, 0.5, 0.25), (10, 20, 30))
    assert_array_equal(grid.index_to_world((1, 2, 3)), [10 + 3 * 0.25, 20 + 2 * 0.5, 30 + 5.0])
    assert_array_equal(grid.world_to_index([10.75, 21, 35]), [1, 2, 3])
    assert grid.index_to_world(np.zeros((6, 7, 3))).shape == (6, 7, 3)


def test_affines_known_answer() -> None:
    grid = Volume(counting((2, 3, 4)), (5.0, 0.5, 0.25), (10, 20, 30))
    assert_array_equal(grid.affine_lps, [[0.25, 0, 0, 10], [0, 0.5, 0, 20], [0, 0, 5, 30], [0, 0, 0, 1]])
    assert_array_equal(grid.affine_ras, [[-0.25, 0, 0, -10], [0, -0.5, 0, -20], [0, 0, 5, 30], [0, 0, 0, 1]])


@oblique
@given(oblique_volumes())
def test_affine_round_trip(grid: Volume) -> None:
    again = Volume.from_affine_lps(grid.array, grid.affine_lps)
    assert all(same_geometry(again, grid).values())


def test_from_affine_keeps_the_subclass_and_its_labels() -> None:
    made = LabelMap.from_affine_lps(np.ones((1, 1, 1), np.uint8), np.eye(4), labels=(5,))
    assert type(made) is LabelMap
    assert made.labels == (5,)


# --- orientation ------------------------------------------------------------------------------------------------------


@every_orientation
def test_axcodes_are_those_of_nibabel_and_simpleitk(axcodes: str) -> None:
    grid = volume(axcodes)
    assert grid.axcodes == axcodes
    assert "".join(nib.aff2axcodes(grid.affine_ras)) == axcodes
    assert sitk.DICOMOrientImageFilter_GetOrientationFromDirectionCosines(np.ravel(grid.direction).tolist()) == axcodes


@oblique
@given(st.sampled_from(AXCODES), st.tuples(*[st.floats(-0.2, 0.2)] * 3))
def test_axcodes_of_tilted_grids(axcodes: str, tilt: tuple[float, float, float]) -> None:
    turned = rotation((1.0, *tilt)) @ direction(axcodes)
    grid = Volume(counting(), SPACING, ORIGIN, turned)
    assert grid.axcodes == "".join(nib.aff2axcodes(grid.affine_ras)) == axcodes


@oblique
@given(oblique_volumes())
def test_axcodes_always_name_three_axes(grid: Volume) -> None:
    assert {frozenset("LR"), frozenset("PA"), frozenset("SI")} == {
        next(pair for pair in map(frozenset, ("LR", "PA", "SI")) if letter in pair) for letter in grid.axcodes
    }


def assert_nothing_moved(old: Volume, new: Volume) -> None:
    """Every voxel of one is a voxel of the other, at the same place and with the same value."""
    index = indices(new)
    was = old.world_to_index(new.index_to_world(index))
    assert_allclose(was, np.rint(was), rtol=0, atol=1e-6)
    was = np.rint(was).astype(int)
    assert {tuple(i) for i in was.tolist()} == {tuple(i) for i in indices(old).tolist()}
    assert_array_equal(new.array[..., *index.T], old.array[..., *was.T])
    assert np.shares_memory(old.array, new.array)


@every_orientation
def test_reoriented_moves_no_voxel_and_agrees_with_simpleitk(axcodes: str) -> None:
    for wanted in AXCODES:
        old = volume(axcodes)
        new = old.reoriented(wanted)
        assert new.axcodes == wanted
        assert_nothing_moved(old, new)
        peer = from_sitk(sitk.DICOMOrient(to_sitk(old), wanted))
        assert_array_equal(new.array, peer.array)
        assert all(same_geometry(new, peer).values())


@oblique
@given(oblique_volumes(), st.sampled_from(AXCODES))
def test_reoriented_oblique_grids(old: Volume, wanted: str) -> None:
    strength = np.abs(old.direction)
    fits = sorted(strength[list(p), range(3)].sum() for p in itertools.permutations(range(3)))
    assume(fits[-1] - fits[-2] > 1e-9)  # turned by 45°, which axis is the nearest is a matter of rounding
    new = old.reoriented(wanted)
    assert new.axcodes == wanted
    assert_nothing_moved(old, new)
    assert all(same_geometry(new.reoriented(old.axcodes), old).values())


def test_reoriented_keeps_channels_labels_and_type() -> None:
    channels = Volume(counting((2, 3, 4, 5)), SPACING, ORIGIN)
    assert channels.reoriented("SAR").array.shape == (2, 5, 4, 3)
    assert_nothing_moved(channels, channels.reoriented("SAR"))
    label_map = mask([[[1, 2]]])
    assert type(label_map.reoriented("RAS")) is LabelMap
    assert label_map.reoriented("RAS").labels == (1, 2)
    assert label_map.reoriented("ras").array.tolist() == [[[2, 1]]]


@pytest.mark.parametrize("wrong", ["", "LP", "LPSS", "LRS", "LLS", "XPS"])
def test_reoriented_refuses_what_names_no_axes(wrong: str) -> None:
    with pytest.raises(InvalidVolume):
        volume().reoriented(wrong)


# --- grids against each other -----------------------------------------------------------------------------------------


def test_extent_known_answer() -> None:
    grid = Volume(counting((2, 3, 4)), (5.0, 2.0, 1.0), (10, 20, 30))
    assert grid.extent_mm() == ((9.5, 19.0, 27.5), (13.5, 25.0, 37.5))


@oblique
@given(oblique_volumes())
def test_extent_is_the_box_around_all_voxels(grid: Volume) -> None:
    low, high = grid.extent_mm()
    halves = np.array(list(itertools.product((-0.5, 0.5), repeat=3)))
    corners = grid.index_to_world((indices(grid)[:, None] + halves).reshape(-1, 3))
    assert_allclose(low, corners.min(axis=0), rtol=0, atol=1e-9)
    assert_allclose(high, corners.max(axis=0), rtol=0, atol=1e-9)


@every_orientation
def test_extent_does_not_depend_on_the_orientation(axcodes: str) -> None:
    assert_allclose(volume().reoriented(axcodes).extent_mm(), volume().extent_mm(), rtol=0, atol=1e-9)


@every_orientation
def test_overlap_known_answers(axcodes: str) -> None:
    whole = Volume(counting((8, 10, 12)), (1.0, 2.0, 3.0), ORIGIN)

    def moved(x: float, y: float, z: float) -> Volume:
        return Volume(whole.array, whole.spacing_mm, (ORIGIN[0] + x, ORIGIN[1] + y, ORIGIN[2] + z)).reoriented(axcodes)

    assert whole.overlap_fraction(whole.reoriented(axcodes)) == 1.0
    assert whole.overlap_fraction(moved(18, 0, 0)) == 0.5
    assert whole.overlap_fraction(moved(0, -10, 0)) == 0.5
    assert whole.overlap_fraction(moved(18, 10, 4)) == 0.125
    assert whole.overlap_fraction(moved(36, 0, 0)) == 0.0
    part = Volume(np.zeros((4, 5, 6)), whole.spacing_mm, whole.origin_mm).reoriented(axcodes)
    assert part.overlap_fraction(whole) == 1.0
    assert whole.overlap_fraction(part) == 0.125


def test_overlap_of_large_grids_is_sampled() -> None:
    large = Volume(np.zeros((100, 100, 100), np.uint8), (1, 1, 1))
    assert large.overlap_fraction(Volume(large.array, (1, 1, 1), (30, 0, 0))) == pytest.approx(0.7, abs=0.03)


def test_same_grid() -> None:
    grid = volume()
    shifted = Volume(grid.array, SPACING, (ORIGIN[0] + 0.009, ORIGIN[1], ORIGIN[2]))
    far = Volume(grid.array, SPACING, (ORIGIN[0] + 0.011, ORIGIN[1], ORIGIN[2]))
    coarse = Volume(grid.array, (SPACING[0] + 0.006, SPACING[1], SPACING[2]), ORIGIN)  # 0.012 mm off at the third slice
    larger = Volume(counting((3, 4, 6)), SPACING, ORIGIN)
    assert grid.same_grid(shifted)
    assert not grid.same_grid(far)
    assert grid.same_grid(far, tolerance_mm=0.02)
    assert not grid.same_grid(coarse)
    assert not grid.same_grid(larger)
    assert not grid.same_grid(grid.reoriented("RPS"))
    assert grid.same_grid(grid.reoriented("RPS").reoriented("LPS"))


def test_with_array() -> None:
    grid = mask(np.ones((3, 4, 5)), spacing_mm=SPACING, origin_mm=ORIGIN)
    made = grid.with_array(np.zeros((2, 3, 4, 5), np.float32))
    assert type(made) is Volume
    assert made.same_grid(grid)
    with pytest.raises(InvalidVolume, match=r"\(5, 4, 3\)"):
        grid.with_array(np.zeros((5, 4, 3)))


# --- nnU-Net ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axcodes", ["LPS", "RAS", "ASL"])
@pytest.mark.parametrize("tilt", [(1, 0, 0, 0), (0.9, 0.1, -0.2, 0.3)])
def test_nnunet_props_are_those_of_its_own_reader(axcodes: str, tilt: tuple[float, ...], tmp_path: Path) -> None:
    turned = rotation(tilt) @ direction(axcodes)
    path = tmp_path / "image.nii.gz"
    sitk.WriteImage(to_sitk(Volume(counting(), SPACING, ORIGIN, turned)), str(path))
    array, properties = SimpleITKIO().read_images([str(path)])
    grid = from_sitk(sitk.ReadImage(str(path)))
    assert grid.to_nnunet_props() == properties
    assert_array_equal(array[0], grid.array)


# --- what makes no volume ---------------------------------------------------------------------------------------------

_SHEAR = np.array([[1, 0.1, 0], [0, 1, 0], [0, 0, 1]])


@pytest.mark.parametrize(
    "change",
    [
        {"array": np.zeros((4, 5))},
        {"array": np.zeros((1, 1, 3, 4, 5))},
        {"array": np.zeros((0, 4, 5))},
        {"array": np.zeros((3, 4, 5), complex)},
        {"array": np.zeros((3, 4, 5), object)},
        {"array": np.full((3, 4, 5), "x")},
        {"spacing_mm": (1, 1)},
        {"spacing_mm": (1, 1, 0)},
        {"spacing_mm": (1, -1, 1)},
        {"spacing_mm": (1, 1, np.nan)},
        {"origin_mm": (0, 0, np.inf)},
        {"origin_mm": (0, 0, 0, 0)},
        {"direction": np.eye(2)},
        {"direction": np.full((3, 3), np.nan)},
        {"direction": np.zeros((3, 3))},
        {"direction": 1.01 * np.eye(3)},
        {"direction": _SHEAR},
    ],
)
def test_invalid_volumes_are_refused(change: dict[str, Any]) -> None:
    valid: dict[str, Any] = {
        "array": np.zeros((3, 4, 5)),
        "spacing_mm": (1, 1, 1),
        "origin_mm": (0, 0, 0),
        "direction": np.eye(3),
    }
    Volume(**valid)
    with pytest.raises(InvalidVolume):
        Volume(**valid | change)


def test_direction_may_be_as_inexact_as_files_are() -> None:
    Volume(counting(), SPACING, ORIGIN, np.round(rotation((0.9, 0.1, -0.2, 0.3)), 4))


@pytest.mark.parametrize(
    "affine",
    [
        np.eye(3),
        np.zeros((4, 4)),
        np.full((4, 4), np.inf),
        np.diag([1, 1, 0, 1]),
        np.block([[_SHEAR, np.zeros((3, 1))], [0, 0, 0, 1]]),
    ],
)
def test_invalid_affines_are_refused(affine: Any) -> None:
    with pytest.raises(InvalidVolume):
        Volume.from_affine_lps(counting(), affine)


def test_geometry_is_plain_numbers() -> None:
    arrays: list[Any] = [np.array(SPACING), np.array(ORIGIN), np.eye(3)]
    grid = Volume(counting(), *arrays)
    assert {type(v) for v in (*grid.spacing_mm, *grid.origin_mm, *itertools.chain(*grid.direction))} == {float}


def test_repr_says_what_it_is() -> None:
    assert repr(volume("RAS")) == "<Volume 3×4×5 int16 2.5×0.7×0.8 mm RAS>"
    assert repr(mask([[[1]]])) == "<LabelMap 1×1×1 uint8 1×1×1 mm LPS>"
