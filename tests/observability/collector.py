"""A collector of traces: the real protocol, and a memory."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest, ExportTraceServiceResponse
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)


@dataclass(frozen=True)
class Span:
    """What arrived of a span."""

    name: str
    service: str
    trace_id: str
    span_id: str
    parent_id: str
    attributes: dict[str, Any]
    events: tuple[str, ...]
    error: str
    raw: str = field(repr=False)


def _value(value: Any) -> Any:
    return getattr(value, value.WhichOneof("value"))


class Collector(TraceServiceServicer):
    """Listens on a port and keeps what it hears."""

    def __init__(self, port: int = 0) -> None:
        self._lock, self._spans = threading.Lock(), list[Span]()
        self._server = grpc.server(ThreadPoolExecutor(4))
        add_TraceServiceServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{port}")
        self._server.start()

    def Export(self, request: ExportTraceServiceRequest, context: Any) -> ExportTraceServiceResponse:  # noqa: N802
        """Take a batch."""
        with self._lock:
            for resource in request.resource_spans:
                service = {a.key: _value(a.value) for a in resource.resource.attributes}["service.name"]
                for span in (s for scope in resource.scope_spans for s in scope.spans):
                    attributes = {a.key: _value(a.value) for a in span.attributes}
                    ids = (span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex())
                    events = tuple(event.name for event in span.events)
                    raw = f"{resource} {span}"
                    self._spans.append(Span(span.name, service, *ids, attributes, events, span.status.message, raw))
        return ExportTraceServiceResponse()

    def spans(self, trace_id: str | None = None) -> list[Span]:
        """What has arrived, of one trace or at all."""
        with self._lock:
            return [span for span in self._spans if trace_id in {None, span.trace_id}]

    def wait(self, trace_id: str, until: Callable[[list[Span]], bool], seconds: float = 60) -> list[Span]:
        """Wait until enough of a trace is there, and for what comes with it."""
        end = time.monotonic() + seconds
        while not until(self.spans(trace_id)):
            assert time.monotonic() < end, sorted(span.name for span in self.spans(trace_id))
            time.sleep(0.2)
        time.sleep(3)  # each process sends once a second
        return self.spans(trace_id)

    def close(self) -> None:
        """Go away."""
        self._server.stop(None).wait()


def orphans(spans: list[Span], outside: str) -> list[str]:
    """Names of the spans whose parent is neither among them nor the given one."""
    known = {span.span_id for span in spans} | {outside}
    return [span.name for span in spans if span.parent_id not in known]
