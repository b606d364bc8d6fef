"""Taking an execution away because somebody wishes it; what is old goes by `executions.forget`."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import delete, select

from scangraph.contracts.api import TERMINAL
from scangraph.contracts.errors import InUse, NoSuch, StillAtWork
from scangraph.storage import Storage
from scangraph.store.database import Store, whole
from scangraph.store.derived import drop_derived
from scangraph.store.files import users_of_files
from scangraph.store.tables import Event, Execution, File, IdempotencyKey, Outbox, Step


async def remove_execution(store: Store, storage: Storage, execution_id: str) -> None:
    """Delete an execution that has ended, with its results and their copies.

    Files' rows, their bytes, the execution: whatever is cut off in between, what is left says that it ended, its bytes are
    found by the sweep, and it can be deleted again. Race: a result becomes an input meanwhile. `executions.accept` holds the
    rows of its inputs, so this waits and finds that execution, or is first, and that one finds no file.

    Raises
    ------
    NoSuch
    StillAtWork
    InUse
        While one that waits or runs has one of the results among its inputs, or a message broker was not told everything yet.
    """
    files = await _take_files(store, execution_id)
    for name, _ in files:
        await storage.delete(name)
    await _take_records(store, execution_id)
    await drop_derived(store, storage, (digest for _, digest in files))


@whole
async def _take_files(store: Store, execution_id: str) -> Sequence[tuple[str, str]]:
    """Take the rows of its results away, and return (storage name, SHA-256) of each."""
    async with store.write() as session:
        query = select(Execution).where(Execution.id == execution_id).with_for_update()
        row = (await session.execute(query)).scalar_one_or_none()
        if row is None:
            raise NoSuch(kind="execution", id=execution_id)
        if row.state not in TERMINAL:
            raise StillAtWork(execution_id=execution_id, state=row.state)
        if (await session.execute(select(Outbox.position).where(Outbox.execution_id == execution_id).limit(1))).first():
            users = "a message broker, which was not told everything yet"
            raise InUse(kind="execution", id=execution_id, users=users, hint="try again in a moment")
        files = (await session.execute(select(File).where(File.execution_id == execution_id).with_for_update())).scalars().all()
        users_of = await users_of_files(session)
        using = sorted({user for file in files for name in (file.id, file.storage_name) for user in users_of.get(name, ())})
        if using:
            hint = "wait until it has ended, or cancel it"
            raise InUse(kind="execution", id=execution_id, users=f"execution {', '.join(using[:3])}", hint=hint)
        await session.execute(delete(File).where(File.execution_id == execution_id))
        return [(file.storage_name, file.sha256) for file in files]


@whole
async def _take_records(store: Store, execution_id: str) -> None:
    async with store.write() as session:
        for table in (Event, Step, IdempotencyKey):
            await session.execute(delete(table).where(table.execution_id == execution_id))
        await session.execute(delete(Execution).where(Execution.id == execution_id))
