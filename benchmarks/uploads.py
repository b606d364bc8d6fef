"""Memory and speed of large transfers through a real service: `python -m benchmarks.uploads [GB]`.

What is sent is a GLB's first bytes and then noise, so that the gate looks at it and inflates nothing: the figures are those of
the way in and out: Serve's proxy, the gateway's replica and the storage (a local folder, every file synced to the disk).
"""

from __future__ import annotations

import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.service import ServiceProcess

MB = 2**20
PIECE = MB
GLB = b"glTF\x02\0\0\0"
_BOUNDARY = "scangraph-benchmark"


def stream(size: int) -> Iterator[bytes]:
    noise = os.urandom(PIECE)
    yield GLB
    left = size - len(GLB)
    while left:
        piece = noise[: min(left, PIECE)]
        left -= len(piece)
        yield piece


def form(size: int) -> Iterator[bytes]:
    head = f'--{_BOUNDARY}\r\nContent-Disposition: form-data; name="file"; filename="noise.glb"\r\n\r\n'
    yield head.encode()
    yield from stream(size)
    yield f"\r\n--{_BOUNDARY}--\r\n".encode()


Memory = dict[str, tuple[float, float]]


class Watch:
    """Peak memory of processes above what they had before, sampled every 50 ms: (resident, not shared) MB.

    Shared is Ray's object store, through which everything larger than 100 kB goes from the proxy to the replica.
    """

    def __init__(self, processes: dict[str, list[psutil.Process]]) -> None:
        self._processes, self._stop = processes, threading.Event()
        self._idle = self._look()
        self._peak = dict(self._idle)
        self._thread = threading.Thread(target=self._run)

    def _look(self) -> Memory:
        memory = {name: [process.memory_info() for process in some] for name, some in self._processes.items()}
        return {
            name: (sum(m.rss for m in some) / MB, sum(m.rss - m.shared for m in some) / MB) for name, some in memory.items()
        }

    def _run(self) -> None:
        while not self._stop.wait(0.05):
            for name, (resident, own) in self._look().items():
                self._peak[name] = max(self._peak[name][0], resident), max(self._peak[name][1], own)

    @property
    def above(self) -> Memory:
        """How much higher the peak was."""
        return {name: (peak[0] - self._idle[name][0], peak[1] - self._idle[name][1]) for name, peak in self._peak.items()}

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def multipart(client: httpx.Client, size: int) -> str:
    kind = {"Content-Type": f"multipart/form-data; boundary={_BOUNDARY}"}
    answer = client.post("/v1/files", content=form(size), headers=kind)
    answer.raise_for_status()
    return str(answer.json()["download_url"])


def resumable(client: httpx.Client, size: int) -> str:
    tus = {"Tus-Resumable": "1.0.0"}
    begun = client.post("/v1/uploads", headers={**tus, "Upload-Length": str(size), "Upload-Metadata": "filename bi5wbmc="})
    begun.raise_for_status()
    headers = {**tus, "Upload-Offset": "0", "Content-Type": "application/offset+octet-stream", "Content-Length": str(size)}
    answer = client.patch(begun.headers["location"], content=stream(size), headers=headers)
    answer.raise_for_status()
    return str(answer.headers["content-location"])


def download(client: httpx.Client, url: str, rate: float | None = None) -> int:
    """Read all of it, no faster than `rate` MB/s."""
    begun, size = time.monotonic(), 0
    with client.stream("GET", url) as answer:
        answer.raise_for_status()
        for piece in answer.iter_raw(PIECE):
            size += len(piece)
            if rate is not None:
                time.sleep(max(begun + size / MB / rate - time.monotonic(), 0))
    return size


def main() -> None:
    """Measure and print."""
    size = int(float(sys.argv[1] if len(sys.argv) > 1 else 2) * 1e9)
    with tempfile.TemporaryDirectory() as folder:
        service = ServiceProcess(Path(folder), {"SCANGRAPH_OBJECT_STORE_MB": "200"})
        service.start()
        try:
            headers = {"Authorization": f"Bearer {service.token()}"}
            with httpx.Client(base_url=service.url, headers=headers, timeout=600) as client:
                for send in (multipart, resumable):  # what they need anyway
                    client.delete(send(client, 20 * MB))
                processes = {"proxy": service.processes("proxy"), "gateway": service.processes("gateway")}
                print(
                    f"{size / 1e9:g} GB                         s    MB/s   proxy       gateway  (peak MB above idle: all, own)"
                )
                url = ""

                def measure(name: str, work: Callable[[], Any]) -> None:
                    begun = time.monotonic()
                    with Watch(processes) as watch:
                        work()
                    took = time.monotonic() - begun
                    proxy, gateway = ("{:.0f}, {:.0f}".format(*watch.above[part]) for part in ("proxy", "gateway"))
                    print(f"{name:24} {took:7.1f} {size / 1e6 / took:7.0f}   {proxy:11} {gateway}")

                def keep(send: Callable[[httpx.Client, int], str]) -> None:
                    nonlocal url
                    url = send(client, size)

                measure("upload, multipart", lambda: keep(multipart))
                measure("download", lambda: download(client, url))
                measure("download, slow client", lambda: download(client, url, rate=100))
                client.delete(url)
                measure("upload, resumable (tus)", lambda: keep(resumable))
        finally:
            service.stop()


if __name__ == "__main__":
    main()
