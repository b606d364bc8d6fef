"""The HTTP door on Ray Serve."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, cast

from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayError
from ray.serve.handle import DeploymentHandle

from deployments.gateway.app import build_app
from deployments.gateway.services import Services
from scangraph.contracts import Component, label_table
from scangraph.contracts.errors import ScanGraphError, StageUnavailable
from scangraph.contracts.pipelines import PipelineSpec, built_in_pipelines
from scangraph.handles import own_error
from scangraph.models import installed_models
from scangraph.settings import GatewaySettings, Settings
from scangraph.storage import open_storage
from scangraph.store import accounts, open_store
from scangraph.store.pipelines import sync_built_in
from scangraph.tokens import Tokens

log = logging.getLogger("scangraph")

#: How long the question which models are warm may take.
_WARM_SECONDS = 3
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


class Gateway:
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
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self,
        settings: Settings,
        components: Mapping[str, Component],
        executor: DeploymentHandle[Any],
        imageio: DeploymentHandle[Any],
    ) -> None:
        store = await open_store(settings.database)
        made = await accounts.ensure_admin(store, settings.data)
        if made is not None:
            log.warning("the first account is admin; its password is in %s", made)
        offered = tuple(components.values())
        await sync_built_in(store, _pipelines(offered))
        self._model_folders, self._executor = settings.model_folders, executor
        self.services = Services(
            settings=settings,
            store=store,
            storage=open_storage(settings.storage, settings.storage_options),
            components=components,
            tokens=Tokens(settings.auth, settings.data / "keys"),
            gate=_Gate(imageio),
            wake=_waker(executor),
            readiness=self.readiness,
            models=self.models,
        )
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

    async def readiness(self) -> dict[str, str]:
        """Ask Serve's controller for every deployment's state."""

        def look() -> dict[str, str]:
            waiting = {}
            own = serve.get_replica_context().app_name
            for name, application in serve.status().applications.items():
                if name != own:
                    continue
                for deployment, state in application.deployments.items():
                    if state.status.value != "HEALTHY":
                        waiting[deployment] = f"{state.status.value}: {_cause(state.message)}"
            return waiting

        return await asyncio.to_thread(look)

    async def _warm(self) -> set[str]:
        """Ask which models are in memory; none, as far as anybody can tell, while the executor or a stage is starting."""
        try:
            async with asyncio.timeout(_WARM_SECONDS):
                return set(await self._executor.options(method_name="warm").remote())
        except (TimeoutError, RayError):
            return set()

    async def models(self) -> dict[str, list[dict[str, Any]]]:
        """List the installed models by component, the one that is used first."""
        warm = await self._warm()
        listed: dict[str, list[dict[str, Any]]] = {}
        for model in await asyncio.to_thread(installed_models, self._model_folders):
            manifest = model.manifest
            entry = {**model.describe(), "title": manifest.title, "spacing_mm": manifest.spacing_mm, "labels": manifest.labels}
            entry |= {"names": manifest.names, "warm": model.digest in warm}
            listed.setdefault(manifest.task, []).append(entry)
        return {task: sorted(models, key=lambda m: m["demo"]) for task, models in listed.items()}


def _pipelines(components: tuple[Component, ...]) -> list[PipelineSpec]:
    return built_in_pipelines(components, {number: label.name for number, label in label_table().items()})


def _cause(message: str) -> str:
    """Last line of a remote traceback: the cause, without the machine's paths."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return lines[-1] if lines else "starting"


class _Gate:
    """imageio, as the gateway asks it."""

    def __init__(self, imageio: DeploymentHandle[Any]) -> None:
        self._inspect = imageio.options(method_name="inspect")

    async def inspect(self, name: str) -> dict[str, Any]:
        """Look into a stored file."""
        try:
            found: dict[str, Any] = await self._inspect.remote(name)
        except RayError as error:
            cause = own_error(error)
            if isinstance(cause, ScanGraphError):
                raise cause from None
            raise StageUnavailable(deployment="imageio", reason="its process died; send the request again") from error
        return found


def _waker(executor: DeploymentHandle[Any]) -> Callable[[], Awaitable[None]]:
    wake = executor.options(method_name="wake")

    async def call() -> None:
        wake.remote()  # not awaited: it finds the work by itself within a second

    return call


def _services() -> Services:
    return cast("Gateway", serve.get_replica_context().servable_object).services
