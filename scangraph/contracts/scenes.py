"""Scenes: named, coloured surfaces in world space, and how they want to be written."""

from __future__ import annotations

import math
import numbers
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, SupportsIndex, get_args

import numpy as np
from numpy.typing import NDArray

from scangraph.contracts.errors import InvalidVolume, UsageError

Frame = Literal["LPS", "RAS"]
SceneFormat = Literal["obj", "glb", "stl", "ply"]
GlbUnit = Literal["m", "mm"]
#: Triangles of a scene that a browser turns smoothly.
SCREEN_TRIANGLES = 150_000


def _rebuild(
    name: str,
    label: int,
    color: tuple[int, int, int],
    vertices: Any,
    faces: Any,
    measures: Mapping[str, Any],
    level: int,
) -> Surface:
    corners, triangles = np.frombuffer(vertices, np.float32), np.frombuffer(faces, np.int32)
    return Surface(name, label, color, corners.reshape(-1, 3), triangles.reshape(-1, 3), measures, level)


def _plain(value: Any) -> Any:
    """Return a value as JSON has it: numpy's numbers would carry numpy's names into pickles, and JSON has no NaN."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, np.bool_):
        return bool(value)
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray | memoryview):
        return [_plain(one) for one in value]
    raise InvalidVolume(detail=f"a {type(value).__name__} among the measures or facts is no JSON value")


@dataclass(frozen=True, eq=False)
class Surface:
    """One structure's closed surface.

    Parameters
    ----------
    name : str
        As in the label table.
    label : int
        Its number there.
    color : (r, g, b)
        0-255.
    vertices_mm : ndarray, shape (V, 3), float32
        Positions in the scene's frame.
    faces : ndarray, shape (F, 3), int32
        Corners of each triangle, counter-clockwise seen from outside.
    measures : mapping
        What is known of it, as plain JSON values; what is NaN or infinite becomes null. Lengths are in mm, `box_mm` is
        [[x, y, z], [x, y, z]], lowest and highest corner in the scene's frame.
    level : int
        Level of detail: 0 is the finest, the same structure's coarser surfaces count up.

    Notes
    -----
    Pickles as `Volume` does: no numpy class is named, the buffers travel out of band.
    """

    name: str
    label: int
    color: tuple[int, int, int]
    vertices_mm: NDArray[np.float32]
    faces: NDArray[np.int32]
    measures: Mapping[str, Any] = field(default_factory=dict)
    level: int = 0

    def __post_init__(self) -> None:
        vertices = np.ascontiguousarray(self.vertices_mm, np.float32)
        faces = np.ascontiguousarray(self.faces, np.int32)
        if vertices.ndim != 2 or faces.ndim != 2 or vertices.shape[1] != 3 or faces.shape[1] != 3:
            raise InvalidVolume(detail=f"a surface is (V, 3) vertices and (F, 3) faces, got {vertices.shape} and {faces.shape}")
        # Plain numbers, as in `Volume`: numpy scalars would carry numpy's module names into pickles.
        red, green, blue = map(int, self.color)
        object.__setattr__(self, "label", int(self.label))
        object.__setattr__(self, "color", (red, green, blue))
        object.__setattr__(self, "vertices_mm", vertices)
        object.__setattr__(self, "faces", faces)
        object.__setattr__(self, "measures", _plain(self.measures))
        object.__setattr__(self, "level", int(self.level))
        if self.level < 0:
            raise InvalidVolume(detail=f"levels of detail count from 0, {self.name!r} has {self.level}")

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        def buffer(array: NDArray[Any]) -> Any:
            raw = array.reshape(-1).view(np.uint8)
            return pickle.PickleBuffer(raw.data) if int(protocol) >= 5 else raw.tobytes()

        arrays = buffer(self.vertices_mm), buffer(self.faces)
        return _rebuild, (self.name, self.label, self.color, *arrays, self.measures, self.level)

    @property
    def volume_ml(self) -> float:
        """Enclosed volume by the divergence theorem; negative where faces point inward."""
        if not len(self.faces):
            return 0.0
        # Around the centroid, so that float error does not grow with the distance from the world's origin.
        vertices = self.vertices_mm.astype(np.float64) - self.vertices_mm.mean(axis=0, dtype=np.float64)
        a, b, c = (vertices[self.faces[:, k]] for k in range(3))
        return float(np.einsum("ij,ij->", a, np.cross(b, c)) / 6000)


@dataclass(frozen=True)
class SceneFiles:
    """How a scene wants to be written.

    Parameters
    ----------
    formats : tuple of "obj", "glb", "stl", "ply"
        At least one; the first one's file is the main one, except that OBJ goes before all others.
    per_structure : bool
        One file for each structure instead of one with all.
    zipped : bool
        All files in one .zip.
    glb_unit : "m" or "mm"
        glTF wants metres; millimetres are for programs that do not scale.

    Raises
    ------
    UsageError
        If there is no format, or one that is not known.
    """

    formats: tuple[SceneFormat, ...] = ("obj",)
    per_structure: bool = False
    zipped: bool = False
    glb_unit: GlbUnit = "m"

    def __post_init__(self) -> None:
        formats = tuple(dict.fromkeys(self.formats))
        if not formats or set(formats) - set(get_args(SceneFormat)):
            known = ", ".join(get_args(SceneFormat))
            raise UsageError(detail=f"the formats of a scene are one or more of {known}, got {', '.join(formats) or 'none'}")
        if self.glb_unit not in get_args(GlbUnit):
            raise UsageError(detail=f"a GLB is in m or mm, not in {self.glb_unit!r}")
        object.__setattr__(self, "formats", tuple(sorted(formats, key=lambda name: name != "obj")))


def _rebuild_line(name: str, label: int, color: tuple[int, int, int], points: Any, segments: Any) -> Line:
    return Line(
        name, label, color, np.frombuffer(points, np.float32).reshape(-1, 3), np.frombuffer(segments, np.int32).reshape(-1, 2)
    )


@dataclass(frozen=True, eq=False)
class Line:
    """One structure's centrelines.

    Parameters
    ----------
    name, label, color
        As in `Surface`.
    points_mm : ndarray, shape (P, 3), float32
        Positions in the scene's frame.
    segments : ndarray, shape (S, 2), int32
        Which points are joined.
    """

    name: str
    label: int
    color: tuple[int, int, int]
    points_mm: NDArray[np.float32]
    segments: NDArray[np.int32]

    def __post_init__(self) -> None:
        points = np.ascontiguousarray(self.points_mm, np.float32)
        segments = np.ascontiguousarray(self.segments, np.int32)
        if points.ndim != 2 or segments.ndim != 2 or points.shape[1] != 3 or segments.shape[1] != 2:
            raise InvalidVolume(detail=f"lines are (P, 3) points and (S, 2) segments, got {points.shape} and {segments.shape}")
        red, green, blue = map(int, self.color)
        object.__setattr__(self, "label", int(self.label))
        object.__setattr__(self, "color", (red, green, blue))
        object.__setattr__(self, "points_mm", points)
        object.__setattr__(self, "segments", segments)

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        def buffer(array: NDArray[Any]) -> Any:
            raw = array.reshape(-1).view(np.uint8)
            return pickle.PickleBuffer(raw.data) if int(protocol) >= 5 else raw.tobytes()

        return _rebuild_line, (self.name, self.label, self.color, buffer(self.points_mm), buffer(self.segments))


@dataclass(frozen=True, eq=False)
class Scene:
    """Surfaces that share one world frame, in millimetres.

    Parameters
    ----------
    surfaces : tuple of Surface
        In the order of their labels; of one structure, the finest first.
    frame : "LPS" or "RAS"
        Which way x and y lead; see `Volume`.
    notes : tuple of str
        What a reader of the scene must know, written into every file made of it.
    files : SceneFiles
        What it becomes when it is saved.
    facts : mapping
        Plain JSON values about the whole scene, for its manifest: the source's grid, the parameters.
    lines : tuple of Line
        Centrelines beside, or instead of, the surfaces.
    screen : tuple of Surface
        The same structures with few triangles, for copies that screens show; in none of the scene's files.
    """

    surfaces: tuple[Surface, ...]
    frame: Frame = "LPS"
    notes: tuple[str, ...] = field(default=())
    files: SceneFiles = field(default=SceneFiles())
    facts: Mapping[str, Any] = field(default_factory=dict)
    lines: tuple[Line, ...] = field(default=())
    screen: tuple[Surface, ...] = field(default=())

    def __post_init__(self) -> None:
        object.__setattr__(self, "facts", _plain(self.facts))

    def in_frame(self, frame: Frame) -> Scene:
        """Return the same scene in LPS or RAS. Both negate x and y, a rotation: no face changes its orientation."""
        if frame == self.frame:
            return self
        turn = np.array([-1, -1, 1], np.float32)
        turned, screen = (
            tuple(replace(s, vertices_mm=s.vertices_mm * turn, measures=_turned(s.measures)) for s in some)
            for some in (self.surfaces, self.screen)
        )
        lines = tuple(replace(line, points_mm=line.points_mm * turn) for line in self.lines)
        return replace(self, surfaces=turned, frame=frame, lines=lines, screen=screen)

    def on_screen(self, most: int = SCREEN_TRIANGLES) -> tuple[Surface, ...]:
        """Return what a screen shows: `screen`, or the finest level of at most so many triangles, or the coarsest."""
        if self.screen:
            return self.screen
        levels: dict[int, list[Surface]] = {}
        for surface in self.surfaces:
            levels.setdefault(surface.level, []).append(surface)
        fine = [level for level, some in levels.items() if sum(len(surface.faces) for surface in some) <= most]
        chosen = min(fine) if fine else max(levels, default=0)
        return tuple(levels.get(chosen, ()))


def _turned(measures: Mapping[str, Any]) -> Mapping[str, Any]:
    """Turn what is said about places: the box's lowest x and y become its highest."""
    if measures.get("box_mm") is None:
        return measures
    (x0, y0, z0), (x1, y1, z1) = measures["box_mm"]
    return {**measures, "box_mm": [[-x1, -y1, z0], [-x0, -y0, z1]]}
