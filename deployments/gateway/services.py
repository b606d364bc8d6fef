"""What the routes need, in one object that a replica makes once and every route gets by `services()` at request time.

Serve copies the FastAPI application into its replica; nothing may be bound to it when it is built.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from scangraph.contracts import Component
from scangraph.settings import Settings
from scangraph.storage import Storage
from scangraph.store import Store
from scangraph.tokens import Tokens


class Gate(Protocol):
    """The part of imageio that the gateway asks what a file is."""

    async def inspect(self, name: str) -> dict[str, Any]:
        """Check a stored file whole and return `kind`, `media_type` and `header`; raises what the gate raises."""
        ...


@dataclass
class Services:
    """Everything behind the routes.

    Parameters
    ----------
    settings : Settings
        All of them; the gateway is a control plane.
    store : Store
        Records.
    storage : Storage
        Files.
    components : mapping
        What can be run, by id.
    tokens : Tokens
        Makes and checks bearer tokens.
    gate : Gate
        Looks into files.
    wake : callable
        Tells the executor that there is work; losing the message costs a second, nothing else.
    readiness : callable
        Deployment -> why it is not ready.
    models : callable
        Component id -> installed models.
    """

    settings: Settings
    store: Store
    storage: Storage
    components: Mapping[str, Component]
    tokens: Tokens
    gate: Gate
    wake: Callable[[], Awaitable[None]]
    readiness: Callable[[], Awaitable[dict[str, str]]]
    models: Callable[[], Awaitable[dict[str, list[dict[str, Any]]]]]
    state: dict[str, Any] = field(default_factory=dict)


Access = Callable[[], Services]
