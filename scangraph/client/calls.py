"""What a server can be asked, as coroutines. `blocking.Client` is made of these."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal, Self, TypeVar

import pydantic
from pydantic import BaseModel, TypeAdapter

from scangraph.client import live, transfer
from scangraph.client.access import Keep
from scangraph.client.failures import from_execution
from scangraph.client.live import Update
from scangraph.client.session import LONG, Session, Wish, segment
from scangraph.client.transfer import Content, OnBytes, nothing, plain_name
from scangraph.contracts import Label
from scangraph.contracts.api import (
    TERMINAL,
    ExecutionAccepted,
    ExecutionPage,
    ExecutionView,
    FileMetadata,
    FilePage,
    FileView,
    Identity,
    InputFile,
    NewExecution,
    OutputFile,
    PipelinePage,
    PipelineView,
    Priority,
    Status,
    Tokens,
    Validation,
)
from scangraph.contracts.errors import AlreadyEnded, InvalidInputs, InvalidPipeline, NoSuch, PreconditionFailed, UsageError
from scangraph.contracts.pipelines import PipelineSpec

T = TypeVar("T")
P = TypeVar("P", ExecutionPage, PipelinePage, FilePage)

#: What may be given for an input: a path of this machine, an id or a view of a file over there, or a list of them.
Given = str | Path | FileView | InputFile
Inputs = Mapping[str, Given | Sequence[Given]]
OnUpdate = Callable[[Update], None]
#: Called with a file's name, the bytes that are done, and all of them.
OnTransfer = Callable[[str, int, int], None]

_PAGE = 100


class Pipeline(PipelineView):
    """A pipeline's revision, and the ETag that changing it takes."""

    etag: str = ""


class _Components(BaseModel):
    items: list[dict[str, Any]]


class _Labels(BaseModel):
    items: list[Label]


_ANYTHING: TypeAdapter[dict[str, Any]] = TypeAdapter(dict[str, Any])


@dataclass(frozen=True)
class Finished:
    """What `run` gives.

    Parameters
    ----------
    execution : ExecutionView
        As it ended.
    files : dict
        Name of the output -> its files on this machine.
    """

    execution: ExecutionView
    files: dict[str, list[Path]]


class AsyncClient:
    """A client of one server. `Client` has the same methods for code without coroutines.

    Parameters
    ----------
    url : str
        Address of the server, `http://127.0.0.1:8000`.
    token : str or callable, optional
        A bearer, or a function that makes one and is called again before it expires; without it call `login`.
    patience : float
        Seconds for which a server that is away, or busy, is waited for. What may be sent again without harm is sent again,
        with growing pauses, and `Retry-After` is obeyed.
    tls : ssl.SSLContext, optional
        How the server's certificate is checked.
    keep : Keep, optional
        Where the login is kept for other processes.

    Notes
    -----
    Every method raises the classes of `scangraph.contracts.errors` that the server raised, `ServerError` for one that is not
    among them, and `ServerUnreachable` when nobody answered in time.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | Callable[[], str] | None = None,
        patience: float = 60,
        tls: ssl.SSLContext | None = None,
        keep: Keep | None = None,
    ) -> None:
        self._session = Session(url, token, keep, patience, tls)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    @property
    def url(self) -> str:
        """Address of the server."""
        return self._session.url

    async def close(self) -> None:
        """Close the connections. The login stays good; `logout` ends it."""
        await self._session.access.settle()
        await self._session.close()

    # --- accounts ----------------------------------------------------------------------------------------------------------

    async def login(self, username: str, password: str) -> Tokens:
        """Log in; from here on tokens are renewed by themselves. A service account's password is its secret."""
        return await self._session.access.log_in(username, password)

    async def logout(self) -> None:
        """End this login, and every other one of the account."""
        try:
            await self._session.request(Wish("POST", "/v1/auth/logout"), "always")
        finally:
            await self._session.access.forget()

    async def me(self) -> Identity:
        """Tell who is logged in."""
        return await self._session.ask(Identity, Wish("GET", "/v1/auth/me"))

    # --- pipelines and components ------------------------------------------------------------------------------------------

    async def pipelines(self) -> AsyncGenerator[PipelineView]:
        """Yield every pipeline, the newest first."""
        async for page in self._pages(PipelinePage, "/v1/pipelines", {}):
            for item in page.items:
                yield item

    async def pipeline(self, name: str) -> Pipeline:
        """Return a pipeline by its name or id, or one revision of it by `name@2`."""
        return self._pipeline(await self._session.request(Wish("GET", f"/v1/pipelines/{segment(name, '@')}")))

    async def create_pipeline(self, spec: PipelineSpec | Mapping[str, Any]) -> Pipeline:
        """Make a pipeline."""
        return self._pipeline(await self._session.request(Wish("POST", "/v1/pipelines", json=_plain(spec))))

    async def update_pipeline(self, name: str, spec: PipelineSpec | Mapping[str, Any], etag: str) -> Pipeline:
        """Make a pipeline's next revision.

        Parameters
        ----------
        etag : str
            Of the revision that is changed: `Pipeline.etag`. If somebody else was faster, `PreconditionFailed` is raised.
        """
        wish = Wish("PUT", f"/v1/pipelines/{segment(name, '@')}", json=_plain(spec), headers={"If-Match": etag})
        try:
            return self._pipeline(await self._session.request(wish, "always"))
        except PreconditionFailed as failure:
            if failure.fields.get("repeated"):  # perhaps it was we who were faster
                current = await self.pipeline(name)
                if current.spec == PipelineSpec.model_validate(_plain(spec)):
                    return current
            raise

    async def delete_pipeline(self, name: str, etag: str) -> None:
        """Take a pipeline away; its executions stay, and those that run go on."""
        wish = Wish("DELETE", f"/v1/pipelines/{segment(name, '@')}", headers={"If-Match": etag})
        await self._delete(wish)

    async def validate_pipeline(self, spec: PipelineSpec | Mapping[str, Any]) -> Validation:
        """Ask whether this would be a pipeline, and if not, why; nothing is made."""
        return await self._session.ask(Validation, Wish("POST", "/v1/pipelines:validate", json=_plain(spec)), "always")

    async def components(self) -> list[dict[str, Any]]:
        """Return what can be run: ports, parameters as JSON Schema, limits, models, readiness."""
        return (await self._session.ask(_Components, Wish("GET", "/v1/components"))).items

    async def component(self, component_id: str) -> dict[str, Any]:
        """Return one of them."""
        response = await self._session.request(Wish("GET", f"/v1/components/{segment(component_id, '/')}"))
        return _ANYTHING.validate_json(response.content)

    async def labels(self) -> list[Label]:
        """Return the label table."""
        return (await self._session.ask(_Labels, Wish("GET", "/v1/labels"))).items

    def _pipeline(self, response: Any) -> Pipeline:
        found = self._session.read(Pipeline, response)
        return found.model_copy(update={"etag": response.headers.get("etag", "")})

    # --- files -------------------------------------------------------------------------------------------------------------

    async def upload(
        self, file: str | Path | BinaryIO, filename: str | None = None, *, on_bytes: OnBytes = nothing
    ) -> FileMetadata:
        """Send a file.

        From 32 MiB on resumably: a connection that breaks costs at most the part that was on its way.

        Parameters
        ----------
        file : path or binary file
            An open file must be seekable; it is sent from its present position on.
        filename : str, optional
            Its name over there; a path's own by default.
        on_bytes : callable
            Called with the bytes that are over there and all of them.

        Raises
        ------
        DigestMismatch
            If what arrived is not what was sent.
        """
        if isinstance(file, str | Path):
            with _open(Path(file)) as opened:
                return await transfer.upload(self._session, opened, filename or Path(file).name, on_bytes)
        return await transfer.upload(self._session, file, filename or plain_name(str(getattr(file, "name", ""))), on_bytes)

    async def files(
        self, *, kind: str | None = None, origin: Literal["upload", "result"] | None = None
    ) -> AsyncGenerator[FileView]:
        """Yield your files, the newest first; an admin's are everybody's."""
        async for page in self._pages(FilePage, "/v1/files", {"kind": kind, "origin": origin}):
            for item in page.items:
                yield item

    async def file(self, file_id: str) -> FileMetadata:
        """Return what is known of a file."""
        return await self._session.ask(FileMetadata, Wish("GET", f"/v1/files/{segment(file_id)}/metadata"))

    async def download(self, file_id: str, path: str | Path = ".", *, on_bytes: OnBytes = nothing) -> Path:
        """Fetch a file, compare its SHA-256, and put it into its place in one go.

        Parameters
        ----------
        path : path
            Its new name, or a folder, where it gets its own; what stands there is replaced.

        Returns
        -------
        Path
            Where it is.
        """
        found = await self.file(file_id)
        target = _target(Path(path), found.filename)
        await transfer.download(self._session, Content(found.id, found.size, found.sha256), target, on_bytes)
        return target

    async def download_output(self, output: OutputFile, folder: str | Path, *, on_bytes: OnBytes = nothing) -> Path:
        """Fetch an execution's result into a folder, under its own name."""
        target = Path(folder) / plain_name(output.filename)
        await transfer.download(self._session, Content(output.file_id, output.size, output.sha256), target, on_bytes)
        return target

    async def display(self, file_id: str, *, most: int = 300) -> bytes:
        """Return a copy of a file for screens.

        Of an image or a mask a `.nii.gz` of at most `most` voxels a side; of a scene JSON, which lists its structures and where
        their surfaces are.
        """
        wish = Wish("GET", f"/v1/files/{segment(file_id)}/display", params={"max": most}, seconds=LONG)
        return (await self._session.request(wish)).content

    async def thumbnail(self, file_id: str) -> bytes:
        """Return a small PNG of an image, mask or 2-D image."""
        return (await self._session.request(Wish("GET", f"/v1/files/{segment(file_id)}/thumbnail", seconds=LONG))).content

    async def delete_file(self, file_id: str) -> None:
        """Delete a file."""
        await self._delete(Wish("DELETE", f"/v1/files/{segment(file_id)}"))

    # --- executions --------------------------------------------------------------------------------------------------------

    async def start(
        self,
        pipeline: str,
        inputs: Inputs,
        *,
        parameters: Mapping[str, Any] | None = None,
        priority: Priority = "normal",
        idempotency_key: str | None = None,
        on_transfer: OnTransfer | None = None,
    ) -> ExecutionAccepted:
        """Send the inputs that are here, and start a pipeline.

        Parameters
        ----------
        pipeline : str
            Name or id; `name@3` for a revision.
        inputs : mapping
            By the pipeline's input names: a path of this machine (as str or Path), a file's id or view, an `InputFile`, or a
            list of them. A path in the server's storage is `InputFile(path=…)`.
        parameters : mapping
            `{"steps": {id: {name: value}}}`, or flat names where only one step has the name.
        idempotency_key : str, optional
            Made by default, so that a lost answer never means a second execution. Give one to be as safe across processes;
            then give file ids as inputs, for the same file sent again is another file.
        on_transfer : callable
            Called with a file's name, the bytes that are over there, and all of them.
        """
        values = await self._send_inputs(inputs, on_transfer)
        try:
            wish = NewExecution(
                pipeline_id=pipeline, inputs=values, parameters=dict(parameters or {}), priority=priority
            ).model_dump(mode="json", exclude_none=True)
        except pydantic.ValidationError as error:
            raise InvalidInputs(detail="; ".join(fault["msg"] for fault in error.errors())) from None
        headers = {"Idempotency-Key": idempotency_key or str(uuid.uuid4())}
        return await self._session.ask(ExecutionAccepted, Wish("POST", "/v1/executions", json=wish, headers=headers))

    async def execution(self, execution_id: str) -> ExecutionView:
        """Return an execution as it is now."""
        return await self._session.ask(ExecutionView, Wish("GET", f"/v1/executions/{segment(execution_id)}"))

    async def executions(
        self,
        *,
        status: Status | None = None,
        pipeline: str | None = None,
        priority: Priority | None = None,
        created_after: datetime | None = None,
        created_before: datetime | None = None,
        owner: str | None = None,
    ) -> AsyncGenerator[ExecutionView]:
        """Yield your executions, the newest first, without their steps; an admin's are everybody's."""
        query = {
            "status": status,
            "pipeline": pipeline,
            "priority": priority,
            "created_after": created_after and created_after.isoformat(),
            "created_before": created_before and created_before.isoformat(),
            "owner": owner,
        }
        async for page in self._pages(ExecutionPage, "/v1/executions", query):
            for item in page.items:
                yield item

    async def cancel(self, execution_id: str) -> ExecutionAccepted:
        """Stop an execution: at once while it waits, within seconds while it runs. A cancelled one is no error."""
        wish = Wish("POST", f"/v1/executions/{segment(execution_id)}/cancel")
        try:
            return await self._session.ask(ExecutionAccepted, wish, "always")
        except AlreadyEnded:
            view = await self.execution(execution_id)
            if view.status != "cancelled":
                raise
            return ExecutionAccepted(execution_id=execution_id, status="cancelled")

    async def retry(self, execution_id: str, *, idempotency_key: str | None = None) -> ExecutionAccepted:
        """Run what failed or was cancelled again, as a new execution; finished steps are not repeated."""
        headers = {"Idempotency-Key": idempotency_key or str(uuid.uuid4())}
        wish = Wish("POST", f"/v1/executions/{segment(execution_id)}/retry", headers=headers)
        return await self._session.ask(ExecutionAccepted, wish)

    async def provenance(self, execution_id: str) -> dict[str, Any]:
        """Tell where every output came from: inputs, versions, models, parameters, hashes."""
        wish = Wish("GET", f"/v1/executions/{segment(execution_id)}/provenance")
        return _ANYTHING.validate_json((await self._session.request(wish)).content)

    async def watch(self, execution_id: str, seq: int | None = None) -> AsyncGenerator[Update]:
        """Yield what happens to an execution until it has ended: its state now first, or everything after `seq`.

        A connection that breaks is made again and nothing is missed; where no WebSocket can be had, the server is asked every
        few seconds.
        """
        async with contextlib.aclosing(live.watch(self._session, execution_id, seq)) as updates:
            async for update in updates:
                yield update

    async def wait(
        self,
        execution_id: str,
        timeout: float | None = None,  # noqa: ASYNC109 - the blocking client has no other way to say it
        *,
        on_update: OnUpdate | None = None,
    ) -> ExecutionView:
        """Wait for an execution's end, however it ends; raises `TimeoutError` when it takes longer."""
        async with asyncio.timeout(timeout):
            async with contextlib.aclosing(self.watch(execution_id)) as updates:
                async for update in updates:
                    if on_update:
                        on_update(update)
            return await self.execution(execution_id)

    async def run(
        self,
        pipeline: str,
        inputs: Inputs,
        out_dir: str | Path,
        *,
        parameters: Mapping[str, Any] | None = None,
        priority: Priority = "normal",
        idempotency_key: str | None = None,
        on_update: OnUpdate | None = None,
        on_transfer: OnTransfer | None = None,
        on_start: Callable[[ExecutionAccepted], None] | None = None,
    ) -> Finished:
        """Send the inputs, run a pipeline, and fetch everything that it made into a folder.

        Raises
        ------
        ScanGraphError
            What the execution failed with; `AlreadyEnded` where somebody cancelled it.
        """
        started = await self.start(
            pipeline,
            inputs,
            parameters=parameters,
            priority=priority,
            idempotency_key=idempotency_key,
            on_transfer=on_transfer,
        )
        if on_start:
            on_start(started)
        view = await self.wait(started.execution_id, on_update=on_update)
        return Finished(view, await self.fetch(view, out_dir, on_transfer=on_transfer))

    async def fetch(
        self, execution: ExecutionView | str, out_dir: str | Path, *, on_transfer: OnTransfer | None = None
    ) -> dict[str, list[Path]]:
        """Fetch everything that a completed execution made into a folder; raises what another one ended with.

        Returns
        -------
        dict
            Name of the output -> its files.
        """
        view = await self.execution(execution) if isinstance(execution, str) else execution
        if view.status not in TERMINAL:
            raise UsageError(detail=f"execution {view.execution_id} is {view.status}: wait for its end")
        if view.status != "completed":
            raise from_execution(view.execution_id, view.status, view.error)
        folder = _folder(Path(out_dir))
        files: dict[str, list[Path]] = {}
        for output in view.output_files:
            path = await self.download_output(output, folder, on_bytes=_named(on_transfer, output.filename))
            files.setdefault(output.name, []).append(path)
        return files

    async def zip(self, execution_id: str, path: str | Path, outputs: Sequence[str] | None = None) -> Path:
        """Fetch an execution's results as one .zip, with a list that says units and frames.

        Parameters
        ----------
        path : path
            Its name, or a folder; what stands there is replaced.
        outputs : sequence of str, optional
            Only these.
        """
        target = _target(Path(path), f"{plain_name(execution_id)}.zip")
        params = {"outputs": ",".join(outputs)} if outputs is not None else {}
        wish = Wish("GET", f"/v1/executions/{segment(execution_id)}/files.zip", params=params, seconds=LONG)
        await transfer.fetch_whole(self._session, wish, target)
        return target

    async def delete_execution(self, execution_id: str) -> None:
        """Delete an execution that has ended, with its results."""
        await self._delete(Wish("DELETE", f"/v1/executions/{segment(execution_id)}"))

    async def _send_inputs(self, inputs: Inputs, on_transfer: OnTransfer | None) -> dict[str, Any]:
        """Replace what is on this machine by the ids of what was sent; the same path is sent once."""
        sent: dict[Path, str] = {}

        async def there(given: Given) -> str | InputFile:
            if isinstance(given, InputFile):
                return given
            if isinstance(given, FileView):
                return given.id
            if isinstance(given, str) and _is_id(given):
                return given
            path = _here(given)
            if path not in sent:
                sent[path] = (await self.upload(path, on_bytes=_named(on_transfer, path.name))).id
            return sent[path]

        values: dict[str, Any] = {}
        for name, given in inputs.items():
            single = isinstance(given, str | Path | FileView | InputFile)
            values[name] = await there(given) if single else [await there(one) for one in given]  # type: ignore[arg-type,union-attr]
        return values

    # --- helpers -----------------------------------------------------------------------------------------------------------

    async def _pages(self, model: type[P], path: str, query: Mapping[str, Any]) -> AsyncGenerator[P]:
        cursor: str | None = None
        while True:
            params = {**query, "limit": _PAGE, "cursor": cursor}
            page = await self._session.ask(model, Wish("GET", path, params=params))
            yield page
            cursor = page.next_cursor
            if cursor is None:
                return

    async def _delete(self, wish: Wish) -> None:
        try:
            await self._session.request(wish, "always")
        except NoSuch as failure:
            if not failure.fields.get("repeated"):  # else the first attempt did it, and only its answer was lost
                raise


def _plain(spec: PipelineSpec | Mapping[str, Any]) -> dict[str, Any]:
    """Return a specification as JSON; one that is none is refused here, in the words of the server."""
    try:
        made = spec if isinstance(spec, PipelineSpec) else PipelineSpec.model_validate(spec)
    except pydantic.ValidationError as error:
        faults = [{"pointer": "/" + "/".join(map(str, e["loc"])), "detail": e["msg"]} for e in error.errors()]
        raise InvalidPipeline(detail="; ".join(f"{f['pointer']}: {f['detail']}" for f in faults), errors=faults) from None
    return made.model_dump(mode="json", exclude_defaults=True)


def _target(path: Path, filename: str) -> Path:
    return path / plain_name(filename) if path.is_dir() else path


def _folder(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path


def _here(given: str | Path) -> Path:
    path = Path(given).expanduser()
    if path.is_file():
        return path
    hint = "for a path in the server's storage give InputFile(path=…)"
    raise UsageError(detail=f"{str(given)!r} is no file of this machine and no file id; {hint}")


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise UsageError(detail=f"{path} cannot be read: {error.strerror}") from None


def _named(on_transfer: OnTransfer | None, name: str) -> OnBytes:
    if on_transfer is None:
        return nothing
    return lambda done, total: on_transfer(name, done, total)


def _is_id(text: str) -> bool:
    try:
        return str(uuid.UUID(text)) == text.lower()
    except ValueError:
        return False
