"""The commands that work on this machine: the service itself, and components by handle. They need what a server needs."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from scangraph import accounts_cli, audit_cli
from scangraph.contracts import Component, Progress, StepSummary, Volume, label_of
from scangraph.contracts.errors import InvalidParameters, NotRunning, UnknownComponent, UsageError
from scangraph.detector_import import import_detector, looker
from scangraph.model_import import Wish, converter, import_model
from scangraph.models import (
    MANIFEST,
    Detector,
    Model,
    ModelManifest,
    differences,
    find_model,
    install_model,
    installed_detectors,
    installed_models,
    invalid_models,
    remove_model,
)
from scangraph.settings import Settings, describe_settings, load_settings
from scangraph.supervising import Supervisor, end_with_parent
from scangraph.terminal import Bars, err, out, parse_parameters

app = typer.Typer()
models_app = typer.Typer(help="List, check and install models.", no_args_is_help=False, invoke_without_command=True)
app.add_typer(models_app, name="models")
storage_app = typer.Typer(help="What an S3 bucket needs.", no_args_is_help=True)
app.add_typer(storage_app, name="storage")
app.add_typer(accounts_cli.app, name="accounts")
app.command()(accounts_cli.token)
app.add_typer(audit_cli.app, name="audit")

OutDir = Annotated[Path, typer.Option("--out", "-o", help="folder for the results")]
Data = Annotated[Path | None, typer.Option(help="data folder, instead of $SCANGRAPH_DATA")]


def _settings(data: Path | None = None, **changes: Any) -> Settings:
    given = {key: value for key, value in {"data": data, **changes}.items() if value is not None}
    return load_settings(**given)


# --- serving ---------------------------------------------------------------------------------------------------------------


@app.command()
def serve(
    port: Annotated[int | None, typer.Option(help="port of the gateway; 0 takes a free one")] = None,
    data: Data = None,
    alone: Annotated[bool, typer.Option("--alone", help="nobody looks after it: when it dies, it is dead")] = False,
) -> None:
    """Start the service and keep it up until Ctrl-C: what dies is started again, and executions go on."""
    settings = _settings(data, port=port)
    if not alone:
        again = [sys.executable, "-m", "scangraph.cli", "serve", "--alone", "--data", str(settings.data)]
        supervisor = Supervisor(
            again, settings.data, settings.stop_seconds, out.print, variables={"SCANGRAPH_PORT": str(settings.port)}
        )
        raise typer.Exit(supervisor.run())
    end_with_parent()
    from scangraph.cluster import local_service, port_is_free
    from scangraph.doctor import storage_fault

    if settings.port and not port_is_free(settings.host, settings.port):
        err.print(f"[red]Port {settings.port} of {settings.host} is taken.[/red] Choose another: `make serve PORT=8123`.")
        raise typer.Exit(1)
    if settings.storage_url and (fault := storage_fault(settings)):
        err.print(f"[red]The storage cannot be used:[/red] {escape(fault)}. Starting all the same; /readyz says when it can.")
    if settings.grpc.enabled and settings.grpc.port and not port_is_free(settings.host, settings.grpc.port):
        err.print(f"[red]Port {settings.grpc.port} of {settings.host} is taken.[/red] Choose another: SCANGRAPH_GRPC__PORT.")
        raise typer.Exit(1)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    out.print("Starting …")
    with _explained_start(), local_service(settings) as service:
        out.print(
            f"scangraph is up at [bold]{service.url}[/bold] after {service.seconds_to_start:.0f} s. Research use only.\n"
            f"  data folder   {settings.data}\n"
            f"  storage       {settings.storage_url or settings.storage_root}   (paths in requests are relative to it)\n"
            f"  documentation {service.url}/docs\n"
            f"  gRPC          {service.grpc or 'off'}\n"
            f"  account       admin, password in {settings.data / accounts_cli.ADMIN_FILE}; `scangraph token` needs none\n"
            "Try, in another terminal:\n"
            f'  curl {service.url}/v1/executions -H "Authorization: Bearer $(scangraph token)" '
            "-H 'Prefer: wait=60' -F pipeline_id=organs -F image=@ct.nii.gz\n"
            "Ctrl-C stops it."
        )
        stop.wait()
        out.print("Stopping …")
    out.print("Stopped.")


@contextlib.contextmanager
def _explained_start() -> Iterator[None]:
    """Turn a failed deployment into a plain error: Serve's own message names the deployment and its last line the cause."""
    try:
        yield
    except RuntimeError as error:
        err.print(f"[red]The graph did not start.[/red] {escape(str(error))}\nRun `scangraph doctor`.")
        raise typer.Exit(1) from None


@contextlib.contextmanager
def _graph(settings: Settings) -> Iterator[Any]:
    """Connect to the running service, or run a graph of our own until the block ends."""
    from scangraph.handles import connect

    try:
        connection = connect(settings.data)
    except NotRunning:
        from scangraph.cluster import local_service

        err.print("No service is running here; starting the graph for this run …")
        with _explained_start(), local_service(settings, http=False), connect(settings.data) as own:
            yield own
        return
    with connection:
        yield connection


def _shown(bars: Bars) -> Callable[[str, Progress], None]:
    """Return what shows a step's progress."""

    def show(step: str, progress: Progress) -> None:
        count = f" {progress.done}/{progress.total}" if progress.total > 1 else ""
        bars.show(step, progress.message, progress.done, progress.total or None, count)

    return show


@app.command()
def demo(
    ct: Annotated[Path | None, typer.Option(help="a CT (.nii.gz); without it the synthetic patient")] = None,
    out_dir: OutDir = Path("demo-output"),
    data: Data = None,
) -> None:
    """Run the main job: CT to organs, vessels, ureters and tumor, to one mask, to a smoothed scene."""
    from scangraph import demo as job

    settings = _settings(data)
    if ct is not None and not ct.is_file():
        raise UsageError(detail=f"{ct} is not a file")
    with _graph(settings) as graph:
        if ct is None:
            err.print("Making the synthetic patient …")
            patient = job.synthetic_patient()
        else:
            patient = job.one_phase_patient(ct.name, graph.read(ct))
        with Bars() as bars:
            report = job.run_demo(graph, patient, out_dir, _shown(bars))
    _print_report(report, out_dir)


def _print_report(report: dict[str, Any], folder: Path) -> None:
    """Print what a person wants to know first."""
    steps = Table("step", "seconds", "peak MB", box=None, pad_edge=False)
    for name, step in report["steps"].items():
        steps.add_row(name, f"{step['seconds']:.1f}", f"{step['peak_mb']:.0f}")
    table = Table("structure", "mL", "true mL", "Dice", box=None, pad_edge=False)
    for row in report["structures"]:
        truth = f"{row['true_volume_ml']:.1f}" if "true_volume_ml" in row else "–"
        table.add_row(row["name"], f"{row['volume_ml']:.1f}", truth, f"{row['dice']:.3f}" if "dice" in row else "–")
    out.print(steps, "", table, "")
    for warning in dict.fromkeys(w for step in report["steps"].values() for w in step["warnings"]):
        out.print(f"[yellow]![/yellow] {escape(warning)}")
    out.print(f"\n{report['seconds']:.0f} s in all. Research use only. Look at [bold]{folder}/preview.png[/bold]; ", end="")
    out.print(f"masks, scene.obj and report.json are beside it in {folder}/.")


# --- components ------------------------------------------------------------------------------------------------------------


def run_component(
    component: str, inputs: list[str], out_dir: Path, parameter: list[str], scheme: str | None, data: Path | None
) -> None:
    """Run one component on local files and write its outputs."""
    settings, parameters = _settings(data), parse_parameters(parameter)
    with _graph(settings) as graph:
        if component not in graph.components:
            raise UnknownComponent(component=component, known=", ".join(graph.components))
        declared: Component = graph.components[component]
        files = _match_inputs(declared, inputs)
        values: dict[str, Any] = {}
        for port in declared.inputs:
            if port.name not in files:
                continue
            readers = {"image": graph.read, "mask": lambda p: graph.read_mask(p, scheme), "image2d": graph.read_picture}
            if port.kind not in readers:
                raise InvalidParameters(
                    component=component, detail=f"input {port.name!r} is a {port.kind}, which cannot be read from a file"
                )
            loaded = [readers[port.kind](path) for path in files[port.name]]
            values[port.name] = loaded if port.many else loaded[0]
        with Bars() as bars:
            show = _shown(bars)
            call = graph.run(component, values, on_progress=lambda p: show(component, p), **parameters)
            summary: StepSummary = call.step().summary
        out_dir.mkdir(parents=True, exist_ok=True)
        for path in _write_outputs(graph, declared, call, out_dir):
            out.print(str(path))
        value = call.result()
    for warning in summary.warnings:
        err.print(f"[yellow]![/yellow] {escape(warning)}")
    if hasattr(value, "volumes_ml"):
        for number, ml in value.volumes_ml().items():
            err.print(f"  {value.label(number).title}: {ml:.1f} mL")
    err.print(f"{summary.seconds:.1f} s, {summary.peak_mb:.0f} MB. Research use only.")


def _match_inputs(component: Component, given: list[str]) -> dict[str, list[Path]]:
    """Give every file to a port: `PORT=FILE` by name, the others in order."""
    names = [port.name for port in component.inputs]
    matched: dict[str, list[Path]] = {}
    positional = []
    for item in given:
        name, separator, file = item.partition("=")
        if separator and name in names:
            matched.setdefault(name, []).append(Path(file))
        else:
            positional.append(Path(item))
    for port in component.inputs:
        if port.name in matched or not positional:
            continue
        matched[port.name] = positional if port.many else [positional[0]]
        positional = [] if port.many else positional[1:]
    missing = [port.name for port in component.inputs if port.name not in matched and not port.optional]
    if missing or positional:
        text = f"takes {', '.join(names)}; " + (f"missing: {', '.join(missing)}" if missing else f"too many: {positional[0]}")
        raise InvalidParameters(component=component.id, detail=text)
    for path in (path for paths in matched.values() for path in paths):
        if not path.is_file():
            raise InvalidParameters(component=component.id, detail=f"{path} is not a file")
    return matched


def _write_outputs(graph: Any, component: Component, call: Any, folder: Path) -> Iterator[Path]:
    """Write what a call gave, named after the component, and after the port where there are several; replaces what is there."""
    from scangraph.scenefiles import save_scene

    stem = component.id.rpartition("/")[2]
    for place, port in enumerate(component.outputs):
        one = call if place == 0 else call.output(port.name)
        name = stem if place == 0 else f"{stem}-{port.name}"
        if port.kind == "scene":
            yield from save_scene(one.result(), folder, name)
            continue
        if port.kind in {"image", "mask"}:
            path, content = folder / f"{name}.nii.gz", graph.encode(one)
        elif port.kind == "image2d":
            path, content = folder / f"{name}.{one.result().file.format}", graph.encode(one)
        else:
            path, content = folder / f"{name}.json", one.result()
        path.write_bytes(content)
        yield path


@app.command()
def components(
    as_json: Annotated[bool, typer.Option("--json", help="whole declarations as JSON")] = False, data: Data = None
) -> None:
    """List what can be run, with ports, parameters and limits."""
    from graph import catalog

    known = catalog(_settings(data)).values()
    if as_json:
        out.print_json(json.dumps([component.describe() for component in known]))
        return
    for component in known:
        ports = ", ".join(f"{p.name}{'…' if p.many else ''}: {p.kind}" for p in component.inputs)
        gives = ", ".join(f"{p.name}: {p.kind}" for p in component.outputs)
        out.print(f"[bold]{component.id}[/bold] {component.version}   {ports} → {gives}\n  {component.description}")
        for name, info in component.parameters.model_fields.items():
            out.print(f"  --set {name}=…   {info.description} (default {info.default!r})", markup=False)
        for limit in component.constraints:
            out.print(f"  · {limit}", markup=False)


# --- models ----------------------------------------------------------------------------------------------------------------


@models_app.callback()
def models(context: typer.Context, data: Data = None) -> None:
    """List the installed models; the first of each task is used."""
    if not context.invoked_subcommand:
        models_list(data)


@models_app.command("list")
def models_list(data: Data = None) -> None:
    """List the installed models; the first of each task is used."""
    settings = _settings(data)
    table = Table("task", "model", "version", "works at", "labels", "", box=None, pad_edge=False)
    for model in sorted(installed_models(settings.model_folders), key=lambda m: (m.manifest.task, m.manifest.demo)):
        manifest = model.manifest
        spacing = "×".join(f"{s:g}" for s in manifest.spacing_mm) + " mm"
        note = "demonstration only" if manifest.demo else ""
        table.add_row(manifest.task, manifest.id, manifest.version, spacing, str(len(manifest.labels)), note)
    for detector in installed_detectors(settings.model_folders):
        found = detector.manifest
        size = "×".join(map(str, found.input_size))
        note = "demonstration only" if found.demo else ""
        table.add_row(found.task, found.id, found.version, f"{size} px", str(len(found.classes)), note)
    out.print(table)
    for error in invalid_models(settings.model_folders):
        err.print(f"[red]![/red] {escape(error.detail)}")


@models_app.command("show")
def models_show(model_id: Annotated[str, typer.Argument(metavar="ID")], data: Data = None) -> None:
    """Say what a model is, what it takes and what it finds."""
    model = find_model(_settings(data).model_folders, model_id)
    if isinstance(model, Detector):
        _show_detector(model)
        return
    manifest = model.manifest
    size = sum(path.stat().st_size for path in model.folder.rglob("*") if path.is_file())
    folds = ", ".join(f"{network.folder} (folds {', '.join(network.folds)})" for network in manifest.networks)
    rows = {
        "model": f"{manifest.id} {manifest.version}: {manifest.title}",
        "component": manifest.task,
        "inputs": ", ".join(f"{entry.name}: {entry.modality}, phase {entry.phase}" for entry in manifest.inputs),
        "spacing": f"{' × '.join(f'{s:g}' for s in manifest.spacing_mm)} mm (z × y × x)",
        "networks": folds + (", averaged over mirrored copies" if manifest.mirroring else ""),
        "licence": manifest.license,
        "trained on": manifest.training_data,
        "folder": f"{model.folder}, {size / 2**20:.1f} MB in {len(manifest.files)} files",
        "sha256": model.digest,
    }
    for name, value in rows.items():
        out.print(f"{name:10} {value}", markup=False, highlight=False)
    table = Table("number", "finds", box=None, pad_edge=False)
    for number in manifest.labels:
        table.add_row(str(number), label_of(number, manifest.names).title)
    out.print(table)
    for warning in model.warnings:
        err.print(f"[yellow]![/yellow] {escape(warning)}")


def _show_detector(model: Detector) -> None:
    manifest = model.manifest
    rows = {
        "model": f"{manifest.id} {manifest.version}: {manifest.title}",
        "component": manifest.task,
        "works at": "×".join(map(str, manifest.input_size)) + " pixels (height × width)",
        "finds": ", ".join(manifest.classes),
        "measured": ", ".join(f"{name} {value}" for name, value in manifest.metrics.items()) or "nothing",
        "licence": manifest.license,
        "trained on": manifest.training_data,
        "folder": f"{model.folder}, {len(manifest.files)} files",
        "sha256": model.digest,
    }
    for name, value in rows.items():
        out.print(f"{name:10} {value}", markup=False, highlight=False)
    for warning in model.warnings:
        err.print(f"[yellow]![/yellow] {escape(warning)}")


@models_app.command("verify")
def models_verify(
    model_id: Annotated[str | None, typer.Argument(metavar="[ID]", help="default: every installed model")] = None,
    data: Data = None,
) -> None:
    """Compare every file of a model, or of all, with its SHA-256, and say what differs."""
    folders = _settings(data).model_folders
    wrong = [] if model_id else [error.detail for error in invalid_models(folders)]
    every = [*installed_models(folders), *installed_detectors(folders)]
    for model in [find_model(folders, model_id)] if model_id else every:
        found = list(differences(model))
        wrong += [f"{model.manifest.id}: {difference}" for difference in found]
        if not found:
            out.print(f"{model.manifest.id} {model.manifest.version}: {len(model.manifest.files)} files are what they were")
    for difference in wrong:
        err.print(f"[red]![/red] {escape(difference)}")
    if wrong:
        raise typer.Exit(1)


@models_app.command("remove")
def models_remove(model_id: Annotated[str, typer.Argument(metavar="ID")], data: Data = None) -> None:
    """Remove an installed model; shipped ones stay. What runs with it goes on."""
    settings = _settings(data)
    folder = remove_model(settings.model_folders, settings.data / "models", model_id)
    out.print(f"{model_id} is removed from {folder.parent}")


@models_app.command("install")
def models_install(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="FILE|FOLDER",
            help="a zip of nnUNetv2_export_model_to_zip, an nnU-Net results folder, TotalSegmentator's weights, a YOLO "
            "detector (.onnx), a model folder",
        ),
    ],
    model_id: Annotated[str | None, typer.Option("--id", help="the model's name; default: made of the dataset's")] = None,
    task: Annotated[
        str | None, typer.Option(help="the component that it serves, e.g. inference/tumor; default: one of its own")
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(help="of several datasets: its name or number, or `total` for TotalSegmentator's five parts")
    ] = None,
    configuration: Annotated[str | None, typer.Option(help="of several networks: e.g. 3d_fullres")] = None,
    labels: Annotated[
        str | None, typer.Option(help="its label=number of the label table, comma-separated: 1=201,2=202; default: by name")
    ] = None,
    folds: Annotated[str | None, typer.Option(help="folds, comma-separated; default: 0")] = None,
    license_: Annotated[str | None, typer.Option("--license", help="licence of the weights")] = None,
    classes: Annotated[
        str | None, typer.Option(help="what a detector finds, in order, comma-separated; default: as its file says")
    ] = None,
    mirroring: Annotated[
        bool, typer.Option("--mirroring", help="average over mirrored copies, as nnU-Net does: several times slower")
    ] = False,
    data: Data = None,
) -> None:
    """Install a model under the data folder; a running service uses it from its next request on."""
    from graph import catalog

    settings = _settings(data)
    target = settings.data / "models"
    model: Model | Detector
    if (source / MANIFEST).exists():
        model = install_model(source, target)
    elif source.suffix.lower() == ".onnx":
        listed = [name.strip() for name in classes.split(",")] if classes else None
        look = looker(settings.environments_dir / "imaging")
        model = import_detector(source, target, look, model_id=model_id, classes=listed, license_=license_)
    else:
        try:
            mapping = {int(a): int(b) for a, b in (pair.split("=") for pair in labels.split(","))} if labels else None
        except ValueError:
            raise UsageError(detail=f"--labels takes 1=201,2=202, got {labels!r}") from None
        wanted = folds.split(",") if folds else None
        wish = Wish(model_id, task, mapping, wanted, dataset, configuration, license_, mirroring)
        convert = converter(settings.environments_dir / "nnunet")
        model = import_model(source, target, catalog(settings), wish, convert)
    manifest = model.manifest
    out.print(f"{manifest.id} {manifest.version} is installed for {manifest.task} in {model.folder}", highlight=False)
    if isinstance(manifest, ModelManifest) and manifest.names:
        named = ", ".join(f"{number} {name}" for number, name in sorted(manifest.names.items()))
        out.print(f"Not in the label table, and numbered by their names: {named}", highlight=False, markup=False)


# --- the machine -------------------------------------------------------------------------------------------------------------


@app.command()
def settings(data: Data = None) -> None:
    """List every setting: its variable, its value now, its meaning."""
    table = Table("variable", "value", "meaning", box=None, pad_edge=False)
    for row in describe_settings(_settings(data)):
        table.add_row(*(escape(cell) for cell in row))
    out.print(table)


@app.command()
def doctor(data: Data = None) -> None:
    """Look at processor, memory, disk, storage, port, libraries, environments and models; say how to mend what is missing."""
    from scangraph.doctor import examine

    colors = {"ok": "green", "warning": "yellow", "error": "red"}
    findings = examine(_settings(data))
    for finding in findings:
        out.print(f"[{colors[finding.level]}]{finding.level:8}[/] {finding.subject}: {escape(finding.text)}")
        if finding.mend:
            out.print(f"         → {escape(finding.mend)}")
    if any(finding.level == "error" for finding in findings):
        raise typer.Exit(1)


@storage_app.command("prepare")
def storage_prepare(
    days: Annotated[int, typer.Option(min=2, help="age at which an upload that never ended is deleted")] = 2, data: Data = None
) -> None:
    """Make the bucket where there is none, give it the lifecycle rule, and try everything that the service does there."""
    from scangraph.s3 import lifecycle
    from scangraph.storage import open_storage

    settings = _settings(data)

    async def prepare() -> None:
        storage = open_storage(settings.storage, settings.storage_options)
        for line in await storage.prepare(lifecycle(settings.storage, days)):
            out.print(line)
        await storage.probe()

    asyncio.run(prepare())
    out.print("written, read, listed and deleted, and nothing is overwritten")


@storage_app.command("lifecycle")
def storage_lifecycle(
    days: Annotated[int, typer.Option(min=2, help="age at which an upload that never ended is deleted")] = 2, data: Data = None
) -> None:
    """Print the bucket's lifecycle rule for uploads that never ended, for `aws s3api put-bucket-lifecycle-configuration`."""
    from scangraph.s3 import lifecycle

    url = _settings(data).storage
    if not url.startswith("s3://"):
        raise UsageError(detail=f"{url} is no bucket; set SCANGRAPH_STORAGE_URL=s3://bucket/prefix")
    print(json.dumps(lifecycle(url, days), indent=2))


@app.command()
def phantom(
    out_dir: OutDir = Path("phantom"),
    seed: Annotated[int | None, typer.Option(help="which patient; default: the one of the demo")] = None,
    data: Data = None,
) -> None:
    """Write a synthetic patient: three contrast phases and the true masks."""
    from scangraph.phantoms import DEMO_SEED, make_phantom

    patient = make_phantom(DEMO_SEED if seed is None else seed)
    files: dict[str, Volume] = {**patient.volumes, **{f"true-{name}": mask for name, mask in patient.truth.items()}}
    out_dir.mkdir(parents=True, exist_ok=True)
    with _graph(_settings(data)) as graph:
        for name, volume in files.items():
            (out_dir / f"{name}.nii.gz").write_bytes(graph.encode(volume))
            out.print(str(out_dir / f"{name}.nii.gz"))
