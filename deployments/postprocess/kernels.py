"""The loops over voxels of thin structures, compiled by numba.

They work on lists of voxels, not on boxes: a vessel tree fills a thousandth of its box, and what is done here costs as much as
the tree has voxels. Lists are in raster order, neighbours are numbered as `OFFSETS` is.
"""

from __future__ import annotations

import itertools

import numba
import numpy as np

#: The 26 neighbours (z, y, x), in raster order: number k and number 25 - k are opposite.
OFFSETS = np.array([o for o in itertools.product((-1, 0, 1), repeat=3) if any(o)], np.int64)


@numba.njit(cache=True, nogil=True)
def link_neighbours(index, shape):  # type: ignore[no-untyped-def]  # pragma: no cover – compiled
    """Return (n, 26) int32: the place in the list of each voxel's neighbours, -1 for background, -2 outside the volume.

    Each of the 13 neighbours that come earlier is found by a second finger that only moves forward: keys are sorted.
    """
    n = len(index)
    ny, nx = shape[1] + 2, shape[2] + 2
    keys = np.empty(n, np.int64)
    for i in range(n):
        keys[i] = ((index[i, 0] + 1) * ny + index[i, 1] + 1) * nx + index[i, 2] + 1
    linked = np.full((n, 26), -1, np.int32)
    for k in range(13):
        step = (OFFSETS[k, 0] * ny + OFFSETS[k, 1]) * nx + OFFSETS[k, 2]
        finger = 0
        for i in range(n):
            wanted = keys[i] + step
            while keys[finger] < wanted:
                finger += 1
            if keys[finger] == wanted:
                linked[i, k] = finger
                linked[finger, 25 - k] = i
    for i in range(n):
        for axis in range(3):
            if index[i, axis] == 0 or index[i, axis] == shape[axis] - 1:
                for k in range(26):
                    at = index[i, axis] + OFFSETS[k, axis]
                    if at < 0 or at >= shape[axis]:
                        linked[i, k] = -2
    return linked


@numba.njit(cache=True, nogil=True)
def distance_to_background(linked, spacing):  # type: ignore[no-untyped-def]  # pragma: no cover – compiled
    """Return (n,) float64, mm: how far each voxel's centre is from the nearest background voxel's; what is outside is none.

    Vector propagation (Danielsson 1980) along the list, forth and back until nothing changes.
    """
    n = len(linked)
    nearest = np.zeros((n, 3), np.int32)
    squared = np.full(n, np.inf)
    weight = spacing * spacing
    for i in range(n):
        for k in range(26):
            if linked[i, k] == -1:
                d = 0.0
                for a in range(3):
                    d += OFFSETS[k, a] * OFFSETS[k, a] * weight[a]
                if d < squared[i]:
                    squared[i] = d
                    for a in range(3):
                        nearest[i, a] = OFFSETS[k, a]
    for _ in range(64):
        changed = False
        for turn in range(2):
            for step in range(n):
                i = step if turn == 0 else n - 1 - step
                for k in range(26):
                    j = linked[i, k]
                    if j < 0 or squared[j] == np.inf:
                        continue
                    d = 0.0
                    for a in range(3):
                        at = OFFSETS[k, a] + nearest[j, a]
                        d += at * at * weight[a]
                    if d < squared[i] - 1e-9:
                        squared[i] = d
                        changed = True
                        for a in range(3):
                            nearest[i, a] = OFFSETS[k, a] + nearest[j, a]
        if not changed:
            break
    return np.sqrt(squared)


@numba.njit(cache=True, nogil=True)
def voxel_graph(linked, spacing, cost):  # type: ignore[no-untyped-def]  # pragma: no cover – compiled
    """Return the neighbourhood as a CSR matrix (data, indices, indptr); an edge weighs its length times its ends' mean cost."""
    n = len(linked)
    indptr = np.zeros(n + 1, np.int32)
    for i in range(n):
        found = 0
        for k in range(26):
            found += linked[i, k] >= 0
        indptr[i + 1] = indptr[i] + found
    indices = np.empty(indptr[n], np.int32)
    data = np.empty(indptr[n], np.float64)
    length = np.empty(26)
    for k in range(26):
        d = 0.0
        for a in range(3):
            d += (OFFSETS[k, a] * spacing[a]) ** 2
        length[k] = np.sqrt(d)
    for i in range(n):
        at = indptr[i]
        for k in range(26):
            j = linked[i, k]
            if j >= 0:
                indices[at] = j
                data[at] = length[k] * 0.5 * (cost[i] + cost[j])
                at += 1
    return data, indices, indptr


@numba.njit(cache=True, nogil=True)
def lengths_along(order, predecessor, position):  # type: ignore[no-untyped-def]  # pragma: no cover – compiled
    """Return (n,) float64, mm: the length of the way that leads to each voxel; `order` has predecessors first."""
    length = np.zeros(len(position))
    for i in order:
        p = predecessor[i]
        if p >= 0:
            d = 0.0
            for a in range(3):
                d += (position[i, a] - position[p, a]) ** 2
            length[i] = length[p] + np.sqrt(d)
    return length


@numba.njit(cache=True, nogil=True)
def trace_branches(farthest, predecessor, linked, position, reach):  # type: ignore[no-untyped-def]  # pragma: no cover – compiled
    """Find the branches of every piece's centreline (TEASAR: Sato et al. 2000).

    From the voxel that is farthest away and not yet covered, follow the way back until it meets what there is; then cover all
    that is within `reach` of the new branch. Coverage spreads through the mask, so it never jumps to a vessel alongside.

    Returns
    -------
    (vertices, starts) : int32
        Voxels of the branches one after the other, each from its tip to the voxel where it meets another branch (included), or
        to the root; and where each begins.
    """
    n = len(linked)
    covered = np.zeros(n, np.bool_)
    on_line = np.zeros(n, np.bool_)
    vertices = np.empty(4 * n + 16, np.int32)
    starts = [np.int64(0)]
    queue = np.empty(n, np.int32)
    source = np.empty(n, np.int32)
    last_branch = np.full(n, -1, np.int32)
    wide = np.empty(n)
    widest = reach.max()
    count = 0
    branch = 0
    for tip in farthest:
        if covered[tip]:
            continue
        first = count
        at = tip
        while at >= 0:
            vertices[count] = at
            count += 1
            if on_line[at]:
                break
            at = predecessor[at]
        starts.append(np.int64(count))
        # At a ragged end the way leaves the middle, where it is shallow: the vessel there is as wide as just before.
        for v in range(first, count):
            i = vertices[v]
            near = reach[i]
            for w in range(v, count):
                j = vertices[w]
                d = 0.0
                for a in range(3):
                    d += (position[i, a] - position[j, a]) ** 2
                if d > widest * widest:
                    break
                if d <= reach[j] * reach[j] and reach[j] > near:
                    near = reach[j]
            # A blunt end has corners all around, up to a diameter from the one that the way leads to.
            d = 0.0
            for a in range(3):
                d += (position[i, a] - position[tip, a]) ** 2
            wide[i] = near if d > 2.25 * near * near else 1.35 * near
        head = 0
        tail = 0
        for v in range(first, count):
            i = vertices[v]
            on_line[i] = True
            covered[i] = True
            last_branch[i] = branch
            source[i] = i
            queue[tail] = i
            tail += 1
        while head < tail:
            i = queue[head]
            head += 1
            s = source[i]
            for k in range(26):
                j = linked[i, k]
                if j < 0 or last_branch[j] == branch:
                    continue
                d = 0.0
                for a in range(3):
                    d += (position[j, a] - position[s, a]) ** 2
                if d <= wide[s] * wide[s]:
                    last_branch[j] = branch
                    covered[j] = True
                    source[j] = s
                    queue[tail] = j
                    tail += 1
        branch += 1
    return vertices[:count], np.array(starts)


@numba.njit(cache=True, nogil=True)
def components(linked):  # type: ignore[no-untyped-def]  # pragma: no cover – compiled
    """Return (n,) int64: the number of each voxel's 26-connected piece, from 0, in the order of their first voxels."""
    n = len(linked)
    number = np.full(n, -1, np.int64)
    stack = np.empty(n, np.int32)
    count = 0
    for start in range(n):
        if number[start] >= 0:
            continue
        number[start] = count
        stack[0] = start
        top = 1
        while top:
            top -= 1
            i = stack[top]
            for k in range(26):
                j = linked[i, k]
                if j >= 0 and number[j] < 0:
                    number[j] = count
                    stack[top] = j
                    top += 1
        count += 1
    return number


@numba.njit(cache=True, nogil=True)
def warp_labels(out, source, keep, matrix, offset, field, field_matrix, field_offset):  # type: ignore[no-untyped-def]  # pragma: no cover – compiled
    """Paint the background of `out` with what `source` has where a map leads.

    Parameters
    ----------
    out, source : unsigned, (z, y, x)
        Only voxels of `out` that are 0 are painted.
    keep : bool, (numbers,)
        Which of the source's labels come along.
    matrix, offset : float64, (3, 3) and (3,)
        Affine map from index in `out` to index in `source`.
    field : float32, (3, a, b, c)
        Added to the mapped index; trilinear between its nodes, held at the border.
    field_matrix, field_offset : float64, (3,) and (3,)
        Index in `out` to index in `field`, per axis.

    Returns
    -------
    painted : int64
    """
    nz, ny, nx = out.shape
    sz, sy, sx = source.shape
    fa, fb, fc = field.shape[1:]
    row = np.empty((fc, 3))  # the field along x, at this z and y
    painted = 0
    for z in range(nz):
        az = min(max(field_matrix[0] * z + field_offset[0], 0.0), fa - 1.000001)
        i = int(az)
        wz = az - i
        for y in range(ny):
            ay = min(max(field_matrix[1] * y + field_offset[1], 0.0), fb - 1.000001)
            j = int(ay)
            wy = ay - j
            for k in range(fc):
                for a in range(3):
                    front = (1 - wy) * field[a, i, j, k] + wy * field[a, i, j + 1, k]
                    back = (1 - wy) * field[a, i + 1, j, k] + wy * field[a, i + 1, j + 1, k]
                    row[k, a] = (1 - wz) * front + wz * back
            for x in range(nx):
                if out[z, y, x] != 0:
                    continue
                ax = min(max(field_matrix[2] * x + field_offset[2], 0.0), fc - 1.000001)
                k = int(ax)
                w = ax - k
                pz = matrix[0, 0] * z + matrix[0, 1] * y + matrix[0, 2] * x + offset[0]
                py = matrix[1, 0] * z + matrix[1, 1] * y + matrix[1, 2] * x + offset[1]
                px = matrix[2, 0] * z + matrix[2, 1] * y + matrix[2, 2] * x + offset[2]
                iz = int(np.floor(pz + (1 - w) * row[k, 0] + w * row[k + 1, 0] + 0.5))
                iy = int(np.floor(py + (1 - w) * row[k, 1] + w * row[k + 1, 1] + 0.5))
                ix = int(np.floor(px + (1 - w) * row[k, 2] + w * row[k + 1, 2] + 0.5))
                if iz < 0 or iy < 0 or ix < 0 or iz >= sz or iy >= sy or ix >= sx:
                    continue
                number = source[iz, iy, ix]
                if keep[number]:
                    out[z, y, x] = number
                    painted += 1
    return painted


@numba.njit(cache=True, nogil=True)
def paint_balls(out, centres, radii, spacing, number):  # type: ignore[no-untyped-def]  # pragma: no cover – compiled
    """Paint balls (box millimetres) into the background; return how many voxels were painted."""
    painted = 0
    for n in range(len(centres)):
        r = radii[n]
        low = np.empty(3, np.int64)
        high = np.empty(3, np.int64)
        for a in range(3):
            low[a] = max(0, int(np.floor((centres[n, a] - r) / spacing[a])))
            high[a] = min(out.shape[a] - 1, int(np.ceil((centres[n, a] + r) / spacing[a])))
        for z in range(low[0], high[0] + 1):
            for y in range(low[1], high[1] + 1):
                for x in range(low[2], high[2] + 1):
                    d = (
                        (z * spacing[0] - centres[n, 0]) ** 2
                        + (y * spacing[1] - centres[n, 1]) ** 2
                        + (x * spacing[2] - centres[n, 2]) ** 2
                    )
                    if d <= r * r and out[z, y, x] == 0:
                        out[z, y, x] = number
                        painted += 1
    return painted
