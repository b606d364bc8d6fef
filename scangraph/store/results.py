"""Step results that are kept, by the hash of what made them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from datetime import timedelta
from typing import Any

from sqlalchemy import delete, func, insert, select, update
from sqlalchemy.exc import IntegrityError

from scangraph.contracts import StepSummary
from scangraph.store.database import Store, now, whole
from scangraph.store.tables import StepResult

#: Uses closer together than this are not written down one by one.
_FRESH = timedelta(seconds=60)


@whole
async def find_result(store: Store, key: str) -> tuple[dict[str, str], StepSummary] | None:
    """Return (port -> storage name, what the step said) of a kept result."""
    async with store.read() as session:
        row = await session.get(StepResult, key)
    if row is None:
        return None
    if now() - row.used_at > _FRESH:
        async with store.write() as session:
            await session.execute(update(StepResult).where(StepResult.key == key).values(used_at=now()))
    summary = StepSummary(**{**row.summary, "warnings": tuple(row.summary["warnings"])})
    return dict(row.outputs), summary


@whole
async def keep_result(
    store: Store, key: str, component: str, outputs: Mapping[str, str], summary: StepSummary, size: int
) -> None:
    """Write down a kept result. Race: two executions made the same one; they are equal, and the first stays."""
    moment, said = now(), asdict(summary)
    values: dict[str, Any] = {"component": component, "outputs": dict(outputs), "size": size, "created_at": moment}
    said["warnings"] = list(said["warnings"])
    try:
        async with store.write() as session:
            await session.execute(insert(StepResult).values(key=key, summary=said, used_at=moment, **values))
    except IntegrityError:
        return


@whole
async def drop_result(store: Store, key: str) -> None:
    """Forget a result whose bytes are gone or damaged."""
    async with store.write() as session:
        await session.execute(delete(StepResult).where(StepResult.key == key))


@whole
async def evict_results(store: Store, limit_bytes: int, batch: int = 100) -> list[str]:
    """Forget the least recently used results until the rest fits, and return the storage names to be deleted.

    Race: a step finds a result and its bytes are deleted before it reads them. It then finds nothing under the name and runs.
    """
    async with store.write() as session:
        total = (await session.execute(select(func.coalesce(func.sum(StepResult.size), 0)))).scalar_one()
        names: list[str] = []
        if total <= limit_bytes:
            return names
        oldest = (await session.execute(select(StepResult).order_by(StepResult.used_at).limit(batch))).scalars().all()
        for row in oldest:
            if total <= limit_bytes:
                break
            names.extend(row.outputs.values())
            total -= row.size
            await session.delete(row)
        return names
