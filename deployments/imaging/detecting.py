"""Boxes in a page: scale it into the network's square, read what comes out, choose, and scale back. Arrays only."""

from __future__ import annotations

import colorsys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from deployments.imaging.converting import flatten, to_bits
from deployments.imaging.layouts import Layout, read_output
from scangraph.contracts.images import has_alpha

#: What lies around an image in the network's input; YOLO networks were trained with it.
_GREY = 114
#: Boxes that are looked at; the rest, the least certain, would only take time.
_CANDIDATES = 30_000
_GOLDEN = 0.618

#: (1, 3, height, width) float32 RGB, 0 to 1 -> the network's output.
Network = Callable[[NDArray[np.float32]], NDArray[Any]]


@dataclass(frozen=True)
class Box:
    """Something that was found.

    Parameters
    ----------
    class_number, name, confidence
        What, and how certain, 0 to 1.
    corners : (x1, y1, x2, y2)
        In the page's pixels, from its upper left corner; (0, 0, width, height) is all of it.
    """

    class_number: int
    name: str
    confidence: float
    corners: tuple[float, float, float, float]

    def describe(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        corners = [round(value, 2) for value in self.corners]
        return {"class": self.class_number, "name": self.name, "confidence": round(self.confidence, 4), "box": corners}


@dataclass(frozen=True)
class Choice:
    """Which boxes are wanted; see `DetectParameters`."""

    confidence: float = 0.25
    iou: float = 0.45
    classes: Collection[int] | None = None
    most: int = 300


@dataclass(frozen=True)
class Fit:
    """How a page lies in the network's input: scaled, then moved by whole pixels (x, y)."""

    scale: tuple[float, float]
    moved: tuple[int, int]


def letterbox(page: NDArray[Any], size: tuple[int, int]) -> tuple[NDArray[np.float32], Fit]:
    """Scale a page into (height, width), with its aspect and in the middle.

    Returns
    -------
    (ndarray, Fit)
        (1, 3, height, width) float32, RGB from 0 to 1, and where the page lies in it.
    """
    colours = to_bits(flatten(page), 8)
    height, width = page.shape[:2]
    factor = min(size[0] / height, size[1] / width)
    inner = max(1, min(size[0], round(height * factor))), max(1, min(size[1], round(width * factor)))
    if inner != (height, width):
        how = cv2.INTER_AREA if factor < 1 else cv2.INTER_LINEAR
        colours = cv2.resize(colours, inner[::-1], interpolation=how)
    if colours.ndim == 2 or colours.shape[2] == 1:
        colours = cv2.cvtColor(colours, cv2.COLOR_GRAY2RGB)
    top, left = (size[0] - inner[0]) // 2, (size[1] - inner[1]) // 2
    bottom, right = size[0] - inner[0] - top, size[1] - inner[1] - left
    square = cv2.copyMakeBorder(colours, top, bottom, left, right, cv2.BORDER_CONSTANT, value=(_GREY,) * 3)
    planes = np.ascontiguousarray(square.transpose(2, 0, 1)[None]).astype(np.float32)
    planes *= np.float32(1 / 255)
    return planes, Fit((inner[1] / width, inner[0] / height), (left, top))


def detect(
    page: NDArray[Any], network: Network, layout: Layout, size: tuple[int, int], names: Sequence[str], choice: Choice
) -> list[Box]:
    """Find boxes in a page, the most certain first."""
    planes, fit = letterbox(page, size)
    corners, scores, classes = read_output(network(planes), layout, choice.confidence)
    if choice.classes is not None:
        wanted = np.isin(classes, list(choice.classes))
        corners, scores, classes = corners[wanted], scores[wanted], classes[wanted]
    order = np.argsort(-scores, kind="stable")[:_CANDIDATES]
    corners, scores, classes = corners[order], scores[order], classes[order]
    kept = np.arange(len(scores)) if layout.name == "end-to-end" else suppress(corners, classes, choice.iou)
    kept = kept[: choice.most]
    corners = (corners[kept] - np.tile(fit.moved, 2)) / np.tile(fit.scale, 2)
    corners = np.clip(corners, 0, np.tile([page.shape[1], page.shape[0]], 2))
    return [
        Box(int(number), names[number] if number < len(names) else str(number), float(score), (x1, y1, x2, y2))
        for (x1, y1, x2, y2), score, number in zip(corners.tolist(), scores[kept], classes[kept], strict=True)
    ]


def suppress(corners: NDArray[Any], classes: NDArray[Any], iou: float) -> NDArray[np.intp]:
    """Return which of some boxes stay, where of two of one class that overlap by more than `iou` the first one does.

    Parameters
    ----------
    corners : ndarray, shape (N, 4)
        x1, y1, x2, y2, the most certain first.
    """
    x1, y1, x2, y2 = corners.astype(np.float64).T
    areas = np.maximum(x2 - x1, 0) * np.maximum(y2 - y1, 0)
    left, kept = np.arange(len(corners)), []
    while len(left):
        first, left = left[0], left[1:]
        kept.append(first)
        across = np.minimum(x2[first], x2[left]) - np.maximum(x1[first], x1[left])
        down = np.minimum(y2[first], y2[left]) - np.maximum(y1[first], y1[left])
        shared = np.maximum(across, 0) * np.maximum(down, 0)
        union = areas[first] + areas[left] - shared
        left = left[(shared <= iou * union) | (classes[left] != classes[first])]
    return np.array(kept, np.intp)


def draw(page: NDArray[Any], boxes: Sequence[Box]) -> NDArray[Any]:
    """Return a page, in colour, with boxes and what they are."""
    colours = np.repeat(page[..., :1], 3, axis=2) if page.shape[2] < 3 else page[..., :3]
    before = to_bits(colours, 8)
    painted = _painted(before.copy(), boxes)
    if page.dtype == np.uint16:  # OpenCV writes on 8 bits only
        colours = np.where((painted != before).any(axis=2, keepdims=True), to_bits(painted, 16), colours)
    else:
        colours = painted
    return np.concatenate([colours, page[..., -1:]], axis=2) if has_alpha(page) else colours


def _painted(colours: NDArray[np.uint8], boxes: Sequence[Box]) -> NDArray[np.uint8]:
    thickness = max(1, round(min(colours.shape[:2]) / 300))
    scale = 0.45 * thickness
    for box in reversed(boxes):  # the most certain on top
        colour = tuple(255 * value for value in _colour(box.class_number))
        (x1, y1), (x2, y2) = ((round(x), round(y)) for x, y in (box.corners[:2], box.corners[2:]))
        cv2.rectangle(colours, (x1, y1), (x2 - 1, y2 - 1), colour, thickness)
        text = f"{box.name} {box.confidence:.2f}"
        (width, height), below = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, scale, thickness)
        bottom = y1 if y1 >= height + below else y1 + height + below
        cv2.rectangle(colours, (x1, bottom - height - below), (x1 + width, bottom), colour, cv2.FILLED)
        cv2.putText(colours, text, (x1, bottom - below // 2), cv2.FONT_HERSHEY_SIMPLEX, scale, (0, 0, 0), thickness)
    return colours


def _colour(number: int) -> tuple[float, float, float]:
    """Return a bright colour, far from those of the neighbouring numbers."""
    return colorsys.hsv_to_rgb(number * _GOLDEN % 1, 0.75, 1)
