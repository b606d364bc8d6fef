"""The second way to an environment: Ray builds it from the lock, on the node where the replica lands."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from runtime_envs.build import uv_environment
from tests.conftest import ROOT

SCRIPT = """
import sys
import numpy as np
from ray import serve
import ray
import runtime_envs
from scangraph.contracts import LabelMap
from scangraph.settings import load_settings

if sys.argv[1] == "wrong":
    right = runtime_envs.pins
    runtime_envs.pins = lambda stage: [p.replace("numba==", "numba==99.") for p in right(stage)]
settings = load_settings(environments="ray-built")

from deployments.smoothing.deployment import Smoothing
from deployments.smoothing.components import BASE
from scangraph.handles import run_step
import asyncio

quiet = {"include_dashboard": False, "log_to_driver": False}
ray.init(address="local", num_cpus=2, _temp_dir=sys.argv[2], **quiet)
environment = runtime_envs.runtime_env("smoothing", settings)
deployment = serve.deployment(name="smoothing", ray_actor_options={"runtime_env": environment})
serve.start(logging_config={"log_level": "ERROR"})
try:
    handle = serve.run(deployment(Smoothing).bind(settings.smoothing), name="scangraph", route_prefix=None)
except RuntimeError:
    state = serve.status().applications["scangraph"]
    messages = "|".join(d.message for d in state.deployments.values())
    print("STATUS", state.status.value, "smoothing" in state.deployments, messages)
else:
    mask = LabelMap(np.pad(np.full((5, 5, 5), 2, np.uint8), 3), (1, 1, 1), labels=(2,))

    async def smooth():
        step = await run_step(handle, BASE, {"mask": ray.put(mask)}, {}, execution_id="test")
        return await step.outputs["scene"]

    print("SURFACES", len(asyncio.run(smooth()).surfaces))
serve.shutdown()
ray.shutdown()
"""


def run(case: str, folder: Path) -> str:
    base = ROOT / ".envs/base/bin/python"
    if not base.exists():
        pytest.skip("environment 'base' is not built: run `make setup`")
    tools = ROOT / ".envs/tools/bin"
    environment = uv_environment(sys.executable, dict(os.environ))
    environment |= {"PYTHONPATH": str(ROOT), "PATH": f"{tools}:{environment['PATH']}"}
    with tempfile.TemporaryDirectory(prefix="scangraph-", ignore_cleanup_errors=True) as short:
        done = subprocess.run(
            [str(base), "-c", SCRIPT, case, short],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=500,
            check=False,
        )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_ray_builds_the_environment_and_the_stage_works(tmp_path: Path) -> None:
    assert "SURFACES 1" in run("right", tmp_path)


@pytest.mark.slow
def test_a_wrong_pin_names_stage_and_cause(tmp_path: Path) -> None:
    said = run("wrong", tmp_path)
    assert "STATUS DEPLOY_FAILED True" in said
    assert "numba==99." in said
