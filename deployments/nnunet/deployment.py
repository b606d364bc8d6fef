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
from scangraph.models import choose_model
from scangraph.settings import NnunetSettings
from scangraph.stage import Operation, Report, Stage, StepOutput


class Nnunet(Stage):
    """One deployment for all nnU-Net models."""

    def __init__(self, settings: NnunetSettings, model_folders: tuple[Path, ...], cache: Path | None = None) -> None:
        import torch

        from deployments.nnunet import segmentation

        threads = segmentation.pick_threads(settings.threads, len(os.sched_getaffinity(0)))
        torch.set_num_threads(threads)
        self._segment = segmentation.segment
        device = segmentation.pick_device(settings.num_gpus or 0)
        self._models = segmentation.ModelStore(model_folders, device, settings.models_held, threads, cache)
        self._device, self._folders = str(device), model_folders
        self._catalog = Catalog(COMPONENTS, model_folders, component_of)
        super().__init__({})

    def operation(self, component_id: str) -> tuple[Component, Operation]:
        """Return a component, declared here or made of an installed model, and its function."""
        component = self._catalog.get(component_id)
        if component is None:
            raise UnknownComponent(component=component_id, known=", ".join(self._catalog))
        return component, partial(self._run, component_id)

    async def identity(self, component_id: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """Return the model that would be used: another one gives another result."""
        chosen = await asyncio.to_thread(choose_model, self._folders, component_id, parameters.get("model"))
        return {"model": chosen.describe()}

    async def warm(self) -> list[str]:
        """Return the SHA-256 of the models that this replica holds in memory."""
        return self._models.held

    def _run(self, task: str, inputs: Mapping[str, Any], parameters: SegmentParameters, report: Report) -> StepOutput:
        report(0, 0, "loading the model")
        model, networks, loaded = self._models.get(task, parameters.model)
        mask, warnings = self._segment(
            inputs,
            model,
            networks,
            on_progress=report,
            step_size=parameters.step_size,
            precision=parameters.precision,
            structures=parameters.structures,
        )
        facts = {
            "model": model.describe(),
            "model_loaded": loaded,
            "device": self._device,
            "precision": parameters.precision,
            "engine": networks[0].engine(parameters.precision),
        }
        return StepOutput((replace(mask, names=model.manifest.names),), tuple(warnings), facts)
