from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import trimesh

from deployments.imageio.nifti import read_nifti
from deployments.smoothing import surfaces
from deployments.smoothing.measuring import crossings, distances_to_boundary, genus, open_edges
from deployments.smoothing.surfaces import Options, label_map_to_scene
from scangraph.contracts import LabelMap, SceneFiles, Surface, label_table
from scangraph.contracts.errors import InvalidParameters, TooLargeForMemory
from tests.smoothing.shapes import THICK, THIN, as_trimesh, capsule, distance_to_line, is_closed, only

CODES = ["".join(p) for axes in itertools.permutations(["LR", "PA", "SI"]) for p in itertools.product(*axes)]
SPHERES = [(25.0, THIN, 2.0), (25.0, THICK, 4.5), (6.0, THIN, 3.5)]


def ball_at(radius: float, spacing: tuple[float, float, float]) -> tuple[LabelMap, list[float]]:
    centre = [radius + 4.3, radius + 4.1, radius + 4.6]
    return capsule(centre, centre, radius, spacing), centre


def normal_deviation(surface: Surface, centre: list[float]) -> float:
    """Mean angle in degrees between the vertices' normals and a sphere's."""
    mesh = as_trimesh(surface)
    true = mesh.vertices - centre
    true /= np.linalg.norm(true, axis=1, keepdims=True)
    return float(np.degrees(np.arccos(np.clip((mesh.vertex_normals * true).sum(axis=1), -1, 1))).mean())


@pytest.mark.parametrize(("radius", "spacing", "degrees"), SPHERES)
def test_spheres_are_true_and_smooth(radius: float, spacing: tuple[float, float, float], degrees: float) -> None:
    mask, centre = ball_at(radius, spacing)
    surface = only(mask, error_mm=0.0)
    distance = np.linalg.norm(surface.vertices_mm - centre, axis=1) - radius
    assert np.abs(distance).mean() < (0.06 if spacing == THIN and radius < 10 else 0.045 * max(spacing))
    assert normal_deviation(surface, centre) < degrees
    assert surface.volume_ml == pytest.approx(4 / 3 * np.pi * radius**3 / 1000, rel=0.01)
    assert surface.volume_ml == pytest.approx(mask.volumes_ml()[52], rel=1e-4)
    assert is_closed(surface)
    assert crossings(surface.vertices_mm, surface.faces) == 0
    assert normal_deviation(only(mask, smoothing=0.0, error_mm=0.0), centre) > 2 * degrees


@pytest.mark.parametrize("error_mm", [0.02, 0.1])
def test_fewer_triangles_stay_within_their_error(error_mm: float) -> None:
    mask, centre = ball_at(25.0, THIN)
    fine, coarse = only(mask, error_mm=0.0), only(mask, error_mm=error_mm)
    assert len(coarse.faces) < len(fine.faces) / 4
    away = np.linalg.norm(as_trimesh(coarse).triangles_center - centre, axis=1) - 25
    assert np.sqrt((away**2).mean()) < 0.05 + error_mm
    assert is_closed(coarse)
    assert crossings(coarse.vertices_mm, coarse.faces) == 0
    assert coarse.volume_ml == pytest.approx(fine.volume_ml, rel=1e-4)


@pytest.mark.parametrize(("radius", "allowed"), [(5.0, 0.01), (2.0, 0.01), (1.2, 0.03)])
def test_tubes_keep_their_volume_and_their_place(radius: float, allowed: float) -> None:
    true = np.pi * radius**2 * (56 + 4 / 3 * radius) / 1000
    a, b = (9.1, 9.3, 8.2), (9.1 + 0.3 * 56, 9.3 + 0.4 * 56, 8.2 + np.sqrt(0.75) * 56)
    for error_mm in (0.0, 0.05):
        mask = capsule(a, b, radius, THIN)
        surface = only(mask, error_mm=error_mm)
        assert surface.volume_ml == pytest.approx(true, rel=allowed)
        assert surface.measures["components"] == 1
        assert surface.measures["genus"] == 0
        assert is_closed(surface)
        assert crossings(surface.vertices_mm, surface.faces) == 0
        away = distance_to_line(as_trimesh(surface).triangles_center, a, b) - radius
        assert np.abs(away).mean() < 0.15


def test_a_sphere_lies_where_its_voxels_lie() -> None:
    """The centre of the mesh's volume is the mean of the voxels' centres: half a voxel off would be 0.4 mm."""
    mask, _ = ball_at(9.0, THIN)
    expected = mask.index_to_world(np.argwhere(mask.array)).mean(axis=0)
    for options in ({"smoothing": 0.0}, {"error_mm": 0.0}, {"error_mm": 0.1}):
        assert np.abs(as_trimesh(only(mask, **options)).center_mass - expected).max() < 0.02


def test_no_piece_of_a_thin_vessel_is_lost() -> None:
    mask = capsule((9, 9, 8), (9, 9, 68), 1.2, THIN)
    array = mask.array.copy()
    array[20:23] = array[40:41] = 0
    array[30, 2, 2] = 52  # and a voxel on its own
    pieces = as_trimesh(only(LabelMap(array, THIN, labels=(52,)))).split(only_watertight=True)
    assert len(pieces) == 4
    assert all(piece.volume > 0 for piece in pieces)


def test_small_pieces_are_left_out_where_wanted_and_said() -> None:
    array = np.zeros((20, 20, 20), np.uint8)
    array[2:9, 2:9, 2:9], array[14, 14, 14] = 2, 2
    array[15, 15, 15], array[2, 14, 14] = 2, 3
    mask = LabelMap(array, (1, 1, 1), labels=(2, 3))
    scene, warnings = label_map_to_scene(mask, Options(min_volume_mm3=5))
    assert [s.label for s in scene.surfaces] == [2]
    assert scene.surfaces[0].measures["components"] == 1
    assert scene.surfaces[0].measures["voxel_volume_ml"] == pytest.approx(0.343)
    assert any(w.startswith("kidney_right: 2 of 3 pieces left out") for w in warnings)
    assert any(w.startswith("kidney_left: 1 of 1 pieces left out") for w in warnings)
    assert array[14, 14, 14] == 2  # in a copy


@pytest.mark.parametrize("codes", CODES)
def test_every_orientation_gives_the_same_surface(ball: LabelMap, codes: str) -> None:
    """On an oblique grid, so that 24 of the 48 are mirrored oblique ones; averages know no order of axes."""
    turned = ball.reoriented(codes)
    expected = {s.label: s for s in label_map_to_scene(ball, Options(error_mm=0))[0].surfaces}
    found = label_map_to_scene(turned, Options(error_mm=0))[0].surfaces
    assert [s.label for s in found] == [2, 5]
    for surface in found:
        assert is_closed(surface)
        theirs = expected[surface.label]
        assert surface.vertices_mm.shape == theirs.vertices_mm.shape
        nearest = trimesh.proximity.ProximityQuery(as_trimesh(theirs)).vertex(surface.vertices_mm)[0]
        assert nearest.max() < 2e-3
        assert surface.volume_ml == pytest.approx(theirs.volume_ml, rel=1e-4)


def test_vertices_lie_beside_the_voxels_corners(ball: LabelMap) -> None:
    """In world millimetres of an oblique grid, against the grid's own arithmetic."""
    for codes in ("LPS", "RAS", "SLA", "PIR"):
        mask = ball.reoriented(codes)
        padded = np.pad(mask.array, 1)
        for surface in label_map_to_scene(mask, Options(smoothing=0, error_mm=0))[0].surfaces:
            cell = np.floor(mask.world_to_index(as_trimesh(surface).vertices)).astype(int) + 1
            corners = np.stack([padded[tuple((cell + step).T)] for step in itertools.product((0, 1), repeat=3)])
            inside = corners == surface.label
            assert (inside.any(axis=0) & ~inside.all(axis=0)).all()


def test_a_box_lies_where_its_voxels_lie() -> None:
    array = np.zeros((20, 20, 30), np.uint8)
    array[4:16, 4:16, 6:26] = 2
    mask = LabelMap(array, (2.0, 1.0, 0.5), (100.0, 200.0, 300.0), labels=(2,))
    box = only(mask).measures["box_mm"]
    expected = [[100 + 5.5 * 0.5, 200 + 3.5, 300 + 3.5 * 2], [100 + 25.5 * 0.5, 200 + 15.5, 300 + 15.5 * 2]]
    assert np.abs(np.array(box) - expected).max() < 0.35


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.5, 1.0, 2.0])
def test_hard_masks_are_watertight(smoothing: float, joint: bool) -> None:
    """Single voxels, corner and edge contacts, holes, the scan's border, touching structures."""
    array = np.zeros((16, 16, 16), np.uint8)
    array[2, 2, 2] = 1
    array[5, 5, 5] = array[6, 6, 6] = 2
    array[9, 9, 9] = array[9, 10, 10] = 3
    array[11:16, 0:6, 0:6] = 5
    array[13, 2, 2] = 0
    array[11:16, 6:9, 0:6] = 6
    mask = LabelMap(array, (1.0, 1.0, 1.0), labels=(1, 2, 3, 5, 6))
    scene, warnings = label_map_to_scene(mask, Options(smoothing=smoothing, joint=joint))
    assert [s.label for s in scene.surfaces] == [1, 2, 3, 5, 6]
    for surface in scene.surfaces:
        assert open_edges(surface.faces) == 0
        assert is_closed(surface)
        assert surface.measures["watertight"]
        assert surface.volume_ml == pytest.approx(mask.volumes_ml()[surface.label], rel=0.01)
    assert [s.measures["components"] for s in scene.surfaces] == [1, 2, 1, 2, 1]  # the liver's hole is a surface, too
    (edge,) = [w for w in warnings if "edge of the scan" in w]
    assert "liver" in edge
    assert "stomach" in edge
    assert "spleen" not in edge
    assert [s.measures["touches_edge"] for s in scene.surfaces] == [False, False, False, True, True]


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32])
def test_noise_is_watertight(dtype: type[np.unsignedinteger], joint: bool) -> None:
    """Every way in which voxels of three labels can touch, many times."""
    random = np.random.default_rng(7)
    for density in (0.1, 0.3, 0.5, 0.8):
        array = (random.random((9, 10, 11)) < density) * random.integers(1, 4, (9, 10, 11))
        mask = LabelMap(array.astype(dtype), (1.5, 1.0, 0.7), labels=(1, 2, 3))
        for smoothing in (0.0, 1.0):
            for surface in label_map_to_scene(mask, Options(smoothing=smoothing, joint=joint))[0].surfaces:
                assert open_edges(surface.faces) == 0
                assert surface.volume_ml > 0


def test_arrays_from_the_object_store_are_read_only_and_stay_so(ball: LabelMap) -> None:
    ball.array.flags.writeable = False
    turned = ball.reoriented("SRA")  # neither C nor Fortran order
    before = turned.array.copy()
    assert len(label_map_to_scene(turned, Options(structures=(2,)))[0].surfaces) == 1
    assert (turned.array == before).all()


def test_numbers_beyond_a_byte_and_too_many_structures() -> None:
    array = np.zeros((4, 4, 1200), np.uint16)
    array[1:3, 1:3, 1:1199] = np.repeat(np.arange(1, 600, dtype=np.uint16), 2)
    names = {n: f"part {n}" for n in range(1, 600)}
    mask = LabelMap(array, (1, 1, 1), labels=tuple(names), names=names)
    scene, warnings = label_map_to_scene(mask, Options(structures=(300, 599, -1, 70_000)))
    assert sum("does not occur" in warning for warning in warnings) == 2
    assert [(s.label, s.name) for s in scene.surfaces] == [(300, mask.label(300).name), (599, mask.label(599).name)]
    with pytest.raises(InvalidParameters, match="up to 255 structures, this would have 599"):
        label_map_to_scene(mask)


def test_levels_of_detail_and_counts_of_triangles() -> None:
    mask, _ = ball_at(25.0, THIN)
    scene, _ = label_map_to_scene(mask, Options(levels=3))
    counts = [len(s.faces) for s in scene.surfaces]
    assert [s.level for s in scene.surfaces] == [0, 1, 2]
    assert counts[1] == pytest.approx(counts[0] / 4, rel=0.02)
    assert counts[2] == 200  # no fewer
    assert all(is_closed(s) for s in scene.surfaces)
    assert all(s.volume_ml == pytest.approx(scene.surfaces[0].volume_ml, rel=1e-3) for s in scene.surfaces)
    (surface,) = label_map_to_scene(mask, Options(triangles=3000))[0].surfaces
    assert 2990 <= len(surface.faces) <= 3000


def test_measures_say_what_is_there(ball: LabelMap) -> None:
    surface = next(s for s in label_map_to_scene(ball)[0].surfaces if s.label == 2)
    mesh, measures = as_trimesh(surface), surface.measures
    assert measures["voxel_volume_ml"] == pytest.approx(ball.volumes_ml()[2])
    assert measures["mesh_volume_ml"] == pytest.approx(mesh.volume / 1000, rel=1e-4)
    assert measures["area_cm2"] == pytest.approx(mesh.area / 100, rel=1e-4)
    assert measures["triangles"] == len(surface.faces)
    assert measures["vertices"] == len(surface.vertices_mm)
    assert measures["genus"] == 0
    assert measures["components"] == 1
    assert np.allclose(measures["box_mm"], [mesh.vertices.min(axis=0), mesh.vertices.max(axis=0)])
    distance = measures["distance_mm"]
    assert 0 < distance["mean"] < distance["p95"] < distance["max"] < max(ball.spacing_mm)
    assert measures["warnings"] == []


def test_distance_to_the_boundary_against_all_faces() -> None:
    random = np.random.default_rng(5)
    array = np.zeros((7, 8, 9), np.uint8)
    array[2:5, 2:6, 3:7] = random.random((3, 4, 4)) < 0.7
    spacing = (1.5, 1.0, 0.7)
    points = random.random((200, 3)) * (8, 7, 6)
    found = distances_to_boundary(points, array, 1, spacing)
    faces = []
    padded = np.pad(array, 1)
    for z, y, x in np.argwhere(padded):
        for axis, side in itertools.product(range(3), (-1, 1)):
            other = [z, y, x]
            other[axis] += side
            if not padded[tuple(other)]:
                faces.append((np.array([x, y, z]) - 1, 2 - axis, side))
    expected = np.full(len(points), np.inf)
    scale = np.array(spacing)[::-1]
    for voxel, axis, side in faces:
        low, high = (voxel - 0.5) * scale, (voxel + 0.5) * scale
        low[axis] = high[axis] = (voxel[axis] + 0.5 * side) * scale[axis]
        away = np.maximum(np.maximum(low - points * scale, points * scale - high), 0)
        expected = np.minimum(expected, np.linalg.norm(away, axis=1))
    near = expected < 2.5
    assert near.sum() > 150
    assert np.allclose(found[near], expected[near])


def test_genus_of_a_ring_and_of_two_balls() -> None:
    z, y, x = np.mgrid[:16, :40, :40]
    ring = (np.hypot(np.hypot(y - 20, x - 20) - 12, z - 8) < 4).astype(np.uint8) * 2
    assert only(LabelMap(ring, (1, 1, 1), labels=(2,))).measures["genus"] == 1
    ball = trimesh.creation.icosphere(2)
    assert genus(2 * len(ball.vertices), 2 * len(ball.faces), 2) == 0


def test_open_edges_sees_a_hole_and_a_flipped_face() -> None:
    faces = trimesh.creation.icosphere(1).faces
    assert open_edges(faces) == 0
    assert open_edges(faces[1:]) == 3
    flipped = faces.copy()
    flipped[0] = flipped[0][::-1]
    assert open_edges(flipped) > 0


def test_crossings_are_seen() -> None:
    ball = trimesh.creation.icosphere(3, radius=10)
    assert crossings(ball.vertices, ball.faces) == 0
    both = np.concatenate([ball.vertices, ball.vertices + np.array((8, 1, 2))])
    assert crossings(both, np.concatenate([ball.faces, ball.faces + len(ball.vertices)])) > 50
    dented = ball.vertices.copy()
    dented[np.argmax(dented[:, 2])] = (0, 0, -15)
    assert crossings(dented, ball.faces) > 0


def test_structures_frames_and_empty_masks(ball: LabelMap) -> None:
    scene, warnings = label_map_to_scene(ball, Options(structures=(5, 52), frame="RAS", files=SceneFiles(("glb",))))
    assert [s.name for s in scene.surfaces] == ["liver"]
    assert any("aorta was asked for" in w for w in warnings)
    lps = label_map_to_scene(ball, Options(structures=(5,)))[0].surfaces[0]
    assert np.allclose(scene.surfaces[0].vertices_mm * [-1, -1, 1], lps.vertices_mm)
    assert (scene.surfaces[0].faces == lps.faces).all()
    assert scene.frame == "RAS"
    assert scene.files.formats == ("glb",)
    assert scene.facts["source"]["shape_zyx"] == list(ball.shape)
    assert any("Research use only" in note for note in scene.notes)
    assert any("millimetres" in note for note in scene.notes)
    assert scene.surfaces[0].color == label_table()[5].color
    empty, warnings = label_map_to_scene(LabelMap(np.zeros((4, 4, 4), np.uint8), (1, 1, 1)))
    assert empty.surfaces == ()
    assert warnings == ["The mask is empty, and so is the scene."]


def test_strict_refuses_what_is_outside_the_tolerances(ball: LabelMap, monkeypatch: pytest.MonkeyPatch) -> None:
    label_map_to_scene(ball, Options(strict=True))
    scene, warnings = label_map_to_scene(ball, Options(error_mm=4.0))
    assert any("from the mask's boundary" in w for w in warnings)
    assert scene.surfaces[0].measures["warnings"]
    with pytest.raises(InvalidParameters, match=r"`strict` was asked for: .*kidney_right"):
        label_map_to_scene(ball, Options(error_mm=4.0, strict=True))


def test_too_much_for_the_memory_is_refused_before(ball: LabelMap, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(surfaces, "free_memory", lambda: 200 * 2**20)
    with pytest.raises(TooLargeForMemory, match="smoothing/base"):
        label_map_to_scene(ball)


@pytest.mark.parametrize("joint", [False, True])
def test_progress_can_stop_it(ball: LabelMap, joint: bool) -> None:
    told: list[tuple[int, int]] = []

    def stop(done: int, total: int, name: str) -> None:
        told.append((done, total))
        if done:
            raise InterruptedError(f"{done} of {total} {name}")

    with pytest.raises(InterruptedError, match="1 of 2"):
        label_map_to_scene(ball, Options(joint=joint), stop)
    assert told[0] == (0, 2)


def test_workers_change_nothing(ball: LabelMap) -> None:
    one, four = (label_map_to_scene(ball, Options(workers=n))[0].surfaces for n in (1, 4))
    for a, b in zip(one, four, strict=True):
        assert np.array_equal(a.vertices_mm, b.vertices_mm)
        assert np.array_equal(a.faces, b.faces)


def test_61_real_structures(sample_mask: Path) -> None:
    mask = read_nifti(sample_mask.read_bytes(), "m.nii.gz", as_mask=True)
    assert isinstance(mask, LabelMap)
    volumes = mask.volumes_ml()
    for joint in (False, True):
        scene, warnings = label_map_to_scene(mask, Options(joint=joint))
        assert len(scene.surfaces) == 61
        assert [s.label for s in scene.surfaces] == sorted(volumes)
        assert [s.name for s in scene.surfaces if open_edges(s.faces)] == []
        for surface in scene.surfaces:
            assert surface.volume_ml == pytest.approx(volumes[surface.label], rel=0.002), surface.name
        assert len(warnings) == 1  # the scan's edge, in one sentence
        # ../shared/data/README.md, RAS mm
        for name, centre, ml in (("kidney_right", (69.6, 132.1, 345.7), 192.6), ("kidney_left", (-78.1, 125.6, 357.4), 137.4)):
            kidney = next(s for s in scene.in_frame("RAS").surfaces if s.name == name)
            assert kidney.volume_ml == pytest.approx(ml, rel=0.005)
            assert np.abs(as_trimesh(kidney).center_mass - centre).max() < 0.2
        assert next(s for s in scene.surfaces if s.label == 52).volume_ml == pytest.approx(49.7, rel=0.005)
