"""Copies of scenes for screens: each structure's surface in MZ3, NiiVue's own compact format, and a list of them, in RAS mm.

MZ3 (https://github.com/neurolabusc/surf-ice/tree/master/mz3): little-endian; magic, attributes, numbers of triangles and
vertices, bytes to skip; then the triangles' corners and the vertices. A file may be gzipped as a whole.
"""

from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np
from isal import igzip

from scangraph.contracts import Line, Scene, Surface, label_table
from scangraph.scenefiles.structures import NOTICE, notes_of, one_line

_HEAD = struct.Struct("<HHIII")
_MAGIC = 0x5A4D
_FACES, _VERTICES = 1, 2
_LEVEL = 1


def write_mz3(surface: Surface) -> bytes:
    """Encode a surface, gzipped; equal ones give equal bytes."""
    head = _HEAD.pack(_MAGIC, _FACES | _VERTICES, len(surface.faces), len(surface.vertices_mm), 0)
    plain = head + surface.faces.astype("<i4").tobytes() + surface.vertices_mm.astype("<f4").tobytes()
    packed: bytes = igzip.compress(plain, _LEVEL, mtime=0)
    return packed


def scene_copy(scene: Scene) -> tuple[bytes, list[Surface]]:
    """Return what a screen shows of a scene.

    Returns
    -------
    (bytes, list of Surface)
        JSON: `structures` in the surfaces' order, each with `name`, `title`, `label`, `laterality`, `rgb`, `volume_ml`,
        `area_mm2`, `centre_mm` (of the surface), `box_mm`, `warnings` and `faces`, its triangles on screens; `lines`, each with
        `name`, `label`, `rgb`, `points_mm` and `segments`; `notes`. Places are RAS, mm. Volumes and areas are the finest
        surface's.
    """
    turned = scene.in_frame("RAS")
    shown = list(turned.on_screen())
    finest = {(s.name, s.label): s for s in turned.surfaces if s.level == 0}
    about = {
        "notice": NOTICE,
        "notes": notes_of(scene),
        "frame": "RAS",
        "unit": "mm",
        "structures": [_structure(surface, finest.get((surface.name, surface.label), surface)) for surface in shown],
        "lines": [_line(line) for line in turned.lines],
    }
    return json.dumps(about, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode("utf-8", "replace"), shown


def _structure(shown: Surface, finest: Surface) -> dict[str, Any]:
    measures, known = finest.measures, label_table().get(finest.label)
    if known is not None and known.name != finest.name:  # the number means something else here
        known = None
    volume, area = measures.get("mesh_volume_ml"), measures.get("area_cm2")
    areas, centres = _triangles(shown)
    corners = shown.vertices_mm if len(shown.vertices_mm) else np.zeros((1, 3), np.float32)
    total = float(areas.sum())
    centre = areas @ centres / total if total else corners.mean(axis=0, dtype=np.float64)
    return {
        "name": one_line(finest.name),
        "title": one_line(known.title if known else finest.name),
        "label": finest.label,
        "laterality": known.laterality if known else None,
        "rgb": list(finest.color),
        "volume_ml": finest.volume_ml if volume is None else volume,
        "area_mm2": total if area is None else 100 * area,
        "centre_mm": [round(float(value), 3) for value in centre],
        "box_mm": measures.get("box_mm") or [corners.min(axis=0).tolist(), corners.max(axis=0).tolist()],
        "warnings": measures.get("warnings", []),
        "touches_edge": bool(measures.get("touches_edge", False)),
        "faces": len(shown.faces),
    }


def _triangles(surface: Surface) -> tuple[Any, Any]:
    """Return areas (mm²) and centres of the triangles."""
    a, b, c = (surface.vertices_mm[surface.faces[:, k]].astype(np.float64) for k in range(3))
    return np.linalg.norm(np.cross(b - a, c - a), axis=1) / 2, (a + b + c) / 3


def _line(line: Line) -> dict[str, Any]:
    points = [[round(value, 3) for value in point] for point in line.points_mm.tolist()]
    return {
        "name": one_line(line.name),
        "label": line.label,
        "rgb": list(line.color),
        "points_mm": points,
        "segments": line.segments.tolist(),
    }
