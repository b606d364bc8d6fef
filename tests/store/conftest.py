"""Records on every database."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from scangraph.store import Store, open_store
from tests.postgres import postgres_server


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """URL of a real server."""
    with postgres_server() as url:
        yield url


@pytest.fixture
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture
def run(runner: asyncio.Runner) -> Callable[[Any], Any]:
    """Run a coroutine in the test's loop."""
    return runner.run


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, runner: asyncio.Runner, tmp_path: Path) -> str:
    """URL of an empty database."""
    if request.param == "sqlite":
        return f"sqlite+aiosqlite:///{tmp_path}/records.db"
    server, name = request.getfixturevalue("postgres"), f"test_{uuid.uuid4().hex}"

    async def create() -> None:
        engine = create_async_engine(f"{server}/postgres", isolation_level="AUTOCOMMIT")
        async with engine.connect() as connection:
            await connection.execute(text(f"CREATE DATABASE {name}"))
        await engine.dispose()

    runner.run(create())
    return f"{server}/{name}"


@pytest.fixture
def store(database_url: str, runner: asyncio.Runner) -> Iterator[Store]:
    """Records at the newest schema."""
    store = runner.run(open_store(database_url))
    yield store
    runner.run(store.close())
