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

ROOT = Path(__file__).resolve().parents[1]


class ServiceProcess:
    """`scangraph serve` on a data folder.

    Parameters
    ----------
    data : Path
        Its data folder.
    environment : dict, optional
        Settings, as variables.
    """

    def __init__(self, data: Path, environment: dict[str, str] | None = None) -> None:
        import os

        self.data, self.port = data, free_port("127.0.0.1")
        self.url = f"http://127.0.0.1:{self.port}"
        self._environment = {**os.environ, "SCANGRAPH_DATA": str(data), **(environment or {})}
        self._process: subprocess.Popen[bytes] | None = None
        self._token, self._token_until = "", 0.0

    def start(self, seconds: float = 120) -> None:
        """Start it and wait until it is ready."""
        import httpx

        command = [sys.executable, "-m", "scangraph.cli", "serve", "--port", str(self.port)]
        with (self.data / "serve.log").open("ab") as log:
            self._process = subprocess.Popen(command, env=self._environment, cwd=ROOT, stdout=log, stderr=log)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/readyz", timeout=2).status_code == 200:
                    return
            if self._process.poll() is not None:
                break
            time.sleep(0.2)
        raise RuntimeError("the service did not start:\n" + (self.data / "serve.log").read_text()[-2000:])

    def token(self) -> str:
        """Return a bearer of the first admin, as `scangraph token` gives it."""
        if time.monotonic() > self._token_until:
            command = [sys.executable, "-m", "scangraph.cli", "token", "--minutes", "600"]
            done = subprocess.run(command, env=self._environment, cwd=ROOT, capture_output=True, text=True, check=True)
            self._token, self._token_until = done.stdout.strip(), time.monotonic() + 3600
        return self._token

    def tree(self) -> list[psutil.Process]:
        """Every process of it."""
        if self._process is None:
            return []
        with contextlib.suppress(psutil.NoSuchProcess):
            own = psutil.Process(self._process.pid)
            return [own, *own.children(recursive=True)]
        return []

    def processes(self, deployment: str) -> list[psutil.Process]:
        """The replicas of a deployment, or the `ProxyActor`."""
        found = []
        for process in self.tree():
            with contextlib.suppress(psutil.Error):
                line = " ".join(process.cmdline())
                if f":{deployment}" in line or (deployment == "proxy" and "ProxyActor" in line):
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


def service_url(data: Path) -> str:
    """Return the address of the service that runs on a data folder."""
    return str(json.loads((data / "run" / "service.json").read_text())["url"])
