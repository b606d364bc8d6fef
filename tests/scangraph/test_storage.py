"""One contract for every storage, and what a folder must guard besides."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

import scangraph.storage
from scangraph.contracts.errors import AlreadyWritten, FileMissing, PathRefused, StorageFull, StorageUnavailable
from scangraph.storage import Storage, open_storage
from tests.s3 import S3, moto, radosgw
from tests.servers import proxied

OUTSIDE = ["", " ", "..", "../x", "a/../../x", "a/..", "s3://bucket/x", "file:///etc/passwd", "a\\b", "a\x00b", "a\nb"]


@pytest.fixture(scope="module")
def s3() -> Iterator[S3]:
    with moto() as server:
        yield server


@pytest.fixture(scope="module")
def ceph() -> Iterator[S3]:
    with tempfile.TemporaryDirectory(prefix="ceph-", ignore_cleanup_errors=True) as folder, radosgw(Path(folder)) as server:
        yield server


@pytest.fixture(params=["folder", "memory", "s3", "ceph"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Storage]:
    if request.param == "folder":
        storage = open_storage((tmp_path / "storage").as_uri())
        yield storage
        assert [path for path in (tmp_path / "storage").rglob("*#*") if path.name.rpartition("#")[2].isdigit()] == []
    elif request.param == "memory":
        yield open_storage("memory://")
    else:
        server: S3 = request.getfixturevalue(request.param)
        prefix = uuid.uuid4().hex
        yield open_storage(f"{server.url}/{prefix}", server.options)
        assert server.parts_left(prefix) == []


@pytest.fixture
def run() -> Iterator[Callable[[Any], Any]]:
    with asyncio.Runner() as runner:
        yield runner.run


async def names(storage: Storage, prefix: str = "") -> list[str]:
    return sorted([stat.name async for stat in storage.list(prefix)])


# --- the contract ----------------------------------------------------------------------------------------------------------


ODD = ["a", "a/b/c.nii.gz", "ct (1).nii.gz", "größe.nii", "e\u0301", "x[1]{2}.gz", "50%.txt", "a%20b%2Fc", "~a", "a b/ c"]
ODD += ["ct#1.nii", "a*b?", "a:b", "a&b=c+d", 'it\'s;"a",<b>|^`$', "-x", "…", "結果.png"]


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("data", [b"", os.urandom(300_000)], ids=["empty", "some"])
def test_what_is_written_is_read(storage: Storage, run: Any, name: str, data: bytes) -> None:
    async def go() -> None:
        assert await storage.write(name, data) == name
        assert await storage.read(name) == data
        stat = await storage.head(name)
        assert (stat.name, stat.size) == (name, len(data))
        assert await names(storage) == [name]
        await storage.delete(name)
        await storage.delete(name)
        assert await names(storage) == []
        for look in (storage.read(name), storage.head(name)):
            with pytest.raises(FileMissing):
                await look

    run(go())


def test_a_name_is_written_one_way(storage: Storage, run: Any) -> None:
    async def go() -> None:
        assert await storage.write("a//b/./c", b"x") == "a/b/c"
        assert await names(storage, "a/") == ["a/b/c"]
        # A folder's own unfinished files are called so; elsewhere it is a name as any other.
        try:
            assert await storage.write("ct#1", b"x") == "ct#1"
        except PathRefused:
            assert storage.local_root is not None
        else:
            assert await storage.read("ct#1") == b"x"

    run(go())


def test_keys_are_write_once(storage: Storage, run: Any) -> None:
    async def go() -> None:
        outcomes = await asyncio.gather(*(storage.write("a/b", str(n).encode()) for n in range(16)), return_exceptions=True)
        won = [n for n, outcome in enumerate(outcomes) if outcome == "a/b"]
        assert len(won) == 1
        assert sum(isinstance(outcome, AlreadyWritten) for outcome in outcomes) == 15
        assert await storage.read("a/b") == str(won[0]).encode()
        with pytest.raises(AlreadyWritten):
            async with storage.writer("a/b"):
                pass

    run(go())


def test_large_files_are_write_once_too(storage: Storage, run: Any) -> None:
    bodies = [bytes([n]) * (66 * 2**20 + n) for n in range(3)]

    async def go() -> None:
        outcomes = await asyncio.gather(*(storage.write("a/b", body) for body in bodies), return_exceptions=True)
        (won,) = [n for n, outcome in enumerate(outcomes) if outcome == "a/b"]
        assert sum(isinstance(outcome, AlreadyWritten) for outcome in outcomes) == 2
        assert await storage.read("a/b") == bodies[won]
        await storage.delete("a/b")

    run(go())


@pytest.mark.parametrize("size", [0, 1, 2**20, 20 * 2**20 + 7])
def test_a_file_is_written_piece_by_piece(storage: Storage, run: Any, size: int) -> None:
    data = os.urandom(size)

    async def go() -> None:
        async with storage.writer("big/file") as file:
            for start in range(0, size, 70_001):
                await file.write(data[start : start + 70_001])
            assert await names(storage) == []
        assert (file.size, file.sha256) == (size, hashlib.sha256(data).hexdigest())
        assert await storage.read("big/file") == data

    run(go())


def test_small_files_are_write_once_piece_by_piece(storage: Storage, run: Any) -> None:
    async def write(data: bytes) -> bytes:
        async with storage.writer("files/x") as file:
            await file.write(data)
        return data

    async def go() -> None:
        outcomes = await asyncio.gather(*(write(b"%d" % n) for n in range(8)), return_exceptions=True)
        (won,) = [outcome for outcome in outcomes if isinstance(outcome, bytes)]
        assert sum(isinstance(outcome, AlreadyWritten) for outcome in outcomes) == 7
        assert await storage.read("files/x") == won

    run(go())


def test_a_storage_that_is_as_it_must_be_is_found_so(storage: Storage, run: Any) -> None:
    run(storage.reach())
    run(storage.probe())
    assert run(names(storage)) == []


class Forgetful:
    """A server between us and a real one that drops the header of conditional writes, as some do."""

    def __init__(self, target: S3) -> None:
        outer = target.options["endpoint"]

        class Handler(BaseHTTPRequestHandler):
            def do(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                headers = {k: v for k, v in self.headers.items() if k.lower() not in {"if-none-match", "host"}}
                with httpx.Client() as client:
                    answer = client.request(self.command, outer + self.path, content=body, headers=headers)
                self.send_response(answer.status_code)
                for name, value in answer.headers.items():
                    if name.lower() not in {"content-length", "transfer-encoding", "connection", "content-encoding"}:
                        self.send_header(name, value)
                self.send_header("Content-Length", str(len(answer.content)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(answer.content)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = do  # noqa: N815

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"


def test_a_server_that_overwrites_is_found_out(s3: S3, run: Any) -> None:
    forgetful = Forgetful(s3)  # moto looks at no signature, so headers may change on the way
    thread = threading.Thread(target=forgetful.server.serve_forever)
    thread.start()
    try:
        storage = open_storage(f"s3://bucket/{uuid.uuid4().hex}", {**s3.options, "endpoint": forgetful.url})
        with pytest.raises(StorageUnavailable, match="overwrites"):
            run(storage.probe())
        assert run(names(storage)) == []
    finally:
        forgetful.server.shutdown()
        forgetful.server.server_close()
        thread.join()


def test_a_writer_that_fails_leaves_nothing(storage: Storage, run: Any) -> None:
    async def write(wait: asyncio.Event) -> None:
        async with storage.writer("big/file") as file:
            for _ in range(12):
                await file.write(os.urandom(2**20))
            wait.set()
            await asyncio.sleep(60)

    async def fail() -> None:
        async with storage.writer("big/file") as file:
            await file.write(os.urandom(12 * 2**20))
            raise KeyError("stop")

    async def go() -> None:
        with pytest.raises(KeyError):
            await fail()
        assert await names(storage) == []
        halfway = asyncio.Event()
        task = asyncio.create_task(write(halfway))
        await halfway.wait()
        task.cancel()
        await asyncio.wait([task])
        assert await names(storage) == []
        if storage.local_root is not None:
            assert [path for path in storage.local_root.rglob("*") if path.is_file()] == []
        await storage.write("big/file", b"whole")

    run(go())


def test_parts_are_read(storage: Storage, run: Any) -> None:
    data = os.urandom(3 * 2**20)

    async def go() -> None:
        await storage.write("a", data)
        ranges = [(0, None), (5, None), (0, 1), (1000, 2_000_000), (len(data) - 1, len(data)), (7, 7), (9, 3), (3, 2**40)]
        ranges += [(len(data), None), (len(data), len(data) + 9), (2**40, None), (2**40, 2**40 + 1)]
        for start, end in ranges:
            assert b"".join([chunk async for chunk in storage.stream("a", start, end)]) == data[start:end], (start, end)
        await storage.write("empty", b"")
        for start, end in ((0, None), (0, 512), (5, None)):
            assert [chunk async for chunk in storage.stream("empty", start, end)] in ([], [b""])
        for start in (0, 5):
            with pytest.raises(FileMissing):
                _ = [chunk async for chunk in storage.stream("b", start)]

    run(go())


def test_a_list_is_of_a_folder(storage: Storage, run: Any) -> None:
    async def go() -> None:
        for name in ("ab/1", "ab/2/3", "abc/4", "5"):
            await storage.write(name, b"x")
        assert await names(storage) == ["5", "ab/1", "ab/2/3", "abc/4"]
        assert await names(storage, "ab/") == await names(storage, "ab") == ["ab/1", "ab/2/3"]
        assert await names(storage, "none/") == []

    run(go())


@pytest.mark.parametrize("path", OUTSIDE)
def test_nothing_leads_outside(storage: Storage, run: Any, path: str) -> None:
    for call in (storage.read(path), storage.write(path, b"x"), storage.delete(path), storage.head(path)):
        with pytest.raises(PathRefused):
            run(call)


@given(path=st.text(max_size=40))
def test_whatever_is_asked_for_stays_inside(path: str) -> None:
    storage = open_storage("memory://")
    try:
        name = storage.name_of(path)
    except PathRefused:
        return
    assert not name.startswith("/")
    assert ".." not in name.split("/")


# --- a folder --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Storage:
    return open_storage((tmp_path / "storage").as_uri())


def test_links_that_lead_outside_are_refused_and_inner_ones_are_not(folder: Storage, run: Any, tmp_path: Path) -> None:
    root = folder.local_root
    assert root is not None
    (tmp_path / "secret").write_bytes(b"secret")
    (root / "out").symlink_to(tmp_path / "secret")
    (root / "away").symlink_to(tmp_path)
    run(folder.write("real/a", b"x"))
    (root / "inner").symlink_to(root / "real")
    for path in ("out", "away/secret", "away/new"):
        with pytest.raises(PathRefused):
            run(folder.read(path))
        with pytest.raises(PathRefused):
            run(folder.write(path, b"x"))
    assert run(folder.read("inner/a")) == b"x"
    (root / "loop").symlink_to(root / "loop")
    with pytest.raises((PathRefused, FileMissing)):
        run(folder.read("loop"))


def test_absolute_paths_inside_are_the_same_file(folder: Storage, run: Any, tmp_path: Path) -> None:
    run(folder.write("a/b", b"x"))
    assert run(folder.read(str(tmp_path / "storage" / "a" / "b"))) == b"x"
    with pytest.raises(PathRefused):
        run(folder.read("/etc/passwd"))


def test_folders_are_no_files(folder: Storage, run: Any) -> None:
    run(folder.write("a/b", b"x"))

    async def write_below() -> None:
        async with folder.writer("a/b/c") as file:
            await file.write(b"x")

    for path in ("a", "a/b/c"):
        for look in (folder.read(path), folder.head(path)):
            with pytest.raises(FileMissing):
                run(look)
        run(folder.delete(path))
    with pytest.raises(PathRefused, match="a part of it is a file"):
        run(folder.write("a/b/c", b"x"))
    with pytest.raises(PathRefused, match="a part of it is a file"):
        run(write_below())
    with pytest.raises((AlreadyWritten, PathRefused)):
        run(folder.write("a", b"x"))
    assert run(names(folder)) == ["a/b"]


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path: Path, run: Any) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("only root can mount a small disk")
    try:
        storage = open_storage(disk.as_uri())

        async def stream() -> None:
            async with storage.writer("b") as file:
                for _ in range(40):
                    await file.write(bytes(2**20))

        async def go() -> None:
            with pytest.raises(StorageFull):
                await storage.write("a", bytes(3 * 2**20))
            with pytest.raises(StorageFull):
                await stream()
            assert await names(storage) == []
            await storage.write("c", bytes(2**20))

        run(go())
    finally:
        subprocess.run(["umount", str(disk)], check=True)


PROGRAM = """
import asyncio, hashlib, json, os, resource, sys
from scangraph.storage import open_storage
def most():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
async def go():
    storage = open_storage(sys.argv[1], json.loads(sys.argv[2]))
    assert await storage.read("warm") == b"from another process"
    before, seen = most(), hashlib.sha256()
    async with storage.writer("large") as file:
        for _ in range(96):
            await file.write(os.urandom(2**20))
    async for chunk in storage.stream("large"):
        seen.update(chunk)
    assert (seen.hexdigest(), file.size) == (file.sha256, 96 * 2**20)
    print(most() - before)
asyncio.run(go())
"""


@pytest.mark.parametrize("place", ["folder", "s3", "ceph"])
def test_a_large_file_takes_little_memory_in_any_process(
    request: pytest.FixtureRequest, tmp_path: Path, run: Any, place: str
) -> None:
    url, options = tmp_path.as_uri(), {}
    if place != "folder":
        server: S3 = request.getfixturevalue(place)
        url, options = f"{server.url}/{uuid.uuid4().hex}", server.options
    storage = open_storage(url, options)
    run(storage.write("warm", b"from another process"))
    command = [sys.executable, "-c", PROGRAM, url, json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 64
    assert run(storage.head("large")).size == 96 * 2**20
    run(storage.delete("large"))


# --- S3 --------------------------------------------------------------------------------------------------------------------


def test_an_outage_is_told_soon(run: Any) -> None:
    async def stream() -> None:
        async with storage.writer("c") as file:
            for _ in range(12):
                await file.write(bytes(2**20))
            server.stop()
            await file.write(bytes(2**20))

    with moto() as server:
        storage = open_storage("s3://bucket/x", server.options)
        run(storage.write("a", b"x"))
        start = time.monotonic()
        with pytest.raises(StorageUnavailable):
            run(stream())
        assert time.monotonic() - start < 30
        for call in (storage.read("a"), storage.head("a"), storage.write("b", b"x"), storage.delete("a"), names(storage)):
            start = time.monotonic()
            with pytest.raises(StorageUnavailable):
                run(call)
            assert time.monotonic() - start < 20
        server.start()
        run(storage.write("b", b"x"))
        assert run(storage.read("b")) == b"x"


def test_a_server_that_answers_nothing_is_told(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scangraph.storage, "_READ_SECONDS", 2.0)
    with moto() as server:
        storage = open_storage("s3://bucket/x", server.options)
        run(storage.write("a", b"x"))
        server.pause()
        start = time.monotonic()
        with pytest.raises(StorageUnavailable):
            run(storage.write("b", b"x"))
        assert time.monotonic() - start < 20
        server.resume()
        assert run(storage.read("a")) == b"x"


def test_a_download_takes_as_long_as_its_reader(s3: S3, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    url, data = f"s3://bucket/{uuid.uuid4().hex}", os.urandom(40 * 2**20)
    run(open_storage(url, s3.options).write("a", data))
    monkeypatch.setattr(scangraph.storage, "_READ_SECONDS", 1.0)
    monkeypatch.setitem(scangraph.storage._RETRY, "retry_timeout", timedelta(seconds=1))
    storage = open_storage(url, s3.options)

    async def go() -> None:
        seen = b""
        async for chunk in storage.stream("a"):
            seen += chunk
            await asyncio.sleep(2.5 if len(seen) < 2**21 else 0.02)
        assert seen == data

    run(go())


def test_an_answer_that_is_lost_is_no_second_writer(s3: S3, run: Any) -> None:
    with proxied(s3.port) as proxy:
        options = {**s3.options, "endpoint": proxy.url}
        storage = open_storage(f"s3://bucket/{uuid.uuid4().hex}", options)

        async def go() -> None:
            proxy.cuts.append(("down", 1))  # it was written, and the answer never comes
            assert await storage.write("a", b"mine") == "a"
            assert proxy.made > 1
            with pytest.raises(AlreadyWritten):
                await storage.write("a", b"mine")
            data = os.urandom(30 * 2**20)
            proxy.cuts.append(("up", 12 * 2**20))
            async with storage.writer("b") as file:
                for start in range(0, len(data), 2**20):
                    await file.write(data[start : start + 2**20])
            proxy.cuts.append(("down", 12 * 2**20))
            assert await storage.read("b") == data
            assert proxy.cuts == []

        run(go())


def test_wrong_credentials_are_no_missing_file(ceph: S3, run: Any) -> None:
    for wrong in ({"secret_access_key": "guess"}, {"access_key_id": "nobody"}):
        storage = open_storage("s3://bucket/x", {**ceph.options, **wrong})
        for call in (storage.read("a"), storage.write("a", b"x"), storage.head("a"), names(storage)):
            with pytest.raises(StorageUnavailable) as told:
                run(call)
            assert "credentials" in str(told.value) or "key" in str(told.value)
            assert told.value.fields["away"]
            assert "guess" not in str(told.value)
            assert "testtest" not in str(told.value)


def test_a_bucket_that_is_not_there(s3: S3, run: Any) -> None:
    storage = open_storage("s3://nowhere/x", s3.options)
    for call in (storage.read("a"), storage.write("a", b"x"), names(storage)):
        with pytest.raises(StorageUnavailable, match="no such bucket"):
            run(call)
    with pytest.raises(FileMissing):  # there is no text in an answer to HEAD
        run(storage.head("a"))
