"""Scenes: named, coloured surfaces in world space."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, field
from typing import Any, Literal, SupportsIndex

import numpy as np
from numpy.typing import NDArray

from scangraph.contracts.errors import InvalidVolume

Frame = Literal["LPS", "RAS"]


def _rebuild(name: str, label: int, color: tuple[int, int, int], vertices: Any, faces: Any) -> Surface:
    return Surface(
        name, label, color, np.frombuffer(vertices, np.float32).reshape(-1, 3), np.frombuffer(faces, np.int32).reshape(-1, 3)
    )


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

    Notes
    -----
    Pickles as `Volume` does: no numpy class is named, the buffers travel out of band.
    """

    name: str
    label: int
    color: tuple[int, int, int]
    vertices_mm: NDArray[np.float32]
    faces: NDArray[np.int32]

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

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        def buffer(array: NDArray[Any]) -> Any:
            raw = array.reshape(-1).view(np.uint8)
            return pickle.PickleBuffer(raw.data) if int(protocol) >= 5 else raw.tobytes()

        return _rebuild, (self.name, self.label, self.color, buffer(self.vertices_mm), buffer(self.faces))

    @property
    def volume_ml(self) -> float:
        """Enclosed volume by the divergence theorem; negative where faces point inward."""
        if not len(self.faces):
            return 0.0
        # Around the centroid, so that float error does not grow with the distance from the world's origin.
        vertices = self.vertices_mm.astype(np.float64) - self.vertices_mm.mean(axis=0, dtype=np.float64)
        a, b, c = (vertices[self.faces[:, k]] for k in range(3))
        return float(np.einsum("ij,ij->", a, np.cross(b, c)) / 6000)


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
        In the order of their labels.
    frame : "LPS" or "RAS"
        Which way x and y lead; see `Volume`.
    notes : tuple of str
        What a reader of the scene must know, written into every file made of it.
    lines : tuple of Line
        Centrelines beside, or instead of, the surfaces.
    """

    surfaces: tuple[Surface, ...]
    frame: Frame = "LPS"
    notes: tuple[str, ...] = field(default=())
    lines: tuple[Line, ...] = field(default=())

    def in_frame(self, frame: Frame) -> Scene:
        """Return the same scene in LPS or RAS. Both negate x and y, a rotation: no face changes its orientation."""
        if frame == self.frame:
            return self
        turn = np.array([-1, -1, 1], np.float32)
        turned = tuple(Surface(s.name, s.label, s.color, s.vertices_mm * turn, s.faces) for s in self.surfaces)
        lines = tuple(Line(e.name, e.label, e.color, e.points_mm * turn, e.segments) for e in self.lines)
        return Scene(turned, frame, self.notes, lines)
