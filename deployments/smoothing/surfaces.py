"""From a label map to smoothed, closed surfaces in millimetres.

The recipe: surface nets of all labels in one pass (`nets`), smoothing that gives back to each neighbourhood the volume that it
takes (`fairing`), fewer triangles within a given error (`decimation`), and at last each piece moved by some hundredths of a
millimetre until it encloses exactly its voxels' volume. Touching structures share their boundary on request (`touching`).
Everything happens in index × spacing millimetres; direction and origin are applied last, so that an oblique grid costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from threading import Event
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from deployments.smoothing import touching
from deployments.smoothing.decimation import decimate, split_quads
from deployments.smoothing.distances import SurfaceDistance, boundary_points, distances_to_surface, summary
from deployments.smoothing.fairing import connected_pieces, fair, move, restore_volumes, vertex_normals, volumes
from deployments.smoothing.measuring import distances_to_boundary, genus, open_edges, sample, triangle_areas
from deployments.smoothing.nets import Nets, extract
from scangraph.contracts import Frame, LabelMap, Scene, SceneFiles, Surface, label_of
from scangraph.contracts.errors import InvalidParameters, TooLargeForMemory
from scangraph.memory import free_memory

#: Farthest that a piece is moved for its volume's sake, in parts of the finest spacing.
_FARTHEST_OFFSET = 0.25
#: A surface's volume may differ from its voxels' by this part, and its 95th percentile of distances be this many of the widest
#: spacing, without a warning.
_VOLUME_TOLERANCE, _DISTANCE_TOLERANCE = 0.05, 1.0
#: Bytes for each vertex, at the peak: `benchmarks.smoothing.speed` adds 310 for a joint scene, 140 for one that is not.
_BYTES_A_VERTEX = 320
_RESERVE = 256 * 2**20
#: Labels that one pass can tell apart.
_MOST_LABELS = 255
#: Each coarser level of detail has a quarter of the triangles, but no surface fewer than this.
_LEVEL_PART, _LEAST_TRIANGLES = 4, 200
#: Rounds in which structures that touch settle how much each gets of what lies between them.
_BALANCINGS = 3
#: Voxels that touch by a face or an edge are one piece, as their surfaces are.
_CONNECTED = ndimage.generate_binary_structure(3, 2)
#: The frame is not among them: a scene says it itself, and can be turned.
_NOTES = ("Research use only. Not a medical device.", "Coordinates are in millimetres.")
_COMPONENT = "smoothing/base"
#: For functions on nets, where all faces are triangles.
_NO_QUADS = np.empty((0, 4), np.int32)
#: Options that a scene names among its facts.
_NAMED = ("smoothing", "error_mm", "triangles", "joint", "gap_mm", "min_volume_mm3", "levels")

OnProgress = Callable[[int, int, str], None]
Floats = NDArray[np.float32]
Faces = NDArray[np.int32]


@dataclass(frozen=True)
class Options:
    """What kind of surfaces are wanted.

    Parameters
    ----------
    structures : tuple of int, optional
        Label numbers to take; by default all that occur.
    smoothing : float
        0 leaves the voxels' steps (rounded), 1 smooths, up to 2.
    error_mm : float
        How far decimation may move a surface, as a root mean square; 0 leaves all triangles.
    triangles : int, optional
        Wanted of all structures together; then `error_mm` does not count.
    joint : bool
        Whether touching structures share their boundary.
    gap_mm : float
        Space between touching structures, with `joint`; 0 for none.
    min_volume_mm3 : float
        Smaller pieces are left out; 0 for none.
    levels : int
        Of detail; each coarser one has a quarter of the triangles.
    frame : "LPS" or "RAS"
        World frame of the vertices.
    strict : bool
        Whether a surface outside the tolerances is an error rather than a warning.
    files : SceneFiles
        What the scene becomes when it is saved.
    workers : int
        Structures that are worked on at the same time.
    surface_distance : callable
        How distances to a surface are measured; see `distances`.
    """

    structures: tuple[int, ...] | None = None
    smoothing: float = 1.0
    error_mm: float = 0.05
    triangles: int | None = None
    joint: bool = False
    gap_mm: float = 0.0
    min_volume_mm3: float = 0.0
    levels: int = 1
    frame: Frame = "LPS"
    strict: bool = False
    files: SceneFiles = field(default=SceneFiles())
    workers: int = 1
    surface_distance: SurfaceDistance = distances_to_surface


class _Mesh(NamedTuple):
    """One label's surface: vertices in mm from the first voxel's centre, (x, y, z), and triangles."""

    places: Floats
    triangles: Faces


class _Net(NamedTuple):
    """One label's net, in mm from its own corner of the array, where single precision has digits to spare."""

    number: int
    origin_mm: NDArray[np.float64]
    places: Floats
    corners: Floats
    links: tuple[NDArray[np.int32], NDArray[np.int32]]
    quads: Faces
    triangles: Faces


def label_map_to_scene(
    mask: LabelMap, options: Options | None = None, on_progress: OnProgress | None = None
) -> tuple[Scene, list[str]]:
    """Make a surface of every structure.

    Parameters
    ----------
    mask : LabelMap
        Any orientation and spacing.
    options : Options, optional
        What kind of surfaces.
    on_progress : callable, optional
        Called as `on_progress(done, total, name)` after each structure; may raise to stop.

    Returns
    -------
    (Scene, list of str)
        Closed, outward-oriented surfaces in the order of their labels, each with its measures; and warnings: structures that
        do not occur, pieces left out, what is cut by the scan's edge, what is outside the tolerances.

    Raises
    ------
    TooLargeForMemory
        Before the memory is taken.
    InvalidParameters
        If there are more than 255 structures, or with `strict` a surface is outside the tolerances.
    """
    options = options or Options()
    array, numbers = _compact(mask, options.structures)
    warnings: list[str] = []
    if options.min_volume_mm3 > 0:
        array, left_out = _without_small_pieces(mask, array, numbers, options.min_volume_mm3)
        warnings += left_out
    table = None
    if options.structures is not None or len(numbers) < int(array.max(initial=0)):
        table = np.zeros(256, np.uint8)
        table[list(numbers)] = list(numbers)
    nets = extract(array, table, lambda vertices: _check_memory(vertices, mask))
    present = {compact: number for compact, number in numbers.items() if nets.voxels[compact]}
    if options.structures is not None:
        missing = sorted(set(options.structures) - set(present.values()))
        warnings += [f"{mask.label(number).name} was asked for but does not occur in the mask." for number in missing]
    if not present:
        return Scene((), options.frame, _NOTES, options.files), warnings or ["The mask is empty, and so is the scene."]
    at_edge = _labels_at_edge(array)
    if cut := [
        mask.label(number).name for compact, number in sorted(present.items(), key=lambda i: i[1]) if compact in at_edge
    ]:
        warnings.append(f"Cut by the edge of the scan, and closed flat there: {', '.join(cut)}.")

    spacing = np.asarray(mask.spacing_mm, np.float64)[::-1]
    work = _Work(mask, array, nets, spacing, options, at_edge)
    names = {compact: mask.label(number).name for compact, number in present.items()}
    made = _joined(work, names, on_progress) if options.joint else _each(work, names, on_progress)
    surfaces = []
    for compact, number in sorted(present.items(), key=lambda item: item[1]):
        for level, (mesh, measures) in enumerate(made[compact]):
            label = mask.label(number)
            measures["warnings"] = _outside_tolerances(measures, mask.spacing_mm)
            if level == 0:
                warnings += [f"{label.name}: {text}" for text in measures["warnings"]]
            surfaces.append(_in_world(mask, number, mesh, measures, level))
    if options.strict and (bad := [s.name for s in surfaces if s.level == 0 and s.measures["warnings"]]):
        raise InvalidParameters(
            component=_COMPONENT,
            detail=f"outside the tolerances, and `strict` was asked for: {', '.join(bad)}. {' '.join(warnings)}",
        )
    facts = {
        "source": {
            "shape_zyx": mask.shape,
            "spacing_mm_zyx": mask.spacing_mm,
            "origin_mm": mask.origin_mm,
            "direction": mask.direction,
        },
        "parameters": {name: getattr(options, name) for name in _NAMED},
    }
    codes = (label_of(s.label, mask.names) for s in surfaces if s.level == 0)
    notes = (*_NOTES, *(f"{c.name}: label {c.number}, SNOMED CT {c.snomed_code}" for c in codes if c.snomed_code))
    return Scene(tuple(surfaces), "LPS", notes, options.files, facts).in_frame(options.frame), warnings


@dataclass(frozen=True)
class _Work:
    """What all structures have in common."""

    mask: LabelMap
    array: NDArray[np.uint8]
    nets: Nets
    spacing: NDArray[np.float64]
    options: Options
    at_edge: set[int]

    def ranges(self, number: int) -> tuple[slice, slice, slice]:
        """Return where a structure's vertices, quadrilaterals and triangles are among all."""
        vertices, quads, triangles = (
            slice(int(start[number]), int(start[number + 1]))
            for start in (self.nets.vertex_start, self.nets.quad_start, self.nets.triangle_start)
        )
        return vertices, quads, triangles

    def net(self, number: int) -> _Net:
        nets, (own, quads, triangles) = self.nets, self.ranges(number)
        corner = np.floor(nets.corners[own].min(axis=0)).astype(np.float32)
        first, last = int(nets.link_start[own.start]), int(nets.link_start[own.stop])
        start = (nets.link_start[own.start : own.stop + 1] - first).astype(np.int32)
        scale = self.spacing.astype(np.float32)
        return _Net(
            number,
            corner.astype(np.float64) * self.spacing,
            (nets.places[own] - corner) * scale,
            (nets.corners[own] - corner) * scale,
            (start, nets.links[first:last]),
            nets.quads[quads],
            nets.triangles[triangles],
        )

    def faired(self, net: _Net) -> Floats:
        if self.options.smoothing <= 0:
            return net.places
        return fair(net.places, net.corners, net.links, (net.quads, net.triangles), self.options.smoothing)

    def goal(self, triangles: int, level: int, least: int = 0) -> dict[str, Any]:
        """Return what decimation is to reach at a level of detail, from so many triangles of the level before."""
        if level > 0:
            return {"target": max(least, triangles // _LEVEL_PART)}
        if self.options.triangles is None:
            return {"error_mm": self.options.error_mm}
        present = 2 * len(self.nets.quads) + len(self.nets.triangles)
        return {"target": max(least, round(triangles * min(1.0, self.options.triangles / present)))}

    def voxel_mm3(self, number: int) -> float:
        """Return the volume of a structure's voxels."""
        return float(self.nets.voxels[number]) * self.mask.voxel_volume_mm3

    @property
    def farthest_mm(self) -> float:
        return _FARTHEST_OFFSET * float(self.spacing.min())

    def boundary(self, number: int) -> NDArray[np.float64]:
        """Return points of the boundary of a structure's voxels, in mm."""
        nets, (own, quads, triangles) = self.nets, self.ranges(number)
        return boundary_points(nets.corners[own], nets.quads[quads], nets.triangles[triangles]) * self.spacing

    def measured(self, number: int, mesh: _Mesh, pieces: int) -> dict[str, Any]:
        """Take a surface's measures; the box is in the mask's world."""
        vertices, triangles = mesh
        points = sample(vertices, triangles) / self.spacing
        distances = distances_to_boundary(points, self.array, number, self.mask.spacing_mm)
        return {
            "voxel_volume_ml": self.voxel_mm3(number) / 1000,
            "mesh_volume_ml": _volume(vertices, triangles) / 1000,
            "area_cm2": float(triangle_areas(vertices, triangles).sum()) / 100,
            "vertices": len(vertices),
            "triangles": len(triangles),
            "watertight": open_edges(triangles) == 0,
            "components": pieces,
            "genus": genus(len(vertices), len(triangles), pieces),
            "distance_mm": summary(distances),
            "distance_from_mask_mm": summary(self.options.surface_distance(self.boundary(number), vertices, triangles)),
            "touches_edge": number in self.at_edge,
        }


Levels = list[tuple[_Mesh, dict[str, Any]]]


def _each(work: _Work, names: dict[int, str], on_progress: OnProgress | None) -> dict[int, Levels]:
    """Make every structure by itself, the largest first."""
    by_size = sorted(names, key=lambda n: work.nets.vertex_start[n] - work.nets.vertex_start[n + 1])
    return dict(_parallel(by_size, lambda number: _alone(work, number), names, work.options.workers, on_progress))


def _alone(work: _Work, number: int) -> Levels:
    net = work.net(number)
    places = work.faired(net)
    triangles = np.concatenate([split_quads(places, net.quads), net.triangles])
    pieces, sizes = connected_pieces(*net.links)
    wanted = volumes(net.corners, net.quads, net.triangles, pieces, len(sizes))
    made = []
    for level in range(work.options.levels):
        places, triangles, _, kept = decimate(places, triangles, **work.goal(len(triangles), level, _LEAST_TRIANGLES))
        pieces = pieces[kept]
        places = restore_volumes(places, triangles, pieces, sizes, wanted, work.farthest_mm)
        mesh = _Mesh((places.astype(np.float64) + net.origin_mm).astype(np.float32), triangles)
        made.append((mesh, work.measured(number, mesh, len(sizes))))
    return made


def _joined(work: _Work, names: dict[int, str], on_progress: OnProgress | None) -> dict[int, Levels]:
    """Make all structures, those that touch with one boundary between them."""
    nets, options = work.nets, work.options
    shared = touching.shared_vertices(nets)
    ranges = {number: work.ranges(number)[0] for number in names}
    together = [number for number in names if shared.touches[ranges[number]].any()]
    alone = {number: name for number, name in names.items() if number not in together}
    made = _each(work, alone, on_progress) if alone else {}
    if not together:
        return made
    places, pieces = np.empty_like(nets.places), {}
    for number in together:
        net = work.net(number)
        own = work.faired(net)
        piece, sizes = connected_pieces(*net.links)
        wanted = volumes(net.corners, net.quads, net.triangles, piece, len(sizes))
        triangles = np.concatenate([split_quads(own, net.quads), net.triangles])
        own = restore_volumes(own, triangles, piece, sizes, wanted, work.farthest_mm)
        places[ranges[number]] = (own + net.origin_mm).astype(np.float32)
        pieces[number] = len(sizes)
    common = touching.common_places(places, shared)
    triangles_of: dict[int, Faces] = {}
    for number in together:
        net, where = work.net(number), ranges[number]
        movement = common[where] - places[where]
        if options.gap_mm > 0:
            normals = vertex_normals(common[where], net.quads, net.triangles)
            movement = movement - np.float32(options.gap_mm / 2) * normals
        places[where] += touching.fade(movement, shared.touches[where], *net.links)
        triangles_of[number] = np.concatenate([split_quads(places[where], net.quads), net.triangles])
    if options.gap_mm > 0:  # nothing is shared any more
        apart = {number: _Mesh(places[ranges[number]], triangles_of[number]) for number in together}
        thin = _parallel(together, lambda n: _thinned(work, n, apart[n], pieces[n]), names, options.workers, on_progress)
        return {**made, **dict(thin)}
    _balance(work, places, shared, ranges, triangles_of)
    whole = touching.join(places, nets, shared, triangles_of)
    levels: dict[int, Levels] = {number: [] for number in together}
    for level in range(options.levels):
        goal = work.goal(len(whole.triangles), level)
        vertices, triangles, kept, still = decimate(whole.places_mm, whole.triangles, fixed=whole.fixed, **goal)
        whole = touching.Complex(vertices, triangles, whole.inside[kept], whole.beyond[kept], whole.fixed[still])
        whole = _with_volumes(work, whole, together)

        def finish(number: int, whole: touching.Complex = whole) -> tuple[_Mesh, dict[str, Any]]:
            mesh = _Mesh(*whole.surface(number)[:2])
            return mesh, work.measured(number, mesh, pieces[number])

        for number, one in _parallel(together, finish, names, options.workers, on_progress):
            levels[number].append(one)
    return {**made, **levels}


def _balance(
    work: _Work, places: Floats, shared: touching.Shared, ranges: dict[int, slice], triangles_of: dict[int, Faces]
) -> None:
    """Move surfaces, in place, towards each structure's volume; shared boundaries by the mean of both wishes."""
    for _ in range(_BALANCINGS):
        movement = np.zeros_like(places)
        for number, triangles in triangles_of.items():
            own = np.ascontiguousarray(places[ranges[number]])
            missing = work.voxel_mm3(number) - _volume(own, triangles)
            step = np.clip(missing / float(triangle_areas(own, triangles).sum()), -work.farthest_mm, work.farthest_mm)
            movement[ranges[number]] = np.float32(step) * vertex_normals(own, _NO_QUADS, triangles)
        places += touching.common_places(movement, shared)


def _thinned(work: _Work, number: int, mesh: _Mesh, pieces: int) -> Levels:
    """Decimate a surface that is to stay where it is."""
    made, (places, triangles) = [], mesh
    for level in range(work.options.levels):
        places, triangles, _, _ = decimate(places, triangles, **work.goal(len(triangles), level, _LEAST_TRIANGLES))
        thin = _Mesh(places, triangles)
        made.append((thin, work.measured(number, thin, pieces)))
    return made


def _with_volumes(work: _Work, whole: touching.Complex, numbers: list[int]) -> touching.Complex:
    """Give each structure its volume, by moving what it does not share."""
    places = whole.places_mm.copy()
    shared = np.zeros(len(places), np.bool_)
    shared[whole.triangles[whole.beyond > 0]] = True
    for number in numbers:
        vertices, triangles, where = whole.surface(number)
        free = ~shared[where]
        free_area = float(triangle_areas(vertices, triangles)[free[triangles].all(axis=1)].sum())
        if free_area <= 0:
            continue
        missing = work.voxel_mm3(number) - _volume(vertices, triangles)
        step = np.float32(np.clip(missing / free_area, -work.farthest_mm, work.farthest_mm))
        normals = vertex_normals(vertices, _NO_QUADS, triangles)
        places[where] = move(vertices, normals, np.where(free & ~whole.fixed[where], step, np.float32(0)).astype(np.float32))
    return whole._replace(places_mm=places)


def _volume(places: Floats, triangles: Faces) -> float:
    """Return the volume that a surface encloses, mm³."""
    return float(volumes(places, _NO_QUADS, triangles, np.zeros(len(places), np.int32), 1)[0])


def _parallel(
    numbers: Sequence[int], work: Callable[[int], Any], names: dict[int, str], workers: int, on_progress: OnProgress | None
) -> Iterator[tuple[int, Any]]:
    """Do something for every structure, several at a time; the kernels let go of Python's lock."""
    stopped = Event()

    def unless_stopped(number: int) -> Any:
        return None if stopped.is_set() else work(number)

    if on_progress:
        on_progress(0, len(numbers), names[numbers[0]])
    with ThreadPoolExecutor(max(1, workers), thread_name_prefix="surface") as pool:
        jobs = {pool.submit(unless_stopped, number): number for number in numbers}
        try:
            for done, job in enumerate(as_completed(jobs), 1):
                yield jobs[job], job.result()
                if on_progress:
                    on_progress(done, len(numbers), names[jobs[job]])
        except BaseException:
            stopped.set()
            pool.shutdown(cancel_futures=True)
            raise


def _compact(mask: LabelMap, structures: Sequence[int] | None) -> tuple[NDArray[np.uint8], dict[int, int]]:
    """Return the mask in bytes, read-only, and what each byte stands for."""
    array: NDArray[Any] = mask.array
    most = int(np.iinfo(array.dtype).max)
    if structures is not None:  # no voxel has another number
        structures = sorted({number for number in structures if 0 < number <= most})
    if array.dtype == np.uint8:
        return _read_only(array), {number: number for number in (range(1, most + 1) if structures is None else structures)}
    wanted = sorted(mask.labels or mask.counts()) if structures is None else structures
    if len(wanted) > _MOST_LABELS:
        raise InvalidParameters(
            component=_COMPONENT,
            detail=f"a scene has up to {_MOST_LABELS} structures, this would have {len(wanted)}; use `structures`",
        )
    compact, sorted_numbers = np.zeros(array.shape, np.uint8), np.array(wanted, array.dtype)
    for plane, out in zip(array, compact, strict=True):
        place = np.searchsorted(sorted_numbers, plane).clip(0, max(len(wanted) - 1, 0))
        if wanted:
            np.copyto(out, (place + 1).astype(np.uint8), where=sorted_numbers[place] == plane)
    return _read_only(compact), {index + 1: number for index, number in enumerate(wanted)}


def _read_only(array: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return a view that cannot be written to: compiled functions then know one kind of array instead of two."""
    view = array.view()
    view.flags.writeable = False
    return view


def _without_small_pieces(
    mask: LabelMap, array: NDArray[np.uint8], numbers: dict[int, int], least_mm3: float
) -> tuple[NDArray[np.uint8], list[str]]:
    """Return the mask without pieces below a volume, and say what was left out."""
    kept, said = array.copy(), []
    for compact, box in enumerate(ndimage.find_objects(array), 1):
        if box is None or compact not in numbers:
            continue
        pieces, _ = ndimage.label(array[box] == compact, _CONNECTED)
        sizes = np.bincount(pieces.ravel())
        small = sizes * mask.voxel_volume_mm3 < least_mm3
        small[0] = False
        if small.any():
            kept[box][small[pieces]] = 0
            lost = float(sizes[small].sum()) * mask.voxel_volume_mm3
            name = mask.label(numbers[compact]).name
            said.append(
                f"{name}: {int(small.sum())} of {len(sizes) - 1} pieces left out, each below {least_mm3:g} mm³, "
                f"{lost:.0f} mm³ in all."
            )
    return _read_only(kept), said


def _check_memory(vertices: int, mask: LabelMap) -> None:
    needed, free = vertices * _BYTES_A_VERTEX + _RESERVE, free_memory()
    if vertices > np.iinfo(np.int32).max or needed > free:
        raise TooLargeForMemory(
            component=_COMPONENT,
            device="main",
            needed_mb=needed // 2**20,
            free_mb=free // 2**20,
            shape="×".join(map(str, mask.shape)),
        )


def _in_world(mask: LabelMap, number: int, mesh: _Mesh, measures: dict[str, Any], level: int) -> Surface:
    """Apply direction and origin, and turn the faces outward where a left-handed direction mirrors them."""
    direction = np.asarray(mask.direction)
    world = (mesh.places.astype(np.float64) @ direction.T + np.asarray(mask.origin_mm)).astype(np.float32)
    faces = mesh.triangles if np.linalg.det(direction) > 0 else mesh.triangles[:, ::-1]
    label = mask.label(number)
    box = [world.min(axis=0), world.max(axis=0)]
    return Surface(label.name, number, label.color, world, faces, {**measures, "box_mm": box}, level)


def _outside_tolerances(measures: dict[str, Any], spacing_mm: Sequence[float]) -> list[str]:
    found = []
    voxels, surface, distance = measures["voxel_volume_ml"], measures["mesh_volume_ml"], measures["distance_mm"]["p95"]
    if not measures["watertight"]:
        found.append("the surface is not a watertight manifold.")
    if abs(surface / voxels - 1) > _VOLUME_TOLERANCE:
        found.append(f"the surface has {surface:.3g} mL, the mask {voxels:.3g} mL ({surface / voxels - 1:+.0%}).")
    if distance > _DISTANCE_TOLERANCE * max(spacing_mm):
        found.append(f"a twentieth of the surface is more than {distance:.2f} mm from the mask's boundary.")
    return found


def _labels_at_edge(array: NDArray[np.uint8]) -> set[int]:
    planes = [np.unique(array.take(index, axis=axis)) for axis in range(3) for index in (0, -1)]
    return set(np.concatenate(planes).tolist()) - {0}
