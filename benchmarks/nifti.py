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
from numpy.typing import NDArray
from scipy import ndimage

from deployments.imageio.nifti import read_nifti, write_nifti
from scangraph.contracts import LabelMap, Volume

SHAPE = (300, 512, 512)
SPACING_MM = (1.0, 0.78, 0.78)
RUNS = 5


def ct_like() -> Volume:
    """A body with a scanner's correlated noise, in air, its field of view round: compresses to 0.4, as a CT does."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[: SHAPE[1], : SHAPE[2]] - 256
    body = (y / 140) ** 2 + (x / 200) ** 2 < 1
    seen = y**2 + x**2 < 255**2
    array = np.empty(SHAPE, np.int16)
    for plane in array:
        noise = ndimage.gaussian_filter(rng.normal(size=plane.shape), 0.8) * 55
        tissue = ndimage.gaussian_filter(rng.normal(size=plane.shape), 12) * 600 + 40
        hounsfield = np.where(body, tissue + noise, -1000 + noise / 2)
        plane[:] = np.where(seen, np.maximum(hounsfield, -1024), -1024)
    return Volume(array, SPACING_MM)


def mask_like() -> LabelMap:
    """Smooth regions of 20 labels on background."""
    field = ndimage.gaussian_filter(np.random.default_rng(1).normal(size=(30, 32, 32)), 2)
    field = ndimage.zoom(field / field.std(), (SHAPE[0] / 30, 16, 16), order=3)
    array = (field.clip(0, 2) * 10).round().astype(np.uint8)
    return LabelMap(array, SPACING_MM, labels=tuple(np.unique(array).tolist()))


def median_seconds(work: Callable[[], Any]) -> float:
    """Median of a few runs."""
    times = []
    for _ in range(RUNS):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def read_simpleitk(path: Path) -> NDArray[Any]:
    return np.asarray(sitk.GetArrayFromImage(sitk.ReadImage(str(path))))


def read_nibabel(path: Path) -> NDArray[Any]:
    return np.asarray(nib.Nifti1Image.from_filename(path).dataobj).transpose(2, 1, 0)


def measure(volume: Volume, folder: Path) -> None:
    """Write it with each library; read each library's own file, and SimpleITK's, which has no table of sections."""
    is_mask = isinstance(volume, LabelMap)
    image = sitk.GetImageFromArray(volume.array)
    image.SetSpacing(volume.spacing_mm[::-1])
    peer = nib.Nifti1Image(volume.array.transpose(2, 1, 0), volume.affine_ras)
    writers: dict[str, Callable[[Path], Any]] = {
        "SimpleITK": lambda path: sitk.WriteImage(image, str(path), True),
        "nibabel": lambda path: nib.save(peer, path),
        "scangraph": lambda path: path.write_bytes(write_nifti(volume)),
        "scangraph, 1 thread": lambda path: path.write_bytes(write_nifti(volume, threads=1)),
    }
    readers: dict[str, Callable[[Path], NDArray[Any]]] = {
        "SimpleITK": read_simpleitk,
        "nibabel": read_nibabel,
        "scangraph": lambda path: read_nifti(path.read_bytes(), path.name, as_mask=is_mask).array,
        "scangraph, 1 thread": lambda path: read_nifti(path.read_bytes(), path.name, as_mask=is_mask, threads=1).array,
    }
    print(f"\n{volume!r}, medians of {RUNS}; times and sizes relative to SimpleITK's")
    print(f"{'':20} {'write s':>8} {'':>6} {'MB':>7} {'':>6} {'read own s':>11} {'':>6} {'read SimpleITK s':>17} {'':>6}")
    base: tuple[float, ...] = ()
    for name, write in writers.items():
        path = folder / f"{name}.nii.gz"
        write_s = median_seconds(lambda write=write, path=path: write(path))  # type: ignore[misc]
        read = readers[name]
        assert np.array_equal(read(path), volume.array), f"{name} reads other voxels than it wrote"
        own_s, foreign_s = (
            median_seconds(lambda read=read, file=file: read(file))  # type: ignore[misc]
            for file in (path, folder / "SimpleITK.nii.gz")
        )
        size = path.stat().st_size / 1e6
        base = base or (write_s, size, own_s, foreign_s)
        print(
            f"{name:20} {write_s:8.2f} {base[0] / write_s:5.1f}× {size:7.1f} {size / base[1] - 1:+6.0%} "
            f"{own_s:11.2f} {base[2] / own_s:5.1f}× {foreign_s:17.2f} {base[3] / foreign_s:5.1f}×"
        )


def main() -> None:
    """Measure and print."""
    for volume in (ct_like(), mask_like()):
        with tempfile.TemporaryDirectory() as folder:
            measure(volume, Path(folder))


if __name__ == "__main__":
    main()
