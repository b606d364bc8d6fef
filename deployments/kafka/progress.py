"""The publisher: tells the broker every event, from the outbox."""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid

from confluent_kafka import KafkaError

from deployments.kafka.clients import Letter, Sender
from scangraph.contracts.errors import NoSuch, StoreUnavailable
from scangraph.contracts.messages import CORRELATION, KEY_PREFIX
from scangraph.intake import Intake, told
from scangraph.store import outbox
from scangraph.store.outbox import Unsent

log = logging.getLogger("scangraph")

_PAUSE_SECONDS = 1.0


class Publisher:
    """Tells events, one replica at a time.

    Parameters
    ----------
    intake : Intake
        Where the records are.
    sender : Sender
        Takes the messages away, in order and however long it takes.

    Notes
    -----
    Race: a replica that was thought dead goes on telling beside its successor. Both tell in order and neither leaves anything
    out, so whoever keeps the highest number of each execution and passes over what is not higher has heard all, once.
    """

    def __init__(self, intake: Intake, sender: Sender) -> None:
        self._intake, self._sender, self._settings = intake, sender, intake.settings.kafka
        self._holder, self._until, self._lease = str(uuid.uuid4()), 0.0, f"tell {self._settings.progress_topic}"[:64]
        self.told = 0

    @property
    def mine(self) -> bool:
        """Whether it is this replica's turn."""
        return time.monotonic() < self._until

    async def keep_turn(self) -> None:
        """Take the turn when nobody has it, and keep it, until cancelled."""
        seconds = self._settings.lease_seconds
        while True:
            begun = time.monotonic()
            try:
                taken = await outbox.take_turn(self._intake.store, self._lease, self._holder, seconds)
                self._until = begun + seconds if taken else 0.0
            except StoreUnavailable:
                pass  # it runs out by itself
            await asyncio.sleep(seconds / 3)

    async def run(self) -> None:
        """Tell what there is to tell, until cancelled: what this process writes at once, what others write at the next look."""
        seen = 0
        while True:
            try:
                more = self.mine and await self._tell_some()
            except StoreUnavailable:
                more = False
                await asyncio.sleep(_PAUSE_SECONDS)
            if not more:
                seen = await self._intake.store.news(seen, self._settings.poll_seconds)

    async def _tell_some(self) -> bool:
        some = await outbox.unsent(self._intake.store)
        if not some:
            return False
        letters = [(unsent.position, await self._letter(unsent)) for unsent in some]
        answers = await self._sender.send([letter for _, letter in letters if letter is not None])
        left = iter(answers)
        done = [position for position, letter in letters if letter is None or _has(next(left))]
        if done:
            await outbox.sent(self._intake.store, done)
            self.told += len(done)
        if len(done) < len(some):
            trouble = next(error for error in answers if not _has(error))
            log.warning("Kafka: %d events cannot be told: %s", len(some) - len(done), trouble and trouble.str())
            await asyncio.sleep(_PAUSE_SECONDS)
        return True

    async def _letter(self, unsent: Unsent) -> Letter | None:
        try:
            message = await told(self._intake, unsent.event)
        except NoSuch:  # forgotten while it was being read
            return None
        key = unsent.key or ""
        headers = [(CORRELATION, key.removeprefix(KEY_PREFIX).encode())] if key.startswith(KEY_PREFIX) else []
        value = json.dumps(message, default=str).encode()
        return Letter(self._settings.progress_topic, unsent.event.execution_id.encode(), value, [*headers])

    async def end(self) -> None:
        """Let another replica tell, at once."""
        await outbox.end_turn(self._intake.store, self._lease, self._holder)


def _has(error: KafkaError | None) -> bool:
    return error is None
