"""What stands in Serve's gRPC proxy, before anything is handed on to a replica.

Serve calls `add_services` when a proxy starts (`grpc_servicer_functions`), and `prepare` through HTTP's door a moment before.
Here

- the server listens where the settings say, not on every address, and its messages have a limit;
- messages go on as bytes: what is none of ours is the replica's to refuse, with a sentence;
- metadata that steers Serve is taken away;
- calls with a stream flow no faster than the other side takes them (`flow.py`), and end when the client is gone;
- what Serve itself says becomes one of our errors.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

import grpc
from google.protobuf.descriptor import ServiceDescriptor
from grpc_health.v1 import health_pb2
from ray.serve._private import constants, default_impl
from ray.serve._private.proxy_request_response import gRPCStreamingType
from ray.serve.grpc_util import RayServegRPCContext

from deployments.gateway.rpc.flow import STEP, WINDOW, Ending, unpack
from deployments.gateway.rpc.status import ending_of
from scangraph.contracts.errors import GatewayLost, Overloaded
from scangraph.handles import APPLICATION, new_execution_id
from scangraph.imageflow.v1 import imageflow_pb2 as pb
from scangraph.settings import Settings

log = logging.getLogger("scangraph")

SERVICES: tuple[ServiceDescriptor, ...] = (
    pb.DESCRIPTOR.services_by_name["ImageProcessingService"],
    health_pb2.DESCRIPTOR.services_by_name["Health"],
)
#: google.rpc.Status travels under this name.
DETAILS = "grpc-status-details-bin"

_STEERING = frozenset({"application", "multiplexed_model_id", "session_id", "request_id"})
_HARMLESS_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_UNARY, _BOTH = gRPCStreamingType.UNARY_UNARY, gRPCStreamingType.STREAM_STREAM


def prepare(settings: Settings) -> None:
    """Say how the proxy's server is made. Serve has no options for it: it listens on `[::]`, and takes 2 GB in a message."""
    limit = settings.grpc.max_message_bytes
    constants.DEFAULT_GRPC_SERVER_OPTIONS[:] = [
        ("grpc.max_receive_message_length", limit),
        ("grpc.max_send_message_length", -1),
        ("grpc.max_concurrent_streams", settings.grpc.max_streams),
        ("grpc.server_handshake_timeout_ms", 10_000),
        # A client whose machine is gone says nothing any more; so it is asked.
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.http2.max_pings_without_data", 0),
    ]
    host = f"[{settings.host}]" if ":" in settings.host else settings.host

    def listen(server: grpc.aio.Server, address: str) -> None:
        server.add_insecure_port(f"{host}:{address.rpartition(':')[2]}")

    default_impl.add_grpc_address = listen  # type: ignore[assignment]  # less is asked of the server


def add_services(_: Any, server: Any) -> None:
    """Give Serve's server our services. It puts its own ways to a replica in every handler's place; we go before them."""
    serves = server.service_handler_factory
    server.service_handler_factory = lambda service_method, streaming_type: _way_in(serves, service_method, streaming_type)
    try:
        for service in SERVICES:
            handlers = {method.name: _handler(method.client_streaming, method.server_streaming) for method in service.methods}
            server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service.full_name, handlers),))
    finally:
        server.service_handler_factory = serves


def _handler(takes_stream: bool, gives_stream: bool) -> grpc.RpcMethodHandler:
    """Make a handler of this kind for bytes; what it does is put in by Serve."""
    kinds = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }
    return kinds[takes_stream, gives_stream](_nobody)


def _nobody(*_: Any) -> None:
    raise NotImplementedError


def _way_in(serves: Callable[..., Any], method: str, kind: gRPCStreamingType) -> Callable[..., Any]:
    """Return the handler of a method: ours around Serve's. One answer goes Serve's plain way, several go by parcels."""
    if kind is _UNARY:
        inner = serves(service_method=method, streaming_type=_UNARY)

        async def unary(request: bytes, context: Any) -> bytes:
            seen = _Seen(context)
            told = unpack(wire) if (wire := await inner(request, seen)) else seen.as_ours(method)
            if isinstance(told, bytes):
                return told
            await _end(context, told if isinstance(told, Ending) else Ending())
            return b""

        return unary

    inner = serves(service_method=method, streaming_type=_BOTH)

    async def stream(request: Any, context: Any) -> AsyncGenerator[bytes]:
        seen = _Seen(context)
        passage = _Passage(_once(request) if isinstance(request, bytes) else aiter(request))
        outbox: asyncio.Queue[bytes | Ending | None] = asyncio.Queue()  # no longer than the window, by the replica's word

        async def pump() -> None:
            # In a task of its own, so that it is always Serve who is waited for: that is where Serve hears of a cancellation,
            # and passes it on to the replica.
            try:
                async for wire in inner(passage, seen):
                    told = unpack(wire)
                    if isinstance(told, int):
                        passage.read(told)
                    else:
                        outbox.put_nowait(told)
            finally:
                outbox.put_nowait(None)

        pumping = asyncio.create_task(pump())
        pumping.add_done_callback(_look_at)
        context.add_done_callback(lambda _: pumping.cancel())
        ending: Ending | None = None
        try:
            while (told := await outbox.get()) is not None:
                if isinstance(told, Ending):
                    ending = told
                else:
                    yield told
                    passage.taken(len(told))
            await _end(context, ending or seen.as_ours(method))
        finally:
            passage.close()
            pumping.cancel()

    return stream


def _look_at(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()):
        log.error("Serve's gRPC proxy failed", exc_info=error)


async def _once(request: bytes) -> AsyncIterator[bytes]:
    yield request


async def _end(context: Any, ending: Ending) -> None:
    if ending.code != "OK":
        await context.abort(grpc.StatusCode[ending.code], ending.detail, ((DETAILS, ending.status),))


class _Seen(RayServegRPCContext):
    """A call's context as Serve sees it: without what steers, and what Serve says of the end is only heard.

    It is Serve's own copy of a context, so nothing is asked of the call itself once it runs. Serve asks for the peer after the
    end, for its access log, and a call that is cancelled ends before Serve does: gRPC then reads memory that is free already,
    and the proxy dies with every connection.
    """

    def __init__(self, context: Any) -> None:
        super().__init__(context)
        self._code = grpc.StatusCode.OK
        given = tuple(context.invocation_metadata() or ())
        ids = [value for name, value in given if name == "request_id"]
        self._invocation_metadata = [(name, value) for name, value in given if name not in _STEERING]
        self._invocation_metadata.append(("application", APPLICATION))
        if len(ids) == 1 and _HARMLESS_ID.fullmatch(ids[0]):
            self._invocation_metadata.append(("request_id", ids[0]))

    def code(self) -> Any:
        """Return that nothing was said yet: only then Serve says how a call ended."""
        return 0

    def as_ours(self, method: str) -> Ending:
        """Return how a call ends of which the replica said nothing."""
        trace_id = new_execution_id()
        log.warning("trace %s: Serve ended %s with %s", trace_id, method, self._code.name)
        busy = {grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.NOT_FOUND}
        return ending_of(Overloaded() if self._code in busy else GatewayLost(), trace_id)


class _Passage:
    """What Serve reads of a client: messages, as long as there is room, and how far the client is with the answer."""

    def __init__(self, messages: AsyncIterator[bytes]) -> None:
        self._messages = messages
        self._coming: asyncio.Task[bytes | None] | None = None
        self._news = asyncio.Event()
        self._unread = 0  # of the client's messages, in Serve and the replica
        self._taken = 0  # of the answer, by the client, and not told yet
        self._ended = self._closed = False

    def __aiter__(self) -> _Passage:
        return self

    async def __anext__(self) -> bytes | int | None:
        while not self._closed:
            self._news.clear()
            if self._taken >= STEP:
                taken, self._taken = self._taken, 0
                return taken
            if self._coming is None and not self._ended and self._unread < WINDOW:
                self._coming = asyncio.create_task(self._next())
                self._coming.add_done_callback(lambda _: self._news.set())
            if self._coming is not None and self._coming.done():
                message, self._coming = self._coming.result(), None
                self._ended = message is None
                self._unread += len(message or b"")
                return message
            await self._news.wait()
        raise StopAsyncIteration

    async def _next(self) -> bytes | None:
        try:
            return await anext(self._messages, None)
        except Exception:  # the connection broke, of which the call hears by itself
            return None

    def read(self, size: int) -> None:
        """Note that the replica has read so much."""
        self._unread -= size
        self._news.set()

    def taken(self, size: int) -> None:
        """Note that the client's connection has taken so much."""
        self._taken += size
        if self._taken >= STEP:
            self._news.set()

    def close(self) -> None:
        """Let go of the client."""
        self._closed = True
        self._news.set()
        if self._coming is not None:
            self._coming.cancel()
