"""Every HTTP request is counted and traced here; what it was is known when its route is."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from scangraph import tracing

#: Asked by machines every few seconds.
_NOT_COUNTED = frozenset({"/healthz", "/readyz", "/metrics"})
#: Where problems find the request's trace: the last resort stands outside of every middleware.
TRACE = "scangraph.trace_id"
#: Where a request's scope says who asks, once that is known.
PRINCIPAL = "scangraph.principal"


class Entrance:
    """Wraps the application."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: D102 - ASGI's own signature
        if scope["type"] != "http" or scope["path"] in _NOT_COUNTED:
            await self._app(scope, receive, send)
            return
        sent = [value.decode("latin-1") for name, value in scope["headers"] if name == b"traceparent"]
        with tracing.entering("http", "none", sent[0] if len(sent) == 1 else None) as entry:
            scope[TRACE] = tracing.trace_id()

            async def received() -> Message:
                message = await receive()
                entry.received += len(message.get("body", b""))
                return message

            async def answer(message: Message) -> None:
                if message["type"] == "http.response.start":
                    entry.code = str(message["status"])
                entry.sent += len(message.get("body", b""))
                await send(message)

            try:
                await self._app(scope, received, answer)
            except Exception:
                entry.code = "500"
                raise
            finally:
                entry.operation = _operation(scope)


def _operation(scope: Scope) -> str:
    """Return method and template of the route that was found: never the path itself, which a client has written."""
    template = getattr(scope.get("route"), "path", None)
    return f"{scope['method']} {template}" if template else "none"
