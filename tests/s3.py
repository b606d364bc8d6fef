"""Real S3 servers for tests: moto's, quick and forgiving, and Ceph's radosgw, which checks signatures.

Any test runs on one of them, or on a bucket of yours, by the service's own variables alone:

    python -m tests.s3 moto|radosgw pytest tests/gateway …
    SCANGRAPH_STORAGE_URL=s3://bucket AWS_…=… pytest tests/gateway …
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import boto3  # type: ignore[import-untyped]
import pytest
from botocore.config import Config  # type: ignore[import-untyped]

from scangraph.cluster import free_port
from scangraph.settings import Settings

#: Debian's; all of them, or there is no server.
_CEPH = ("ceph", "ceph-authtool", "ceph-mon", "ceph-osd", "monmaptool", "radosgw", "radosgw-admin")


def in_own_place(settings: Settings) -> Settings:
    """Give the settings of a test a corner of its own in the storage that the environment names, if it names one."""
    url = os.environ.get("SCANGRAPH_STORAGE_URL")
    if not url or settings.storage_url != url:
        return settings
    corner = hashlib.sha256(str(settings.data).encode()).hexdigest()[:16]
    return settings.model_copy(update={"storage_url": f"{url}/{corner}"})


class S3:
    """A server on a port of its own, with a bucket `bucket`."""

    url = "s3://bucket"

    def __init__(self, port: int) -> None:
        self.port = port

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

    @cached_property
    def client(self) -> Any:
        """Return another library's client, for looking at what is really there."""
        return boto3.client(
            "s3",
            endpoint_url=self.options["endpoint"],
            region_name="us-east-1",
            aws_access_key_id="test",
            aws_secret_access_key="testtest",
            config=Config(s3={"addressing_style": "path"}, retries={"total_max_attempts": 1}),
        )

    def parts_left(self, prefix: str = "") -> list[str]:
        """Return the names of uploads in parts that were neither finished nor given up."""
        found = self.client.list_multipart_uploads(Bucket="bucket").get("Uploads", [])
        return [upload["Key"] for upload in found if upload["Key"].startswith(prefix)]

    def _answers(self) -> bool:
        with contextlib.suppress(urllib.error.URLError, ConnectionError):
            urllib.request.urlopen(f"http://127.0.0.1:{self.port}/", timeout=5).close()
            return True
        return False


class Moto(S3):
    """moto's S3 server, in a process that can be ended and started again on the same port (empty then)."""

    def __init__(self) -> None:
        super().__init__(free_port("127.0.0.1"))
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, with its bucket."""
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
        """End it, as a power cut does."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def pause(self) -> None:
        """Let it accept connections and answer nothing."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it answer again."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)


@contextlib.contextmanager
def moto() -> Iterator[Moto]:
    """Run moto until the block ends."""
    server = Moto()
    server.start()
    try:
        yield server
    finally:
        server.client.close()
        server.stop()


_CONF = """
[global]
fsid = {fsid}
mon host = [v2:127.0.0.1:{mon}]
public addr = 127.0.0.1
cluster addr = 127.0.0.1
auth cluster required = cephx
auth service required = cephx
auth client required = cephx
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 4
osd pool default pgp num = 4
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
mon allow pool size one = true
mon warn on pool no redundancy = false
mon max pg per osd = 1000
run dir = {folder}
admin socket = {folder}/$name.asok
log file = {folder}/$name.log
keyring = {folder}/keyring
mon data = {folder}/mon
osd data = {folder}/osd
osd objectstore = memstore
memstore device bytes = 3221225472
osd class load list = *
osd class default list = *
[client.rgw]
rgw frontends = beast endpoint=127.0.0.1:{port}
rgw data = {folder}/rgw
rgw gc obj min wait = 1
rgw gc processor period = 1
"""


class Radosgw(S3):
    """Ceph's gateway, which can be ended and started again; what is stored stays in Ceph."""

    def __init__(self, run: Callable[[], subprocess.Popen[bytes]]) -> None:
        super().__init__(free_port("127.0.0.1"))
        self._run = run
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and wait until it answers."""
        self._process = self._run()
        for _ in range(600):
            if self._answers():
                return
            time.sleep(0.1)
        raise RuntimeError("radosgw did not start")

    def stop(self) -> None:
        """End it, as a power cut does."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


@contextlib.contextmanager
def radosgw(folder: Path) -> Iterator[Radosgw]:
    """Run Ceph in memory (one monitor, one disk, no manager) and its S3 gateway until the block ends.

    It takes about ten seconds and half a gigabyte. `folder`'s path must be short: sockets are in it.
    """
    if missing := [program for program in _CEPH if shutil.which(program) is None]:
        wanted = "apt-get install ceph-mon ceph-osd ceph-common radosgw"
        pytest.skip(f"Ceph's {', '.join(missing)} not installed (Debian: {wanted})")
    server = Radosgw(lambda: begin("radosgw", "-n", "client.rgw"))
    fsid, monitor = str(uuid.uuid4()), free_port("127.0.0.1")
    conf, keyring, running = folder / "ceph.conf", folder / "keyring", []
    for name in ("mon", "osd", "rgw"):
        (folder / name).mkdir(parents=True)
    conf.write_text(_CONF.format(fsid=fsid, mon=monitor, folder=folder, port=server.port))
    environment = {**os.environ, "CEPH_CONF": str(conf)}

    def call(*command: str) -> None:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
        if done.returncode:
            raise RuntimeError(f"{command[0]}: {done.stderr[-1000:]}")

    def begin(*command: str) -> subprocess.Popen[bytes]:
        quiet = subprocess.DEVNULL
        return subprocess.Popen([*command, "-f"], env=environment, stdout=quiet, stderr=quiet)

    def start(*command: str) -> None:
        running.append(begin(*command))

    try:
        call("ceph-authtool", "--create-keyring", str(keyring), "--gen-key", "-n", "mon.", "--cap", "mon", "allow *")
        for name in ("client.admin", "client.rgw", "osd.0"):
            caps = [word for part in ("mon", "osd", "mgr") for word in ("--cap", part, "allow *")]
            call("ceph-authtool", str(keyring), "--gen-key", "-n", name, *caps)
        call("monmaptool", "--create", "--fsid", fsid, "--addv", "a", f"[v2:127.0.0.1:{monitor}]", str(folder / "monmap"))
        call("ceph-mon", "--mkfs", "-i", "a", "--monmap", str(folder / "monmap"), "--keyring", str(keyring))
        start("ceph-mon", "-i", "a")
        disk = str(uuid.uuid4())
        call("ceph", "osd", "new", disk)
        call("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", disk)
        start("ceph-osd", "-i", "0")
        server.start()
        keys = ("--access-key=test", "--secret=testtest")
        call("radosgw-admin", "user", "create", "--uid=test", "--display-name=test", *keys)
        server.client.create_bucket(Bucket="bucket")
        yield server
    finally:
        server.client.close()
        server.stop()
        for process in reversed(running):
            process.kill()
            process.wait()


@contextlib.contextmanager
def named(kind: str) -> Iterator[S3]:
    """Run `moto` or `radosgw` until the block ends."""
    with contextlib.ExitStack() as stack:
        if kind == "moto":
            yield stack.enter_context(moto())
        else:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="ceph-", ignore_cleanup_errors=True))
            yield stack.enter_context(radosgw(Path(folder)))


def main(kind: str, *command: str) -> int:
    """Run a command with the service's variables set to a server of its own."""
    with named(kind) as server:
        variables = {"SCANGRAPH_STORAGE_URL": server.url, "SCANGRAPH_STORAGE_OPTIONS": json.dumps(server.options)}
        return subprocess.run(command, env={**os.environ, **variables}, check=False).returncode


if __name__ == "__main__":
    try:
        sys.exit(main(*sys.argv[1:]))
    except pytest.skip.Exception as reason:  # radosgw is not installed
        sys.exit(f"skipped: {reason}")
