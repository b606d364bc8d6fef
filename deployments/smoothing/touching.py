"""Structures that touch, with one boundary between them.

Smoothed one by one they part, or overlap, by a tenth of a millimetre. Here each is smoothed by itself, with all that keeps its
volume; then, in every cell through which several surfaces pass together, their vertices move to their common mean, and what
that moved them by fades out over the neighbourhood. So shared boundaries are equal to the last bit. To stay so through
decimation they are one set of triangles with a structure on either side; lines where three regions meet stay as they are.
"""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

from deployments.smoothing.nets import Nets, cell_tables

#: Averagings by which a movement fades out.
_FADING = 12
#: Neighbours of a vertex that lies between two cells.
_BETWEEN_CELLS = 2


class Shared(NamedTuple):
    """Which vertices of which labels are one.

    Parameters
    ----------
    same : int64, (V,)
        First of the vertices (of all labels, counted through) that lie in the same place; itself where it is alone.
    knotted : bool, (V,)
        Where one label passes a place twice: it shares the place, but keeps vertices of its own.
    touches : bool, (V,)
        Whether it shares its place.
    """

    same: NDArray[np.int64]
    knotted: NDArray[np.bool_]
    touches: NDArray[np.bool_]


def shared_vertices(nets: Nets) -> Shared:
    """Find the vertices of different labels whose surfaces pass through a cell together."""
    count = int(nets.vertex_start[-1])
    same, knotted = np.arange(count), np.zeros(count, np.bool_)
    touches = np.zeros(count, np.bool_)
    _share(nets.cells, cell_tables(), nets.vertex_start, same, knotted, touches)
    # Polygons with a vertex between two cells (which has two neighbours, others have three and more) are one label's own, and
    # what it shares with the next ends there.
    degree = np.diff(nets.link_start)
    between = np.flatnonzero(degree == _BETWEEN_CELLS)
    label = np.searchsorted(nets.vertex_start, between, side="right") - 1
    for side in range(_BETWEEN_CELLS):
        knotted[nets.links[nets.link_start[between] + side] + nets.vertex_start[label]] = True
    together = np.zeros(count, np.bool_)
    together[same[knotted]] = True
    return Shared(same, together[same], touches)


def common_places(places_mm: NDArray[np.float32], shared: Shared) -> NDArray[np.float32]:
    """Return the means of the vertices that are one, shape (V, 3); others stay."""
    members = np.flatnonzero(shared.touches)
    _, group = np.unique(shared.same[members], return_inverse=True)
    counts = np.bincount(group)
    out = places_mm.copy()
    for axis in range(3):
        means = np.bincount(group, places_mm[members, axis].astype(np.float64)) / counts
        out[members, axis] = means[group].astype(np.float32)
    return out


def fade(
    movement: NDArray[np.float32], held: NDArray[np.bool_], start: NDArray[np.int32], links: NDArray[np.int32]
) -> NDArray[np.float32]:
    """Spread the movement of the held vertices over those around them, and let it fade out.

    Parameters
    ----------
    movement : float32, (V, 3)
        Of the held vertices; anything elsewhere.
    held : bool, (V,)
        Whose movement stays as it is.
    start, links
        The vertices' neighbours.

    Returns
    -------
    ndarray of float32, shape (V, 3)
    """
    out = np.where(held[:, None], movement, 0).astype(np.float32)
    _fade(out, held, start, links, _FADING)
    return out


@numba.njit(cache=True, nogil=True)
def _fade(values, held, start, links, steps):
    for step in range(steps):
        for k in range(values.shape[0]):
            v = k if step % 2 == 0 else values.shape[0] - 1 - k  # in place, so each way once
            if held[v]:
                continue
            x, y, z = np.float32(0), np.float32(0), np.float32(0)
            for i in range(start[v], start[v + 1]):
                x += values[links[i], 0]
                y += values[links[i], 1]
                z += values[links[i], 2]
            share = np.float32(1) / np.float32(start[v + 1] - start[v] + 1)
            values[v, 0], values[v, 1], values[v, 2] = x * share, y * share, z * share


@numba.njit(cache=True, nogil=True)
def _share(cells, tables, vertex_start, same, knotted, touches):
    """Fill `Shared`'s fields: passages of several labels through a cell are one where they cross an edge in common."""
    vertex, edges, owner, group = np.empty(32, np.int64), np.empty(32, np.int64), np.empty(32, np.int64), np.empty(32, np.int64)
    begin, total = 0, cells.serial.size
    while begin < total:
        end = begin + 1
        while end < total and cells.serial[end] == cells.serial[begin]:
            end += 1
        if end - begin > 1:
            count = 0
            for e in range(begin, end):
                configuration = cells.configuration[e]
                for cycle in range(tables.cycles[configuration]):
                    vertex[count] = vertex_start[cells.label[e]] + cells.first[e] + cycle
                    owner[count], group[count], edges[count] = e, count, 0
                    for edge in range(12):
                        if tables.cycle_of_edge[configuration, edge] == cycle:
                            edges[count] |= 1 << edge
                    count += 1
            for i in range(count):
                for j in range(i):
                    if edges[i] & edges[j] and group[i] != group[j]:
                        old, new = max(group[i], group[j]), min(group[i], group[j])
                        for k in range(count):
                            if group[k] == old:
                                group[k] = new
            for i in range(count):
                same[vertex[i]] = vertex[group[i]]
                for j in range(count):
                    if j != i and group[j] == group[i]:
                        touches[vertex[i]] = True
                        if owner[j] == owner[i]:
                            for k in range(count):
                                if group[k] == group[i]:
                                    knotted[vertex[k]] = True
        begin = end


class Complex(NamedTuple):
    """Triangles between two regions each, all labels together.

    Parameters
    ----------
    places_mm : float32, (V, 3)
    triangles : int32, (T, 3)
        Counter-clockwise from outside the first label.
    inside, beyond : uint8, (T,)
        The labels on the two sides; `beyond` is 0 where only the first label has this triangle.
    fixed : bool, (V,)
        Vertices where more than two regions meet.
    """

    places_mm: NDArray[np.float32]
    triangles: NDArray[np.int32]
    inside: NDArray[np.uint8]
    beyond: NDArray[np.uint8]
    fixed: NDArray[np.bool_]

    def surface(self, label: int) -> tuple[NDArray[np.float32], NDArray[np.int32], NDArray[np.int32]]:
        """Return one label's closed surface: vertices, triangles, and the vertices' numbers here."""
        own = np.concatenate([self.triangles[self.inside == label], self.triangles[self.beyond == label][:, ::-1]])
        used = np.zeros(len(self.places_mm), np.bool_)
        used[own] = True
        number = (np.cumsum(used) - 1).astype(np.int32)
        return self.places_mm[used], number[own], np.flatnonzero(used).astype(np.int32)


def join(places_mm: NDArray[np.float32], nets: Nets, shared: Shared, triangles_of: dict[int, NDArray[np.int32]]) -> Complex:
    """Put the surfaces of all labels together, each boundary between two of them once.

    Parameters
    ----------
    places_mm : float32, (V, 3)
        Of all labels' vertices.
    nets : Nets
        Their faces.
    shared : Shared
        Which vertices are one.
    triangles_of : dict
        Each label's quadrilaterals, cut: two triangles each, then the net's own triangles; counted within the label.
    """
    own = np.where(shared.knotted, np.arange(len(places_mm)), shared.same)
    parts, inside, beyond, frozen = [], [], [], []
    for label, triangles in triangles_of.items():
        start = nets.vertex_start[label]
        other = nets.beyond[nets.quad_start[label] : nets.quad_start[label + 1]]
        other = np.concatenate([np.repeat(other, 2), np.zeros(len(triangles) - 2 * len(other), np.uint8)])
        other = np.where(np.isin(other, list(triangles_of)), other, 0).astype(np.uint8)
        corners = triangles.astype(np.int64) + start
        # At a knot, and on polygons with a vertex between two cells, the neighbour's boundary is another one: both stay.
        tied = shared.knotted[corners].any(axis=1) | (~shared.touches[corners]).any(axis=1)
        pairs = tied.copy()
        halves = 2 * (nets.quad_start[label + 1] - nets.quad_start[label])
        pairs[:halves] = np.repeat(tied[:halves].reshape(-1, 2).any(axis=1), 2)
        kept = (other == 0) | pairs | (other > label)
        parts.append(own[corners[kept]])
        inside.append(np.full(int(kept.sum()), label, np.uint8))
        beyond.append(np.where(pairs, 0, other)[kept].astype(np.uint8))
        frozen.append((pairs & (other > 0))[kept])
    corners, side, back = np.concatenate(parts), np.concatenate(inside), np.concatenate(beyond)
    fixed = np.zeros(len(places_mm), np.bool_)
    fixed[corners[np.concatenate(frozen)]] = True
    fixed[own[shared.knotted]] = True
    pair = side.astype(np.int64) * 256 + back
    low, high = np.full(len(places_mm), 1 << 20), np.full(len(places_mm), -1)
    for k in range(3):
        np.minimum.at(low, corners[:, k], pair)
        np.maximum.at(high, corners[:, k], pair)
    fixed |= low < high
    used = np.zeros(len(places_mm), np.bool_)
    used[corners] = True
    number = (np.cumsum(used) - 1).astype(np.int32)
    return Complex(places_mm[used], number[corners], side, back, fixed[used])
