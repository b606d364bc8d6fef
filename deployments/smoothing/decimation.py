"""Fewer triangles, within millimetres: edge collapse by quadric error that never breaks a closed surface.

Quadric error after Garland & Heckbert (SIGGRAPH 1997), each vertex's quadric in coordinates about the vertex itself, so that
single precision has digits to spare. An edge is collapsed only if its ends have exactly two neighbours in common (the link
condition of Dey et al., 1999: a closed 2-manifold stays one) and no triangle around turns over or becomes a needle. Edges are
taken in sweeps of growing error, a queue's order within a factor of two without the queue; each vertex remembers its cheapest
edge until something near it changes.
"""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray

#: Squared error (mm²) of the first sweep, and what it grows by.
_FIRST, _GROWTH = 4e-6, 2.0
#: Nobody asks for more than this many mm.
_LARGEST_MM = 20.0
#: Pull of the new vertex to the edge's middle, where planes leave it free.
_PULL = 1e-3
#: What a mm² of edge costs: of two equally flat edges the shorter goes first, which keeps triangles even.
_LENGTH = 1e-4
#: A triangle must not turn farther than this cosine in one step, nor get thinner than this (1 is equilateral) unless it was.
_TURN, _SHAPE = 0.3, 0.08


def decimate(
    places_mm: NDArray[np.float32],
    triangles: NDArray[np.int32],
    *,
    target: int = 0,
    error_mm: float | None = None,
    fixed: NDArray[np.bool_] | None = None,
) -> tuple[NDArray[np.float32], NDArray[np.int32], NDArray[np.int64], NDArray[np.int32]]:
    """Collapse edges until few enough are left, or none is left below the error.

    Parameters
    ----------
    places_mm : ndarray of float32, shape (V, 3)
        Millimetres.
    triangles : ndarray of int32, shape (T, 3)
        A closed, oriented surface; with `fixed`, surfaces that meet in fixed vertices.
    target : int
        Triangles wanted; 0 for as few as the error allows.
    error_mm : float, optional
        Root mean square, weighted by area, of a new vertex's distances to the planes of the triangles that it stands for.
    fixed : ndarray of bool, shape (V,), optional
        Vertices that neither move nor go.

    Returns
    -------
    (places, triangles, kept triangles, kept vertices)
        Their numbers before, for the last two.
    """
    if fixed is None:
        fixed = np.zeros(len(places_mm), np.bool_)
    places, corners = np.array(places_mm, np.float32), np.array(triangles, np.int32)
    limit = _LARGEST_MM if error_mm is None else error_mm
    if len(corners) and limit > 0:
        _collapse(places, corners, fixed, target, limit * limit)
    kept = np.flatnonzero(corners[:, 0] >= 0)
    corners = corners[kept]
    used = np.zeros(len(places), np.bool_)
    used[corners] = True
    number = (np.cumsum(used) - 1).astype(np.int32)
    return places[used], number[corners], kept, np.flatnonzero(used).astype(np.int32)


def split_quads(places_mm: NDArray[np.float32], quads: NDArray[np.int32]) -> NDArray[np.int32]:
    """Cut quadrilaterals along their shorter diagonals, (2 Q, 3)."""
    out = np.empty((2 * len(quads), 3), np.int32)
    _split(places_mm, quads, out)
    return out


@numba.njit(cache=True, nogil=True)
def _split(places, quads, out):
    for q in range(quads.shape[0]):
        a, b, c, d = quads[q]
        first, second = np.float32(0), np.float32(0)
        for k in range(3):
            first += (places[a, k] - places[c, k]) ** 2
            second += (places[b, k] - places[d, k]) ** 2
        if first <= second:
            out[2 * q] = (a, b, c)
            out[2 * q + 1] = (a, c, d)
        else:
            out[2 * q] = (b, c, d)
            out[2 * q + 1] = (b, d, a)


@numba.njit(cache=True, nogil=True)
def _quadrics(places, triangles):
    """Return each vertex's quadric about itself: xx xy xz yy yz zz, x y z, constant, weight."""
    q = np.zeros((places.shape[0], 11), np.float32)
    for t in range(triangles.shape[0]):
        a, b, c = triangles[t]
        ux, uy, uz = places[b, 0] - places[a, 0], places[b, 1] - places[a, 1], places[b, 2] - places[a, 2]
        vx, vy, vz = places[c, 0] - places[a, 0], places[c, 1] - places[a, 1], places[c, 2] - places[a, 2]
        x, y, z = uy * vz - uz * vy, uz * vx - ux * vz, ux * vy - uy * vx
        length = np.sqrt(x * x + y * y + z * z)
        if length == 0:
            continue
        s = np.float32(1) / length
        for v in (a, b, c):  # the plane goes through the vertex itself: nothing but the matrix
            row = q[v]
            row[0] += x * x * s
            row[1] += x * y * s
            row[2] += x * z * s
            row[3] += y * y * s
            row[4] += y * z * s
            row[5] += z * z * s
            row[10] += length
    return q


@numba.njit(cache=True, nogil=True, inline="always")
def _cost(places, q, fixed, u, v):
    """Return (squared error, cost, new place relative to u) of making one vertex of an edge's two."""
    tx, ty, tz = places[v, 0] - places[u, 0], places[v, 1] - places[u, 1], places[v, 2] - places[u, 2]
    m, r = q[u], q[v]
    xx, xy, xz, yy, yz, zz = m[0] + r[0], m[1] + r[1], m[2] + r[2], m[3] + r[3], m[4] + r[4], m[5] + r[5]
    gx, gy, gz = r[0] * tx + r[1] * ty + r[2] * tz, r[1] * tx + r[3] * ty + r[4] * tz, r[2] * tx + r[4] * ty + r[5] * tz
    bx, by, bz = m[6] + r[6] - gx, m[7] + r[7] - gy, m[8] + r[8] - gz
    constant = m[9] + r[9] + tx * gx + ty * gy + tz * gz - 2 * (r[6] * tx + r[7] * ty + r[8] * tz)
    weight = m[10] + r[10]
    if fixed[u]:
        x, y, z = np.float32(0), np.float32(0), np.float32(0)
    elif fixed[v]:
        x, y, z = tx, ty, tz
    else:
        pull = np.float32(_PULL) * weight
        half = np.float32(0.5) * pull
        a, d, f = xx + pull, yy + pull, zz + pull
        rx, ry, rz = half * tx - bx, half * ty - by, half * tz - bz
        c00, c01, c02 = d * f - yz * yz, xz * yz - xy * f, xy * yz - xz * d
        c11, c12, c22 = a * f - xz * xz, xy * xz - a * yz, a * d - xy * xy
        determinant = a * c00 + xy * c01 + xz * c02
        if determinant > 0:
            s = np.float32(1) / determinant
            x = (c00 * rx + c01 * ry + c02 * rz) * s
            y = (c01 * rx + c11 * ry + c12 * rz) * s
            z = (c02 * rx + c12 * ry + c22 * rz) * s
        else:
            x, y, z = tx / 2, ty / 2, tz / 2
    error = x * (xx * x + 2 * (xy * y + xz * z + bx)) + y * (yy * y + 2 * (yz * z + by)) + z * (zz * z + 2 * bz) + constant
    error = max(error, np.float32(0)) / weight if weight > 0 else np.float32(0)
    return error, error + np.float32(_LENGTH) * (tx * tx + ty * ty + tz * tz), x, y, z


@numba.njit(cache=True, nogil=True)
def _collapse(places, triangles, fixed, target, limit):
    """Collapse edges, in place; triangles that are gone begin with -1."""
    n, left = places.shape[0], triangles.shape[0]
    q = _quadrics(places, triangles)
    # The triangles of each vertex: a pool, to whose end grown lists move.
    first, count = np.zeros(n, np.int64), np.zeros(n, np.int32)
    for t in range(left):
        for k in range(3):
            count[triangles[t, k]] += 1
    at = 0
    for v in range(n):
        first[v] = at
        at += count[v]
        count[v] = 0
    pool = np.empty(max(at * 5 // 2, 1024), np.int32)
    for t in range(left):
        for k in range(3):
            v = triangles[t, k]
            pool[first[v] + count[v]] = t
            count[v] += 1
    room = count.copy()
    cheapest, mate, floor = np.zeros(n, np.float32), np.zeros(n, np.int32), np.full(n, -1, np.float32)
    stale, gone = np.zeros(n, np.int32), np.zeros(n, np.bool_)
    sweep = np.int32(0)
    ring_mark, stamp = np.zeros(n, np.int32), np.int32(0)
    threshold = np.float32(_FIRST)
    merged = np.empty(4096, np.int32)
    infinite = np.float32(np.inf)
    while left > target:
        before = left
        sweep += 1
        for v in range(n):
            if gone[v] or stale[v] == sweep or left <= target:
                continue
            tries = 0
            while tries < 4:
                tries += 1
                if stale[v] >= 0:
                    stale[v], floor[v], cheapest[v] = -1, -1, -1
                if cheapest[v] < 0:  # look for it: each edge belongs to its end with the lower number
                    best, partner = infinite, -1
                    for i in range(first[v], first[v] + count[v]):
                        t = pool[i]
                        # Of a triangle at v its next corner: around a closed fan every neighbour is met once.
                        u = (
                            triangles[t, 1]
                            if triangles[t, 0] == v
                            else triangles[t, 2]
                            if triangles[t, 1] == v
                            else triangles[t, 0]
                        )
                        if u < v or (fixed[u] and fixed[v]):
                            continue
                        error, cost, _, _, _ = _cost(places, q, fixed, v, u)
                        if error <= limit and floor[v] < cost < best:
                            best, partner = cost, u
                    cheapest[v], mate[v] = best, partner
                if cheapest[v] > threshold:
                    break
                u = np.int64(mate[v])
                _, cost, x, y, z = _cost(places, q, fixed, v, u)
                if count[u] + count[v] > merged.size:
                    floor[v], cheapest[v] = cheapest[v], -1
                    continue
                stamp += 1
                if not _allowed(
                    places,
                    triangles,
                    pool,
                    first,
                    count,
                    ring_mark,
                    stamp,
                    v,
                    u,
                    places[v, 0] + x,
                    places[v, 1] + y,
                    places[v, 2] + z,
                ):
                    floor[v], cheapest[v] = cheapest[v], -1
                    continue
                # u goes into v.
                _merge_quadrics(places, q, v, u, x, y, z)
                size = 0
                for side in range(2):
                    own, other = (v, u) if side == 0 else (u, v)
                    for i in range(first[own], first[own] + count[own]):
                        t = pool[i]
                        if triangles[t, 0] < 0:
                            continue
                        if triangles[t, 0] == other or triangles[t, 1] == other or triangles[t, 2] == other:
                            for k in range(3):
                                w = triangles[t, k]
                                if w not in (v, u):
                                    for j in range(first[w], first[w] + count[w]):
                                        if pool[j] == t:
                                            pool[j] = pool[first[w] + count[w] - 1]
                                            count[w] -= 1
                                            break
                            triangles[t, 0] = -1
                            left -= 1
                        else:
                            merged[size] = t
                            size += 1
                gone[u] = True
                for i in range(size):
                    t = merged[i]
                    for k in range(3):
                        if triangles[t, k] == u:
                            triangles[t, k] = v
                        stale[triangles[t, k]] = sweep
                if size > room[v]:
                    if size <= room[u]:
                        first[v], room[v] = first[u], room[u]
                    else:
                        if at + size > pool.size:
                            at = _compact(pool, first, count, room, gone, v)
                            if at + size > pool.size:
                                larger = np.empty(2 * pool.size + size, np.int32)
                                larger[:at] = pool[:at]
                                pool = larger
                        first[v], room[v] = at, size
                        at += size
                for i in range(size):
                    pool[first[v] + i] = merged[i]
                count[v] = size
                break  # one a sweep and vertex: surfaces thin out evenly
        if threshold > limit and before - left <= before // 256:
            break
        threshold *= np.float32(_GROWTH)


@numba.njit(cache=True, nogil=True)
def _compact(pool, first, count, room, gone, skipped):
    """Close the gaps in the pool and return its length; the lists of vertices that are gone, and of one more, are dropped."""
    old = pool.copy()
    at = 0
    for v in range(first.size):
        if gone[v] or v == skipped:
            continue
        start = first[v]
        first[v], room[v] = at, count[v]
        for i in range(count[v]):
            pool[at + i] = old[start + i]
        at += count[v]
    return at


@numba.njit(cache=True, nogil=True)
def _merge_quadrics(places, q, v, u, x, y, z):
    """Move v by (x, y, z) and give it both quadrics, about its new place."""
    nx, ny, nz = places[v, 0] + x, places[v, 1] + y, places[v, 2] + z
    for own in (v, u):
        m = q[own]
        tx, ty, tz = nx - places[own, 0], ny - places[own, 1], nz - places[own, 2]
        gx, gy, gz = m[0] * tx + m[1] * ty + m[2] * tz, m[1] * tx + m[3] * ty + m[4] * tz, m[2] * tx + m[4] * ty + m[5] * tz
        m[9] += tx * gx + ty * gy + tz * gz + 2 * (m[6] * tx + m[7] * ty + m[8] * tz)
        m[6] += gx
        m[7] += gy
        m[8] += gz
    for k in range(11):
        q[v, k] += q[u, k]
    places[v, 0], places[v, 1], places[v, 2] = nx, ny, nz


@numba.njit(cache=True, nogil=True)
def _allowed(places, triangles, pool, first, count, mark, stamp, v, u, x, y, z):
    """Tell whether edge v–u may become one vertex at (x, y, z)."""
    for i in range(first[v], first[v] + count[v]):
        t = pool[i]
        for k in range(3):
            mark[triangles[t, k]] = stamp
    shared = 0
    for i in range(first[u], first[u] + count[u]):
        t = pool[i]
        a, b, c = triangles[t]
        if v in (a, b, c):
            shared += 1
            w = a + b + c - u - v
            if count[w] <= 3:
                return False
            continue
        # The next corner after u: each neighbour once.
        w = b if a == u else c if b == u else a
        if mark[w] == stamp:
            # A common neighbour; those opposite the edge in its two triangles are met here, too, once each.
            shared += 16
    # One of the two opposite corners follows u in a triangle without v, the other one in the triangle with v.
    if shared != 18:
        return False
    for side in range(2):
        own, other = (v, u) if side == 0 else (u, v)
        for i in range(first[own], first[own] + count[own]):
            t = pool[i]
            a, b, c = triangles[t]
            if other in (a, b, c):
                continue
            if b == own:
                b, c = c, a
            elif c == own:
                b, c = a, b
            # (own, b, c) becomes (new, b, c)
            ex, ey, ez = places[c, 0] - places[b, 0], places[c, 1] - places[b, 1], places[c, 2] - places[b, 2]
            ox, oy, oz = places[own, 0] - places[b, 0], places[own, 1] - places[b, 1], places[own, 2] - places[b, 2]
            px, py, pz = x - places[b, 0], y - places[b, 1], z - places[b, 2]
            mx, my, mz = ey * oz - ez * oy, ez * ox - ex * oz, ex * oy - ey * ox
            lx, ly, lz = ey * pz - ez * py, ez * px - ex * pz, ex * py - ey * px
            old, new = mx * mx + my * my + mz * mz, lx * lx + ly * ly + lz * lz
            turn = mx * lx + my * ly + mz * lz
            if turn <= np.float32(_TURN) * np.sqrt(old * new):
                return False
            qx, qy, qz = x - places[c, 0], y - places[c, 1], z - places[c, 2]
            edge = ex * ex + ey * ey + ez * ez
            longest = max(edge, px * px + py * py + pz * pz, qx * qx + qy * qy + qz * qz)
            # 2 · area / longest², over its value of an equilateral triangle.
            shape = np.sqrt(new) / longest * np.float32(1.1547)
            if shape < np.float32(_SHAPE):
                rx, ry, rz = places[own, 0] - places[c, 0], places[own, 1] - places[c, 1], places[own, 2] - places[c, 2]
                before = max(edge, ox * ox + oy * oy + oz * oz, rx * rx + ry * ry + rz * rz)
                if shape < np.sqrt(old) / before * np.float32(1.1547):
                    return False
    return True
