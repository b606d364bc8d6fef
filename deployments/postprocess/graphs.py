"""Graphs in CSR form, and three things that are asked of them, by scipy or, where it pays, by cugraph on a GPU.

cugraph takes seconds to import and milliseconds to move a graph of the usual size; it pays from about a million nodes. Its
import succeeds without a GPU and the first call then fails, so the device decides, never the import.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.sparse import csgraph

Backend = Literal["scipy", "cugraph"]
#: Nodes from which on a GPU is faster than the way to it.
GPU_NODES = 1_000_000


@dataclass(frozen=True)
class Graph:
    """An undirected graph: each edge stands in the rows of both its ends.

    Parameters
    ----------
    weights : (m,) float64
        Positive.
    indices : (m,) int32
        Neighbour of each entry.
    indptr : (n + 1,) int32
        Where each node's entries begin.
    """

    weights: NDArray[np.float64]
    indices: NDArray[np.int32]
    indptr: NDArray[np.int32]

    @property
    def nodes(self) -> int:
        """How many there are."""
        return len(self.indptr) - 1

    @property
    def matrix(self) -> Any:
        """The same as a scipy matrix; shares the arrays."""
        return sparse.csr_array((self.weights, self.indices, self.indptr), shape=(self.nodes, self.nodes))

    @classmethod
    def from_edges(cls, nodes: int, edges: NDArray[np.int64], weights: NDArray[np.float64]) -> Graph:
        """Make a graph of (m, 2) pairs; of several edges between two nodes the lightest counts."""
        ends = np.sort(edges.reshape(-1, 2), axis=1)
        order = np.lexsort((weights, ends[:, 1], ends[:, 0]))
        ends, weights = ends[order], np.asarray(weights, np.float64)[order]
        first = np.ones(len(ends), bool)
        first[1:] = (ends[1:] != ends[:-1]).any(axis=1)
        ends, weights = ends[first], weights[first]
        both = (np.concatenate([ends[:, 0], ends[:, 1]]), np.concatenate([ends[:, 1], ends[:, 0]]))
        made = sparse.csr_array((np.concatenate([weights, weights]), both), shape=(nodes, nodes))
        return cls(made.data, made.indices.astype(np.int32), made.indptr.astype(np.int32))


class GraphBackend(Protocol):
    """What is asked of a graph."""

    name: Backend

    def components(self, graph: Graph) -> NDArray[np.int64]:
        """Return (n,): the number of each node's component, counted from 0 in the order of their first nodes."""

    def minimum_spanning_forest(self, graph: Graph) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Return (k, 2) edges, the lower end first, in ascending order, and their (k,) weights."""

    def shortest_paths(self, graph: Graph, sources: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Return (n,) distances to the nearest source, inf where none is reached, and (n,) predecessors, -1 where none is."""


class ScipyBackend:
    """On the CPU."""

    name: Backend = "scipy"

    def components(self, graph: Graph) -> NDArray[np.int64]:
        """See `GraphBackend`."""
        return _in_order(csgraph.connected_components(graph.matrix, directed=False)[1])

    def minimum_spanning_forest(self, graph: Graph) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """See `GraphBackend`."""
        forest = csgraph.minimum_spanning_tree(graph.matrix).tocoo()
        return _sorted_edges(forest.coords[0], forest.coords[1], forest.data)

    def shortest_paths(self, graph: Graph, sources: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """See `GraphBackend`."""
        distance, before, _ = csgraph.dijkstra(
            graph.matrix, directed=True, indices=sources, min_only=True, return_predecessors=True
        )
        return distance, np.where(before < 0, -1, before).astype(np.int64)


class CugraphBackend:
    """On a GPU, by RAPIDS cugraph (the extra `cugraph-cu13`)."""

    name: Backend = "cugraph"

    def __init__(self) -> None:
        import cudf
        import cugraph

        self._cudf, self._cugraph = cudf, cugraph

    def _made(self, graph: Graph, sources: NDArray[np.int64] | None = None) -> Any:
        """Return the graph on the device."""
        made = self._cugraph.Graph(directed=False)
        frame = self._cudf.DataFrame(dict(zip(("source", "target", "weight"), edge_list(graph, sources), strict=True)))
        made.from_cudf_edgelist(frame, source="source", destination="target", edge_attr="weight", renumber=True)
        return made

    def components(self, graph: Graph) -> NDArray[np.int64]:
        """See `GraphBackend`."""
        numbers = np.arange(graph.nodes, dtype=np.int64)  # a node without an edge is its own component, and not in the answer
        if len(graph.indices):
            found = self._cugraph.connected_components(self._made(graph))
            numbers[found["vertex"].to_numpy()] = graph.nodes + found["labels"].to_numpy().astype(np.int64)
        return _in_order(numbers)

    def minimum_spanning_forest(self, graph: Graph) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """See `GraphBackend`."""
        if not len(graph.indices):
            return np.empty((0, 2), np.int64), np.empty(0)
        edges = self._cugraph.minimum_spanning_tree(self._made(graph)).view_edge_list()
        names = list(edges.columns)
        weight = next(name for name in names if "weight" in name)
        one, other = (name for name in names if name != weight)
        rows, columns = edges[one].to_numpy(), edges[other].to_numpy()
        once = np.unique(np.sort(np.stack([rows, columns], 1), axis=1), axis=0, return_index=True)[1]
        return _sorted_edges(rows[once], columns[once], edges[weight].to_numpy()[once])

    def shortest_paths(self, graph: Graph, sources: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """See `GraphBackend`."""
        found = self._cugraph.sssp(self._made(graph, sources), source=graph.nodes)
        columns = (found[name].to_numpy() for name in ("vertex", "distance", "predecessor"))
        return paths_without_source(graph, sources, *columns)


def edge_list(
    graph: Graph, sources: NDArray[np.int64] | None = None
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Return each edge once, as its ends and its weight.

    `sources` get a common neighbour, node n, at distance 1: cugraph's paths start from one node.
    """
    rows = np.repeat(np.arange(graph.nodes), np.diff(graph.indptr))
    once = rows < graph.indices
    source, target, weight = rows[once], graph.indices[once].astype(np.int64), graph.weights[once]
    if sources is not None:
        source = np.concatenate([source, np.full(len(sources), graph.nodes)])
        target = np.concatenate([target, sources])
        weight = np.concatenate([weight, np.ones(len(sources))])
    return source, target, weight


def paths_without_source(
    graph: Graph,
    sources: NDArray[np.int64],
    vertex: NDArray[np.int64],
    found_mm: NDArray[np.float64],
    found_before: NDArray[np.int64],
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Turn the paths from the common neighbour of the sources, in any order of vertices, into those from the sources."""
    distance, before = np.full(graph.nodes + 1, np.inf), np.full(graph.nodes + 1, -1, np.int64)
    distance[vertex], before[vertex] = found_mm, found_before
    distance = np.where(distance < 1e300, distance - 1.0, np.inf)[:-1]  # unreached ones have the largest float
    distance[sources] = 0.0
    before = before[:-1]
    before[(before == graph.nodes) | np.isinf(distance)] = -1
    before[sources] = -1
    return distance, before


def pick_backend(nodes: int, wanted: Literal["auto", "scipy", "cugraph"] = "auto") -> GraphBackend:
    """Return cugraph where it is wanted, or where a GPU and the extra are there and the graph is large; else scipy."""
    if wanted == "cugraph" or (wanted == "auto" and nodes >= GPU_NODES and gpu_is_there()):
        return CugraphBackend()
    return ScipyBackend()


@cache
def gpu_is_there() -> bool:
    """Whether a GPU answers and the extra is installed."""
    if importlib.util.find_spec("cugraph") is None or importlib.util.find_spec("cupy") is None:
        return False
    try:
        import cupy

        return bool(cupy.cuda.runtime.getDeviceCount() > 0)
    except (ImportError, RuntimeError):  # without a driver the runtime's own error, which is a RuntimeError
        return False


def _in_order(numbers: NDArray[Any]) -> NDArray[np.int64]:
    """Number components by their first nodes, whatever a library called them."""
    _, first, inverse = np.unique(numbers, return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return np.asarray(rank[inverse], np.int64)


def _sorted_edges(
    rows: NDArray[Any], columns: NDArray[Any], weights: NDArray[Any]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    edges = np.sort(np.stack([rows, columns], axis=1).astype(np.int64), axis=1)
    order = np.lexsort((edges[:, 1], edges[:, 0]))
    return edges[order], np.asarray(weights, np.float64)[order]
