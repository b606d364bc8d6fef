"""The gateway on Ray Serve: HTTP's door, and gRPC's methods."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Mapping
from typing import Any, cast

import httpx
import ray
from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayError
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import DeploymentStatusOverview

from deployments.gateway.app import build_app
from deployments.gateway.metrics import make_token
from deployments.gateway.rpc.methods import Rpc
from deployments.gateway.services import Services
from scangraph import logs, tracing
from scangraph.contracts import Component, label_table
from scangraph.contracts.errors import ScanGraphError, StageUnavailable
from scangraph.contracts.pipelines import PipelineSpec, built_in_pipelines
from scangraph.handles import RemoteGate, waker
from scangraph.models import installed_detectors, installed_models
from scangraph.settings import GatewaySettings, Settings
from scangraph.storage import Storage, open_storage
from scangraph.store import accounts, open_store
from scangraph.store.pipelines import sync_built_in
from scangraph.tokens import Tokens

log = logging.getLogger("scangraph")

#: How long the question which models are warm may take.
_WARM_SECONDS = 3
#: How long a node's agent may take.
_AGENT_SECONDS = 3
#: How long another door may take to say how it is.
_ASK_SECONDS = 3
#: How often a replica looks for components that came or went.
_FOLLOW_SECONDS = 1.0


def build_gateway(components: tuple[Component, ...], settings: GatewaySettings) -> Any:
    """Return the gateway's class: the replica with the HTTP application in front, and endpoints for these components.

    Those of components that come later are made when they are asked for.
    """

    def build() -> FastAPI:
        # Called in the replica: state put on an app that is built here would not reach it.
        return build_app(components, _services, settings)

    return serve.ingress(build)(Gateway)


class Gateway(Rpc):
    """Opens what the routes need.

    Parameters
    ----------
    settings : Settings
        All of them; the gateway is a control plane.
    components : mapping
        What is offered, by id; it may change.
    executor : DeploymentHandle
        Told when there is work.
    imageio : DeploymentHandle
        Looks into uploads.
    doors : mapping
        The other doors that are configured, by name.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self,
        settings: Settings,
        components: Mapping[str, Component],
        executor: DeploymentHandle[Any],
        imageio: DeploymentHandle[Any],
        doors: Mapping[str, DeploymentHandle[Any]],
    ) -> None:
        logs.configure()
        tracing.configure(settings.tracing, "gateway")
        await asyncio.to_thread(make_token, settings.metrics_token_file)
        store = await open_store(settings.database, outbox=settings.kafka.on)
        made = await accounts.ensure_admin(store, settings.data)
        if made is not None:
            log.warning("the first account is admin; its password is in %s", made)
        offered = tuple(components.values())
        await sync_built_in(store, _pipelines(offered))
        self._model_folders, self._executor, self._doors = settings.model_folders, executor, doors
        storage = open_storage(settings.storage, settings.storage_options, settings.files.link_endpoint)
        self.services = Services(
            settings=settings,
            store=store,
            storage=storage,
            components=components,
            tokens=Tokens(settings.auth, settings.data / "keys"),
            gate=RemoteGate(imageio),
            wake=waker(executor),
            readiness=self.readiness,
            models=self.models,
            pages=node_pages,
            doors=self.doors,
            news=self.news,
        )
        # Not a condition: a storage may come later. Until then /readyz says so, and uploads are answered 503.
        self._probing = asyncio.get_running_loop().create_task(_probe(storage))
        self._following = asyncio.get_running_loop().create_task(self._follow(offered))

    async def _follow(self, offered: tuple[Component, ...]) -> None:
        """Give components that come while the service runs their pipelines, and take away those of components that go."""
        while True:
            await asyncio.sleep(_FOLLOW_SECONDS)
            now = tuple(self.services.components.values())
            if now == offered:
                continue
            try:
                await sync_built_in(self.services.store, _pipelines(now))
            except ScanGraphError as error:  # the records cannot be reached: a second later, perhaps
                log.warning("the pipelines of installed models could not be written: %s", error)
            else:
                offered = now

    async def __del__(self) -> None:
        """Called by Serve before the replica ends."""
        await tracing.flush()

    async def readiness(self) -> dict[str, str]:
        """Ask Serve's controller which deployments cannot take work."""

        def look() -> dict[str, str]:
            application = serve.status().applications.get(serve.get_replica_context().app_name)
            return why_not_ready(application.deployments) if application else {}

        return await asyncio.to_thread(look)

    async def _warm(self) -> set[str]:
        """Ask which models are in memory; none, as far as anybody can tell, while the executor or a stage is starting."""
        try:
            async with asyncio.timeout(_WARM_SECONDS):
                return set(await self._executor.options(method_name="warm").remote())
        except (TimeoutError, RayError):
            return set()

    async def doors(self) -> dict[str, dict[str, Any]]:
        """Ask the other doors how they are; of each, one replica answers."""

        async def ask(handle: DeploymentHandle[Any]) -> dict[str, Any]:
            try:
                async with asyncio.timeout(_ASK_SECONDS):
                    found: dict[str, Any] = await handle.options(method_name="status").remote()
            except (TimeoutError, RayError):
                return {"trouble": "it does not answer; see /readyz"}
            return found

        return dict(zip(self._doors, await asyncio.gather(*map(ask, self._doors.values())), strict=True))

    async def news(self, seen: int) -> int:
        """Ask the executor to say when it has written something."""
        try:
            newest: int = await self._executor.options(method_name="news").remote(seen)
        except RayError as error:
            raise StageUnavailable(deployment="executor", reason="its process died") from error
        return newest

    async def models(self) -> dict[str, list[dict[str, Any]]]:
        """List the installed models by component, the one that is used first."""
        warm = await self._warm()
        listed: dict[str, list[dict[str, Any]]] = {}
        for model in await asyncio.to_thread(installed_models, self._model_folders):
            manifest = model.manifest
            entry = {**model.describe(), "title": manifest.title, "spacing_mm": manifest.spacing_mm, "labels": manifest.labels}
            entry |= {"names": manifest.names, "warm": model.digest in warm}
            listed.setdefault(manifest.task, []).append(entry)
        for detector in await asyncio.to_thread(installed_detectors, self._model_folders):
            found = detector.manifest
            entry = {**detector.describe(), "title": found.title, "classes": found.classes, "warm": detector.digest in warm}
            listed.setdefault(found.task, []).append(entry)
        return {task: sorted(models, key=lambda m: m["demo"]) for task, models in listed.items()}


async def node_pages() -> dict[str, str | None]:
    """Ask the agent of every node that is alive for its page; they answer at once, or not at all.

    A node is called by its address; where several share one (a cluster on one machine), by its agent's port, too.
    """
    nodes = [node for node in await asyncio.to_thread(ray.nodes) if node["Alive"]]
    async with httpx.AsyncClient(timeout=_AGENT_SECONDS, trust_env=False) as client:

        async def ask(address: str, port: int) -> str | None:
            try:
                answer = await client.get(f"http://{address}:{port}/metrics")
                answer.raise_for_status()
            except httpx.HTTPError:
                return None
            return answer.text

        places = [(str(node["NodeManagerAddress"]), int(node["MetricsExportPort"])) for node in nodes]
        found = await asyncio.gather(*(ask(*place) for place in places))
    often = Counter(address for address, _ in places)
    names = [address if often[address] == 1 else f"{address}:{port}" for address, port in places]
    return dict(zip(names, found, strict=True))


def _pipelines(components: tuple[Component, ...]) -> list[PipelineSpec]:
    return built_in_pipelines(components, {number: label.name for number, label in label_table().items()})


async def _probe(storage: Storage) -> None:
    try:
        await storage.probe()
    except ScanGraphError as error:
        log.error("%s", error)


def why_not_ready(deployments: Mapping[str, DeploymentStatusOverview]) -> dict[str, str]:
    """Return the deployments that cannot take work, and why.

    One whose replica runs can, whatever else Serve is busy with: more of them, or a new version that may never start. One
    without any is healthy where nothing asks for it.
    """
    return {
        name: f"{state.status.value}: {_cause(state.message)}"
        for name, state in deployments.items()
        if state.status.value != "HEALTHY" and "RUNNING" not in state.replica_states
    }


def _cause(message: str) -> str:
    """Last line of a remote traceback: the cause, without the machine's paths."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return lines[-1] if lines else "starting"


def _services() -> Services:
    return cast("Gateway", serve.get_replica_context().servable_object).services
