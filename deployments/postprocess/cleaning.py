"""Masks merged by priority, and tidied up: small pieces, holes, sides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from deployments.postprocess import masks
from scangraph.contracts import LabelMap, check_labels
from scangraph.contracts.errors import InvalidParameters, InvalidVolume

_NEIGHBOURS = np.ones((3, 3, 3), bool)


@dataclass(frozen=True)
class Tidy:
    """A mask and what was done."""

    mask: LabelMap
    facts: dict[str, Any]
    warnings: list[str]


def merge(
    given: Sequence[LabelMap],
    *,
    structures: Sequence[int] | None = None,
    priority: Sequence[int] = (),
    resample: bool = True,
    on_progress: masks.Report = masks.silent,
) -> Tidy:
    """Put masks together on the first one's grid.

    Parameters
    ----------
    given : sequence of LabelMap
        Where several name a voxel, the later one wins.
    structures : sequence of int, optional
        Numbers that are taken.
    priority : sequence of int
        Numbers that win whatever mask they are in, the first over the next.
    resample : bool
        Whether masks on other grids are looked up by nearest neighbour, or refused.

    Raises
    ------
    InvalidVolume
        If there is none, or two have one number for two names.
    UnknownLabels, GridsDiffer
    """
    if not given:
        raise InvalidVolume(detail="nothing to merge: give at least one mask")
    first = given[0]
    names: dict[int, str] = {}
    for mask in given:
        for number, name in mask.names.items():
            if names.setdefault(number, name).lower() != name.lower():
                raise InvalidVolume(detail=f"label {number} is {names[number]!r} in one mask and {name!r} in another")
    # What is named but not there is no fault: the same list serves masks of several models.
    check_labels((*(structures or ()), *priority), "structures", names)
    if not resample:
        for number, mask in enumerate(given[1:], 2):
            masks.same_grid(first, mask, "mask 1", f"mask {number}")
    kind = np.result_type(*(mask.array.dtype for mask in given))
    size = 1 + max(int(mask.array.max(initial=0)) for mask in given)
    rank = np.zeros(max(size, 1), np.uint16)
    for place, number in enumerate(reversed(list(priority)), 1):
        if number < size:
            rank[number] = place
    wanted = np.ones(max(size, 1), bool)
    if structures is not None:
        wanted[:] = False
        wanted[[n for n in structures if n < size]] = True
    wanted[0] = False
    merged = np.zeros(first.shape, kind)
    conflicts: dict[tuple[int, int], int] = {}
    labels: set[int] = set()
    for done, mask in enumerate(given):
        on_progress(done, len(given), "merging")
        labels |= {n for n in mask.labels if structures is None or n in set(structures)}
        array = mask.on_grid_of(first).array
        for old, new in zip(merged, array, strict=True):  # a plane at a time: no copies of the volume
            take = wanted[new]
            both = take & (old != 0) & (old != new)
            if both.any():
                pairs, counts = np.unique(np.stack([old[both], new[both]]), axis=1, return_counts=True)
                for (a, b), count in zip(pairs.T.tolist(), counts.tolist(), strict=True):
                    key = (min(a, b), max(a, b))
                    conflicts[key] = conflicts.get(key, 0) + count
                take &= rank[new] >= rank[old]
            old[take] = new[take]
    result = LabelMap(merged, first.spacing_mm, first.origin_mm, first.direction, tuple(labels), names)
    grids = sum(not mask.same_grid(first) for mask in given)
    warnings = [f"{grids} of {len(given)} masks lay on another grid than the first."] if grids else []
    ml = first.voxel_volume_mm3 / 1000
    facts: dict[str, Any] = {
        "volumes_ml": {str(n): round(v, 3) for n, v in result.volumes_ml().items()},
        "conflicts": [
            {"labels": list(pair), "voxels": count, "ml": round(count * ml, 3)}
            for pair, count in sorted(conflicts.items(), key=lambda item: -item[1])
        ],
    }
    if result.names:
        facts["names"] = {str(n): name for n, name in result.names.items()}
    return Tidy(result, facts, warnings)


def clean(
    mask: LabelMap,
    *,
    structures: Sequence[int] | None = None,
    min_mm3: float = 0.0,
    keep_largest: int | None = None,
    fill_holes: bool = False,
    split: Mapping[int, tuple[int, int]] | None = None,
    on_progress: masks.Report = masks.silent,
) -> Tidy:
    """Tidy a mask up, label by label; pieces are 26-connected.

    Parameters
    ----------
    structures : sequence of int, optional
        Numbers that are worked on; all that occur if not given.
    min_mm3 : float
        Smaller pieces become background.
    keep_largest : int, optional
        So many of the largest pieces of a label stay.
    fill_holes : bool
        Whether background that a label encloses on all sides becomes that label; what other labels fill stays.
    split : mapping, optional
        Number -> (its right part's number, its left part's): by pieces, at the body's middle.

    Raises
    ------
    UnknownLabels, LabelsMissing, InvalidParameters
    """
    found = masks.occurring(mask)
    split = dict(split or {})
    numbers = list(found if structures is None else structures)
    masks.require("postprocess/clean", mask, [*numbers, *split], found)
    check_labels((n for pair in split.values() for n in pair), "split", mask.names)
    for number, pair in split.items():
        if number in pair or pair[0] == pair[1]:
            raise InvalidParameters(
                component="postprocess/clean",
                detail=f"split: {number} must become two other numbers, not {pair[0]} and {pair[1]}",
            )
    out, array = masks.writable(mask, [n for pair in split.values() for n in pair])
    ml = mask.voxel_volume_mm3 / 1000
    middle = masks.midline(array) if split else 0.0
    boxes = ndimage.find_objects(array.astype(np.int32) if array.dtype.itemsize > 4 else array)
    rows: dict[str, dict[str, Any]] = {}
    for done, number in enumerate(sorted({*numbers, *split})):
        on_progress(done, len(numbers), mask.label(number).title)
        row: dict[str, Any] = {}
        box = boxes[number - 1] if number <= len(boxes) else None
        if box is None:
            continue
        inside = array[box] == number
        if number in numbers:
            if min_mm3 > 0 or keep_largest is not None:
                keep, removed = _keep(inside, min_mm3 / mask.voxel_volume_mm3, keep_largest)
                gone = inside & ~keep
                array[box][gone] = 0
                inside = keep
                row |= {"pieces_removed": removed, "removed_ml": round(float(gone.sum()) * ml, 4)}
            if fill_holes:
                holes = ndimage.binary_fill_holes(inside) & (array[box] == 0)
                array[box][holes] = number
                inside |= holes
                row["filled_ml"] = round(float(holes.sum()) * ml, 4)
        if number in split:
            left = _left_pieces(inside, middle - box[2].start)
            array[box][inside & ~left], array[box][left] = split[number]
            row["split_ml"] = [round(float(part.sum()) * ml, 3) for part in (inside & ~left, left)]
        rows[str(number)] = row
    on_progress(len(numbers), len(numbers), "done")
    volumes = {str(n): round(v, 3) for n, v in out.volumes_ml().items()}
    return Tidy(out, {"structures": rows, "volumes_ml": volumes}, [])


def _keep(inside: NDArray[np.bool_], least: float, largest: int | None) -> tuple[NDArray[np.bool_], int]:
    parts, count = ndimage.label(inside, _NEIGHBOURS)
    sizes = np.bincount(parts.ravel(), minlength=count + 1)
    sizes[0] = 0
    keep = sizes >= max(least, 1)
    if largest is not None:
        order = np.argsort(-sizes, kind="stable")[:largest]
        chosen = np.zeros(count + 1, bool)
        chosen[order] = True
        keep &= chosen
    keep[0] = False
    return keep[parts], count - int(keep.sum())


def _left_pieces(inside: NDArray[np.bool_], middle: float) -> NDArray[np.bool_]:
    """Where the left part is: whole pieces by their centre, but one that spans the middle is cut there."""
    parts, _ = ndimage.label(inside, _NEIGHBOURS)
    columns = np.arange(inside.shape[2])
    left = np.zeros(inside.shape, bool)
    for number, box in enumerate(ndimage.find_objects(parts), 1):
        part = parts[box] == number
        x = columns[box[2]]
        share = float(part[:, :, x >= middle].sum()) / float(part.sum())
        if 0.1 < share < 0.9:
            left[box] |= part & (x >= middle)
        elif share >= 0.9:
            left[box] |= part
    return left
