"""How far a mask's boundary lies from a surface: where a surface has lost a thin part, only this direction sees it.

Triangles are sorted along a Morton curve and bounded by boxes of boxes (a linear bounding volume hierarchy: Lauterbach et al.,
Eurographics 2009), four to a leaf, so building is one radix sort and one pass; a search goes into the nearer box first. The
points come in raster order, so each starts from its predecessor's answer: the nearest triangle is no farther than that one's
distance and the step between the two. Distances to triangles after Ericson, Real-Time Collision Detection, 2005, 5.1.5.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numba
import numpy as np
from numpy.typing import NDArray

#: points_mm (N, 3), vertices_mm (V, 3), triangles (F, 3) -> millimetres (N,); see `distances_to_surface`.
SurfaceDistance = Callable[[NDArray[np.floating], NDArray[np.floating], NDArray[np.integer]], NDArray[np.float64]]

#: Points of a structure's boundary at which its distance is measured, at most.
_SAMPLES = 10_000
_LEAF = 4


def boundary_points(
    corners: NDArray[np.floating], quads: NDArray[np.integer], triangles: NDArray[np.integer]
) -> NDArray[np.float64]:
    """Return up to 10,000 points spread evenly over the boundary of a structure's voxels.

    Parameters
    ----------
    corners : ndarray, shape (V, 3)
        Corners of the voxels, as `Nets.corners`, in any unit.
    quads : ndarray, shape (Q, 4)
        The net's quadrilaterals: a voxel's face each.
    triangles : ndarray, shape (T, 3)
        Its triangles, of the faces at which voxels touch by an edge.

    Returns
    -------
    ndarray, shape (N, 3)
        The faces' centres, in the order of the net.
    """
    step = max(1, -(-(len(quads) + len(triangles)) // _SAMPLES))
    centres = [corners[faces[::step]].astype(np.float64).mean(axis=1) for faces in (quads, triangles) if len(faces)]
    return np.concatenate(centres)[:_SAMPLES] if centres else np.zeros((0, 3))


def distances_to_surface(
    points_mm: NDArray[np.floating], vertices_mm: NDArray[np.floating], triangles: NDArray[np.integer]
) -> NDArray[np.float64]:
    """Measure how far points lie from a surface.

    Parameters
    ----------
    points_mm : ndarray, shape (N, 3)
        In any order; fastest where neighbours follow one another.
    vertices_mm : ndarray, shape (V, 3)
        In the same frame.
    triangles : ndarray, shape (F, 3)
        Of a surface, closed or not; those without area count by their edges.

    Returns
    -------
    ndarray, shape (N,), float64
        Millimetres to the nearest point of any triangle, never negative; infinite where there is no triangle.
    """
    points = np.ascontiguousarray(points_mm, np.float64)
    if not len(triangles) or not len(points):
        return np.full(len(points), np.inf)
    # Around the middle, so that single precision has digits to spare.
    vertices = np.ascontiguousarray(vertices_mm, np.float64)
    middle = (vertices.min(axis=0) + vertices.max(axis=0)) / 2
    corners, boxes = _hierarchy((vertices - middle).astype(np.float32), np.ascontiguousarray(triangles, np.int32))
    return np.asarray(_nearest(points - middle, corners, boxes))


def open3d_distances() -> SurfaceDistance:
    """Return the same by open3d's ray-casting scene (Embree), which is an extra.

    Raises
    ------
    ImportError
        Where open3d, or a library of the system that it needs, is missing.
    """
    import open3d.core
    import open3d.t.geometry

    def distances(
        points_mm: NDArray[np.floating], vertices_mm: NDArray[np.floating], triangles: NDArray[np.integer]
    ) -> NDArray[np.float64]:
        if not len(triangles) or not len(points_mm):
            return np.full(len(points_mm), np.inf)
        middle = (vertices_mm.min(axis=0) + vertices_mm.max(axis=0)) / 2

        def tensor(array: NDArray[Any], dtype: Any) -> Any:
            return open3d.core.Tensor(np.ascontiguousarray(array, dtype))

        scene = open3d.t.geometry.RaycastingScene()
        scene.add_triangles(tensor(vertices_mm - middle, np.float32), tensor(triangles, np.uint32))
        return np.asarray(scene.compute_distance(tensor(points_mm - middle, np.float32)).numpy(), np.float64)

    return distances


def summary(distances_mm: NDArray[np.float64]) -> dict[str, float]:
    """Return mean, 95th percentile and maximum, as a surface's measures have them; infinite where there is no distance."""
    if not len(distances_mm):
        return dict.fromkeys(("mean", "p95", "max"), np.inf)
    # Between a number and infinity there is nothing to interpolate.
    method: Literal["linear", "higher"] = "linear" if np.isfinite(distances_mm).all() else "higher"
    return {
        "mean": float(distances_mm.mean()),
        "p95": float(np.percentile(distances_mm, 95, method=method)),
        "max": float(distances_mm.max()),
    }


@numba.njit(cache=True, nogil=True)
def _hierarchy(vertices, triangles):
    """Sort triangles along a Morton curve and bound them.

    Returns
    -------
    float32, (F, 3, 3): corners of the sorted triangles
    float32, (2 P - 1, 6): lowest and highest corner of each node; those below node n are 2 n + 1 and 2 n + 2, the last P leaves
    """
    count = triangles.shape[0]
    low, high = np.full(3, np.inf, np.float32), np.full(3, -np.inf, np.float32)
    for v in range(vertices.shape[0]):
        for k in range(3):
            low[k] = min(low[k], vertices[v, k])
            high[k] = max(high[k], vertices[v, k])
    cells = np.float32(1023) / max(high[0] - low[0], high[1] - low[1], high[2] - low[2], np.float32(1e-6))
    codes, order = np.empty(count, np.uint32), np.empty(count, np.int32)
    for t in range(count):
        code = np.uint32(0)
        for k in range(3):
            centre = (vertices[triangles[t, 0], k] + vertices[triangles[t, 1], k] + vertices[triangles[t, 2], k]) / 3
            # Spread ten bits, two zeros between each.
            bits = np.uint32((centre - low[k]) * cells)
            bits = (bits | bits << np.uint32(16)) & np.uint32(0x030000FF)
            bits = (bits | bits << np.uint32(8)) & np.uint32(0x0300F00F)
            bits = (bits | bits << np.uint32(4)) & np.uint32(0x030C30C3)
            bits = (bits | bits << np.uint32(2)) & np.uint32(0x09249249)
            code |= bits << np.uint32(k)
        codes[t], order[t] = code, t
    other = np.empty(count, np.int32)
    for shift in (0, 10, 20):
        starts = np.zeros(1025, np.int64)
        for t in range(count):
            starts[(codes[t] >> np.uint32(shift) & np.uint32(1023)) + 1] += 1
        for digit in range(1024):
            starts[digit + 1] += starts[digit]
        for i in range(count):
            digit = codes[order[i]] >> np.uint32(shift) & np.uint32(1023)
            other[starts[digit]] = order[i]
            starts[digit] += 1
        order, other = other, order

    leaves = 1
    while leaves * _LEAF < count:
        leaves *= 2
    boxes = np.empty((2 * leaves - 1, 6), np.float32)
    boxes[:, :3], boxes[:, 3:] = np.inf, -np.inf
    corners = np.empty((count, 3, 3), np.float32)
    for i in range(count):
        box = boxes[leaves - 1 + i // _LEAF]
        for corner in range(3):
            for k in range(3):
                value = vertices[triangles[order[i], corner], k]
                corners[i, corner, k] = value
                box[k], box[3 + k] = min(box[k], value), max(box[3 + k], value)
    for node in range(leaves - 2, -1, -1):
        for k in range(3):
            boxes[node, k] = min(boxes[2 * node + 1, k], boxes[2 * node + 2, k])
            boxes[node, 3 + k] = max(boxes[2 * node + 1, 3 + k], boxes[2 * node + 2, 3 + k])
    return corners, boxes


@numba.njit(cache=True, nogil=True, inline="always")
def _to_box(x, y, z, boxes, node):
    """Return the squared distance from a point to a box; infinite for one that is empty."""
    dx = max(boxes[node, 0] - x, x - boxes[node, 3], 0.0)
    dy = max(boxes[node, 1] - y, y - boxes[node, 4], 0.0)
    dz = max(boxes[node, 2] - z, z - boxes[node, 5], 0.0)
    return dx * dx + dy * dy + dz * dz


@numba.njit(cache=True, nogil=True)
def _nearest(points, corners, boxes):
    out = np.empty(points.shape[0])
    first_leaf = (boxes.shape[0] - 1) // 2
    stack, distances = np.empty(64, np.int64), np.empty(64)
    before = np.inf
    for p in range(points.shape[0]):
        x, y, z = points[p, 0], points[p, 1], points[p, 2]
        best = np.inf
        if p > 0:
            step = np.sqrt((x - points[p - 1, 0]) ** 2 + (y - points[p - 1, 1]) ** 2 + (z - points[p - 1, 2]) ** 2)
            best = (before + step) ** 2 * (1 + 1e-9) + 1e-12
        stack[0], distances[0] = 0, 0.0
        size = 1
        while size:
            size -= 1
            node = stack[size]
            if distances[size] >= best:
                continue
            if node >= first_leaf:
                begin = (node - first_leaf) * _LEAF
                for t in range(begin, min(begin + _LEAF, corners.shape[0])):
                    best = min(best, _to_triangle(x, y, z, corners, t))
                continue
            near, far = 2 * node + 1, 2 * node + 2
            to_near, to_far = _to_box(x, y, z, boxes, near), _to_box(x, y, z, boxes, far)
            if to_far < to_near:
                near, far, to_near, to_far = far, near, to_far, to_near
            if to_far < best:
                stack[size], distances[size] = far, to_far
                size += 1
            if to_near < best:
                stack[size], distances[size] = near, to_near
                size += 1
        before = np.sqrt(best)
        out[p] = before
    return out


@numba.njit(cache=True, nogil=True, inline="always")
def _to_triangle(x, y, z, corners, t):
    """Return the squared distance from a point to a triangle."""
    ax, ay, az = np.float64(corners[t, 0, 0]), np.float64(corners[t, 0, 1]), np.float64(corners[t, 0, 2])
    bx, by, bz = corners[t, 1, 0] - ax, corners[t, 1, 1] - ay, corners[t, 1, 2] - az
    cx, cy, cz = corners[t, 2, 0] - ax, corners[t, 2, 1] - ay, corners[t, 2, 2] - az
    px, py, pz = x - ax, y - ay, z - az
    d1, d2 = bx * px + by * py + bz * pz, cx * px + cy * py + cz * pz
    if d1 <= 0 and d2 <= 0:
        return px * px + py * py + pz * pz
    bb, bc, cc = bx * bx + by * by + bz * bz, bx * cx + by * cy + bz * cz, cx * cx + cy * cy + cz * cz
    d3, d4, d5, d6 = d1 - bb, d2 - bc, d1 - bc, d2 - cc
    va, vb, vc = d3 * d6 - d5 * d4, d5 * d2 - d1 * d6, d1 * d4 - d3 * d2
    if d3 >= 0 and d4 <= d3:
        v, w = 1.0, 0.0
    elif d6 >= 0 and d5 <= d6:
        v, w = 0.0, 1.0
    elif vc <= 0 and d1 >= 0 and d3 <= 0 and bb > 0:
        v, w = d1 / bb, 0.0
    elif vb <= 0 and d2 >= 0 and d6 <= 0 and cc > 0:
        v, w = 0.0, d2 / cc
    elif va <= 0 and d4 >= d3 and d5 >= d6 and d4 - d3 + d5 - d6 > 0:
        w = (d4 - d3) / (d4 - d3 + d5 - d6)
        v = 1 - w
    elif va + vb + vc > 0:
        v, w = vb / (va + vb + vc), vc / (va + vb + vc)
    else:  # no area
        v, w = 0.0, min(max(d2 / cc, 0.0), 1.0) if cc > 0 else 0.0
    qx, qy, qz = px - v * bx - w * cx, py - v * by - w * cy, pz - v * bz - w * cz
    return qx * qx + qy * qy + qz * qz
