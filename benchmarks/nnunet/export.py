"""From logits on the network's grid to labels on the image's: ours, nnU-Net's default, and its torch variant.

    python -m benchmarks.nnunet.export [--classes 25] [--size 128] [--onto 256]

The same float16 logits for all: blobs as organs have them. Each way in a process of its own; its peak memory is over what the
logits and the process had before (ours runs twice, the first time to be compiled, so none shows).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage

from benchmarks.nnunet.speed import compare

WAYS = ("nnunet", "torch", "scangraph")


def logits_of(classes: int, size: int) -> NDArray[np.float16]:
    """Return float16, (classes, z, y, x): the nearest of random centres wins, with borders a few voxels wide."""
    rng = np.random.default_rng(2)
    grid = np.stack(np.meshgrid(*[np.arange(size, dtype=np.float32)] * 3, indexing="ij"))
    logits = np.empty((classes, size, size, size), np.float16)
    for label in range(classes):
        centre = rng.uniform(0, size, (3, 1, 1, 1)).astype(np.float32)
        waves = ndimage.zoom(rng.normal(0, 2, (8, 8, 8)).astype(np.float32), size / 8, order=1)
        logits[label] = -np.sqrt(((grid - centre) ** 2).sum(0)) / 2 + waves
    return logits


def one(way: str, classes: int, size: int, onto: int, out: str) -> dict[str, Any]:
    """Run one way in this process."""
    warnings.simplefilter("ignore")
    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    logits, shape = logits_of(classes, size), (onto,) * 3
    labels: Any = np.zeros(shape, np.uint8)
    if way == "scangraph":
        from deployments.nnunet.accumulate import Accumulator, Target
        from deployments.nnunet.resampling import Rule

        def run() -> Any:
            target = Target(labels, Rule(1), np.arange(classes, dtype=np.uint8), False, True)
            sums = Accumulator((size,) * 3, [slice(0, size)] * 3, size, classes, None, target)
            sums._ring[...] = last
            sums._weights[...] = 1
            sums.finish(size)
            return labels

        last = np.ascontiguousarray(np.moveaxis(logits, 0, -1), dtype=np.float32)
        run()  # compiles
    elif way == "torch":
        from nnunetv2.preprocessing.resampling.resample_torch import resample_torch_fornnunet

        def run() -> Any:
            full = resample_torch_fornnunet(
                torch.from_numpy(logits), shape, (1, 1, 1), (1, 1, 1), is_seg=False, num_threads=threads, force_separate_z=False
            )
            return full.argmax(0).numpy().astype(np.uint8)

    else:
        from nnunetv2.preprocessing.resampling.default_resampling import resample_data_or_seg_to_shape

        def run() -> Any:
            full = resample_data_or_seg_to_shape(logits, shape, (1, 1, 1), (1, 1, 1), order=1)
            return full.argmax(0).astype(np.uint8)

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    found = run()
    seconds = time.perf_counter() - start
    np.save(out, found)
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {"way": way, "s": round(seconds, 2), "peak MB more": round(peak)}


def main() -> None:
    """Run them all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, default=25)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--onto", type=int, default=256)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    size = (arguments.classes, arguments.size, arguments.onto)
    if arguments.one:
        print(json.dumps(one(arguments.one[0], *size, arguments.one[1])))
        return
    with tempfile.TemporaryDirectory(prefix="scangraph-bench-") as folder:
        expected: Any = None
        for way in WAYS:
            out = f"{folder}/{way}.npy"
            command = [sys.executable, "-m", "benchmarks.nnunet.export", *sys.argv[1:], "--one", way, out]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            result = json.loads(done.stdout.splitlines()[-1])
            found = np.load(out)
            if expected is None:
                expected, first = found, result["s"]
            else:
                result |= {"times faster": round(first / result["s"], 1), **compare(found, expected)}
            print(result, flush=True)


if __name__ == "__main__":
    main()
