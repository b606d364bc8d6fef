"""Executions: accepted, looked at, cancelled, tried again. Both the pipelines' road and the direct endpoints'."""

from __future__ import annotations

import hashlib
import json
import re
import uuid
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, NamedTuple

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from deployments.gateway.auth import Principal, requires
from deployments.gateway.files import Form, discard, keep, receive_form
from deployments.gateway.live import hub
from deployments.gateway.problems import documented
from deployments.gateway.services import Access, Services
from scangraph.contracts.api import (
    TERMINAL,
    ExecutionAccepted,
    ExecutionPage,
    ExecutionView,
    InputFile,
    NewExecution,
    Priority,
    Status,
)
from scangraph.contracts.errors import AlreadyEnded, Forbidden, InvalidInputs, NoSuch, NotEnded, ScanGraphError
from scangraph.contracts.pipelines import PipelineInput, PipelineSpec, assign_parameters
from scangraph.store import cursors, executions, pipelines
from scangraph.store import files as file_records
from scangraph.store.executions import QueueLimits, Record
from scangraph.store.pipelines import Stored
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
#: What the executor and the gateway keep for themselves in the storage.
_OURS, _OWNED = ("steps/", "uploads/"), ("files/", "results/")
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


# --- inputs ----------------------------------------------------------------------------------------------------------------


async def resolve_inputs(
    services: Services, principal: Principal, spec: PipelineSpec, given: Mapping[str, Any]
) -> tuple[dict[str, Any], int | None]:
    """Find the files that are named for a pipeline's inputs.

    Returns
    -------
    inputs : dict
        As `NewExecution.inputs` of the records.
    input_bytes : int or None
        Of the decoded images, where all are known.

    Raises
    ------
    InvalidInputs
        Points at each input that does not fit.
    NoSuch, PathRefused, FileMissing
    """
    faults: list[dict[str, str]] = []
    found: dict[str, Any] = {}
    known = ", ".join(spec.inputs)
    strangers = given.keys() - spec.inputs.keys()
    faults += [_fault(name, f"the pipeline has no input {name!r}; it has {known}") for name in strangers]
    for name, wanted in spec.inputs.items():
        value = given.get(name)
        if value is None:
            if not wanted.optional:
                faults.append(_fault(name, f"input {name!r} ({wanted.kind}) is missing"))
            continue
        listed = value if isinstance(value, list) else [value]
        if isinstance(value, list) and not wanted.many:
            faults.append(_fault(name, f"input {name!r} takes one file"))
            continue
        if not listed:
            faults.append(_fault(name, f"input {name!r} needs at least one file"))
            continue
        entries = [await _resolve(services, principal, name, wanted, one, faults) for one in listed]
        found[name] = entries if wanted.many else entries[0]
    if faults:
        raise InvalidInputs(detail="; ".join(fault["detail"] for fault in faults), errors=faults)
    sizes = [entry.get("decoded_bytes") for entry in executions.input_entries(found)]
    return found, sum(s for s in sizes if s) if all(sizes) else None


def _fault(name: str, detail: str) -> dict[str, str]:
    return {"pointer": f"/inputs/{name}", "detail": detail}


async def _resolve(
    services: Services, principal: Principal, name: str, wanted: PipelineInput, given: Any, faults: list[dict[str, str]]
) -> dict[str, Any]:
    if isinstance(given, str):
        given = InputFile(file_id=given) if _is_uuid(given) else InputFile(path=given)
    if (given.file_id is None) == (given.path is None):
        faults.append(_fault(name, f"input {name!r}: give either `file_id` or `path`"))
        return {}
    row = await (_by_id(services, principal, given.file_id) if given.file_id else _by_path(services, principal, given.path))
    if row is None:
        path = services.storage.name_of(given.path)
        await services.storage.head(path)
        return {"file_id": None, "path": path, "label_scheme": given.label_scheme}
    readable = (row.header or {}).get("readable_as")
    if wanted.kind in {"image", "mask"} and (row.kind != "nifti" or (readable is not None and wanted.kind not in readable)):
        what = row.kind if row.kind != "nifti" else f"readable as {' or '.join(readable or [])}"
        faults.append(_fault(name, f"input {name!r} takes a {wanted.kind}; {row.filename!r} is {what}"))
    return {
        "file_id": row.id,
        "path": row.storage_name,
        "label_scheme": given.label_scheme,
        "sha256": row.sha256,
        "decoded_bytes": (row.header or {}).get("decoded_bytes"),
    }


def _is_uuid(text: str) -> bool:
    try:
        return str(uuid.UUID(text)) == text.lower()
    except ValueError:
        return False


async def _by_id(services: Services, principal: Principal, file_id: str) -> File:
    row = await file_records.get_file(services.store, file_id)
    if not principal.sees(row.owner_id):
        raise NoSuch(kind="file", id=file_id)
    return row


async def _by_path(services: Services, principal: Principal, path: str) -> File | None:
    """Return the record of a path, None for what a backend put there itself. Somebody else's is not there."""
    name = services.storage.name_of(path)
    row = await file_records.by_storage_name(services.store, name)
    if row is not None and principal.sees(row.owner_id):
        return row
    if row is not None or name.startswith(_OURS) or (name.startswith(_OWNED) and principal.role != "admin"):
        raise NoSuch(kind="file", id=path)
    return None


# --- accepting -------------------------------------------------------------------------------------------------------------


def fingerprint(*parts: Any) -> str:
    """Hash a request: the same words in another order are the same request."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


async def submit(
    services: Services,
    principal: Principal,
    stored: Stored,
    inputs: Mapping[str, Any],
    parameters: Mapping[str, Any],
    priority: Priority = "normal",
    key: tuple[str, str] | None = None,
) -> tuple[str, bool]:
    """Check and accept an execution of a pipeline; returns its id, and whether the key had made it before."""
    versions = {step.component: services.components[step.component].version for step in _runnable(services, stored)}
    found, size = await resolve_inputs(services, principal, stored.spec, inputs)
    full, faults = assign_parameters(stored.spec, services.components, parameters)
    if faults:
        raise InvalidInputs(detail="; ".join(fault["detail"] for fault in faults), errors=faults)
    new = executions.NewExecution(
        principal.account_id, stored.id, stored.revision, stored.spec, found, full, versions, priority, size
    )
    execution_id, replayed = await executions.accept(services.store, new, _limits(services), key)
    await services.wake()
    return execution_id, replayed


def _runnable(services: Services, stored: Stored) -> Sequence[Any]:
    missing = sorted({step.component for step in stored.spec.steps} - services.components.keys())
    if missing:
        raise InvalidInputs(detail=f"pipeline {stored.name!r} needs {', '.join(missing)}, which this service does not have")
    return stored.spec.steps


def _limits(services: Services) -> QueueLimits:
    s = services.settings.executor
    return QueueLimits(s.max_pending, s.max_pending_per_account, s.ageing_seconds)


async def look(services: Services, execution_id: str) -> Record:
    """Load an execution as of now."""
    return await executions.load(services.store, execution_id, services.settings.executor.max_running)


async def own(services: Services, principal: Principal, execution_id: str) -> None:
    """Raise `NoSuch` unless it is there and this one's to see."""
    if not principal.sees(await executions.owner_of(services.store, execution_id)):
        raise NoSuch(kind="execution", id=execution_id)


def failure(record: Record) -> ScanGraphError:
    """Return what a failed or cancelled execution ended with, as the error that it was."""
    row = record.execution
    if row.state == "cancelled":
        return AlreadyEnded(execution_id=row.id, state="cancelled", hint="start a new one to run it again")
    error = row.error or {}
    return Failed(error.get("code", "stage-failed"), error.get("status", 500), error.get("title", "It failed"), error)


class Failed(ScanGraphError):
    """An execution's recorded error, told again."""

    def __init__(self, code: str, status: int, title: str, recorded: Mapping[str, Any]) -> None:
        super().__init__(detail=recorded.get("detail", ""), errors=recorded.get("errors"))
        self.code, self.status, self.title = code, status, title  # type: ignore[misc]


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
        versions = {step.component: s.components[step.component].version for step in _runnable(s, stored)}
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
        fresh, replayed = await executions.accept(s.store, new, _limits(s), key)
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
    if form is None:
        return
    for row in rows:
        await file_records.delete_file(s.store, row.id)
    await discard(s, [file for _, file in form.files])
