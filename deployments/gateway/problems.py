"""Every error as RFC 9457 `application/problem+json`."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from scangraph.contracts.errors import ScanGraphError
from scangraph.handles import new_execution_id, own_error

log = logging.getLogger("scangraph")

#: No host stands behind these names, so they are URNs.
TYPE_PREFIX = "urn:scangraph:problem:"
RETRY_AFTER_SECONDS = 5
_STATUS_CODES = {
    404: "not-found",
    405: "method-not-allowed",
    413: "body-too-large",
    415: "unsupported-media",
    503: "overloaded",
}
_STATUS_TITLES = {404: "There is nothing at this address", 405: "The address does not know this method"}


def problem(
    status: int, code: str, title: str, detail: str, *, instance: str, trace_id: str, errors: list[Any] | None = None
) -> Response:
    """Build the answer."""
    body: dict[str, Any] = {
        "type": TYPE_PREFIX + code,
        "title": title,
        "status": status,
        "detail": detail,
        "instance": instance,
    }
    body["trace_id"] = trace_id
    if errors:
        body["errors"] = errors
    headers = {"Retry-After": str(RETRY_AFTER_SECONDS)} if status in {429, 503} else {}
    return Response(json.dumps(body, ensure_ascii=False), status, headers, "application/problem+json")


def from_error(error: ScanGraphError, request: Request) -> Response:
    """Turn one of our errors into a problem; fields are in its sentence, so only structured ones go along."""
    trace_id = str(getattr(request.state, "execution_id", "") or new_execution_id())
    return problem(
        error.status,
        error.code,
        error.title,
        error.detail,
        instance=request.url.path,
        trace_id=trace_id,
        errors=error.fields.get("errors"),
    )


def install(app: FastAPI, max_body_bytes: int) -> None:
    """Give an app these answers for everything that can go wrong in it."""

    @app.exception_handler(ScanGraphError)
    async def ours(request: Request, error: ScanGraphError) -> Response:
        return from_error(error, request)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        errors = [{"pointer": _pointer(e["loc"]), "detail": e["msg"]} for e in error.errors()]
        detail = "; ".join(f"{e['pointer']}: {e['detail']}" for e in errors)
        return problem(
            422,
            "invalid-request",
            "The request does not fit",
            detail,
            instance=request.url.path,
            trace_id=new_execution_id(),
            errors=errors,
        )

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        code = _STATUS_CODES.get(error.status_code, "http-error")
        title = _STATUS_TITLES.get(error.status_code, str(error.detail))
        detail = f"{request.method} {request.url.path}: {error.detail}. See /docs for what there is."
        response = problem(error.status_code, code, title, detail, instance=request.url.path, trace_id=new_execution_id())
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def unforeseen(request: Request, error: Exception) -> Response:
        cause = own_error(error)
        if isinstance(cause, ScanGraphError):
            return from_error(cause, request)
        trace_id = new_execution_id()
        log.error("trace %s: %s %s failed", trace_id, request.method, request.url.path, exc_info=error)
        detail = f"The service failed in a way nobody foresaw; its log has the details under trace {trace_id}."
        return problem(500, "internal-error", "The service failed", detail, instance=request.url.path, trace_id=trace_id)

    app.add_middleware(BodyLimit, max_body_bytes=max_body_bytes)


class BodyLimit:
    """Refuses bodies over a limit while they come in, declared or not: Serve itself buffers whatever is sent."""

    def __init__(self, app: ASGIApp, max_body_bytes: int) -> None:
        self._app, self._limit = app, max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: D102 - ASGI's own signature
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        path = scope["path"]
        if declared.isdigit() and int(declared) > self._limit:
            await self._refuse(path)(scope, receive, send)
            return
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._limit:
                raise HTTPException(413, f"the body has more than {self._limit} bytes")
            return message

        await self._app(scope, counted, send)

    def _refuse(self, path: str) -> Response:
        detail = f"The body may have {self._limit} bytes. Put images into the storage and send their paths."
        return problem(413, "body-too-large", "The request is too large", detail, instance=path, trace_id=new_execution_id())


def _pointer(location: tuple[Any, ...] | list[Any]) -> str:
    """JSON pointer of a validation error, without FastAPI's `body`."""
    return "/" + "/".join(str(part) for part in location if part != "body")


def problem_schema() -> Mapping[str, Any]:
    """OpenAPI description of a problem."""
    return {
        "description": "What went wrong (RFC 9457)",
        "content": {
            "application/problem+json": {
                "schema": {
                    "type": "object",
                    "required": ["type", "title", "status", "detail", "trace_id"],
                    "properties": {
                        "type": {"type": "string", "format": "uri"},
                        "title": {"type": "string"},
                        "status": {"type": "integer"},
                        "detail": {"type": "string"},
                        "instance": {"type": "string"},
                        "trace_id": {"type": "string"},
                        "errors": {
                            "type": "array",
                            "items": {
                                "type": "object",
                                "properties": {"pointer": {"type": "string"}, "detail": {"type": "string"}},
                            },
                        },
                    },
                }
            }
        },
    }
