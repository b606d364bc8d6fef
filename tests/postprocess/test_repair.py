"""Repair of vessels and ureters: what is closed, what is left alone, and that nothing else changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import cKDTree

from deployments.imageio.nifti import read_nifti
from deployments.postprocess.bridging import Limits
from deployments.postprocess.repairing import Repaired, repair_ureters, repair_vessels
from scangraph.contracts import LabelMap
from scangraph.contracts.errors import GridsDiffer, LabelsMissing, UnknownLabels
from tests.contracts.grids import AXCODES
from tests.postprocess.trees import (
    ARTERY,
    BLADDER,
    KIDNEY_LEFT,
    KIDNEY_RIGHT,
    ORGAN,
    URETER,
    VEIN,
    Case,
    make_case,
    make_ureters,
    score,
)

SPACING = (1.0, 0.8, 0.8)
SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"
needs_ct = pytest.mark.skipif(not SHARED.exists(), reason="the sample CT is not here (../shared/data)")


def of(array: NDArray[Any], spacing: tuple[float, float, float] = SPACING) -> LabelMap:
    return LabelMap(array, spacing, labels=tuple(int(n) for n in np.unique(array) if n))


def tubes(*parts: tuple[Any, Any, float], shape: tuple[int, int, int] = (60, 50, 50), label: int = ARTERY) -> NDArray[np.uint8]:
    """Straight tubes from one point to another (mm), with a radius."""
    index = np.argwhere(np.ones(shape, bool)) * SPACING
    inside = np.zeros(len(index), bool)
    for a, b, radius in parts:
        line = np.linspace(a, b, 200)
        inside |= cKDTree(line).query(index)[0] <= radius
    return (inside.reshape(shape) * label).astype(np.uint8)


def gap(radius: float = 2.0, wide: float = 8.0, aside: float = 0.0) -> NDArray[np.uint8]:
    """One vessel along z with a gap; the second half may be shifted aside."""
    middle = 30.0
    a = ((4.0, 20.0, 20.0), (middle - wide / 2 - radius, 20.0, 20.0), radius)
    b = ((middle + wide / 2 + radius, 20.0 + aside, 20.0), (56.0, 20.0 + aside, 20.0), radius)
    return tubes(a, b)


def pieces(array: NDArray[Any], label: int = ARTERY) -> int:
    return int(ndimage.label(array == label, np.ones((3, 3, 3)))[1])


@pytest.fixture(scope="module")
def tree() -> Case:
    return make_case(4)


@pytest.fixture(scope="module")
def repaired(tree: Case) -> Repaired:
    return repair_vessels(tree.mask)


def test_quality_on_trees() -> None:
    """The targets, on few cases; benchmarks/postprocess has them on many."""
    scores = [score(case, repair_vessels(case.mask).mask.array) for case in map(make_case, range(100, 105))]
    closed = np.array([(length, done) for s in scores for length, done in s.closed])
    assert closed[closed[:, 0] < 10, 1].mean() >= 0.9
    assert closed[closed[:, 0] >= 10, 1].mean() >= 0.75
    assert np.mean([s.false_bridges for s in scores]) <= 0.3
    assert np.mean([s.cl_dice for s in scores]) >= 0.98


def test_only_background_is_painted_and_nothing_is_taken(tree: Case, repaired: Repaired) -> None:
    before, after = tree.mask.array, repaired.mask.array
    changed = before != after
    assert changed.any()
    assert (before[changed] == 0).all()
    assert set(np.unique(after[changed])) == {ARTERY}
    assert repaired.facts["pieces_after"] < repaired.facts["pieces_before"]
    assert repaired.facts["painted_ml"] == pytest.approx(changed.sum() * tree.mask.voxel_volume_mm3 / 1000, abs=1e-4)


def test_a_dry_run_tells_the_same_and_changes_nothing(tree: Case, repaired: Repaired) -> None:
    dry = repair_vessels(tree.mask, dry_run=True)
    assert dry.mask is tree.mask
    assert {**dry.facts, "dry_run": False} == repaired.facts


def test_what_is_whole_stays_and_a_second_repair_does_nothing(tree: Case, repaired: Repaired) -> None:
    whole = of(np.where(tree.truth, ARTERY, 0).astype(np.uint8))
    again = repair_vessels(whole)
    assert again.facts["bridges"] == []
    assert np.array_equal(again.mask.array, whole.array)
    twice = repair_vessels(repaired.mask)
    assert (twice.mask.array != repaired.mask.array).sum() <= 0.02 * (repaired.mask.array != tree.mask.array).sum()


@pytest.mark.parametrize("axcodes", AXCODES)
def test_all_orientations_give_the_same_repair(axcodes: str) -> None:
    mask = LabelMap(gap(), SPACING, (-3.0, 8.0, 40.0), labels=(ARTERY,))
    turned = mask.reoriented(axcodes)
    given = LabelMap(np.ascontiguousarray(turned.array), turned.spacing_mm, turned.origin_mm, turned.direction, (ARTERY,))
    one, other = repair_vessels(mask), repair_vessels(given)
    assert np.array_equal(other.mask.reoriented("LPS").array, one.mask.array)
    assert other.facts == one.facts
    assert other.mask.same_grid(given)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_mirrored_patient_gets_a_mirrored_repair(axis: int, tree: Case, repaired: Repaired) -> None:
    mirrored = repair_vessels(of(np.ascontiguousarray(np.flip(tree.mask.array, axis))))
    added = repaired.mask.array != tree.mask.array
    other = np.flip(mirrored.mask.array, axis) != tree.mask.array
    assert len(mirrored.facts["bridges"]) == len(repaired.facts["bridges"])
    # Not to the voxel: of two voxels at one distance, which is the farther one is a matter of order.
    assert 2 * (added & other).sum() / (added.sum() + other.sum()) > 0.9


def test_a_gap_is_told_in_world_millimetres() -> None:
    array = gap(radius=2.0, wide=8.0)
    done = repair_vessels(LabelMap(array, SPACING, (100.0, -50.0, 7.0), labels=(ARTERY,)))
    (bridge,) = done.facts["bridges"]
    low, high = sorted([bridge["from_mm"], bridge["to_mm"]], key=lambda p: p[2])
    assert low == pytest.approx([100 + 20, -50 + 20, 7 + 26], abs=1.6)
    assert high == pytest.approx([100 + 20, -50 + 20, 7 + 34], abs=1.6)
    assert bridge["gap_mm"] == pytest.approx(9.5, abs=1.5)  # between the mean faces, and the ends are round
    assert bridge["radius_mm"] == pytest.approx([2, 2], abs=0.3)
    assert bridge["turn_deg"] < 10
    assert bridge["confidence"] > 0.6
    assert bridge["ct_evidence"] is None
    assert pieces(done.mask.array) == 1


def test_the_bridge_is_as_thick_as_the_vessel() -> None:
    done = repair_vessels(of(gap(radius=3.0, wide=10.0)))
    area = (done.mask.array[30] == ARTERY).sum() * 0.64
    assert area == pytest.approx(np.pi * 9, rel=0.15)


def test_beyond_the_limits_nothing_is_bridged() -> None:
    far = repair_vessels(of(gap(wide=10.0)), limits=Limits(gap_mm=6.0))
    assert far.facts["bridges"] == []
    beside = repair_vessels(of(gap(wide=2.0, aside=14.0)))
    assert beside.facts["bridges"] == []
    shifted = repair_vessels(of(gap(wide=8.0, aside=7.0)), limits=Limits(angle_deg=20))
    assert shifted.facts["bridges"] == []
    assert any("angle" in r["reason"] for r in shifted.facts["rejected"])
    thin = tubes(((4, 20, 20), (24, 20, 20), 4.0), ((34, 20, 20), (56, 20, 20), 1.2))
    found = repair_vessels(of(thin), limits=Limits(radius_ratio=1.5))
    assert found.facts["bridges"] == []
    assert any("radii" in r["reason"] for r in found.facts["rejected"])


def test_organs_are_never_crossed() -> None:
    array = gap(wide=8.0)
    array[28:33][array[28:33] == 0] = ORGAN  # a wall through the whole volume
    done = repair_vessels(of(array))
    assert done.facts["bridges"] == []
    assert any("organ" in r["reason"] for r in done.facts["rejected"])


def test_a_small_obstacle_is_gone_around() -> None:
    array = gap(radius=2.0, wide=14.0)
    array[29:32, 23:27, 24:27] = VEIN
    done = repair_vessels(of(array))
    assert pieces(done.mask.array) == 1
    assert ((done.mask.array == VEIN) == (array == VEIN)).all()


def test_what_ends_at_the_edge_of_the_scan_stays_apart() -> None:
    # Two vessels that leave the volume side by side.
    array = tubes(((-10, 15, 20), (40, 15, 20), 2.0), ((-10, 24, 20), (40, 24, 20), 2.0))
    assert pieces(array) == 2
    done = repair_vessels(of(array[:40].copy()))
    assert done.facts["bridges"] == []


def test_specks_are_no_ends_and_go_only_when_asked() -> None:
    array = gap(wide=12.0)
    for z, y in ((30, 25), (20, 40), (45, 38)):
        array[z : z + 2, y : y + 2, 24:26] = ARTERY
    kept = repair_vessels(of(array))
    assert kept.facts["specks"] == 3
    assert ((kept.mask.array == ARTERY) | (array != ARTERY)).all()
    gone = repair_vessels(of(array), remove_specks=True)
    assert pieces(gone.mask.array) == 1


def test_a_branch_meets_a_vessels_side() -> None:
    array = tubes(((4, 20, 20), (56, 20, 20), 3.5), ((30, 20, 29), (30, 20, 40), 1.8))
    assert pieces(array) == 2
    done = repair_vessels(of(array))
    (bridge,) = done.facts["bridges"]
    assert bridge["kind"] == "side"
    assert pieces(done.mask.array) == 1


def test_arteries_and_veins_are_never_joined() -> None:
    array = gap(wide=6.0)
    array[30:][array[30:] == ARTERY] = VEIN
    done = repair_vessels(of(array), vessels="all")
    assert done.facts["bridges"] == []


def test_of_two_labels_of_one_tree_each_keeps_its_half() -> None:
    array = gap(wide=8.0)
    array[30:][array[30:] == ARTERY] = 66
    done = repair_vessels(of(array))
    (bridge,) = done.facts["bridges"]
    assert sorted(bridge["labels"]) == [66, ARTERY]
    assert done.mask.array[27, 25, 25] == ARTERY
    assert done.mask.array[33, 25, 25] == 66


def test_a_ct_is_evidence() -> None:
    array = gap(wide=8.0)
    mask = of(array)
    lit = np.where(repair_vessels(mask).mask.array == ARTERY, 300, 0).astype(np.int16)
    dark = np.where(array == ARTERY, 300, 0).astype(np.int16)
    (seen,) = repair_vessels(mask, mask.with_array(lit)).facts["bridges"]
    (unseen,) = repair_vessels(mask, mask.with_array(dark)).facts["bridges"]
    assert seen["ct_evidence"] > 0.9
    assert unseen["ct_evidence"] < 0.1
    assert seen["confidence"] > unseen["confidence"]
    other = LabelMap(array, (1.0, 0.8, 0.9), labels=(ARTERY,)).with_array(lit)
    with pytest.raises(GridsDiffer, match="0.9 mm"):
        repair_vessels(mask, other)


def test_labels_are_checked() -> None:
    mask = of(np.full((4, 4, 4), ORGAN, np.uint8))
    with pytest.raises(LabelsMissing, match="204 artery.*it has 5 liver"):
        repair_vessels(mask)
    with pytest.raises(LabelsMissing, match="205 vein"):
        repair_vessels(mask, structures=[VEIN])
    with pytest.raises(UnknownLabels, match="190"):
        repair_vessels(mask, structures=[190])
    with pytest.raises(LabelsMissing, match="206 ureter"):
        repair_ureters(mask)


def test_ureters_are_joined_side_by_side() -> None:
    for seed in (1, 2, 3):
        case = make_ureters(seed)
        done = repair_ureters(case.mask)
        result = score(case, done.mask.array)
        assert all(closed for _, closed in result.closed)
        assert result.cl_dice >= 0.995
        assert result.false_bridges == 0
        middle = case.mask.shape[2] / 2
        parts, count = ndimage.label(done.mask.array == URETER, np.ones((3, 3, 3)))
        assert count == 2
        assert all((np.argwhere(parts == n)[:, 2] < middle).mean() in (0.0, 1.0) for n in (1, 2))


def test_ureters_never_cross_to_the_other_side() -> None:
    # The right one ends high, the left one begins low: near to each other, and pointing at each other.
    array = tubes(((56, 20, 15), (33, 20, 22), 1.8), ((27, 20, 24), (4, 20, 31), 1.8), label=URETER)
    array[50:58, 10:30, 2:8], array[50:58, 10:30, 40:46] = KIDNEY_RIGHT, KIDNEY_LEFT
    assert repair_vessels(of(array), structures=[URETER]).facts["bridges"]  # as a vessel it would be joined
    done = repair_ureters(of(array), anchor=False)
    assert done.facts["bridges"] == []
    assert any("other side" in r["reason"] for r in done.facts["rejected"])


def test_ureters_are_led_to_the_bladder() -> None:
    case = make_ureters(1, gaps=0)
    array = case.mask.array.copy()
    low = int(np.argwhere(array == URETER)[:, 0].min())
    array[low : low + 8][array[low : low + 8] == URETER] = 0
    done = repair_ureters(of(array))
    assert [b["to"] for b in done.facts["bridges"]] == ["urinary_bladder"] * 2
    near = ndimage.binary_dilation(array == BLADDER, np.ones((3, 3, 3)))
    assert (near & (done.mask.array == URETER)).any()
    assert repair_ureters(of(array), anchor=False).facts["bridges"] == []


@needs_ct
@pytest.mark.parametrize("label", [65, 66, 67, 68])
def test_iliac_vessels_of_a_real_mask(label: int) -> None:
    """Cut across at a third of its height, by two slices; the voxels are 3 mm, a vessel is three of them wide."""
    mask = read_nifti((SHARED / "ct_total_seg.nii.gz").read_bytes(), "mask", as_mask=True)
    assert isinstance(mask, LabelMap)
    whole = repair_vessels(mask, structures=[label])
    assert whole.facts["bridges"] == []  # nothing is made up
    rows = np.flatnonzero((mask.array == label).any(axis=(1, 2)))
    z = int(rows[len(rows) // 3])
    array = mask.array.copy()
    array[z : z + 2][array[z : z + 2] == label] = 0
    cut = LabelMap(array, mask.spacing_mm, mask.origin_mm, mask.direction, mask.labels)
    done = repair_vessels(cut, structures=[label])
    changed = done.mask.array != array
    assert len(done.facts["bridges"]) == 1
    assert (array[changed] == 0).all()
    assert changed[z - 3 : z + 5].sum() == changed.sum()  # nothing elsewhere: vessels slant


@needs_ct
def test_far_pieces_of_a_real_mask_stay_apart() -> None:
    mask = read_nifti((SHARED / "ct_total_seg.nii.gz").read_bytes(), "mask", as_mask=True)
    assert isinstance(mask, LabelMap)
    assert repair_vessels(mask, structures=[64]).facts["bridges"] == []
    assert repair_vessels(mask, vessels="all").facts["painted_ml"] == 0
