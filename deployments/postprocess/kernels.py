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
def link_neighbours(index, shape):
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
def distance_to_background(linked, spacing):
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
def voxel_graph(linked, spacing, cost):
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
def lengths_along(order, predecessor, position):
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
def trace_branches(farthest, predecessor, linked, position, reach):
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
def components(linked):
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
def warp_plane(plane, z, source, matrix, offset, field, scale, shift, painted):
    """Paint the background of one plane with what `source` has where a map leads.

    Parameters
    ----------
    plane : uint16, (y, x)
        Plane `z` of the painted volume. Only voxels that are 0 are painted.
    source : uint16, (z, y, x)
        0 where there is nothing to paint.
    matrix, offset : float64, (3, 3) and (3,)
        Affine map from index in the painted volume to index in `source`.
    field : float32, (3, a, b, c)
        Added to the mapped index; trilinear between its nodes, held at the border.
    scale, shift : float64, (3,) and (3,)
        From index in the painted volume to index in `field`, per axis.
    painted : bool, (65536,)
        Numbers that were painted become True.
    """
    ny, nx = plane.shape
    sz, sy, sx = source.shape
    fa, fb, fc = field.shape[1:]
    row = np.empty((fc, 3))  # the field along x, at this z and y
    start = np.empty(3)
    step = np.empty(3)
    az = min(max(scale[0] * z + shift[0], 0.0), fa - 1.000001)
    i = int(az)
    wz = az - i
    for y in range(ny):
        ay = min(max(scale[1] * y + shift[1], 0.0), fb - 1.000001)
        j = int(ay)
        wy = ay - j
        for k in range(fc):
            for a in range(3):
                front = (1 - wy) * field[a, i, j, k] + wy * field[a, i, j + 1, k]
                back = (1 - wy) * field[a, i + 1, j, k] + wy * field[a, i + 1, j + 1, k]
                row[k, a] = (1 - wz) * front + wz * back
        first = 0
        while first < nx:
            # Between two nodes, and outside of all, the map is straight along x.
            ax = scale[2] * first + shift[2]
            k = min(max(int(np.floor(ax)), -1), fc - 1)
            stop = nx
            if k < fc - 1:
                stop = min(nx, max(first + 1, int(np.ceil((k + 1 - shift[2]) / scale[2]))))
            for a in range(3):
                start[a] = matrix[a, 0] * z + matrix[a, 1] * y + matrix[a, 2] * first + offset[a] + 0.5
                step[a] = matrix[a, 2]
                if 0 <= k < fc - 1:
                    slope = row[k + 1, a] - row[k, a]
                    start[a] += row[k, a] + (ax - k) * slope
                    step[a] += slope * scale[2]
                else:
                    start[a] += row[max(k, 0), a]
            for x in range(first, stop):
                if plane[y, x] != 0:
                    continue
                n = x - first
                pz = start[0] + n * step[0]
                py = start[1] + n * step[1]
                px = start[2] + n * step[2]
                if pz < 0 or py < 0 or px < 0:
                    continue
                iz, iy, ix = int(pz), int(py), int(px)
                if iz >= sz or iy >= sy or ix >= sx:
                    continue
                number = source[iz, iy, ix]
                if number != 0:
                    plane[y, x] = number
                    painted[number] = True
            first = stop


@numba.njit(cache=True, nogil=True)
def paint_balls(inside, centres, radii, spacing):
    """Set what lies in one of the balls (box millimetres), in a boolean volume."""
    for n in range(len(centres)):
        r = radii[n]
        low = np.empty(3, np.int64)
        high = np.empty(3, np.int64)
        for a in range(3):
            low[a] = max(0, int(np.ceil((centres[n, a] - r) / spacing[a])))
            high[a] = min(inside.shape[a] - 1, int(np.floor((centres[n, a] + r) / spacing[a])))
        for z in range(low[0], high[0] + 1):
            dz = (z * spacing[0] - centres[n, 0]) ** 2
            for y in range(low[1], high[1] + 1):
                dy = dz + (y * spacing[1] - centres[n, 1]) ** 2
                for x in range(low[2], high[2] + 1):
                    if dy + (x * spacing[2] - centres[n, 2]) ** 2 <= r * r:
                        inside[z, y, x] = True


@numba.njit(cache=True, nogil=True)
def jacobian(matrix, field, spacing):
    """Return the determinant of the derivative of `matrix @ p + field(p)` at the nodes of a lattice.

    Central differences, one-sided at the border.
    """
    nz, ny, nx = field.shape[1:]
    out = np.empty((nz, ny, nx), np.float32)
    d = np.empty((3, 3))
    whole, half = 1.0 / spacing, 0.5 / spacing
    for z in range(nz):
        z0, z1 = max(z - 1, 0), min(z + 1, nz - 1)
        in_z = half if z1 - z0 == 2 else whole
        for y in range(ny):
            y0, y1 = max(y - 1, 0), min(y + 1, ny - 1)
            in_y = half if y1 - y0 == 2 else whole
            for x in range(nx):
                x0, x1 = max(x - 1, 0), min(x + 1, nx - 1)
                in_x = half if x1 - x0 == 2 else whole
                for a in range(3):
                    d[a, 0] = matrix[a, 0] + in_z * (field[a, z1, y, x] - field[a, z0, y, x])
                    d[a, 1] = matrix[a, 1] + in_y * (field[a, z, y1, x] - field[a, z, y0, x])
                    d[a, 2] = matrix[a, 2] + in_x * (field[a, z, y, x1] - field[a, z, y, x0])
                out[z, y, x] = (
                    d[0, 0] * (d[1, 1] * d[2, 2] - d[1, 2] * d[2, 1])
                    - d[0, 1] * (d[1, 0] * d[2, 2] - d[1, 2] * d[2, 0])
                    + d[0, 2] * (d[1, 0] * d[2, 1] - d[1, 1] * d[2, 0])
                )
    return out


@numba.njit(cache=True, nogil=True)
def carry_frames(tangent, first):
    """Return (k, 2, 3): two unit vectors across a curve at each of its k points, turning with it and not around it.

    From point to point by the smallest rotation (parallel transport, Bishop 1975; Rodrigues' formula). `tangent` (k, 3) are
    unit vectors, `first` (3,) is across the first one.
    """
    n = len(tangent)
    frames = np.empty((n, 2, 3))
    u = first.copy()
    w = np.empty(3)
    c = np.empty(3)
    cc = np.empty(3)
    for k in range(n):
        t = tangent[k]
        if k:
            s = tangent[k - 1]
            cos = s[0] * t[0] + s[1] * t[1] + s[2] * t[2]
            if cos >= -1 + 1e-9:
                _cross(s, t, w)
                _cross(w, u, c)
                _cross(w, c, cc)
                for a in range(3):
                    u[a] += c[a] + cc[a] / (1 + cos)
        along = u[0] * t[0] + u[1] * t[1] + u[2] * t[2]
        for a in range(3):
            u[a] -= along * t[a]
        length = np.sqrt(u[0] ** 2 + u[1] ** 2 + u[2] ** 2)
        for a in range(3):
            u[a] /= length
            frames[k, 0, a] = u[a]
        _cross(t, u, frames[k, 1])
    return frames


@numba.njit(cache=True, nogil=True)
def _cross(a, b, out):
    out[0] = a[1] * b[2] - a[2] * b[1]
    out[1] = a[2] * b[0] - a[0] * b[2]
    out[2] = a[0] * b[1] - a[1] * b[0]


@numba.njit(cache=True, nogil=True)
def cross_planes(position, line, tangent, frames, slope):
    """Find between which of a curve's planes each voxel lies, and where in them.

    Parameters
    ----------
    position : (n, 3) float64
        Voxels, mm.
    line, tangent : (k, 3) float64
        The curve's points, mm, and its unit directions there.
    frames : (k, 2, 3) float64
        Across it.
    slope : (k, 2) float64
        How far the plane leans forward per mm along each vector of the frame.

    Returns
    -------
    nearest : (n,) int64
        The plane behind the voxel; of several the one whose point is nearest; -1 where it lies between none.
    u, v : (n,) float64
        Coordinates in that plane, mm.
    """
    n, k = len(position), len(line)
    nearest = np.full(n, -1, np.int64)
    u, v = np.zeros(n), np.zeros(n)
    for i in range(n):
        best = np.inf
        was_ahead = False
        u_before = v_before = 0.0
        for j in range(k):
            along = u_here = v_here = 0.0
            for a in range(3):
                d = position[i, a] - line[j, a]
                along += d * tangent[j, a]
                u_here += d * frames[j, 0, a]
                v_here += d * frames[j, 1, a]
            ahead = along - u_here * slope[j, 0] - v_here * slope[j, 1] >= 0
            if was_ahead and not ahead:
                off = u_before * u_before + v_before * v_before
                if off < best:
                    best = off
                    nearest[i], u[i], v[i] = j - 1, u_before, v_before
            was_ahead, u_before, v_before = ahead, u_here, v_here
    return nearest, u, v
