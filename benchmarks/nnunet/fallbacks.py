"""One tile of a real-size network by each way that a processor has: OpenVINO, torch compiled by inductor, eager torch.

    python -m benchmarks.nnunet.fallbacks [--precisions fast exact]

31 million parameters, 128³, 25 classes, all cores, in one process; the best of three. `load s` is what the first patch waits
for.
"""

from __future__ import annotations

import argparse
import os
import time
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks.nnunet.cases import real_size
from benchmarks.nnunet.profile import best
from deployments.nnunet.plan import build_network
from deployments.nnunet.runtimes import OpenVino, Torch, complete_state, has_fast_bf16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precisions", nargs="+", default=["fast", "exact"], choices=["fast", "exact"])
    arguments = parser.parse_args()
    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    folder, cpu, size = real_size(25), torch.device("cpu"), (128, 128, 128)
    patch = [np.random.default_rng(0).normal(0, 1, (1, *size)).astype(np.float32)]

    def network() -> torch.nn.Module:
        made = build_network(folder)
        made.load_state_dict(complete_state(made, folder.parameters[0]))
        return made

    for precision in arguments.precisions:
        bf16 = precision == "fast" and has_fast_bf16()
        dtype = torch.bfloat16 if bf16 else torch.float32
        for way in ("OpenVINO", "inductor", "eager"):
            start = time.perf_counter()
            runtime: Any = (
                OpenVino(network(), 1, size, flat=False, bf16=bf16, logits=True, threads=threads, cache=None)
                if way == "OpenVINO"
                else Torch(network(), cpu, 1, size, flat=False, dtype=dtype, compiled=way == "inductor")
            )
            load = time.perf_counter() - start
            seconds = best(partial(runtime, patch, lambda: None), 3)
            print({"precision": precision, "way": runtime.name, "load s": round(load, 1), "s": round(seconds, 2)}, flush=True)


if __name__ == "__main__":
    main()
