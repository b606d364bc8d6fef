"""Who accessed whose data is written down here, before the answer goes out; see `scangraph.store.audit`."""

from __future__ import annotations

import re
from typing import Any

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.gateway import problems
from deployments.gateway.auth import network
from deployments.gateway.entrance import PRINCIPAL, TRACE
from deployments.gateway.services import Access as ServicesAccess
from deployments.gateway.services import Services
from scangraph.contracts.errors import ScanGraphError
from scangraph.intake import Principal
from scangraph.store.audit import Access, Recorder

#: Nobody's data: accounts' own tokens, what can be run and how, and how the service is.
_NOT_PATIENTS = re.compile(
    r"/v1/(auth|components|labels|doors|pipelines|jwks\.json)\b|/(metrics|readyz|healthz|docs|openapi\.json)\b"
)
_KINDS = {"file_id": "file", "execution_id": "execution", "upload_id": "upload"}
_PLACE = re.compile(rb"/v1/(file|execution|upload)s/([0-9a-f-]{36})")
_UUID = re.compile(r"[0-9a-f-]{36}")


def recorder(services: Services) -> Recorder:
    """Return the replica's way to the log."""
    found: Recorder = services.state.setdefault("audit", Recorder(services.store))
    return found


async def note_execution(
    services: Services, principal: Principal, door: str, action: str, execution_id: str, code: str
) -> None:
    """Write down that somebody did something to an execution by a door other than HTTP."""
    known = _UUID.fullmatch(execution_id) is not None
    access = Access(principal.account_id, principal.name, door, action, code, "execution", execution_id if known else "")
    await recorder(services).note(access, repeats=True)


class Audited:
    """Wraps the application: an answer to somebody who is known begins when it is in the log.

    What is refused is written down, too, but not requests of nobody (401): anybody could fill the log with those.
    """

    def __init__(self, app: ASGIApp, services: ServicesAccess) -> None:
        self._app, self._services = app, services

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: D102 - ASGI's own signature
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        withheld = False

        async def answer(message: Message) -> None:
            nonlocal withheld
            if withheld:  # the rest of an answer that does not go out
                return
            principal, template = scope.get(PRINCIPAL), getattr(scope.get("route"), "path", "")
            if message["type"] == "http.response.start" and principal and not _NOT_PATIENTS.match(template):
                access = _access(scope, principal, template, message)
                repeats = scope["method"] in {"GET", "HEAD"} or template.startswith("/v1/uploads/")
                try:
                    await recorder(self._services()).note(access, repeats=repeats)
                except ScanGraphError as error:
                    withheld = True
                    await problems.from_error(error, Request(scope))(scope, receive, send)
                    return
            await send(message)

        await self._app(scope, receive, answer)


def _access(scope: Scope, principal: Principal, template: str, message: Message) -> Access:
    kind, object_id = _object(scope, message)
    client = scope.get("client")
    return Access(
        principal.account_id,
        principal.name,
        "http",
        f"{scope['method']} {template}",
        str(message["status"]),
        kind,
        object_id,
        network(client[0]) if client else "",
        str(scope.get(TRACE, "")),
    )


def _object(scope: Scope, message: Message) -> tuple[str, str]:
    """Return what a request was about: the file it made, or what its path names, if that can be an id of ours."""
    headers: dict[bytes, bytes] = dict(message.get("headers", ()))
    for header in (b"location", b"content-location"):
        if found := _PLACE.match(headers.get(header, b"")):
            return found[1].decode(), found[2].decode()
    named: dict[str, Any] = scope.get("path_params", {})
    for name, kind in _KINDS.items():
        if name in named:
            return kind, named[name] if _UUID.fullmatch(str(named[name])) else ""
    return "", ""
