"""What the HTTP interface and its clients say to each other: one set of models for the gateway, the client and the tests."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from scangraph.contracts.components import PortKind
from scangraph.contracts.pipelines import PipelineSpec

Status = Literal["pending", "running", "completed", "failed", "cancelled"]
StepStatus = Literal["pending", "running", "completed", "failed", "cancelled", "skipped"]
Priority = Literal["high", "normal", "low"]
Role = Literal["admin", "editor", "operator", "viewer"]
#: States that never change again.
TERMINAL: frozenset[str] = frozenset({"completed", "failed", "cancelled"})


class _Wire(BaseModel):
    model_config = ConfigDict(extra="forbid")


# --- executions ------------------------------------------------------------------------------------------------------------


class InputFile(_Wire):
    """What goes into an input: an uploaded file, or a path in the storage; exactly one of them."""

    file_id: str | None = Field(None, description="id of a file (POST /v1/files)")
    path: str | None = Field(None, description="path in the storage, where the backend put it itself")
    label_scheme: Literal["kits"] | None = Field(None, description="numbering of a mask, if not the label table's")
    sha256: str | None = Field(None, pattern="^[0-9a-f]{64}$", description="of the file; another one is refused")


#: A bare string is a file id if it is one, else a storage path.
InputValue = str | InputFile | list[str | InputFile]


class NewExecution(_Wire):
    """Body of `POST /v1/executions`."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"examples": [{"pipeline_id": "organs", "inputs": {"image": "ct.nii.gz"}, "priority": "normal"}]},
    )

    pipeline_id: str = Field(min_length=1, max_length=64, description="UUID or name of a pipeline; `name@3` for a revision")
    inputs: dict[str, InputValue] = Field(description="by the pipeline's input names: file id, storage path, or a list")
    parameters: dict[str, Any] = Field(
        default_factory=dict, description='`{"steps": {id: {name: value}}}`, or flat names where only one step has the name'
    )
    priority: Priority = "normal"


class Problem(BaseModel):
    """RFC 9457 problem details."""

    type: str
    title: str
    status: int
    detail: str
    instance: str | None = None
    trace_id: str
    errors: list[dict[str, str]] | None = None


class StepProgress(_Wire):
    """How far a step is, in its own units (tiles, structures)."""

    done: int = 0
    total: int = 0
    message: str = ""


class StepView(_Wire):
    """A step of an execution."""

    step_id: str
    component: str
    status: StepStatus
    started_at: datetime | None = None
    completed_at: datetime | None = None
    progress: StepProgress = StepProgress()
    progress_percentage: float = 0
    attempts: int = Field(0, description="0 where it has not run, or its result was known")
    cached: bool = Field(False, description="its result was known from an earlier run with the same inputs and parameters")
    seconds: float | None = Field(None, description="wall time inside the stage")
    peak_mb: float | None = Field(None, description="highest resident memory of the stage while it worked")
    resource_usage: dict[str, float] = Field(default_factory=dict, description="of the replica that runs it, last known")
    warnings: list[str] = []
    facts: dict[str, Any] = {}
    error: dict[str, Any] | None = None


class OutputFile(_Wire):
    """A result."""

    name: str = Field(description="name of the pipeline's output")
    file_id: str
    filename: str
    kind: PortKind | None
    path: str = Field(description="in the storage")
    media_type: str
    size: int
    sha256: str
    download_url: str


class ExecutionView(_Wire):
    """An execution."""

    execution_id: str
    pipeline_id: str
    pipeline: str = Field(description="the pipeline's name")
    revision: int
    status: Status
    priority: Priority
    progress_percentage: float
    current_step: str | None = None
    queue_position: int | None = Field(None, description="1 is next; null unless pending")
    created_at: datetime
    started_at: datetime | None = None
    completed_at: datetime | None = None
    cancel_requested_at: datetime | None = None
    estimated_completion: datetime | None = Field(
        None, description="from earlier runs of this pipeline and the size of the inputs; null where nothing is known"
    )
    inputs: dict[str, Any] = {}
    parameters: dict[str, Any] = {}
    steps: list[StepView] = []
    warnings: list[str] = []
    output_files: list[OutputFile] = []
    error: dict[str, Any] | None = Field(None, description="code, status, title, detail; where it failed")
    retry_of: str | None = None


class ExecutionAccepted(_Wire):
    """Answer to an execution that was accepted."""

    execution_id: str
    status: Status
    estimated_completion: datetime | None = None
    queue_position: int | None = None


class ExecutionPage(_Wire):
    """A page of executions, without their steps."""

    items: list[ExecutionView]
    next_cursor: str | None = None


# --- pipelines -------------------------------------------------------------------------------------------------------------


class PipelineView(_Wire):
    """A pipeline's revision."""

    id: str
    name: str
    revision: int
    built_in: bool
    owner: str | None = None
    created_at: datetime
    updated_at: datetime
    expected_seconds: float | None = Field(
        None, description="median of the last runs that were not known before; no part of the revision, so the ETag stays"
    )
    spec: PipelineSpec


class PipelinePage(_Wire):
    """A page of pipelines."""

    items: list[PipelineView]
    next_cursor: str | None = None


class Validation(_Wire):
    """Answer of the dry run."""

    valid: bool
    errors: list[dict[str, str]] = []


# --- files -----------------------------------------------------------------------------------------------------------------


class FileView(_Wire):
    """A stored file."""

    id: str
    filename: str
    kind: str = Field(description="found by content: nifti, image2d, dicom, zip, obj, …")
    media_type: str
    size: int
    sha256: str
    path: str = Field(description="in the storage; what the direct endpoints take")
    created_at: datetime
    expires_at: datetime | None = None
    origin: Literal["upload", "result"]
    execution_id: str | None = None
    download_url: str


class FileMetadata(FileView):
    """A file and what its header says."""

    metadata: dict[str, Any] = Field(
        description="images: shape_zyx, spacing_mm, origin_mm, direction, dtype; intensity: min, max, percentiles (p01, …); "
        "never free text"
    )


class FilePage(_Wire):
    """A page of files."""

    items: list[FileView]
    next_cursor: str | None = None


# --- accounts --------------------------------------------------------------------------------------------------------------


class Credentials(_Wire):
    """Body of `POST /v1/auth/login`: a person's name and password, or a service account's name and secret."""

    username: str = Field(min_length=1, max_length=64)
    password: str = Field(min_length=1, max_length=256)


class RefreshRequest(_Wire):
    """Body of `POST /v1/auth/refresh`."""

    refresh_token: str = Field(min_length=1, max_length=256)


class Tokens(_Wire):
    """An access token and what makes the next one."""

    access_token: str
    token_type: Literal["Bearer"] = "Bearer"  # noqa: S105 - a name, no password
    expires_in: int = Field(description="seconds")
    refresh_token: str
    role: Role


class Session(_Wire):
    """Whose session a browser's cookies are; null where they are nobody's."""

    account: str | None = Field(None, description="its name")
    account_id: str | None = None
    role: Role | None = None
    expires_at: datetime | None = Field(None, description="end of the access token; refresh before, or then")
    renewable: bool = Field(description="whether there is a refresh token, which may be good")


class Identity(_Wire):
    """Who a token belongs to."""

    account_id: str
    name: str
    role: Role
    expires_at: datetime
