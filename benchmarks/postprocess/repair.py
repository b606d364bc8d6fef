"""Repair of vessels and ureters: quality against simpler methods, on many cases; speed and memory on a whole CT's grid.

    python -m benchmarks.postprocess.repair [--cases 14] [--first-seed 0] [--only quality|ureters|real|speed]

Everything runs on one core.
"""

from __future__ import annotations

import argparse
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.sparse.csgraph import minimum_spanning_tree
from scipy.spatial import cKDTree

from deployments.imageio.nifti import read_nifti
from deployments.postprocess.bridging import Limits
from deployments.postprocess.centrelines import find_voxels, trace
from deployments.postprocess.repairing import repair_ureters, repair_vessels
from scangraph.contracts import LabelMap
from tests.postprocess.trees import ARTERY, Case, Score, grow, make_case, make_ureters, paint, score

Method = Callable[[Case], NDArray[Any]]
SAMPLE = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "ct_total_seg.nii.gz"


def nothing(case: Case) -> NDArray[Any]:
    return case.mask.array


def closing(case: Case) -> NDArray[Any]:
    """Closing by a ball of 4 mm, onto background."""
    spacing = case.mask.spacing_mm
    inside = np.pad(case.mask.array == case.label, 8)
    grown = ndimage.distance_transform_edt(~inside, sampling=spacing) <= 4
    closed = (ndimage.distance_transform_edt(grown, sampling=spacing) > 4)[8:-8, 8:-8, 8:-8]
    out = case.mask.array.copy()
    out[closed & (out == 0)] = case.label
    return out


def _line(out: NDArray[Any], a: Any, b: Any, radius: float, label: int, spacing: Any) -> None:
    points = np.linspace(a, b, max(2, int(np.linalg.norm(np.asarray(b) - a) / 0.4)))
    low = np.maximum(np.floor((points.min(axis=0) - radius) / spacing).astype(int), 0)
    high = np.ceil((points.max(axis=0) + radius) / spacing).astype(int) + 1
    box = out[tuple(slice(p, q) for p, q in zip(low, high, strict=True))]
    index = np.argwhere(box == 0)
    near = cKDTree(points).query((index + low) * spacing)[0] <= radius
    box[tuple(index[near].T)] = label


def nearest_tree(case: Case) -> NDArray[Any]:
    """Every piece of 30 mm³ or more joined to the rest by its nearest voxels (a minimum spanning tree), as lines of 1 mm."""
    spacing = np.array(case.mask.spacing_mm)
    voxels = find_voxels(case.mask.array, (case.label,), case.mask.spacing_mm)
    pieces = np.flatnonzero(voxels.volumes_mm3 >= 30)
    own = [voxels.position_mm[voxels.piece == p] for p in pieces]
    trees = [cKDTree(points) for points in own]
    weights = np.zeros((len(own), len(own)))
    ends: dict[tuple[int, int], tuple[Any, Any]] = {}
    for i in range(len(own)):
        for j in range(i + 1, len(own)):
            distance, at = trees[j].query(own[i])
            k = int(distance.argmin())
            weights[i, j], ends[i, j] = distance[k], (own[i][k], own[j][at[k]])
    out = case.mask.array.copy()
    for i, j in zip(*minimum_spanning_tree(weights).nonzero(), strict=True):
        _line(out, *ends[int(i), int(j)], 1.0, case.label, spacing)
    return out


def straight_ends(case: Case) -> NDArray[Any]:
    """Endpoints of centrelines joined to the nearest endpoint of another piece within 20 mm, straight, without direction."""
    spacing = np.array(case.mask.spacing_mm)
    voxels = find_voxels(case.mask.array, (case.label,), case.mask.spacing_mm)
    lines = trace(voxels, np.flatnonzero(voxels.volumes_mm3 >= 30))
    tips = np.flatnonzero(lines.degree == 1)
    points, piece = lines.position_mm[tips], lines.piece[tips]
    out, group = case.mask.array.copy(), list(range(voxels.pieces))
    pairs = sorted((float(np.linalg.norm(points[i] - points[j])), i, j) for i, j in cKDTree(points).query_pairs(20))
    used: set[int] = set()
    for _, i, j in pairs:
        a, b = group[piece[i]], group[piece[j]]
        if a == b or i in used or j in used:
            continue
        group = [b if g == a else g for g in group]
        used |= {i, j}
        radius = float(lines.radius_mm[tips[i]] + lines.radius_mm[tips[j]]) / 2
        _line(out, points[i], points[j], max(1.0, radius), case.label, spacing)
    return out


def ours(case: Case) -> NDArray[Any]:
    return repair_vessels(case.mask).mask.array


METHODS: dict[str, Method] = {
    "nothing": nothing,
    "closing 4 mm": closing,
    "nearest-voxel spanning tree": nearest_tree,
    "endpoints, no direction": straight_ends,
    "postprocess/vessel": ours,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "1 × 0.8 × 0.8 mm": {},
    "1 × 0.8 × 0.8 mm, gaps of 3-18 mm evenly": {"gap_mm": (3.0, 18.0)},
    "2 × 0.9 × 0.9 mm": {"spacing_mm": (2.0, 0.9, 0.9)},
    "0.8 × 1.5 × 0.8 mm": {"spacing_mm": (0.8, 1.5, 0.8)},
    "0.6 mm": {"spacing_mm": (0.6, 0.6, 0.6), "size_mm": (120.0, 100.0, 100.0)},
    "radius 8 mm at the root": {"root_mm": 8.0, "size_mm": (200.0, 150.0, 150.0)},
}


def _row(name: str, scores: list[Score], seconds: list[float]) -> str:
    closed = np.array([(length, done) for s in scores for length, done in s.closed])
    parts = []
    for low, high in ((0, 6), (6, 10), (10, 99)):
        here = closed[(closed[:, 0] >= low) & (closed[:, 0] < high), 1]
        parts.append(f"{int(here.sum())}/{len(here)}")
    cl = [s.cl_dice for s in scores]
    return (
        f"| {name} | {closed[:, 1].mean():.1%} | {' · '.join(parts)} | {np.mean([s.false_bridges for s in scores]):.2f} | "
        f"{np.mean([s.beta0_error for s in scores]):.1f} | {np.mean(cl):.4f} ({min(cl):.3f}) | "
        f"{np.mean([s.dice_in_gaps for s in scores]):.2f} | {np.median(seconds):.2f} |"
    )


HEAD = (
    "| | gaps closed | < 6 · 6-10 · > 10 mm | false bridges a case | β₀ error | clDice (lowest) | Dice in gaps | s |\n"
    "|---|---|---|---|---|---|---|---|"
)


def _measure(method: Method, cases: list[Case]) -> tuple[list[Score], list[float]]:
    scores, seconds = [], []
    for case in cases:
        start = time.perf_counter()
        out = method(case)
        seconds.append(time.perf_counter() - start)
        scores.append(score(case, out))
    return scores, seconds


def quality(seeds: range) -> None:
    ours(make_case(1000))  # compile
    print(f"Vessels, {len(seeds)} trees a row, seeds {seeds[0]}-{seeds[-1]}\n\n{HEAD}")
    made = [make_case(seed) for seed in seeds]
    for name, method in METHODS.items():
        print(_row(name, *_measure(method, made)), flush=True)
    print(f"\npostprocess/vessel on other trees\n\n{HEAD}")
    for name, options in VARIANTS.items():
        print(_row(name, *_measure(ours, [make_case(seed, **options) for seed in seeds])), flush=True)


def ureters(seeds: range) -> None:
    made = [make_ureters(seed) for seed in seeds]
    print(f"\nUreters, {len(seeds)} patients, gaps of 5-30 mm\n\n{HEAD}")
    for name, method in (*METHODS.items(), ("postprocess/ureter", lambda case: repair_ureters(case.mask).mask.array)):
        if name != "postprocess/vessel":
            print(_row(name, *_measure(method, made)), flush=True)


def slices(mask: NDArray[np.bool_], first: int, count: int) -> NDArray[np.bool_]:
    """What an oracle does that knows that whole slices are missing: shape-based interpolation between the slices beside."""
    below, above = mask[first - 1], mask[first + count]
    a, b = (np.array(ndimage.center_of_mass(part)) for part in (below, above))
    sa, sb = (ndimage.distance_transform_edt(~p) - ndimage.distance_transform_edt(p) for p in (below, above))
    out = np.zeros_like(mask)
    for k in range(count):
        t = (k + 1) / (count + 1)
        c = (1 - t) * a + t * b
        shifted = [ndimage.shift(s, c - centre, order=1, mode="nearest") for s, centre in ((sa, a), (sb, b))]
        out[first + k] = (1 - t) * shifted[0] + t * shifted[1] <= 0
    return out


def real() -> None:
    if not SAMPLE.exists():
        print("\nreal mask: ../shared/data is not here")
        return
    mask = read_nifti(SAMPLE.read_bytes(), "mask", as_mask=True)
    assert isinstance(mask, LabelMap)
    whole = repair_vessels(mask, vessels="all")
    print(
        f"\nReal mask (3 mm), untouched: {len(whole.facts['bridges'])} bridges. Iliac arteries and veins cut, 9 places each\n"
    )
    print(
        "| cut | joined | changed outside ± 3 slices | Dice in the gap | oracle: slice interpolation |\n|---|---|---|---|---|"
    )
    for count in (1, 2, 3, 4, 5):
        rows = []
        for label in (65, 66, 67, 68):
            true = mask.array == label
            z = np.flatnonzero(true.any(axis=(1, 2)))
            for share in np.linspace(0.15, 0.8, 9):
                first = int(z[0] + share * (z[-1] - z[0]))
                array, gone = mask.array.copy(), np.zeros_like(true)
                gone[first : first + count] = true[first : first + count]
                array[gone] = 0
                cut = LabelMap(array, mask.spacing_mm, mask.origin_mm, mask.direction, mask.labels)
                done = repair_vessels(cut, structures=[label])
                added = done.mask.array != array
                far = added.sum() - added[max(0, first - 3) : first + count + 3].sum()
                oracle = slices(true, first, count) & (array == 0)

                def dice(x: Any, gone: Any = gone) -> float:
                    return float(2 * (x & gone).sum() / (x.sum() + gone.sum()))

                rows.append((len(done.facts["bridges"]) > 0, int(far), dice(added), dice(oracle)))
        joined = [r for r in rows if r[0]]
        print(
            f"| {3 * count} mm | {len(joined)}/{len(rows)} | {sum(r[1] for r in rows)} voxels | "
            f"{np.mean([r[2] for r in joined]):.2f} | {np.mean([r[3] for r in rows]):.2f} |",
            flush=True,
        )


def speed() -> None:
    """A tree on the grid of a whole CT: 512 × 512 × 400."""
    spacing, shape = np.array([1.0, 0.8, 0.8]), (400, 512, 512)
    repair_vessels(make_case(1000).mask)
    rng = np.random.default_rng(11)
    branches = []
    for part in range(4):  # four trees side by side fill the field of view
        corner = np.array([0.0, 200.0 * (part // 2), 200.0 * (part % 2)])
        for branch in grow(rng, np.array([395.0, 200.0, 200.0]), 8.0):
            branch.points_mm = branch.points_mm + corner
            branches.append(branch)
    truth, voxels, _ = paint(shape, spacing, branches)
    array = np.where(truth, ARTERY, 0).astype(np.uint8)
    for branch in branches[::3]:
        middle = branch.points_mm[len(branch.points_mm) // 2]
        near = np.linalg.norm(voxels * spacing - middle, axis=1) < branch.radii_mm.max() + 2.5
        array[tuple(voxels[near].T)] = 0
    mask = LabelMap(array, tuple(spacing), labels=(ARTERY,))
    del truth, voxels
    _reset_peak()
    before = _peak_mb()
    times = []
    for _ in range(3):
        start = time.perf_counter()
        done = repair_vessels(mask, limits=Limits())
        times.append(time.perf_counter() - start)
    print(
        f"\nSpeed, 512×512×400, {int((array > 0).sum()) // 1000} thousand voxels in {done.facts['pieces_before']} pieces, "
        f"{len(done.facts['bridges'])} bridges: {np.median(times):.2f} s ({min(times):.2f}-{max(times):.2f}), "
        f"{_peak_mb() - before:.0f} MB added, of which the result is {array.nbytes / 2**20:.0f}"
    )


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _peak_mb() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return float(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=14)
    parser.add_argument("--first-seed", type=int, default=0, help="limits were chosen on seeds 0-99")
    parser.add_argument("--only", choices=["quality", "ureters", "real", "speed"])
    arguments = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.cases)
    jobs = {
        "quality": lambda: quality(seeds),
        "ureters": lambda: ureters(seeds),
        "real": real,
        "speed": speed,
    }
    for name, job in jobs.items():
        if arguments.only in {None, name}:
            job()


if __name__ == "__main__":
    main()
