"""One execution's way: its steps as soon as their inputs are there, each result once, the outputs at the end.

Only references and small values pass through here.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import weakref
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

from deployments.executor.stages import Stages
from scangraph.contracts import Component, Progress, StepSummary
from scangraph.contracts.errors import (
    DamagedResult,
    FileMissing,
    InvalidParameters,
    LeaseLost,
    ScanGraphError,
    StageFailed,
    StepTimedOut,
    StorageFull,
    StorageUnavailable,
    StoreUnavailable,
    UnknownComponent,
)
from scangraph.contracts.pipelines import INPUT, PipelineStep, needs
from scangraph.settings import Settings
from scangraph.storage import Storage
from scangraph.store import Store, executions, now
from scangraph.store.executions import Claim, NewFile
from scangraph.store.pipelines import find_revision
from scangraph.store.results import drop_result, find_result, keep_result
from scangraph.store.views import provenance

log = logging.getLogger("scangraph")

#: How often progress is written down, at most.
_FLUSH_SECONDS = 1.0
_READABLE = frozenset({"image", "mask"})


def result_key(
    component: Component, identity: Mapping[str, Any], parameters: Mapping[str, Any], inputs: Mapping[str, Any]
) -> str:
    """Hash all that makes a step's result.

    Parameters
    ----------
    identity : mapping
        What the stage adds: model id, version and checksum.
    parameters : mapping
        All of them, defaults filled in, so that naming a default makes no difference.
    inputs : mapping
        Port -> key of its content, or a list of them.
    """
    full = component.parameters.model_validate(dict(parameters)).model_dump(mode="json")
    made_of = [component.id, component.version, dict(identity), full, dict(inputs)]
    return hashlib.sha256(json.dumps(made_of, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


class HeldInputs:
    """References to decoded inputs, kept for the next execution on the same CT.

    Parameters
    ----------
    limit_bytes : int
        Decoded size that is held; the least recently used leave.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit, self._size = limit_bytes, 0
        self._held: OrderedDict[tuple[str, str, str | None], tuple[Any, int]] = OrderedDict()

    def get(self, key: tuple[str, str, str | None]) -> Any | None:
        """Return the reference, if it is held."""
        if key not in self._held:
            return None
        self._held.move_to_end(key)
        return self._held[key][0]

    def put(self, key: tuple[str, str, str | None], ref: Any, size: int) -> None:
        """Hold a reference; a size of 0 is unknown, and not held."""
        if key in self._held or not 0 < size <= self._limit:
            return
        self._held[key], self._size = (ref, size), self._size + size
        while self._size > self._limit:
            _, (_, gone) = self._held.popitem(last=False)
            self._size -= gone


@dataclass
class Tools:
    """What every execution of an executor shares."""

    settings: Settings
    store: Store
    storage: Storage
    stages: Stages
    components: Mapping[str, Component]
    held: HeldInputs
    # Two executions that need the same result: the second waits for the first, then finds it.
    locks: weakref.WeakValueDictionary[str, asyncio.Lock] = field(default_factory=weakref.WeakValueDictionary)

    def lock(self, key: str) -> asyncio.Lock:
        """Return the lock of a result."""
        found = self.locks.get(key)
        if found is None:
            found = self.locks[key] = asyncio.Lock()
        return found


class Value:
    """An input or output: its key is known at once, its reference is made when somebody needs it, and then only once."""

    def __init__(self, key: str, make: Callable[[], Awaitable[Any]]) -> None:
        self.key, self._make = key, make
        self._ref: asyncio.Future[Any] | None = None

    async def ref(self) -> Any:
        """Return the reference."""
        if self._ref is None:
            self._ref = asyncio.ensure_future(self._make())
        return await asyncio.shield(self._ref)

    async def drop(self) -> None:
        """Stop making it, if nobody needs it any more."""
        if self._ref is not None and not self._ref.done():
            self._ref.cancel()
            await asyncio.wait([self._ref])
        if self._ref is not None and not self._ref.cancelled():
            self._ref.exception()  # seen: an error in what nobody waits for is not worth a line in the log


class StepError(Exception):
    """A step's failure, with the step."""

    def __init__(self, step_id: str | None, error: ScanGraphError) -> None:
        super().__init__(step_id, error)
        self.step_id, self.error = step_id, error


class Runner:
    """Runs one claimed execution.

    Parameters
    ----------
    tools : Tools
        Shared.
    claim : Claim
        What to do, and the right to.
    """

    def __init__(self, tools: Tools, claim: Claim) -> None:
        self._tools, self._claim = tools, claim
        self._spec, self._steps = claim.spec, {step.id: step for step in claim.spec.steps}
        self._components: dict[str, Component] = {}
        self._news: dict[str, tuple[Progress, int]] = {}
        self._lost: dict[str, list[str]] = {}
        self._inputs: dict[str, Any] = {}
        self._outputs: dict[str, dict[str, Value]] = {}
        self._keeping: dict[str, asyncio.Task[None]] = {}
        self._written: list[str] = []

    async def run(self) -> None:
        """Work to the end and write it down. Cancelled by the scheduler, it stops the work and leaves the rest to that.

        Raises
        ------
        LeaseLost
            If somebody else has the execution now.
        StoreUnavailable
            If the records cannot be reached: the lease runs out, and the execution goes on elsewhere.
        """
        flush = asyncio.create_task(self._flush_progress())
        try:
            await self._finish(await self._work())
        except (LeaseLost, StoreUnavailable, asyncio.CancelledError):
            raise
        except StepError as failure:
            await self._fail(failure.error, failure.step_id)
        except ScanGraphError as error:
            await self._fail(error, None)
        except Exception as error:  # the process boundary: whatever it was, the execution ends and says so
            log.exception("execution %s failed", self._claim.execution_id)
            unforeseen = StageFailed(
                component=self._claim.pipeline, error=type(error).__name__, execution_id=self._claim.execution_id
            )
            await self._fail(unforeseen, None)
        finally:
            for task in (*self._keeping.values(), flush):
                task.cancel()
            await asyncio.gather(flush, *self._keeping.values(), return_exceptions=True)
            for value in self._all_values():
                await value.drop()

    async def _finish(self, files: list[NewFile]) -> None:
        """Complete the execution, whole.

        Race: the scheduler cancels this task while the transaction is on its way. Whether it took effect is then not known, so
        it is waited for, and what it says counts.
        """
        ending = asyncio.ensure_future(executions.complete(self._tools.store, self._claim, files, self._expiry()))
        try:
            completed = await asyncio.shield(ending)
        except asyncio.CancelledError:
            await asyncio.wait([ending])
            if ending.exception() is None and ending.result():
                return
            raise
        if not completed:
            await executions.end_cancelled(self._tools.store, self._claim)
            await self.remove_written()

    async def _fail(self, error: ScanGraphError, step_id: str | None) -> None:
        described = {"code": error.code, "status": error.status, "title": error.title, "detail": error.detail}
        if error.fields.get("errors"):
            described["errors"] = error.fields["errors"]
        await executions.fail(self._tools.store, self._claim, described, step_id)
        await self.remove_written()

    async def _work(self) -> list[NewFile]:
        # One look for the whole execution: a model that is removed meanwhile takes its component with it.
        for wanted in self._spec.steps:
            found = self._tools.components.get(wanted.component)
            if found is None:
                known = ", ".join(self._tools.components)
                raise StepError(wanted.id, UnknownComponent(component=wanted.component, known=known))
            self._components[wanted.id] = found
        await self._open_inputs()
        waits = needs(self._spec)
        tasks: dict[str, asyncio.Task[None]] = {}

        async def step(step_id: str) -> None:
            for other in waits[step_id]:
                await asyncio.wait([tasks[other]])
                tasks[other].result()  # its failure is ours
            await self._step(self._steps[step_id])

        for step_id in self._steps:
            tasks[step_id] = asyncio.create_task(step(step_id), name=f"{self._claim.execution_id}/{step_id}")
        await _together(tasks.values())
        # Independent of each other: results for people, and results for later runs.
        files = await self._write_outputs()
        await asyncio.gather(*self._keeping.values())
        return files

    # --- inputs ------------------------------------------------------------------------------------------------------------

    async def _open_inputs(self) -> None:
        # What a backend put into the storage itself, it may also replace: such a hash is good for this run only.
        unknown = [entry for entry in executions.input_entries(self._claim.inputs) if not entry.get("file_id")]
        for entry in unknown:
            entry["sha256"] = await self._tools.stages.sha256(str(entry["path"]))
        if unknown:
            await executions.note_inputs(self._tools.store, self._claim, self._claim.inputs)
        for name, given in self._claim.inputs.items():
            kind = self._spec.inputs[name].kind
            self._inputs[name] = (
                [self._open(kind, one) for one in given] if isinstance(given, list) else self._open(kind, given)
            )

    def _open(self, kind: str, given: Mapping[str, Any]) -> Value:
        if kind not in _READABLE:
            raise InvalidParameters(
                component=self._claim.pipeline, detail=f"{given['path']}: a {kind} cannot be read from a file"
            )
        path, scheme = str(given["path"]), given.get("label_scheme") if kind == "mask" else None
        digest = str(given["sha256"])
        key = (digest, kind, scheme)

        async def read() -> Any:
            ref = self._tools.held.get(key)
            if ref is None:
                ref = await self._tools.stages.read(path, kind, scheme)
                self._tools.held.put(key, ref, int(given.get("decoded_bytes") or 0))
            return ref

        return Value(":".join((kind, digest, scheme or "")), read)

    def _source(self, source: str) -> Any:
        origin, _, name = source.partition(".")
        return self._inputs.get(name) if origin == INPUT else self._outputs[origin][name]

    def _step_inputs(self, step: PipelineStep) -> dict[str, Any]:
        """Return port -> Value or list of them; what was left out is not there."""
        values: dict[str, Any] = {}
        for port, given in step.inputs.items():
            if isinstance(given, str):
                found = self._source(given)
            else:
                found = []
                for source in given:
                    one = self._source(source)
                    found.extend(one if isinstance(one, list) else [one] if one is not None else [])
            if found is not None:
                values[port] = found
        return values

    # --- steps -------------------------------------------------------------------------------------------------------------

    async def _step(self, step: PipelineStep) -> None:
        tools, component = self._tools, self._components[step.id]
        parameters = self._claim.parameters[step.id]
        try:
            identity = await tools.stages.identity(component, parameters)
            inputs = self._step_inputs(step)
            keys = {port: [v.key for v in value] if isinstance(value, list) else value.key for port, value in inputs.items()}
            key = result_key(component, identity, parameters, keys)
            known = await self._known(key)
            if known is None:
                await executions.start_step(tools.store, self._claim, step.id)
                lock = tools.lock(key)
                await lock.acquire()
                try:
                    known = await self._known(key)
                    if known is None:
                        await self._compute(step, component, parameters, inputs, key)
                        return
                finally:
                    # Who waits for it wants to find the result: it is free when that is kept, the steps after it begin now.
                    kept = self._keeping.get(key)
                    if kept is None:
                        lock.release()
                    else:
                        kept.add_done_callback(lambda _: lock.release())
            outputs, summary = known
            self._outputs[step.id] = {
                port: Value(f"{key}.{port}", self._recalling(step, component, inputs, key, port, name))
                for port, name in outputs.items()
            }
            await executions.finish_step(tools.store, self._claim, step.id, summary, attempts=0, result_key=key, cached=True)
        except (LeaseLost, StoreUnavailable):
            raise
        except ScanGraphError as error:
            raise StepError(step.id, error) from error

    async def _known(self, key: str) -> tuple[dict[str, str], StepSummary] | None:
        return await find_result(self._tools.store, key) if self._tools.settings.executor.kept_results_bytes else None

    def _recalling(
        self, step: PipelineStep, component: Component, inputs: Mapping[str, Any], key: str, port: str, name: str
    ) -> Callable[[], Awaitable[Any]]:
        """Return how to get a kept output: from the storage, or, where it is gone or damaged, by making it again."""

        async def recall() -> Any:
            try:
                return await self._tools.stages.recall(name)
            except (FileMissing, DamagedResult) as error:
                log.warning("execution %s: kept result %s: %s", self._claim.execution_id, name, error)
            async with self._tools.lock(key):
                await drop_result(self._tools.store, key)
                return (await self._run(step, component, self._claim.parameters[step.id], inputs))[0][port]

        return recall

    async def _compute(
        self, step: PipelineStep, component: Component, parameters: Mapping[str, Any], inputs: Mapping[str, Any], key: str
    ) -> None:
        outputs, summary, attempts = await self._run(step, component, parameters, inputs)
        if lost := self._lost.get(step.id):
            summary = StepSummary(summary.seconds, summary.peak_mb, summary.warnings, {**summary.facts, "lost_attempts": lost})
        made = {port: Value(f"{key}.{port}", _constant(ref)) for port, ref in outputs.items()}
        self._outputs[step.id] = made
        if self._tools.settings.executor.kept_results_bytes:
            self._keeping[key] = asyncio.create_task(self._keep(key, component, outputs, summary))
        await executions.finish_step(
            self._tools.store, self._claim, step.id, summary, attempts=attempts, result_key=key, cached=False
        )

    async def _run(
        self, step: PipelineStep, component: Component, parameters: Mapping[str, Any], inputs: Mapping[str, Any]
    ) -> tuple[dict[str, Any], StepSummary, int]:
        settings, attempt = self._tools.settings.executor, 1
        refs = {
            port: [await v.ref() for v in value] if isinstance(value, list) else await value.ref()
            for port, value in inputs.items()
        }

        def on_progress(progress: Progress) -> None:
            if progress.resources is None and step.id in self._news:
                progress = replace(progress, resources=self._news[step.id][0].resources)
            self._news[step.id] = (progress, attempt)

        def on_lost(number: int, error: BaseException) -> None:
            nonlocal attempt
            attempt = number
            self._lost.setdefault(step.id, []).append(f"{type(error).__name__}, then attempt {number}")

        limit = step.timeout_seconds or settings.step_timeout_seconds
        try:
            async with asyncio.timeout(limit):
                result = await self._tools.stages.run(
                    component,
                    refs,
                    parameters,
                    f"{self._claim.execution_id}/{step.id}",
                    on_progress,
                    on_lost,
                    step.attempts or settings.attempts,
                )
        except TimeoutError:
            raise StepTimedOut(step=step.id, component=component.id, seconds=limit) from None
        self._news.pop(step.id, None)
        return result.outputs, result.summary, result.attempts

    async def _keep(self, key: str, component: Component, outputs: Mapping[str, Any], summary: StepSummary) -> None:
        """Keep a result for later runs; without it everything works, only slower."""
        try:
            names = {port: f"steps/{key}/{port}" for port in outputs}
            sizes = await asyncio.gather(*(self._tools.stages.keep(outputs[port], name) for port, name in names.items()))
            await keep_result(self._tools.store, key, component.id, names, summary, sum(sizes))
        except (StorageFull, StorageUnavailable, StoreUnavailable) as error:
            log.warning("execution %s: a step's result was not kept: %s", self._claim.execution_id, error)

    async def _flush_progress(self) -> None:
        """Write progress down now and then; what is outdated by then is skipped."""
        while True:
            await asyncio.sleep(_FLUSH_SECONDS)
            news, self._news = self._news, {}
            if news:
                # Progress that cannot be written is no reason to stop; a lost lease is noticed where it matters.
                with contextlib.suppress(StoreUnavailable, LeaseLost):
                    await executions.report_progress(self._tools.store, self._claim, news)

    # --- outputs -----------------------------------------------------------------------------------------------------------

    async def _write_outputs(self) -> list[NewFile]:
        """Write the declared outputs and, last, the manifest that says where each came from."""
        folder = f"results/{self._claim.execution_id}"

        async def write(name: str, source: str) -> list[NewFile]:
            origin, _, port_name = source.partition(".")
            component = self._components[origin]
            kind = next(port.kind for port in component.outputs if port.name == port_name)
            try:
                ref = await self._outputs[origin][port_name].ref()
                files = [
                    NewFile(output=name, **entry) for entry in await self._tools.stages.save(ref, kind, f"{folder}/{name}")
                ]
            except ScanGraphError as error:
                raise StepError(origin, error) from error
            self._written.extend(file.storage_name for file in files)
            return files

        jobs = [asyncio.ensure_future(write(name, source)) for name, source in self._spec.outputs.items()]
        done = await asyncio.gather(*jobs, return_exceptions=True)  # all, so that what was written is known
        for outcome in done:
            if isinstance(outcome, BaseException):
                raise outcome
        files = [file for outcome in done if isinstance(outcome, list) for file in outcome]
        return [*files, await self._write_manifest(folder, files)]

    async def _write_manifest(self, folder: str, files: list[NewFile]) -> NewFile:
        record = await executions.load(self._tools.store, self._claim.execution_id)
        pipeline = await find_revision(self._tools.store, self._claim.pipeline_id, self._claim.revision)
        text = json.dumps(provenance(record, pipeline, files), indent=2, default=str).encode()
        # An executor that died after this line left a manifest of its own; ours says other times, so it gets another name.
        name = await self._tools.storage.write(f"{folder}/manifest-{self._claim.fence}.json", text)
        self._written.append(name)
        digest = hashlib.sha256(text).hexdigest()
        return NewFile("manifest", name, "manifest.json", "json", "application/json", len(text), digest)

    async def remove_written(self) -> None:
        """Leave nothing of an execution that ended without completing; what cannot be deleted now is found by the sweep.

        Only after that end is written down: while another executor may have the execution, the files may be its own.
        """
        for name in self._written:
            with contextlib.suppress(ScanGraphError):
                await self._tools.storage.delete(name)
        self._written.clear()

    def _expiry(self) -> Any:
        days = self._tools.settings.files.retention_days
        return now() + timedelta(days=days) if days else None

    def _all_values(self) -> list[Value]:
        values: list[Value] = []
        for value in self._inputs.values():
            values.extend(value if isinstance(value, list) else [value])
        for outputs in self._outputs.values():
            values.extend(outputs.values())
        return values


def _constant(ref: Any) -> Callable[[], Awaitable[Any]]:
    async def give() -> Any:
        return ref

    return give


async def _together(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Wait for all; where one fails, or we are cancelled, stop the others first."""
    waiting = list(tasks)
    try:
        await asyncio.wait(waiting, return_when=asyncio.FIRST_EXCEPTION)
    finally:
        for task in waiting:
            task.cancel()
        ended = await asyncio.gather(*waiting, return_exceptions=True)
    for outcome in ended:
        if isinstance(outcome, BaseException) and not isinstance(outcome, asyncio.CancelledError):
            raise outcome
