"""The compiled loops along curves, against plain numpy."""

from __future__ import annotations

import numpy as np

from deployments.postprocess import kernels

RNG = np.random.default_rng(7)


def helix(points: int = 60) -> tuple[np.ndarray, np.ndarray]:
    t = np.linspace(0, 3 * np.pi, points)
    line = np.stack([2.0 * t, 8 * np.cos(t), 8 * np.sin(t)], axis=1)
    tangent = np.gradient(line, axis=0)
    return line, tangent / np.linalg.norm(tangent, axis=1)[:, None]


def frames_along(tangent: np.ndarray) -> np.ndarray:
    first = np.cross(tangent[0], [0.0, 1.0, 0.0])
    return np.asarray(kernels.carry_frames(tangent, first / np.linalg.norm(first)))


def test_frames_are_right_handed_and_do_not_turn_around_the_curve() -> None:
    _, tangent = helix()
    frames = frames_along(tangent)
    triads = np.concatenate([frames, tangent[:, None]], axis=1)
    np.testing.assert_allclose(triads @ triads.transpose(0, 2, 1), np.broadcast_to(np.eye(3), (len(tangent), 3, 3)), atol=1e-12)
    np.testing.assert_allclose(np.cross(tangent, frames[:, 0]), frames[:, 1], atol=1e-12)
    # The smallest rotation from point to point turns around an axis across both tangents.
    for k in range(1, len(tangent)):
        turn = triads[k].T @ triads[k - 1]
        axis = np.array([turn[2, 1] - turn[1, 2], turn[0, 2] - turn[2, 0], turn[1, 0] - turn[0, 1]])
        assert abs(axis @ tangent[k]) < 1e-9


def test_a_straight_curve_keeps_its_frame() -> None:
    tangent = np.tile([0.0, 0.0, 1.0], (5, 1))
    frames = kernels.carry_frames(tangent, np.array([0.0, 1.0, 0.0]))
    assert (frames == frames[0]).all()


def test_where_planes_cross_voxels_is_what_numpy_finds() -> None:
    line, tangent = helix()
    frames = frames_along(tangent)
    slope = RNG.normal(0, 0.2, (len(line), 2))
    position = np.repeat(line, 20, axis=0) + RNG.normal(0, 4, (20 * len(line), 3))
    nearest, u, v = kernels.cross_planes(position, line, tangent, frames, slope)

    away = position[:, None] - line
    along, across = np.einsum("nka,ka->nk", away, tangent), np.einsum("nka,kba->nkb", away, frames)
    ahead = along - (across * slope).sum(axis=2) >= 0
    off = np.where(ahead[:, :-1] & ~ahead[:, 1:], (across[:, :-1] ** 2).sum(axis=2), np.inf)
    expected = np.where(np.isfinite(off.min(axis=1)), off.argmin(axis=1), -1)
    np.testing.assert_array_equal(nearest, expected)
    found = expected >= 0
    assert found.mean() > 0.9
    at = across[np.flatnonzero(found), expected[found]]
    np.testing.assert_allclose(np.stack([u, v], axis=1)[found], at, atol=1e-9)
    before = np.array([[-200.0, 0.0, 0.0]])  # behind every plane: between none
    assert kernels.cross_planes(before, line, tangent, frames, 0 * slope)[0] == [-1]
