"""Centrelines of thin structures: from a list of voxels to branches with positions and radii.

Not by thinning: thinning of ragged ends makes tunnels and loops without ends, and the ends are what a repair needs. Instead the
ways from each piece's far end through the middle of the vessel are followed (TEASAR, Sato et al. 2000), which gives one tree a
piece whatever its surface looks like. Positions are then moved to the middle of their cross-sections, to less than a voxel.

Positions are "box millimetres": array index (z, y, x) times spacing.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import cKDTree

from deployments.postprocess import kernels
from deployments.postprocess.graphs import Graph, GraphBackend, pick_backend

#: How much the middle of a vessel is preferred: the cost of a voxel is its depth to this power.
_CENTRING = -4.0
#: A branch is one where it leaves this many radii of the line, and this many voxel widths more.
_REACH, _REACH_VOXELS = 1.25, 1.5
#: Corners of one ragged end: chains at most so many radii long and so many thick, whose tips are at most so many radii apart.
_FINGER, _THIN, _FACE = 2.5, 0.55, 2.4


@dataclass(frozen=True)
class Voxels:
    """The voxels of some labels, as a list.

    Parameters
    ----------
    index : (n, 3) int32
        z, y, x, in raster order.
    linked : (n, 26) int32
        See `kernels.link_neighbours`.
    spacing_mm : (3,) float64
        z, y, x.
    piece : (n,) int32
        Number of the 26-connected piece, from 0.
    """

    index: NDArray[np.int32]
    linked: NDArray[np.int32]
    spacing_mm: NDArray[np.float64]
    shape: tuple[int, int, int]
    piece: NDArray[np.int64]

    @cached_property
    def position_mm(self) -> NDArray[np.float64]:
        """Box millimetres of the centres."""
        return np.asarray(self.index * self.spacing_mm, np.float64)

    @cached_property
    def depth_mm(self) -> NDArray[np.float64]:
        """Distance to the nearest background voxel's centre; where there is none, the size of the volume."""
        depth = np.asarray(kernels.distance_to_background(self.linked, self.spacing_mm))
        size = float((np.array(self.shape) * self.spacing_mm).max())
        return np.asarray(np.minimum(depth, size), np.float64)

    @cached_property
    def pieces(self) -> int:
        """How many pieces there are."""
        return int(self.piece.max()) + 1 if len(self.piece) else 0

    @cached_property
    def volumes_mm3(self) -> NDArray[np.float64]:
        """Volume of each piece."""
        return np.asarray(np.bincount(self.piece, minlength=self.pieces) * float(np.prod(self.spacing_mm)), np.float64)


def find_voxels(array: NDArray[np.unsignedinteger], numbers: tuple[int, ...], spacing_mm: tuple[float, ...]) -> Voxels:
    """List the voxels that have one of the numbers.

    Parameters
    ----------
    array : (z, y, x)
        Only looked at, plane by plane: no copy of it is made.
    """
    wanted = np.zeros(int(np.iinfo(array.dtype).max) + 1, bool) if array.dtype.itemsize <= 2 else None
    if wanted is not None:
        wanted[list(numbers)] = True
    parts = []
    for z, plane in enumerate(array):
        yx = np.argwhere(wanted[plane] if wanted is not None else np.isin(plane, numbers))
        if len(yx):
            parts.append(np.column_stack([np.full(len(yx), z, np.int32), yx.astype(np.int32)]))
    index = np.ascontiguousarray(np.concatenate(parts) if parts else np.empty((0, 3), np.int32))
    spacing = np.asarray(spacing_mm, np.float64)
    linked = kernels.link_neighbours(index, np.array(array.shape)) if len(index) else np.empty((0, 26), np.int32)
    piece = np.asarray(kernels.components(linked)) if len(index) else np.empty(0, np.int64)
    z, y, x = array.shape
    return Voxels(index, linked, spacing, (z, y, x), piece)


@dataclass(frozen=True)
class Centrelines:
    """The centrelines of some pieces.

    Parameters
    ----------
    voxel : (v,) int64
        Which voxel of the list each vertex is.
    position_mm : (v, 3)
        Box millimetres, smoothed and centred.
    radius_mm : (v,)
        Of a round vessel of the same cross-section.
    piece : (v,)
        As in `Voxels`.
    chains : list of int arrays
        Vertices of each stretch between two nodes, both included; nodes are ends and forks.
    degree : (v,)
        How many chains end at a vertex; 0 inside of chains. A piece of a single vertex has no chain.
    """

    voxel: NDArray[np.int64]
    position_mm: NDArray[np.float64]
    radius_mm: NDArray[np.float64]
    piece: NDArray[np.int64]
    chains: list[NDArray[np.int64]]
    degree: NDArray[np.int64]

    @cached_property
    def steps_mm(self) -> list[NDArray[np.float64]]:
        """Arc length along each chain, from 0."""
        return [_arc(self.position_mm[chain]) for chain in self.chains]

    @cached_property
    def chains_at(self) -> dict[int, list[int]]:
        """Chains by the nodes that they end at."""
        found: dict[int, list[int]] = {}
        for number, chain in enumerate(self.chains):
            for node in {int(chain[0]), int(chain[-1])}:
                found.setdefault(node, []).append(number)
        return found


def _arc(line: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(line, axis=0), axis=1))])


def trace(voxels: Voxels, pieces: NDArray[np.int64] | None = None, backend: GraphBackend | None = None) -> Centrelines:
    """Find the centrelines.

    Parameters
    ----------
    voxels : Voxels
    pieces : (k,) int, optional
        Which pieces; all if not given.
    backend : GraphBackend, optional
        Who finds the shortest paths; picked by size and device if not given.

    Returns
    -------
    Centrelines
        A tree a piece; of a ring in a vessel (an anastomosis) the thinnest place is left open.
    """
    wanted = np.zeros(voxels.pieces, bool)
    wanted[np.arange(voxels.pieces) if pieces is None else pieces] = True
    taken = wanted[voxels.piece] if len(voxels.piece) else np.empty(0, bool)
    if not taken.any():
        nothing = np.empty(0, np.int64)
        return Centrelines(nothing, np.empty((0, 3)), np.empty(0), nothing, [], nothing)
    depth, position = voxels.depth_mm, voxels.position_mm
    # The powers of depths in mm would make thick vessels free; relative to the piece's deepest, numbers stay near 1.
    deepest = np.zeros(voxels.pieces)
    np.maximum.at(deepest, voxels.piece, depth)
    cost = (depth / deepest[voxels.piece]) ** _CENTRING
    graph = Graph(*kernels.voxel_graph(voxels.linked, voxels.spacing_mm, cost))
    backend = backend or pick_backend(graph.nodes)

    def farthest(sources: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Voxels of the wanted pieces, the farthest from their source along the middle first; and all predecessors."""
        distance, predecessor = backend.shortest_paths(graph, sources)
        length = kernels.lengths_along(np.argsort(distance, kind="stable"), predecessor, position)
        length[~taken] = -1.0
        order = np.argsort(-length, kind="stable")
        return order[length[order] >= 0], predecessor

    first = _first_of_each(voxels.piece, np.argsort(-depth, kind="stable"), wanted)
    order, _ = farthest(first)
    root = _first_of_each(voxels.piece, order, wanted)
    order, predecessor = farthest(root)
    reach = _REACH * depth + _REACH_VOXELS * float(np.mean(voxels.spacing_mm))
    flat, starts = kernels.trace_branches(order, predecessor, voxels.linked, position, reach)
    return _assemble(voxels, taken, np.asarray(flat, np.int64), np.asarray(starts))


def _first_of_each(piece: NDArray[np.int64], order: NDArray[np.int64], wanted: NDArray[np.bool_]) -> NDArray[np.int64]:
    """The first voxel of each wanted piece in an order."""
    numbers, first = np.unique(piece[order], return_index=True)
    return order[first[wanted[numbers]]]


def _assemble(voxels: Voxels, taken: NDArray[np.bool_], flat: NDArray[np.int64], starts: NDArray[np.int64]) -> Centrelines:
    """Cut branches into chains at forks, centre them, and measure radii."""
    names, vertex = np.unique(flat, return_inverse=True)
    branches = [vertex[a:b] for a, b in itertools.pairwise(starts)]
    degree = np.zeros(len(names), np.int64)
    for branch in branches:
        for end in (branch[0], branch[-1]):
            if len(branch) > 1:
                degree[end] += 1
    is_node = degree > 0
    chains: list[NDArray[np.int64]] = []
    for branch in branches:
        cuts = [0, *(np.flatnonzero(is_node[branch[1:-1]]) + 1), len(branch) - 1]
        chains += [branch[a : b + 1] for a, b in itertools.pairwise(cuts) if b > a]
    chains = _without_fingers(chains, voxels.position_mm[names], voxels.depth_mm[names])
    names, chains, alone = _renumber(names, chains, voxels.piece)
    degree = np.zeros(len(names), np.int64)
    for chain in chains:
        degree[chain[0]] += 1
        degree[chain[-1]] += 1

    # Every voxel counts for the vertex that it is nearest to: sums along a chain give cross-sections and their centres.
    raw = voxels.position_mm[names]
    own = voxels.position_mm[taken]
    nearest = cKDTree(raw).query(own)[1]
    counts = np.bincount(nearest, minlength=len(names)).astype(float)
    sums = np.stack([np.bincount(nearest, own[:, k], minlength=len(names)) for k in range(3)], axis=1)
    position, radius, weight = np.zeros_like(raw), np.zeros(len(names)), np.zeros(len(names))
    depth = voxels.depth_mm[names]
    width = float(np.mean(voxels.spacing_mm))
    for chain in chains:
        step = max(1e-9, float(_arc(raw[chain])[-1]) / (len(chain) - 1))
        sigma = max(1.0, 0.7 * float(np.median(depth[chain]))) / step
        smooth = [ndimage.gaussian_filter1d(values, sigma, mode="nearest") for values in (counts[chain], *sums[chain].T)]
        line = np.stack(smooth[1:], axis=1) / np.maximum(smooth[0], 1e-9)[:, None]
        line = ndimage.gaussian_filter1d(line, max(0.5, 1.0 / step), axis=0, mode="nearest")
        # Arc of the smoothed line, not of the voxels' staircase.
        along = np.gradient(_arc(line)) if len(chain) > 1 else np.ones(1)
        along = np.maximum(ndimage.gaussian_filter1d(along, sigma, mode="nearest"), 0.3 * step)
        area = smooth[0] * float(np.prod(voxels.spacing_mm)) / along
        position[chain] += line
        # Near a fork sections take in the other vessel; the depth does not.
        radius[chain] += np.minimum(np.sqrt(area / np.pi), 1.2 * depth[chain] + 0.25 * width)
        weight[chain] += 1
    position[alone], radius[alone], weight[alone] = raw[alone], depth[alone], 1
    position, radius = position / weight[:, None], radius / weight
    return Centrelines(names, position, radius, voxels.piece[names], chains, degree)


def _without_fingers(
    chains: list[NDArray[np.int64]], position: NDArray[np.float64], depth: NDArray[np.float64]
) -> list[NDArray[np.int64]]:
    """Join what several corners of one ragged end have made of a vessel.

    Two ends at one fork that are as near to each other as a vessel is thick, and not far from the fork, are one: the longer
    stays and goes on into the vessel. A single short chain at a fork stays: it may be all that is left of a branch.
    """
    chains = list(chains)
    while True:
        at: dict[int, list[int]] = {}
        for number, chain in enumerate(chains):
            for node in {int(chain[0]), int(chain[-1])}:
                at.setdefault(node, []).append(number)
        for fork, meeting in at.items():
            if len(meeting) < 3:
                continue
            ends = []
            for number in meeting:
                chain = chains[number] if chains[number][-1] == fork else chains[number][::-1]
                if len(at[int(chain[0])]) == 1:
                    thin = float(np.median(depth[chain[: (len(chain) + 1) // 2]]))
                    ends.append((float(_arc(position[chain])[-1]), number, chain, thin))
            thick = max(_depth_near(chains[n], fork, depth) for n in meeting)
            ends = [e for e in ends if e[0] <= _FINGER * thick and e[3] <= _THIN * thick]
            ends.sort(key=lambda e: -e[0])
            gone = next(
                (
                    b[1]
                    for i, a in enumerate(ends)
                    for b in ends[i + 1 :]
                    if np.linalg.norm(position[a[2][0]] - position[b[2][0]]) <= _FACE * thick
                ),
                None,
            )
            if gone is None:
                continue
            rest = [n for n in meeting if n != gone]
            if len(rest) == 2:
                one, other = (chains[n] for n in rest)
                one = one if one[-1] == fork else one[::-1]
                other = other if other[0] == fork else other[::-1]
                chains[rest[0]] = np.concatenate([one, other[1:]])
                drop = sorted([gone, rest[1]], reverse=True)
            else:
                drop = [gone]
            for n in drop:
                del chains[n]
            break
        else:
            return chains


def _depth_near(chain: NDArray[np.int64], fork: int, depth: NDArray[np.float64]) -> float:
    """The deepest of a chain's first vertices from a fork on."""
    return float(depth[chain[:8] if chain[0] == fork else chain[-8:]].max())


def _renumber(
    names: NDArray[np.int64], chains: list[NDArray[np.int64]], piece: NDArray[np.int64]
) -> tuple[NDArray[np.int64], list[NDArray[np.int64]], NDArray[np.bool_]]:
    """Leave out vertices that no chain has any more; those of pieces without a chain stay, and are said to be alone."""
    used = np.zeros(len(names), bool)
    for chain in chains:
        used[chain] = True
    lonely = ~used & ~np.isin(piece[names], np.unique(piece[names[used]]))
    keep = np.flatnonzero(used | lonely)
    number = np.full(len(names), -1)
    number[keep] = np.arange(len(keep))
    return names[keep], [number[chain] for chain in chains], lonely[keep]
