"""One execution's way: its steps as soon as their inputs are there, each result once, its outputs as soon as they are made.

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
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from deployments.executor.journal import Journal
from deployments.executor.lines import Lines
from deployments.executor.stages import Stages
from deployments.executor.watching import Watch
from scangraph.contracts import Component, Progress, StepSummary
from scangraph.contracts.components import READABLE
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
from scangraph.store.derived import drop_derived
from scangraph.store.executions import Claim, NewFile, OutputWritten, Record, StepFinished, StepProgress, StepStarted
from scangraph.store.pipelines import Stored, find_revision
from scangraph.store.results import drop_result, find_result, keep_result
from scangraph.store.views import provenance

log = logging.getLogger("scangraph")

#: Results that may be on their way into the storage before executions wait for that.
_KEEPING_AT_ONCE = 8
#: How long the end of an execution waits for files that are being written, to delete them.
_SAVING_SECONDS = 30.0


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
    lines: Lines = field(default_factory=Lines)
    # Two executions that need the same result: the second waits for the first, then finds it.
    locks: weakref.WeakValueDictionary[str, asyncio.Lock] = field(default_factory=weakref.WeakValueDictionary)

    # Results on their way into the storage: the executions that made them need not wait for that.
    keeping: set[asyncio.Task[None]] = field(default_factory=set)

    def beside(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Keep a result beside everything else."""
        task = asyncio.create_task(work)
        self.keeping.add(task)
        task.add_done_callback(self.keeping.discard)
        return task

    async def not_too_many_beside(self) -> None:
        """Wait while the storage is slower than the stages: what is not kept yet stays in memory."""
        while len(self.keeping) > _KEEPING_AT_ONCE:
            await asyncio.wait(self.keeping, return_when=asyncio.FIRST_COMPLETED)

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
        self._tools, self._claim, self.watch = tools, claim, Watch(claim)
        self._spec, self._steps = claim.spec, {step.id: step for step in claim.spec.steps}
        self._components: dict[str, Component] = {}
        self._journal = Journal(tools.store, claim)
        self._lost: dict[str, list[str]] = {}
        self._inputs: dict[str, Any] = {}
        self._outputs: dict[str, dict[str, Value]] = {}
        self._keeping: dict[str, asyncio.Task[None]] = {}
        self._writing: dict[str, asyncio.Task[list[NewFile]]] = {}
        self._saving: set[asyncio.Future[list[dict[str, Any]]]] = set()
        self._written: dict[str, str] = {}  # storage name -> SHA-256

    async def run(self) -> None:
        """Work to the end and write it down. Cancelled by the scheduler, it stops the work and leaves the rest to that.

        Raises
        ------
        LeaseLost
            If somebody else has the execution now.
        StoreUnavailable
            If the records cannot be reached: the lease runs out, and the execution goes on elsewhere.
        """
        self.watch.enter()
        writing = asyncio.create_task(self._journal.keep_writing())
        try:
            await self._finish(await self._work())
        except asyncio.CancelledError:
            await self._stop_writing()
            with contextlib.suppress(LeaseLost, StoreUnavailable):
                await self._journal.flush()
            raise
        except (LeaseLost, StoreUnavailable):
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
            writing.cancel()
            await asyncio.wait([writing])
            await self._stop_writing()
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
                self.watch.end("completed")
                return
            raise
        if not completed:
            await executions.end_cancelled(self._tools.store, self._claim)
            await self.remove_written()
        self.watch.end("completed" if completed else "cancelled")

    async def _fail(self, error: ScanGraphError, step_id: str | None) -> None:
        described = {"code": error.code, "status": error.status, "title": error.title, "detail": error.detail}
        if error.fields.get("errors"):
            described["errors"] = error.fields["errors"]
        await self._stop_writing()
        await self._journal.flush()
        await executions.fail(self._tools.store, self._claim, described, step_id)
        self.watch.end("failed", error.code, step_id)
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
            with self.watch.step(step_id, component=self._components[step_id].id):
                await self._step(self._steps[step_id])
            self._begin_writing(step_id)

        for step_id in self._steps:
            tasks[step_id] = asyncio.create_task(step(step_id), name=f"{self._claim.execution_id}/{step_id}")
        await _together(tasks.values())
        await self._tools.not_too_many_beside()
        return await self._write_outputs()

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
        if kind not in READABLE:
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
            identity = await self._identity(step, component, parameters) if component.uses_models else {}
            inputs = self._step_inputs(step)
            keys = {port: [v.key for v in value] if isinstance(value, list) else value.key for port, value in inputs.items()}
            key = result_key(component, identity, parameters, keys)
            lock = tools.lock(key)
            if lock.locked():  # somebody makes this very result: waiting for it is work, too
                self._journal.add(StepStarted(step.id))
            await lock.acquire()
            try:
                known = await self._known(key)
                if known is None:
                    self._journal.add(StepStarted(step.id))
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
            self._journal.add(StepFinished(step.id, summary, 0, key, cached=True))
        except (LeaseLost, StoreUnavailable):
            raise
        except ScanGraphError as error:
            raise StepError(step.id, error) from error

    async def _identity(self, step: PipelineStep, component: Component, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """Ask for the model. A stage that nobody has needed for long is started for that, which takes a while."""

        def on_progress(progress: Progress) -> None:
            self._journal.add(StepStarted(step.id))
            self._journal.add(StepProgress(step.id, progress, 0))

        with self._tools.lines.told(component.deployment, on_progress):
            return await self._tools.stages.identity(component, parameters)

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
        executor = self._tools.settings.executor
        if executor.kept_results_bytes and summary.seconds >= executor.keep_from_seconds:
            self._keeping[key] = self._tools.beside(self._keep(key, component, outputs, summary))
        self._journal.add(StepFinished(step.id, summary, attempts, key, cached=False))

    async def _run(
        self, step: PipelineStep, component: Component, parameters: Mapping[str, Any], inputs: Mapping[str, Any]
    ) -> tuple[dict[str, Any], StepSummary, int]:
        settings, lines, attempt = self._tools.settings.executor, self._tools.lines, 1
        refs = {
            port: [await v.ref() for v in value] if isinstance(value, list) else await value.ref()
            for port, value in inputs.items()
        }

        def on_progress(progress: Progress) -> None:
            self._journal.add(StepProgress(step.id, progress, attempt))

        def on_lost(number: int, error: BaseException) -> None:
            nonlocal attempt
            attempt = number
            self._lost.setdefault(step.id, []).append(f"{type(error).__name__}, then attempt {number}")

        limit = step.timeout_seconds or settings.step_timeout_seconds
        size, order = self._claim.input_bytes, self._claim.queue_key
        async with lines.turn(component.deployment, component.id, size, order, on_progress) as work:

            def heard(progress: Progress) -> None:
                work.heard(progress)
                on_progress(progress)

            try:
                async with asyncio.timeout(limit):
                    result = await self._tools.stages.run(
                        component,
                        refs,
                        parameters,
                        f"{self._claim.execution_id}/{step.id}",
                        heard,
                        on_lost,
                        step.attempts or settings.attempts,
                    )
            except TimeoutError:
                raise StepTimedOut(step=step.id, component=component.id, seconds=limit) from None
            lines.costs.learn(component.id, result.summary.seconds, size)
        return result.outputs, result.summary, result.attempts

    async def _keep(self, key: str, component: Component, outputs: Mapping[str, Any], summary: StepSummary) -> None:
        """Keep a result for later runs; without it everything works, only slower."""
        try:
            names = {port: f"steps/{key}/{port}" for port in outputs}
            sizes = await asyncio.gather(*(self._tools.stages.keep(outputs[port], name) for port, name in names.items()))
            await keep_result(self._tools.store, key, component.id, names, summary, sum(sizes))
        except (StorageFull, StorageUnavailable, StoreUnavailable) as error:
            log.warning("execution %s: a step's result was not kept: %s", self._claim.execution_id, error)

    # --- outputs -----------------------------------------------------------------------------------------------------------

    def _begin_writing(self, step_id: str) -> None:
        """Write what a step gives to the outputs while the others work: whoever watches need not wait for the end."""
        for name, source in self._spec.outputs.items():
            origin, _, port = source.partition(".")
            if origin == step_id:
                self._writing[name] = asyncio.create_task(self._write_output(name, step_id, port))

    async def _write_output(self, name: str, step_id: str, port_name: str) -> list[NewFile]:
        kind = next(port.kind for port in self._components[step_id].outputs if port.name == port_name)
        try:
            ref = await self._outputs[step_id][port_name].ref()
            saving = asyncio.ensure_future(self._tools.stages.save(ref, kind, f"{self._folder}/{name}"))
            self._saving.add(saving)
            saved = await asyncio.shield(saving)
        except ScanGraphError as error:
            raise StepError(step_id, error) from error
        files = [NewFile(output=name, **entry) for entry in saved]
        self._written.update((file.storage_name, file.sha256) for file in files)
        self._journal.add(OutputWritten(name, files, self._expiry()))
        return files

    async def _stop_writing(self) -> None:
        for task in self._writing.values():
            task.cancel()
        await asyncio.gather(*self._writing.values(), return_exceptions=True)

    async def _write_outputs(self) -> list[NewFile]:
        """Wait for the declared outputs and, last, write the manifest that says where each came from."""

        async def story() -> tuple[Record, Stored]:
            await self._journal.flush()
            record = await executions.load(self._tools.store, self._claim.execution_id)
            return record, await find_revision(self._tools.store, self._claim.pipeline_id, self._claim.revision)

        told, jobs = asyncio.ensure_future(story()), [self._writing[name] for name in self._spec.outputs]
        done = await asyncio.gather(*jobs, told, return_exceptions=True)  # all, so that what was written is known
        for outcome in done:
            if isinstance(outcome, BaseException):
                raise outcome
        files = [file for job in jobs for file in job.result()]
        return [*files, await self._write_manifest(provenance(*told.result(), files))]

    async def _write_manifest(self, manifest: Mapping[str, Any]) -> NewFile:
        text = json.dumps(manifest, indent=2, default=str).encode()
        # An executor that died after this line left a manifest of its own; ours says other times, so it gets another name.
        name = await self._tools.stages.wait_for_storage(
            lambda: self._tools.storage.write(f"{self._folder}/manifest-{self._claim.fence}.json", text)
        )
        digest = hashlib.sha256(text).hexdigest()
        self._written[name] = digest
        return NewFile("manifest", name, "manifest.json", "json", "application/json", len(text), digest)

    async def remove_written(self) -> None:
        """Leave nothing of an execution that ended without completing; what cannot be deleted now is found by the sweep.

        Only after that end is written down: while another executor may have the execution, the files may be its own.

        Race: a stage that writes a file does not stop for us, and what it had not written yet when we looked would stay.
        """
        if self._saving:
            written, late = await asyncio.wait(self._saving, timeout=_SAVING_SECONDS)
            for task in written:
                if not task.cancelled() and task.exception() is None:
                    self._written.update((entry["storage_name"], entry["sha256"]) for entry in task.result())
            for task in late:
                task.cancel()
            self._saving.clear()
        for name in self._written:
            with contextlib.suppress(ScanGraphError):
                await self._tools.storage.delete(name)
        with contextlib.suppress(ScanGraphError):  # whoever watched has had copies made
            await drop_derived(self._tools.store, self._tools.storage, self._written.values())
        self._written.clear()

    @property
    def _folder(self) -> str:
        return f"results/{self._claim.execution_id}"

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
