"""Binary PLY: vertices with colours, triangles with the number of their label."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from scangraph.contracts import Scene
from scangraph.scenefiles.structures import Sink, Structure, blocks, notes_of, one_line

_VERTEX = np.dtype([("position", "<f4", 3), ("color", "u1", 3)])
_FACE = np.dtype([("corners", "u1"), ("vertices", "<i4", 3), ("label", "<i4")])


def write_ply(out: Sink, scene: Scene, structures: Sequence[Structure]) -> None:
    """Write structures as one mesh, in mm: vertices carry their structure's colour, faces its label's number.

    Parameters
    ----------
    out : file or other taker of bytes
    scene : Scene
        Says frame and notes.
    structures : sequence of Structure
        What of it is written. Their numbers and names are in the header's comments.
    """
    vertices, faces = (sum(len(getattr(s.surface, name)) for s in structures) for name in ("vertices_mm", "faces"))
    comments = ["scangraph scene", "unit: mm", f"SPACE={scene.frame}", *notes_of(scene)]
    comments += [f"label {s.surface.label} {s.key}" for s in structures]
    out.write(
        "\n".join(
            [
                "ply",
                "format binary_little_endian 1.0",
                *(f"comment {one_line(comment)}".encode("ascii", "replace").decode() for comment in comments),
                f"element vertex {vertices}",
                *(f"property float {axis}" for axis in "xyz"),
                *(f"property uchar {channel}" for channel in ("red", "green", "blue")),
                f"element face {faces}",
                "property list uchar int vertex_indices",
                "property int label",
                "end_header\n",
            ]
        ).encode()
    )
    for structure in structures:
        for positions in blocks(structure.surface.vertices_mm):
            rows = np.empty(len(positions), _VERTEX)
            rows["position"], rows["color"] = positions, structure.surface.color
            out.write(rows.tobytes())
    first = 0
    for structure in structures:
        for corners in blocks(structure.surface.faces):
            rows = np.empty(len(corners), _FACE)
            rows["corners"], rows["vertices"], rows["label"] = 3, corners + np.int32(first), structure.surface.label
            out.write(rows.tobytes())
        first += len(structure.surface.vertices_mm)
