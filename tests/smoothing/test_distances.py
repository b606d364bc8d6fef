from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import trimesh
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from benchmarks.smoothing.distances import by_vtk
from deployments.smoothing.deployment import Smoothing
from deployments.smoothing.distances import boundary_points, distances_to_surface, open3d_distances, summary
from deployments.smoothing.nets import extract
from deployments.smoothing.surfaces import label_map_to_scene
from scangraph.contracts import LabelMap
from scangraph.settings import SmoothingSettings

from .shapes import THIN, capsule

ROOT = Path(__file__).resolve().parents[2]


def brute_force(
    points: NDArray[np.float64], vertices: NDArray[np.float64], triangles: NDArray[np.int32]
) -> NDArray[np.float64]:
    corners = vertices[triangles]
    nearest = [trimesh.triangles.closest_point(corners, np.repeat(p[None], len(corners), 0)) for p in points]
    return np.array([np.linalg.norm(n - p, axis=1).min() for n, p in zip(nearest, points, strict=True)])


@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.sampled_from([0.0, 1.0, 900.0]), st.booleans())
@settings(max_examples=60, deadline=None)
def test_as_every_triangle_looked_at(seed: int, count: int, away: float, flat: bool) -> None:
    """Triangles in any number and place, joined or not, needles too; a single one has no hierarchy."""
    random = np.random.default_rng(seed)
    vertices = (random.normal(0, 10, (max(3, count), 3)) + away) * (1, 1, 0.01 if flat else 1)
    triangles = np.array([random.choice(len(vertices), 3, replace=False) for _ in range(count)], np.int32)
    points = np.concatenate([random.normal(0, 20, (20, 3)) + away, vertices[:5]])
    expected = brute_force(points, vertices, triangles)
    assert distances_to_surface(points, vertices, triangles) == pytest.approx(expected, abs=2e-4)  # single precision of 900 mm


def test_distances_to_a_sphere_are_known() -> None:
    ball = trimesh.creation.icosphere(5, 10.0)
    points = np.random.default_rng(3).normal(0, 12, (5000, 3))
    found = distances_to_surface(points, ball.vertices, ball.faces)
    assert found == pytest.approx(np.abs(np.linalg.norm(points, axis=1) - 10), abs=0.005)  # the polyhedron's own error
    assert found == pytest.approx(by_vtk(points, ball.vertices, ball.faces), abs=1e-5)


def test_the_order_of_the_points_does_not_matter() -> None:
    ball = trimesh.creation.icosphere(3, 10.0)
    random = np.random.default_rng(4)
    points = random.normal(0, 15, (500, 3))
    order = random.permutation(500)
    found = distances_to_surface(points, ball.vertices, ball.faces)
    assert distances_to_surface(points[order], ball.vertices, ball.faces) == pytest.approx(found[order], rel=1e-6)


def test_triangles_without_area_and_none_at_all() -> None:
    line = np.array([[0.0, 0, 0], [10, 0, 0], [5, 0, 0]])
    points = np.array([[5.0, 3, 0], [-4, 3, 0], [14, 0, 3], [2, 0, 0]])
    for corners in ([0, 1, 2], [2, 0, 1], [0, 0, 1], [0, 1, 1], [1, 0, 0]):
        found = distances_to_surface(points, line, np.array([corners], np.int32))
        assert found == pytest.approx([3, 5, 5, 0], abs=1e-6)
    assert distances_to_surface(points, line, np.array([[0, 0, 0]], np.int32)) == pytest.approx(np.linalg.norm(points, axis=1))
    assert np.isinf(distances_to_surface(points, line, np.zeros((0, 3), np.int32))).all()
    assert distances_to_surface(np.zeros((0, 3)), line, np.array([[0, 1, 2]], np.int32)).shape == (0,)


def test_points_are_the_centres_of_the_voxels_faces() -> None:
    array = np.zeros((5, 5, 5), np.uint8)
    array[2, 2, 2] = 7
    nets = extract(array)
    points = boundary_points(nets.corners, nets.quads, nets.triangles)
    sides = 2 + np.concatenate([np.eye(3), -np.eye(3)]) / 2
    assert sorted(map(tuple, points.tolist())) == sorted(map(tuple, sides.tolist()))


def test_points_of_large_and_of_knotty_boundaries() -> None:
    large = np.zeros((102, 102, 102), np.uint8)
    large[1:-1, 1:-1, 1:-1] = 1
    nets = extract(large)
    points = boundary_points(nets.corners, nets.quads, nets.triangles)
    assert 5000 < len(points) <= 10_000
    assert np.ptp(points, axis=0) == pytest.approx((100, 100, 100), abs=2)
    knotty = (np.indices((8, 8, 8)).sum(axis=0) % 2).astype(np.uint8)  # touches by edges only
    nets = extract(knotty)
    assert len(boundary_points(nets.corners, nets.quads, nets.triangles)) > 0


def test_only_this_direction_sees_what_a_surface_has_lost() -> None:
    """A ball with a thin branch, and a surface of the ball alone."""
    ball = capsule((20, 20, 20), (20, 20, 20), 10, THIN)
    array = np.pad(ball.array, ((0, 0), (0, 0), (0, 10)))
    array[20, 25, 33:48] = 52  # (y, z) = 19.5 and 20 mm
    both = LabelMap(array, THIN, labels=(52,))
    whole, lost = (label_map_to_scene(mask)[0].surfaces[0] for mask in (both, ball))
    nets = extract(both.array)
    points = boundary_points(nets.corners, nets.quads, nets.triangles) * THIN[::-1]
    kept = summary(distances_to_surface(points, whole.vertices_mm, whole.faces))
    assert whole.measures["distance_from_mask_mm"] == pytest.approx(kept, abs=1e-4)
    assert kept["max"] < 1.2  # a line of single voxels is rounded at its end
    missing = summary(distances_to_surface(points, lost.vertices_mm, lost.faces))
    tip = np.array([47.5 * 0.78, 25 * 0.78, 20.0])
    assert missing["max"] == pytest.approx(np.linalg.norm(tip - 20) - 10, abs=0.5)
    assert lost.measures["distance_mm"]["max"] < 1.0


def test_summaries_of_infinite_distances_are_infinite() -> None:
    assert summary(np.arange(101.0)) == {"mean": 50.0, "p95": 95.0, "max": 100.0}
    assert summary(np.array([1.0, np.inf])) == {"mean": np.inf, "p95": np.inf, "max": np.inf}
    assert summary(np.zeros(0))["p95"] == np.inf


# --- open3d, an extra ---------------------------------------------------------------------------------------------------------


def python_with_open3d() -> str:
    """An interpreter that can import open3d: this one, or that of the extra environment."""
    for python in (sys.executable, str(ROOT / ".envs/smoothing-open3d/bin/python")):
        if (
            Path(python).exists()
            and not subprocess.run([python, "-c", "import open3d"], capture_output=True, check=False).returncode
        ):
            return python
    pytest.skip("open3d is an extra and cannot be imported here: `make setup-open3d`")


_BOTH = """
import json, sys
import numpy as np
from deployments.smoothing.deployment import Smoothing
from deployments.smoothing.distances import distances_to_surface
from deployments.smoothing.surfaces import Options, label_map_to_scene
from scangraph.contracts import LabelMap
from scangraph.settings import SmoothingSettings

stage = Smoothing(SmoothingSettings(open3d=True))
z, y, x = np.mgrid[:30, :40, :40]
mask = LabelMap((np.hypot(np.hypot(z - 15, y - 20), x - 20) < 12).astype(np.uint8) * 5, (1.5, 0.8, 0.8), labels=(5,))
(surface,) = label_map_to_scene(mask, Options(surface_distance=stage._distance))[0].surfaces
points = np.random.default_rng(0).normal(15, 12, (4000, 3))
mesh = surface.vertices_mm, surface.faces
apart = stage._distance(points, *mesh) - distances_to_surface(points, *mesh)
empty = stage._distance(points, surface.vertices_mm, surface.faces[:0])
(ours,) = label_map_to_scene(mask)[0].surfaces
name = "distance_from_mask_mm"
print(json.dumps([float(np.abs(apart).max()), bool(np.isinf(empty).all()), surface.measures[name], ours.measures[name]]))
"""


def test_open3d_gives_the_same_distances() -> None:
    done = subprocess.run([python_with_open3d(), "-c", _BOTH], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    apart, empty_is_infinite, measured, ours = json.loads(done.stdout.splitlines()[-1])
    assert apart < 1e-4
    assert empty_is_infinite
    assert measured == pytest.approx(ours, abs=1e-4)


def test_the_setting_without_open3d_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open3d", None)
    with pytest.raises(ImportError, match="open3d"):
        open3d_distances()
    with pytest.raises(ImportError, match="open3d"):
        Smoothing(SmoothingSettings(open3d=True))
