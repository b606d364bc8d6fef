"""Centrelines: of what has a known one."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import cKDTree

from deployments.postprocess.centrelines import find_voxels, trace
from deployments.postprocess.skeletons import skeletonize
from scangraph.contracts import LabelMap
from scangraph.contracts.errors import LabelsMissing, UnknownLabels
from scangraph.scenefiles import write_scene
from tests.postprocess.trees import ARTERY, grow, paint

SPACING = (1.0, 0.8, 0.9)


def tube(points: Any, radius: float, shape: tuple[int, int, int], spacing: tuple[float, ...] = SPACING) -> NDArray[np.uint8]:
    index = np.argwhere(np.ones(shape, bool))
    near: NDArray[np.bool_] = cKDTree(points).query(index * np.array(spacing))[0] <= radius
    return near.reshape(shape).astype(np.uint8)


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (2.0, 0.7, 0.7), (0.8, 1.5, 0.8)])
def test_depth_is_the_distance_to_background(spacing: tuple[float, float, float]) -> None:
    rng = np.random.default_rng(0)
    array = (ndimage.gaussian_filter(rng.normal(size=(24, 25, 26)), 2.0) > 0.02).astype(np.uint8)
    voxels = find_voxels(array, (1,), spacing)
    padded = np.pad(array, 30, mode="edge")  # what is outside the volume is no background
    true = ndimage.distance_transform_edt(padded, sampling=spacing)[30:-30, 30:-30, 30:-30][array > 0]
    near = true < 6
    # Vector propagation errs seldom, and by less than a tenth of a voxel.
    assert np.abs(voxels.depth_mm - true)[near].max() < 0.1 * min(spacing)
    assert (np.abs(voxels.depth_mm - true)[near] > 1e-6).mean() < 0.01


def test_pieces_are_those_of_scipy() -> None:
    array = (np.random.default_rng(1).random((20, 21, 22)) < 0.08).astype(np.uint8)
    voxels = find_voxels(array, (1,), SPACING)
    parts, count = ndimage.label(array, np.ones((3, 3, 3)))
    assert voxels.pieces == count
    assert np.array_equal(voxels.piece, parts[array > 0] - 1)
    assert np.array_equal(voxels.index, np.argwhere(array))


def test_a_straight_tube() -> None:
    line = np.column_stack([np.arange(8, 52, 0.25), np.full(176, 16.0), np.full(176, 18.0)])
    voxels = find_voxels(tube(line, 3.0, (60, 40, 40)), (1,), SPACING)
    lines = trace(voxels)
    assert len(lines.chains) == 1
    assert sorted(lines.degree[lines.degree > 0]) == [1, 1]
    inner = np.abs(lines.position_mm[:, 0] - 30) < 15
    assert np.abs(lines.position_mm[inner, 1:] - [16, 18]).max() < 0.2
    assert np.abs(lines.radius_mm[inner] - 3.0).max() < 0.2
    assert lines.steps_mm[0][-1] == pytest.approx(47, abs=3)  # 44 mm and some of the two round caps


def test_a_fork_has_three_ends() -> None:
    t = np.arange(0, 25, 0.25)[:, None]
    start = np.array([10.0, 25.0, 25.0])
    arms = [start + t * [1, 0, 0], start + [25, 0, 0] + t * [0.7, 0.7, 0], start + [25, 0, 0] + t * [0.7, -0.6, 0.4]]
    lines = trace(find_voxels(tube(np.concatenate(arms), 2.5, (60, 64, 60)), (1,), SPACING))
    assert sorted(lines.degree[lines.degree > 0]) == [1, 1, 1, 3]
    assert len(lines.chains) == 3


def test_trees_have_their_ends_and_lie_in_the_middle() -> None:
    spacing = np.array(SPACING)
    rng = np.random.default_rng(3)
    branches = grow(rng, np.array([120.0, 100.0, 100.0]))
    shape = tuple(int(n) for n in np.ceil(np.array([120.0, 100.0, 100.0]) / spacing))
    truth, _, _ = paint(shape, spacing, branches)
    lines = trace(find_voxels(truth.astype(np.uint8), (1,), SPACING))
    leaves = 1 + len(branches) - len({b.parent for b in branches if b.parent >= 0})
    assert abs(int((lines.degree == 1).sum()) - leaves) <= 1
    points = np.concatenate([b.points_mm for b in branches])
    radii = np.concatenate([b.radii_mm for b in branches])
    off, nearest = cKDTree(points).query(lines.position_mm)
    assert np.quantile(off, 0.95) < 0.6
    assert abs(float(np.median(lines.radius_mm - radii[nearest]))) < 0.1
    # Every piece of every branch has a line near.
    assert np.quantile(cKDTree(lines.position_mm).query(points)[0], 0.95) < 3.0


def test_ragged_ends_and_holes_make_no_loops_and_no_fingers() -> None:
    line = np.column_stack([np.arange(10, 50, 0.25), np.full(160, 20.0), np.full(160, 20.0)])
    array = tube(line, 4.0, (60, 52, 46))
    rng = np.random.default_rng(5)
    array[np.nonzero(array)[0].min() :][:4][rng.random(array[:4].shape) < 0.3] = 0
    array[30:33, 24:26, 21:23] = 0  # a cavity
    lines = trace(find_voxels(array, (1,), SPACING), np.array([0]))
    assert int((lines.degree == 1).sum()) == 2


def test_nothing_and_a_single_voxel() -> None:
    empty = find_voxels(np.zeros((4, 5, 6), np.uint8), (1,), SPACING)
    assert trace(empty).chains == []
    array = np.zeros((4, 5, 6), np.uint8)
    array[2, 2, 2] = 1
    lines = trace(find_voxels(array, (1,), SPACING))
    assert (len(lines.position_mm), lines.chains) == (1, [])


@pytest.mark.parametrize("axcodes", ["LPS", "RAS", "SAR", "PIR"])
def test_the_skeleton_is_in_world_millimetres_whatever_the_array(axcodes: str) -> None:
    line = np.column_stack([np.arange(8, 52, 0.25), np.full(176, 16.0), np.full(176, 18.0)])
    mask = LabelMap(tube(line, 3.0, (60, 40, 40)) * np.uint8(ARTERY), SPACING, (-5, 7, 100), labels=(ARTERY,))
    turned = mask.reoriented(axcodes)
    done = skeletonize(
        LabelMap(np.ascontiguousarray(turned.array), turned.spacing_mm, turned.origin_mm, turned.direction, (204,))
    )
    (entry,) = json.loads(done.report)["structures"]
    assert [node["kind"] for node in entry["nodes"]] == ["end", "end"]
    (edge,) = entry["edges"]
    assert edge["tortuosity"] == pytest.approx(1.0, abs=0.02)
    middle = np.array(edge["points_mm"])[len(edge["points_mm"]) // 2]
    assert middle[:2] == pytest.approx([-5 + 18, 7 + 16], abs=0.3)
    obj = write_scene(done.scene, "lines")["lines.obj"].decode()
    assert obj.count("\nl ") == len(done.scene.lines[0].segments) == len(edge["points_mm"]) - 1


def test_structures_are_checked() -> None:
    mask = LabelMap(np.full((4, 4, 4), 5, np.uint8), SPACING, labels=(5,))
    with pytest.raises(LabelsMissing, match="204 artery.*it has 5 liver"):
        skeletonize(mask)
    with pytest.raises(UnknownLabels, match="190"):
        skeletonize(mask, structures=[190])
