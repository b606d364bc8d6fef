"""Records on every database."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from scangraph.store import Store, open_store
from tests.postgres import fresh_database, postgres_server


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
        return f"sqlite:///{tmp_path}/records.db"
    return runner.run(fresh_database(request.getfixturevalue("postgres")))


@pytest.fixture
def store(database_url: str, runner: asyncio.Runner) -> Iterator[Store]:
    """Records at the newest schema."""
    store = runner.run(open_store(database_url))
    yield store
    runner.run(store.close())
