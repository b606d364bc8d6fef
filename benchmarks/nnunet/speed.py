"""Seconds, peak memory and labels of the engine and of nnU-Net's predictor, on one image, with one network.

    python -m benchmarks.nnunet.speed [--classes 25] [--shape 300 512 512] [--spacing 0.8] [--ways nnunet exact fast draft]
    python -m benchmarks.nnunet.speed --model models/totalseg-demo/nnunet --shape 200 300 300 --spacing 1.2
    python -m benchmarks.nnunet.speed --model models/totalseg-demo/nnunet --phantom 7
    python -m benchmarks.nnunet.speed --device cuda --classes 118 --shape 600 512 512 --ways nnunet exact fast

Each way runs in a process of its own, one after the other, with the same threads and no mirrored copies; the network is
loaded and compiled before the clock starts (`load s`). Memory is the process's highest resident set; the image alone is 2
bytes a voxel.
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
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from benchmarks.nnunet.cases import image, real_size
from deployments.nnunet.accumulate import Accumulator
from deployments.nnunet.plan import build_network
from deployments.nnunet.predictor import Network, Precision
from deployments.nnunet.runtimes import OpenVino, complete_state
from deployments.nnunet.weights import NetworkFolder, read_network_folder
from scangraph.models import read_model
from scangraph.phantoms import make_phantom


def folder_of(arguments: argparse.Namespace) -> NetworkFolder:
    """Return the network that was asked for."""
    if arguments.model:
        return read_network_folder(Path(arguments.model), ("0",))
    return real_size(arguments.classes)


def images(arguments: argparse.Namespace, count: int) -> tuple[list[np.ndarray], list[float]]:
    """Return the network's channels and their spacing: of a patient, the phases that the model was made for."""
    if arguments.phantom is None:
        return [image(arguments.shape)] * count, [arguments.spacing] * 3
    phases = ["portal"] * count
    if arguments.model:
        inputs = read_model(Path(arguments.model).parent).manifest.inputs
        phases = ["portal" if entry.phase == "any" else entry.phase for entry in inputs]
    patient = make_phantom(arguments.phantom).volumes
    return [np.asarray(patient[phase].array) for phase in phases], list(patient[phases[0]].spacing_mm)


def one(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run one way in this process."""
    warnings.simplefilter("ignore")
    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    folder = folder_of(arguments)
    channels, spacing = images(arguments, len(folder.dataset["channel_names"]))
    device = torch.device(arguments.device)
    start = time.perf_counter()
    if arguments.one == "nnunet":
        from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
        from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

        plans, network = PlansManager(folder.plans), build_network(folder)
        weights = [complete_state(network, fold) for fold in folder.parameters]
        predictor = nnUNetPredictor(
            use_mirroring=False, perform_everything_on_device=device.type == "cuda", device=device, allow_tqdm=False
        )
        chosen = plans.get_configuration(folder.configuration)
        predictor.manual_initialization(network, plans, chosen, weights, folder.dataset, folder.trainer, folder.mirror_axes)
        loaded = time.perf_counter()
        labels = predictor.predict_single_npy_array(np.stack(channels).astype(np.float32), {"spacing": spacing})
    else:
        engine = Network(folder, device, mirroring=False, threads=threads, cache=Path(arguments.cache))
        precision = cast("Precision", arguments.one)
        engine.engine(precision)
        engine.predict(
            [c[:32, :32, :32] for c in channels],
            spacing,
            lambda *_: None,
            precision=precision,
            # What is compiled once is compiled here.
        )
        parts = timed()
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        loaded = time.perf_counter()
        labels = engine.predict(channels, spacing, lambda *_: None, precision=precision)
    end = time.perf_counter()
    np.save(arguments.out, labels)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    result = {"way": arguments.one, "load s": round(loaded - start, 1), "s": round(end - loaded, 1), "peak MB": round(peak)}
    if arguments.one != "nnunet" and device.type == "cpu":
        result["of it"] = {part: round(seconds, 2) for part, seconds in parts.items()}
    if device.type == "cuda":
        result["GPU MB"] = round(torch.cuda.max_memory_allocated() / 2**20)
    return result


def timed() -> dict[str, float]:
    """Let the engine's parts on a processor count their seconds, from now on."""
    parts = {"resample": 0.0, "network": 0.0, "add up": 0.0, "export": 0.0}

    def watch(owner: Any, name: str, part: str) -> None:
        own = getattr(owner, name)

        def counted(*args: Any, **named: Any) -> Any:
            start = time.perf_counter()
            try:
                return own(*args, **named)
            finally:
                parts[part] += time.perf_counter() - start

        setattr(owner, name, counted)

    watch(Network, "_prepare", "resample")
    watch(OpenVino, "__call__", "network")
    watch(Accumulator, "add", "add up")
    watch(Accumulator, "finish", "export")
    return parts


def compare(found: np.ndarray, expected: np.ndarray) -> dict[str, float]:
    """Return the fraction of voxels that differ, and the Dice over labels."""
    size = int(max(found.max(), expected.max())) + 1
    counts = np.zeros((size, size), np.int64)
    for a, b in zip(found, expected, strict=True):
        counts += np.bincount(a.ravel().astype(np.int64) * size + b.ravel(), minlength=size * size).reshape(size, size)
    both, either = np.diag(counts)[1:], (counts.sum(0) + counts.sum(1))[1:]
    there = either > 0
    dice = 2 * both[there] / either[there]
    differ = 1 - np.diag(counts).sum() / counts.sum()
    return {
        "differ": float(f"{differ:.2g}"),
        "Dice mean": round(float(dice.mean()), 5),
        "Dice min": round(float(dice.min()), 5),
    }


def main() -> None:
    """Run them all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, default=25)
    parser.add_argument("--shape", type=int, nargs=3, default=[300, 512, 512], metavar=("Z", "Y", "X"))
    parser.add_argument("--spacing", type=float, default=0.8)
    parser.add_argument("--phantom", type=int, help="seed of a synthetic patient instead of a random image")
    parser.add_argument("--model", help="an nnU-Net folder instead of a random network")
    parser.add_argument("--ways", nargs="+", default=["nnunet", "exact", "fast", "draft"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cache")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(one(arguments)))
        return
    with tempfile.TemporaryDirectory(prefix="scangraph-bench-") as folder:
        cache = ["--cache", arguments.cache or f"{folder}/cache"]
        first: dict[str, Any] | None = None
        for way in arguments.ways:
            out = f"{folder}/{way}.npy"
            command = [sys.executable, "-m", "benchmarks.nnunet.speed", *sys.argv[1:], *cache, "--one", way, "--out", out]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                print(way, "failed:", done.stderr[-400:] or done.returncode, flush=True)
                continue
            result = json.loads(done.stdout.splitlines()[-1])
            labels = np.load(out)
            if first is None:
                first = {**result, "labels": labels}
            else:
                result |= {"times faster": round(first["s"] / result["s"], 1), **compare(labels, first["labels"])}
            print(result, flush=True)


if __name__ == "__main__":
    main()
