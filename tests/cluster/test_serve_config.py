"""The Serve config in `cluster/` deploys the same graph to a Ray that runs already."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from deployments.imageio.nifti import write_nifti
from graph import COMPONENTS
from scangraph.accounts_cli import local_token
from scangraph.contracts import LabelMap
from scangraph.settings import Settings, load_settings
from tests.conftest import ROOT

CONFIG = ROOT / "cluster/serve.yaml"


def unknown_keys(given: Any, schema: Any, where: str = "") -> list[str]:
    """Name keys that Serve would silently ignore."""
    fields = getattr(schema, "model_fields", None)
    if not isinstance(given, dict) or fields is None:
        return []
    return [f"{where}.{key}" for key in given if key not in fields]


def test_the_config_is_known_to_serve_and_to_our_settings() -> None:
    config = yaml.safe_load(CONFIG.read_text())
    parsed = ServeDeploySchema.model_validate(config)
    (application,) = config["applications"]
    assert unknown_keys(config, ServeDeploySchema) == []
    assert unknown_keys(application, type(parsed.applications[0])) == []
    assert application["args"].keys() <= Settings.model_fields.keys()
    assert "deployments" not in application  # ray_actor_options there would drop the environments
    assert config["http_options"]["host"] == "127.0.0.1"  # Serve's default in a file is every address
    assert len({component.id for component in COMPONENTS}) == len(COMPONENTS)


DRIVER = """
import json, os, signal, sys, time
import ray
quiet = {"include_dashboard": False, "log_to_driver": False}
ray.init(address="local", num_cpus=2, _temp_dir=sys.argv[1], **quiet)
print(json.dumps({"address": ray.get_runtime_context().gcs_address}), flush=True)
signal.pause()
"""

DEPLOY = """
import sys, time, yaml
import ray
from ray import serve
from ray.serve._private.api import serve_start
from ray.serve.schema import ServeDeploySchema
from ray.serve.context import _get_global_client
config = yaml.safe_load(open(sys.argv[2]).read())
config["http_options"]["port"] = int(sys.argv[3])
config["applications"][0]["args"]["data"] = sys.argv[4]
ray.init(address=sys.argv[1], log_to_driver=False, namespace="serve")
serve.start(http_options=config["http_options"])
_get_global_client().deploy_apps(ServeDeploySchema.model_validate(config), _blocking=False)
for _ in range(240):
    status = serve.status().applications.get("scangraph")
    if status and status.status in ("RUNNING", "DEPLOY_FAILED"):
        break
    time.sleep(1)
print(status.status.value, status.message, flush=True)
"""


@pytest.mark.slow
def test_it_deploys_to_a_second_ray(tmp_path: Path) -> None:
    """One process runs a Ray; another one, which knows nothing but its address and the file, deploys to it."""
    import tempfile

    base = ROOT / ".envs/base/bin/python"
    if not base.exists():
        pytest.skip("environment 'base' is not built: run `make setup`")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    token = tmp_path / "token"
    token.write_text("0123456789abcdef" * 4)
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory(prefix="scangraph-", ignore_cleanup_errors=True) as short:
        head = subprocess.Popen(
            [str(base), "-c", DRIVER, short],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        try:
            assert head.stdout
            address = json.loads(head.stdout.readline())["address"]
            command = [str(base), "-c", DEPLOY, address, str(CONFIG), str(port), str(tmp_path / "data")]
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400, check=False)
            assert done.stdout.strip().splitlines()[-1].startswith("RUNNING"), done.stdout + done.stderr[-3000:]
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
                wait_until_ready(client)
                bearer = local_token(load_settings(data=tmp_path / "data"))
                client.headers["Authorization"] = f"Bearer {bearer}"
                mask = LabelMap(np.pad(np.full((5, 5, 5), 2, np.uint8), 3), (1, 1, 1), labels=(2,))
                (tmp_path / "data/storage/mask.nii.gz").write_bytes(write_nifti(mask))
                answer = client.post("/smoothing/base", json={"mask_path": "mask.nii.gz"})
                assert answer.status_code == 200, answer.text
                assert (tmp_path / "data/storage" / answer.json()["obj_path"]).exists()
        finally:
            head.send_signal(signal.SIGTERM)
            head.wait(timeout=60)
            if head.stdout:
                head.stdout.close()


def wait_until_ready(client: httpx.Client) -> None:
    for _ in range(60):
        try:
            if client.get("/readyz").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(1)
    raise AssertionError("the deployed graph did not become ready")
