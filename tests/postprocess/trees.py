"""Synthetic vessel trees with cut gaps, and ureters: known centrelines, known cuts, nobody's data.

A tree is a set of branches, curved and tapering, from one root; a cut takes a stretch of one branch out, with ragged ends.
Beside it: specks, organs, and a vessel of the other kind that runs along some of the branches.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.interpolate import CubicSpline
from scipy.spatial import cKDTree

from scangraph.contracts import LabelMap

ORGAN, BLADDER, KIDNEY_RIGHT, KIDNEY_LEFT, ARTERY, VEIN, URETER = 5, 21, 2, 3, 204, 205, 206
Points = NDArray[np.float64]
#: How long gaps are, and how often: most breaks in segmented vessels are short.
GAPS_MM, GAP_SHARES = ((3.0, 6.0), (6.0, 10.0), (10.0, 18.0)), (0.44, 0.38, 0.18)


@dataclass
class Branch:
    """A centreline in box coordinates.

    Attributes
    ----------
    points_mm : (n, 3), z y x, half a millimetre apart
    radii_mm : (n,)
    parent : int
        Index of its branch, -1 for the root.
    """

    points_mm: Points
    radii_mm: NDArray[np.float64]
    parent: int


@dataclass
class Gap:
    """A stretch that was taken out.

    Attributes
    ----------
    branch : int
    start_mm, stop_mm : float
        Arc length on the branch.
    voxels : (n, 3)
        What was taken out.
    """

    branch: int
    start_mm: float
    stop_mm: float
    voxels: NDArray[np.int64]

    @property
    def length_mm(self) -> float:
        return self.stop_mm - self.start_mm


@dataclass
class Case:
    """What a repair gets, and what is true.

    Attributes
    ----------
    mask : LabelMap
        With gaps, specks, organs and a neighbour of the other kind.
    truth : bool, (z, y, x)
        The whole vessel.
    label : int
        Its number.
    pieces : int, (z, y, x)
        The connected pieces of the cut tree, numbered from 1, without specks.
    neighbours : set of (int, int)
        Pieces that follow each other along a vessel.
    """

    mask: LabelMap
    truth: NDArray[np.bool_]
    label: int
    branches: list[Branch]
    gaps: list[Gap]
    pieces: NDArray[np.int32]
    neighbours: set[tuple[int, int]] = field(default_factory=set)


def _curve(rng: np.random.Generator, start: Points, direction: Points, length_mm: float, bend: float) -> Points:
    """A smooth random curve, half a millimetre a step."""
    steps = max(4, round(length_mm / 0.5))
    turn = rng.normal(0, 1, 3) * bend
    heading, at, line = direction / np.linalg.norm(direction), start.astype(float), [start.astype(float)]
    for _ in range(steps):
        turn += rng.normal(0, 1, 3) * bend * 0.15 - 0.03 * turn
        heading = heading + turn * 0.5
        heading = heading / np.linalg.norm(heading)
        at = at + 0.5 * heading
        line.append(at)
    return np.array(line)


def grow(rng: np.random.Generator, size_mm: Points, root_mm: float = 5.0, least_mm: float = 1.0) -> list[Branch]:
    """Grow a tree from the top of a box; radii fall by Murray's law from `root_mm` to `least_mm`."""
    branches: list[Branch] = []
    start = np.array([size_mm[0] - 7.0, size_mm[1] * 0.5, size_mm[2] * 0.5])
    todo = [(start, np.array([-1.0, 0.0, 0.0]) + rng.normal(0, 0.1, 3), root_mm, -1, 0)]
    taken = np.empty((0, 3))
    thick = np.empty(0)
    while todo:
        at, heading, radius, parent, depth = todo.pop(0)
        found = None
        for _ in range(30):
            length = (14 + 7 * radius) * rng.uniform(0.8, 1.5)
            line = _curve(rng, at, heading + rng.normal(0, 0.15, 3), length, 0.012)
            inside = ((line > 6) & (line < size_mm - 6)).all(axis=1) | (np.arange(len(line)) < 4)
            own = line[min(len(line) - 1, round((3 * radius + 8) / 0.5)) :]
            near = len(taken) and len(own) and (cKDTree(taken).query(own)[0] - 0 < radius + 7).any()
            if inside.all() and not near:
                found = line
                break
            heading = heading + rng.normal(0, 0.25, 3)
        if found is None:
            continue
        end = max(least_mm, radius * rng.uniform(0.8, 0.95))
        branches.append(Branch(found, np.linspace(radius, end, len(found)), parent))
        taken, thick = np.concatenate([taken, found]), np.concatenate([thick, branches[-1].radii_mm])
        me = len(branches) - 1
        if depth >= 5 or end < least_mm * 1.12:
            continue
        share = rng.uniform(0.35, 0.65)
        tangent = found[-1] - found[-4]
        tangent /= np.linalg.norm(tangent)
        side = np.cross(tangent, rng.normal(0, 1, 3))
        side /= np.linalg.norm(side)
        for part, sign in ((share, 1), (1 - share, -1)):
            angle = np.deg2rad(rng.uniform(20, 45)) * sign
            todo.append(
                (found[-1], tangent * np.cos(angle) + side * np.sin(angle), max(least_mm, end * part ** (1 / 3)), me, depth + 1)
            )
    return branches


def paint(
    shape: tuple[int, ...], spacing_mm: Points, branches: list[Branch]
) -> tuple[NDArray[np.bool_], NDArray[np.int64], NDArray[np.int64]]:
    """Paint the branches; return the mask, its voxels, and of each the index of its centreline point among all."""
    points = np.concatenate([b.points_mm for b in branches])
    radii = np.concatenate([b.radii_mm for b in branches])
    near = np.zeros(shape, bool)
    for p, r in zip(points[::2], radii[::2], strict=True):
        low = np.maximum(np.floor((p - r - 1) / spacing_mm).astype(int), 0)
        high = np.ceil((p + r + 1) / spacing_mm).astype(int) + 1
        near[tuple(slice(a, max(a, b)) for a, b in zip(low, high, strict=True))] = True
    voxels = np.argwhere(near)
    tree = cKDTree(points)
    best = np.full(len(voxels), np.inf)
    nearest = np.zeros(len(voxels), np.int64)
    distance, index = tree.query(voxels * spacing_mm, k=min(12, len(points)))
    for k in range(distance.shape[1]):
        depth = distance[:, k] - radii[index[:, k]]
        better = depth < best
        best[better], nearest[better] = depth[better], index[better, k]
    inside = best <= 0
    mask = np.zeros(shape, bool)
    mask[tuple(voxels[inside].T)] = True
    return mask, voxels[inside], nearest[inside]


def make_case(
    seed: int,
    *,
    spacing_mm: tuple[float, float, float] = (1.0, 0.8, 0.8),
    size_mm: tuple[float, float, float] = (150.0, 120.0, 120.0),
    root_mm: float = 5.0,
    gaps: int = 11,
    gap_mm: tuple[float, float] | None = None,
    specks: int = 12,
    label: int = ARTERY,
    clutter: bool = True,
) -> Case:
    """Make a tree with gaps, ragged ends, specks, organs and a neighbour of the other kind.

    Gaps have the lengths of `GAPS_MM`, or are drawn evenly from `gap_mm`.
    """
    rng = np.random.default_rng(seed)
    spacing, size = np.array(spacing_mm), np.array(size_mm)
    shape = tuple(int(n) for n in np.ceil(size / spacing))
    branches = grow(rng, size, root_mm)
    truth, voxels, nearest = paint(shape, spacing, branches)
    owner = np.concatenate([np.full(len(b.points_mm), i) for i, b in enumerate(branches)])
    arc = np.concatenate([np.arange(len(b.points_mm)) * 0.5 for b in branches])
    radii = np.concatenate([b.radii_mm for b in branches])
    cut = truth.copy()
    made: list[Gap] = []
    noise = ndimage.gaussian_filter(rng.normal(0, 1, shape), 1.2 / spacing)
    noise *= 1.0 / noise.std()
    ragged = np.clip(noise[tuple(voxels.T)], -1.5, 1.5)
    taken = np.zeros(len(voxels), bool)
    for _ in range(gaps * 30):
        if len(made) == gaps:
            break
        b = int(rng.integers(len(branches)))
        length = (len(branches[b].points_mm) - 1) * 0.5
        wide = rng.uniform(*(gap_mm or GAPS_MM[rng.choice(3, p=GAP_SHARES)]))
        # The child's own surface begins about two radii of its parent away from the fork.
        first = 2.0 + (1.6 * branches[branches[b].parent].radii_mm[-1] if branches[b].parent >= 0 else 4.0)
        if first + wide + 6 > length:
            continue
        start = rng.uniform(first, length - wide - 6)
        if any(g.branch == b and start < g.stop_mm + 8 and start + wide > g.start_mm - 8 for g in made):
            continue
        where = (owner[nearest] == b) & (arc[nearest] + ragged > start) & (arc[nearest] - ragged < start + wide)
        made.append(Gap(b, start, start + wide, voxels[where]))
        taken |= where
        # Small holes in the last millimetres of both ends.
        rim = (owner[nearest] == b) & ((np.abs(arc[nearest] - start) < 2.5) | (np.abs(arc[nearest] - start - wide) < 2.5))
        taken |= rim & (rng.random(len(voxels)) < 0.12) & (radii[nearest] > 1.3)
    cut[tuple(voxels[taken].T)] = False

    pieces, _ = ndimage.label(cut, np.ones((3, 3, 3)))
    sizes = np.bincount(pieces.ravel())
    small = np.flatnonzero(sizes < 4)
    cut[np.isin(pieces, small[small > 0])] = False
    pieces, _ = ndimage.label(cut, np.ones((3, 3, 3)))

    array = np.zeros(shape, np.uint8)
    free = ~ndimage.binary_dilation(truth, iterations=2)
    if clutter:
        grid = np.meshgrid(*(np.arange(n) * s for n, s in zip(shape, spacing, strict=True)), indexing="ij", sparse=True)
        for _ in range(4):
            centre, half = rng.uniform(0.15, 0.85, 3) * size, rng.uniform(8, 20, 3)
            inside = sum(((g - c) / h) ** 2 for g, c, h in zip(grid, centre, half, strict=True)) < 1
            array[inside & free] = ORGAN
        other = []
        for b in rng.permutation(len(branches))[:3]:
            line, r = branches[b].points_mm, branches[b].radii_mm
            side = np.cross(line[-1] - line[0], rng.normal(0, 1, 3))
            side /= np.linalg.norm(side)
            other.append(Branch(line + side * (2.1 * r[:, None] + 1.0), r * 0.9, -1))
        vein, _, _ = paint(shape, spacing, other)
        array[vein & ~truth & (array == 0)] = VEIN if label == ARTERY else ARTERY
    array[cut] = label
    far = np.argwhere(ndimage.distance_transform_edt(~truth, sampling=spacing) > 2.5)
    for p in far[rng.permutation(len(far))[:specks]]:
        r = rng.uniform(0.8, 1.5)
        box = tuple(slice(max(0, int(c - 3)), int(c + 4)) for c in p)
        around = np.stack(
            np.meshgrid(*(np.arange(s.start, min(s.stop, n)) for s, n in zip(box, shape, strict=True)), indexing="ij"), -1
        )
        ball = (((around - p) * spacing) ** 2).sum(-1) <= r * r
        part = array[box]
        part[ball & (part == 0)] = label
    made = [g for g in made if len(g.voxels)]
    case = Case(
        LabelMap(array, spacing_mm, labels=tuple(sorted({int(v) for v in np.unique(array)} - {0}))),
        truth, label, branches, made, pieces,
    )  # fmt: skip
    _note_neighbours(case)
    return case


def make_ureters(seed: int, spacing_mm: tuple[float, float, float] = (1.0, 0.8, 0.8), gaps: int = 2) -> Case:
    """Two ureters from their kidneys to the bladder, each with gaps of 5-30 mm."""
    rng = np.random.default_rng(seed)
    spacing, size = np.array(spacing_mm), np.array([230.0, 100.0, 180.0])
    shape = tuple(int(n) for n in np.ceil(size / spacing))
    array = np.zeros(shape, np.uint8)
    grid = np.meshgrid(*(np.arange(n) * s for n, s in zip(shape, spacing, strict=True)), indexing="ij", sparse=True)
    branches = []
    bladder = np.array([22.0, 45.0, 90.0])
    for side, number in ((-1, KIDNEY_RIGHT), (1, KIDNEY_LEFT)):
        kidney = np.array([190.0, 60.0, 90.0 + side * 55]) + rng.normal(0, 3, 3)
        inside = sum(((g - c) / h) ** 2 for g, c, h in zip(grid, kidney, (30, 18, 17), strict=True)) < 1
        array[inside] = number
        corners = np.array(
            [
                kidney + np.array([-8, -5, -side * 17]), kidney + np.array([-35, -12, -side * 22]), [120, 45, 90 + side * 32],
                [80, 42, 90 + side * 34], [45, 58, 90 + side * 36], bladder + np.array([8, 8, side * 20]),
            ]
        ) + rng.normal(0, 1.5, (6, 3))  # fmt: skip
        t = np.linspace(0, 5, 600)
        line = CubicSpline(np.arange(6), corners)(t)
        steps = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(line, axis=0), axis=1))])
        even = np.arange(0, steps[-1], 0.5)
        line = np.stack([np.interp(even, steps, line[:, k]) for k in range(3)], 1)
        branches.append(Branch(line, np.interp(even, [0, 20, 60, even[-1]], [3.2, 2.2, 1.7, 1.8]), -1))
    inside = sum(((g - c) / h) ** 2 for g, c, h in zip(grid, bladder, (20, 24, 26), strict=True)) < 1
    array[inside] = BLADDER
    truth, voxels, nearest = paint(shape, spacing, branches)
    truth &= array == 0
    keep = truth[tuple(voxels.T)]
    voxels, nearest = voxels[keep], nearest[keep]
    owner = np.concatenate([np.full(len(b.points_mm), i) for i, b in enumerate(branches)])
    arc = np.concatenate([np.arange(len(b.points_mm)) * 0.5 for b in branches])
    cut, made = truth.copy(), []
    for b in range(2):
        length = len(branches[b].points_mm) * 0.5
        mine: list[Gap] = []
        for _ in range(200):
            if len(mine) == gaps:
                break
            wide = rng.uniform(5, 30)
            start = rng.uniform(18, length - wide - 30)
            if any(start < g.stop_mm + 10 and start + wide > g.start_mm - 10 for g in mine):
                continue
            wobble = rng.uniform(-1, 1, len(voxels))
            where = (owner[nearest] == b) & (arc[nearest] + wobble > start) & (arc[nearest] - wobble < start + wide)
            mine.append(Gap(b, start, start + wide, voxels[where]))
            cut[tuple(voxels[where].T)] = False
        made += mine
    array[cut] = URETER
    pieces, _ = ndimage.label(cut, np.ones((3, 3, 3)))
    labels = tuple(sorted({int(v) for v in np.unique(array)} - {0}))
    case = Case(LabelMap(array, spacing_mm, labels=labels), truth, URETER, branches, made, pieces)
    _note_neighbours(case)
    return case


def _note_neighbours(case: Case) -> None:
    """Pieces that follow each other along a branch and the end of its parent may be joined.

    At gaps and their ragged ends; and where voxels are as large as a vessel is thick, and have broken it themselves.
    """
    spacing = np.array(case.mask.spacing_mm)
    for branch in case.branches:
        before = case.branches[branch.parent].points_mm[-16:] if branch.parent >= 0 else branch.points_mm[:0]
        line = np.concatenate([before, branch.points_mm])
        index = np.clip(np.rint(line / spacing).astype(int), 0, np.array(case.pieces.shape) - 1)
        order = [int(p) for p in case.pieces[tuple(index.T)] if p]
        case.neighbours |= {(min(p, q), max(p, q)) for p, q in itertools.pairwise(order) if p != q}
    for gap in case.gaps:
        sides = _sides(case, gap)
        if sides is not None and sides[0] != sides[1]:
            case.neighbours.add((min(sides), max(sides)))


def _sides(case: Case, gap: Gap) -> tuple[int, int] | None:
    """The pieces on both sides of a gap, along its branch; None where there is none within 8 mm of an end."""
    branch, spacing = case.branches[gap.branch], np.array(case.mask.spacing_mm)
    found = []
    for at, sign in ((gap.start_mm, -1), (gap.stop_mm, 1)):
        for step in np.arange(1.0, 8.0, 0.5):
            where = round((at + sign * step) / 0.5)
            if not 0 <= where < len(branch.points_mm):
                break
            index = np.rint(branch.points_mm[where] / spacing).astype(int)
            index = np.clip(index, 0, np.array(case.pieces.shape) - 1)
            piece = int(case.pieces[tuple(index)])
            if piece:
                found.append(piece)
                break
    return (found[0], found[1]) if len(found) == 2 else None


@dataclass
class Score:
    """How well a repair did on one case."""

    closed: list[tuple[float, bool]]
    false_bridges: int
    dice_in_gaps: float
    cl_dice: float
    beta0_error: int


def score(case: Case, repaired: NDArray[Any]) -> Score:
    """Measure a repair: gaps closed within their own stretch, painted links between pieces that no gap parts, overlap.

    A gap counts as closed where its two sides are connected inside its own surroundings (2.5 mm around the true stretch), so
    that a detour through the rest of the tree does not count.
    """
    spacing = np.array(case.mask.spacing_mm)
    vessel = repaired == case.label
    before = case.mask.array == case.label
    added = vessel & ~before
    closed, total, hit, painted_in = [], 0, 0, 0
    for gap in case.gaps:
        sides = _sides(case, gap)
        if sides is None or sides[0] == sides[1]:
            continue
        line = case.branches[gap.branch].points_mm
        a, b = max(0, round((gap.start_mm - 7) / 0.5)), min(len(line), round((gap.stop_mm + 7) / 0.5) + 1)
        reach = case.branches[gap.branch].radii_mm[a:b].max() + 2.5
        low = np.maximum(np.floor((line[a:b].min(axis=0) - reach) / spacing).astype(int), 0)
        high = np.minimum(np.ceil((line[a:b].max(axis=0) + reach) / spacing).astype(int) + 1, vessel.shape)
        box = tuple(slice(p, q) for p, q in zip(low, high, strict=True))
        inside = np.argwhere(np.ones([q - p for p, q in zip(low, high, strict=True)], bool)) + low
        tube = (cKDTree(line[a:b]).query(inside * spacing)[0] <= reach).reshape([q - p for p, q in zip(low, high, strict=True)])
        linked, _ = ndimage.label(vessel[box] & tube, np.ones((3, 3, 3)))
        numbers = [set(np.unique(linked[(case.pieces[box] == s) & tube])) - {0} for s in sides]
        closed.append((gap.length_mm, bool(numbers[0] & numbers[1])))
        short = tuple(gap.voxels.T)
        total += len(gap.voxels)
        hit += int(vessel[short].sum())
    true_gap = case.truth & ~before
    near = ndimage.distance_transform_edt(~case.truth, sampling=spacing) <= 2.0
    painted_in = int((added & near).sum())
    dice = 2 * int((added & true_gap).sum()) / max(1, painted_in + int(true_gap.sum()))

    # A painted part that joins pieces which no gap parts, or a speck to anything, is a false bridge.
    whole, _ = ndimage.label(before, np.ones((3, 3, 3)))
    parts, _ = ndimage.label(added, np.ones((3, 3, 3)))
    false = 0
    for number, box in enumerate(ndimage.find_objects(parts), 1):
        wide = tuple(slice(max(0, s.start - 1), s.stop + 1) for s in box)
        touched = ndimage.binary_dilation(parts[wide] == number, np.ones((3, 3, 3)))
        joined = {int(v) for v in np.unique(case.pieces[wide][touched])} - {0}
        specks = {int(v) for v in np.unique(whole[wide][touched & (case.pieces[wide] == 0)])} - {0}
        groups = {p: p for p in joined}

        def root(p: int, groups: dict[int, int] = groups) -> int:
            while groups[p] != p:
                p = groups[p]
            return p

        for p, q in case.neighbours:
            if p in joined and q in joined:
                groups[root(p)] = root(q)
        false += max(0, len({root(p) for p in joined}) - 1) + len(specks) * bool(joined)
    return Score(closed, false, dice, cl_dice(vessel & _large(vessel), case), _beta0(case, vessel))


def _large(vessel: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Without specks, which a repair leaves alone on purpose."""
    parts, _ = ndimage.label(vessel, np.ones((3, 3, 3)))
    sizes = np.bincount(parts.ravel())
    keep = sizes >= 60
    keep[0] = False
    return np.asarray(keep[parts], bool)


def cl_dice(vessel: NDArray[np.bool_], case: Case) -> float:
    """Centreline Dice (arXiv 2003.07311): how much of each one's skeleton lies inside the other."""
    from skimage.morphology import skeletonize

    spacing = np.array(case.mask.spacing_mm)
    lines = np.concatenate([b.points_mm for b in case.branches])
    index = np.clip(np.rint(lines / spacing).astype(int), 0, np.array(case.truth.shape) - 1)
    on = case.truth[tuple(index.T)]
    sensitivity = vessel[tuple(index[on].T)].mean()
    skeleton = skeletonize(vessel)
    precision = case.truth[skeleton].mean()
    return float(2 * precision * sensitivity / (precision + sensitivity))


def _beta0(case: Case, vessel: NDArray[np.bool_]) -> int:
    parts = ndimage.label(_large(vessel), np.ones((3, 3, 3)))[1]
    true = ndimage.label(case.truth, np.ones((3, 3, 3)))[1]
    return abs(int(parts) - int(true))
