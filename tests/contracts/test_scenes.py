"""Surfaces and scenes: volumes of bodies whose volume is known, and frames."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from scangraph.contracts import Scene, SceneFiles, Surface
from scangraph.contracts.errors import InvalidVolume, UsageError
from tests.contracts.grids import rotation


def box(size: tuple[float, float, float], at: Any = (0, 0, 0)) -> Surface:
    """A closed box, its faces counter-clockwise seen from outside."""
    corners = np.array([(x, y, z) for x in (0, 1) for y in (0, 1) for z in (0, 1)]) * size + at
    quads = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]
    faces = [t for a, b, c, d in quads for t in ((a, b, c), (a, c, d))]
    return surface(corners, faces)


def sphere(radius: float, rings: int, at: Any = (0, 0, 0)) -> Surface:
    """A closed sphere of latitude rings; its volume approaches the ball's from below."""
    theta = np.linspace(0, math.pi, rings + 1)[1:-1]
    phi = np.linspace(0, 2 * math.pi, 2 * rings, endpoint=False)
    ring = np.stack(
        [
            np.outer(np.sin(theta), np.cos(phi)),
            np.outer(np.sin(theta), np.sin(phi)),
            np.outer(np.cos(theta), np.ones(2 * rings)),
        ],
        -1,
    )
    vertices = np.concatenate([ring.reshape(-1, 3), [(0, 0, 1), (0, 0, -1)]]) * radius + at
    n, north, south = 2 * rings, len(vertices) - 2, len(vertices) - 1
    faces = []
    for k in range(n):
        after = (k + 1) % n
        faces += [(north, k, after), (south, (rings - 2) * n + after, (rings - 2) * n + k)]
        for row in range(0, (rings - 2) * n, n):
            faces += [(row + k, row + n + k, row + n + after), (row + k, row + n + after, row + after)]
    return surface(vertices, faces)


def surface(vertices: Any, faces: Any, **change: Any) -> Surface:
    return Surface(**{"name": "liver", "label": 5, "color": (1, 2, 3), "vertices_mm": vertices, "faces": faces, **change})


def test_volume_of_a_box() -> None:
    assert box((10, 20, 30)).volume_ml == pytest.approx(6.0)


@pytest.mark.parametrize("at", [(0, 0, 0), (1500, -1200, 900)])
def test_volume_of_a_sphere_wherever_it_is(at: tuple[float, float, float]) -> None:
    ball = 4 / 3 * math.pi * 20**3 / 1000
    coarse, fine = sphere(20, 16, at).volume_ml, sphere(20, 64, at).volume_ml
    assert fine == pytest.approx(ball, rel=2e-3)
    assert coarse < fine < ball


def test_volume_is_negative_inside_out_and_zero_without_faces() -> None:
    inward = box((10, 20, 30))
    assert surface(inward.vertices_mm, inward.faces[:, ::-1]).volume_ml == pytest.approx(-6.0)
    assert surface(np.zeros((0, 3)), np.zeros((0, 3))).volume_ml == 0.0


def test_volume_does_not_change_in_a_turn() -> None:
    brick = box((10, 20, 30), at=(5, 6, 7))
    turned = surface(brick.vertices_mm @ rotation((0.4, 0.1, -0.8, 0.3)).T, brick.faces)
    assert turned.volume_ml == pytest.approx(6.0, rel=1e-5)


def test_arrays_become_what_files_and_screens_want() -> None:
    made = surface([(0, 0, 0), (1, 0, 0), (0, 1, 0)], [(0, 1, 2)], label=np.uint8(5), color=np.array([1, 2, 3], np.uint8))
    assert made.vertices_mm.dtype == np.float32
    assert made.faces.dtype == np.int32
    assert made.vertices_mm.flags.c_contiguous
    assert (type(made.label), made.color, {type(c) for c in made.color}) == (int, (1, 2, 3), {int})


@pytest.mark.parametrize("change", [{"vertices": np.zeros((4, 2))}, {"faces": np.zeros((4, 4))}, {"faces": np.zeros(3)}])
def test_other_shapes_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(InvalidVolume):
        surface(**{"vertices": np.zeros((4, 3)), "faces": np.zeros((1, 3)), **change})


# --- what is said about them -------------------------------------------------------------------------------------------


def test_measures_and_facts_become_plain_values() -> None:
    said: dict[Any, Any] = {
        "a": np.float32(0.5),
        "b": (np.int64(1), np.bool_(True)),
        "c": {"d": np.zeros(2)},
        "e": math.nan,
        5: np.array(-np.inf),
    }
    plain = {"a": 0.5, "b": [1, True], "c": {"d": [0.0, 0.0]}, "e": None, "5": None}
    for value in (surface(np.zeros((0, 3)), np.zeros((0, 3)), measures=said).measures, Scene((), facts=said).facts):
        assert value == plain
        assert json.loads(json.dumps(value, allow_nan=False)) == plain
        assert type(value["b"][1]) is bool
    for wrong in (object(), b"bytes", {1, 2}):
        with pytest.raises(InvalidVolume, match="no JSON value"):
            Scene((), facts={"x": wrong})


def test_levels_count_from_zero() -> None:
    assert surface(np.zeros((0, 3)), np.zeros((0, 3)), level=np.int8(2)).level == 2
    with pytest.raises(InvalidVolume):
        surface(np.zeros((0, 3)), np.zeros((0, 3)), level=-1)


def test_formats_are_checked_and_obj_goes_first() -> None:
    assert SceneFiles(("stl", "glb", "obj", "glb")).formats == ("obj", "stl", "glb")
    refused: list[Any] = [{"formats": ()}, {"formats": ("obj", "fbx")}, {"glb_unit": "inch"}]
    for wrong in refused:
        with pytest.raises(UsageError):
            SceneFiles(**wrong)


# --- frames -----------------------------------------------------------------------------------------------------------


def test_in_frame_turns_every_surface_and_keeps_the_rest() -> None:
    brick = replace(box((10, 20, 30), at=(1, 2, 3)), measures={"box_mm": [[1, 2, 3], [11, 22, 33]], "genus": 0}, level=1)
    scene = Scene((brick, sphere(5, 8)), "LPS", ("a demonstration",), SceneFiles(("glb",)), {"source": "a CT"})
    turned = scene.in_frame("RAS")
    assert (turned.frame, turned.notes, turned.files, turned.facts) == ("RAS", scene.notes, scene.files, scene.facts)
    assert turned.surfaces[0].measures == {"box_mm": [[-11, -22, 3], [-1, -2, 33]], "genus": 0}
    assert_array_equal(turned.surfaces[0].vertices_mm.min(axis=0), turned.surfaces[0].measures["box_mm"][0])
    assert turned.in_frame("LPS").surfaces[0].measures == brick.measures
    for before, after in zip(scene.surfaces, turned.surfaces, strict=True):
        assert_array_equal(after.vertices_mm, before.vertices_mm * np.array([-1, -1, 1], np.float32))
        assert_array_equal(after.faces, before.faces)
        assert (after.name, after.label, after.color, after.level) == (before.name, before.label, before.color, before.level)
        assert after.volume_ml == pytest.approx(before.volume_ml)  # a rotation, not a mirror: still outward


def test_in_frame_and_back_is_the_same() -> None:
    scene = Scene((sphere(5, 8, (100, -50, 25)),))
    assert scene.in_frame("LPS") is scene
    again = scene.in_frame("RAS").in_frame("LPS")
    assert again.frame == "LPS"
    assert_allclose(again.surfaces[0].vertices_mm, scene.surfaces[0].vertices_mm, rtol=0, atol=0)


def test_a_screen_shows_the_finest_level_that_is_not_too_much() -> None:
    levels = [replace(sphere(5, rings), level=level) for level, rings in enumerate((20, 10, 5))]
    faces = [len(surface.faces) for surface in levels]
    scene = Scene(tuple(levels), "LPS")
    assert scene.on_screen() == (levels[0],)
    assert scene.on_screen(faces[1]) == (levels[1],)
    assert scene.on_screen(faces[1] - 1) == (levels[2],)
    assert scene.on_screen(1) == (levels[2],)
    assert Scene((), "LPS").on_screen() == ()
    own = replace(scene, screen=(levels[1],))
    assert own.on_screen() == (levels[1],)
    turned = own.in_frame("RAS").screen[0]
    assert_array_equal(turned.vertices_mm, levels[1].vertices_mm * np.array([-1, -1, 1], np.float32))
