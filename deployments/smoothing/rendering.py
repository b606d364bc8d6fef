"""Draws surfaces off screen: a script, run as a process of its own by `preview.render_scene`.

Where OpenGL is missing or broken VTK does not raise, it ends the process (9.7 without Mesa's drivers: signal 11). A child may
die, and its memory goes with it. It imports nothing of ours, and so starts as quickly as VTK itself. `Parts` come in on stdin,
the pictures go out on stdout.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import vtkmodules.vtkRenderingOpenGL2  # noqa: F401 - registers OpenGL as what draws
from numpy.typing import NDArray
from vtkmodules.util.numpy_support import numpy_to_vtk, numpy_to_vtkIdTypeArray, vtk_to_numpy
from vtkmodules.vtkCommonCore import vtkPoints
from vtkmodules.vtkCommonDataModel import vtkCellArray, vtkPolyData
from vtkmodules.vtkFiltersCore import vtkPolyDataNormals
from vtkmodules.vtkRenderingCore import (
    vtkActor,
    vtkLightKit,
    vtkPolyDataMapper,
    vtkRenderer,
    vtkRenderWindow,
    vtkWindowToImageFilter,
)

#: vertices (V, 3) float32 in LPS mm and faces (F, 3) int32 of all surfaces one after the other, the faces counting within
#: their own; counts (S, 2) of vertices and faces, colors (S, 3) uint8 and opacity (S,) of each; background (3,) uint8.
#: Of every view: sizes (K, 2), width and height in pixels; toward (K, 3), the unit vector from the scene to who looks at it;
#: up (K, 3), what is up in the picture; middles (K, 3), the LPS mm in its middle; mm_per_pixel (K,).
Parts = Mapping[str, NDArray[Any]]

#: Opacity that glass gains where it is seen edge-on.
_RIM = 0.85
#: Drawn so much larger and averaged down: smooth edges, with transparency too.
_OVERSAMPLING = 2


class _Glass(NamedTuple):
    """A surface that lets what is behind it be seen, otherwise from every side."""

    data: Any
    normals: NDArray[np.float32]
    color: NDArray[np.uint8]
    opacity: float

    def look_from(self, toward: NDArray[np.float64]) -> None:
        """Make it clear where one looks straight at it and close it towards its rim, as in anatomical drawings.

        Of equal opacity everywhere, ten organs in front of each other make one brown cloud.
        """
        facing = (self.normals @ toward.astype(np.float32)).clip(0, 1)
        rgba = np.empty((len(facing), 4), np.uint8)
        rgba[:, :3] = self.color
        rgba[:, 3] = np.round(255 * (self.opacity + (1 - self.opacity) * _RIM * (1 - facing) ** 1.6))
        self.data.GetPointData().SetScalars(numpy_to_vtk(rgba, deep=True))


def draw(parts: Parts) -> list[NDArray[np.uint8]]:
    """Draw surfaces in parallel projection, so that a millimetre is equally long everywhere.

    Parameters
    ----------
    parts : mapping
        See `Parts`.

    Returns
    -------
    list of ndarray, shape (height, width, 3)
        RGB of each view, the first row on top.
    """
    renderer = vtkRenderer()
    renderer.SetBackground(*(parts["background"] / 255))
    glass = _add_surfaces(renderer, parts)
    lights = vtkLightKit()  # they move with the camera
    lights.SetKeyLightIntensity(0.9)
    lights.SetKeyToFillRatio(2.6)
    lights.AddLightsToRenderer(renderer)
    if glass:
        renderer.SetUseDepthPeeling(True)
        renderer.SetMaximumNumberOfPeels(8)
        renderer.SetOcclusionRatio(0.02)
    window = vtkRenderWindow()
    window.SetOffScreenRendering(True)
    window.SetAlphaBitPlanes(True)
    window.SetMultiSamples(0)
    window.AddRenderer(renderer)
    camera = renderer.GetActiveCamera()
    camera.ParallelProjectionOn()
    # Outside the scene: what is behind the camera is not drawn, in parallel projection either.
    away = float(np.linalg.norm(np.ptp(parts["vertices"], axis=0))) + 1
    pictures = []
    names = ("sizes", "toward", "up", "middles", "mm_per_pixel")
    for (width, height), toward, up, middle, scale in zip(*(parts[name] for name in names), strict=True):
        for surface in glass:
            surface.look_from(toward)
        camera.SetFocalPoint(*middle)
        camera.SetPosition(*(middle + away * toward))
        camera.SetViewUp(*up)
        camera.SetParallelScale(scale * height / 2)
        renderer.ResetCameraClippingRange()
        window.SetSize(int(width) * _OVERSAMPLING, int(height) * _OVERSAMPLING)
        window.Render()
        pictures.append(_grab(window, int(width), int(height)))
    return pictures


def _grab(window: Any, width: int, height: int) -> NDArray[np.uint8]:
    grab = vtkWindowToImageFilter()
    grab.SetInput(window)
    grab.ReadFrontBufferOff()
    grab.Update()
    image = grab.GetOutput()
    columns, rows, _ = image.GetDimensions()
    pixels = vtk_to_numpy(image.GetPointData().GetScalars()).reshape(rows, columns, -1)[::-1, :, :3]
    blocks = pixels[: height * _OVERSAMPLING, : width * _OVERSAMPLING].reshape(height, _OVERSAMPLING, width, _OVERSAMPLING, 3)
    return np.asarray(blocks.mean(axis=(1, 3)).round(), np.uint8)


def _add_surfaces(renderer: Any, parts: Parts) -> list[_Glass]:
    """Add every surface, and return those that change with the view."""
    glass = []
    ends = np.cumsum(parts["counts"], axis=0)
    for (v, f), (v_end, f_end), color, opacity in zip(parts["counts"], ends, parts["colors"], parts["opacity"], strict=True):
        data = _with_normals(parts["vertices"][v_end - v : v_end], parts["faces"][f_end - f : f_end])
        mapper, actor = vtkPolyDataMapper(), vtkActor()
        mapper.SetInputData(data)
        actor.SetMapper(mapper)
        look = actor.GetProperty()
        look.SetColor(*(color / 255))
        look.SetSpecular(0.22)
        look.SetSpecularPower(24)
        if opacity < 1:
            mapper.SetScalarModeToUsePointData()
            actor.ForceTranslucentOn()
            look.BackfaceCullingOn()  # its far side would only be seen through itself
            glass.append(_Glass(data, vtk_to_numpy(data.GetPointData().GetNormals()), color, float(opacity)))
        renderer.AddActor(actor)
    return glass


def _with_normals(points: NDArray[np.float32], faces: NDArray[np.int32]) -> Any:
    places, cells, data = vtkPoints(), vtkCellArray(), vtkPolyData()
    places.SetData(numpy_to_vtk(np.ascontiguousarray(points), deep=True))
    cells.SetData(3, numpy_to_vtkIdTypeArray(faces.astype(np.int64).ravel(), deep=True))
    data.SetPoints(places)
    data.SetPolys(cells)
    normals = vtkPolyDataNormals()
    normals.SetInputData(data)
    normals.SplittingOff()
    normals.ConsistencyOff()
    normals.Update()
    return normals.GetOutput()


def main() -> None:
    """Read parts from stdin (npz), write the pictures to stdout (npz: arr_0, arr_1, …)."""
    if sys.platform != "win32":
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # where OpenGL is broken, dying is the answer: leave no core file
    with io.BytesIO(sys.stdin.buffer.read()) as received, np.load(received) as parts:
        pictures = draw(dict(parts))
    with io.BytesIO() as sent:
        np.savez(sent, *pictures)
        sys.stdout.buffer.write(sent.getvalue())


if __name__ == "__main__":
    main()
