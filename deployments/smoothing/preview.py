"""One picture that shows a result: three slices with the mask over them, and the scene with a legend."""

from __future__ import annotations

import ctypes
import io
import os
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from numpy.typing import NDArray

from scangraph.contracts import LabelMap, Scene, Volume, label_number, label_table

_SIZE_INCHES, _DPI = (16, 9), 100
_BACKGROUND, _TEXT, _MUTED = "#0e1216", "#e8ecef", "#8a949c"
#: Soft tissue: level 40, width 400 HU.
_WINDOW_HU = (-160.0, 240.0)
#: What slices are laid through, the first that occurs.
_INTERESTING = (("tumor",), ("cyst",), ("kidney", "kidney_right", "kidney_left"), ("ureter",), ("aorta", "artery"))
#: Shown as glass where vessels, ureters or tumors would be hidden behind them.
_GLASS = ("liver", "spleen", "kidney", "kidney_right", "kidney_left", "stomach", "colon", "small_bowel", "urinary_bladder")
_INNER = ("artery", "vein", "ureter", "tumor", "cyst")
_LEGEND_ROWS = 24


def render_preview(image: Volume, mask: LabelMap, scene: Scene, *, title: str = "") -> tuple[bytes, list[str]]:
    """Draw a result.

    Parameters
    ----------
    image : Volume
        CT in Hounsfield units.
    mask : LabelMap
        On any grid; looked up on the image's.
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
    mask = mask.on_grid_of(image).reoriented("LPS")
    image = image.reoriented("LPS")
    figure = Figure(figsize=_SIZE_INCHES, dpi=_DPI, facecolor=_BACKGROUND)
    FigureCanvasAgg(figure)
    _draw_slices(figure, image, mask)
    axes = figure.add_axes((0.285, 0.04, 0.515, 0.88))
    axes.set_axis_off()
    picture, problem = render_scene(scene, (824, 792))
    if picture is None:
        warnings.append(f"The picture has no 3-D view: {problem}")
        axes.text(0.5, 0.5, f"no 3-D view\n{problem}", color=_MUTED, ha="center", va="center", wrap=True, fontsize=11)
    else:
        axes.imshow(picture, interpolation="antialiased")
    _draw_legend(figure, mask)
    figure.text(0.02, 0.955, title or "scangraph", color=_TEXT, fontsize=16, fontweight="bold", va="center")
    figure.text(0.98, 0.955, "Research use only", color="#e8b23c", fontsize=12, ha="right", va="center")
    with io.BytesIO() as buffer:
        figure.savefig(buffer, format="png", facecolor=_BACKGROUND)
        return buffer.getvalue(), warnings


def render_scene(scene: Scene, size: tuple[int, int]) -> tuple[NDArray[np.uint8] | None, str]:
    """Render a scene off screen, from the front and a little from the left.

    Returns
    -------
    (ndarray, shape (height, width, 3), or None; str)
        The picture, or why there is none.
    """
    if not any(len(surface.faces) for surface in scene.surfaces):
        return None, "the scene is empty"
    if not os.environ.get("DISPLAY"):
        try:  # VTK ends the process where it finds neither a display nor EGL
            ctypes.CDLL("libEGL.so.1")
        except OSError:
            return None, "libEGL is missing on the server (Debian: libegl1 libgl1-mesa-dri)"
        os.environ.setdefault("VTK_DEFAULT_OPENGL_WINDOW", "vtkEGLRenderWindow")
    import pyvista

    plotter = pyvista.Plotter(off_screen=True, window_size=list(size), lighting="three lights")
    try:
        plotter.set_background(_BACKGROUND)
        present = {surface.name for surface in scene.surfaces}
        hides = bool(present & set(_INNER))
        for surface in scene.in_frame("LPS").surfaces:
            if not len(surface.faces):
                continue
            mesh = pyvista.PolyData.from_regular_faces(surface.vertices_mm, surface.faces)
            opacity = 0.38 if hides and surface.name in _GLASS else 1.0
            color = [c / 255 for c in surface.color]
            plotter.add_mesh(mesh, color=color, opacity=opacity, smooth_shading=True, specular=0.25, specular_power=18)
        plotter.enable_depth_peeling(8)
        plotter.enable_anti_aliasing("ssaa")
        # LPS: the front is at negative y, the patient's left at positive x, the head at positive z.
        plotter.camera_position = [(0.35, -1.0, 0.18), (0.0, 0.0, 0.0), (0.0, 0.0, 1.0)]
        plotter.reset_camera()
        plotter.camera.zoom(1.25)
        return np.asarray(plotter.screenshot(return_img=True), np.uint8), ""
    finally:
        plotter.close()


def _draw_slices(figure: Figure, image: Volume, mask: LabelMap) -> None:
    """Axial, coronal and sagittal, in radiological convention: the patient's right is on the left."""
    z, y, x = _position(mask)
    dz, dy, dx = image.spacing_mm
    views: list[tuple[str, Any, float, tuple[str, str, str, str]]] = [
        ("axial", np.s_[z, :, :], dy / dx, ("A", "P", "R", "L")),
        ("coronal", np.s_[::-1, y, :], dz / dx, ("S", "I", "R", "L")),
        ("sagittal", np.s_[::-1, :, x], dz / dy, ("S", "I", "A", "P")),
    ]
    for row, (name, cut, aspect, (top, bottom, left, right)) in enumerate(views):
        axes = figure.add_axes((0.02, 0.635 - row * 0.3, 0.25, 0.285))
        axes.set_facecolor("black")
        axes.set(xticks=[], yticks=[])
        for spine in axes.spines.values():
            spine.set_color("#2a3138")
        axes.imshow(
            image.array[cut], cmap="gray", vmin=_WINDOW_HU[0], vmax=_WINDOW_HU[1], aspect=aspect, interpolation="bilinear"
        )
        axes.imshow(_overlay(mask.array[cut]), aspect=aspect, interpolation="nearest")
        axes.set_anchor("C")
        letters: dict[str, Any] = {
            "fontsize": 9,
            "color": "#c8d0d6",
            "transform": axes.transAxes,
            "ha": "center",
            "va": "center",
        }
        for letter, position in ((top, (0.5, 0.95)), (bottom, (0.5, 0.05)), (left, (0.035, 0.5)), (right, (0.965, 0.5))):
            axes.text(*position, letter, **letters)
        axes.text(0.03, 0.94, name, fontsize=9, color=_MUTED, transform=axes.transAxes, va="center")


def _overlay(labels: NDArray[Any]) -> NDArray[np.float32]:
    """Colours of the table, (rows, columns, RGBA): half transparent, with a stronger outline."""
    colors = np.zeros((int(labels.max(initial=0)) + 1, 4), np.float32)
    for number in np.unique(labels[labels > 0]):
        label = label_table().get(int(number))
        colors[number, :3] = np.asarray(label.color if label else (160, 160, 160)) / 255
        colors[number, 3] = 0.42
    painted = colors[labels]
    edge = np.zeros(labels.shape, bool)
    edge[1:] |= labels[1:] != labels[:-1]
    edge[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    painted[edge & (labels > 0), 3] = 0.95
    return np.asarray(painted, np.float32)


def _position(mask: LabelMap) -> tuple[int, int, int]:
    """Index (z, y, x) through the middle of what is most interesting: on each axis the plane where most of it lies."""
    counts = mask.counts()
    wanted = next(
        (numbers for names in _INTERESTING if (numbers := {label_number(n) for n in names} & counts.keys())), set(counts)
    )
    if not wanted:
        z, y, x = (n // 2 for n in mask.shape)
        return z, y, x
    chosen = np.isin(mask.array, list(wanted))
    z, y, x = (int(chosen.sum(axis=tuple(a for a in range(3) if a != axis)).argmax()) for axis in range(3))
    return z, y, x


def _draw_legend(figure: Figure, mask: LabelMap) -> None:
    table, volumes = label_table(), mask.volumes_ml()
    axes = figure.add_axes((0.805, 0.04, 0.185, 0.88))
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.set_axis_off()
    shown = sorted(volumes, key=lambda n: (-n if n > 200 else n, n))[:_LEGEND_ROWS]
    for row, number in enumerate(shown):
        label, height = table.get(number), 0.97 - row * 0.038
        color = np.asarray(label.color if label else (160, 160, 160)) / 255
        axes.add_patch(FancyBboxPatch((0.02, height - 0.009), 0.05, 0.018, boxstyle="round,pad=0.004", color=color, lw=0))
        axes.text(0.12, height, label.title if label else str(number), color=_TEXT, fontsize=11, va="center")
        axes.text(0.98, height, f"{volumes[number]:.1f} mL", color=_MUTED, fontsize=10, va="center", ha="right")
    if len(volumes) > len(shown):
        axes.text(
            0.12, 0.97 - len(shown) * 0.038, f"and {len(volumes) - len(shown)} more", color=_MUTED, fontsize=10, va="center"
        )
