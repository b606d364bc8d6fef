from __future__ import annotations

import itertools

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from deployments.smoothing.fairing import connected_pieces
from deployments.smoothing.measuring import open_edges
from deployments.smoothing.nets import Nets, cell_tables, extract


def triangles_of(nets: Nets, label: int) -> NDArray[np.int32]:
    quads = nets.quads[nets.quad_start[label] : nets.quad_start[label + 1]]
    own = nets.triangles[nets.triangle_start[label] : nets.triangle_start[label + 1]]
    return np.concatenate([quads[:, [0, 1, 2]], quads[:, [0, 2, 3]], own])


def vertices_of(nets: Nets, label: int) -> slice:
    return slice(int(nets.vertex_start[label]), int(nets.vertex_start[label + 1]))


def volume(vertices: NDArray[np.floating], triangles: NDArray[np.integer]) -> float:
    a, b, c = (vertices[triangles[:, k]].astype(float) for k in range(3))
    return float(np.einsum("ij,ij->", a, np.cross(b, c)) / 6)


@pytest.mark.parametrize("density", [0.03, 0.2, 0.5, 0.8, 0.97])
def test_noise_gives_closed_manifolds_of_exactly_its_volume(density: float) -> None:
    """Every way in which voxels of three labels can touch, many times."""
    random = np.random.default_rng(int(100 * density))
    array = ((random.random((17, 18, 19)) < density) * random.integers(1, 4, (17, 18, 19))).astype(np.uint8)
    nets = extract(array)
    for label in (1, 2, 3):
        own, triangles = vertices_of(nets, label), triangles_of(nets, label)
        assert open_edges(triangles) == 0
        assert np.array_equal(np.unique(triangles), np.arange(own.stop - own.start))  # no vertex is left over
        assert nets.voxels[label] == (array == label).sum()
        # The corners that belong to the vertices make the voxels' own boundary.
        assert volume(nets.corners[own], triangles) == pytest.approx(nets.voxels[label], rel=1e-6)
        assert 0 < volume(nets.places[own], triangles) < nets.voxels[label]
        # One fan of triangles around every vertex: with closed edges, the surface is a 2-manifold.
        assert one_fan_each(triangles, own.stop - own.start)


def one_fan_each(triangles: NDArray[np.int32], vertices: int) -> bool:
    following: list[dict[int, int]] = [{} for _ in range(vertices)]
    for a, b, c in triangles.tolist():
        following[a][b], following[b][c], following[c][a] = c, a, b
    for ring in following:
        start = at = next(iter(ring))
        steps = 0
        while True:
            at, steps = ring[at], steps + 1
            if at == start:
                break
        if steps != len(ring):
            return False
    return True


def test_every_configuration_of_two_cells_is_closed() -> None:
    """All 4096 ways to fill 2×2×3 voxels: every pair of neighbouring cells."""
    for bits in range(1, 4096):
        array = np.array([bits >> k & 1 for k in range(12)], np.uint8).reshape(2, 2, 3)
        nets = extract(array)
        triangles = triangles_of(nets, 1)
        assert open_edges(triangles) == 0
        assert one_fan_each(triangles, len(nets.places))
        # Voxels that touch by a face or an edge are one piece.
        start = nets.link_start.astype(np.int32)
        assert len(connected_pieces(start, nets.links)[1]) == ndimage.label(array, ndimage.generate_binary_structure(3, 2))[1]


def test_links_are_the_edges_between_cells() -> None:
    random = np.random.default_rng(3)
    nets = extract((random.random((8, 9, 10)) < 0.4).astype(np.uint8))
    pairs = {(v, int(u)) for v in range(len(nets.places)) for u in nets.links[nets.link_start[v] : nets.link_start[v + 1]]}
    assert len(pairs) == len(nets.links)  # none twice
    assert pairs == {(b, a) for a, b in pairs}
    sides = {tuple(sorted((int(q[k]), int(q[k - 1])))) for q in nets.quads for k in range(4)}
    assert sides <= pairs


def test_a_vertex_stays_within_its_cell() -> None:
    random = np.random.default_rng(4)
    nets = extract((random.random((12, 12, 12)) < 0.5).astype(np.uint8))
    assert np.abs(nets.places - nets.corners).max() < 0.5


def test_a_voxel_and_its_neighbours() -> None:
    array = np.zeros((5, 5, 5), np.uint8)
    array[2, 2, 2] = 7
    nets = extract(array)
    assert np.array_equal(
        np.sort(nets.corners, axis=0), np.sort([[x, y, z] for x, y, z in itertools.product((1.5, 2.5), repeat=3)], axis=0)
    )
    assert len(nets.quads) == 6
    assert len(nets.triangles) == 0
    assert set(nets.beyond) == {0}


def test_the_label_beyond() -> None:
    array = np.zeros((4, 4, 6), np.uint8)
    array[1:3, 1:3, 1:3], array[1:3, 1:3, 3:5] = 1, 2
    nets = extract(array)
    for label, other in ((1, 2), (2, 1)):
        beyond = nets.beyond[nets.quad_start[label] : nets.quad_start[label + 1]]
        assert (beyond == other).sum() == 4
        assert (beyond == 0).sum() == 20


def test_a_table_leaves_labels_out_and_padding_is_background() -> None:
    array = np.full((3, 4, 5), 9, np.uint8)
    array[0] = 4
    table = np.zeros(256, np.uint8)
    table[9] = 200
    nets = extract(array, table)
    assert nets.voxels[200] == 40
    assert nets.voxels.sum() == 40
    assert open_edges(triangles_of(nets, 200)) == 0


def test_room_is_asked_for_before_it_is_taken() -> None:
    array = np.zeros((6, 6, 6), np.uint8)
    array[2:4, 2:4, 2:4] = 1

    def refuse(vertices: int) -> None:
        raise MemoryError(vertices)

    with pytest.raises(MemoryError, match="26"):
        extract(array, None, refuse)


def test_tables_are_symmetric() -> None:
    """Mirrored configurations have as many passages, and as many links as edges that are crossed."""
    tables = cell_tables()
    mirrored = [sum(1 << (c ^ 1) for c in range(8) if n >> c & 1) for n in range(256)]
    assert np.array_equal(tables.cycles, tables.cycles[mirrored])
    crossed = (tables.cycle_of_edge != 255).sum(axis=1)
    assert np.array_equal(tables.degree.sum(axis=1), crossed)
    assert tables.cycles.max() <= 4
