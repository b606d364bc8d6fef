"""Real stages in this process, without Ray: what crosses a process boundary crosses a pickle here."""

from __future__ import annotations

import asyncio
import pickle
import threading
import time
from collections.abc import Callable, Generator, Mapping
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from deployments.executor.stages import Stages
from deployments.imageio.deployment import Imageio
from scangraph.contracts import Component, LabelMap, Port, Progress, Scene, StepSummary, Surface
from scangraph.handles import StepResult, check_parameters
from scangraph.settings import Settings
from scangraph.stage import Report, Stage, StepOutput


class Ref:
    """A value in no object store."""

    def __init__(self, value: Any) -> None:
        self.data = pickle.dumps(value, protocol=5)

    def __await__(self) -> Generator[Any, None, Any]:
        return asyncio.sleep(0, pickle.loads(self.data)).__await__()


class Knobs(BaseModel):
    """Parameters of the test's components."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    label: int = 5
    seconds: float = 0.0
    fail: bool = False


THRESHOLD = Component(
    id="test/threshold",
    version="1.0.0",
    uses_models=True,
    title="Threshold",
    description="Labels what is above 0.",
    deployment="test",
    inputs=(Port(name="image", kind="image"),),
    outputs=(Port(name="mask", kind="mask"),),
    parameters=Knobs,
)
BOX = Component(
    id="test/box",
    version="1.0.0",
    uses_models=True,
    title="Box",
    description="A tetrahedron per label.",
    deployment="test",
    inputs=(Port(name="mask", kind="mask"), Port(name="other", kind="mask", optional=True)),
    outputs=(Port(name="scene", kind="scene"),),
    parameters=Knobs,
)
COMPONENTS = (THRESHOLD, BOX)


class Worker(Stage):
    """Does little, slowly if asked, and counts."""

    def __init__(self) -> None:
        super().__init__({THRESHOLD: self._threshold, BOX: self._box})
        self.calls: list[tuple[str, int]] = []
        self.busy = threading.Event()
        self.model = "1"

    async def identity(self, component_id: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
        return {"model": self.model}

    def _work(self, name: str, knobs: Knobs, report: Report) -> None:
        self.calls.append((name, knobs.label))
        if knobs.fail:
            raise ZeroDivisionError
        end = time.monotonic() + knobs.seconds
        self.busy.set()
        try:
            for tile in range(10_000):
                report(tile, 10_000, "tiles")
                if time.monotonic() >= end:
                    return
                time.sleep(0.01)
        finally:
            self.busy.clear()

    def _threshold(self, inputs: Mapping[str, Any], knobs: Knobs, report: Report) -> StepOutput:
        self._work("threshold", knobs, report)
        image = inputs["image"]
        array = np.where(image.array > 0, knobs.label, 0).astype(np.uint8)
        mask = LabelMap(array, image.spacing_mm, image.origin_mm, image.direction, (knobs.label,))
        return StepOutput((mask,), ("made by a test",), {"label": knobs.label})

    def _box(self, inputs: Mapping[str, Any], knobs: Knobs, report: Report) -> StepOutput:
        self._work("box", knobs, report)
        vertices = np.eye(4, 3, dtype=np.float32) * 10
        faces = np.array([[0, 2, 1], [0, 1, 3], [1, 2, 3], [2, 0, 3]], np.int32)
        label = inputs["mask"].labels[0]
        return StepOutput((Scene((Surface("thing", label, (10, 20, 30), vertices, faces),), "LPS"),))


class LocalStages(Stages):
    """The executor's view of stages that live here."""

    def __init__(self, settings: Settings, worker: Worker | None = None) -> None:
        super().__init__({}, 3, settings.executor.storage_patience_seconds)
        self.worker = worker or Worker()
        self.imageio = Imageio(settings.imageio, settings.storage, settings.storage_options)
        self.before: Callable[[str], None] = lambda method: None

    async def identity(self, component: Component, parameters: Mapping[str, Any]) -> dict[str, Any]:
        return await self.worker.identity(component.id, parameters)

    async def run(
        self,
        component: Component,
        inputs: Mapping[str, Any],
        parameters: Mapping[str, Any],
        token: str,
        on_progress: Any,
        on_lost: Any,
        attempts: int,
    ) -> StepResult:
        check_parameters(component, parameters)
        summary, outputs = None, []
        stream = self.worker.run(component.id, inputs, parameters, token)
        try:
            async for item in stream:
                if isinstance(item, Progress):
                    on_progress(item)
                elif isinstance(item, StepSummary):
                    summary = item
                else:
                    outputs.append(Ref(item))
        finally:
            await stream.aclose()  # type: ignore[attr-defined]
        assert summary is not None
        return StepResult(dict(zip((p.name for p in component.outputs), outputs, strict=True)), summary, 1)  # type: ignore[arg-type]

    async def _imageio(self, method: str, *arguments: Any) -> Any:
        async def call() -> Any:
            self.before(method)
            values = [await a if isinstance(a, Ref) else a for a in arguments]
            return await getattr(self.imageio, method)(*values)

        return await self._ask("imageio", call)

    async def _imageio_ref(self, method: str, *arguments: Any) -> Any:
        return Ref(await self._imageio(method, *arguments))
