"""What every stage's deployment does alike: take references, work in a thread, tell progress, hand back results.

A stage subclasses `Stage` and names one function per component. The protocol of `Stage.run`, a stream of items:
`Progress` any number of times (none where it is done at once), one `StepSummary`, then the outputs in the order of the
component's ports, each an item and so an object of its own in the object store, owned by the caller.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Event
from typing import Any

import psutil

from scangraph import logs
from scangraph.contracts import WAITING, Component, Progress, StepSummary
from scangraph.contracts.errors import OutOfMemory, ScanGraphError, StageFailed, StageUnavailable, UnknownComponent

log = logging.getLogger("scangraph")

#: How often what the process uses is said.
_USAGE_SECONDS = 1.0
#: What takes less is told nothing of: each item is an object of Ray's, and two of them take as long as resizing a picture.
_QUIET_SECONDS = 0.05
#: Called by an operation as `report(done, total, message)`; raises `StepCancelled` when nobody waits for the result any more.
Report = Callable[[int, int, str], None]


class StepCancelled(Exception):
    """The caller has left; stop working."""


@dataclass(frozen=True)
class StepOutput:
    """What an operation returns: its outputs in port order, and what is to be said about them."""

    outputs: tuple[Any, ...]
    warnings: tuple[str, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)


Operation = Callable[[Mapping[str, Any], Any, Report], StepOutput]


class Stage:
    """Base of the stages' deployments.

    Parameters
    ----------
    operations : mapping
        Component -> function (inputs by port, validated parameters, report) -> StepOutput.

    Notes
    -----
    One thread works at a time: models and VTK are not to be run twice at once in one process, and two predictions side by side
    on one CPU are slower than one after the other. Waiting callers are told that they wait.
    """

    def __init__(self, operations: Mapping[Component, Operation]) -> None:
        logs.configure()
        self._operations = {component.id: (component, function) for component, function in operations.items()}
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="step")
        self._working: dict[str, Event] = {}
        self._process = psutil.Process()
        self._process.cpu_percent()  # the first call only starts the count

    async def identity(self, component_id: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """Return what, besides version, parameters and inputs, decides a component's result; a stage with models says more."""
        self.operation(component_id)
        del parameters
        return {}

    async def warm(self) -> list[str]:
        """Return the SHA-256 of the models that this replica holds in memory; a stage without models has none."""
        return []

    def operation(self, component_id: str) -> tuple[Component, Operation]:
        """Return a component and its function; a stage whose components come and go says here which there are.

        Raises
        ------
        UnknownComponent
        """
        if component_id not in self._operations:
            raise UnknownComponent(component=component_id, known=", ".join(self._operations))
        return self._operations[component_id]

    async def ready(self) -> bool:
        """Answer: the stage is up."""
        return True

    async def run(
        self,
        component_id: str,
        inputs: Mapping[str, Any],
        parameters: Mapping[str, Any],
        execution_id: str,
        trace: str | None = None,
    ) -> AsyncIterator[Any]:
        """Run one component.

        Parameters
        ----------
        component_id : str
            Which one.
        inputs : mapping
            ObjectRef (or a list of them) by port.
        parameters : mapping
            Plain values; validated again here, because the caller may be anybody with a handle.
        execution_id : str
            For the log, and to know the same work when it comes again: who asks anew has lost the first answer (its executor
            died), so the first is stopped.
        trace : str, optional
            The caller's `traceparent`, for the log.

        Yields
        ------
        Progress unless it is quick, then StepSummary, then the outputs
        """
        component, function = self.operation(component_id)
        model = component.parameters.model_validate(dict(parameters))
        values = {port: await _fetch(ref) for port, ref in inputs.items()}

        loop, gone = asyncio.get_running_loop(), Event()
        if execution_id in self._working:
            self._working[execution_id].set()
        self._working[execution_id] = gone
        told = 0.0
        news: asyncio.Queue[Progress | None] = asyncio.Queue()

        def report(done: int, total: int, message: str = "") -> None:
            if gone.is_set():
                raise StepCancelled
            loop.call_soon_threadsafe(news.put_nowait, Progress(done, total, message))

        def work() -> tuple[StepOutput, float, float]:
            report(0, 0, "running")
            with logs.about(execution_id, trace), _watch_memory() as peak:
                start = time.perf_counter()
                output = function(values, model, report)
                return output, time.perf_counter() - start, peak()

        job = loop.run_in_executor(self._thread, work)
        job.add_done_callback(lambda _: news.put_nowait(None))
        job.add_done_callback(_look_at)
        try:
            await asyncio.wait([job], timeout=_QUIET_SECONDS)
            if news.empty():
                yield Progress(0, 0, WAITING)
            while (item := await _newest(news)) is not None:
                if time.monotonic() - told >= _USAGE_SECONDS:
                    told = time.monotonic()
                    item = replace(item, resources=self._usage())
                yield item
            output, seconds, peak_mb = await job
        except (asyncio.CancelledError, GeneratorExit):
            gone.set()
            raise
        except StepCancelled:
            raise StageUnavailable(deployment=component.deployment, reason="the same work was asked for again") from None
        except ScanGraphError:
            raise
        except MemoryError:
            shape = next((v.shape for v in values.values() if hasattr(v, "shape")), ())
            raise OutOfMemory(component=component_id, device="main", shape="×".join(map(str, shape))) from None
        except Exception as error:  # the process boundary: nothing unforeseen may leave as a pickled foreign class
            with logs.about(execution_id, trace):
                log.exception("execution %s: %s failed", execution_id, component_id)
            raise StageFailed(component=component_id, error=type(error).__name__, execution_id=execution_id) from None
        finally:
            if self._working.get(execution_id) is gone:
                del self._working[execution_id]
        yield StepSummary(round(seconds, 3), round(peak_mb, 1), output.warnings, output.facts)
        for value in output.outputs:
            yield value

    def _usage(self) -> dict[str, float]:
        """Return what this process uses."""
        return {"cpu_percent": self._process.cpu_percent(), "rss_mb": round(self._process.memory_info().rss / 2**20, 1)}


def _look_at(job: asyncio.Future[Any]) -> None:
    """Take note of how it ended: when nobody listens any more, that it was stopped is no news for the log."""
    if not job.cancelled():
        job.exception()


async def _fetch(ref: Any) -> Any:
    return [await item for item in ref] if isinstance(ref, list | tuple) else await ref


async def _newest(news: asyncio.Queue[Progress | None]) -> Progress | None:
    """Wait for news and skip what is outdated: a slow listener must not pile up a queue."""
    item = await news.get()
    while item is not None and not news.empty():
        item = news.get_nowait()
    return item


@contextlib.contextmanager
def _watch_memory() -> Any:
    """Give a function that returns this process's highest resident memory (MB) since entering, 0 where Linux does not say."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def peak() -> float:
        with contextlib.suppress(OSError, StopIteration):
            line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
            return float(line.split()[1]) / 1024
        return 0.0

    with contextlib.suppress(OSError):
        reset.write_text("5")  # proc(5): resets VmHWM
    yield peak
