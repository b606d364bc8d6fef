"""What leaving out air and working on a region save, and what they cost.

python -m benchmarks.nnunet.skipping [--ct ../shared/data/ct.nii.gz]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from deployments.imageio.nifti import read_nifti
from deployments.nnunet.body import body_blocks
from deployments.nnunet.segmentation import Guide, ModelStore, segment
from scangraph.contracts import Volume
from scangraph.phantoms import make_phantom

ROOT = Path(__file__).resolve().parents[2]
MODELS = {"organs": ("inference/totalseg", "image"), "ureters": ("inference/ureter", "image_D")}
#: Kidneys and bladder, around which ureters are looked for.
GUIDES, URETER = (2, 3, 21), 206


def in_a_field_of(volume: Volume, field_mm: float) -> Volume:
    """Return the image with air around it, as a reconstruction of the whole field of view has it."""
    spacing = volume.spacing_mm[1:]
    missing = [round((field_mm - n * s) / s) for n, s in zip(volume.array.shape[1:], spacing, strict=True)]
    before = [max(n, 0) // 2 for n in missing]
    pad = ((0, 0), *((b, max(n, 0) - b) for b, n in zip(before, missing, strict=True)))
    array = np.pad(volume.array, pad, constant_values=-1000)
    moved = np.asarray(volume.direction) @ (np.asarray((before[1], before[0], 0)) * (*spacing[::-1], 0))
    origin = np.asarray(volume.origin_mm) - moved
    return Volume(array, volume.spacing_mm, (float(origin[0]), float(origin[1]), float(origin[2])), volume.direction)


def timed(store: ModelStore, task: str, inputs: dict[str, Volume], **options: Any) -> tuple[float, Any]:
    """Seconds and segmentation."""
    model, networks, _ = store.get(task, None)
    start = time.perf_counter()
    found = segment(inputs, model, networks, on_progress=lambda *_: None, **options)
    return time.perf_counter() - start, found


def air(store: ModelStore, images: dict[str, Volume]) -> None:
    """Print tiles and seconds with and without air."""
    print("| image | model | tiles, s | with `skip_air` |\n|---|---|---|---|")
    for name, image in images.items():
        for what, (task, port) in MODELS.items():
            timed(store, task, {port: image})  # shapes are met here for the first time
            (all_s, everything), (some_s, some) = (timed(store, task, {port: image}, skip_air=s) for s in (False, True))
            tiles = everything.facts["tiles"], some.facts["tiles"]
            print(f"| {name} | {what} | {tiles[0]}, {all_s:.1f} | {tiles[1]}, {some_s:.1f} |", flush=True)
    large = np.full((600, 512, 512), -1000, np.int16)
    large[:, 150:360, 100:400] = 40
    start = time.perf_counter()
    body = body_blocks(large, (0.8, 0.8, 0.8))
    found = time.perf_counter() - start
    labels = np.ones(large.shape, np.uint8)
    start = time.perf_counter()
    body.clear_outside(labels)
    print(f"\nthe body of 512×512×600: {found:.2f} s; clearing what is outside: {time.perf_counter() - start:.2f} s\n")


def region(store: ModelStore) -> None:
    """Print what `roi: auto` does to the ureters of four phantoms."""
    print(
        "| phantom, margin | whole: tiles, s, Dice to truth | region: tiles, s, Dice to truth | Dice between | truth outside |"
    )
    print("|---|---|---|---|---|")
    coarse, networks, _ = store.get(MODELS["organs"][0], None)
    task, port = MODELS["ureters"]
    for seed in (7, 2000, 2003, 2005):
        phantom = make_phantom(seed)
        inputs, truth = {port: phantom.volumes["delayed"]}, phantom.truth["ureters"].array == URETER
        timed(store, task, inputs)
        seconds, whole = timed(store, task, inputs)
        all_over = whole.mask.array == URETER
        for margin in (10, 30):
            options: dict[str, Any] = {"guide": Guide(coarse, networks, GUIDES, margin), "skip_air": True}
            less, part = timed(store, task, inputs, **options)
            inside = part.mask.array == URETER
            box = tuple(slice(*ends) for ends in part.facts["roi"]["box"])
            first = f"{whole.facts['tiles']}, {seconds:.2f}, {dice(all_over, truth):.3f}"
            second = f"{part.facts['tiles']}, {less:.2f}, {dice(inside, truth):.3f}"
            lost = int(truth.sum() - truth[box].sum())
            print(f"| {seed}, {margin} mm | {first} | {second} | {dice(inside, all_over):.3f} | {lost} |", flush=True)


def dice(one: Any, other: Any) -> float:
    """Overlap of two masks."""
    return float(2 * (one & other).sum() / (one.sum() + other.sum()))


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ct", type=Path, help="a real CT; without it only phantoms")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    phantom = make_phantom(7).volumes["delayed"]
    images = {"phantom 7": phantom, "phantom 7, 700 mm": in_a_field_of(phantom, 700)}
    if arguments.ct:
        ct = read_nifti(arguments.ct.read_bytes(), arguments.ct.name).reoriented("LPS")
        images = {"CT": ct, "CT, 600 mm": in_a_field_of(ct, 600), **images}
    with tempfile.TemporaryDirectory() as cache:
        store = ModelStore([ROOT / "models"], torch.device("cpu"), 4, arguments.threads, Path(cache))
        air(store, images)
        region(store)


if __name__ == "__main__":
    main()
