"""Broken tubes made whole: which ends belong together, how the missing stretch ran, and what it looked like.

The parts follow what is known of the problem (directional linking of centreline ends: Risser et al., IEEE TMI 2008; OGMC,
arXiv 2306.01808), with two of our own: the ends come from centrelines that ragged ends do not disturb (`centrelines`), and a
bridge is no pipe of one radius, but the cross-sections of both ends carried along the curve and blended into each other.

Positions are box millimetres: array index (z, y, x) times spacing. Nothing here knows of labels' meanings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import cKDTree

from deployments.postprocess import kernels
from deployments.postprocess.centrelines import Centrelines, Voxels, find_voxels, trace
from deployments.postprocess.graphs import Graph, ScipyBackend

Floats = NDArray[np.float64]

#: Arc length (mm) behind an end that gives its direction, at least and in radii.
_LOOK_BACK_MM, _LOOK_BACK_RADII = 7.0, 2.0
#: What is nearer to the end than this is its ragged rim.
_RIM_MM = 1.0
#: The cap of an end reaches to where the centreline has this part of the vessel's depth.
_CAP = 0.8
#: Shorter than thick, and thicker than this: a disc cut out of a vessel, which leads nowhere of itself.
_BLUNT_MM = 2.0
#: A piece is a vessel, and no speck, where its centreline is this many of its radii long.
_ELONGATED = 2.0
#: How much of a curve's direction at its ends is that of the straight line: ragged ends lead only roughly where a vessel goes,
#: ends cut at a slice do better.
_CHORD, _CHORD_CUT = 0.5, 0.15
#: Pairs of ends that the limits forbid are told where they are this near to each other.
_TOLD_MM = 15.0
#: Where the last slice holds this part of those before it, the mask was cut there; unless the vessel runs almost in the slice.
_FULL, _STEEPEST = 0.8, 0.4
#: Step of curves, mm.
_STEP_MM = 0.25


@dataclass(frozen=True)
class Limits:
    """What may be bridged.

    Parameters
    ----------
    gap_mm : float
        The longest gap of all.
    gap_base_mm, gap_per_radius : float
        The longest gap of a vessel of radius r is `gap_base_mm + gap_per_radius * r`.
    angle_deg : float
        How far either end may turn towards the other.
    radius_ratio : float
        How much thicker one end may be than the other.
    least_mm3, least_mm : float
        Smaller or shorter pieces are specks, and so are round ones: never an end of a bridge.
    detour : float
        A way around obstacles may be this much longer than the straight one, and 2 mm.
    branches : bool
        Whether an end may meet another vessel's side.
    least_confidence : float
        Bridges below are rejected.
    """

    gap_mm: float = 25.0
    gap_base_mm: float = 15.0
    gap_per_radius: float = 4.0
    angle_deg: float = 60.0
    radius_ratio: float = 2.2
    least_mm3: float = 6.0
    least_mm: float = 3.5
    detour: float = 1.6
    branches: bool = True
    least_confidence: float = 0.25

    def longest_mm(self, radius_mm: float) -> float:
        """The longest gap at a radius."""
        return min(self.gap_mm, self.gap_base_mm + self.gap_per_radius * radius_mm)


@dataclass(frozen=True)
class End:
    """An end of a piece, or the place on a vessel's side where another one begins.

    Parameters
    ----------
    point_mm : (3,)
        On the centreline.
    outward : (3,)
        Unit vector; where the vessel would go on. Zero for a place on a side.
    room_mm : float
        How far back the vessel is free of forks: what its cross-section may be taken from.
    tilt : (3,)
        The end's face is a plane: where one goes across the axis by v, it lies `tilt @ v` further out.
    rag_mm : float
        How ragged the face is: standard deviation from the plane.
    cut : bool
        Whether the face is the side of a slice.
    """

    vertex: int
    piece: int
    point_mm: Floats
    outward: Floats
    radius_mm: float
    room_mm: float
    tilt: Floats = field(default_factory=lambda: np.zeros(3))
    rag_mm: float = 0.0
    cut: bool = False

    @property
    def is_side(self) -> bool:
        """Whether it is a place on a vessel's side."""
        return not self.outward.any()


@dataclass(frozen=True)
class Candidate:
    """Two ends that may belong together; the lower the cost, the likelier."""

    start: End
    stop: End
    gap_mm: float
    turn_deg: float
    cost: float

    @cached_property
    def confidence(self) -> float:
        """0…1: falls with what turning, mismatch and length (in radii) cost."""
        return float(np.exp(-self.cost))


@dataclass(frozen=True)
class Bridge:
    """A gap that was closed, or would be.

    Parameters
    ----------
    line_mm : (k, 3)
        Its centreline, from inside one end to inside the other.
    voxels : (m, 3) int
        Background that is painted.
    labels : (int, int)
        Of the start and of the stop.
    evidence : float or None
        Part (0…1) of the painted voxels whose HU fit the vessel's, where there is a CT.
    """

    candidate: Candidate
    line_mm: Floats
    voxels: NDArray[np.int64]
    confidence: float
    labels: tuple[int, int]
    spacing_mm: Floats
    evidence: float | None = None

    @property
    def length_mm(self) -> float:
        """Between the two ends, along the curve."""
        return float(np.linalg.norm(np.diff(self.line_mm, axis=0), axis=1).sum())


@dataclass(frozen=True)
class Rejection:
    """A candidate that was not followed, and why."""

    candidate: Candidate
    reason: str


@dataclass
class Repair:
    """What was found."""

    bridges: list[Bridge] = field(default_factory=list)
    rejected: list[Rejection] = field(default_factory=list)
    pieces: int = 0
    specks: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    voxels: Voxels | None = None
    lines: Centrelines | None = None


Allowed = Callable[[End, End], str | None]


def repair(
    array: NDArray[np.unsignedinteger],
    numbers: tuple[int, ...],
    spacing_mm: Sequence[float],
    limits: Limits,
    *,
    hu: NDArray[np.generic] | None = None,
    allowed: Allowed | None = None,
) -> Repair:
    """Find the bridges of one kind of vessel.

    Parameters
    ----------
    array : (z, y, x)
        Labels; only looked at.
    numbers : tuple of int
        The vessel's: together they are one tree. Everything else is an obstacle.
    hu : (z, y, x), optional
        A CT on the same grid.
    allowed : callable, optional
        Says why two ends must not be joined, or None.
    """
    voxels = find_voxels(array, numbers, tuple(spacing_mm))
    found = Repair(pieces=voxels.pieces, voxels=voxels)
    if not voxels.pieces:
        return found
    large = np.flatnonzero(voxels.volumes_mm3 >= limits.least_mm3)
    lines = trace(voxels, large)
    found.lines = lines
    lengths = np.zeros(voxels.pieces)
    for chain, steps in zip(lines.chains, lines.steps_mm, strict=True):
        lengths[lines.piece[chain[0]]] += steps[-1]
    # A tube of this length and volume would be so thick; a ball, whose line is short, comes out thicker than long.
    thick = np.sqrt(voxels.volumes_mm3 / np.pi / np.maximum(lengths, 1e-3))
    is_piece = (lengths >= limits.least_mm) & (lengths >= _ELONGATED * thick)
    found.specks = np.flatnonzero(~is_piece)

    ends = find_ends(voxels, lines, is_piece)
    candidates, turned_down = find_candidates(lines, ends, is_piece, limits)
    found.rejected += turned_down
    painter = Painter(array, numbers, voxels, is_piece, hu)
    joined = np.arange(voxels.pieces)
    used: set[int] = set()
    for candidate in sorted(candidates, key=lambda c: c.cost):
        a, b = candidate.start, candidate.stop
        reason = None
        if _root(joined, a.piece) == _root(joined, b.piece):
            continue
        if a.vertex in used or (b.vertex in used and not b.is_side):
            reason = "an end has a better partner"
        elif allowed is not None:
            reason = allowed(a, b)
        if reason is None and candidate.confidence < limits.least_confidence and hu is None:
            reason = f"confidence {candidate.confidence:.2f}"
        if reason is None:
            bridge, reason = painter.bridge(candidate, limits)
            if bridge is not None and bridge.confidence < limits.least_confidence:
                reason, bridge = f"confidence {bridge.confidence:.2f}", None
            if bridge is not None:
                found.bridges.append(bridge)
                joined[_root(joined, a.piece)] = _root(joined, b.piece)
                used |= {a.vertex, b.vertex}
                continue
        found.rejected.append(Rejection(candidate, reason or "no way"))
    return found


def _root(joined: NDArray[np.int64], piece: int) -> int:
    while joined[piece] != piece:
        piece = int(joined[piece])
    return piece


# --- ends ---------------------------------------------------------------------------------------------------------------------


def find_ends(voxels: Voxels, lines: Centrelines, is_piece: NDArray[np.bool_]) -> list[End]:
    """Return the ends of the pieces; those at the scan's edge are none: there the vessel goes on outside."""
    ends = []
    last = np.array(voxels.shape) - 1
    tree = cKDTree(voxels.position_mm)
    for vertex in np.flatnonzero(lines.degree == 1):
        if not is_piece[lines.piece[vertex]]:
            continue
        index = voxels.index[lines.voxel[vertex]]
        if ((index <= 1) | (index >= last - 1)).any():
            continue
        end = _end_at(voxels, lines, int(vertex))
        if end is not None:
            ends.append(_with_face(voxels, tree, end))
    return ends


def _with_face(voxels: Voxels, tree: cKDTree, end: End) -> End:
    """Fit a plane to an end's face and put the end's point where the axis meets it.

    A cut is seldom square to its vessel: masks end at slices, and vessels cross those at all angles. The plane is fitted to the
    foremost voxel of each column along the axis, with Tukey's weights: a ragged rim has holes and fingers.
    """
    width = float(voxels.spacing_mm.mean())
    near = np.array(tree.query_ball_point(end.point_mm, 2.5 * end.radius_mm + 2 * width), np.int64)
    near = near[voxels.piece[near] == end.piece]
    cut = _cut_at_slice(voxels, near, end)
    if cut is not None:
        return cut
    offset = voxels.position_mm[near] - end.point_mm
    along = offset @ end.outward
    across = offset - along[:, None] * end.outward
    # Only what lies right behind the face: further back the vessel may come from another side.
    foremost = float(along[np.linalg.norm(across, axis=1) <= 0.7 * end.radius_mm + 0.5 * width].max(initial=0.0))
    depth = 2.0 * end.radius_mm + width
    inside = (np.linalg.norm(across, axis=1) <= 1.05 * end.radius_mm) & (along >= foremost - depth)
    along, across = along[inside], across[inside]
    e1 = np.cross(end.outward, np.eye(3)[np.argmin(np.abs(end.outward))])
    e1 /= np.linalg.norm(e1)
    e2 = np.cross(end.outward, e1)
    uv = np.stack([across @ e1, across @ e2], axis=1)
    cells = np.rint(uv / (1.2 * width)).astype(np.int64)
    order = np.lexsort((-along, cells[:, 1], cells[:, 0]))
    first = np.ones(len(order), bool)
    first[1:] = (cells[order[1:]] != cells[order[:-1]]).any(axis=1)
    front = order[first]
    if len(front) < 5:
        return end
    # The foremost voxel's centre is, on the average, half a voxel behind the face.
    height = along[front] + 0.5 * width * float(np.abs(end.outward).max())
    design = np.column_stack([np.ones(len(front)), uv[front]])
    weight = np.ones(len(front))
    for _ in range(5):
        normal = design.T @ (weight[:, None] * design) + np.diag([0.0, 0.5, 0.5]) * width**2  # few columns: rather square
        fit = np.linalg.solve(normal, design.T @ (weight * height))
        off = height - design @ fit
        scale = max(0.4 * width, 1.4826 * float(np.median(np.abs(off))))
        weight = np.clip(1 - (off / (4 * scale)) ** 2, 0, 1) ** 2 + 1e-6
    slope = float(np.hypot(*fit[1:]))
    shrink = min(1.0, 1.5 / slope) if slope > 0 else 1.0
    tilt = shrink * (fit[1] * e1 + fit[2] * e2)
    trusted = weight > 0.3
    middle = uv[front][trusted].mean(axis=0) if trusted.sum() >= 3 else np.zeros(2)
    middle *= min(1.0, 0.6 * end.radius_mm / max(1e-9, float(np.hypot(*middle))))
    shift = middle[0] * e1 + middle[1] * e2
    point = end.point_mm + shift + (fit[0] + float(tilt @ shift)) * end.outward
    return replace(end, point_mm=point, tilt=tilt, rag_mm=float(min(scale, 1.5 * width)))


def _cut_at_slice(voxels: Voxels, near: NDArray[np.int64], end: End) -> End | None:
    """Return an end whose face is the side of a slice, None where it is none: the last slice is as full as those before it.

    Then the slices behind tell better than the centreline where the vessel comes from: their centres lie on its axis.
    """
    found: tuple[float, int, int, NDArray[np.int64]] | None = None
    index = voxels.index[near].astype(np.int64)
    for axis in range(3):
        if abs(end.outward[axis]) < _STEEPEST:
            continue
        sign = 1 if end.outward[axis] > 0 else -1
        level = sign * index[:, axis]
        counts = np.bincount(level.max() - level, minlength=4)[:4]
        if counts[0] < 5 or not counts[1:3].all():
            continue
        fullness = float(counts[0] / counts[1:3].mean())
        if fullness >= _FULL and (found is None or fullness > found[0]):
            found = fullness, axis, sign, level
    if found is None:
        return None
    _, axis, sign, level = found
    step = float(voxels.spacing_mm[axis])
    back = max(3, round(_LOOK_BACK_MM / step))
    centres: list[NDArray[np.float64]] = []
    for k in range(min(back, int(level.max() - level.min()) + 1)):
        own = voxels.position_mm[near[level == level.max() - k]]
        if len(own):
            centre = own.mean(axis=0)
            if centres and np.linalg.norm(centre - centres[-1]) > step / _STEEPEST + 1.5 * end.radius_mm:
                break  # another branch
            centres.append(centre)
    line = np.array(centres)
    if len(line) < 3:
        return None
    weight = np.exp(-np.arange(len(line)) * step / _LOOK_BACK_MM)
    away = -sign * line[:, axis]
    design = np.column_stack([np.ones(len(line)), away - away[0]])
    fit = np.linalg.lstsq(design * np.sqrt(weight)[:, None], line * np.sqrt(weight)[:, None], rcond=None)[0]
    outward = -fit[1] / np.linalg.norm(fit[1])
    if abs(outward[axis]) < _STEEPEST or outward @ end.outward < 0.5:
        return None
    normal = np.zeros(3)
    normal[axis] = 1 / outward[axis]
    point = fit[0] - 0.5 * step * fit[1]
    return replace(end, point_mm=point, outward=outward, tilt=outward - normal, cut=True)


def _end_at(voxels: Voxels, lines: Centrelines, vertex: int) -> End | None:
    """Direction and radius of an end, from the centreline behind its cap; None where a piece is too blunt to have one.

    The last stretch of a centreline runs into a corner of the ragged end. What tells it from the vessel is its depth: it counts
    from where it is nearly as deep as the vessel behind.
    """
    number = lines.chains_at[vertex][0]
    chain, steps = lines.chains[number], lines.steps_mm[number]
    if chain[0] != vertex:
        chain, steps = chain[::-1], steps[-1] - steps[::-1]
    line, radii, depth = lines.position_mm[chain], lines.radius_mm[chain], voxels.depth_mm[lines.voxel[chain]]
    inner = float(steps[-1])
    forked = lines.degree[chain[-1]] > 1
    if forked:
        inner = max(min(inner, 1.5), inner - 1.2 * float(depth[-1]))  # nearer to the fork it is the other vessel
    deep = 0.0
    for _ in range(4):
        deep = float(depth[steps <= min(inner, 3.0 + 2.0 * deep)].max(initial=depth[0]))
    cap = float(steps[np.argmax(depth >= _CAP * deep)])
    core = steps[depth >= _CAP * deep]
    if not forked and deep > _BLUNT_MM and steps[-1] < 5 * deep and core[-1] - core[0] < 1.2 * deep:
        return None
    back = max(_LOOK_BACK_MM, _LOOK_BACK_RADII * deep)
    seen = (steps >= min(cap, inner)) & (steps <= max(inner, cap + 1.0)) & (steps <= cap + back)
    if seen.sum() < 3:
        seen = steps <= steps[min(len(steps) - 1, 3)]
    s, p = steps[seen], line[seen]
    weight = np.exp(-(s - s[0]) / back)
    mean = (weight[:, None] * p).sum(axis=0) / weight.sum()
    _, _, axes = np.linalg.svd((p - mean) * np.sqrt(weight)[:, None], full_matrices=False)
    outward = axes[0] * (1.0 if axes[0] @ (p[0] - p[-1]) >= 0 else -1.0)
    reach = float((voxels.position_mm[lines.voxel[vertex]] - mean) @ outward)
    radius = float(np.quantile(radii[seen][s <= s[0] + max(8.0, 2 * deep)], 0.75))
    return End(vertex, int(lines.piece[vertex]), mean + reach * outward, outward, max(radius, 0.3), max(0.0, inner))


# --- candidates ---------------------------------------------------------------------------------------------------------------


def find_candidates(
    lines: Centrelines, ends: Sequence[End], is_piece: NDArray[np.bool_], limits: Limits
) -> tuple[list[Candidate], list[Rejection]]:
    """Return pairs of ends, and of ends and vessels' sides, that the limits allow; and near ones that they do not."""
    candidates: list[Candidate] = []
    rejected: list[Rejection] = []
    if not ends:
        return [], []
    points = np.array([e.point_mm for e in ends])
    tree = cKDTree(points)
    for i, j in sorted(tree.query_pairs(limits.gap_mm)):
        if ends[i].piece == ends[j].piece:
            continue
        candidate, reason = _end_to_end(ends[i], ends[j], limits)
        if reason is None:
            candidates.append(candidate)
        elif candidate.gap_mm <= _TOLD_MM:
            rejected.append(Rejection(candidate, reason))
    if not limits.branches:
        return candidates, rejected
    thick = np.zeros(len(is_piece))
    for end in ends:
        thick[end.piece] = max(thick[end.piece], end.radius_mm)
    with_ends = np.zeros(len(is_piece), bool)
    with_ends[[end.piece for end in ends]] = True
    blunt = is_piece & ~with_ends
    inside = np.flatnonzero(is_piece[lines.piece] & ((lines.degree != 1) | blunt[lines.piece]))
    sides = cKDTree(lines.position_mm[inside])
    tips: dict[int, list[End]] = {}
    for end in ends:
        tips.setdefault(end.piece, []).append(end)
    for end in ends:
        best: Candidate | None = None
        # A side branch is thickest where it leaves: a tip that ends beside another vessel is just a tip.
        is_root = end.radius_mm >= 0.85 * thick[end.piece]
        for place in sides.query_ball_point(end.point_mm, limits.longest_mm(end.radius_mm) + 12.0):
            vertex = int(inside[place])
            if lines.piece[vertex] == end.piece or lines.radius_mm[vertex] < 0.75 * end.radius_mm:
                continue
            if not (is_root or blunt[lines.piece[vertex]]) or _through_an_end(end, lines, vertex, tips, limits):
                continue
            found = _end_to_side(end, lines, vertex, limits, blunt=bool(blunt[lines.piece[vertex]]))
            if found is not None and (best is None or found.cost < best.cost):
                best = found
        if best is not None:
            candidates.append(best)
    return candidates, rejected


def _end_to_end(a: End, b: End, limits: Limits) -> tuple[Candidate, str | None]:
    gap = b.point_mm - a.point_mm
    length = float(np.linalg.norm(gap))
    # Between ragged ends that nearly touch, the straight line from tip to tip says nothing; from a little behind it does.
    inner = gap + 2.0 * (a.outward - b.outward)
    inner /= max(1e-9, float(np.linalg.norm(inner)))
    cos_a, cos_b = float(a.outward @ inner), float(-b.outward @ inner)
    turn = float(np.degrees(np.arccos(np.clip(-(a.outward @ b.outward), -1, 1))))
    ratio = max(a.radius_mm, b.radius_mm) / min(a.radius_mm, b.radius_mm)
    radius = (a.radius_mm + b.radius_mm) / 2
    cost = 1.2 * (1 - cos_a) + 1.2 * (1 - cos_b) + 0.4 * np.log(ratio) + 0.5 * length / limits.longest_mm(radius)
    candidate = Candidate(a, b, length, turn, float(cost))
    least = np.cos(np.deg2rad(limits.angle_deg))
    reason = None
    if length > limits.longest_mm(radius):
        reason = f"gap {length:.1f} mm"
    elif min(cos_a, cos_b) < least:
        reason = f"angle {np.degrees(np.arccos(np.clip(min(cos_a, cos_b), -1, 1))):.0f}°"
    elif ratio > limits.radius_ratio:
        reason = f"radii {a.radius_mm:.1f} and {b.radius_mm:.1f} mm"
    return candidate, reason


def _through_an_end(end: End, lines: Centrelines, vertex: int, tips: dict[int, list[End]], limits: Limits) -> bool:
    """Whether the way to a vessel's side leads through that vessel's end, whose radius does not fit."""
    way = lines.position_mm[vertex] - end.point_mm
    for tip in tips.get(int(lines.piece[vertex]), ()):
        if max(tip.radius_mm, end.radius_mm) / min(tip.radius_mm, end.radius_mm) <= limits.radius_ratio:
            continue
        t = np.clip((tip.point_mm - end.point_mm) @ way / max(1e-9, float(way @ way)), 0, 1)
        if np.linalg.norm(end.point_mm + t * way - tip.point_mm) < tip.radius_mm:
            return True
    return False


def _end_to_side(end: End, lines: Centrelines, vertex: int, limits: Limits, *, blunt: bool) -> Candidate | None:
    gap = lines.position_mm[vertex] - end.point_mm
    length = float(np.linalg.norm(gap))
    if length < 1e-6:
        return None
    open_mm = max(0.0, length - float(lines.radius_mm[vertex]))
    ahead = gap + 2.0 * end.outward
    cos = float(end.outward @ ahead) / max(1e-9, float(np.linalg.norm(ahead)))
    if open_mm > (0.8 if blunt else 0.7) * limits.longest_mm(end.radius_mm) or cos < np.cos(np.deg2rad(0.8 * limits.angle_deg)):
        return None
    stop = End(vertex, int(lines.piece[vertex]), lines.position_mm[vertex], np.zeros(3), float(lines.radius_mm[vertex]), 0.0)
    cost = (0.1 if blunt else 0.35) + 1.8 * (1 - cos) + 0.8 * open_mm / limits.longest_mm(end.radius_mm)
    return Candidate(end, stop, open_mm, float(np.degrees(np.arccos(np.clip(cos, -1, 1)))), float(cost))


# --- the way and the shape ----------------------------------------------------------------------------------------------------


class Painter:
    """Draws bridges into the background."""

    def __init__(
        self,
        array: NDArray[np.unsignedinteger],
        numbers: tuple[int, ...],
        voxels: Voxels,
        is_piece: NDArray[np.bool_],
        hu: NDArray[np.generic] | None,
    ) -> None:
        self._array, self._numbers, self._voxels, self._is_piece, self._hu = array, numbers, voxels, is_piece, hu
        self._spacing = voxels.spacing_mm
        self._shape = np.array(array.shape)
        _, y, x = array.shape
        self._keys = (voxels.index[:, 0].astype(np.int64) * y + voxels.index[:, 1]) * x + voxels.index[:, 2]
        self._strides = np.array([y * x, x, 1])
        self._by_piece = np.argsort(voxels.piece, kind="stable")

    def piece_at(self, index: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return (m,): the piece of each voxel (m, 3), -1 where it is of none."""
        keys = index @ self._strides
        at = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        return np.where(self._keys[at] == keys, self._voxels.piece[at], -1)

    def bridge(self, candidate: Candidate, limits: Limits) -> tuple[Bridge | None, str | None]:
        """Find the way and the shape; or say why there is none."""
        a, b = candidate.start, candidate.stop
        line = _hermite(a, b)
        if self._blocked(line, a, b):
            line, reason = self._around(line, a, b, limits)
            if reason is not None:
                return None, reason
        voxels = self._paint(line, a, b)
        voxels = self._apart(voxels, a, b)
        if not self._connects(voxels, a, b):
            return None, "no room"
        evidence = self._evidence(voxels, a, b) if self._hu is not None else None
        confidence = candidate.confidence
        if evidence is not None:
            # Without contrast in the gap nothing is proved: it halves the confidence at most, and certainty doubles it.
            confidence = min(1.0, confidence * (0.5 + 1.5 * evidence))
        labels = self._label(a), self._label(b)
        return Bridge(candidate, line, voxels, confidence, labels, self._spacing, evidence), None

    def to_structure(self, candidate: Candidate, numbers: Sequence[int]) -> Bridge | None:
        """Lead an end to a voxel of another structure; None where something else is in the way."""
        a, b = candidate.start, candidate.stop
        line = _hermite(a, b)
        index = np.unique(np.rint(line / self._spacing).astype(np.int64), axis=0)
        if not np.isin(self._array[tuple(index.T)], (0, *self._numbers, *numbers)).all():
            return None
        label = self._label(a)
        voxels = self._apart(self._paint(line, a, b), a, b)
        return Bridge(candidate, line, voxels, candidate.confidence, (label, label), self._spacing)

    def _label(self, end: End) -> int:
        """The label at an end."""
        first, last = np.searchsorted(self._voxels.piece, (end.piece, end.piece + 1), sorter=self._by_piece)
        own = self._by_piece[first:last]
        distance = ((self._voxels.position_mm[own] - end.point_mm) ** 2).sum(axis=1)
        return int(self._array[tuple(self._voxels.index[own[distance.argmin()]])])

    def _blocked(self, line: Floats, a: End, b: End) -> bool:
        """Whether another structure, or a third piece, lies on the line."""
        index = np.unique(np.rint(line / self._spacing).astype(np.int64), axis=0)
        if ((index < 0) | (index >= self._shape)).any():
            return True
        other = ~np.isin(self._array[tuple(index.T)], (0, *self._numbers))
        piece = self.piece_at(index)
        third = (piece >= 0) & (piece != a.piece) & (piece != b.piece) & self._is_piece[piece]
        return bool(other.any() or third.any())

    def _around(self, line: Floats, a: End, b: End, limits: Limits) -> tuple[Floats, str | None]:
        """Find the shortest way through free background that stays near the line."""
        straight = float(np.linalg.norm(b.point_mm - a.point_mm))
        margin = 0.5 * straight + 3 * max(a.radius_mm, b.radius_mm) + 3
        low = np.maximum(np.floor((line.min(axis=0) - margin) / self._spacing), 0).astype(np.int64)
        high = np.minimum(np.ceil((line.max(axis=0) + margin) / self._spacing) + 1, self._shape).astype(np.int64)
        box = self._array[tuple(slice(p, q) for p, q in zip(low, high, strict=True))]
        open_ = np.isin(box, (0, *self._numbers)).astype(np.uint8)
        inside = np.argwhere(np.isin(box, self._numbers)) + low
        piece = self.piece_at(inside)
        third = (piece != a.piece) & (piece != b.piece) & self._is_piece[piece]
        open_[tuple((inside[third] - low).T)] = 0
        free = find_voxels(open_, (1,), tuple(self._spacing))
        if not len(free.index):
            return line, "an organ is in the way"
        position = free.position_mm + low * self._spacing
        tree = cKDTree(position)
        (far_a, start), (far_b, stop) = (tree.query(end.point_mm) for end in (a, b))
        off = cKDTree(line).query(position)[0]
        cost = 1 + (off / max(1.0, min(a.radius_mm, b.radius_mm))) ** 2 * 0.3
        graph = Graph(*kernels.voxel_graph(free.linked, self._spacing, cost))
        distance, before = ScipyBackend().shortest_paths(graph, np.array([start]))
        if not np.isfinite(distance[stop]) or max(far_a, far_b) > 3 * self._spacing.max():
            return line, "an organ is in the way"
        way = [int(stop)]
        while before[way[-1]] >= 0:
            way.append(int(before[way[-1]]))
        path = position[way[::-1]]
        sigma = 1.0 / float(self._spacing.mean())
        smooth = ndimage.gaussian_filter1d(path, sigma, axis=0, mode="nearest")
        length = float(np.linalg.norm(np.diff(smooth, axis=0), axis=1).sum())
        if length > limits.detour * straight + 2:
            return line, f"the way around is {length:.1f} mm for a gap of {straight:.1f}"
        smooth = np.concatenate([line[:1], smooth, line[-1:]])
        arc = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(smooth, axis=0), axis=1))])
        even = np.linspace(0, arc[-1], max(2, int(arc[-1] / _STEP_MM)))
        return np.stack([np.interp(even, arc, smooth[:, k]) for k in range(3)], axis=1), None

    def _paint(self, line: Floats, a: End, b: End) -> NDArray[np.int64]:
        """Return the background voxels of the tube whose cross-section goes over from one end's into the other's.

        A stack of planes leads along the curve: the first is the one end's face, the last the other's, and those between lean
        less and less as the one and more and more as the other. Where a plane meets a voxel says which cross-section counts.
        """
        arc = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(line, axis=0), axis=1))])
        tangent = np.gradient(line, axis=0)
        tangent /= np.linalg.norm(tangent, axis=1)[:, None]
        frames = _frames(line)
        at = [int(((line - end.point_mm) ** 2).sum(axis=1).argmin()) for end in (a, b)]
        at[1] = max(at[1], at[0] + 1) if at[0] + 1 < len(line) else at[0]
        faces = arc[at]
        share = np.clip((arc - faces[0]) / max(1e-9, faces[1] - faces[0]), 0, 1)
        leans = [_lean(end, tangent[k]) for end, k in zip((a, b), at, strict=True)]
        section_a = self._section(a, frames[at[0]], tangent[at[0]], leans[0])
        section_b = section_a if b.is_side else self._section(b, frames[at[1]], tangent[at[1]], leans[1])
        # How far out of the plane across the curve one gets per mm along each vector of the frame.
        slopes = [frames[k] @ lean for k, lean in zip(at, leans, strict=True)]
        slope = (1 - share[:, None]) * slopes[0] + share[:, None] * (np.zeros(2) if b.is_side else slopes[1])

        wide = max(section_a.reach_mm, section_b.reach_mm)
        low = np.maximum(np.floor((line.min(axis=0) - wide) / self._spacing), 0).astype(np.int64)
        high = np.minimum(np.ceil((line.max(axis=0) + wide) / self._spacing) + 1, self._shape).astype(np.int64)
        box = tuple(slice(p, q) for p, q in zip(low, high, strict=True))
        index = np.argwhere(self._array[box] == 0) + low
        position = index * self._spacing
        near = np.isfinite(cKDTree(line).query(position, distance_upper_bound=wide)[0])
        index, position = index[near], position[near]
        nearest, u, v = kernels.cross_planes(position, line, tangent, frames, slope)
        within = nearest >= 0
        # The curve leaves the one piece here and enters the other there; behind, nothing is painted.
        core = np.clip(np.rint(line / self._spacing).astype(np.int64), 0, self._shape - 1)
        piece = self.piece_at(core)
        leaves = int(np.flatnonzero(piece == a.piece).max(initial=0)) if a.piece != b.piece else 0
        enters = np.flatnonzero(piece[leaves:] == b.piece) if a.piece != b.piece else np.empty(0, np.int64)
        stop = leaves + int(enters[0]) if len(enters) else len(line) - 1
        # Nothing behind the faces but their ragged rims.
        within &= arc[nearest] >= faces[0] - _rim(a)
        if b.is_side:
            within &= nearest <= stop + round(0.5 * b.radius_mm / _STEP_MM)
        else:
            within &= arc[nearest] <= faces[1] + _rim(b)
        t = share[nearest]
        depth = (1 - t) * section_a.at(u, v) + t * section_b.at(u, v)
        painted = index[within & (depth <= section_a.loss(section_b)(t))]
        # However thin: the curve itself joins.
        core = core[leaves : stop + 1]
        core = core[self._array[tuple(core.T)] == 0]
        return np.unique(np.concatenate([painted, core]), axis=0)

    def _section(self, end: End, frame: Floats, along: Floats, lean: Floats) -> _Section:
        """Measure the cross-section behind an end: the mean of several, so that neither rim nor voxel shows.

        It lies in planes like the end's face; `frame` and `along` are the curve's there, `lean` is `_lean(end, along)`.
        """
        reach = 1.9 * end.radius_mm + 1.5
        first = 0.5 * float(self._spacing.mean()) + end.rag_mm
        last = min(end.room_mm, first + max(2.5, 0.6 * end.radius_mm, 1.2 * float(self._spacing.max())))
        if last < first + 0.2:
            return _Section.disc(end.radius_mm, reach)
        sample = np.linspace(-reach, reach, 2 * max(8, int(reach / (0.4 * float(self._spacing.min())))) + 1)
        uu, vv = np.meshgrid(sample, sample, indexing="ij")
        depths = np.arange(first, last, max(0.5, 0.5 * float(self._spacing.min())))
        planes = end.point_mm - depths[:, None] * end.outward
        across = uu[..., None] * frame[0] + vv[..., None] * frame[1]
        points = planes[:, None, None, :] + across + (across @ lean)[..., None] * along
        low = np.maximum(np.floor(points.reshape(-1, 3).min(axis=0) / self._spacing) - 3, 0).astype(np.int64)
        high = np.minimum(np.ceil(points.reshape(-1, 3).max(axis=0) / self._spacing) + 4, self._shape).astype(np.int64)
        box = tuple(slice(p, q) for p, q in zip(low, high, strict=True))
        inside = np.isin(self._array[box], self._numbers)
        where = np.argwhere(inside)
        inside[tuple(where[self.piece_at(where + low) != end.piece].T)] = False
        half = 0.5 * float(self._spacing.mean())
        signed = np.where(
            inside,
            half - ndimage.distance_transform_edt(inside, sampling=self._spacing),
            ndimage.distance_transform_edt(~inside, sampling=self._spacing) - half,
        )
        where_mm = np.moveaxis(points / self._spacing - low, -1, 0)
        mean = ndimage.map_coordinates(signed, where_mm, order=1, mode="nearest").mean(axis=0)
        # Only what hangs together with the middle: another branch may pass through the plane.
        parts, _ = ndimage.label(mean <= 0)
        middle = parts[len(sample) // 2, len(sample) // 2]
        if not middle:
            return _Section.disc(end.radius_mm, reach)
        mean[(parts != middle) & (parts > 0)] = half
        # Corners are lost in between voxels, and sections that do not lie quite above each other have a mean that is smaller
        # than each: the section gets the area that the voxels have.
        around = ndimage.distance_transform_edt(parts != middle) * (sample[1] - sample[0]) <= 2 * half
        voxels = ndimage.map_coordinates(inside.astype(np.float32), where_mm, order=0, mode="nearest")
        mean -= np.quantile(mean[around], float(voxels[:, around].mean()))
        area = float((mean <= 0).sum()) * (sample[1] - sample[0]) ** 2
        if not 0.4 < np.sqrt(area / np.pi) / end.radius_mm < 1.6:
            return _Section.disc(end.radius_mm, reach)
        return _Section(mean, float(sample[0]), float(sample[1] - sample[0]), reach)

    def _apart(self, index: NDArray[np.int64], a: End, b: End) -> NDArray[np.int64]:
        """Leave out what would touch a third piece or a speck."""
        if not len(index):
            return index
        touching = np.zeros(len(index), bool)
        for offset in kernels.OFFSETS:
            near = np.clip(index + offset, 0, self._shape - 1)
            piece = self.piece_at(near)
            touching |= (piece >= 0) & (piece != a.piece) & (piece != b.piece) & self._is_piece[piece]
        return index[~touching]

    def _connects(self, index: NDArray[np.int64], a: End, b: End) -> bool:
        """Whether the painted voxels join the two pieces."""
        radius = 6 * max(a.radius_mm, b.radius_mm) + 6
        corners = np.concatenate([index, np.rint([a.point_mm / self._spacing, b.point_mm / self._spacing]).astype(np.int64)])
        low = np.maximum(corners.min(axis=0) - np.ceil(radius / self._spacing).astype(np.int64), 0)
        high = np.minimum(corners.max(axis=0) + np.ceil(radius / self._spacing).astype(np.int64) + 1, self._shape)
        box = self._array[tuple(slice(p, q) for p, q in zip(low, high, strict=True))]
        where = np.argwhere(np.isin(box, self._numbers)) + low
        piece = self.piece_at(where)
        made = np.zeros(box.shape, np.uint8)
        mine = (piece == a.piece) | (piece == b.piece)
        made[tuple((where[mine] - low).T)] = 1
        made[tuple((index - low).T)] = 1
        parts, _ = ndimage.label(made, np.ones((3, 3, 3)))
        numbers = [set(np.unique(parts[tuple((where[piece == p] - low).T)])) for p in (a.piece, b.piece)]
        return bool(numbers[0] & numbers[1])

    def _evidence(self, index: NDArray[np.int64], a: End, b: End) -> float:
        """Part of the painted voxels that have the HU of the vessel beside them."""
        if self._hu is None or not len(index):
            return 0.0
        reach = 4 * max(a.radius_mm, b.radius_mm) + 6
        tree = cKDTree(self._voxels.position_mm)
        near = np.concatenate([tree.query_ball_point(e.point_mm, reach) for e in (a, b)]).astype(np.int64)
        deep = near[self._voxels.depth_mm[near] > 1.1 * float(self._spacing.min())]
        known = self._voxels.index[deep if len(deep) >= 20 else near]
        values = np.asarray(self._hu[tuple(known.T)], np.float64)
        middle = float(np.median(values))
        spread = max(15.0, 1.4826 * float(np.median(np.abs(values - middle))))
        here = np.asarray(self._hu[tuple(index.T)], np.float64)
        return float((np.abs(here - middle) <= 2.5 * spread).mean())


@dataclass(frozen=True)
class _Section:
    """A cross-section: signed distance (mm, negative inside) on a square lattice around the centreline."""

    depth: Floats
    first: float
    step: float
    reach_mm: float

    @classmethod
    def disc(cls, radius: float, reach: float) -> _Section:
        sample = np.linspace(-reach, reach, 33)
        uu, vv = np.meshgrid(sample, sample, indexing="ij")
        return cls(np.hypot(uu, vv) - radius, float(sample[0]), float(sample[1] - sample[0]), reach)

    def loss(self, other: _Section) -> Callable[[Floats], Floats]:
        """Return what a blend of both must be raised by to have their areas in between: unlike shapes share too little."""
        sample = self.first + self.step * np.arange(len(self.depth))
        uu, vv = np.meshgrid(sample, sample, indexing="ij")
        one, two = self.depth, other.at(uu, vv)
        shares = np.linspace(0, 1, 9)
        areas = (1 - shares) * float((one <= 0).mean()) + shares * float((two <= 0).mean())
        levels = [float(np.quantile((1 - t) * one + t * two, area)) for t, area in zip(shares, areas, strict=True)]
        return lambda t: np.asarray(np.interp(t, shares, levels))

    def at(self, u: Floats, v: Floats) -> Floats:
        index = np.stack([(u - self.first) / self.step, (v - self.first) / self.step])
        return np.asarray(ndimage.map_coordinates(self.depth, index, order=1, mode="nearest"))


def _rim(end: End) -> float:
    """How far behind an end's face it may be painted: where it is ragged."""
    return min(_RIM_MM, max(1.5 * end.rag_mm, 0.1))


def _lean(end: End, along: Floats) -> Floats:
    """How an end's face leans against the plane across a curve: going across by v, one is `lean @ v` further along."""
    if end.is_side:
        return np.zeros(3)
    normal = end.outward - end.tilt
    upright = float(normal @ along)
    if abs(upright) < 0.3 * float(np.linalg.norm(normal)):
        return np.zeros(3)
    lean = along - normal / upright
    return np.asarray(lean * min(1.0, 4.0 / max(1e-9, float(np.linalg.norm(lean)))))


def _hermite(a: End, b: End) -> Floats:
    """The curve from inside one end to inside the other, in steps of `_STEP_MM`."""
    p0 = a.point_mm - _back(a) * a.outward
    chord = b.point_mm - a.point_mm
    chord /= max(1e-9, float(np.linalg.norm(chord)))
    if b.is_side:
        p1 = b.point_mm
        length = float(np.linalg.norm(p1 - p0))
        m0 = a.outward * length
        m1 = 2 * (p1 - p0) - m0  # no wish of its own: the curve of least bending
        norm = float(np.linalg.norm(m1))
        m1 = m1 * (length / norm) if norm > 0 else m0
    else:
        p1 = b.point_mm - _back(b) * b.outward
        length = float(np.linalg.norm(p1 - p0))
        shares = (_CHORD_CUT if end.cut else _CHORD for end in (a, b))
        m0, m1 = (((1 - c) * d + c * chord) * length for c, d in zip(shares, (a.outward, -b.outward), strict=True))
    t = np.linspace(0, 1, max(3, int(np.ceil(1.1 * length / _STEP_MM))))[:, None]
    return np.asarray(
        (2 * t**3 - 3 * t**2 + 1) * p0 + (t**3 - 2 * t**2 + t) * m0 + (3 * t**2 - 2 * t**3) * p1 + (t**3 - t**2) * m1
    )


def _back(end: End) -> float:
    """How far inside an end its curve begins: behind the rim, and behind what a slanting face lacks."""
    return min(_RIM_MM + end.radius_mm * (0.3 + float(np.linalg.norm(end.tilt))), max(0.5, end.room_mm))


def _frames(line: Floats) -> Floats:
    """Return (k, 2, 3): two unit vectors across the line at each point, turning with it and not around it."""
    tangent = np.gradient(line, axis=0)
    tangent /= np.linalg.norm(tangent, axis=1)[:, None]
    first = np.cross(tangent[0], np.eye(3)[np.argmin(np.abs(tangent[0]))])
    first /= np.linalg.norm(first)
    return np.asarray(kernels.carry_frames(tangent, first))
