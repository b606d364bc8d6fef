"""Masks whose surfaces are known, and how surfaces are judged."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import trimesh
from numpy.typing import NDArray

from deployments.smoothing.surfaces import Options, label_map_to_scene
from scangraph.contracts import LabelMap, Surface

THIN, THICK = (1.0, 0.78, 0.78), (3.0, 0.8, 0.8)


def capsule(
    a: Sequence[float], b: Sequence[float], radius: float, spacing: tuple[float, float, float], label: int = 52
) -> LabelMap:
    """All voxels within `radius` of the line from a to b, (x, y, z) mm."""
    high = np.maximum(a, b)[::-1] + radius
    shape = [int(h / s) + 5 for h, s in zip(high, spacing, strict=True)]
    points = np.moveaxis(np.indices(shape), 0, -1)[..., :] * np.asarray(spacing)
    return LabelMap((distance_to_line(points[..., ::-1], a, b) < radius).astype(np.uint8) * label, spacing, labels=(label,))


def distance_to_line(points: NDArray[np.floating], a: Sequence[float], b: Sequence[float]) -> NDArray[np.float64]:
    """Millimetres from points (…, 3) to the line from a to b."""
    start, axis = np.asarray(a, float), np.asarray(b, float) - np.asarray(a, float)
    along = np.clip((points - start) @ axis / max(float(axis @ axis), 1e-12), 0, 1)
    return np.asarray(np.linalg.norm(points - start - along[..., None] * axis, axis=-1))


def only(mask: LabelMap, **options: object) -> Surface:
    scene, _ = label_map_to_scene(mask, Options(**options))  # type: ignore[arg-type]
    (surface,) = scene.surfaces
    return surface


def as_trimesh(surface: Surface) -> trimesh.Trimesh:
    return trimesh.Trimesh(surface.vertices_mm.astype(float), surface.faces, process=False)


def is_closed(surface: Surface) -> bool:
    """As trimesh sees it: watertight, every face turned like its neighbours, and outward."""
    mesh = as_trimesh(surface)
    return bool(mesh.is_watertight and mesh.is_winding_consistent and mesh.volume > 0)
