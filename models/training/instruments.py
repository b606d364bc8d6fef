"""Drawn pictures of instruments on a tray, and where each of them is, for the demonstration detector."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

CLASSES = ("scissors", "forceps", "scalpel", "swab")
#: cv2 draws to a 16th of a pixel.
_SHIFT = 4
#: What is covered by others to more than this is not asked for.
_HIDDEN = 0.6
_SMALLEST = 8

Image = NDArray[np.uint8]
Points = NDArray[np.float64]


class Picture(NamedTuple):
    """A picture, (height, width, 3) RGB, its boxes, (N, 4) x1 y1 x2 y2 in pixels, and their classes, (N,)."""

    pixels: Image
    boxes: NDArray[np.float64]
    classes: NDArray[np.int64]


def draw_picture(seed: int, width: int, height: int) -> Picture:
    """Draw a picture; a seed and a size always give the same one."""
    rng = np.random.default_rng(seed)
    canvas = _background(rng, width, height)
    owner = np.zeros((height, width), np.uint8)
    for _ in range(rng.integers(0, 5)):
        _distract(rng, canvas)
    drawn: list[tuple[int, int]] = []
    for number in range(1, rng.integers(1, 7) + 1):
        kind = int(rng.integers(len(CLASSES)))
        shape = np.zeros((height, width), np.uint8)
        size = min(width, height) * rng.uniform(0.14, 0.5)
        place = _Place(rng.uniform(0.1, 0.9, 2) * (width, height), rng.uniform(0, 2 * np.pi), size)
        _DRAW[kind](rng, canvas, shape, place)
        owner[shape > 127] = number
        drawn.append((kind, int((shape > 127).sum())))
    boxes, classes = [], []
    for number, (kind, whole) in enumerate(drawn, 1):
        rows, columns = np.nonzero(owner == number)
        if len(rows) < (1 - _HIDDEN) * whole or not len(rows):
            continue
        box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        if min(box[2] - box[0], box[3] - box[1]) >= _SMALLEST * min(width, height) / 320:
            boxes.append(box)
            classes.append(kind)
    pixels = _photographed(rng, canvas)
    return Picture(pixels, np.array(boxes, np.float64).reshape(-1, 4), np.array(classes, np.int64))


class _Place(NamedTuple):
    """Where something lies: its middle, its angle, its length, in pixels."""

    middle: Points
    angle: float
    size: float

    def points(self, local: list[tuple[float, float]]) -> Points:
        """Turn points in units of the length, around the middle, into pixels."""
        cos, sin = np.cos(self.angle), np.sin(self.angle)
        return np.asarray(self.middle + self.size * np.array(local) @ np.array([[cos, sin], [-sin, cos]]))


def _background(rng: np.random.Generator, width: int, height: int) -> Image:
    base = rng.uniform(40, 220, 3)
    tilt = rng.uniform(-50, 50, (2, 1, 1, 3))
    y, x = np.linspace(-0.5, 0.5, height)[:, None], np.linspace(-0.5, 0.5, width)
    angle, waves = rng.uniform(0, np.pi), rng.uniform(5, 60)
    folds = rng.uniform(0, 14) * np.sin((waves * (x * np.cos(angle) + y * np.sin(angle))).astype(np.float32))
    slope = (base + tilt[0] * y[..., None]).astype(np.float32) + (tilt[1] * x[:, None]).astype(np.float32)
    return np.asarray(np.clip(slope + folds[..., None], 0, 255).astype(np.uint8))


def _distract(rng: np.random.Generator, canvas: Image) -> None:
    """Draw what is no instrument: a cable, a bowl, a label."""
    height, width = canvas.shape[:2]
    colour = tuple(map(float, rng.uniform(20, 235, 3)))
    place = _Place(rng.uniform(0, 1, 2) * (width, height), rng.uniform(0, 6.3), min(width, height) * rng.uniform(0.2, 0.8))
    kind = rng.integers(3)
    if kind == 0:
        t = np.linspace(-0.5, 0.5, 24)
        bend = rng.uniform(-0.3, 0.3)
        curve = place.points([(float(s), float(bend * np.sin(3 * s * np.pi))) for s in t])
        cv2.polylines(canvas, [_fixed(curve)], False, colour, int(rng.integers(1, 5)), cv2.LINE_AA, _SHIFT)
    elif kind == 1:
        radius = int(place.size * 0.3 * 2**_SHIFT)
        thickness = int(rng.choice([-1, 2, 6]))
        cv2.circle(canvas, tuple(map(int, _fixed(place.middle)[0])), radius, colour, thickness, cv2.LINE_AA, _SHIFT)
    else:
        corners = place.points([(-0.3, -0.2), (0.3, -0.2), (0.3, 0.2), (-0.3, 0.2)])
        cv2.fillPoly(canvas, [_fixed(corners)], colour, cv2.LINE_AA, _SHIFT)


def _fixed(points: Points) -> NDArray[np.int32]:
    return np.asarray(np.rint(np.atleast_2d(points) * 2**_SHIFT).astype(np.int32))


def _steel(rng: np.random.Generator) -> tuple[float, float, float]:
    grey = rng.uniform(90, 250)
    r, g, b = np.clip(grey + rng.normal(0, 8, 3), 0, 255)
    return float(r), float(g), float(b)


def _stroke(canvas: Image, shape: Image, points: Points, thickness: float, colour: tuple[float, ...]) -> None:
    width = max(1, round(thickness))
    for target, value in ((canvas, colour), (shape, (255.0,))):
        cv2.polylines(target, [_fixed(points)], False, value, width, cv2.LINE_AA, _SHIFT)


def _fill(canvas: Image, shape: Image, points: Points, colour: tuple[float, ...]) -> None:
    for target, value in ((canvas, colour), (shape, (255.0,))):
        cv2.fillPoly(target, [_fixed(points)], value, cv2.LINE_AA, _SHIFT)


def _ring(canvas: Image, shape: Image, middle: Points, radius: float, thickness: float, colour: tuple[float, ...]) -> None:
    at = tuple(map(int, _fixed(middle)[0]))
    for target, value in ((canvas, colour), (shape, (255.0,))):
        cv2.circle(target, at, round(radius * 2**_SHIFT), value, max(1, round(thickness)), cv2.LINE_AA, _SHIFT)


def _scissors(rng: np.random.Generator, canvas: Image, shape: Image, place: _Place) -> None:
    """Two blades that cross, a ring at the end of each."""
    opening, colour, thick = rng.uniform(0.05, 0.3), _steel(rng), place.size * rng.uniform(0.03, 0.05)
    for side in (-1, 1):
        tip, ring = (0.5, side * opening / 2), (-0.38, -side * (0.1 + opening / 2))
        _fill(canvas, shape, place.points([(0, -0.025), tip, (0, 0.025)]), colour)
        _stroke(canvas, shape, place.points([(0.05, 0), ring]), thick, colour)
        middle = place.points([(ring[0] - 0.08, ring[1])])[0]
        _ring(canvas, shape, middle, 0.085 * place.size, thick, colour)


def _forceps(rng: np.random.Generator, canvas: Image, shape: Image, place: _Place) -> None:
    """Two arms that meet at one end."""
    opening, colour, thick = rng.uniform(0.08, 0.22), _steel(rng), place.size * rng.uniform(0.03, 0.055)
    for side in (-1, 1):
        arm = [(-0.5, 0.0), (-0.2, side * opening * 0.4), (0.2, side * opening * 0.5), (0.5, side * opening * 0.2)]
        _stroke(canvas, shape, place.points(arm), thick, colour)


def _scalpel(rng: np.random.Generator, canvas: Image, shape: Image, place: _Place) -> None:
    """A handle, and a blade with one slanted edge."""
    colour, thick = _steel(rng), rng.uniform(0.025, 0.04)
    handle = tuple(map(float, rng.uniform(30, 220, 3))) if rng.random() < 0.5 else colour
    _fill(canvas, shape, place.points([(-0.5, -thick), (0.15, -thick), (0.15, thick), (-0.5, thick)]), handle)
    side = rng.choice([-1, 1])
    blade = [(0.15, -0.8 * thick), (0.15, 0.8 * thick), (0.32, side * 1.6 * thick), (0.5, -side * 1.6 * thick)]
    _fill(canvas, shape, cv2.convexHull(place.points(blade).astype(np.float32))[:, 0].astype(np.float64), colour)


def _swab(rng: np.random.Generator, canvas: Image, shape: Image, place: _Place) -> None:
    """A square of white cloth with a coloured thread."""
    half = 0.25 * rng.uniform(0.8, 1.2, 2)
    corners = np.array([(-half[0], -half[1]), (half[0], -half[1]), (half[0], half[1]), (-half[0], half[1])])
    corners += rng.normal(0, 0.015, corners.shape)
    white = float(rng.uniform(205, 255))
    _fill(canvas, shape, place.points([(float(x), float(y)) for x, y in corners]), (white, white, white * 0.97))
    for offset in np.linspace(-0.8, 0.8, 5):
        line = place.points([(-half[0] * 0.9, offset * half[1]), (half[0] * 0.9, offset * half[1])])
        cv2.polylines(canvas, [_fixed(line)], False, (white * 0.9,) * 3, 1, cv2.LINE_AA, _SHIFT)
    thread = place.points([(-half[0] * 0.9, -half[1] * 0.5), (half[0] * 0.9, half[1] * 0.4)])
    cv2.polylines(canvas, [_fixed(thread)], False, (30.0, 70.0, 190.0), max(1, round(place.size * 0.02)), cv2.LINE_AA, _SHIFT)


_DRAW: tuple[Callable[[np.random.Generator, Image, Image, _Place], None], ...] = (_scissors, _forceps, _scalpel, _swab)


def _photographed(rng: np.random.Generator, canvas: Image) -> Image:
    """Out of focus by a little, lit, and noisy."""
    soft = cv2.GaussianBlur(canvas, (0, 0), rng.uniform(0.3, 1.2)).astype(np.float32)
    soft *= rng.uniform(0.7, 1.2)
    soft += np.float32(rng.uniform(1, 9)) * rng.standard_normal(canvas.shape, np.float32)
    return np.clip(soft, 0, 255).astype(np.uint8)
