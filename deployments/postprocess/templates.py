"""A quick patient-specific mask from a template: align what both have, carry the rest along.

The map leads from the patient to the template, so that every voxel of the patient has exactly one answer: an affine map by
closest points, structure by structure, then a smooth displacement from what remains at the surfaces, spread by Gaussians from
wide to narrow and never far beyond them. A step that would fold space is shortened until it does not.

Positions are LPS millimetres in array order (z, y, x) on masks turned to LPS.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import cKDTree

from deployments.postprocess import kernels, masks
from deployments.postprocess.centrelines import find_voxels, trace
from scangraph.contracts import LabelMap, merge_label_maps
from scangraph.contracts.errors import LabelsMissing

Floats = NDArray[np.float64]

#: Spacing of the alignment, mm.
WORK_MM = 2.5
#: Spacing of the displacement's lattice, mm.
FIELD_MM = 5.0
#: What is never carried: another patient's disease.
DISEASE = frozenset({masks.TUMOR, masks.CYST, masks.CYST_LEFT, masks.CYST_RIGHT})
#: What is carried as centrelines with radii: as voxels, thin tubes would tear.
TUBES = (204, 205, 206)
#: Widths of the displacement's Gaussians, mm, and the steps at each.
_WIDTHS_MM, _STEPS = (30.0, 15.0, 8.0, 5.0), 3
#: Surface points of a structure that are followed.
_POINTS = 1200
#: How far the trust in carried structures reaches (mm): it falls to 1/e.
_TRUST_MM = 40.0
#: The smallest Jacobian determinant that is allowed, relative to the affine map's.
_LEAST_JACOBIAN = 0.15


@dataclass(frozen=True)
class Sample:
    """A mask with the template's structures, and what is known of them."""

    mask: LabelMap
    facts: dict[str, Any]
    warnings: list[str]


@dataclass(frozen=True)
class Alignment:
    """A map from the patient's to the template's millimetres: `matrix @ p + offset + displacement(p)`.

    Parameters
    ----------
    field_mm : (3, a, b, c) float32
        Displacement at the nodes of a lattice of `FIELD_MM`, the first of them at `origin_mm`.
    """

    matrix: Floats
    offset: Floats
    field_mm: NDArray[np.float32]
    origin_mm: Floats

    def displacement(self, points: Floats) -> Floats:
        """Displacement at (n, 3) points of the patient."""
        index = ((points - self.origin_mm) / FIELD_MM).T
        return np.stack([ndimage.map_coordinates(part, index, order=1, mode="nearest") for part in self.field_mm], axis=1)

    def to_template(self, points: Floats) -> Floats:
        """Map (n, 3) points of the patient."""
        return np.asarray(points @ self.matrix.T + self.offset + self.displacement(points))

    def to_patient(self, points: Floats) -> Floats:
        """Map (n, 3) points of the template back, by fixed-point iteration."""
        inverse = np.linalg.inv(self.matrix)
        found = (points - self.offset) @ inverse.T
        for _ in range(30):
            found = (points - self.offset - self.displacement(found)) @ inverse.T
        return np.asarray(found)

    def jacobian(self) -> NDArray[np.float64]:
        """Determinant of the map's derivative at the lattice's nodes."""
        return np.asarray(kernels.jacobian(self.matrix, self.field_mm, FIELD_MM), np.float64)


def sample(mask: LabelMap, template: LabelMap | None = None, *, on_progress: masks.Report = masks.silent) -> Sample:
    """Fill a patient's mask with a template's structures.

    Parameters
    ----------
    mask : LabelMap
        What is known of the patient. All of it stays; only background is painted.
    template : LabelMap, optional
        Any grid. A synthetic patient's if not given.

    Raises
    ------
    LabelsMissing
        If both have no structure in common.
    """
    synthetic = template is None
    template = built_in_template() if template is None else template
    found, there = masks.occurring(mask), masks.occurring(template)
    on_progress(0, 3, "aligning")
    patient, pattern = mask.reoriented("LPS"), template.reoriented("LPS")
    small_patient, small_pattern = coarse(patient), coarse(pattern)
    one, other = structures(small_patient), structures(small_pattern)
    shared = sorted(one.keys() & other.keys())
    if not shared:
        raise LabelsMissing(
            name="postprocess/sample",
            wanted="a structure that the template has, too",
            missing="any of " + ", ".join(template.label(n).name for n in there if n not in DISEASE),
            found=", ".join(mask.label(n).name for n in found) or "nothing",
        )
    alignment = align(small_patient, small_pattern, one, other, shared)
    on_progress(1, 3, "carrying")
    carried = [n for n in there if n not in found and n not in DISEASE and n not in _same_as(found)]
    out, array = masks.writable(mask, carried)
    arrived = _carry(array, patient, pattern, alignment, [n for n in carried if n not in TUBES])
    on_progress(2, 3, "tubes")
    arrived += [n for n in carried if n in TUBES and _carry_tube(array, patient, pattern, alignment, n)]
    dice = shared_dice(small_patient, small_pattern, alignment, one, other, shared)
    facts = {
        "template": "built-in synthetic patient" if synthetic else "given",
        "shared_dice": {str(n): round(d, 4) for n, d in dice.items()},
        "least_jacobian": round(float(alignment.jacobian().min()), 4),
        "structures": _confidences(
            out,
            found,
            arrived,
            np.concatenate([_surface(one[n], small_patient.origin_mm, n)[0] for n in shared]),
            float(np.mean(list(dice.values()))),
        ),
    }
    on_progress(3, 3, "done")
    warnings = ["Structures from the template are a guess from another anatomy, the worse the farther from what is known."]
    if len(shared) < 3:
        warnings.append(f"Only {len(shared)} structure(s) are in both masks: what is far from them may lie centimetres off.")
    return Sample(out, facts, warnings)


@cache
def built_in_template() -> LabelMap:
    """Return the synthetic patient's mask: a caricature of an anatomy, in plausible proportions."""
    from scangraph.phantoms import DEMO_SEED, make_phantom

    truth = make_phantom(DEMO_SEED, spacing_mm=(WORK_MM, WORK_MM, WORK_MM), oblique=(0, 0, 0)).truth
    merged = merge_label_maps([truth["organs"], truth["vessels"], truth["ureters"]])
    merged.array.flags.writeable = False
    return merged


def _same_as(found: Iterable[int]) -> set[int]:
    """Numbers that would be carried twice: one mask calls it kidney, the other right and left kidney."""
    found = set(found)
    if masks.KIDNEY in found:
        return {masks.KIDNEY_RIGHT, masks.KIDNEY_LEFT}
    return {masks.KIDNEY} if found & {masks.KIDNEY_RIGHT, masks.KIDNEY_LEFT} else set()


# --- working grids ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Coarse:
    """A mask on a lattice of `WORK_MM`, the first node at `origin_mm` (z, y, x)."""

    array: NDArray[np.unsignedinteger]
    origin_mm: Floats


def coarse(turned: LabelMap) -> Coarse:
    """Look an LPS mask up on the working lattice (oblique ones by their own axes)."""
    spacing = np.asarray(turned.spacing_mm)
    size = np.maximum(2, np.ceil(np.asarray(turned.shape) * spacing / WORK_MM).astype(int))
    first = (np.asarray(turned.shape) - 1) * spacing / 2 - (size - 1) * WORK_MM / 2
    picks = [
        np.clip(np.rint((first[a] + np.arange(size[a]) * WORK_MM) / spacing[a]).astype(int), 0, turned.shape[a] - 1)
        for a in range(3)
    ]
    array = np.ascontiguousarray(turned.array[np.ix_(*picks)])
    return Coarse(array, first)


def structures(work: Coarse) -> dict[int, NDArray[np.bool_]]:
    """Return what can be aligned: each label, and each kidney whole, with its tumor and cysts, under its side's number."""
    array = work.array
    left = np.arange(array.shape[2]) >= masks.midline(array)
    out = {}
    boxes = ndimage.find_objects(array)
    numbers = [n for n, box in enumerate(boxes, 1) if box is not None]
    disease = sorted(DISEASE.intersection(numbers))
    parts = ndimage.label(np.isin(array, disease))[0] if disease else None
    for side, mine in ((masks.KIDNEY_RIGHT, ~left), (masks.KIDNEY_LEFT, left)):
        kidney = array == side
        if masks.KIDNEY in numbers:
            kidney |= (array == masks.KIDNEY) & mine
        if parts is not None and kidney.any():
            box = tuple(slice(max(0, s.start - 2), s.stop + 2) for s in ndimage.find_objects(kidney.view(np.uint8))[0])
            near = ndimage.binary_dilation(kidney[box], iterations=2)
            touching = np.unique(parts[box][near])
            kidney |= np.isin(parts, touching[touching > 0])
        out[side] = kidney
    for number in numbers:
        if number not in {*DISEASE, masks.KIDNEY, masks.KIDNEY_RIGHT, masks.KIDNEY_LEFT, *TUBES}:
            out[number] = array == number
    return {number: part for number, part in out.items() if np.count_nonzero(part) >= 30}


def _surface(part: NDArray[np.bool_], origin: Floats, seed: int) -> tuple[Floats, Floats]:
    """Return (surface points, mm; all of them): the middles of faces between inside and outside, not at the grid's border."""
    points = []
    box = tuple(slice(max(0, s.start - 1), s.stop + 1) for s in ndimage.find_objects(part.astype(np.uint8))[0])
    inside = part[box]
    low = np.array([s.start for s in box])
    for axis in range(3):
        a = np.moveaxis(inside, axis, 0)
        where = np.argwhere(a[1:] != a[:-1]).astype(float)
        where[:, 0] += 0.5
        order = [0, 0, 0]
        order[axis] = 0
        rest = [k for k in range(3) if k != axis]
        order[rest[0]], order[rest[1]] = 1, 2
        points.append(where[:, order])
    every = (np.concatenate(points) + low) * WORK_MM + origin
    rng = np.random.default_rng(seed)
    some = every if len(every) <= _POINTS else every[rng.choice(len(every), _POINTS, replace=False)]
    return some, every


# --- alignment ----------------------------------------------------------------------------------------------------------------


def align(
    patient: Coarse,
    pattern: Coarse,
    one: dict[int, NDArray[np.bool_]],
    other: dict[int, NDArray[np.bool_]],
    shared: list[int],
) -> Alignment:
    """Find the map from patient to template by the structures that both have."""
    mine = {n: _surface(one[n], patient.origin_mm, n)[0] for n in shared}
    theirs = {n: _surface(other[n], pattern.origin_mm, n) for n in shared}
    trees = {n: cKDTree(theirs[n][1]) for n in shared}
    matrix, offset = _affine(mine, {n: t[0] for n, t in theirs.items()}, trees)
    matrix = np.ascontiguousarray(matrix)  # one order, one compiled loop

    shape = tuple(int(np.ceil(n * WORK_MM / FIELD_MM)) + 1 for n in patient.array.shape)
    field = np.zeros((3, *shape), np.float32)
    points = np.concatenate([mine[n] for n in shared])
    index = ((points - patient.origin_mm) / FIELD_MM).T
    base = np.linalg.det(matrix)
    cells = tuple(np.clip(np.rint(index).astype(int), 0, np.array(shape)[:, None] - 1))
    for width in _WIDTHS_MM:
        for _ in range(_STEPS):
            here = points @ matrix.T + offset
            here += np.stack([ndimage.map_coordinates(part, index, order=1, mode="nearest") for part in field], axis=1)
            wanted, weight = _pull(here, shared, mine, theirs, trees)
            step = _spread(wanted, weight, cells, shape, width)
            field = _without_folds(matrix, base, field, step)
    return Alignment(matrix, offset, field, patient.origin_mm)


def _affine(mine: dict[int, Floats], theirs: dict[int, Floats], trees: dict[int, cKDTree]) -> tuple[Floats, Floats]:
    """Fit an affine map by closest points; a similarity where there are fewer than three structures."""
    shared = sorted(mine)
    points = np.concatenate([mine[n] for n in shared])
    # Each structure counts alike, however large.
    weight = np.concatenate([np.full(len(mine[n]), 1.0 / len(mine[n])) for n in shared])
    centre = np.mean([mine[n].mean(axis=0) for n in shared], axis=0)
    aim = np.mean([theirs[n].mean(axis=0) for n in shared], axis=0)
    if len(shared) == 1:
        size = [float(np.sqrt(((p - p.mean(axis=0)) ** 2).sum(axis=1).mean())) for p in (mine[shared[0]], theirs[shared[0]])]
        matrix = np.eye(3) * size[1] / size[0]
    else:
        middles = [np.array([part[n].mean(axis=0) for n in shared]) for part in (mine, theirs)]
        size = [float(np.sqrt(((m - m.mean(axis=0)) ** 2).sum(axis=1).mean())) for m in middles]
        matrix = np.eye(3) * np.clip(size[1] / max(size[0], 1e-6), 0.7, 1.4)
    offset = aim - matrix @ centre
    for turn in range(12):
        here = points @ matrix.T + offset
        targets = np.empty_like(here)
        at = 0
        for n in shared:
            part = here[at : at + len(mine[n])]
            targets[at : at + len(part)] = theirs_at(trees[n], part)
            at += len(part)
        if len(shared) < 3 or turn < 4:
            matrix, offset = _similarity(points, targets, weight)
        else:
            matrix, offset = _least_squares(points, targets, weight)
    return matrix, offset


def theirs_at(tree: cKDTree, points: Floats) -> Floats:
    """Nearest points of a tree."""
    return np.asarray(tree.data[tree.query(points)[1]])


def _similarity(points: Floats, targets: Floats, weight: Floats) -> tuple[Floats, Floats]:
    """Umeyama, TPAMI 1991."""
    total = weight.sum()
    p, q = (weight @ points) / total, (weight @ targets) / total
    a, b = points - p, targets - q
    u, s, vt = np.linalg.svd((b * weight[:, None]).T @ a)
    sign = np.diag([1.0, 1.0, np.sign(np.linalg.det(u @ vt))])
    rotation = u @ sign @ vt
    scale = float((s * np.diag(sign)).sum() / (weight @ (a**2).sum(axis=1)))
    matrix = rotation * np.clip(scale, 0.6, 1.6)
    return matrix, q - matrix @ p


def _least_squares(points: Floats, targets: Floats, weight: Floats) -> tuple[Floats, Floats]:
    design = np.column_stack([points, np.ones(len(points))]) * np.sqrt(weight)[:, None]
    solved = np.linalg.lstsq(design, targets * np.sqrt(weight)[:, None], rcond=None)[0]
    return solved[:3].T, solved[3]


def _pull(
    here: Floats,
    shared: list[int],
    mine: dict[int, Floats],
    theirs: dict[int, tuple[Floats, Floats]],
    trees: dict[int, cKDTree],
) -> tuple[Floats, Floats]:
    """Return where the patient's surface points are to move: to the template's nearest, and so that those are reached, too."""
    wanted = np.empty_like(here)
    weight = np.ones(len(here))
    at = 0
    for n in shared:
        part = slice(at, at + len(mine[n]))
        at += len(mine[n])
        own = theirs_at(trees[n], here[part]) - here[part]
        back = cKDTree(here[part]).query(theirs[n][0])[1]
        sums, counts = np.zeros_like(own), np.bincount(back, minlength=len(own)).astype(float)
        np.add.at(sums, back, theirs[n][0] - here[part][back])
        wanted[part] = (own + sums) / (1 + counts)[:, None]
    return wanted, weight


def _spread(wanted: Floats, weight: Floats, cells: Any, shape: tuple[int, ...], width: float) -> NDArray[np.float32]:
    """Spread displacements from the surfaces by a normalised Gaussian; where no surface is near, there is none."""
    step = max(1, int(width / FIELD_MM / 1.5))  # a wide Gaussian needs no fine lattice
    small = tuple(-(-n // step) for n in shape)
    at = np.ravel_multi_index(tuple(np.minimum(c // step, s - 1) for c, s in zip(cells, small, strict=True)), small)
    sigma = width / FIELD_MM / step
    count = ndimage.gaussian_filter(
        np.bincount(at, weight, int(np.prod(small))).reshape(small).astype(np.float32), sigma, truncate=3
    )
    parts = []
    # Half of the trust is left where a surface of this density is two widths away.
    floor = 0.05 * float(count.max())
    for a in range(3):
        total = np.bincount(at, weight * wanted[:, a], int(np.prod(small))).reshape(small).astype(np.float32)
        part = ndimage.gaussian_filter(total, sigma, truncate=3) / (count + floor)
        if step > 1:
            grid = [np.clip((np.arange(n) - (step - 1) / 2) / step, 0, s - 1) for n, s in zip(shape, small, strict=True)]
            for axis, g in enumerate(grid):
                low = np.minimum(g.astype(int), part.shape[axis] - 2) if part.shape[axis] > 1 else np.zeros(len(g), int)
                high = np.minimum(low + 1, part.shape[axis] - 1)
                w = (g - low).astype(np.float32).reshape([-1 if k == axis else 1 for k in range(3)])
                part = np.take(part, low, axis) * (1 - w) + np.take(part, high, axis) * w
        parts.append(part)
    return np.stack(parts).astype(np.float32)


def _without_folds(matrix: Floats, base: float, field: NDArray[np.float32], step: NDArray[np.float32]) -> NDArray[np.float32]:
    """Add a step, shortened where it would fold space."""
    share = np.ones(field.shape[1:], np.float32)
    for _ in range(6):
        moved = field + share * step
        bad = kernels.jacobian(matrix, moved, FIELD_MM) < _LEAST_JACOBIAN * base
        if not bad.any():
            return moved
        box = tuple(slice(max(0, s.start - 10), s.stop + 10) for s in ndimage.find_objects(bad.view(np.uint8))[0])
        around = ndimage.gaussian_filter(ndimage.binary_dilation(bad[box], iterations=2).astype(np.float32), 2.0)
        share[box] *= 1 - np.minimum(1.0, 1.5 * around)
    return field


def shared_dice(
    patient: Coarse,
    pattern: Coarse,
    alignment: Alignment,
    one: dict[int, NDArray[np.bool_]],
    other: dict[int, NDArray[np.bool_]],
    shared: list[int],
) -> dict[int, float]:
    """Overlap of the patient's structures with the template's, carried over, on the working lattice."""
    merged = np.zeros(pattern.array.shape, np.uint16)
    for n in shared:
        merged[other[n]] = n
    out = np.zeros(patient.array.shape, np.uint16)
    _warp(out, merged, patient.origin_mm, WORK_MM, pattern.origin_mm, WORK_MM, alignment)
    return {n: 2 * float(((out == n) & one[n]).sum()) / float((out == n).sum() + one[n].sum()) for n in shared}


def _warp(
    out: NDArray[np.unsignedinteger],
    source: NDArray[np.uint16],
    origin: Any,
    spacing: Any,
    source_origin: Any,
    source_spacing: Any,
    alignment: Alignment,
) -> list[int]:
    """Paint the background of `out` with the source, and return the numbers that were painted."""
    spacing, source_spacing = np.broadcast_to(spacing, 3).astype(float), np.broadcast_to(source_spacing, 3).astype(float)
    matrix = alignment.matrix * spacing[None, :] / source_spacing[:, None]
    offset = (alignment.matrix @ np.asarray(origin) + alignment.offset - source_origin) / source_spacing
    field = np.ascontiguousarray(alignment.field_mm / source_spacing.astype(np.float32)[:, None, None, None])
    scale, shift = spacing / FIELD_MM, (np.asarray(origin) - alignment.origin_mm) / FIELD_MM
    painted = np.zeros(65536, bool)
    # Plane by plane through a buffer of one type and order: one compiled loop serves every mask.
    buffer = np.empty(out.shape[1:], np.uint16)
    for z, plane in enumerate(out):
        buffer[...] = plane
        kernels.warp_plane(buffer, z, source, matrix, offset, field, scale, shift, painted)
        plane[...] = buffer
    return [int(n) for n in np.flatnonzero(painted)]


# --- carrying -----------------------------------------------------------------------------------------------------------------


def _carry(
    array: NDArray[np.unsignedinteger], patient: LabelMap, pattern: LabelMap, alignment: Alignment, numbers: list[int]
) -> list[int]:
    """Carry structures as voxels; return those that have arrived."""
    if not numbers:
        return []
    wanted = np.zeros(65536, np.uint16)
    wanted[numbers] = numbers
    source = np.empty(pattern.shape, np.uint16)
    for plane, own in zip(source, pattern.array, strict=True):
        plane[...] = wanted[own]
    return _warp(array, source, np.zeros(3), patient.spacing_mm, np.zeros(3), pattern.spacing_mm, alignment)


def _carry_tube(
    array: NDArray[np.unsignedinteger], patient: LabelMap, pattern: LabelMap, alignment: Alignment, number: int
) -> bool:
    """Carry a tube's centreline and radii, and paint it anew; return whether any of it has arrived."""
    voxels = find_voxels(pattern.array, (number,), pattern.spacing_mm)
    lines = trace(voxels)
    spacing = np.asarray(patient.spacing_mm)
    scale = float(np.abs(np.linalg.det(alignment.matrix)) ** (-1 / 3))
    least = 0.6 * float(spacing.max())  # thinner ones would fall through the grid
    centres, radii = [], []
    for chain in lines.chains:
        points = alignment.to_patient(lines.position_mm[chain])
        wide = np.maximum(lines.radius_mm[chain] * scale, least)
        arc = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(points, axis=0), axis=1))])
        # Balls half a radius apart leave dents of a thirtieth of it between them.
        even = np.linspace(0, arc[-1], max(2, int(arc[-1] / (0.5 * float(wide.min()))) + 1))
        centres.append(np.stack([np.interp(even, arc, points[:, a]) for a in range(3)], axis=1))
        radii.append(np.interp(even, arc, wide))
    if not centres:
        return False
    centre, radius = np.concatenate(centres), np.concatenate(radii)
    low = np.maximum(np.floor((centre - radius[:, None]).min(axis=0) / spacing), 0).astype(int)
    high = np.minimum(np.ceil((centre + radius[:, None]).max(axis=0) / spacing) + 1, array.shape).astype(int)
    if (low >= high).any():
        return False
    inside = np.zeros(tuple(high - low), bool)
    kernels.paint_balls(inside, centre - low * spacing, radius, spacing)
    box = array[tuple(slice(a, b) for a, b in zip(low, high, strict=True))]
    inside &= box == 0
    box[inside] = number
    return bool(inside.any())


def _confidences(
    out: LabelMap,
    found: Iterable[int],
    carried: Iterable[int],
    known: Floats,
    quality: float,
) -> list[dict[str, Any]]:
    """Say of each structure where it comes from and how far it can be trusted; `known` are points of the shared ones."""
    placed = coarse(out.reoriented("LPS"))
    tree = cKDTree(known)
    rows: list[dict[str, Any]] = []
    carried = set(carried)
    for number in sorted({*found, *carried}):
        name = out.label(number).name
        if number not in carried:
            rows.append({"label": number, "name": name, "source": "patient", "confidence": 1.0})
            continue
        index = np.argwhere(placed.array == number)
        # Carried, and thinner than the working lattice: nowhere near anything that is known.
        distance = 10 * _TRUST_MM
        if len(index):
            some = index[:: max(1, len(index) // 500)] * WORK_MM + placed.origin_mm
            distance = float(tree.query(some)[0].mean())
        confidence = quality * float(np.exp(-distance / _TRUST_MM))
        rows.append(
            {
                "label": number,
                "name": name,
                "source": "template",
                "confidence": round(confidence, 3),
                "distance_mm": round(distance, 1),
            }
        )
    return rows
