"""A second node for a service's cluster, on the same machine: `ray start`, as on another one."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time

import psutil

from benchmarks.service import ROOT, ServiceProcess, family
from scangraph.cluster import proxies_environment
from scangraph.handles import TOKEN_FILE
from scangraph.settings import load_settings

_GCS = "--gcs-address="


class Node:
    """A worker node, which may be killed.

    Parameters
    ----------
    service : ServiceProcess
        Whose cluster it joins; it may still be starting.
    cpus : int
        What the node says that it has.
    """

    def __init__(self, service: ServiceProcess, cpus: int = 2) -> None:
        self._service, self._cpus = service, cpus
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, seconds: float = 60) -> None:
        """Join as soon as there is somebody to join."""
        settings = load_settings(data=self._service.data)
        environment = {
            **os.environ,
            **proxies_environment(settings),  # Serve's proxies on this node inherit it
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(settings.data / TOKEN_FILE),
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", f"--address={self._address(seconds)}", "--block"]
        command += [f"--num-cpus={self._cpus}", "--num-gpus=0", f"--object-store-memory={512 * 2**20}"]
        with (self._service.data / "node.log").open("ab") as log:
            self._process = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=log, stderr=log)

    def _address(self, seconds: float) -> str:
        """Return where the control store listens, as its own raylet was told."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for process in self._service.tree():
                with contextlib.suppress(psutil.Error):
                    for word in process.cmdline() if process.name() == "raylet" else ():
                        if word.startswith(_GCS):
                            return word.removeprefix(_GCS)
            time.sleep(0.2)
        raise RuntimeError("the service has no control store to join")

    def tree(self) -> list[psutil.Process]:
        """Every process of it."""
        return family(self._process)

    def processes(self, name: str) -> list[psutil.Process]:
        """Its replicas of a deployment, or its `proxy`."""
        return self._service.matching(self.tree(), name)

    def kill(self) -> int:
        """SIGKILL to all of it at once, as a power cut would; return how many that were."""
        tree = self.tree()
        for process in tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        if self._process is not None:
            self._process.wait()
        psutil.wait_procs(tree, timeout=10)
        return len(tree)
