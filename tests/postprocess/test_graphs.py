"""The graph interface: known answers, and the GPU's equal the CPU's."""

from __future__ import annotations

import itertools
from typing import Any

import networkx
import numpy as np
import pytest

from deployments.postprocess import graphs
from deployments.postprocess.graphs import (
    CugraphBackend,
    Graph,
    GraphBackend,
    ScipyBackend,
    edge_list,
    gpu_is_there,
    paths_without_source,
    pick_backend,
)

needs_gpu = pytest.mark.skipif(not gpu_is_there(), reason="no GPU here, or no cugraph: `make setup-cugraph`")
BACKENDS = [pytest.param(ScipyBackend, id="scipy"), pytest.param(CugraphBackend, id="cugraph", marks=needs_gpu)]


def random_graph(seed: int, nodes: int = 200, edges: int = 260) -> Graph:
    rng = np.random.default_rng(seed)
    pairs = rng.integers(0, nodes, (edges, 2))
    pairs = pairs[pairs[:, 0] != pairs[:, 1]]
    return Graph.from_edges(
        nodes, pairs, (rng.permutation(len(pairs)) + 1).astype(np.float64)
    )  # all different: one spanning forest only


@pytest.mark.parametrize("make", BACKENDS)
def test_known_answers(make: type[GraphBackend]) -> None:
    # 0-1-2 in a row and a longer way round, 3-4 apart, 5 alone.
    graph = Graph.from_edges(6, np.array([[0, 1], [1, 2], [2, 0], [3, 4]]), np.array([1.0, 2.0, 4.0, 1.5]))
    backend = make()
    assert backend.components(graph).tolist() == [0, 0, 0, 1, 1, 2]
    edges, weights = backend.minimum_spanning_forest(graph)
    assert (edges.tolist(), weights.tolist()) == ([[0, 1], [1, 2], [3, 4]], [1.0, 2.0, 1.5])
    distance, before = backend.shortest_paths(graph, np.array([0, 4]))
    assert distance.tolist() == [0.0, 1.0, 3.0, 1.5, 0.0, np.inf]
    assert before.tolist() == [-1, 0, 1, 4, -1, -1]


@pytest.mark.parametrize("make", BACKENDS)
@pytest.mark.parametrize("seed", range(4))
def test_against_plain_algorithms(make: type[GraphBackend], seed: int) -> None:
    graph, backend = random_graph(seed), make()
    rows = np.repeat(np.arange(graph.nodes), np.diff(graph.indptr))
    edges = sorted((w, int(a), int(b)) for w, a, b in zip(graph.weights, rows, graph.indices, strict=True) if a < b)
    # Kruskal.
    group = list(range(graph.nodes))
    forest = []
    for weight, a, b in edges:
        if group[a] != group[b]:
            forest.append((a, b, weight))
            old, new = group[a], group[b]
            group = [new if g == old else g for g in group]
    found, weights = backend.minimum_spanning_forest(graph)
    assert sorted(forest) == [(*pair, w) for pair, w in zip(found.tolist(), weights.tolist(), strict=True)]
    numbers = backend.components(graph)
    for a, b in itertools.product(range(0, graph.nodes, 7), repeat=2):
        assert (numbers[a] == numbers[b]) == (group[a] == group[b])
    # Bellman and Ford.
    sources = np.array([0, 5])
    best = np.full(graph.nodes, np.inf)
    best[sources] = 0
    for _ in range(graph.nodes):
        np.minimum.at(best, graph.indices, best[rows] + graph.weights)
    distance, before = backend.shortest_paths(graph, sources)
    assert np.array_equal(distance, best)
    inner = np.flatnonzero(before >= 0)
    steps = graph.matrix[before[inner], inner]
    assert np.allclose(distance[inner] - distance[before[inner]], steps)


@pytest.mark.parametrize("seed", range(4))
def test_what_cugraph_is_given_and_gives_back(seed: int) -> None:
    """All around cugraph, without a GPU: networkx finds what cugraph would, from the same list of edges."""
    graph = random_graph(seed)
    sources = np.array([0, 5, 77])
    plain = ScipyBackend()
    there: Any = networkx.Graph()
    there.add_weighted_edges_from(zip(*(column.tolist() for column in edge_list(graph)), strict=True))
    assert sorted(sorted(pair) for pair in networkx.minimum_spanning_edges(there, data=False)) == (
        plain.minimum_spanning_forest(graph)[0].tolist()
    )
    numbers = plain.components(graph)
    assert {frozenset(part) for part in networkx.connected_components(there)} == {
        frozenset(np.flatnonzero(numbers == n).tolist()) for n in range(numbers.max() + 1) if (numbers == n).sum() > 1
    }
    there.add_weighted_edges_from(zip(*(column.tolist() for column in edge_list(graph, sources)), strict=True))
    before, distance = networkx.dijkstra_predecessor_and_distance(there, graph.nodes)
    vertex = np.array(list(there.nodes))  # unreached ones as cugraph tells them: the largest float, -1
    length = np.array([distance.get(v, np.finfo(np.float64).max) for v in vertex.tolist()])
    previous = np.array([next(iter(before.get(v, [])), -1) for v in vertex.tolist()])
    expected = plain.shortest_paths(graph, sources)
    found = paths_without_source(graph, sources, vertex, length, previous)
    assert np.array_equal(found[0], expected[0])
    assert np.array_equal(found[1], expected[1])


def test_of_several_edges_the_lightest_counts() -> None:
    graph = Graph.from_edges(2, np.array([[0, 1], [1, 0], [0, 1]]), np.array([3.0, 1.0, 2.0]))
    assert graph.weights.tolist() == [1.0, 1.0]


def test_the_device_decides_and_not_the_import(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "gpu_is_there", lambda: False)
    assert pick_backend(10**9).name == "scipy"
    monkeypatch.setattr(graphs, "gpu_is_there", lambda: True)
    monkeypatch.setattr(graphs, "CugraphBackend", lambda: "on the GPU")
    assert pick_backend(graphs.GPU_NODES - 1).name == "scipy"
    assert pick_backend(graphs.GPU_NODES) == "on the GPU"  # type: ignore[comparison-overlap]
    assert pick_backend(10**9, "scipy").name == "scipy"
