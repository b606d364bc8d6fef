"""The lines before the stages: whose turn it is, what is expected, who is told."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from deployments.executor.lines import Costs, Lines, Work
from scangraph.contracts import WAITING, Progress


def nobody(_: Progress) -> None:
    """Hear it."""


class Cluster:
    """Replicas, as Serve would count them."""

    def __init__(self, **replicas: int) -> None:
        self.replicas = replicas

    async def look(self) -> Mapping[str, int]:
        return self.replicas


class Steps:
    """Steps that stand in a line, go in, and stay until they are let go."""

    def __init__(self, lines: Lines) -> None:
        self.lines = lines
        self.inside: list[str] = []
        self.tasks: dict[str, asyncio.Task[None]] = {}
        self.go: dict[str, asyncio.Event] = {}

    async def stand(self, name: str, order: float = 0) -> None:
        self.go[name] = asyncio.Event()

        async def step() -> None:
            async with self.lines.turn("nnunet", "inference/x", 0, order, nobody):
                self.inside.append(name)
                await self.go[name].wait()

        self.tasks[name] = asyncio.create_task(step())
        await asyncio.sleep(0)

    async def leave(self, name: str) -> None:
        self.go[name].set()
        await self.tasks[name]
        await asyncio.sleep(0)


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not true():  # noqa: ASYNC110 - what it waits for tells nobody
            await asyncio.sleep(0.02)


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(test())


def test_the_urgent_go_first_and_equals_in_their_order() -> None:
    async def test() -> None:
        steps = Steps(Lines())
        for name, order in (("a", 5), ("b", 5), ("low", 9), ("later", 5), ("urgent", 1)):
            await steps.stand(name, order)
        assert steps.inside == ["a", "b"]  # one at work, one whose inputs are fetched
        for name in ("a", "b", "urgent"):
            await steps.leave(name)
        assert steps.inside == ["a", "b", "urgent", "later", "low"]

    run(test)


def test_a_new_replica_takes_from_the_line() -> None:
    async def test() -> None:
        cluster = Cluster(nnunet=1)
        steps = Steps(Lines(cluster.look))
        for number in range(8):
            await steps.stand(str(number))
        await until(lambda: bool(steps.lines._replicas))
        assert len(steps.inside) == 2
        cluster.replicas["nnunet"] = 3
        await until(lambda: len(steps.inside) == 6)
        cluster.replicas["nnunet"] = 1  # what is there stays there; nobody follows
        await until(lambda: steps.lines.replicas("nnunet") == 1)
        await steps.leave("0")
        assert len(steps.inside) == 6
        for task in steps.tasks.values():
            task.cancel()
        await asyncio.wait(steps.tasks.values())
        assert steps.lines.work() == {"nnunet": (0, 0)}
        assert steps.lines._inside["nnunet"] == 0
        await steps.lines.stop()

    run(test)


def test_who_leaves_the_line_is_skipped() -> None:
    async def test() -> None:
        steps = Steps(Lines())
        for name in "abcd":
            await steps.stand(name)
        steps.tasks["c"].cancel()
        await asyncio.wait([steps.tasks["c"]])
        assert steps.lines.work()["nnunet"][1] == 3
        await steps.leave("a")
        assert steps.inside == ["a", "b", "d"]

    run(test)


def test_a_cold_stage_is_told_of_once() -> None:
    async def test() -> None:
        cluster = Cluster(nnunet=0, smoothing=1)
        lines = Lines(cluster.look)
        heard: list[str] = []
        with lines.told("nnunet", lambda progress: heard.append(progress.message)):
            await until(lambda: heard == ["starting nnunet"])
            async with lines.turn("smoothing", "smoothing/base", 0, 0, lambda progress: heard.append(progress.message)):
                await asyncio.sleep(1.5)
        assert heard == ["starting nnunet"]
        await lines.stop()

    run(test)


def test_whoever_waits_hears_it() -> None:
    async def test() -> None:
        steps = Steps(Lines())
        heard: list[str] = []
        await steps.stand("a")
        await steps.stand("b")

        async def third() -> None:
            async with steps.lines.turn("nnunet", "inference/x", 0, 0, lambda progress: heard.append(progress.message)):
                pass

        task = asyncio.create_task(third())
        await asyncio.sleep(0)
        assert heard == [WAITING]
        await steps.leave("a")
        await task

    run(test)


def test_steps_are_expected_to_take_what_they_took() -> None:
    costs = Costs()
    assert costs.expect("inference/x", 100) > 0
    costs.learn_all([("inference/x", 10.0, 100), ("inference/x", 30.0, 200), ("inference/x", 12.0, 100)])
    assert costs.expect("inference/x", 100) == 12.0
    assert costs.expect("inference/x", 1000) == 120.0
    assert costs.expect("inference/x", 0) == 12.0  # of unknown size: the median run
    costs.learn("image/resize", 0.5, 0)
    assert costs.expect("image/resize", 10) == 0.5


def test_what_is_left_follows_the_tiles() -> None:
    work = Work(100.0)
    work.heard(Progress(0, 0, WAITING))
    assert work.seconds() == 100.0
    work.heard(Progress(0, 0, "loading the model"))
    assert 99 < work.seconds() <= 100
    work.heard(Progress(9, 10, "tiles"))
    assert work.seconds() < 1  # nearly all tiles were done in no time: so will be the rest
