"""One picture that shows a result: the scene from the front, the left and above, three slices beside it, and a legend."""

from __future__ import annotations

import ctypes
import io
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from matplotlib.text import Text
from numpy.typing import NDArray

from scangraph.contracts import Image2D, LabelMap, Scene, Volume, label_number, label_of

_WIDTH, _HEIGHT, _DPI = 1600, 900, 100
_BACKGROUND, _PANEL, _TEXT, _MUTED, _ACCENT = "#0e1216", "#000000", "#e8ecef", "#8a949c", "#e8b23c"
#: Boxes in pixels (left, top, width, height): the axial slice is wide, the others are tall.
_AXIAL, _CORONAL, _SAGITTAL = (28, 76, 420, 392), (28, 480, 240, 392), (280, 480, 168, 392)
#: The views of the scene, with slices and without.
_BESIDE_SLICES = ((460, 76, 520, 796), (992, 76, 300, 392), (992, 480, 300, 392))
_ALONE = ((28, 76, 760, 796), (800, 76, 492, 392), (800, 480, 492, 392))
_LEGEND = (1316, 76, 256, 796)
#: Room for letters, name and scale bar around the scene in each view, in pixels.
_SIDE, _ABOVE = 28, 42
_BORDER, _LETTERS, _NAMES = "#232a31", "#c8d0d6", "#9aa4ac"
#: Soft tissue: level 40, width 400 HU.
_WINDOW_HU = (-160.0, 240.0)
#: What the body is denser than; clothes, table and air around it are cut away.
_BODY_HU = -250.0
#: What slices are laid through, the first that occurs.
_INTERESTING = (("tumor",), ("cyst",), ("kidney", "kidney_right", "kidney_left"), ("ureter",), ("aorta", "artery"))
#: How much of the light structures stop, all others being solid, so that vessels, kidneys and what grows in them are seen. Only
#: where there are such: a scene of bones is drawn solid, and so are kidneys in which nothing is known.
_OPACITY = (
    (r"liver|spleen|pancreas|gallbladder|duodenum", 0.22),
    (r"urinary_bladder|prostate|heart|adrenal.*", 0.4),
    (r"stomach|colon|small_bowel|esophagus|lung.*|fat", 0.05),
    (r"gluteus.*|autochthon.*|iliopsoas.*|brain|skull|costal_cartilages|rib.*|scapula.*|clavicula.*|sternum", 0.06),
)
_KIDNEY, _IN_KIDNEYS, _KIDNEY_OPACITY = r"kidney(_left|_right)?", r"tumor|.*cyst.*|artery|vein|renal_pelvis", 0.48
_INNER = r"kidney.*|artery|vein|ureter|tumor|cyst|aorta|inferior_vena_cava|portal_vein.*|iliac_.*|renal_pelvis"
#: Series that the legend shows as one line.
_SERIES = ((r"vertebrae_.*", "vertebrae"), (r"rib_left_.*", "ribs left"), (r"rib_right_.*", "ribs right"))
#: Legend lines: as high as this where there are few, and no more than so many.
_ROW_HEIGHT, _MOST_ROWS = 30.0, 48
#: To which part of their size long names in it shrink before they are cut.
_SMALLEST = 0.8
_TIMEOUT_S = 180


class View(NamedTuple):
    """A way to look at a scene, in LPS.

    Parameters
    ----------
    name : str
    toward : (x, y, z)
        Unit vector from the scene to who looks at it.
    up : (x, y, z)
        What is up in the picture.
    letters : str
        Sides of the patient: above, below, on the left and on the right of the picture.
    """

    name: str
    toward: tuple[int, int, int]
    up: tuple[int, int, int]
    letters: str


#: The patient's right is on the left in the front view, the axial and the coronal slice, and so it is from above, too: nobody
#: has to swap sides within one picture.
VIEWS = (
    View("front", (0, -1, 0), (0, 0, 1), "SIRL"),
    View("left", (1, 0, 0), (0, 0, 1), "SIAP"),
    View("top", (0, 0, 1), (0, 1, 0), "PARL"),
)
Box = tuple[int, int, int, int]
_PACKAGES = "Debian: apt-get install libegl1 libgl1-mesa-dri"


class Rendered(NamedTuple):
    """A view of a scene: RGB, (height, width, 3), and how long a pixel is."""

    pixels: NDArray[np.uint8]
    mm_per_pixel: float


def render_preview(
    scene: Scene, image: Volume | None = None, mask: LabelMap | None = None, *, title: str = ""
) -> tuple[Image2D, list[str]]:
    """Draw a result.

    Parameters
    ----------
    scene : Scene
        In any frame; its finest level of detail is drawn.
    image : Volume, optional
        CT in Hounsfield units, (z, y, x) or (c, z, y, x), of which the first channel is drawn.
    mask : LabelMap, optional
        On any grid; looked up on the image's. Slices run along the image's own axes, so they are oblique where it is. With
        neither image nor mask there are no slices; the legend's volumes are the mask's, or the scene's where there is none.
    title : str
        Written above.

    Returns
    -------
    (Image2D, list of str)
        1600×900, a PNG when it is saved, and warnings (no OpenGL, so no 3-D view).
    """
    warnings: list[str] = []
    figure = Figure(figsize=(_WIDTH / _DPI, _HEIGHT / _DPI), dpi=_DPI, facecolor=_BACKGROUND)
    canvas = FigureCanvasAgg(figure)
    boxes = _ALONE
    if image is not None or mask is not None:
        boxes = _BESIDE_SLICES
        _draw_slices(figure, image, mask)
    views, problem = render_scene(scene, [box[2:] for box in boxes])
    if problem:
        warnings.append(f"The picture has no 3-D view: {problem}.")
        left, top, _, height = boxes[0]
        axes = _axes(figure, (left, top, boxes[1][0] + boxes[1][2] - left, height))
        axes.set_axis_off()
        axes.text(0.5, 0.5, f"No 3-D view:\n{problem}", color=_MUTED, ha="center", va="center", fontsize=12, linespacing=1.6)
    else:
        bar_mm = _bar_length([0.3 * box[2] * view.mm_per_pixel for box, view in zip(boxes, views, strict=True)])
        for box, view, rendered in zip(boxes, VIEWS, views, strict=True):
            _draw_view(figure, box, view, rendered, bar_mm)
    _draw_legend(figure, _legend(_named_volumes(scene, mask)))
    title = title or "scangraph"
    figure.text(
        28 / _WIDTH, 1 - 40 / _HEIGHT, title, color=_TEXT, fontsize=min(17, 1500 / len(title)), fontweight="bold", va="center",
        parse_math=False,
    )  # fmt: skip
    figure.text(1572 / _WIDTH, 1 - 40 / _HEIGHT, "Research use only", color=_ACCENT, fontsize=12, ha="right", va="center")
    canvas.draw()
    return Image2D((np.array(np.asarray(canvas.buffer_rgba())[..., :3]),)), warnings


def render_scene(scene: Scene, sizes: Sequence[tuple[int, int]], views: Sequence[View] = VIEWS) -> tuple[list[Rendered], str]:
    """Render a scene off screen from several sides, in one process of its own (see `rendering`).

    Parameters
    ----------
    scene : Scene
        In any frame; its finest level of detail is drawn.
    sizes : sequence of (width, height)
        Pixels of each view.
    views : sequence of View
        From where.

    Returns
    -------
    (list of Rendered, str)
        The pictures, in parallel projection; or none, and why.
    """
    surfaces = [surface for surface in scene.in_frame("LPS").surfaces if len(surface.faces) and surface.level == 0]
    if not surfaces:
        return [], "the scene is empty"
    names = [surface.name for surface in surfaces]
    vertices = np.concatenate([s.vertices_mm for s in surfaces])
    middle, mm_per_pixel = _fit(vertices, sizes, views)
    with io.BytesIO() as buffer:
        np.savez(
            buffer,
            vertices=vertices,
            faces=np.concatenate([s.faces for s in surfaces]),
            counts=np.array([(len(s.vertices_mm), len(s.faces)) for s in surfaces]),
            colors=np.array([s.color for s in surfaces], np.uint8),
            opacity=_opacities(names),
            background=np.frombuffer(bytes.fromhex(_BACKGROUND[1:]), np.uint8),
            sizes=np.array(sizes),
            toward=np.array([view.toward for view in views], np.float64),
            up=np.array([view.up for view in views], np.float64),
            middles=np.array([middle for _ in views]),
            mm_per_pixel=mm_per_pixel,
        )
        parts = buffer.getvalue()
    environment = dict(os.environ)
    if sys.platform == "linux" and not environment.get("DISPLAY"):
        environment["VTK_DEFAULT_OPENGL_WINDOW"] = "vtkEGLRenderWindow"  # VTK would find it by itself, but complain
    script = Path(__file__).with_name("rendering.py")
    command = [sys.executable, "-P", str(script)]
    try:
        child = subprocess.run(command, input=parts, capture_output=True, timeout=_TIMEOUT_S, env=environment, check=False)
    except subprocess.TimeoutExpired:
        return [], f"drawing took longer than {_TIMEOUT_S} s"
    if child.returncode != 0:
        return [], _reason(child.returncode, child.stderr.decode(errors="replace"))
    with io.BytesIO(child.stdout) as received, np.load(received) as pictures:
        drawn = [np.asarray(pictures[f"arr_{number}"], np.uint8) for number in range(len(views))]
    return [Rendered(pixels, float(scale)) for pixels, scale in zip(drawn, mm_per_pixel, strict=True)], ""


def _fit(
    vertices: NDArray[np.float32], sizes: Sequence[tuple[int, int]], views: Sequence[View]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return what is in the middle of every view, and mm per pixel, (K,), at which everything can be seen."""
    low, high = vertices.min(axis=0).astype(np.float64), vertices.max(axis=0).astype(np.float64)
    scales = []
    for (width, height), view in zip(sizes, views, strict=True):
        across = np.abs(np.cross(view.up, view.toward))
        room = max(1, width - 2 * _SIDE), max(1, height - 2 * _ABOVE)
        scales.append(max(float((high - low) @ across) / room[0], float((high - low) @ np.abs(view.up)) / room[1], 1e-6))
    return (low + high) / 2, np.array(scales)


def _opacities(names: Sequence[str]) -> NDArray[np.float64]:
    """How much of the light each structure stops, 0 to 1: less where there is something to be seen behind it."""
    if not any(re.fullmatch(_INNER, name) for name in names):
        return np.ones(len(names))
    filled = any(re.fullmatch(_IN_KIDNEYS, name) for name in names)
    rules = (*_OPACITY, (_KIDNEY, _KIDNEY_OPACITY if filled else 1.0))
    return np.array([next((opacity for rule, opacity in rules if re.fullmatch(rule, name)), 1.0) for name in names])


def _reason(returncode: int, log: str) -> str:
    """Say why the drawing process died; Python's errors end in a line of their own, VTK's in a signal."""
    if returncode > 0:
        return f"drawing failed with {log.strip().splitlines()[-1] if log.strip() else f'exit code {returncode}'}"
    try:
        ctypes.CDLL("libEGL.so.1")
    except OSError:
        return f"libEGL is missing on the server ({_PACKAGES})"
    return f"OpenGL does not work on the server, drawing ended with signal {-returncode} ({_PACKAGES})"


def _axes(figure: Figure, box: Box) -> Axes:
    left, top, width, height = box
    return figure.add_axes((left / _WIDTH, 1 - (top + height) / _HEIGHT, width / _WIDTH, height / _HEIGHT))


def _panel(figure: Figure, box: Box, name: str, letters: str, ground: str) -> Axes:
    """Return axes with a border, a name, and what is above, below, left and right."""
    axes = _axes(figure, box)
    axes.set_facecolor(ground)
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set_color(_BORDER)
    # Readable over a picture, too.
    patch = {"facecolor": ground, "alpha": 0.6, "linewidth": 0, "pad": 1.5}
    style: dict[str, Any] = {"fontsize": 10, "color": _LETTERS, "transform": axes.transAxes, "va": "center", "bbox": patch}
    across, down = 14 / box[2], 16 / box[3]
    for letter, place in zip(letters, ((0.5, 1 - down), (0.5, down), (across, 0.5), (1 - across, 0.5)), strict=True):
        axes.text(*place, letter, ha="center", **style)
    axes.text(across / 2, 1 - down, name, **style | {"color": _NAMES})
    return axes


def _bar_length(rooms_mm: Sequence[float]) -> float:
    """Return the longest 1, 2 or 5 times a power of ten, in mm, for which there is room in every view."""
    room = min(rooms_mm)
    power = 10.0 ** np.floor(np.log10(room))
    return float(max(step * power for step in (1, 2, 5) if step * power <= room))


def _draw_view(figure: Figure, box: Box, view: View, rendered: Rendered, bar_mm: float) -> None:
    """Draw a view of the scene, and a scale bar in its lower left corner."""
    axes = _panel(figure, box, view.name, view.letters, _BACKGROUND)
    width, height = box[2:]
    axes.imshow(rendered.pixels, interpolation="none", extent=(0, width, height, 0))
    length = bar_mm / rendered.mm_per_pixel
    axes.plot((14, 14 + length), (height - 13, height - 13), color=_LETTERS, lw=1.6, solid_capstyle="butt")
    axes.text(14, height - 25, f"{bar_mm:g} mm", color=_LETTERS, fontsize=9, va="center")


def _draw_slices(figure: Figure, image: Volume | None, mask: LabelMap | None) -> None:
    """Axial, coronal and sagittal, in radiological convention: the patient's right is on the left."""
    if image is None:
        assert mask is not None
        mask = mask.reoriented("LPS")
        spacing_mm, hounsfield = mask.spacing_mm, np.broadcast_to(np.float32(_WINDOW_HU[0]), mask.shape)
    else:
        if mask is None:
            nothing = np.zeros(image.array.shape[-3:], np.uint8)
            mask = LabelMap(nothing, image.spacing_mm, image.origin_mm, image.direction, labels=())
        mask, image = mask.on_grid_of(image).reoriented("LPS"), image.reoriented("LPS")
        spacing_mm, hounsfield = image.spacing_mm, image.array if image.array.ndim == 3 else image.array[0]
    z, y, x = _position(mask)
    dz, dy, dx = spacing_mm
    # box, name, cut, where the other two slices lie in it (row, column), mm of a row and a column, letters
    views: list[tuple[Box, str, Any, tuple[int, int], tuple[float, float], str]] = [
        (_AXIAL, "axial", np.s_[z, :, :], (y, x), (dy, dx), "APRL"),
        (_CORONAL, "coronal", np.s_[::-1, y, :], (mask.shape[0] - 1 - z, x), (dz, dx), "SIRL"),
        (_SAGITTAL, "sagittal", np.s_[::-1, :, x], (mask.shape[0] - 1 - z, y), (dz, dy), "SIAP"),
    ]
    for box, name, cut, crossing, spacing, letters in views:
        axes = _panel(figure, box, name, letters, _PANEL)
        _draw_slice(axes, hounsfield[cut], mask.array[cut], crossing, spacing, box[2] / box[3])


def _draw_slice(
    axes: Axes,
    hounsfield: NDArray[Any],
    labels: NDArray[Any],
    crossing: tuple[int, int],
    spacing: tuple[float, float],
    aspect: float,
) -> None:
    """Draw one cut in millimetres, as large as the body fits into a box of width / height = `aspect`."""
    rows, columns = hounsfield.shape
    extent = (0.0, columns * spacing[1], rows * spacing[0], 0.0)
    low, high = _WINDOW_HU
    axes.imshow(hounsfield, cmap="gray", vmin=low, vmax=high, extent=extent, interpolation="bilinear")
    axes.imshow(_overlay(labels), extent=extent, interpolation="nearest")
    top, bottom, left, right = (v * mm for v, mm in zip(_body(hounsfield), np.repeat(spacing, 2), strict=True))
    # Room for the letters, and the box's own aspect.
    middle_row, middle_column, height, width = (top + bottom) / 2, (left + right) / 2, bottom - top, right - left
    height = 1.06 * max(height, width / aspect)
    axes.set_xlim(middle_column - height * aspect / 2, middle_column + height * aspect / 2)
    axes.set_ylim(middle_row + height / 2, middle_row - height / 2)
    row, column = ((v + 0.5) * mm for v, mm in zip(crossing, spacing, strict=True))
    for line in (axes.axhline, axes.axvline):
        line(row if line == axes.axhline else column, color=_TEXT, lw=0.6, alpha=0.28)


def _body(hounsfield: NDArray[Any]) -> tuple[int, int, int, int]:
    """First and last row, first and last column (ends exclusive) with more than a few pixels of body; all if there is none."""
    dense = hounsfield > _BODY_HU
    found = []
    for axis in (1, 0):
        occupied = np.flatnonzero(dense.mean(axis=axis) > 0.12)
        found += [int(occupied[0]), int(occupied[-1]) + 1] if occupied.size else [0, hounsfield.shape[1 - axis]]
    top, bottom, left, right = found
    return top, bottom, left, right


def _overlay(labels: NDArray[Any]) -> NDArray[np.float32]:
    """Colours of the table, (rows, columns, RGBA): a third opaque, with a stronger outline."""
    numbers, index = np.unique(labels, return_inverse=True)
    colors = np.array([(*_color(int(n)), 0.36 if n else 0.0) for n in numbers], np.float32)
    painted = colors[index.reshape(labels.shape)]
    edge = np.zeros(labels.shape, bool)
    for axis in (0, 1):  # pixels whose neighbour on any side is another structure
        differs = np.diff(labels.astype(np.int64), axis=axis) != 0
        pair = [(0, 0), (0, 0)]
        for side in ((1, 0), (0, 1)):
            pair[axis] = side
            edge |= np.pad(differs, pair)
    painted[edge & (labels > 0), 3] = 0.9
    return painted


def _color(number: int) -> tuple[float, float, float]:
    red, green, blue = label_of(number, {}).color
    return red / 255, green / 255, blue / 255


def _position(mask: LabelMap) -> tuple[int, int, int]:
    """Index (z, y, x) through what is most interesting: on each axis the plane where most of it lies."""
    present = mask.counts().keys()
    wanted = next((n for names in _INTERESTING if (n := {label_number(name) for name in names} & present)), set(present))
    if not wanted:
        z, y, x = (n // 2 for n in mask.shape)
        return z, y, x
    chosen = np.isin(mask.array, list(wanted))
    z, y, x = (int(chosen.sum(axis=tuple(a for a in range(3) if a != axis)).argmax()) for axis in range(3))
    return z, y, x


Entry = tuple[str, tuple[float, float, float], float]


def _named_volumes(scene: Scene, mask: LabelMap | None) -> dict[int, Entry]:
    """Name, colour and mL of every label: the mask's, or where there is none the scene's."""
    if mask is not None:
        return {number: (mask.label(number).name, _color(number), ml) for number, ml in mask.volumes_ml().items()}
    found = {}
    for surface in scene.surfaces:
        if surface.level == 0:
            red, green, blue = surface.color
            ml = surface.measures.get("voxel_volume_ml")
            found[surface.label] = surface.name, (red / 255, green / 255, blue / 255), surface.volume_ml if ml is None else ml
    return found


def _legend(volumes: dict[int, Entry]) -> list[Entry]:
    """Lines of the legend: name, colour, mL. Series are one line; what was looked for comes first."""
    lines: dict[str, tuple[tuple[float, float, float], float]] = {}
    for number in sorted(volumes, key=lambda n: (not re.fullmatch(_INNER, volumes[n][0]), -n if n > 200 else n)):
        name, color, ml = volumes[number]
        shown = next((title for pattern, title in _SERIES if re.fullmatch(pattern, name)), name).replace("_", " ")
        first, so_far = lines.get(shown, (color, 0.0))
        lines[shown] = first, so_far + ml
    return [(name, color, ml) for name, (color, ml) in lines.items()]


def _draw_legend(figure: Figure, lines: Sequence[Entry]) -> None:
    axes = _axes(figure, _LEGEND)
    axes.set(xlim=(0, _LEGEND[2]), ylim=(_LEGEND[3], 0))  # pixels
    axes.set_axis_off()
    shown = lines if len(lines) <= _MOST_ROWS else lines[: _MOST_ROWS - 1]
    row_height = min(_ROW_HEIGHT, _LEGEND[3] / max(len(lines[:_MOST_ROWS]), 1))
    style: dict[str, Any] = {"fontsize": min(11.0, 0.5 * row_height), "va": "center", "parse_math": False}
    for row, (name, color, ml) in enumerate(shown):
        height = (row + 0.5) * row_height
        axes.add_patch(Circle((8, height), min(7.0, 0.34 * row_height), color=color, lw=0))
        volume = axes.text(_LEGEND[2], height, f"{ml:.1f} mL", color=_MUTED, ha="right", **style)
        _shorten(axes.text(26, height, name, color=_TEXT, **style), _LEGEND[2] - 26 - volume.get_window_extent().width - 8)
    if len(shown) < len(lines):
        axes.text(26, (len(shown) + 0.5) * row_height, f"and {len(lines) - len(shown)} more", color=_MUTED, **style)


def _shorten(text: Text, room: float) -> None:
    """Make a text that needs more pixels than there are smaller, and if that does not do, cut its end."""
    needed, whole = text.get_window_extent().width, text.get_text()
    if needed > room:
        text.set_fontsize(float(text.get_fontsize()) * max(room / needed, _SMALLEST))
    for length in range(len(whole) - 1, 0, -1):
        if text.get_window_extent().width <= room + 1:
            return
        text.set_text(f"{whole[:length].rstrip()}…")
