"""Scenes as Wavefront OBJ text with materials.

OBJ has no unit and no frame, so both are said in comments; `SPACE=LPS` is 3D Slicer's convention since 2020.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from scangraph.contracts import Scene

#: Decimals of a coordinate: 0.1 µm, what float32 resolves at a metre from the origin.
_PLACES = 4
#: Rows formatted at a time: their text stays in the processor's cache, and memory does not grow with the scene.
_ROWS = 1 << 15


def write_obj(scene: Scene, mtl_name: str = "scene.mtl") -> tuple[bytes, bytes]:
    """Write a scene, one object, group and material per structure; centrelines as line elements.

    Parameters
    ----------
    scene : Scene
        Surfaces in millimetres; equal scenes give equal bytes.
    mtl_name : str
        File name under which the second part will lie beside the first.

    Returns
    -------
    (bytes, bytes)
        OBJ and MTL text; coordinates to 0.1 µm.

    Raises
    ------
    ValueError
        If a vertex is not finite.
    """
    head = ["scangraph scene", "unit: mm", f"SPACE={scene.frame}", *scene.notes]
    parts = [*(f"# {_one_line(note)}\n".encode() for note in head), f"mtllib {_one_line(mtl_name)}\n".encode()]
    materials = ["# scangraph materials\n"]
    first = 1  # OBJ counts vertices from 1 through the whole file
    for surface in scene.surfaces:
        if not np.isfinite(surface.vertices_mm).all():
            raise ValueError(f"{surface.name} has vertices that are not finite")
        name = "_".join(surface.name.split())  # names end at a space, statements at a line's end
        red, green, blue = (c / 255 for c in surface.color)
        materials.append(f"newmtl {name}\nKd {red:.4f} {green:.4f} {blue:.4f}\nKs 0.1000 0.1000 0.1000\nNs 20\nd 1.0\n")
        parts.append(f"o {name}\ng {name}\nusemtl {name}\n".encode())
        parts += [
            _lines("v", np.rint(rows * np.float64(10**_PLACES)).astype(np.int64), _PLACES)
            for rows in _blocks(surface.vertices_mm)
        ]
        parts += [_lines("f", rows.astype(np.int64) + first) for rows in _blocks(surface.faces)]
        first += len(surface.vertices_mm)
    for line in scene.lines:
        if not np.isfinite(line.points_mm).all():
            raise ValueError(f"{line.name} has points that are not finite")
        name = "_".join(line.name.split()) + "_centreline"
        red, green, blue = (c / 255 for c in line.color)
        materials.append(f"newmtl {name}\nKd {red:.4f} {green:.4f} {blue:.4f}\nd 1.0\n")
        parts.append(f"o {name}\ng {name}\nusemtl {name}\n".encode())
        parts += [
            _lines("v", np.rint(rows * np.float64(10**_PLACES)).astype(np.int64), _PLACES) for rows in _blocks(line.points_mm)
        ]
        parts.append("".join(f"l {a + first} {b + first}\n" for a, b in line.segments.tolist()).encode())
        first += len(line.points_mm)
    return b"".join(parts), "".join(materials).encode()


def _blocks(rows: NDArray[Any]) -> list[NDArray[Any]]:
    return [rows[start : start + _ROWS] for start in range(0, len(rows), _ROWS)]


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _lines(letter: str, whole: NDArray[np.int64], places: int = 0) -> bytes:
    """Write rows of three whole numbers as text, each divided by 10 to the power of `places`.

    All numbers get the same number of columns, right-aligned; columns are filled digit by digit for all numbers at once, and
    those that stay empty (zero bytes) are left out at the end. Over four times as fast as `%` on a million triangles.
    """
    values = whole.reshape(-1)
    rest = np.abs(values)
    if int(rest.max()) < 2**32:
        rest = rest.astype(np.uint32)  # divides several times as fast
    digits = max(len(str(int(rest.max()))), places + 1)
    columns = np.zeros((2 + digits + (places > 0), values.size), np.uint8)  # sign, digits, point, separator
    columns[-1] = ord(" ")
    columns[-1, 2::3] = ord("\n")
    at = len(columns) - 2
    for k in range(digits):
        if places and k == places:
            columns[at] = ord(".")
            at -= 1
        tens = rest // 10
        columns[at] = rest - tens * 10 + ord("0")
        if k > places:
            columns[at] *= rest > 0  # no leading zeros
        rest, at = tens, at - 1
    below_zero = np.flatnonzero(values < 0)
    columns[(columns[:, below_zero] != 0).argmax(axis=0) - 1, below_zero] = ord("-")
    text = np.empty((len(whole), 2 + 3 * len(columns)), np.uint8)
    text[:, 0], text[:, 1] = ord(letter), ord(" ")
    text[:, 2:] = columns.T.reshape(len(whole), -1)
    return bytes(text[text != 0].data)
