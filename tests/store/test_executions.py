"""The state machine and the queue, on every database."""

from __future__ import annotations

import asyncio
import random
import uuid
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import select, update

from scangraph.contracts import Progress, StepSummary
from scangraph.contracts.api import Priority
from scangraph.contracts.errors import AlreadyEnded, IdempotencyMismatch, LeaseLost, NoSuch, QueueFull
from scangraph.contracts.pipelines import PipelineSpec
from scangraph.store import Store, executions, now
from scangraph.store.executions import Claim, NewExecution, NewFile, QueueLimits
from scangraph.store.pipelines import create_pipeline
from scangraph.store.tables import Event, Execution, File, Step

SPEC = PipelineSpec.model_validate(
    {
        "name": "two-steps",
        "inputs": {"image": {"kind": "image"}},
        "steps": [
            {"id": "organs", "component": "inference/totalseg", "inputs": {"image": "input.image"}},
            {"id": "scene", "component": "smoothing/base", "inputs": {"mask": "organs.mask"}},
        ],
        "outputs": {"scene": "scene.scene"},
    }
)
LIMITS = QueueLimits(10_000, 10_000, 900)
SUMMARY = StepSummary(1.5, 200.0, ("cut at the border",), {"model": "m"})
RESULT = NewFile("scene", "results/{}/scene.obj", "scene.obj", "scene", "model/obj", 12, "0" * 64)


async def submit(
    store: Store,
    priority: Priority = "normal",
    owner: str = "me",
    limits: QueueLimits = LIMITS,
    key: Any = None,
    size: int = 10,
) -> str:
    pipeline_id = await pipeline_of(store)
    versions = {step.component: "1.0.0" for step in SPEC.steps}
    inputs = {"image": {"file_id": None, "path": "ct.nii.gz", "label_scheme": None}}
    new = NewExecution(owner, pipeline_id, 1, SPEC, inputs, {}, versions, priority, size)
    return (await executions.accept(store, new, limits, key))[0]


async def pipeline_of(store: Store) -> str:
    from scangraph.store.pipelines import find_pipeline

    try:
        return (await find_pipeline(store, SPEC.name)).id
    except NoSuch:
        return (await create_pipeline(store, SPEC, None)).id


async def take(store: Store, worker: str = "w", lease: float = 60) -> Claim:
    claim = await executions.claim(store, worker, lease)
    assert claim is not None
    return claim


async def state_of(store: Store, execution_id: str) -> str:
    return (await executions.load(store, execution_id)).execution.state


async def finish(store: Store, claim: Claim) -> bool:
    for step in SPEC.steps:
        await executions.write_down(store, claim, [executions.StepStarted(step.id)])
        await executions.write_down(store, claim, [executions.StepFinished(step.id, SUMMARY, 1, "k", False)])
    file = NewFile(**{**RESULT.__dict__, "storage_name": f"results/{claim.execution_id}/scene.obj"})
    return await executions.complete(store, claim, [file], None)


async def events(store: Store, execution_id: str) -> Sequence[Event]:
    return await executions.events_since(store, {execution_id: 0}, limit=10_000)


def test_the_way_of_one_execution(store: Store, run: Any) -> None:
    async def go() -> None:
        execution_id = await submit(store)
        record = await executions.load(store, execution_id)
        assert (record.execution.state, record.queue_position) == ("pending", 1)
        assert [step.state for step in record.steps] == ["pending", "pending"]
        claim = await take(store)
        assert claim.execution_id == execution_id
        assert claim.spec == SPEC
        await executions.write_down(store, claim, [executions.StepStarted("organs")])
        await executions.write_down(
            store, claim, [executions.StepProgress("organs", Progress(3, 4, "tiles", {"rss_mb": 5.0}), 1)]
        )
        record = await executions.load(store, execution_id)
        assert executions.step_percentage(record.steps[0]) == 75
        assert record.steps[0].resources == {"rss_mb": 5.0}
        assert await finish(store, claim)
        record = await executions.load(store, execution_id)
        assert record.execution.state == "completed"
        assert record.execution.completed_at is not None
        assert [file.output for file in record.files] == ["scene"]
        assert [step.state for step in record.steps] == ["completed", "completed"]
        told = await events(store, execution_id)
        assert [event.seq for event in told] == list(range(1, len(told) + 1))
        assert told[-1].body["status"] == "completed"
        assert told[-1].body["progress_percentage"] == 100
        percentages = [event.body["progress_percentage"] for event in told]
        assert percentages == sorted(percentages)

    run(go())


@pytest.mark.parametrize("end", ["completed", "failed", "cancelled"])
def test_terminal_states_never_change(store: Store, run: Any, end: str) -> None:
    async def go() -> None:
        execution_id = await submit(store)
        claim = await take(store)
        if end == "completed":
            await finish(store, claim)
        elif end == "failed":
            await executions.fail(store, claim, {"code": "x", "status": 500, "title": "t", "detail": "d"}, "organs")
        else:
            await executions.end_cancelled(store, claim)
        for change in (
            executions.fail(store, claim, {}),
            executions.end_cancelled(store, claim),
            executions.complete(store, claim, [], None),
            executions.write_down(store, claim, [executions.StepStarted("organs")]),
            executions.give_back(store, claim),
        ):
            with pytest.raises(LeaseLost):
                await change
        with pytest.raises(AlreadyEnded):
            await executions.request_cancel(store, execution_id)
        assert await state_of(store, execution_id) == end
        assert await executions.claim(store, "w", 60) is None
        open_steps = [
            s.step_id for s in (await executions.load(store, execution_id)).steps if s.state in {"pending", "running"}
        ]
        assert not open_steps

    run(go())


def test_the_queue_is_ordered_by_priority_and_age(store: Store, run: Any) -> None:
    async def go() -> None:
        low = await submit(store, "low")
        normal = await submit(store, "normal")
        high = await submit(store, "high")
        second_high = await submit(store, "high")
        assert [(await executions.load(store, e)).queue_position for e in (high, second_high, normal, low)] == [1, 2, 3, 4]
        async with store.write() as session:  # it has waited for two steps of priority, and a moment
            row = await session.get(Execution, low)
            assert row is not None
            row.queue_key -= 2 * LIMITS.ageing_seconds + 1
        assert [(await take(store)).execution_id for _ in range(4)] == [low, high, second_high, normal]

    run(go())


def test_an_execution_that_does_not_fit_is_not_overtaken(store: Store, run: Any) -> None:
    async def go() -> None:
        large = await submit(store, size=1000)
        small = await submit(store, size=1)
        assert await executions.claim(store, "w", 60, room_bytes=999) is None
        assert (await take(store)).execution_id == large
        claim = await executions.claim(store, "w", 60, room_bytes=999)
        assert claim is not None
        assert claim.execution_id == small

    run(go())


def test_many_executors_take_each_execution_once(store: Store, run: Any) -> None:
    async def go() -> None:
        submitted = {await submit(store) for _ in range(30)}

        async def work(worker: str) -> list[str]:
            taken = []
            while (claim := await executions.claim(store, worker, 60)) is not None:
                taken.append(claim.execution_id)
            return taken

        taken = [e for found in await asyncio.gather(*(work(f"w{i}") for i in range(8))) for e in found]
        assert sorted(taken) == sorted(submitted)

    run(go())


def test_a_silent_executor_is_replaced_and_cannot_write_any_more(store: Store, run: Any) -> None:
    async def go() -> None:
        execution_id = await submit(store)
        old = await take(store, "old", lease=0.05)
        await executions.write_down(store, old, [executions.StepStarted("organs")])
        await executions.write_down(store, old, [executions.StepFinished("organs", SUMMARY, 1, "k", cached=False)])
        await executions.write_down(store, old, [executions.StepStarted("scene")])
        await asyncio.sleep(0.1)
        new = await take(store, "new")
        assert new.execution_id == execution_id
        assert new.fence == old.fence + 1
        states = {step.step_id: step.state for step in (await executions.load(store, execution_id)).steps}
        assert states == {"organs": "completed", "scene": "pending"}
        lost, _ = await executions.renew(store, "old", [old], 60)
        assert lost == {execution_id}
        with pytest.raises(LeaseLost):
            await executions.write_down(store, old, [executions.StepStarted("scene")])
        with pytest.raises(LeaseLost):
            await executions.complete(store, old, [], None)
        assert await executions.renew(store, "new", [new], 60) == (set(), set())
        assert await finish(store, new)

    run(go())


def test_a_lease_that_is_renewed_is_kept(store: Store, run: Any) -> None:
    async def go() -> None:
        await submit(store)
        claim = await take(store, "w", lease=0.3)
        for _ in range(4):
            await asyncio.sleep(0.15)
            assert await executions.renew(store, "w", [claim], 0.3) == (set(), set())
        assert await executions.claim(store, "other", 60) is None

    run(go())


def test_given_back_work_keeps_its_place(store: Store, run: Any) -> None:
    async def go() -> None:
        first, _second = await submit(store), await submit(store)
        claim = await take(store)
        await executions.write_down(store, claim, [executions.StepStarted("organs")])
        await executions.give_back(store, claim)
        again = await take(store)
        assert again.execution_id == first
        started = (await executions.load(store, first)).execution.started_at
        assert started is not None

    run(go())


def test_cancelling_what_waits_is_at_once_and_what_runs_is_told(store: Store, run: Any) -> None:
    async def go() -> None:
        waiting = await submit(store)
        assert await executions.request_cancel(store, waiting) == "cancelled"
        assert await executions.claim(store, "w", 60) is None
        working = await submit(store)
        claim = await take(store)
        assert await executions.request_cancel(store, working) == "running"
        assert await executions.request_cancel(store, working) == "running"
        assert await executions.renew(store, "w", [claim], 60) == (set(), {working})
        await executions.end_cancelled(store, claim)
        assert (await events(store, working))[-1].kind == "cancelled"
        with pytest.raises(NoSuch):
            await executions.request_cancel(store, str(uuid.uuid4()))

    run(go())


def test_a_cancel_that_was_answered_is_never_followed_by_completed(store: Store, run: Any) -> None:
    async def go() -> None:
        for _ in range(20):
            execution_id = await submit(store)
            claim = await take(store)

            async def cancel(execution_id: str = execution_id) -> bool:
                await asyncio.sleep(random.random() * 0.01)
                try:
                    await executions.request_cancel(store, execution_id)
                except AlreadyEnded:
                    return False
                return True

            async def complete(claim: Claim = claim) -> bool:
                await asyncio.sleep(random.random() * 0.01)
                return await finish(store, claim)

            wished, completed = await asyncio.gather(cancel(), complete())
            assert wished != completed
            assert (await state_of(store, execution_id)) == ("completed" if completed else "running")
            if not completed:
                await executions.end_cancelled(store, claim)
                assert not (await executions.load(store, execution_id)).files

    run(go())


def test_cancel_and_claim_race_to_one_end(store: Store, run: Any) -> None:
    async def go() -> None:
        for _ in range(20):
            execution_id = await submit(store)
            state, claim = await asyncio.gather(
                executions.request_cancel(store, execution_id), executions.claim(store, "w", 60)
            )
            if claim is None:
                assert state == "cancelled"
            else:
                assert state == "running"
                assert await executions.renew(store, "w", [claim], 60) == (set(), {execution_id})
                await executions.end_cancelled(store, claim)

    run(go())


def test_one_key_makes_one_execution(store: Store, run: Any) -> None:
    async def go() -> None:
        await pipeline_of(store)
        made = await asyncio.gather(*(submit(store, key=("key", "a" * 64)) for _ in range(50)))
        assert len(set(made)) == 1
        assert (await executions.counts(store)) == {"pending": 1}
        with pytest.raises(IdempotencyMismatch):
            await submit(store, key=("key", "b" * 64))
        assert await submit(store, owner="somebody else", key=("key", "b" * 64)) not in made

    run(go())


def test_the_queue_is_bounded(store: Store, run: Any) -> None:
    async def go() -> None:
        limits = QueueLimits(3, 2, 900)
        for _ in range(2):
            await submit(store, limits=limits)
        with pytest.raises(QueueFull, match="for you"):
            await submit(store, limits=limits)
        await submit(store, owner="other", limits=limits)
        with pytest.raises(QueueFull, match="in all"):
            await submit(store, owner="third", limits=limits)
        await take(store)
        await submit(store, owner="third", limits=limits)

    run(go())


def test_estimates_come_from_earlier_runs_and_are_null_without_them(store: Store, run: Any) -> None:
    async def go() -> None:
        first = await submit(store, size=100)
        assert (await executions.load(store, first)).estimated_completion is None
        claim = await take(store)
        await finish(store, claim)
        async with store.write() as session:
            values = {"started_at": now() - timedelta(seconds=10), "completed_at": now()}
            await session.execute(update(Execution).where(Execution.id == first).values(**values))
        second, third = await submit(store, size=200), await submit(store, size=200)
        expected = (await executions.load(store, second)).estimated_completion
        behind = (await executions.load(store, third)).estimated_completion
        assert expected is not None
        assert behind is not None
        assert 18 < (expected - now()).total_seconds() < 21  # twice the size
        assert 28 < (behind - now()).total_seconds() < 31  # and ten seconds in the queue
        claim = await take(store)
        async with store.write() as session:
            await session.execute(
                update(Execution).where(Execution.id == second).values(started_at=now() - timedelta(seconds=60))
            )
        assert (await executions.load(store, second)).estimated_completion is None  # longer than it ever took

    run(go())


def test_pages_have_no_gaps_and_no_repeats_while_others_insert(store: Store, run: Any) -> None:
    async def go() -> None:
        made = [await submit(store) for _ in range(25)]
        seen: list[str] = []
        before = None
        while page := await executions.list_executions(store, before=before, limit=7):
            seen.extend(row.id for row in page)
            before = (page[-1].created_at, page[-1].id)
            await submit(store)
        assert seen == made[::-1]
        assert {row.id for row in await executions.list_executions(store, state="running")} == set()
        assert len(await executions.list_executions(store, pipeline="two-steps", owner_id="me", limit=5)) == 5
        assert await executions.list_executions(store, owner_id="nobody") == []

    run(go())


def test_listeners_miss_nothing_while_many_write(store: Store, run: Any) -> None:
    """Several writers of one execution, a reader that polls: every number arrives once and in order."""

    async def go() -> None:
        execution_id = await submit(store)
        claim = await take(store)
        await executions.write_down(store, claim, [executions.StepStarted("organs")])
        ready = asyncio.Event()
        heard: list[int] = []

        async def write(number: int) -> None:
            for done in range(10):
                await executions.write_down(
                    store, claim, [executions.StepProgress("organs", Progress(done, 10, f"{number}"), 1)]
                )

        async def listen() -> None:
            while not ready.is_set() or await executions.events_since(store, {execution_id: heard[-1]}):
                heard.extend(e.seq for e in await executions.events_since(store, {execution_id: heard[-1] if heard else 0}))
                await asyncio.sleep(0.001)

        listener = asyncio.create_task(listen())
        await asyncio.gather(*(write(i) for i in range(4)))
        ready.set()
        await listener
        assert heard == list(range(1, len(heard) + 1))
        assert len(heard) == 43

    run(go())


def test_forgetting_takes_records_and_bytes(store: Store, run: Any, tmp_path: Any) -> None:
    from scangraph.storage import open_storage

    async def go() -> None:
        storage = open_storage((tmp_path / "s").as_uri())
        execution_id = await submit(store, key=("k", "0" * 64))
        claim = await take(store)
        await storage.write(f"results/{execution_id}/scene.obj", b"v 0 0 0")
        await finish(store, claim)
        young = await submit(store)
        assert await executions.forget(store, storage, now() - timedelta(days=1)) == 0
        assert await executions.forget(store, storage, now() + timedelta(seconds=1)) == 1
        async with store.read() as session:
            for table, column in ((Execution, Execution.id), (Step, Step.execution_id), (File, File.execution_id)):
                ids = (await session.execute(select(column))).scalars().all()
                assert execution_id not in ids, table
        assert [name async for name in storage.list("results/")] == []
        assert await state_of(store, young) == "pending"

    run(go())
