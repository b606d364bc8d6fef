"""The control plane: reads inputs once, runs the component, writes its outputs once.

Only small messages and references pass through here; arrays stay in the object store.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from ray.exceptions import RayTaskError
from ray.serve.handle import DeploymentHandle, DeploymentResponse

from scangraph.contracts import Component, Port, Progress
from scangraph.contracts.errors import InvalidParameters, ScanGraphError, StageFailed, UnknownComponent
from scangraph.handles import own_error, run_step
from scangraph.obj import write_obj
from scangraph.settings import ExecutorSettings
from scangraph.storage import LocalStorage

log = logging.getLogger("scangraph")

_ENDINGS = {"image": ".nii.gz", "mask": ".nii.gz", "scene": ".obj", "image2d": ".png"}


@dataclass(frozen=True)
class Answer:
    """What an execution gave.

    Parameters
    ----------
    paths : dict
        Storage path of each output, by the port's `path_name`.
    seconds : float
        Wall time inside the stage.
    """

    execution_id: str
    component: str
    paths: dict[str, str]
    warnings: tuple[str, ...]
    seconds: float
    peak_mb: float
    attempts: int
    facts: dict[str, Any] = field(default_factory=dict)


class Executor:
    """Runs components.

    Parameters
    ----------
    settings : ExecutorSettings
        Attempts and limits.
    storage_root : Path
        Where outputs go.
    components : tuple of Component
        Everything that can be run.
    stages : dict
        Handle by deployment name.
    """

    def __init__(
        self,
        settings: ExecutorSettings,
        storage_root: Path,
        components: tuple[Component, ...],
        stages: dict[str, DeploymentHandle[Any]],
    ) -> None:
        self._settings = settings
        self._storage = LocalStorage(storage_root)
        self._components = {component.id: component for component in components}
        self._stages = stages

    async def components(self) -> tuple[Component, ...]:
        """Return every component's declaration."""
        return tuple(self._components.values())

    async def execute(
        self,
        execution_id: str,
        component_id: str,
        paths: Mapping[str, str | list[str]],
        parameters: Mapping[str, Any],
        label_scheme: str | None = None,
    ) -> AsyncIterator[Progress | Answer]:
        """Run one component on stored files.

        Parameters
        ----------
        execution_id : str
            Names the outputs' folder.
        paths : mapping
            Storage path (or list of them) by input port.
        label_scheme : str, optional
            Numbering of the input masks, if it is not the label table's.

        Yields
        ------
        Progress, and last the Answer
        """
        if component_id not in self._components:
            raise UnknownComponent(component=component_id, known=", ".join(self._components))
        component = self._components[component_id]
        news: asyncio.Queue[Progress | None] = asyncio.Queue()

        async def work() -> Answer:
            try:
                async with asyncio.timeout(self._settings.step_timeout_seconds):
                    return await self._execute(execution_id, component, paths, parameters, label_scheme, news.put_nowait)
            except RayTaskError as error:
                raise own_error(error) from None
            finally:
                news.put_nowait(None)

        job = asyncio.create_task(work())
        try:
            while (item := await news.get()) is not None:
                yield item
            yield await job
        except ScanGraphError:
            raise
        except (asyncio.CancelledError, GeneratorExit):
            job.cancel()
            raise
        except Exception as error:  # the process boundary
            log.exception("execution %s: %s failed", execution_id, component_id)
            raise StageFailed(component=component_id, error=type(error).__name__, execution_id=execution_id) from None

    async def _execute(
        self,
        execution_id: str,
        component: Component,
        paths: Mapping[str, str | list[str]],
        parameters: Mapping[str, Any],
        label_scheme: str | None,
        on_progress: Any,
    ) -> Answer:
        on_progress(Progress(0, 0, "reading"))
        ports = {port.name: port for port in component.inputs}
        flat = {(name, p) for name, given in paths.items() for p in ([given] if isinstance(given, str) else given)}
        # A file that two ports name is read once.
        kinds = {(ports[name].kind, path) for name, path in flat}
        read = dict(
            zip(kinds, await asyncio.gather(*(self._read(kind, path, label_scheme) for kind, path in kinds)), strict=True)
        )

        def refs(name: str, given: str | list[str]) -> Any:
            kind = ports[name].kind
            return read[kind, given] if isinstance(given, str) else [read[kind, path] for path in given]

        result = await run_step(
            self._stages[component.deployment],
            component,
            {name: refs(name, given) for name, given in paths.items()},
            parameters,
            execution_id=execution_id,
            on_progress=on_progress,
            attempts=self._settings.attempts,
        )
        on_progress(Progress(0, 0, "writing"))
        absolute = all(Path(path).is_absolute() for _, path in flat)
        stem = f"results/{execution_id}/{component.id.rpartition('/')[2]}"
        written = {}
        for port in component.outputs:
            name = await self._write(port, result.outputs[port.name], stem)
            written[port.path_name] = str(self._storage.root / name) if absolute else name
        summary = result.summary
        return Answer(
            execution_id,
            component.id,
            written,
            summary.warnings,
            summary.seconds,
            summary.peak_mb,
            result.attempts,
            summary.facts,
        )

    async def _read(self, kind: str, path: str, label_scheme: str | None) -> Any:
        """Return a reference to what a stored file holds."""
        self._storage.file(path)  # fails at once, before anything is queued
        if kind not in {"image", "mask"}:
            raise InvalidParameters(component="", detail=f"{path}: a {kind} cannot be read from a file")
        scheme = label_scheme if kind == "mask" else None
        response = self._stages["imageio"].options(method_name="read").remote(path, kind == "mask", scheme)
        ref = await cast("DeploymentResponse[Any]", response)._to_object_ref()
        await ref
        return ref

    async def _write(self, port: Port, ref: Any, stem: str) -> str:
        """Write one output under a new name; it is there, whole, when this returns."""
        path = stem + _ENDINGS[port.kind]
        if port.kind in {"image", "mask"}:
            return str(await self._stages["imageio"].options(method_name="write").remote(ref, path))
        value = await ref
        if port.kind == "scene":
            mtl = f"{stem}.mtl"
            obj_text, mtl_text = await asyncio.to_thread(write_obj, value, Path(mtl).name)
            await asyncio.to_thread(self._storage.write, mtl, mtl_text)
            value = obj_text
        return await asyncio.to_thread(self._storage.write, path, value)
