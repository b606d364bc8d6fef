"""Masks whose surfaces are known: spheres and tubes, and an abdomen of fifteen structures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]
#: Spacing (z, y, x) in mm of the usual and of thick slices.
THIN, THICK = (1.0, 0.78, 0.78), (3.0, 0.8, 0.8)


class Tube(NamedTuple):
    """All points within a radius of a line from a to b: a cylinder with half spheres at its ends.

    Parameters
    ----------
    a, b : ndarray, (3,)
        (x, y, z) in mm, relative to voxel (0, 0, 0)'s centre; equal for a sphere.
    radius_mm : float
    """

    a: Vector
    b: Vector
    radius_mm: float

    @property
    def volume_mm3(self) -> float:
        """Of the shape itself."""
        length = float(np.linalg.norm(self.b - self.a))
        return float(np.pi * self.radius_mm**2 * (length + 4 / 3 * self.radius_mm))

    def nearest(self, points: Vector) -> Vector:
        """Return the nearest points of the line, shape (N, 3)."""
        axis = self.b - self.a
        along = np.clip((points - self.a) @ axis / max(float(axis @ axis), 1e-12), 0, 1)
        return np.asarray(self.a + along[:, None] * axis)

    def distance(self, points: Vector) -> Vector:
        """Signed distance to the surface in mm, negative inside."""
        return np.asarray(np.linalg.norm(points - self.nearest(points), axis=1) - self.radius_mm)

    def normals(self, points: Vector) -> Vector:
        """Outward unit normals of the nearest points of the surface."""
        away = points - self.nearest(points)
        return np.asarray(away / np.linalg.norm(away, axis=1, keepdims=True))

    def mask(self, spacing_mm: Sequence[float]) -> NDArray[np.uint8]:
        """Return the shape's voxels, (z, y, x), with room around it."""
        high = np.maximum(self.a, self.b) + self.radius_mm
        shape = [int(np.ceil(h / s)) + 4 for h, s in zip(high[::-1], spacing_mm, strict=True)]
        zyx = np.moveaxis(np.indices(shape), 0, -1).reshape(-1, 3) * np.asarray(spacing_mm)
        return (self.distance(zyx[:, ::-1]) < 0).reshape(shape).astype(np.uint8)


def sphere(radius_mm: float, random: np.random.Generator) -> Tube:
    """A sphere that lies anywhere between voxels."""
    centre = radius_mm + 3 + random.random(3)
    return Tube(centre, centre, radius_mm)


def tube(radius_mm: float, random: np.random.Generator, length_mm: float = 60.0) -> Tube:
    """A tube in any direction and place."""
    direction = random.normal(size=3)
    direction /= np.linalg.norm(direction)
    half = direction * length_mm / 2
    centre = np.abs(half) + radius_mm + 3 + random.random(3)
    return Tube(centre - half, centre + half, radius_mm)


def abdomen(
    shape: tuple[int, int, int] = (400, 512, 512), spacing_mm: Sequence[float] = THIN, seed: int = 5
) -> NDArray[np.uint8]:
    """Fifteen structures of an abdomen's sizes: eight organs with rippled surfaces, seven vessels that branch.

    Returns
    -------
    ndarray of uint8, shape (z, y, x)
        Labels 1 to 15; organs touch one another.
    """
    random = np.random.default_rng(seed)
    mask = np.zeros(shape, np.uint8)
    size = np.asarray(shape) * spacing_mm
    organs = (  # centre and half axes (z, y, x), in parts of the image
        ((0.62, 0.42, 0.30), (0.20, 0.20, 0.20)),
        ((0.68, 0.55, 0.76), (0.12, 0.11, 0.10)),
        ((0.45, 0.62, 0.28), (0.14, 0.07, 0.07)),
        ((0.45, 0.62, 0.72), (0.14, 0.07, 0.07)),
        ((0.12, 0.40, 0.50), (0.10, 0.10, 0.11)),
        ((0.60, 0.35, 0.62), (0.12, 0.10, 0.13)),
        ((0.50, 0.45, 0.50), (0.05, 0.05, 0.16)),
        ((0.50, 0.78, 0.50), (0.48, 0.06, 0.05)),
    )
    for label, (centre, half) in enumerate(organs, 1):
        _paint_organ(mask, label, np.asarray(centre) * size, np.asarray(half) * size, spacing_mm, random)
    for label in range(9, 16):
        start = np.array([random.uniform(0.2, 0.5), random.uniform(0.3, 0.6), random.uniform(0.3, 0.7)]) * size
        _paint_tree(mask, label, start, 7.0 if label < 11 else 4.0, spacing_mm, random)
    return mask


def _paint_organ(
    mask: NDArray[np.uint8], label: int, centre: Vector, half: Vector, spacing_mm: Sequence[float], random: np.random.Generator
) -> None:
    box = _box(mask.shape, centre - 1.1 * half, centre + 1.1 * half, spacing_mm)
    z, y, x = (
        (np.arange(b.start, b.stop) * s - c).reshape([-1 if k == axis else 1 for k in range(3)]).astype(np.float32)
        for axis, (b, s, c) in enumerate(zip(box, spacing_mm, centre, strict=True))
    )
    waves = [np.sin(a / random.uniform(6, 12) + random.uniform(0, 6)) for a in (z, y, x)]
    radius = np.sqrt((z / half[0]) ** 2 + (y / half[1]) ** 2 + (x / half[2]) ** 2)
    mask[box][radius < 1 + 0.03 * waves[0] * waves[1] + 0.03 * waves[1] * waves[2]] = label


def _paint_tree(
    mask: NDArray[np.uint8], label: int, start: Vector, radius: float, spacing_mm: Sequence[float], random: np.random.Generator
) -> None:
    size = np.asarray(mask.shape) * spacing_mm
    branches = [(start, np.array([1.0, 0.0, 0.0]), radius)]
    while branches:
        point, direction, radius = branches.pop()
        for _ in range(12):
            direction = direction + random.normal(0, 0.35, 3)
            direction /= np.linalg.norm(direction)
            end = point + 8 * direction
            if (end < 12).any() or (end > size - 12).any():
                break
            low, high = np.minimum(point, end) - radius, np.maximum(point, end) + radius
            box = _box(mask.shape, low, high, spacing_mm)
            grid = np.stack(
                np.meshgrid(*(np.arange(b.start, b.stop) * s for b, s in zip(box, spacing_mm, strict=True)), indexing="ij"), -1
            )
            near = Tube(point, end, radius).distance(grid.reshape(-1, 3)).reshape(grid.shape[:3]) < 0
            mask[box][near] = label
            point = end
        else:
            if radius > 1.6:
                for sign in (-1, 1):
                    turned = direction + sign * random.normal(0, 0.7, 3)
                    branches.append((point, turned / np.linalg.norm(turned), 0.78 * radius))


def _box(shape: Sequence[int], low: Vector, high: Vector, spacing_mm: Sequence[float]) -> tuple[slice, ...]:
    return tuple(
        slice(max(int(a / s) - 1, 0), min(int(b / s) + 2, n)) for a, b, s, n in zip(low, high, spacing_mm, shape, strict=True)
    )
