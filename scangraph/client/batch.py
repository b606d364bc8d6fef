"""One pipeline over many inputs: a few at a time, and every step noted, so that it can be stopped and begun again anywhere.

In the folder of the results `batch.jsonl` is the journal: a line for everything that must not be done twice, the last line of
a case is what holds. A case's files are sent, and noted; then it gets a key, which is noted with them; then it is started with
that key. Whenever it is interrupted, the same key and the same files lead to the same execution.
"""

from __future__ import annotations

import asyncio
import contextlib
import csv
import hashlib
import json
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from scangraph.client import locks
from scangraph.client.calls import AsyncClient, Pipeline
from scangraph.client.failures import ServerUnreachable, from_execution
from scangraph.client.live import Update
from scangraph.contracts.api import Priority, Status
from scangraph.contracts.errors import Forbidden, NoSuch, ScanGraphError, Unauthenticated, UsageError
from scangraph.contracts.pipelines import PipelineSpec

JOURNAL, LOCK, TABLE = "batch.jsonl", ".batch.lock", "results.csv"
_VOLUMES = (".nii.gz", ".nii")
_PICTURES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp")
_ENDINGS = (*_VOLUMES, *_PICTURES)
#: What would meet every other case too.
_HOPELESS = (ServerUnreachable, Unauthenticated, Forbidden)


@dataclass(frozen=True)
class Case:
    """One run: a file for each input.

    Parameters
    ----------
    name : str
        Of its folder among the results.
    files : dict
        Input -> files.
    fault : str
        Why it cannot be run.
    """

    name: str
    files: dict[str, list[Path]]
    fault: str = ""

    @property
    def shown(self) -> str:
        """Its files, for people."""
        return ";".join(str(path) for paths in self.files.values() for path in paths) or self.name


class Output(BaseModel):
    """A result on this machine."""

    path: str
    sha256: str


class Record(BaseModel):
    """What is noted of a case."""

    case: str
    request: str
    key: str
    file_ids: dict[str, list[str]] = {}
    execution_id: str = ""
    status: Status | Literal["", "not run"] = ""
    seconds: float | None = None
    error: str = ""
    outputs: list[Output] = []


#: Told of a case: its name, what it does, how far it is in percent, and whether it is over.
OnCase = Callable[[str, str, float, bool], None]


def _nothing(name: str, text: str, percent: float, over: bool) -> None:
    """Tell nobody."""


# --- what there is to do ------------------------------------------------------------------------------------------------------


def find_cases(spec: PipelineSpec, given: Sequence[Path]) -> list[Case]:
    """Find the cases in files and folders.

    Parameters
    ----------
    spec : PipelineSpec
        With one input that must be there, each NIfTI is a case, or each 2-D image where that is taken. With several, each
        folder is one whose files are named after the inputs (`arterial.nii.gz`), or a folder of such folders.
    given : sequence of Path
        Files and folders.

    Raises
    ------
    UsageError
        If there is nothing to do, or two cases would have the same name.
    """
    needed = [name for name, wanted in spec.inputs.items() if not wanted.optional]
    found: list[tuple[Path, dict[str, list[Path]]]] = []
    for path in given:
        if not path.exists():
            raise UsageError(detail=f"{path} is not there")
        if len(needed) == 1 and len(spec.inputs) == 1:
            found += [(image, {needed[0]: [image]}) for image in ([path] if path.is_file() else _images(spec, path))]
        elif path.is_file():
            raise UsageError(
                detail=f"{path} is one file, and {spec.name} takes {', '.join(spec.inputs)}: give a folder with them"
            )
        elif (here := _named(spec, path)).keys() >= set(needed):
            found.append((path, here))
        else:
            inside = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
            found += [(folder, _named(spec, folder)) for folder in inside]
    if not found:
        raise UsageError(detail=f"no case is in {', '.join(map(str, given))}: {_expected(spec)}")
    short = [_stem(path) for path, _ in found]
    names = [name if short.count(name) == 1 else path.name for name, (path, _) in zip(short, found, strict=True)]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(detail=f"two cases are called {twice!r}, and their results would be in one folder; run them apart")
    cases = []
    for name, (_, files) in zip(names, found, strict=True):
        missing = [need for need in needed if need not in files]
        cases.append(Case(name, files, f"no file for {', '.join(missing)}" if missing else ""))
    return cases


def _expected(spec: PipelineSpec) -> str:
    if len(spec.inputs) == 1:
        return f"each {', '.join(_taken(spec))} is one"
    return f"each folder is one, with files named {', '.join(f'{name}.nii.gz' for name in spec.inputs)}"


def _taken(spec: PipelineSpec) -> tuple[str, ...]:
    """Return the endings of the files that a pipeline takes."""
    kinds = {wanted.kind for wanted in spec.inputs.values()}
    return (*(_VOLUMES if kinds & {"image", "mask"} else ()), *(_PICTURES if "image2d" in kinds else ()))


def _images(spec: PipelineSpec, folder: Path) -> list[Path]:
    endings = _taken(spec)
    return sorted(
        p for p in folder.iterdir() if p.is_file() and p.name.lower().endswith(endings) and not p.name.startswith(".")
    )


def _stem(path: Path) -> str:
    return next((path.name[: -len(end)] for end in _ENDINGS if path.name.lower().endswith(end)), path.name)


def _named(spec: PipelineSpec, folder: Path) -> dict[str, list[Path]]:
    """Return input -> files of that name; `name-1`, `name-2`, … for one that takes many."""
    files: dict[str, list[Path]] = {}
    for path in _images(spec, folder):
        stem = _stem(path)
        for name, wanted in spec.inputs.items():
            if stem == name or (wanted.many and stem.startswith(f"{name}-")):
                files.setdefault(name, []).append(path)
    return files


# --- what was done ------------------------------------------------------------------------------------------------------------


class Journal:
    """The journal of a folder.

    Raises
    ------
    UsageError
        If another process works in this folder.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = (folder / LOCK).open("ab")
        if not locks.take(self._lock.fileno()):
            self._lock.close()
            raise UsageError(detail=f"another batch works in {folder}; wait for it, or choose another folder")
        path = folder / JOURNAL
        lines = path.read_bytes().split(b"\n") if path.exists() else []
        self._records: dict[str, Record] = {}
        for line in lines:
            with contextlib.suppress(ValidationError):  # a line that was cut off
                record = Record.model_validate_json(line, extra="ignore")
                self._records[record.case] = record
        self._file = path.open("ab")
        if lines and lines[-1]:
            self._file.write(b"\n")

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._lock.close()

    def get(self, case: str) -> Record | None:
        """Return what holds of a case."""
        return self._records.get(case)

    def note(self, record: Record) -> None:
        """Note it. From here on it survives this process."""
        self._records[record.case] = record.model_copy()
        self._file.write(record.model_dump_json().encode() + b"\n")
        self._file.flush()


@dataclass
class Batch:
    """Runs cases.

    Parameters
    ----------
    client : AsyncClient
        With much patience.
    pipeline : Pipeline
        What is run: this revision, also after an interruption.
    folder : Path
        Where the results go.
    in_flight : int
        Cases at once.
    """

    client: AsyncClient
    pipeline: Pipeline
    folder: Path
    parameters: Mapping[str, Any] = field(default_factory=dict)
    priority: Priority = "normal"
    in_flight: int = 4
    on_case: OnCase = _nothing

    async def run(self, cases: Sequence[Case]) -> list[Record]:
        """Run all of them, and return how each ended. What ended well before, and is whole, is not run again.

        Raises
        ------
        UsageError
            If another process works in this folder.
        ServerUnreachable, Unauthenticated, Forbidden
            What would meet every case ends the batch.
        """
        done = {case.name: Record(case=case.name, request="", key="", status="not run") for case in cases}
        left = iter(cases)
        hopeless: list[ScanGraphError] = []

        async def work(journal: Journal) -> None:
            for case in left:
                if hopeless:
                    return
                self.on_case(case.name, "", 0, False)
                try:
                    done[case.name] = await self._run(case, journal)
                except _HOPELESS as error:
                    hopeless.append(error)
                    done[case.name].error = error.detail
                except OSError as error:
                    done[case.name].status, done[case.name].error = "failed", str(error)
                self.on_case(case.name, done[case.name].status, 100, True)

        with Journal(self.folder) as journal:
            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(max(self.in_flight, 1)):
                        group.create_task(work(journal))
            finally:
                for case in cases:
                    if done[case.name].status == "not run" and (known := journal.get(case.name)) is not None:
                        done[case.name].execution_id = known.execution_id
                self._write_table(cases, done)
        if hopeless:
            raise hopeless[0]
        return [done[case.name] for case in cases]

    async def _run(self, case: Case, journal: Journal) -> Record:
        request = await asyncio.to_thread(self._fingerprint, case)
        record = journal.get(case.name)
        if record is None or record.request != request:
            record = Record(case=case.name, request=request, key=str(uuid.uuid4()))
        elif record.status == "completed" and await asyncio.to_thread(self._intact, record):
            return record
        elif record.status in {"failed", "cancelled"}:  # again, with the files that are there already
            record = Record(case=case.name, request=request, key=str(uuid.uuid4()), file_ids=record.file_ids)
        else:
            record = record.model_copy(update={"error": ""})
        try:
            if case.fault:
                raise UsageError(detail=case.fault)
            try:
                await self._finish(case, record, journal)
            except NoSuch:
                if not record.file_ids:  # nothing was there before: it is something else that is not there
                    raise
                # Its files, its execution or its results were deleted meanwhile.
                record = Record(case=case.name, request=request, key=str(uuid.uuid4()))
                await self._finish(case, record, journal)
        except _HOPELESS:
            raise
        except (ScanGraphError, OSError) as error:
            record.error = error.detail if isinstance(error, ScanGraphError) else str(error)
            if record.status not in {"failed", "cancelled"}:  # it failed here, not there: next time it goes on from where it is
                record.status = ""
                journal.note(record)
                return record.model_copy(update={"status": "failed"})
        journal.note(record)
        return record

    async def _finish(self, case: Case, record: Record, journal: Journal) -> None:
        """Do whatever is left to do."""
        if not record.execution_id:
            if not record.file_ids:
                for name, paths in case.files.items():
                    record.file_ids[name] = [await self._send(case, path) for path in paths]
            journal.note(record)
            inputs = {name: ids if self.pipeline.spec.inputs[name].many else ids[0] for name, ids in record.file_ids.items()}
            started = await self.client.start(
                f"{self.pipeline.id}@{self.pipeline.revision}",
                inputs,
                parameters=self.parameters,
                priority=self.priority,
                idempotency_key=record.key,
            )
            record.execution_id = started.execution_id
            journal.note(record)
        view = await self.client.wait(record.execution_id, on_update=lambda update: self._show(case, update))
        record.status, record.outputs = view.status, []
        if view.started_at and view.completed_at:
            record.seconds = round((view.completed_at - view.started_at).total_seconds(), 3)
        if view.status != "completed":
            raise from_execution(view.execution_id, view.status, view.error)
        folder = self.folder / case.name
        await self.client.fetch(view, folder)
        record.outputs = [
            Output(path=str((folder / output.filename).relative_to(self.folder)), sha256=output.sha256)
            for output in view.output_files
        ]

    async def _send(self, case: Case, path: Path) -> str:
        def show(done: int, total: int) -> None:
            self.on_case(case.name, f"sending {path.name}", 100 * done / max(total, 1), False)

        return (await self.client.upload(path, on_bytes=show)).id

    def _show(self, case: Case, update: Update) -> None:
        text = update.current_step or update.status
        if update.status == "pending" and update.queue_position:
            text = f"waits, number {update.queue_position}"
        self.on_case(case.name, text, update.progress_percentage, False)

    def _fingerprint(self, case: Case) -> str:
        """Hash what is asked for: with other files or parameters a case is another one."""
        files = {
            name: [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
            for name, paths in case.files.items()
        }
        asked = [self.client.url, self.pipeline.id, self.pipeline.revision, self.parameters, files]
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()

    def _intact(self, record: Record) -> bool:
        """Whether the results are all there, byte by byte."""
        return all(_sha256(self.folder / output.path) == output.sha256 for output in record.outputs)

    def _write_table(self, cases: Sequence[Case], done: Mapping[str, Record]) -> None:
        temporary = self.folder / f".{TABLE}"
        with temporary.open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["file", "execution_id", "status", "seconds", "error", "outputs"])
            for case in cases:
                record = done[case.name]
                outputs = ";".join(output.path for output in record.outputs)
                seconds = "" if record.seconds is None else record.seconds
                rows.writerow([case.shown, record.execution_id, record.status, seconds, record.error, outputs])
        temporary.replace(self.folder / TABLE)


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return ""


def counts(records: Sequence[Record]) -> Iterator[tuple[str, int]]:
    """Yield (status, how many)."""
    for status in sorted({record.status for record in records}):
        yield status, sum(record.status == status for record in records)
