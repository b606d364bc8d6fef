"""Vessels and ureters repaired: which labels, which limits, which sides; the engine is in `bridging`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from deployments.postprocess import bridging, masks
from deployments.postprocess.bridging import Bridge, Candidate, End, Limits, Rejection
from deployments.postprocess.centrelines import find_voxels, trace
from scangraph.contracts import LabelMap, Volume, label_table

#: Trees: what belongs to one is joined, whatever its labels are.
ARTERIES = (52, 54, 55, 56, 57, 58, 65, 66, 204)
VEINS = (59, 60, 62, 63, 67, 68, 205)
PORTAL = (64,)
URETER = (206,)
_TREES: dict[str, list[tuple[int, ...]]] = {
    "arteries": [ARTERIES],
    "veins": [VEINS, PORTAL],
    "all": [ARTERIES, VEINS, PORTAL],
}

VESSEL_LIMITS = Limits()
#: Long gaps, since peristalsis empties whole stretches; nothing branches; ureters bend over the iliac vessels.
URETER_LIMITS = Limits(
    gap_mm=40, gap_base_mm=40, gap_per_radius=0, angle_deg=75, radius_ratio=3, branches=False, least_confidence=0.1
)
#: Rejected candidates that are told, the likeliest first.
_TOLD = 40


@dataclass(frozen=True)
class Repaired:
    """A repaired mask and what was done to it."""

    mask: LabelMap
    facts: dict[str, Any]
    warnings: list[str]


def repair_vessels(
    mask: LabelMap,
    image: Volume | None = None,
    *,
    vessels: Literal["arteries", "veins", "all"] = "arteries",
    structures: Sequence[int] | None = None,
    limits: Limits = VESSEL_LIMITS,
    remove_specks: bool = False,
    dry_run: bool = False,
    resample: bool = False,
    on_progress: masks.Report = masks.silent,
) -> Repaired:
    """Reconnect broken vessels.

    Parameters
    ----------
    mask : LabelMap
        Only its background is painted.
    image : Volume, optional
        A contrast-enhanced CT. It guides ways around obstacles and weighs confidences.
    vessels : str
        Which trees.
    structures : sequence of int, optional
        Label numbers of one tree, instead of `vessels`.
    remove_specks : bool
        Whether pieces that are too small to be vessels are taken out.
    dry_run : bool
        Whether to leave the mask as it is, and only tell.

    Raises
    ------
    UnknownLabels, LabelsMissing, GridsDiffer
    """
    found = masks.occurring(mask)
    if structures is not None:
        trees = [tuple(structures)]
        masks.require("postprocess/vessel", mask, structures, found)
    else:
        known = _TREES[vessels]
        masks.require("postprocess/vessel", mask, [n for tree in known for n in tree], found, any_of=True)
        trees = [tree for tree in (tuple(n for n in tree if n in found) for tree in known) if tree]
    return _repair(
        mask, masks.hu_on(mask, image, resample=resample), trees, limits, remove_specks=remove_specks, dry_run=dry_run,
        on_progress=on_progress,
    )  # fmt: skip


def repair_ureters(
    mask: LabelMap,
    image: Volume | None = None,
    *,
    structures: Sequence[int] = URETER,
    limits: Limits = URETER_LIMITS,
    anchor: bool = True,
    remove_specks: bool = False,
    dry_run: bool = False,
    resample: bool = False,
    on_progress: masks.Report = masks.silent,
) -> Repaired:
    """Reconnect broken ureters, each side for itself, from the renal pelvis or kidney to the bladder where the mask has these.

    Parameters are those of `repair_vessels`; with `anchor`, the upper end is led to the pelvis or kidney and the lower one to
    the bladder, where they are within the limits.
    """
    found = masks.occurring(mask)
    masks.require("postprocess/ureter", mask, structures, found)
    return _repair(
        mask, masks.hu_on(mask, image, resample=resample), [tuple(structures)], limits, remove_specks=remove_specks,
        dry_run=dry_run, on_progress=on_progress, sided=True, anchor=anchor,
    )  # fmt: skip


def _repair(
    mask: LabelMap,
    hu: NDArray[np.generic] | None,
    trees: Sequence[Sequence[int]],
    limits: Limits,
    *,
    remove_specks: bool,
    dry_run: bool,
    on_progress: masks.Report,
    sided: bool = False,
    anchor: bool = False,
) -> Repaired:
    out, array = masks.writable(mask)
    turned = out.reoriented("LPS")
    spacing = turned.spacing_mm
    if hu is not None:
        hu = mask.with_array(np.asarray(hu)).reoriented("LPS").array
    middle = masks.midline(array) if sided else 0.0
    facts: dict[str, Any] = {
        "bridges": [],
        "rejected": [],
        "pieces_before": 0,
        "pieces_after": 0,
        "specks": 0,
        "dry_run": dry_run,
    }
    painted = 0
    for number, tree in enumerate(trees):
        on_progress(number, len(trees), "repairing " + ", ".join(mask.label(n).title for n in tree[:3]))
        allowed = None
        if sided:
            voxels = find_voxels(array, tuple(tree), spacing)
            means = np.bincount(voxels.piece, voxels.index[:, 2]) / np.bincount(voxels.piece)

            def allowed(a: End, b: End, means: NDArray[np.float64] = means) -> str | None:
                return None if (means[a.piece] < middle) == (means[b.piece] < middle) else "the other side"

        done = bridging.repair(array, tuple(tree), spacing, limits, hu=hu, allowed=allowed)
        for bridge in done.bridges:
            painted += _paint(array, bridge)
        facts["bridges"] += [_tell(turned, array, bridge) for bridge in done.bridges]
        rejected = sorted(done.rejected, key=lambda r: r.candidate.cost)[:_TOLD]
        facts["rejected"] += [_tell_rejected(turned, r) for r in rejected]
        facts["pieces_before"] += done.pieces - len(done.specks)
        facts["pieces_after"] += done.pieces - len(done.specks) - len(done.bridges)
        facts["specks"] += len(done.specks)
        if remove_specks and done.voxels is not None and len(done.specks):
            gone = np.isin(done.voxels.piece, done.specks)
            array[tuple(done.voxels.index[gone].T)] = 0
        if anchor:
            for bridge, what in _anchors(array, tuple(tree), spacing, limits, middle):
                painted += _paint(array, bridge)
                facts["bridges"].append({**_tell(turned, array, bridge), "to": what})
    facts["painted_ml"] = round(painted * mask.voxel_volume_mm3 / 1000, 4)
    on_progress(len(trees), len(trees), "repaired")
    warnings = []
    if sided and not facts["bridges"] and facts["pieces_before"] > 2:
        warnings.append(f"The ureters are in {facts['pieces_before']} pieces, and none could be joined within the limits.")
    return Repaired(mask if dry_run else out, facts, warnings)


def _paint(array: NDArray[np.unsignedinteger], bridge: Bridge) -> int:
    """Paint a bridge, each voxel with the label of the nearer end; return how many were background."""
    a, b = bridge.candidate.start, bridge.candidate.stop
    index = bridge.voxels[array[tuple(bridge.voxels.T)] == 0]  # another bridge may have come first
    near_b = np.zeros(len(index), bool)
    if bridge.labels[0] != bridge.labels[1]:
        position = index * bridge.spacing_mm
        near_b = np.linalg.norm(position - a.point_mm, axis=1) > np.linalg.norm(position - b.point_mm, axis=1)
    array[tuple(index.T)] = np.where(near_b, bridge.labels[1], bridge.labels[0])
    return len(index)


def _tell(turned: LabelMap, array: NDArray[np.unsignedinteger], bridge: Bridge) -> dict[str, Any]:
    del array
    return {
        **_ends(turned, bridge.candidate),
        "length_mm": round(bridge.length_mm, 2),
        "confidence": round(bridge.confidence, 3),
        "ct_evidence": None if bridge.evidence is None else round(bridge.evidence, 3),
        "labels": list(dict.fromkeys(bridge.labels)),
        "voxels": len(bridge.voxels),
    }


def _tell_rejected(turned: LabelMap, rejection: Rejection) -> dict[str, Any]:
    return {**_ends(turned, rejection.candidate), "reason": rejection.reason}


def _ends(turned: LabelMap, candidate: Candidate) -> dict[str, Any]:
    a, b = (
        [round(float(v), 2) for v in turned.index_to_world(end.point_mm / np.asarray(turned.spacing_mm))]
        for end in (candidate.start, candidate.stop)
    )
    return {
        "from_mm": a,
        "to_mm": b,
        "kind": "side" if candidate.stop.is_side else "end",
        "gap_mm": round(candidate.gap_mm, 2),
        "radius_mm": [round(candidate.start.radius_mm, 2), round(candidate.stop.radius_mm, 2)],
        "turn_deg": round(candidate.turn_deg, 1),
    }


def _anchors(
    array: NDArray[np.unsignedinteger], tree: tuple[int, ...], spacing: Sequence[float], limits: Limits, middle: float
) -> list[tuple[Bridge, str]]:
    """Lead each side's upper end to its pelvis or kidney, and the lower one to the bladder."""
    voxels = find_voxels(array, tree, tuple(spacing))
    if not voxels.pieces:
        return []
    lines = trace(voxels, np.flatnonzero(voxels.volumes_mm3 >= limits.least_mm3))
    ends = bridging.find_ends(voxels, lines, voxels.volumes_mm3 >= limits.least_mm3)
    painter = bridging.Painter(array, tree, voxels, np.ones(voxels.pieces, bool), None)
    made = []
    step = np.asarray(spacing)
    for left in (False, True):
        mine = [e for e in ends if (voxels.index[voxels.piece == e.piece, 2].mean() >= middle) == left]
        if not mine:
            continue
        kidneys = (masks.KIDNEY_LEFT if left else masks.KIDNEY_RIGHT, masks.KIDNEY)
        upper, lower = max(mine, key=lambda e: e.point_mm[0]), min(mine, key=lambda e: e.point_mm[0])
        for end, wanted in ((upper, ((masks.PELVIS,), kidneys)), (lower, ((masks.BLADDER,),))):
            for numbers in wanted:
                low = np.maximum((end.point_mm - limits.gap_mm) / step, 0).astype(int)
                high = np.ceil((end.point_mm + limits.gap_mm) / step).astype(int) + 1
                box = array[tuple(slice(p, q) for p, q in zip(low, high, strict=True))]
                there = np.argwhere(np.isin(box, numbers)) + low
                if masks.BLADDER not in numbers:
                    there = there[(there[:, 2] >= middle) == left]
                if not len(there):
                    continue
                position = there * step
                distance, nearest = cKDTree(position).query(end.point_mm)
                own = cKDTree(voxels.position_mm[voxels.piece == end.piece]).query(position)[0].min()
                if own <= 1.8 * step.max():  # it is there already
                    break
                ahead = position[nearest] - end.point_mm + 2.0 * end.outward
                cos = float(ahead @ end.outward / max(1e-9, float(np.linalg.norm(ahead))))
                if distance > limits.gap_mm or cos < np.cos(np.deg2rad(limits.angle_deg)):
                    break
                stop = End(-1, end.piece, position[nearest], np.zeros(3), end.radius_mm, 0.0)
                turn = float(np.degrees(np.arccos(np.clip(cos, -1, 1))))
                candidate = Candidate(end, stop, float(distance), turn, (1 - cos) + 0.5 * float(distance) / limits.gap_mm)
                bridge = painter.to_structure(candidate, numbers)
                if bridge is not None:
                    made.append((bridge, label_table()[numbers[0]].name))
                break
    return made
