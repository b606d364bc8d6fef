"""Coarser surfaces for screens: few enough, still closed, where they were."""

from __future__ import annotations

import numpy as np
import pytest

from deployments.smoothing.screens import with_screen
from deployments.smoothing.surfaces import Options, label_map_to_scene
from scangraph.contracts import LabelMap, Scene
from tests.smoothing.shapes import is_closed


@pytest.fixture(scope="module")
def scene() -> Scene:
    """A large ball and a small one, with all their triangles."""
    places = np.indices((70, 70, 70)).astype(float)
    array = np.zeros((70, 70, 70), np.uint8)
    array[np.sqrt(((places - 30) ** 2).sum(axis=0)) < 25] = 2
    array[np.sqrt(((places - 62) ** 2).sum(axis=0)) < 5] = 3
    found, _ = label_map_to_scene(LabelMap(array, (1.0, 1.0, 1.0), (5.0, 6.0, 7.0), labels=(2, 3)), Options(error_mm=0.0))
    return found


def test_few_triangles_closed_and_in_place(scene: Scene) -> None:
    total = sum(len(surface.faces) for surface in scene.surfaces)
    assert total > 20_000
    made = with_screen(scene, 4000, workers=2)
    assert made.surfaces == scene.surfaces
    assert [surface.label for surface in made.screen] == [2, 3]
    counts = [len(surface.faces) for surface in made.screen]
    assert counts[1] == pytest.approx(300, abs=4)
    assert sum(counts) <= 4000 + 300
    for coarse, fine in zip(made.screen, scene.surfaces, strict=True):
        assert is_closed(coarse)
        assert coarse.volume_ml == pytest.approx(fine.volume_ml, rel=0.02)
        for edge in (np.min, np.max):
            assert np.abs(edge(coarse.vertices_mm, axis=0) - edge(fine.vertices_mm, axis=0)).max() < 0.5
        assert (coarse.name, coarse.color) == (fine.name, fine.color)
    assert made.on_screen() == made.screen


def test_what_is_coarse_enough_stays_alone(scene: Scene) -> None:
    assert with_screen(scene) is scene
    assert with_screen(Scene((), "LPS"), 1).screen == ()


def test_small_structures_keep_what_they_have(scene: Scene) -> None:
    coarse = with_screen(scene, 10).screen
    again = with_screen(Scene(coarse, "LPS"), 10).screen
    assert again == coarse
    assert all(len(surface.faces) == pytest.approx(300, abs=4) for surface in coarse)
