"""Scenes as files: read back by trimesh, VTK and by hand, against what was written."""

from __future__ import annotations

import hashlib
import io
import json
import math
import struct
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trimesh
from numpy.testing import assert_allclose, assert_array_equal
from numpy.typing import NDArray
from vtkmodules.util.numpy_support import vtk_to_numpy
from vtkmodules.vtkIOGeometry import vtkGLTFReader, vtkOBJReader, vtkSTLReader
from vtkmodules.vtkIOPLY import vtkPLYReader

from scangraph.contracts import Frame, GlbUnit, Scene, SceneFiles, SceneFormat, Surface, label_table, plain_name
from scangraph.scenefiles import SceneManifest, save_scene, scene_files, write_scene
from scangraph.scenefiles.structures import vertex_normals
from tests.contracts.test_scenes import box, sphere

FORMATS: tuple[SceneFormat, ...] = ("obj", "glb", "stl", "ply")
ALL = SceneFiles(FORMATS)
LIVER, KIDNEY = label_table()[5], label_table()[2]
MEASURES = {"voxel_volume_ml": 33.25, "watertight": True, "box_mm": [[-10, -50, 480], [30, -10, 520]]}


def structure(shape: Surface, name: str, label: int, **change: Any) -> Surface:
    known = label_table().get(label)
    return replace(shape, name=name, label=label, color=known.color if known else (250, 128, 3), **change)


def scene(files: SceneFiles = ALL, frame: Frame = "LPS") -> Scene:
    """A ball, a box and a structure of a foreign model; nothing at the origin."""
    surfaces = (
        structure(box((10, 20, 30), (100.25, 50, -400)), "kidney_right", 2),
        structure(sphere(20, 12, (10, -30, 500)), "liver", 5, measures=MEASURES),
        structure(sphere(3, 6, (-200, 100, 0.1)), "Lymph_nodes", 4321),
    )
    return Scene(surfaces, frame, ("Research use only. Not a medical device.", "a note"), files, {"spacing_mm": [1, 0.8, 0.8]})


def surface(vertices: object, faces: object = ((0, 1, 2),), name: str = "liver") -> Surface:
    return Surface(name, 5, (255, 0, 51), np.array(vertices, np.float32), np.array(faces, np.int32))


def in_format(scene: Scene, kind: SceneFormat) -> bytes:
    return write_scene(replace(scene, files=replace(scene.files, formats=(kind,))), "scene")[f"scene.{kind}"]


def manifest_of(files: dict[str, bytes], name: str = "scene.manifest.json") -> SceneManifest:
    def refuse(constant: str) -> Any:
        raise AssertionError(f"{constant} is no JSON")

    return SceneManifest.model_validate(json.loads(files[name], parse_constant=refuse))


def corners(surface: Surface) -> NDArray[Any]:
    return np.asarray(surface.vertices_mm[surface.faces])


# --- read by others ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frame", ["LPS", "RAS"])
def test_trimesh_reads_the_same_structures(frame: Frame, tmp_path: Path) -> None:
    written = scene(frame=frame)
    save_scene(written, tmp_path)
    obj = trimesh.load_scene(tmp_path / "scene.obj", process=False)
    glb = trimesh.load_scene(tmp_path / "scene.glb", process=False)
    assert set(obj.geometry) == set(glb.geometry) == {"kidney_right", "liver", "Lymph_nodes"}
    for s in written.surfaces:
        for read, tolerance in ((obj, 1e-4), (glb, 0)):
            mesh = read.geometry[s.name]
            assert np.abs(corners(s) - np.asarray(mesh.vertices[mesh.faces])).max() <= tolerance
            assert mesh.is_watertight
            assert mesh.volume / 1000 == pytest.approx(s.volume_ml, rel=1e-5)  # positive: the faces look outward
        assert tuple(obj.geometry[s.name].visual.material.diffuse[:3]) == s.color
    whole = np.concatenate([corners(s) for s in written.surfaces])
    stl = trimesh.load_mesh(tmp_path / "scene.stl", process=False)
    ply: Any = trimesh.load_mesh(tmp_path / "scene.ply", process=False)
    assert_array_equal(np.asarray(stl.vertices[stl.faces], np.float32), whole)
    assert_array_equal(np.asarray(ply.vertices[ply.faces], np.float32), whole)
    colors = np.repeat([s.color for s in written.surfaces], [len(s.vertices_mm) for s in written.surfaces], axis=0)
    assert_array_equal(ply.visual.vertex_colors[:, :3], colors)
    labels = np.repeat([s.label for s in written.surfaces], [len(s.faces) for s in written.surfaces])
    assert_array_equal(ply.metadata["_ply_raw"]["face"]["data"]["label"].ravel(), labels)


def vtk_points(reader: Any, path: Path) -> Any:
    reader.SetFileName(str(path))
    reader.Update()
    return reader.GetOutput()


def test_vtk_reads_the_same_triangles(tmp_path: Path) -> None:
    written = scene()
    save_scene(written, tmp_path)
    whole = np.concatenate([corners(s) for s in written.surfaces]).reshape(-1, 3)
    stl_reader = vtkSTLReader()
    stl_reader.MergingOff()
    readers = (("obj", vtkOBJReader(), 1e-4), ("stl", stl_reader, 0), ("ply", vtkPLYReader(), 0))
    for kind, reader, tolerance in readers:
        data = vtk_points(reader, tmp_path / f"scene.{kind}")
        points = vtk_to_numpy(data.GetPoints().GetData())
        triangles = vtk_to_numpy(data.GetPolys().GetConnectivityArray())
        assert np.abs(points[triangles] - whole).max() <= tolerance
    blocks = vtk_points(vtkGLTFReader(), tmp_path / "scene.glb")
    meshes = leaves(blocks)
    assert len(meshes) == 3
    for s, mesh in zip(written.surfaces, meshes, strict=True):
        points = vtk_to_numpy(mesh.GetPoints().GetData())  # as it stands in the world of glTF: metres, Y up
        x, y, z = s.vertices_mm.T / 1000
        assert_allclose(points, np.stack([x, z, -y], axis=1), atol=1e-7)


def leaves(data: Any) -> list[Any]:
    if not data.IsA("vtkMultiBlockDataSet"):
        return [data]
    return [leaf for k in range(data.GetNumberOfBlocks()) for leaf in leaves(data.GetBlock(k))]


# --- OBJ --------------------------------------------------------------------------------------------------------------


def lines(text: bytes, *words: str) -> list[str]:
    return [line for line in text.decode().splitlines() if line.split(" ")[0] in words]


def test_obj_says_unit_frame_and_structures() -> None:
    files = write_scene(scene(SceneFiles()), "other")
    assert list(files) == ["other.obj", "other.mtl", "other.manifest.json"]
    obj, mtl = files["other.obj"], files["other.mtl"]
    for comment in (b"# unit: mm\n", b"# SPACE=LPS\n", b"# Research use only", b"# a note\n"):
        assert comment in obj
    assert b"# SPACE=RAS\n" in in_format(scene().in_frame("RAS"), "obj")
    assert b"# Research use only" in in_format(Scene(()), "obj")  # said or not
    names = ["kidney_right", "liver", "Lymph_nodes"]
    assert lines(obj, "o", "g", "usemtl") == [f"{word} {name}" for name in names for word in ("o", "g", "usemtl")]
    assert lines(obj, "mtllib") == ["mtllib other.mtl"]
    assert lines(mtl, "newmtl") == [f"newmtl {name}" for name in names]
    assert len(lines(mtl, "Kd")) == 3


def test_numbers_are_written_as_python_would() -> None:
    values = [[0, -0.0, 1], [-1, 0.5, -0.0625], [999.9999, -1234.5, 1e-5], [-0.00004, 123456, 10], [-7e6, 0.1, 100]]
    text = in_format(Scene((surface(values, [[0, 1, 2], [2, 3, 4]]), surface(values, [[4, 0, 1]], "spleen"))), "obj")
    once = ["v " + " ".join(f"{float(np.float32(c)) + 0.0:.4f}" for c in row) for row in values]
    expected = [line.replace("-0.0000", "0.0000") for line in once]
    assert lines(text, "v") == 2 * expected
    assert lines(text, "f") == ["f 1 2 3", "f 3 4 5", "f 10 6 7"]


def test_many_blocks_count_on(tmp_path: Path) -> None:
    random = np.random.default_rng(3)
    vertices = random.normal(0, 300, (70_001, 3)).astype(np.float32)
    faces = random.integers(0, len(vertices), (100_003, 3), np.int32)
    many = Scene((surface(vertices, faces), surface(-vertices, faces, "spleen")), files=ALL)
    files = write_scene(many, "scene")
    rows = [line.split()[1:] for line in lines(files["scene.obj"], "v")]
    assert np.abs(np.array(rows, float) - np.concatenate([vertices, -vertices])).max() < 1e-4
    rows = [line.split()[1:] for line in lines(files["scene.obj"], "f")]
    assert_array_equal(np.array(rows, int), np.concatenate([faces + 1, faces + 1 + len(vertices)]))
    for kind in ("stl", "ply"):
        mesh = trimesh.load_mesh(io.BytesIO(files[f"scene.{kind}"]), file_type=kind, process=False)
        read = np.asarray(mesh.vertices[mesh.faces], np.float32)
        assert_array_equal(read, np.concatenate([vertices[faces], -vertices[faces]]))
    (_, _), parts = glb_parts(files["scene.glb"])  # more vertices than 16 bits count
    assert_array_equal(parts[0]["indices"].reshape(-1, 3), faces)
    assert parts[0]["indices"].dtype == np.uint32


# --- GLB --------------------------------------------------------------------------------------------------------------

TYPES: dict[int, np.dtype[Any]] = {5126: np.dtype("<f4"), 5125: np.dtype("<u4"), 5123: np.dtype("<u2")}


def glb_parts(data: bytes) -> tuple[tuple[dict[str, Any], bytes], list[dict[str, Any]]]:
    """Read a GLB by the letter of its specification, and check that letter."""
    magic, version, total, json_size, json_kind = struct.unpack_from("<4sII I4s", data)
    assert (magic, version, total, json_kind) == (b"glTF", 2, len(data), b"JSON")
    assert json_size % 4 == 0
    document = json.loads(data[20 : 20 + json_size])
    binary = b""
    if len(data) > 20 + json_size:
        size, kind = struct.unpack_from("<I4s", data, 20 + json_size)
        binary = data[28 + json_size :]
        assert (size, kind, size % 4) == (len(binary), b"BIN\0", 0)
        assert document["buffers"] == [{"byteLength": size}]
    for name in ("meshes", "materials", "accessors", "bufferViews", "buffers"):
        assert document.get(name) != []  # a list that is there has entries

    def values(number: int, target: int) -> NDArray[Any]:
        accessor = document["accessors"][number]
        view = document["bufferViews"][accessor["bufferView"]]
        assert (view["target"], view["byteOffset"] % 4, view["buffer"]) == (target, 0, 0)
        dtype, width = TYPES[accessor["componentType"]], {"VEC3": 3, "SCALAR": 1}[accessor["type"]]
        assert view["byteLength"] == accessor["count"] * width * dtype.itemsize
        array: NDArray[Any] = np.frombuffer(binary, dtype, accessor["count"] * width, view["byteOffset"])
        return array.reshape(-1, 3) if width == 3 else array

    parts = []
    for node in document["nodes"][1:]:
        if "mesh" not in node:
            parts.append({"node": node})
            continue
        mesh = document["meshes"][node["mesh"]]
        (primitive,) = mesh["primitives"]
        position = document["accessors"][primitive["attributes"]["POSITION"]]
        part = {
            "node": node,
            "position": values(primitive["attributes"]["POSITION"], 34962),
            "normal": values(primitive["attributes"]["NORMAL"], 34962),
            "indices": values(primitive["indices"], 34963),
            "material": document["materials"][primitive["material"]],
        }
        assert mesh["name"] == node["name"] == part["material"]["name"]
        assert_array_equal(np.float32(position["min"]), part["position"].min(axis=0))
        assert_array_equal(np.float32(position["max"]), part["position"].max(axis=0))
        assert int(part["indices"].max()) < min(len(part["position"]), np.iinfo(part["indices"].dtype).max)
        parts.append(part)
    return (document, binary), parts


def turned(rotation: Sequence[float], vectors: NDArray[Any]) -> NDArray[Any]:
    """Turn vectors by a quaternion (x, y, z, w)."""
    axis, w = np.asarray(rotation[:3]), rotation[3]
    return np.asarray(vectors + 2 * np.cross(axis, np.cross(axis, vectors) + w * vectors))


def srgb(light: float) -> int:
    return round(255 * (12.92 * light if light <= 0.0031308 else 1.055 * light ** (1 / 2.4) - 0.055))


def test_glb_has_a_node_mesh_and_material_for_each_structure() -> None:
    written = scene()
    (document, _), parts = glb_parts(in_format(written, "glb"))
    assert [part["node"]["name"] for part in parts] == ["kidney_right", "liver", "Lymph_nodes"]
    for s, part in zip(written.surfaces, parts, strict=True):
        assert_array_equal(part["position"], s.vertices_mm)  # the scanner's millimetres, to the bit
        assert_array_equal(part["indices"].reshape(-1, 3), s.faces)
        assert part["indices"].dtype == np.uint16
        assert_allclose(np.linalg.norm(part["normal"], axis=1), 1, atol=1e-6)
        shade = part["material"]["pbrMetallicRoughness"]
        assert tuple(map(srgb, shade["baseColorFactor"][:3])) == s.color
        assert (shade["baseColorFactor"][3], shade["metallicFactor"], shade["roughnessFactor"]) == (1, 0, 0.6)
        extras = part["node"]["extras"]
        assert (extras["label"], extras["name"], extras["color"]) == (s.label, s.name, list(s.color))
    assert parts[1]["node"]["extras"]["snomed_code"] == LIVER.snomed_code
    assert parts[1]["node"]["extras"]["voxel_volume_ml"] == 33.25
    assert parts[2]["node"]["extras"]["snomed_code"] is None
    about = document["asset"]["extras"]
    assert "Research use only" in about["notice"]
    assert (about["frame"], about["unit"], about["vertices_unit"]) == ("LPS", "m", "mm")


@pytest.mark.parametrize("unit", ["m", "mm"])
def test_the_root_of_a_glb_stands_the_patient_upright_in_either_frame(unit: GlbUnit) -> None:
    """Head to +Y, face to +Z, left hand to +X, as glTF wants assets."""
    head, front, left = np.array([[0, 0, 1], [0, -1, 0], [1, 0, 0]])  # LPS
    for frame, sign in (("LPS", 1), ("RAS", -1)):
        files = SceneFiles(("glb",), glb_unit=unit)
        (document, _), _ = glb_parts(in_format(scene(files).in_frame(frame), "glb"))  # type: ignore[arg-type]
        root = document["nodes"][0]
        assert document["scenes"][document["scene"]]["nodes"] == [0]
        assert root["children"] == [1, 2, 3]
        assert root.get("scale", [1, 1, 1]) == ([0.001] * 3 if unit == "m" else [1, 1, 1])
        for direction, expected in ((head, [0, 1, 0]), (front, [0, 0, 1]), (left, [1, 0, 0])):
            assert_allclose(turned(root["rotation"], direction * [sign, sign, 1]), expected, atol=1e-12)
        assert document["asset"]["extras"]["unit"] == unit
        assert f"scanner's {frame} frame" in document["asset"]["extras"]["axes"]


def test_normals_look_outward_and_are_weighted_by_area() -> None:
    ball = sphere(20, 24, (300, -200, 900))
    outward = (ball.vertices_mm - [300, -200, 900]) / 20
    cosines = np.einsum("ij,ij->i", vertex_normals(ball.vertices_mm, ball.faces), outward)
    assert math.degrees(math.acos(cosines.min())) < 3
    lonely = vertex_normals(np.zeros((4, 3), np.float32), np.array([[0, 1, 2]], np.int32))
    assert_array_equal(lonely, np.tile(np.array([0, 0, 1], np.float32), (4, 1)))
    tall = np.array([(0, 0, 0), (4, 0, 0), (0, 0, 1), (0, 1, 0)], np.float32)
    (first, *_) = vertex_normals(tall, np.array([[0, 1, 2], [0, 1, 3]], np.int32))  # areas 2 and 2: between -y and z
    assert_allclose(first, np.array([0, -1, 1]) / math.sqrt(2), atol=1e-6)


# --- STL, PLY ---------------------------------------------------------------------------------------------------------


def test_stl_and_ply_say_frame_and_unit_as_slicer_reads_them() -> None:
    for frame in ("LPS", "RAS"):
        written = scene().in_frame(frame)
        stl, ply = in_format(written, "stl"), in_format(written, "ply")
        for head in (stl[:80], ply.partition(b"end_header")[0]):
            assert f"SPACE={frame}".encode() in head
            assert b"mm" in head
            assert b"research use only" in head.lower()
        assert not stl.startswith(b"solid")
        count = sum(len(s.faces) for s in written.surfaces)
        assert struct.unpack_from("<I", stl, 80) == (count,)
        assert len(stl) == 84 + 50 * count
        assert b"comment label 4321 Lymph_nodes\n" in ply


def test_stl_has_unit_normals_that_look_outward() -> None:
    triangle = np.dtype([("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("attribute", "<u2")])
    flat = surface([(0, 0, 0), (1, 0, 0), (2, 0, 0)], name="flat")
    read = np.frombuffer(in_format(Scene((*scene().surfaces, flat)), "stl"), triangle, offset=84)
    assert_array_equal(read["normal"][-1], 0)  # none, where there is no area
    a, b, c = (read["corners"][:-1, k].astype(float) for k in range(3))
    normals = np.cross(b - a, c - a)
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    assert np.abs(read["normal"][:-1] - normals).max() < 1e-3  # float32, half a metre from the origin
    assert not read["attribute"].any()


# --- the manifest -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_structure", [False, True])
def test_the_manifest_describes_every_file_and_structure(per_structure: bool) -> None:
    files = write_scene(scene(SceneFiles(FORMATS, per_structure)), "scene")
    manifest = manifest_of(files)
    assert list(files)[-1] == "scene.manifest.json"
    assert [file.name for file in manifest.files] == list(files)[:-1]
    for file in manifest.files:
        data = files[file.name]
        assert (file.size, file.sha256) == (len(data), hashlib.sha256(data).hexdigest())
        assert file.unit == {"mtl": None, "glb": "m"}.get(file.kind, "mm")
        assert file.name.endswith(f".{file.kind}")
        several = not per_structure or file.kind == "mtl"
        assert len(file.structures) == (3 if several else 1)
    assert (manifest.frame, manifest.unit, manifest.archive) == ("LPS", "mm", None)
    assert manifest.facts == {"spacing_mm": [1, 0.8, 0.8]}
    assert "a note" in manifest.notes
    assert "Research use only" in manifest.notice
    assert "x leads to the patient's left" in manifest.coordinates
    liver = manifest.structures[1]
    assert (liver.object, liver.label, liver.name, liver.title) == ("liver", 5, "liver", "liver")
    assert (liver.snomed_code, liver.color, liver.level, liver.triangles) == (LIVER.snomed_code, LIVER.color, 0, 528)
    assert liver.measures == MEASURES
    assert manifest.structures[0].title == "kidney right"
    assert manifest.structures[0].laterality == "right"
    assert manifest.structures[2].snomed_code is None
    schema = SceneManifest.model_json_schema()
    assert schema["properties"].keys() == json.loads(files["scene.manifest.json"]).keys()


def test_a_number_with_another_meaning_has_no_code() -> None:
    (entry,) = manifest_of(write_scene(Scene((surface(np.eye(3), name="something"),)), "scene")).structures
    assert (entry.label, entry.name, entry.snomed_code) == (5, "something", None)


# --- which files ------------------------------------------------------------------------------------------------------


def test_levels_of_detail_get_files_of_their_own() -> None:
    fine, coarse = sphere(20, 12), sphere(20, 6)
    detailed = Scene((*(structure(s, "liver", 5, level=n) for n, s in ((2, coarse), (0, fine), (1, coarse))),), files=ALL)
    files = write_scene(detailed, "a")
    expected = [f"a{lod}.{kind}" for kind in FORMATS for lod in ("", "_lod1", "_lod2")]
    expected.insert(3, "a.mtl")
    assert list(files) == [*expected, "a.manifest.json"]
    manifest = manifest_of(files, "a.manifest.json")
    assert [(s.level, s.triangles) for s in manifest.structures] == [(0, len(fine.faces)), (1, len(coarse.faces)), (2, 120)]
    assert lines(files["a.mtl"], "newmtl") == ["newmtl liver"]  # the same at every level
    assert {file.name: file.level for file in manifest.files}["a_lod2.glb"] == 2
    apart = write_scene(replace(detailed, files=SceneFiles(("stl",), per_structure=True)), "a")
    assert list(apart) == ["a.liver.stl", "a_lod1.liver.stl", "a_lod2.liver.stl", "a.manifest.json"]


def test_a_zip_holds_all_and_the_manifest_lies_beside_it(tmp_path: Path) -> None:
    zipped = replace(ALL, zipped=True)
    files, loose = write_scene(scene(zipped), "scene"), write_scene(scene(), "scene")
    assert list(files) == ["scene.zip", "scene.manifest.json"]
    with zipfile.ZipFile(io.BytesIO(files["scene.zip"])) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == list(loose)
        for name in archive.namelist()[:-1]:
            assert archive.read(name) == loose[name]
        assert archive.read("scene.manifest.json") == files["scene.manifest.json"]
    manifest = manifest_of(files)
    assert manifest.archive == "scene.zip"
    assert [file.sha256 for file in manifest.files] == [file.sha256 for file in manifest_of(loose).files]


def test_equal_scenes_give_equal_bytes_on_disk_and_in_memory(tmp_path: Path) -> None:
    for files in (ALL, SceneFiles(FORMATS, per_structure=True, zipped=True)):
        paths = save_scene(scene(files), tmp_path, "s")
        assert {path.name: path.read_bytes() for path in paths} == write_scene(scene(files), "s")
        assert [path.name for path in paths] == [file.name for file in scene_files(scene(files), "s")]


def test_a_manifest_that_is_written_first_says_the_same() -> None:
    *_, manifest = scene_files(scene(), "s")
    out = io.BytesIO()
    manifest.write(out)
    assert out.getvalue() == write_scene(scene(), "s")["s.manifest.json"]


# --- hostile, empty, many ---------------------------------------------------------------------------------------------

NAMES = [
    "",
    "liver",
    "liver",
    "Liver",
    "liver_5",
    "a/../../b",
    "C:\\x\\y",
    "腎臓",
    "腎臓",
    "a b\nv 9 9 9",
    "é#1 \\",
    "\x00\u2028\x1b[31m",
    "\ud800",
    "..",
    "x" * 5000,
    "con",
    "\"};'<script>",
]


def test_names_cannot_break_out_and_files_do_not_meet(tmp_path: Path) -> None:
    hostile = Scene(tuple(surface(np.eye(3) + n, name=name) for n, name in enumerate(NAMES)), notes=("x\nv 8 8 8", "\ud800"))
    together = write_scene(replace(hostile, files=ALL), "scene")
    names = [structure.object for structure in manifest_of(together).structures]
    assert len({name.lower() for name in names}) == len(NAMES)
    assert not any(c.isspace() or c in "#\\" or not c.isprintable() for name in names for c in name)
    obj = together["scene.obj"]
    assert lines(obj, "o") == [f"o {name}" for name in names]
    assert len(lines(obj, "v")) == 3 * len(NAMES)
    assert lines(together["scene.mtl"], "newmtl") == [f"newmtl {name}" for name in names]
    _, parts = glb_parts(together["scene.glb"])
    assert [part["node"]["name"] for part in parts] == names
    trimesh.load_mesh(io.BytesIO(together["scene.ply"]), file_type="ply", process=False)

    apart = replace(hostile, files=SceneFiles(FORMATS, per_structure=True))
    paths = save_scene(apart, tmp_path, "scene")
    assert len(set(paths)) == len({path.name.lower() for path in paths}) == 4 * len(NAMES) + 2
    for path in paths:
        assert path.parent == tmp_path
        assert path.is_file()
        assert len(path.name.encode()) < 128
        assert plain_name(path.name).replace("_", "").isascii()
    stl = [path for path in paths if path.suffix == ".stl"]
    for n, path in enumerate(stl):
        mesh = trimesh.load_mesh(path, process=False)
        assert_array_equal(mesh.triangles[0], np.eye(3) + n)


@pytest.mark.parametrize("files", [ALL, SceneFiles(FORMATS, per_structure=True), SceneFiles(FORMATS, zipped=True)])
def test_an_empty_scene_has_all_its_files(files: SceneFiles) -> None:
    written = write_scene(Scene((), files=files), "scene")
    if files.zipped:
        with zipfile.ZipFile(io.BytesIO(written["scene.zip"])) as archive:
            written = {name: archive.read(name) for name in archive.namelist()}
    assert list(written) == ["scene.obj", "scene.mtl", "scene.glb", "scene.stl", "scene.ply", "scene.manifest.json"]
    assert lines(written["scene.obj"], "o", "v", "f") == []
    assert len(written["scene.stl"]) == 84
    (document, binary), _ = glb_parts(written["scene.glb"])
    assert "children" not in document["nodes"][0]
    assert not binary
    assert manifest_of(written).structures == []


def test_a_structure_without_triangles_is_listed_everywhere() -> None:
    nothing = Surface("fat", 207, (1, 2, 3), np.zeros((0, 3), np.float32), np.zeros((0, 3), np.int32))
    written = write_scene(Scene((nothing, surface(np.eye(3))), files=ALL), "scene")
    assert lines(written["scene.obj"], "o", "v") == [
        "o fat",
        "o liver",
        *("v " + " ".join(f"{c:.4f}" for c in r) for r in np.eye(3)),
    ]
    (_, parts) = glb_parts(written["scene.glb"])
    assert ["mesh" in part["node"] for part in parts] == [False, True]
    assert [s.triangles for s in manifest_of(written).structures] == [0, 1]
    assert struct.unpack_from("<I", written["scene.stl"], 80) == (1,)


@pytest.mark.parametrize("per_structure", [False, True])
def test_a_mask_may_have_255_structures(per_structure: bool, tmp_path: Path) -> None:
    many = tuple(structure(box((1, 1, 1), (n, 0, 0)), f"structure {n}", 1000 + n) for n in range(255))
    written = write_scene(Scene(many, files=SceneFiles(FORMATS, per_structure)), "scene")
    assert len(written) == (4 * 255 + 2 if per_structure else 6)
    assert len(manifest_of(written).structures) == 255
    if not per_structure:
        _, parts = glb_parts(written["scene.glb"])
        assert_array_equal(parts[254]["position"], many[254].vertices_mm)
        (tmp_path / "scene.obj").write_bytes(written["scene.obj"])
        assert len(trimesh.load_scene(tmp_path / "scene.obj", process=False).geometry) == 255


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e10])
def test_positions_that_no_scanner_gives_are_an_error(bad: float) -> None:
    with pytest.raises(ValueError, match="liver has vertices that are not finite, or farther"):
        write_scene(Scene((surface(np.eye(3) * bad if math.isfinite(bad) else [[0, 0, 0], [0, bad, 0], [1, 0, 0]]),)), "scene")


@pytest.mark.parametrize("corner", [-1, 3])
def test_triangles_without_corners_are_an_error(corner: int) -> None:
    with pytest.raises(ValueError, match="none of its 3 vertices"):
        write_scene(Scene((surface(np.eye(3), [[0, 1, corner]]),)), "scene")
