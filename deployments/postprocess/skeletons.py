"""Centrelines as a graph for programs and as lines for people."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from deployments.postprocess import masks
from deployments.postprocess.centrelines import Centrelines, find_voxels, trace
from deployments.postprocess.graphs import Graph, pick_backend
from scangraph.contracts import LabelMap, Scene
from scangraph.contracts.scenes import Line

#: What is tubular; the default.
TUBULAR = (52, 53, 54, 55, 56, 57, 58, 59, 60, 62, 63, 64, 65, 66, 67, 68, 204, 205, 206)


@dataclass(frozen=True)
class Skeleton:
    """A graph as JSON, and as lines."""

    report: bytes
    scene: Scene
    facts: dict[str, Any]
    warnings: list[str]


def skeletonize(
    mask: LabelMap,
    *,
    structures: Sequence[int] | None = None,
    min_mm3: float = 6.0,
    backend: Literal["auto", "scipy", "cugraph"] = "auto",
    on_progress: masks.Report = masks.silent,
) -> Skeleton:
    """Trace the centrelines of tubular structures.

    Parameters
    ----------
    structures : sequence of int, optional
        Label numbers; all tubular ones that occur if not given.
    min_mm3 : float
        Smaller pieces are left out.
    backend : str
        Who works on the graphs; see `graphs.pick_backend`.

    Returns
    -------
    Skeleton
        `report` is JSON: by structure `nodes` (LPS mm, radius, kind: end or fork, tree) and `edges` (two nodes, length,
        tortuosity as length over distance, mean and least radius, points). `scene` has one line set a structure.

    Raises
    ------
    UnknownLabels, LabelsMissing
    """
    found = masks.occurring(mask)
    if structures is None:
        masks.require("postprocess/skeleton", mask, TUBULAR, found, any_of=True)
        structures = [n for n in TUBULAR if n in found]
    else:
        masks.require("postprocess/skeleton", mask, structures, found)
    turned = mask.reoriented("LPS")
    entries, lines, totals = [], [], {}
    warnings: list[str] = []
    for done, number in enumerate(structures):
        label = mask.label(number)
        on_progress(done, len(structures), label.title)
        voxels = find_voxels(turned.array, (number,), turned.spacing_mm)
        chosen = pick_backend(len(voxels.index), backend)
        traced = trace(voxels, np.flatnonzero(voxels.volumes_mm3 >= min_mm3), chosen)
        entry = describe(traced, turned)
        entries.append({"label": number, "name": label.name, **entry})
        totals[str(number)] = {
            "trees": entry["trees"],
            "nodes": len(entry["nodes"]),
            "edges": len(entry["edges"]),
            "length_mm": round(sum(e["length_mm"] for e in entry["edges"]), 1),
        }
        points = _world(turned, traced.position_mm)
        ends = np.concatenate([np.column_stack([c[:-1], c[1:]]) for c in traced.chains]) if traced.chains else np.empty((0, 2))
        lines.append(Line(label.name, number, label.color, points.astype(np.float32), ends.astype(np.int32)))
        if not traced.chains:
            warnings.append(f"{label.title}: no piece is long enough for a centreline.")
    on_progress(len(structures), len(structures), "done")
    report = json.dumps({"frame": "LPS", "unit": "mm", "structures": entries}, separators=(",", ":")).encode()
    return Skeleton(report, Scene((), "LPS", ("centrelines",), lines=tuple(lines)), {"structures": totals}, warnings)


def describe(traced: Centrelines, turned: LabelMap) -> dict[str, Any]:
    """Return nodes and edges as plain values."""
    points = _world(turned, traced.position_mm)
    at = np.flatnonzero(traced.degree > 0)
    number = {int(vertex): n for n, vertex in enumerate(at)}
    pairs = np.array([[number[int(c[0])], number[int(c[-1])]] for c in traced.chains], np.int64).reshape(-1, 2)
    graph = Graph.from_edges(len(at), pairs, np.array([float(s[-1]) for s in traced.steps_mm]))
    trees = pick_backend(graph.nodes).components(graph) if len(at) else np.empty(0, np.int64)
    nodes = [
        {
            "id": n,
            "position_mm": [round(float(v), 3) for v in points[vertex]],
            "radius_mm": round(float(traced.radius_mm[vertex]), 3),
            "kind": "end" if traced.degree[vertex] == 1 else "fork",
            "tree": int(trees[n]),
        }
        for n, vertex in enumerate(at)
    ]
    edges = []
    for chain, steps, (a, b) in zip(traced.chains, traced.steps_mm, pairs.tolist(), strict=True):
        straight = float(np.linalg.norm(traced.position_mm[chain[-1]] - traced.position_mm[chain[0]]))
        edges.append(
            {
                "nodes": [a, b],
                "length_mm": round(float(steps[-1]), 3),
                "tortuosity": round(float(steps[-1]) / straight, 4) if straight > 0 else None,
                "radius_mm": round(float(traced.radius_mm[chain].mean()), 3),
                "least_radius_mm": round(float(traced.radius_mm[chain].min()), 3),
                "points_mm": np.round(points[chain], 2).tolist(),
                "radii_mm": np.round(traced.radius_mm[chain], 2).tolist(),
            }
        )
    return {"trees": int(trees.max()) + 1 if len(trees) else 0, "nodes": nodes, "edges": edges}


def _world(turned: LabelMap, position_mm: Any) -> Any:
    return turned.index_to_world(position_mm / np.asarray(turned.spacing_mm))
