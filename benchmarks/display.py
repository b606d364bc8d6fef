"""Copies for screens of a 512×512×400 CT and mask, and of a scene: `python -m benchmarks.display [MASK.nii.gz]`."""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.nifti import RUNS, ct_like, mask_like, median_seconds
from deployments.imageio.deployment import Imageio
from deployments.imageio.display import reduced, small_picture
from deployments.imageio.meshes import scene_copy, write_mz3
from deployments.imageio.nifti import read_nifti, write_nifti
from deployments.smoothing.screens import with_screen
from deployments.smoothing.surfaces import Options, label_map_to_scene
from scangraph.contracts import LabelMap, Volume
from scangraph.settings import ImageioSettings


def longer(volume: Volume) -> Volume:
    """Make the 300 slices 400."""
    array = np.concatenate([volume.array, volume.array[:100]])
    if isinstance(volume, LabelMap):
        return LabelMap(array, volume.spacing_mm, labels=volume.labels)
    return Volume(array, volume.spacing_mm)


def whole_requests(imageio: Imageio, name: str, what: str) -> float:
    """Median of what a request waits for where there is no copy: read, make, write."""
    numbers = iter(range(RUNS))
    most = 0 if "picture" in what else 300
    return median_seconds(lambda: asyncio.run(imageio.derive(name, f"copies/{what}-{next(numbers)}", what, most)))


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        imageio = Imageio(ImageioSettings(), Path(folder).as_uri(), {})
        print(f"512×512×400, {len(os.sched_getaffinity(0))} cores, median of {RUNS}")
        print("| | file MB | reading s | block means or labels s | writing s | a request s | copy MB | thumbnail s |")
        print("|---|---|---|---|---|---|---|---|")
        for volume, what in ((longer(ct_like()), "image"), (longer(mask_like()), "mask")):
            data = write_nifti(volume)
            (Path(folder) / f"{what}.nii.gz").write_bytes(data)
            copy = reduced(volume)
            parts = (
                median_seconds(partial(read_nifti, data, "a.nii.gz", as_mask=what == "mask")),
                median_seconds(partial(reduced, volume)),
                median_seconds(partial(write_nifti, copy, level=1)),
            )
            whole = whole_requests(imageio, f"{what}.nii.gz", what)
            picture = median_seconds(partial(small_picture, volume))
            size = len(write_nifti(copy, level=1)) / 1e6
            cells = [
                f"{len(data) / 1e6:.0f}",
                *(f"{part:.2f}" for part in parts),
                f"{whole:.2f}",
                f"{size:.1f}",
                f"{picture:.2f}",
            ]
            print(f"| {what} | " + " | ".join(cells) + " |")
    if len(sys.argv) > 1:
        mask = read_nifti(Path(sys.argv[1]).read_bytes(), "a.nii.gz", as_mask=True)
        assert isinstance(mask, LabelMap)
        cores = len(os.sched_getaffinity(0))
        scene, _ = label_map_to_scene(mask, Options(workers=cores))
        shown = with_screen(scene, workers=cores)
        making = median_seconds(lambda: with_screen(scene, workers=cores))
        writing = median_seconds(lambda: [scene_copy(shown), *(write_mz3(surface) for surface in shown.on_screen())])
        faces = [sum(len(surface.faces) for surface in some) for some in (scene.surfaces, shown.on_screen())]
        size = sum(len(write_mz3(surface)) for surface in shown.on_screen()) / 1e6
        print(
            f"\n{len(scene.surfaces)} structures, {faces[0]} triangles: {making:.2f} s to {faces[1]}, "
            f"{writing:.2f} s to encode, {size:.1f} MB"
        )


if __name__ == "__main__":
    main()
