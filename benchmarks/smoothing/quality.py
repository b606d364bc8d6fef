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

_SHAPES = ("sphere 25", "sphere 25, 3 mm slices", "tube 5", "tube 2", "tube 1.2")


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


def _mesh(way: Way, shape: Tube, spacing_mm: tuple[float, float, float], part: float) -> Mesh:
    mask = shape.mask(spacing_mm)
    wanted = 0 if part == 1 else round(part * len(WAYS["ours"](mask, spacing_mm, 0)[1][1]))
    return way(mask, spacing_mm, wanted)[1]


def main() -> None:
    """Print a table."""
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
                degrees, distance, _, crossed, open_ = found.mean(axis=0)
                low, high = 100 * found[:, 2].min(), 100 * found[:, 2].max()
                broken = f" · {open_:.0f} open" if open_ else ""
                cells.append(f"{degrees:.2f}° · {distance:.3f} · {low:+.1f} … {high:+.1f} % · {crossed:.1f}{broken}")
            print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
