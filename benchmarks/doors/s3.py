"""Files in S3 instead of a folder: `python -m benchmarks.doors.s3 [GB] [moto|radosgw|folder …]`.

The transfers of `benchmarks.uploads`, through a real service, beside what obstore alone does with the same server. Client,
service and S3 server share this machine's cores, and moto and Ceph keep everything in memory: it is the road that is measured.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import obstore
import psutil

from benchmarks.service import ServiceProcess
from benchmarks.uploads import GLB, MB, Watch, download, multipart, resumable
from scangraph.storage import open_storage
from tests.s3 import named

_PART = 8 * MB


async def bare(url: str, options: dict[str, str], size: int) -> tuple[float, float]:
    """Return the seconds that obstore takes to put as many bytes in parts, and to get them."""
    storage, noise = open_storage(url, options), os.urandom(_PART)
    place = storage._store

    async def parts() -> AsyncIterator[bytes]:
        for start in range(0, size, _PART):
            yield noise[: min(_PART, size - start)]

    begun = time.monotonic()
    await obstore.put_async(place, "bare", parts(), use_multipart=True, chunk_size=_PART, max_concurrency=2)
    put = time.monotonic() - begun
    begun, got = time.monotonic(), 0
    async for piece in (await obstore.get_async(place, "bare")).stream(min_chunk_size=MB):
        got += len(piece)
    assert got == size
    await storage.delete("bare")
    return put, time.monotonic() - begun


def alone(url: str, options: dict[str, str], size: int) -> tuple[float, float]:
    """Return the largest memory (MB above idle) of a process that writes and reads a file through our `Storage`."""
    program = """
import asyncio, json, os, sys, psutil
from scangraph.storage import open_storage
async def go():
    storage, size, me = open_storage(sys.argv[1], json.loads(sys.argv[2])), int(sys.argv[3]), psutil.Process()
    await storage.reach()
    noise, idle, peak = os.urandom(2**20), me.memory_info().rss, [0, 0]
    async with storage.writer("large") as file:
        for start in range(0, size, 2**20):
            await file.write(noise[: min(2**20, size - start)])
            peak[0] = max(peak[0], me.memory_info().rss)
    async for piece in storage.stream("large"):
        peak[1] = max(peak[1], me.memory_info().rss)
    await storage.delete("large")
    print(json.dumps([(value - idle) / 2**20 for value in peak]))
asyncio.run(go())
"""
    command = [sys.executable, "-c", program, url, json.dumps(options), str(size)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    up, down = json.loads(done.stdout)
    return up, down


@contextlib.contextmanager
def placed(kind: str, folder: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Give URL and options of a storage of this kind."""
    if kind == "folder":
        yield (folder / "bare").as_uri(), {}
        return
    with named(kind) as server:
        yield f"{server.url}/benchmark", server.options


def served(data: Path, url: str, options: dict[str, str], size: int) -> Iterator[tuple[str, float, Any]]:
    """Yield (what, seconds, memory) of a service's transfers."""
    variables = {"SCANGRAPH_OBJECT_STORE_MB": "200"}
    if options:
        variables |= {"SCANGRAPH_STORAGE_URL": url, "SCANGRAPH_STORAGE_OPTIONS": json.dumps(options)}
    service = ServiceProcess(data, variables)
    service.start(300)
    service.settle()
    try:
        headers = {"Authorization": f"Bearer {service.token()}"}
        with httpx.Client(base_url=service.url, headers=headers, timeout=1200) as client:
            for send in (multipart, resumable):  # what they need anyway
                client.delete(send(client, 20 * MB))
            processes: dict[str, list[psutil.Process]] = {"gateway": service.processes("gateway")}
            kept: list[str] = []
            jobs: list[tuple[str, Any]] = [
                ("upload, multipart", lambda: kept.append(multipart(client, size))),
                ("download", lambda: download(client, kept[0])),
                ("upload, resumable (tus)", lambda: kept.append(resumable(client, size))),
            ]
            for name, work in jobs:
                begun = time.monotonic()
                with Watch(processes) as watch:
                    work()
                yield name, time.monotonic() - begun, watch.above["gateway"]
            for place in kept:
                client.delete(place)
    finally:
        service.stop()


def main(gigabytes: float, *kinds: str) -> None:
    """Measure and print."""
    size = int(gigabytes * 1e9) + len(GLB)

    def told(kind: str, what: str, seconds: float, memory: str) -> None:
        print(f"{kind:8} {what:26} {seconds:7.1f} s {size / 1e6 / seconds:6.0f} MB/s   {memory}", flush=True)

    for kind in kinds or ("folder", "moto", "radosgw"):
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name, placed(kind, Path(name)) as (url, options):
            put, got = asyncio.run(bare(url, options, size))
            told(kind, "obstore alone, up", put, "")
            told(kind, "obstore alone, down", got, "")
            up, down = alone(url, options, size)
            print(f"{kind:8} Storage alone: {up:.0f} MB above idle up, {down:.0f} down", flush=True)
            data = Path(name) / "data"
            data.mkdir()
            for what, seconds, (resident, own) in served(data, url, options, size):
                told(kind, what, seconds, f"gateway {resident:.0f} MB above idle, {own:.0f} of its own")


if __name__ == "__main__":
    main(float(sys.argv[1] if len(sys.argv) > 1 else 1), *sys.argv[2:])
