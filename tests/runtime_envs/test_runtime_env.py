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


def test_ray_built_installs_the_lock_and_keeps_the_cache(tmp_path: Path) -> None:
    settings = load_settings(environments="ray-built", environments_dir=tmp_path)
    made = runtime_env("nnunet", settings)
    options = ["--override", str(HOME / "runtime_envs/overrides.txt")]  # and none that would forget the cache
    assert made == {"uv": {"packages": pins("nnunet"), "uv_pip_install_options": options}, **CODE}
    assert [pin for pin in made["uv"]["packages"] if pin.startswith("torch==")]
    assert runtime_env("gateway", settings) == CODE
