"""Binary STL: triangles and nothing else. Frame and unit are in its header, as 3D Slicer reads them."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np

from scangraph.contracts import Scene
from scangraph.contracts.errors import UsageError
from scangraph.scenefiles.structures import Sink, Structure, blocks, triangle_normals

_TRIANGLE = np.dtype([("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("attribute", "<u2")])
_HEADER_BYTES = 80
_MOST_TRIANGLES = 2**32 - 1


def write_stl(out: Sink, scene: Scene, structures: Sequence[Structure]) -> None:
    """Write structures as one heap of triangles, in mm.

    Parameters
    ----------
    out : file or other taker of bytes
    scene : Scene
        Says the frame.
    structures : sequence of Structure
        What of it is written, one behind the other: the format has no parts.

    Raises
    ------
    UsageError
        If there are more triangles than the format can count.
    """
    count = sum(len(structure.surface.faces) for structure in structures)
    if count > _MOST_TRIANGLES:
        raise UsageError(detail=f"an STL counts to {_MOST_TRIANGLES} triangles, this scene has {count}: ask for another format")
    header = f"scangraph SPACE={scene.frame} unit=mm research use only"  # "solid" would begin a text STL
    out.write(header.encode().ljust(_HEADER_BYTES) + struct.pack("<I", count))
    for structure in structures:
        vertices = structure.surface.vertices_mm
        for faces in blocks(structure.surface.faces):
            rows = np.zeros(len(faces), _TRIANGLE)
            rows["corners"] = vertices[faces]
            normals = np.stack(triangle_normals(vertices, [faces[:, k].astype(np.intp) for k in range(3)]), axis=1)
            lengths = np.sqrt(np.einsum("ij,ij->i", normals, normals))
            rows["normal"] = normals / np.where(lengths > 0, lengths, 1)[:, None]
            out.write(rows.tobytes())
