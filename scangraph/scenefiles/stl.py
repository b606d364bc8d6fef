"""Binary STL: triangles and nothing else. Frame and unit are in its header, as 3D Slicer reads them."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np

from scangraph.contracts import Scene
from scangraph.contracts.errors import UsageError
from scangraph.scenefiles.structures import Sink, Structure, blocks, columns_of, corners_of, triangle_normals

#: Normal and three corners; then two bytes that mean nothing.
_NUMBERS, _TRIANGLE_BYTES = 12, 50
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
        axes = columns_of(structure.surface.vertices_mm)
        for faces in blocks(structure.surface.faces):
            corners = corners_of(axes, faces)
            nx, ny, nz = triangle_normals(*corners)
            lengths = np.sqrt(nx * nx + ny * ny + nz * nz)
            lengths[lengths == 0] = 1
            numbers = np.empty((len(faces), _NUMBERS), "<f4")
            for k, column in enumerate(
                (nx / lengths, ny / lengths, nz / lengths, *(axis for corner in corners for axis in corner))
            ):
                numbers[:, k] = column
            rows = np.zeros((len(faces), _TRIANGLE_BYTES), np.uint8)
            rows[:, : 4 * _NUMBERS] = numbers.view(np.uint8)
            out.write(rows.data)
