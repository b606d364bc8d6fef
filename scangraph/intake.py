"""What every door does, whatever it speaks: take files in, check and accept executions, tell how one ended.

HTTP, gRPC and Kafka all come here, so a pipeline cannot be started in two ways that differ.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import re
import unicodedata
import uuid
from collections.abc import AsyncIterable, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import PurePosixPath
from typing import Any, NamedTuple, Protocol
from urllib.parse import unquote

from scangraph.contracts import Component
from scangraph.contracts.api import InputFile, Priority, Role
from scangraph.contracts.errors import (
    AlreadyEnded,
    EmptyFile,
    InputDigestMismatch,
    InUse,
    InvalidInputs,
    NoSuch,
    PathRefused,
    ScanGraphError,
    UploadTooLarge,
)
from scangraph.contracts.pipelines import PipelineInput, PipelineSpec, assign_parameters
from scangraph.settings import Settings
from scangraph.storage import Storage
from scangraph.store import Store, executions, now
from scangraph.store import files as file_records
from scangraph.store.database import whole
from scangraph.store.executions import QueueLimits, Record
from scangraph.store.files import FILES, NewFile
from scangraph.store.pipelines import Stored
from scangraph.store.tables import Event, File
from scangraph.store.views import output_view

#: Each role may do what those before it may: a viewer looks, an operator runs and uploads, an editor makes pipelines.
_ORDER: tuple[Role, ...] = ("viewer", "operator", "editor", "admin")
#: What the executor and the gateway keep for themselves in the storage.
_OURS, _OWNED = ("steps/", "uploads/", "display/"), ("files/", "results/")


class Principal(NamedTuple):
    """Who asks."""

    account_id: str
    name: str
    role: Role
    jti: str
    expires_at: datetime
    epoch: int = 0

    def may(self, role: Role) -> bool:
        """Whether this one may do what needs a role."""
        return _ORDER.index(self.role) >= _ORDER.index(role)

    def sees(self, owner_id: str | None) -> bool:
        """Whether this one sees an execution or a file of that owner."""
        return self.role == "admin" or (owner_id is not None and owner_id == self.account_id)


class Gate(Protocol):
    """The part of imageio that the gateway asks what a file is."""

    async def inspect(self, name: str) -> dict[str, Any]:
        """Check a stored file whole and return `kind`, `media_type` and `header`; raises what the gate raises."""
        ...

    async def derive(self, name: str, target: str, what: str, most: int = 0) -> dict[str, Any]:
        """Make a copy of a stored file for screens under a new name; see `Imageio.derive`."""
        ...

    async def sha256(self, name: str) -> str:
        """Return a stored file's hash."""
        ...


@dataclass
class Intake:
    """What a door needs to take work in.

    Parameters
    ----------
    settings : Settings
        All of them; a door is part of the control plane.
    store : Store
        Records.
    storage : Storage
        Files.
    components : mapping
        What can be run, by id.
    gate : Gate
        Looks into files.
    wake : callable
        Tells the executor that there is work; losing the message costs a second, nothing else.
    """

    settings: Settings
    store: Store
    storage: Storage
    components: Mapping[str, Component]
    gate: Gate
    wake: Callable[[], Awaitable[None]]


#: Kind of a port -> kind of the files that it can be read from.
_FILE_KINDS = {"image": "nifti", "mask": "nifti", "image2d": "image2d"}


# --- files -----------------------------------------------------------------------------------------------------------------


async def inspected(intake: Intake, file: NewFile) -> NewFile:
    """Let the gate look into a stored file, and note what it found."""
    if file.size == 0:
        raise EmptyFile(name=file.filename, reason="it has no bytes")
    found = await intake.gate.inspect(file.storage_name)
    return replace(file, kind=found["kind"], media_type=found["media_type"], header=dict(found["header"]))


async def receive(
    intake: Intake, principal: Principal, filename: str, pieces: AsyncIterable[bytes], limit: int | None = None
) -> NewFile:
    """Stream a file into the storage and let the gate look into it; it has no row yet. What goes wrong leaves nothing.

    Raises
    ------
    UploadTooLarge
    EmptyFile
    ScanGraphError
        Whatever the gate or the storage raises.
    """
    file, size = new_file(intake, principal, filename), 0
    limit = limit or intake.settings.files.max_upload_bytes
    try:
        async with intake.storage.writer(file.storage_name) as out:
            async for piece in pieces:
                size += len(piece)
                if size > limit:
                    raise UploadTooLarge(limit=limit)
                await out.write(piece)
        return await inspected(intake, replace(file, size=size, sha256=out.sha256))
    except BaseException:
        await asyncio.shield(discard(intake, [file]))
        raise


@whole
async def keep(intake: Intake, files: Iterable[NewFile]) -> list[File]:
    """Give files their rows, all or none; without rows their bytes are deleted. Once begun it goes on without its caller."""
    files = list(files)
    try:
        return await file_records.add_files(intake.store, files)
    except BaseException:
        await discard_unnamed(intake, [file.storage_name for file in files])
        raise


async def discard(intake: Intake, files: Iterable[NewFile]) -> None:
    """Delete the bytes of files that get no row. What cannot be deleted now is an orphan, and swept."""
    for file in files:
        with contextlib.suppress(ScanGraphError):
            await intake.storage.delete(file.storage_name)


async def discard_unnamed(intake: Intake, names: list[str]) -> None:
    """Delete stored bytes unless they have a row.

    Race: the connection to the database broke in a commit. Then only the database knows whether the rows are there.
    """
    with contextlib.suppress(ScanGraphError):  # about an earlier error; what stays is swept
        for name in await file_records.unnamed(intake.store, names) if names else ():
            await intake.storage.delete(name)


async def take_back(intake: Intake, files: Iterable[NewFile], rows: Iterable[File] = ()) -> None:
    """Delete files that no execution takes: those that have rows already, and the bytes of all.

    Race: the database's answer to `submit` was lost, and the execution is there. Then what it reads stays.
    """
    taken = set()
    for row in rows:
        try:
            await file_records.delete_file(intake.store, row.id)
        except InUse:
            taken.add(row.id)
    await discard(intake, (file for file in files if file.id not in taken))


def new_file(intake: Intake, principal: Principal, filename: str) -> NewFile:
    """Give a file that is about to come its id and its place."""
    file_id = str(uuid.uuid4())
    days = intake.settings.files.retention_days
    return NewFile(
        id=file_id,
        owner_id=principal.account_id,
        filename=shown_name(filename),
        storage_name=f"{FILES}{file_id}/{safe_name(filename)}",
        kind="",
        media_type="",
        size=0,
        sha256="",
        expires_at=now() + timedelta(days=days) if days else None,
    )


def shown_name(name: str) -> str:
    """Return a client's file name for people: without folders and control characters."""
    last = re.split(r"[/\\]", unicodedata.normalize("NFC", name))[-1]
    return "".join(c for c in last if unicodedata.category(c) not in {"Cc", "Cs", "Cf", "Zl", "Zp"}).strip()[:200] or "file"


def safe_name(name: str) -> str:
    """Return a name for the storage that keeps a client's, as far as every file system and shell takes it."""
    plain = unicodedata.normalize("NFKD", shown_name(name)).encode("ascii", "ignore").decode()
    plain = re.sub(r"[^A-Za-z0-9._-]+", "_", plain).lstrip("._-") or "file"
    end = "".join(PurePosixPath(plain).suffixes[-2:])[-20:]
    return plain if len(plain) <= 100 else plain[: 100 - len(end)] + end


async def own_file(intake: Intake, principal: Principal, file_id: str) -> File:
    """Return a file that this account may see. One that it may not see is answered like one that is not there.

    Raises
    ------
    NoSuch
    """
    file = await file_records.get_file(intake.store, file_id)
    if not principal.sees(file.owner_id):
        raise NoSuch(kind="file", id=file_id)
    return file


# --- inputs ----------------------------------------------------------------------------------------------------------------


async def resolve_inputs(
    intake: Intake, principal: Principal, spec: PipelineSpec, given: Mapping[str, Any]
) -> tuple[dict[str, Any], int | None]:
    """Find the files that are named for a pipeline's inputs.

    Returns
    -------
    inputs : dict
        As `NewExecution.inputs` of the records.
    input_bytes : int or None
        Of the decoded images, where all are known.

    Raises
    ------
    InvalidInputs
        Points at each input that does not fit.
    NoSuch, PathRefused, FileMissing, InputDigestMismatch
    """
    faults: list[dict[str, str]] = []
    found: dict[str, Any] = {}
    known = ", ".join(spec.inputs)
    strangers = given.keys() - spec.inputs.keys()
    faults += [_fault(name, f"the pipeline has no input {name!r}; it has {known}") for name in strangers]
    for name, wanted in spec.inputs.items():
        value = given.get(name)
        if value is None:
            if not wanted.optional:
                faults.append(_fault(name, f"input {name!r} ({wanted.kind}) is missing"))
            continue
        listed = value if isinstance(value, list) else [value]
        if isinstance(value, list) and not wanted.many:
            faults.append(_fault(name, f"input {name!r} takes one file"))
            continue
        if not listed:
            faults.append(_fault(name, f"input {name!r} needs at least one file"))
            continue
        entries = [await _resolve(intake, principal, name, wanted, one, faults) for one in listed]
        found[name] = entries if wanted.many else entries[0]
    if faults:
        raise InvalidInputs(detail="; ".join(fault["detail"] for fault in faults), errors=faults)
    sizes = [entry.get("decoded_bytes") for entry in executions.input_entries(found)]
    return found, sum(s for s in sizes if s) if all(sizes) else None


def _fault(name: str, detail: str) -> dict[str, str]:
    return {"pointer": f"/inputs/{name}", "detail": detail}


async def _resolve(
    intake: Intake, principal: Principal, name: str, wanted: PipelineInput, given: Any, faults: list[dict[str, str]]
) -> dict[str, Any]:
    if isinstance(given, str):
        given = InputFile(file_id=given) if _is_uuid(given) else InputFile(path=given)
    if (given.file_id is None) == (given.path is None):
        faults.append(_fault(name, f"input {name!r}: give either `file_id` or `path`"))
        return {}
    row = await (_by_id(intake, principal, given.file_id) if given.file_id else _by_path(intake, principal, given.path))
    if row is None:
        path = intake.storage.name_of(given.path)
        await intake.storage.head(path)
        if given.sha256 is not None:
            _compare(name, given.sha256, await intake.gate.sha256(path))
        return {"file_id": None, "path": path, "label_scheme": given.label_scheme}
    if given.sha256 is not None:
        _compare(name, given.sha256, row.sha256)
    readable = (row.header or {}).get("readable_as")
    fits = row.kind == _FILE_KINDS.get(wanted.kind, row.kind)
    if not fits or (row.kind == "nifti" and readable is not None and wanted.kind not in readable):
        what = row.kind if not fits else f"readable as {' or '.join(readable or [])}"
        faults.append(_fault(name, f"input {name!r} takes a {wanted.kind}; {row.filename!r} is {what}"))
    return {
        "file_id": row.id,
        "path": row.storage_name,
        "label_scheme": given.label_scheme,
        "sha256": row.sha256,
        "decoded_bytes": (row.header or {}).get("decoded_bytes"),
    }


def _compare(name: str, announced: str, found: str) -> None:
    if announced != found:
        raise InputDigestMismatch(name=name, announced=announced, found=found)


def path_of(intake: Intake, uri: str) -> str:
    """Return the path in the storage that a URI names; what has no scheme is one.

    Raises
    ------
    PathRefused
        If it is the URI of something else.
    """
    if "://" not in uri:
        return uri
    root = intake.settings.storage.rstrip("/") + "/"
    if not uri.startswith(root):
        raise PathRefused(path=uri, reason="it is not in this service's storage")
    path = uri.removeprefix(root)
    return unquote(path) if root.startswith("file:") else path


def _is_uuid(text: str) -> bool:
    try:
        return str(uuid.UUID(text)) == text.lower()
    except ValueError:
        return False


async def _by_id(intake: Intake, principal: Principal, file_id: str) -> File:
    row = await file_records.get_file(intake.store, file_id)
    if not principal.sees(row.owner_id):
        raise NoSuch(kind="file", id=file_id)
    return row


async def _by_path(intake: Intake, principal: Principal, path: str) -> File | None:
    """Return the record of a path, None for what a backend put there itself. Somebody else's is not there."""
    name = intake.storage.name_of(path)
    row = await file_records.by_storage_name(intake.store, name)
    if row is not None and principal.sees(row.owner_id):
        return row
    if row is not None or name.startswith(_OURS) or (name.startswith(_OWNED) and principal.role != "admin"):
        raise NoSuch(kind="file", id=path)
    return None


# --- accepting -------------------------------------------------------------------------------------------------------------


def fingerprint(*parts: Any) -> str:
    """Hash a request: the same words in another order are the same request."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


async def submit(
    intake: Intake,
    principal: Principal,
    stored: Stored,
    inputs: Mapping[str, Any],
    parameters: Mapping[str, Any],
    priority: Priority = "normal",
    key: tuple[str, str] | None = None,
) -> tuple[str, bool]:
    """Check and accept an execution of a pipeline; returns its id, and whether the key had made it before."""
    versions = {step.component: intake.components[step.component].version for step in runnable(intake, stored)}
    found, size = await resolve_inputs(intake, principal, stored.spec, inputs)
    full, faults = assign_parameters(stored.spec, intake.components, parameters)
    if faults:
        raise InvalidInputs(detail="; ".join(fault["detail"] for fault in faults), errors=faults)
    new = executions.NewExecution(
        principal.account_id, stored.id, stored.revision, stored.spec, found, full, versions, priority, size
    )
    execution_id, replayed = await executions.accept(intake.store, new, limits(intake), key)
    await intake.wake()
    return execution_id, replayed


def runnable(intake: Intake, stored: Stored) -> Sequence[Any]:
    """Return a pipeline's steps, if the service has all their components.

    Raises
    ------
    InvalidInputs
    """
    missing = sorted({step.component for step in stored.spec.steps} - intake.components.keys())
    if missing:
        raise InvalidInputs(detail=f"pipeline {stored.name!r} needs {', '.join(missing)}, which this service does not have")
    return stored.spec.steps


def limits(intake: Intake) -> QueueLimits:
    """Return how many executions may wait."""
    s = intake.settings.executor
    return QueueLimits(s.max_pending, s.max_pending_per_account, s.ageing_seconds)


async def look(intake: Intake, execution_id: str) -> Record:
    """Load an execution as of now."""
    return await executions.load(intake.store, execution_id, intake.settings.executor.max_running)


async def own(intake: Intake, principal: Principal, execution_id: str) -> None:
    """Raise `NoSuch` unless it is there and this one's to see."""
    if not principal.sees(await executions.owner_of(intake.store, execution_id)):
        raise NoSuch(kind="execution", id=execution_id)


async def told(intake: Intake, event: Event) -> dict[str, Any]:
    """Return an event as every listener is told it, by whatever door."""
    message = {
        "type": event.kind,
        "execution_id": event.execution_id,
        "seq": event.seq,
        "at": event.created_at.isoformat(),
        **event.body,
    }
    if event.body["status"] == "completed" or event.body.get("new_outputs"):
        record = await executions.load(intake.store, event.execution_id)  # what can be read by now, this event's and later ones
        message["output_files"] = [output_view(file).model_dump(mode="json") for file in record.files]
    return message


def failure(record: Record) -> ScanGraphError:
    """Return what a failed or cancelled execution ended with, as the error that it was."""
    row = record.execution
    if row.state == "cancelled":
        return AlreadyEnded(execution_id=row.id, state="cancelled", hint="start a new one to run it again")
    error = row.error or {}
    return Failed(error.get("code", "stage-failed"), error.get("status", 500), error.get("title", "It failed"), error)


class Failed(ScanGraphError):
    """An execution's recorded error, told again."""

    def __init__(self, code: str, status: int, title: str, recorded: Mapping[str, Any]) -> None:
        super().__init__(detail=recorded.get("detail", ""), errors=recorded.get("errors"))
        self.code, self.status, self.title = code, status, title  # type: ignore[misc]
