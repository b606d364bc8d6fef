"""Train the demonstration models: `.envs/nnunet/bin/python -m models.training.train [--only TASK] …`.

Makes phantoms, trains one small nnU-Net a task, measures it on phantoms of unseen seeds and writes `models/<task>-demo/`.
On CPUs one task trains per core, each in a process of its own.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from models.training.tasks import EVALUATION_SEEDS, FIRST_TRAINING_SEED, TASKS

MODELS = Path(__file__).resolve().parents[1]
WORK = MODELS.parent / ".scangraph" / "training"


def main() -> None:
    """Parse the command line; without `--task`, start one process a task."""
    parser = argparse.ArgumentParser(description="Train scangraph's demonstration models on synthetic phantoms.")
    parser.add_argument("--only", choices=TASKS, action="append", help="train this task only (may be repeated)")
    parser.add_argument("--cases", type=int, default=48, help="phantoms to train on (default 48)")
    parser.add_argument("--epochs", type=int, help="epochs of 50 steps (default: the task's own)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--jobs", type=int, default=2, help="tasks to train at the same time (default 2)")
    parser.add_argument("--work", type=Path, default=WORK, help="folder for phantoms, nnU-Net's folders and logs")
    parser.add_argument("--task", choices=TASKS, help=argparse.SUPPRESS)  # the process of one task
    options = parser.parse_args()
    seeds = list(range(FIRST_TRAINING_SEED, FIRST_TRAINING_SEED + options.cases))
    if options.task:
        train_task(options.task, seeds, options.device, options.epochs, options.work)
    else:
        train_all(options.only or list(TASKS), seeds, options)


def train_all(names: list[str], seeds: list[int], options: argparse.Namespace) -> None:
    """Make the phantoms, then train the tasks, `options.jobs` at a time."""
    from models.training.data import write_phantoms

    start = time.monotonic()
    write_phantoms(options.work / "phantoms", seeds, options.jobs)
    print(f"{len(seeds)} phantoms after {(time.monotonic() - start) / 60:.1f} min", flush=True)
    threads = str(max(1, (os.cpu_count() or 1) // options.jobs))
    environment = {
        **os.environ,
        **{f"nnUNet_{name}": str(options.work.resolve() / name) for name in ("raw", "preprocessed", "results")},
        "OMP_NUM_THREADS": threads,
        # Keep freed tensors instead of returning them to the system, whose page faults took a fifth of a CPU pass.
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": "100000000000",
    }
    forwarded = ["--cases", str(options.cases), "--device", options.device, "--work", str(options.work.resolve())]
    if options.epochs:
        forwarded += ["--epochs", str(options.epochs)]

    def run(name: str) -> int:
        command = [sys.executable, "-m", "models.training.train", "--task", name, *forwarded]
        with (options.work / f"{name}.log").open("w") as log:
            code = subprocess.call(command, env=environment, cwd=MODELS.parent, stdout=log, stderr=subprocess.STDOUT)
        outcome = "trained" if code == 0 else f"FAILED, see {log.name},"
        print(f"{name} {outcome} after {(time.monotonic() - start) / 60:.1f} min", flush=True)
        return code

    with ThreadPoolExecutor(options.jobs) as pool:
        if any(list(pool.map(run, names))):
            sys.exit(1)


def train_task(name: str, seeds: list[int], device: str, epochs: int | None, work: Path) -> None:
    """Train, export and measure one task in this process."""
    from models.training import export, fit
    from models.training.data import write_dataset

    task = TASKS[name]
    start = time.monotonic()
    for kind in ("preprocessed", "results"):
        shutil.rmtree(work / kind / task.dataset, ignore_errors=True)
    write_dataset(work / "raw", work / "phantoms", task, seeds)
    plans = fit.prepare(task, processes=1)
    prepared = time.monotonic()
    trainer = fit.train(task, plans, device, epochs * fit.STEPS_PER_EPOCH if epochs else task.iterations)
    trained = time.monotonic()

    folder = MODELS / f"{name}-demo"
    shutil.rmtree(folder, ignore_errors=True)
    export.write_network(folder / "nnunet", task, plans, fit.network_of(trainer), len(seeds))
    scores = dict(zip(EVALUATION_SEEDS, export.evaluate(folder / "nnunet", task, EVALUATION_SEEDS), strict=True))
    lines = [f"seed {seed}: " + "  ".join(f"{n} {v:.3f}" for n, v in row.items()) for seed, row in scores.items()]
    minutes = f"minutes: data {(prepared - start) / 60:.1f}, training {(trained - prepared) / 60:.1f}, "
    minutes += f"evaluation {(time.monotonic() - trained) / 60:.1f} on {device}, {os.environ['OMP_NUM_THREADS']} thread(s)"
    log = [fit.progress_table(trainer), "Dice on phantoms of unseen seeds, by label number", *lines, minutes, ""]
    (folder / "training.log").write_text("\n".join(log))
    export.write_manifest(folder, name, task, seeds, scores)


if __name__ == "__main__":
    main()
