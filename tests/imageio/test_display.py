"""Copies for screens: known answers, the place in the world on all 48 orientations, and a slow oracle."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from deployments.imageio.display import intensity, reduced, small_picture
from deployments.imageio.nifti import read_nifti, write_nifti
from scangraph.contracts import Image2D, LabelMap, Volume, label_table
from tests.contracts.grids import AXCODES, ORIGIN, SPACING, direction


def blocks(array: NDArray[Any], most: int) -> Any:
    """Each block's index and voxels, one after the other."""
    sides = [-(-n // most) for n in array.shape]
    for index in itertools.product(*(range(-(-n // side)) for n, side in zip(array.shape, sides, strict=True))):
        yield index, array[tuple(slice(k * side, (k + 1) * side) for k, side in zip(index, sides, strict=True))]


# --- images ----------------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_means_of_blocks_whatever_the_sizes(data: Any) -> None:
    shape = data.draw(st.tuples(*[st.integers(1, 11)] * 3))
    most = data.draw(st.integers(2, 12))
    kind = data.draw(st.sampled_from(["i2", "f4"]))
    array = np.random.default_rng(data.draw(st.integers(0, 99))).integers(-32768, 32768, shape).astype(kind)
    found = reduced(Volume(array, SPACING, ORIGIN), most)
    assert max(found.shape) <= most
    assert found.array.dtype == np.int16 or kind == "f4"
    for index, block in blocks(array, most):
        assert found.array[index] == pytest.approx(block.mean(), abs=0.51)


@pytest.mark.parametrize("codes", AXCODES)
def test_no_place_in_the_world_moves(codes: str) -> None:
    """What grows evenly along the world's axes does so in the copy, too: a block's mean is the value in its middle."""
    grid = Volume(np.zeros((8, 12, 10), np.float32), SPACING, ORIGIN, direction(codes))
    slopes = np.array([0.7, -1.1, 0.4])

    def values(image: Volume) -> NDArray[np.float64]:
        found: NDArray[np.float64] = (image.index_to_world(np.moveaxis(np.indices(image.shape), 0, -1)) - ORIGIN) @ slopes
        return found

    volume = grid.with_array(values(grid).astype(np.float32))
    copy = reduced(volume, 6)
    assert copy.shape == (4, 6, 5)
    assert copy.spacing_mm == (2 * SPACING[0], 2 * SPACING[1], 2 * SPACING[2])
    assert copy.axcodes == codes
    assert np.allclose(copy.array, values(copy), atol=1e-3)
    # One voxel of the copy, against the mean of the places that it stands for.
    inside = np.argwhere(np.ones((2, 2, 2))) + np.array([4, 6, 2])
    assert np.allclose(copy.index_to_world((2, 3, 1)), volume.index_to_world(inside).mean(axis=0))
    again = read_nifti(write_nifti(copy, level=1), "a.nii.gz")
    assert np.abs(again.affine_lps - copy.affine_lps).max() < 2e-4


def test_what_is_small_enough_stays_what_it_is() -> None:
    array = np.arange(60, dtype=np.int16).reshape(3, 4, 5)
    volume = Volume(array, SPACING, ORIGIN, direction("RAS"))
    copy = reduced(volume, 5)
    assert np.array_equal(copy.array, array)
    assert copy.same_grid(volume)


def test_fractions_stay_where_rounding_would_lose_them() -> None:
    few = np.linspace(0, 1, 64, dtype=np.float32).reshape(4, 4, 4)
    assert reduced(Volume(few, (1, 1, 1))).array.dtype == np.float32
    assert reduced(Volume(few, (1, 1, 1)), 2).array.mean() == pytest.approx(0.5)
    assert reduced(Volume(few * 1000 - 500, (1, 1, 1))).array.dtype == np.int16
    large = np.full((4, 4, 4), 70000, np.int32)
    assert (reduced(Volume(large, (1, 1, 1)), 2).array == 70000).all()


def test_long_blocks_do_not_overflow() -> None:
    array = np.full((70, 70, 70), -32768, np.int16)
    assert (reduced(Volume(array, (1, 1, 1)), 2).array == -32768).all()


# --- masks -----------------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_block_s_label_is_its_commonest_or_nothing(data: Any) -> None:
    shape = data.draw(st.tuples(*[st.integers(1, 9)] * 3))
    most = data.draw(st.integers(2, 9))
    kind = data.draw(st.sampled_from(["u1", "u2"]))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    array = rng.choice([0, 0, 0, 1, 2, 7], shape).astype(kind)
    found = reduced(LabelMap(array, SPACING, ORIGIN, labels=(1, 2, 7)), most)
    assert isinstance(found, LabelMap)
    assert found.array.dtype == array.dtype
    assert found.labels == (1, 2, 7)
    for index, block in blocks(array, most):
        labelled = Counter(block[block > 0].tolist())
        enough = 2 * sum(labelled.values()) >= block.size
        commonest = [n for n, count in labelled.items() if count == max(labelled.values())]
        assert found.array[index] == (min(commonest) if enough else 0), (index, block)


def test_a_copy_of_a_mask_says_that_it_is_one() -> None:
    mask = LabelMap(np.full((4, 4, 4), 2, np.uint8), (1, 1, 1), labels=(2,))
    data = write_nifti(reduced(mask, 2), level=1)
    found = read_nifti(data, "a.nii.gz", as_mask=True)
    assert isinstance(found, LabelMap)
    nib = pytest.importorskip("nibabel")
    header = nib.Nifti1Image.from_bytes(__import__("gzip").decompress(data)).header
    assert header.get_intent()[0] == "label"
    assert header.get_data_dtype() == np.uint8


# --- what is known of values -----------------------------------------------------------------------------------------------


def test_percentiles() -> None:
    array = np.arange(-100, 101, dtype=np.int16).reshape(1, 3, 67)
    assert intensity(array) == {"min": -100, "max": 100, "p01": -98, "p50": 0, "p99": 98}
    large = np.zeros((2, 1024, 1024), np.int16)
    large[:, :, ::2] = 100  # every n-th voxel, n even, would see one of the two
    large[0, 0, 0] = -1000
    found = intensity(large)
    assert (found["min"], found["p01"], found["p99"], found["max"]) == (-1000, 0, 100, 100)
    assert found == intensity(large)


# --- small pictures --------------------------------------------------------------------------------------------------------


def patient(codes: str) -> Volume:
    """Air around a box of soft tissue; bone at the patient's right, fat at the head, metal in front."""
    array = np.full((40, 30, 50), -1000, np.int16)
    array[5:35, 5:25, 5:45] = 40
    array[10:30, 8:22, 5:10] = 1000  # low x is the patient's right in LPS
    array[30:35, 10:20, 15:35] = -100
    return Volume(array, (2.0, 3.0, 1.5), (0, 0, 0)).reoriented(codes)


@pytest.mark.parametrize("codes", ["LPS", "RAS", "SPR", "AIL"])
def test_a_small_picture_shows_the_patient_upright_and_as_radiologists_do(codes: str) -> None:
    picture = small_picture(patient(codes))
    page = picture.pages[0]
    assert page.dtype == np.uint8
    assert page.shape[2] == 1
    assert max(page.shape) <= 256
    view = (page.shape[1] - 4) // 2
    coronal, axial = page[:, :view, 0], page[:, view + 4 :, 0]
    # 75 mm across, 80 mm down in the coronal view, 90 mm in the axial one; a millimetre is equally long.
    millimetre = view / 75
    assert page.shape[0] == pytest.approx(90 * millimetre, abs=1)
    tissue = round((40 + 160) / 400 * 255)
    assert axial[page.shape[0] // 2, view // 2] == tissue
    assert axial[page.shape[0] // 2, round(view * 0.15)] == 255  # bone, at the left of the picture
    assert axial[page.shape[0] // 2, round(view * 0.85)] == tissue
    assert axial[0].max() == 0
    top = (page.shape[0] - round(80 * millimetre)) // 2
    fat = round((-100 + 160) / 400 * 255)
    assert coronal[top + round(14 * millimetre), view // 2] == pytest.approx(fat, abs=1)  # the head is above
    assert coronal[top + round(66 * millimetre), view // 2] == tissue


def test_what_is_no_ct_is_shown_between_its_percentiles() -> None:
    array = np.linspace(0, 4000, 27000).reshape(30, 30, 30).astype(np.int16)
    page = small_picture(Volume(array, (1, 1, 1))).pages[0]
    assert page.min() == 0
    assert page.max() > 250
    flat = small_picture(Volume(np.full((3, 3, 3), 7, np.int16), (1, 1, 1))).pages[0]
    assert flat.max() == 0


def test_a_mask_is_shown_where_there_is_most_of_it_in_its_colours() -> None:
    array = np.zeros((20, 20, 20), np.uint8)
    array[17, 3:6, 2:18] = 2  # far from the middle
    page = small_picture(LabelMap(array, (1, 1, 1), labels=(2,))).pages[0]
    assert page.shape[2] == 3
    colours = {tuple(colour) for colour in page.reshape(-1, 3).tolist()}
    assert colours == {(0, 0, 0), label_table()[2].color}
    empty = small_picture(LabelMap(np.zeros((4, 4, 4), np.uint8), (1, 1, 1))).pages[0]
    assert empty.max() == 0


def test_a_2d_image_is_shrunk_to_its_means_and_never_enlarged() -> None:
    page = np.zeros((512, 300, 1), np.uint8)
    page[::2] = 200
    small = small_picture(Image2D((page,))).pages[0]
    assert small.shape == (256, 150, 1)
    assert (small == 100).all()
    tiny = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    assert np.array_equal(small_picture(Image2D((tiny, tiny))).pages[0], tiny)
    deep = np.full((2, 2, 1), 65535, np.uint16)
    assert (small_picture(Image2D((deep,))).pages[0] == 255).all()
    clear = np.zeros((2, 2, 4), np.uint8)
    assert (small_picture(Image2D((clear,))).pages[0] == 255).all()  # black, but nothing of it is there
    assert small_picture(Image2D((clear,))).pages[0].shape == (2, 2, 3)


def test_extreme_shapes_stay_small_and_whole() -> None:
    for shape in ((1, 1, 1), (1, 1, 3000), (3000, 1, 1), (1, 3000, 1)):
        page = small_picture(Volume(np.zeros(shape, np.int16), (1, 1, 1))).pages[0]
        assert max(page.shape) <= 256
        assert min(page.shape) >= 1
        assert max(reduced(Volume(np.zeros(shape, np.int16), (1, 1, 1)), 50).shape) <= 50
