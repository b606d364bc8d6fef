"""The stages as the executor sees them: calls that give references, are tried again when a process dies, raise our errors."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

from ray.exceptions import RayError
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from scangraph import tracing
from scangraph.contracts import WAITING, Component, Progress
from scangraph.contracts.errors import ScanGraphError, StageUnavailable, StorageUnavailable, TransientError
from scangraph.handles import LOST, OnLost, OnProgress, StepResult, own_error, run_step

log = logging.getLogger("scangraph")

T = TypeVar("T")
#: Longest time between two looks whether the storage is back.
_PAUSE_SECONDS = 10


def is_transient(error: BaseException) -> bool:
    """Whether the same call may succeed in a moment. A full disk or too little memory stays as it is: those are 507."""
    return isinstance(error, LOST) or (isinstance(error, TransientError) and error.status == 503)


class Stages:
    """Handles by deployment name.

    Parameters
    ----------
    handles : mapping
        Of every stage, imageio included.
    attempts : int
        How often a call is tried.
    storage_patience : float
        Seconds that a call waits for a storage that is away.
    """

    def __init__(self, handles: Mapping[str, DeploymentHandle[Any]], attempts: int, storage_patience: float = 0) -> None:
        self._handles, self._attempts, self._storage_patience = handles, attempts, storage_patience

    async def identity(self, component: Component, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """Return what besides version, parameters and inputs decides a component's result: its model."""
        handle = self._handles[component.deployment].options(method_name="identity")
        found: dict[str, Any] = await self._ask(component.deployment, lambda: handle.remote(component.id, dict(parameters)))
        return found

    async def run(
        self,
        component: Component,
        inputs: Mapping[str, Any],
        parameters: Mapping[str, Any],
        token: str,
        on_progress: OnProgress,
        on_lost: OnLost,
        attempts: int,
    ) -> StepResult:
        """Run a component on references."""
        with tracing.span(f"{component.deployment} {component.id}") as span:
            return await run_step(
                self._handles[component.deployment],
                component,
                inputs,
                parameters,
                execution_id=token,
                on_progress=_noting(span, on_progress),
                on_lost=on_lost,
                attempts=attempts,
            )

    async def read(self, path: str, kind: str, scheme: str | None) -> Any:
        """Return a reference to what a stored file holds."""
        if kind == "image2d":
            return await self._imageio_ref("read_picture", path)
        return await self._imageio_ref("read", path, kind == "mask", scheme if kind == "mask" else None)

    async def sha256(self, path: str) -> str:
        """Return a stored file's hash."""
        return str(await self._imageio("sha256", path))

    async def save(self, ref: Any, kind: str, stem: str) -> list[dict[str, Any]]:
        """Write a result for people, and describe its files."""
        return list(await self._imageio("save", ref, kind, stem))

    async def keep(self, ref: Any, name: str) -> int:
        """Write a step's output for later runs, and return its size."""
        return int(await self._imageio("keep", ref, name))

    async def recall(self, name: str) -> Any:
        """Return a reference to a kept output."""
        return await self._imageio_ref("recall", name)

    async def wait_for_storage(self, call: Callable[[], Awaitable[T]]) -> T:
        """Make a call again while the storage is away: what waits has its inputs and results in memory, and loses nothing."""
        begun, pause, told = time.monotonic(), 1.0, False
        while True:
            try:
                return await call()
            except StorageUnavailable as error:
                if not error.fields.get("away") or time.monotonic() - begun + pause > self._storage_patience:
                    raise
                if not told:
                    log.warning("waiting up to %.0f s for the storage: %s", self._storage_patience, error.fields["reason"])
                    told = True
            await asyncio.sleep(pause)
            pause = min(2 * pause, _PAUSE_SECONDS)

    async def _imageio(self, method: str, *arguments: Any) -> Any:
        handle = self._handles["imageio"].options(method_name=method)
        return await self._ask("imageio", lambda: handle.remote(*arguments, trace=tracing.here()))

    async def _imageio_ref(self, method: str, *arguments: Any) -> Any:
        handle = self._handles["imageio"].options(method_name=method)

        async def call() -> Any:
            response: Any = handle.remote(*arguments, trace=tracing.here())
            ref = await response._to_object_ref()
            await ref
            return ref

        return await self._ask("imageio", call)

    async def _ask(self, deployment: str, call: Callable[[], Awaitable[T]]) -> T:
        return await self.wait_for_storage(lambda: self._tried(deployment, call))

    async def _tried(self, deployment: str, call: Callable[[], Awaitable[T]]) -> T:
        for attempt in range(1, self._attempts + 1):
            try:
                return await call()
            except DeploymentUnavailableError as error:
                raise StageUnavailable(deployment=deployment, reason="it could not be started; see /readyz") from error
            except (RayError, ScanGraphError) as error:
                cause = own_error(error)
                if not is_transient(cause):
                    raise cause from None
                if attempt == self._attempts:
                    if isinstance(cause, ScanGraphError):
                        raise cause from None
                    raise StageUnavailable(deployment=deployment, reason=f"it died {attempt} times") from error
            await asyncio.sleep(min(2**attempt, 10))
        raise AssertionError("unreachable")


def _noting(span: Any, on_progress: OnProgress) -> OnProgress:
    """Note in a span when the stage begins, and begins again after a loss: before that the step waits for its turn."""
    waiting = True

    def heard(progress: Progress) -> None:
        nonlocal waiting
        if waiting and progress.message != WAITING:
            span.add_event("begun")
        waiting = progress.message == WAITING
        on_progress(progress)

    return heard
