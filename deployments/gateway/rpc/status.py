"""Errors as gRPC's status with google.rpc's details: what `problems.py` is for HTTP."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import grpc
from google.protobuf.any_pb2 import Any as Packed
from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status

from deployments.gateway.problems import RETRY_AFTER_SECONDS, TYPE_PREFIX
from deployments.gateway.rpc.flow import Ending
from scangraph.contracts.errors import STATUS_NAMES, ScanGraphError
from scangraph.imageflow.v1 import imageflow_pb2 as pb

#: Who the reasons are of.
DOMAIN = "scangraph"
#: Trailers have room for some 8 kB in all, a third of which base64 takes.
_LONGEST_DETAIL, _MOST_ERRORS, _LONGEST_ERROR = 1500, 10, 200


def ending_of(error: ScanGraphError, trace_id: str, about: Mapping[str, str] | None = None) -> Ending:
    """Turn one of our errors into a call's end.

    Parameters
    ----------
    error : ScanGraphError
        What went wrong.
    trace_id : str
        Under which the log has it.
    about : mapping, optional
        More for the metadata of ErrorInfo, such as the execution's id.
    """
    name, message = STATUS_NAMES[error.status].grpc, _short(error.detail, _LONGEST_DETAIL)
    told = {"type": TYPE_PREFIX + error.code, "status": str(error.status), "title": error.title, "trace_id": trace_id}
    details: list[Any] = [ErrorInfo(reason=error.code, domain=DOMAIN, metadata={**told, **(about or {})})]
    violations = [
        BadRequest.FieldViolation(field=pointer, description=_short(detail, _LONGEST_ERROR))
        for pointer, detail in _pointed(error.fields.get("errors"))
    ]
    if violations:
        details.append(BadRequest(field_violations=violations[:_MOST_ERRORS]))
    if error.status in {429, 503}:
        seconds = int(error.fields.get("retry_after_seconds") or RETRY_AFTER_SECONDS)
        details.append(RetryInfo(retry_delay=Duration(seconds=seconds)))
    status = Status(code=getattr(grpc.StatusCode, name).value[0], message=message)
    for detail in details:
        packed = Packed()
        packed.Pack(detail)
        status.details.append(packed)
    return Ending(name, message, status.SerializeToString())


def problem_of(error: ScanGraphError) -> pb.Problem:
    """Show an error that ends an image, and not the call."""
    return to_problem(
        {"code": error.code, "title": error.title, "status": error.status, "detail": error.detail, **error.fields}
    )


def to_problem(recorded: Mapping[str, Any]) -> pb.Problem:
    """Show an error as the records keep it."""
    status = int(recorded.get("status", 500))
    return pb.Problem(
        type=TYPE_PREFIX + str(recorded.get("code", "internal-error")),
        title=str(recorded.get("title", "")),
        status=status,
        detail=str(recorded.get("detail", "")),
        code=STATUS_NAMES[status].grpc if status in STATUS_NAMES else "UNKNOWN",
        errors=[pb.FieldProblem(pointer=pointer, detail=detail) for pointer, detail in _pointed(recorded.get("errors"))],
    )


def _pointed(errors: Any) -> Iterable[tuple[str, str]]:
    return ((str(e.get("pointer", "")), str(e.get("detail", ""))) for e in errors or () if isinstance(e, Mapping))


def _short(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"
