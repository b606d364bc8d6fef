"""Replicas follow a load that rises and falls, on several Ray nodes on this machine.

    python -m benchmarks.autoscaling [--nodes 4] [--picture docs/autoscaling.png]

The whole service is real, and so are the nodes (a raylet and an object store each); what is simulated is the network: its
stage waits for each tile as long as a GPU of another machine would take, since four networks on two cores would only measure
the cores. At first the stage has no replica. CTs come slowly, then faster than one replica can take them, then slowly again.
The picture shows CTs that wait or are at work, replicas, and how long each waited: from POST to its result, less computing.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import ray
from ray import serve
from ray._private.node import Node
from ray._private.parameter import RayParams

import graph
from deployments.imageio.nifti import write_nifti
from deployments.nnunet.components import COMPONENTS
from scangraph.accounts_cli import local_token
from scangraph.cluster import local_service
from scangraph.contracts import LabelMap, Volume
from scangraph.handles import APPLICATION
from scangraph.settings import load_settings
from scangraph.stage import Report, Stage, StepOutput

TILES, TILE_SECONDS = 12, 0.5
#: (seconds, seconds between two CTs)
LOAD = ((24, 8.0), (48, 2.0), (32, 8.0))
_GRID = (16, 16, 16)


class Elsewhere(Stage):
    """The segmentation stage, as if its network ran on the GPU of a machine of its own."""

    def __init__(self, *_: Any) -> None:
        def segment(inputs: Mapping[str, Any], _: Any, report: Report) -> StepOutput:
            for tile in range(TILES):
                report(tile, TILES, "tiles")
                time.sleep(TILE_SECONDS)  # the work: replicas on one machine would take each other's processors
            image = inputs["image"]
            array = np.full(image.array.shape, 2, np.uint8)
            mask = LabelMap(array, image.spacing_mm, image.origin_mm, image.direction, (2,))
            return StepOutput((mask,), (), {"tiles": TILES})

        super().__init__(dict.fromkeys(COMPONENTS, segment))


@contextlib.contextmanager
def nodes(number: int) -> Iterator[None]:
    """Join nodes with one GPU each to the Ray of this process."""
    address = ray.get_runtime_context().gcs_address
    joined = []
    try:
        for _ in range(number):
            wanted = RayParams(
                gcs_address=address,
                num_cpus=0,
                num_gpus=1,
                object_store_memory=100 * 2**20,
                min_worker_port=0,
                max_worker_port=0,
                node_manager_port=0,
                dashboard_agent_listen_port=None,
            )
            joined.append(Node(wanted, head=False, shutdown_at_exit=True, spawn_reaper=False))
        yield
    finally:
        for node in joined:
            node.kill_all_processes(check_alive=False, allow_graceful=True)


@dataclass(frozen=True)
class Seen:
    """One CT: seconds since the beginning."""

    posted: float
    begun: float
    ended: float


class Replicas(threading.Thread):
    """Counts the stage's replicas: (seconds, running, starting)."""

    def __init__(self, begin: float) -> None:
        super().__init__(daemon=True)
        self.begin, self.counts, self.over = begin, [(0.0, 0, 0)], threading.Event()

    def run(self) -> None:
        """Count until it is over."""
        while not self.over.wait(0.5):
            states = serve.status().applications[APPLICATION].deployments["nnunet"].replica_states
            told = {str(getattr(state, "value", state)): number for state, number in states.items()}
            self.counts.append((time.time() - self.begin, told.get("RUNNING", 0), told.get("STARTING", 0)))


def send(client: httpx.Client, begin: float) -> list[str]:
    """Post CTs as the load says."""
    ids: list[str] = []
    at = limit = 0.0
    for seconds, pause in LOAD:
        limit += seconds
        while at < limit:
            time.sleep(max(begin + at - time.time(), 0))  # CTs come by the clock
            body = {"pipeline_id": "inference-totalseg", "inputs": {"image": f"ct-{len(ids)}.nii.gz"}}
            answer = client.post("/v1/executions", json=body)
            answer.raise_for_status()
            ids.append(str(answer.json()["execution_id"]))
            at += pause
    return ids


def ended(client: httpx.Client, execution_id: str, begin: float) -> Seen:
    """Wait for an execution, and tell when it was what."""
    while (record := client.get(f"/v1/executions/{execution_id}").json())["status"] in {"pending", "running"}:
        time.sleep(0.5)
    if record["status"] != "completed":
        raise RuntimeError(f"{execution_id}: {record['error']}")
    created, completed = (datetime.fromisoformat(record[key]).timestamp() - begin for key in ("created_at", "completed_at"))
    return Seen(created, completed - TILES * TILE_SECONDS, completed)


def draw(path: Path, cts: list[Seen], counts: list[tuple[float, int, int]]) -> None:
    """Draw the three curves."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    seconds = [at for at, _, _ in counts]
    figure, (queue, replicas, waits) = plt.subplots(3, sharex=True, figsize=(8, 7), dpi=90, layout="constrained")
    queue.fill_between(seconds, [sum(c.posted <= at < c.ended for c in cts) for at in seconds], step="post", label="at work")
    queue.fill_between(
        seconds,
        [sum(c.posted <= at < c.begun for c in cts) for at in seconds],
        step="post",
        label="waiting",
        color="tab:orange",
    )
    queue.plot([c.posted for c in cts], [0] * len(cts), "k|", label="a CT comes")
    replicas.step(seconds, [running + starting for _, running, starting in counts], where="post", ls=":", label="with starting")
    replicas.step(seconds, [running for _, running, _ in counts], where="post", label="running")
    waits.stem([c.posted for c in cts], [max(c.begun - c.posted, 0) for c in cts], basefmt=" ")
    for axis, label in ((queue, "CTs"), (replicas, "replicas"), (waits, "waiting, s")):
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
        if axis is not waits:
            axis.legend(loc="upper right")
    waits.set_xlabel("seconds")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--picture", type=Path, default=Path("docs/autoscaling.png"))
    arguments = parser.parse_args()
    os.environ["RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S"] = "2"  # Serve's 10 s are for loads of hours
    vars(graph)["Nnunet"] = Elsewhere
    number = sum(int(seconds / pause) + 1 for seconds, pause in LOAD)
    with tempfile.TemporaryDirectory(prefix="scangraph-scaling-", ignore_cleanup_errors=True) as folder:
        none: dict[str, Any] = {"min_replicas": 0}
        settings = load_settings(
            data=Path(folder),
            port=0,
            cpus=2,
            object_store_mb=256,
            executor={"max_running": 64, "kept_results_bytes": 0},
            nnunet={
                **none,
                "num_cpus": 0,
                "num_gpus": 1,
                "max_replicas": arguments.nodes,
                "work_seconds": 12,
                "upscale_seconds": 2,
                "downscale_seconds": 10,
            },
            smoothing=none,
            postprocess=none,
            imaging=none,
            grpc={"enabled": False},
        )
        settings.storage_root.mkdir(parents=True)
        for n in range(number):
            image = Volume(np.full(_GRID, n, np.int16), (1.0, 1.0, 1.0))
            (settings.storage_root / f"ct-{n}.nii.gz").write_bytes(write_nifti(image))
        with local_service(settings) as service, nodes(arguments.nodes):
            headers = {"Authorization": f"Bearer {local_token(settings, minutes=60)}"}
            with httpx.Client(base_url=service.url, headers=headers, timeout=60) as client:
                begin = time.time()
                replicas = Replicas(begin)
                replicas.start()
                ids = send(client, begin)
                cts = [ended(client, execution_id, begin) for execution_id in ids]
                over = time.time() + 60
                while time.time() < over and replicas.counts[-1][1]:
                    time.sleep(0.5)
                time.sleep(2)  # so that the picture shows that they are gone
                replicas.over.set()
                replicas.join()
    draw(arguments.picture, cts, replicas.counts)
    waits = [max(c.begun - c.posted, 0) for c in cts]
    alone = 0.0
    free = 0.0  # the same load before one replica that is always there
    for c in cts:
        free = max(free, c.posted) + TILES * TILE_SECONDS
        alone = max(alone, free - c.posted - TILES * TILE_SECONDS)
    last = next((at for at, running, starting in reversed(replicas.counts) if running + starting), 0.0)
    print(f"CTs {len(cts)}, each {TILES} tiles of {TILE_SECONDS} s")
    print(
        f"the first (no replica yet) waited {waits[0]:.1f} s; median {statistics.median(waits):.1f}, longest {max(waits):.1f} s"
    )
    print(f"most waiting at once {max(sum(c.posted <= at < c.begun for c in cts) for at, _, _ in replicas.counts)}")
    print(f"most replicas {max(running for _, running, _ in replicas.counts)}; one replica alone: longest wait {alone:.1f} s")
    print(f"last CT ended at {max(c.ended for c in cts):.0f} s, last replica was gone at {last:.0f} s")
    print(f"picture: {arguments.picture}, {arguments.picture.stat().st_size // 1000} kB")


if __name__ == "__main__":
    main()
