"""Traces: one for an execution, from the request that brought it through executor and imageio, over queues and restarts.

Every request has a trace id, the client's (W3C `traceparent`) or a new one; it stands in problems, in log lines, and with the
execution in the records. Spans are made only where `SCANGRAPH_TRACING__ENDPOINT` names a collector, and sent by a thread of
their own: what the collector does not take in time is dropped, and nobody waits for it. They say what was done and how it
ended, in codes; no sentence of an error, no name of a file.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import time
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

from opentelemetry import trace
from opentelemetry.context import Context, attach, detach
from opentelemetry.trace import NonRecordingSpan, Span, SpanContext, SpanKind, StatusCode, TraceFlags
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from scangraph import metrics
from scangraph.contracts.errors import ScanGraphError
from scangraph.settings import TracingSettings

P = ParamSpec("P")
T = TypeVar("T")

_SCOPE = "scangraph"
_HEADER = "traceparent"
#: How long a batch waits for more, and what is kept for a collector that does not answer.
_DELAY_MS, _QUEUE = 1000, 4096
_EXPORT_SECONDS = 5
#: (trace id, span id) that the next span gets, where it must be a known one.
_wanted: ContextVar[tuple[int | None, int] | None] = ContextVar("scangraph_wanted_ids", default=None)
#: A request that its client left before the answer; nginx's number for it.
LEFT = "499"
#: gRPC's names of what is the service's fault.
_OUR_FAULT = frozenset({"INTERNAL", "UNAVAILABLE", "UNKNOWN", "DATA_LOSS"})


class _Sending:
    """Where this process's spans go.

    Not OpenTelemetry's own global place: libraries that find a provider there (FastAPI) send spans of their own, with paths.
    """

    provider: Any = None


_sending = _Sending()


def configure(settings: TracingSettings, deployment: str) -> None:
    """Send this process's spans to the collector, if there is one; a replica calls it once, at its start."""
    if not settings.endpoint or not is_off():
        return
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
    from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio

    class Ids(RandomIdGenerator):
        """Random, but for spans that other processes must be able to name before they are sent."""

        def generate_trace_id(self) -> int:
            wanted = _wanted.get()
            return (wanted and wanted[0]) or super().generate_trace_id()

        def generate_span_id(self) -> int:
            wanted = _wanted.get()
            return wanted[1] if wanted else super().generate_span_id()

    exporter = OTLPSpanExporter(
        endpoint=settings.endpoint,
        headers={name.lower(): value.get_secret_value() for name, value in settings.headers.items()} or None,
        timeout=_EXPORT_SECONDS,
    )
    resource = Resource.create({"service.name": f"scangraph-{deployment}", "service.namespace": "scangraph"})
    # At the end nobody waits either: what must not be lost is flushed by `flush`, and that has an end.
    provider = TracerProvider(
        resource=resource, sampler=ParentBasedTraceIdRatio(settings.ratio), id_generator=Ids(), shutdown_on_exit=False
    )
    processor = BatchSpanProcessor(exporter, max_queue_size=_QUEUE, schedule_delay_millis=_DELAY_MS)
    provider.add_span_processor(processor)
    _sending.provider = provider


def is_off() -> bool:
    """Whether this process sends no spans."""
    return _sending.provider is None


async def flush() -> None:
    """Send what waits, before a replica ends."""
    if not is_off():
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.to_thread(_sending.provider.force_flush), _EXPORT_SECONDS)


# --- where we are ------------------------------------------------------------------------------------------------------------


def here() -> str | None:
    """Return the `traceparent` of what is going on, to be given to another process or kept; None outside of any trace."""
    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier)
    return carrier.get(_HEADER)


def trace_id() -> str | None:
    """Return the trace's id, 32 hexadecimal digits."""
    found = trace.get_current_span().get_span_context()
    return trace.format_trace_id(found.trace_id) if found.is_valid else None


def trace_id_of(traceparent: str | None) -> str | None:
    """Return the trace's id in a client's header, None where it is not one."""
    found = _parent(traceparent)
    return trace.format_trace_id(found.trace_id) if found is not None else None


def _parent(traceparent: str | None) -> SpanContext | None:
    if not traceparent:
        return None
    context = TraceContextTextMapPropagator().extract({_HEADER: traceparent}, Context())
    found = trace.get_current_span(context).get_span_context()
    return found if found.is_valid else None


def _start(name: str, parent: SpanContext | None, kind: SpanKind, ids: tuple[int | None, int] | None = None) -> Span:
    """Begin a span; where none are sent, only its ids are made."""
    if is_off():
        wanted_trace, span = ids or (None, 0)
        number = parent.trace_id if parent is not None else wanted_trace or uuid.uuid4().int
        flags = parent.trace_flags if parent is not None else TraceFlags(0)
        return NonRecordingSpan(SpanContext(number, span or uuid.uuid4().int >> 64, False, flags))
    context = Context() if parent is None else trace.set_span_in_context(NonRecordingSpan(parent), Context())
    token = _wanted.set(ids)
    try:
        made: Span = _sending.provider.get_tracer(_SCOPE).start_span(name, context, kind)
        return made
    finally:
        _wanted.reset(token)


@contextlib.contextmanager
def _inside(span: Span) -> Iterator[Span]:
    token = attach(trace.set_span_in_context(span))
    try:
        yield span
    finally:
        detach(token)


def code_of(error: BaseException) -> str:
    """Return what may be said of an error anywhere: its code, or its class. Its sentence may hold a file's name."""
    if isinstance(error, asyncio.CancelledError):
        return "cancelled"
    cause = getattr(error, "cause", None)  # Ray wraps what another process raised
    known = next((e for e in (error, cause) if isinstance(e, ScanGraphError)), None)
    return known.code if known is not None else type(error).__name__


def _end(span: Span, code: str | None) -> None:
    if code is not None:
        span.set_attribute("error.type", code)
        span.set_status(StatusCode.ERROR, code)
    span.end()


# --- spans -------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def span(name: str, **attributes: str | float | bool) -> Iterator[Span]:
    """Make a span of the block, if what is going on is traced.

    Parameters
    ----------
    name : str
        What is done, of a small set.
    **attributes
        Never a file's name, nor anything that a client has written.
    """
    current = trace.get_current_span()
    parent = current.get_span_context()
    if not parent.trace_flags.sampled or is_off():
        yield current
        return
    made = _start(name, parent, SpanKind.INTERNAL)
    made.set_attributes(attributes)
    with _inside(made):
        try:
            yield made
        except BaseException as error:
            _end(made, code_of(error))
            raise
    _end(made, None)


def spanned(name: str) -> Callable[[Callable[P, Awaitable[T]]], Callable[P, Coroutine[Any, Any, T]]]:
    """Make a span of each call of an async function."""

    def around(function: Callable[P, Awaitable[T]]) -> Callable[P, Coroutine[Any, Any, T]]:
        @functools.wraps(function)
        async def call(*arguments: P.args, **named: P.kwargs) -> T:
            with span(name):
                return await function(*arguments, **named)

        return call

    return around


@contextlib.contextmanager
def following(traceparent: str | None) -> Iterator[bool]:
    """Make the block a part of another process's trace; False where there is none."""
    parent = _parent(traceparent)
    if parent is None:
        yield False
        return
    with _inside(NonRecordingSpan(parent)):
        yield True


def joined(method: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, Coroutine[Any, Any, T]]:
    """Let a method that other processes call join the caller's trace, which they give as the keyword `trace` beside its own."""

    @functools.wraps(method)
    async def call(*arguments: P.args, **named: P.kwargs) -> T:
        parent: Any = named.pop("trace", None)
        with following(parent), span(f"{type(arguments[0]).__name__.lower()} {method.__name__}"):
            return await method(*arguments, **named)

    return call


@dataclass
class Entry:
    """A request on its way through a door; the door says what it was and how it ended."""

    door: str
    operation: str
    code: str = LEFT
    received: int = 0
    sent: int = 0


@contextlib.contextmanager
def entering(door: str, operation: str, traceparent: str | None = None) -> Iterator[Entry]:
    """Count and trace a request: everything that is done in the block belongs to it.

    Parameters
    ----------
    door : str
        `http`, `grpc`, `kafka`.
    operation : str
        Which of the door's operations, of a small set: a route's template, a method's name.
    traceparent : str, optional
        What the client sent under this name.

    Yields
    ------
    Entry
        Set its `code` (HTTP status, gRPC status name) before the block ends, and add to `received` and `sent`.

    Examples
    --------
    >>> with entering("grpc", "ProcessSingleImage", metadata.get("traceparent")) as entry:    # doctest: +SKIP
    ...     entry.received += len(request.image)
    ...     answer = await work(request)
    ...     entry.code = "OK"
    """
    entry, began = Entry(door, operation), time.perf_counter()
    made = _start(f"{door} {operation}", _parent(traceparent), SpanKind.SERVER)
    failed: str | None = None
    try:
        with _inside(made):
            yield entry
    except BaseException as error:
        failed = code_of(error)
        raise
    finally:
        made.update_name(f"{entry.door} {entry.operation}")
        made.set_attributes({"scangraph.door": door, "scangraph.operation": entry.operation, "scangraph.code": entry.code})
        _end(made, failed or (entry.code if entry.code.startswith("5") or entry.code in _OUR_FAULT else None))
        metrics.REQUESTS.add(door=door, operation=entry.operation, code=entry.code)
        metrics.REQUEST_SECONDS.observe(time.perf_counter() - began, door=door)
        metrics.RECEIVED.add(entry.received, door=door, operation=entry.operation)
        metrics.SENT.add(entry.sent, door=door, operation=entry.operation)


class ExecutionTrace:
    """The spans of an execution and of its steps, whoever works on it.

    A span is sent when it ends, and a process that is killed sends none of those it had begun. Spans of imageio would then hang
    on nothing. So the ids of these follow from the execution's: whoever takes it over begins the same spans anew, and only who
    brings them to an end sends them.

    Parameters
    ----------
    execution_id : str
        A UUID; also the trace's id, where no request brought one.
    traceparent : str or None
        Of the request that made it, from the records.
    **attributes
        Of the execution's span.
    """

    def __init__(self, execution_id: str, traceparent: str | None, **attributes: str | float | bool) -> None:
        self._id = execution_id
        ids = (uuid.UUID(execution_id).int, self._span_id(""))
        self._span = _start("execution", _parent(traceparent), SpanKind.CONSUMER, ids)
        self._span.set_attributes({"scangraph.execution_id": execution_id, **attributes})
        self._open: dict[str, Span] = {}

    def _span_id(self, step_id: str) -> int:
        return int.from_bytes(hashlib.sha256(f"{self._id}/{step_id}".encode()).digest()[:8]) or 1

    def enter(self) -> None:
        """Make what this task does from here on a part of the trace; the task is the execution's own."""
        attach(trace.set_span_in_context(self._span))

    @contextlib.contextmanager
    def step(self, step_id: str, **attributes: str | float | bool) -> Iterator[Span]:
        """Make a span of a step. One that does not get to its end, for whatever reason, stays open until it is known why."""
        made = _start("step", self._span.get_span_context(), SpanKind.INTERNAL, (None, self._span_id(step_id)))
        made.set_attributes({"scangraph.step": step_id, **attributes})
        self._open[step_id] = made
        with _inside(made):
            yield made
        del self._open[step_id]
        _end(made, None)

    def end(self, state: str, code: str | None = None, failed_step: str | None = None) -> None:
        """Send the execution's span, with the steps that its end has stopped; to be called once that is in the records."""
        for step_id, made in self._open.items():
            _end(made, code if code is not None and step_id == failed_step else "cancelled")
        self._open.clear()
        self._span.set_attribute("scangraph.state", state)
        _end(self._span, code)
