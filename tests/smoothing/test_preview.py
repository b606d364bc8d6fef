from __future__ import annotations

import ctypes
import io
import subprocess
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from numpy.typing import NDArray

from deployments.smoothing import preview
from deployments.smoothing.surfaces import Options, label_map_to_scene
from scangraph.contracts import Frame, LabelMap, Scene, Volume


def has_egl() -> bool:
    try:
        ctypes.CDLL("libEGL.so.1")
    except OSError:
        return False
    return True


needs_egl = pytest.mark.skipif(not has_egl(), reason="libEGL is not on this machine: `make setup` as root installs it")


def ct_under(mask: LabelMap) -> Volume:
    noise = np.random.default_rng(0).normal(40, 30, mask.shape)
    return mask.with_array((noise + 100 * (mask.array > 0)).astype(np.int16))


def pixels(data: bytes) -> NDArray[np.uint8]:
    return (imread(io.BytesIO(data), format="png")[..., :3] * 255).round().astype(np.uint8)


def box(picture: NDArray[np.uint8], bounds: tuple[int, int, int, int]) -> NDArray[np.uint8]:
    left, top, width, height = bounds
    return picture[top : top + height, left : left + width]


def colors(picture: NDArray[np.uint8]) -> int:
    return len(np.unique(picture.reshape(-1, 3), axis=0))


def no_child(*_: Any, **__: Any) -> Any:
    return subprocess.CompletedProcess([], -11, b"", b"")


@needs_egl
def test_picture_shows_mask_scene_and_legend(ball: LabelMap) -> None:
    data, warnings = preview.render_preview(ct_under(ball), ball, label_map_to_scene(ball)[0], title="costs $5 or $x_{")
    assert warnings == []
    picture = pixels(data)
    assert picture.shape == (900, 1600, 3)
    assert colors(box(picture, preview._SCENE)) > 500  # shaded surfaces
    for bounds in (preview._AXIAL, preview._CORONAL, preview._SAGITTAL):
        slice_ = box(picture, bounds).astype(int)
        assert (np.ptp(slice_, axis=-1) > 30).mean() > 0.005  # coloured overlay …
        assert (np.ptp(slice_, axis=-1) < 3).mean() > 0.5  # … on grey
    legend = box(picture, preview._LEGEND)
    assert all((legend == np.array(c)).all(axis=-1).any() for c in ((0xB9, 0x66, 0x4D), (0xA8, 0x53, 0x3B)))


@needs_egl
@pytest.mark.parametrize("frame", ["LPS", "RAS"])
def test_the_scene_is_seen_from_the_front_with_the_right_on_the_left(frame: Frame) -> None:
    """Three cubes: red to the patient's right, green to the left, blue behind and above."""
    array = np.zeros((40, 40, 40), np.uint8)
    array[10:16, 10:16, 4:10] = 29
    array[10:16, 10:16, 30:36] = 30
    array[30:36, 30:36, 17:23] = 31
    scene = label_map_to_scene(LabelMap(array, (1, 1, 1), labels=(29, 30, 31)), Options(frame=frame))[0]
    pure = ((255, 0, 0), (0, 255, 0), (0, 0, 255))
    scene = replace(scene, surfaces=tuple(replace(s, color=c) for s, c in zip(scene.surfaces, pure, strict=True)))
    picture, problem = preview.render_scene(scene, (200, 160))
    assert problem == ""
    assert picture is not None
    assert picture.shape == (160, 200, 3)
    lit = picture.max(axis=-1) > 60
    red, green, blue = (np.argwhere(lit & (picture.argmax(axis=-1) == c)).mean(axis=0) for c in (0, 1, 2))
    assert red[1] < blue[1] < green[1]
    assert blue[0] < min(red[0], green[0])


@needs_egl
def test_glass_lets_what_is_inside_be_seen() -> None:
    z, y, x = np.mgrid[:40, :40, :40]
    radius = np.sqrt((z - 20) ** 2 + (y - 20) ** 2 + (x - 20) ** 2)
    array = np.where(radius < 6, 202, np.where(radius < 15, 201, 0)).astype(np.uint8)
    scene = label_map_to_scene(LabelMap(array, (1, 1, 1), labels=(201, 202)))[0]
    both, _ = preview.render_scene(scene, (120, 120))
    alone, _ = preview.render_scene(Scene(tuple(s for s in scene.surfaces if s.name == "kidney")), (120, 120))
    assert both is not None
    assert alone is not None
    assert both[60, 60, 1] > alone[60, 60, 1] + 20  # the yellow tumor behind the brown kidney


def test_without_a_driver_it_says_so_and_lives(ball: LabelMap, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mesa's own switches make its driver vanish: VTK really ends its process."""
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.setenv("__EGL_VENDOR_LIBRARY_FILENAMES", "/nonexistent.json")
    monkeypatch.setenv("LIBGL_DRIVERS_PATH", "/nonexistent")
    picture, problem = preview.render_scene(label_map_to_scene(ball)[0], (100, 80))
    assert picture is None
    assert "libgl1-mesa-dri" in problem


def test_without_egl_the_picture_names_it(ball: LabelMap, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: str) -> None:
        raise OSError

    monkeypatch.setattr(subprocess, "run", no_child)
    monkeypatch.setattr(ctypes, "CDLL", missing)
    data, warnings = preview.render_preview(ct_under(ball), ball, label_map_to_scene(ball)[0])
    assert pixels(data).shape == (900, 1600, 3)
    assert len(warnings) == 1
    assert "libEGL is missing" in warnings[0]


def test_a_script_that_fails_and_one_that_hangs(ball: LabelMap, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = label_map_to_scene(ball)[0]
    failed = subprocess.CompletedProcess([], 1, b"", b"Traceback\nImportError: libX11.so.6\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    assert preview.render_scene(scene, (8, 8)) == (None, "drawing failed with ImportError: libX11.so.6")

    def hang(*_: Any, **__: Any) -> None:
        raise subprocess.TimeoutExpired("draw", 1)

    monkeypatch.setattr(subprocess, "run", hang)
    assert "longer than" in preview.render_scene(scene, (8, 8))[1]


def test_an_empty_scene_is_drawn_too() -> None:
    image = Volume(np.zeros((6, 6, 6), np.int16), (2, 1, 1))
    data, warnings = preview.render_preview(image, LabelMap(np.zeros((6, 6, 6), np.uint8), (2, 1, 1)), Scene(()))
    assert pixels(data).shape == (900, 1600, 3)
    assert "empty" in warnings[0]


def test_grids_orientations_and_channels_do_not_matter(ball: LabelMap, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same image and mask, stored in other ways, give the same slices; a mask may lie on a grid of its own."""
    monkeypatch.setattr(subprocess, "run", no_child)
    image, scene = ct_under(ball), label_map_to_scene(ball)[0]
    first, _ = preview.render_preview(image, ball, scene)
    stored = image.reoriented("SAR")
    second, _ = preview.render_preview(
        Volume(np.stack([stored.array, stored.array * 0]), stored.spacing_mm, stored.origin_mm, stored.direction),
        ball.reoriented("IRP"),
        scene,
    )
    assert (pixels(first) == pixels(second)).all()


@pytest.mark.parametrize("codes", ["LPS", "RAS", "SLA"])
def test_slices_are_in_radiological_convention(codes: str) -> None:
    """Bright towards the patient's left, back and head, however the file is stored."""
    z, y, x = np.mgrid[:10, :20, :30]
    image = Volume((x + 30 * y + 600 * z).astype(np.float32) / 600, (3, 1.3, 0.8)).reoriented(codes)
    figure = Figure(figsize=(16, 9), dpi=100)
    preview._draw_slices(figure, image, LabelMap(np.zeros(image.shape, np.uint8), image.spacing_mm))
    for axes, name, around, brighter in zip(
        figure.axes,
        ("axial", "coronal", "sagittal"),
        ("APRL", "SIRL", "SIAP"),
        (("bottom", "right"), ("top", "right"), ("top", "right")),
        strict=True,
    ):
        texts = {text.get_text(): text.get_position() for text in axes.texts}
        assert name in texts
        top, bottom, left, right = (texts[letter] for letter in around)
        assert top[1] > 0.9
        assert bottom[1] < 0.1
        assert left[0] < 0.1
        assert right[0] > 0.9
        pixels = np.asarray(axes.images[0].get_array())
        assert ("bottom" if pixels[-1].mean() > pixels[0].mean() else "top") == brighter[0]
        assert ("right" if pixels[:, -1].mean() > pixels[:, 0].mean() else "left") == brighter[1]
        # Millimetres, undistorted: the picture's own size, and as wide for its height as the box.
        left_mm, right_mm, bottom_mm, top_mm = axes.images[0].get_extent()
        rows_mm, columns_mm = {"axial": (26, 24), "coronal": (30, 24), "sagittal": (30, 26)}[name]
        assert (right_mm - left_mm, bottom_mm - top_mm) == pytest.approx((columns_mm, rows_mm))
        place = axes.get_position(original=True)
        across, down = np.ptp(axes.get_xlim()), np.ptp(axes.get_ylim())
        assert across / down == pytest.approx(place.width * 16 / (place.height * 9), rel=1e-3)
        assert across >= columns_mm
        assert down >= rows_mm


def test_slices_go_through_the_tumor() -> None:
    array = np.zeros((20, 30, 40), np.uint8)
    array[2:18, 5:25, 5:20] = 2
    array[12:15, 20:23, 8:11] = 202
    assert preview._position(LabelMap(array, (1, 1, 1), labels=(2, 202))) == (12, 20, 8)
    array[array == 202] = 0
    z, y, x = preview._position(LabelMap(array, (1, 1, 1), labels=(2,)))
    assert array[z, y, x] == 2


def test_the_legend_joins_series_and_puts_first_what_was_looked_for() -> None:
    array = np.zeros((4, 4, 4), np.uint8)
    array[0, 0] = (5, 30, 31, 202)
    array[1, 0] = (92, 93, 2, 3)
    found = preview._legend(LabelMap(array, (10, 10, 10), labels=(2, 3, 5, 30, 31, 92, 93, 202)))
    assert [(name, ml) for name, _, ml in found] == [
        ("tumor", 1.0), ("kidney right", 1.0), ("kidney left", 1.0), ("liver", 1.0), ("vertebrae", 2.0), ("ribs left", 2.0),
    ]  # fmt: skip
