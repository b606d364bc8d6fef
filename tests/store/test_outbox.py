"""The outbox and its turns, on every database."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from scangraph.store import Store, executions, open_store
from scangraph.store.outbox import end_turn, sent, take_turn, unsent, waiting
from tests.store.test_executions import submit


@pytest.fixture
def told(database_url: str, run: Any) -> Iterator[Store]:
    """Records that note events for a broker."""
    store = run(open_store(database_url, outbox=True))
    yield store
    run(store.close())


def test_without_a_broker_nothing_is_noted(store: Store, run: Any) -> None:
    run(submit(store))
    assert run(waiting(store)) == (0, None)


def test_every_event_once_in_order_until_it_is_sent(told: Store, run: Any) -> None:
    async def go() -> None:
        first = await submit(told, key=("kafka:c", "0" * 64))
        ids = [first, *await asyncio.gather(*(submit(told) for _ in range(20)))]
        await asyncio.gather(*(executions.request_cancel(told, key) for key in ids))
        count, oldest = await waiting(told)
        assert (count, oldest is not None) == (42, True)
        found = await unsent(told, 30)
        assert len(found) == 30
        assert [u.position for u in found] == [u.position for u in await unsent(told, 30)]
        assert {u.key for u in found if u.event.execution_id == first} == {"kafka:c"}
        await sent(told, [u.position for u in found])
        found += await unsent(told, 30)
        history: dict[str, list[int]] = {}
        for u in found:
            history.setdefault(u.event.execution_id, []).append(u.event.seq)
        assert history == {key: [1, 2] for key in ids}
        await sent(told, [u.position for u in found])
        assert await waiting(told) == (0, None)
        # What is slow to say that it was sent takes away nothing newer.
        await submit(told)
        await sent(told, [u.position for u in found])
        assert (await waiting(told))[0] == 1

    run(go())


def test_one_has_the_turn(store: Store, run: Any) -> None:
    async def go() -> None:
        taken = await asyncio.gather(*(take_turn(store, "tell", f"h{n}", 0.5) for n in range(8)))
        assert sum(taken) == 1
        holder = f"h{taken.index(True)}"
        assert await take_turn(store, "tell", holder, 0.5)
        assert not await take_turn(store, "tell", "other", 0.5)
        assert await take_turn(store, "another", "other", 0.5)
        await asyncio.sleep(0.6)
        assert await take_turn(store, "tell", "other", 30)
        assert not await take_turn(store, "tell", holder, 30)
        await end_turn(store, "tell", holder)  # not its any more
        assert not await take_turn(store, "tell", holder, 30)
        await end_turn(store, "tell", "other")
        assert await take_turn(store, "tell", holder, 30)

    run(go())
