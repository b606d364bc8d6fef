"""The bridge between Kafka and the intake: reads requests, tells progress, and says how it is doing. No Ray here."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from deployments.kafka.clients import Line, Sender
from deployments.kafka.door import Door
from deployments.kafka.progress import Publisher
from deployments.kafka.requests import Requests
from scangraph.contracts.errors import ScanGraphError, StoreUnavailable
from scangraph.intake import Intake
from scangraph.store import now, outbox

log = logging.getLogger("scangraph")

_ASK_SECONDS = 5.0
_PAUSE_SECONDS = 2.0


class Bridge:
    """Everything of one replica.

    Parameters
    ----------
    intake : Intake
        Takes work in; its store notes events for the outbox.
    """

    def __init__(self, intake: Intake) -> None:
        self._intake, self._line = intake, Line()
        self._sender = Sender(intake.settings.kafka, self._line)
        self._door = Door(intake, self._sender)
        self._requests = Requests(intake.settings.kafka, self._door.settle, self._line)
        self._publisher = Publisher(intake, self._sender)
        parts = {
            "requests": self._requests.run,
            "turn": self._publisher.keep_turn,
            "progress": self._publisher.run,
            "line": self._ask,
        }
        self._tasks = [asyncio.create_task(_kept(name, part), name=f"kafka {name}") for name, part in parts.items()]

    async def _ask(self) -> None:
        while True:
            await self._sender.ask()
            await asyncio.sleep(_ASK_SECONDS)

    async def status(self) -> dict[str, Any]:
        """Say how it is doing.

        Returns
        -------
        dict
            `brokers` (up, away or unknown), `trouble`; of this replica: `partitions`, `lag` by partition, `working`, `held`,
            `paused`, `telling`, `told` and the counts of messages since its start; of all: `unsent` events and
            `unsent_seconds`, the age of the oldest one (null where the records do not answer).
        """
        unsent, seconds = None, None
        with contextlib.suppress(StoreUnavailable):
            unsent, oldest = await outbox.waiting(self._intake.store)
            seconds = round((now() - oldest).total_seconds(), 1) if oldest else 0.0
        counts = {name: self._door.counts[name] for name in ("accepted", "known", "refused", "tries")}
        return {
            "brokers": {True: "up", False: "away", None: "unknown"}[self._line.up],
            "trouble": self._line.trouble,
            "partitions": self._requests.partitions,
            "lag": self._requests.lag,
            "working": self._requests.working,
            "held": self._door.held,
            "paused": self._requests.paused,
            **counts,
            "telling": self._publisher.mine,
            "told": self._publisher.told,
            "unsent": unsent,
            "unsent_seconds": seconds,
        }

    def check(self) -> None:
        """Raise if a part has ended: none must."""
        for task in self._tasks:
            if task.done():
                raise RuntimeError(f"{task.get_name()} has ended")

    async def stop(self) -> None:
        """Commit what is settled, leave the group, and let another replica tell the events."""
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)
        with contextlib.suppress(ScanGraphError):
            await self._publisher.end()
        await asyncio.to_thread(self._sender.close)


async def _kept(name: str, part: Callable[[], Awaitable[None]]) -> None:
    """Begin a part anew when it stumbles."""
    while True:
        try:
            await part()
        except Exception:  # the process boundary: a fault here must not end the service
            log.exception("the Kafka bridge's %s stumbled", name)
        await asyncio.sleep(_PAUSE_SECONDS)
