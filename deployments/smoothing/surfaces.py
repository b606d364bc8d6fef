"""From a label map to smoothed, closed surfaces in millimetres.

The recipe, measured against its alternatives on analytic shapes: marching cubes of all labels in one pass (zmesh), windowed-
sinc smoothing (Taubin, Zhang & Golub 1996, as in VTK), then *local compensation*: what smoothing took along the normal is
averaged over the neighbourhood and given back, so that thin vessels keep their volume without the voxels' staircase. What
marching cubes itself took (it cuts every convex edge of a voxel) comes back by moving the whole surface outward until it
encloses the voxels' volume: some 0.02 mm on a tube of 5 mm radius, 0.05 mm at 1.2 mm.
Everything happens in index × spacing millimetres; direction and origin are applied last, so that an oblique grid costs nothing.

Every surface comes out as a closed 2-manifold, where voxels touch by an edge or a corner, too; it is counted for each. What is
left: touching structures are smoothed one by one and part by a tenth of a millimetre; pieces of a voxel or two stay the
octahedra that they are; nobody looks whether a surface crosses itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import scipy.sparse
import scipy.sparse.csgraph
import zmesh
from numpy.typing import NDArray
from vtkmodules.util.numpy_support import numpy_to_vtk, numpy_to_vtkIdTypeArray, vtk_to_numpy
from vtkmodules.vtkCommonCore import vtkPoints
from vtkmodules.vtkCommonDataModel import vtkCellArray, vtkPolyData
from vtkmodules.vtkFiltersCore import vtkWindowedSincPolyDataFilter

from scangraph.contracts import Frame, LabelMap, Scene, Surface, label_table

#: Windowed-sinc passes and pass band at full strength.
_ITERATIONS, _PASS_BAND = 30, 0.01
#: Averagings of the loss before it is given back: wide enough to leave the staircase out, local enough to know the radius.
_AVERAGINGS = 30
#: Pieces with fewer vertices are not smoothed.
_LEAST_VERTICES = 40
#: Farthest that a surface is moved for its volume's sake, in parts of the finest spacing: noise of single voxels, whose
#: octahedra have a sixth of their volume, must not blow up what lies between.
_FARTHEST_OFFSET = 0.25
#: Difference of surface and voxel volume (parts of one) from which a structure carries a warning.
_VOLUME_TOLERANCE = 0.05
#: The frame is not among them: a scene says it itself, and can be turned.
_NOTES = ("Research use only. Not a medical device.", "Coordinates are in millimetres.")

OnProgress = Callable[[int, int, str], None]
Vertices = NDArray[np.float64]
Faces = NDArray[np.int64]


def label_map_to_scene(
    mask: LabelMap,
    *,
    structures: Sequence[int] | None = None,
    smoothing: float = 1.0,
    frame: Frame = "LPS",
    on_progress: OnProgress | None = None,
) -> tuple[Scene, list[str]]:
    """Make a surface of every structure.

    Parameters
    ----------
    mask : LabelMap
        Any orientation and spacing.
    structures : sequence of int, optional
        Label numbers to take; by default all that occur.
    smoothing : float
        From 0 (marching cubes as it is) to 1.
    frame : "LPS" or "RAS"
        World frame of the vertices.
    on_progress : callable, optional
        Called as `on_progress(done, total, name)`; may raise to stop.

    Returns
    -------
    (Scene, list of str)
        Closed, outward-oriented surfaces in the order of their labels, no piece left out; and warnings: structures that do not
        occur, are cut by the scan's edge, are not watertight, or enclose another volume than their voxels.

    Raises
    ------
    ValueError
        If `smoothing` is not within 0 and 1.
    """
    if not 0 <= smoothing <= 1:
        raise ValueError(f"smoothing must be within 0 and 1, got {smoothing}")
    counts = mask.counts()
    wanted = list(counts) if structures is None else sorted(set(structures))
    warnings = [
        f"{mask.label(number).name} was asked for but does not occur in the mask." for number in wanted if number not in counts
    ]
    wanted = [number for number in wanted if number in counts]
    if not wanted:
        return Scene((), frame, _NOTES), warnings or ["The mask is empty, and so is the scene."]

    cropped, offset = _crop(mask.array, None if len(wanted) == len(counts) else wanted)
    at_edge = _labels_at_edge(mask.array)
    if cut := [mask.label(number).name for number in wanted if number in at_edge]:
        warnings.append(f"Cut by the edge of the scan, and closed flat there: {', '.join(cut)}.")
    mesher = zmesh.Mesher(mask.spacing_mm)
    mesher.mesh(cropped, close=True)
    surfaces = []
    for done, number in enumerate(wanted):
        name = mask.label(number).name
        if on_progress:
            on_progress(done, len(wanted), name)
        mesh = mesher.get(number, normals=False, reduction_factor=0)
        mesher.erase(number)
        # Closed meshes are made on a grid padded by one voxel, and count from its first voxel's centre.
        vertices = np.asarray(mesh.vertices, np.float64) + (offset - 1) * np.asarray(mask.spacing_mm)
        faces = np.asarray(mesh.faces, np.int64)
        voxel_mm3 = counts[number] * mask.voxel_volume_mm3
        if smoothing > 0:
            vertices = smooth_surface(vertices, faces, smoothing)
            vertices = restore_volume(vertices, faces, voxel_mm3, _FARTHEST_OFFSET * min(mask.spacing_mm))
        surface = _in_world(mask, number, vertices, faces)
        warnings += _look_at(surface, voxel_mm3 / 1000)
        surfaces.append(surface)
    if on_progress:
        on_progress(len(wanted), len(wanted), "")
    codes = tuple(
        f"{s.name}: label {s.label}, SNOMED CT {label_table()[s.label].snomed_code}"
        for s in surfaces
        if s.label in label_table()
    )
    return Scene(tuple(surfaces), "LPS", (*_NOTES, *codes)).in_frame(frame), warnings


def smooth_surface(vertices: Vertices, faces: Faces, strength: float = 1.0) -> Vertices:
    """Smooth a closed surface and give back, locally, the volume that smoothing took.

    Parameters
    ----------
    vertices : ndarray, shape (V, 3)
        Millimetres, any frame.
    faces : ndarray, shape (F, 3)
        Triangles, consistently oriented.
    strength : float
        Above 0 up to 1; moves the filter's pass band from everything to 1 %.

    Returns
    -------
    ndarray, shape (V, 3)
        New positions; the faces stay.
    """
    smoothed = _windowed_sinc(vertices, faces, _PASS_BAND**strength)
    adjacency = _adjacency(len(vertices), faces)
    # A piece of a voxel or two would shrink to a point, or turn inside out: it stays as it is.
    piece = scipy.sparse.csgraph.connected_components(adjacency, directed=False)[1]
    tiny = np.bincount(piece)[piece] < _LEAST_VERTICES
    smoothed[tiny] = vertices[tiny]
    averaging = scipy.sparse.diags(1 / np.asarray(adjacency.sum(axis=1)).ravel()) @ adjacency
    normals = vertex_normals(smoothed, faces)
    loss = np.einsum("ij,ij->i", vertices - smoothed, normals)
    for _ in range(_AVERAGINGS):
        loss = averaging @ loss
    return np.asarray(smoothed + loss[:, None] * normals)


def restore_volume(vertices: Vertices, faces: Faces, volume_mm3: float, farthest_mm: float) -> Vertices:
    """Move a closed surface along its normals until it encloses a volume.

    Parameters
    ----------
    vertices : ndarray, shape (V, 3)
        Millimetres.
    faces : ndarray, shape (F, 3)
        Triangles, counter-clockwise seen from outside.
    volume_mm3 : float
        What it should enclose.
    farthest_mm : float
        Not farther than this, in all.

    Returns
    -------
    ndarray, shape (V, 3)
        New positions.
    """
    normals, moved = vertex_normals(vertices, faces), 0.0
    for _ in range(2):  # Newton: a volume grows by its area; the second step makes up for the curvature
        areas = _doubled_areas(vertices + moved * normals, faces)
        # Corner and area vector of a triangle span six times its share of the volume, about a centre that keeps digits.
        corners = (vertices + moved * normals - vertices.mean(axis=0))[faces[:, 0]]
        missing = volume_mm3 - float(np.einsum("ij,ij->", corners, areas)) / 6
        area = float(np.linalg.norm(areas, axis=1).sum()) / 2
        moved = float(np.clip(moved + missing / area, -farthest_mm, farthest_mm)) if area > 0 else moved
    return np.asarray(vertices + moved * normals)


def vertex_normals(vertices: Vertices, faces: Faces) -> Vertices:
    """Area-weighted unit normals of the vertices, shape (V, 3); zero where a vertex has no area."""
    areas, normals = _doubled_areas(vertices, faces), np.empty_like(vertices)
    for axis in range(3):
        normals[:, axis] = np.bincount(faces.ravel(), np.repeat(areas[:, axis], 3), len(vertices))
    lengths = np.linalg.norm(normals, axis=1, keepdims=True)
    return np.asarray(normals / np.where(lengths > 0, lengths, 1))


def open_edges(faces: NDArray[Any]) -> int:
    """Count the edges that do not join exactly two triangles in opposite directions; 0 for a watertight, oriented surface."""
    if not len(faces):
        return 0
    directed = np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]]).astype(np.int64)
    size = int(faces.max()) + 1
    forward, backward = (np.sort(directed[:, i] * size + directed[:, 1 - i]) for i in (0, 1))
    doubled = int(np.count_nonzero(forward[1:] == forward[:-1]))
    return doubled + int(np.count_nonzero(~np.isin(forward, backward, assume_unique=doubled == 0)))


def _windowed_sinc(vertices: Vertices, faces: Faces, pass_band: float) -> Vertices:
    points = vtkPoints()
    points.SetData(numpy_to_vtk(np.ascontiguousarray(vertices), deep=True))
    cells = vtkCellArray()
    cells.SetData(3, numpy_to_vtkIdTypeArray(np.ascontiguousarray(faces, np.int64).ravel(), deep=True))
    data = vtkPolyData()
    data.SetPoints(points)
    data.SetPolys(cells)
    sinc = vtkWindowedSincPolyDataFilter()
    sinc.SetInputData(data)
    sinc.SetNumberOfIterations(_ITERATIONS)
    sinc.SetPassBand(pass_band)
    sinc.NormalizeCoordinatesOn()
    sinc.NonManifoldSmoothingOn()
    sinc.BoundarySmoothingOff()
    sinc.FeatureEdgeSmoothingOff()
    sinc.Update()
    return np.asarray(vtk_to_numpy(sinc.GetOutput().GetPoints().GetData()), np.float64).copy()


def _doubled_areas(vertices: Vertices, faces: Faces) -> Vertices:
    """Vectors along the triangles' normals, twice as long as their areas, shape (F, 3)."""
    a, b, c = (vertices[faces[:, k]] for k in range(3))
    return np.asarray(np.cross(b - a, c - a))


def _adjacency(count: int, faces: Faces) -> Any:
    """Sparse matrix with a 1 for every vertex and each of its neighbours, itself included."""
    start, end = faces.ravel(), np.roll(faces, -1, axis=1).ravel()
    every = np.arange(count)
    rows, columns = np.concatenate([start, end, every]), np.concatenate([end, start, every])
    adjacency = scipy.sparse.csr_matrix((np.ones(rows.size), (rows, columns)), shape=(count, count))
    adjacency.data[:] = 1.0  # an edge has two triangles and would count twice
    return adjacency


def _crop(array: NDArray[Any], wanted: Sequence[int] | None) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Cut the box of the wanted labels (None: of all) out, others set to 0; return it with its first index."""
    chosen = array if wanted is None else np.where(np.isin(array, wanted), array, 0)
    box = []
    for axis in range(3):
        occupied = np.flatnonzero(chosen.any(axis=tuple(a for a in range(3) if a != axis)))
        box.append(slice(int(occupied[0]), int(occupied[-1]) + 1))
    return np.ascontiguousarray(chosen[tuple(box)]), np.array([b.start for b in box])


def _in_world(mask: LabelMap, number: int, vertices_zyx: Vertices, faces: Faces) -> Surface:
    """Apply direction and origin, and turn the faces outward where that mirrors them."""
    world = vertices_zyx @ np.asarray(mask.direction).T[::-1] + np.asarray(mask.origin_mm)
    # Reversing the axes mirrors once; a left-handed direction mirrors again.
    if np.linalg.det(np.asarray(mask.direction)) > 0:
        faces = faces[:, ::-1]
    label = mask.label(number)
    return Surface(label.name, number, label.color, world.astype(np.float32), faces.astype(np.int32))


def _look_at(surface: Surface, voxel_ml: float) -> list[str]:
    found = []
    if broken := open_edges(surface.faces):
        found.append(f"{surface.name} is not a watertight manifold: {broken} edges where pieces touch.")
    difference = surface.volume_ml / voxel_ml - 1
    if abs(difference) > _VOLUME_TOLERANCE:
        found.append(
            f"{surface.name}: the surface has {surface.volume_ml:.2f} mL, the mask {voxel_ml:.2f} mL ({difference:+.0%})."
        )
    return found


def _labels_at_edge(array: NDArray[Any]) -> set[int]:
    planes = [np.unique(array.take(index, axis=axis)) for axis in range(3) for index in (0, -1)]
    return set(np.concatenate(planes).tolist()) - {0}
