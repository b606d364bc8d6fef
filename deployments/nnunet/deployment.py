"""The segmentation stage."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from deployments.nnunet.components import COMPONENTS, SegmentParameters, component_of
from scangraph.catalog import Catalog
from scangraph.contracts import Component
from scangraph.contracts.errors import UnknownComponent
from scangraph.models import choose_model, coarse_model
from scangraph.settings import NnunetSettings
from scangraph.stage import Operation, Report, Stage, StepOutput

#: Said where a region was wished for, and nothing can show it.
NO_GUIDE = (
    "roi: no coarser model for {id} is installed, so the whole image was segmented. A model with the same labels and larger "
    "voxels would do (`scangraph models install`), or one that its model.yaml names (`roi`)."
)


class Nnunet(Stage):
    """One deployment for all nnU-Net models."""

    def __init__(self, settings: NnunetSettings, model_folders: tuple[Path, ...], cache: Path | None = None) -> None:
        import torch

        from deployments.nnunet import segmentation
        from deployments.nnunet.accumulate import compile_kernels

        threads = segmentation.pick_threads(settings.threads, len(os.sched_getaffinity(0)))
        torch.set_num_threads(threads)
        self._segment, self._guide = segmentation.segment, segmentation.Guide
        device = segmentation.pick_device(settings.num_gpus or 0)
        self._models = segmentation.ModelStore(model_folders, device, settings.models_held, threads, cache)
        self._device, self._folders = str(device), model_folders
        self._catalog = Catalog(COMPONENTS, model_folders, component_of)
        super().__init__({})
        if device.type == "cpu":
            # In the thread of the steps, where it meets none of them; whoever comes first waits for the rest of it.
            self._thread.submit(compile_kernels)

    def operation(self, component_id: str) -> tuple[Component, Operation]:
        """Return a component, declared here or made of an installed model, and its function."""
        component = self._catalog.get(component_id)
        if component is None:
            raise UnknownComponent(component=component_id, known=", ".join(self._catalog))
        return component, partial(self._run, component_id)

    async def identity(self, component_id: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """Return the model that would be used: another one gives another result."""
        return await asyncio.to_thread(self._identity, component_id, parameters)

    def _identity(self, component_id: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
        model = choose_model(self._folders, component_id, parameters.get("model"))
        if parameters.get("roi") is None:
            return {"model": model.describe()}
        coarse = coarse_model(self._folders, model, parameters.get("structures") or model.manifest.labels)
        return {"model": model.describe(), "roi_model": None if coarse is None else coarse[0].describe()}

    async def warm(self) -> list[str]:
        """Return the SHA-256 of the models that this replica holds in memory."""
        return self._models.held

    async def check_health(self) -> None:
        """Say anew what is held, as often as Serve looks at the replica: Ray forgets a gauge that is not repeated."""
        self._models.tell()

    def _run(self, task: str, inputs: Mapping[str, Any], parameters: SegmentParameters, report: Report) -> StepOutput:
        report(0, 0, "loading the model")
        guide, warnings = self._find_guide(task, parameters)
        model, networks, loaded = self._models.get(task, parameters.model)
        found = self._segment(
            inputs,
            model,
            networks,
            on_progress=report,
            step_size=parameters.step_size,
            precision=parameters.precision,
            structures=parameters.structures,
            skip_air=parameters.precision != "exact" if parameters.skip_air is None else parameters.skip_air,
            guide=guide,
        )
        facts = {
            "model": model.describe(),
            "model_loaded": loaded,
            "device": self._device,
            "precision": parameters.precision,
            "engine": networks[0].engine(parameters.precision),
            **found.facts,
        }
        return StepOutput((replace(found.mask, names=model.manifest.names),), (*warnings, *found.warnings), facts)

    def _find_guide(self, task: str, parameters: SegmentParameters) -> tuple[Any, tuple[str, ...]]:
        """Return the coarser model that shows where to look, if that is wanted; or what is to be said where there is none."""
        if parameters.roi is None:
            return None, ()
        model = choose_model(self._folders, task, parameters.model)
        coarse = coarse_model(self._folders, model, parameters.structures or model.manifest.labels)
        if coarse is None:
            return None, (NO_GUIDE.format(id=model.manifest.id),)
        other, roi = coarse
        _, networks, _ = self._models.get(other.manifest.task, other.manifest.id)
        return self._guide(other, networks, roi.structures, roi.margin_mm), ()
