"""The command, as a process of its own."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from deployments.imageio.nifti import read_nifti, write_nifti
from scangraph.phantoms import Phantom
from scangraph.settings import Settings
from tests.conftest import ROOT

COMMAND = ROOT / ".envs/base/bin/scangraph"


def scangraph(*arguments: str | Path, data: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    if not COMMAND.exists():
        pytest.skip("environment 'base' is not built: run `make setup`")
    done = subprocess.run(
        [str(COMMAND), *map(str, arguments)],
        cwd=data,
        env={**os.environ, "SCANGRAPH_DATA": str(data), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert "Traceback" not in done.stderr, done.stderr
    if check:
        assert done.returncode == 0, done.stderr
    return done


def test_lists(tmp_path: Path) -> None:
    assert "inference/vessel" in scangraph("components", data=tmp_path).stdout
    declared = json.loads(scangraph("components", "--json", data=tmp_path).stdout)
    assert {c["id"] for c in declared} >= {"smoothing/base", "inference/tumor"}
    assert "demonstration only" in scangraph("models", data=tmp_path).stdout
    assert str(tmp_path) in scangraph("settings", data=tmp_path).stdout
    for command in ("run", "serve", "demo", "components", "models", "doctor", "settings", "phantom"):
        assert command in scangraph(command, "--help", data=tmp_path).stdout


def test_doctor_looks_and_says_how_to_mend(tmp_path: Path) -> None:
    done = scangraph("doctor", data=tmp_path)
    for subject in ("processor", "GPU", "memory", "shared memory", "disk", "environments", "port", "models"):
        assert subject in done.stdout
    (tmp_path / "models" / "broken").mkdir(parents=True)
    (tmp_path / "models" / "broken" / "model.yaml").write_text("id: [")
    done = scangraph("doctor", data=tmp_path, check=False)
    assert done.returncode == 1
    assert "broken" in done.stdout
    assert "Install the model again" in done.stdout


def test_wrong_settings_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCANGRAPH_PORT", "a lot")
    done = scangraph("settings", data=tmp_path, check=False)
    assert done.returncode == 1
    assert "SCANGRAPH_PORT" in done.stderr


def test_run_against_the_service(service: str, service_settings: Settings, phantom: Phantom, tmp_path: Path) -> None:
    image = tmp_path / "delayed.nii.gz"
    image.write_bytes(write_nifti(phantom.volumes["delayed"]))
    done = scangraph("run", "inference/ureter", image, "-o", tmp_path, "--set", "step_size=1.0", data=service_settings.data)
    mask = read_nifti((tmp_path / "ureter.nii.gz").read_bytes(), "m.nii.gz", as_mask=True)
    assert mask.same_grid(phantom.volumes["delayed"])
    assert np.any(mask.array == 206)
    assert "synthetic phantoms" in done.stderr
    assert "ureter:" in done.stderr
    scangraph("run", "smoothing/base", f"mask={tmp_path / 'ureter.nii.gz'}", "-o", tmp_path, data=service_settings.data)
    assert "mtllib base.mtl" in (tmp_path / "base.obj").read_text()
    assert (tmp_path / "base.mtl").exists()
    manifest = json.loads((tmp_path / "base.manifest.json").read_text())
    assert [s["name"] for s in manifest["structures"]] == ["ureter"]
    for file in manifest["files"]:
        assert hashlib.sha256((tmp_path / file["name"]).read_bytes()).hexdigest() == file["sha256"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("inference/nothing", "a.nii.gz"), "There is no component"),
        (("inference/vessel", "here.txt"), "missing: image_P"),
        (("inference/ureter", "nothing.nii.gz"), "nothing.nii.gz is not a file"),
        (("inference/ureter", "here.txt"), "not a NIfTI"),
        (("inference/ureter", "here.txt", "--set", "oops"), "NAME=VALUE"),
    ],
)
def test_errors_are_plain(service: str, service_settings: Settings, arguments: tuple[str, ...], said: str) -> None:
    (service_settings.data / "here.txt").write_text("text" * 99)
    done = scangraph("run", *arguments, data=service_settings.data, check=False)
    assert done.returncode == 1
    assert said in done.stderr


def test_the_demo_on_the_service(service: str, service_settings: Settings, phantom: Phantom, tmp_path: Path) -> None:
    """One CT for all phases: every output on its grid, the report complete."""
    image = tmp_path / "ct.nii.gz"
    image.write_bytes(write_nifti(phantom.volumes["portal"]))
    out = tmp_path / "out"
    scangraph("demo", "--ct", image, "--out", out, data=service_settings.data)
    names = {p.name for p in out.iterdir()}
    masks = {f"{name}.nii.gz" for name in ("organs", "vessels", "ureters", "tumor", "merged", "fat")}
    assert names == masks | {"scene.obj", "scene.mtl", "scene.manifest.json", "preview.png", "report.json"}
    for name in masks:
        assert read_nifti((out / name).read_bytes(), name, as_mask=True).same_grid(phantom.volumes["portal"])
    report: dict[str, Any] = json.loads((out / "report.json").read_text())
    assert report["steps"].keys() == {
        "organs",
        "vessels",
        "ureters",
        "tumor",
        "merged",
        "vessel-repair",
        "ureter-repair",
        "fat",
        "scene",
        "preview",
    }
    assert all(step["seconds"] > 0 and step["peak_mb"] > 0 for step in report["steps"].values())
    assert any("same image" in w for w in report["steps"]["vessels"]["warnings"])
    assert {"aorta", "ureter"} <= {row["name"] for row in report["structures"]}


@pytest.mark.slow
def test_serve_starts_says_where_it_is_and_stops_cleanly(tmp_path: Path) -> None:
    if not COMMAND.exists():
        pytest.skip("environment 'base' is not built: run `make setup`")
    environment = {**os.environ, "SCANGRAPH_DATA": str(tmp_path / "data"), "PYTHONUNBUFFERED": "1"}
    log = tmp_path / "log"
    with log.open("w") as file:
        server = subprocess.Popen(
            [str(COMMAND), "serve", "--port", "0"], env=environment, stdout=file, stderr=subprocess.STDOUT
        )
        try:
            deadline = time.monotonic() + 240
            while "Ctrl-C" not in log.read_text():
                assert server.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.5)
            service = json.loads((tmp_path / "data/run/service.json").read_text())
            assert service["url"] in log.read_text()
            assert httpx.get(f"{service['url']}/readyz", timeout=30).status_code == 200
            assert (tmp_path / "data/run/ray-token").stat().st_mode & 0o077 == 0
        finally:
            server.send_signal(signal.SIGINT)
            assert server.wait(timeout=120) == 0
    assert "Stopped." in log.read_text()
    assert not (tmp_path / "data/run/service.json").exists()
