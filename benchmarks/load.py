"""1000 small executions at once, and what the gateway costs.

    python -m benchmarks.load [--executions 1000]

1. Posts them as fast as the gateway takes them; latency of each POST; until all have ended; memory of gateway, executor and
   proxy before, when all are queued and after.
2. `GET /v1/executions/{id}`: throughput and latency with 1 and 16 connections, beside a bare FastAPI application that returns
   the same JSON under uvicorn on the same machine, one after the other in one run.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from benchmarks.service import ServiceProcess
from deployments.imageio.nifti import write_nifti
from scangraph.cluster import free_port
from scangraph.contracts import LabelMap

CONTROL = ("gateway", "executor", "proxy")


def percentile(values: list[float], part: float) -> float:
    """Return a percentile of seconds, in milliseconds."""
    return round(1000 * sorted(values)[min(int(part * len(values)), len(values) - 1)], 1)


async def flood(service: ServiceProcess, number: int, in_flight: int) -> dict[str, Any]:
    """Post them all, and wait until all have ended."""
    headers = {"Authorization": f"Bearer {service.token()}"}
    latencies: list[float] = []
    statuses: Counter[int] = Counter()
    gate = asyncio.Semaphore(in_flight)
    async with httpx.AsyncClient(base_url=service.url, headers=headers, timeout=60) as client:

        async def post(n: int) -> str:
            body = {
                "pipeline_id": "postprocess-merge",
                "inputs": {"masks": ["mask.nii.gz"]},
                "parameters": {"structures": [2, 5 + n]},
            }
            async with gate:
                start = time.perf_counter()
                answer = await client.post("/v1/executions", json=body)
                latencies.append(time.perf_counter() - start)
            statuses[answer.status_code] += 1
            return str(answer.json()["execution_id"])

        before = {name: service.memory_mb(name) for name in CONTROL}
        start = time.perf_counter()
        ids = await asyncio.gather(*(post(n) for n in range(number)))
        posted = time.perf_counter() - start
        queued = {name: service.memory_mb(name) for name in CONTROL}
        states: Counter[str] = Counter()
        while sum(states[s] for s in ("completed", "failed", "cancelled")) < number:
            await asyncio.sleep(2)
            states = Counter()
            cursor = None
            while True:
                page = (
                    await client.get("/v1/executions", params={"limit": 200, **({"cursor": cursor} if cursor else {})})
                ).json()
                states.update(item["status"] for item in page["items"])
                cursor = page.get("next_cursor")
                if not cursor:
                    break
        seconds = time.perf_counter() - start
        after = {name: service.memory_mb(name) for name in CONTROL}
    return {
        "executions": number,
        "in flight": in_flight,
        "answers": dict(statuses),
        "distinct": len(set(ids)),
        "posted in s": round(posted, 1),
        "POST ms p50/p99/max": [percentile(latencies, 0.5), percentile(latencies, 0.99), percentile(latencies, 1)],
        "ended": dict(states),
        "all ended after s": round(seconds, 1),
        "MB before": before,
        "MB when all were posted": queued,
        "MB after": after,
        "id": ids[-1],
    }


def bare(port: int, body: dict[str, Any]) -> None:
    """Serve a fixed answer."""
    import uvicorn
    from fastapi import FastAPI

    app = FastAPI()

    @app.get("/v1/executions/{execution_id}")
    async def get(execution_id: str) -> dict[str, Any]:
        return {**body, "execution_id": execution_id}

    uvicorn.run(app, port=port, log_level="error", access_log=False)


async def hammer(url: str, headers: dict[str, str], connections: int, seconds: float) -> dict[str, float]:
    """Get again and again."""
    latencies: list[float] = []
    end = time.perf_counter() + seconds

    async def one() -> None:
        async with httpx.AsyncClient(headers=headers, timeout=30) as client:
            while time.perf_counter() < end:
                start = time.perf_counter()
                answer = await client.get(url)
                assert answer.status_code == 200, answer.text
                latencies.append(time.perf_counter() - start)

    await asyncio.gather(*(one() for _ in range(connections)))
    return {
        "requests/s": round(len(latencies) / seconds, 1),
        "ms mean": round(1000 * statistics.fmean(latencies), 2),
        "ms p99": percentile(latencies, 0.99),
    }


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--executions", type=int, default=1000)
    parser.add_argument("--in-flight", type=int, default=16, help="requests at a time")
    parser.add_argument("--seconds", type=float, default=8)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="scangraph-load-") as folder:
        data = Path(folder)
        (data / "storage").mkdir()
        array = np.zeros((4, 8, 8), np.uint8)
        array[1:3, 2:6, 2:6] = 2
        (data / "storage" / "mask.nii.gz").write_bytes(write_nifti(LabelMap(array, (1, 1, 1), labels=(2,))))
        service = ServiceProcess(data)
        service.start()
        port = free_port("127.0.0.1")
        peer: Any = None
        try:
            result = asyncio.run(flood(service, arguments.executions, arguments.in_flight))
            print(result, flush=True)
            headers = {"Authorization": f"Bearer {service.token()}"}
            url = f"/v1/executions/{result['id']}"
            body = httpx.get(service.url + url, headers=headers).json()
            peer = multiprocessing.get_context("spawn").Process(target=bare, args=(port, body), daemon=True)
            peer.start()
            time.sleep(3)
            for connections in (1, 16):
                for name, base in (("bare FastAPI", f"http://127.0.0.1:{port}"), ("scangraph", service.url)):
                    print(
                        name, connections, asyncio.run(hammer(base + url, headers, connections, arguments.seconds)), flush=True
                    )
        finally:
            if peer is not None:
                peer.terminate()
            service.stop()


if __name__ == "__main__":
    main()
