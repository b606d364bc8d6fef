"""How YOLO networks arrange what they found, told by the shape of their output.

A network divides its input into cells of 8, 16 and 32 pixels. From v8 on each cell gives one box (a column: cx, cy, w, h, then
a score a class), before that three (a row: cx, cy, w, h, how certain that there is anything, then a score a class). Networks
that choose by themselves give rows of x1, y1, x2, y2, score and class.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_STRIDES = (8, 16, 32, 64)
_BOX, _CHOSEN = 4, 6
#: A network that chooses by itself gives so many boxes at most.
_MOST_CHOSEN = 1000


@dataclass(frozen=True)
class Layout:
    """How an output is read.

    Parameters
    ----------
    name : "v5", "v8" or "end-to-end"
    classes : int
        How many it has; 0 where the shape does not say.
    boxes_last : bool
        Boxes are columns, as v8 writes them, not rows.
    """

    name: str
    classes: int
    boxes_last: bool = False


def recognise(shape: tuple[int, ...], input_size: tuple[int, int], wanted: str | None = None) -> Layout | None:
    """Tell the layout of an output.

    Parameters
    ----------
    shape : tuple of int
        (1, a, b).
    input_size : (height, width)
        Of the network.
    wanted : str, optional
        What the manifest says.

    Returns
    -------
    Layout or None
        None where it is none of these.
    """
    if len(shape) != 3 or shape[0] != 1:
        return None
    for layout in _fitting(shape[1], shape[2], input_size):
        if wanted in {None, layout.name}:
            return layout
    return None


def _fitting(first: int, second: int, input_size: tuple[int, int]) -> list[Layout]:
    height, width = input_size
    cells = [-(-height // stride) * -(-width // stride) for stride in _STRIDES]
    counts = {sum(cells[:3]), sum(cells)}  # the largest networks have cells of 64 pixels, too
    found = []
    for boxes, values, last in ((second, first, True), (first, second, False)):
        if boxes in counts and values > _BOX:
            found.append(Layout("v8", values - _BOX, last))
        if boxes in {3 * count for count in counts} and values > _BOX + 1:
            found.append(Layout("v5", values - _BOX - 1, last))
    if second == _CHOSEN and first <= _MOST_CHOSEN:
        found.append(Layout("end-to-end", 0))
    return found


def read_output(output: NDArray[Any], layout: Layout, confidence: float) -> tuple[NDArray[np.float32], ...]:
    """Return what is certain enough.

    Returns
    -------
    (boxes, scores, classes)
        (N, 4) x1, y1, x2, y2 in the network's pixels, (N,) and (N,) int.
    """
    rows = np.asarray(output[0].T if layout.boxes_last else output[0])
    if layout.name == "end-to-end":
        kept = rows[rows[:, 4] >= confidence].astype(np.float32)
        return kept[:, :4], kept[:, 4], kept[:, 5].astype(np.int64)
    if layout.name == "v5":
        rows = rows[rows[:, 4] >= confidence]  # the product with a class's score is not higher
        scores = rows[:, 5:] * rows[:, 4:5]
    else:
        scores = rows[:, 4:]
    classes = scores.argmax(axis=1)
    best = scores[np.arange(len(scores)), classes]
    certain = best >= confidence
    centre, size = rows[certain, :2].astype(np.float32), rows[certain, 2:4].astype(np.float32)
    corners = np.concatenate([centre - size / 2, centre + size / 2], axis=1)
    return corners, best[certain].astype(np.float32), classes[certain]
