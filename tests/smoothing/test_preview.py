from __future__ import annotations

import ctypes
import io

import numpy as np
import pytest
from matplotlib.image import imread

from deployments.smoothing import preview
from deployments.smoothing.surfaces import label_map_to_scene
from scangraph.contracts import LabelMap, Scene, Volume


def has_egl() -> bool:
    try:
        ctypes.CDLL("libEGL.so.1")
    except OSError:
        return False
    return True


def ct_under(mask: LabelMap) -> Volume:
    noise = np.random.default_rng(0).normal(40, 30, mask.shape)
    return mask.with_array((noise + 100 * (mask.array > 0)).astype(np.int16))


def test_picture_shows_mask_and_scene(ball: LabelMap) -> None:
    if not has_egl():
        pytest.skip("libEGL is not on this machine: `make setup` as root installs it")
    data, warnings = preview.render_preview(ct_under(ball), ball, label_map_to_scene(ball)[0], title="test")
    picture = imread(io.BytesIO(data), format="png")
    assert picture.shape[:2] == (900, 1600)
    assert warnings == []
    scene = (picture[100:850, 480:1250, :3] * 255).astype(np.uint8)
    assert len(np.unique(scene.reshape(-1, 3), axis=0)) > 500  # shaded surfaces
    slices = picture[100:850, 40:440, :3]
    assert (np.ptp(slices, axis=-1) > 0.15).mean() > 0.01  # coloured overlay on grey


def test_without_egl_it_says_so(ball: LabelMap, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: str) -> None:
        raise OSError

    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.setattr(ctypes, "CDLL", missing)
    data, warnings = preview.render_preview(ct_under(ball), ball, label_map_to_scene(ball)[0])
    assert data.startswith(b"\x89PNG")
    assert "libEGL" in warnings[0]


def test_an_empty_scene_is_drawn_too() -> None:
    image = Volume(np.zeros((6, 6, 6), np.int16), (2, 1, 1))
    data, warnings = preview.render_preview(image, LabelMap(np.zeros((6, 6, 6), np.uint8), (2, 1, 1)), Scene(()))
    assert data.startswith(b"\x89PNG")
    assert "empty" in warnings[0]
