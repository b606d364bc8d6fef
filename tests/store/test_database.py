"""Transactions of several processes on one database."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import pytest
from sqlalchemy import text

from scangraph.store import Store, open_store


def test_nobody_is_starved(database_url: str, run: Any) -> None:
    """Two that write all the time take turns; each store locks with files of its own, as processes do."""
    if not database_url.startswith("sqlite"):
        pytest.skip("PostgreSQL has many writers")
    order: list[int] = []

    async def write(store: Store, name: int, times: int) -> None:
        for _ in range(times):
            async with store.write() as session:
                await session.execute(text("SELECT 1"))
                order.append(name)

    async def go() -> None:
        stores = [await open_store(database_url) for _ in range(2)]
        try:
            # Four of each wait at any time.
            await asyncio.gather(*(write(store, name, 25) for name, store in enumerate(stores) for _ in range(4)))
        finally:
            for store in stores:
                await store.close()

    run(go())
    assert sorted(order) == [0] * 100 + [1] * 100
    both = order[: max(i for i, name in enumerate(order) if name != order[-1])]  # until one of them had finished
    assert max(len(list(turns)) for _, turns in itertools.groupby(both)) <= 3


def test_a_writer_that_gives_up_lets_the_others_write(store: Store, run: Any) -> None:
    async def hold(seconds: float) -> None:
        async with store.write():
            await asyncio.sleep(seconds)

    async def go() -> None:
        first = asyncio.create_task(hold(0.2))
        await asyncio.sleep(0.02)
        second = asyncio.create_task(hold(60))
        await asyncio.sleep(0.02)
        second.cancel()
        await asyncio.gather(first, second, return_exceptions=True)
        async with asyncio.timeout(5):
            await hold(0)

    run(go())
