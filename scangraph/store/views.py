"""Records as the interface shows them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import scangraph
from scangraph.contracts.api import (
    ExecutionAccepted,
    ExecutionView,
    FileMetadata,
    FileView,
    OutputFile,
    PipelineView,
    StepProgress,
    StepView,
)
from scangraph.contracts.pipelines import needs
from scangraph.store.executions import NewFile, Record, percentage, step_percentage
from scangraph.store.pipelines import Stored
from scangraph.store.tables import Execution, File, Step

#: Kind of a stored file -> kind of the ports that it comes from.
_PORT_KINDS = {
    "nifti": "mask",
    "image2d": "image2d",
    "png": "image2d",  # written before there were other formats
    "report": "report",
    **dict.fromkeys(("obj", "glb", "stl", "ply", "zip"), "scene"),
}


def download_url(file_id: str) -> str:
    """Return where a file is fetched."""
    return f"/v1/files/{file_id}"


def to_view(record: Record) -> ExecutionView:
    """Show an execution with its steps and results."""
    row = record.execution
    steps = [step_view(step) for step in record.steps]
    return _summary(row).model_copy(
        update={
            "progress_percentage": percentage(record.steps, row.state),
            "current_step": next((step.step_id for step in record.steps if step.state == "running"), None),
            "queue_position": record.queue_position,
            "estimated_completion": record.estimated_completion,
            "steps": steps,
            "warnings": list(dict.fromkeys(warning for step in steps for warning in step.warnings)),
            "output_files": [output_view(file) for file in record.files],
        }
    )


def list_view(row: Execution, told: Mapping[str, Any]) -> ExecutionView:
    """Show an execution in a list, without its steps; `told` is what listeners were told last."""
    update = {key: told[key] for key in ("progress_percentage", "current_step") if key in told}
    return _summary(row).model_copy(update=update)


def _summary(row: Execution) -> ExecutionView:
    return ExecutionView.model_validate(
        {
            "execution_id": row.id,
            "pipeline_id": row.pipeline_id,
            "pipeline": row.pipeline,
            "revision": row.revision,
            "status": row.state,
            "priority": row.priority,
            "progress_percentage": 100 if row.state == "completed" else 0,
            "created_at": row.created_at,
            "started_at": row.started_at,
            "completed_at": row.completed_at,
            "cancel_requested_at": row.cancel_requested_at,
            "inputs": row.inputs,
            "parameters": {"steps": row.parameters},
            "error": row.error,
            "retry_of": row.retry_of,
        }
    )


def step_view(step: Step) -> StepView:
    """Show a step."""
    return StepView.model_validate(
        {
            "step_id": step.step_id,
            "component": step.component,
            "status": step.state,
            "started_at": step.started_at,
            "completed_at": step.completed_at,
            "progress": StepProgress(done=step.done, total=step.total, message=step.message),
            "progress_percentage": step_percentage(step),
            "attempts": step.attempts,
            "cached": step.cached,
            "seconds": step.seconds,
            "peak_mb": step.peak_mb,
            "resource_usage": step.resources or {},
            "warnings": step.warnings,
            "facts": step.facts,
            "error": step.error,
        }
    )


def output_view(file: File) -> OutputFile:
    """Show a result."""
    return OutputFile.model_validate(
        {
            "name": file.output,
            "file_id": file.id,
            "filename": file.filename,
            "kind": _PORT_KINDS.get(file.kind),
            "path": file.storage_name,
            "media_type": file.media_type,
            "size": file.size,
            "sha256": file.sha256,
            "download_url": download_url(file.id),
        }
    )


def file_view(file: File) -> FileView:
    """Show a file."""
    return FileView.model_validate(_file(file))


def file_metadata(file: File) -> FileMetadata:
    """Show a file with what its header says."""
    return FileMetadata.model_validate({**_file(file), "metadata": file.header})


def _file(file: File) -> dict[str, Any]:
    return {
        "id": file.id,
        "filename": file.filename,
        "kind": file.kind,
        "media_type": file.media_type,
        "size": file.size,
        "sha256": file.sha256,
        "path": file.storage_name,
        "created_at": file.created_at,
        "expires_at": file.expires_at,
        "origin": file.origin,
        "execution_id": file.execution_id,
        "download_url": download_url(file.id),
    }


def accepted(record: Record) -> ExecutionAccepted:
    """Show what is said when an execution is accepted."""
    row = record.execution
    return ExecutionAccepted.model_validate(
        {
            "execution_id": row.id,
            "status": row.state,
            "estimated_completion": record.estimated_completion,
            "queue_position": record.queue_position,
        }
    )


def pipeline_view(stored: Stored, expected_seconds: float | None = None) -> PipelineView:
    """Show a pipeline's revision."""
    return PipelineView(
        id=stored.id,
        name=stored.name,
        revision=stored.revision,
        built_in=stored.built_in,
        owner=stored.owner_id,
        created_at=stored.created_at,
        updated_at=stored.updated_at,
        expected_seconds=expected_seconds,
        spec=stored.spec,
    )


def provenance(record: Record, pipeline: Stored, files: Iterable[File | NewFile]) -> dict[str, Any]:
    """Tell where every output came from: inputs, versions, models, parameters, hashes.

    Parameters
    ----------
    record : Record
        The execution.
    pipeline : Stored
        The revision that it ran.
    files : iterable of File or NewFile
        Its results.
    """
    row = record.execution
    steps = [
        {
            "step_id": step.step_id,
            "component": step.component,
            "version": step.version,
            "model": (step.facts or {}).get("model"),
            "parameters": row.parameters.get(step.step_id, {}),
            "inputs": pipeline.spec.step(step.step_id).model_dump(mode="json")["inputs"],
            "result_key": step.result_key,
            "cached": step.cached,
            "attempts": step.attempts,
            "started_at": step.started_at,
            "completed_at": step.completed_at,
            "seconds": step.seconds,
            "warnings": step.warnings,
        }
        for step in record.steps
    ]
    outputs = [
        {
            "name": file.output,
            "filename": file.filename,
            "path": file.storage_name,
            "size": file.size,
            "sha256": file.sha256,
            "from": pipeline.spec.outputs.get(str(file.output)),
            "steps": _ancestors(pipeline, str(file.output)),
        }
        for file in files
    ]
    return {
        "notice": "Research use only. Not a medical device.",
        "scangraph": scangraph.__version__,
        "execution_id": row.id,
        "pipeline": {
            "id": row.pipeline_id,
            "name": row.pipeline,
            "revision": row.revision,
            "spec": pipeline.spec.model_dump(mode="json"),
        },
        "created_at": row.created_at,
        "started_at": row.started_at,
        "inputs": row.inputs,
        "steps": steps,
        "outputs": outputs,
    }


def _ancestors(pipeline: Stored, output: str) -> list[str]:
    """Return the steps that an output depends on, in the pipeline's order."""
    waits = needs(pipeline.spec)
    source = pipeline.spec.outputs.get(output, "")
    found, left = set(), [source.partition(".")[0]] if source else []
    while left:
        step = left.pop()
        if step not in found:
            found.add(step)
            left.extend(waits.get(step, ()))
    return [step.id for step in pipeline.spec.steps if step.id in found]
