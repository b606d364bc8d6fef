"""What survives: 20 executions run and wait while processes are killed with SIGKILL.

    python -m benchmarks.faults [--executions 20] [quiet nnunet executor gateway everything]

Each scenario starts a service of its own on an empty data folder, submits the same executions through the gateway, kills while
they run, and compares the outputs' hashes with the quiet run's. Prints one line a scenario; exits 1 if anything was lost.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.service import ServiceProcess
from deployments.imageio.nifti import write_nifti
from scangraph.phantoms import make_phantom

SCENARIOS = ("quiet", "nnunet", "executor", "gateway", "everything")
TERMINAL = {"completed", "failed", "cancelled"}


def requests(number: int) -> list[dict[str, Any]]:
    """Make executions that differ in a parameter each, so that none has another's result."""
    return [
        {
            "pipeline_id": "organs",
            "inputs": {"image": "ct.nii.gz"},
            "parameters": {"step_size": round(1.0 - 0.002 * n, 3)},
            "priority": ("high", "normal", "low")[n % 3],
        }
        for n in range(number)
    ]


async def submit(service: ServiceProcess, body: dict[str, Any], key: str) -> str:
    """Post until it is accepted, as a client does: the key makes that safe."""
    while True:
        try:
            async with httpx.AsyncClient(base_url=service.url, timeout=30) as client:
                headers = {"Authorization": f"Bearer {service.token()}", "Idempotency-Key": key}
                answer = await client.post("/v1/executions", json=body, headers=headers)
            if answer.status_code == 202:
                return str(answer.json()["execution_id"])
            if answer.status_code < 500 and answer.status_code != 429:
                raise RuntimeError(answer.text)
        except httpx.TransportError:
            pass
        await asyncio.sleep(0.5)


async def look(service: ServiceProcess, execution_id: str) -> dict[str, Any] | None:
    """Get an execution, or None while nobody answers."""
    try:
        async with httpx.AsyncClient(base_url=service.url, timeout=10) as client:
            headers = {"Authorization": f"Bearer {service.token()}"}
            answer = await client.get(f"/v1/executions/{execution_id}", headers=headers)
    except httpx.TransportError:
        return None
    return answer.json() if answer.status_code == 200 else None


async def scenario(name: str, number: int, image: bytes) -> dict[str, Any]:
    """Run one, and return what came of it."""
    with tempfile.TemporaryDirectory(prefix="scangraph-faults-") as folder:
        data = Path(folder)
        (data / "storage").mkdir()
        (data / "storage" / "ct.nii.gz").write_bytes(image)
        service = ServiceProcess(data)
        service.start()
        try:
            return await _scenario(name, number, service)
        finally:
            service.stop()


async def _scenario(name: str, number: int, service: ServiceProcess) -> dict[str, Any]:
    start = time.monotonic()
    bodies = requests(number)
    ids = await asyncio.gather(*(submit(service, body, f"key-{n}") for n, body in enumerate(bodies)))
    kills = 0
    ended: dict[str, dict[str, Any]] = {}
    again: Counter[str] = Counter()
    while len(ended) < number:
        await asyncio.sleep(0.5)
        for execution_id in ids:
            if execution_id in ended:
                continue
            found = await look(service, execution_id)
            if found and found["status"] in TERMINAL:
                ended[execution_id] = found
        if name != "quiet" and kills < 3 and len(ended) > kills * number // 4:
            kills += 1
            if name == "everything":
                service.kill_everything()
                service.start()
            else:
                for process in service.processes(name):
                    process.kill()
        if time.monotonic() - start > 1800:
            break
    # Later, nothing has changed: what had ended has ended once.
    for n, execution_id in enumerate(ids):
        assert await submit(service, bodies[n], f"key-{n}") == execution_id
        found = await look(service, execution_id)
        if found and execution_id in ended and found != ended[execution_id]:
            again[execution_id] += 1
    hashes = []
    for execution_id in ids:
        files = ended.get(execution_id, {}).get("output_files", [])
        hashes.append({f["filename"]: f["sha256"] for f in files if f["name"] != "manifest"})
        for file in files:
            async with httpx.AsyncClient(base_url=service.url, timeout=30) as client:
                answer = await client.get(file["download_url"], headers={"Authorization": f"Bearer {service.token()}"})
            assert answer.status_code == 200
            assert len(answer.content) == file["size"]
    return {
        "scenario": name,
        "kills": kills,
        "states": dict(Counter(found["status"] for found in ended.values())),
        "changed after their end": sum(again.values()),
        "attempts": max((step["attempts"] for found in ended.values() for step in found["steps"]), default=0),
        "seconds": round(time.monotonic() - start, 1),
        "hashes": hashes,
        "errors": [found["error"] for found in ended.values() if found["error"]],
    }


def main() -> int:
    """Run the scenarios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--executions", type=int, default=20)
    parser.add_argument("scenarios", nargs="*", help=f"of {', '.join(SCENARIOS)}; default: all")
    arguments = parser.parse_args()
    phantom = make_phantom(4242, spacing_mm=(6.0, 5.0, 5.0))
    image = write_nifti(phantom.volumes["portal"])
    wanted = list(dict.fromkeys(["quiet", *(arguments.scenarios or SCENARIOS)]))
    quiet: Any = None
    good = True
    for name in wanted:
        result = asyncio.run(scenario(name, arguments.executions, image))
        hashes = result.pop("hashes")
        quiet = hashes if name == "quiet" else quiet
        result["outputs equal the quiet run's"] = hashes == quiet
        fine = result["states"] == {"completed": arguments.executions} and hashes == quiet
        good &= fine and not result["changed after their end"]
        print(json.dumps(result), flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    psutil.Process()  # fails early where psutil is missing
    sys.exit(main())
