"""S3 servers for tests."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from scangraph.cluster import free_port


class Moto:
    """moto's S3 server, in a process that can be ended and started again on the same port (empty then)."""

    def __init__(self) -> None:
        self.port = free_port("127.0.0.1")
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def options(self) -> dict[str, str]:
        """What `open_storage` needs besides the URL."""
        return {
            "endpoint": f"http://127.0.0.1:{self.port}",
            "allow_http": "true",
            "region": "us-east-1",
            "access_key_id": "test",
            "secret_access_key": "testtest",
        }

    def start(self) -> None:
        """Start it, with a bucket `bucket`."""
        program = Path(sys.executable).with_name("moto_server")
        command = [str(program), "-H", "127.0.0.1", "-p", str(self.port)]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(300):
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                url = f"http://127.0.0.1:{self.port}/bucket"
                urllib.request.urlopen(urllib.request.Request(url, method="PUT"), timeout=5).close()
                return
            time.sleep(0.1)
        raise RuntimeError("moto's server did not start")

    def stop(self) -> None:
        """End it."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


@contextlib.contextmanager
def moto() -> Iterator[Moto]:
    """Run moto until the block ends."""
    server = Moto()
    server.start()
    try:
        yield server
    finally:
        server.stop()
