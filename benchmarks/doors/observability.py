"""What it costs to be seen: numbers, spans and log lines, for each small execution.

    python -m benchmarks.doors.observability [--executions 60] [--rounds 3]

1. One call of each kind, in a loop, in a process of a Ray.
2. Small executions one after the other (`postprocess-merge` of 12³ voxels, each another one, `Prefer: wait`), on three services
   side by side that take turns: without spans, with spans to a collector on this machine, and to a collector that is not there.
3. `GET /metrics` on a service whose records hold many executions.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from sqlalchemy import text

from benchmarks.service import ServiceProcess
from deployments.imageio.nifti import write_nifti
from scangraph.cluster import free_port
from scangraph.contracts import LabelMap
from scangraph.store import open_store
from tests.observability.collector import Collector

_SETTINGS = {"SCANGRAPH_CPUS": "2", "SCANGRAPH_OBJECT_STORE_MB": "256"}


def microseconds(call: Callable[[], Any], times: int = 20_000) -> float:
    start = time.perf_counter()
    for _ in range(times):
        call()
    return 1e6 * (time.perf_counter() - start) / times


def single_calls() -> None:
    import ray

    from scangraph import metrics, tracing
    from scangraph.settings import TracingSettings

    def spans() -> dict[str, float]:
        def inside() -> None:
            with tracing.span("x"):
                pass

        with tracing.entering("http", "x"):
            return {"span": microseconds(inside), "here": microseconds(tracing.here)}

    off = spans()
    dropped = microseconds(lambda: metrics.LOST.add(deployment="x"))
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(Exception):
        ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, _temp_dir=folder)
    counter = microseconds(lambda: metrics.LOST.add(deployment="x"))
    histogram = microseconds(lambda: metrics.WAITED.observe(1.5, priority="x"))
    ray.shutdown()
    collector = Collector()
    tracing.configure(TracingSettings(endpoint=f"http://127.0.0.1:{collector.port}"), "benchmark")
    on = spans()
    collector.close()
    print(f"counter {counter:.1f} µs, histogram {histogram:.1f} µs, without Ray {dropped:.2f} µs")
    print(f"span: off {off['span']:.2f} µs, on {on['span']:.1f} µs; traceparent {on['here']:.1f} µs")


def small_execution(service: ServiceProcess, client: httpx.Client, number: int) -> float:
    body = {
        "pipeline_id": "postprocess-merge",
        "inputs": {"masks": ["m.nii.gz"]},
        "parameters": {"structures": [2, 5 + number]},
    }
    start = time.perf_counter()
    answer = client.post(f"{service.url}/v1/executions", json=body, headers={"Prefer": "wait=60"})
    assert answer.json().get("status") == "completed", answer.text
    return time.perf_counter() - start


def executions(number: int, rounds: int) -> None:
    collector, away = Collector(), free_port("127.0.0.1")
    ways = {"no spans": "", "spans": f"http://127.0.0.1:{collector.port}", "collector away": f"http://127.0.0.1:{away}"}
    array = np.zeros((12, 12, 12), np.uint8)
    array[3:9, 3:9, 3:9] = 2
    mask = write_nifti(LabelMap(array, (2.0, 2.0, 2.0), labels=(2,)))
    with contextlib.ExitStack() as stack:
        services: dict[str, tuple[ServiceProcess, httpx.Client]] = {}
        for way, endpoint in ways.items():
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            service = ServiceProcess(folder, {**_SETTINGS, "SCANGRAPH_TRACING__ENDPOINT": endpoint})
            stack.callback(service.stop)
            service.start(300)
            service.settle()
            (folder / "storage" / "m.nii.gz").write_bytes(mask)
            client = stack.enter_context(httpx.Client(timeout=90, headers={"Authorization": f"Bearer {service.token()}"}))
            services[way] = service, client
            small_execution(service, client, 0)
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        done = 0
        for _ in range(rounds):
            for way, (service, client) in services.items():
                for n in range(number // rounds):
                    seconds[way].append(small_execution(service, client, 1 + done + n))
            done += number // rounds
        for way, found in seconds.items():
            median, slow = 1000 * statistics.median(found), 1000 * statistics.quantiles(found, n=20)[-1]
            print(f"{way:15} {len(found)} executions: median {median:.1f} ms, 95 % {slow:.1f} ms")
        print(f"{len(collector.spans()) / (number + 1):.1f} spans an execution arrived")
        service, client = services["no spans"]
        pages(service, client)
    collector.close()


def pages(service: ServiceProcess, client: httpx.Client) -> None:
    for rows in (0, 100_000):
        asyncio.run(fill(service, rows))
        found = []
        for _ in range(20):
            start = time.perf_counter()
            answer = client.get(f"{service.url}/metrics")
            found.append(time.perf_counter() - start)
        size = len(answer.content) / 1024
        print(f"GET /metrics, {rows} more executions: median {1000 * statistics.median(found):.0f} ms, {size:.0f} KiB")


async def fill(service: ServiceProcess, rows: int) -> None:
    """Copy an execution that has ended."""
    store = await open_store(f"sqlite:///{service.data}/scangraph.db")
    async with store.write() as session:
        names = [row[1] for row in (await session.execute(text("PRAGMA table_info(executions)"))).all()]
        others = ", ".join(name for name in names if name != "id")
        numbers = f"WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {rows})"
        one = f"(SELECT {others} FROM executions LIMIT 1)"
        if rows:
            await session.execute(
                text(f"INSERT INTO executions (id, {others}) {numbers} SELECT 'copy-' || i, o.* FROM n, {one} o")
            )
    await store.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--executions", type=int, default=60, help="on each service")
    parser.add_argument("--rounds", type=int, default=3, help="turns that each service gets")
    arguments = parser.parse_args()
    single_calls()
    executions(arguments.executions, arguments.rounds)


if __name__ == "__main__":
    main()
