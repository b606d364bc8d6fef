"""A service in a process of its own, that benchmarks and fault tests may kill."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path

import psutil

from scangraph.cluster import free_port
from scangraph.handles import SERVICE_FILE

ROOT = Path(__file__).resolve().parents[1]
#: Ray gives its own start 30 s, which is not enough where others use the machine; then it is started again.
_SLOW = "timed out during startup"


class ServiceProcess:
    """`scangraph serve` on a data folder.

    Parameters
    ----------
    data : Path
        Its data folder.
    environment : dict, optional
        Settings, as variables.

    Attributes
    ----------
    environment : dict
        The variables that its processes get.
    """

    def __init__(self, data: Path, environment: dict[str, str] | None = None) -> None:
        import os

        self.data, self.port = data, free_port("127.0.0.1")
        self.url = f"http://127.0.0.1:{self.port}"
        self.environment = {**os.environ, "SCANGRAPH_DATA": str(data), **(environment or {})}
        self._process: subprocess.Popen[bytes] | None = None
        self._token, self._token_until = "", 0.0

    def start(self, seconds: float = 120) -> None:
        """Start it and wait until it is ready."""
        import httpx

        log, end = self.data / "serve.log", time.monotonic() + seconds
        began = log.stat().st_size if log.exists() else 0
        while time.monotonic() < end:
            if self._process is None or self._process.poll() is not None:
                self._launch(log)
            with contextlib.suppress(httpx.TransportError):
                told = (self.data / SERVICE_FILE).exists()  # written when everything is ready
                if httpx.get(f"{self.url}/readyz", timeout=2).status_code == 200 and told:
                    return
            if self._process is not None and self._process.poll() is not None and _SLOW not in log.read_text()[began:]:
                break
            time.sleep(0.2)
        raise RuntimeError("the service did not start:\n" + log.read_text()[began:][-2000:])

    def _launch(self, log: Path) -> None:
        command = [sys.executable, "-m", "scangraph.cli", "serve", "--port", str(self.port)]
        with log.open("ab") as file:
            self._process = subprocess.Popen(command, env=self.environment, cwd=ROOT, stdout=file, stderr=file)

    def settle(self, seconds: float = 180) -> None:
        """Wait until the stages have compiled and loaded what they do at their start: until nothing works any more."""
        end, quiet = time.monotonic() + seconds, 0
        while quiet < 3 and time.monotonic() < end:
            before = self._cpu_seconds()
            time.sleep(1)
            quiet = quiet + 1 if self._cpu_seconds() - before < 0.25 else 0

    def _cpu_seconds(self) -> float:
        total = 0.0
        for process in self.tree():
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                total += times.user + times.system
        return total

    def token(self) -> str:
        """Return a bearer of the first admin, as `scangraph token` gives it."""
        if time.monotonic() > self._token_until:
            self._token, self._token_until = self.command("token", "--minutes", "600"), time.monotonic() + 3600
        return self._token

    def command(self, *words: str) -> str:
        """Run `scangraph …` on its data folder and return what it prints."""
        line = [sys.executable, "-m", "scangraph.cli", *words]
        done = subprocess.run(line, env=self.environment, cwd=ROOT, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    def tree(self) -> list[psutil.Process]:
        """Every process of it."""
        return family(self._process)

    def processes(self, deployment: str) -> list[psutil.Process]:
        """The replicas of a deployment; or `proxy`, which speaks HTTP and gRPC; or Serve's `controller`."""
        return self.matching(self.tree(), deployment)

    @staticmethod
    def matching(processes: list[psutil.Process], deployment: str) -> list[psutil.Process]:
        """Return those of the processes that are the deployment's."""
        actor = {"proxy": "ProxyActor", "controller": "ServeController"}.get(deployment)
        found = []
        for process in processes:
            with contextlib.suppress(psutil.Error):
                line = " ".join(process.cmdline())
                if actor in line if actor else f":{deployment}" in line:
                    found.append(process)
        return found

    def memory_mb(self, deployment: str) -> float:
        """Resident memory of a deployment's replicas, without what they share in the object store."""
        total = 0.0
        for process in self.processes(deployment):
            with contextlib.suppress(psutil.Error):
                memory = process.memory_info()
                total += (memory.rss - memory.shared) / 2**20
        return round(total, 1)

    def kill_everything(self) -> None:
        """SIGKILL, to every process at once, as a power cut would."""
        tree = self.tree()
        for process in tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(tree, timeout=10)
        if self._process is not None:
            self._process.wait()

    def stop(self) -> None:
        """Stop it as Ctrl-C does, and make sure."""
        tree = self.tree()
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(60)
        for process in tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(tree, timeout=10)


def family(process: subprocess.Popen[bytes] | None) -> list[psutil.Process]:
    """Return a process, if there is one, and all that it started."""
    if process is not None:
        with contextlib.suppress(psutil.NoSuchProcess):
            own = psutil.Process(process.pid)
            return [own, *own.children(recursive=True)]
    return []


def service_url(data: Path) -> str:
    """Return the address of the service that runs on a data folder."""
    return str(json.loads((data / "run" / "service.json").read_text())["url"])
