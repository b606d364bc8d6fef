"""PostgreSQL ends as in a power cut, or stands still, while executions run: the real server, gateway and executor."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from benchmarks.faults.checker import Results, check, results
from benchmarks.faults.clients import Client, Log, Work
from deployments.imageio.nifti import write_nifti
from scangraph.settings import load_settings
from tests.conftest import constant_volume
from tests.postgres import Postgres, fresh_database, postgres
from tests.servers import Server, serving

#: Of each account; each takes a while, so that some run and some wait when it happens.
WORKS = [Work(f"mask-{n}", "test-threshold", "image", "ct", {"label": 1 + n, "seconds": 0.4}) for n in range(6)]
SIZES = {"alice": 40, "bob": 50}


@pytest.fixture(scope="module")
def database() -> Iterator[Postgres]:
    with postgres() as server:
        yield server


@pytest.fixture(scope="module")
def server(database: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    url = asyncio.run(fresh_database(database.url))
    executor = {"lease_seconds": 3, "kept_results_bytes": 0}
    with serving(load_settings(data=tmp_path_factory.mktemp("data"), database_url=url, executor=executor)) as server:
        yield server


@pytest.fixture(scope="module")
def tokens(server: Server) -> dict[str, str]:
    found = {}
    for name in SIZES:
        body = {"username": name, "password": server.account(name)}
        found[name] = httpx.post(f"{server.url}/v1/auth/login", json=body).json()["access_token"]
    return found


def work(server: Server, tokens: dict[str, str], run: str, harm: Callable[[], None]) -> Log:
    """Let both accounts send their work, do harm, and return what they saw."""

    async def all_of_it() -> None:
        clients = [
            Client(server, name, token, {"ct.nii.gz": write_nifti(constant_volume(SIZES[name]))}, log, run)
            for name, token in tokens.items()
        ]
        for client in clients:
            await client.prepare()
        await asyncio.gather(*(client.submit(one) for client in clients for one in WORKS[:4]))
        harming = asyncio.create_task(asyncio.to_thread(harm))
        await asyncio.sleep(0.1)  # the others are sent while it happens
        await asyncio.gather(*(client.submit(one) for client in clients for one in WORKS[4:]))
        await asyncio.gather(harming, *(client.wait() for client in clients))
        for client in clients:
            await client.review([other for other in clients if other is not client])

    log = Log(Path(tempfile.mkdtemp(dir=server.settings.data)) / "clients.jsonl")
    asyncio.run(all_of_it())
    return log


@pytest.fixture(scope="module")
def quiet(server: Server, tokens: dict[str, str]) -> Results:
    log = work(server, tokens, "quiet", lambda: None)
    assert check(log.lines) == []
    return results(log.lines)


def test_postgresql_is_restarted(database: Postgres, server: Server, tokens: dict[str, str], quiet: Results) -> None:
    log = work(server, tokens, "restarted", database.restart)
    assert check(log.lines, quiet) == []
    assert len(results(log.lines)) == 2 * len(WORKS)


def test_postgresql_is_held_for_longer_than_a_lease(
    database: Postgres, server: Server, tokens: dict[str, str], quiet: Results
) -> None:
    def hold() -> None:
        with database.held():
            time.sleep(6)  # twice a lease

    log = work(server, tokens, "held", hold)
    assert check(log.lines, quiet) == []
    assert len(results(log.lines)) == 2 * len(WORKS)
