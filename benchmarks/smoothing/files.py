"""Writing scenes against trimesh's exporters and VTK's writers, in one run: `python -m benchmarks.smoothing.files [triangles]`.

Every way gets the same 15 structures in memory and writes a file into a temporary folder. Each has a process of its own, so
that its memory can be told: resident bytes at most, above those before it began. A peer that writes less says so in its row.
"""

from __future__ import annotations

import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
import psutil

from scangraph.contracts import Scene, SceneFiles, SceneFormat, Surface, label_table
from scangraph.scenefiles import save_scene

STRUCTURES, RUNS = 15, 7
MB = 1e6


def blob(triangles: int, seed: int) -> Surface:
    """A closed, bumpy ball of about so many triangles, somewhere in a scanner."""
    rings = max(4, round((triangles / 4) ** 0.5))
    around = 2 * rings
    random = np.random.default_rng(seed)
    theta, phi = np.linspace(0.02, np.pi - 0.02, rings + 1), np.linspace(0, 2 * np.pi, around, endpoint=False)
    bumps = 1 + 0.1 * np.outer(np.sin(5 * theta), np.cos(7 * phi)) + random.normal(0, 1e-3, (rings + 1, around))
    ball = np.stack([np.outer(np.sin(theta), f(phi)) for f in (np.cos, np.sin)] + [np.outer(np.cos(theta), 0 * phi + 1)], -1)
    vertices = (ball * bumps[..., None]).reshape(-1, 3) * 60 + random.uniform(-300, 300, 3)
    row, column = np.mgrid[:rings, :around]
    a, b = row * around + column, row * around + (column + 1) % around
    faces = np.concatenate([np.stack([a, a + around, b], -1), np.stack([b, a + around, b + around], -1)]).reshape(-1, 3)
    label = list(label_table().values())[seed]
    return Surface(label.name, label.number, label.color, vertices.astype(np.float32), faces.astype(np.int32))


def example(triangles: int) -> Scene:
    """15 structures of very different sizes."""
    shares = 0.75 ** np.arange(STRUCTURES)
    return Scene(tuple(blob(round(triangles * share), n) for n, share in enumerate(shares / shares.sum())))


def ours(scene: Scene, **files: Any) -> Callable[[Path], Any]:
    wish = Scene(scene.surfaces, scene.frame, scene.notes, SceneFiles(**files))
    return lambda folder: save_scene(wish, folder)


def by_trimesh(scene: Scene, kind: str) -> Callable[[Path], Any]:
    import trimesh

    def colored(s: Surface) -> Any:
        mesh: Any = trimesh.Trimesh(s.vertices_mm, s.faces, process=False)
        shades = trimesh.visual.material
        if kind == "obj":
            mesh.visual = trimesh.visual.TextureVisuals(material=shades.SimpleMaterial(diffuse=[*s.color, 255]))
        elif kind == "glb":
            shade = shades.PBRMaterial(baseColorFactor=[*s.color, 255], metallicFactor=0.0, roughnessFactor=0.6)
            mesh.visual = trimesh.visual.TextureVisuals(material=shade)
        elif kind == "ply":
            mesh.visual.vertex_colors = [*s.color, 255]
        return mesh

    def write(folder: Path) -> None:
        meshes = {s.name: colored(s) for s in scene.surfaces}  # anew each time: it caches normals
        whole = trimesh.Scene(meshes) if kind in {"obj", "glb"} else trimesh.util.concatenate(list(meshes.values()))
        extra: dict[str, Any] = (
            {"include_normals": True} if kind == "glb" else {"include_normals": False} if kind == "obj" else {}
        )
        whole.export(folder / f"scene.{kind}", **extra)

    return write


def poly_data(surfaces: tuple[Surface, ...]) -> Any:
    from vtkmodules.util.numpy_support import numpy_to_vtk, numpy_to_vtkIdTypeArray
    from vtkmodules.vtkCommonCore import vtkPoints
    from vtkmodules.vtkCommonDataModel import vtkCellArray, vtkPolyData

    firsts = np.cumsum([0, *(len(s.vertices_mm) for s in surfaces)])
    points, cells, data = vtkPoints(), vtkCellArray(), vtkPolyData()
    points.SetData(numpy_to_vtk(np.concatenate([s.vertices_mm for s in surfaces]), deep=True))
    faces = np.concatenate([s.faces.astype(np.int64) + first for s, first in zip(surfaces, firsts[:-1], strict=True)])
    cells.SetData(3, numpy_to_vtkIdTypeArray(faces.ravel(), deep=True))
    data.SetPoints(points)
    data.SetPolys(cells)
    colors = np.repeat(np.array([s.color for s in surfaces], np.uint8), np.diff(firsts), axis=0)
    shown = numpy_to_vtk(colors, deep=True)
    shown.SetName("RGB")
    data.GetPointData().AddArray(shown)
    return data


def by_vtk(scene: Scene, kind: str) -> Callable[[Path], Any]:
    from vtkmodules.vtkCommonDataModel import vtkMultiBlockDataSet
    from vtkmodules.vtkFiltersCore import vtkPolyDataNormals
    from vtkmodules.vtkIOGeometry import vtkGLTFWriter, vtkOBJWriter, vtkSTLWriter
    from vtkmodules.vtkIOPLY import vtkPLYWriter

    def normals(data: Any) -> Any:
        made = vtkPolyDataNormals()
        made.SetInputData(data)
        made.SplittingOff()
        made.ConsistencyOff()
        made.Update()
        return made.GetOutput()

    def write(folder: Path) -> None:
        if kind == "glb":
            building, scenes = vtkMultiBlockDataSet(), vtkMultiBlockDataSet()
            for n, s in enumerate(scene.surfaces):
                building.SetBlock(n, normals(poly_data((s,))))
            scenes.SetBlock(0, building)
            writer: Any = vtkGLTFWriter()
            writer.SaveNormalOn()
            writer.SetInputDataObject(scenes)
        else:
            writer = {"obj": vtkOBJWriter, "stl": vtkSTLWriter, "ply": vtkPLYWriter}[kind]()
            writer.SetInputData(poly_data(scene.surfaces))
        if kind in {"stl", "ply"}:
            writer.SetFileTypeToBinary()
        if kind == "ply":
            writer.SetArrayName("RGB")
        writer.SetFileName(str(folder / f"scene.{kind}"))
        writer.Write()

    return write


def measured(make: Callable[..., Callable[[Path], Any]], triangles: int, pipe: Connection, options: dict[str, Any]) -> None:
    """In a process of its own: least seconds of processor and clock, peak of resident memory, bytes written."""
    write = make(example(triangles), **options)
    process, stop, peak = psutil.Process(), Event(), [0]
    before = process.memory_info().rss

    def watch() -> None:
        while not stop.wait(0.002):
            peak[0] = max(peak[0], process.memory_info().rss - before)

    watcher = Thread(target=watch)
    watcher.start()
    times, size = [], 0
    for _ in range(RUNS):
        with tempfile.TemporaryDirectory() as folder:
            start = time.process_time(), time.perf_counter()
            write(Path(folder))
            times.append((time.process_time() - start[0], time.perf_counter() - start[1]))
            size = sum(file.stat().st_size for file in Path(folder).iterdir())
    stop.set()
    watcher.join()
    pipe.send((*(min(column) for column in zip(*times, strict=True)), peak[0] / MB, size / MB))


def row(name: str, make: Callable[..., Callable[[Path], Any]], triangles: int, base: float | None, **options: Any) -> float:
    """Measure one way in a fresh process and print it."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    child = context.Process(target=measured, args=(make, triangles, there, options))
    child.start()
    there.close()
    processor, clock, peak, size = here.recv()
    child.join()
    ratio = "" if base is None else f"{processor / base:.1f}×"
    print(f"{name:44} {processor:8.3f} {ratio:>7} {clock:8.3f} {peak:8.0f} {size:8.1f}", flush=True)
    return float(processor)


NOTES = {
    ("vtk", "obj"): "no groups, no materials",
    ("vtk", "ply"): "no labels",
    ("vtk", "glb"): "no names, no colours",
    ("trimesh", "ply"): "no labels",
}


def main() -> None:
    """Measure and print."""
    triangles = int(sys.argv[1]) if len(sys.argv) > 1 else 2_000_000
    true = sum(len(s.faces) for s in example(triangles).surfaces)
    print(f"{STRUCTURES} structures, {true / 1e6:.2f} M triangles; best of {RUNS}; ratios of processor seconds to ours")
    print(f"{'':44} {'CPU s':>8} {'':>7} {'clock s':>8} {'MB more':>8} {'MB file':>8}")
    kinds: tuple[SceneFormat, ...] = ("obj", "glb", "stl", "ply")
    for kind in kinds:
        base = row(f"{kind}: scangraph, manifest with SHA-256 included", ours, triangles, None, formats=(kind,))
        for peer, make in (("trimesh", by_trimesh), ("vtk", by_vtk)):
            note = NOTES.get((peer, kind), "")
            row(f"{kind}: {peer}{f' ({note})' if note else ''}", make, triangles, base, kind=kind)
    row("all four: scangraph", ours, triangles, None, formats=kinds)
    row("all four, zipped: scangraph", ours, triangles, None, formats=kinds, zipped=True)
    row("obj, zipped: scangraph", ours, triangles, None, zipped=True)


if __name__ == "__main__":
    main()
