"""The schema's way from nothing to now, on every database."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from typing import Any

from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection, inspect

from scangraph.store import Store, open_store
from scangraph.store.database import alembic_config, migrate
from scangraph.store.tables import Base


def test_the_tables_are_what_the_migrations_make(store: Store, run: Any) -> None:
    """Fails when a table was changed and no migration was written."""

    def differences(connection: Connection) -> list[Any]:
        return list(compare_metadata(MigrationContext.configure(connection, opts={"compare_type": True}), Base.metadata))

    async def go() -> list[Any]:
        async with store.engine.connect() as connection:
            return await connection.run_sync(differences)

    assert run(go()) == []


def test_down_to_nothing_and_up_again(store: Store, run: Any) -> None:
    def down(connection: Connection) -> set[str]:
        config = alembic_config(store.url)
        config.attributes["connection"] = connection
        command.downgrade(config, "base")
        return set(inspect(connection).get_table_names())

    async def go() -> set[str]:
        async with store.engine.begin() as connection:
            left = await connection.run_sync(down)
        await migrate(store)
        await migrate(store)
        return left

    assert run(go()) == {"alembic_version"}
    test_the_tables_are_what_the_migrations_make(store, run)


def test_many_may_start_at_once(database_url: str, run: Any) -> None:
    async def go() -> None:
        stores = await asyncio.gather(*(open_store(database_url) for _ in range(4)))
        await asyncio.gather(*(store.close() for store in stores))

    run(go())
    code = f"import asyncio; from scangraph.store import open_store; asyncio.run(open_store({database_url!r}))"
    processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(3)]
    assert [process.wait(60) for process in processes] == [0, 0, 0]
