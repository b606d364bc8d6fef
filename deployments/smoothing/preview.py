"""One picture that shows a result: three slices with the mask over them, and the scene with a legend."""

from __future__ import annotations

import ctypes
import io
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from numpy.typing import NDArray

from scangraph.contracts import LabelMap, Scene, Volume, label_number, label_of

_WIDTH, _HEIGHT, _DPI = 1600, 900, 100
_BACKGROUND, _PANEL, _TEXT, _MUTED, _ACCENT = "#0e1216", "#000000", "#e8ecef", "#8a949c", "#e8b23c"
#: Boxes in pixels (left, top, width, height): the axial slice is wide, the others are tall.
_AXIAL, _CORONAL, _SAGITTAL = (28, 76, 508, 352), (28, 440, 288, 432), (328, 440, 208, 432)
_SCENE, _LEGEND = (556, 76, 728, 796), (1304, 76, 268, 796)
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
_TIMEOUT_S = 180
_PACKAGES = "Debian: apt-get install libegl1 libgl1-mesa-dri"


def render_preview(image: Volume, mask: LabelMap, scene: Scene, *, title: str = "") -> tuple[bytes, list[str]]:
    """Draw a result.

    Parameters
    ----------
    image : Volume
        CT in Hounsfield units, (z, y, x) or (c, z, y, x), of which the first channel is drawn.
    mask : LabelMap
        On any grid; looked up on the image's. Slices run along the image's own axes, so they are oblique where it is.
    scene : Scene
        In any frame.
    title : str
        Written above.

    Returns
    -------
    (bytes, list of str)
        PNG of 1600×900, and warnings (no OpenGL, so no 3-D view).
    """
    warnings: list[str] = []
    figure = Figure(figsize=(_WIDTH / _DPI, _HEIGHT / _DPI), dpi=_DPI, facecolor=_BACKGROUND)
    FigureCanvasAgg(figure)
    _draw_slices(figure, image, mask)
    axes = _axes(figure, _SCENE)
    axes.set_axis_off()
    picture, problem = render_scene(scene, _SCENE[2:])
    if picture is None:
        warnings.append(f"The picture has no 3-D view: {problem}.")
        axes.text(0.5, 0.5, f"No 3-D view:\n{problem}", color=_MUTED, ha="center", va="center", fontsize=12, linespacing=1.6)
    else:
        axes.imshow(picture, interpolation="none")
        axes.text(0.015, 0.5, "R", color=_MUTED, fontsize=11, va="center", transform=axes.transAxes)
        axes.text(0.985, 0.5, "L", color=_MUTED, fontsize=11, va="center", ha="right", transform=axes.transAxes)
    _draw_legend(figure, mask)
    title = title or "scangraph"
    figure.text(
        28 / _WIDTH, 1 - 40 / _HEIGHT, title, color=_TEXT, fontsize=min(17, 1500 / len(title)), fontweight="bold", va="center",
        parse_math=False,
    )  # fmt: skip
    figure.text(1572 / _WIDTH, 1 - 40 / _HEIGHT, "Research use only", color=_ACCENT, fontsize=12, ha="right", va="center")
    with io.BytesIO() as buffer:
        figure.savefig(buffer, format="png", facecolor=_BACKGROUND)
        return buffer.getvalue(), warnings


def render_scene(scene: Scene, size: tuple[int, int]) -> tuple[NDArray[np.uint8] | None, str]:
    """Render a scene off screen, from the front and a little from the left, in a process of its own (see `rendering`).

    Parameters
    ----------
    scene : Scene
        In any frame.
    size : (width, height)
        Pixels.

    Returns
    -------
    (ndarray, shape (height, width, 3), or None; str)
        The picture, or why there is none.
    """
    surfaces = [surface for surface in scene.in_frame("LPS").surfaces if len(surface.faces)]
    if not surfaces:
        return None, "the scene is empty"
    names = [surface.name for surface in surfaces]
    with io.BytesIO() as buffer:
        np.savez(
            buffer,
            vertices=np.concatenate([s.vertices_mm for s in surfaces]),
            faces=np.concatenate([s.faces for s in surfaces]),
            counts=np.array([(len(s.vertices_mm), len(s.faces)) for s in surfaces]),
            colors=np.array([s.color for s in surfaces], np.uint8),
            opacity=_opacities(names),
            size=np.array(size),
            background=np.frombuffer(bytes.fromhex(_BACKGROUND[1:]), np.uint8),
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
        return None, f"drawing took longer than {_TIMEOUT_S} s"
    if child.returncode == 0:
        with io.BytesIO(child.stdout) as received:
            return np.asarray(np.load(received), np.uint8), ""
    return None, _reason(child.returncode, child.stderr.decode(errors="replace"))


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


def _axes(figure: Figure, box: tuple[int, int, int, int]) -> Axes:
    left, top, width, height = box
    return figure.add_axes((left / _WIDTH, 1 - (top + height) / _HEIGHT, width / _WIDTH, height / _HEIGHT))


def _draw_slices(figure: Figure, image: Volume, mask: LabelMap) -> None:
    """Axial, coronal and sagittal, in radiological convention: the patient's right is on the left."""
    mask = mask.on_grid_of(image).reoriented("LPS")
    image = image.reoriented("LPS")
    hounsfield = image.array if image.array.ndim == 3 else image.array[0]
    z, y, x = _position(mask)
    dz, dy, dx = image.spacing_mm
    # box, name, cut, where the other two slices lie in it (row, column), mm of a row and a column, letters
    views: list[tuple[tuple[int, int, int, int], str, Any, tuple[int, int], tuple[float, float], str]] = [
        (_AXIAL, "axial", np.s_[z, :, :], (y, x), (dy, dx), "APRL"),
        (_CORONAL, "coronal", np.s_[::-1, y, :], (mask.shape[0] - 1 - z, x), (dz, dx), "SIRL"),
        (_SAGITTAL, "sagittal", np.s_[::-1, :, x], (mask.shape[0] - 1 - z, y), (dz, dy), "SIAP"),
    ]
    for box, name, cut, crossing, spacing, letters in views:
        axes = _axes(figure, box)
        axes.set_facecolor(_PANEL)
        axes.set(xticks=[], yticks=[])
        for spine in axes.spines.values():
            spine.set_color("#232a31")
        _draw_slice(axes, hounsfield[cut], mask.array[cut], crossing, spacing, box[2] / box[3])
        style: dict[str, Any] = {"fontsize": 10, "color": "#c8d0d6", "transform": axes.transAxes, "va": "center"}
        across, down = 14 / box[2], 16 / box[3]
        places = ((0.5, 1 - down), (0.5, down), (across, 0.5), (1 - across, 0.5))
        for letter, place in zip(letters, places, strict=True):
            axes.text(*place, letter, ha="center", **style)
        axes.text(across / 2, 1 - down, name, **style | {"color": "#9aa4ac"})


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


def _legend(mask: LabelMap) -> list[tuple[str, tuple[float, float, float], float]]:
    """Lines of the legend: name, colour, mL. Series are one line; what was looked for comes first."""
    lines: dict[str, tuple[tuple[float, float, float], float]] = {}
    volumes = mask.volumes_ml()
    names = {number: mask.label(number).name for number in volumes}
    for number in sorted(volumes, key=lambda n: (not re.fullmatch(_INNER, names[n]), -n if n > 200 else n)):
        name = next((title for pattern, title in _SERIES if re.fullmatch(pattern, names[number])), names[number])
        color, so_far = lines.get(name.replace("_", " "), (_color(number), 0.0))
        lines[name.replace("_", " ")] = color, so_far + volumes[number]
    return [(name, color, ml) for name, (color, ml) in lines.items()]


def _draw_legend(figure: Figure, mask: LabelMap) -> None:
    lines = _legend(mask)
    axes = _axes(figure, _LEGEND)
    axes.set(xlim=(0, _LEGEND[2]), ylim=(_LEGEND[3], 0))  # pixels
    axes.set_axis_off()
    shown = lines if len(lines) <= _MOST_ROWS else lines[: _MOST_ROWS - 1]
    row_height = min(_ROW_HEIGHT, _LEGEND[3] / max(len(lines[:_MOST_ROWS]), 1))
    style: dict[str, Any] = {"fontsize": min(11.0, 0.5 * row_height), "va": "center"}
    for row, (name, color, ml) in enumerate(shown):
        height = (row + 0.5) * row_height
        axes.add_patch(Circle((8, height), min(7.0, 0.34 * row_height), color=color, lw=0))
        axes.text(26, height, name, color=_TEXT, **style)
        axes.text(_LEGEND[2], height, f"{ml:.1f} mL", color=_MUTED, ha="right", **style)
    if len(shown) < len(lines):
        axes.text(26, (len(shown) + 0.5) * row_height, f"and {len(lines) - len(shown)} more", color=_MUTED, **style)
