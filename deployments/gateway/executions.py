"""Executions: accepted, looked at, cancelled, tried again. Both the pipelines' road and the direct endpoints'."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, NamedTuple

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import StreamingResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from deployments.gateway.archive import zipped
from deployments.gateway.auth import requires
from deployments.gateway.files import INERT, Form, receive_form
from deployments.gateway.live import hub
from deployments.gateway.problems import documented
from deployments.gateway.services import Access, Services
from scangraph.contracts.api import (
    TERMINAL,
    ExecutionAccepted,
    ExecutionPage,
    ExecutionView,
    NewExecution,
    Priority,
    Status,
)
from scangraph.contracts.errors import Forbidden, InvalidInputs, NoSuch, NotEnded
from scangraph.contracts.pipelines import PipelineSpec
from scangraph.intake import Principal, fingerprint, keep, limits, look, own, runnable, safe_name, submit, take_back
from scangraph.store import cursors, executions, pipelines
from scangraph.store.removing import remove_execution
from scangraph.store.tables import File
from scangraph.store.views import accepted, list_view, provenance, to_view

IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key", min_length=1, max_length=255, description="sent again with the same body, makes nothing new"
    ),
]
Prefer = Annotated[
    str | None,
    Header(max_length=200, description="`wait=30`: answer when it has ended, or after 30 s; `respond-async`: at once"),
]
_FORM = "multipart/form-data"
_BINARY = {"type": "string", "format": "binary"}
_LONGEST_WAIT = 300
_RETRY_AFTER = "2"


class Asked(NamedTuple):
    """What a client prefers (RFC 7240)."""

    at_once: bool
    wait_seconds: float | None


def preferences(header: str | None) -> Asked:
    """Read `Prefer`; what is not understood is ignored, as the RFC says."""
    parts = [part.strip().lower() for part in (header or "").split(",")]
    waits = [found.group(1) for part in parts if (found := re.fullmatch(r'wait\s*=\s*"?(\d{1,6})"?', part))]
    return Asked("respond-async" in parts, min(float(waits[0]), _LONGEST_WAIT) if waits else None)


# --- routes ----------------------------------------------------------------------------------------------------------------


async def _read_request(request: Request, s: Services, principal: Principal) -> tuple[NewExecution, Form | None]:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == _FORM:
        form = await receive_form(
            request, s, principal, file_fields=lambda name: name not in {"pipeline_id", "parameters", "priority"}
        )
        try:
            return _from_form(form), form
        except BaseException:
            await _take_back(s, form, ())
            raise
    if kind not in {"application/json", ""} and not kind.endswith("+json"):
        raise HTTPException(415, f"send application/json or {_FORM}, not {kind!r}")
    body = await request.body()
    try:
        return NewExecution.model_validate_json(body), None
    except ValidationError as error:
        raise RequestValidationError(error.errors(include_url=False, include_context=False)) from None
    except RecursionError:
        raise InvalidInputs(detail="the body is nested too deeply") from None


def _from_form(form: Form) -> NewExecution:
    """Read the form's words; its files get their places by name, or, as `input_files`, in the pipeline's order."""
    fields = dict(form.fields)
    try:
        parameters = json.loads(fields.pop("parameters", "") or "{}")
    except (ValueError, RecursionError):
        raise InvalidInputs(
            detail="`parameters` must be JSON", errors=[{"pointer": "/parameters", "detail": "must be JSON"}]
        ) from None
    try:
        return NewExecution.model_validate({"inputs": {}, "parameters": parameters, **fields})
    except ValidationError as error:
        raise RequestValidationError(error.errors(include_url=False, include_context=False)) from None


def _place(spec: PipelineSpec, form: Form, rows: Sequence[File]) -> dict[str, Any]:
    """Give the form's files to the pipeline's inputs."""
    placed: dict[str, list[str]] = {}
    free = [name for name in spec.inputs if name not in {field for field, _ in form.files}]
    for (field, _), row in zip(form.files, rows, strict=True):
        name = field
        if field == "input_files" and field not in spec.inputs:
            name = free[0] if free else field
            if name in spec.inputs and not spec.inputs[name].many:
                free.pop(0)
        placed.setdefault(name, []).append(row.id)
    return {
        name: ids if len(ids) > 1 or (name in spec.inputs and spec.inputs[name].many) else ids[0]
        for name, ids in placed.items()
    }


def execution_routes(services: Access) -> APIRouter:
    """Make the routes."""
    router = APIRouter(prefix="/v1/executions", tags=["executions"])
    viewer, operator = Depends(requires(services, "viewer")), Depends(requires(services, "operator"))

    async def answer(s: Services, execution_id: str, response: Response, prefer: str | None, replayed: bool = False) -> Any:
        asked = preferences(prefer)
        response.headers["Location"] = f"/v1/executions/{execution_id}"
        if replayed:
            response.headers["Idempotency-Replayed"] = "true"
        if asked.wait_seconds is not None and not asked.at_once:
            response.headers["Preference-Applied"] = f"wait={asked.wait_seconds:.0f}"
            if await hub(s).wait_ended(execution_id, asked.wait_seconds):
                response.status_code = 200
                return to_view(await look(s, execution_id))
        response.status_code = 202
        response.headers["Retry-After"] = _RETRY_AFTER
        return accepted(await look(s, execution_id))

    def links(*operations: str) -> dict[str, Any]:
        parameters = {"execution_id": "$response.body#/execution_id"}
        return {name: {"operationId": name, "parameters": parameters} for name in operations}

    follow = links("get_execution", "cancel_execution", "retry_execution", "execution_provenance")

    @router.post(
        "",
        status_code=202,
        summary="Run a pipeline",
        description="As JSON, with file ids or storage paths, or as a form with the files themselves: a field per input, or "
        "`input_files` in the order of the pipeline's inputs.",
        operation_id="create_execution",
        response_model=ExecutionAccepted | ExecutionView,
        responses={
            200: {"description": "it has ended within `Prefer: wait`", "model": ExecutionView},
            202: {"description": "accepted; nothing loses it from here on", "model": ExecutionAccepted, "links": follow},
            **documented(401, 403, 404, 408, 413, 415, 422, 429, 500, 503, 507),
        },
    )
    async def create(
        *,
        request: Request,
        principal: Principal = operator,
        response: Response,
        idempotency_key: IdempotencyKey = None,
        prefer: Prefer = None,
    ) -> Any:
        s = services()
        wish, form = await _read_request(request, s, principal)
        rows: Sequence[File] = ()
        try:
            sent = [[field, file.sha256] for field, file in form.files] if form else None
            digest = fingerprint("POST /v1/executions", wish.model_dump(mode="json"), sent)
            key = (idempotency_key, digest) if idempotency_key else None
            if key and (known := await executions.replay(s.store, principal.account_id, key)):
                await _take_back(s, form, rows)
                return await answer(s, known, response, prefer, replayed=True)
            stored = await pipelines.find_pipeline(s.store, wish.pipeline_id)
            inputs: dict[str, Any] = dict(wish.inputs)
            if form is not None:
                rows = await keep(s, [file for _, file in form.files])
                inputs = _place(stored.spec, form, rows)
            execution_id, replayed = await submit(s, principal, stored, inputs, wish.parameters, wish.priority, key)
        except BaseException:
            await _take_back(s, form, rows)
            raise
        if replayed:
            await _take_back(s, form, rows)
        return await answer(s, execution_id, response, prefer, replayed)

    @router.get(
        "", summary="Executions, the newest first", operation_id="list_executions", responses=documented(401, 403, 422, 503)
    )
    async def listed(
        *,
        request: Request,
        principal: Principal = viewer,
        response: Response,
        status: Status | None = None,
        pipeline: Annotated[str | None, Query(max_length=64, description="id or name")] = None,
        priority: Priority | None = None,
        created_after: datetime | None = None,
        created_before: datetime | None = None,
        owner: Annotated[str | None, Query(max_length=36, description="an account's id; for admins")] = None,
        cursor: Annotated[str | None, Query(max_length=200)] = None,
        limit: Annotated[int, Query(ge=1, le=200)] = 50,
    ) -> ExecutionPage:
        if owner is not None and not principal.sees(owner):
            raise Forbidden(action="looking at the executions of others", needed="admin", role=principal.role)
        rows = await executions.list_executions(
            services().store,
            owner_id=owner if principal.role == "admin" else principal.account_id,
            state=status,
            pipeline=pipeline,
            priority=priority,
            created_after=_zoned(created_after),
            created_before=_zoned(created_before),
            before=cursors.decode(cursor) if cursor else None,
            limit=limit + 1,
        )
        told = await executions.latest(services().store, [row.id for row in rows[:limit]])
        page = ExecutionPage(items=[list_view(row, told.get(row.id, {})) for row in rows[:limit]])
        if len(rows) > limit:
            page.next_cursor = cursors.encode(rows[limit - 1].created_at, rows[limit - 1].id)
            target = request.url.include_query_params(cursor=page.next_cursor)
            response.headers["Link"] = f'<{target.path}?{target.query}>; rel="next"'
        return page

    @router.get(
        "/{execution_id}", summary="One execution", operation_id="get_execution", responses=documented(401, 404, 422, 503)
    )
    async def get(*, execution_id: str, principal: Principal = viewer, response: Response) -> ExecutionView:
        record = await look(services(), execution_id)
        if not principal.sees(record.execution.owner_id):
            raise NoSuch(kind="execution", id=execution_id)
        if record.execution.state not in TERMINAL:
            response.headers["Retry-After"] = _RETRY_AFTER
        return to_view(record)

    @router.delete(
        "/{execution_id}",
        status_code=204,
        summary="Delete an execution that has ended, with its results",
        description="Its inputs stay. What its steps found is kept for later runs until it is the least recently used.",
        operation_id="delete_execution",
        responses=documented(401, 403, 404, 409, 422, 503),
    )
    async def remove(*, execution_id: str, principal: Principal = operator) -> None:
        s = services()
        await own(s, principal, execution_id)
        await remove_execution(s.store, s.storage, execution_id)

    @router.get(
        "/{execution_id}/files.zip",
        summary="Its results in one .zip, with a list that says units and frames",
        operation_id="execution_files",
        response_class=Response,
        responses={
            200: {"description": "the archive", "content": {"application/zip": {"schema": _BINARY}}},
            **documented(401, 404, 422, 503),
        },
    )
    async def archive(
        *,
        execution_id: str,
        outputs: Annotated[str | None, Query(max_length=1000, description="names of outputs, with commas; unset: all")] = None,
        principal: Principal = viewer,
    ) -> Response:
        s = services()
        await own(s, principal, execution_id)
        record = await look(s, execution_id)
        files, wanted = list(record.files), None
        if outputs is not None:
            wanted = [name.strip() for name in outputs.split(",")]
            known = list(dict.fromkeys(str(file.output) for file in files))
            if strangers := sorted(set(wanted) - set(known)):
                detail = f"there is no output {', '.join(map(repr, strangers))}; there are: {', '.join(known) or 'none yet'}"
                raise InvalidInputs(detail=detail, errors=[{"pointer": "/outputs", "detail": detail}])
            files = [file for file in files if file.output in wanted]
        if not files:
            raise NoSuch(kind="result of execution", id=execution_id)
        await asyncio.gather(*(s.storage.head(file.storage_name) for file in files))  # later it is too late for an error
        row = record.execution
        about = f"{row.pipeline} (revision {row.revision}), execution {row.id}"
        headers = {"Content-Disposition": f'attachment; filename="{safe_name(row.pipeline)}-{row.id[:8]}.zip"', **INERT}
        return StreamingResponse(zipped(s.storage, files, about), 200, headers, "application/zip")

    @router.post(
        "/{execution_id}/cancel",
        status_code=202,
        summary="Stop it: at once while it waits, within seconds while it runs",
        operation_id="cancel_execution",
        responses=documented(401, 403, 404, 409, 422, 503),
    )
    async def cancel(*, execution_id: str, principal: Principal = operator) -> ExecutionAccepted:
        s = services()
        await own(s, principal, execution_id)
        await executions.request_cancel(s.store, execution_id)
        await s.wake()
        return accepted(await look(s, execution_id))

    @router.post(
        "/{execution_id}/retry",
        status_code=202,
        summary="Run what failed or was cancelled again; finished steps are not repeated",
        operation_id="retry_execution",
        response_model=ExecutionAccepted | ExecutionView,
        responses={
            200: {"description": "it has ended within `Prefer: wait`", "model": ExecutionView},
            202: {"description": "accepted", "model": ExecutionAccepted, "links": follow},
            **documented(401, 403, 404, 409, 422, 429, 503),
        },
    )
    async def retry(
        *,
        execution_id: str,
        principal: Principal = operator,
        response: Response,
        idempotency_key: IdempotencyKey = None,
        prefer: Prefer = None,
    ) -> Any:
        s = services()
        await own(s, principal, execution_id)
        old = (await look(s, execution_id)).execution
        if old.state not in {"failed", "cancelled"}:
            raise NotEnded(execution_id=execution_id, state=old.state)
        stored = await pipelines.find_revision(s.store, old.pipeline_id, old.revision)
        versions = {step.component: s.components[step.component].version for step in runnable(s, stored)}
        new = executions.NewExecution(
            old.owner_id,
            old.pipeline_id,
            old.revision,
            stored.spec,
            old.inputs,
            old.parameters,
            versions,
            old.priority,  # type: ignore[arg-type]
            old.input_bytes,
            execution_id,
        )
        key = (idempotency_key, fingerprint("retry", execution_id)) if idempotency_key else None
        fresh, replayed = await executions.accept(s.store, new, limits(s), key)
        await s.wake()
        return await answer(s, fresh, response, prefer, replayed)

    @router.get(
        "/{execution_id}/provenance",
        summary="Where every output came from: inputs, versions, models, parameters, hashes",
        operation_id="execution_provenance",
        responses=documented(401, 404, 422, 503),
    )
    async def lineage(*, execution_id: str, principal: Principal = viewer) -> dict[str, Any]:
        s = services()
        record = await look(s, execution_id)
        if not principal.sees(record.execution.owner_id):
            raise NoSuch(kind="execution", id=execution_id)
        stored = await pipelines.find_revision(s.store, record.execution.pipeline_id, record.execution.revision)
        return provenance(record, stored, [file for file in record.files if file.output != "manifest"])

    return router


def _zoned(moment: datetime | None) -> datetime | None:
    """Return the time in UTC, which is also the zone of one without."""
    if moment is None or moment.tzinfo is None:
        return moment and moment.replace(tzinfo=UTC)
    try:
        return moment.astimezone(UTC)
    except OverflowError:  # a few hours before the first year, or after the last one
        return moment.replace(tzinfo=UTC)


async def _take_back(s: Services, form: Form | None, rows: Sequence[File]) -> None:
    """Delete what a form brought that no execution takes."""
    if form is not None:
        await take_back(s, [file for _, file in form.files], rows)
