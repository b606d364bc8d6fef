"""The command `scangraph`: what works on a server, and where a server's packages are installed, what works on this machine."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from scangraph import remote_cli
from scangraph.contracts.errors import ScanGraphError, UsageError
from scangraph.remote_cli import Server
from scangraph.terminal import complain, err

_SERVER_PACKAGES = "pip install 'scangraph[server]'"


def _local_commands() -> Any:
    """Return the module of what works on this machine, None on one that is only a client."""
    try:
        return importlib.import_module("scangraph.local_cli")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "scangraph":
            raise
        return None


_local = _local_commands()

app = typer.Typer(
    help="CT scans in, label masks and surgical 3-D scenes out. Research use only.",
    epilog=None if _local else f"A service of your own needs more packages: {_SERVER_PACKAGES}",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.command()
def run(
    name: Annotated[
        str, typer.Argument(help="a component of this machine, e.g. inference/totalseg, or a server's pipeline, e.g. organs")
    ],
    inputs: Annotated[
        list[str],
        typer.Argument(metavar="INPUT…", help="files, in the order of the inputs, or INPUT=FILE; or folders: a batch"),
    ],
    server: Server = None,
    out_dir: Annotated[Path, typer.Option("--out", "-o", help="folder for the results")] = Path(),
    parameter: Annotated[
        list[str] | None,
        typer.Option(
            "--set", "-s", metavar="NAME=VALUE", help="a parameter, value as JSON or text; STEP.NAME=VALUE for one step"
        ),
    ] = None,
    scheme: Annotated[str | None, typer.Option(help="numbering of input masks, if not the label table's: kits")] = None,
    priority: Annotated[str, typer.Option(help="on a server: high, normal or low")] = "normal",
    batch: Annotated[bool, typer.Option("--batch", help="on a server: each file is a run of its own")] = False,
    in_flight: Annotated[int, typer.Option(min=1, max=256, help="of a batch: runs at once")] = 4,
    data: Annotated[Path | None, typer.Option(help="data folder, instead of $SCANGRAPH_DATA")] = None,
) -> None:
    """Run a component on local files, or a pipeline on a server, and write its outputs.

    A component's id has a slash in it; with --server, its pipeline over there is run. In a folder each .nii or .nii.gz is one
    run; for a pipeline with several inputs each sub-folder is, with files named after the inputs. Started again, a batch goes
    on where it was.
    """
    if "/" in name and server is None:
        if _local is None:
            raise UsageError(detail=f"to run {name} on this machine: {_SERVER_PACKAGES}; to run it on a server say --server")
        _local.run_component(name, inputs, out_dir, parameter or [], scheme, data)
        return
    wish = remote_cli.Wish(name, inputs, out_dir, parameter or [], scheme, priority, batch, in_flight)
    remote_cli.run_pipeline(wish, server, data)


app.registered_commands += remote_cli.app.registered_commands
app.registered_groups += remote_cli.app.registered_groups
if _local is not None:
    app.registered_commands += _local.app.registered_commands
    app.registered_groups += _local.app.registered_groups


def main() -> None:
    """Run the command; every foreseen error becomes one plain sentence and exit status 1."""
    try:
        app(standalone_mode=True)
    except ScanGraphError as error:
        complain(error.title, error.detail)
        raise SystemExit(1) from None
    except ValidationError as error:
        for fault in error.errors():
            setting = "SCANGRAPH_" + "__".join(str(part) for part in fault["loc"]).upper()
            complain(f"Setting {setting}", fault["msg"])
        raise SystemExit(1) from None
    except OSError as error:  # a folder that may not be written, a disk that is full
        complain("This machine refuses it", str(error))
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        err.print("Interrupted.")
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
