"""Live updates of an execution: over the WebSocket, and where there is none, by asking now and then."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections.abc import AsyncGenerator
from datetime import datetime
from typing import Any, Literal, Self

from pydantic import AliasChoices, BaseModel, ConfigDict, Field
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, WebSocketException

from scangraph.client.failures import ServerUnreachable, from_problem
from scangraph.client.session import Session, Wish, segment
from scangraph.contracts.api import TERMINAL, ExecutionView, OutputFile, Status, StepProgress, StepStatus
from scangraph.contracts.errors import TransientError, Unauthenticated

_EVENTS = frozenset({"snapshot", "progress", "error", "cancelled"})
_AGAIN = 4401
_LONGEST_MESSAGE = 2**24
_POLL_SECONDS = 3.0
_OPEN_SECONDS = 10.0
#: What ends a connection without ending the watch.
_LOST = (OSError, TimeoutError, WebSocketException, TransientError)


class StepUpdate(BaseModel):
    """How a step is."""

    model_config = ConfigDict(frozen=True)

    status: StepStatus
    started_at: datetime | None = None
    completed_at: datetime | None = None
    progress: StepProgress = StepProgress()
    progress_percentage: float = 0
    attempts: int = 0
    cached: bool = False
    resource_usage: dict[str, float] = {}


class Update(BaseModel):
    """How an execution is, at one moment.

    Attributes
    ----------
    type : str
        `snapshot`: the state as a whole, with `execution`; the others are what happened.
    seq : int or None
        The event's number, to go on from; None where the server was asked instead.
    steps : dict
        By id, those that have begun (of a snapshot: all).
    output_files : list of OutputFile
        Of a completed execution.
    """

    model_config = ConfigDict(frozen=True)

    type: Literal["snapshot", "progress", "error", "cancelled"]
    execution_id: str
    seq: int | None = None
    at: datetime | None = None
    status: Status
    current_step: str | None = None
    progress_percentage: float = 0
    queue_position: int | None = None
    steps: dict[str, StepUpdate] = Field(default_factory=dict, validation_alias=AliasChoices("step_details", "steps"))
    error: dict[str, Any] | None = None
    output_files: list[OutputFile] = []
    execution: ExecutionView | None = None

    @property
    def ended(self) -> bool:
        """Whether there will be no other."""
        return self.status in TERMINAL

    @classmethod
    def of(cls, view: ExecutionView, seq: int | None = None) -> Self:
        """Return the update that a view of the whole makes."""
        steps = {
            step.step_id: StepUpdate.model_validate(step.model_dump(include=set(StepUpdate.model_fields)))
            for step in view.steps
        }
        return cls(
            type="snapshot",
            execution_id=view.execution_id,
            seq=seq,
            status=view.status,
            current_step=view.current_step,
            progress_percentage=view.progress_percentage,
            queue_position=view.queue_position,
            steps=steps,
            error=view.error,
            output_files=view.output_files,
            execution=view,
        )


async def watch(session: Session, execution_id: str, seq: int | None = None) -> AsyncGenerator[Update]:
    """Yield what happens to an execution, until it has ended.

    A connection that breaks is made again, from the last number on, so nothing is missed. Where no WebSocket can be had, the
    server is asked every few seconds; what happened in between is then seen only by its outcome.

    Raises
    ------
    NoSuch, Unauthenticated
    ServerUnreachable
        When it does not come back within the session's patience.
    """
    path = f"/v1/executions/{segment(execution_id)}"
    failures, refused, seen = 0, "", None
    while True:
        token = await session.access.bearer(refused or None) or ""
        try:
            async with contextlib.aclosing(_listen(session, token, execution_id, seq)) as updates:
                async for update in updates:
                    refused = ""
                    if update is None:
                        continue
                    failures, seq = 0, update.seq
                    yield update
                    if update.ended:
                        return
        except Unauthenticated:
            if refused or not await session.access.bearer(token):
                raise
            refused = token
            continue
        except _LOST:
            pass
        failures += 1
        if failures > 1:  # once is an accident, and nothing was missed; twice, and the state is asked for
            view = await session.ask(ExecutionView, Wish("GET", path))
            update, seq = Update.of(view), None
            if update != seen:
                yield update
            if update.ended:
                return
            seen = update
        await asyncio.sleep(random.uniform(0.5, 1) * min(0.1 * 3**failures, _POLL_SECONDS))  # noqa: S311


async def _listen(session: Session, token: str, execution_id: str, seq: int | None) -> AsyncGenerator[Update | None]:
    """Yield what one connection brings; None for a token that was taken."""
    try:
        async with connect(
            session.websocket_url, ssl=session.tls, open_timeout=_OPEN_SECONDS, close_timeout=2, max_size=_LONGEST_MESSAGE
        ) as socket:
            await socket.send(json.dumps({"type": "auth", "token": token}))
            wish = {"type": "watch", "execution_id": execution_id, **({} if seq is None else {"seq": seq})}
            await socket.send(json.dumps(wish))
            while True:
                try:
                    async with asyncio.timeout(session.access.seconds_left):
                        text = await socket.recv()
                except TimeoutError:  # the token is old; the connection is good
                    token = await session.access.bearer() or token
                    await socket.send(json.dumps({"type": "auth", "token": token}))
                    continue
                message = json.loads(text)
                kind = message.get("type")
                if kind == "problem":
                    raise from_problem(message["code"], message["status"], "The server refused", message["detail"])
                if kind == "auth_ok":
                    yield None
                elif kind == "watching" and seq is not None and message["seq"] <= seq and message["ended"]:
                    # It had ended, and nothing will ever be new. (Race: one that ends from here on sends its events.)
                    view = await session.ask(ExecutionView, Wish("GET", f"/v1/executions/{segment(execution_id)}"))
                    yield Update.of(view, seq)
                elif kind == "snapshot":
                    view = ExecutionView.model_validate(message["execution"], extra="ignore")
                    yield Update.of(view, message["seq"])
                elif kind in _EVENTS:
                    yield Update.model_validate(message, extra="ignore")
    except ConnectionClosed as error:
        if error.rcvd is not None and error.rcvd.code == _AGAIN:
            raise Unauthenticated(reason=error.rcvd.reason or "The token was refused") from error
        raise ServerUnreachable(url=session.websocket_url, reason="the connection ended") from error
