from __future__ import annotations

import ctypes
import subprocess
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from deployments.smoothing import preview
from deployments.smoothing.surfaces import Options, label_map_to_scene
from scangraph.contracts import Frame, Image2D, LabelMap, Scene, Volume


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


def pixels(picture: Image2D) -> NDArray[np.uint8]:
    (page,) = picture.pages
    assert page.dtype == np.uint8
    return np.asarray(page)


def box(picture: NDArray[np.uint8], bounds: tuple[int, int, int, int]) -> NDArray[np.uint8]:
    left, top, width, height = bounds
    return picture[top : top + height, left : left + width]


def colors(picture: NDArray[np.uint8]) -> int:
    return len(np.unique(picture.reshape(-1, 3), axis=0))


def no_child(*_: Any, **__: Any) -> Any:
    return subprocess.CompletedProcess([], -11, b"", b"")


@needs_egl
def test_picture_shows_mask_scene_and_legend(ball: LabelMap) -> None:
    data, warnings = preview.render_preview(label_map_to_scene(ball)[0], ct_under(ball), ball, title="costs $5 or $x_{")
    assert warnings == []
    picture = pixels(data)
    assert picture.shape == (900, 1600, 3)
    for bounds in preview._BESIDE_SLICES:
        assert colors(box(picture, bounds)) > 300  # shaded surfaces
    for bounds in (preview._AXIAL, preview._CORONAL, preview._SAGITTAL):
        slice_ = box(picture, bounds).astype(int)
        assert (np.ptp(slice_, axis=-1) > 30).mean() > 0.005  # coloured overlay …
        assert (np.ptp(slice_, axis=-1) < 3).mean() > 0.5  # … on grey
    legend = box(picture, preview._LEGEND)
    assert all((legend == np.array(c)).all(axis=-1).any() for c in ((0xB9, 0x66, 0x4D), (0xA8, 0x53, 0x3B)))


@needs_egl
def test_a_scene_alone_is_enough(ball: LabelMap) -> None:
    """Without slices the views have their room; volumes are the scene's."""
    scene = label_map_to_scene(ball)[0]
    data, warnings = preview.render_preview(scene)
    assert warnings == []
    picture = pixels(data)
    for bounds in preview._ALONE:
        assert colors(box(picture, bounds)) > 300
    legend = preview._legend(preview._named_volumes(scene, None))
    assert [(n, round(ml, 6)) for n, _, ml in legend] == [
        (n, round(ml, 6)) for n, _, ml in preview._legend(preview._named_volumes(scene, ball))
    ]
    bare = replace(scene, surfaces=tuple(replace(s, measures={}) for s in scene.surfaces))
    for (_, _, measured), (_, _, enclosed) in zip(legend, preview._legend(preview._named_volumes(bare, None)), strict=True):
        assert enclosed == pytest.approx(measured, rel=0.01)


@needs_egl
@pytest.mark.parametrize("given", ["image", "mask"])
def test_image_or_mask_alone_gives_slices(ball: LabelMap, given: str) -> None:
    scene = label_map_to_scene(ball)[0]
    data, warnings = preview.render_preview(scene, **{given: ct_under(ball) if given == "image" else ball})  # type: ignore[arg-type]
    assert warnings == []
    for bounds in (preview._AXIAL, preview._CORONAL, preview._SAGITTAL):
        slice_ = box(pixels(data), bounds).astype(int)
        assert ((np.ptp(slice_, axis=-1) > 30).mean() > 0.005) == (given == "mask")
        assert ((slice_.min(axis=-1) > 40).mean() > 0.3) == (given == "image")  # tissue, or black


@needs_egl
@pytest.mark.parametrize("frame", ["LPS", "RAS"])
def test_every_view_has_the_patients_sides_where_its_letters_say(frame: Frame) -> None:
    """Three cubes: red to the patient's right, green to the left, blue behind and above; each is asked after by its place."""
    array = np.zeros((40, 40, 40), np.uint8)
    cubes = {29: (4, 10, 4), 30: (4, 10, 30), 31: (30, 30, 17)}  # (z, y, x): S, P and L lead upwards
    for number, (z, y, x) in cubes.items():
        array[z : z + 6, y : y + 6, x : x + 6] = number
    scene = label_map_to_scene(LabelMap(array, (1, 1, 1), labels=tuple(cubes)), Options(frame=frame))[0]
    pure = ((255, 0, 0), (0, 255, 0), (0, 0, 255))
    scene = replace(scene, surfaces=tuple(replace(s, color=c) for s, c in zip(scene.surfaces, pure, strict=True)))
    sizes = [(200, 160), (160, 160), (180, 150)]
    drawn, problem = preview.render_scene(scene, sizes)
    assert problem == ""
    boxes = [s.vertices_mm[:, ::-1] for s in scene.in_frame("LPS").surfaces]  # (z, y, x)
    low, high = np.min([b.min(axis=0) for b in boxes], axis=0), np.max([b.max(axis=0) for b in boxes], axis=0)
    leads_to = {"S": (0, 1), "I": (0, -1), "P": (1, 1), "A": (1, -1), "L": (2, 1), "R": (2, -1)}
    for view, (width, height), (picture, mm_per_pixel) in zip(preview.VIEWS, sizes, drawn, strict=True):
        assert picture.shape == (height, width, 3)
        (down, down_sign), (across, across_sign) = leads_to[view.letters[1]], leads_to[view.letters[3]]
        for channel, cube in enumerate(boxes):
            seen = np.argwhere((picture.max(axis=-1) > 60) & (picture.argmax(axis=-1) == channel))
            if view.name == "left" and channel == 0:
                assert not len(seen)  # the right cube is behind the left one
                continue
            place = (cube.min(axis=0) + cube.max(axis=0) - low - high) / 2
            row = height / 2 + down_sign * place[down] / mm_per_pixel
            column = width / 2 + across_sign * place[across] / mm_per_pixel
            assert (seen.min(axis=0) + seen.max(axis=0) + 1) / 2 == pytest.approx((row, column), abs=1)
            size = np.ptp(cube, axis=0)[[down, across]] / mm_per_pixel  # millimetres, as the scale bar says
            assert np.ptp(seen, axis=0) + 1 == pytest.approx(size, abs=2)
        lit = np.argwhere(picture.max(axis=-1) > 60)
        assert (lit.min(axis=0) >= (preview._ABOVE - 1, preview._SIDE - 1)).all()  # nothing lies under letters or scale bar
        assert (lit.max(axis=0) <= (height - preview._ABOVE, width - preview._SIDE)).all()


@needs_egl
def test_glass_lets_what_is_inside_be_seen_from_every_side() -> None:
    z, y, x = np.mgrid[:40, :40, :40]
    radius = np.sqrt((z - 20) ** 2 + (y - 20) ** 2 + (x - 20) ** 2)
    array = np.where(radius < 6, 202, np.where(radius < 15, 201, 0)).astype(np.uint8)
    scene = label_map_to_scene(LabelMap(array, (1, 1, 1), labels=(201, 202)))[0]
    kidney = Scene(tuple(s for s in scene.surfaces if s.name == "kidney"))
    sizes = [(160, 160)] * 3
    both, alone = preview.render_scene(scene, sizes)[0], preview.render_scene(kidney, sizes)[0]
    assert len(both) == len(alone) == 3
    for one, other in zip(both, alone, strict=True):
        assert one.pixels[80, 80, 1] > other.pixels[80, 80, 1] + 20  # the yellow tumor behind the brown kidney


@needs_egl
def test_only_the_finest_level_of_detail_is_drawn(ball: LabelMap) -> None:
    several = label_map_to_scene(ball, Options(levels=3))[0]
    finest = replace(several, surfaces=tuple(s for s in several.surfaces if s.level == 0))
    assert len(several.surfaces) > len(finest.surfaces)
    one, other = (preview.render_scene(scene, [(120, 120)], preview.VIEWS[:1])[0][0].pixels for scene in (several, finest))
    assert (one == other).all()
    assert preview._named_volumes(several, None) == preview._named_volumes(finest, None)


@pytest.mark.parametrize(("rooms", "length"), [((130.0, 99.0), 50), ((100.0,), 100), ((0.31, 7.0), 0.2), ((2500.0,), 2000)])
def test_scale_bars_are_round_and_fit(rooms: tuple[float, ...], length: float) -> None:
    assert preview._bar_length(rooms) == pytest.approx(length)


def test_views_and_bars_show_the_same_millimetres() -> None:
    figure = Figure(figsize=(16, 9), dpi=100)
    FigureCanvasAgg(figure)
    for box_, view, scale in zip(preview._BESIDE_SLICES, preview.VIEWS, (0.5, 1.25, 2.0), strict=True):
        width, height = box_[2:]
        rendered = preview.Rendered(np.zeros((height, width, 3), np.uint8), scale)
        preview._draw_view(figure, box_, view, rendered, 100.0)
        axes = figure.axes[-1]
        assert {text.get_text() for text in axes.texts} == {view.name, *view.letters, "100 mm"}
        (bar,) = axes.lines
        assert float(np.ptp(np.asarray(bar.get_xdata(), float))) * scale == pytest.approx(100)
        assert axes.get_xlim() == (0, width)  # so a unit is a pixel
        boxes = [text.get_window_extent() for text in axes.texts]
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_long_names_are_cut_where_their_volumes_begin() -> None:
    entries = [("a structure with a name that nobody would believe to be one", (1.0, 0, 0), 12345.6), ("liver", (0, 1.0, 0), 1)]
    figure = Figure(figsize=(16, 9), dpi=100)
    FigureCanvasAgg(figure)
    preview._draw_legend(figure, entries)
    texts = {text.get_text(): text for text in figure.axes[0].texts}
    (cut,) = (text for name, text in texts.items() if name.startswith("a structure"))
    assert cut.get_text().endswith("…")
    assert cut.get_window_extent().x1 < texts["12345.6 mL"].get_window_extent().x0
    assert "liver" in texts


def test_without_a_driver_it_says_so_and_lives(ball: LabelMap, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mesa's own switches make its driver vanish: VTK really ends its process."""
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.setenv("__EGL_VENDOR_LIBRARY_FILENAMES", "/nonexistent.json")
    monkeypatch.setenv("LIBGL_DRIVERS_PATH", "/nonexistent")
    pictures, problem = preview.render_scene(label_map_to_scene(ball)[0], [(100, 80)], preview.VIEWS[:1])
    assert pictures == []
    assert "libgl1-mesa-dri" in problem


def test_without_egl_the_picture_names_it(ball: LabelMap, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: str) -> None:
        raise OSError

    monkeypatch.setattr(subprocess, "run", no_child)
    monkeypatch.setattr(ctypes, "CDLL", missing)
    data, warnings = preview.render_preview(label_map_to_scene(ball)[0], ct_under(ball), ball)
    assert pixels(data).shape == (900, 1600, 3)
    assert len(warnings) == 1
    assert "libEGL is missing" in warnings[0]


def test_a_script_that_fails_and_one_that_hangs(ball: LabelMap, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = label_map_to_scene(ball)[0]
    failed = subprocess.CompletedProcess([], 1, b"", b"Traceback\nImportError: libX11.so.6\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    assert preview.render_scene(scene, [(8, 8)] * 3) == ([], "drawing failed with ImportError: libX11.so.6")

    def hang(*_: Any, **__: Any) -> None:
        raise subprocess.TimeoutExpired("draw", 1)

    monkeypatch.setattr(subprocess, "run", hang)
    assert "longer than" in preview.render_scene(scene, [(8, 8)] * 3)[1]


def test_an_empty_scene_is_drawn_too() -> None:
    image = Volume(np.zeros((6, 6, 6), np.int16), (2, 1, 1))
    data, warnings = preview.render_preview(Scene(()), image, LabelMap(np.zeros((6, 6, 6), np.uint8), (2, 1, 1)))
    assert pixels(data).shape == (900, 1600, 3)
    assert "empty" in warnings[0]


def test_grids_orientations_and_channels_do_not_matter(ball: LabelMap, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same image and mask, stored in other ways, give the same slices; a mask may lie on a grid of its own."""
    monkeypatch.setattr(subprocess, "run", no_child)
    image, scene = ct_under(ball), label_map_to_scene(ball)[0]
    first, _ = preview.render_preview(scene, image, ball)
    stored = image.reoriented("SAR")
    second, _ = preview.render_preview(
        scene,
        Volume(np.stack([stored.array, stored.array * 0]), stored.spacing_mm, stored.origin_mm, stored.direction),
        ball.reoriented("IRP"),
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
    mask = LabelMap(array, (10, 10, 10), labels=(2, 3, 5, 30, 31, 92, 93, 202))
    found = preview._legend(preview._named_volumes(Scene(()), mask))
    assert [(name, ml) for name, _, ml in found] == [
        ("tumor", 1.0), ("kidney right", 1.0), ("kidney left", 1.0), ("liver", 1.0), ("vertebrae", 2.0), ("ribs left", 2.0),
    ]  # fmt: skip
