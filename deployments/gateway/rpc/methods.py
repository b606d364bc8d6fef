"""The methods of imageflow.v1 and of grpc.health.v1. Serve calls the ingress's method that has the gRPC method's name."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any

from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse, HealthListResponse

from deployments.gateway.auditing import note_execution
from deployments.gateway.auth import authenticate, still_good
from deployments.gateway.live import hub
from deployments.gateway.rpc.flow import Ending, Gone, Line, Parcel, converse, end_parcel, message_parcel
from deployments.gateway.rpc.images import ImageStream, ended_response, process, result_pieces, unforeseen
from deployments.gateway.rpc.messages import Wish, parse, read_wish, snapshot_of, update_of
from deployments.gateway.rpc.status import ending_of
from deployments.gateway.services import Services
from scangraph.contracts.api import TERMINAL, Role
from scangraph.contracts.errors import Forbidden, NoSuch, StoreUnavailable, TooManyStreams, Unauthenticated
from scangraph.imageflow.v1 import imageflow_pb2 as pb
from scangraph.intake import Principal, failure, look
from scangraph.store.executions import Record
from scangraph.tracing import Entry, entering

#: How often a call with a stream looks whether its token was revoked.
_STANDING_SECONDS = 2.0
#: How often somebody who watches the health is looked after, and how many may: they need no token.
_HEALTH_SECONDS, _MOST_HEALTH_WATCHES = 2.0, 32
#: A response's other fields need no more.
_ROOM_FOR_THE_REST = 2**16

_SERVICE = pb.DESCRIPTOR.services_by_name["ImageProcessingService"].full_name


class Rpc:
    """What the gateway's class takes over: gRPC's methods.

    Each gets a client's bytes and gives Serve parcels (`flow.py`).
    """

    services: Services

    # --- imageflow.v1 ---

    async def ProcessSingleImage(self, request: bytes, grpc_context: Any) -> Parcel:
        """Run a pipeline on an image and wait for its end."""

        async def work() -> pb.ProcessingResponse:
            principal = await self._caller(grpc_context, "operator")
            message = parse(pb.ImageRequest, request)
            wish = read_wish(message.metadata)
            image = _pieces(message.data) if message.data or wish.input else None
            record = await process(self.services, principal, wish, image, _nothing)
            if record.execution.state != "completed":
                error = failure(record)
                error.fields["execution_id"] = record.execution.id
                raise error
            return await self._with_results(wish, record)

        return await _answer("ProcessSingleImage", grpc_context, request, work)

    async def ProcessImageStream(self, messages: AsyncIterator[Any], grpc_context: Any) -> AsyncGenerator[Parcel]:
        """Run a pipeline on each image of a stream."""

        async def work(line: Line) -> Ending:
            principal = await self._caller(grpc_context, "operator")
            stream = ImageStream(self.services, line, lambda: self._caller(grpc_context, "operator"))
            await self._while_good(principal, stream.run(), expires=False)
            return Ending()

        guarded = _guarded("ProcessImageStream", grpc_context, work)
        async with contextlib.aclosing(converse(messages, guarded)) as parcels:
            async for parcel in parcels:
                yield parcel

    async def WatchExecution(self, messages: AsyncIterator[Any], grpc_context: Any) -> AsyncGenerator[Parcel]:
        """Tell of an execution until it has ended."""

        async def work(line: Line) -> Ending:
            principal = await self._caller(grpc_context, "viewer")
            wish = parse(pb.WatchRequest, await line.receive() or b"")
            await self._while_good(principal, self._watch(line, principal, wish), expires=True)
            return Ending()

        guarded = _guarded("WatchExecution", grpc_context, work)
        async with contextlib.aclosing(converse(messages, guarded)) as parcels:
            async for parcel in parcels:
                yield parcel

    async def _watch(self, line: Line, principal: Principal, wish: pb.WatchRequest) -> None:
        services, execution_id = self.services, wish.execution_id
        record = await look(services, execution_id)
        if not principal.sees(record.execution.owner_id):
            await note_execution(services, principal, "grpc", "WatchExecution", execution_id, "NOT_FOUND")
            raise NoSuch(kind="execution", id=execution_id)
        await note_execution(services, principal, "grpc", "WatchExecution", execution_id, "OK")
        last = record.execution.last_seq
        if wish.HasField("after_seq") and wish.after_seq <= last:
            seq = wish.after_seq
        else:
            seq = last
            await line.send(snapshot_of(record).SerializeToString())
        if record.execution.state in TERMINAL and seq == last:
            return
        async for event in hub(services).events(execution_id, seq):
            completed = event.body["status"] == "completed"
            files = (await look(services, execution_id)).files if completed else ()
            await line.send(update_of(event, files).SerializeToString())

    async def _with_results(self, wish: Wish, record: Record) -> pb.ProcessingResponse:
        """Return the one response, with the bytes of the results if they were wished for and fit."""
        response = ended_response(record)
        response.client_id, response.is_final = wish.client_id, True
        if not wish.chunks:
            return response
        room = self.services.settings.grpc.max_message_bytes - _ROOM_FOR_THE_REST
        whole: dict[str, pb.ResultChunk] = {}
        async for piece in result_pieces(self.services, record):
            room -= len(piece.data)
            if room < 0:
                response.warnings.append("the results do not fit into one message: download them, or use ProcessImageStream")
                return response
            if piece.file_id in whole:
                whole[piece.file_id].data += piece.data
            else:
                whole[piece.file_id] = piece
            whole[piece.file_id].is_final = True
        response.results.extend(whole.values())
        return response

    # --- grpc.health.v1 ---

    async def Check(self, request: bytes, grpc_context: Any) -> Parcel:  # noqa: ARG002 - no token is asked for
        """Say whether the gateway ("") or the whole service (its name) can be used."""

        async def work() -> HealthCheckResponse:
            asked = parse(HealthCheckRequest, request).service
            return HealthCheckResponse(status=await self._health(asked))

        return await _packed(work)

    async def List(self, request: bytes, grpc_context: Any) -> Parcel:  # noqa: ARG002
        """Say it of both."""

        async def work() -> HealthListResponse:
            statuses = {name: HealthCheckResponse(status=await self._health(name)) for name in ("", _SERVICE)}
            return HealthListResponse(statuses=statuses)

        return await _packed(work)

    async def Watch(self, messages: AsyncIterator[Any], grpc_context: Any) -> AsyncGenerator[Parcel]:  # noqa: ARG002
        """Tell of each change of that."""

        async def work(line: Line) -> Ending:
            asked = parse(HealthCheckRequest, await line.receive() or b"").service
            counted = self.services.state.setdefault("health_watches", [0])
            if counted[0] >= _MOST_HEALTH_WATCHES:
                raise TooManyStreams(what="Many watch this gateway's health", limit=_MOST_HEALTH_WATCHES, hint="Use Check")
            counted[0] += 1
            told = None
            try:
                while True:
                    try:
                        now = await self._health(asked)
                    except NoSuch:
                        now = HealthCheckResponse.SERVICE_UNKNOWN
                    if now != told:
                        await line.send(HealthCheckResponse(status=now).SerializeToString())
                        told = now
                    await asyncio.sleep(_HEALTH_SECONDS)
            finally:
                counted[0] -= 1

        async with contextlib.aclosing(converse(messages, _whole(work))) as parcels:
            async for parcel in parcels:
                yield parcel

    async def _health(self, service: str) -> Any:
        if service not in {"", _SERVICE}:
            raise NoSuch(kind="service", id=service[:100])
        ready = not service or not await self.services.readiness()
        return HealthCheckResponse.SERVING if ready else HealthCheckResponse.NOT_SERVING

    # --- who asks ---

    async def _caller(self, context: Any, role: Role) -> Principal:
        """Return who calls; Serve's proxy asks nobody."""
        given = [value for name, value in context.invocation_metadata() if name == "authorization"]
        kind, _, token = str(given[0] if len(given) == 1 else "").partition(" ")
        if kind.lower() != "bearer" or not token:
            raise Unauthenticated(reason="The call has no bearer token in its metadata")
        principal = await authenticate(self.services, token.strip())
        if not principal.may(role):
            raise Forbidden(action="This method", needed=role, role=principal.role)
        return principal

    async def _while_good(self, principal: Principal, work: Awaitable[None], *, expires: bool) -> None:
        """Work on for as long as the token is not revoked, and, where this is asked for, has not expired."""

        async def stand() -> None:
            while True:
                left = principal.expires_at.timestamp() - time.time()
                if expires and left <= 0:
                    raise Unauthenticated(reason="The token has expired; watch again, with the last number that you saw")
                await asyncio.sleep(max(min(left, _STANDING_SECONDS), 0.1) if expires else _STANDING_SECONDS)
                with contextlib.suppress(StoreUnavailable):
                    if not await still_good(self.services, principal):
                        raise Unauthenticated(reason="The token was revoked")

        tasks = [asyncio.ensure_future(work), asyncio.ensure_future(stand())]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def _entering(method: str, context: Any) -> contextlib.AbstractContextManager[Entry]:
    sent = [value for name, value in context.invocation_metadata() if name == "traceparent"]
    return entering("grpc", method, str(sent[0]) if len(sent) == 1 else None)


async def _answer(method: str, context: Any, request: bytes, work: Callable[[], Awaitable[Any]]) -> Parcel:
    """Do the same, counted and traced."""
    with _entering(method, context) as entry:
        entry.received += len(request)

        async def noted() -> Any:
            response = await work()
            entry.code, entry.sent = "OK", response.ByteSize()
            return response

        return await _packed(noted, entry)


async def _packed(work: Callable[[], Awaitable[Any]], entry: Entry | None = None) -> Parcel:
    """Work, and pack the message or the error."""
    try:
        return message_parcel((await work()).SerializeToString())
    except Exception as error:  # the process's boundary
        ending = _ending(error)
        if entry is not None:
            entry.code = ending.code
        return end_parcel(ending)


def _guarded(method: str, context: Any, work: Callable[[Line], Awaitable[Ending]]) -> Callable[[Line], Awaitable[Ending]]:
    """Do the same for a call with a stream, counted and traced."""

    async def guarded(line: Line) -> Ending:
        with _entering(method, context) as entry:
            ending = await _whole(work)(line)
            entry.code, entry.received, entry.sent = ending.code, line.received_bytes, line.sent_bytes
            return ending

    return guarded


def _whole(work: Callable[[Line], Awaitable[Ending]]) -> Callable[[Line], Awaitable[Ending]]:
    async def whole(line: Line) -> Ending:
        try:
            return await work(line)
        except Gone:
            return Ending("CANCELLED", "The client is gone")
        except Exception as error:  # the process's boundary
            return _ending(error)

    return whole


def _ending(error: Exception) -> Ending:
    cause, trace_id = unforeseen(error)
    execution_id = cause.fields.get("execution_id")
    return ending_of(cause, trace_id, {"execution_id": str(execution_id)} if execution_id else None)


async def _pieces(data: bytes) -> AsyncIterator[bytes]:
    if data:
        yield data


async def _nothing(_: pb.ProcessingResponse) -> None:
    """Tell nobody: the one response comes in the end."""
