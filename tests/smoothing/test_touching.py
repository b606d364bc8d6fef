from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial import cKDTree

from deployments.smoothing.measuring import crossings
from deployments.smoothing.surfaces import Options, label_map_to_scene
from scangraph.contracts import LabelMap, Surface
from tests.smoothing.shapes import as_trimesh, is_closed


@pytest.fixture(scope="module")
def halves() -> LabelMap:
    """A ball of radius 15 mm, cut obliquely into two structures, with a third on top of both."""
    z, y, x = np.mgrid[:46, :46, :46]
    inside = (z - 22) ** 2 + (y - 22) ** 2 + (x - 22) ** 2 < 15**2
    array = np.where(inside, np.where(x + 0.4 * y - 0.3 * z > 24.3, 3, 2), 0)
    array[(z - 36) ** 2 + (y - 22) ** 2 + (x - 24) ** 2 < 6**2] = 5
    return LabelMap(array.astype(np.uint8), (1.0, 0.9, 0.9), labels=(2, 3, 5))


def faces_in_space(surface: Surface) -> set[tuple[bytes, ...]]:
    """Triangles as sets of exact corners."""
    corners = [v.tobytes() for v in surface.vertices_mm]
    return {tuple(sorted(corners[v] for v in face)) for face in surface.faces}


def test_touching_structures_share_their_boundary_exactly(halves: LabelMap) -> None:
    for smoothing in (0.0, 1.0):
        for levels in (1, 3):
            scene, _ = label_map_to_scene(halves, Options(joint=True, smoothing=smoothing, levels=levels))
            for level in range(levels):
                left, right, top = (s for s in scene.surfaces if s.level == level)
                shared = faces_in_space(left) & faces_in_space(right)
                assert len(shared) > 20
                assert faces_in_space(left) & faces_in_space(top)
                # Everything that lies between the two is shared: nothing of one is inside the other.
                assert crossings(left.vertices_mm, left.faces) == 0
                whole = as_trimesh(left).volume + as_trimesh(right).volume + as_trimesh(top).volume
                assert whole / 1000 == pytest.approx(sum(halves.volumes_ml().values()), rel=3e-3 if level == 0 else 0.1)
                for surface in (left, right, top):
                    assert is_closed(surface)
                    if level == 0:
                        assert surface.volume_ml == pytest.approx(halves.volumes_ml()[surface.label], rel=0.01)


def test_one_by_one_they_part(halves: LabelMap) -> None:
    left, right, _ = label_map_to_scene(halves)[0].surfaces
    assert not faces_in_space(left) & faces_in_space(right)


def test_a_gap_between_them(halves: LabelMap) -> None:
    fine = {"error_mm": 0.0, "joint": True}
    together, apart = (label_map_to_scene(halves, Options(**fine, gap_mm=gap))[0].surfaces for gap in (0.0, 0.8))  # type: ignore[arg-type]
    left, right = (as_trimesh(s).vertices for s in together[:2])
    contact = np.array(sorted(set(map(tuple, left)) & set(map(tuple, right))))
    assert len(contact) > 300
    middle = contact[np.linalg.norm(contact - contact.mean(axis=0), axis=1) < 10]
    distance = sum(cKDTree(as_trimesh(s).sample(60_000, seed=1)).query(middle)[0] for s in apart[:2])
    assert np.median(distance) == pytest.approx(0.8, abs=0.1)
    assert all(is_closed(s) for s in apart)
    assert not faces_in_space(apart[0]) & faces_in_space(apart[1])


def test_what_does_not_touch_is_as_if_alone(halves: LabelMap) -> None:
    array = np.zeros((30, 30, 60), np.uint8)
    array[5:25, 5:25, 5:25], array[5:25, 5:25, 35:55] = 2, 3
    mask = LabelMap(array, (1, 1, 1), labels=(2, 3))
    alone, joint = (label_map_to_scene(mask, Options(joint=j, error_mm=0))[0].surfaces for j in (False, True))
    for a, b in zip(alone, joint, strict=True):
        assert np.abs(a.vertices_mm - b.vertices_mm).max() < 0.01
