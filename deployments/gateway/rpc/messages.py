"""Protobuf's messages, read into our own contracts and made out of records."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeVar, cast

from google.protobuf.message import DecodeError
from google.protobuf.timestamp_pb2 import Timestamp
from pydantic import ValidationError

from deployments.gateway.rpc.status import to_problem
from scangraph.contracts.api import ExecutionView, InputFile, NewExecution
from scangraph.contracts.errors import InvalidInputs, InvalidMessage
from scangraph.imageflow.v1 import imageflow_pb2 as pb
from scangraph.store.executions import Record
from scangraph.store.tables import Event, File
from scangraph.store.views import output_view, to_view

M = TypeVar("M")

_KINDS = {
    "progress": pb.UPDATE_KIND_PROGRESS,
    "error": pb.UPDATE_KIND_ERROR,
    "cancelled": pb.UPDATE_KIND_CANCELLED,
}
_PRIORITIES = {pb.PRIORITY_LOW: "low", pb.PRIORITY_NORMAL: "normal", pb.PRIORITY_HIGH: "high"}
#: Kinds of ports whose files are images.
_IMAGES = frozenset({"image", "mask", "image2d"})
_LONGEST_KEY = 255


def parse(kind: type[M], wire: bytes) -> M:
    """Read a message.

    Raises
    ------
    InvalidMessage
    """
    message: Any = kind()
    try:
        message.ParseFromString(wire)
    except DecodeError as error:
        raise InvalidMessage(detail=f"{message.DESCRIPTOR.full_name}: {error}") from None
    return cast(M, message)


@dataclass(frozen=True)
class Wish:
    """What is to be done with an image: its metadata, read and checked as far as that goes without the records.

    Parameters
    ----------
    execution : NewExecution
        What HTTP's body would be; the image itself is not among the inputs.
    filename, client_id : str
        The client's words for the image.
    size : int or None
        Bytes it must have.
    sha256 : str or None
        Hexadecimal, what it must have.
    input : str
        Which input it is; empty: the first that is free.
    label_scheme : str or None
        Of the image.
    chunks : bool
        Whether results that are images come as bytes.
    detached : bool
        Whether the execution outlives its call.
    key : str
        Idempotency-Key, or empty.
    """

    execution: NewExecution
    filename: str
    client_id: str
    size: int | None
    sha256: str | None
    input: str
    label_scheme: str | None
    chunks: bool
    detached: bool
    key: str


def read_wish(metadata: pb.ImageMetadata) -> Wish:
    """Read what is wanted.

    Raises
    ------
    InvalidInputs
        Points at each field that does not fit.
    """
    faults: list[dict[str, str]] = []

    def fault(pointer: str, detail: str) -> None:
        faults.append({"pointer": pointer, "detail": detail})

    if len(metadata.sha256) not in {0, 32}:
        fault("/sha256", "must be the 32 bytes of a SHA-256")
    if len(metadata.idempotency_key) > _LONGEST_KEY:
        fault("/idempotency_key", f"may have {_LONGEST_KEY} characters")
    if metadata.priority not in _PRIORITIES:
        fault("/priority", "must be one of Priority")
    if metadata.result_delivery not in pb.ResultDelivery.values():
        fault("/result_delivery", "must be one of ResultDelivery")
    body = {
        "pipeline_id": metadata.pipeline_id,
        "inputs": {name: _files(given) for name, given in metadata.inputs.items()},
        "parameters": {name: _json(name, text, fault) for name, text in metadata.parameters.items()},
        "priority": _PRIORITIES.get(metadata.priority, "normal") if metadata.HasField("priority") else "normal",
    }
    try:
        execution = NewExecution.model_validate(body)
    except ValidationError as error:
        for e in error.errors(include_url=False, include_context=False):
            fault("/" + "/".join(str(part) for part in e["loc"]), e["msg"])
    try:
        InputFile.model_validate({"label_scheme": metadata.label_scheme or None})
    except ValidationError as error:
        fault("/label_scheme", error.errors()[0]["msg"])
    if faults:
        raise InvalidInputs(detail="; ".join(f"{f['pointer']}: {f['detail']}" for f in faults), errors=faults)
    return Wish(
        execution=execution,
        filename=metadata.filename or "image",
        client_id=metadata.client_id,
        size=metadata.file_size or None,
        sha256=metadata.sha256.hex() or None,
        input=metadata.input,
        label_scheme=metadata.label_scheme or None,
        chunks=metadata.result_delivery == pb.RESULT_DELIVERY_CHUNKS,
        detached=metadata.detached,
        key=metadata.idempotency_key,
    )


def _files(given: pb.InputFiles) -> Any:
    files = [
        {name: value for name in ("file_id", "path", "label_scheme") if (value := getattr(file, name))} for file in given.files
    ]
    return files[0] if len(files) == 1 else files


def _json(name: str, text: str, fault: Any) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        fault(f"/parameters/{name}", 'must be JSON: 20, true, {"a": 1}; a word has quotes, "word"')
        return None


# --- what is told ----------------------------------------------------------------------------------------------------------


def is_image(file: File) -> bool:
    """Whether a result is an image that may be sent as bytes."""
    return output_view(file).kind in _IMAGES


def output_files(files: Iterable[File]) -> list[pb.OutputFile]:
    """Show results."""
    names = [field.name for field in pb.OutputFile.DESCRIPTOR.fields]
    return [pb.OutputFile(**{name: getattr(view, name) for name in names}) for view in map(output_view, files)]


def response_of(event: Event) -> pb.ProcessingResponse:
    """Show an event to whoever sent the image."""
    return pb.ProcessingResponse(
        execution_id=event.execution_id,
        seq=event.seq,
        status=status_of(event.body["status"]),
        progress_percentage=event.body["progress_percentage"],
        current_step=event.body["current_step"] or "",
        error=to_problem(event.body["error"]) if "error" in event.body else None,
    )


def update_of(event: Event, files: Iterable[File] = ()) -> pb.ExecutionUpdate:
    """Show an event to whoever watches; `files` are the results of a completed one."""
    body = event.body
    return pb.ExecutionUpdate(
        execution_id=event.execution_id,
        seq=event.seq,
        kind=_KINDS[event.kind],
        at=_stamp(event.created_at),
        status=status_of(body["status"]),
        progress_percentage=body["progress_percentage"],
        current_step=body["current_step"] or "",
        steps=[_step(step_id, details) for step_id, details in body["step_details"].items()],
        output_files=output_files(files),
        error=to_problem(body["error"]) if "error" in body else None,
    )


def snapshot_of(record: Record) -> pb.ExecutionUpdate:
    """Show an execution as it is now."""
    view = to_view(record)
    return pb.ExecutionUpdate(
        execution_id=view.execution_id,
        seq=record.execution.last_seq,
        kind=pb.UPDATE_KIND_SNAPSHOT,
        status=status_of(view.status),
        progress_percentage=view.progress_percentage,
        current_step=view.current_step or "",
        steps=[_step(step.step_id, step.model_dump()) for step in view.steps],
        output_files=output_files(record.files) if view.status == "completed" else [],
        error=to_problem(view.error) if view.error else None,
        execution=_execution(view),
    )


def _execution(view: ExecutionView) -> pb.Execution:
    return pb.Execution(
        pipeline_id=view.pipeline_id,
        pipeline=view.pipeline,
        revision=view.revision,
        priority=next(number for number, name in _PRIORITIES.items() if name == view.priority),
        created_at=_stamp(view.created_at),
        started_at=_stamp(view.started_at),
        completed_at=_stamp(view.completed_at),
        estimated_completion=_stamp(view.estimated_completion),
        queue_position=view.queue_position or 0,
        warnings=view.warnings,
    )


def _step(step_id: str, details: Mapping[str, Any]) -> pb.StepUpdate:
    progress = details["progress"]
    return pb.StepUpdate(
        step_id=step_id,
        status=details["status"],
        started_at=_stamp(details["started_at"]),
        completed_at=_stamp(details["completed_at"]),
        progress_percentage=details["progress_percentage"],
        done=max(progress["done"], 0),
        total=max(progress["total"], 0),
        message=progress["message"],
        attempts=details["attempts"],
        cached=details["cached"],
        resource_usage=details["resource_usage"],
    )


def status_of(state: str) -> pb.Status:
    """Return the number of a state."""
    return cast(pb.Status, pb.Status.Value(f"STATUS_{state.upper()}"))


def _stamp(moment: datetime | str | None) -> Timestamp | None:
    if moment is None:
        return None
    stamp = Timestamp()
    stamp.FromDatetime(datetime.fromisoformat(moment) if isinstance(moment, str) else moment)
    return stamp
