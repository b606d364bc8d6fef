"""The structures of a scene under the names that files can have, and the blocks in which they are written."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from scangraph.contracts import Label, Line, Scene, Surface, label_table, plain_name

NOTICE = "Research use only. Not a medical device."
#: Farther than this from the world's origin nothing is that was scanned; and OBJ's digits are whole numbers of 64 bits.
_FARTHEST_MM = 1e9
#: Rows (vertices, triangles) that are written at a time: what becomes of them stays in the processor's cache.
_ROWS = 1 << 15
#: Spaces end a name in OBJ, `#` begins a comment there, and a backslash joins lines.
_UNFIT = re.compile(r"[\s#\\]+")


R = TypeVar("R", bound=np.generic)


class Sink(Protocol):
    """What takes bytes."""

    def write(self, data: bytes | memoryview, /) -> Any:
        """Take the next ones."""


@dataclass(frozen=True)
class Structure:
    """A surface as it is called in files.

    Parameters
    ----------
    surface : Surface
        Positions in the scene's frame, mm.
    key : str
        Its name without spaces, the same at every level; no other structure has it. Objects, groups and materials have it.
    file_key : str
        The same in letters that every file system knows; no other structure has it, in small letters either.
    label : Label
        What the label table knows of it, and otherwise only its name and number.
    """

    surface: Surface
    key: str
    file_key: str
    label: Label


def structures_of(scene: Scene) -> dict[int, list[Structure]]:
    """Name the structures of a scene.

    Returns
    -------
    dict
        Level of detail -> its structures, the finest level first; level 0 of an empty scene is empty.

    Raises
    ------
    ValueError
        If a vertex is not finite or absurdly far away, or a triangle has a corner that is no vertex.
    """
    levels: dict[int, list[Structure]] = {}
    names: dict[tuple[str, int, int], tuple[str, str]] = {}  # a structure is called the same at every level
    keys, file_keys = set[str](), set[str]()
    for surface in sorted(scene.surfaces, key=lambda s: s.level):  # stable: within a level the order stays
        _check(surface)
        level = levels.setdefault(surface.level, [])
        name, otherwise = one_line(surface.name), f"label_{surface.label}"
        twin = sum((s.surface.name, s.surface.label) == (surface.name, surface.label) for s in level)
        which = (surface.name, surface.label, twin)
        if which not in names:
            key = _unique(_UNFIT.sub("_", name).strip("_") or otherwise, surface.label, keys)
            names[which] = key, _unique(plain_name(name) or otherwise, surface.label, file_keys)
        known = label_table().get(surface.label)
        if known is None or known.name != surface.name:  # a number that means something else here has no code either
            known = Label(number=surface.label, name=name or otherwise, color=surface.color)
        level.append(Structure(surface, *names[which], known))
    return levels or {0: []}


def lines_of(scene: Scene, structures: Sequence[Structure]) -> list[tuple[str, Line]]:
    """Return the centrelines with names that no structure and no other line has.

    Raises
    ------
    ValueError
        If a point is not finite.
    """
    taken, named = {structure.key.lower() for structure in structures}, []
    for line in scene.lines:
        if not np.isfinite(line.points_mm).all():
            raise ValueError(f"{line.name} has points that are not finite")
        named.append((_unique(f"{_UNFIT.sub('_', one_line(line.name)).strip('_')}_centreline", line.label, taken), line))
    return named


def one_line(text: str) -> str:
    """Return a text without line breaks and without what cannot be written or seen."""
    written = text.encode("utf-8", "replace").decode()
    return " ".join("".join(c if c.isprintable() else " " for c in written).split())


def notes_of(scene: Scene) -> list[str]:
    """Return what a reader must know, on a line each; whatever the scene says, its use is for research only."""
    return list(dict.fromkeys([NOTICE, *map(one_line, scene.notes)]))


def blocks(rows: NDArray[R]) -> Iterator[NDArray[R]]:
    """Cut an array into blocks of rows."""
    for start in range(0, len(rows), _ROWS):
        yield rows[start : start + _ROWS]


Columns = tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]


def columns_of(rows: NDArray[R]) -> tuple[NDArray[R], NDArray[R], NDArray[R]]:
    """Return the columns of (N, 3) rows, each in one piece: reading and computing then run at the memory's speed."""
    first, second, third = (np.ascontiguousarray(column) for column in rows.T)
    return first, second, third


def triangle_normals(a: Columns, b: Columns, c: Columns) -> Columns:
    """Return the normals of triangles with these corners, twice as long as their area; all as columns x, y, z."""
    ux, uy, uz = (end - start for start, end in zip(a, b, strict=True))
    vx, vy, vz = (end - start for start, end in zip(a, c, strict=True))
    return uy * vz - uz * vy, uz * vx - ux * vz, ux * vy - uy * vx


def corners_of(axes: Columns, faces: NDArray[np.int32]) -> tuple[Columns, Columns, Columns]:
    """Return the three corners of each triangle as columns x, y, z; `axes` are the vertices' columns."""
    x, y, z = axes
    a, b, c = ((x.take(corner), y.take(corner), z.take(corner)) for corner in columns_of(faces))
    return a, b, c


def vertex_normals(vertices_mm: NDArray[np.float32], faces: NDArray[np.int32]) -> NDArray[np.float32]:
    """Return the vertices' unit normals, each the mean of its triangles' by area.

    Returns
    -------
    ndarray, shape (V, 3), float32
        (0, 0, 1) where a vertex has no area: glTF allows no other length than 1.
    """
    sums = np.empty((len(vertices_mm), 3))
    indices = columns_of(faces.astype(np.intp))
    for axis, part in enumerate(triangle_normals(*corners_of(columns_of(vertices_mm), faces))):
        weights = part.astype(np.float64)
        sums[:, axis] = sum(np.bincount(index, weights, len(sums)) for index in indices)
    lengths = np.sqrt(np.einsum("ij,ij->i", sums, sums))
    flat = lengths == 0
    sums[flat], lengths[flat] = (0, 0, 1), 1
    normals: NDArray[np.float32] = (sums / lengths[:, None]).astype(np.float32)
    return normals


def _check(surface: Surface) -> None:
    vertices, faces = surface.vertices_mm, surface.faces
    if len(vertices) and not max(-float(vertices.min()), float(vertices.max())) < _FARTHEST_MM:  # NaN is in both
        raise ValueError(f"{surface.name} has vertices that are not finite, or farther than {_FARTHEST_MM:g} mm away")
    if len(faces) and not (int(faces.min()) >= 0 and int(faces.max()) < len(vertices)):
        raise ValueError(f"{surface.name} has triangles whose corners are none of its {len(vertices)} vertices")


def _unique(name: str, label: int, taken: set[str]) -> str:
    """Return the name, with the label's number and then a count behind it while it is taken; capitals do not matter."""
    wanted, count = name, 1
    while wanted.lower() in taken:
        wanted = f"{name}_{label}" if count == 1 else f"{name}_{label}_{count}"
        count += 1
    taken.add(wanted.lower())
    return wanted
