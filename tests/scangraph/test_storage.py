"""One contract for every storage, and what a folder must guard besides."""

from __future__ import annotations

import asyncio
import hashlib
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scangraph.contracts.errors import AlreadyWritten, FileMissing, PathRefused, StorageFull, StorageUnavailable
from scangraph.storage import Storage, open_storage
from tests.s3 import Moto, moto

OUTSIDE = ["", " ", "..", "../x", "a/../../x", "a/..", "s3://bucket/x", "file:///etc/passwd", "a\\b", "a\x00b", "a\nb"]


@pytest.fixture(scope="module")
def s3() -> Iterator[Moto]:
    with moto() as server:
        yield server


@pytest.fixture(params=["folder", "memory", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "folder":
        return open_storage((tmp_path / "storage").as_uri())
    if request.param == "memory":
        return open_storage("memory://")
    server: Moto = request.getfixturevalue("s3")
    return open_storage(f"s3://bucket/{uuid.uuid4().hex}", server.options)


@pytest.fixture
def run() -> Iterator[Callable[[Any], Any]]:
    with asyncio.Runner() as runner:
        yield runner.run


async def names(storage: Storage, prefix: str = "") -> list[str]:
    return sorted([stat.name async for stat in storage.list(prefix)])


# --- the contract ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a", "a/b/c.nii.gz", "ct (1).nii.gz", "größe.nii", "x[1].gz", "50%.txt", "~a", "a b/ c"])
@pytest.mark.parametrize("data", [b"", b"x", os.urandom(300_000)])
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


def test_keys_are_write_once(storage: Storage, run: Any) -> None:
    async def go() -> None:
        outcomes = await asyncio.gather(*(storage.write("a/b", str(n).encode()) for n in range(12)), return_exceptions=True)
        won = [n for n, outcome in enumerate(outcomes) if outcome == "a/b"]
        assert len(won) == 1
        assert sum(isinstance(outcome, AlreadyWritten) for outcome in outcomes) == 11
        assert await storage.read("a/b") == str(won[0]).encode()
        with pytest.raises(AlreadyWritten):
            async with storage.writer("a/b"):
                pass

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
        for start, end in ((0, None), (5, None), (0, 1), (1000, 2_000_000), (len(data) - 1, len(data)), (7, 7)):
            assert b"".join([chunk async for chunk in storage.stream("a", start, end)]) == data[start:end]
        with pytest.raises(FileMissing):
            _ = [chunk async for chunk in storage.stream("b")]

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
    for path in ("a", "a/b/c"):
        with pytest.raises((FileMissing, StorageUnavailable)):
            run(folder.read(path))


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


def test_a_large_file_takes_little_memory(tmp_path: Path) -> None:
    code = """
import asyncio, os, resource, sys
from scangraph.storage import open_storage
async def go():
    storage = open_storage(sys.argv[1])
    await storage.write("warm", bytes(2**20))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    async with storage.writer("large") as file:
        for _ in range(300):
            await file.write(os.urandom(2**20))
    async for chunk in storage.stream("large"):
        pass
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
asyncio.run(go())
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path.as_uri()], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 120


# --- S3 --------------------------------------------------------------------------------------------------------------------


def test_an_outage_is_told_soon(run: Any) -> None:
    with moto() as server:
        storage = open_storage("s3://bucket/x", server.options)
        run(storage.write("a", b"x"))
        server.stop()
        for call in (storage.read("a"), storage.write("b", b"x"), storage.delete("a")):
            start = time.monotonic()
            with pytest.raises(StorageUnavailable):
                run(call)
            assert time.monotonic() - start < 30
        server.start()
        run(storage.write("b", b"x"))
        assert run(storage.read("b")) == b"x"
