"""What stands in Serve's HTTP proxy, before anything is handed on to a replica.

Serve calls `middlewares` when a proxy starts, if the environment of `ray start` (or of whoever calls `ray.init`) names it:
`RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=deployments.gateway.door:middlewares`. There is no other way in: a Serve config has
no place for it, and Ray 2.60 refuses `HTTPOptions(middlewares=…)`. Here

- headers that steer Serve are taken away: they are for those who run it, not for clients;
- bodies flow no faster than the other side takes them (`flow.py`);
- a request's head must arrive in time;
- what Serve itself answers, in plain text, becomes `application/problem+json`.
"""

from __future__ import annotations

import asyncio
import logging
import re
from typing import Any, Final

import uvicorn.config
from ray.serve._private import constants
from ray.serve.exceptions import RequestCancelledError
from starlette.middleware import Middleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from deployments.gateway.flow import EXTENSION, READ, STEP, TAKEN, WINDOW
from deployments.gateway.problems import problem
from deployments.gateway.rpc import door as rpc
from scangraph import logs
from scangraph.handles import new_execution_id
from scangraph.settings import load_settings
from scangraph.tracing import trace_id_of

log = logging.getLogger("scangraph")

#: Time that a request's head may take, and bytes that it may have.
HEAD_SECONDS: Final = 10.0
HEAD_BYTES: Final = 2**16

_STEERING = {
    name.lower().replace("-", "_").encode()
    for name in (
        constants.SERVE_HTTP_REQUEST_TIMEOUT_S_HEADER,
        constants.SERVE_HTTP_REQUEST_DISCONNECT_DISABLED_HEADER,
        constants.SERVE_MULTIPLEXED_MODEL_ID,
        constants.SERVE_SESSION_ID,
    )
}
_ROUTER_PREFIX = b"x_serve_"
_REQUEST_ID = constants.SERVE_HTTP_REQUEST_ID_HEADER.encode()
#: A client may name its request, for the logs. Serve decodes and logs the name unseen.
_HARMLESS_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")

#: What Serve says by itself -> the problem's code, title and sentence. Its own text would show a traceback's last line.
_SAID_BY_SERVE: dict[int, tuple[str, str, str]] = {
    408: ("timed-out", "The request took too long", "The request was stopped after the longest time that Serve gives one."),
    429: ("overloaded", "Too many requests", "Every gateway has as many requests as it may; nothing was done with this one."),
    500: (
        "internal-error",
        "The service failed",
        "The proxy failed on this request; its log has the cause under {trace_id}.",
    ),
    503: ("overloaded", "The service is busy", "No gateway can take the request now; nothing was done with it. Send it again."),
}
#: The graph is at `/`, so Serve knows every address, or none yet: "not found" would say that an execution is gone.
_STARTING = (
    "starting",
    "The service is starting",
    "No gateway is there yet; nothing was done with the request. Send it again.",
)
_LOST = (
    "gateway-lost",
    "The gateway went away",
    "The gateway's process ended while it worked on this request. Look whether it was done before you send it again.",
)


def middlewares() -> list[Middleware]:
    """Return what Serve wraps its proxy in, and make its server patient only for so long; and prepare gRPC's server.

    A proxy gets no settings from anybody: it reads what it needs (`SCANGRAPH_HOST`, `SCANGRAPH_GRPC__…`) from the environment.
    """
    # Serve builds uvicorn's configuration itself and leaves the protocol to "auto"; uvicorn has no limit on a head's time (its
    # authors leave that to a server in front), and a middleware sees a request only when the head is complete. This table is
    # where "auto" gets its meaning, and it is read after this call.
    logs.configure("proxy")
    logging.getLogger("asyncio").addFilter(is_news)
    uvicorn.config.HTTP_PROTOCOLS["auto"] = f"{__name__}:{HeadDeadline.__name__}"
    # The gRPC proxy is in the same process and begins to listen after this call.
    rpc.prepare(load_settings())
    return [Middleware(Door)]


def is_news(record: logging.LogRecord) -> bool:
    """Whether a line of asyncio's is worth one: Serve leaves a wait behind for each call whose client has gone, as an error."""
    left_behind = record.exc_info[1] if record.exc_info else None
    return not isinstance(left_behind, RequestCancelledError | StopAsyncIteration)


class Door:
    """Wraps the proxy's ASGI application."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: D102 - ASGI's own signature
        if scope["type"] not in {"http", "websocket"}:
            await self._app(scope, receive, send)
            return
        scope["headers"] = _without_steering(scope["headers"])
        if scope["type"] == "websocket":
            await self._app(scope, receive, send)
            return
        scope["extensions"] = {**scope.get("extensions", {}), EXTENSION: {"window": WINDOW}}
        passage = _Passage(scope, receive, send)
        try:
            await self._app(scope, passage.receive, passage.send)
        except Exception:
            log.exception("Serve's proxy failed on %s %s", scope["method"], scope["path"])
            await passage.answer(500, _SAID_BY_SERVE[500])
        else:
            # Serve says nothing about a replica that died; its server would answer 500 in plain text.
            await passage.answer(503, _LOST)
        finally:
            passage.close()


def _without_steering(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    ids = [value for name, value in headers if name == _REQUEST_ID]
    harmless = len(ids) == 1 and _HARMLESS_ID.fullmatch(ids[0])
    kept = []
    for name, value in headers:
        plain = name.lower().replace(b"-", b"_")
        if plain in _STEERING or plain.startswith(_ROUTER_PREFIX) or (name == _REQUEST_ID and not harmless):
            continue
        kept.append((name, value))
    return kept


class _Passage:
    """One request on its way through, and the answer on its way back."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._scope, self._receive, self._send = scope, receive, send
        self._coming: asyncio.Task[Message] | None = None
        self._news = asyncio.Event()
        self._unread = 0  # of the request's body, in Serve and the replica
        self._taken = 0  # of the response's body, by the client, and not told yet
        self._started = False
        self._withheld: Message | None = None

    async def receive(self) -> Message:
        """Give Serve the next message: the client's, as long as there is room, or how far the client is with the answer."""
        while True:
            self._news.clear()
            if self._taken >= STEP:
                taken, self._taken = self._taken, 0
                return {"type": TAKEN, "bytes": taken}
            if self._coming is None and self._unread < WINDOW:
                self._coming = asyncio.ensure_future(self._receive())
                self._coming.add_done_callback(lambda _: self._news.set())
            if self._coming is not None and self._coming.done():
                message, self._coming = self._coming.result(), None
                self._unread += len(message.get("body", b""))
                return message
            await self._news.wait()

    async def send(self, message: Message) -> None:
        """Pass an answer on; keep what the replica tells the door, and what Serve says in plain text."""
        kind = message["type"]
        if kind == READ:
            self._unread -= message["bytes"]
            self._news.set()
        elif kind == "http.response.start":
            if _is_serves_own(message):
                self._withheld = message
            else:
                self._started = True
                await self._send(message)
        elif self._withheld is None:
            await self._send(message)
            self._taken += len(message.get("body", b""))
            if self._taken >= STEP:
                self._news.set()
        elif not message.get("more_body", False):
            status = int(self._withheld["status"])
            if status == 404:
                await self.answer(503, _STARTING, retry_after="5")
            else:
                await self.answer(status, _SAID_BY_SERVE.get(status, _SAID_BY_SERVE[500]))

    async def answer(self, status: int, said: tuple[str, str, str], retry_after: str | None = None) -> None:
        """Answer with a problem, unless an answer has begun."""
        if self._started:
            return
        self._started = True
        headers = dict(self._withheld["headers"]) if self._withheld else {}
        headers |= {name: value for name, value in self._scope["headers"] if name == _REQUEST_ID}
        sent = next((value.decode("latin-1") for name, value in self._scope["headers"] if name == b"traceparent"), None)
        request_id = headers.get(_REQUEST_ID, b"").decode("ascii")
        trace_id = trace_id_of(sent) or request_id or new_execution_id()
        code, title, detail = said
        path = self._scope["path"]
        detail = detail.format(path=path, trace_id=trace_id)
        response = problem(status, code, title, detail, instance=path, trace_id=trace_id)
        response.headers["X-Request-ID"] = request_id or trace_id
        if retry_after is None and b"retry-after" in headers:
            retry_after = headers[b"retry-after"].decode("ascii")
        if retry_after is not None:
            response.headers["Retry-After"] = retry_after
        await response(self._scope, self._receive, self._send)

    def close(self) -> None:
        """Let go of the client's messages."""
        if self._coming is not None:
            self._coming.cancel()


def _is_serves_own(start: Message) -> bool:
    """Whether an error was not said by the application, which speaks of errors in problem+json only."""
    types = [bytes(value) for name, value in start.get("headers", []) if bytes(name).lower() == b"content-type"]
    return start["status"] >= 400 and types[:1] != [] and types[0].startswith(b"text/plain")


class HeadDeadline(HttpToolsProtocol):
    """uvicorn's HTTP protocol, for clients that send a whole head in time."""

    _timer: asyncio.TimerHandle | None = None
    _place = "between"  # | head | body: what of a request is arriving
    _size = 0
    _upgraded = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # noqa: D102
        super().connection_made(transport)
        self._arm()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: D102
        self._disarm()
        super().connection_lost(exc)

    def handle_websocket_upgrade(self) -> None:  # noqa: D102
        self._upgraded = True
        super().handle_websocket_upgrade()

    def data_received(self, data: bytes) -> None:  # noqa: D102
        before = self._place
        super().data_received(data)
        if self._upgraded or self.transport.is_closing() or not (self.cycle is None or self.cycle.response_complete):
            return
        # Nothing is being answered: this is a head, or the rest of a body whose answer the client has not read yet.
        self._arm()
        if "body" not in (before, self._place):  # the last of such a body is not the next request's head
            self._size += len(data)
            if self._size > HEAD_BYTES:
                self._refuse(431, "head-too-large", "The request's head is too large", f"It may have {HEAD_BYTES} bytes.")

    def on_message_begin(self) -> None:  # noqa: D102
        self._place = "head"
        super().on_message_begin()

    def on_headers_complete(self) -> None:  # noqa: D102
        self._disarm()
        self._place, self._size = "body", 0
        super().on_headers_complete()

    def on_message_complete(self) -> None:  # noqa: D102
        self._place = "between"
        super().on_message_complete()

    def on_response_complete(self) -> None:  # noqa: D102
        super().on_response_complete()
        if self._place != "between":  # what began behind the answered request, or the rest of its body
            self._arm()

    def _arm(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(HEAD_SECONDS, self._late)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _late(self) -> None:
        self._timer = None
        if self._place == "head":
            detail = f"Its head was not complete after {HEAD_SECONDS:g} s."
            self._refuse(408, "request-incomplete", "The request did not arrive in time", detail)
        else:
            self.transport.close()

    def _refuse(self, status: int, code: str, title: str, detail: str) -> None:
        """Answer without an application: there is no request yet that one could be given."""
        self._disarm()
        if not self.transport.is_closing():
            self.transport.write(_on_the_wire(problem(status, code, title, detail, instance="", trace_id=new_execution_id())))
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """Say it as every error is said; uvicorn's own is plain text."""
        self._refuse(400, "bad-http", "This is not HTTP", msg)


def _on_the_wire(response: Response) -> bytes:
    lines: list[Any] = [b"HTTP/1.1 %d " % response.status_code, b"\r\n"]
    lines += [part for name, value in response.raw_headers for part in (name, b": ", value, b"\r\n")]
    return b"".join([*lines, b"connection: close\r\n\r\n", bytes(response.body)])
