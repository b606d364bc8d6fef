"""Merging, cleaning, fat and templates: known answers and what must always hold."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from deployments.imageio.nifti import read_nifti
from deployments.postprocess import kernels, templates
from deployments.postprocess.cleaning import clean, merge
from deployments.postprocess.components import COMPONENTS
from deployments.postprocess.deployment import Postprocess
from deployments.postprocess.fat import FAT, FAT_HU, perirenal_fat
from deployments.postprocess.templates import align, coarse, sample, shared_dice, structures
from deployments.postprocess.warming import compile_kernels
from scangraph.contracts import LabelMap, NoParameters, Scene, merge_label_maps
from scangraph.contracts.codec import from_bytes, to_bytes
from scangraph.contracts.errors import GridsDiffer, InvalidParameters, LabelsMissing, UnknownLabels
from scangraph.phantoms import make_phantom

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"
needs_ct = pytest.mark.skipif(not SHARED.exists(), reason="the sample CT is not here (../shared/data)")


KNOWN = (1, 2, 3, 5, 21, 202, 203, 204, 205, 206)


def of(array: Any, spacing: tuple[float, float, float] = (2.0, 1.0, 1.0), **geometry: Any) -> LabelMap:
    array = np.asarray(array, np.uint8)
    return LabelMap(array, spacing, labels=tuple(int(n) for n in np.unique(array) if n), **geometry)


def ball(shape: tuple[int, int, int], centre: Any, radius: float, spacing: Any = (1, 1, 1)) -> NDArray[np.bool_]:
    grid = np.meshgrid(*(np.arange(n) * s for n, s in zip(shape, spacing, strict=True)), indexing="ij", sparse=True)
    inside: NDArray[np.bool_] = sum((g - c) ** 2 for g, c in zip(grid, centre, strict=True)) <= radius**2
    return inside


# --- merge --------------------------------------------------------------------------------------------------------------------


def test_later_masks_win_and_conflicts_are_counted() -> None:
    done = merge([of([[[5, 5, 5, 0, 1]]]), of([[[0, 2, 2, 0, 1]]]), of([[[0, 0, 3, 0, 0]]])])
    assert done.mask.array.tolist() == [[[5, 2, 3, 0, 1]]]
    assert done.facts["conflicts"] == [
        {"labels": [2, 5], "voxels": 2, "ml": 0.004},
        {"labels": [2, 3], "voxels": 1, "ml": 0.002},
    ]
    assert done.warnings == []


def test_priority_goes_before_the_order_of_masks() -> None:
    given = [of([[[202, 202, 5]]]), of([[[201, 5, 201]]])]
    assert merge(given).mask.array.tolist() == [[[201, 5, 201]]]
    assert merge(given, priority=(202, 201)).mask.array.tolist() == [[[202, 202, 201]]]
    assert merge(given[::-1], priority=(202, 201, 5)).mask.array.tolist() == [[[202, 202, 201]]]


@pytest.mark.parametrize("seed", range(5))
def test_merge_equals_the_plain_one(seed: int) -> None:
    rng = np.random.default_rng(seed)
    given = [of(rng.integers(0, 6, (3, 4, 5))) for _ in range(3)]
    assert np.array_equal(merge(given).mask.array, merge_label_maps(given).array)
    assert np.array_equal(merge(given, structures=[2, 3]).mask.array, merge_label_maps(given, only=[2, 3]).array)


def test_other_grids_are_refused_or_looked_up() -> None:
    first, second = of([[[1, 0]]]), of([[[0, 2]]], (2.0, 1.0, 1.5))
    assert merge([first, second]).warnings == ["1 of 2 masks lay on another grid than the first."]
    with pytest.raises(GridsDiffer, match=r"1×1×2 voxels of 2×1×1.5 mm.*instead of 1×1×2 voxels of 2×1×1 mm"):
        merge([first, second], resample=False)
    with pytest.raises(UnknownLabels, match="190"):
        merge([first], priority=(190,))


# --- clean --------------------------------------------------------------------------------------------------------------------


def test_small_pieces_go_by_volume_and_by_rank() -> None:
    array = np.zeros((10, 20, 20), np.uint8)
    array[1:5, 1:5, 1:5] = 5  # 64 voxels, 128 mm³
    array[7:9, 10:12, 10:12] = 5  # 8 voxels, 16 mm³
    array[7, 1, 1] = 5
    array[0, 19, 19] = 2
    done = clean(of(array), structures=[5], min_mm3=16)
    assert done.facts["structures"]["5"] == {"pieces_removed": 1, "removed_ml": 0.002}
    assert ((array != done.mask.array).sum(), done.mask.array[0, 19, 19]) == (1, 2)
    done = clean(of(array), structures=[5], keep_largest=1)
    assert (done.mask.array == 5).sum() == 64
    assert array[7, 1, 1] == 5  # what was given stays


def test_only_enclosed_background_is_filled() -> None:
    array = np.zeros((9, 9, 9), np.uint8)
    array[1:8, 1:8, 1:8] = 5
    array[3, 3, 3] = 0
    array[5, 5, 5] = 202
    array[4, 4, 0:4] = 0  # open to the outside
    done = clean(of(array), structures=[5], fill_holes=True)
    assert done.mask.array[3, 3, 3] == 5
    assert done.mask.array[5, 5, 5] == 202
    assert (done.mask.array[4, 4, 1:4] == 0).all()


@pytest.mark.parametrize("axcodes", ["LPS", "RAS", "AIR"])
def test_right_and_left_are_the_patients(axcodes: str) -> None:
    array = np.zeros((6, 10, 30), np.uint8)
    array[2:4, 2:5, 3:8] = 201  # low x is the right
    array[2:4, 2:5, 20:26] = 201
    array[2:4, 6:9, 14:16] = 27  # a vertebra in the middle
    turned = of(array).reoriented(axcodes)
    given = LabelMap(np.ascontiguousarray(turned.array), turned.spacing_mm, turned.origin_mm, turned.direction, (27, 201))
    done = clean(given, structures=[], split={201: (2, 3)}).mask.reoriented("LPS").array
    assert (done[array == 201][:5] == 2).all()
    assert set(np.unique(done[:, :, :10])) == {0, 2}
    assert set(np.unique(done[:, :, 18:])) == {0, 3}
    with pytest.raises(InvalidParameters, match="201 must become two other numbers"):
        clean(given, split={201: (201, 3)})


def test_cleaning_without_options_changes_nothing() -> None:
    array = np.random.default_rng(0).integers(0, 4, (5, 6, 7)).astype(np.uint8)
    assert np.array_equal(clean(of(array)).mask.array, array)
    with pytest.raises(LabelsMissing, match="5 liver"):
        clean(of(array), structures=[5])


# --- fat ----------------------------------------------------------------------------------------------------------------------


def kidneys() -> LabelMap:
    shape, spacing = (50, 60, 80), (2.0, 1.5, 1.5)
    array = np.zeros(shape, np.uint8)
    array[ball(shape, (50, 45, 30), 18, spacing)] = 2
    array[ball(shape, (50, 45, 90), 18, spacing)] = 3
    array[ball(shape, (50, 45, 112), 9, spacing) & (array == 0)] = 202
    return LabelMap(array, spacing, labels=(2, 3, 202))


def test_fat_is_a_shell_around_each_kidney() -> None:
    mask = kidneys()
    done = perirenal_fat(mask, distance_mm=8)
    fat = done.mask.array == FAT
    assert (mask.array[fat] == 0).all()
    assert ((done.mask.array == mask.array) | fat).all()
    distance = ndimage.distance_transform_edt(mask.array == 0, sampling=mask.spacing_mm)
    assert distance[fat].max() <= 8 + 1.5  # from the kidney with its sinus closed, which is a voxel larger
    # A ball of radius 18 with a shell of 8: (26³ - 18³) · 4π/3.
    assert done.facts["sides"]["right"]["volume_ml"] == pytest.approx(4 / 3 * np.pi * (26**3 - 18**3) / 1000, rel=0.08)
    assert done.facts["method"] == "estimated"
    assert any("estimated" in w for w in done.warnings)


def test_sides_meet_half_way_and_neighbours_bound() -> None:
    mask = kidneys()
    wide = perirenal_fat(mask, distance_mm=30).mask.array == FAT
    to = {n: ndimage.distance_transform_edt(mask.array != n, sampling=mask.spacing_mm) for n in (2, 3)}
    assert (wide & (np.minimum(to[2], to[3]) < 10)).any()
    array = mask.array.copy()
    array[:, 43:, :][array[:, 43:, :] == 0] = 5
    bounded = perirenal_fat(LabelMap(array, mask.spacing_mm, labels=(2, 3, 5, 202))).mask.array
    assert ((bounded == 5) == (array == 5)).all()


def test_with_a_ct_fat_is_what_has_fats_hu() -> None:
    mask = kidneys()
    hu = np.full(mask.shape, 40, np.int16)
    hu[:, :30] = -100
    done = perirenal_fat(mask, mask.with_array(hu), distance_mm=10)
    fat = done.mask.array == FAT
    assert done.facts["method"] == "hu"
    assert fat[:, :29].any()
    assert not fat[:, 31:].any()  # closed by one voxel
    moved = LabelMap(mask.array, mask.spacing_mm, (500, 0, 0), labels=mask.labels).with_array(hu)
    with pytest.raises(GridsDiffer):
        perirenal_fat(mask, moved)


def test_fat_needs_a_kidney() -> None:
    with pytest.raises(LabelsMissing, match="2 kidney_right.*it has 5 liver"):
        perirenal_fat(of(np.full((3, 3, 3), 5)))


@needs_ct
@pytest.mark.parametrize(("distance", "least"), [(10, 0.90), (15, 0.87)])
def test_estimated_fat_is_nearly_the_cts(distance: float, least: float) -> None:
    mask = read_nifti((SHARED / "ct_total_seg.nii.gz").read_bytes(), "mask", as_mask=True)
    ct = read_nifti((SHARED / "ct.nii.gz").read_bytes(), "ct")
    assert isinstance(mask, LabelMap)
    found, seen = perirenal_fat(mask, distance_mm=distance), perirenal_fat(mask, ct, distance_mm=distance)
    x = np.arange(mask.shape[2])
    for half in (x < mask.shape[2] // 2, x >= mask.shape[2] // 2):
        one, other = (m.mask.array[:, :, half] == FAT for m in (found, seen))
        assert 2 * (one & other).sum() / (one.sum() + other.sum()) >= least
    values = ct.array[seen.mask.array == FAT]
    assert ((values >= FAT_HU[0]) & (values <= FAT_HU[1])).mean() > 0.9


# --- templates ----------------------------------------------------------------------------------------------------------------


def patient(seed: int, spacing: tuple[float, float, float] = (3.0, 2.5, 2.5)) -> LabelMap:
    truth = make_phantom(seed, spacing_mm=spacing, oblique=(0, 0, 0)).truth
    merged = merge_label_maps([truth["organs"], truth["vessels"], truth["ureters"], truth["tumor"]], only=KNOWN)
    return LabelMap(merged.array, merged.spacing_mm, merged.origin_mm, merged.direction, KNOWN)


@pytest.fixture(scope="module")
def pair() -> tuple[LabelMap, LabelMap]:
    return patient(3), patient(8)


def test_shared_structures_are_aligned_without_folds(pair: tuple[LabelMap, LabelMap]) -> None:
    own, pattern = (coarse(m.reoriented("LPS")) for m in pair)
    one, other = structures(own), structures(pattern)
    shared = sorted(one.keys() & other.keys())
    assert {1, 2, 3, 5, 21} <= set(shared)
    alignment = align(own, pattern, one, other, shared)
    dice = shared_dice(own, pattern, alignment, one, other, shared)
    assert np.mean(list(dice.values())) >= 0.94
    assert min(dice.values()) >= 0.92
    assert alignment.jacobian().min() > 0
    # There and back.
    points = np.argwhere(one[5])[::50] * templates.WORK_MM + own.origin_mm
    assert np.abs(alignment.to_patient(alignment.to_template(points)) - points).max() < 0.5


def test_the_patient_wins_and_disease_stays_behind(pair: tuple[LabelMap, LabelMap]) -> None:
    whole, template = pair
    keep = np.isin(whole.array, (2, 3, 202, 5))
    known = LabelMap(
        np.where(keep, whole.array, 0).astype(np.uint8), whole.spacing_mm, whole.origin_mm, whole.direction, (2, 3, 5, 202)
    )
    done = sample(known, template)
    array = done.mask.array
    assert np.array_equal(array[keep], whole.array[keep])
    assert not ((array == 202) & ~keep).any()
    assert (203 in known.labels) == bool((array == 203).any())
    rows = {row["label"]: row for row in done.facts["structures"]}
    assert rows[2]["source"] == "patient"
    assert {1, 21, 204, 205, 206} <= {n for n, row in rows.items() if row["source"] == "template"}
    assert rows[1]["confidence"] > rows[21]["confidence"]  # the spleen is near the kidneys, the bladder is not
    assert 0 < rows[21]["confidence"] < 1
    # The tubes are whole, wherever they ran.
    parts, count = ndimage.label(array == 206, np.ones((3, 3, 3)))
    assert count <= 4
    assert parts.any()


def test_a_template_on_itself_is_itself(pair: tuple[LabelMap, LabelMap]) -> None:
    whole = pair[0]
    keep = np.isin(whole.array, (1, 2, 3, 21))
    known = LabelMap(
        np.where(keep, whole.array, 0).astype(np.uint8), whole.spacing_mm, whole.origin_mm, whole.direction, (1, 2, 3, 21)
    )
    done = sample(known, whole)
    liver, true = done.mask.array == 5, whole.array == 5
    assert 2 * (liver & true).sum() / (liver.sum() + true.sum()) > 0.93


def test_without_a_template_the_synthetic_patient_serves(pair: tuple[LabelMap, LabelMap]) -> None:
    whole = pair[0]
    keep = np.isin(whole.array, (2, 3))
    known = LabelMap(
        np.where(keep, whole.array, 0).astype(np.uint8), whole.spacing_mm, whole.origin_mm, whole.direction, (2, 3)
    )
    done = sample(known)
    assert done.facts["template"] == "built-in synthetic patient"
    assert any("2 structure" in w for w in done.warnings)
    assert {5, 204} <= set(done.mask.counts())
    with pytest.raises(LabelsMissing, match="structure that the template has"):
        sample(of(np.full((9, 9, 9), 15)))


# --- the stage ----------------------------------------------------------------------------------------------------------------


def test_the_stage_runs_every_component_and_results_can_be_kept(pair: tuple[LabelMap, LabelMap]) -> None:
    stage, whole = Postprocess(), pair[0]
    for component in COMPONENTS:
        _, operation = stage.operation(component.id)
        inputs = {p.name: [whole] if p.many else whole for p in component.inputs if p.kind == "mask" and p.name != "template"}
        done = operation(inputs, component.parameters(), lambda *_: None)
        assert len(done.outputs) == len(component.outputs)
        for port, value in zip(component.outputs, done.outputs, strict=True):
            kinds: dict[str, Any] = {"mask": LabelMap, "report": bytes, "scene": Scene}
            assert isinstance(value, kinds[port.kind])
            again = from_bytes(to_bytes(value))
            assert to_bytes(again) == to_bytes(value)
        assert component.parameters is NoParameters or component.parameters.model_fields


def test_all_loops_are_compiled_before_the_first_request(pair: tuple[LabelMap, LabelMap]) -> None:
    """Whatever is asked for afterwards, in whatever type and order of a mask, there is nothing left to compile."""
    compile_kernels()
    loops = [loop for loop in vars(kernels).values() if hasattr(loop, "signatures")]
    before = [len(loop.signatures) for loop in loops]
    assert before == [1] * len(loops) != []
    stage = Postprocess()
    for dtype, axcodes in ((np.uint8, "LPS"), (np.uint16, "RAS"), (np.uint32, "SAR")):
        whole = replace(pair[0], array=pair[0].array.astype(dtype)).reoriented(axcodes)
        for component in COMPONENTS:
            inputs = {p.name: [whole] if p.many else whole for p in component.inputs if p.kind == "mask"}
            stage.operation(component.id)[1](inputs, component.parameters(), lambda *_: None)
    assert [len(loop.signatures) for loop in loops] == before


def test_a_pipeline_may_pass_over_what_is_missing() -> None:
    stage, liver = Postprocess(), of(np.full((4, 4, 4), 5))
    for name, inputs in (("vessel", {"mask": liver}), ("ureter", {"mask": liver}), ("fat", {"masks": [liver]})):
        component, operation = stage.operation(f"postprocess/{name}")
        with pytest.raises(LabelsMissing):
            operation(inputs, component.parameters(), lambda *_: None)
        done = operation(inputs, component.parameters(skip_missing=True), lambda *_: None)
        assert np.array_equal(done.outputs[0].array, liver.array)
        assert done.facts == {"skipped": True}
        assert "5 liver" in done.warnings[0]


def test_a_template_may_be_spelled_as_clients_spell_it() -> None:
    from deployments.gateway.app import request_model
    from deployments.postprocess.components import SAMPLE

    model = request_model(SAMPLE)
    for name in ("template_path", "templete_path"):
        body = model.model_validate({"mask_path": "m.nii.gz", name: "t.nii.gz"})
        assert body.model_dump(exclude_unset=True) == {"mask_path": "m.nii.gz", "template_path": "t.nii.gz"}
    with pytest.raises(ValueError, match="Extra inputs"):
        model.model_validate({"mask_path": "m.nii.gz", "tmplate_path": "t.nii.gz"})
