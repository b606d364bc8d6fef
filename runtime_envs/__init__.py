"""The environment of each stage, as Ray understands it."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

from scangraph.contracts.errors import FatalError
from scangraph.settings import HOME, Settings

#: What a service needs: `build.SERVING`, which runs before anything is installed, so neither can import the other.
STAGES = ("base", "nnunet", "smoothing", "postprocess", "imaging")
#: Stages that need nothing but the base environment share it.
SHARES_BASE = frozenset({"gateway", "executor", "imageio", "kafka"})
#: Stages with loops that numba compiles.
COMPILES = frozenset({"nnunet", "smoothing", "postprocess"})


#: What a replica's interpreter must have in common with its cluster's.
_TELL = "import json, sys; from importlib.metadata import version; print(json.dumps([version('ray'), sys.version_info[:2]]))"
_START_SECONDS = 60


class EnvironmentMissing(FatalError):
    """A stage's environment was not built."""

    code, title = "environment-missing", "A stage's environment is missing"
    template = "The environment of stage {stage!r} is not there ({expected}). Build it with `{command}`."


class EnvironmentBroken(FatalError):
    """A stage's environment is there, and no replica could start from it."""

    code, title = "environment-broken", "A stage's environment does not work"
    template = "{python} cannot run a stage: {reason}. Build the environment again with `{command}`."


def lock_of(stage: str, settings: Settings | None = None) -> str:
    """Name of the lock a stage runs from, without its ending; settings may choose one with an extra."""
    if stage == "smoothing" and settings is not None and settings.smoothing.open3d:
        return "smoothing-open3d"
    if stage == "postprocess" and settings is not None and settings.postprocess.cugraph:
        return "postprocess-cugraph"
    return "base" if stage in SHARES_BASE else stage


def command_for(lock: str) -> str:
    """What builds the environment of a lock."""
    _, _, extra = lock.partition("-")
    return f"make setup-{extra}" if extra else "make setup"


def pins(lock: str) -> list[str]:
    """Exact pins of a stage, or of a lock."""
    lines = Path(__file__).with_name(f"{lock_of(lock)}.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def placement(stage: str, settings: Settings) -> dict[str, float]:
    """Return the Ray resources by which a stage finds nodes that have its environment; where all nodes have all, none.

    A replica takes next to nothing of it: the resource says what a node has, and its processors and GPUs say how much.
    """
    return {f"scangraph-{lock_of(stage, settings)}": 0.001} if settings.environments == "images" else {}


def runtime_env(stage: str, settings: Settings) -> dict[str, Any]:
    """Return Ray's `runtime_env` of a stage.

    Three ways to the same packages: *prebuilt* points at the interpreter that `make setup` made, which costs nothing at start;
    *images* does so, too, but it is on other nodes (`placement`); *ray-built* lets Ray install the lock with uv on whatever
    node the replica lands. Ray's default for the latter adds `--no-cache`, which costs minutes at every start, hence the
    explicit options.

    What numba compiles is kept in the data folder: beside the code it may be read-only, and each environment has its own numba.

    Raises
    ------
    EnvironmentMissing
        If a prebuilt environment is not there.
    """
    lock = lock_of(stage, settings)
    code: dict[str, Any] = {"working_dir": f"local://{HOME}"}
    if stage in COMPILES:
        code["env_vars"] = {"NUMBA_CACHE_DIR": str(settings.cache / lock / "numba")}
    if settings.environments == "ray-built":
        if lock == "base":
            return code  # the cluster's own interpreter has it
        overrides = str(Path(__file__).with_name("overrides.txt"))
        return {"uv": {"packages": pins(lock), "uv_pip_install_options": ["--override", overrides]}, **code}
    python = settings.environments_dir / lock / "bin" / "python"
    if settings.environments == "prebuilt" and not python.exists():
        raise EnvironmentMissing(stage=stage, expected=str(python), command=command_for(lock))
    return {"py_executable": str(python), **code}


def check(settings: Settings) -> None:
    """Start each stage's prebuilt interpreter once, before anything is deployed.

    Ray tries without end to start a worker whose interpreter ends at once, and Serve waits for it without saying why. With
    this, a broken update is refused and what runs goes on. Environments elsewhere, or that Ray builds, cannot be asked.

    Raises
    ------
    EnvironmentMissing, EnvironmentBroken
        For the first that is not there, or does not start, or has another Ray or Python than this process.
    """
    if settings.environments != "prebuilt":
        return
    pythons = {lock_of(stage, settings): str(runtime_env(stage, settings)["py_executable"]) for stage in STAGES}
    with ThreadPoolExecutor(len(pythons)) as pool:
        for lock, python, reason in zip(pythons, pythons.values(), pool.map(_why_broken, pythons.values()), strict=True):
            if reason:
                raise EnvironmentBroken(python=python, reason=reason, command=command_for(lock))


def _why_broken(python: str) -> str:
    try:
        command = [python, "-IB", "-c", _TELL]  # by itself, and leaving no bytecode behind
        asked = subprocess.run(command, capture_output=True, text=True, timeout=_START_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return f"it did not start within {_START_SECONDS} s"
    except OSError as error:
        return f"it does not start ({error.strerror})"
    lines = asked.stderr.strip().splitlines()
    if asked.returncode:
        return f"it ended with {asked.returncode} ({lines[-1] if lines else 'and said nothing'})"
    ray, (major, minor) = json.loads(asked.stdout)
    found, wanted = (ray, f"{major}.{minor}"), (version("ray"), "{}.{}".format(*sys.version_info[:2]))
    return "" if found == wanted else "it has Ray {} and Python {}, this process {} and {}".format(*found, *wanted)
