"""How long it takes to find how far a mask's boundary lies from its surface: ours, VTK's static cell locator, open3d.

    python runtime_envs/build.py smoothing-open3d && sh runtime_envs/system.sh open3d
    .envs/dev/bin/python -m benchmarks.smoothing.distances [MASK.nii.gz]

Of every structure up to 10,000 faces of voxels, to its decimated surface, by each way in a process of its own and on one core.
Without a mask: `cases.abdomen`, 512×512×400, 15 structures. The processes run from the environment smoothing-open3d where it is
built; where open3d cannot be imported it is left out.
"""

from __future__ import annotations

import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

EXTRA = Path(__file__).resolve().parents[2] / ".envs/smoothing-open3d/bin/python"
WAYS = ("ours", "vtk", "open3d")
ROUNDS = 3
Distance = Callable[[NDArray[Any], NDArray[Any], NDArray[Any]], NDArray[np.float64]]


def by_vtk(points: NDArray[Any], vertices: NDArray[Any], triangles: NDArray[Any]) -> NDArray[np.float64]:
    """Measure by VTK's static cell locator, which takes one point a call."""
    from vtkmodules.util.numpy_support import numpy_to_vtk, numpy_to_vtkIdTypeArray
    from vtkmodules.vtkCommonCore import mutable, vtkPoints
    from vtkmodules.vtkCommonDataModel import vtkCellArray, vtkGenericCell, vtkPolyData, vtkStaticCellLocator

    places, cells, data = vtkPoints(), vtkCellArray(), vtkPolyData()
    places.SetData(numpy_to_vtk(np.ascontiguousarray(vertices), deep=True))
    cells.SetData(3, numpy_to_vtkIdTypeArray(triangles.astype(np.int64).ravel(), deep=True))
    data.SetPoints(places)
    data.SetPolys(cells)
    locator = vtkStaticCellLocator()
    locator.SetDataSet(data)
    locator.BuildLocator()
    cell, closest = vtkGenericCell(), [0.0, 0.0, 0.0]
    cell_id: Any = mutable(0)
    part: Any = mutable(0)
    squared: Any = mutable(0.0)
    out = np.empty(len(points))
    for index, point in enumerate(points.tolist()):
        locator.FindClosestPoint(point, closest, cell, cell_id, part, squared)
        out[index] = squared.get()
    return np.asarray(np.sqrt(out))


def way(name: str) -> Distance:
    """Return a way to measure."""
    from deployments.smoothing.distances import distances_to_surface, open3d_distances

    return {"ours": lambda: distances_to_surface, "vtk": lambda: by_vtk, "open3d": open3d_distances}[name]()


def measure(name: str) -> None:
    """Read structures from stdin, print seconds and megabytes, keep the distances: what a child does."""
    given = np.load(io.BytesIO(sys.stdin.buffer.read()))
    # Arrays are copied out first, so that reading is not counted.
    structures = [[given[f"{part}_{index}"] for part in ("points", "vertices", "triangles")] for index in range(given["count"])]
    started = time.perf_counter()
    distance = way(name)
    distance(*structures[0])  # compiles or loads what there is
    ready = time.perf_counter() - started
    before = resident_mb()
    seconds, found = np.inf, []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        found = [distance(*structure) for structure in structures]
        seconds = min(seconds, time.perf_counter() - started)
    np.savez(Path(sys.argv[2]), *found)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"seconds": seconds, "ready": ready, "resident_mb": before, "added_mb": peak - before}))


def resident_mb() -> float:
    """Return what this process holds, and forget its peak."""
    Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def structures_of(path: str | None) -> list[tuple[NDArray[Any], NDArray[Any], NDArray[Any]]]:
    """Make points of the boundary, vertices and triangles of every structure."""
    from benchmarks.smoothing.cases import THIN, abdomen
    from deployments.imageio.nifti import read_nifti
    from deployments.smoothing.distances import boundary_points
    from deployments.smoothing.nets import extract
    from deployments.smoothing.surfaces import label_map_to_scene
    from scangraph.contracts import LabelMap

    if path:
        read = read_nifti(Path(path).read_bytes(), path, as_mask=True)
        mask = LabelMap(read.array, read.spacing_mm)
    else:
        mask = LabelMap(abdomen(), THIN)
    nets = extract(mask.array.astype(np.uint8))
    spacing = np.array(mask.spacing_mm[::-1])
    found = []
    for surface in label_map_to_scene(mask)[0].surfaces:
        n = surface.label
        own, quads, triangles = (
            slice(int(s[n]), int(s[n + 1])) for s in (nets.vertex_start, nets.quad_start, nets.triangle_start)
        )
        points = boundary_points(nets.corners[own] * spacing, nets.quads[quads], nets.triangles[triangles])
        found.append((points, surface.vertices_mm, surface.faces))
    return found


def main() -> None:
    """Measure every way on the same structures and print the table."""
    structures = structures_of(sys.argv[1] if len(sys.argv) > 1 else None)
    with io.BytesIO() as buffer:
        named = {
            f"{part}_{index}": array
            for index, structure in enumerate(structures)
            for part, array in zip(("points", "vertices", "triangles"), structure, strict=True)
        }
        np.savez(buffer, count=np.array(len(structures)), **named)  # type: ignore[arg-type]
        given = buffer.getvalue()
    triangles, points = sum(len(s[2]) for s in structures), sum(len(s[0]) for s in structures)
    print(f"{len(structures)} structures, {triangles} triangles, {points} points")
    one_core = {**os.environ, "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    core = min(os.sched_getaffinity(0))
    results: dict[str, list[NDArray[np.float64]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in WAYS:
            kept = Path(folder) / f"{name}.npz"
            python = str(EXTRA) if EXTRA.exists() else sys.executable
            child = subprocess.run(
                [python, "-m", "benchmarks.smoothing.distances", f"--child={name}", str(kept)],
                input=given,
                capture_output=True,
                env=one_core,
                check=False,
                preexec_fn=lambda: os.sched_setaffinity(0, {core}),
            )
            if child.returncode:
                print(f"{name}: left out, {child.stderr.decode().strip().splitlines()[-1]}")
                continue
            told = json.loads(child.stdout)
            with np.load(kept) as arrays:
                results[name] = [arrays[f"arr_{index}"] for index in range(len(structures))]
            apart = max(float(np.abs(a - b).max()) for a, b in zip(results["ours"], results[name], strict=True))
            print(
                f"{name:7} {told['seconds']:7.3f} s, ready after {told['ready']:.1f} s, {told['resident_mb']:.0f} MB loaded, "
                f"{told['added_mb']:.0f} MB added, at most {apart:.1e} mm from ours"
            )


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1].startswith("--child="):
        measure(sys.argv[1].removeprefix("--child="))
    else:
        main()
