"""The commonest faults, on a service of their own: the scenarios of `python -m benchmarks.faults`, with less to do."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.faults.clients import mixture
from benchmarks.faults.scenarios import World, run

pytestmark = pytest.mark.slow
WORK = mixture(organs=1)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A service, and what comes of the work where nothing disturbs it."""
    world = World(tmp_path_factory.mktemp("data"), {"SCANGRAPH_OBJECT_STORE_MB": "512"})
    try:
        world.start()
        figures = asyncio.run(run(world, "quiet", WORK))
        assert figures["faults"] == []
        assert len(world.quiet) == len(WORK) * 2
        yield world
    finally:
        world.stop()


@pytest.mark.parametrize("name", ["nnunet", "executor", "gateway", "controller", "everything"])
def test_what_is_killed_loses_nothing(world: World, name: str) -> None:
    figures = asyncio.run(run(world, name, WORK))
    print(json.dumps(figures))
    assert figures["faults"] == [], (figures, Path(world.data / "serve.log").read_text()[-2000:])
    assert figures["ended"] == {"completed": len(WORK) * 2}
    assert figures["killed"] > 0
