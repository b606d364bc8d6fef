"""Where calls go on two nodes, on real Ray: a program, since a process has one Ray and the tests' has its own."""

from __future__ import annotations

import asyncio
import secrets
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import ray
from prometheus_client.parser import text_string_to_metric_families
from ray import serve
from ray.serve.config import HTTPOptions, ProxyLocation
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from benchmarks.autoscaling import nodes
from deployments.gateway.deployment import node_pages
from scangraph.handles import TOKEN_FILE, use_token
from scangraph.routing import bytes_by_node

NEAR: Any = {"request_router_class": "scangraph.routing:NearTheData"}
QUICK: Any = {"_system_config": {"metrics_report_interval_ms": 1000}}
PLACED: Any = {"num_cpus": 0, "num_gpus": 1}


class Reader:
    """Says where it is, after a while if wanted."""

    async def read(self, inputs: dict[str, Any], seconds: float = 0) -> str:
        await asyncio.gather(*inputs.values())
        await asyncio.sleep(seconds)
        return str(ray.get_runtime_context().get_node_id())


@ray.remote(num_cpus=0)
def volumes(count: int) -> Any:
    """Make 8 MB each on the node where this runs."""
    return tuple(np.full(2**20, number, np.int64) for number in range(count))


def lying(place: str, count: int) -> Any:
    """Return references to volumes that lie on a node."""
    there = NodeAffinitySchedulingStrategy(place, soft=False)
    return volumes.options(scheduling_strategy=there, num_returns=count).remote(count)


async def check(handle: Any) -> None:
    """Each call goes to its data, unless the replica there has two already."""
    places = [node["NodeID"] for node in ray.nodes() if node["Resources"].get("GPU")]
    assert len(places) == 2
    made = [ref for pair in zip(*(lying(place, 6) for place in places), strict=True) for ref in pair]
    await asyncio.to_thread(ray.wait, made, num_returns=len(made), fetch_local=False)
    for number, ref in enumerate(made):
        there, total = bytes_by_node(["x", {"image": [ref]}])
        assert set(there) == {places[number % 2]}
        assert total > 2**23
    # One at a time, each goes to its data (by chance: once in 4096 runs).
    assert [await handle.read.remote({"image": ref}) for ref in made] == places * 6

    # Many at once with all their data on one node: the other one helps.
    mine = lying(places[0], 8)
    await asyncio.to_thread(ray.wait, mine, num_returns=len(mine), fetch_local=False)
    went = Counter(await asyncio.gather(*(handle.read.remote({"image": ref}, 2) for ref in mine)))
    assert went[places[0]] >= 2
    assert went[places[1]] >= 1

    # What was copied is counted.
    wanted = {"here": (len(made) + went[places[0]]) * total, "elsewhere": went[places[1]] * total}
    end = time.monotonic() + 60
    while (found := await counted()) != wanted:
        assert time.monotonic() < end, f"{found} were counted, not {wanted}"
        await asyncio.sleep(0.5)


async def counted() -> dict[str, float]:
    """Return the bytes of arguments by place, as the nodes' pages have them."""
    found: Counter[str] = Counter()
    for page in (await node_pages()).values():
        for family in text_string_to_metric_families(page or ""):
            for sample in family.samples:
                if sample.name.endswith("scangraph_argument_bytes_total"):
                    found[sample.labels["place"]] += int(sample.value)
    return dict(found)


def main() -> None:
    """Run it."""
    with warnings.catch_warnings(), tempfile.TemporaryDirectory(prefix="scangraph-", ignore_cleanup_errors=True) as short:
        warnings.simplefilter("ignore")  # Ray's own threads warn about Ray's own sockets
        (Path(short) / TOKEN_FILE).parent.mkdir()
        (Path(short) / TOKEN_FILE).write_text(secrets.token_hex(32))
        use_token(Path(short))
        ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, _temp_dir=short, **QUICK)
        try:
            with nodes(2):
                serve.start(http_options=HTTPOptions(location=ProxyLocation.Disabled))
                app = serve.deployment(num_replicas=2, ray_actor_options=PLACED, request_router_config=NEAR)(Reader).bind()
                asyncio.run(check(serve.run(app, name="near", route_prefix=None)))
                serve.delete("near")
        finally:
            ray.shutdown()


if __name__ == "__main__":
    main()
