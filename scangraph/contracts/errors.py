"""The error tree. Every error is a code and fields; its sentence is made from the fields.

Three kinds, which decide what happens next: `UsageError` (the request is at fault: a 4xx, never retried), `TransientError`
(a 503, retried) and `FatalError` (a 500). `STATUS_NAMES` maps statuses to gRPC and WebSocket codes; nothing else does.

Ray pickles what a stage raises and calls the exception's constructor with its `args` on the other side; a class that does
not accept them arrives as `UnserializableException`, and a 422 becomes a 500. Hence `__reduce__` here and plain fields only.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple


class Wire(NamedTuple):
    """What an HTTP status is called on the other wires."""

    grpc: str
    websocket: int


#: HTTP status -> gRPC status name and WebSocket close code. The one table for every door.
STATUS_NAMES: dict[int, Wire] = {
    400: Wire("INVALID_ARGUMENT", 4400),
    401: Wire("UNAUTHENTICATED", 4401),
    403: Wire("PERMISSION_DENIED", 4403),
    404: Wire("NOT_FOUND", 4404),
    405: Wire("UNIMPLEMENTED", 4405),
    408: Wire("DEADLINE_EXCEEDED", 4408),
    409: Wire("ABORTED", 4409),
    412: Wire("FAILED_PRECONDITION", 4412),
    413: Wire("RESOURCE_EXHAUSTED", 4413),
    415: Wire("INVALID_ARGUMENT", 4415),
    416: Wire("OUT_OF_RANGE", 4416),
    422: Wire("INVALID_ARGUMENT", 4422),
    428: Wire("FAILED_PRECONDITION", 4428),
    429: Wire("RESOURCE_EXHAUSTED", 4429),
    460: Wire("DATA_LOSS", 4460),
    500: Wire("INTERNAL", 4500),
    503: Wire("UNAVAILABLE", 4503),
    504: Wire("DEADLINE_EXCEEDED", 4504),
    507: Wire("RESOURCE_EXHAUSTED", 4507),
}


def _rebuild(cls: type[ScanGraphError], fields: dict[str, Any]) -> ScanGraphError:
    return cls(**fields)


class ScanGraphError(Exception):
    """Base of every error that scangraph raises on purpose.

    Parameters
    ----------
    **fields
        Plain values (str, int, float, bool, lists and dicts of them) that `template` is filled from.

    Attributes
    ----------
    code : str
        Stable name, the last part of the problem's `type`.
    status : int
        HTTP status.
    title : str
        Short sentence, the same for every occurrence.
    """

    code: ClassVar[str] = "internal-error"
    status: ClassVar[int] = 500
    title: ClassVar[str] = "The service failed"
    template: ClassVar[str] = "{detail}"

    def __init__(self, **fields: Any) -> None:
        self.fields = fields
        super().__init__(self.template.format_map(_Lenient(fields)))

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.fields)

    @property
    def detail(self) -> str:
        """What was wrong, where, and what to do."""
        return self.template.format_map(_Lenient(self.fields))


class _Missing(str):
    """A field's name in braces, whatever format its place asks for."""

    __slots__ = ()

    def __format__(self, spec: str) -> str:
        return str(self)

    __repr__ = str.__str__


class _Lenient(dict[str, Any]):
    """An error about an error helps nobody: a missing field shows as its name."""

    def __missing__(self, key: str) -> str:
        return _Missing("{" + key + "}")


class UsageError(ScanGraphError):
    """The request is at fault; sending it again unchanged cannot help."""

    code, status, title = "bad-request", 422, "The request cannot be carried out"


class TransientError(ScanGraphError):
    """Nothing is wrong with the request; it may succeed when sent again."""

    code, status, title = "unavailable", 503, "The service is not able to do this now"


class FatalError(ScanGraphError):
    """The service is at fault, and a retry would fail in the same way."""


# --- requests ------------------------------------------------------------------------------------------------------------


class UnknownComponent(UsageError):
    """No component has this id."""

    code, status, title = "unknown-component", 404, "There is no such component"
    template = "There is no component {component!r}; there are: {known}."


class InvalidParameters(UsageError):
    """Parameters or inputs do not fit the component's declaration."""

    code, title = "invalid-parameters", "Inputs or parameters do not fit the component"
    template = "{component}: {detail}"


class WrongGrid(UsageError):
    """Two images that must lie on each other do not."""

    code, title = "extents-do-not-overlap", "The images do not show the same part of the body"
    template = (
        "{second} must overlap {first}, but only {overlap_percent:.0f} % of it does: {first} spans {first_extent}, "
        "{second} spans {second_extent} (LPS mm). Send images of the same patient and body part."
    )


class InvalidVolume(UsageError):
    """An array and its geometry do not make a volume."""

    code, title = "invalid-volume", "Array and geometry do not make a volume"


class UnknownLabels(UsageError):
    """A mask holds numbers that the label table does not have."""

    code, title = "unknown-labels", "The mask has labels that nobody named"
    template = (
        "{name} holds the label numbers {numbers}, which are not in the label table (GET /v1/labels). "
        "Renumber the mask, or name its scheme (label_scheme)."
    )


class LabelsMissing(UsageError):
    """A mask lacks the structures that are worked on."""

    code, title = "labels-missing", "The mask lacks what is needed"
    template = "{name} needs {wanted}, and the mask does not have {missing}; it has {found}. See GET /v1/labels."


class GridsDiffer(UsageError):
    """Two inputs that must lie on one grid do not."""

    code, title = "grids-differ", "The inputs lie on different grids"
    template = (
        "{second} lies on another grid than {first}: {second_grid} instead of {first_grid}. "
        "Resample it, or allow it to be resampled (resample=true)."
    )


# --- storage -------------------------------------------------------------------------------------------------------------


class PathRefused(UsageError):
    """A path that leads, or tries to lead, outside the storage root."""

    code, status, title = "path-refused", 403, "The path leads outside the storage"
    template = "{path!r} is refused: {reason}. Paths are relative to the storage root, or absolute inside it."


class FileMissing(UsageError):
    """Nothing is stored under this path."""

    code, status, title = "file-not-found", 404, "There is no such file"
    template = "{path!r} is not in the storage. Put the file under the storage root first."


class AlreadyWritten(UsageError):
    """Keys are write-once."""

    code, status, title = "already-exists", 409, "There is a file already"
    template = "{path!r} exists, and what is stored is never overwritten."


class StorageFull(TransientError):
    """No room is left for a result."""

    code, status, title = "storage-full", 507, "The storage is full"
    template = "{path!r} could not be written: {reason}. Free space in the data folder and send the request again."


# --- image files (the policy of imageio's gate) ----------------------------------------------------------------------------


class ImageFileError(UsageError):
    """A file that is not, or not safely, an image; `name` is the file, `reason` what was found."""

    template = "{name}: {reason}"


class EmptyFile(ImageFileError):
    """Zero bytes."""

    code, title = "empty-file", "The file is empty"


class UnsupportedMedia(ImageFileError):
    """Not a file of a kind that is read here."""

    code, status, title = "unsupported-media", 415, "The file is of no supported kind"


class Truncated(ImageFileError):
    """Fewer bytes than the file declares."""

    code, title = "truncated", "The file ends early"


class IntegrityError(ImageFileError):
    """A checksum does not fit."""

    code, title = "integrity", "The file is damaged"


class TooManyVoxels(ImageFileError):
    """More voxels than the limit."""

    code, status, title = "too-many-voxels", 413, "The image has too many voxels"


class InflatedTooLarge(ImageFileError):
    """The decompressed file is larger than it declares, or than the limit."""

    code, status, title = "inflated-too-large", 413, "The file inflates past its limit"


class InvalidHeader(ImageFileError):
    """Header fields that contradict the format."""

    code, title = "invalid-header", "The file's header is invalid"


class InvalidGeometry(ImageFileError):
    """Spacing, origin or direction are not a rigid grid in space."""

    code, title = "invalid-geometry", "The image's geometry is invalid"


class AmbiguousGeometry(ImageFileError):
    """Two geometries that contradict each other."""

    code, title = "ambiguous-geometry", "The image has two geometries"


class MissingGeometry(ImageFileError):
    """No geometry at all: millimetres would be invented."""

    code, title = "missing-geometry", "The image has no geometry"


class InvalidIntensity(ImageFileError):
    """Voxel values that are no CT and no mask."""

    code, title = "invalid-intensity", "The image's values are invalid"


class UnsupportedPixelType(ImageFileError):
    """Colour or complex voxels."""

    code, status, title = "unsupported-pixel-type", 415, "The voxel type is not supported"


class UnsupportedDimensions(ImageFileError):
    """Not one 3-D image."""

    code, title = "unsupported-dimensions", "The file does not hold one 3-D image"


# --- running ---------------------------------------------------------------------------------------------------------------


class ModelNotFound(UsageError):
    """No installed model does this task."""

    code, status, title = "model-not-found", 404, "No such model is installed"
    template = "No model {model!r} is installed for {component}; installed: {known}. See `scangraph models`."


class ModelRefused(UsageError):
    """What was given to install, or to remove, is not taken."""

    code, title = "model-refused", "The model is refused"
    template = "{source}: {reason}."


class InvalidModel(FatalError):
    """A model folder that cannot be trusted or read."""

    code, title = "invalid-model", "A model folder is invalid"
    template = "Model folder {folder!r}: {reason}"


class StageLost(TransientError):
    """The process that ran a step died, and so did the retries."""

    code, title = "stage-lost", "The process that ran this step died"
    template = (
        "{deployment} died while it ran {component} ({attempts} attempts). Send the request again; if it dies again, {hint}."
    )


class StageUnavailable(TransientError):
    """A deployment has no replica that can take the work now."""

    code, title = "stage-unavailable", "A stage is not ready"
    template = "{deployment} is not ready: {reason}"


class OutOfMemory(TransientError):
    """A step needs more memory than there is."""

    code, status, title = "out-of-memory", 507, "Not enough memory"
    template = "{component} ran out of {device} memory on an image of {shape} voxels. Use a coarser or smaller image."


class TooLargeForMemory(UsageError):
    """A step would need more memory than is free; it was not begun, and trying again is of no use."""

    code, status, title = "too-large-for-memory", 413, "Too large for the memory"
    template = (
        "{component} needs about {needed_mb} MB of {device} memory for an image of {shape} voxels, and {free_mb} MB are free. "
        "Use a coarser or smaller image, or a larger machine."
    )


class StageFailed(FatalError):
    """A step raised something nobody foresaw; the cause is in the log under the execution's id."""

    code, title = "stage-failed", "A step failed"
    template = "{component} failed with {error}; the log has the details under execution {execution_id}."


class NotRunning(TransientError):
    """No scangraph is reachable."""

    code, title = "not-running", "No scangraph is running here"
    template = "No running scangraph was found {where}. Start one with `scangraph serve` (or `make serve`)."


class StepTimedOut(FatalError):
    """A step took longer than it may."""

    code, status, title = "step-timed-out", 504, "A step took too long"
    template = "Step {step!r} ({component}) was stopped after {seconds:g} s, the longest it may take."


# --- the service -----------------------------------------------------------------------------------------------------------


class Unauthenticated(UsageError):
    """No valid token."""

    code, status, title = "unauthenticated", 401, "Who are you?"
    template = "{reason}. Send `Authorization: Bearer <token>`; POST /v1/auth/login gives one."


class Forbidden(UsageError):
    """A valid token whose role may not do this."""

    code, status, title = "forbidden", 403, "Your role may not do this"
    template = "{action} needs the role {needed}; yours is {role}."


class NoSuch(UsageError):
    """Nothing of that id, or nothing that this account may see."""

    code, status, title = "not-found", 404, "There is no such thing"
    template = "There is no {kind} {id!r}, or it is not yours."


class AlreadyEnded(UsageError):
    """Terminal states never change."""

    code, status, title = "already-ended", 409, "The execution has ended"
    template = "Execution {execution_id} is {state} and stays so; {hint}."


class NotEnded(UsageError):
    """Only what failed or was cancelled is tried again."""

    code, status, title = "not-retryable", 409, "The execution is not one to retry"
    template = "Execution {execution_id} is {state}; only failed and cancelled ones are retried."


class InvalidPipeline(UsageError):
    """A pipeline whose parts do not fit; `errors` points at each."""

    code, title = "invalid-pipeline", "The pipeline does not fit together"


class InvalidInputs(UsageError):
    """An execution's inputs do not fit its pipeline; `errors` points at each."""

    code, title = "invalid-inputs", "The inputs do not fit the pipeline"


class NameTaken(UsageError):
    """Names are unique."""

    code, status, title = "name-taken", 409, "The name is taken"
    template = "There is a {kind} {name!r} already."


class InUse(UsageError):
    """What running work needs is not deleted."""

    code, status, title = "in-use", 409, "It is in use"
    template = "{kind} {id!r} is used by {users}; {hint}."


class BuiltIn(UsageError):
    """What comes with the service is not changed."""

    code, status, title = "built-in", 409, "It comes with the service"
    template = "Pipeline {name!r} is built in and cannot be changed; copy it under another name."


class PreconditionRequired(UsageError):
    """A change that does not say what it changes."""

    code, status, title = "precondition-required", 428, "Say which revision you change"
    template = "Send `If-Match` with the ETag that GET gave."


class PreconditionFailed(UsageError):
    """Somebody else was faster."""

    code, status, title = "precondition-failed", 412, "It was changed since you read it"
    template = "The {kind} {id!r} is at {etag} now. Read it again and repeat the change."


class IdempotencyMismatch(UsageError):
    """A key that was used for another request."""

    code, title = "idempotency-mismatch", "The Idempotency-Key was used for another request"
    template = "Idempotency-Key {key!r} came with another body before. Use a new key for a new request."


class InvalidCursor(UsageError):
    """A cursor that this service did not give."""

    code, title = "invalid-cursor", "The cursor is not one of ours"
    template = "`cursor` must be a `next_cursor` from the same list."


class UnsatisfiableRange(UsageError):
    """A range beyond the file's end."""

    code, status, title = "unsatisfiable-range", 416, "The file ends before this range"
    template = "The file has {size} bytes."


class UploadTooLarge(UsageError):
    """More bytes than a file may have."""

    code, status, title = "upload-too-large", 413, "The file is too large"
    template = "A file may have {limit} bytes."


class UploadIncomplete(UsageError):
    """A body that ended, or stalled, before it was whole."""

    code, status, title = "upload-incomplete", 408, "The request did not arrive in time"
    template = "{detail} Nothing was kept; send it again, or use resumable uploads (tus) at /v1/uploads."


class TooManyRequests(TransientError):
    """Slow down."""

    code, status, title = "too-many-requests", 429, "Too many requests"
    template = "{what} Try again in {retry_after_seconds} s."


class QueueFull(TransientError):
    """More is waiting than may."""

    code, status, title = "queue-full", 429, "The queue is full"
    template = "{waiting} executions wait {whose}, and no more than {limit} may. Try again in {retry_after_seconds} s."


class StoreUnavailable(TransientError):
    """The database does not answer."""

    code, title = "store-unavailable", "The service's records cannot be reached"
    template = "The database did not answer ({reason}); nothing was changed. Try again in {retry_after_seconds} s."


class StorageUnavailable(TransientError):
    """The object storage does not answer."""

    code, title = "storage-unavailable", "The storage cannot be reached"
    template = "The storage cannot be used for {path!r}: {reason}. Nothing was lost; try again."


class LeaseLost(TransientError):
    """Another executor has taken this execution over."""

    code, title = "lease-lost", "Another executor has this execution"
    template = "Execution {execution_id} was taken over; this attempt ends without a trace."


class DigestMismatch(UsageError):
    """What arrived is not what was sent."""

    code, title = "digest-mismatch", "The bytes that arrived are not the ones that were sent"
    template = "{algorithm} of what arrived is not the one that was announced; send it again."


class ChecksumMismatch(UsageError):
    """A part of a resumable upload arrived damaged (tus' own status)."""

    code, status, title = "checksum-mismatch", 460, "The part arrived damaged"
    template = "The part does not have the {algorithm} that was announced; nothing of it was kept, send it again."


class UploadConflict(UsageError):
    """A part that does not follow what is there."""

    code, status, title = "upload-conflict", 409, "The part does not fit on"
    template = "{reason}; HEAD says where to go on."


class TusVersion(UsageError):
    """Another version of the protocol."""

    code, status, title = "tus-version", 412, "This is tus 1.0"
    template = "Send `Tus-Resumable: 1.0.0`."


class InvalidUpload(UsageError):
    """A resumable upload's headers do not say what they must."""

    code, status, title = "invalid-upload", 400, "The upload's headers do not fit"
    template = "{header}: {reason}."


class DamagedResult(FatalError):
    """A kept result whose bytes are not what was written."""

    code, title = "damaged-result", "A kept result is damaged"
    template = "A kept result cannot be used: {reason}."


class UnusableText(UsageError):
    """A text that no record can hold."""

    code, title, status = "unusable-text", "A text in the request cannot be used", 422
    template = "A text in the request has a NUL character, which no record can hold."


class InputDigestMismatch(UsageError):
    """An input is not the file that was meant."""

    code, title = "input-digest-mismatch", "An input is not the file that was meant"
    template = "Input {name!r} has the SHA-256 {found}, and {announced} was announced."


class InvalidMessage(UsageError):
    """A message that is no request; `errors` points at what does not fit."""

    code, title = "invalid-message", "The message is no request"
    template = "{detail}"


class DoorClosed(TransientError):
    """A door that takes nothing in as it is set up now."""

    code, title = "door-closed", "A door is closed"
    template = "The {door} door takes nothing in: {reason}."


class InvalidSetting(FatalError):
    """Settings that something refuses to be made with."""

    code, title = "invalid-setting", "A setting does not fit"
    template = "The settings of {section!r} do not fit: {reason}. `scangraph settings` lists them."


class GatewayLost(TransientError):
    """The process that worked on a call ended."""

    code, title = "gateway-lost", "The gateway went away"
    template = "The gateway's process ended while it worked on this call. Look whether it was done before you send it again."


class Overloaded(TransientError):
    """No gateway can take a call."""

    code, title = "overloaded", "The service is busy"
    template = "No gateway can take the call now; nothing was done with it. Send it again."


class TooManyStreams(TransientError):
    """More of something than one connection, or one gateway, may have."""

    code, status, title = "too-many-streams", 429, "Too many at once"
    template = "{what}, and no more than {limit} may be open. {hint}."


class Idle(UsageError):
    """A call on which nothing happens."""

    code, status, title = "idle", 408, "Nothing came"
    template = "{detail} Begin a new call when there is something to send."


class InvalidChunk(UsageError):
    """A chunk that does not belong where it is."""

    code, title = "invalid-chunk", "The chunk does not fit"
    template = "Chunk {chunk} of image {image!r}: {reason}. Nothing of the image was kept; send it again."


# --- 2-D images ------------------------------------------------------------------------------------------------------------


class InvalidImage(UsageError):
    """An array that is no 2-D image."""

    code, title = "invalid-image", "The image is not valid"


class TooManyPixels(ImageFileError):
    """A 2-D image over the limits."""

    code, status, title = "too-many-pixels", 413, "The image has too many pixels"


# --- the page --------------------------------------------------------------------------------------------------------------


class CrossSite(UsageError):
    """A request by cookie that another page may have made the browser send."""

    code, status, title = "cross-site-request", 403, "Only the service's own page may do this with its cookie"
    template = "The request came with a cookie, and {reason}. Programs send `Authorization: Bearer <token>` instead."


class StillAtWork(UsageError):
    """What waits or runs is not deleted."""

    code, status, title = "still-at-work", 409, "The execution has not ended"
    template = "Execution {execution_id} is {state}; cancel it (POST /v1/executions/{execution_id}/cancel), then delete it."
