"""Surface nets of all labels in one pass: closed, oriented 2-manifolds of quadrilaterals, one vertex a boundary cell.

A *cell* lies between eight voxel centres. Wherever its corners differ in whether they belong to a label, that label's surface
passes through it, and gets one vertex for each closed cycle in which it does (dual marching cubes: Nielson, Visualization 2004;
surface nets: Gibson, MICCAI 1998). Every pair of neighbouring voxels of which one belongs to the label gives one quadrilateral
among the four cells around it. Where label voxels touch by an edge only, they are joined, for thin oblique vessels: on a cell's
face with two label voxels at opposite corners the surface passes twice, and there each pass gets a vertex of its own, without
which two sheets would share an edge (the non-manifold case of dual methods; Wenger, Isosurfaces, 2013, ch. 3). So every edge
of a surface has exactly two faces, whatever the mask.

Cells are found by comparing whole rows, some thirty voxels an instruction; only cells on a boundary cost more.
Positions are in voxel indices (x, y, z); voxel centres lie on whole numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

#: Corner c of a cell lies at (x, y, z) = (c & 1, c >> 1 & 1, c >> 2); edges 0–3 lead along x, 4–7 along y, 8–11 along z.
_EDGES = tuple((a, a | step) for step in (1, 2, 4) for a in range(8) if not a & step)
#: Corners of the faces at the lower end of x, y and z, and of those at the upper end, in cyclic order.
_FACES = tuple(
    tuple(side * axis | corner for corner in (0, first, first | second, second))
    for side in (0, 1)
    for axis, first, second in ((1, 2, 4), (2, 4, 1), (4, 1, 2))
)
_NONE = 255


class Tables(NamedTuple):
    """What a cell does, by its configuration: bit c is set where corner c belongs to the label.

    Parameters
    ----------
    cycles : uint8, (256,)
        How often the surface passes.
    cycle_of_edge : uint8, (256, 12)
        To which passage each crossed edge belongs.
    place : float32, (256, 4, 3)
        Mean of each passage's crossings, (x, y, z) in the cell.
    degree : uint8, (256, 4)
        Neighbours of each passage's vertex.
    segments : uint8, (256, 6)
        How often the surface crosses each face: 0, 1, or 2.
    segment_edges : uint8, (256, 6, 2, 2)
        The two edges that each crossing of a face joins.
    slot_of_edge : uint8, (256, 6, 12)
        Which crossing of a face an edge belongs to.
    quads : uint8, (256,)
        Bit k is set where the edge from corner 0 along axis k is crossed.
    """

    cycles: NDArray[np.uint8]
    cycle_of_edge: NDArray[np.uint8]
    place: NDArray[np.float32]
    degree: NDArray[np.uint8]
    segments: NDArray[np.uint8]
    segment_edges: NDArray[np.uint8]
    slot_of_edge: NDArray[np.uint8]
    quads: NDArray[np.uint8]


class Cells(NamedTuple):
    """Every (cell, label) whose surface passes through the cell, in raster order; those of one cell follow one another.

    Parameters
    ----------
    x, y : int32, (N,)
        Place of the cell in its slab, counted from outside the array.
    label, configuration : uint8, (N,)
        The label, and which corners of the cell belong to it.
    serial : int32, (N,)
        Number of the cell.
    first : int32, (N,)
        Its first vertex, counted within the label.
    slabs : int64, (nz + 2,)
        Where each slab's begin.
    """

    x: NDArray[np.int32]
    y: NDArray[np.int32]
    label: NDArray[np.uint8]
    configuration: NDArray[np.uint8]
    serial: NDArray[np.int32]
    first: NDArray[np.int32]
    slabs: NDArray[np.int64]


class Nets(NamedTuple):
    """Surfaces of all labels, one after the other.

    Parameters
    ----------
    places : float32, (V, 3)
        Vertices (x, y, z) in voxel indices.
    corners : float32, (V, 3)
        Corners of the voxels' boundary (centres of the cells) that belong to the vertices.
    link_start : int64, (V + 1,); links : int32, (L,)
        Neighbours of vertex v: `links[link_start[v]:link_start[v + 1]]`, counted within its label.
    quads : int32, (Q, 4); triangles : int32, (T, 3)
        Corners, counted within their label, counter-clockwise from outside in right-handed (x, y, z).
    beyond : uint8, (Q,)
        The label on a quadrilateral's other side.
    vertex_start, quad_start, triangle_start : int64, (256 + 1,)
        Where each label's begin.
    voxels : int64, (256,)
        How many voxels each label has.
    cells : Cells
        Where they come from.
    """

    places: NDArray[np.float32]
    corners: NDArray[np.float32]
    link_start: NDArray[np.int64]
    links: NDArray[np.int32]
    quads: NDArray[np.int32]
    triangles: NDArray[np.int32]
    beyond: NDArray[np.uint8]
    vertex_start: NDArray[np.int64]
    quad_start: NDArray[np.int64]
    triangle_start: NDArray[np.int64]
    voxels: NDArray[np.int64]
    cells: Cells


def extract(
    array: NDArray[np.unsignedinteger], numbers: NDArray[np.uint8] | None = None, room: Callable[[int], None] = lambda _: None
) -> Nets:
    """Find the surfaces of every label.

    Parameters
    ----------
    array : ndarray of unsigned integers, shape (z, y, x)
        Any strides; read only.
    numbers : ndarray of uint8, optional
        What each value counts as, 0 to leave it out; itself by default, where values are below 256.
    room : callable, optional
        Told how many vertices there will be before memory is taken for them; may raise.

    Returns
    -------
    Nets
        Outside the array everything is background, so surfaces are closed there.
    """
    table = np.arange(256, dtype=np.uint8) if numbers is None else numbers
    tables = cell_tables()
    found, counts, voxels = _find_cells(array, table, numbers is not None, tables)
    cells = Cells(*found)
    starts = [np.concatenate(([0], np.cumsum(counts[:, k]))) for k in range(counts.shape[1])]
    vertices, links, quads, extra = starts[:4]
    room(int(vertices[-1]))
    places, corners = np.empty((vertices[-1], 3), np.float32), np.empty((vertices[-1], 3), np.float32)
    link_start = np.empty(vertices[-1] + 1, np.int64)
    link_start[-1] = links[-1]
    neighbours = np.empty(links[-1], np.int32)
    faces, beyond = np.empty((quads[-1], 4), np.int32), np.empty(quads[-1], np.uint8)
    triangles = np.empty((extra[-1], 3), np.int32)
    quads_made, triangles_made = _fill(
        cells, array.shape, tables, vertices, links, quads, extra, int(counts[:, 4].sum()),
        places, corners, link_start, neighbours, faces, beyond, triangles,
    )  # fmt: skip
    if triangles_made.any():  # room was kept for more
        beyond = _close_gaps(beyond, quads, quads_made)[0]
        faces, quads = _close_gaps(faces, quads, quads_made)
        triangles, extra = _close_gaps(triangles, extra, triangles_made)
    return Nets(places, corners, link_start, neighbours, faces, triangles, beyond, vertices, quads, extra, voxels, cells)


@lru_cache(maxsize=1)
def cell_tables() -> Tables:
    """Work out what every configuration of a cell does."""
    tables = Tables(
        np.zeros(256, np.uint8),
        np.full((256, 12), _NONE, np.uint8),
        np.zeros((256, 4, 3), np.float32),
        np.zeros((256, 4), np.uint8),
        np.zeros((256, 6), np.uint8),
        np.full((256, 6, 2, 2), _NONE, np.uint8),
        np.full((256, 6, 12), _NONE, np.uint8),
        np.zeros(256, np.uint8),
    )
    number = {frozenset(ends): n for n, ends in enumerate(_EDGES)}
    middle = np.array([[((a >> k & 1) + (b >> k & 1)) / 2 for k in range(3)] for a, b in _EDGES])
    for configuration in range(256):
        inside = [bool(configuration >> corner & 1) for corner in range(8)]
        crossed = [edge for edge, (a, b) in enumerate(_EDGES) if inside[a] != inside[b]]
        group = {edge: {edge} for edge in crossed}
        for face, corners in enumerate(_FACES):
            for slot, segment in enumerate(_segments(corners, inside, number)):
                tables.segments[configuration, face] += 1
                tables.segment_edges[configuration, face, slot] = segment
                tables.slot_of_edge[configuration, face, list(segment)] = slot
                merged = group[segment[0]] | group[segment[1]]
                for edge in merged:
                    group[edge] = merged
        cycles = sorted({min(members): sorted(members) for members in group.values()}.values())
        tables.cycles[configuration] = len(cycles)
        for cycle, members in enumerate(cycles):
            tables.cycle_of_edge[configuration, members] = cycle
            tables.place[configuration, cycle] = middle[members].mean(axis=0)
            tables.degree[configuration, cycle] = len(members)  # a cycle has as many segments as edges
        tables.quads[configuration] = sum(1 << k for k, edge in enumerate((0, 4, 8)) if edge in crossed)
    return tables


def _segments(corners: tuple[int, ...], inside: list[bool], number: dict[frozenset[int], int]) -> list[tuple[int, int]]:
    """Return the pairs of edges between which the surface crosses a face."""
    edges = [number[frozenset((corners[k], corners[(k + 1) % 4]))] for k in range(4)]
    crossed = [inside[corners[k]] != inside[corners[(k + 1) % 4]] for k in range(4)]
    if not any(crossed):
        return []
    if not all(crossed):
        first, second = (edge for edge, cross in zip(edges, crossed, strict=True) if cross)
        return [(first, second)]
    # Two opposite corners are inside and joined: the surface cuts the other two off. Seen from the neighbouring cell the same
    # corner must come first, so they are ordered by their place on the face, which is the same from both sides.
    outside = sorted((k for k in range(4) if not inside[corners[k]]), key=lambda k: corners[k])
    return [(edges[k - 1], edges[k]) for k in outside]


def _close_gaps(
    rows: NDArray[Any], start: NDArray[np.int64], made: NDArray[np.int64]
) -> tuple[NDArray[Any], NDArray[np.int64]]:
    kept = np.concatenate([rows[a : a + n] for a, n in zip(start, made, strict=False)])
    return kept, np.concatenate(([0], np.cumsum(made)))


@numba.njit(cache=True, nogil=True)
def _grow(array):
    larger = np.empty(2 * array.size, array.dtype)
    larger[: array.size] = array
    return larger


@numba.njit(cache=True, nogil=True)
def _find_cells(array, table, use_table, tables):
    """List every (cell, label) that has vertices, in raster order, and count what they will need.

    Returns
    -------
    fields of Cells, counts (256, 5: vertices, links, quads, triangles, cells with middles), voxels (256,)
    """
    cycles, degree, segments, quads = tables.cycles, tables.degree, tables.segments, tables.quads
    nz, ny, nx = array.shape
    width = (nx + 2 + 7) // 8 * 8 + 8
    lower, upper = np.zeros((ny + 2, width), np.uint8), np.zeros((ny + 2, width), np.uint8)
    differs, active = np.zeros(width, np.uint8), np.zeros(width, np.uint8)
    words = active.view(np.uint64)
    xs, ys = np.empty(1 << 16, np.int32), np.empty(1 << 16, np.int32)
    labels, configurations = np.empty(1 << 16, np.uint8), np.empty(1 << 16, np.uint8)
    serials = np.empty(1 << 16, np.int32)
    starts = np.zeros(nz + 2, np.int64)
    counts, voxels = np.zeros((256, 5), np.int64), np.zeros(256, np.int64)
    found, serial = 0, 0
    corner = np.empty(8, np.uint8)
    for z in range(nz + 1):
        starts[z] = found
        lower, upper = upper, lower
        if z == nz:
            upper[:] = 0
        else:
            for y in range(ny):
                row, source = upper[y + 1], array[z, y]
                if use_table:
                    for x in range(nx):
                        row[x + 1] = table[source[x]]
                else:
                    for x in range(nx):
                        row[x + 1] = np.uint8(source[x])
            flat = upper.reshape(-1).view(np.uint64)
            for i in range(flat.size):
                word = flat[i]
                if word == 0:
                    continue
                first = word & np.uint64(255)
                if word == first * np.uint64(0x0101010101010101):
                    voxels[first] += 8
                else:
                    for k in range(8):
                        voxels[(word >> np.uint64(8 * k)) & np.uint64(255)] += 1
        for y in range(ny + 1):
            a, b, c, d = lower[y], lower[y + 1], upper[y], upper[y + 1]
            some = np.uint8(0)
            for x in range(nx + 2):
                differs[x] = (a[x] ^ b[x]) | (a[x] ^ c[x]) | (a[x] ^ d[x])
            for x in range(nx + 1):
                active[x] = differs[x] | differs[x + 1] | (a[x] ^ a[x + 1])
                some |= active[x]
            if some == 0:
                continue
            for i in range((nx + 1 + 7) // 8):
                if words[i] == 0:
                    continue
                for x in range(8 * i, min(8 * i + 8, nx + 1)):
                    if active[x] == 0:
                        continue
                    corner[0], corner[1], corner[2], corner[3] = a[x], a[x + 1], b[x], b[x + 1]
                    corner[4], corner[5], corner[6], corner[7] = c[x], c[x + 1], d[x], d[x + 1]
                    for k in range(8):
                        label = corner[k]
                        if label == 0:
                            continue
                        configuration, seen = 0, False
                        for other in range(8):
                            if corner[other] == label:
                                if other < k:
                                    seen = True
                                    break
                                configuration |= 1 << other
                        if seen:
                            continue
                        if found == xs.size:
                            xs, ys, serials = _grow(xs), _grow(ys), _grow(serials)
                            labels, configurations = _grow(labels), _grow(configurations)
                        xs[found], ys[found], labels[found], configurations[found] = x, y, label, configuration
                        serials[found] = serial
                        found += 1
                        n = cycles[configuration]
                        counts[label, 0] += n
                        for cycle in range(n):
                            counts[label, 1] += degree[configuration, cycle]
                        bits = quads[configuration]
                        counts[label, 2] += (bits & 1) + (bits >> 1 & 1) + (bits >> 2)
                        doubled = 0
                        for face in range(3):
                            doubled += segments[configuration, face] == 2
                        if doubled:
                            counts[label, 0] += 2 * doubled
                            counts[label, 1] += 4 * doubled
                            counts[label, 3] += 12 * doubled  # 2 vertices, 2 polygons each, 3 triangles at most for each
                            counts[label, 4] += 1
                    serial += 1
    starts[nz + 1] = found
    voxels[0] = 0
    first = np.zeros(found, np.int32)
    cells = (xs[:found], ys[:found], labels[:found], configurations[:found], serials[:found], first, starts)
    return cells, counts, voxels


@numba.njit(cache=True, nogil=True, inline="always")
def _entry(index, y, x, label, labels):
    """Return the entry of a label in a cell; it is there wherever it is asked for."""
    entry = index[y, x]
    while labels[entry] != label:
        entry += 1
    return entry


@numba.njit(cache=True, nogil=True)
def _fill(
    cells, shape, tables, vertex_start, links_start, quad_start, triangle_start, middles,
    places, corners, link_start, links, quads, beyond, triangles,
):  # fmt: skip
    """Make vertices, links and faces; see `Nets`."""
    xs, ys, labels, configurations, slabs = cells.x, cells.y, cells.label, cells.configuration, cells.slabs
    first = cells.first
    nz, ny, nx = shape
    below, here = np.zeros((ny + 1, nx + 1), np.int32), np.zeros((ny + 1, nx + 1), np.int32)
    middle_of = np.full(xs.size, -1, np.int32)
    middle = np.empty((middles, 3, 2), np.int32)
    used, linked = np.empty(places.shape[0], np.uint8), np.zeros(256, np.int64)
    made, quads_made, triangles_made = np.zeros(256, np.int64), np.zeros(256, np.int64), np.zeros(256, np.int64)
    middles_made = 0
    around, passed, polygon = np.empty(4, np.int32), np.empty(4, np.int64), np.empty(8, np.int32)
    corner_edges = np.array([[3, 2, 0, 1], [7, 5, 4, 6], [11, 10, 8, 9]])
    for z in range(nz + 1):
        below, here = here, below
        for e in range(slabs[z + 1] - 1, slabs[z] - 1, -1):  # backwards: the first of a cell's entries stays
            here[ys[e], xs[e]] = e
        for e in range(slabs[z], slabs[z + 1]):
            x, y, label, configuration = xs[e], ys[e], labels[e], configurations[e]
            start = vertex_start[label]
            first[e] = made[label]
            for cycle in range(tables.cycles[configuration]):
                v = start + made[label]
                made[label] += 1
                places[v, 0] = x - 1 + tables.place[configuration, cycle, 0]
                places[v, 1] = y - 1 + tables.place[configuration, cycle, 1]
                places[v, 2] = z - 1 + tables.place[configuration, cycle, 2]
                corners[v, 0], corners[v, 1], corners[v, 2] = x - 0.5, y - 0.5, z - 0.5
                used[v] = 0
                link_start[v] = links_start[label] + linked[label]
                linked[label] += tables.degree[configuration, cycle]
            for face in range(3):
                count = tables.segments[configuration, face]
                if count == 0:
                    continue
                if face == 0:
                    other = _entry(here, y, x - 1, label, labels)
                elif face == 1:
                    other = _entry(here, y - 1, x, label, labels)
                else:
                    other = _entry(below, y, x, label, labels)
                # From the neighbour the face lies at its upper end, its edges one step along the axis.
                for slot in range(count):
                    edge = tables.segment_edges[configuration, face, slot, 0]
                    own = first[e] + tables.cycle_of_edge[configuration, edge]
                    theirs = first[other] + tables.cycle_of_edge[configurations[other], _opposite(edge, face)]
                    if count == 1:
                        links[link_start[start + own] + used[start + own]] = theirs
                        links[link_start[start + theirs] + used[start + theirs]] = own
                    else:
                        v = start + made[label]
                        if middle_of[e] < 0:
                            middle_of[e] = middles_made
                            middles_made += 1
                        middle[middle_of[e], face, slot] = made[label]
                        second = tables.segment_edges[configuration, face, slot, 1]
                        for axis in range(3):
                            places[v, axis] = (_edge_middle(edge, axis) + _edge_middle(second, axis)) / 2
                        places[v, 0] += x - 1
                        places[v, 1] += y - 1
                        places[v, 2] += z - 1
                        corners[v, 0] = x - (1.0 if face == 0 else 0.5)
                        corners[v, 1] = y - (1.0 if face == 1 else 0.5)
                        corners[v, 2] = z - (1.0 if face == 2 else 0.5)
                        used[v] = 2
                        link_start[v] = links_start[label] + linked[label]
                        linked[label] += 2
                        links[link_start[v]], links[link_start[v] + 1] = own, theirs
                        links[link_start[start + own] + used[start + own]] = made[label]
                        links[link_start[start + theirs] + used[start + theirs]] = made[label]
                        made[label] += 1
                    used[start + own] += 1
                    used[start + theirs] += 1
            bits = tables.quads[configuration]
            for axis in range(3):
                if not bits >> axis & 1:
                    continue
                # The four cells around the edge, turning about its axis; the one at hand is the third.
                if axis == 0:
                    passed[0] = _entry(below, y - 1, x, label, labels)
                    passed[1] = _entry(below, y, x, label, labels)
                    passed[3] = _entry(here, y - 1, x, label, labels)
                    faces = (1, 2, 1, 2)
                elif axis == 1:
                    passed[0] = _entry(below, y, x - 1, label, labels)
                    passed[1] = _entry(here, y, x - 1, label, labels)
                    passed[3] = _entry(below, y, x, label, labels)
                    faces = (2, 0, 2, 0)
                else:
                    passed[0] = _entry(here, y - 1, x - 1, label, labels)
                    passed[1] = _entry(here, y - 1, x, label, labels)
                    passed[3] = _entry(here, y, x - 1, label, labels)
                    faces = (0, 1, 0, 1)
                passed[2] = e
                for k in range(4):
                    edge = corner_edges[axis, k]
                    around[k] = first[passed[k]] + tables.cycle_of_edge[configurations[passed[k]], edge]
                sides, at = 0, -1
                for k in range(4):
                    polygon[sides] = around[k]
                    sides += 1
                    # Between this cell and the next lies a lower face of the second (k = 0), third or fourth cell.
                    owner = 1 if k == 0 else 3 if k == 3 else 2
                    entry = passed[owner]
                    if middle_of[entry] >= 0 and tables.segments[configurations[entry], faces[k]] == 2:
                        slot = tables.slot_of_edge[configurations[entry], faces[k], corner_edges[axis, owner]]
                        at = sides
                        polygon[sides] = middle[middle_of[entry], faces[k], slot]
                        sides += 1
                outward = configuration & 1  # the voxel at the lower end is inside
                if at < 0:
                    q = quad_start[label] + quads_made[label]
                    quads_made[label] += 1
                    for k in range(4):
                        quads[q, k] = polygon[k] if outward else polygon[3 - k]
                    beyond[q] = 0
                    # The voxel on the other side is a corner of this cell, too.
                    there = 1 << axis
                    corner = (1 << there) if outward else 1
                    other = here[y, x]
                    while other < slabs[z + 1] and xs[other] == x and ys[other] == y:
                        if configurations[other] & corner:
                            beyond[q] = labels[other]
                        other += 1
                else:
                    for k in range(1, sides - 1):
                        t = triangle_start[label] + triangles_made[label]
                        triangles_made[label] += 1
                        second, third = polygon[(at + k) % sides], polygon[(at + k + 1) % sides]
                        triangles[t, 0] = polygon[at]
                        triangles[t, 1] = second if outward else third
                        triangles[t, 2] = third if outward else second
    return quads_made, triangles_made


@numba.njit(cache=True, nogil=True, inline="always")
def _opposite(edge, axis):
    """Return what an edge of a lower face is called in the cell below it."""
    # Within its direction an edge's number counts the two other axes, the lower one first.
    direction = edge // 4
    lower_axis = 0 if direction > 0 else 1
    return edge + (1 if axis == lower_axis else 2)


@numba.njit(cache=True, nogil=True, inline="always")
def _edge_middle(edge, axis):
    direction = edge // 4
    if axis == direction:
        return np.float32(0.5)
    lower_axis = 0 if direction > 0 else 1
    return np.float32(edge & 1) if axis == lower_axis else np.float32(edge >> 1 & 1)
