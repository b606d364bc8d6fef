"""Fat around the kidneys: by distance and neighbours from masks alone, by Hounsfield units where a CT is given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import ConvexHull, QhullError

from deployments.postprocess import masks
from scangraph.contracts import LabelMap, Volume
from scangraph.contracts.errors import LabelsMissing

FAT = 207
#: Hounsfield units of fat in CT.
FAT_HU = (-190, -30)
_VEINS = (205,)
#: The renal sinus is closed over by this much before distances are taken (mm).
_SINUS_MM = 12.0
#: Labels that bound the retroperitoneum, so that a hull around all labels means the body: spine, muscles, ribs, hips.
_WALL = frozenset({*range(25, 51), 77, 78, *range(80, 90), *range(92, 118)})

#: At the flank the wall's muscles have no label; there the hull of the labels ends inside of them, in fat (mm).
_FLANK_MM = 10.0


@dataclass(frozen=True)
class Fat:
    """A mask with fat in its background, and measures of it."""

    mask: LabelMap
    facts: dict[str, Any]
    warnings: list[str]


def perirenal_fat(
    mask: LabelMap,
    image: Volume | None = None,
    *,
    distance_mm: float = 12.0,
    resample: bool = False,
    on_progress: masks.Report = masks.silent,
) -> Fat:
    """Mark the fat around both kidneys.

    Parameters
    ----------
    mask : LabelMap
        Kidneys (2, 3, or 201) with tumors and cysts; whatever else it holds bounds the fat. Only background is painted.
    image : Volume, optional
        A CT: fat is then what has fat's Hounsfield units. Without it the result is an estimate, and says so.
    distance_mm : float
        How far from the kidney's surface it may reach.

    Raises
    ------
    UnknownLabels, LabelsMissing, GridsDiffer
    """
    found = masks.occurring(mask)
    masks.require("postprocess/fat", mask, (masks.KIDNEY_RIGHT, masks.KIDNEY_LEFT, masks.KIDNEY), found, any_of=True)
    hu: NDArray[Any] | None = masks.hu_on(mask, image, resample=resample)
    if hu is not None:
        hu = np.asarray(mask.with_array(np.asarray(hu)).reoriented("LPS").array, np.float32)
    out, array = masks.writable(mask, (FAT,))
    spacing = np.asarray(out.reoriented("LPS").spacing_mm)
    middle = masks.midline(array)
    # Fat that the mask has already is found again, not an obstacle.
    array[array == FAT] = 0
    sides = kidneys_by_side(array, middle)
    if not sides:
        raise LabelsMissing(name="postprocess/fat", wanted="a kidney", missing="a kidney", found="only tumor or cyst")
    walled = len(_WALL.intersection(found)) >= 3
    distances: dict[str, tuple[tuple[slice, ...], NDArray[np.float32], NDArray[np.float32]]] = {}
    for number, (side, kidney) in enumerate(sides.items()):
        on_progress(number, len(sides), f"{side} kidney")
        distances[side] = _distance(kidney, array.shape, spacing, distance_mm)
    facts: dict[str, Any] = {"method": "estimated" if hu is None else "hu", "distance_mm": distance_mm, "sides": {}}
    painted = {}
    for side, (box, distance, own) in distances.items():
        near = (distance <= distance_mm) & (array[box] == 0)
        if walled:
            near &= _hull(array, box, spacing)
        for other, (other_box, other_distance, _) in distances.items():
            if other != side:
                near &= distance <= _in_box(other_distance, other_box, box)
        if hu is not None:
            part = hu[box]
            near &= (part >= FAT_HU[0]) & (part <= FAT_HU[1])
            near = ndimage.binary_closing(np.pad(near, 1))[1:-1, 1:-1, 1:-1] & (array[box] == 0)
        near = _touching(near, own <= float(1.8 * spacing.max()))
        painted[side] = (box, near)
    for side, (box, near) in painted.items():
        array[box][near] = FAT
        volume = float(near.sum()) * mask.voxel_volume_mm3 / 1000
        facts["sides"][side] = {
            "volume_ml": round(volume, 2),
            **_thickness(array, box, near, distances[side][2], spacing, sides[side]),
        }
    on_progress(len(sides), len(sides), "done")
    estimated = "The fat is estimated from the distance to the kidneys and their neighbours, without a CT."
    warnings = [] if hu is not None else [estimated]
    if hu is None and not walled:
        warnings.append("The mask lacks spine and muscles: the fat is bounded by the distance alone.")
    return Fat(out, facts, warnings)


def kidneys_by_side(array: NDArray[np.unsignedinteger], middle: float) -> dict[str, NDArray[np.int64]]:
    """Return the voxels (n, 3) of each kidney with its tumor and cysts in an LPS array; sides without a kidney are left out."""
    renal = (masks.KIDNEY_RIGHT, masks.KIDNEY_LEFT, masks.KIDNEY, masks.TUMOR, masks.CYST, masks.CYST_LEFT, masks.CYST_RIGHT)
    voxels = []
    for z, plane in enumerate(array):
        yx = np.argwhere(np.isin(plane, renal))
        if len(yx):
            voxels.append(np.column_stack([np.full(len(yx), z), yx]))
    if not voxels:
        return {}
    index = np.concatenate(voxels)
    number = array[tuple(index.T)]
    left = index[:, 2] >= middle
    left[np.isin(number, (masks.KIDNEY_RIGHT, masks.CYST_RIGHT))] = False
    left[np.isin(number, (masks.KIDNEY_LEFT, masks.CYST_LEFT))] = True
    kidney = np.isin(number, (masks.KIDNEY_RIGHT, masks.KIDNEY_LEFT, masks.KIDNEY))
    sides = {"right": ~left, "left": left}
    return {side: index[chosen] for side, chosen in sides.items() if (chosen & kidney).any()}


def _distance(
    kidney: NDArray[np.int64], shape: tuple[int, ...], spacing: NDArray[np.float64], reach_mm: float
) -> tuple[tuple[slice, ...], NDArray[np.float32], NDArray[np.float32]]:
    """Return a box around a kidney, and in it the distance to the kidney with its sinus closed, and to the kidney as it is."""
    margin = np.ceil((max(reach_mm, _SINUS_MM) + 2) / spacing).astype(int) + 2
    low = np.maximum(kidney.min(axis=0) - margin, 0)
    high = np.minimum(kidney.max(axis=0) + margin + 1, shape)
    inside = np.zeros(tuple(high - low), bool)
    inside[tuple((kidney - low).T)] = True
    own = ndimage.distance_transform_edt(~inside, sampling=spacing).astype(np.float32)
    # Closing by a ball: what is farther than its radius from everything farther than its radius from the kidney.
    outside = ndimage.distance_transform_edt(np.pad(own <= _SINUS_MM, 1, constant_values=False), sampling=spacing)
    closed = (outside[1:-1, 1:-1, 1:-1] > _SINUS_MM) | inside
    distance = ndimage.distance_transform_edt(~closed, sampling=spacing).astype(np.float32)
    return tuple(slice(a, b) for a, b in zip(low, high, strict=True)), distance, own


def _in_box(values: NDArray[np.float32], box: tuple[slice, ...], wanted: tuple[slice, ...]) -> NDArray[np.float32]:
    """Values of one box in another one, infinite where they are not known."""
    out = np.full([s.stop - s.start for s in wanted], np.inf, np.float32)
    low = [max(a.start, b.start) for a, b in zip(box, wanted, strict=True)]
    high = [min(a.stop, b.stop) for a, b in zip(box, wanted, strict=True)]
    if all(a < b for a, b in zip(low, high, strict=True)):
        to = tuple(slice(a - w.start, b - w.start) for a, b, w in zip(low, high, wanted, strict=True))
        of = tuple(slice(a - w.start, b - w.start) for a, b, w in zip(low, high, box, strict=True))
        out[to] = values[of]
    return out


def _hull(array: NDArray[np.unsignedinteger], box: tuple[slice, ...], spacing: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Slice by slice, the convex hull of everything that has a label, and `_FLANK_MM` around: what the body's wall encloses."""
    inside = np.ones([s.stop - s.start for s in box], bool)
    yy, xx = np.mgrid[box[1], box[2]]
    points = np.stack([yy.ravel(), xx.ravel()], axis=1) * spacing[1:]
    for k, z in enumerate(range(box[0].start, box[0].stop)):
        found = np.argwhere(array[z] != 0)
        if len(found) < 3:
            continue
        try:
            planes = ConvexHull(found * spacing[1:]).equations
        except QhullError:  # all on one line
            continue
        inside[k] = (points @ planes[:, :2].T + planes[:, 2] <= _FLANK_MM).all(axis=1).reshape(yy.shape)
    return inside


def _touching(near: NDArray[np.bool_], at_kidney: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Keep the pieces that reach the kidney."""
    parts, count = ndimage.label(near, np.ones((3, 3, 3)))
    keep = np.zeros(count + 1, bool)
    keep[np.unique(parts[near & at_kidney])] = True
    keep[0] = False
    return np.asarray(keep[parts], bool)


def _thickness(
    array: NDArray[np.unsignedinteger],
    box: tuple[slice, ...],
    fat: NDArray[np.bool_],
    own: NDArray[np.float32],
    spacing: NDArray[np.float64],
    kidney: NDArray[np.int64],
) -> dict[str, Any]:
    """Measure the fat's thickness at the renal vein's level: behind and beside the kidney, in mm (as in the MAP score)."""
    level, how = _vein_level(array, kidney, spacing)
    plane = fat[level - box[0].start]
    ring = np.argwhere(own[level - box[0].start] == 0)
    if not len(ring):
        return {"level": how, "posterior_mm": None, "lateral_mm": None}
    y, x = np.median(ring, axis=0).astype(int)
    outward = 1 if np.median(kidney[:, 2]) > array.shape[2] / 2 else -1
    behind = plane[ring[:, 0][ring[:, 1] == x].max(initial=y) :, x]
    columns = ring[:, 1][ring[:, 0] == y]
    edge = columns.max(initial=x) if outward > 0 else columns.min(initial=x)
    beside = plane[y, edge:] if outward > 0 else plane[y, : edge + 1][::-1]
    return {
        "level": how,
        "posterior_mm": round(_run(behind) * float(spacing[1]), 1),
        "lateral_mm": round(_run(beside) * float(spacing[2]), 1),
    }


def _vein_level(array: NDArray[np.unsignedinteger], kidney: NDArray[np.int64], spacing: NDArray[np.float64]) -> tuple[int, str]:
    """The slice where the renal vein leaves: where a vein is nearest to the kidney; without veins the kidney's middle."""
    low = np.maximum(kidney.min(axis=0) - np.ceil(20 / spacing).astype(int), 0)
    high = np.minimum(kidney.max(axis=0) + np.ceil(20 / spacing).astype(int) + 1, array.shape)
    there = np.argwhere(np.isin(array[tuple(slice(a, b) for a, b in zip(low, high, strict=True))], _VEINS)) + low
    middle = int(np.median(kidney[:, 0]))
    if len(there):
        centre = kidney.mean(axis=0)
        near = np.linalg.norm((there - centre) * spacing, axis=1)
        close = there[near <= np.quantile(near, 0.1), 0]
        return int(np.clip(np.median(close), kidney[:, 0].min(), kidney[:, 0].max())), "renal vein"
    return middle, "middle of the kidney"


def _run(values: NDArray[np.bool_]) -> int:
    """Length of the first run of fat, within three voxels of the start."""
    hit = np.flatnonzero(values[:3])
    if not len(hit):
        return 0
    rest = values[hit[0] :]
    stop = np.flatnonzero(~rest)
    return int(stop[0]) if len(stop) else len(rest)
