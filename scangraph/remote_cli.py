"""The commands against a server."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import json
import os
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast, get_args

import typer
from pydantic import BaseModel
from rich.markup import escape
from rich.table import Table

from scangraph.client import AsyncClient, Pipeline, ServerUnreachable, Update
from scangraph.client.batch import Batch, Record, counts, find_cases
from scangraph.client.failures import from_execution
from scangraph.client.logins import LoginFile
from scangraph.contracts.api import ExecutionView, InputFile, Priority, Status
from scangraph.contracts.errors import InvalidInputs, ScanGraphError, Unauthenticated, UsageError
from scangraph.contracts.pipelines import PipelineSpec, pipeline_name
from scangraph.terminal import Bars, complain, err, out, parse_parameters, show_table

T = TypeVar("T")

app = typer.Typer()
pipelines_app = typer.Typer(help="Pipelines of a server.", invoke_without_command=True)
files_app = typer.Typer(help="Files on a server.", invoke_without_command=True)
app.add_typer(pipelines_app, name="pipelines")
app.add_typer(files_app, name="files")

Server = Annotated[
    str | None, typer.Option(metavar="URL", help="the server; default $SCANGRAPH_SERVER, this machine's, or the last login's")
]
AsJson = Annotated[bool, typer.Option("--json", help="as JSON")]
ExecutionId = Annotated[str, typer.Argument(metavar="EXECUTION", help="its id")]
FileId = Annotated[str, typer.Argument(metavar="FILE", help="its id")]
Specification = Annotated[Path, typer.Argument(metavar="FILE", help="a specification, JSON or YAML")]
PipelineName = Annotated[str, typer.Argument(metavar="NAME", help="name or id; NAME@2 for a revision")]

#: For how long a command waits for a server that is away; what takes hours should survive a restart over there.
_PATIENCE, _LONG_PATIENCE = 20.0, 600.0
_COLOURS = {"completed": "green", "failed": "red", "cancelled": "yellow", "running": "cyan"}


# --- which server, and who asks -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Local:
    """The service that runs on this machine."""

    url: str
    token: Callable[[], str]


def local_service(data: Path | None = None) -> Local | None:
    """Find the service whose data folder is ours: its owner needs no login."""
    try:
        settings = importlib.import_module("scangraph.settings").load_settings(**({"data": data} if data else {}))
    except ModuleNotFoundError:  # a client's machine
        return None
    try:
        # `scangraph.handles` names this file too, but brings Ray.
        running = json.loads((settings.data / "run" / "service.json").read_text())
        os.kill(running["pid"], 0)  # it may have been killed, and left the file
    except PermissionError:
        pass
    except (OSError, ValueError, LookupError, TypeError):
        return None
    if not running.get("url"):
        return None

    def token() -> str:
        try:
            return str(importlib.import_module("scangraph.accounts_cli").local_token(settings))
        except OSError as error:
            raise Unauthenticated(reason=f"The service's key cannot be read ({error.strerror}); `scangraph login`") from None

    return Local(str(running["url"]), token)


def login_file() -> LoginFile:
    """Return where this person's logins are."""
    folder = os.environ.get("SCANGRAPH_CONFIG") or typer.get_app_dir("scangraph")
    return LoginFile(Path(folder) / "logins.json")


def open_client(server: str | None, patience: float = _PATIENCE, data: Path | None = None) -> AsyncClient:
    """Open a client: of the server that is named, of this machine's service, or of the last login's server.

    The token is `$SCANGRAPH_TOKEN`, the login's, or, on this machine, one that the service's owner may make.
    """
    logins = login_file()
    local = local_service(data)
    url = server or os.environ.get("SCANGRAPH_SERVER") or (local.url if local else next(iter(logins.servers()), None))
    if url is None:
        raise UsageError(
            detail="no server is known: say --server URL or set SCANGRAPH_SERVER, log in (`scangraph login --server URL`), or "
            "start one here (`scangraph serve`)"
        )
    url = url.rstrip("/")
    if given := os.environ.get("SCANGRAPH_TOKEN"):
        return AsyncClient(url, token=given, patience=patience)
    keep = logins.keep(url)
    if keep.load() is not None:
        return AsyncClient(url, keep=keep, patience=patience)
    if local is not None and url == local.url:
        return AsyncClient(url, token=local.token, patience=patience)
    raise Unauthenticated(reason=f"You are not logged in: `scangraph login --server {url}`")


def _with_client(
    work: Callable[[AsyncClient], Coroutine[Any, Any, T]],
    server: str | None,
    patience: float = _PATIENCE,
    data: Path | None = None,
) -> T:
    """Do something with a client."""

    async def go() -> T:
        async with open_client(server, patience, data) as client:
            return await work(client)

    return asyncio.run(go())


@app.command()
def login(
    server: Server = None,
    user: Annotated[str | None, typer.Option(help="account; asked for by default")] = None,
    password_stdin: Annotated[bool, typer.Option("--password-stdin", help="read the password from standard input")] = False,
) -> None:
    """Log in to a server; the login is kept for you, and renews itself."""
    local = local_service()
    url = server or os.environ.get("SCANGRAPH_SERVER") or (local.url if local else None)
    if url is None:
        raise UsageError(detail="say where: --server URL")
    name = user or str(typer.prompt("User"))
    password = sys.stdin.readline().rstrip("\n") if password_stdin else str(typer.prompt("Password", hide_input=True))

    async def go() -> str:
        async with AsyncClient(url, keep=login_file().keep(url), patience=_PATIENCE) as client:
            return (await client.login(name, password)).role

    role = asyncio.run(go())
    err.print(f"{name} is logged in at {url} as {role}.", markup=False)


@app.command()
def logout(server: Server = None) -> None:
    """End the login, on the server too: all logins of the account."""
    logins = login_file()
    url = server or os.environ.get("SCANGRAPH_SERVER") or next(iter(logins.servers()), None)
    if url is None or logins.keep(url).load() is None:
        raise UsageError(detail="there is no login" + (f" at {url}" if url else ""))

    async def go() -> None:
        async with AsyncClient(url, keep=logins.keep(url), patience=_PATIENCE) as client:
            with contextlib.suppress(Unauthenticated):  # it ended by itself
                await client.logout()

    try:
        asyncio.run(go())
    except ServerUnreachable as error:
        logins.keep(url).save(None)
        err.print(f"The login is forgotten here; over there it ends by itself. {error.detail}", markup=False)
        return
    err.print(f"Logged out at {url}.", markup=False)


# --- executions ---------------------------------------------------------------------------------------------------------------


@app.command()
def status(
    execution: Annotated[str | None, typer.Argument(metavar="[EXECUTION]", help="its id; without it all of them")] = None,
    server: Server = None,
    state: Annotated[str | None, typer.Option("--status", help="only these: pending, running, completed, …")] = None,
    pipeline: Annotated[str | None, typer.Option(help="only this pipeline's")] = None,
    limit: Annotated[int, typer.Option(min=1, help="how many")] = 20,
    as_json: AsJson = False,
) -> None:
    """List executions, or show one."""
    if execution is not None:
        view = _with_client(lambda client: client.execution(execution), server)
        _print_json(view) if as_json else _print_execution(view)
        return
    wanted = cast("Status | None", _one_of(state, Status, "--status"))

    async def look(client: AsyncClient) -> list[ExecutionView]:
        return await _first(client.executions(status=wanted, pipeline=pipeline), limit)

    views = _with_client(look, server)
    if as_json:
        _print_json(views)
        return
    table = Table("execution", "pipeline", "status", "priority", "made", "seconds", box=None, pad_edge=False)
    for view in views:
        name = f"{view.pipeline}@{view.revision}"
        table.add_row(view.execution_id, name, _coloured(view.status), view.priority, _when(view.created_at), _seconds(view))
    show_table(table)


@app.command()
def watch(execution: ExecutionId, server: Server = None) -> None:
    """Follow an execution to its end; Ctrl-C leaves it running."""

    async def follow(client: AsyncClient) -> ExecutionView:
        with Bars() as bars:
            return await client.wait(execution, on_update=lambda update: _show(bars, update))

    view = _interruptible(lambda: _with_client(follow, server, _LONG_PATIENCE), lambda: execution)
    _print_execution(view)
    if view.status != "completed":
        raise typer.Exit(1)


@app.command()
def cancel(execution: ExecutionId, server: Server = None) -> None:
    """Stop an execution: at once while it waits, within seconds while it runs."""
    accepted = _with_client(lambda client: client.cancel(execution), server)
    err.print("It is cancelled." if accepted.status == "cancelled" else "It is told to stop.")


@app.command()
def retry(execution: ExecutionId, server: Server = None) -> None:
    """Run what failed or was cancelled again; finished steps are not repeated."""
    accepted = _with_client(lambda client: client.retry(execution), server)
    out.print(accepted.execution_id)
    err.print(f"Follow it with `scangraph watch {accepted.execution_id}`.", markup=False)


def _interruptible(work: Callable[[], T], execution: Callable[[], str]) -> T:
    """Do something that Ctrl-C ends here, and not over there."""
    try:
        return work()
    except KeyboardInterrupt:
        if execution():
            err.print(f"\nIt goes on over there. Look again with `scangraph watch {execution()}`,", markup=False)
            err.print(f"stop it with `scangraph cancel {execution()}`.", markup=False)
        else:
            err.print("\nThe server had not answered yet; `scangraph status` shows whether it was started.")
        raise typer.Exit(130) from None


def _show(bars: Bars, update: Update) -> None:
    if update.status == "pending":
        place = f", number {update.queue_position} in the queue" if update.queue_position else ""
        bars.show("queue", f"waits{place}", 0, 1)
        return
    bars.remove("queue")
    for name, step in update.steps.items():
        match step.status:
            case "pending":
                continue
            case "running":
                count = f" {step.progress.done}/{step.progress.total}" if step.progress.total > 1 else ""
                text = step.progress.message or "runs"
                bars.show(name, text, step.progress.done, step.progress.total or None, count)
            case ended:
                bars.show(name, "known from before" if step.cached else ended, 1, 1)


def _print_execution(view: ExecutionView) -> None:
    """Print what a person wants to know of one execution."""
    place = f", number {view.queue_position} in the queue" if view.queue_position else ""
    head = f"[bold]{view.execution_id}[/bold]  {escape(view.pipeline)}@{view.revision}  {_coloured(view.status)}{place}"
    out.print(f"{head}  {view.progress_percentage:.0f} %  made {_when(view.created_at)}  {_seconds(view)} s")
    if view.estimated_completion:
        out.print(f"expected to end at {_when(view.estimated_completion)}")
    table = Table("step", "component", "status", "seconds", "", box=None, pad_edge=False)
    for step in view.steps:
        seconds = "" if step.seconds is None else f"{step.seconds:.1f}"
        note = "known from before" if step.cached else escape(step.progress.message) if step.status == "running" else ""
        table.add_row(escape(step.step_id), step.component, _coloured(step.status), seconds, note)
    show_table(table)
    for warning in view.warnings:
        out.print(f"[yellow]![/yellow] {escape(warning)}")
    if view.error:
        error = from_execution(view.execution_id, view.status, view.error)
        out.print(f"[red]{escape(error.title)}.[/red] {escape(error.detail)}")
    for output in view.output_files:
        out.print(f"  {output.file_id}  {escape(output.filename)}  {_size(output.size)}")


# --- run ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wish:
    """What `scangraph run` was asked for."""

    pipeline: str
    inputs: list[str]
    out_dir: Path
    parameters: list[str]
    scheme: str | None
    priority: str
    batch: bool
    in_flight: int


def run_pipeline(wish: Wish, server: str | None, data: Path | None) -> None:
    """Run a pipeline on a server, once or as a batch."""
    priority = cast("Priority", _one_of(wish.priority, Priority, "--priority"))
    parameters = _by_step(parse_parameters(wish.parameters))
    # A component's own pipeline is named after it.
    name = pipeline_name(wish.pipeline) if "/" in wish.pipeline else wish.pipeline
    if wish.batch or any(Path(given).is_dir() for given in wish.inputs):
        _run_batch(wish, name, parameters, priority, server, data)
        return
    wish.out_dir.mkdir(parents=True, exist_ok=True)  # hours later is too late to find out
    if not os.access(wish.out_dir, os.W_OK):
        raise UsageError(detail=f"{wish.out_dir} cannot be written to")
    started: list[str] = []

    async def go(client: AsyncClient) -> ExecutionView:
        spec = (await client.pipeline(name)).spec
        inputs = _match(spec, wish.inputs)
        if wish.scheme:
            inputs = await _with_scheme(client, spec, inputs, wish.scheme)
        with Bars() as bars:
            done = await client.run(
                name,
                inputs,
                wish.out_dir,
                parameters=parameters,
                priority=priority,
                on_update=lambda update: _show(bars, update),
                on_transfer=lambda file, done, total: bars.show(file, "", done, total, f"{_size(done)} of {_size(total)}"),
                on_start=lambda accepted: started.append(accepted.execution_id),
            )
        for paths in done.files.values():
            for path in paths:
                out.print(str(path), markup=False)
        return done.execution

    def work() -> ExecutionView:
        try:
            return _with_client(go, server, _LONG_PATIENCE, data)
        except ScanGraphError:
            if started:
                err.print(f"Execution {started[0]}", markup=False)
            raise

    view = _interruptible(work, lambda: "".join(started[:1]))
    for warning in view.warnings:
        err.print(f"[yellow]![/yellow] {escape(warning)}")
    err.print(f"{_seconds(view)} s, execution {view.execution_id}. Research use only.")


def _match(spec: PipelineSpec, given: list[str]) -> dict[str, Any]:
    """Give every file to an input: `INPUT=FILE` by name, the others in order."""
    matched: dict[str, list[str]] = {}
    positional = []
    for item in given:
        name, separator, file = item.partition("=")
        if separator and name in spec.inputs:
            matched.setdefault(name, []).append(file)
        else:
            positional.append(item)
    for name, wanted in spec.inputs.items():
        if name in matched or not positional:
            continue
        matched[name] = positional if wanted.many else positional[:1]
        positional = [] if wanted.many else positional[1:]
    missing = [name for name, wanted in spec.inputs.items() if name not in matched and not wanted.optional]
    several = [name for name, files in matched.items() if len(files) > 1 and not spec.inputs[name].many]
    if missing or positional or several:
        fault = f"missing: {', '.join(missing)}" if missing else f"too many: {', '.join(positional or several)}"
        raise InvalidInputs(detail=f"{spec.name} takes {', '.join(spec.inputs)}; {fault}")
    return {name: files if spec.inputs[name].many else files[0] for name, files in matched.items()}


async def _with_scheme(client: AsyncClient, spec: PipelineSpec, inputs: Mapping[str, Any], scheme: str) -> dict[str, Any]:
    """Name the masks' numbering, which takes that they are over there."""
    if scheme != "kits":
        raise UsageError(detail=f"there is no scheme {scheme!r}; there is kits")

    async def named(given: str) -> InputFile:
        here = await asyncio.to_thread(Path(given).is_file)
        return InputFile(file_id=(await client.upload(given)).id if here else given, label_scheme="kits")

    masks = {name: given for name, given in inputs.items() if spec.inputs[name].kind == "mask"}
    made = {
        name: [await named(one) for one in given] if isinstance(given, list) else await named(given)
        for name, given in masks.items()
    }
    return {**inputs, **made}


def _by_step(values: Mapping[str, Any]) -> dict[str, Any]:
    """Sort `STEP.NAME` from the flat names."""
    parameters: dict[str, Any] = {}
    for name, value in values.items():
        step, dot, inner = name.partition(".")
        if dot:
            parameters.setdefault("steps", {}).setdefault(step, {})[inner] = value
        else:
            parameters[name] = value
    return parameters


def _run_batch(
    wish: Wish, name: str, parameters: dict[str, Any], priority: Priority, server: str | None, data: Path | None
) -> None:
    """Run every file or folder by itself; exit status 1 if one of them failed."""
    if wish.scheme:
        raise UsageError(detail="a batch takes no --scheme")

    async def go(client: AsyncClient) -> list[Record]:
        pipeline: Pipeline = await client.pipeline(name)
        cases = find_cases(pipeline.spec, [Path(given) for given in wish.inputs])
        with Bars() as bars:
            ended = 0
            whole = f"{len(cases)} in all"

            def show(case: str, text: str, percent: float, over: bool) -> None:
                nonlocal ended
                ended += over
                if over:
                    if not err.is_terminal:
                        bars.show(case, text)
                    bars.remove(case)
                else:
                    bars.show(case, text if err.is_terminal else "", percent, 100)
                if err.is_terminal:
                    bars.show(whole, f"{ended} done", ended, len(cases))

            batch = Batch(client, pipeline, wish.out_dir, parameters, priority, wish.in_flight, show)
            return await batch.run(cases)

    hint = "Started again, the same command goes on from here."
    try:
        records = _with_client(go, server, _LONG_PATIENCE, data)
    except KeyboardInterrupt:
        err.print(f"\nWhat was started goes on over there. {hint}")
        raise typer.Exit(130) from None
    except ServerUnreachable as error:
        complain(error.title, f"{error.detail} {hint}")
        raise typer.Exit(1) from None
    table = Table("case", "status", "seconds", "error", box=None, pad_edge=False)
    for record in records:
        seconds = "" if record.seconds is None else f"{record.seconds:.1f}"
        table.add_row(escape(record.case), _coloured(record.status), seconds, escape(record.error))
    show_table(table)
    err.print(f"{', '.join(f'{number} {state}' for state, number in counts(records))}; see {wish.out_dir / 'results.csv'}")
    if any(record.status != "completed" for record in records):
        raise typer.Exit(1)


# --- pipelines ----------------------------------------------------------------------------------------------------------------


@pipelines_app.callback()
def pipelines(context: typer.Context, server: Server = None, as_json: AsJson = False) -> None:
    """Pipelines of a server; by itself it lists them."""
    context.obj = server
    if context.invoked_subcommand is None:
        _list_pipelines(server, as_json)


@pipelines_app.command("list")
def pipelines_list(context: typer.Context, server: Server = None, as_json: AsJson = False) -> None:
    """List them."""
    _list_pipelines(server or context.obj, as_json)


def _list_pipelines(server: str | None, as_json: bool) -> None:
    views = _with_client(lambda client: _first(client.pipelines(), None), server)
    if as_json:
        _print_json(views)
        return
    table = Table("name", "revision", "", "inputs", "outputs", "title", box=None, pad_edge=False)
    for view in sorted(views, key=lambda view: view.name):
        inputs = ", ".join(f"{name}{'…' if i.many else ''}: {i.kind}" for name, i in view.spec.inputs.items())
        outputs = ", ".join(view.spec.outputs)
        built_in = "built in" if view.built_in else ""
        table.add_row(view.name, str(view.revision), built_in, inputs, outputs, escape(view.spec.title))
    show_table(table)


@pipelines_app.command("show")
def pipelines_show(context: typer.Context, name: PipelineName, server: Server = None) -> None:
    """Print a specification, as `create` and `update` take it."""
    view = _with_client(lambda client: client.pipeline(name), server or context.obj)
    out.print_json(json.dumps(view.spec.model_dump(mode="json", exclude_defaults=True)))


@pipelines_app.command("create")
def pipelines_create(context: typer.Context, file: Specification, server: Server = None) -> None:
    """Make a pipeline."""
    spec = _read_spec(file)
    made = _with_client(lambda client: client.create_pipeline(spec), server or context.obj)
    err.print(f"{made.name} is made, as {made.id}.", markup=False)


@pipelines_app.command("update")
def pipelines_update(
    context: typer.Context,
    file: Specification,
    name: Annotated[str | None, typer.Argument(help="which; by default the one that the specification names")] = None,
    etag: Annotated[str | None, typer.Option(help="of the revision that you changed; by default the present one's")] = None,
    server: Server = None,
) -> None:
    """Make a pipeline's next revision."""
    spec = _read_spec(file)
    which = name or str(spec.get("name", ""))

    async def change(client: AsyncClient) -> Pipeline:
        return await client.update_pipeline(which, spec, etag or (await client.pipeline(which)).etag)

    made = _with_client(change, server or context.obj)
    err.print(f"{made.name} is at revision {made.revision}.", markup=False)


@pipelines_app.command("delete")
def pipelines_delete(context: typer.Context, name: PipelineName, server: Server = None) -> None:
    """Take a pipeline away; its executions stay."""

    async def remove(client: AsyncClient) -> None:
        await client.delete_pipeline(name, (await client.pipeline(name)).etag)

    _with_client(remove, server or context.obj)
    err.print(f"{name} is gone.", markup=False)


@pipelines_app.command("validate")
def pipelines_validate(context: typer.Context, file: Specification, server: Server = None) -> None:
    """Say what is wrong with a specification; nothing is made."""
    spec = _read_spec(file)
    found = _with_client(lambda client: client.validate_pipeline(spec), server or context.obj)
    for fault in found.errors:
        out.print(f"{fault['pointer']}: {fault['detail']}", markup=False)
    if not found.valid:
        raise typer.Exit(1)
    err.print("It is a pipeline.")


def _read_spec(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text()
        if file.suffix in {".yaml", ".yml"}:
            yaml = importlib.import_module("yaml")
            try:
                spec = yaml.safe_load(text)
            except yaml.YAMLError as error:
                raise ValueError(str(error)) from None
        else:
            spec = json.loads(text)
    except ModuleNotFoundError:
        raise UsageError(detail="to read YAML, `pip install pyyaml`; JSON needs nothing") from None
    except (OSError, ValueError) as error:
        raise UsageError(detail=f"{file}: {error}") from None
    if not isinstance(spec, dict):
        raise UsageError(detail=f"{file} holds no specification")
    return spec


# --- files --------------------------------------------------------------------------------------------------------------------


@files_app.callback()
def files(context: typer.Context, server: Server = None, as_json: AsJson = False) -> None:
    """Files on a server; by itself it lists yours."""
    context.obj = server
    if context.invoked_subcommand is None:
        _list_files(server, None, 50, as_json)


@files_app.command("list")
def files_list(
    context: typer.Context,
    server: Server = None,
    kind: Annotated[str | None, typer.Option(help="only these: nifti, obj, png, …")] = None,
    limit: Annotated[int, typer.Option(min=1, help="how many")] = 50,
    as_json: AsJson = False,
) -> None:
    """List them, the newest first."""
    _list_files(server or context.obj, kind, limit, as_json)


def _list_files(server: str | None, kind: str | None, limit: int, as_json: bool) -> None:
    views = _with_client(lambda client: _first(client.files(kind=kind), limit), server)
    if as_json:
        _print_json(views)
        return
    table = Table("file", "name", "kind", "size", "origin", "made", box=None, pad_edge=False)
    for view in views:
        name = escape(view.filename)
        table.add_row(view.id, name, view.kind, _size(view.size), view.origin, _when(view.created_at))
    show_table(table)


@files_app.command("upload")
def files_upload(
    context: typer.Context, paths: Annotated[list[Path], typer.Argument(metavar="PATH…")], server: Server = None
) -> None:
    """Send files; prints their ids."""

    async def send(client: AsyncClient) -> None:
        with Bars() as bars:
            for path in paths:
                show = _bar_of(bars, path.name)
                out.print((await client.upload(path, on_bytes=show)).id)

    _with_client(send, server or context.obj, _LONG_PATIENCE)


@files_app.command("download")
def files_download(
    context: typer.Context,
    file: FileId,
    path: Annotated[Path, typer.Option("--out", "-o", help="its new name, or a folder")] = Path(),
    server: Server = None,
) -> None:
    """Fetch a file, and compare its SHA-256."""

    async def fetch(client: AsyncClient) -> Path:
        with Bars() as bars:
            return await client.download(file, path, on_bytes=_bar_of(bars, file))

    out.print(str(_with_client(fetch, server or context.obj, _LONG_PATIENCE)), markup=False)


@files_app.command("delete")
def files_delete(
    context: typer.Context, ids: Annotated[list[str], typer.Argument(metavar="FILE…", help="ids")], server: Server = None
) -> None:
    """Delete files."""

    async def remove(client: AsyncClient) -> None:
        for file_id in ids:
            await client.delete_file(file_id)
            err.print(f"{file_id} is gone.", markup=False)

    _with_client(remove, server or context.obj)


@files_app.command("show")
def files_show(context: typer.Context, file: FileId, server: Server = None) -> None:
    """Print what is known of a file, as JSON."""
    _print_json(_with_client(lambda client: client.file(file), server or context.obj))


# --- small things -------------------------------------------------------------------------------------------------------------


async def _first(items: AsyncIterator[T], limit: int | None) -> list[T]:
    found: list[T] = []
    async for item in items:
        found.append(item)
        if limit is not None and len(found) >= limit:
            break
    return found


def _one_of(text: str | None, names: Any, option: str) -> str | None:
    if text is not None and text not in get_args(names):
        raise UsageError(detail=f"{option} takes {', '.join(get_args(names))}, not {text!r}")
    return text


def _bar_of(bars: Bars, name: str) -> Callable[[int, int], None]:
    return lambda done, total: bars.show(name, "", done, total, f"{_size(done)} of {_size(total)}")


def _print_json(what: BaseModel | list[Any]) -> None:
    values = [one.model_dump(mode="json") for one in what] if isinstance(what, list) else what.model_dump(mode="json")
    out.print_json(json.dumps(values))


def _coloured(state: str) -> str:
    return f"[{_COLOURS[state]}]{state}[/]" if state in _COLOURS else state


def _when(moment: datetime) -> str:
    return f"{moment.astimezone():%Y-%m-%d %H:%M:%S}"


def _seconds(view: ExecutionView) -> str:
    """Time at work; so far, for one that runs."""
    if view.started_at is None:
        return "–"
    end = view.completed_at or datetime.now(view.started_at.tzinfo)
    return f"{(end - view.started_at).total_seconds():.1f}"


def _size(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"
