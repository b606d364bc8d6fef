"""How true surfaces are, on shapes that are known exactly: `python -m benchmarks.smoothing.quality`.

For each way, with all triangles and with a fifth of them: the mean angle between vertex normals and the shape's, the mean
distance of the vertices from the shape, the volume against the shape's, and how many pairs of triangles cut through each other.
"""

from __future__ import annotations

import argparse

import numpy as np
from numpy.typing import NDArray

from benchmarks.smoothing.cases import THICK, THIN, Tube, sphere, tube
from benchmarks.smoothing.ways import WAYS, Mesh, Way
from deployments.smoothing.fairing import vertex_normals
from deployments.smoothing.measuring import crossings, open_edges

#: So far from the cut the outer surface is judged: nearer there is a junction.
_AWAY_MM = 2.0


def shapes(count: int) -> dict[str, list[tuple[Tube, tuple[float, float, float]]]]:
    """Return the shapes in random places and directions."""
    random = np.random.default_rng(1)
    found: dict[str, list[tuple[Tube, tuple[float, float, float]]]] = {
        "sphere 25": [(sphere(25, random), THIN) for _ in range(2)],
        "sphere 25, 3 mm slices": [(sphere(25, random), THICK) for _ in range(2)],
    }
    for radius in (5.0, 2.0, 1.2):
        found[f"tube {radius:g}"] = [(tube(radius, random), THIN) for _ in range(count)]
    return found


def judge(mesh: Mesh, shape: Tube) -> NDArray[np.float64]:
    """Return mean normal deviation (degrees), mean distance (mm), volume error (parts), crossings, open edges."""
    vertices, faces = mesh
    points = vertices.astype(np.float64)
    normals = vertex_normals(vertices, np.empty((0, 4), np.int32), np.ascontiguousarray(faces))
    cosine = np.clip((normals * shape.normals(points)).sum(axis=1), -1, 1)
    a, b, c = (points[faces[:, k]] - points.mean(axis=0) for k in range(3))
    volume = float(np.einsum("ij,ij->", a, np.cross(b, c))) / 6
    return np.array(
        [
            np.degrees(np.arccos(cosine)).mean(),
            np.abs(shape.distance(points)).mean(),
            volume / shape.volume_mm3 - 1,
            crossings(vertices, faces),
            open_edges(faces),
        ]
    )


def judge_halves(meshes: dict[int, Mesh], shape: Tube, cut: float) -> NDArray[np.float64]:
    """The same for a shape whose halves are two labels: of the outer surface, away from the cut, and of both volumes."""
    cosines, distances, volume, crossed, open_ = [], [], 0.0, 0, 0
    for vertices, faces in meshes.values():
        points = vertices.astype(np.float64)
        normals = vertex_normals(vertices, np.empty((0, 4), np.int32), np.ascontiguousarray(faces))
        away = np.abs(points[:, 2] - cut) > _AWAY_MM
        cosines.append((normals * shape.normals(points)).sum(axis=1)[away])
        distances.append(shape.distance(points)[away])
        a, b, c = (points[faces[:, k]] - points.mean(axis=0) for k in range(3))
        volume += float(np.einsum("ij,ij->", a, np.cross(b, c))) / 6
        crossed += crossings(vertices, faces)
        open_ += open_edges(faces)
    degrees = np.degrees(np.arccos(np.clip(np.concatenate(cosines), -1, 1))).mean()
    return np.array([degrees, np.abs(np.concatenate(distances)).mean(), volume / shape.volume_mm3 - 1, crossed, open_])


def halves(shape: Tube, spacing_mm: tuple[float, float, float]) -> tuple[NDArray[np.uint8], float]:
    """Return the shape's mask with label 2 above its middle, and where the two meet (z, mm)."""
    mask = shape.mask(spacing_mm)
    planes = np.flatnonzero(mask.any(axis=(1, 2)))
    middle = int(planes.mean().round())
    upper = mask[middle:]
    upper[upper > 0] = 2
    return mask, (middle - 0.5) * spacing_mm[0]


def _mesh(way: Way, shape: Tube, spacing_mm: tuple[float, float, float], part: float) -> Mesh:
    mask = shape.mask(spacing_mm)
    wanted = 0 if part == 1 else round(part * len(WAYS["ours"](mask, spacing_mm, 0)[1][1]))
    return way(mask, spacing_mm, wanted)[1]


def _cell(found: NDArray[np.float64]) -> str:
    degrees, distance, _, crossed, open_ = found.mean(axis=0)
    low, high = 100 * found[:, 2].min(), 100 * found[:, 2].max()
    broken = f" · {open_:.0f} open" if open_ else ""
    return f"{degrees:.2f}° · {distance:.3f} · {low:+.1f} … {high:+.1f} % · {crossed:.1f}{broken}"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=20, help="tubes of each radius")
    arguments = parser.parse_args()
    cases = shapes(arguments.count)
    print("degrees · mm · volume (least … most) · crossings; of", arguments.count, "tubes of each radius")
    for part in (1.0, 0.2):
        print(
            f"\n| {'all triangles' if part == 1 else 'a fifth of them'} | {' | '.join(cases)} |\n|{'---|' * (len(cases) + 1)}"
        )
        for name, way in WAYS.items():
            cells = []
            for of_kind in cases.values():
                found = np.array([judge(_mesh(way, s, spacing, part), s) for s, spacing in of_kind])
                cells.append(_cell(found))
            print(f"| {name} | {' | '.join(cells)} |", flush=True)
    print(f"\n| in two halves | {' | '.join(cases)} |\n|{'---|' * (len(cases) + 1)}")
    for name in ("ours", "ours, joint"):
        cells = []
        for of_kind in cases.values():
            cut = [(halves(s, spacing), s, spacing) for s, spacing in of_kind]
            found = np.array([judge_halves(WAYS[name](m, spacing, 0), s, z) for (m, z), s, spacing in cut])
            cells.append(_cell(found))
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
