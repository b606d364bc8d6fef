"""The HTTP application. Its routes are made of the components' declarations: none of them is named here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, create_model

import scangraph
from deployments.gateway import problems
from scangraph.contracts import Component, label_table
from scangraph.contracts.errors import UnknownComponent
from scangraph.handles import new_execution_id

_DESCRIPTION = """\
CT scans in, label masks and surgical 3-D scenes out. **Research use only**: not a medical device.

Paths are relative to the service's storage folder, or absolute inside it; answers use the same form.
Every error is `application/problem+json`.
"""


#: What a request can name by a path; scenes are made, not read.
_READABLE = frozenset({"image", "mask"})


class Backend(Protocol):
    """What the routes need; the deployment implements it with handles, a test with anything."""

    components: Mapping[str, Component]

    async def execute(
        self,
        execution_id: str,
        component: Component,
        paths: Mapping[str, Any],
        parameters: Mapping[str, Any],
        scheme: str | None,
    ) -> Any:
        """Run a component and return the executor's `Answer`."""
        ...

    async def readiness(self) -> dict[str, str]:
        """Return deployment -> why it is not ready, for those that are not."""
        ...

    async def models(self) -> dict[str, list[dict[str, Any]]]:
        """Return component id -> installed models, the one that is used first."""
        ...


class _Answer(BaseModel):
    """Common to the answers of all components."""

    execution_id: str
    warnings: list[str] = Field(description="limits that the input breaks, and what must be known about the result")
    seconds: float = Field(description="wall time inside the stage")
    peak_mb: float = Field(description="highest resident memory of the stage while it worked")
    attempts: int = Field(description="1, or more where a process died and the step was tried again")
    facts: dict[str, Any] = Field(description="what else the stage says: model, counts")


def request_model(component: Component) -> type[BaseModel]:
    """Make the body of a component's endpoint: a path per input, the parameters beside them."""
    fields: dict[str, Any] = {}
    for port in component.inputs:
        kind: Any = list[str] if port.many else str
        rules: dict[str, Any] = {"min_length": 1, "description": port.description}
        fields[port.path_name] = (kind | None, Field(None, **rules)) if port.optional else (kind, Field(..., **rules))
    for name, info in component.parameters.model_fields.items():
        fields[name] = (info.annotation, info)
    if any(port.kind == "mask" for port in component.inputs):
        fields["label_scheme"] = (Literal["kits"] | None, Field(None, description="numbering of the mask, if not the table's"))
    name = "".join(part.capitalize() for part in component.id.replace("-", "/").split("/"))
    model: type[BaseModel] = create_model(f"{name}Request", __config__=ConfigDict(extra="forbid"), **fields)
    return model


def answer_model(component: Component) -> type[BaseModel]:
    """Make the answer of a component's endpoint."""
    name = "".join(part.capitalize() for part in component.id.replace("-", "/").split("/"))
    fields: dict[str, Any] = {port.path_name: (str, Field(..., description=port.description)) for port in component.outputs}
    model: type[BaseModel] = create_model(f"{name}Answer", __base__=_Answer, **fields)
    return model


def build_app(components: tuple[Component, ...], backend: Callable[[], Backend], max_body_bytes: int) -> FastAPI:
    """Build the application.

    Parameters
    ----------
    components : tuple of Component
        What is offered.
    backend : callable
        Gives the backend at request time: Serve copies the application into its replica, so nothing may be bound here.
    max_body_bytes : int
        Limit of a body.
    """
    app = FastAPI(
        title="scangraph",
        version=scangraph.__version__,
        description=_DESCRIPTION,
        openapi_tags=[{"name": "components"}, {"name": "service"}],
        swagger_ui_parameters={"docExpansion": "list"},
    )
    problems.install(app, max_body_bytes)
    app.include_router(_service_routes(backend))
    for component in components:
        if all(port.kind in _READABLE for port in component.inputs):
            _add_component(app, component, backend)
    return app


def _add_component(app: FastAPI, component: Component, backend: Callable[[], Backend]) -> None:
    body_model, ports = request_model(component), {port.path_name: port.name for port in component.inputs}

    async def run(request: Request, body: Any) -> Any:
        request.state.execution_id = execution_id = new_execution_id()
        values = body.model_dump(exclude_unset=True)
        paths = {ports[key]: values.pop(key) for key in list(values) if key in ports and values[key] is not None}
        scheme = values.pop("label_scheme", None)
        answer = await backend().execute(execution_id, component, paths, values, scheme)
        return {
            **answer.paths,
            "execution_id": execution_id,
            "warnings": list(answer.warnings),
            "seconds": answer.seconds,
            "peak_mb": answer.peak_mb,
            "attempts": answer.attempts,
            "facts": answer.facts,
        }

    run.__annotations__ = {"request": Request, "body": body_model, "return": Any}
    described = problems.problem_schema()
    limits = "".join(f"\n- {text}" for text in component.constraints)
    app.add_api_route(
        f"/{component.id}",
        run,
        methods=["POST"],
        response_model=answer_model(component),
        summary=component.title,
        description=f"{component.description}\n\nLimits:{limits}" if limits else component.description,
        operation_id=component.id.replace("/", "_"),
        tags=["components"],
        responses={status: dict(described) for status in (403, 404, 413, 415, 422, 500, 503)},
    )


def _service_routes(backend: Callable[[], Backend]) -> APIRouter:
    router = APIRouter(tags=["service"])

    @router.get("/healthz", summary="Is the process alive?")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @router.get("/readyz", summary="Can every stage take work? Names what cannot, and why")
    async def readyz() -> Response:
        waiting = await backend().readiness()
        body = {"status": "not ready" if waiting else "ready", "not_ready": waiting}
        return JSONResponse(body, 503 if waiting else 200, {"Retry-After": "5"} if waiting else None)

    @router.get("/v1/components", summary="What can be run")
    async def components() -> dict[str, Any]:
        service = backend()
        models = await service.models()
        return {"items": [{**c.describe(), "models": models.get(c.id, [])} for c in service.components.values()]}

    @router.get("/v1/components/{component_id:path}", summary="One component")
    async def component(component_id: str) -> dict[str, Any]:
        service = backend()
        if component_id not in service.components:
            raise UnknownComponent(component=component_id, known=", ".join(service.components))
        models = await service.models()
        return {**service.components[component_id].describe(), "models": models.get(component_id, [])}

    @router.get("/v1/labels", summary="The label table")
    async def labels() -> dict[str, Any]:
        return {"items": [label.model_dump() for label in label_table().values()]}

    return router
