"""The surface stage."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from typing import Any

from deployments.smoothing.components import BASE, PREVIEW, PreviewParameters, SmoothParameters
from scangraph.contracts import SceneFiles
from scangraph.settings import SmoothingSettings
from scangraph.stage import Report, Stage, StepOutput


class Smoothing(Stage):
    """Masks to surfaces, and pictures of them."""

    def __init__(self, settings: SmoothingSettings) -> None:
        from deployments.smoothing import distances, preview, screens, surfaces, warming

        self._surfaces, self._preview, self._screens = surfaces, preview, screens
        self._threads = settings.threads or len(os.sched_getaffinity(0))
        self._distance = distances.open3d_distances() if settings.open3d else distances.distances_to_surface
        super().__init__({BASE: self._smooth, PREVIEW: self._draw})
        # The first request need not wait for the compiler, nor the start for it.
        threading.Thread(target=warming.compile_kernels, name="compile", daemon=True).start()

    def _smooth(self, inputs: Mapping[str, Any], parameters: SmoothParameters, report: Report) -> StepOutput:
        files = SceneFiles(parameters.formats, parameters.per_structure, parameters.zipped, parameters.glb_unit)
        chosen = parameters.model_dump(exclude={"formats", "per_structure", "zipped", "glb_unit"})
        options = self._surfaces.Options(**chosen, files=files, workers=self._threads, surface_distance=self._distance)
        scene, warnings = self._surfaces.label_map_to_scene(inputs["mask"], options, report)
        finest = [surface for surface in scene.surfaces if surface.level == 0]
        facts = {"structures": len(finest), "triangles": sum(len(surface.faces) for surface in finest)}
        return StepOutput((self._screens.with_screen(scene, workers=self._threads),), tuple(warnings), facts)

    def _draw(self, inputs: Mapping[str, Any], parameters: PreviewParameters, report: Report) -> StepOutput:
        report(0, 1, "drawing")
        picture, warnings = self._preview.render_preview(
            inputs["scene"], inputs.get("image"), inputs.get("mask"), title=parameters.title
        )
        return StepOutput((picture,), tuple(warnings))
