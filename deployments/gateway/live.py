"""Live progress: the events of the records, tailed for whoever listens. `/v1/ws`, and waiting for an end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any, Literal
from urllib.parse import urlsplit

from fastapi import APIRouter, WebSocket
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from starlette.websockets import WebSocketDisconnect, WebSocketState

from deployments.gateway import cookies
from deployments.gateway.auditing import note_execution
from deployments.gateway.auth import authenticate, still_good
from deployments.gateway.services import Access, Services
from scangraph.contracts.api import TERMINAL
from scangraph.contracts.errors import STATUS_NAMES, NoSuch, ScanGraphError, StoreUnavailable, Unauthenticated
from scangraph.intake import Principal, told
from scangraph.store import executions
from scangraph.store.tables import Event
from scangraph.store.views import to_view

_AUTH_SECONDS = 5.0
_SEND_SECONDS = 20.0
_MOST_WATCHES = 1000
_LONGEST_MESSAGE = 65536
#: How often a conversation looks whether its token was revoked.
_STANDING_SECONDS = 2.0
#: Executions in one look at the records: a statement has room for no more than some thousand of them.
_BATCH = 200
#: Closing codes, 4000 and up are ours: as HTTP's statuses.
_UNAUTHENTICATED, _FORBIDDEN, _SLOW = (STATUS_NAMES[status].websocket for status in (401, 403, 408))


class Hub:
    """Tells a replica's listeners that there is news. One look at the records serves all of them; each then pulls its own.

    Parameters
    ----------
    services : Services
        Where the records are, and how often to look.

    Notes
    -----
    Nothing is queued for anybody, so a slow listener costs no memory: it reads on from its own number when it has time.
    """

    def __init__(self, services: Services) -> None:
        self._services = services
        self._listeners: dict[str, set[asyncio.Event]] = {}
        self._seen: dict[str, int] = {}
        self._tasks: tuple[asyncio.Task[None], ...] = ()
        self._stirred = asyncio.Event()

    def listen(self, execution_id: str, bell: asyncio.Event) -> None:
        """Ring a bell at every event of an execution."""
        self._listeners.setdefault(execution_id, set()).add(bell)
        if not self._tasks or self._tasks[0].done():
            for task in self._tasks:
                task.cancel()
            self._tasks = (asyncio.create_task(self._look(), name="hub"), asyncio.create_task(self._follow(), name="news"))

    def leave(self, execution_id: str, bell: asyncio.Event) -> None:
        """Ring it no more."""
        bells = self._listeners.get(execution_id, set())
        bells.discard(bell)
        if not bells:
            self._listeners.pop(execution_id, None)
            self._seen.pop(execution_id, None)

    async def _look(self) -> None:
        while self._listeners:
            with contextlib.suppress(StoreUnavailable):  # it will be back; nobody misses anything
                for some in _batches(list(self._listeners)):
                    for execution_id, seq in (await executions.newest(self._services.store, some)).items():
                        if self._seen.get(execution_id) != seq and execution_id in self._listeners:
                            self._seen[execution_id] = seq
                            for bell in self._listeners[execution_id]:
                                bell.set()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._services.settings.gateway.poll_seconds):
                    await self._stirred.wait()
            self._stirred.clear()

    async def _follow(self) -> None:
        """Have the executor say when there is news; what it does not say, the next look finds."""
        seen = -1
        while self._listeners and self._services.news is not None:
            try:
                seen = await self._services.news(seen)
            except ScanGraphError:  # it is starting anew
                await asyncio.sleep(self._services.settings.gateway.poll_seconds)
            else:
                self._stirred.set()

    async def events(self, execution_id: str, seq: int) -> AsyncIterator[Event]:
        """Yield the events of an execution after a number, up to the one that ends it, which must not be that one."""
        bell = asyncio.Event()
        bell.set()
        self.listen(execution_id, bell)
        try:
            while True:
                await bell.wait()
                bell.clear()
                try:
                    events = await executions.events_since(self._services.store, {execution_id: seq})
                except StoreUnavailable:
                    await asyncio.sleep(1)
                    bell.set()
                    continue
                for event in events:
                    seq = event.seq
                    yield event
                    if event.body["status"] in TERMINAL:
                        return
                if events:
                    bell.set()  # there may be more than one look brings
        finally:
            self.leave(execution_id, bell)

    async def wait_ended(self, execution_id: str, seconds: float) -> bool:
        """Wait for an execution's end; False when it takes longer."""
        bell = asyncio.Event()
        self.listen(execution_id, bell)
        try:
            async with asyncio.timeout(seconds):
                while True:
                    record = await executions.load(self._services.store, execution_id)
                    if record.execution.state in TERMINAL:
                        return True
                    await bell.wait()
                    bell.clear()
        except TimeoutError:
            return False
        finally:
            self.leave(execution_id, bell)


def hub(services: Services) -> Hub:
    """Return the replica's hub."""
    found: Hub = services.state.setdefault("hub", Hub(services))
    return found


# --- the WebSocket ---------------------------------------------------------------------------------------------------------


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Auth(_Message):
    """Who I am; again, before the token expires. Without a token: whoever the handshake's cookie says."""

    type: Literal["auth"]
    token: str | None = Field(None, max_length=8192)


class Watch(_Message):
    """Tell me of this execution: everything after `seq`, or a snapshot and what follows."""

    type: Literal["watch"]
    execution_id: str = Field(min_length=1, max_length=64)
    seq: int | None = Field(None, ge=0)


class Unwatch(_Message):
    """Tell me no more."""

    type: Literal["unwatch"]
    execution_id: str = Field(min_length=1, max_length=64)


class Ping(_Message):
    """Ask for a sign of life."""

    type: Literal["ping"]


_MESSAGES: TypeAdapter[Auth | Watch | Unwatch | Ping] = TypeAdapter(Auth | Watch | Unwatch | Ping)


class Conversation:
    """One client's WebSocket."""

    def __init__(self, socket: WebSocket, services: Services) -> None:
        self._socket, self._services, self._hub = socket, services, hub(services)
        self._principal: Principal | None = None
        self._watches: dict[str, int] = {}  # execution -> last number sent
        self._bell = asyncio.Event()
        self._sending = asyncio.Lock()

    async def hold(self) -> None:
        """Talk until somebody leaves."""
        await self._socket.accept()
        try:
            async with asyncio.timeout(_AUTH_SECONDS):
                while self._principal is None:
                    await self._hear()
        except TimeoutError:
            await self._close(_UNAUTHENTICATED, "no valid token came in time")
            return
        except ScanGraphError as error:
            await self._close(STATUS_NAMES[error.status].websocket, error.detail)
            return
        tasks = [asyncio.create_task(part) for part in (self._listen(), self._tell(), self._expire())]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        except ScanGraphError as error:
            await self._close(STATUS_NAMES[error.status].websocket, error.detail)
        except TimeoutError:
            await self._close(_SLOW, "you do not read")
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for execution_id in list(self._watches):
                self._forget(execution_id)

    async def _listen(self) -> None:
        while True:
            await self._hear()

    async def _hear(self) -> None:
        message = await self._socket.receive()
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(message.get("code", 1005))
        text = message.get("text") or ""
        if len(text) > _LONGEST_MESSAGE:
            await self._problem("message-too-long", 413, f"a message may have {_LONGEST_MESSAGE} characters")
            return
        try:
            wish = _MESSAGES.validate_json(text)
        except (ValidationError, RecursionError):
            await self._problem("invalid-message", 422, "send auth, watch, unwatch or ping as JSON; see README")
            return
        match wish:
            case Auth():
                token = wish.token
                if token is None:
                    token = cookies.socket_token(self._socket, self._services.settings.gateway.origins)
                await self._become(await authenticate(self._services, token))
            case Ping():
                await self._send({"type": "pong", "at": datetime.now(UTC).isoformat()})
            case _ if self._principal is None:
                raise Unauthenticated(reason="The first message must be auth")
            case Watch():
                await self._begin_watch(self._principal, wish)
            case Unwatch():
                self._forget(wish.execution_id)
                await self._send({"type": "unwatched", "execution_id": wish.execution_id})

    async def _become(self, principal: Principal) -> None:
        """Take another token. Another account, or another role, may not see what was seen: it begins anew."""
        old, self._principal = self._principal, principal
        if old is not None and (old.account_id, old.role) != (principal.account_id, principal.role):
            for execution_id in list(self._watches):
                self._forget(execution_id)
        await self._send({"type": "auth_ok", "name": principal.name, "role": principal.role})

    def _forget(self, execution_id: str) -> None:
        self._watches.pop(execution_id, None)
        self._hub.leave(execution_id, self._bell)

    async def _begin_watch(self, principal: Principal, wish: Watch) -> None:
        execution_id = wish.execution_id
        if len(self._watches) >= _MOST_WATCHES and execution_id not in self._watches:
            await self._problem("too-many-watches", 429, f"a connection may watch {_MOST_WATCHES} executions", execution_id)
            return
        try:
            record = await executions.load(self._services.store, execution_id, self._services.settings.executor.max_running)
            if not principal.sees(record.execution.owner_id):
                raise NoSuch(kind="execution", id=execution_id)
            await note_execution(self._services, principal, "ws", "watch", execution_id, "OK")
        except NoSuch as error:
            await note_execution(self._services, principal, "ws", "watch", execution_id, "NOT_FOUND")
            await self._problem(error.code, error.status, error.detail, execution_id)
            return
        except ScanGraphError as error:
            await self._problem(error.code, error.status, error.detail, execution_id)
            return
        last = record.execution.last_seq
        ended = record.execution.state in TERMINAL
        await self._send({"type": "watching", "execution_id": execution_id, "seq": last, "ended": ended})
        if wish.seq is None or wish.seq > last:
            view = to_view(record).model_dump(mode="json")
            await self._send({"type": "snapshot", "execution_id": execution_id, "seq": last, "execution": view})
            self._watches[execution_id] = last
        else:
            self._watches[execution_id] = wish.seq
        self._hub.listen(execution_id, self._bell)
        self._bell.set()

    async def _tell(self) -> None:
        while True:
            await self._bell.wait()
            self._bell.clear()
            try:
                for some in _batches(list(self._watches)):
                    await self._tell_of(some)
            except StoreUnavailable:
                await asyncio.sleep(1)
                self._bell.set()

    async def _tell_of(self, some: Sequence[str]) -> None:
        seen = {execution_id: self._watches[execution_id] for execution_id in some if execution_id in self._watches}
        events = await executions.events_since(self._services.store, seen)
        for event in events:
            if event.seq <= self._watches.get(event.execution_id, event.seq):
                continue
            message = await told(self._services, event)
            if event.execution_id in self._watches:  # else unwatched meanwhile
                self._watches[event.execution_id] = event.seq
                await self._send(message)
        if events:
            self._bell.set()  # there may be more than one look brings

    async def _expire(self) -> None:
        """End the conversation with the token's life, and look every now and then whether it was revoked."""
        while True:
            principal = self._principal
            assert principal is not None
            left = principal.expires_at.timestamp() - time.time()
            await asyncio.sleep(max(min(left, _STANDING_SECONDS), 0.1))
            if self._principal is principal:
                if principal.expires_at.timestamp() <= time.time():
                    raise Unauthenticated(reason="The token has expired")
                await self._still_good(principal)

    async def _still_good(self, principal: Principal) -> None:
        with contextlib.suppress(StoreUnavailable):
            if not await still_good(self._services, principal):
                raise Unauthenticated(reason="The token was revoked")

    async def _problem(self, code: str, status: int, detail: str, execution_id: str | None = None) -> None:
        body: dict[str, Any] = {"type": "problem", "code": code, "status": status, "detail": detail}
        await self._send({**body, **({"execution_id": execution_id} if execution_id else {})})

    async def _send(self, message: dict[str, Any]) -> None:
        """Send, or give up on a client that does not read."""
        async with self._sending:
            await _in_time(self._socket.send_text(json.dumps(message, default=str)))

    async def _close(self, code: int, reason: str) -> None:
        if self._socket.application_state is not WebSocketState.DISCONNECTED:
            with contextlib.suppress(RuntimeError, TimeoutError):
                # A closing frame has room for 123 bytes of reason.
                await _in_time(self._socket.close(code, reason.encode()[:120].decode(errors="ignore")))


def _batches(ids: list[str]) -> Iterator[list[str]]:
    return (ids[start : start + _BATCH] for start in range(0, len(ids), _BATCH))


async def _in_time(sending: Awaitable[None]) -> None:
    async with asyncio.timeout(_SEND_SECONDS):
        await sending


def _foreign(socket: WebSocket, origins: tuple[str, ...]) -> bool:
    """Whether a page of somebody else's opened it; what is no browser sends no Origin."""
    origin = socket.headers.get("origin")
    return origin is not None and origin not in origins and urlsplit(origin).netloc != socket.headers.get("host")


def live_routes(services: Access) -> APIRouter:
    """Make the route."""
    router = APIRouter()

    @router.websocket("/v1/ws")
    async def live(socket: WebSocket) -> None:
        s = services()
        if _foreign(socket, s.settings.gateway.origins):
            await socket.close(_FORBIDDEN)
            return
        with contextlib.suppress(WebSocketDisconnect):
            await Conversation(socket, s).hold()

    return router
