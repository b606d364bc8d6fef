"""SQLite for SQLAlchemy's asynchronous engine, without a thread for every statement.

aiosqlite hands each call to a thread and waits; most of what the records ask takes less than that hop, and a whole execution's
statements took twice as much processor time that way (`python -m benchmarks.records`). What does wait, waits elsewhere: for the
disk, in a commit, in a thread, and for another writer in `begin_writing`, asleep.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
from typing import Any

from sqlalchemy import URL, Pool
from sqlalchemy.dialects import registry
from sqlalchemy.dialects.sqlite.pysqlite import SQLiteDialect_pysqlite
from sqlalchemy.pool import AsyncAdaptedQueuePool, StaticPool
from sqlalchemy.util import await_only

NAME = "sqlite+inline"
#: How long a call may keep everybody waiting for a lock. Readers need none, but for a moment after a crash.
LOCK_SECONDS = 0.25
_WRITER_SECONDS, _LOOK_SECONDS = 30.0, 0.005


class InlineSqlite(SQLiteDialect_pysqlite):
    """The standard library's driver, called where the engine runs."""

    driver = "inline"
    is_async = True
    supports_statement_cache = True

    @classmethod
    def get_pool_class(cls, url: URL) -> type[Pool]:
        """Return a pool that waits without blocking; a database in memory has one connection."""
        return AsyncAdaptedQueuePool if cls._is_url_file_db(url) else StaticPool

    def do_commit(self, dbapi_connection: Any) -> None:
        """Commit. What was only read has nothing to wait for."""
        if dbapi_connection.total_changes == dbapi_connection.changes_seen:
            dbapi_connection.commit()
        else:
            await_only(asyncio.to_thread(dbapi_connection.commit))
            dbapi_connection.changes_seen = dbapi_connection.total_changes


class Cursor(sqlite3.Cursor):
    """A cursor that SQLAlchemy may let go of while it waits."""

    async def _async_soft_close(self) -> None:
        """Called when a result was read whole, or dropped; there is nothing to wait for."""


class Connection(sqlite3.Connection):
    """A connection that knows what it has committed."""

    changes_seen = 0

    def cursor(self, factory: Any = Cursor) -> Any:
        """Return a cursor."""
        return super().cursor(factory)


def register() -> None:
    """Make the dialect known to SQLAlchemy by its name."""
    registry.register("sqlite.inline", __name__, InlineSqlite.__name__)


def begin_writing(connection: sqlite3.Connection) -> None:
    """Begin a transaction that writes, after whoever writes now.

    Raises
    ------
    sqlite3.OperationalError
        If that takes longer than half a minute.
    """
    end = time.monotonic() + _WRITER_SECONDS
    while True:
        try:
            connection.execute("BEGIN IMMEDIATE")
            return
        except sqlite3.OperationalError as error:
            busy = (error.sqlite_errorcode & 0xFF) in {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}
            if not busy or time.monotonic() > end:
                raise
        await_only(asyncio.sleep(_LOOK_SECONDS))
