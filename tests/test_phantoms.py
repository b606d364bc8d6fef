"""The synthetic patient: the same every time, on every grid, with everything where it belongs."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from scangraph.contracts import label_table
from scangraph.phantoms import (
    BLADDER,
    CYST,
    DEMO_SEED,
    KIDNEY_LEFT,
    KIDNEY_RIGHT,
    PHASES,
    TASK_LABELS,
    TASKS,
    TUMOR,
    Phantom,
    make_phantom,
)

NEIGHBOURS_26 = np.ones((3, 3, 3), bool)
#: Thick slices, oblique, fine in plane: what thin tubes are lost on.
SEEDS = (DEMO_SEED, 1009, 2005, 2008)


@cache
def phantom(seed: int) -> Phantom:
    return make_phantom(seed)


def mean_hu(p: Phantom, phase: str, task: str, label: int) -> float:
    inside = ndimage.binary_erosion(p.truth[task].array == label)  # without partial volume
    return float(p.volumes[phase].array[inside].mean())


def centre_of(mask: NDArray[np.bool_], p: Phantom) -> NDArray[np.float64]:
    """Mean LPS position (x, y, z) in mm."""
    return np.asarray(p.volumes["portal"].index_to_world(np.argwhere(mask)).mean(axis=0))


def test_same_seed_gives_the_same_bytes() -> None:
    again = make_phantom(DEMO_SEED)
    for phase in PHASES:
        np.testing.assert_array_equal(again.volumes[phase].array, phantom(DEMO_SEED).volumes[phase].array)
    for task in TASKS:
        np.testing.assert_array_equal(again.truth[task].array, phantom(DEMO_SEED).truth[task].array)
    assert again.description == phantom(DEMO_SEED).description


def test_other_seed_gives_another_patient() -> None:
    assert phantom(1009).description != phantom(2005).description


@pytest.mark.parametrize("seed", SEEDS)
def test_truth_and_phases_share_one_grid(seed: int) -> None:
    p = phantom(seed)
    assert set(p.volumes) == set(PHASES)
    assert set(p.truth) == set(TASKS)
    for volume in (*p.volumes.values(), *p.truth.values()):
        assert volume.same_grid(p.volumes["arterial"])
    assert {v.array.dtype for v in p.volumes.values()} == {np.dtype(np.int16)}
    assert {m.array.dtype for m in p.truth.values()} == {np.dtype(np.uint8)}


@pytest.mark.parametrize("seed", SEEDS)
def test_every_structure_is_there_and_in_the_label_table(seed: int) -> None:
    p = phantom(seed)
    for task, mask in p.truth.items():
        assert mask.labels == TASK_LABELS[task]
        assert set(mask.labels) <= label_table().keys()
        assert set(mask.counts()) | {TUMOR, CYST} >= set(mask.labels)
        assert set(mask.counts()) <= set(mask.labels)


def test_demo_patient_has_tumor_and_cyst() -> None:
    volumes = phantom(DEMO_SEED).truth["tumor"].volumes_ml()
    assert min(volumes[TUMOR], volumes[CYST]) > 1


def test_lesions_occur_about_as_often_as_documented() -> None:
    found = [make_phantom(seed, spacing_mm=(6, 6, 6)).truth["tumor"].counts() for seed in range(40)]
    assert 26 <= sum(TUMOR in counts for counts in found) <= 38
    assert 12 <= sum(CYST in counts for counts in found) <= 28


@pytest.mark.parametrize("seed", SEEDS)
def test_right_is_the_patients_right(seed: int) -> None:
    p = phantom(seed)
    organs = p.truth["organs"].array
    assert centre_of(organs == KIDNEY_RIGHT, p)[0] < -40  # LPS: x grows to the left
    assert centre_of(organs == KIDNEY_LEFT, p)[0] > 40


@pytest.mark.parametrize("seed", SEEDS)
def test_ureter_leads_from_pelvis_to_bladder_in_one_piece_a_side(seed: int) -> None:
    p = phantom(seed)
    organs = p.truth["organs"].array
    pieces, count = ndimage.label(p.truth["ureters"].array, NEIGHBOURS_26)
    assert count == 2
    urine = (p.volumes["delayed"].array > 200) & (p.volumes["arterial"].array < 100)  # in the pelvis, not bone or vessels
    for piece in (1, 2):
        around = ndimage.binary_dilation(pieces == piece, NEIGHBOURS_26)
        assert (around & (organs == BLADDER)).any()
        kidney = KIDNEY_RIGHT if centre_of(pieces == piece, p)[0] < 0 else KIDNEY_LEFT
        beyond = around & (pieces == 0) & urine & (organs != BLADDER)
        top = p.volumes["delayed"].index_to_world(np.argwhere(beyond))[:, 2].max()
        assert abs(top - centre_of(organs == kidney, p)[2]) < 30


@pytest.mark.parametrize("seed", SEEDS)
def test_contrast_arrives_in_order(seed: int) -> None:
    p = phantom(seed)
    artery, vein, urine = (
        [mean_hu(p, phase, task, label) for phase in PHASES]
        for task, label in (("organs", 52), ("organs", 63), ("organs", BLADDER))
    )
    assert artery[0] > artery[1] > artery[2] > 80
    assert artery[0] > 280
    assert vein[1] > max(vein[0], vein[2])
    assert artery[0] > vein[0] + 100
    assert urine[2] > 150 > max(urine[:2])


def test_oblique_grid_is_turned_and_orthonormal() -> None:
    volume = make_phantom(3, spacing_mm=(5, 4, 4), oblique=(10, -7, 5)).volumes["portal"]
    direction = np.asarray(volume.direction)
    np.testing.assert_allclose(direction.T @ direction, np.eye(3), atol=1e-12)
    assert np.linalg.det(direction) == pytest.approx(1)
    assert np.abs(direction - np.eye(3)).max() > 0.05
    assert volume.axcodes == "LPS"


def test_one_anatomy_on_every_grid() -> None:
    fine = make_phantom(5, spacing_mm=(2, 1.6, 1.6), oblique=(0, 0, 0))
    other = make_phantom(5, spacing_mm=(3, 2, 2), oblique=(8, -6, 10))
    for task in ("organs", "tumor", "ureters"):
        for label, ml in fine.truth[task].volumes_ml().items():
            # The field of view cuts the great vessels at its own, turned, upper and lower end.
            tolerance = 0.06 if label in {52, 63} else 0.03 if ml > 20 else 0.08
            assert other.truth[task].volumes_ml()[label] == pytest.approx(ml, rel=tolerance)


def test_spacing_and_noise_are_as_asked() -> None:
    p = make_phantom(8, spacing_mm=(4, 3, 3), oblique=(0, 0, 0), noise_hu=20)
    volume = p.volumes["portal"]
    assert volume.spacing_mm == pytest.approx((4, 3, 3))
    liver = ndimage.binary_erosion(p.truth["organs"].array == 5, iterations=2)
    assert volume.array[liver].std() == pytest.approx(20, rel=0.1)
