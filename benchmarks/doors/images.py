"""`resize-ai-detect` by one gRPC stream, and the bare functions: `python -m benchmarks.doors.images [COUNT]`.

COUNT JPEGs (60) of 1920×1080, each another one: first one at a time, the stream staying open (what the service adds to one
image), then as fast as they go (what it leaves of the throughput). The bare functions decode, resize, detect, draw and encode
in one process.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import queue
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import grpc
from PIL import Image

from benchmarks.service import ServiceProcess
from deployments.imageio.pictures import PictureLimits, read_picture, write_picture
from deployments.imaging.converting import convert
from deployments.imaging.detecting import Choice, detect, draw
from deployments.imaging.networks import Networks
from deployments.imaging.resizing import resize
from models.training.instruments import draw_picture
from scangraph.contracts import Image2D, ImageFile
from scangraph.handles import SERVICE_FILE
from scangraph.imageflow.v1 import imageflow_pb2 as pb
from scangraph.imageflow.v1 import imageflow_pb2_grpc

MODELS = Path(__file__).resolve().parents[2] / "models"
SIZE, WIDTH, PIECE, WARM = (1920, 1080), 640, 2**19, 10
PARAMETERS = {"resize_width": str(WIDTH), "output_format": '"jpeg"'}


def picture(number: int, quality: int = 90) -> bytes:
    """Return a JPEG that no other number has."""
    with io.BytesIO() as out:
        Image.fromarray(draw_picture(number, *SIZE).pixels).save(out, "JPEG", quality=quality)
        return out.getvalue()


def bare_functions() -> Callable[[bytes], bytes]:
    """Return what the pipeline does, as one function."""
    networks = Networks((MODELS,), 1, len(os.sched_getaffinity(0)), gpu=False)
    model = networks.choose("image/detect", None)
    network, names, choice = networks.get(model), model.manifest.classes, Choice()
    facts, small, jpeg = network.facts, (WIDTH, WIDTH * SIZE[1] // SIZE[0]), ImageFile("jpeg", 90)

    def work(data: bytes) -> bytes:
        pixels = resize(read_picture(data, "x", "jpeg", PictureLimits()).pages[0], small, "area")
        found = detect(pixels, network, facts.layout, facts.input_size, names, choice)
        return write_picture(convert(Image2D((draw(pixels, found),)), jpeg)[0])

    return work


def chunks(image: bytes, name: str) -> Iterator[pb.ImageChunk]:
    """Cut an image."""
    metadata = pb.ImageMetadata(
        filename=f"{name}.jpg",
        pipeline_id="resize-ai-detect",
        file_size=len(image),
        parameters=PARAMETERS,
        result_delivery=pb.RESULT_DELIVERY_CHUNKS,
    )
    for number, start in enumerate(range(0, len(image), PIECE)):
        yield pb.ImageChunk(
            image_id=name,
            metadata=None if number else metadata,
            data=image[start : start + PIECE],
            chunk_number=number,
            is_final=start + PIECE >= len(image),
        )


def ends(answers: Iterable[pb.ProcessingResponse]) -> Iterator[str]:
    """Yield each image's name when its result is there."""
    for told in answers:
        if told.is_final:
            assert told.status == pb.STATUS_COMPLETED, told
            yield told.image_id


def measure(service: ServiceProcess, images: list[bytes]) -> None:
    """Print both comparisons."""
    target = json.loads((service.data / SERVICE_FILE).read_text())["grpc"]
    bearer = [("authorization", f"Bearer {service.token()}")]
    bare, count = bare_functions(), len(images) - WARM
    with grpc.insecure_channel(target) as channel:
        stub = imageflow_pb2_grpc.ImageProcessingServiceStub(channel)
        sending: queue.Queue[pb.ImageChunk | None] = queue.Queue()
        ended = ends(stub.ProcessImageStream(iter(sending.get, None), metadata=bearer, timeout=600))
        alone, served = [], []
        for number, image in enumerate(images):
            begun = time.perf_counter()
            bare(image)
            between = time.perf_counter()
            for chunk in chunks(image, f"one-{number}"):
                sending.put(chunk)
            next(ended)
            if number >= WARM:
                alone.append(1000 * (between - begun))
                served.append(1000 * (time.perf_counter() - between))
        sending.put(None)
        print(f"one at a time, median (90 %) of {count}: bare {_told(alone)} ms, by the stream {_told(served)} ms")
        print(f"the service adds {statistics.median(served) - statistics.median(alone):.1f} ms at the median")

        again = [picture(number, 91) for number in range(len(images))]  # what is known is not computed again
        begun = time.perf_counter()
        for image in again:
            bare(image)
        loop = len(images) / (time.perf_counter() - begun)
        begun = time.perf_counter()
        many = itertools.chain.from_iterable(chunks(image, str(number)) for number, image in enumerate(again))
        done = sum(1 for _ in ends(stub.ProcessImageStream(many, metadata=bearer, timeout=600)))
        stream = done / (time.perf_counter() - begun)
        print(f"as fast as they go: bare loop {loop:.1f} images/s, by the stream {stream:.1f}: {stream / loop:.2f} of it")


def _told(times: list[float]) -> str:
    return f"{statistics.median(times):.1f} ({sorted(times)[int(0.9 * len(times))]:.1f})"


def main() -> None:
    """Measure and print."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 60
    images = [picture(number) for number in range(count + WARM)]
    with tempfile.TemporaryDirectory() as folder:
        service = ServiceProcess(Path(folder))
        service.start(400)
        service.settle()
        try:
            measure(service, images)
        finally:
            service.stop()


if __name__ == "__main__":
    main()
