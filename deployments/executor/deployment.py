"""The control plane on Ray Serve: takes accepted executions from the records and works on them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.handle import DeploymentHandle

from deployments.executor.lines import Lines
from deployments.executor.runner import HeldInputs, Tools
from deployments.executor.scheduler import Scheduler
from deployments.executor.stages import Stages
from scangraph import autoscaling, logs, tracing
from scangraph.contracts import Component
from scangraph.settings import Settings
from scangraph.storage import open_storage
from scangraph.store import executions, open_store

log = logging.getLogger("scangraph")
#: How long somebody may wait for news in one call: no longer than an executor that is going down should wait for him.
_NEWS_SECONDS = 2.0
#: How long a stage may take to say what it holds.
_WARM_SECONDS = 2


class Executor:
    """Runs pipelines.

    It keeps nothing that is not in the records: killed, it is started again by Serve and takes its work up after the lease.

    Parameters
    ----------
    settings : Settings
        All of them; the executor is a control plane.
    components : mapping
        Everything that can be run, by id.
    stages : dict
        Handle by deployment name.
    """

    def __init__(
        self, settings: Settings, components: Mapping[str, Component], stages: Mapping[str, DeploymentHandle[Any]]
    ) -> None:
        logs.configure()
        tracing.configure(settings.tracing, "executor")
        self._settings, self._stages, self._components = settings, stages, components
        self._scheduler: Scheduler | None = None
        self._lines = Lines(_count_replicas)
        # Serve wants a replica that answers while the database is not there yet.
        self._opening = asyncio.get_running_loop().create_task(self._open())

    async def _open(self) -> None:
        settings = self._settings
        while True:
            try:
                store = await open_store(settings.database, outbox=settings.kafka.on)
                break
            except Exception:
                log.exception("the records cannot be opened; trying again")
                await asyncio.sleep(2)
        self._lines.costs.learn_all(await executions.step_runs(store))
        storage = open_storage(settings.storage, settings.storage_options)
        tools = Tools(
            settings,
            store,
            storage,
            Stages(self._stages, settings.executor.attempts, settings.executor.storage_patience_seconds),
            self._components,
            HeldInputs(settings.executor.held_inputs_bytes),
            self._lines,
        )
        room = settings.executor.max_running_bytes
        if room is None:
            room = int(ray.cluster_resources().get("object_store_memory", 2 * 2**30) / 2)
        self._scheduler = Scheduler(tools, room)

    async def components(self) -> tuple[Component, ...]:
        """Return every component's declaration."""
        return tuple(self._components.values())

    async def wake(self) -> None:
        """Look at the queue now."""
        if self._scheduler is not None:
            self._scheduler.wake()

    async def news(self, seen: int) -> int:
        """Wait, a little while at most, until something was written about an execution since number `seen`."""
        if self._scheduler is None:
            await asyncio.sleep(_NEWS_SECONDS)
            return seen
        return await self._scheduler.news(seen, _NEWS_SECONDS)

    async def warm(self) -> list[str]:
        """Return the SHA-256 of the models that are in memory: of each stage, in the replica that answered."""

        async def ask(handle: DeploymentHandle[Any]) -> list[str]:
            try:
                async with asyncio.timeout(_WARM_SECONDS):
                    found: list[str] = await handle.options(method_name="warm").remote()
            except (TimeoutError, RayError):
                return []
            return found

        wanted = {component.deployment for component in self._components.values()}
        running = await _count_replicas()  # a stage without replicas has no model in memory, and is not to be started to say so
        stages = [handle for name, handle in self._stages.items() if name in wanted and running.get(name)]
        return [digest for found in await asyncio.gather(*map(ask, stages)) for digest in found]

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Serve: the work before each stage, for the stages' policies."""
        return autoscaling.reported(dict.fromkeys(self._stages, (0.0, 0)) | self._lines.work())

    async def running(self) -> list[str]:
        """Return the executions at work here."""
        return self._scheduler.running if self._scheduler is not None else []

    async def check_health(self) -> None:
        """Called by Serve, which starts the replica anew when this raises."""
        if self._scheduler is not None:
            self._scheduler.check()

    async def __del__(self) -> None:
        """Called by Serve before the replica ends: what is unfinished goes back to the queue at once, not after the lease."""
        self._opening.cancel()
        if self._scheduler is not None:
            await self._scheduler.stop()
        await self._lines.stop()
        await tracing.flush()


async def _count_replicas() -> dict[str, int]:
    """Ask Serve's controller how many replicas of each deployment run."""

    def look() -> dict[str, int]:
        application = serve.status().applications[serve.get_replica_context().app_name]
        return {
            name: sum(number for state, number in deployment.replica_states.items() if state == "RUNNING")
            for name, deployment in application.deployments.items()
        }

    return await asyncio.to_thread(look)
