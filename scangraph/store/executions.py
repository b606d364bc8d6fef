"""Executions: the state machine, the queue, and what listeners are told.

    pending ──claim──► running ──► completed | failed | cancelled
       └──────────────request_cancel──────────────► cancelled

Every change is one transaction, and whoever works on an execution names the fence of its claim. So of all that may happen at
once (two executors, a cancel, a process that was thought dead) exactly one thing did: what the row says.
"""

from __future__ import annotations

import statistics
import uuid
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, cast

from sqlalchemy import Table, and_, bindparam, delete, exists, func, insert, or_, select, tuple_, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from scangraph import metrics, tracing
from scangraph.contracts import Progress, StepSummary
from scangraph.contracts.api import TERMINAL, Priority
from scangraph.contracts.errors import AlreadyEnded, IdempotencyMismatch, LeaseLost, NoSuch, QueueFull
from scangraph.contracts.pipelines import PipelineSpec
from scangraph.storage import Storage
from scangraph.store.database import Store, now, whole
from scangraph.store.derived import drop_derived
from scangraph.store.tables import Base, Event, Execution, File, IdempotencyKey, Outbox, Pipeline, PipelineRevision, Step

_RANK: dict[str, int] = {"high": 0, "normal": 1, "low": 2}
#: A lease is renewed when so much of it is left: looking at it costs less than writing.
_RENEWED_AT = 0.75
#: How many earlier runs an estimate looks at.
_HISTORY = 20
#: What all pipelines are called in numbers that are not built in: everybody may make some.
CUSTOM = "custom"


def _table(of: type[Base]) -> Table:
    """Return a class's table: statements on it make no objects, which what is written at every step need not pay for."""
    return cast("Table", of.__table__)


_ROW = _table(Execution)
_NUMBERED = (
    update(_ROW)
    .where(_ROW.c.id == bindparam("execution"))
    .values(last_seq=_ROW.c.last_seq + 1)
    .returning(_ROW.c.last_seq, _ROW.c.state, _ROW.c.error)
)
_STEPS = select(_table(Step)).where(_table(Step).c.execution_id == bindparam("execution")).order_by(_table(Step).c.position)
_EVENT = insert(_table(Event))


@dataclass(frozen=True)
class NewExecution:
    """What is accepted.

    Parameters
    ----------
    inputs : mapping
        By input name: `{"file_id", "path", "label_scheme"}`, or a list of them; `path` is the storage name.
    parameters : mapping
        Step id -> all parameters of that step.
    versions : mapping
        Component id -> its version now.
    input_bytes : int, optional
        Size of the decoded images, where all are known.
    """

    owner_id: str | None
    pipeline_id: str
    revision: int
    spec: PipelineSpec
    inputs: Mapping[str, Any]
    parameters: Mapping[str, Mapping[str, Any]]
    versions: Mapping[str, str]
    priority: Priority = "normal"
    input_bytes: int | None = None
    retry_of: str | None = None


@dataclass(frozen=True)
class QueueLimits:
    """How much may wait, and what waiting is worth."""

    waiting: int
    waiting_per_account: int
    ageing_seconds: float


@dataclass(frozen=True)
class Claim:
    """The right to work on an execution, until the lease ends or somebody else claims it."""

    execution_id: str
    fence: int
    owner_id: str | None
    pipeline_id: str
    pipeline: str
    revision: int
    spec: PipelineSpec
    inputs: dict[str, Any]
    parameters: dict[str, dict[str, Any]]
    input_bytes: int
    cancel_requested: bool
    started_at: datetime | None = None
    traceparent: str | None = None
    kind: str = CUSTOM  # name of a built-in pipeline
    queue_key: float = 0.0


@dataclass(frozen=True)
class NewFile:
    """A result's record."""

    output: str
    storage_name: str
    filename: str
    kind: str
    media_type: str
    size: int
    sha256: str
    header: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Record:
    """An execution with its steps and results, as of one moment."""

    execution: Execution
    steps: Sequence[Step]
    files: Sequence[File]
    queue_position: int | None = None
    estimated_completion: datetime | None = None


# --- accepting -------------------------------------------------------------------------------------------------------------


@whole
async def accept(
    store: Store, new: NewExecution, limits: QueueLimits, idempotency: tuple[str, str] | None = None
) -> tuple[str, bool]:
    """Put an execution into the queue.

    Parameters
    ----------
    idempotency : (key, sha256 of the request), optional
        With a key that this account used before, nothing is made and the earlier execution is returned.

    Returns
    -------
    execution_id : str
    replayed : bool
        Whether it was there before.

    Raises
    ------
    IdempotencyMismatch, QueueFull, NoSuch

    Notes
    -----
    Race: many requests with one key at once. The key's row and the execution's are written in one transaction, and the key is
    the table's primary key: one transaction wins, the others find the winner's row when theirs is refused. Nobody is ever "in
    flight" for the others to see.
    """
    try:
        return await _accept(store, new, limits, idempotency)
    except IntegrityError:
        if idempotency is None:
            raise
    return await _accept(store, new, limits, idempotency)


async def _accept(
    store: Store, new: NewExecution, limits: QueueLimits, idempotency: tuple[str, str] | None
) -> tuple[str, bool]:
    owner, created = new.owner_id, now()
    async with store.write() as session:
        if idempotency is not None and (known := await _made_by(session, owner, idempotency)) is not None:
            return known, True
        await _check_room(session, owner, limits)
        await _hold_files(session, new.inputs)
        execution_id = str(uuid.uuid4())
        row = {
            "id": execution_id,
            "owner_id": owner,
            "pipeline_id": new.pipeline_id,
            "revision": new.revision,
            "pipeline": new.spec.name,
            "inputs": dict(new.inputs),
            "parameters": {step: dict(values) for step, values in new.parameters.items()},
            "input_bytes": new.input_bytes,
            "retry_of": new.retry_of,
            "priority": new.priority,
            "queue_key": created.timestamp() + limits.ageing_seconds * _RANK[new.priority],
            "state": "pending",
            "created_at": created,
            "fence": 0,
            "last_seq": 0,
            "traceparent": tracing.here(),
        }
        await session.execute(insert(_ROW), row)
        steps = [
            {
                "execution_id": execution_id,
                "step_id": step.id,
                "position": position,
                "component": step.component,
                "version": new.versions[step.component],
                "state": "pending",
            }
            for position, step in enumerate(new.spec.steps)
        ]
        await session.execute(insert(_table(Step)), steps)
        if idempotency is not None:
            key, digest = idempotency
            values = {"owner_id": owner or "", "key": key, "body_sha256": digest}
            await session.execute(insert(IdempotencyKey).values(**values, execution_id=execution_id, created_at=created))
        await _tell(session, execution_id)
    metrics.ACCEPTED.add(priority=new.priority)
    return execution_id, False


@whole
async def replay(store: Store, owner: str | None, idempotency: tuple[str, str]) -> str | None:
    """Return what a key has made: the answer stays the same when the request would not be accepted any more.

    Raises
    ------
    IdempotencyMismatch
    """
    async with store.read() as session:
        return await _made_by(session, owner, idempotency)


async def _made_by(session: AsyncSession, owner: str | None, idempotency: tuple[str, str]) -> str | None:
    known = await session.get(IdempotencyKey, (owner or "", idempotency[0]))
    if known is not None and known.body_sha256 != idempotency[1]:
        raise IdempotencyMismatch(key=idempotency[0])
    return known.execution_id if known is not None else None


async def _check_room(session: AsyncSession, owner: str | None, limits: QueueLimits) -> None:
    """Two requests at the limit may both pass: it bounds the queue, it does not count it out."""
    waiting = (
        await session.execute(select(func.count()).select_from(Execution).where(Execution.state == "pending"))
    ).scalar_one()
    if waiting >= limits.waiting:
        raise QueueFull(waiting=waiting, whose="in all", limit=limits.waiting, retry_after_seconds=30)
    if waiting >= limits.waiting_per_account:
        mine = select(func.count()).select_from(Execution).where(Execution.state == "pending", Execution.owner_id == owner)
        own = (await session.execute(mine)).scalar_one()
        if own >= limits.waiting_per_account:
            raise QueueFull(waiting=own, whose="for you", limit=limits.waiting_per_account, retry_after_seconds=30)


async def _hold_files(session: AsyncSession, inputs: Mapping[str, Any]) -> None:
    """Race: an input is deleted between the check and now. Here it is locked until the execution is there to protect it."""
    ids = {entry["file_id"] for entry in input_entries(inputs) if entry.get("file_id")}
    if not ids:
        return
    found = (await session.execute(select(File.id).where(File.id.in_(ids)).with_for_update(read=True))).scalars().all()
    for missing in ids - set(found):
        raise NoSuch(kind="file", id=missing)


def input_entries(inputs: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
    """Yield every file of an execution's inputs."""
    for given in inputs.values():
        yield from [given] if isinstance(given, dict) else given


# --- looking ---------------------------------------------------------------------------------------------------------------


@whole
async def load(store: Store, execution_id: str, slots: int = 1) -> Record:
    """Return an execution as it is now; `slots` is how many run at once, for the estimate.

    Raises
    ------
    NoSuch
    """
    async with store.read() as session:
        execution = await session.get(Execution, execution_id)
        if execution is None:
            raise NoSuch(kind="execution", id=execution_id)
        steps = (await session.execute(select(Step).where(Step.execution_id == execution_id).order_by(Step.position))).scalars()
        files: Sequence[File] = ()
        if execution.state in {"running", "completed"}:
            query = select(File).where(File.execution_id == execution_id).order_by(File.created_at, File.output, File.filename)
            files = (await session.execute(query)).scalars().all()
        position = await _position(session, execution)
        estimate = await _estimate(session, execution, position, slots)
        return Record(execution, steps.all(), files, position, estimate)


@whole
async def owner_of(store: Store, execution_id: str) -> str | None:
    """Return whose execution it is; raises `NoSuch`."""
    async with store.read() as session:
        row = (await session.execute(select(Execution.owner_id).where(Execution.id == execution_id))).one_or_none()
        if row is None:
            raise NoSuch(kind="execution", id=execution_id)
        return row[0]


async def _position(session: AsyncSession, execution: Execution) -> int | None:
    if execution.state != "pending":
        return None
    ahead = select(func.count()).select_from(Execution)
    key = (execution.queue_key, execution.id)
    ahead = ahead.where(Execution.state == "pending", tuple_(Execution.queue_key, Execution.id) < tuple_(*key))
    return int((await session.execute(ahead)).scalar_one()) + 1


async def _estimate(session: AsyncSession, execution: Execution, position: int | None, slots: int) -> datetime | None:
    """Guess the end: the median time per input byte of the last runs, behind the median time of whoever is ahead."""
    if execution.state in TERMINAL:
        return None
    runs = await _durations(session, Execution.pipeline_id == execution.pipeline_id, Execution.revision == execution.revision)
    if not runs:
        return None
    sized = [seconds / size for seconds, size in runs if size]
    if execution.input_bytes and sized:
        seconds = statistics.median(sized) * execution.input_bytes
    else:
        seconds = statistics.median(s for s, _ in runs)
    if execution.started_at is not None:
        end = execution.started_at + timedelta(seconds=seconds)
        return end if end > now() else None  # it takes longer than it ever did: nobody knows
    anything = await _durations(session)
    wait = statistics.median(s for s, _ in anything) * ((position or 1) - 1) / max(slots, 1)
    return now() + timedelta(seconds=wait + seconds)


@whole
async def expected_seconds(store: Store, revisions: Collection[tuple[str, int]]) -> dict[str, float]:
    """Return the median time of the last completed runs of pipelines' revisions, by pipeline; none where there are none."""
    found = {}
    async with store.read() as session:
        for pipeline_id, revision in revisions:
            runs = await _durations(session, Execution.pipeline_id == pipeline_id, Execution.revision == revision)
            if runs:
                found[pipeline_id] = round(statistics.median(seconds for seconds, _ in runs), 3)
    return found


@whole
async def step_runs(store: Store, limit: int = 500) -> list[tuple[str, float, int]]:
    """Return (component, seconds, the execution's input bytes) of the last computed steps, the oldest first."""
    query = select(Step.component, Step.seconds, Execution.input_bytes).join(Execution, Execution.id == Step.execution_id)
    query = query.where(Execution.state == "completed", ~Step.cached, Step.seconds.is_not(None))
    async with store.read() as session:
        rows = (await session.execute(query.order_by(Execution.created_at.desc()).limit(limit))).all()
    return [(component, seconds or 0.0, size or 0) for component, seconds, size in reversed(rows)]


async def _durations(session: AsyncSession, *conditions: Any) -> list[tuple[float, int | None]]:
    """Return (seconds, input bytes) of the last completed runs."""
    query = select(Execution.started_at, Execution.completed_at, Execution.input_bytes)
    # Where a result was known, the time says nothing about the next run.
    known = select(Step.step_id).where(Step.execution_id == Execution.id, Step.cached).exists()
    query = query.where(Execution.state == "completed", ~known, *conditions)
    query = query.order_by(Execution.created_at.desc()).limit(_HISTORY)
    rows = (await session.execute(query)).all()
    return [((end - start).total_seconds(), size) for start, end, size in rows if start and end]


@whole
async def list_executions(
    store: Store,
    *,
    owner_id: str | None = None,
    state: str | None = None,
    pipeline: str | None = None,
    priority: str | None = None,
    created_after: datetime | None = None,
    created_before: datetime | None = None,
    before: tuple[datetime, str] | None = None,
    limit: int = 50,
) -> list[Execution]:
    """List executions, the newest first.

    Parameters
    ----------
    owner_id : str, optional
        Only this account's.
    pipeline : str, optional
        Its id or name.
    before : (created_at, id), optional
        Where the last page ended.
    """
    query: Any = select(Execution).order_by(Execution.created_at.desc(), Execution.id.desc()).limit(limit)
    conditions = {Execution.owner_id: owner_id, Execution.state: state, Execution.priority: priority}
    query = query.where(*(column == value for column, value in conditions.items() if value is not None))
    if pipeline is not None:
        query = query.where(or_(Execution.pipeline_id == pipeline, Execution.pipeline == pipeline))
    if created_after is not None:
        query = query.where(Execution.created_at >= created_after)
    if created_before is not None:
        query = query.where(Execution.created_at < created_before)
    if before is not None:
        at, last = before
        query = query.where(or_(Execution.created_at < at, and_(Execution.created_at == at, Execution.id < last)))
    async with store.read() as session:
        return list((await session.execute(query)).scalars())


@whole
async def events_since(store: Store, seen: Mapping[str, int], limit: int = 500) -> list[Event]:
    """Return what happened after the given numbers, in order within each execution.

    Race: numbers are given under the execution's row lock, so of one execution they become visible in order and without a gap;
    between executions there is no order to miss.
    """
    if not seen:
        return []
    async with store.read() as session:
        query = select(Execution.id, Execution.last_seq).where(Execution.id.in_(seen))
        behind = [(key, seen[key]) for key, last in (await session.execute(query)).all() if last > seen[key]]
        if not behind:
            return []
        conditions = or_(*(and_(Event.execution_id == key, Event.seq > seq) for key, seq in behind))
        events = select(Event).where(conditions).order_by(Event.execution_id, Event.seq).limit(limit)
        return list((await session.execute(events)).scalars())


@whole
async def latest(store: Store, execution_ids: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return what listeners were told last of each execution."""
    async with store.read() as session:
        query = select(Event.execution_id, Event.body).join(
            Execution, and_(Execution.id == Event.execution_id, Execution.last_seq == Event.seq)
        )
        rows = (await session.execute(query.where(Execution.id.in_(execution_ids)))).all()
        return {row[0]: row[1] for row in rows}


@whole
async def newest(store: Store, execution_ids: Sequence[str]) -> dict[str, int]:
    """Return the number of each execution's last event."""
    if not execution_ids:
        return {}
    async with store.read() as session:
        query = select(Execution.id, Execution.last_seq).where(Execution.id.in_(execution_ids))
        return {key: int(seq) for key, seq in (await session.execute(query)).all()}


@whole
async def counts(store: Store) -> dict[str, int]:
    """Return state -> number of executions."""
    async with store.read() as session:
        rows = (await session.execute(select(Execution.state, func.count()).group_by(Execution.state))).all()
        return {state: int(number) for state, number in rows}


@dataclass(frozen=True)
class Census:
    """What there is, for whoever looks from outside.

    Parameters
    ----------
    executions : dict
        (state, name of the built-in pipeline or `CUSTOM`) -> number.
    waiting : dict
        Priority -> number of those in the queue.
    oldest_seconds : float
        How long the first of these was accepted ago, 0 where none waits.
    """

    executions: dict[tuple[str, str], int]
    waiting: dict[str, int]
    oldest_seconds: float


@whole
async def census(store: Store) -> Census:
    """Count the executions."""
    async with store.read() as session:
        built_in = select(Pipeline.name).where(Pipeline.built_in)
        names = {name for name in (await session.execute(built_in)).scalars() if name is not None}
        grouped = select(Execution.state, Execution.pipeline, func.count()).group_by(Execution.state, Execution.pipeline)
        found = dict.fromkeys(((state, name) for state in ("pending", "running", *TERMINAL) for name in (*names, CUSTOM)), 0)
        for state, pipeline, number in (await session.execute(grouped)).all():
            found[state, pipeline if pipeline in names else CUSTOM] += number
        queue = select(Execution.priority, func.count(), func.min(Execution.created_at))
        rows = (await session.execute(queue.where(Execution.state == "pending").group_by(Execution.priority))).all()
    first = min((created for _, _, created in rows), default=None)
    waiting = {**dict.fromkeys(_RANK, 0), **{priority: int(number) for priority, number, _ in rows}}
    return Census(found, waiting, max((now() - first).total_seconds(), 0.0) if first else 0.0)


# --- cancelling ------------------------------------------------------------------------------------------------------------


@whole
async def request_cancel(store: Store, execution_id: str) -> str:
    """Cancel: at once what waits, as soon as its executor hears of it what runs. Returns the state now.

    Race: an executor claims it meanwhile. Both updates name the state that they expect; if it was claimed in between, the
    second one applies, and the executor finds the wish at its next look.

    Raises
    ------
    AlreadyEnded, NoSuch
    """
    async with store.write() as session:
        waiting = update(Execution).where(Execution.id == execution_id, Execution.state == "pending")
        if not await _changed(session, waiting.values(state="cancelled", completed_at=now(), cancel_requested_at=now())):
            working = update(Execution).where(Execution.id == execution_id, Execution.state == "running")
            wish = func.coalesce(Execution.cancel_requested_at, now())
            if await _changed(session, working.values(cancel_requested_at=wish)):
                return "running"
            state = (await session.execute(select(Execution.state).where(Execution.id == execution_id))).scalar_one_or_none()
            if state is None:
                raise NoSuch(kind="execution", id=execution_id)
            raise AlreadyEnded(execution_id=execution_id, state=state, hint="start a new one to run it again")
        await _close_steps(session, execution_id, running="cancelled")
        await _drop_files(session, execution_id)
        await _tell(session, execution_id)
        of_it = select(Pipeline.name).join(Execution, Execution.pipeline_id == Pipeline.id).where(Execution.id == execution_id)
        kind = (await session.execute(of_it.where(Pipeline.built_in))).scalar_one_or_none()
    metrics.ENDED.add(pipeline=kind or CUSTOM, state="cancelled")
    return "cancelled"


# --- working ---------------------------------------------------------------------------------------------------------------


@whole
async def claim(store: Store, worker: str, lease_seconds: float, room_bytes: int | None = None) -> Claim | None:
    """Take the next execution: one whose executor went silent, else the first in the queue.

    Parameters
    ----------
    worker : str
        Who asks; unique to the process.
    room_bytes : int, optional
        Size of the inputs that there is room for. What does not fit waits, and so does everything behind it: a large one that
        may be overtaken would never run.

    Notes
    -----
    Race: several executors ask at once. On PostgreSQL the row is locked and others skip it; SQLite has one writer.
    The old executor may still be alive, only slow: its fence is outdated from here on, and each of its writes is refused.
    """
    async with store.read() as session:  # there is nothing, most times, and nobody needs to wait for that
        silence = and_(Execution.state == "running", Execution.lease_until < now())
        if not (
            await session.execute(select(or_(exists().where(Execution.state == "pending"), exists().where(silence))))
        ).scalar():
            return None
    async with store.write() as session:
        moment = now()
        expired = select(Execution).where(Execution.state == "running", Execution.lease_until < moment)
        waiting = select(Execution).where(Execution.state == "pending")
        row = None
        for query in (expired, waiting):
            ordered = query.order_by(Execution.queue_key, Execution.id).limit(1).with_for_update(skip_locked=True)
            row = (await session.execute(ordered)).scalar_one_or_none()
            if row is not None:
                break
        if row is None or (room_bytes is not None and (row.input_bytes or 0) > room_bytes):
            return None
        again = row.started_at is not None
        silent = row.state == "running"
        row.state = "running"
        row.started_at = row.started_at or moment
        row.lease_owner, row.lease_until = worker, moment + timedelta(seconds=lease_seconds)
        row.fence += 1
        interrupted = update(Step).where(Step.execution_id == row.id, Step.state == "running")
        await session.execute(interrupted.values(state="pending", message="interrupted", done=0, total=0))
        revision = select(PipelineRevision.spec, Pipeline.built_in).join(Pipeline, Pipeline.id == PipelineRevision.pipeline_id)
        revision = revision.where(Pipeline.id == row.pipeline_id, PipelineRevision.revision == row.revision)
        spec, built_in = (await session.execute(revision)).one()
        await session.flush()
        await _tell(session, row.id)
        claimed = Claim(
            row.id,
            row.fence,
            row.owner_id,
            row.pipeline_id,
            row.pipeline,
            row.revision,
            PipelineSpec.model_validate(spec),
            dict(row.inputs),
            dict(row.parameters),
            row.input_bytes or 0,
            row.cancel_requested_at is not None,
            row.started_at,
            row.traceparent,
            row.pipeline if built_in else CUSTOM,
            row.queue_key,
        )
    if silent:
        metrics.TAKEN_OVER.add()
    elif not again:
        metrics.WAITED.observe((moment - row.created_at).total_seconds(), priority=row.priority)
    return claimed


@whole
async def renew(store: Store, worker: str, claims: Iterable[Claim], lease_seconds: float) -> tuple[set[str], set[str]]:
    """Keep the leases and hear of cancels.

    Returns
    -------
    lost : set of str
        Executions that somebody else has now, or that are no more.
    cancelled : set of str
        Executions whose end is wished.
    """
    fences = {claim.execution_id: claim.fence for claim in claims}
    if not fences:
        return set(), set()
    mine = and_(Execution.id.in_(fences), Execution.lease_owner == worker, Execution.state == "running")
    columns = Execution.id, Execution.fence, Execution.cancel_requested_at, Execution.lease_until
    async with store.read() as session:
        rows = (await session.execute(select(*columns).where(mine))).all()
    length = timedelta(seconds=lease_seconds)
    if any(until is not None and until - now() < length * _RENEWED_AT for *_, until in rows):
        async with store.write() as session:
            await session.execute(update(Execution).where(mine).values(lease_until=now() + length))
    kept = {key for key, fence, *_ in rows if fences[key] == fence}
    return fences.keys() - kept, {key for key, _, wish, _ in rows if wish is not None and key in kept}


@whole
async def give_back(store: Store, claim: Claim) -> None:
    """Return an unfinished execution to the queue, at the place it had: this executor is going down."""
    async with store.write() as session:
        await _guard(session, claim, state="pending", lease_owner=None, lease_until=None)
        running = update(Step).where(Step.execution_id == claim.execution_id, Step.state == "running")
        await session.execute(running.values(state="pending", message="interrupted", done=0, total=0))
        await _tell(session, claim.execution_id)


@whole
async def note_inputs(store: Store, claim: Claim, inputs: Mapping[str, Any]) -> None:
    """Write down what was found out about the inputs: the hashes of those that a backend put into the storage itself."""
    async with store.write() as session:
        await _guard(session, claim, inputs=dict(inputs))


@dataclass(frozen=True)
class StepStarted:
    """A step has begun; its first start is kept over retries."""

    step_id: str
    message: str = ""
    at: datetime = field(default_factory=now)

    def values(self) -> dict[str, Any]:
        """Return the columns it changes."""
        started = func.coalesce(Step.started_at, self.at)
        return {"state": "running", "started_at": started, "message": self.message, "completed_at": None, "error": None}


@dataclass(frozen=True)
class StepProgress:
    """How far a running step is."""

    step_id: str
    progress: Progress
    attempt: int

    def values(self) -> dict[str, Any]:
        """Return the columns it changes."""
        told = self.progress
        values = {"done": told.done, "total": told.total, "message": told.message, "attempts": self.attempt}
        return values | ({"resources": told.resources} if told.resources else {})


@dataclass(frozen=True)
class StepFinished:
    """A step has its result."""

    step_id: str
    summary: StepSummary
    attempts: int
    result_key: str
    cached: bool
    at: datetime = field(default_factory=now)

    def values(self) -> dict[str, Any]:
        """Return the columns it changes."""
        return {
            "state": "completed",
            "started_at": func.coalesce(Step.started_at, self.at),
            "completed_at": self.at,
            "seconds": self.summary.seconds,
            "peak_mb": self.summary.peak_mb,
            "warnings": list(self.summary.warnings),
            "facts": dict(self.summary.facts),
            "attempts": self.attempts,
            "cached": self.cached,
            "result_key": self.result_key,
            "done": Step.total,
            "message": "",
        }


@dataclass(frozen=True)
class OutputWritten:
    """An output of the execution can be read, while the rest of it is at work."""

    output: str
    files: Sequence[NewFile]
    expires_at: datetime | None


Change = StepStarted | StepProgress | StepFinished | OutputWritten


@whole
async def write_down(store: Store, claim: Claim, changes: Sequence[Change]) -> None:
    """Write what has become of steps since the last time: in their order, in one transaction, told as one event.

    Raises
    ------
    LeaseLost
    """
    async with store.write() as session:
        await _guard(session, claim)
        written = [change for change in changes if isinstance(change, OutputWritten)]
        for output in written:
            await _add_files(session, claim, output.files, output.expires_at)
        for step_id, values in _merged([change for change in changes if not isinstance(change, OutputWritten)]):
            statement = _step(claim, step_id).values(**values)
            # Progress that comes after the end is outdated.
            await session.execute(statement if "state" in values else statement.where(_table(Step).c.state == "running"))
        await _tell(session, claim.execution_id, [change.output for change in written])
    for change in changes:
        if isinstance(change, StepFinished):
            component = _component(claim, change.step_id)
            metrics.STEPS.add(component=component, outcome="known" if change.cached else "computed")
            if not change.cached:
                metrics.STEP_SECONDS.observe(change.summary.seconds, component=component)


def _component(claim: Claim, step_id: str) -> str:
    return next(step.component for step in claim.spec.steps if step.id == step_id)


def _count_end(claim: Claim, state: str) -> None:
    metrics.ENDED.add(pipeline=claim.kind, state=state)
    if state == "completed" and claim.started_at is not None:
        metrics.RAN.observe((now() - claim.started_at).total_seconds(), pipeline=claim.kind)


def _merged(changes: Sequence[StepStarted | StepProgress | StepFinished]) -> Iterable[tuple[str, dict[str, Any]]]:
    """Return one update a step, so that a step that began and ended since the last time costs one statement."""
    merged: dict[str, dict[str, Any]] = {}
    for change in changes:
        known, values = merged.setdefault(change.step_id, {}), change.values()
        if isinstance(change, StepFinished):  # what it names by the row's columns may be in this very update
            values |= {"done": known["total"]} if "total" in known else {}
            values |= {"started_at": known["started_at"]} if "started_at" in known else {}
        known.update(values)
    return merged.items()


@whole
async def complete(store: Store, claim: Claim, files: Sequence[NewFile], expires_at: datetime | None) -> bool:
    """End well, with results that can be read; False where a cancel was wished before: then nothing has changed.

    Race: a cancel comes while the results are written. The update names "no cancel wished", so one of the two is first, and a
    cancel that was answered 202 is never followed by `completed`.
    """
    moment = now()
    async with store.write() as session:
        mine = update(_ROW).where(*_mine(claim), _ROW.c.cancel_requested_at.is_(None))
        if not await _changed(session, mine.values(state="completed", completed_at=moment, lease_owner=None, lease_until=None)):
            await _guard(session, claim)  # raises where it is not ours any more
            return False
        await _add_files(session, claim, files, expires_at)
        table = _table(File)
        placed = update(table).where(table.c.storage_name == bindparam("name")).values(created_at=bindparam("at"))
        at = [{"name": f.storage_name, "at": moment + timedelta(microseconds=n)} for n, f in enumerate(files)]
        if at:  # the order of the outputs, not that in which they were ready
            await session.execute(placed, at)
        await _tell(session, claim.execution_id)
    _count_end(claim, "completed")
    return True


async def _add_files(session: AsyncSession, claim: Claim, files: Sequence[NewFile], expires_at: datetime | None) -> None:
    """Give results their rows, but for those that have one: from a moment ago, or from an executor that died then.

    What that one wrote otherwise has another name, and is replaced; the sweep finds its bytes.
    """
    names, outputs = [file.storage_name for file in files], {file.output for file in files}
    rows_of_it = _table(File).c.execution_id == claim.execution_id
    stale = _table(File).c.output.in_(outputs) & _table(File).c.storage_name.not_in(names)
    await session.execute(delete(_table(File)).where(rows_of_it, stale))
    known, moment = set((await session.execute(select(_table(File).c.storage_name).where(rows_of_it))).scalars()), now()
    rows = [
        {
            "id": str(uuid.uuid4()),
            "owner_id": claim.owner_id,
            "origin": "result",
            "filename": file.filename,
            "storage_name": file.storage_name,
            "kind": file.kind,
            "media_type": file.media_type,
            "size": file.size,
            "sha256": file.sha256,
            "header": file.header,
            "execution_id": claim.execution_id,
            "output": file.output,
            "created_at": moment + timedelta(microseconds=number),
            "expires_at": expires_at,
        }
        for number, file in enumerate(files)
        if file.storage_name not in known
    ]
    if rows:
        await session.execute(insert(_table(File)), rows)


async def _drop_files(session: AsyncSession, execution_id: str) -> None:
    """Forget the results of what ends without completing; whoever wrote the bytes deletes them, or the sweep finds them."""
    await session.execute(delete(File).where(File.execution_id == execution_id))


@whole
async def fail(store: Store, claim: Claim, error: Mapping[str, Any], step_id: str | None = None) -> None:
    """End badly: with `code`, `status`, `title` and `detail`, and the step that is to blame."""
    async with store.write() as session:
        await _guard(session, claim, state="failed", completed_at=now(), error=dict(error), lease_owner=None, lease_until=None)
        if step_id is not None:
            values = {"state": "failed", "completed_at": now(), "error": dict(error)}
            await session.execute(_step(claim, step_id).values(**values))
        await _close_steps(session, claim.execution_id, running="cancelled")
        await _drop_files(session, claim.execution_id)
        await _tell(session, claim.execution_id)
    _count_end(claim, "failed")
    if step_id is not None:
        metrics.STEPS.add(component=_component(claim, step_id), outcome="failed")


@whole
async def end_cancelled(store: Store, claim: Claim) -> None:
    """End because it was wished; the work has stopped and its outputs are gone."""
    async with store.write() as session:
        await _guard(session, claim, state="cancelled", completed_at=now(), lease_owner=None, lease_until=None)
        await _close_steps(session, claim.execution_id, running="cancelled")
        await _drop_files(session, claim.execution_id)
        await _tell(session, claim.execution_id)
    _count_end(claim, "cancelled")


def _mine(claim: Claim) -> tuple[Any, ...]:
    return _ROW.c.id == claim.execution_id, _ROW.c.state == "running", _ROW.c.fence == claim.fence


async def _guard(session: AsyncSession, claim: Claim, **values: Any) -> None:
    """Lock the execution's row for this transaction if the claim still holds, and change it.

    Raises
    ------
    LeaseLost
    """
    if not await _changed(session, update(_ROW).where(*_mine(claim)).values(values or {"fence": claim.fence})):
        raise LeaseLost(execution_id=claim.execution_id)


async def _changed(session: AsyncSession, statement: Any) -> bool:
    result: Any = await session.execute(statement)
    return bool(result.rowcount == 1)


def _step(claim: Claim, step_id: str) -> Any:
    steps = _table(Step)
    return update(steps).where(steps.c.execution_id == claim.execution_id, steps.c.step_id == step_id)


async def _close_steps(session: AsyncSession, execution_id: str, *, running: str) -> None:
    """Leave no step open in an execution that has ended."""
    steps = update(Step).where(Step.execution_id == execution_id)
    await session.execute(steps.where(Step.state == "running").values(state=running, completed_at=now()))
    await session.execute(steps.where(Step.state == "pending").values(state="skipped"))


# --- telling ---------------------------------------------------------------------------------------------------------------


async def _tell(session: AsyncSession, execution_id: str, new_outputs: Sequence[str] = ()) -> None:
    """Number and keep what listeners will be told: the execution's state after this transaction, and which outputs are new."""
    session.info["told"] = True
    seq, state, error = (await session.execute(_NUMBERED, {"execution": execution_id})).one()
    steps = (await session.execute(_STEPS, {"execution": execution_id})).all()
    current = next((step.step_id for step in steps if step.state == "running"), None)
    body: dict[str, Any] = {
        "status": state,
        "current_step": current,
        "progress_percentage": percentage(steps, state),
        "step_details": {step.step_id: step_details(step) for step in steps if step.state != "pending"},
    }
    if new_outputs:
        body["new_outputs"] = list(new_outputs)
    if error:
        body["error"] = error
    kind = {"failed": "error", "cancelled": "cancelled"}.get(state, "progress")
    values = {"execution_id": execution_id, "seq": seq, "kind": kind, "body": body, "created_at": now()}
    await session.execute(_EVENT, values)
    if session.info["outbox"]:
        await session.execute(insert(Outbox).values(execution_id=execution_id, seq=seq))


def step_details(step: Any) -> dict[str, Any]:
    """Return what a listener is told of a step, as JSON values."""
    return {
        "status": step.state,
        "started_at": step.started_at.isoformat() if step.started_at else None,
        "completed_at": step.completed_at.isoformat() if step.completed_at else None,
        "progress_percentage": step_percentage(step),
        "progress": {"done": step.done, "total": step.total, "message": step.message},
        "attempts": step.attempts,
        "cached": step.cached,
        "resource_usage": step.resources or {},
    }


def step_percentage(step: Any) -> float:
    """Return how far a step is, 0 to 100."""
    if step.state == "completed":
        return 100.0
    return round(100 * min(step.done / step.total, 1), 1) if step.total and step.state == "running" else 0.0


def percentage(steps: Sequence[Any], state: str) -> float:
    """Return how far an execution is: the mean over its steps; 100 only when it is completed."""
    if state == "completed":
        return 100.0
    return min(round(statistics.fmean(map(step_percentage, steps)), 1), 99.9) if steps else 0.0


# --- forgetting ------------------------------------------------------------------------------------------------------------


@whole
async def forget(store: Store, storage: Storage, ended_before: datetime, limit: int = 100) -> int:
    """Delete executions that ended long ago, with their results, and return how many.

    The bytes go first: a crash in between leaves records of files that are gone, which the next round deletes. What a message
    broker was not told of yet stays until it was.
    """
    old = select(Execution.id).where(Execution.state.in_(TERMINAL), Execution.completed_at < ended_before).limit(limit)
    if store.outbox:
        old = old.where(~select(Outbox.position).where(Outbox.execution_id == Execution.id).exists())
    async with store.read() as session:
        ids = list((await session.execute(old)).scalars())
        files = (await session.execute(select(File.storage_name, File.sha256).where(File.execution_id.in_(ids)))).all()
    for name, _ in files:
        await storage.delete(name)
    async with store.write() as session:
        for table in (File, Event, Step, IdempotencyKey, Outbox):
            await session.execute(delete(table).where(table.execution_id.in_(ids)))
        await session.execute(delete(Execution).where(Execution.id.in_(ids)))
    await drop_derived(store, storage, (digest for _, digest in files))
    return len(ids)
