"""Reading and writing `.nii.gz` against SimpleITK and nibabel, in one run: `python -m benchmarks.nifti`."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import SimpleITK as sitk

from deployments.imageio.nifti import read_nifti, write_nifti
from scangraph.contracts import Volume

SHAPE = (300, 512, 512)
RUNS = 3


def ct_like() -> Volume:
    """A body of soft tissue with noise in air, int16; compresses like a CT."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:512, :512]
    body = ((y - 256) / 180) ** 2 + ((x - 256) / 230) ** 2 < 1
    array = np.empty(SHAPE, np.int16)
    for z in range(SHAPE[0]):
        noise = rng.normal(0, 14, (512, 512))
        array[z] = np.where(body, 40 + 30 * np.sin(x / 40 + z / 30) + noise, -1000 + noise / 4)
    return Volume(array, (1.0, 0.78, 0.78), (-200, -200, 0))


def median_seconds(work: Callable[[], Any]) -> float:
    """Median of a few runs."""
    times = []
    for _ in range(RUNS):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    """Measure and print."""
    volume = ct_like()
    image = sitk.GetImageFromArray(volume.array)
    image.SetSpacing(volume.spacing_mm[::-1])
    peer = nib.Nifti1Image(volume.array.transpose(2, 1, 0), volume.affine_ras)
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs, other = (Path(folder) / f"{name}.nii.gz" for name in ("scangraph", "simpleitk", "nibabel"))
        write = {
            "scangraph": median_seconds(lambda: ours.write_bytes(write_nifti(volume))),
            "SimpleITK": median_seconds(lambda: sitk.WriteImage(image, str(theirs), True)),
            "nibabel": median_seconds(lambda: nib.save(peer, other)),
        }
        sizes = {"scangraph": ours, "SimpleITK": theirs, "nibabel": other}
        # Everybody reads the same file.
        read = {
            "scangraph": median_seconds(lambda: read_nifti(theirs.read_bytes(), theirs.name).array.max()),
            "SimpleITK": median_seconds(lambda: sitk.GetArrayViewFromImage(sitk.ReadImage(str(theirs))).max()),
            "nibabel": median_seconds(lambda: np.asarray(nib.Nifti1Image.from_filename(theirs).dataobj).max()),
        }
        print(f"{'':10} {'read s':>8} {'ratio':>6} {'write s':>8} {'ratio':>6} {'MB':>7} {'size':>6}")
        base = sizes["SimpleITK"].stat().st_size
        for name, seconds in write.items():
            size = sizes[name].stat().st_size
            faster_read, faster_write = read["SimpleITK"] / read[name], write["SimpleITK"] / seconds
            print(
                f"{name:10} {read[name]:8.2f} {faster_read:5.1f}x {seconds:8.2f} {faster_write:5.1f}x "
                f"{size / 1e6:7.1f} {size / base - 1:+6.1%}"
            )


if __name__ == "__main__":
    main()
