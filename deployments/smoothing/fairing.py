"""Smoothing that loses nothing: a surface net becomes a smooth surface that encloses its voxels' volume, everywhere.

Averaging a surface takes its staircase away, and volume with it: all of it from a thin vessel. What was lost can be seen at
each vertex as the distance along the normal from the smoothed surface to the voxels' own boundary, whose corners are the
centres of the net's cells. Averaged over the surface that distance has no staircase any more, and the surface is moved by
it: so each neighbourhood gets its own volume back, a thin vessel as well as the liver beside it. As a number on the surface it
can be averaged widely without shrinking anything, which positions cannot.

Averaging n times is the polynomial A^n of the matrix of neighbours' means, and a Chebyshev series of some 2 √n terms is nearly
the same polynomial (meshes are filtered so since Taubin et al., ECCV 1996), for half the work.

Positions are millimetres along the mask's own axes: (x, y, z).
"""

from __future__ import annotations

from functools import lru_cache
from math import comb, sqrt

import numba
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Links = tuple[NDArray[np.int32], NDArray[np.int32]]

#: Averagings of the positions, and of the loss, at strength 1. More of the former fold the ends of the thinnest vessels over;
#: more of either make spheres smoother and blur what is smaller than 10 mm.
_STEPS, _LOSS_STEPS = 10, 20
#: Terms of the series: so many times the square root of the averagings.
_TERMS = 2.0
#: Pieces with fewer vertices are only scaled: they would shrink to a point. A voxel alone has 8, two have 12.
_LEAST_VERTICES = 40


def fair(
    places_mm: Floats, corners_mm: Floats, links: Links, faces: tuple[NDArray[np.int32], NDArray[np.int32]], strength: float
) -> Floats:
    """Smooth a surface net, keeping the volume of its voxels.

    Parameters
    ----------
    places_mm : ndarray of float32, shape (V, 3)
        The net's vertices.
    corners_mm : ndarray of float32, shape (V, 3)
        The corners of the voxels' boundary that belong to them.
    links : (start, neighbours)
        Neighbours of vertex v: `neighbours[start[v]:start[v + 1]]`.
    faces : (quads, triangles)
        Shapes (Q, 4) and (T, 3), counter-clockwise from outside.
    strength : float
        Above 0; averagings grow with it.

    Returns
    -------
    ndarray of float32, shape (V, 3)
    """
    series, wide = (_series(max(1, round(strength * steps))) for steps in (_STEPS, _LOSS_STEPS))
    pieces, sizes = connected_pieces(*links)
    smoothed = _averaged(places_mm, *links, series)
    if sizes.min() < _LEAST_VERTICES:
        small = (sizes < _LEAST_VERTICES)[pieces]
        smoothed[small] = places_mm[small]
    normals = vertex_normals(smoothed, *faces)
    loss = _averaged(_loss(corners_mm, smoothed, normals)[:, None], *links, wide)
    return np.asarray(move(smoothed, normals, loss[:, 0]))


def restore_volumes(
    places_mm: Floats,
    triangles: NDArray[np.int32],
    pieces: NDArray[np.int32],
    sizes: NDArray[np.int64],
    volumes_mm3: NDArray[np.float64],
    farthest_mm: float,
) -> Floats:
    """Move each piece of a surface along its normals until it encloses a volume.

    Parameters
    ----------
    places_mm : ndarray of float32, shape (V, 3); triangles : ndarray of int32, shape (T, 3)
        The surface.
    pieces : ndarray of int32, shape (V,)
        Which piece each vertex belongs to.
    sizes : ndarray of int64, shape (P,)
        Vertices of each piece on the net; small ones are scaled about their centres.
    volumes_mm3 : ndarray, shape (P,)
        What each should enclose; negative for cavities.
    farthest_mm : float
        Not farther than this in one of two steps.

    Returns
    -------
    ndarray of float32, shape (V, 3)
    """
    nothing = np.empty((0, 4), np.int32)
    small = sizes < _LEAST_VERTICES
    moved = np.array(places_mm)
    for _ in range(2):  # Newton: a volume grows by its area; the second step makes up for the curvature
        has = volumes(moved, nothing, triangles, pieces, len(sizes))
        area = areas(moved, nothing, triangles, pieces, len(sizes))
        step = np.clip((volumes_mm3 - has) / np.maximum(area, 1e-9), -farthest_mm, farthest_mm)
        step[small] = 0
        moved = move(moved, vertex_normals(moved, nothing, triangles), step.astype(np.float32)[pieces])
    if small.any():
        _scale_pieces(moved, pieces, small, volumes_mm3, volumes(moved, nothing, triangles, pieces, len(sizes)))
    return moved


def _scale_pieces(
    places: Floats,
    pieces: NDArray[np.int32],
    small: NDArray[np.bool_],
    wanted: NDArray[np.float64],
    has: NDArray[np.float64],
) -> None:
    """Scale small pieces about their centres to the volumes wanted, in place."""
    ratio = np.where(small & (wanted * has > 0), wanted / np.where(has == 0, 1, has), 1)
    factor = np.cbrt(ratio).astype(np.float32)
    chosen = small[pieces]
    counts = np.maximum(np.bincount(pieces, minlength=len(small)), 1)
    centres = np.stack([np.bincount(pieces, places[:, k], len(small)) / counts for k in range(3)], 1).astype(np.float32)
    own = pieces[chosen]
    places[chosen] = centres[own] + (places[chosen] - centres[own]) * factor[own, None]


@lru_cache(maxsize=32)
def _series(steps: int) -> tuple[float, ...]:
    """Chebyshev coefficients of x^n, cut off, and scaled so that constants stay what they are."""
    terms = min(steps, int(np.ceil(_TERMS * sqrt(steps))))
    full = [comb(steps, (steps - k) // 2) * (2.0 if k else 1.0) if (steps - k) % 2 == 0 else 0.0 for k in range(terms + 1)]
    return tuple(c / sum(full) for c in full)


def _averaged(values: Floats, start: NDArray[np.int32], links: NDArray[np.int32], series: tuple[float, ...]) -> Floats:
    weights = np.array(series, np.float32)
    if values.shape[1] == 1:
        return np.asarray(_filter_scalars(values[:, 0], start, links, weights))[:, None]
    # About the first vertex, so that digits are not lost on where the surface lies.
    first = values[0].copy()
    averaged: Floats = _filter_points(values - first, start, links, weights) + first
    return averaged


@numba.njit(cache=True, nogil=True, fastmath=True)
def _filter_points(values, start, links, weights):
    """Return the series Σ weights[k] T_k(A) of the points; A takes the mean of a vertex and its neighbours."""
    n = values.shape[0]
    before, now = values.copy(), np.zeros_like(values)
    out = values * weights[0]
    for k in range(1, weights.size):
        w, scale = weights[k], np.float32(1 if k == 1 else 2)
        keep = np.float32(0 if k == 1 else 1)
        source = before if k == 1 else now
        target = now if k == 1 else before
        for v in range(n):
            x, y, z = source[v, 0], source[v, 1], source[v, 2]
            for i in range(start[v], start[v + 1]):
                u = links[i]
                x += source[u, 0]
                y += source[u, 1]
                z += source[u, 2]
            share = scale / np.float32(start[v + 1] - start[v] + 1)
            x = x * share - keep * target[v, 0]
            y = y * share - keep * target[v, 1]
            z = z * share - keep * target[v, 2]
            target[v, 0], target[v, 1], target[v, 2] = x, y, z
            out[v, 0] += w * x
            out[v, 1] += w * y
            out[v, 2] += w * z
        if k > 1:
            before, now = now, before
    return out


@numba.njit(cache=True, nogil=True, fastmath=True)
def _filter_scalars(values, start, links, weights):
    """Return the same series of one number a vertex."""
    n = values.size
    before, now = values.copy(), np.zeros_like(values)
    out = values * weights[0]
    for k in range(1, weights.size):
        w, scale = weights[k], np.float32(1 if k == 1 else 2)
        keep = np.float32(0 if k == 1 else 1)
        source = before if k == 1 else now
        target = now if k == 1 else before
        for v in range(n):
            x = source[v]
            for i in range(start[v], start[v + 1]):
                x += source[links[i]]
            x = x * scale / np.float32(start[v + 1] - start[v] + 1) - keep * target[v]
            target[v] = x
            out[v] += w * x
        if k > 1:
            before, now = now, before
    return out


@numba.njit(cache=True, nogil=True)
def connected_pieces(start, links):
    """Label the connected pieces of a net: (piece of each vertex, int32; vertices of each piece, int64)."""
    n = start.size - 1
    piece = np.full(n, -1, np.int32)
    stack = np.empty(n, np.int32)
    sizes = np.zeros(n, np.int64)
    pieces = 0
    for seed in range(n):
        if piece[seed] >= 0:
            continue
        stack[0], height, size = seed, 1, 0
        piece[seed] = pieces
        while height:
            height -= 1
            v = stack[height]
            size += 1
            for i in range(start[v], start[v + 1]):
                u = links[i]
                if piece[u] < 0:
                    piece[u] = pieces
                    stack[height] = u
                    height += 1
        sizes[pieces] = size
        pieces += 1
    return piece, sizes[:pieces].copy()


@numba.njit(cache=True, nogil=True, fastmath=True)
def vertex_normals(places, quads, triangles):
    """Area-weighted unit normals of the vertices, float32 (V, 3); zero where a vertex has no area."""
    normals = np.zeros_like(places)
    for q in range(quads.shape[0]):
        a, b, c, d = quads[q]
        # The diagonals' product is twice the quadrilateral's area vector, flat or not.
        ux, uy, uz = places[c, 0] - places[a, 0], places[c, 1] - places[a, 1], places[c, 2] - places[a, 2]
        vx, vy, vz = places[d, 0] - places[b, 0], places[d, 1] - places[b, 1], places[d, 2] - places[b, 2]
        x, y, z = uy * vz - uz * vy, uz * vx - ux * vz, ux * vy - uy * vx
        for v in (a, b, c, d):
            normals[v, 0] += x
            normals[v, 1] += y
            normals[v, 2] += z
    for t in range(triangles.shape[0]):
        a, b, c = triangles[t]
        ux, uy, uz = places[b, 0] - places[a, 0], places[b, 1] - places[a, 1], places[b, 2] - places[a, 2]
        vx, vy, vz = places[c, 0] - places[a, 0], places[c, 1] - places[a, 1], places[c, 2] - places[a, 2]
        x, y, z = uy * vz - uz * vy, uz * vx - ux * vz, ux * vy - uy * vx
        for v in (a, b, c):
            normals[v, 0] += x
            normals[v, 1] += y
            normals[v, 2] += z
    for v in range(places.shape[0]):
        x, y, z = normals[v, 0], normals[v, 1], normals[v, 2]
        length = np.sqrt(x * x + y * y + z * z)
        if length > 0:
            normals[v, 0], normals[v, 1], normals[v, 2] = x / length, y / length, z / length
    return normals


@numba.njit(cache=True, nogil=True, fastmath=True)
def _loss(corners, places, normals):
    loss = np.empty(places.shape[0], np.float32)
    for v in range(places.shape[0]):
        total = np.float32(0)
        for k in range(3):
            total += (corners[v, k] - places[v, k]) * normals[v, k]
        loss[v] = total
    return loss


@numba.njit(cache=True, nogil=True, fastmath=True)
def move(places, normals, distance):
    """Return the vertices, each moved along its normal by its own distance (mm)."""
    out = np.empty_like(places)
    for v in range(places.shape[0]):
        for k in range(3):
            out[v, k] = places[v, k] + distance[v] * normals[v, k]
    return out


@numba.njit(cache=True, nogil=True)
def volumes(places, quads, triangles, pieces, count):
    """Signed volume that each piece encloses, mm³ (float64); a hole's is negative."""
    total = np.zeros(count)
    if places.shape[0] == 0:
        return total
    ox, oy, oz = np.float64(places[0, 0]), np.float64(places[0, 1]), np.float64(places[0, 2])
    for q in range(quads.shape[0]):
        for half in range(2):
            a, b, c = quads[q, 0], quads[q, 1 + half], quads[q, 2 + half]
            total[pieces[a]] += _six_volumes(places, a, b, c, ox, oy, oz)
    for t in range(triangles.shape[0]):
        a, b, c = triangles[t]
        total[pieces[a]] += _six_volumes(places, a, b, c, ox, oy, oz)
    return total / 6


@numba.njit(cache=True, nogil=True, inline="always")
def _six_volumes(places, a, b, c, ox, oy, oz):
    ax, ay, az = places[a, 0] - ox, places[a, 1] - oy, places[a, 2] - oz
    bx, by, bz = places[b, 0] - ox, places[b, 1] - oy, places[b, 2] - oz
    cx, cy, cz = places[c, 0] - ox, places[c, 1] - oy, places[c, 2] - oz
    return ax * (by * cz - bz * cy) + ay * (bz * cx - bx * cz) + az * (bx * cy - by * cx)


@numba.njit(cache=True, nogil=True)
def areas(places, quads, triangles, pieces, count):
    """Area of each piece, mm² (float64)."""
    total = np.zeros(count)
    for q in range(quads.shape[0]):
        for half in range(2):
            a, b, c = quads[q, 0], quads[q, 1 + half], quads[q, 2 + half]
            total[pieces[a]] += _area(places, a, b, c)
    for t in range(triangles.shape[0]):
        a, b, c = triangles[t]
        total[pieces[a]] += _area(places, a, b, c)
    return total


@numba.njit(cache=True, nogil=True, inline="always")
def _area(places, a, b, c):
    ux, uy, uz = places[b, 0] - places[a, 0], places[b, 1] - places[a, 1], places[b, 2] - places[a, 2]
    vx, vy, vz = places[c, 0] - places[a, 0], places[c, 1] - places[a, 1], places[c, 2] - places[a, 2]
    x, y, z = uy * vz - uz * vy, uz * vx - ux * vz, ux * vy - uy * vx
    return np.sqrt(x * x + y * y + z * z) / 2
