"""The HTTP application. The direct endpoints are made of the components' declarations: none of them is named here."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, Literal

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, create_model
from starlette.routing import BaseRoute, Match
from starlette.types import Receive, Scope, Send

import scangraph
from deployments.gateway import problems
from deployments.gateway.auditing import Audited
from deployments.gateway.auth import auth_routes, requires
from deployments.gateway.display import display_routes
from deployments.gateway.entrance import Entrance
from deployments.gateway.executions import (
    IdempotencyKey,
    Prefer,
    execution_routes,
    preferences,
)
from deployments.gateway.files import file_routes
from deployments.gateway.live import hub, live_routes
from deployments.gateway.metrics import metrics_routes
from deployments.gateway.page import page_routes
from deployments.gateway.pipelines import pipeline_routes
from deployments.gateway.problems import documented
from deployments.gateway.resumable import upload_routes
from deployments.gateway.services import Access, Services
from deployments.gateway.sessions import session_routes
from scangraph.contracts import Component, label_of, label_table
from scangraph.contracts.api import ExecutionAccepted, InputFile, NewExecution
from scangraph.contracts.errors import StorageUnavailable, UnknownComponent
from scangraph.contracts.pipelines import one_step_pipeline, pipeline_name
from scangraph.intake import Principal, failure, fingerprint, look, submit
from scangraph.settings import GatewaySettings
from scangraph.store import executions, pipelines
from scangraph.store.executions import Record
from scangraph.store.views import accepted

_DESCRIPTION = """\
CT scans in, label masks and surgical 3-D scenes out. **Research use only**: not a medical device.

Everything but health, documentation and login wants a bearer token (`POST /v1/auth/login`), or the page's cookies. Upload
files (`/v1/files`, or resumably `/v1/uploads`), run a pipeline on them (`/v1/executions`), follow it live (WebSocket `/v1/ws`)
and fetch the results.
The direct endpoints run one component on storage paths and wait.
Every error is `application/problem+json`.
"""
#: A direct endpoint waits as long as its client does; a day ends every connection.
_FOREVER = 86400.0
#: How long the storage may take to show that it is there.
_STORAGE_SECONDS = 5
#: Where a request's scope says which endpoint it found.
_LATER = "scangraph.endpoint"


class _Answer(BaseModel):
    """Common to the answers of all components."""

    execution_id: str
    warnings: list[str] = Field(description="limits that the input breaks, and what must be known about the result")
    seconds: float = Field(description="wall time inside the stage")
    peak_mb: float = Field(description="highest resident memory of the stage while it worked")
    attempts: int = Field(description="0 where the result was known, 1, or more where a process died and it was tried again")
    facts: dict[str, Any] = Field(description="what else the stage says: model, counts")


def request_model(component: Component) -> type[BaseModel]:
    """Make the body of a component's endpoint: a path per input, the parameters beside them."""
    fields: dict[str, Any] = {}
    for port in component.inputs:
        kind: Any = list[str] if port.many else str
        rules: dict[str, Any] = {"min_length": 1, "description": port.description}
        if port.also:
            rules["validation_alias"] = AliasChoices(port.path_name, *port.also)
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


def build_app(components: tuple[Component, ...], services: Access, settings: GatewaySettings) -> FastAPI:
    """Build the application.

    Parameters
    ----------
    components : tuple of Component
        What is offered.
    services : callable
        Gives the services at request time: Serve copies the application into its replica, so nothing may be bound here.
    settings : GatewaySettings
        Limits.
    """
    app = FastAPI(
        title="scangraph",
        version=scangraph.__version__,
        description=_DESCRIPTION,
        openapi_tags=[{"name": name} for name in ("accounts", "files", "pipelines", "executions", "components", "service")],
        swagger_ui_parameters={"docExpansion": "list"},
        # Its own spans and lines would hold paths; see `entrance.py`.
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
    )
    problems.install(app, settings.max_body_bytes, settings.stall_seconds)
    app.add_middleware(Audited, services=services)
    app.add_middleware(Entrance)
    for routes in (
        auth_routes,
        session_routes,
        file_routes,
        display_routes,
        upload_routes,
        pipeline_routes,
        execution_routes,
        live_routes,
        metrics_routes,
        page_routes,
        _service_routes,
    ):
        app.include_router(routes(services))
    for component in components:
        if _has_endpoint(component):
            app.router.routes.append(_endpoint(component, services))
    later = _LaterEndpoints({component.id for component in components}, services)
    app.router.routes.append(later)
    app.openapi = lambda: _document(app, later)  # type: ignore[method-assign]
    return app


def _document(app: FastAPI, later: _LaterEndpoints) -> dict[str, Any]:
    """Return the OpenAPI document, with what FastAPI cannot know: a body that is either JSON or a form; and new components."""
    routes = later.routes()
    if app.openapi_schema is None or later.documented != routes:
        later.documented = routes
        document = get_openapi(
            title=app.title,
            version=app.version,
            description=app.description,
            routes=[*app.routes, *routes],
            tags=app.openapi_tags,
        )
        schema = NewExecution.model_json_schema(ref_template="#/components/schemas/{model}")
        document["components"]["schemas"].update(schema.pop("$defs"))
        document["components"]["schemas"]["NewExecution"] = schema
        properties = {
            "pipeline_id": {"type": "string"},
            "parameters": {"type": "string", "contentMediaType": "application/json"},
            "priority": {"enum": ["high", "normal", "low"]},
            "input_files": {"type": "array", "items": {"type": "string", "format": "binary"}},
        }
        form = {"type": "object", "required": ["pipeline_id"], "properties": properties}
        form["additionalProperties"] = {"type": "string", "format": "binary"}
        document["paths"]["/v1/executions"]["post"]["requestBody"] = {
            "required": True,
            "content": {
                "application/json": {"schema": {"$ref": "#/components/schemas/NewExecution"}},
                "multipart/form-data": {"schema": form},
            },
        }
        app.openapi_schema = document
    return app.openapi_schema


def _has_endpoint(component: Component) -> bool:
    return component.reads_files


class _LaterEndpoints(BaseRoute):
    """The endpoints of components that came after the start: made when they are asked for, gone with their components.

    Parameters
    ----------
    fixed : set of str
        Components whose endpoints are routes of their own.
    """

    def __init__(self, fixed: set[str], services: Access) -> None:
        self._fixed, self._services = fixed, services
        self._made: dict[str, tuple[Component, APIRoute]] = {}
        self.documented: list[APIRoute] = []

    def routes(self) -> list[APIRoute]:
        """Return the endpoints that there are now."""
        later = [c for c in self._services().components.values() if c.id not in self._fixed and _has_endpoint(c)]
        return [self._route(component) for component in later]

    def _route(self, component: Component) -> APIRoute:
        made = self._made.get(component.id)
        if made is None or made[0] != component:
            made = self._made[component.id] = component, _endpoint(component, self._services)
        return made[1]

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """Say whether a request is for one of them."""
        component_id = scope["path"].removeprefix("/") if scope["type"] == "http" else ""
        if component_id in self._fixed or component_id.count("/") != 1:
            return Match.NONE, {}
        component = self._services().components.get(component_id)
        if component is None or not _has_endpoint(component):
            return Match.NONE, {}
        route = self._route(component)
        match, child = route.matches(scope)
        return match, {**child, _LATER: route}

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand the request to the endpoint."""
        await scope[_LATER].handle(scope, receive, send)


def _endpoint(component: Component, services: Access) -> APIRoute:
    """Make the endpoint of a component: its pipeline of one step, run and waited for."""
    body_model, ports = request_model(component), {port.path_name: port.name for port in component.inputs}
    answered = answer_model(component)
    operator = Depends(requires(services, "operator"))

    async def run(
        *,
        request: Request,
        body: Any,
        response: Response,
        principal: Principal = operator,
        idempotency_key: IdempotencyKey = None,
        prefer: Prefer = None,
    ) -> Any:
        s, asked = services(), preferences(prefer)
        values = body.model_dump(exclude_unset=True)
        paths = {ports[key]: values.pop(key) for key in list(values) if key in ports and values[key] is not None}
        scheme = values.pop("label_scheme", None)
        inputs = {name: _given(given, scheme) for name, given in paths.items()}
        key = (idempotency_key, fingerprint(component.id, paths, scheme, values)) if idempotency_key else None
        execution_id = await executions.replay(s.store, principal.account_id, key) if key else None
        replayed = execution_id is not None
        if execution_id is None:
            stored = await pipelines.find_built_in(s.store, one_step_pipeline(component))
            execution_id, replayed = await submit(s, principal, stored, inputs, {"steps": {"run": values}}, key=key)
        request.state.execution_id = execution_id
        response.headers["Location"] = f"/v1/executions/{execution_id}"
        if replayed:
            response.headers["Idempotency-Replayed"] = "true"
        seconds = _FOREVER if asked.wait_seconds is None else asked.wait_seconds
        if asked.at_once or not await hub(s).wait_ended(execution_id, seconds):
            response.headers["Preference-Applied"] = "respond-async" if asked.at_once else f"wait={seconds:.0f}"
            response.status_code = 202
            return JSONResponse(accepted(await look(s, execution_id)).model_dump(mode="json"), 202, dict(response.headers))
        record = await look(s, execution_id)
        if record.execution.state != "completed":
            raise failure(record)
        given = [path for value in paths.values() for path in ([value] if isinstance(value, str) else value)]
        root = s.storage.local_root if all(Path(path).is_absolute() for path in given) else None
        return _answer(component, record, root)

    run.__annotations__ = {**run.__annotations__, "body": body_model}
    limits = "".join(f"\n- {text}" for text in component.constraints)
    return APIRoute(
        f"/{component.id}",
        run,
        methods=["POST"],
        response_model=answered,
        summary=component.title,
        description=f"{component.description}\n\nLimits:{limits}" if limits else component.description,
        operation_id=component.id.replace("/", "_"),
        tags=["components"],
        responses={
            202: {"description": "accepted, where `Prefer` asks not to wait", "model": ExecutionAccepted},
            **documented(401, 403, 404, 408, 409, 413, 415, 422, 429, 500, 503, 504, 507),
        },
    )


def _given(value: Any, scheme: str | None) -> Any:
    """Name a file by its path: here a text is always one."""
    if isinstance(value, list):
        return [_given(one, scheme) for one in value]
    return InputFile(path=value, label_scheme=scheme)


def _answer(component: Component, record: Record, root: Path | None) -> dict[str, Any]:
    """Answer with the results' paths: absolute where the inputs' were."""
    first: dict[str, str] = {}
    for file in record.files:
        first.setdefault(str(file.output), str(root / file.storage_name) if root else file.storage_name)
    (step,) = record.steps
    return {
        **{port.path_name: first[port.name] for port in component.outputs},
        "execution_id": record.execution.id,
        "warnings": step.warnings,
        "seconds": step.seconds,
        "peak_mb": step.peak_mb,
        "attempts": step.attempts,
        "facts": step.facts,
    }


class Items(BaseModel):
    """A list."""

    items: list[dict[str, Any]]


class Readiness(BaseModel):
    """Whether every stage can take work, and why not."""

    status: Literal["ready", "not ready"]
    not_ready: dict[str, str]


async def _storage_state(services: Services) -> dict[str, str]:
    """Return why the storage cannot be used, if it cannot."""
    try:
        async with asyncio.timeout(_STORAGE_SECONDS):
            await services.storage.reach()
    except TimeoutError:
        return {"storage": f"it does not answer within {_STORAGE_SECONDS} s"}
    except StorageUnavailable as error:
        return {"storage": str(error.fields["reason"])}
    return {}


def _service_routes(services: Access) -> APIRouter:
    router = APIRouter(tags=["service"])
    viewer, admin = Depends(requires(services, "viewer")), Depends(requires(services, "admin"))

    def shown(component: Component, models: dict[str, Any], waiting: dict[str, str]) -> dict[str, Any]:
        reason = waiting.get(component.deployment)
        return {
            **component.describe(),
            "models": models.get(component.id, []),
            "ready": reason is None,
            "not_ready": reason,
            "pipeline": pipeline_name(component.id) if component.reads_files else None,
        }

    @router.get("/healthz", summary="Is the process alive?", operation_id="healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @router.get(
        "/readyz",
        summary="Can every stage take work? Names what cannot, and why",
        operation_id="readyz",
        response_model=Readiness,
        responses={503: {"model": Readiness, "description": "not yet"}},
    )
    async def readyz() -> Response:
        waiting = await services().readiness() | await _storage_state(services())
        body = {"status": "not ready" if waiting else "ready", "not_ready": waiting}
        return JSONResponse(body, 503 if waiting else 200, {"Retry-After": "5"} if waiting else None)

    @router.get("/v1/doors", summary="How the other doors are", operation_id="list_doors", responses=documented(401, 403, 503))
    async def doors(*, _: Principal = admin) -> dict[str, dict[str, Any]]:
        return await services().doors()

    @router.get("/v1/components", summary="What can be run", operation_id="list_components", responses=documented(401, 503))
    async def components(*, _: Principal = viewer) -> Items:
        s = services()
        models, waiting = await s.models(), await s.readiness()
        return Items(items=[shown(c, models, waiting) for c in s.components.values()])

    @router.get(
        "/v1/components/{component_id:path}",
        summary="One component: ports, JSON Schema of its parameters, limits, models, readiness",
        operation_id="get_component",
        responses=documented(401, 404, 422, 503),
    )
    async def component(*, component_id: str, _: Principal = viewer) -> dict[str, Any]:
        s = services()
        if component_id not in s.components:
            raise UnknownComponent(component=component_id, known=", ".join(s.components))
        return shown(s.components[component_id], await s.models(), await s.readiness())

    @router.get(
        "/v1/labels",
        summary="The label table, and what installed models add",
        operation_id="list_labels",
        responses=documented(401, 503),
    )
    async def labels(*, _: Principal = viewer) -> Items:
        own = {
            n: name for models in (await services().models()).values() for m in models for n, name in m.get("names", {}).items()
        }
        return Items(items=[label_of(number, own).model_dump() for number in (*label_table(), *sorted(own))])

    return router
