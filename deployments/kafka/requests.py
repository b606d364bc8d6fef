"""The consumer: reads requests, has several worked on at once, and commits what is settled."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from confluent_kafka import KafkaError, KafkaException, Message, TopicPartition
from confluent_kafka.aio import AIOConsumer

from deployments.kafka.clients import Line, configuration
from deployments.kafka.offsets import Lane
from scangraph.settings import KafkaSettings

log = logging.getLogger("scangraph")

#: Between two looks whether a message came; also the longest that a commit waits.
_POLL_SECONDS = 0.5
_COMMIT_SECONDS = 0.5
#: What is worked on when a partition goes gets so long to end; what does not comes again at its next owner.
_FAREWELL_SECONDS = 5.0
#: One that reads, and some for what its callbacks call.
_THREADS = 4
#: Brokers that hang are not waited for longer when we go.
_GOODBYE_SECONDS = 10.0
#: What a commit meets while partitions move.
_MOVING = {KafkaError.REBALANCE_IN_PROGRESS, KafkaError.ILLEGAL_GENERATION, KafkaError.UNKNOWN_MEMBER_ID}
#: Messages of a partition that may be done behind one that is not: so many come again after a crash.
_FARTHEST_AHEAD = 500


class Requests:
    """Reads the requests' topic as one of a group.

    Parameters
    ----------
    settings : KafkaSettings
        Which topic, which group.
    settle : callable
        Works on a message and returns when it need not come again; raises nothing.
    line : Line
        Told of troubles.

    Notes
    -----
    Races. A partition goes to another replica while its messages are worked on: both may settle a message, which makes one
    execution, and either's commit is true, for it names only what was settled. An offset that goes back costs repetitions.
    A partition that comes back begins a new `Lane`: what the old one still does is not counted.
    """

    def __init__(self, settings: KafkaSettings, settle: Callable[[Message], Awaitable[None]], line: Line) -> None:
        self._settings, self._settle, self._line = settings, settle, line
        self._lanes: dict[tuple[str, int], Lane] = {}
        self._paused: set[tuple[str, int]] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._committed = time.monotonic()
        #: Partition -> messages that are there and not settled, of the partitions that are ours.
        self.lag: dict[str, int] = {}

    def _configuration(self) -> dict[str, Any]:
        s = self._settings
        return {
            "auto.offset.reset": "earliest",
            "queued.max.messages.kbytes": 16 * 1024,
            "partition.assignment.strategy": "cooperative-sticky",
            **configuration(s),
            "group.id": s.group,
            "session.timeout.ms": int(s.session_seconds * 1000),
            "enable.auto.commit": False,
            "enable.auto.offset.store": False,
            "error_cb": self._heard,
        }

    async def _heard(self, error: Any) -> None:
        self._line.heard(error)

    async def run(self) -> None:
        """Read until cancelled."""
        # An executor of ours: the consumer's close would wait for its own, and so for a call that hangs.
        threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="kafka requests")
        consumer = AIOConsumer(self._configuration(), executor=threads)
        try:
            await consumer.subscribe(
                [self._settings.requests_topic], on_assign=self._assigned, on_revoke=self._revoked, on_lost=self._lost
            )
            while True:
                await self._make_room(consumer)
                await self._read(consumer)
                if time.monotonic() - self._committed > _COMMIT_SECONDS:
                    await self._commit(consumer, self._lanes.values())
                    await self._measure(consumer)
        finally:
            await self._close(consumer)
            threads.shutdown(wait=False)

    async def _read(self, consumer: AIOConsumer) -> None:
        first = await consumer.poll(_POLL_SECONDS)
        if first is None:
            return
        free = self._settings.concurrent - len(self._tasks) - 1
        for message in (first, *(await consumer.consume(free, 0) if free > 0 else ())):
            if message.error() is not None:
                self._line.heard(message.error())
            else:
                self._begin(message)

    def _begin(self, message: Message) -> None:
        lane = self._lanes.get((message.topic(), message.partition()))  # type: ignore[arg-type]
        if lane is None:  # no longer ours: its next owner gets it
            return
        lane.begin(message.offset())  # type: ignore[arg-type]
        task = asyncio.create_task(self._work(lane, message))
        for tasks in (self._tasks, lane.tasks):
            tasks.add(task)
            task.add_done_callback(tasks.discard)

    async def _work(self, lane: Lane, message: Message) -> None:
        await self._settle(message)
        lane.done(message.offset())  # type: ignore[arg-type]

    async def _make_room(self, consumer: AIOConsumer) -> None:
        """Return when there is room for a message, or when none comes for a while: the broker wants to be asked regularly.

        What has no room stays with the broker: its partitions are paused.
        """
        if len(self._tasks) >= self._settings.concurrent:
            await asyncio.wait(self._tasks, timeout=1, return_when=asyncio.FIRST_COMPLETED)
        full = len(self._tasks) >= self._settings.concurrent
        wanted = {key for key, lane in self._lanes.items() if full or lane.open >= _FARTHEST_AHEAD}
        with contextlib.suppress(KafkaException):  # one of them has just gone
            if wanted - self._paused:
                await consumer.pause(_named(wanted - self._paused))
            if self._paused - wanted:
                await consumer.resume(_named((self._paused - wanted) & self._lanes.keys()))
        self._paused = wanted

    async def _commit(self, consumer: AIOConsumer, lanes: Iterable[Lane]) -> None:
        self._committed = time.monotonic()
        news = [(lane, lane.news) for lane in lanes if lane.news is not None]
        if not news or self._line.up is False:  # librdkafka would wait for brokers that hang, for minutes
            return
        offsets = [TopicPartition(lane.topic, lane.partition, offset) for lane, offset in news]
        try:
            answers = await consumer.commit(offsets=offsets, asynchronous=False)
        except KafkaException as error:  # tried again with the next ones; at worst messages come twice
            if error.args[0].code() not in _MOVING:
                self._line.heard(error.args[0])
            return
        for (lane, offset), answer in zip(news, answers, strict=True):
            if answer.error is None:
                lane.committed = offset

    async def _assigned(self, _: AIOConsumer, partitions: Sequence[TopicPartition]) -> None:
        for p in partitions:
            self._lanes[p.topic, p.partition] = Lane(p.topic, p.partition)
            self._paused.discard((p.topic, p.partition))

    async def _revoked(self, consumer: AIOConsumer, partitions: Sequence[TopicPartition]) -> None:
        """Settle what is begun, say so, and let go. The others of the group wait for it."""
        lanes = self._let_go(partitions)
        tasks = {task for lane in lanes for task in lane.tasks}
        if tasks:
            await asyncio.wait(tasks, timeout=_FAREWELL_SECONDS)
        await self._commit(consumer, lanes)
        for task in tasks:
            task.cancel()

    async def _lost(self, _: AIOConsumer, partitions: Sequence[TopicPartition]) -> None:
        """Stop what is begun: somebody else has it by now, and would not hear what we commit."""
        for lane in self._let_go(partitions):
            for task in lane.tasks:
                task.cancel()

    def _let_go(self, partitions: Sequence[TopicPartition]) -> list[Lane]:
        keys = [(p.topic, p.partition) for p in partitions]
        self._paused -= set(keys)
        return [self._lanes.pop(key) for key in keys if key in self._lanes]

    async def _close(self, consumer: AIOConsumer) -> None:
        """Leave the group, which ends as a revocation does."""
        try:
            async with asyncio.timeout(_GOODBYE_SECONDS):
                await consumer.close()
        except TimeoutError:
            log.warning("Kafka: the brokers do not answer to a goodbye; the partitions go to others after the session")
        finally:
            for task in self._tasks:
                task.cancel()
            self._lanes, self._paused, self.lag = {}, set(), {}

    async def _measure(self, consumer: AIOConsumer) -> None:
        """Note how far behind we are, as far as the last answers of the brokers say."""
        here = [TopicPartition(lane.topic, lane.partition) for lane in self._lanes.values()]
        found = {}
        with contextlib.suppress(KafkaException):
            for at in await consumer.position(here) if here else ():
                _, high = await consumer.get_watermark_offsets(at, cached=True)
                lane = self._lanes.get((at.topic, at.partition))
                if at.offset >= 0 and high >= 0 and lane is not None:
                    found[str(at.partition)] = max(high - at.offset, 0) + lane.open
        self.lag = found

    @property
    def partitions(self) -> list[int]:
        """The partitions that are ours."""
        return sorted(partition for _, partition in self._lanes)

    @property
    def working(self) -> int:
        """Messages at work."""
        return len(self._tasks)

    @property
    def paused(self) -> bool:
        """Whether there is no room for more."""
        return bool(self._paused)


def _named(keys: Iterable[tuple[str, int]]) -> list[TopicPartition]:
    return [TopicPartition(topic, partition) for topic, partition in keys]
