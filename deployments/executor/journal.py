"""What becomes of an execution's steps, on its way into the records."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace

from scangraph.contracts.errors import LeaseLost, StoreUnavailable
from scangraph.store import Store, executions
from scangraph.store.executions import Change, Claim, StepProgress

#: Changes gather for so long before they are written: many steps take less, and a transaction takes some milliseconds.
_GATHER_SECONDS = 0.1
#: How often progress alone is written, at most.
_PROGRESS_SECONDS = 1.0


class Journal:
    """Writes the changes of one execution's steps, in their order, a little later and together.

    Nothing that must not be lost goes through here: an execution's acceptance, claim and end are transactions of their own, and
    a step whose change was lost with its executor is simply done again. So no step waits for the records.

    Parameters
    ----------
    store : Store
        The records.
    claim : Claim
        Whose steps.
    """

    def __init__(self, store: Store, claim: Claim) -> None:
        self._store, self._claim = store, claim
        self._pending: list[Change] = []
        self._writing = asyncio.Lock()
        self._urgent, self._any = asyncio.Event(), asyncio.Event()

    def add(self, change: Change) -> None:
        """Note a change; of a step's progress only the newest counts, and what it said of resources stays."""
        if isinstance(change, StepProgress):
            for older in [c for c in self._pending if isinstance(c, StepProgress) and c.step_id == change.step_id]:
                self._pending.remove(older)
                if change.progress.resources is None:
                    change = replace(change, progress=replace(change.progress, resources=older.progress.resources))
        else:
            self._urgent.set()
        self._pending.append(change)
        self._any.set()

    async def flush(self) -> None:
        """Write what there is now.

        Raises
        ------
        LeaseLost
        StoreUnavailable
            The changes wait for the next time.
        """
        async with self._writing:
            changes, self._pending = self._pending, []
            self._urgent.clear()
            self._any.clear()
            if not changes:
                return
            try:
                await executions.write_down(self._store, self._claim, changes)
            except StoreUnavailable:
                self._pending = [*changes, *self._pending]
                raise

    async def keep_writing(self) -> None:
        """Write until cancelled. A lost lease is noticed where it matters, a database that is away may come back."""
        while True:
            await self._any.wait()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_PROGRESS_SECONDS):
                    await self._urgent.wait()
                    await asyncio.sleep(_GATHER_SECONDS)
            with contextlib.suppress(LeaseLost):
                try:
                    await self.flush()
                except StoreUnavailable:
                    self._any.set()
                    await asyncio.sleep(_PROGRESS_SECONDS)
