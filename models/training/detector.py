"""Train the demonstration detector: `.envs/dev/bin/python -m models.training.detector`.

Draws pictures, trains a small YOLO-like network (no anchors, three scales) on one core, exports it to ONNX in v8's layout,
measures it on pictures of unseen seeds as `image/detect` runs it, and writes `models/instruments-demo/`.
"""

from __future__ import annotations

import argparse
import io
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from deployments.imaging.detecting import Box, Choice, detect
from deployments.imaging.networks import Network
from models.training.instruments import CLASSES, Picture, draw_picture
from scangraph.models import DetectorManifest, write_manifest

TARGET = Path(__file__).resolve().parents[1] / "instruments-demo"
SIZE = 320
STRIDES = (8, 16, 32)
#: A box belongs to the scale whose range its longer side is in, in pixels; the ranges overlap a little.
RANGES = ((0, 64), (48, 128), (96, SIZE))
BATCH, STEPS, PEAK = 16, 700, 3e-3
FIRST_TRAINING_SEED, FIRST_EVALUATION_SEED, EVALUATED = 1_000_000, 2_000_000, 500
#: Measured on pictures of another size than those trained on.
EVALUATION_SIZE = (640, 480)
_VERSION = "1.0.0"


class Convolution(nn.Sequential):
    """Convolution, normalisation, activation."""

    def __init__(self, inside: int, out: int, kernel: int = 3, stride: int = 1) -> None:
        super().__init__(
            nn.Conv2d(inside, out, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(out), nn.ReLU(inplace=True)
        )


class Block(nn.Module):
    """A residual block with a bottleneck."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(Convolution(width, width // 2, 1), Convolution(width // 2, width))

    def forward(self, x: Tensor) -> Tensor:
        """Add what the block finds."""
        found: Tensor = self.inner(x)
        return x + found


class Detector(nn.Module):
    """(B, 3, SIZE, SIZE) from 0 to 1 -> scores before the sigmoid, (B, N, classes), and boxes (B, N, 4) as cx, cy, w, h."""

    cells: Tensor
    strides: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(Convolution(3, 16, 3, 2), Convolution(16, 32, 3, 2), Block(32))
        self.down8 = nn.Sequential(Convolution(32, 64, 3, 2), Block(64), Block(64))
        self.down16 = nn.Sequential(Convolution(64, 96, 3, 2), Block(96))
        self.down32 = nn.Sequential(Convolution(96, 96, 3, 2), Block(96))
        self.up16 = Convolution(96 + 96, 64, 1)
        self.up8 = Convolution(64 + 64, 64, 1)
        widths = (64, 64, 96)
        self.heads = nn.ModuleList(nn.Sequential(Convolution(w, 48), nn.Conv2d(48, 4 + len(CLASSES), 1)) for w in widths)
        for head in self.heads:
            nn.init.constant_(head[1].bias[4:], -4.6)  # type: ignore[index] # most cells hold nothing: one in a hundred does
        middles, strides = [], []
        for stride in STRIDES:
            across = (torch.arange(SIZE // stride) + 0.5) * stride
            y, x = torch.meshgrid(across, across, indexing="ij")
            middles.append(torch.stack([x, y], -1).reshape(-1, 2))
            strides.append(torch.full(((SIZE // stride) ** 2, 1), float(stride)))
        self.register_buffer("cells", torch.cat(middles))
        self.register_buffer("strides", torch.cat(strides))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Run the network."""
        at8 = self.down8(self.stem(x))
        at16 = self.down16(at8)
        at32 = self.down32(at16)
        at16 = self.up16(torch.cat([at16, functional.interpolate(at32, scale_factor=2.0)], 1))
        at8 = self.up8(torch.cat([at8, functional.interpolate(at16, scale_factor=2.0)], 1))
        found = [head(part).flatten(2) for head, part in zip(self.heads, (at8, at16, at32), strict=True)]
        rows = torch.cat(found, 2).transpose(1, 2)
        sides = functional.softplus(rows[..., :4]) * self.strides * 2  # left, top, right, bottom of the cell's middle
        low, high = self.cells - sides[..., :2], self.cells + sides[..., 2:]
        return rows[..., 4:], torch.cat([(low + high) / 2, high - low], -1)


class Exported(nn.Module):
    """The detector with v8's output: (B, 4 + classes, N)."""

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, x: Tensor) -> Tensor:
        """Run it."""
        scores, boxes = self.detector(x)
        return torch.cat([boxes, scores.sigmoid()], -1).transpose(1, 2)


def corners_of(boxes: Tensor) -> Tensor:
    """Turn (…, 4) cx, cy, w, h into x1, y1, x2, y2."""
    return torch.cat([boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2], -1)


def overlap(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return IoU and generalised IoU of boxes (N, 4), pair by pair."""
    shared = (torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])).clamp(min=0).prod(1)
    around = (torch.maximum(a[:, 2:], b[:, 2:]) - torch.minimum(a[:, :2], b[:, :2])).prod(1)
    union = (a[:, 2:] - a[:, :2]).prod(1) + (b[:, 2:] - b[:, :2]).prod(1) - shared
    iou = shared / union.clamp(min=1e-6)
    return iou, iou - (around - union) / around.clamp(min=1e-6)


def assign(network: Detector, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Say which cells answer for which boxes: those near its middle, on the scale that fits; of several the smallest box.

    Returns
    -------
    (cells, boxes)
        Indices, one pair a cell.
    """
    middle, size = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    longest = size.amax(1)
    near = (network.cells[:, None] - middle).abs().amax(2) < 1.5 * network.strides
    low = torch.cat([torch.full(((SIZE // s) ** 2,), r[0]) for s, r in zip(STRIDES, RANGES, strict=True)])
    high = torch.cat([torch.full(((SIZE // s) ** 2,), r[1]) for s, r in zip(STRIDES, RANGES, strict=True)])
    fits = near & (longest >= low[:, None]) & (longest < high[:, None])
    area = torch.where(fits, size.prod(1), torch.inf)
    best = area.min(1)
    cells = torch.nonzero(torch.isfinite(best.values))[:, 0]
    return cells, best.indices[cells]


def loss_of(network: Detector, pixels: Tensor, pictures: Sequence[Picture]) -> Tensor:
    """Boxes by generalised IoU, scores by cross-entropy towards the IoU that the box has (quality focal loss)."""
    scores, boxes = network(pixels)
    wanted = torch.zeros_like(scores)
    found, truth = [], []
    for number, picture in enumerate(pictures):
        if not len(picture.boxes):
            continue
        true = torch.from_numpy(picture.boxes).float()
        cells, which = assign(network, true)
        predicted = corners_of(boxes[number, cells])
        iou, _ = overlap(predicted.detach(), true[which])
        wanted[number, cells, torch.from_numpy(picture.classes)[which]] = iou.clamp(0.05, 1)
        found.append(predicted)
        truth.append(true[which])
    _, generalised = overlap(torch.cat(found), torch.cat(truth))
    weight = (wanted - scores.sigmoid()).abs().detach() ** 2
    quality = functional.binary_cross_entropy_with_logits(scores, wanted, weight, reduction="sum")
    return (quality + 2 * (1 - generalised).sum()) / len(generalised)


def batches(steps: int) -> Iterator[tuple[Tensor, list[Picture]]]:
    """Draw the pictures to train on, each seed once."""
    for step in range(steps):
        seeds = range(FIRST_TRAINING_SEED + step * BATCH, FIRST_TRAINING_SEED + (step + 1) * BATCH)
        pictures = [draw_picture(seed, SIZE, SIZE) for seed in seeds]
        stack = np.stack([picture.pixels for picture in pictures]).transpose(0, 3, 1, 2)
        yield torch.from_numpy(stack.astype(np.float32) / 255), pictures


def train(steps: int) -> tuple[Detector, list[str]]:
    """Train; return the network and the log."""
    torch.manual_seed(0)
    network, log, start = Detector(), [], time.perf_counter()
    optimizer = torch.optim.AdamW(network.parameters(), lr=PEAK, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK, total_steps=steps, pct_start=0.15)
    network.train()
    told = 0.0
    for step, (pixels, pictures) in enumerate(batches(steps), 1):
        loss = loss_of(network, pixels.to(memory_format=torch.channels_last), pictures)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 10.0)
        optimizer.step()
        schedule.step()
        told = 0.95 * told + 0.05 * loss.item() if step > 1 else loss.item()
        if step % 50 == 0 or step == steps:
            minutes, cpu = (time.perf_counter() - start) / 60, time.process_time() / 60
            log.append(f"step {step} of {steps}: loss {told:.3f}, {minutes:.1f} min, {cpu:.1f} min of processor time")
            print(log[-1], flush=True)
    return network.eval(), log


def export(network: Detector) -> bytes:
    """Return the network as ONNX, with its classes where exporters of YOLO write them."""
    with io.BytesIO() as out:
        example = (torch.zeros(1, 3, SIZE, SIZE),)
        names = {"input_names": ["images"], "output_names": ["output0"]}
        torch.onnx.export(Exported(network).eval(), example, out, opset_version=17, dynamo=False, **names)  # type: ignore[arg-type]
        model = onnx.load_model_from_string(out.getvalue())
    metadata = {"names": str(dict(enumerate(CLASSES))), "imgsz": str([SIZE, SIZE]), "stride": "32"}
    onnx.helper.set_model_props(model, metadata)
    return bytes(model.SerializeToString())


def average_precision(
    found: Sequence[Sequence[Box]], truth: Sequence[Picture], number: int, thresholds: Sequence[float]
) -> NDArray[np.float64]:
    """Return the mean precision at 101 recalls of one class, as COCO computes it.

    Parameters
    ----------
    found : sequence of sequences of Box
        Of each picture, the most certain first.
    thresholds : sequence of float
        How far (IoU) a box must overlap a true one, which counts once.

    Returns
    -------
    ndarray, shape (thresholds,)
    """
    wanted = sum(int((picture.classes == number).sum()) for picture in truth)
    certain: list[float] = []
    hits: list[NDArray[np.bool_]] = []
    for boxes, picture in zip(found, truth, strict=True):
        own = [box for box in boxes if box.class_number == number]
        overlaps = _overlaps(np.array([box.corners for box in own]), picture.boxes[picture.classes == number])
        certain += [box.confidence for box in own]
        hits.append(np.stack([_hits(overlaps, threshold) for threshold in thresholds], axis=1))
    right = np.concatenate(hits)[np.argsort(-np.array(certain), kind="stable")]
    if not wanted or not len(right):
        return np.zeros(len(thresholds))
    counted = right.cumsum(axis=0)
    recall, precision = counted / wanted, counted / np.arange(1, len(right) + 1)[:, None]
    precision = np.maximum.accumulate(precision[::-1], axis=0)[::-1]
    means = []
    for column in range(len(thresholds)):
        at = np.searchsorted(recall[:, column], np.linspace(0, 1, 101), side="left")
        means.append(np.append(precision[:, column], 0)[at].mean())
    return np.array(means)


def _overlaps(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the IoU of each of (N, 4) with each of (M, 4)."""
    a, b = a.reshape(-1, 1, 4), b.reshape(1, -1, 4)
    shared = np.maximum(np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2]), 0).prod(axis=2)
    areas = (a[..., 2:] - a[..., :2]).prod(axis=2) + (b[..., 2:] - b[..., :2]).prod(axis=2)
    return np.asarray(shared / (areas - shared))


def _hits(overlaps: NDArray[np.float64], threshold: float) -> NDArray[np.bool_]:
    """Say which boxes (rows, the most certain first) have found something that none before them had."""
    left, hits = overlaps.copy(), np.zeros(len(overlaps), bool)
    for row in np.flatnonzero((overlaps >= threshold).any(axis=1)):
        best = int(left[row].argmax())
        if left[row, best] >= threshold:
            hits[row], left[:, best] = True, -1
    return hits


def evaluate(network: Network, pictures: int = EVALUATED) -> dict[str, float | int | dict[str, float]]:
    """Measure the exported network on unseen pictures, by the code that serves it."""
    truth = [draw_picture(FIRST_EVALUATION_SEED + number, *EVALUATION_SIZE) for number in range(pictures)]
    facts, choice = network.facts, Choice(confidence=0.001)
    found = [detect(picture.pixels, network, facts.layout, facts.input_size, CLASSES, choice) for picture in truth]
    thresholds = np.linspace(0.5, 0.95, 10).tolist()
    table = np.array([average_precision(found, truth, number, thresholds) for number in range(len(CLASSES))])
    return {
        "pictures": pictures,
        "first_seed": FIRST_EVALUATION_SEED,
        "map_50": round(float(table[:, 0].mean()), 4),
        "map_50_95": round(float(table.mean()), 4),
        "ap_50": {name: round(float(row[0]), 4) for name, row in zip(CLASSES, table, strict=True)},
        "ap_50_95": {name: round(float(row.mean()), 4) for name, row in zip(CLASSES, table, strict=True)},
    }


def main() -> None:
    """Train, measure, write the model's folder."""
    parser = argparse.ArgumentParser(description="Train scangraph's demonstration detector on drawn pictures.")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"steps of {BATCH} pictures (default {STEPS})")
    parser.add_argument("--out", type=Path, default=TARGET, help="the model's folder")
    options = parser.parse_args()
    torch.set_num_threads(1)
    network, log = train(options.steps)
    data = export(network)
    metrics = evaluate(Network(data, "the trained network", threads=1))
    print(metrics)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "network.onnx").write_bytes(data)
    (options.out / "training.log").write_text("\n".join([*log, str(metrics), ""]))
    last = FIRST_TRAINING_SEED + options.steps * BATCH - 1
    manifest = DetectorManifest(
        kind="detector",
        id=TARGET.name,
        version=_VERSION,
        title="Instruments on a tray (demonstration)",
        demo=True,
        network="network.onnx",
        classes=CLASSES,
        input_size=(SIZE, SIZE),
        layout="v8",
        license="Apache-2.0",
        training_data=f"Pictures drawn by models.training.instruments, seeds {FIRST_TRAINING_SEED} to {last}; no photograph. "
        "For demonstration and tests only.",
        metrics=metrics,
        files={},
    )
    write_manifest(options.out, manifest)


if __name__ == "__main__":
    main()
