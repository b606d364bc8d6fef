"""gRPC against HTTP on one real service: `python -m benchmarks.doors.grpc [SMALL [SIDE]]`.

SMALL masks (40) one after the other through `postprocess-clean`, warm, each another one so that nothing is known of it; and one
mask of SIDE³ voxels (512) of int16, uncompressed, until it is accepted: received, stored, looked into and in the queue.
"""

from __future__ import annotations

import gzip
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import httpx
import numpy as np

from benchmarks.service import ServiceProcess
from benchmarks.uploads import Watch
from deployments.imageio.nifti import write_nifti
from scangraph.contracts import LabelMap, Volume
from scangraph.handles import SERVICE_FILE
from scangraph.imageflow.v1 import imageflow_pb2 as pb
from scangraph.imageflow.v1 import imageflow_pb2_grpc

PIPELINE, PIECE = "postprocess-clean", 2**19


def small(number: int) -> bytes:
    """A mask that no other number has."""
    array = np.pad(np.full((20, 20, 20), 2, np.uint8), 4)
    array[0, 0, :16] = [2 * (number >> bit & 1) for bit in range(16)]
    return write_nifti(LabelMap(array, (1, 1, 1), labels=(2,)))


def large(side: int) -> bytes:
    array = np.zeros((side,) * 3, np.int16)
    array[: side // 2, : side // 2] = 2
    return gzip.decompress(write_nifti(Volume(array, (1, 1, 1))))


def chunks(image: bytes, name: str = "", detached: bool = False) -> Iterator[pb.ImageChunk]:
    metadata = pb.ImageMetadata(
        filename="m.nii" if detached else "m.nii.gz", pipeline_id=PIPELINE, file_size=len(image), detached=detached
    )
    for number, start in enumerate(range(0, len(image), PIECE)):
        yield pb.ImageChunk(
            image_id=name,
            metadata=metadata if not number else None,
            data=image[start : start + PIECE],
            chunk_number=number,
            is_final=start + PIECE >= len(image),
        )


def told(name: str, seconds: list[float]) -> None:
    print(f"{name:28} median {1000 * statistics.median(seconds):6.0f} ms   90 % {1000 * np.percentile(seconds, 90):6.0f} ms")


def latency(name: str, count: int, numbers: Iterator[int], work: Callable[[bytes], None]) -> None:
    seconds = []
    for turn in range(count + 3):
        image = small(next(numbers))
        begun = time.perf_counter()
        work(image)
        if turn >= 3:
            seconds.append(time.perf_counter() - begun)
    told(name, seconds)


def measure(service: ServiceProcess, count: int, side: int) -> None:
    while not (service.data / SERVICE_FILE).exists():  # written a moment after the gateway is ready
        time.sleep(0.1)
    target = json.loads((service.data / SERVICE_FILE).read_text())["grpc"]
    bearer = [("authorization", f"Bearer {service.token()}")]
    numbers = iter(range(1, 2**16))
    headers = {"Authorization": f"Bearer {service.token()}", "Prefer": "wait=60"}
    with httpx.Client(base_url=service.url, headers=headers, timeout=600) as http, grpc.insecure_channel(target) as channel:
        stub = imageflow_pb2_grpc.ImageProcessingServiceStub(channel)

        def by_http(image: bytes) -> None:
            answer = http.post("/v1/executions", data={"pipeline_id": PIPELINE}, files={"mask": ("m.nii.gz", image)})
            assert answer.json()["status"] == "completed", answer.text

        def by_call(image: bytes) -> None:
            request = pb.ImageRequest(metadata=pb.ImageMetadata(filename="m.nii.gz", pipeline_id=PIPELINE), data=image)
            assert stub.ProcessSingleImage(request, metadata=bearer, timeout=600).status == pb.STATUS_COMPLETED

        def by_stream(image: bytes) -> None:
            *_, last = stub.ProcessImageStream(chunks(image), metadata=bearer, timeout=600)
            assert last.status == pb.STATUS_COMPLETED

        latency("HTTP, form, Prefer: wait", count, numbers, by_http)
        latency("gRPC, ProcessSingleImage", count, numbers, by_call)
        latency("gRPC, ProcessImageStream", count, numbers, by_stream)
        images = [small(next(numbers)) for _ in range(count)]
        begun = time.perf_counter()
        many = (chunk for number, image in enumerate(images) for chunk in chunks(image, str(number)))
        done = sum(answer.is_final for answer in stub.ProcessImageStream(many, metadata=bearer, timeout=600))
        took = time.perf_counter() - begun
        print(f"{'gRPC, one stream of all':28} {done / took:6.1f} masks/s")

        image = large(side)
        print(f"{side}³ int16, {len(image) / 1e6:.0f} MB, until accepted; peak MB above idle: all, own")
        processes = {"proxy": service.processes("proxy"), "gateway": service.processes("gateway")}

        def http_large() -> str:
            answer = http.post(
                "/v1/executions",
                data={"pipeline_id": PIPELINE},
                files={"mask": ("m.nii", image)},
                headers={"Prefer": "respond-async"},
            )
            assert answer.status_code == 202, answer.text
            return str(answer.json()["execution_id"])

        def grpc_large() -> str:
            call = stub.ProcessImageStream(chunks(image, detached=True), metadata=bearer, timeout=600)
            first = next(call)
            assert first.execution_id, first.error
            call.cancel()
            return str(first.execution_id)

        for name, send in (("HTTP, form", http_large), ("gRPC, ProcessImageStream", grpc_large)) * 2:
            with Watch(processes) as watch:
                begun = time.perf_counter()
                execution_id = send()
                took = time.perf_counter() - begun
            proxy, gateway = ("{:.0f}, {:.0f}".format(*watch.above[part]) for part in ("proxy", "gateway"))
            print(f"{name:28} {took:6.2f} s {len(image) / 1e6 / took:6.0f} MB/s   proxy {proxy:10} gateway {gateway}")
            http.post(f"/v1/executions/{execution_id}/cancel")
            time.sleep(5)  # what the cancelled one leaves is let go: the next one's memory is its own


def main() -> None:
    """Measure and print."""
    count, side = (int(sys.argv[n]) if len(sys.argv) > n else default for n, default in ((1, 40), (2, 512)))
    with tempfile.TemporaryDirectory() as folder:
        service = ServiceProcess(Path(folder))
        service.start(400)
        try:
            measure(service, count, side)
        finally:
            service.stop()


if __name__ == "__main__":
    main()
