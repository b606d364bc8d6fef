"""Synthetic abdominal CT patients with known truth, for demonstration, training and tests. Nobody's data.

A phantom is one anatomy seen in three contrast phases on one grid. Every structure is a union of analytic solids (ellipsoids
and tapered tubes along splines), given by their signed distance in millimetres, painted in order onto a voxel grid of any
spacing and orientation: distances make partial volume exact to first order, and one anatomy comes out the same on every grid.

Anatomical coordinates are LPS millimetres (x towards the patient's left, y posterior, z superior) with the origin in front of
the lumbar spine, near the middle of the abdomen. `HU` are Hounsfield units. The anatomy is a caricature in plausible
proportions, with tubes on the generous side; nothing learnt from it is clinically valid.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scangraph.contracts import LabelMap, Volume

Array = NDArray[np.float32]
Point = NDArray[np.float64]
#: Corner points of a tube's spline, each (x, y, z) in mm.
Points = Sequence[ArrayLike]
#: Signed distance (negative inside, mm) of the points with LPS coordinates x, y, z, which broadcast against each other.
Distance = Callable[[Array, Array, Array], Array]

PHASES = ("arterial", "portal", "delayed")
TASKS = ("organs", "vessels", "ureters", "tumor")

SPLEEN, KIDNEY_RIGHT, KIDNEY_LEFT, LIVER, BLADDER, AORTA, VENA_CAVA = 1, 2, 3, 5, 21, 52, 63
KIDNEY, TUMOR, CYST, ARTERY, VEIN, URETER = 201, 202, 203, 204, 205, 206
#: Numbers of the project's label table that each task's truth may hold.
TASK_LABELS: dict[str, tuple[int, ...]] = {
    "organs": (SPLEEN, KIDNEY_RIGHT, KIDNEY_LEFT, LIVER, BLADDER, AORTA, VENA_CAVA),
    "vessels": (ARTERY, VEIN),
    "ureters": (URETER,),
    "tumor": (KIDNEY, TUMOR, CYST),
}

#: The shipped synthetic patient: never trained on; chosen for a tumor and a cyst that are large enough to see, one a kidney.
DEMO_SEED = 9022

#: Far outside everything, where no solid has been evaluated.
_FAR = np.float32(1e3)
#: Half size (x, y, z) in mm of the field of view around the anatomical origin.
_HALF_FIELD_MM = np.array([157.0, 112.0, 165.0])


@dataclass(frozen=True)
class Phantom:
    """A synthetic patient.

    Attributes
    ----------
    seed : int
        What it was made from.
    volumes : dict of str to Volume
        The phases "arterial", "portal" and "delayed": int16 HU, one grid.
    truth : dict of str to LabelMap
        The tasks "organs", "vessels", "ureters" and "tumor", on the same grid. Kidneys in "organs" include their tumors
        and cysts; kidney (201) in "tumor" is the parenchyma beside them.
    description : str
        One line: grid, orientation and lesions.
    """

    seed: int
    volumes: dict[str, Volume]
    truth: dict[str, LabelMap]
    description: str


def make_phantom(
    seed: int,
    *,
    spacing_mm: tuple[float, float, float] | None = None,
    oblique: tuple[float, float, float] | None = None,
    noise_hu: float | None = None,
) -> Phantom:
    """Make the synthetic patient of a seed, the same bytes every time.

    Parameters
    ----------
    seed : int
        Decides the anatomy, the grid and the noise, each by a stream of its own: another spacing leaves the anatomy alone.
    spacing_mm : (z, y, x), optional
        Voxel spacing. Drawn by the seed if not given: 1.2-2.2 mm in plane, slices of 1.5-4 mm.
    oblique : (x, y, z) degrees, optional
        Rotation of the grid about the three patient axes. If not given, two seeds of five have one of up to 12 degrees.
    noise_hu : float, optional
        Standard deviation of the noise. Drawn by the seed if not given: 8-16 HU.

    Returns
    -------
    Phantom
        Three phases and the truth of four tasks, all on one grid.
    """
    anatomy_rng, grid_rng, noise_rng = (
        np.random.Generator(np.random.PCG64(stream)) for stream in np.random.SeedSequence(seed).spawn(3)
    )
    scale = anatomy_rng.uniform(0.93, 1.07)
    drawn_spacing, drawn_angles = _draw_grid(grid_rng)
    drawn_noise = noise_rng.uniform(8, 16)
    grid = _Grid.centred(spacing_mm or drawn_spacing, drawn_angles if oblique is None else oblique, scale)
    canvas = _Canvas.blank(grid)
    lesions = _paint_anatomy(canvas, anatomy_rng)

    sigma = drawn_noise if noise_hu is None else noise_hu
    volumes, truth = {}, {}
    for phase, clean in zip(PHASES, canvas.hu, strict=True):
        hu = clean + _ct_noise(grid.shape, sigma, noise_rng)
        volumes[phase] = grid.volume(np.clip(np.rint(hu), -1024, 3071).astype(np.int16))
    for task, labels in canvas.labels.items():
        plain = grid.volume(labels)
        truth[task] = LabelMap(labels, plain.spacing_mm, plain.origin_mm, plain.direction, TASK_LABELS[task])

    size = "×".join(map(str, grid.shape))
    spacing = "×".join(f"{s:.2f}" for s in grid.spacing_mm)
    tilt = "oblique" if np.any(grid.direction != np.eye(3)) else "axis-aligned"
    description = f"synthetic patient {seed}: {size} voxels of {spacing} mm (z, y, x), {tilt}, {lesions}"
    return Phantom(seed, volumes, truth, description)


def _draw_grid(rng: np.random.Generator) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Draw spacing (z, y, x) in mm and rotation angles (x, y, z) in degrees."""
    in_plane = round(rng.uniform(1.2, 2.2), 2)
    # Fine pixels come with thick slices, as in practice, which also bounds a phantom at about four million voxels.
    slices = round(rng.uniform(max(1.5, 5.5 / in_plane**2), 4.0), 2)
    angles = rng.uniform(-12, 12, 3) if rng.random() < 0.4 else np.zeros(3)
    return (slices, in_plane, in_plane), (float(angles[0]), float(angles[1]), float(angles[2]))


def _ct_noise(shape: tuple[int, ...], sigma: float, rng: np.random.Generator) -> Array:
    """Gaussian noise of standard deviation `sigma` HU, correlated over neighbours in plane as reconstruction leaves it."""
    noise = rng.standard_normal(shape, dtype=np.float32)
    for axis in (1, 2):
        noise = noise + np.float32(0.5) * (np.roll(noise, 1, axis) + np.roll(noise, -1, axis))
    return np.asarray(noise * np.float32(sigma / 1.5), dtype=np.float32)  # each pass scales the deviation by sqrt(1.5)


# --- solids -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Solid:
    """A signed distance and the box it is confined to.

    Attributes
    ----------
    distance : Distance
    low, high : ndarray, shape (3,)
        Corners (x, y, z) in mm of an axis-aligned box around the solid.
    """

    distance: Distance
    low: Point
    high: Point


def _ellipsoid(
    centre: ArrayLike, radii: ArrayLike, axes: NDArray[np.float64] | None = None, ripple: Distance | None = None
) -> _Solid:
    """Ellipsoid of three radii (mm) along the columns of `axes` (default: the patient's), its surface moved out by `ripple`."""
    rotation = np.eye(3) if axes is None else axes
    c, r = np.asarray(centre, np.float64), np.asarray(radii, np.float64)
    half = np.sqrt(((rotation * r) ** 2).sum(axis=1)) + (0.0 if ripple is None else 6.0)

    def distance(x: Array, y: Array, z: Array) -> Array:
        # First-order distance k0 (k0 - 1) / k1 with k0 = |p / r| and k1 = |p / r²|: exact on the surface and for spheres.
        k0: Array = np.full((1, 1, 1), 1e-12, np.float32)
        k1 = k0
        for axis, radius in zip(rotation.T, r, strict=True):
            u = _dot(axis, (x - np.float32(c[0]), y - np.float32(c[1]), z - np.float32(c[2]))) / np.float32(radius)
            k0 = k0 + u**2
            k1 = k1 + (u / np.float32(radius)) ** 2
        k0 = np.sqrt(k0)
        d = k0 * (k0 - 1) / np.sqrt(k1)
        return np.asarray(d if ripple is None else d - ripple(x, y, z))

    return _Solid(distance, c - half, c + half)


def _dot(weights: NDArray[np.float64], terms: Sequence[Array]) -> Array:
    """Weighted sum that leaves terms of weight zero out, so that axis-aligned grids stay broadcastable and cheap."""
    total = np.zeros((1, 1, 1), np.float32)
    for weight, term in zip(weights, terms, strict=True):
        if weight:
            total = total + np.float32(weight) * term
    return total


def _tube(points: Points, radii: Sequence[float], step_mm: float = 5.0) -> list[_Solid]:
    """Tube along a Catmull-Rom spline through `points` (x, y, z in mm); the radii (mm) belong to the points."""
    line, widths = _spline(np.array([np.asarray(p, np.float64) for p in points]), np.asarray(radii, np.float64), step_mm)
    return [_capsule(*ends, *ends_widths) for ends, ends_widths in zip(pairwise(line), pairwise(widths), strict=True)]


def _spline(points: Point, radii: Point, step_mm: float) -> tuple[Point, Point]:
    """Points (n, 3) about `step_mm` apart on the Catmull-Rom spline through `points`, and radii (n,) interpolated linearly."""
    padded = np.concatenate([2 * points[:1] - points[1:2], points, 2 * points[-1:] - points[-2:-1]])
    line, widths = [points[:1]], [radii[:1]]
    for i in range(len(points) - 1):
        p0, p1, p2, p3 = padded[i : i + 4]
        count = max(1, int(np.ceil(np.linalg.norm(p2 - p1) / step_mm)))
        t = np.arange(1, count + 1)[:, None] / count
        line.append(
            0.5 * (2 * p1 + (p2 - p0) * t + (2 * p0 - 5 * p1 + 4 * p2 - p3) * t**2 + (3 * p1 - p0 - 3 * p2 + p3) * t**3)
        )
        widths.append(radii[i] + (radii[i + 1] - radii[i]) * t[:, 0])
    return np.concatenate(line), np.concatenate(widths)


def _capsule(a: Point, b: Point, radius_a: float, radius_b: float) -> _Solid:
    """Round-ended cone frustum from `a` to `b` (x, y, z in mm)."""
    ab = b - a
    length2 = np.float32(max(float(ab @ ab), 1e-9))

    def distance(x: Array, y: Array, z: Array) -> Array:
        px, py, pz = x - np.float32(a[0]), y - np.float32(a[1]), z - np.float32(a[2])
        t = np.clip((px * np.float32(ab[0]) + py * np.float32(ab[1]) + pz * np.float32(ab[2])) / length2, 0, 1)
        gap2 = sum((p - t * np.float32(d)) ** 2 for p, d in zip((px, py, pz), ab, strict=True))
        return np.asarray(np.sqrt(gap2) - (np.float32(radius_a) + t * np.float32(radius_b - radius_a)))

    r = max(radius_a, radius_b)
    return _Solid(distance, np.minimum(a, b) - r, np.maximum(a, b) + r)


def _ripple(rng: np.random.Generator, height_mm: float, length_mm: float) -> Distance:
    """Smooth bumps of at most `height_mm` and about `length_mm` across, which keep organs from being perfect ellipsoids."""
    phase = rng.uniform(0, 2 * np.pi, 3).astype(np.float32)
    k = (2 * np.pi / length_mm / rng.uniform(0.8, 1.25, 3)).astype(np.float32)

    def height(x: Array, y: Array, z: Array) -> Array:
        waves = np.sin(k[0] * x + phase[0]) * np.sin(k[1] * y + phase[1]) * np.sin(k[2] * z + phase[2])
        return np.asarray(np.float32(height_mm) * waves)

    return height


def _rotation(degrees: ArrayLike) -> NDArray[np.float64]:
    """Matrix that turns by the given degrees about x, then y, then z."""
    (cx, cy, cz), (sx, sy, sz) = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    about_x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    about_z = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    return np.asarray(about_z @ about_y @ about_x)


# --- the grid and the canvas ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Grid:
    """Voxel grid, and anatomical coordinates on it.

    Attributes
    ----------
    shape : (z, y, x)
    spacing_mm : (z, y, x)
    origin_mm : ndarray, shape (3,)
        LPS position (x, y, z) of voxel (0, 0, 0).
    direction : ndarray, shape (3, 3)
        Columns are the LPS directions of the index axes x, y, z.
    scale : float
        Size of the patient: world millimetres are anatomical millimetres times this.
    """

    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    origin_mm: Point
    direction: NDArray[np.float64]
    scale: float

    @classmethod
    def centred(cls, spacing_mm: tuple[float, float, float], degrees: tuple[float, float, float], scale: float) -> _Grid:
        """Cover the field of view of a patient of this scale."""
        spacing_xyz = np.array(spacing_mm[::-1])
        size_xyz = np.ceil(2 * _HALF_FIELD_MM * scale / spacing_xyz).astype(int)
        direction = _rotation(degrees) if any(degrees) else np.eye(3)
        origin = -direction @ (spacing_xyz * (size_xyz - 1) / 2)
        x, y, z = (int(n) for n in size_xyz)
        return cls((z, y, x), spacing_mm, origin, direction, scale)

    @property
    def voxel_mm(self) -> float:
        """Mean voxel width in anatomical mm: the width over which coverage falls from 1 to 0."""
        return float(np.mean(self.spacing_mm)) / self.scale

    def volume(self, array: NDArray[np.generic]) -> Volume:
        """Put an array (z, y, x) on this grid."""
        x, y, z = (float(v) for v in self.origin_mm)
        rows = [(float(r[0]), float(r[1]), float(r[2])) for r in self.direction]
        return Volume(array, self.spacing_mm, (x, y, z), (rows[0], rows[1], rows[2]))

    def box(self, low: Point, high: Point) -> tuple[slice, slice, slice]:
        """Slices (z, y, x) of the voxels that anything between the corners `low` and `high` (x, y, z in mm) can touch."""
        margins = low - self.voxel_mm, high + self.voxel_mm
        corners = np.stack(np.meshgrid(*zip(*margins, strict=True), indexing="ij"), axis=-1).reshape(-1, 3) * self.scale
        index = (corners - self.origin_mm) @ self.direction / np.array(self.spacing_mm[::-1])
        first = np.maximum(np.floor(index.min(axis=0)).astype(int), 0)
        stop = np.minimum(np.ceil(index.max(axis=0)).astype(int) + 1, self.shape[::-1])
        x, y, z = (slice(int(a), max(int(a), int(b))) for a, b in zip(first, stop, strict=True))
        return z, y, x

    def coordinates(self, box: tuple[slice, slice, slice]) -> tuple[Array, Array, Array]:
        """Anatomical coordinates x, y, z (mm) of a box's voxel centres, each of a shape that broadcasts to the box."""
        z, y, x = (
            np.arange(s.start, s.stop, dtype=np.float32) * np.float32(d) for s, d in zip(box, self.spacing_mm, strict=True)
        )
        steps = (x[None, None, :], y[None, :, None], z[:, None, None])
        cx, cy, cz = (
            (_dot(row, steps) + np.float32(o)) / np.float32(self.scale)
            for row, o in zip(self.direction, self.origin_mm, strict=True)
        )
        return cx, cy, cz


@dataclass(frozen=True)
class _Tissue:
    """What a structure is painted with.

    Attributes
    ----------
    hu : (arterial, portal, delayed)
    labels : dict of str to int
        Number in each task's truth; a task that is not named sees background.
    """

    hu: tuple[float, float, float]
    labels: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class _Canvas:
    """Images and masks under construction; later structures cover earlier ones.

    Attributes
    ----------
    grid : _Grid
    hu : ndarray, shape (3, z, y, x), float32
        The three phases.
    labels : dict of str to ndarray, shape (z, y, x), uint8
        The truth of each task.
    """

    grid: _Grid
    hu: Array
    labels: dict[str, NDArray[np.uint8]]

    @classmethod
    def blank(cls, grid: _Grid) -> _Canvas:
        """Nothing but air."""
        return cls(
            grid,
            np.full((len(PHASES), *grid.shape), -1000, np.float32),
            {task: np.zeros(grid.shape, np.uint8) for task in TASKS},
        )

    def paint(self, solids: Sequence[_Solid], tissue: _Tissue, within: Distance | None = None) -> None:
        """Paint the union of `solids`, cut to the inside of `within`.

        The images get the tissue in proportion to the part of each voxel it covers, the masks where it covers the centre.
        """
        whole = self.grid.box(np.min([s.low for s in solids], axis=0), np.max([s.high for s in solids], axis=0))
        gap = np.full([s.stop - s.start for s in whole], _FAR, np.float32)
        if gap.size == 0:
            return
        for solid in solids:
            box = self.grid.box(solid.low, solid.high)
            local = gap[tuple(slice(b.start - w.start, b.stop - w.start) for b, w in zip(box, whole, strict=True))]
            np.minimum(local, solid.distance(*self.grid.coordinates(box)), out=local)
        if within is not None:
            np.maximum(gap, within(*self.grid.coordinates(whole)), out=gap)
        coverage = np.clip(np.float32(0.5) - gap / np.float32(self.grid.voxel_mm), 0, 1)
        for phase, value in zip(self.hu, tissue.hu, strict=True):
            phase[whole] += coverage * (np.float32(value) - phase[whole])
        inside = gap <= 0
        for task, labels in self.labels.items():
            labels[whole][inside] = tissue.labels.get(task, 0)


# --- the anatomy ------------------------------------------------------------------------------------------------------


def _paint_anatomy(canvas: _Canvas, rng: np.random.Generator) -> str:
    """Paint the whole patient; returns the lesions in words."""
    cavity = _paint_body(canvas, rng)
    _paint_chest_and_bowel(canvas, rng, cavity)
    _paint_organs(canvas, rng, cavity)
    _paint_skeleton(canvas, rng)
    bladder = np.array([rng.normal(0, 3), -28 + rng.normal(0, 3), -120 + rng.normal(0, 3)])
    kidneys = [_Kidney.draw(rng, side) for side in (-1, 1)]
    for kidney in kidneys:
        _paint_kidney(canvas, rng, kidney, cavity)
    lesions = _paint_lesions(canvas, rng, kidneys, cavity)
    for kidney in kidneys:
        _paint_urinary_tract(canvas, rng, kidney, bladder)
    _paint_bladder(canvas, rng, bladder)
    _paint_vessels(canvas, rng, kidneys)
    return lesions


def _vary(rng: np.random.Generator, *hu: float, **labels: int) -> _Tissue:
    """Tissue of roughly these HU in the three phases; one factor for all, so that the order of the phases stays."""
    factor = rng.uniform(0.9, 1.1)
    return _Tissue((hu[0] * factor, hu[1] * factor, hu[2] * factor), labels)


def _paint_body(canvas: _Canvas, rng: np.random.Generator) -> Distance:
    """Paint skin fat, the muscular wall and the fat inside; returns the distance to the wall's inside."""
    width, depth = 150 + rng.normal(0, 4), 103 + rng.normal(0, 3)
    fat, wall = rng.uniform(12, 22), rng.uniform(9, 13)
    waist, height = rng.uniform(0.0, 0.06), rng.uniform(-60, 0)

    def skin(x: Array, y: Array, z: Array) -> Array:
        narrow = 1 - np.float32(waist) * np.exp(-(((z - np.float32(height)) / 60) ** 2))
        k0 = np.sqrt((x / (np.float32(width) * narrow)) ** 2 + (y / (np.float32(depth) * narrow)) ** 2 + np.float32(1e-12))
        k1 = np.sqrt((x / np.float32(width**2)) ** 2 + (y / np.float32(depth**2)) ** 2 + np.float32(1e-12))
        return np.asarray(k0 * (k0 - 1) / k1)

    endless = np.full(3, 1e3)

    def inset(mm: float) -> _Solid:
        return _Solid(lambda x, y, z: skin(x, y, z) + np.float32(mm), -endless, endless)

    muscle = _vary(rng, 52, 62, 60)
    canvas.paint([inset(0)], _Tissue((-105, -103, -104)))
    canvas.paint([inset(fat)], muscle)
    cavity = inset(fat + wall)
    canvas.paint([cavity], _Tissue((-100, -98, -99)))
    for side in (-1, 1):
        erector = _tube([(side * 34, 70, -170), (side * 33, 66, 0), (side * 32, 68, 170)], (24, 22, 18), 40)
        psoas = _tube(
            [(side * 27, 46, 40), (side * 36, 42, -30), (side * 52, 34, -100), (side * 66, 20, -170)], (7, 14, 18, 16), 12
        )
        canvas.paint(erector + psoas, muscle, within=inset(fat).distance)
    return cavity.distance


def _paint_chest_and_bowel(canvas: _Canvas, rng: np.random.Generator, cavity: Distance) -> None:
    """Paint lung bases, heart, stomach and bowel loops with gas above fluid."""
    for side in (-1, 1):
        lung = _ellipsoid((side * 62, 8, 178 + rng.normal(0, 5)), (62, 58, 62))
        canvas.paint([lung], _Tissue((-850, -850, -850)), within=cavity)
    heart = _ellipsoid((18, -30, 170), (45, 40, 32 + rng.normal(0, 3)))
    canvas.paint([heart], _vary(rng, 150, 130, 110), within=cavity)

    wall = _vary(rng, 60, 85, 75)
    centres = [(48.0, -28.0, 86.0)]
    radii = [(38.0, 26.0, 30.0)]
    for side in (-1, 1):  # the ascending and descending colon
        for z in np.arange(-90, 40, 26):
            centres.append((side * (92 + rng.normal(0, 4)), 5 + rng.normal(0, 6), z + rng.normal(0, 4)))
            radii.append((17.0, 18.0, 17.0))
    for _ in range(int(rng.integers(14, 24))):  # small bowel and transverse colon, in front
        centres.append((rng.uniform(-75, 75), rng.uniform(-62, -28), rng.uniform(-95, 55)))
        radii.append(tuple(rng.uniform(9, 20, 3)))
    for centre, size in zip(centres, radii, strict=True):
        axes = _rotation(rng.uniform(-40, 40, 3))
        content = float(rng.uniform(5, 35))
        lumen = _ellipsoid(centre, np.subtract(size, 2.5), axes)
        canvas.paint([_ellipsoid(centre, size, axes)], wall, within=cavity)
        canvas.paint([lumen], _Tissue((content, content, content)), within=cavity)
        if rng.random() < 0.55:  # patients lie on their back: gas rises to the front (-y)
            level = np.float32(centre[1] + rng.uniform(-0.6, 0.3) * size[1])
            canvas.paint([lumen], _Tissue((-900, -900, -900)), within=lambda _x, y, _z, level=level: y - level)  # type: ignore[misc]


def _paint_organs(canvas: _Canvas, rng: np.random.Generator, cavity: Distance) -> None:
    """Paint liver, spleen and pancreas, a few millimetres inside the abdominal wall."""

    def inside(x: Array, y: Array, z: Array) -> Array:
        return cavity(x, y, z) + np.float32(2)

    jitter = rng.normal(0, 3, (3, 3))
    size = rng.uniform(0.92, 1.08, 3)
    liver = [
        _ellipsoid(jitter[0] + (-64, -10, 88), size[0] * np.array([58, 62, 62]), ripple=_ripple(rng, 4, 90)),
        _ellipsoid(jitter[0] + (-4, -42, 104), size[0] * np.array([62, 24, 36]), _rotation((0, 12, 0)), _ripple(rng, 3, 70)),
    ]
    spleen = _ellipsoid(
        jitter[1] + (86, 24, 98), size[1] * np.array([23, 36, 46]), _rotation((20, 8, -15)), _ripple(rng, 3, 60)
    )
    pancreas = _tube(jitter[2] * 0.5 + np.array([(-32, -8, 36), (-10, -20, 44), (22, -18, 56), (56, 0, 72)]), (12, 8, 8, 6))
    canvas.paint(liver, _vary(rng, 78, 112, 96, organs=LIVER), within=inside)
    canvas.paint([spleen], _vary(rng, 130, 122, 104, organs=SPLEEN), within=inside)
    canvas.paint(pancreas, _vary(rng, 105, 90, 75), within=inside)


def _paint_skeleton(canvas: _Canvas, rng: np.random.Generator) -> None:
    """Paint the spine with discs and canal, ribs and the wings of the pelvis."""
    bone, shell, disc = _vary(rng, 190, 190, 190), _vary(rng, 430, 430, 430), _Tissue((85, 88, 88))
    for z in np.arange(-170, 190, 34) + rng.uniform(-8, 8):
        body = [_capsule(np.array([0, 47, z - 9]), np.array([0, 47, z + 9]), 19, 19)]
        canvas.paint(_tube([(0, 47, z + 9), (0, 47, z + 25)], (17, 17), 20), disc)
        canvas.paint(body, shell, within=lambda _x, _y, h, z=z: np.abs(h - np.float32(z)) - 12)  # type: ignore[misc]
        core = [_capsule(np.array([0, 47, z - 9]), np.array([0, 47, z + 9]), 16.5, 16.5)]
        canvas.paint(core, bone, within=lambda _x, _y, h, z=z: np.abs(h - np.float32(z)) - 10)  # type: ignore[misc]
        arch = [*_tube([(0, 78, z), (0, 92, z - 8)], (4, 3)), *_tube([(-36, 66, z), (0, 76, z), (36, 66, z)], (3, 5, 3), 20)]
        canvas.paint(arch, shell)
    canvas.paint(_tube([(0, 71, -175), (0, 71, 180)], (8, 8), 400), _Tissue((35, 35, 35)))
    for side in (-1, 1):
        for z in np.arange(52, 190, 26) + rng.uniform(-5, 5):
            angles = np.deg2rad(np.arange(60, -41, -20))  # from beside the spine to the front
            ring = [(side * 124 * np.cos(a), 4 + 78 * np.sin(a), z + 22 * np.sin(a)) for a in angles]
            canvas.paint(_tube(ring, [4.5] * len(ring), 15), shell)
        wing = _ellipsoid((side * 86, 34, -150), (9, 44, 46), _rotation((0, side * 24, side * -28)))
        inner = _ellipsoid((side * 86, 34, -150), (6, 41, 43), _rotation((0, side * 24, side * -28)))
        canvas.paint([wing], shell)
        canvas.paint([inner], bone)


@dataclass(frozen=True)
class _Kidney:
    """Pose and size of a kidney.

    Attributes
    ----------
    side : int
        -1 right, 1 left: the sign of x.
    centre : ndarray, shape (3,)
    axes : ndarray, shape (3, 3)
        Columns: lateral, posterior and superior axis of the kidney.
    radii : ndarray, shape (3,)
    """

    side: int
    centre: Point
    axes: NDArray[np.float64]
    radii: Point

    @classmethod
    def draw(cls, rng: np.random.Generator, side: int) -> _Kidney:
        """Draw a kidney; the right one lies a little lower, the upper poles lean towards the spine."""
        centre = np.array([side * 64, 30, 22 if side < 0 else 30]) + rng.normal(0, 2.5, 3)
        axes = _rotation((rng.normal(0, 5), -side * rng.uniform(6, 14), side * rng.normal(0, 6)))
        axes[:, 0] *= side
        return cls(side, centre, axes, np.array([26, 24, 50]) * rng.uniform(0.92, 1.08, 3))

    def at(self, lateral: float, posterior: float, superior: float) -> Point:
        """Position (x, y, z) in mm of a point given as fractions of the radii along the kidney's own axes."""
        return np.asarray(self.centre + self.axes @ (np.array([lateral, posterior, superior]) * self.radii))

    def hilum(self) -> Point:
        """Where the vessels enter and the pelvis leaves."""
        return self.at(-1.0, -0.05, 0.0)

    @property
    def label(self) -> int:
        """Number of this kidney in the label table."""
        return KIDNEY_RIGHT if self.side < 0 else KIDNEY_LEFT


def _paint_kidney(canvas: _Canvas, rng: np.random.Generator, kidney: _Kidney, cavity: Distance) -> None:
    """Paint the fat around a kidney, cortex, medullary pyramids and the fat of the sinus."""
    labels = {"organs": kidney.label, "tumor": KIDNEY}
    fat = _Tissue((-95, -95, -95))
    bumps = _ripple(rng, 1.5, 45)
    canvas.paint([_ellipsoid(kidney.centre, kidney.radii + rng.uniform(4, 8), kidney.axes)], fat, within=cavity)
    canvas.paint([_ellipsoid(kidney.centre, kidney.radii, kidney.axes, bumps)], _vary(rng, 195, 172, 145, **labels))
    medulla = _vary(rng, 75, 150, 142, **labels)
    pyramids = [
        _ellipsoid(kidney.at(0.55 * np.cos(a), b, 0.62 * np.sin(a)), (7, 6, 7), kidney.axes)
        for a in np.deg2rad([-75, -40, 0, 40, 75])
        for b in (-0.32, 0.32)
    ]
    canvas.paint(pyramids, medulla)
    canvas.paint([_ellipsoid(kidney.at(-0.55, 0, 0), (0.62, 0.42, 0.5) * kidney.radii, kidney.axes)], fat)


def _paint_lesions(canvas: _Canvas, rng: np.random.Generator, kidneys: Sequence[_Kidney], cavity: Distance) -> str:
    """Paint a tumor in four patients of five and a cyst in every second, each at a pole of its own; returns them in words."""
    poles = [(kidney, sign) for kidney in kidneys for sign in (-1, 1)]
    tumor_pole, cyst_pole = (poles[i] for i in rng.permutation(len(poles))[:2])
    # Everything is drawn whether or not it is painted, so that the rest of the anatomy does not depend on it.
    has_tumor, has_cyst = rng.random() < 0.8, rng.random() < 0.5
    spots = rng.uniform((0.35, -0.35, 0.3), (0.85, 0.35, 0.7), (2, 3))
    tumor_mm, cyst_mm = rng.uniform(10, 21), rng.uniform(8, 16)
    shape, necrosis = rng.uniform(0.85, 1.15, 3), rng.uniform(0.35, 0.6)
    bumps = _ripple(rng, 1.8, 26)
    tissues = _vary(rng, 118, 98, 78), _vary(rng, 45, 42, 40), _vary(rng, 8, 8, 9)
    words = []

    def place(pole: tuple[_Kidney, int], spot: Point) -> tuple[_Kidney, Point]:
        kidney, sign = pole
        return kidney, kidney.at(spot[0], spot[1], sign * spot[2])

    def side(kidney: _Kidney) -> str:
        return "right" if kidney.side < 0 else "left"

    if has_tumor:
        kidney, centre = place(tumor_pole, spots[0])
        labels = {"organs": kidney.label, "tumor": TUMOR}
        canvas.paint([_ellipsoid(centre, tumor_mm * shape, kidney.axes, bumps)], _Tissue(tissues[0].hu, labels), within=cavity)
        core = _ellipsoid(centre, necrosis * tumor_mm * shape, kidney.axes, bumps)
        canvas.paint([core], _Tissue(tissues[1].hu, labels), within=cavity)
        words.append(f"a tumor of {2 * tumor_mm:.0f} mm in the {side(kidney)} kidney")
    if has_cyst:
        kidney, centre = place(cyst_pole, spots[1])
        labels = {"organs": kidney.label, "tumor": CYST}
        canvas.paint([_ellipsoid(centre, (cyst_mm,) * 3)], _Tissue(tissues[2].hu, labels), within=cavity)
        words.append(f"a cyst of {2 * cyst_mm:.0f} mm in the {side(kidney)} kidney")
    return " and ".join(words) or "no lesion"


def _paint_urinary_tract(canvas: _Canvas, rng: np.random.Generator, kidney: _Kidney, bladder: Point) -> None:
    """Paint calyces, renal pelvis and the ureter down to the bladder; contrast has reached them in the delayed phase."""
    urine = rng.uniform(350, 750)
    mid, exit_ = kidney.at(-0.5, 0.05, -0.02), kidney.at(-1.0, 0.12, -0.2)
    calyces = [s for z in (-0.42, 0.0, 0.42) for s in _tube([mid, kidney.at(-0.2, 0.02, z)], (3.5, 3.0))]
    canvas.paint(_tube([mid, exit_], (7.5, 4.5)) + calyces, _Tissue((10, 18, urine)))

    s, wander = kidney.side, rng.normal(0, 2, (3, 2))
    width = rng.uniform(2.4, 3.0)
    course: Points = [
        exit_,
        (s * (37 + wander[0, 0]), 24 + wander[0, 1], -28),
        (s * (37 + wander[1, 0]), 10 + wander[1, 1], -62),
        (s * (31 + wander[2, 0]), -1 + wander[2, 1], -85),  # in front of the iliac vessels, which it crosses here
        (s * 21, 0, -102),
        (s * 20, 5, -116),
        np.add(bladder, (s * 14, 21, -10)),
        np.add(bladder, (s * 6, 3, -8)),
    ]
    canvas.paint(_tube(course, [3.2] + [width] * (len(course) - 1)), _Tissue((12, 18, urine * 0.9), {"ureters": URETER}))


def _paint_bladder(canvas: _Canvas, rng: np.random.Generator, centre: Point) -> None:
    """Paint the bladder, wall included in its label; it covers the ends of the ureters."""
    radii = np.array([36, 28, 28]) * rng.uniform(0.85, 1.1, 3)
    canvas.paint([_ellipsoid(centre, radii)], _vary(rng, 35, 45, 45, organs=BLADDER))
    canvas.paint([_ellipsoid(centre, radii - 2.5)], _vary(rng, 6, 8, 260, organs=BLADDER))


def _paint_vessels(canvas: _Canvas, rng: np.random.Generator, kidneys: Sequence[_Kidney]) -> None:
    """Paint vena cava and aorta with their renal, visceral and iliac branches; arteries cover veins where they touch."""
    arterial = rng.uniform(300, 400)
    artery = (arterial, rng.uniform(140, 175), rng.uniform(105, 130))
    vein_hu = (rng.uniform(80, 130), rng.uniform(165, 200), rng.uniform(115, 135))
    ax, ay = 8 + rng.normal(0, 1.5), 15 + rng.normal(0, 1)
    vx, vy = -17 + rng.normal(0, 1.5), 16 + rng.normal(0, 1)
    aorta_mm, cava_mm = rng.uniform(8.5, 10.5), rng.uniform(9.5, 11.0)
    level = 24 + rng.normal(0, 3)  # of the renal veins

    veins = [
        *_tube([(vx + 3, vy + 2, -66), (-26, 20, -100), (-54, 6, -175)], (7.5, 6.5, 6)),
        *_tube([(vx + 3, vy + 2, -66), (12, 26, -90), (34, 20, -115), (58, 8, -175)], (7.5, 6.5, 6.5, 6)),
    ]
    for kidney in kidneys:
        hilum, inner = kidney.at(-1.05, -0.2, 0.0), kidney.at(-0.6, -0.12, 0.0)
        thick = rng.uniform(3.8, 4.6)
        if kidney.side < 0:
            trunk: Points = [(vx, vy, level), (vx - 12, vy - 1, level), hilum, inner]
        else:  # in front of the aorta, behind the superior mesenteric artery
            trunk = [(vx, vy - 4, level), (ax - 6, ay - aorta_mm - 5, level), (ax + 10, ay - aorta_mm - 2, level), hilum, inner]
        veins += _tube(trunk, [thick] * (len(trunk) - 1) + [thick * 0.8])
        for up in (-1, 1):
            tips = [inner, kidney.at(-0.42, -0.2, up * 0.22), kidney.at(-0.2, -0.25, up * 0.4)]
            veins += _tube(tips, (2.8, 2.4, 2.0))
    canvas.paint(veins, _Tissue(vein_hu, {"vessels": VEIN}))
    cava = _tube(
        [(vx + 3, vy + 2, -66), (vx, vy, -20), (vx, vy, 60), (vx - 4, vy - 8, 120), (vx - 2, vy - 14, 180)], [cava_mm] * 5
    )
    canvas.paint(cava, _Tissue(vein_hu, {"vessels": VEIN, "organs": VENA_CAVA}))

    arteries = [
        *_tube([(ax, ay, -56), (-22, 10, -95), (-54, -8, -175)], (6, 5.5, 5)),
        *_tube([(ax, ay, -56), (28, 10, -95), (56, -8, -175)], (6, 5.5, 5)),
        *_tube([(ax, ay - 6, 50), (ax - 1, ay - 26, 38), (ax - 3, ay - 30, 0), (ax - 5, ay - 34, -45)], (3.4, 3.4, 3.0, 2.4)),
        *_tube([(ax, ay - 6, 64), (ax - 2, ay - 24, 70), (-22, -18, 76), (-40, -16, 84)], (3.2, 3.0, 2.6, 2.2)),
        *_tube([(ax - 2, ay - 24, 70), (28, -6, 76), (52, 8, 84), (68, 18, 92)], (3.0, 2.8, 2.6, 2.2)),
    ]
    for kidney in kidneys:
        arteries += _renal_artery(rng, kidney, np.array([ax, ay, level + 8]), vx, aorta_mm)
    canvas.paint(arteries, _Tissue(artery, {"vessels": ARTERY}))
    aorta = _tube([(ax, ay, -56), (ax, ay, 60), (ax - 2, ay + 4, 180)], (aorta_mm * 0.85, aorta_mm, aorta_mm * 1.1))
    canvas.paint(aorta, _Tissue(artery, {"vessels": ARTERY, "organs": AORTA}))


def _renal_artery(rng: np.random.Generator, kidney: _Kidney, root: Point, cava_x: float, aorta_mm: float) -> list[_Solid]:
    """Renal artery from the aorta's axis at `root`, behind the vena cava on the right, with two generations of branches."""
    hilum = kidney.at(-1.05, 0.12, 0.08)
    thick = rng.uniform(2.8, 3.4)
    if kidney.side < 0:
        course: Points = [
            root,
            np.add(root, (-aorta_mm - 2, 12, -2)),
            (cava_x, root[1] + 17, root[2] - 4),
            (cava_x - 15, root[1] + 13, root[2] - 6),
            hilum,
        ]
    else:
        course = [root, np.add(root, (aorta_mm + 6, 8, -2)), hilum]
    solids = _tube(course, [thick] * (len(course) - 1) + [thick * 0.9])
    for posterior, superior in ((-0.22, 0.34), (0.2, 0.0), (-0.05, -0.36)):
        aim = kidney.at(-0.55, posterior + rng.normal(0, 0.03), superior + rng.normal(0, 0.03))
        solids += _tube([hilum, aim], (2.4, 2.0))
        for up in (-1, 1):
            tip = kidney.at(-0.02 + rng.normal(0, 0.04), posterior * 1.7, superior * 1.3 + up * 0.16)
            solids += _tube([aim, (aim + tip) / 2 + (0, 0, up * 1.5), tip], (1.9, 1.7, 1.5))
    return solids
