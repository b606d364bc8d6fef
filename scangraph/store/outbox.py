"""What a message broker is still to be told, and who tells it.

A row of the outbox is written in the transaction that numbers the event, and taken away once the broker has it. So nothing is
lost, whoever dies, and what is told twice has the same number. There is no cursor over all events: on PostgreSQL a transaction
that began earlier may be seen later, and a cursor would have passed it.
"""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime, timedelta
from typing import NamedTuple

from sqlalchemy import and_, delete, func, insert, or_, select, update
from sqlalchemy.exc import IntegrityError

from scangraph.store.database import Store, now, whole
from scangraph.store.tables import Event, IdempotencyKey, Lease, Outbox


class Unsent(NamedTuple):
    """An event that is still to be told."""

    position: int
    event: Event
    key: str | None  # the idempotency key that made its execution


@whole
async def unsent(store: Store, limit: int = 500) -> list[Unsent]:
    """Return the next events, in order within each execution."""
    query = select(Outbox.position, Event, IdempotencyKey.key)
    query = query.join(Event, and_(Event.execution_id == Outbox.execution_id, Event.seq == Outbox.seq))
    query = query.outerjoin(IdempotencyKey, IdempotencyKey.execution_id == Outbox.execution_id)
    async with store.read() as session:
        rows = (await session.execute(query.order_by(Outbox.position).limit(limit))).all()
    return [Unsent(position, event, key) for position, event, key in rows]


@whole
async def sent(store: Store, positions: Collection[int]) -> None:
    """Take away what the broker has. Race: two do at once, one of them slow; a position is never used again."""
    async with store.write() as session:
        await session.execute(delete(Outbox).where(Outbox.position.in_(positions)))


@whole
async def waiting(store: Store) -> tuple[int, datetime | None]:
    """Return how many events are still to be told, and when the first of them happened."""
    async with store.read() as session:
        count = (await session.execute(select(func.count()).select_from(Outbox))).scalar_one()
        first = select(Event.created_at).join(Outbox, and_(Event.execution_id == Outbox.execution_id, Event.seq == Outbox.seq))
        oldest = (await session.execute(first.order_by(Outbox.position).limit(1))).scalar_one_or_none()
    return int(count), oldest


@whole
async def take_turn(store: Store, name: str, holder: str, seconds: float) -> bool:
    """Become, or stay, the one who does something for so long; False while somebody else does.

    Race: two find nobody. The name is the table's primary key, and the update names who had it.
    """
    moment = now()
    values = {"holder": holder, "until": moment + timedelta(seconds=seconds)}
    free = or_(Lease.holder == holder, Lease.until < moment)
    try:
        async with store.write() as session:
            taken = await session.execute(update(Lease).where(Lease.name == name, free).values(**values).returning(Lease.name))
            if taken.scalar_one_or_none() is not None:
                return True
            if (await session.execute(select(Lease.name).where(Lease.name == name))).scalar_one_or_none() is not None:
                return False
            await session.execute(insert(Lease).values(name=name, **values))
    except IntegrityError:
        return False
    return True


@whole
async def end_turn(store: Store, name: str, holder: str) -> None:
    """Let somebody else do it, now."""
    async with store.write() as session:
        await session.execute(delete(Lease).where(Lease.name == name, Lease.holder == holder))
