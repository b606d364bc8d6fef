"""Draws surfaces off screen: a script, run as a process of its own by `preview.render_scene`.

Where OpenGL is missing or broken VTK does not raise, it ends the process (9.7 without Mesa's drivers: signal 11). A child may
die, and its memory goes with it. It imports nothing of ours, and so starts as quickly as VTK itself. `Parts` come in on stdin,
the picture goes out on stdout.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator, Mapping
from typing import Any

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
#: their own; counts (S, 2) of vertices and faces, colors (S, 3) uint8 and opacity (S,) of each; size (width, height) in pixels,
#: background (3,) uint8.
Parts = Mapping[str, NDArray[Any]]

#: Where the camera stands as seen from the middle: in front, a little to the patient's left and above.
_FROM = np.array((0.34, -1.0, 0.16))
_VIEW_ANGLE, _MARGIN = 22.0, 1.02
#: Opacity that glass gains where it is seen edge-on.
_RIM = 0.85
#: Drawn so much larger and averaged down: smooth edges, with transparency too.
_OVERSAMPLING = 2


def draw(parts: Parts) -> NDArray[np.uint8]:
    """Draw surfaces from the front.

    Parameters
    ----------
    parts : mapping
        See `Parts`.

    Returns
    -------
    ndarray, shape (height, width, 3)
        RGB, the first row on top.
    """
    width, height = map(int, parts["size"])
    middle, eye = _camera(parts["vertices"], width / height)
    renderer = vtkRenderer()
    renderer.SetBackground(*(parts["background"] / 255))
    for points, faces, color, opacity in _surfaces(parts):
        renderer.AddActor(_actor(points, faces, color, opacity, eye))
    lights = vtkLightKit()
    lights.SetKeyLightIntensity(0.9)
    lights.SetKeyToFillRatio(2.6)
    lights.AddLightsToRenderer(renderer)
    camera = renderer.GetActiveCamera()
    camera.SetViewAngle(_VIEW_ANGLE)
    camera.SetFocalPoint(*middle)
    camera.SetPosition(*eye)
    camera.SetViewUp(0, 0, 1)
    renderer.ResetCameraClippingRange()
    if (parts["opacity"] < 1).any():
        renderer.SetUseDepthPeeling(True)
        renderer.SetMaximumNumberOfPeels(8)
        renderer.SetOcclusionRatio(0.02)
    window = vtkRenderWindow()
    window.SetOffScreenRendering(True)
    window.SetAlphaBitPlanes(True)
    window.SetMultiSamples(0)
    window.SetSize(width * _OVERSAMPLING, height * _OVERSAMPLING)
    window.AddRenderer(renderer)
    window.Render()
    grab = vtkWindowToImageFilter()
    grab.SetInput(window)
    grab.ReadFrontBufferOff()
    grab.Update()
    image = grab.GetOutput()
    columns, rows, _ = image.GetDimensions()
    pixels = vtk_to_numpy(image.GetPointData().GetScalars()).reshape(rows, columns, -1)[::-1, :, :3]
    blocks = pixels[: height * _OVERSAMPLING, : width * _OVERSAMPLING].reshape(height, _OVERSAMPLING, width, _OVERSAMPLING, 3)
    return np.asarray(blocks.mean(axis=(1, 3)).round(), np.uint8)


def _surfaces(parts: Parts) -> Iterator[tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.uint8], float]]:
    ends = np.cumsum(parts["counts"], axis=0)
    for (v, f), (v_end, f_end), color, opacity in zip(parts["counts"], ends, parts["colors"], parts["opacity"], strict=True):
        points, faces = parts["vertices"][v_end - v : v_end], parts["faces"][f_end - f : f_end]
        yield points, faces.astype(np.int64), color, float(opacity)


def _camera(vertices: NDArray[np.float32], aspect: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return focal point and position from which all vertices just fill the picture (width / height = `aspect`)."""
    back = _FROM / np.linalg.norm(_FROM)
    right = np.cross((0, 0, 1), back)
    right /= np.linalg.norm(right)
    frame = np.stack([right, np.cross(back, right), back], axis=1)
    seen = vertices.astype(np.float64) @ frame
    middle = (seen.min(axis=0) + seen.max(axis=0)) / 2
    half = np.abs(seen[:, :2] - middle[:2]) / (np.tan(np.radians(_VIEW_ANGLE / 2)) * np.array([aspect, 1.0]))
    distance = _MARGIN * float((half.max(axis=1) + seen[:, 2] - middle[2]).max())
    return frame @ middle, frame @ (middle + np.array((0, 0, distance)))


def _actor(
    points: NDArray[np.float32], faces: NDArray[np.int64], color: NDArray[np.uint8], opacity: float, eye: NDArray[np.float64]
) -> Any:
    places, cells, data = vtkPoints(), vtkCellArray(), vtkPolyData()
    places.SetData(numpy_to_vtk(np.ascontiguousarray(points), deep=True))
    cells.SetData(3, numpy_to_vtkIdTypeArray(faces.ravel(), deep=True))
    data.SetPoints(places)
    data.SetPolys(cells)
    normals = vtkPolyDataNormals()
    normals.SetInputData(data)
    normals.SplittingOff()
    normals.ConsistencyOff()
    normals.Update()
    data = normals.GetOutput()
    mapper, actor = vtkPolyDataMapper(), vtkActor()
    mapper.SetInputData(data)
    actor.SetMapper(mapper)
    look = actor.GetProperty()
    look.SetColor(*(color / 255))
    look.SetSpecular(0.22)
    look.SetSpecularPower(24)
    if opacity < 1:
        # Glass is clear where one looks straight at it and closes towards its rim, as in anatomical drawings; of equal opacity
        # everywhere, ten organs in front of each other make one brown cloud.
        toward = eye - points
        toward /= np.linalg.norm(toward, axis=1, keepdims=True)
        facing = np.einsum("ij,ij->i", toward, vtk_to_numpy(data.GetPointData().GetNormals())).clip(0, 1)
        rgba = np.empty((len(points), 4), np.uint8)
        rgba[:, :3] = color
        rgba[:, 3] = np.round(255 * (opacity + (1 - opacity) * _RIM * (1 - facing) ** 1.6))
        data.GetPointData().SetScalars(numpy_to_vtk(rgba, deep=True))
        mapper.SetScalarModeToUsePointData()
        actor.ForceTranslucentOn()
        look.BackfaceCullingOn()  # its far side would only be seen through itself
    return actor


def main() -> None:
    """Read parts from stdin (npz), write the picture to stdout (npy)."""
    if sys.platform != "win32":
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # where OpenGL is broken, dying is the answer: leave no core file
    with io.BytesIO(sys.stdin.buffer.read()) as received, np.load(received) as parts:
        picture = draw(dict(parts))
    with io.BytesIO() as sent:
        np.save(sent, picture)
        sys.stdout.buffer.write(sent.getvalue())


if __name__ == "__main__":
    main()
