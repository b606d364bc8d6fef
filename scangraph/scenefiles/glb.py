"""glTF 2.0 in one binary file: a named node with its mesh and material for each structure.

glTF is in metres, right-handed, Y up, and an asset looks along +Z. The vertices stay what the scanner measured, millimetres in
the scene's frame, to the last bit: the root node turns and scales them, and is left out by whoever wants them back.
Specification: Khronos Group, glTF 2.0 (ISO/IEC 12113:2022).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

import scangraph
from scangraph.contracts import GlbUnit, Scene
from scangraph.contracts.errors import UsageError
from scangraph.scenefiles.structures import NOTICE, Sink, Structure, notes_of, vertex_normals

ROOT = "scanner_to_gltf"
#: What the root node does: patient's head up, face to +Z, left hand to +X. Quaternions (x, y, z, w).
_HALF = 0.5**0.5
_UPRIGHT = {"LPS": [-_HALF, 0.0, 0.0, _HALF], "RAS": [0.0, _HALF, _HALF, 0.0]}
_SCALE = {"m": 0.001, "mm": 1.0}
_ROUGHNESS = 0.6
_FLOAT, _UINT16, _UINT32 = 5126, 5123, 5125
_ARRAY, _ELEMENTS = 34962, 34963  # targets of buffer views
#: 65535 itself restarts a strip.
_MOST_UINT16 = 65535
_MOST_BYTES = 2**32 - 1


def axes_in_words(scene: Scene, unit: GlbUnit) -> str:
    """Say what the axes of a GLB are, and how to get back to the scanner's millimetres."""
    unit_name, scales = ("metres", " and scales them by 0.001") if unit == "m" else ("millimetres", "")
    return (
        f"glTF axes: +Y to the patient's head, +Z to the front, +X to the left, in {unit_name}. The vertices themselves are "
        f"millimetres in the scanner's {scene.frame} frame; the root node {ROOT!r} turns them upright{scales}. Leave its "
        "transform out to get the scanner's millimetres back."
    )


def write_glb(out: Sink, scene: Scene, structures: Sequence[Structure], unit: GlbUnit) -> None:
    """Write structures as binary glTF; equal ones give equal bytes.

    Parameters
    ----------
    out : file or other taker of bytes
    scene : Scene
        Says frame and notes.
    structures : sequence of Structure
        What of it is written.
    unit : "m" or "mm"
        What a viewer sees; "mm" is not what glTF says, but what some programs expect.

    Raises
    ------
    UsageError
        If it would not fit into the 4 GiB that the format has.
    """
    document, binary = _document(scene, structures, unit)
    text = json.dumps(document, separators=(",", ":"), allow_nan=False).encode()
    text += b" " * (-len(text) % 4)
    total = 12 + 8 + len(text) + (8 + binary if binary else 0)
    if total > _MOST_BYTES:
        raise UsageError(
            detail=f"a GLB holds 4 GiB, this scene needs {total / 2**30:.1f}: ask for fewer triangles, or another format"
        )
    out.write(struct.pack("<4sIII4s", b"glTF", 2, total, len(text), b"JSON"))
    out.write(text)
    if not binary:
        return
    out.write(struct.pack("<I4s", binary, b"BIN\0"))
    for structure in structures:
        surface = structure.surface
        if not len(surface.faces):
            continue
        out.write(np.ascontiguousarray(surface.vertices_mm, "<f4").data)
        out.write(np.ascontiguousarray(vertex_normals(surface.vertices_mm, surface.faces), "<f4").data)
        indices = surface.faces.astype("<u2" if len(surface.vertices_mm) <= _MOST_UINT16 else "<u4")
        out.write(indices.data)
        out.write(b"\0" * (-indices.nbytes % 4))


def _document(scene: Scene, structures: Sequence[Structure], unit: GlbUnit) -> tuple[dict[str, Any], int]:
    """Return the JSON and the bytes of the binary part."""
    nodes: list[dict[str, Any]] = [{"name": ROOT, "rotation": _UPRIGHT[scene.frame]}]
    if unit != "mm":
        nodes[0]["scale"] = [_SCALE[unit]] * 3
    meshes: list[dict[str, Any]] = []
    materials: list[dict[str, Any]] = []
    accessors: list[dict[str, Any]] = []
    views: list[dict[str, Any]] = []
    at = 0

    def add(target: int, size: int, kind: dict[str, Any]) -> int:
        nonlocal at
        accessors.append({"bufferView": len(views), **kind})
        views.append({"buffer": 0, "byteOffset": at, "byteLength": size, "target": target})
        at += size + -size % 4
        return len(accessors) - 1

    for structure in structures:
        surface, label = structure.surface, structure.label
        extras = {
            "label": surface.label,
            "name": label.name,
            "title": label.title,
            "snomed_code": label.snomed_code or None,
            "color": list(surface.color),
            "level": surface.level,
            **surface.measures,
        }
        node: dict[str, Any] = {"name": structure.key, "extras": extras}
        nodes.append(node)
        if not len(surface.faces):
            continue  # an accessor of nothing is not allowed
        count, corners = len(surface.vertices_mm), surface.faces.size
        low, high = (edge.tolist() for edge in (surface.vertices_mm.min(axis=0), surface.vertices_mm.max(axis=0)))
        small = count <= _MOST_UINT16
        vectors = {"componentType": _FLOAT, "count": count, "type": "VEC3"}
        position = add(_ARRAY, 12 * count, {**vectors, "min": low, "max": high})
        normal = add(_ARRAY, 12 * count, vectors)
        scalars = {"componentType": _UINT16 if small else _UINT32, "count": corners, "type": "SCALAR"}
        indices = add(_ELEMENTS, (2 if small else 4) * corners, scalars)
        node["mesh"] = len(meshes)
        primitive = {"attributes": {"POSITION": position, "NORMAL": normal}, "indices": indices, "material": len(materials)}
        meshes.append({"name": structure.key, "primitives": [primitive]})
        shade = {"baseColorFactor": [*map(_linear, surface.color), 1.0], "metallicFactor": 0.0, "roughnessFactor": _ROUGHNESS}
        materials.append({"name": structure.key, "pbrMetallicRoughness": shade})
    if len(nodes) > 1:
        nodes[0]["children"] = list(range(1, len(nodes)))
    about = {
        "notice": NOTICE,
        "frame": scene.frame,
        "unit": unit,
        "vertices_unit": "mm",
        "axes": axes_in_words(scene, unit),
        "notes": notes_of(scene),
    }
    document: dict[str, Any] = {
        "asset": {"version": "2.0", "generator": f"scangraph {scangraph.__version__}", "extras": about},
        "scene": 0,
        "scenes": [{"name": "scangraph scene", "nodes": [0]}],
        "nodes": nodes,
    }
    parts = {"meshes": meshes, "materials": materials, "accessors": accessors, "bufferViews": views}
    document |= {name: part for name, part in parts.items() if part}  # empty lists are not allowed
    if at:
        document["buffers"] = [{"byteLength": at}]
    return document, at


def _linear(value: int) -> float:
    """Return a channel of an sRGB colour (0-255) as light (0-1), which is what glTF's factors are (IEC 61966-2-1)."""
    part = value / 255
    return round(part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4, 6)
