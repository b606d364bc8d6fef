"""What the routes need, in one object that a replica makes once and every route gets by `services()` at request time.

Serve copies the FastAPI application into its replica; nothing may be bound to it when it is built.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from scangraph.intake import Intake
from scangraph.tokens import Tokens


async def _no_pages() -> dict[str, str | None]:
    return {}


async def _no_doors() -> dict[str, dict[str, Any]]:
    return {}


@dataclass
class Services(Intake):
    """Everything behind the routes.

    Parameters
    ----------
    tokens : Tokens
        Makes and checks bearer tokens.
    readiness : callable
        Deployment -> why it is not ready.
    models : callable
        Component id -> installed models.
    doors : callable
        Name of another door -> how it is.
    news : callable, optional
        Waits until the executor wrote something since the number given, and returns the newest number. Without it, or while it
        fails, the records are looked at every `poll_seconds`.
    pages : callable
        Node's address, with a port where several share it -> the page of its metrics, None where it does not answer.
    """

    tokens: Tokens
    readiness: Callable[[], Awaitable[dict[str, str]]]
    models: Callable[[], Awaitable[dict[str, list[dict[str, Any]]]]]
    doors: Callable[[], Awaitable[dict[str, dict[str, Any]]]] = _no_doors
    news: Callable[[int], Awaitable[int]] | None = None
    state: dict[str, Any] = field(default_factory=dict)
    pages: Callable[[], Awaitable[dict[str, str | None]]] = _no_pages


Access = Callable[[], Services]
