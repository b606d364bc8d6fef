"""A volume through two stages: by reference, by value, and by writing and reading `.nii.gz`: `python -m benchmarks.hops`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import ray
from ray import serve

from deployments.imageio.nifti import read_nifti, write_nifti
from scangraph.contracts import Volume

RUNS = 5


@serve.deployment(name="touch", ray_actor_options={"num_cpus": 0})
class Touch:
    """A stage that looks at a volume and passes it on."""

    async def by_value(self, volume: Volume) -> float:
        """Take it as an argument."""
        return float(volume.array[0, 0, 0])

    async def by_reference(self, refs: list[Any]) -> float:
        """Take a reference and map it."""
        volume = await refs[0]
        return float(volume.array[0, 0, 0])

    async def from_file(self, data: bytes) -> bytes:
        """Decode a file and encode it again, as stages that speak in files do."""
        return write_nifti(read_nifti(data, "hop.nii.gz"))


def median_ms(work: Callable[[], Any], runs: int = RUNS) -> float:
    """Median of a few runs after one that is not counted."""
    work()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


def main() -> None:
    """Measure and print."""
    ray.init(address="local", include_dashboard=False, log_to_driver=False, object_store_memory=6 * 2**30)
    serve.start(logging_config={"log_level": "ERROR"})
    handle: Any = serve.run(Touch.bind(), name="hops", route_prefix=None)  # type: ignore[attr-defined]
    print(f"{'':6} {'put once':>9} {'by ref':>9} {'by value':>9} {'by file':>9}   milliseconds for two stages")
    for side in (64, 256, 512):
        rng = np.random.default_rng(0)
        volume = Volume(rng.integers(-100, 100, (side,) * 3, dtype=np.int16), (1, 1, 1))
        start = time.perf_counter()
        ref = ray.put(volume)
        put = 1000 * (time.perf_counter() - start)
        data = write_nifti(volume)

        def twice(call: Callable[[], Any]) -> Callable[[], None]:
            return lambda: (call(), call(), None)[-1]

        by_ref = median_ms(twice(lambda ref=ref: handle.by_reference.remote([ref]).result()))  # type: ignore[misc]
        by_value = median_ms(twice(lambda volume=volume: handle.by_value.remote(volume).result()), 3)  # type: ignore[misc]
        by_file = median_ms(twice(lambda data=data: handle.from_file.remote(data).result()), 1)  # type: ignore[misc]
        print(f"{side:4}³  {put:9.1f} {by_ref:9.1f} {by_value:9.1f} {by_file:9.1f}")
        del ref
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
