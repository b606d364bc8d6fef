"""What an execution of three quick steps costs in the records, without Ray: `python -m benchmarks.records [COUNT] [URL]`."""

from __future__ import annotations

import asyncio
import resource
import statistics
import sys
import tempfile
import time
import uuid
from collections import defaultdict
from collections.abc import Awaitable
from typing import Any, TypeVar

from sqlalchemy import event

from scangraph.contracts import StepSummary
from scangraph.contracts.pipelines import PipelineSpec
from scangraph.store import executions, open_store
from scangraph.store.executions import Change, NewExecution, NewFile, QueueLimits, StepFinished, StepStarted
from scangraph.store.files import NewFile as Upload
from scangraph.store.files import add_files, get_file
from scangraph.store.pipelines import create_pipeline

T = TypeVar("T")
STEPS = ("resize", "ai", "output")
SPEC = PipelineSpec.model_validate(
    {
        "name": "three-quick-steps",
        "inputs": {"image": {"kind": "image2d"}},
        "steps": [
            {"id": "resize", "component": "image/resize", "inputs": {"image": "input.image"}},
            {"id": "ai", "component": "image/detect", "inputs": {"image": "resize.image"}},
            {"id": "output", "component": "image/convert", "inputs": {"image": "ai.image"}},
        ],
        "outputs": {"image": "output.image"},
    }
)


class Times:
    """Seconds and statements by what was done."""

    def __init__(self, engine: Any) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.statements: dict[str, list[int]] = defaultdict(list)
        self._count = 0
        event.listen(engine, "before_cursor_execute", self._counted)

    def _counted(self, *_: Any) -> None:
        self._count += 1

    async def of(self, name: str, work: Awaitable[T]) -> T:
        """Do it."""
        begun, before = time.perf_counter(), self._count
        result = await work
        self.seconds[name].append(time.perf_counter() - begun)
        self.statements[name].append(self._count - before)
        return result


async def measure(count: int, url: str) -> None:
    """Take executions through all their states and print the medians."""
    store = await open_store(url)
    times, pipeline = Times(store.engine.sync_engine), await create_pipeline(store, SPEC, None)
    versions = {step.component: "1" for step in SPEC.steps}
    for _ in range(count):
        file_id = str(uuid.uuid4())
        upload = Upload(file_id, None, "x.jpg", f"files/{file_id}/x.jpg", "image2d", "image/jpeg", 10, "ab" * 32, {"width": 1})
        await times.of("keep the file", add_files(store, [upload]))
        await times.of("look it up", get_file(store, file_id))
        inputs = {"image": {"file_id": file_id, "path": upload.storage_name, "sha256": upload.sha256}}
        new = NewExecution(None, pipeline.id, 1, SPEC, inputs, {step: {} for step in STEPS}, versions)
        execution_id, _ = await times.of("accept", executions.accept(store, new, QueueLimits(1000, 1000, 60)))
        claim = await times.of("claim", executions.claim(store, "benchmark", 60))
        assert claim is not None
        changes: list[Change] = []
        for step in STEPS:
            changes += [StepStarted(step), StepFinished(step, StepSummary(0.1, 1.0, (), {}), 1, "k" * 64, cached=False)]
        await times.of("write down steps", executions.write_down(store, claim, changes))
        result = NewFile("image", f"results/{execution_id}/i.jpg", "i.jpg", "image2d", "image/jpeg", 3, "cd" * 32)
        await times.of("complete", executions.complete(store, claim, [result], None))
        await times.of("read its events", executions.events_since(store, {execution_id: 0}))
        await times.of("load it", executions.load(store, execution_id))
    await store.close()
    for name, seconds in times.seconds.items():
        print(
            f"{name:18} {1000 * statistics.median(seconds):5.2f} ms, {statistics.median(times.statements[name]):.0f} statements"
        )


def main() -> None:
    """Measure and print."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    with tempfile.TemporaryDirectory() as folder:
        before = resource.getrusage(resource.RUSAGE_SELF)
        asyncio.run(measure(count, sys.argv[2] if len(sys.argv) > 2 else f"sqlite:///{folder}/records.db"))
        after = resource.getrusage(resource.RUSAGE_SELF)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"processor time for an execution: {1000 * spent / count:.1f} ms")


if __name__ == "__main__":
    main()
