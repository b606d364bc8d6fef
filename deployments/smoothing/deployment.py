"""The surface stage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deployments.smoothing.components import BASE, PREVIEW, PreviewParameters, SmoothParameters
from scangraph.stage import Report, Stage, StepOutput


class Smoothing(Stage):
    """Masks to surfaces, and pictures of them."""

    def __init__(self) -> None:
        from deployments.smoothing import preview, surfaces

        self._surfaces, self._preview = surfaces, preview
        super().__init__({BASE: self._smooth, PREVIEW: self._draw})

    def _smooth(self, inputs: Mapping[str, Any], parameters: SmoothParameters, report: Report) -> StepOutput:
        scene, warnings = self._surfaces.label_map_to_scene(
            inputs["mask"],
            structures=parameters.structures,
            smoothing=parameters.smoothing,
            frame=parameters.frame,
            on_progress=report,
        )
        facts = {"structures": len(scene.surfaces), "triangles": sum(len(s.faces) for s in scene.surfaces)}
        return StepOutput((scene,), tuple(warnings), facts)

    def _draw(self, inputs: Mapping[str, Any], parameters: PreviewParameters, report: Report) -> StepOutput:
        report(0, 1, "drawing")
        picture, warnings = self._preview.render_preview(
            inputs["image"], inputs["mask"], inputs["scene"], title=parameters.title
        )
        return StepOutput((picture,), tuple(warnings))
