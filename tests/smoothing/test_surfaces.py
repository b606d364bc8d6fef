from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import trimesh

from deployments.imageio.nifti import read_nifti
from deployments.smoothing.surfaces import label_map_to_scene, open_edges, smooth_surface, vertex_normals
from scangraph.contracts import LabelMap, Surface
from scangraph.obj import write_obj

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


def test_thick_slices_stay_smooth() -> None:
    mask, centre = sphere(25, (3.0, 0.8, 0.8))
    assert normal_deviation_degrees(only(mask), centre) < 6.5


@pytest.mark.parametrize(("radius", "tolerance"), [(5.0, 0.02), (2.0, 0.08), (1.2, 0.15)])
def test_thin_tubes_keep_their_volume_and_pieces(radius: float, tolerance: float) -> None:
    z, y, x = np.mgrid[:76, :24, :24]
    point = np.stack([z * 1.0, y * 0.78, x * 0.78], axis=-1)
    axis = np.stack([np.clip(point[..., 0], 8, 68), np.full(z.shape, 9.1), np.full(z.shape, 9.3)], axis=-1)
    mask = LabelMap((np.linalg.norm(point - axis, axis=-1) < radius).astype(np.uint8) * 52, SPACING, labels=(52,))
    surface = only(mask)
    voxel_ml = mask.volumes_ml()[52]
    assert surface.volume_ml == pytest.approx(voxel_ml, rel=tolerance)
    assert open_edges(surface.faces) == 0
    assert len(trimesh.Trimesh(surface.vertices_mm, surface.faces).split(only_watertight=False)) == 1


CODES = ["".join(p) for axes in itertools.permutations(["LR", "PA", "SI"]) for p in itertools.product(*axes)]


@pytest.mark.parametrize("codes", CODES)
def test_every_orientation_gives_the_same_place_and_outward_faces(ball: LabelMap, codes: str) -> None:
    # Which diagonal splits a square depends on the axes' order, so smoothed surfaces agree within a fraction of a voxel only.
    for smoothing, tolerance_mm in ((0.0, 1e-4), (1.0, 0.1)):
        expected = {s.label: s for s in label_map_to_scene(ball, smoothing=smoothing)[0].surfaces}
        found = {s.label: s for s in label_map_to_scene(ball.reoriented(codes), smoothing=smoothing)[0].surfaces}
        assert found.keys() == expected.keys() == {2, 5}
        for label, surface in found.items():
            assert surface.volume_ml > 0
            assert surface.volume_ml == pytest.approx(expected[label].volume_ml, rel=0.005)
            for bound in (np.min, np.max):
                assert np.allclose(
                    bound(surface.vertices_mm, axis=0), bound(expected[label].vertices_mm, axis=0), atol=tolerance_mm
                )


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
        assert surface.volume_ml > 0
        assert trimesh.Trimesh(surface.vertices_mm, surface.faces, process=False).is_watertight
    assert any("liver touches the edge" in w for w in warnings)


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


def test_structures_frames_and_empty_masks(ball: LabelMap) -> None:
    scene, warnings = label_map_to_scene(ball, structures=[5, 52], frame="RAS")
    assert [s.name for s in scene.surfaces] == ["liver"]
    assert any("aorta was asked for" in w for w in warnings)
    lps = label_map_to_scene(ball, structures=[5])[0].surfaces[0]
    assert np.allclose(scene.surfaces[0].vertices_mm * [-1, -1, 1], lps.vertices_mm)
    empty, warnings = label_map_to_scene(LabelMap(np.zeros((4, 4, 4), np.uint8), (1, 1, 1)))
    assert empty.surfaces == ()
    assert warnings


def test_progress_can_stop_it(ball: LabelMap) -> None:
    def stop(done: int, total: int, name: str) -> None:
        raise InterruptedError(f"{done} of {total} {name}")

    with pytest.raises(InterruptedError, match="0 of 2 kidney_right"):
        label_map_to_scene(ball, on_progress=stop)


def test_obj_says_what_it_is_and_reads_back(ball: LabelMap, tmp_path: Path) -> None:
    scene = label_map_to_scene(ball)[0]
    obj, mtl = write_obj(scene)
    (tmp_path / "scene.obj").write_bytes(obj)
    (tmp_path / "scene.mtl").write_bytes(mtl)
    text = obj.decode()
    assert "# unit: mm" in text
    assert "# SPACE=LPS" in text
    assert "Research use only" in text
    assert mtl.decode().count("newmtl") == 2
    assert [line for line in text.splitlines() if line.startswith(("g ", "usemtl "))] == [
        "g kidney_right",
        "usemtl kidney_right",
        "g liver",
        "usemtl liver",
    ]
    loaded = trimesh.load_mesh(tmp_path / "scene.obj", process=False)
    whole = loaded if isinstance(loaded, trimesh.Trimesh) else loaded.to_mesh()
    assert whole.volume / 1000 == pytest.approx(sum(s.volume_ml for s in scene.surfaces), rel=1e-4)
    vertices = np.concatenate([s.vertices_mm for s in scene.surfaces])
    assert np.allclose(whole.bounds, [vertices.min(axis=0), vertices.max(axis=0)], atol=1e-3)


def test_61_real_structures(sample_mask: Path) -> None:
    mask = read_nifti(sample_mask.read_bytes(), "m.nii.gz", as_mask=True)
    assert isinstance(mask, LabelMap)
    scene, _ = label_map_to_scene(mask)
    volumes = mask.volumes_ml()
    assert [s.label for s in scene.surfaces] == sorted(volumes)
    assert sum(open_edges(s.faces) for s in scene.surfaces) == 0
    for surface in scene.surfaces:
        if volumes[surface.label] > 20:
            assert surface.volume_ml == pytest.approx(volumes[surface.label], rel=0.05)
    kidney = next(s for s in scene.surfaces if s.name == "kidney_right")
    middle = kidney.vertices_mm.mean(axis=0) * [-1, -1, 1]
    assert np.linalg.norm(middle - [69.6, 132.1, 345.7]) < 5
