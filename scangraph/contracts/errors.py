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
    403: Wire("PERMISSION_DENIED", 4403),
    404: Wire("NOT_FOUND", 4404),
    405: Wire("UNIMPLEMENTED", 4405),
    409: Wire("ABORTED", 4409),
    413: Wire("RESOURCE_EXHAUSTED", 4413),
    415: Wire("INVALID_ARGUMENT", 4415),
    422: Wire("INVALID_ARGUMENT", 4422),
    500: Wire("INTERNAL", 4500),
    503: Wire("UNAVAILABLE", 4503),
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


class StageFailed(FatalError):
    """A step raised something nobody foresaw; the cause is in the log under the execution's id."""

    code, title = "stage-failed", "A step failed"
    template = "{component} failed with {error}; the log has the details under execution {execution_id}."


class NotRunning(TransientError):
    """No scangraph is reachable."""

    code, title = "not-running", "No scangraph is running here"
    template = "No running scangraph was found {where}. Start one with `scangraph serve` (or `make serve`)."
