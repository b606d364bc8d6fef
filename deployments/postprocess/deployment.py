"""The mask stage."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from deployments.postprocess.components import (
    CLEAN,
    FAT,
    MERGE,
    SAMPLE,
    SKELETON,
    URETER,
    VESSEL,
    CleanParameters,
    FatParameters,
    MergeParameters,
    SkeletonParameters,
    UreterParameters,
    VesselParameters,
)
from scangraph.contracts import LabelMap, NoParameters
from scangraph.contracts.errors import LabelsMissing
from scangraph.stage import Report, Stage, StepOutput


class Postprocess(Stage):
    """Masks to masks."""

    def __init__(self) -> None:
        from deployments.postprocess import cleaning, fat, repairing, skeletons, templates, warming

        self._cleaning, self._fat, self._repairing = cleaning, fat, repairing
        self._skeletons, self._templates = skeletons, templates
        super().__init__(
            {
                MERGE: self._merge,
                CLEAN: self._clean,
                VESSEL: self._vessel,
                URETER: self._ureter,
                SKELETON: self._skeleton,
                FAT: self._mark_fat,
                SAMPLE: self._sample,
            }
        )
        # The first request need not wait for the compiler, nor the start for it.
        threading.Thread(target=warming.compile_kernels, name="compile", daemon=True).start()

    def _merge(self, inputs: Mapping[str, Any], parameters: MergeParameters, report: Report) -> StepOutput:
        done = self._cleaning.merge(inputs["masks"], **parameters.model_dump(), on_progress=report)
        return StepOutput((done.mask,), tuple(done.warnings), done.facts)

    def _clean(self, inputs: Mapping[str, Any], parameters: CleanParameters, report: Report) -> StepOutput:
        done = self._cleaning.clean(inputs["mask"], **parameters.model_dump(), on_progress=report)
        return StepOutput((done.mask,), tuple(done.warnings), done.facts)

    def _skipping(
        self, mask: LabelMap, parameters: VesselParameters | UreterParameters | FatParameters, work: Callable[[], StepOutput]
    ) -> StepOutput:
        """Work, or pass the mask on where it lacks what is worked on and that was allowed."""
        try:
            return work()
        except LabelsMissing as missing:
            if not parameters.skip_missing:
                raise
            return StepOutput((mask,), (f"Nothing was done: {missing.detail}",), {"skipped": True})

    def _vessel(self, inputs: Mapping[str, Any], parameters: VesselParameters, report: Report) -> StepOutput:
        def work() -> StepOutput:
            done = self._repairing.repair_vessels(
                inputs["mask"],
                inputs.get("image"),
                vessels=parameters.vessels,
                structures=parameters.structures,
                limits=_limits(self._repairing.VESSEL_LIMITS, parameters),
                remove_specks=parameters.remove_specks,
                dry_run=parameters.dry_run,
                resample=parameters.resample,
                on_progress=report,
            )
            return StepOutput((done.mask,), tuple(done.warnings), done.facts)

        return self._skipping(inputs["mask"], parameters, work)

    def _ureter(self, inputs: Mapping[str, Any], parameters: UreterParameters, report: Report) -> StepOutput:
        limits = _limits(self._repairing.URETER_LIMITS, parameters)

        def work() -> StepOutput:
            done = self._repairing.repair_ureters(
                inputs["mask"],
                inputs.get("image"),
                structures=parameters.structures,
                limits=replace(limits, gap_base_mm=parameters.max_gap_mm),
                anchor=parameters.anchor,
                remove_specks=parameters.remove_specks,
                dry_run=parameters.dry_run,
                resample=parameters.resample,
                on_progress=report,
            )
            return StepOutput((done.mask,), tuple(done.warnings), done.facts)

        return self._skipping(inputs["mask"], parameters, work)

    def _skeleton(self, inputs: Mapping[str, Any], parameters: SkeletonParameters, report: Report) -> StepOutput:
        done = self._skeletons.skeletonize(inputs["mask"], **parameters.model_dump(), on_progress=report)
        return StepOutput((done.report, done.scene), tuple(done.warnings), done.facts)

    def _mark_fat(self, inputs: Mapping[str, Any], parameters: FatParameters, report: Report) -> StepOutput:
        merged = self._cleaning.merge(inputs["masks"], resample=parameters.resample)

        def work() -> StepOutput:
            done = self._fat.perirenal_fat(
                merged.mask,
                inputs.get("image"),
                distance_mm=parameters.distance_mm,
                resample=parameters.resample,
                on_progress=report,
            )
            facts = {**done.facts, "volumes_ml": {str(n): round(v, 3) for n, v in done.mask.volumes_ml().items()}}
            return StepOutput((done.mask,), (*merged.warnings, *done.warnings), facts)

        return self._skipping(merged.mask, parameters, work)

    def _sample(self, inputs: Mapping[str, Any], parameters: NoParameters, report: Report) -> StepOutput:
        del parameters
        done = self._templates.sample(inputs["mask"], inputs.get("template"), on_progress=report)
        return StepOutput((done.mask,), tuple(done.warnings), done.facts)


def _limits(limits: Any, parameters: VesselParameters | UreterParameters) -> Any:
    return replace(
        limits,
        gap_mm=parameters.max_gap_mm,
        angle_deg=parameters.max_angle_deg,
        radius_ratio=parameters.max_radius_ratio,
        least_confidence=parameters.min_confidence,
    )
