"""What surfaces of a whole abdomen cost, one core: `python -m benchmarks.smoothing.speed`.

512×512×400, fifteen structures; each way in a process of its own, in turn, the best of some runs. With `--files` from a
`.nii.gz` to OBJ files instead.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.smoothing.cases import THIN, abdomen

#: From a file, the peers are read by SimpleITK and written by trimesh.
_TRIANGLES = 477_000
_FILE_WAYS = ("ours", "Slicer's recipe", "zmesh + sinc + fast-simplification", "zmesh + sinc + meshoptimizer")


def measure(way: str, part: float, source: Path, files: bool) -> dict[str, Any]:
    """Run one way, warm, and return its figures."""
    from benchmarks.smoothing.ways import WAYS
    from deployments.smoothing.measuring import crossings, open_edges
    from deployments.smoothing.nets import extract

    small = np.zeros((12, 12, 12), np.uint8)
    small[2:9, 2:9, 2:6], small[2:9, 2:9, 6:9] = 1, 2
    WAYS[way](small, THIN, 200)  # imports, and what is compiled
    if files:
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            triangles = _through_files(way, source, Path(folder))
            return {"seconds": time.perf_counter() - start, "triangles": triangles}
    mask = np.load(source)
    wanted = round(part * 2 * len(extract(mask).quads))
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    start, cpu = time.perf_counter(), time.process_time()
    made = WAYS[way](mask, THIN, wanted)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    added = _status("VmHWM") - before
    counts, voxel = np.bincount(mask.ravel()), float(np.prod(THIN))
    errors = []
    for label, (vertices, faces) in made.items():
        a, b, c = ((vertices[faces[:, k]] - vertices.mean(axis=0)).astype(np.float64) for k in range(3))
        errors.append(float(np.einsum("ij,ij->", a, np.cross(b, c))) / 6 / (counts[label] * voxel) - 1)
    return {
        "seconds": seconds,
        "cpu_seconds": cpu,
        "added_mb": added,
        "triangles": sum(len(f) for _, f in made.values()),
        "closed": sum(open_edges(f) == 0 for _, f in made.values()),
        "crossings": sum(crossings(v, f) for v, f in made.values()),
        "volume": max(errors, key=abs),
    }


def _through_files(way: str, source: Path, folder: Path) -> int:
    from benchmarks.smoothing.ways import WAYS

    if way == "ours":
        from deployments.imageio.nifti import read_nifti
        from deployments.smoothing.surfaces import Options, label_map_to_scene
        from scangraph.contracts import LabelMap
        from scangraph.scenefiles import save_scene

        mask = read_nifti(source.read_bytes(), source.name, as_mask=True)
        assert isinstance(mask, LabelMap)
        scene, _ = label_map_to_scene(mask, Options(triangles=_TRIANGLES))
        save_scene(scene, folder, "scene")
        return sum(len(s.faces) for s in scene.surfaces)
    import SimpleITK as sitk
    import trimesh

    array = sitk.GetArrayFromImage(sitk.ReadImage(str(source)))
    made = WAYS[way](array, THIN, _TRIANGLES)
    for label, (vertices, faces) in made.items():
        trimesh.Trimesh(vertices, faces, process=False).export(folder / f"{label}.obj")
    return sum(len(f) for _, f in made.values())


def _status(name: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return float(line.split()[1]) / 1024


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--part", type=float, default=0.2, help="of the triangles that is kept")
    parser.add_argument("--files", action="store_true", help="from .nii.gz to OBJ")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--source", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        print(json.dumps(measure(arguments.way, arguments.part, arguments.source, arguments.files)))
        return
    from benchmarks.smoothing.ways import WAYS

    one = dict.fromkeys(("OMP_NUM_THREADS", "NUMBA_NUM_THREADS", "VTK_SMP_MAX_THREADS"), "1")
    ways = _FILE_WAYS if arguments.files else tuple(WAYS)
    best: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        mask = abdomen()
        source = Path(folder) / ("mask.nii.gz" if arguments.files else "mask.npy")
        if arguments.files:
            import SimpleITK as sitk

            image = sitk.GetImageFromArray(mask)
            image.SetSpacing(THIN[::-1])
            sitk.WriteImage(image, str(source), useCompression=True)
        else:
            np.save(source, mask)
        for _ in range(arguments.runs):
            for way in ways:
                command = [sys.executable, "-m", "benchmarks.smoothing.speed", "--way", way, "--source", str(source)]
                command += ["--part", str(arguments.part), *(["--files"] if arguments.files else [])]
                # One core: of those that this process may use, the last.
                core = max(os.sched_getaffinity(0))
                done = subprocess.run(
                    ["taskset", "-c", str(core), *command],
                    capture_output=True,
                    text=True,
                    env={**os.environ, **one},
                    check=True,
                )
                found = json.loads(done.stdout.splitlines()[-1])
                if way not in best or found["seconds"] < best[way]["seconds"]:
                    best[way] = found
    fastest = min(best[way]["seconds"] for way in ways if not way.startswith("ours"))
    print(f"\n{mask.shape[::-1]}, {int(mask.max())} structures, one core, best of {arguments.runs}")
    if arguments.files:
        print("| from .nii.gz to OBJ | s | of the fastest peer | triangles |\n|---|---|---|---|")
        for way in ways:
            b = best[way]
            print(f"| {way} | {b['seconds']:.2f} | {b['seconds'] / fastest:.2f} | {b['triangles']:,} |")
        return
    print("| way | s | of the fastest peer | added MB | triangles | closed | worst volume | crossings |")
    print("|---|---|---|---|---|---|---|---|")
    for way in ways:
        b = best[way]
        print(
            f"| {way} | {b['seconds']:.2f} | {b['seconds'] / fastest:.2f} | {b['added_mb']:.0f} | {b['triangles']:,} "
            f"| {b['closed']} of {int(mask.max())} | {100 * b['volume']:+.2f} % | {b['crossings']} |"
        )


if __name__ == "__main__":
    main()
