from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import trimesh

from deployments.imageio.nifti import read_nifti
from deployments.smoothing.surfaces import (
    label_map_to_scene,
    open_edges,
    restore_volume,
    smooth_surface,
    vertex_normals,
)
from scangraph.contracts import LabelMap, Surface, label_table

SPACING = (1.0, 0.78, 0.78)


def sphere(radius_mm: float, spacing: tuple[float, float, float] = SPACING) -> tuple[LabelMap, np.ndarray]:
    """A sphere off the grid's centre, and its centre in LPS mm."""
    shape = tuple(int(2 * (radius_mm + 4) / s) for s in spacing)
    centre = np.array([n / 2 + 0.3 for n in shape])
    grid = np.moveaxis(np.indices(shape), 0, -1)
    distance = np.linalg.norm((grid - centre) * spacing, axis=-1)
    mask = LabelMap((distance < radius_mm).astype(np.uint8) * 2, spacing, (7.0, -8.0, 9.0), labels=(2,))
    return mask, mask.index_to_world(centre)


def only(mask: LabelMap, **options: float) -> Surface:
    scene, _ = label_map_to_scene(mask, **options)  # type: ignore[arg-type]
    (surface,) = scene.surfaces
    return surface


def is_closed(surface: Surface) -> bool:
    """As trimesh sees it: watertight, every face turned like its neighbours, and outward."""
    mesh = trimesh.Trimesh(surface.vertices_mm, surface.faces, process=False)
    return bool(mesh.is_watertight and mesh.is_winding_consistent and mesh.volume > 0)


def normal_deviation_degrees(surface: Surface, centre: np.ndarray) -> float:
    vertices = surface.vertices_mm.astype(float)
    true = vertices - centre
    true /= np.linalg.norm(true, axis=1, keepdims=True)
    cosine = np.einsum("ij,ij->i", vertex_normals(vertices, surface.faces.astype(np.int64)), true)
    return float(np.degrees(np.arccos(np.clip(cosine, -1, 1))).mean())


def test_sphere_is_true_and_smooth() -> None:
    mask, centre = sphere(25)
    surface = only(mask)
    distance = np.linalg.norm(surface.vertices_mm - centre, axis=1) - 25
    assert np.abs(distance).mean() < 0.045
    assert normal_deviation_degrees(surface, centre) < 2.5
    assert surface.volume_ml == pytest.approx(4 / 3 * np.pi * 25**3 / 1000, rel=0.005)
    raw = only(mask, smoothing=0.0)
    assert normal_deviation_degrees(raw, centre) > 3 * normal_deviation_degrees(surface, centre)


def test_a_sphere_lies_where_its_voxels_lie() -> None:
    """The centre of the mesh's volume is the mean of the voxels' centres: half a voxel off would be 0.4 mm."""
    mask, _ = sphere(9)
    expected = mask.index_to_world(np.argwhere(mask.array)).mean(axis=0)
    for smoothing in (0.0, 1.0):
        surface = only(mask, smoothing=smoothing)
        centre = trimesh.Trimesh(surface.vertices_mm, surface.faces, process=False).center_mass
        assert np.abs(centre - expected).max() < 0.01


def test_thick_slices_stay_smooth() -> None:
    mask, centre = sphere(25, (3.0, 0.8, 0.8))
    assert normal_deviation_degrees(only(mask), centre) < 6.5


def tube(radius_mm: float, label: int = 52) -> LabelMap:
    """A capsule of 60 mm along z."""
    z, y, x = np.mgrid[:76, :24, :24]
    point = np.stack([z * 1.0, y * 0.78, x * 0.78], axis=-1)
    axis = np.stack([np.clip(point[..., 0], 8, 68), np.full(z.shape, 9.1), np.full(z.shape, 9.3)], axis=-1)
    inside = np.linalg.norm(point - axis, axis=-1) < radius_mm
    return LabelMap(inside.astype(np.uint8) * label, SPACING, labels=(label,))


@pytest.mark.parametrize("radius", [5.0, 2.0, 1.2])
def test_tubes_keep_their_volume(radius: float) -> None:
    mask = tube(radius)
    surface = only(mask)
    assert surface.volume_ml == pytest.approx(mask.volumes_ml()[52], rel=0.005)
    assert is_closed(surface)
    distance = np.linalg.norm(surface.vertices_mm[:, :2] - [9.3, 9.1], axis=1)
    shaft = (surface.vertices_mm[:, 2] > 12) & (surface.vertices_mm[:, 2] < 64)
    assert distance[shaft].mean() == pytest.approx(radius, abs=0.15)


def test_smoothing_alone_would_lose_a_thin_tube() -> None:
    """What compensation is for: half of a tube of 1.2 mm goes without it, and marching cubes itself takes some percent."""
    raw = only(tube(1.2), smoothing=0.0)
    assert raw.volume_ml < 0.95 * tube(1.2).volumes_ml()[52]
    vertices, faces = raw.vertices_mm.astype(float), raw.faces.astype(np.int64)
    compensated = Surface("", 0, (0, 0, 0), smooth_surface(vertices, faces).astype(np.float32), raw.faces)
    assert compensated.volume_ml == pytest.approx(raw.volume_ml, rel=0.03)


def test_no_piece_of_a_thin_vessel_is_lost() -> None:
    array = tube(1.2).array.copy()
    array[20:23] = array[40:41] = 0
    array[30, 2, 2] = 52  # and a voxel on its own
    mask = LabelMap(array, SPACING, labels=(52,))
    pieces = trimesh.Trimesh(only(mask).vertices_mm, only(mask).faces, process=False).split(only_watertight=True)
    assert len(pieces) == 4
    assert all(piece.volume > 0 for piece in pieces)


CODES = ["".join(p) for axes in itertools.permutations(["LR", "PA", "SI"]) for p in itertools.product(*axes)]


@pytest.mark.parametrize("codes", CODES)
def test_every_orientation_gives_the_same_place_and_outward_faces(ball: LabelMap, codes: str) -> None:
    """On an oblique grid, so that 24 of the 48 are mirrored oblique ones."""
    turned = ball.reoriented(codes)
    # The raw surface is halfway between voxel centres inside and outside, whatever the axes are called.
    expected = {s.label: s for s in label_map_to_scene(ball, smoothing=0.0)[0].surfaces}
    found = label_map_to_scene(turned, smoothing=0.0)[0].surfaces
    assert [s.label for s in found] == [2, 5]
    for surface in found:
        assert is_closed(surface)
        places = (np.rint(s.vertices_mm * 100).astype(int) for s in (surface, expected[surface.label]))
        ours, theirs = (p[np.lexsort(p.T)] for p in places)
        assert ours.shape == theirs.shape
        assert np.abs(np.sort(ours, axis=0) - np.sort(theirs, axis=0)).max() <= 1
    # Which diagonal splits a square depends on the axes' order, so smoothed ones agree within a fraction of a voxel only.
    expected = {s.label: s for s in label_map_to_scene(ball)[0].surfaces}
    for surface in label_map_to_scene(turned)[0].surfaces:
        assert is_closed(surface)
        assert surface.volume_ml == pytest.approx(expected[surface.label].volume_ml, rel=0.002)
        for bound in (np.min, np.max):
            difference = bound(surface.vertices_mm, axis=0) - bound(expected[surface.label].vertices_mm, axis=0)
            assert np.abs(difference).max() < 0.1


def test_vertices_lie_halfway_between_voxel_centres(ball: LabelMap) -> None:
    """In world millimetres of an oblique grid, against the grid's own arithmetic."""
    for codes in ("LPS", "RAS", "SLA", "PIR"):
        mask = ball.reoriented(codes)
        for surface in label_map_to_scene(mask, smoothing=0.0)[0].surfaces:
            index = mask.world_to_index(surface.vertices_mm)
            halves = np.abs(index - np.floor(index) - 0.5) < 1e-3
            assert (halves.sum(axis=1) == 1).all()  # on an edge between two centres, in its middle
            step = np.where(halves, 0.5, 0.0)
            before, after = (np.rint(index + sign * step).astype(int) for sign in (-1, 1))
            inside = [mask.array[tuple(i.T)] == surface.label for i in (before, after)]
            assert (inside[0] != inside[1]).all()


def test_a_box_lies_where_its_voxels_lie() -> None:
    array = np.zeros((20, 20, 20), np.uint8)
    array[4:10, 5:12, 6:16] = 2
    mask = LabelMap(array, (2.0, 1.0, 0.5), (100.0, 200.0, 300.0), labels=(2,))
    vertices = only(mask, smoothing=0.0).vertices_mm
    assert vertices.min(axis=0) == pytest.approx([100 + 5.5 * 0.5, 200 + 4.5, 300 + 3.5 * 2])
    assert vertices.max(axis=0) == pytest.approx([100 + 15.5 * 0.5, 200 + 11.5, 300 + 9.5 * 2])


@pytest.mark.parametrize("smoothing", [0.0, 0.5, 1.0])
def test_hard_masks_are_watertight(smoothing: float) -> None:
    """Single voxels, corner and edge contacts, holes, the scan's border, touching structures."""
    array = np.zeros((16, 16, 16), np.uint8)
    array[2, 2, 2] = 1
    array[5, 5, 5] = array[6, 6, 6] = 2
    array[9, 9, 9] = array[9, 10, 10] = 3
    array[11:16, 0:6, 0:6] = 5
    array[13, 2, 2] = 0
    array[11:16, 6:9, 0:6] = 6
    mask = LabelMap(array, (1.0, 1.0, 1.0), labels=(1, 2, 3, 5, 6))
    scene, warnings = label_map_to_scene(mask, smoothing=smoothing)
    assert [s.label for s in scene.surfaces] == [1, 2, 3, 5, 6]
    for surface in scene.surfaces:
        assert open_edges(surface.faces) == 0
        assert is_closed(surface)
    (edge,) = [w for w in warnings if "edge of the scan" in w]
    assert "liver" in edge
    assert "stomach" in edge
    assert "spleen" not in edge
    assert any(w.startswith("spleen: the surface has") for w in warnings)  # a voxel's octahedron is a sixth of it


def test_a_few_voxels_do_not_shrink_away() -> None:
    for size in ((3, 1, 1), (2, 2, 1), (2, 2, 2)):
        array = np.zeros((8, 8, 8), np.uint8)
        array[tuple(slice(3, 3 + n) for n in size)] = 202
        mask = LabelMap(array, (1.0, 1.0, 1.0), labels=(202,))
        assert only(mask).volume_ml == pytest.approx(mask.volumes_ml()[202], rel=0.05)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32])
def test_noise_is_watertight(dtype: type[np.unsignedinteger]) -> None:
    """Every way in which voxels of three labels can touch, many times."""
    random = np.random.default_rng(7)
    for density in (0.1, 0.3, 0.5, 0.8):
        array = (random.random((9, 10, 11)) < density) * random.integers(1, 4, (9, 10, 11))
        mask = LabelMap(array.astype(dtype), (1.5, 1.0, 0.7), labels=(1, 2, 3))
        for smoothing in (0.0, 1.0):
            assert all(is_closed(s) for s in label_map_to_scene(mask, smoothing=smoothing)[0].surfaces)


def test_arrays_from_the_object_store_are_read_only_and_stay_so(ball: LabelMap) -> None:
    ball.array.flags.writeable = False
    turned = ball.reoriented("SRA")  # neither C nor Fortran order
    before = turned.array.copy()
    assert len(label_map_to_scene(turned, structures=[2])[0].surfaces) == 1
    assert (turned.array == before).all()


def test_open_edges_sees_a_hole_and_a_flipped_face() -> None:
    faces = trimesh.creation.icosphere(1).faces
    assert open_edges(faces) == 0
    assert open_edges(faces[1:]) == 3
    flipped = faces.copy()
    flipped[0] = flipped[0][::-1]
    assert open_edges(flipped) > 0


def test_smoothing_keeps_a_sphere_mesh() -> None:
    ball = trimesh.creation.icosphere(4, radius=10)
    smoothed = smooth_surface(np.asarray(ball.vertices, float), np.asarray(ball.faces, np.int64))
    assert np.abs(np.linalg.norm(smoothed, axis=1) - 10).max() < 0.05


def test_volume_is_restored_within_a_limit() -> None:
    ball = trimesh.creation.icosphere(4, radius=10)
    vertices, faces = np.asarray(ball.vertices) + np.array((1000, -500, 20)), np.asarray(ball.faces, np.int64)
    for wanted, farthest, found in ((1.05, 1.0, 1.05), (0.9, 1.0, 0.9), (2.0, 0.1, 1.01**3)):
        moved = restore_volume(vertices, faces, wanted * ball.volume, farthest)
        assert trimesh.Trimesh(moved, faces, process=False).volume == pytest.approx(found * ball.volume, rel=1e-3)


def test_structures_frames_and_empty_masks(ball: LabelMap) -> None:
    scene, warnings = label_map_to_scene(ball, structures=[5, 52], frame="RAS")
    assert [s.name for s in scene.surfaces] == ["liver"]
    assert any("aorta was asked for" in w for w in warnings)
    lps = label_map_to_scene(ball, structures=[5])[0].surfaces[0]
    assert np.allclose(scene.surfaces[0].vertices_mm * [-1, -1, 1], lps.vertices_mm)
    assert (scene.surfaces[0].faces == lps.faces).all()
    assert scene.frame == "RAS"
    assert any("Research use only" in note for note in scene.notes)
    assert any("millimetres" in note for note in scene.notes)
    assert scene.surfaces[0].color == label_table()[5].color
    empty, warnings = label_map_to_scene(LabelMap(np.zeros((4, 4, 4), np.uint8), (1, 1, 1)))
    assert empty.surfaces == ()
    assert warnings
    with pytest.raises(ValueError, match="within 0 and 1"):
        label_map_to_scene(ball, smoothing=1.5)


def test_progress_can_stop_it(ball: LabelMap) -> None:
    def stop(done: int, total: int, name: str) -> None:
        raise InterruptedError(f"{done} of {total} {name}")

    with pytest.raises(InterruptedError, match="0 of 2 kidney_right"):
        label_map_to_scene(ball, on_progress=stop)


def test_61_real_structures(sample_mask: Path) -> None:
    mask = read_nifti(sample_mask.read_bytes(), "m.nii.gz", as_mask=True)
    assert isinstance(mask, LabelMap)
    scene, warnings = label_map_to_scene(mask)
    volumes = mask.volumes_ml()
    assert len(scene.surfaces) == 61
    assert [s.label for s in scene.surfaces] == sorted(volumes)
    assert [s.name for s in scene.surfaces if not is_closed(s)] == []
    for surface in scene.surfaces:
        assert surface.volume_ml == pytest.approx(volumes[surface.label], rel=0.02), surface.name
    assert len(warnings) == 1  # the scan's edge, in one sentence
    # ../shared/data/README.md, RAS mm
    for name, centre, ml in (("kidney_right", (69.6, 132.1, 345.7), 192.6), ("kidney_left", (-78.1, 125.6, 357.4), 137.4)):
        kidney = next(s for s in scene.in_frame("RAS").surfaces if s.name == name)
        assert kidney.volume_ml == pytest.approx(ml, rel=0.005)
        assert np.abs(trimesh.Trimesh(kidney.vertices_mm, kidney.faces).center_mass - centre).max() < 0.2
