"""Which messages of a partition are done with, and up to where that may be said."""

from __future__ import annotations

import asyncio
from collections import deque


class Lane:
    """A partition while it is ours.

    Messages are worked on side by side and end in any order; what is committed is only the beginning that is done without a
    gap. A message that is done behind one that is not comes again after a crash, and makes nothing new.

    Parameters
    ----------
    topic, partition : str, int
        Which.
    """

    def __init__(self, topic: str, partition: int) -> None:
        self.topic, self.partition = topic, partition
        self.tasks: set[asyncio.Task[None]] = set()
        self.committed: int | None = None
        self._begun: deque[int] = deque()
        self._done: set[int] = set()
        self._next: int | None = None

    def begin(self, offset: int) -> None:
        """Note a message that arrived; they arrive in order, though not without gaps."""
        self._begun.append(offset)

    def done(self, offset: int) -> None:
        """Note that a message is settled for good."""
        self._done.add(offset)
        while self._begun and self._begun[0] in self._done:
            self._next = self._begun.popleft() + 1
            self._done.remove(self._next - 1)

    @property
    def open(self) -> int:
        """Messages that arrived and are not yet within what may be committed."""
        return len(self._begun)

    @property
    def news(self) -> int | None:
        """The offset to commit: that of the next message to be read by whoever comes after us; None where it is known."""
        return self._next if self._next != self.committed else None
