"""What Ray is told about a stage's environment."""

from __future__ import annotations

import json
import sys
import venv
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from runtime_envs import (
    COMPILES,
    SHARES_BASE,
    STAGES,
    EnvironmentBroken,
    EnvironmentMissing,
    check,
    command_for,
    lock_of,
    pins,
    runtime_env,
)
from runtime_envs.build import SERVING
from scangraph.settings import HOME, Settings, load_settings

CODE = {"working_dir": f"local://{HOME}"}


def code(stage: str, settings: Settings, environment: str = "") -> dict[str, Any]:
    """Where a stage's code is and, if it has loops to compile, where they are kept: by environment, each has its own numba."""
    if stage not in COMPILES:
        return CODE
    return {**CODE, "env_vars": {"NUMBA_CACHE_DIR": str(settings.cache / (environment or stage) / "numba")}}


@pytest.mark.parametrize("stage", ["base", "nnunet", "smoothing", *SHARES_BASE])
def test_every_stage_has_a_lock_that_is_built(stage: str) -> None:
    assert lock_of(stage) in SERVING
    assert all("==" in pin for pin in pins(stage))


@pytest.mark.parametrize(("stage", "environment"), [("nnunet", "nnunet"), ("smoothing", "smoothing"), ("gateway", "base")])
def test_prebuilt_points_at_the_interpreter(stage: str, environment: str, tmp_path: Path) -> None:
    python = tmp_path / environment / "bin" / "python"
    settings = load_settings(environments="prebuilt", environments_dir=tmp_path)
    with pytest.raises(EnvironmentMissing, match=f"'{stage}' is not there.*make setup"):
        runtime_env(stage, settings)
    python.parent.mkdir(parents=True)
    python.touch()
    assert runtime_env(stage, settings) == {"py_executable": str(python), **code(stage, settings)}


@pytest.mark.parametrize(("stage", "extra"), [("smoothing", "open3d"), ("postprocess", "cugraph")])
def test_a_setting_runs_a_stage_from_the_lock_with_its_extra(stage: str, extra: str, tmp_path: Path) -> None:
    lock = f"{stage}-{extra}"
    names = {pin.partition("==")[0] for pin in pins(stage)}
    more = {pin.partition("==")[0].removesuffix("-cu13") for pin in pins(lock)}
    assert extra in more - names
    assert names < more
    chosen: dict[str, Any] = {stage: {extra: True}, "environments_dir": tmp_path}
    settings = load_settings(**chosen)
    for name in (stage, lock):
        with pytest.raises(EnvironmentMissing, match=f"'{stage}' is not there.*make setup-{extra}"):
            runtime_env(stage, settings)
        python = tmp_path / name / "bin" / "python"  # the plain one is not enough
        python.parent.mkdir(parents=True)
        python.touch()
    assert runtime_env(stage, settings) == {"py_executable": str(python), **code(stage, settings, lock)}
    assert runtime_env(stage, load_settings(environments_dir=tmp_path))["py_executable"] != str(python)
    made = runtime_env(stage, load_settings(**chosen, environments="ray-built"))
    assert made["uv"]["packages"] == pins(lock)
    assert f"{command_for(lock).removeprefix('make ')}:" in (HOME / "Makefile").read_text()


def test_ray_built_installs_the_lock_and_keeps_the_cache(tmp_path: Path) -> None:
    settings = load_settings(environments="ray-built", environments_dir=tmp_path)
    made = runtime_env("nnunet", settings)
    options = ["--override", str(HOME / "runtime_envs/overrides.txt")]  # and none that would forget the cache
    assert made == {"uv": {"packages": pins("nnunet"), "uv_pip_install_options": options}, **code("nnunet", settings)}
    assert [pin for pin in made["uv"]["packages"] if pin.startswith("torch==")]
    assert runtime_env("gateway", settings) == CODE


def script(text: str) -> str:
    """What stands in for an interpreter."""
    return f"#!/bin/sh\n{text}\n"


OURS = [version("ray"), sys.version_info[:2]]


@pytest.mark.parametrize(
    ("interpreter", "reason"),
    [
        (script("echo 'no such library: libthis.so' >&2; exit 3"), r"it ended with 3 \(no such library: libthis.so\)"),
        (script("exit 1"), r"it ended with 1 \(and said nothing\)"),
        ("#!/there/is/no/python", r"it does not start \(No such file or directory\)"),
        (script(f"echo '{json.dumps(['2.0.0', OURS[1]])}'"), "it has Ray 2.0.0 and Python 3.11, this process"),
        (None, r"it ended with 1 \(.*PackageNotFoundError: No package metadata was found for ray\)"),
    ],
    ids=["ends", "silent", "is-not-there", "another-ray", "without-ray"],
)
def test_an_environment_that_no_replica_could_start_from_is_found_before(
    interpreter: str | None, reason: str, tmp_path: Path
) -> None:
    for stage in SERVING:
        python = tmp_path / stage / "bin" / "python"
        if stage == "smoothing" and interpreter is None:
            venv.create(tmp_path / stage)  # a good Python with nothing in it
            continue
        python.parent.mkdir(parents=True)
        python.write_text(interpreter if stage == "smoothing" and interpreter else script(f"echo '{json.dumps(OURS)}'"))
        python.chmod(0o755)
    settings = load_settings(environments_dir=tmp_path)
    with pytest.raises(EnvironmentBroken, match=f"{tmp_path}/smoothing/bin/python cannot run a stage: {reason}.*`make setup`"):
        check(settings)
    check(load_settings(environments_dir=tmp_path, environments="images"))  # they are on other nodes
    (tmp_path / "imaging" / "bin" / "python").unlink()
    with pytest.raises(EnvironmentMissing, match="'imaging' is not there"):
        check(settings)


def test_good_environments_pass() -> None:
    assert STAGES == SERVING  # what is built is what is looked at
    settings = load_settings()
    if not all((settings.environments_dir / stage / "bin" / "python").exists() for stage in SERVING):
        pytest.skip("the environments are not built: run `make setup`")
    check(settings)
