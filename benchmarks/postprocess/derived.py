"""Fat from masks against fat by Hounsfield units, and masks from templates against other ways to align them.

    python -m benchmarks.postprocess.derived [--only fat|templates|speed]

Everything runs on one core.
"""

from __future__ import annotations

import argparse
import itertools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import cKDTree

from deployments.imageio.nifti import read_nifti
from deployments.postprocess import templates
from deployments.postprocess.fat import FAT, FAT_HU, kidneys_by_side, perirenal_fat
from deployments.postprocess.masks import midline
from deployments.postprocess.templates import WORK_MM, Alignment, Coarse, align, coarse, sample, shared_dice, structures
from scangraph.contracts import LabelMap, merge_label_maps
from scangraph.phantoms import make_phantom

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"
ALIGNED = tuple[Coarse, Coarse, dict[int, Any], dict[int, Any], list[int]]


def dice(a: Any, b: Any) -> float:
    return float(2 * (a & b).sum() / max(1, a.sum() + b.sum()))


def fat() -> None:
    if not SHARED.exists():
        print("fat: ../shared/data is not here")
        return
    mask = read_nifti((SHARED / "ct_total_seg.nii.gz").read_bytes(), "mask", as_mask=True)
    ct = read_nifti((SHARED / "ct.nii.gz").read_bytes(), "ct")
    assert isinstance(mask, LabelMap)
    turned = mask.reoriented("LPS")
    hu = ct.reoriented("LPS").array
    spacing = np.array(turned.spacing_mm)
    sides = kidneys_by_side(turned.array, midline(turned.array))
    print("Fat, sample CT (3 mm), masks only; right / left Dice\n")
    print("| distance | against postprocess/fat with the CT | against all unlabelled fat HU within that distance | s |")
    print("|---|---|---|---|")
    for distance in (10, 15, 20):
        start = time.perf_counter()
        found = perirenal_fat(mask, distance_mm=distance).mask.reoriented("LPS").array == FAT
        seconds = time.perf_counter() - start
        seen = perirenal_fat(mask, ct, distance_mm=distance).mask.reoriented("LPS").array == FAT
        rows = []
        to = {side: _distance(index, turned.shape, spacing) for side, index in sides.items()}
        for side in ("right", "left"):
            other = to["left" if side == "right" else "right"]
            near = (to[side] <= distance) & (to[side] <= other) & (turned.array == 0)
            by_hu = near & (hu >= FAT_HU[0]) & (hu <= FAT_HU[1])
            mine = to[side] <= other
            rows.append((dice(found & mine, seen & mine), dice(found & near, by_hu)))
        print(f"| {distance} mm | {rows[0][0]:.3f} / {rows[1][0]:.3f} | {rows[0][1]:.3f} / {rows[1][1]:.3f} | {seconds:.2f} |")


def _distance(index: NDArray[np.int64], shape: tuple[int, ...], spacing: Any) -> NDArray[Any]:
    inside = np.zeros(shape, bool)
    inside[tuple(index.T)] = True
    return np.asarray(ndimage.distance_transform_edt(~inside, sampling=spacing))


# --- templates ----------------------------------------------------------------------------------------------------------------


def patient(seed: int, spacing: tuple[float, float, float] = (WORK_MM,) * 3) -> LabelMap:
    truth = make_phantom(seed, spacing_mm=spacing, oblique=(0, 0, 0)).truth
    masks = [truth["organs"], truth["vessels"], truth["ureters"], truth["tumor"]]
    return merge_label_maps(masks, only=(1, 2, 3, 5, 21, 202, 203, 204, 205, 206))


def _still(own: Coarse, matrix: Any, offset: Any) -> Alignment:
    return Alignment(np.asarray(matrix), np.asarray(offset), np.zeros((3, 2, 2, 2), np.float32), own.origin_mm)


def _points(parts: dict[int, Any], shared: list[int], origin: Any) -> NDArray[Any]:
    return np.concatenate([np.argwhere(parts[n])[::7] * WORK_MM + origin for n in shared])


def centroid(given: ALIGNED) -> Alignment:
    own, pattern, one, other, shared = given
    a, b = _points(one, shared, own.origin_mm), _points(other, shared, pattern.origin_mm)
    return _still(own, np.eye(3), b.mean(axis=0) - a.mean(axis=0))


def pca(given: ALIGNED) -> Alignment:
    own, pattern, one, other, shared = given
    a, b = _points(one, shared, own.origin_mm), _points(other, shared, pattern.origin_mm)
    roots = []
    for points in (a, b):
        values, vectors = np.linalg.eigh(np.cov(points.T))
        vectors = vectors * np.where(vectors[np.abs(vectors).argmax(axis=0), range(3)] < 0, -1, 1)
        roots.append(vectors * np.sqrt(values))
    matrix = roots[1] @ np.linalg.inv(roots[0])
    return _still(own, matrix, b.mean(axis=0) - matrix @ a.mean(axis=0))


def icp(given: ALIGNED) -> Alignment:
    """Affine ICP on all surfaces together."""
    own, pattern, one, other, shared = given
    mine = {0: np.concatenate([templates._surface(one[n], own.origin_mm, n)[0] for n in shared])}
    theirs = {0: np.concatenate([templates._surface(other[n], pattern.origin_mm, n)[1] for n in shared])}
    points, tree = mine[0], cKDTree(theirs[0])
    matrix, offset = np.eye(3), theirs[0].mean(axis=0) - points.mean(axis=0)
    for _ in range(20):
        targets = templates.theirs_at(tree, points @ matrix.T + offset)
        matrix, offset = templates._least_squares(points, targets, np.ones(len(points)))
    return _still(own, matrix, offset)


def affine_part(given: ALIGNED) -> Alignment:
    found = align(*given)
    return _still(given[0], found.matrix, found.offset)


def bspline(given: ALIGNED) -> dict[int, float]:
    """SimpleITK: the affine map of `align`, then a B-spline (50 mm) on the sum of clipped signed distances."""
    own, pattern, one, other, shared = given
    found = align(*given)

    def image(work: Coarse, parts: dict[int, Any]) -> Any:
        total = np.zeros(work.array.shape, np.float32)
        for place, n in enumerate(shared, 1):
            signed = ndimage.distance_transform_edt(parts[n]) - ndimage.distance_transform_edt(~parts[n])
            total += place * np.clip(signed, -6, 6).astype(np.float32)
        made = sitk.GetImageFromArray(total)
        made.SetSpacing((WORK_MM,) * 3)
        made.SetOrigin([float(v) for v in work.origin_mm[::-1]])
        return made

    fixed, moving = image(own, one), image(pattern, other)
    affine = sitk.AffineTransform(3)
    affine.SetMatrix(found.matrix[::-1, ::-1].ravel().tolist())
    affine.SetTranslation([float(v) for v in found.offset[::-1]])
    spline = sitk.BSplineTransformInitializer(fixed, [max(2, round(s * WORK_MM / 50)) for s in own.array.shape[::-1]])
    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsMeanSquares()
    method.SetMetricSamplingStrategy(method.RANDOM)
    method.SetMetricSamplingPercentage(0.05, 1)
    method.SetOptimizerAsLBFGSB(numberOfIterations=15)
    method.SetInterpolator(sitk.sitkLinear)
    method.SetMovingInitialTransform(affine)
    method.SetInitialTransform(spline, inPlace=True)
    method.Execute(fixed, moving)
    both = sitk.CompositeTransform([affine, spline])
    merged = np.zeros(pattern.array.shape, np.uint8)
    for n in shared:
        merged[other[n]] = n
    source = sitk.GetImageFromArray(merged)
    source.CopyInformation(moving)
    out = sitk.GetArrayFromImage(sitk.Resample(source, fixed, both, sitk.sitkNearestNeighbor))
    return {n: dice(out == n, one[n]) for n in shared}


def sampling() -> None:
    masks = [patient(seed) for seed in range(5)]
    works = [coarse(m.reoriented("LPS")) for m in masks]
    parts = [structures(w) for w in works]
    shared_dice_of: dict[str, Callable[[ALIGNED], Alignment]] = {
        "centroid": centroid,
        "PCA affine": pca,
        "affine ICP, all surfaces": icp,
        "affine, structure by structure": affine_part,
        "postprocess/sample": lambda given: align(*given),
    }
    print("\nTemplates, 20 pairs of synthetic patients at 2.5 mm, five shared structures\n")
    print("| | mean Dice | lowest | lowest Jacobian | s |\n|---|---|---|---|---|")
    pairs = []
    for a, b in itertools.permutations(range(5), 2):
        shared = sorted(parts[a].keys() & parts[b].keys())
        pairs.append((works[a], works[b], parts[a], parts[b], shared))
    align(*pairs[0])
    for name, method in shared_dice_of.items():
        values, folds, seconds = [], [], []
        for pair in pairs:
            start = time.perf_counter()
            found = method(pair)
            seconds.append(time.perf_counter() - start)
            values += list(shared_dice(pair[0], pair[1], found, *pair[2:]).values())
            folds.append(float(found.jacobian().min()))
        print(
            f"| {name} | {np.mean(values):.3f} | {min(values):.3f} | {min(folds):.2f} | {np.median(seconds):.2f} |", flush=True
        )
    values, seconds = [], []
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    for pair in pairs[:2]:
        start = time.perf_counter()
        values += list(bspline(pair).values())
        seconds.append(time.perf_counter() - start)
    row = f"{np.mean(values):.3f} | {min(values):.3f} | - | {np.median(seconds):.2f}"
    print(f"| SimpleITK B-spline on distance maps (2 pairs) | {row} |", flush=True)


def speed() -> None:
    """Measure the whole component, three times each."""
    template, whole = patient(0), patient(7)
    keep = np.isin(whole.array, (2, 3, 5))
    small = LabelMap(
        np.where(keep, whole.array, 0).astype(np.uint8), whole.spacing_mm, whole.origin_mm, whole.direction, (2, 3, 5)
    )
    large = small.on_grid_of(_grid(small, (512, 512, 400)))
    sample(small, template)  # compiles
    for name, mask in (("2.5 mm", small), ("512×512×400", large)):
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            done = sample(mask, template)
            seconds.append(f"{time.perf_counter() - start:.2f}")
        print(f"\npostprocess/sample, {name}: {', '.join(seconds)} s, {len(done.facts['structures'])} structures")


def _grid(like: LabelMap, size_xyz: tuple[int, int, int]) -> LabelMap:
    shape = size_xyz[::-1]
    spacing = tuple(s * n / m for s, n, m in zip(like.spacing_mm, like.shape, shape, strict=True))
    return LabelMap(np.zeros(shape, np.uint8), spacing, like.origin_mm, like.direction)  # type: ignore[arg-type]


def main() -> None:
    parts = {"fat": fat, "templates": sampling, "speed": speed}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=parts)
    only = parser.parse_args().only
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    for name, part in parts.items():
        if only in {None, name}:
            part()


if __name__ == "__main__":
    main()
