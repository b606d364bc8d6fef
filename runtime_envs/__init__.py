"""The environment of each stage, as Ray understands it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from scangraph.contracts.errors import FatalError
from scangraph.settings import HOME, Settings

#: Stages that need nothing but the base environment share it.
SHARES_BASE = frozenset({"gateway", "executor", "imageio"})


class EnvironmentMissing(FatalError):
    """A stage's environment was not built."""

    code, title = "environment-missing", "A stage's environment is missing"
    template = "The environment of stage {stage!r} is not there ({expected}). Build it with `make setup`."


def lock_of(stage: str) -> str:
    """Name of the lock a stage runs from, without its ending."""
    return "base" if stage in SHARES_BASE else stage


def pins(stage: str) -> list[str]:
    """Exact pins of a stage, from its lock."""
    lines = Path(__file__).with_name(f"{lock_of(stage)}.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def runtime_env(stage: str, settings: Settings) -> dict[str, Any]:
    """Return Ray's `runtime_env` of a stage.

    Two ways to the same packages: *prebuilt* points at the interpreter that `make setup` made, which costs nothing at start;
    *ray-built* lets Ray install the lock with uv on whatever node the replica lands. Ray's default for the latter adds
    `--no-cache`, which costs minutes at every start, hence the explicit options.

    Raises
    ------
    EnvironmentMissing
        If a prebuilt environment is not there.
    """
    code = {"working_dir": f"local://{HOME}"}
    if settings.environments == "ray-built":
        if lock_of(stage) == "base":
            return code  # the cluster's own interpreter has it
        overrides = str(Path(__file__).with_name("overrides.txt"))
        return {"uv": {"packages": pins(stage), "uv_pip_install_options": ["--override", overrides]}, **code}
    python = settings.environments_dir / lock_of(stage) / "bin" / "python"
    if not python.exists():
        raise EnvironmentMissing(stage=stage, expected=str(python))
    return {"py_executable": str(python), **code}
