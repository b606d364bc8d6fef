"""The ways from a mask to surfaces that are compared: ours and the peers', each with the libraries' own best settings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Mesh = tuple[NDArray[np.float32], NDArray[np.int32]]
#: From a mask (z, y, x) with a spacing (z, y, x) in mm, and the triangles wanted in all (0: all there are), to a mesh a label,
#: (x, y, z) mm.
Way = Callable[[NDArray[np.uint8], Sequence[float], int], dict[int, Mesh]]
#: Windowed sinc as 3D Slicer's closed surfaces have it at its default smoothing factor of 0.5.
_PASS_BAND, _ITERATIONS = 0.01, 40


def ours(mask: NDArray[np.uint8], spacing_mm: Sequence[float], triangles: int, joint: bool = False) -> dict[int, Mesh]:
    """scangraph, with all its measures."""
    from deployments.smoothing.surfaces import Options, label_map_to_scene
    from scangraph.contracts import LabelMap

    labels = tuple(range(1, int(mask.max()) + 1))
    label_map = LabelMap(mask, tuple(spacing_mm), labels=labels)  # type: ignore[arg-type]
    options = Options(triangles=triangles, joint=joint) if triangles else Options(error_mm=0.0, joint=joint)
    scene, _ = label_map_to_scene(label_map, options)
    return {s.label: (s.vertices_mm, s.faces) for s in scene.surfaces}


def ours_joint(mask: NDArray[np.uint8], spacing_mm: Sequence[float], triangles: int) -> dict[int, Mesh]:
    """scangraph, touching structures sharing their boundary."""
    return ours(mask, spacing_mm, triangles, joint=True)


def slicer(mask: NDArray[np.uint8], spacing_mm: Sequence[float], triangles: int) -> dict[int, Mesh]:
    """3D Slicer's recipe: flying edges on each label's box, decimation, windowed sinc."""
    from scipy import ndimage
    from vtkmodules.util.numpy_support import numpy_to_vtk, vtk_to_numpy
    from vtkmodules.vtkCommonDataModel import vtkImageData
    from vtkmodules.vtkFiltersCore import vtkDecimatePro
    from vtkmodules.vtkFiltersGeneral import vtkDiscreteFlyingEdges3D

    raw = {}
    for label, box in enumerate(ndimage.find_objects(mask), 1):
        if box is None:
            continue
        crop = np.pad((mask[box] == label).astype(np.uint8), 1)
        image = vtkImageData()
        image.SetDimensions(crop.shape[::-1])
        image.SetSpacing(tuple(spacing_mm)[::-1])
        image.SetOrigin([(b.start - 1) * s for b, s in zip(box[::-1], tuple(spacing_mm)[::-1], strict=True)])
        image.GetPointData().SetScalars(numpy_to_vtk(crop.ravel()))
        edges = vtkDiscreteFlyingEdges3D()
        edges.SetInputData(image)
        edges.SetValue(0, 1)
        edges.ComputeNormalsOff()
        edges.Update()
        raw[label] = edges.GetOutput()
    part = _part(triangles, sum(mesh.GetNumberOfPolys() for mesh in raw.values()))
    made = {}
    for label, mesh in raw.items():
        kept = mesh
        if part < 1:
            fewer = vtkDecimatePro()
            fewer.SetInputData(mesh)
            fewer.SetFeatureAngle(60)
            fewer.SplittingOff()
            fewer.PreserveTopologyOn()
            fewer.SetMaximumError(1)
            fewer.SetTargetReduction(1 - part)
            fewer.Update()
            kept = fewer.GetOutput()
        smooth = _sinc(kept)
        faces = vtk_to_numpy(smooth.GetPolys().GetConnectivityArray()).reshape(-1, 3)
        made[label] = (np.asarray(vtk_to_numpy(smooth.GetPoints().GetData()), np.float32), faces.astype(np.int32))
    return made


def zmesh_fast_simplification(mask: NDArray[np.uint8], spacing_mm: Sequence[float], triangles: int) -> dict[int, Mesh]:
    """Zmesh of all labels at once, windowed sinc, fast-simplification."""
    import fast_simplification

    def fewer(vertices: NDArray[np.float32], faces: NDArray[np.int32], part: float) -> Mesh:
        points, kept = fast_simplification.simplify(vertices, faces, target_reduction=1 - part)
        return points, kept

    return dict(_zmesh(mask, spacing_mm, triangles, fewer))


def zmesh_meshoptimizer(mask: NDArray[np.uint8], spacing_mm: Sequence[float], triangles: int) -> dict[int, Mesh]:
    """Zmesh of all labels at once, windowed sinc, meshoptimizer."""
    import meshoptimizer

    def fewer(vertices: NDArray[np.float32], faces: NDArray[np.int32], part: float) -> Mesh:
        out = np.empty(faces.size, np.uint32)
        indices = np.ascontiguousarray(faces, np.uint32).ravel()
        count = meshoptimizer.simplify(out, indices, vertices, target_index_count=int(faces.size * part), target_error=1.0)
        return _used(vertices, out[:count].reshape(-1, 3).astype(np.int32))

    return dict(_zmesh(mask, spacing_mm, triangles, fewer))


WAYS: dict[str, Way] = {
    "ours": ours,
    "ours, joint": ours_joint,
    "Slicer's recipe": slicer,
    "zmesh + sinc + fast-simplification": zmesh_fast_simplification,
    "zmesh + sinc + meshoptimizer": zmesh_meshoptimizer,
}


def _zmesh(
    mask: NDArray[np.uint8], spacing_mm: Sequence[float], triangles: int, fewer: Callable[[Any, Any, float], Mesh]
) -> Iterator[tuple[int, Mesh]]:
    import zmesh
    from vtkmodules.util.numpy_support import vtk_to_numpy

    mesher = zmesh.Mesher(tuple(spacing_mm))
    mesher.mesh(mask, close=True)
    raw = {label: mesher.get(label, normals=False, reduction_factor=0) for label in sorted(mesher.ids())}
    part = _part(triangles, sum(len(mesh.faces) for mesh in raw.values()))
    for label, mesh in raw.items():
        # zmesh counts along the array's axes from a padded corner; (z, y, x) to (x, y, z) mirrors, so faces are turned.
        vertices = (np.asarray(mesh.vertices, np.float32) - np.asarray(spacing_mm, np.float32))[:, ::-1]
        faces = np.asarray(mesh.faces, np.int64)[:, ::-1]
        smooth = _sinc(_poly_data(vertices, faces))
        points, whole = np.asarray(vtk_to_numpy(smooth.GetPoints().GetData()), np.float32), faces.astype(np.int32)
        yield int(label), fewer(points, whole, part) if part < 1 else (points, whole)


def _part(wanted: int, present: int) -> float:
    return min(1.0, wanted / present) if wanted else 1.0


def _poly_data(vertices: NDArray[np.float32], faces: NDArray[np.int64]) -> Any:
    from vtkmodules.util.numpy_support import numpy_to_vtk, numpy_to_vtkIdTypeArray
    from vtkmodules.vtkCommonCore import vtkPoints
    from vtkmodules.vtkCommonDataModel import vtkCellArray, vtkPolyData

    points = vtkPoints()
    points.SetData(numpy_to_vtk(np.ascontiguousarray(vertices), deep=True))
    cells = vtkCellArray()
    cells.SetData(3, numpy_to_vtkIdTypeArray(np.ascontiguousarray(faces).ravel(), deep=True))
    data = vtkPolyData()
    data.SetPoints(points)
    data.SetPolys(cells)
    return data


def _sinc(data: Any) -> Any:
    from vtkmodules.vtkFiltersCore import vtkWindowedSincPolyDataFilter

    sinc = vtkWindowedSincPolyDataFilter()
    sinc.SetInputData(data)
    sinc.SetNumberOfIterations(_ITERATIONS)
    sinc.SetPassBand(_PASS_BAND)
    sinc.NormalizeCoordinatesOn()
    sinc.NonManifoldSmoothingOn()
    sinc.BoundarySmoothingOff()
    sinc.FeatureEdgeSmoothingOff()
    sinc.Update()
    return sinc.GetOutput()


def _used(vertices: NDArray[np.float32], faces: NDArray[np.int32]) -> Mesh:
    used = np.zeros(len(vertices), np.bool_)
    used[faces] = True
    return vertices[used], (np.cumsum(used) - 1).astype(np.int32)[faces]
