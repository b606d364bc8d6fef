"""The connection: engine, transactions, migrations."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import functools
import logging
import os
from collections.abc import AsyncIterator, Callable, Coroutine
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, DateTime, Dialect, event, make_url, text
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.types import TypeDecorator

from scangraph import metrics
from scangraph.contracts.errors import StoreUnavailable, UnusableText
from scangraph.store import sqlite

log = logging.getLogger("scangraph")

_MIGRATIONS = Path(__file__).with_name("migrations")
#: Any number will do, as long as every process takes the same one (PostgreSQL, `pg_advisory_lock`).
_MIGRATION_LOCK = 0x5CA9
#: PostgreSQL's word for a text with a NUL; SQLite takes it and finds nothing.
_NOT_IN_REPERTOIRE = "22021"
_POOL: dict[str, Any] = {"pool_size": 8, "max_overflow": 4, "pool_timeout": 30}
_IN_MEMORY = {None, "", ":memory:"}
#: Between two looks whether another process still writes.
_LOOK_SECONDS = 0.001


def now() -> datetime:
    """Return the time, in UTC."""
    return datetime.now(UTC)


class UtcDateTime(TypeDecorator[datetime]):
    """An aware UTC time in every database; SQLite itself knows no zones."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002, D102
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("a time without a zone")
        return value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002, D102
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


P = ParamSpec("P")
T = TypeVar("T")
_begun: set[asyncio.Task[Any]] = set()


def whole(function: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, Coroutine[Any, Any, T]]:
    """Let a transaction that has begun run to its end, also where its caller is cancelled.

    A driver that is interrupted in the middle of `BEGIN` or `COMMIT` leaves a connection of which nobody knows whether it
    holds the lock (seen: every writer waited for 30 s). So a cancelled caller leaves at once, and what it began
    is done or not done as if it had been cancelled a moment later.
    """

    @functools.wraps(function)
    async def begun(*arguments: P.args, **named: P.kwargs) -> T:
        task = asyncio.get_running_loop().create_task(function(*arguments, **named))
        _begun.add(task)  # the loop itself holds tasks only weakly
        task.add_done_callback(_ended)
        return await asyncio.shield(task)

    return begun


def _ended(task: asyncio.Task[Any]) -> None:
    _begun.discard(task)
    if not task.cancelled():
        task.exception()  # an abandoned one's failure is nobody's


class Store:
    """Transactions on one database.

    Parameters
    ----------
    url : str
        `sqlite:///…` or `postgresql+asyncpg://…`.
    outbox : bool
        Whether events are also noted for a message broker.
    """

    def __init__(self, url: str, outbox: bool = False) -> None:
        self.url, self.outbox = url, outbox
        self.is_sqlite = url.startswith("sqlite")
        self.engine = _engine(url)
        self._read = async_sessionmaker(self.engine, expire_on_commit=False)
        writing = self.engine.execution_options(scangraph_write=True)
        self._write = async_sessionmaker(writing, expire_on_commit=False, info={"outbox": outbox})
        self._line = _Line(self.engine.url.database) if self.is_sqlite else None
        self._told, self._bell = 0, asyncio.Event()

    @contextlib.asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncSession]:
        """Give a session for looking only: one consistent view, nothing locked."""
        with _translated():
            async with self._read() as session:
                yield session

    @contextlib.asynccontextmanager
    async def write(self) -> AsyncIterator[AsyncSession]:
        """Give a session whose changes are committed together when the block ends, and dropped when it raises."""
        with _translated():
            async with self._line or contextlib.nullcontext(), self._write.begin() as session:
                yield session
        if session.info.get("told"):
            self._told += 1
            self._bell.set()
            self._bell = asyncio.Event()

    async def news(self, seen: int, seconds: float) -> int:
        """Wait until an execution's event was committed here since number `seen`, and return the newest number."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self._told == seen:
                    await self._bell.wait()
        return self._told

    async def close(self) -> None:
        """Let the connections go."""
        await self.engine.dispose()
        if self._line is not None:
            self._line.close()


class _Line:
    """SQLite has one writer: the queue for it, of this process and of the others.

    SQLite's lock stays what protects, but it is not fair: who waits for it sleeps up to 0.1 s between two looks, and a busy
    process comes first again and again (seen: 1.7 s, with the executor and a gateway both writing). So before it there are two
    locks, on files beside the database: who holds `next` is the next to get `now`, and only then lets `next` go. A process that
    has just written finds `next` taken by the one that waits.

    Parameters
    ----------
    database : str or None
        Path of the file; None for a database in memory, which has one process.
    """

    def __init__(self, database: str | None) -> None:
        self._here = asyncio.Lock()
        self._names = [f"{database}.next", f"{database}.now"] if database else []
        self._files: list[int] = []

    async def __aenter__(self) -> None:
        await self._here.acquire()
        try:
            while len(self._files) < len(self._names):
                name = self._names[len(self._files)]
                self._files.append(os.open(name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            for file in self._files:
                while not _locked(file):  # noqa: ASYNC110 – the kernel tells nobody
                    await asyncio.sleep(_LOOK_SECONDS)
            for file in self._files[:-1]:
                fcntl.flock(file, fcntl.LOCK_UN)
        except BaseException:
            await self.__aexit__()
            raise

    async def __aexit__(self, *_: object) -> None:
        for file in self._files:
            fcntl.flock(file, fcntl.LOCK_UN)
        self._here.release()

    def close(self) -> None:
        """Close the files, which also unlocks them."""
        for file in self._files:
            os.close(file)
        self._files = []


def _locked(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextlib.contextmanager
def _translated() -> Any:
    try:
        yield
    except (OperationalError, InterfaceError, PoolTimeout, OSError) as error:
        reason = type(getattr(error, "orig", None) or error).__name__
        log.warning("the database did not answer: %s", reason)
        metrics.DATABASE_ERRORS.add()
        raise StoreUnavailable(reason=reason, retry_after_seconds=2) from error
    except DBAPIError as error:
        if error.connection_invalidated:
            metrics.DATABASE_ERRORS.add()
            raise StoreUnavailable(reason="the connection was lost", retry_after_seconds=2) from error
        if getattr(error.orig, "sqlstate", None) == _NOT_IN_REPERTOIRE:
            raise UnusableText from error
        raise


def _engine(url: str) -> AsyncEngine:
    if not url.startswith("sqlite"):
        return create_async_engine(url, pool_pre_ping=True, pool_size=10, max_overflow=10, pool_timeout=10)
    sqlite.register()
    options = {"timeout": sqlite.LOCK_SECONDS, "check_same_thread": False, "factory": sqlite.Connection}
    inline = make_url(url).set(drivername=sqlite.NAME)
    engine = create_async_engine(inline, connect_args=options, **({} if inline.database in _IN_MEMORY else _POOL))

    @event.listens_for(engine.sync_engine, "connect")
    def _configure(connection: Any, _record: Any) -> None:
        # The driver would begin transactions by itself, and too late: a read that turns into a write cannot wait its turn.
        connection.isolation_level = None
        cursor = connection.cursor()
        cursor.execute("PRAGMA journal_mode=WAL")
        cursor.execute("PRAGMA synchronous=FULL")  # an accepted execution survives a power cut
        cursor.execute("PRAGMA foreign_keys=ON")
        cursor.close()

    @event.listens_for(engine.sync_engine, "begin")
    def _begin(connection: Connection) -> None:
        raw: Any = connection.connection.dbapi_connection
        if connection.get_execution_options().get("scangraph_write"):
            sqlite.begin_writing(raw)
        else:
            raw.execute("BEGIN")

    return engine


def alembic_config(url: str) -> Config:
    """Return alembic's configuration, for the migrations in this package."""
    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS))
    config.attributes["url"] = url
    return config


@whole
async def migrate(store: Store) -> None:
    """Bring the database to the newest schema; safe when many processes start at once."""

    def upgrade(connection: Connection) -> None:
        config = alembic_config(store.url)
        config.attributes["connection"] = connection
        if not store.is_sqlite:  # SQLite: the transaction is the lock, BEGIN IMMEDIATE
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _MIGRATION_LOCK})
        command.upgrade(config, "head")

    with _translated():
        async with store.engine.execution_options(scangraph_write=True).begin() as connection:
            await connection.run_sync(upgrade)


async def open_store(url: str, outbox: bool = False) -> Store:
    """Open the database at its newest schema; `outbox` as for `Store`.

    Raises
    ------
    StoreUnavailable
        If it does not answer.
    """
    store = Store(url, outbox)
    if store.is_sqlite and store.engine.url.database:
        folder = Path(store.engine.url.database).parent
        await asyncio.to_thread(folder.mkdir, parents=True, exist_ok=True)
    try:
        await migrate(store)
    except BaseException:
        await store.close()
        raise
    return store
