"""The HTTP door on Ray Serve."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayError
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from deployments.gateway.app import Backend, build_app
from scangraph.contracts import Component
from scangraph.contracts.errors import StageFailed, StageUnavailable
from scangraph.handles import own_error
from scangraph.models import installed_models


def build_gateway(components: tuple[Component, ...], max_body_bytes: int) -> Any:
    """Return the gateway's class for these components: the backend with the HTTP application in front."""

    def build() -> FastAPI:
        # Called in the replica: state put on an app that is built here would not reach it.
        return build_app(components, _this_replica, max_body_bytes)

    return serve.ingress(build)(GatewayBackend)


class GatewayBackend:
    """Implements `Backend` with handles.

    Parameters
    ----------
    components : tuple of Component
        What is offered.
    executor : DeploymentHandle
        Runs it.
    model_folders : tuple of Path
        Where models are looked for.
    """

    def __init__(
        self, components: tuple[Component, ...], executor: DeploymentHandle[Any], model_folders: tuple[Path, ...]
    ) -> None:
        self.components = {component.id: component for component in components}
        self._execute = executor.options(method_name="execute", stream=True)
        self._model_folders = model_folders

    async def execute(
        self,
        execution_id: str,
        component: Component,
        paths: Mapping[str, Any],
        parameters: Mapping[str, Any],
        scheme: str | None,
    ) -> Any:
        """Run a component to its end."""
        answer: Any = None
        try:
            response = self._execute.remote(execution_id, component.id, dict(paths), dict(parameters), scheme)
            async for item in cast("DeploymentResponseGenerator[Any]", response):
                answer = item
        except RayError as error:
            cause = own_error(error)
            if cause is error:  # not raised by our code: the executor's own process is gone
                reason = "its process died; nothing was written, send the request again"
                raise StageUnavailable(deployment="executor", reason=reason) from error
            raise cause from None
        if not hasattr(answer, "paths"):
            raise StageFailed(component=component.id, error="no answer", execution_id=execution_id)
        return answer

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

    async def models(self) -> dict[str, list[dict[str, Any]]]:
        """List the installed models by component, the one that is used first."""
        listed: dict[str, list[dict[str, Any]]] = {}
        for model in await asyncio.to_thread(installed_models, self._model_folders):
            manifest = model.manifest
            entry = {**model.describe(), "title": manifest.title, "spacing_mm": manifest.spacing_mm, "labels": manifest.labels}
            listed.setdefault(manifest.task, []).append(entry)
        return {task: sorted(models, key=lambda m: m["demo"]) for task, models in listed.items()}


def _cause(message: str) -> str:
    """Last line of a remote traceback: the cause, without the machine's paths."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return lines[-1] if lines else "starting"


def _this_replica() -> Backend:
    return cast("Backend", serve.get_replica_context().servable_object)
