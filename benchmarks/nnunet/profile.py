"""Where the fast path's time goes on a processor, against what the processor can do.

    python -m benchmarks.nnunet.profile [--classes 25] [--shape 150 300 300] [--spacing 0.8] [--precision fast]

Three tables: the machine (products of matrices, memory), the stages of one image, and the layers of one tile by OpenVINO's
counters. For each kind of layer: its arithmetic and the bytes that it must read and write, and the time that both would take at
the machine's measured best; no schedule of the same layers one after the other can be faster than the larger of the two.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import torch

from benchmarks.nnunet.cases import image, real_size
from benchmarks.nnunet.speed import timed
from deployments.nnunet.predictor import Network, Precision

#: What OpenVINO's counters call a layer -> a kind; everything else is counted as "other".
KINDS = {
    "Convolution": "convolution",
    "MVN": "normalisation",
    "ConvolutionBackpropData": "transposed convolution",
    "Concat": "concatenation",
    "Reorder": "reordering",
}
#: Of the converted network's operations.
OPERATIONS = {
    "Convolution": "convolution",
    "MVN": "normalisation",
    "ConvolutionBackpropData": "transposed convolution",
    "Concat": "concatenation",
}


def best(run: Callable[[], Any], repeats: int = 5) -> float:
    """Return the seconds of the fastest of several runs."""
    run()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def machine(dtype: torch.dtype) -> tuple[float, float]:
    """Return (FLOP/s of a large product of matrices, bytes/s read and written by a large copy)."""
    size = 4096
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    c = torch.empty(size, size, dtype=dtype)
    flops = 2 * size**3 / best(lambda: torch.matmul(a, b, out=c))
    source = torch.ones(2**28)  # 1 GiB, more than the caches
    target = torch.empty_like(source)
    return flops, 2 * source.nbytes / best(lambda: target.copy_(source))


@contextmanager
def counted() -> Iterator[list[Any]]:
    """Let OpenVINO count the time of each layer; gives the models that are compiled meanwhile."""
    own, models = openvino.Core.compile_model, []

    def compile_model(core: Any, model: Any, device: str, settings: dict[str, Any]) -> Any:
        models.append(model)
        return own(core, model, device, {**settings, "PERF_COUNT": True})

    openvino.Core.compile_model = compile_model
    try:
        yield models
    finally:
        openvino.Core.compile_model = own


def work(model: Any, item_bytes: int) -> dict[str, tuple[float, float]]:
    """Return kind -> (FLOP, bytes read and written) of a network with fixed shapes."""
    found: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for node in model.get_ordered_ops():
        kind = OPERATIONS.get(node.get_type_name())
        if kind is None:
            continue
        out = int(np.prod(list(node.output(0).get_shape())))
        given = [int(np.prod(list(node.input(i).get_shape()))) for i in range(node.get_input_size())]
        if kind == "convolution":  # weights: (out, in, z, y, x)
            found[kind][0] += 2 * out * given[1] / int(node.input(1).get_shape()[0])
        elif kind == "transposed convolution":  # weights: (in, out, z, y, x); strides as long as the kernel do not overlap
            found[kind][0] += 2 * out * int(node.input(1).get_shape()[0])
        elif kind == "normalisation":
            given = given[:1] * 2  # the mean first, then again
        found[kind][1] += item_bytes * (out + sum(given))
    return {kind: (flop, size) for kind, (flop, size) in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, default=25)
    parser.add_argument("--shape", type=int, nargs=3, default=[150, 300, 300], metavar=("Z", "Y", "X"))
    parser.add_argument("--spacing", type=float, default=0.8)
    parser.add_argument("--precision", default="fast", choices=["exact", "fast"])
    arguments = parser.parse_args()
    precision: Precision = arguments.precision
    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    bf16 = precision == "fast"
    flops, bandwidth = machine(torch.bfloat16 if bf16 else torch.float32)
    print(f"machine: {threads} threads, {flops / 1e12:.2f} TFLOP/s, {bandwidth / 1e9:.1f} GB/s")

    with tempfile.TemporaryDirectory(prefix="scangraph-bench-") as folder, counted() as models:
        network = Network(
            real_size(arguments.classes), torch.device("cpu"), mirroring=False, threads=threads, cache=Path(folder)
        )
        ct, spacing = image(arguments.shape), [arguments.spacing] * 3
        (runtime,) = network.runtimes(bf16=bf16)
        network.predict([ct[:32, :32, :32]], spacing, lambda *_: None, precision=precision)  # compiles the loops
        parts, tiles = timed(), []
        start = time.perf_counter()
        network.predict([ct], spacing, lambda _, total: tiles.append(total), precision=precision)
        whole = time.perf_counter() - start
        print(f"\n{'×'.join(map(str, ct.shape))} at {arguments.spacing} mm, {max(tiles)} tiles: {whole:.1f} s")
        for part, seconds in parts.items():
            print(f"  {part:10} {seconds:6.2f} s {seconds / whole:6.1%}")

        patch = np.random.default_rng(0).normal(0, 1, (1, *network.patch)).astype(np.float32)
        took: dict[str, float] = defaultdict(float)
        tile = best(lambda: runtime([patch], lambda: None), 3)
        request: Any = runtime._request  # type: ignore[attr-defined]
        for node in request.profiling_info:
            took[KINDS.get(node.node_type, "other")] += node.real_time.total_seconds()
        needed = work(models[-1], 2 if bf16 else 4)

    print(f"\none tile of {'×'.join(map(str, network.patch))}: {tile:.3f} s (counted: {sum(took.values()):.3f} s)")
    print(f"  {'':24} {'s':>7} {'share':>6} {'GFLOP':>7} {'at best':>8} {'GB':>6} {'at best':>8} {'times the bound':>16}")
    total = 0.0
    for kind, seconds in sorted(took.items(), key=lambda item: -item[1]):
        flop, size = needed.get(kind, (0.0, 0.0))
        bound = max(flop / flops, size / bandwidth)
        total += bound
        times = f"{seconds / bound:.1f}" if bound else "-"
        print(
            f"  {kind:24} {seconds:7.3f} {seconds / sum(took.values()):6.1%} {flop / 1e9:7.0f} {flop / flops:8.3f} "
            f"{size / 1e9:6.2f} {size / bandwidth:8.3f} {times:>16}"
        )
    print(f"  bound of all: {total:.3f} s, {tile / total:.1f} times that is needed")


if __name__ == "__main__":
    main()
