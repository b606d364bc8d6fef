from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import trimesh

from deployments.smoothing.surfaces import label_map_to_scene
from scangraph.contracts import LabelMap, Scene, Surface, label_table
from scangraph.obj import write_obj


def surface(vertices: object, faces: object = ((0, 1, 2),), name: str = "liver") -> Surface:
    return Surface(name, 5, (255, 0, 51), np.array(vertices, np.float32), np.array(faces, np.int32))


def lines(text: bytes, *words: str) -> list[str]:
    return [line for line in text.decode().splitlines() if line.split(" ")[0] in words]


def test_trimesh_reads_the_same_structures(ball: LabelMap, tmp_path: Path) -> None:
    scene = label_map_to_scene(ball)[0]
    for path, data in zip(("scene.obj", "scene.mtl"), write_obj(scene), strict=True):
        (tmp_path / path).write_bytes(data)
    read = trimesh.load_scene(tmp_path / "scene.obj", process=False)
    assert sorted(read.geometry) == ["kidney_right", "liver"]
    for written in scene.surfaces:
        mesh = read.geometry[written.name]
        ours, theirs = written.vertices_mm[written.faces], np.asarray(mesh.vertices[mesh.faces])
        assert np.abs(ours - theirs).max() < 1e-4
        assert tuple(mesh.visual.material.diffuse[:3]) == written.color == label_table()[written.label].color
        assert mesh.is_watertight


def test_it_says_unit_frame_and_structures(ball: LabelMap) -> None:
    scene = label_map_to_scene(ball)[0]
    obj, mtl = write_obj(scene, "other.mtl")
    for comment in (b"# unit: mm\n", b"# SPACE=LPS\n", b"# Research use only"):
        assert comment in obj
    assert b"# SPACE=RAS\n" in write_obj(scene.in_frame("RAS"))[0]
    names = ["kidney_right", "liver"]
    assert lines(obj, "o", "g", "usemtl") == [f"{word} {name}" for name in names for word in ("o", "g", "usemtl")]
    assert lines(obj, "mtllib") == ["mtllib other.mtl"]
    assert lines(mtl, "newmtl") == [f"newmtl {name}" for name in names]
    assert len(lines(mtl, "Kd")) == 2
    assert write_obj(scene, "other.mtl") == (obj, mtl)


def test_numbers_are_written_as_python_would() -> None:
    values = [[0, -0.0, 1], [-1, 0.5, -0.0625], [999.9999, -1234.5, 1e-5], [-0.00004, 123456, 10], [-7e6, 0.1, 100]]
    text, _ = write_obj(Scene((surface(values, [[0, 1, 2], [2, 3, 4]]), surface(values, [[4, 0, 1]], "spleen"))))
    once = ["v " + " ".join(f"{float(np.float32(c)) + 0.0:.4f}" for c in row) for row in values]
    expected = [line.replace("-0.0000", "0.0000") for line in once]
    assert lines(text, "v") == 2 * expected
    assert lines(text, "f") == ["f 1 2 3", "f 3 4 5", "f 10 6 7"]


def test_many_blocks_count_on() -> None:
    random = np.random.default_rng(3)
    vertices = random.normal(0, 300, (70_001, 3)).astype(np.float32)
    faces = random.integers(0, len(vertices), (100_003, 3), np.int32)
    text, _ = write_obj(Scene((surface(vertices, faces),)))
    assert np.abs(np.array([line.split()[1:] for line in lines(text, "v")], float) - vertices).max() < 1e-4
    assert (np.array([line.split()[1:] for line in lines(text, "f")], int) == faces + 1).all()


def test_a_million_triangles_are_quick() -> None:
    """0.2 s here; `%` over a list takes ten times as long."""
    random = np.random.default_rng(3)
    big = Scene((surface(random.normal(0, 300, (500_000, 3)), random.integers(0, 500_000, (1_000_000, 3), np.int32)),))
    start = time.process_time()
    write_obj(big)
    assert time.process_time() - start < 1.0


def test_empty_and_hostile_scenes() -> None:
    assert lines(write_obj(Scene(()))[0], "o", "v", "f") == []
    nothing = Surface("fat", 207, (1, 2, 3), np.zeros((0, 3), np.float32), np.zeros((0, 3), np.int32))
    assert lines(write_obj(Scene((nothing,)))[0], "o", "v", "f") == ["o fat"]
    triangle = np.eye(3)
    text, mtl = write_obj(Scene((surface(triangle, name="a b\nv 9 9 9"),), notes=("x\nv 8 8 8",)))
    assert len(lines(text, "v")) == 3
    assert lines(mtl, "newmtl") == ["newmtl a_b_v_9_9_9"]
    with pytest.raises(ValueError, match="not finite"):
        write_obj(Scene((surface(triangle * np.nan),)))
