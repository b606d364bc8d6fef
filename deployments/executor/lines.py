"""The lines before the stages: who is next, how much work stands there, and who hears that a stage is being started.

A replica gets two steps, one that it works on and one whose inputs it fetches meanwhile; all others wait here. So a replica
that has just started finds work, and what is urgent goes first, which no queue inside of a replica could do.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
import logging
import statistics
import time
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping

from scangraph import metrics
from scangraph.contracts import WAITING, Progress
from scangraph.handles import OnProgress

log = logging.getLogger("scangraph")

#: Steps that one replica is given at once.
_AT_A_REPLICA = 2
#: How often the replicas are counted while there is work. What is quicker than the first look needs none.
_LOOK_SECONDS = 1.0
_FIRST_LOOK_SECONDS = 0.2
#: Runs of a component that its next one is judged by.
_HISTORY = 32
#: Of a component that has never run.
_UNKNOWN_SECONDS = 30.0

#: Counts the running replicas, by deployment.
Look = Callable[[], Awaitable[Mapping[str, int]]]


class Costs:
    """What steps take: the median of a component's last runs, for the size of the image where sizes are known."""

    def __init__(self) -> None:
        self._runs: dict[str, deque[tuple[float, int]]] = defaultdict(lambda: deque(maxlen=_HISTORY))

    def learn(self, component: str, seconds: float, size: int) -> None:
        """Note a run."""
        self._runs[component].append((seconds, size))

    def learn_all(self, runs: Iterable[tuple[str, float, int]]) -> None:
        """Note earlier runs, the oldest first."""
        for component, seconds, size in runs:
            self.learn(component, seconds, size)

    def expect(self, component: str, size: int) -> float:
        """Return seconds."""
        runs = self._runs.get(component)
        if not runs:
            return _UNKNOWN_SECONDS
        rates = [seconds / run_size for seconds, run_size in runs if run_size > 0]
        if rates and size > 0:
            return statistics.median(rates) * size
        return statistics.median(seconds for seconds, _ in runs)


class Work:
    """A step before a stage or in it.

    Parameters
    ----------
    expected : float
        Seconds that such steps take.
    """

    def __init__(self, expected: float) -> None:
        self._expected = expected
        self._begun: float | None = None
        self._part = 0.0

    def heard(self, progress: Progress) -> None:
        """Note how far it is."""
        if progress.message == WAITING:
            return
        if self._begun is None:
            self._begun = time.monotonic()
        self._part = progress.done / progress.total if progress.total else 0.0

    def seconds(self) -> float:
        """Return what is left of it: by its tiles, where it counts such, else by what others took."""
        if self._begun is None:
            return self._expected
        taken = time.monotonic() - self._begun
        if self._part > 0:
            return taken * (1 - self._part) / self._part
        return max(self._expected - taken, 0.0)


class Lines:
    """The lines of one executor.

    Parameters
    ----------
    look : callable, optional
        Counts replicas; without it each stage has one.
    """

    def __init__(self, look: Look | None = None) -> None:
        self.costs = Costs()
        self._look = look
        self._looking: asyncio.Task[None] | None = None
        self._replicas: dict[str, int] = {}
        self._work: dict[str, set[Work]] = defaultdict(set)
        self._inside: dict[str, int] = defaultdict(int)
        self._waiting: dict[str, list[tuple[float, int, asyncio.Future[None]]]] = defaultdict(list)
        self._count = itertools.count()
        self._tell: dict[int, tuple[str, OnProgress]] = {}

    def replicas(self, deployment: str) -> int:
        """Return how many replicas a stage had when they were counted last."""
        return self._replicas.get(deployment, 1)

    def work(self) -> dict[str, tuple[float, int]]:
        """Return seconds of work and steps of every stage that has had some."""
        found = {name: (sum(one.seconds() for one in steps), len(steps)) for name, steps in self._work.items()}
        for name, (seconds, steps) in found.items():
            metrics.WORK_SECONDS.set(seconds, deployment=name)
            metrics.WORK_STEPS.set(steps, deployment=name)
        return found

    @contextlib.contextmanager
    def told(self, deployment: str, on_progress: OnProgress) -> Iterator[None]:
        """Tell, until the block ends, when the stage has no replica and is being started."""
        number = next(self._count)
        self._tell[number] = (deployment, on_progress)
        self._keep_looking()
        try:
            yield
        finally:
            self._tell.pop(number, None)

    @contextlib.asynccontextmanager
    async def turn(
        self, deployment: str, component: str, size: int, order: float, on_progress: OnProgress
    ) -> AsyncIterator[Work]:
        """Stand in a stage's line; the block is entered when it is this step's turn.

        Parameters
        ----------
        order : float
            Who has the lower number goes first, and of equal ones who came first.
        on_progress : callable
            Hears that it waits, and that the stage is being started.
        """
        work = Work(self.costs.expect(component, size))
        self._work[deployment].add(work)
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting[deployment], (order, next(self._count), turn))
        self._let_in(deployment)
        try:
            with self.told(deployment, on_progress):
                if not turn.done():
                    on_progress(Progress(0, 0, WAITING))
                await turn
                yield work
        finally:
            self._work[deployment].discard(work)
            if turn.done() and not turn.cancelled():
                self._inside[deployment] -= 1
            turn.cancel()
            self._let_in(deployment)

    def _let_in(self, deployment: str) -> None:
        waiting = self._waiting[deployment]
        while waiting and self._inside[deployment] < _AT_A_REPLICA * max(self.replicas(deployment), 1):
            _, _, turn = heapq.heappop(waiting)
            if not turn.done():  # who was cancelled stands there still
                turn.set_result(None)
                self._inside[deployment] += 1

    def _keep_looking(self) -> None:
        if self._look is not None and (self._looking is None or self._looking.done()):
            self._looking = asyncio.create_task(self._keep_counting(self._look), name="replicas")

    async def _keep_counting(self, look: Look) -> None:
        await asyncio.sleep(_FIRST_LOOK_SECONDS)
        while any(self._work.values()) or self._tell:
            try:
                self._replicas = dict(await look())
            except Exception as error:  # Serve's controller is away; what was known stays
                log.warning("the replicas cannot be counted: %s", type(error).__name__)
            for number, (deployment, on_progress) in list(self._tell.items()):
                if self._replicas.get(deployment) == 0:
                    on_progress(Progress(0, 0, f"starting {deployment}"))
                    del self._tell[number]
            for deployment in list(self._waiting):
                self._let_in(deployment)
            await asyncio.sleep(_LOOK_SECONDS)

    async def stop(self) -> None:
        """Stop counting."""
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.wait([self._looking])
