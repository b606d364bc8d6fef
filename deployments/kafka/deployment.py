"""The Kafka door on Ray Serve. Bound only where brokers are configured."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ray.serve.handle import DeploymentHandle

from scangraph import logs, tracing
from scangraph.contracts import Component, label_table
from scangraph.contracts.errors import ScanGraphError
from scangraph.contracts.pipelines import built_in_pipelines
from scangraph.handles import RemoteGate, waker
from scangraph.intake import Intake
from scangraph.settings import Settings
from scangraph.storage import open_storage
from scangraph.store import open_store
from scangraph.store.pipelines import sync_built_in

if TYPE_CHECKING:
    from deployments.kafka.bridge import Bridge

log = logging.getLogger("scangraph")

_PAUSE_SECONDS = 2.0


class Kafka:
    """Takes requests in from a topic, and tells another one how all executions go on.

    Brokers, records and storage may be away when it starts, and at any time after: it waits for them. It keeps nothing that is
    not in the records or at the broker.

    Parameters
    ----------
    settings : Settings
        All of them; a door is part of the control plane.
    components : mapping
        What can be run, by id; it may change.
    executor : DeploymentHandle
        Told when there is work.
    imageio : DeploymentHandle
        Looks into files.
    """

    def __init__(
        self,
        settings: Settings,
        components: Mapping[str, Component],
        executor: DeploymentHandle[Any],
        imageio: DeploymentHandle[Any],
    ) -> None:
        from deployments.kafka.clients import check_configuration

        logs.configure()
        tracing.configure(settings.tracing, "kafka")
        check_configuration(settings.kafka)
        self._settings, self._components, self._handles = settings, components, (executor, imageio)
        self._bridge: Bridge | None = None
        self._intake: Intake | None = None
        self._opening = asyncio.get_running_loop().create_task(self._open())

    async def _open(self) -> None:
        from deployments.kafka.bridge import Bridge

        settings, (executor, imageio) = self._settings, self._handles
        while True:
            try:
                store = await open_store(settings.database, outbox=True)
                # The first message may be here before the first gateway is.
                offered, names = tuple(self._components.values()), {n: label.name for n, label in label_table().items()}
                await sync_built_in(store, built_in_pipelines(offered, names))
                break
            except ScanGraphError as error:
                log.warning("the Kafka door waits for the records: %s", error)
                await asyncio.sleep(_PAUSE_SECONDS)
        storage = open_storage(settings.storage, settings.storage_options)
        self._intake = Intake(settings, store, storage, self._components, RemoteGate(imageio), waker(executor))
        self._bridge = Bridge(self._intake)

    async def status(self) -> dict[str, Any]:
        """Say how this replica is doing; see `Bridge.status`."""
        return await self._bridge.status() if self._bridge is not None else {"brokers": "unknown", "trouble": "starting"}

    async def check_health(self) -> None:
        """Called by Serve, which starts the replica anew when this raises. That brokers are away is no reason to."""
        if self._opening.done():
            self._opening.result()
        if self._bridge is not None:
            self._bridge.check()

    async def __del__(self) -> None:
        """Called by Serve before the replica ends: its partitions go to others at once, not after the session."""
        self._opening.cancel()
        if self._bridge is not None:
            await self._bridge.stop()
        await tracing.flush()
        if self._intake is not None:
            await self._intake.store.close()
