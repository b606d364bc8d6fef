"""What Ray is told about a stage's environment."""

from __future__ import annotations

from pathlib import Path

import pytest

from runtime_envs import SHARES_BASE, EnvironmentMissing, lock_of, pins, runtime_env
from runtime_envs.build import SERVING
from scangraph.settings import HOME, load_settings

CODE = {"working_dir": f"local://{HOME}"}


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
    assert runtime_env(stage, settings) == {"py_executable": str(python), **CODE}


def test_the_setting_runs_the_surface_stage_from_the_lock_with_open3d(tmp_path: Path) -> None:
    names = {pin.partition("==")[0] for pin in pins("smoothing")}
    more = {pin.partition("==")[0] for pin in pins("smoothing-open3d")}
    assert "open3d" in more - names
    assert names < more
    chosen = {"smoothing": {"open3d": True}, "environments_dir": tmp_path}
    settings = load_settings(**chosen)
    for stage in ("smoothing", "smoothing-open3d"):
        with pytest.raises(EnvironmentMissing, match="'smoothing' is not there.*make setup-open3d"):
            runtime_env("smoothing", settings)
        python = tmp_path / stage / "bin" / "python"  # the plain one is not enough
        python.parent.mkdir(parents=True)
        python.touch()
    assert runtime_env("smoothing", settings) == {"py_executable": str(python), **CODE}
    assert runtime_env("smoothing", load_settings(environments_dir=tmp_path))["py_executable"] != str(python)
    made = runtime_env("smoothing", load_settings(**chosen, environments="ray-built"))
    assert made["uv"]["packages"] == pins("smoothing-open3d")


def test_ray_built_installs_the_lock_and_keeps_the_cache(tmp_path: Path) -> None:
    settings = load_settings(environments="ray-built", environments_dir=tmp_path)
    made = runtime_env("nnunet", settings)
    options = ["--override", str(HOME / "runtime_envs/overrides.txt")]  # and none that would forget the cache
    assert made == {"uv": {"packages": pins("nnunet"), "uv_pip_install_options": options}, **CODE}
    assert [pin for pin in made["uv"]["packages"] if pin.startswith("torch==")]
    assert runtime_env("gateway", settings) == CODE
