"""Kept step results."""

from __future__ import annotations

from typing import Any

from sqlalchemy import update

from scangraph.contracts import StepSummary
from scangraph.store import Store, now
from scangraph.store.results import drop_result, evict_results, find_result, keep_result
from scangraph.store.tables import StepResult

SUMMARY = StepSummary(1.0, 2.0, ("a", "b"), {"model": {"id": "m"}})


def test_a_kept_result_is_found_until_it_is_dropped(store: Store, run: Any) -> None:
    async def go() -> None:
        assert await find_result(store, "k") is None
        await keep_result(store, "k", "c/d", {"mask": "steps/k/mask"}, SUMMARY, 10)
        await keep_result(store, "k", "c/d", {"mask": "elsewhere"}, SUMMARY, 10)
        assert await find_result(store, "k") == ({"mask": "steps/k/mask"}, SUMMARY)
        await drop_result(store, "k")
        assert await find_result(store, "k") is None

    run(go())


def test_the_least_recently_used_leave_first(store: Store, run: Any) -> None:
    async def go() -> None:
        for number in range(5):
            await keep_result(store, f"k{number}", "c/d", {"mask": f"steps/k{number}/mask"}, SUMMARY, 10)
        async with store.write() as session:
            await session.execute(update(StepResult).where(StepResult.key == "k0").values(used_at=now()))
        assert await evict_results(store, 50) == []
        assert set(await evict_results(store, 25)) == {f"steps/k{n}/mask" for n in (1, 2, 3)}
        assert await find_result(store, "k0") is not None
        assert await find_result(store, "k4") is not None
        assert await evict_results(store, 0) != []

    run(go())
