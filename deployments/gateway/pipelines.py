"""Pipelines: made, looked at, changed by revisions."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Query, Response

from deployments.gateway.auth import requires
from deployments.gateway.problems import documented
from deployments.gateway.services import Access
from scangraph.contracts.api import PipelinePage, PipelineView, Validation
from scangraph.contracts.errors import Forbidden, InvalidPipeline, PreconditionRequired
from scangraph.contracts.pipelines import PipelineSpec, check_pipeline
from scangraph.intake import Principal
from scangraph.store import cursors, executions, pipelines
from scangraph.store.pipelines import Stored
from scangraph.store.views import pipeline_view

IfMatch = Annotated[str | None, Header(alias="If-Match", max_length=200, description="the ETag that GET gave")]
IfNoneMatch = Annotated[str | None, Header(alias="If-None-Match", max_length=200)]
_ETAG = {"headers": {"ETag": {"description": "of this revision, strong", "schema": {"type": "string"}}}}


def pipeline_routes(services: Access) -> APIRouter:
    """Make the routes."""
    router = APIRouter(prefix="/v1/pipelines", tags=["pipelines"])
    viewer, editor = Depends(requires(services, "viewer")), Depends(requires(services, "editor"))

    def checked(spec: PipelineSpec) -> PipelineSpec:
        faults = check_pipeline(spec, services().components)
        if faults:
            raise InvalidPipeline(detail="; ".join(fault["detail"] for fault in faults), errors=faults)
        return spec

    def answer(stored: Stored, response: Response, seconds: float | None = None) -> PipelineView:
        response.headers["ETag"] = stored.etag
        return pipeline_view(stored, seconds)

    async def own(principal: Principal, pipeline_id: str) -> Stored:
        found = await pipelines.find_pipeline(services().store, pipeline_id)
        if not found.built_in and not principal.sees(found.owner_id):
            raise Forbidden(
                action=f"changing the pipeline {found.name!r} of somebody else", needed="admin", role=principal.role
            )
        return found

    @router.get(
        "", summary="All pipelines, the newest first", operation_id="list_pipelines", responses=documented(401, 422, 503)
    )
    async def listed(
        *,
        _: Principal = viewer,
        cursor: Annotated[str | None, Query(max_length=200)] = None,
        limit: Annotated[int, Query(ge=1, le=200)] = 50,
        response: Response,
    ) -> PipelinePage:
        before = cursors.decode(cursor) if cursor else None
        rows = await pipelines.list_pipelines(services().store, before=before, limit=limit + 1)
        known = await executions.expected_seconds(services().store, [(row.id, row.revision) for row in rows[:limit]])
        page = PipelinePage(items=[pipeline_view(row, known.get(row.id)) for row in rows[:limit]])
        if len(rows) > limit:
            page.next_cursor = cursors.encode(rows[limit - 1].created_at, rows[limit - 1].id)
            response.headers["Link"] = f'</v1/pipelines?limit={limit}&cursor={page.next_cursor}>; rel="next"'
        return page

    @router.post(
        "",
        status_code=201,
        summary="Make a pipeline",
        operation_id="create_pipeline",
        responses={201: {"description": "made; see Location", **_ETAG}, **documented(401, 403, 409, 413, 422, 503)},
    )
    async def create(*, spec: PipelineSpec, principal: Principal = editor, response: Response) -> PipelineView:
        stored = await pipelines.create_pipeline(services().store, checked(spec), principal.account_id)
        response.headers["Location"] = f"/v1/pipelines/{stored.id}"
        return answer(stored, response)

    @router.post(
        ":validate",
        summary="Would this be a pipeline?",
        operation_id="validate_pipeline",
        responses=documented(401, 413, 422, 503),
    )
    async def validate(*, spec: PipelineSpec, _: Principal = viewer) -> Validation:
        faults = check_pipeline(spec, services().components)
        return Validation(valid=not faults, errors=faults)

    @router.post(
        "/{pipeline_id}:validate",
        summary="Would this be its next revision? Without a body: is the present one still right?",
        operation_id="validate_revision",
        responses=documented(401, 404, 413, 422, 503),
    )
    async def validate_revision(*, pipeline_id: str, _: Principal = viewer, spec: PipelineSpec | None = None) -> Validation:
        stored = await pipelines.find_pipeline(services().store, pipeline_id)
        faults = check_pipeline(spec or stored.spec, services().components)
        return Validation(valid=not faults, errors=faults)

    @router.get(
        "/{pipeline_id}",
        summary="One pipeline; `name@2` is its second revision",
        operation_id="get_pipeline",
        response_model=PipelineView,
        responses={
            200: {"description": "the revision", **_ETAG},
            304: {"description": "not changed"},
            **documented(401, 404, 422, 503),
        },
    )
    async def get(*, pipeline_id: str, _: Principal = viewer, response: Response, known: IfNoneMatch = None) -> Any:
        stored = await pipelines.find_pipeline(services().store, pipeline_id)
        # A proxy that compresses makes weak tags of ours; for reading they are as good (RFC 9110, 13.1.2).
        if known is not None and {tag.strip().removeprefix("W/") for tag in known.split(",")} & {stored.etag, "*"}:
            return Response(status_code=304, headers={"ETag": stored.etag})
        seconds = await executions.expected_seconds(services().store, [(stored.id, stored.revision)])
        return answer(stored, response, seconds.get(stored.id))

    @router.put(
        "/{pipeline_id}",
        summary="Make the next revision",
        operation_id="update_pipeline",
        responses={200: {"description": "the revision", **_ETAG}, **documented(401, 403, 404, 409, 412, 413, 422, 428, 503)},
    )
    async def update(
        *,
        pipeline_id: str,
        spec: PipelineSpec,
        principal: Principal = editor,
        response: Response,
        if_match: IfMatch = None,
    ) -> PipelineView:
        await own(principal, pipeline_id)
        if if_match is None:
            raise PreconditionRequired
        stored = await pipelines.update_pipeline(
            services().store, pipeline_id, checked(spec), principal.account_id, if_match.strip()
        )
        return answer(stored, response)

    @router.delete(
        "/{pipeline_id}",
        status_code=204,
        summary="Take a pipeline away; what runs it goes on",
        operation_id="delete_pipeline",
        responses=documented(401, 403, 404, 409, 412, 422, 428, 503),
    )
    async def remove(*, pipeline_id: str, principal: Principal = editor, if_match: IfMatch = None) -> None:
        await own(principal, pipeline_id)
        if if_match is None:
            raise PreconditionRequired
        await pipelines.delete_pipeline(services().store, pipeline_id, if_match.strip())

    return router
