"""Every error as RFC 9457 `application/problem+json`."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.gateway.entrance import TRACE
from deployments.gateway.flow import Flow
from scangraph.contracts.errors import ScanGraphError
from scangraph.handles import new_execution_id, own_error

log = logging.getLogger("scangraph")

#: No host stands behind these names, so they are URNs.
TYPE_PREFIX = "urn:scangraph:problem:"
RETRY_AFTER_SECONDS = 5
_STATUS_CODES = {
    404: "not-found",
    405: "method-not-allowed",
    408: "upload-incomplete",
    413: "body-too-large",
    415: "unsupported-media",
    503: "overloaded",
}
_STATUS_TITLES = {
    404: "There is nothing at this address",
    405: "The address does not know this method",
    408: "The request did not arrive in time",
    413: "The request is too large",
}
#: Where a route finds the limit of its request's body (`allow_body`), and bytes that end a silence.
_ALLOWED = "scangraph.body"
_LIVELY = 1024


def problem(
    status: int,
    code: str,
    title: str,
    detail: str,
    *,
    instance: str,
    trace_id: str,
    errors: list[Any] | None = None,
    retry_after: int | None = None,
    execution_id: str | None = None,
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
    if execution_id:
        body["execution_id"] = execution_id
    if errors:
        body["errors"] = errors
    headers = {"Retry-After": str(retry_after or RETRY_AFTER_SECONDS)} if status in {429, 503} else {}
    if status == 401:
        headers["WWW-Authenticate"] = 'Bearer realm="scangraph"'
    return Response(json.dumps(body, ensure_ascii=False), status, headers, "application/problem+json")


def from_error(error: ScanGraphError, request: Request) -> Response:
    """Turn one of our errors into a problem; fields are in its sentence, so only structured ones go along."""
    return problem(
        error.status,
        error.code,
        error.title,
        error.detail,
        instance=request.url.path,
        trace_id=_trace_id(request),
        errors=error.fields.get("errors"),
        retry_after=error.fields.get("retry_after_seconds"),
        execution_id=getattr(request.state, "execution_id", None),
    )


def _trace_id(request: Request) -> str:
    """Return the request's trace, which its log lines and spans name, too."""
    return str(request.scope.get(TRACE) or new_execution_id())


def install(app: FastAPI, max_body_bytes: int, stall_seconds: float = 20) -> None:
    """Give an app these answers for everything that can go wrong in it, and the limits of what it reads."""

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
            trace_id=_trace_id(request),
            errors=errors,
        )

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        if error.status_code == 400:  # FastAPI's answer to a body that is no text, or nested too deeply
            detail = f"{error.detail}: it must be JSON in UTF-8"
            where, trace_id = request.url.path, _trace_id(request)
            return problem(422, "invalid-request", "The request does not fit", detail, instance=where, trace_id=trace_id)
        code = _STATUS_CODES.get(error.status_code, "http-error")
        title = _STATUS_TITLES.get(error.status_code, str(error.detail))
        detail = f"{request.method} {request.url.path}: {error.detail}. See /docs for what there is."
        response = problem(error.status_code, code, title, detail, instance=request.url.path, trace_id=_trace_id(request))
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def unforeseen(request: Request, error: Exception) -> Response:
        cause = own_error(error)
        if isinstance(cause, ScanGraphError):
            return from_error(cause, request)
        trace_id = _trace_id(request)
        log.error("trace %s: %s %s failed", trace_id, request.method, request.url.path, exc_info=error)
        detail = f"The service failed in a way nobody foresaw; its log has the details under trace {trace_id}."
        return problem(500, "internal-error", "The service failed", detail, instance=request.url.path, trace_id=trace_id)

    app.add_middleware(BodyLimit, max_body_bytes=max_body_bytes, stall_seconds=stall_seconds)
    app.add_middleware(Flow)


class BodyLimit:
    """Refuses bodies that are too large or do not come, while they are read: Serve itself buffers whatever is sent.

    Parameters
    ----------
    max_body_bytes : int
        Limit for every request whose route does not ask for more (`allow_body`).
    stall_seconds : float
        Silence after which a body is given up. A kilobyte ends a silence: one that drips takes as long as one that stopped.
    """

    def __init__(self, app: ASGIApp, max_body_bytes: int, stall_seconds: float = 20) -> None:
        self._app, self._limit, self._stall = app, max_body_bytes, stall_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: D102 - ASGI's own signature
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        allowed = scope[_ALLOWED] = {"bytes": self._limit}
        length = dict(scope["headers"]).get(b"content-length", b"")
        declared = int(length) if length.isdigit() else 0
        seen, fresh, waited, more = 0, 0, 0.0, True

        async def checked() -> Message:
            nonlocal seen, fresh, waited, more
            if not more:
                return await receive()  # the client's departure; it may take its time
            if declared > allowed["bytes"]:
                raise _too_large(allowed["bytes"])
            begun = time.monotonic()
            try:
                async with asyncio.timeout(self._stall - waited):
                    message = await receive()
            except TimeoutError:
                detail = f"the body stopped for {self._stall:g} s after {seen} bytes"
                raise HTTPException(408, detail, {"Connection": "close"}) from None
            size = len(message.get("body", b""))
            seen, fresh, waited, more = seen + size, fresh + size, waited + time.monotonic() - begun, _more(message)
            if fresh >= _LIVELY:
                fresh, waited = 0, 0.0
            if seen > allowed["bytes"]:
                raise _too_large(allowed["bytes"])
            return message

        await self._app(scope, checked, send)


def allow_body(request: Request, max_body_bytes: int) -> None:
    """Let a request have a larger body; for routes that stream it."""
    request.scope[_ALLOWED]["bytes"] = max_body_bytes


def _more(message: Message) -> bool:
    return message["type"] == "http.request" and bool(message.get("more_body", False))


def _too_large(limit: int) -> HTTPException:
    return HTTPException(413, f"the body may have {limit} bytes; send images as files (POST /v1/files)")


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
                        "execution_id": {"type": "string"},
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


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Describe the problems that a route may answer, for OpenAPI."""
    return {status: dict(problem_schema()) for status in statuses}
