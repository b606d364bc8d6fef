"""What a surface is, in numbers: closed or not, its pieces and handles, and how far it lies from the voxels it was made of."""

from __future__ import annotations

from collections.abc import Sequence

import numba
import numpy as np
from numpy.typing import NDArray

#: Points of a surface at which its distance is measured, at most.
_SAMPLES = 10_000


def open_edges(faces: NDArray[np.integer]) -> int:
    """Count the edges that do not join exactly two triangles in opposite directions; 0 for a watertight, oriented surface."""
    if not len(faces):
        return 0
    directed = np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]]).astype(np.int64)
    size = int(faces.max()) + 1
    forward, backward = (np.sort(directed[:, i] * size + directed[:, 1 - i]) for i in (0, 1))
    doubled = int(np.count_nonzero(forward[1:] == forward[:-1]))
    return doubled + int(np.count_nonzero(~np.isin(forward, backward, assume_unique=doubled == 0)))


def triangle_areas(vertices: NDArray[np.floating], faces: NDArray[np.integer]) -> NDArray[np.float64]:
    """Return the triangles' areas in the square of the vertices' unit, shape (F,)."""
    a, b, c = (vertices[faces[:, k]].astype(np.float64) for k in range(3))
    return np.asarray(np.linalg.norm(np.cross(b - a, c - a), axis=1) / 2)


def genus(vertices: int, triangles: int, pieces: int) -> int:
    """Count the handles of closed surfaces: by Euler's formula V - E + F = 2 (pieces - genus), where 2 E = 3 F."""
    return pieces - (vertices - triangles // 2) // 2


def distances_to_boundary(
    places_index: NDArray[np.float64], array: NDArray[np.unsignedinteger], number: int, spacing_mm: Sequence[float]
) -> NDArray[np.float64]:
    """Measure how far points lie from the boundary of a structure's voxels.

    Parameters
    ----------
    places_index : ndarray, shape (N, 3)
        Points (x, y, z) in voxel indices.
    array : ndarray of unsigned integers, shape (z, y, x)
        The mask.
    number : int
        Of the structure.
    spacing_mm : (z, y, x)
        Of the mask.

    Returns
    -------
    ndarray, shape (N,)
        Millimetres to the nearest voxel face between the structure and anything else, to 4 voxels; infinite beyond.
    """
    spacing = np.asarray(spacing_mm, np.float64)[::-1].copy()
    return np.asarray(_to_boundary(np.ascontiguousarray(places_index, np.float64), array, array.dtype.type(number), spacing))


def sample(vertices: NDArray[np.floating], faces: NDArray[np.integer]) -> NDArray[np.float64]:
    """Return up to 10,000 points spread over a surface: corners and centres of its triangles, shape (N, 3)."""
    step = max(1, 2 * len(faces) // _SAMPLES)
    chosen = vertices.astype(np.float64)[faces[::step]]
    return np.concatenate([chosen.mean(axis=1), chosen[:, 0]]) if len(chosen) else np.zeros((0, 3))


@numba.njit(cache=True, nogil=True)
def _to_boundary(points, array, number, spacing):
    out = np.empty(points.shape[0])
    nz, ny, nx = array.shape
    finest = spacing.min()
    for p in range(points.shape[0]):
        px, py, pz = points[p]
        cx, cy, cz = int(np.floor(px + 0.5)), int(np.floor(py + 0.5)), int(np.floor(pz + 0.5))
        best = np.inf
        for reach in (1, 2, 4):
            for z in range(cz - reach, cz + reach + 1):
                for y in range(cy - reach, cy + reach + 1):
                    for x in range(cx - reach, cx + reach + 1):
                        if not (0 <= z < nz and 0 <= y < ny and 0 <= x < nx) or array[z, y, x] != number:
                            continue
                        # Distance from the voxel's box along each axis, and to its faces' planes.
                        dx, dy, dz = max(abs(px - x) - 0.5, 0.0), max(abs(py - y) - 0.5, 0.0), max(abs(pz - z) - 0.5, 0.0)
                        dx, dy, dz = dx * spacing[0], dy * spacing[1], dz * spacing[2]
                        for axis in range(3):
                            for side in (-1, 1):
                                ox = x + side if axis == 0 else x
                                oy = y + side if axis == 1 else y
                                oz = z + side if axis == 2 else z
                                if 0 <= oz < nz and 0 <= oy < ny and 0 <= ox < nx and array[oz, oy, ox] == number:
                                    continue
                                if axis == 0:
                                    d = ((px - x - 0.5 * side) * spacing[0]) ** 2 + dy * dy + dz * dz
                                elif axis == 1:
                                    d = ((py - y - 0.5 * side) * spacing[1]) ** 2 + dx * dx + dz * dz
                                else:
                                    d = ((pz - z - 0.5 * side) * spacing[2]) ** 2 + dx * dx + dy * dy
                                best = min(best, d)
            # Faces outside this box are at least so far away.
            if best <= (reach * finest) ** 2:
                break
        out[p] = np.sqrt(best)
    return out


def crossings(vertices: NDArray[np.floating], faces: NDArray[np.integer]) -> int:
    """Count the pairs of triangles that cut through each other; those that share a corner are not looked at.

    Parameters
    ----------
    vertices : ndarray, shape (V, 3)
        Millimetres.
    faces : ndarray, shape (F, 3)

    Returns
    -------
    int
        Edge-against-triangle tests (Möller & Trumbore, 1997) of all pairs that meet in a cell of a grid.
    """
    if len(faces) < 2:
        return 0
    corners = vertices.astype(np.float64)[faces]
    low, high = corners.min(axis=1), corners.max(axis=1)
    cell = max(float(np.median((high - low).max(axis=1))), 1e-6)
    origin = low.min(axis=0)
    first, last = ((edge - origin) // cell for edge in (low, high))
    dims = last.max(axis=0).astype(np.int64) + 1
    return int(_count_crossings(corners, faces.astype(np.int64), first.astype(np.int64), last.astype(np.int64), dims))


@numba.njit(cache=True, nogil=True)
def _count_crossings(corners, faces, first, last, dims):
    total = 0
    for f in range(first.shape[0]):
        total += (last[f, 0] - first[f, 0] + 1) * (last[f, 1] - first[f, 1] + 1) * (last[f, 2] - first[f, 2] + 1)
    cells, owners = np.empty(total, np.int64), np.empty(total, np.int32)
    at = 0
    for f in range(first.shape[0]):
        for x in range(first[f, 0], last[f, 0] + 1):
            for y in range(first[f, 1], last[f, 1] + 1):
                for z in range(first[f, 2], last[f, 2] + 1):
                    cells[at], owners[at] = (x * dims[1] + y) * dims[2] + z, f
                    at += 1
    order = np.argsort(cells)
    found = 0
    begin = 0
    while begin < total:
        end, here = begin + 1, cells[order[begin]]
        while end < total and cells[order[end]] == here:
            end += 1
        for i in range(begin, end):
            a = owners[order[i]]
            for j in range(i + 1, end):
                b = owners[order[j]]
                joined, apart = False, False
                for k in range(3):
                    joined |= faces[a, k] == faces[b, 0] or faces[a, k] == faces[b, 1] or faces[a, k] == faces[b, 2]
                if joined:
                    continue
                # A pair that meets in several cells is counted in the first one alone.
                number = np.int64(0)
                for k in range(3):
                    low = max(first[a, k], first[b, k])
                    apart |= low > min(last[a, k], last[b, k])
                    number = number * dims[k] + low
                if apart or number != here:
                    continue
                if _cross(corners[a], corners[b]) or _cross(corners[b], corners[a]):
                    found += 1
        begin = end
    return found


@numba.njit(cache=True, nogil=True)
def _cross(t, s):
    """Tell whether an edge of triangle s goes through triangle t."""
    e1, e2 = t[1] - t[0], t[2] - t[0]
    for k in range(3):
        origin, way = s[k], s[(k + 1) % 3] - s[k]
        px, py, pz = way[1] * e2[2] - way[2] * e2[1], way[2] * e2[0] - way[0] * e2[2], way[0] * e2[1] - way[1] * e2[0]
        determinant = e1[0] * px + e1[1] * py + e1[2] * pz
        if abs(determinant) < 1e-12:
            continue
        tx, ty, tz = origin[0] - t[0, 0], origin[1] - t[0, 1], origin[2] - t[0, 2]
        u = (tx * px + ty * py + tz * pz) / determinant
        if u < 0 or u > 1:
            continue
        qx, qy, qz = ty * e1[2] - tz * e1[1], tz * e1[0] - tx * e1[2], tx * e1[1] - ty * e1[0]
        v = (way[0] * qx + way[1] * qy + way[2] * qz) / determinant
        if v < 0 or u + v > 1:
            continue
        where = (e2[0] * qx + e2[1] * qy + e2[2] * qz) / determinant
        if 0 <= where <= 1:
            return True
    return False
