"""The service is kept up, and leaves nothing behind."""

from __future__ import annotations

import configparser
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from benchmarks.service import ServiceProcess
from deployments.imageio.nifti import write_nifti
from scangraph.phantoms import Phantom
from scangraph.settings import load_settings
from scangraph.supervising import SERVICE_FILE, VITAL
from tests.conftest import ROOT

#: A supervisor in a process of its own: it has signals, and children.
SUPERVISE = """
import sys
from pathlib import Path
from scangraph.supervising import Supervisor
data, seconds, *command = sys.argv[1:]
say = lambda text: print(text, flush=True)
sys.exit(Supervisor(command, Path(data), float(seconds), say, longest_pause=0.2, vital=("sleep",)).run())
"""
#: Something that serves: it notes its starts, has two processes of which one is an orphan, and stops as it is told to.
SERVE = """
import json, os, signal, subprocess, sys, time
from pathlib import Path
data, how = Path(sys.argv[1]), sys.argv[2]
with (data / "starts").open("a") as file:
    file.write(f"{os.getpid()} {os.environ.get('SCANGRAPH_PORT', '')}\\n")
if how == "never":
    sys.exit(7)
signal.signal(signal.SIGINT, signal.SIG_IGN if how == "deaf" else lambda *_: sys.exit(0))
vital = subprocess.Popen(["sleep", "1000"])
if how == "starting":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    time.sleep(1000)  # a start that takes longer than any test waits
subprocess.run(["sh", "-c", "sleep 1001 & echo $! >" + str(data / "orphan")])
told = json.dumps({"url": "http://127.0.0.1:1234", "pid": os.getpid(), "vital": vital.pid})
(data / "run/service.json").write_text(told)
while True:
    time.sleep(0.05)
"""


class Run:
    """A supervised program."""

    def __init__(self, data: Path, how: str = "well", seconds: float = 10, **environment: str) -> None:
        self.data = data
        command = [sys.executable, "-c", SUPERVISE, str(data), str(seconds), sys.executable, "-c", SERVE, str(data), how]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), **environment}
        )

    def starts(self) -> list[list[str]]:
        with contextlib.suppress(FileNotFoundError):
            return [line.split(" ") for line in (self.data / "starts").read_text().splitlines()]
        return []

    def state(self, number: int) -> dict[str, Any]:
        """Wait until it is up for the so-manieth time."""
        for _ in range(400):
            with contextlib.suppress(FileNotFoundError, ValueError):
                told: dict[str, Any] = json.loads((self.data / SERVICE_FILE).read_text())
                if len(self.starts()) == number and told["pid"] == int(self.starts()[-1][0]):
                    time.sleep(0.5)  # the supervisor has seen it, too
                    return told
            time.sleep(0.05)
        raise AssertionError(f"not up {number} times: {self.starts()}")

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        self.process.send_signal(number)
        said, _ = self.process.communicate(timeout=30)
        return self.process.returncode, said


@pytest.fixture
def data(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    for name in ("starts", "orphan"):
        if (tmp_path / name).exists():
            for line in (tmp_path / name).read_text().splitlines():
                assert not psutil.pid_exists(int(line.split()[0])), "a process was left behind"


def killed(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("victim", ["pid", "vital"])
def test_what_dies_is_started_again_where_it_was(victim: str, data: Path) -> None:
    run = Run(data)
    first = run.state(1)
    orphan = int((data / "orphan").read_text())
    killed(first[victim])
    run.state(2)
    assert not psutil.pid_exists(orphan)
    assert not psutil.pid_exists(first["vital"])
    assert [port for _, port in run.starts()] == ["", "1234"]
    code, said = run.end()
    assert code == 0
    assert "started again" in said
    assert not (data / SERVICE_FILE).exists()


def test_what_never_comes_up_is_not_tried_for_ever(data: Path) -> None:
    run = Run(data, "never")
    assert run.process.wait(20) == 7
    assert len(run.starts()) == 1
    run.end()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_stops_when_it_is_told(number: int, data: Path) -> None:
    run = Run(data)
    run.state(1)
    assert run.end(number) == (0, "")


def test_what_does_not_stop_is_killed_at_the_end_of_its_time(data: Path) -> None:
    run = Run(data, "deaf", seconds=1)
    run.state(1)
    began = time.monotonic()
    code, said = run.end()
    assert code == 0
    assert "did not stop in time" in said
    assert 1 <= time.monotonic() - began < 10


def test_what_still_starts_is_stopped_at_once(data: Path) -> None:
    run = Run(data, "starting", seconds=1000)
    for _ in range(400):
        if run.starts():
            break
        time.sleep(0.05)  # it is a process of its own: its file is all that tells of it
    code, said = run.end()
    assert (code, said) == (0, "")


def test_who_asks_twice_does_not_wait(data: Path) -> None:
    run = Run(data, "deaf", seconds=100)
    run.state(1)
    run.process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert run.end(signal.SIGINT)[0] == 0


def test_one_data_folder_has_one_service(data: Path) -> None:
    run = Run(data)
    run.state(1)
    another = Run(data)
    said, _ = another.process.communicate(timeout=20)
    assert (another.process.returncode, "already" in said) == (1, True)
    assert len(run.starts()) == 1
    assert run.end()[0] == 0


def test_systemd_is_told(data: Path) -> None:
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(f"{folder}/notify")
        systemd.settimeout(20)
        run = Run(data, NOTIFY_SOCKET=f"{folder}/notify")
        assert systemd.recv(100) == b"READY=1"
        run.state(1)
        run.end()
        assert systemd.recv(100) == b"STOPPING=1"


def test_the_unit_fits_the_service() -> None:
    path = ROOT / "cluster/systemd/scangraph.service"
    unit = configparser.ConfigParser(interpolation=None)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read_string(path.read_text())
    service = unit["Service"]
    variables = dict(word.split("=") for word in service["Environment"].split())
    settings = load_settings(stop_seconds=float(variables["SCANGRAPH_STOP_SECONDS"]))
    assert settings.stop_seconds < float(service["TimeoutStopSec"])
    assert service["ExecStart"].endswith("/.envs/base/bin/scangraph serve")
    assert service["Type"] == "notify"
    program = shutil.which("systemd-analyze")
    if program is not None:
        text = path.read_text().replace(service["ExecStart"], "/bin/true").replace("User=scangraph", "User=root")
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / path.name).write_text(text)
            done = subprocess.run([program, "verify", f"{folder}/{path.name}"], capture_output=True, text=True, check=False)
        assert "Unknown" not in done.stderr, done.stderr


@pytest.mark.slow
def test_a_dead_head_of_ray_is_replaced_and_executions_go_on(tmp_path: Path, phantom: Phantom) -> None:
    """The process of Ray that nothing else brings back is killed while executions are at work."""
    shared = set(Path("/dev/shm").iterdir())
    service = ServiceProcess(tmp_path)
    service.start()
    tree = service.tree()
    try:
        headers = {"Authorization": f"Bearer {service.token()}"}
        with httpx.Client(base_url=service.url, headers=headers, timeout=120) as client:
            content = write_nifti(phantom.volumes["portal"])
            image = client.post("/v1/files", files={"file": ("ct.nii.gz", content)}).json()["id"]
            wishes = [{"pipeline_id": "organs", "inputs": {"image": image}, "parameters": {"step_size": s}} for s in (0.3, 0.4)]
            ids = [client.post("/v1/executions", json=wish).json()["execution_id"] for wish in wishes]
            time.sleep(1)
            (head,) = [process for process in tree if process.name() == VITAL[0]]
            head.kill()
            end = time.monotonic() + 150
            ended: list[str] = []
            while time.monotonic() < end and ended != ["completed"] * 2:
                time.sleep(0.5)
                with contextlib.suppress(httpx.TransportError, KeyError):
                    ended = [client.get(f"/v1/executions/{one}").json()["status"] for one in ids]
            assert ended == ["completed"] * 2, (ended, (tmp_path / "serve.log").read_text()[-2000:])
        tree += service.tree()
        temporary = Path((tmp_path / "run/ray-folder").read_text())
    finally:
        service.stop()
    assert [process for process in tree if process.is_running() and process.status() != psutil.STATUS_ZOMBIE] == []
    assert not temporary.exists()
    assert set(Path("/dev/shm").iterdir()) - shared == set()
    assert "Stopped." in (tmp_path / "serve.log").read_text()
