"""What the parts of `resize-ai-detect` take on a 1920×1080 JPEG, beside Pillow and OpenCV: `python -m benchmarks.imaging`."""

from __future__ import annotations

import io
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from deployments.imageio.pictures import PictureLimits, read_picture, write_picture
from deployments.imaging.converting import convert
from deployments.imaging.detecting import Choice, detect, draw, letterbox
from deployments.imaging.networks import Networks
from deployments.imaging.resizing import resize
from models.training.instruments import draw_picture
from scangraph.contracts import Image2D, ImageFile

MODELS = Path(__file__).resolve().parents[1] / "models"
SIZE, SMALL = (1920, 1080), (640, 360)
ROUNDS = 25


def milliseconds(work: Callable[[], Any]) -> tuple[float, float]:
    """Median and shortest time of a call, ms, after one that does not count."""
    work()
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        work()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times), min(times)


def pillow_jpeg(pixels: NDArray[Any]) -> bytes:
    with io.BytesIO() as out:
        Image.fromarray(pixels).save(out, "JPEG", quality=90)
        return out.getvalue()


def main() -> None:
    threads = len(os.sched_getaffinity(0))
    networks = Networks((MODELS,), 1, threads, gpu=False)
    model = networks.choose("image/detect", None)
    network, names, choice = networks.get(model), model.manifest.classes, Choice()
    facts = network.facts
    data = pillow_jpeg(draw_picture(5, *SIZE).pixels)
    image = read_picture(data, "x", "jpeg", PictureLimits())
    page: Any = image.pages[0]
    wide = page.astype(np.uint16)
    small = resize(page, SMALL, "area")
    boxes = detect(small, network, facts.layout, facts.input_size, names, choice)
    planes, _ = letterbox(small, facts.input_size)
    jpeg = ImageFile("jpeg", 90)

    def whole() -> bytes:
        pixels = resize(read_picture(data, "x", "jpeg", PictureLimits()).pages[0], SMALL, "area")
        found = detect(pixels, network, facts.layout, facts.input_size, names, choice)
        return write_picture(convert(Image2D((draw(pixels, found),)), jpeg)[0])

    def plain() -> bytes:
        decoded: Any = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
        pixels = cv2.resize(decoded, SMALL, interpolation=cv2.INTER_AREA)
        network(letterbox(pixels, facts.input_size)[0])
        return bytes(cv2.imencode(".jpg", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 90])[1])

    print(f"{platform.processor() or platform.machine()}, {threads} cores; JPEG of {SIZE[0]}×{SIZE[1]}, {len(data) // 1000} kB")
    print(f"{len(boxes)} boxes by {model.manifest.id}\n\n| | median, ms | shortest, ms |\n|---|---|---|")
    rows: list[tuple[str, Callable[[], Any]]] = [
        ("decode: ours", lambda: read_picture(data, "x", "jpeg", PictureLimits())),
        ("decode: Pillow", lambda: np.asarray(Image.open(io.BytesIO(data)))),
        ("decode: OpenCV, as RGB", lambda: cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)),
        ("resize to 640×360: ours, area", lambda: resize(page, SMALL, "area")),
        ("resize: ours, lanczos", lambda: resize(page, SMALL, "lanczos")),
        ("resize: Pillow, BOX", lambda: np.asarray(Image.fromarray(page).resize(SMALL, Image.Resampling.BOX))),
        ("resize: ours, area, 16 bits", lambda: resize(wide, SMALL, "area")),
        ("detect: letterbox", lambda: letterbox(small, facts.input_size)),
        ("detect: network", lambda: network(planes)),
        ("detect: all", lambda: detect(small, network, facts.layout, facts.input_size, names, choice)),
        ("draw", lambda: draw(small, boxes)),
        ("encode 640×360 JPEG: ours", lambda: write_picture(Image2D((small,), file=jpeg))),
        ("encode: Pillow", lambda: pillow_jpeg(small)),
        ("encode 1920×1080 JPEG: ours", lambda: write_picture(Image2D((page,), file=jpeg))),
        ("encode 1920×1080 JPEG: Pillow", lambda: pillow_jpeg(page)),
        ("encode 1920×1080 PNG: ours", lambda: write_picture(Image2D((page,)))),
        ("all in a row: ours", whole),
        ("all in a row: OpenCV and the same network, nothing checked or drawn", plain),
    ]
    for name, work in rows:
        median, shortest = milliseconds(work)
        print(f"| {name} | {median:.1f} | {shortest:.1f} |", flush=True)


if __name__ == "__main__":
    main()
