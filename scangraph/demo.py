"""The main job from end to end: CT -> organs, vessels, ureters, tumor -> one mask -> a smoothed scene, a picture and a report.

The pipeline is written with the public Python interface, as a user would write it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import scangraph
from scangraph.contracts import LabelMap, Progress, Scene, Volume, label_table
from scangraph.handles import Call, Connection
from scangraph.phantoms import DEMO_SEED, make_phantom
from scangraph.scenefiles import save_scene

#: Step name in the report and on the screen -> file of its mask.
MASKS = ("organs", "vessels", "ureters", "tumor")
_NAMED_TWICE = frozenset({"kidney", "aorta", "inferior_vena_cava"})
StepProgress = Callable[[str, Progress], None]


@dataclass
class Patient:
    """What the demo works on.

    Parameters
    ----------
    name : str
        For titles.
    arterial, portal, delayed : Volume
        The phases; the same volume three times where there is only one.
    truth : dict
        Label maps by step, for a synthetic patient.
    """

    name: str
    arterial: Volume
    portal: Volume
    delayed: Volume
    truth: dict[str, LabelMap] = field(default_factory=dict)

    @property
    def synthetic(self) -> bool:
        """Whether the truth is known."""
        return bool(self.truth)


def synthetic_patient(seed: int = DEMO_SEED) -> Patient:
    """Make the shipped synthetic patient; its seed was not used in training."""
    phantom = make_phantom(seed)
    phases = phantom.volumes
    return Patient(
        f"synthetic patient, seed {seed}", phases["arterial"], phases["portal"], phases["delayed"], dict(phantom.truth)
    )


def one_phase_patient(name: str, image: Volume) -> Patient:
    """Use one CT for every phase; the answers will warn."""
    return Patient(name, image, image, image)


def run_demo(graph: Connection, patient: Patient, out: Path, on_progress: StepProgress) -> dict[str, Any]:
    """Run the whole job and write its results.

    Parameters
    ----------
    graph : Connection
        The running graph.
    patient : Patient
        What to segment.
    out : Path
        Folder for masks, scene, picture and report.
    on_progress : callable
        Called with (step name, Progress), from other threads.

    Returns
    -------
    dict
        The report, as written to `report.json`.
    """
    out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()

    def watch(step: str) -> Callable[[Progress], None]:
        return lambda progress: on_progress(step, progress)

    # One reference a phase: four models read it, nobody copies it.
    arterial, portal, delayed = (graph.put(v) for v in (patient.arterial, patient.portal, patient.delayed))
    calls: dict[str, Call[Any]] = {
        "organs": graph.totalseg(portal, on_progress=watch("organs")),
        "vessels": graph.vessel(arterial, portal, on_progress=watch("vessels")),
        "ureters": graph.ureter(delayed, on_progress=watch("ureters")),
        "tumor": graph.tumor(portal, on_progress=watch("tumor")),
    }
    # The last one wins: vessels and ureters lie over organs, the tumor over everything. What two models name differently is
    # taken once: the kidneys by side from the organs, aorta and vena cava as artery and vein.
    once = [number for number, label in label_table().items() if label.name not in _NAMED_TWICE]
    calls["merged"] = graph.merge([calls[name] for name in MASKS], structures=once, on_progress=watch("merged"))
    calls["vessel-repair"] = graph.repair_vessels(
        calls["merged"], vessels="all", skip_missing=True, on_progress=watch("vessel-repair")
    )
    calls["ureter-repair"] = graph.repair_ureters(calls["vessel-repair"], skip_missing=True, on_progress=watch("ureter-repair"))
    calls["fat"] = graph.fat([calls["ureter-repair"]], portal, skip_missing=True, on_progress=watch("fat"))
    calls["scene"] = graph.smooth(calls["fat"], on_progress=watch("scene"))
    calls["preview"] = graph.preview(
        calls["scene"], portal, calls["fat"], title=f"scangraph · {patient.name}", on_progress=watch("preview")
    )

    masks: dict[str, LabelMap] = {}
    for name in (*MASKS, "merged", "fat"):
        masks[name] = calls[name].result()
        (out / f"{name}.nii.gz").write_bytes(graph.encode(calls[name]))
        on_progress(name, Progress(1, 1, "written"))
    for name in ("vessel-repair", "ureter-repair"):
        calls[name].step()
        on_progress(name, Progress(1, 1, "done"))
    scene: Scene = calls["scene"].result()
    save_scene(scene, out, "scene")
    on_progress("scene", Progress(1, 1, "written"))
    (out / "preview.png").write_bytes(graph.encode(calls["preview"]))
    on_progress("preview", Progress(1, 1, "written"))

    steps = {}
    for name, call in calls.items():
        summary = call.step().summary
        steps[name] = {
            "seconds": summary.seconds,
            "peak_mb": summary.peak_mb,
            "warnings": list(summary.warnings),
            **summary.facts,
        }
    report = {
        "scangraph": scangraph.__version__,
        "notice": "Research use only. Not a medical device.",
        "patient": patient.name,
        "grid": {"shape_zyx": patient.portal.shape, "spacing_mm_zyx": patient.portal.spacing_mm},
        "seconds": round(time.perf_counter() - start, 2),
        "steps": steps,
        "structures": _structures(masks, scene, patient.truth),
    }
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    return report


def _structures(masks: Mapping[str, LabelMap], scene: Scene, truth: Mapping[str, LabelMap]) -> list[dict[str, Any]]:
    """Volumes of every structure, and Dice where the truth is known."""
    table, surfaces = label_table(), {s.label: s for s in scene.surfaces if s.level == 0}
    rows = []
    for step in MASKS:
        counts = masks[step].counts()
        known = truth[step].counts() if step in truth else {}
        for number in sorted(counts.keys() | known.keys()):
            row: dict[str, Any] = {"step": step, "label": number, "name": table[number].name}
            row["volume_ml"] = round(counts.get(number, 0) * masks[step].voxel_volume_mm3 / 1000, 2)
            if step in truth and number in truth[step].labels:
                row["true_volume_ml"] = round(known.get(number, 0) * truth[step].voxel_volume_mm3 / 1000, 2)
                row["dice"] = round(dice(masks[step].array == number, truth[step].array == number), 4)
            if number in surfaces:
                row["surface_volume_ml"] = round(surfaces[number].volume_ml, 2)
            rows.append(row)
    return rows


def dice(found: Any, true: Any) -> float:
    """Dice coefficient of two boolean arrays; 1 where both are empty."""
    total = int(np.count_nonzero(found)) + int(np.count_nonzero(true))
    return 2 * int(np.count_nonzero(found & true)) / total if total else 1.0
