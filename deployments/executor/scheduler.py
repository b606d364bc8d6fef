"""What is at work now: takes executions while there is room, keeps their leases, hears of cancels, cleans up."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from datetime import timedelta

from deployments.executor.runner import Runner, Tools
from scangraph.contracts.errors import LeaseLost, ScanGraphError, StoreUnavailable
from scangraph.store import executions, now
from scangraph.store.executions import Claim
from scangraph.store.files import delete_expired, sweep_orphans
from scangraph.store.results import evict_results

log = logging.getLogger("scangraph")

#: How often the queue and the cancels are looked at when nobody calls.
_LOOK_SECONDS = 1.0
_CLEAN_SECONDS = 60.0
#: Looking for orphans lists the whole storage.
_SWEEP_SECONDS = 6 * 3600.0
#: What nobody names and is older than this is nobody's any more: longer than any upload or execution takes.
_ORPHAN_AGE = timedelta(days=2)


class Scheduler:
    """One executor's work.

    Parameters
    ----------
    tools : Tools
        What its executions share.
    room_bytes : int
        Decoded inputs that may be at work at once. One execution that is larger runs alone.
    """

    def __init__(self, tools: Tools, room_bytes: int) -> None:
        self._tools, self._room = tools, room_bytes
        self.worker = str(uuid.uuid4())
        self._running: dict[str, tuple[Claim, asyncio.Task[None]]] = {}
        self._stopped_by: dict[str, str] = {}  # execution -> cancel | lost | shutdown
        self._called = asyncio.Event()
        self._cleaned = self._swept = time.monotonic()
        self._cleaning: asyncio.Task[None] | None = None
        self._loop = asyncio.create_task(self._work(), name="scheduler")

    def wake(self) -> None:
        """Look now: something was accepted or is to be cancelled."""
        self._called.set()

    async def news(self, seen: int, seconds: float) -> int:
        """Wait until something was written about an execution here since number `seen`; return the newest number."""
        return await self._tools.store.news(seen, seconds)

    def check(self) -> None:
        """Raise if the loop has ended: it must not."""
        if self._loop.done():
            raise RuntimeError(f"the executor's loop has ended: {self._loop.exception()!r}")

    @property
    def running(self) -> list[str]:
        """Executions at work."""
        return list(self._running)

    async def stop(self) -> None:
        """Stop working and return what is unfinished to the queue."""
        for task in (self._loop, self._cleaning):
            if task is not None:
                task.cancel()
                await asyncio.wait([task])
        for execution_id, (_, task) in self._running.items():
            self._stopped_by[execution_id] = "shutdown"
            task.cancel()
        if self._running:
            await asyncio.wait([task for _, task in self._running.values()], timeout=20)
        if keeping := set(self._tools.keeping):  # what is made should be there for the next executor
            _, slow = await asyncio.wait(keeping, timeout=5)
            for task in slow:
                task.cancel()

    async def _work(self) -> None:
        while True:
            try:
                await self._look()
            except StoreUnavailable:
                log.warning("the records cannot be reached; the executor goes on when they can")
            except Exception:  # the process boundary: a fault here must not end the service
                log.exception("the executor's loop stumbled")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_SECONDS):
                    await self._called.wait()
            self._called.clear()

    async def _look(self) -> None:
        settings, store = self._tools.settings.executor, self._tools.store
        claims = [claim for claim, _ in self._running.values()]
        lost, cancelled = await executions.renew(store, self.worker, claims, settings.lease_seconds)
        for execution_id in (*lost, *cancelled):
            self._stop_one(execution_id, "lost" if execution_id in lost else "cancel")
        while len(self._running) < settings.max_running:
            taken = sum(claim.input_bytes for claim, _ in self._running.values())
            room = None if not self._running else max(self._room - taken, 0)
            claim = await executions.claim(store, self.worker, settings.lease_seconds, room)
            if claim is None:
                break
            if claim.execution_id in self._running:  # our own, whose lease ran out while this process stood still
                self._stop_one(claim.execution_id, "lost")
                await asyncio.wait([self._running[claim.execution_id][1]])
            self._start(claim)
        if time.monotonic() - self._cleaned > _CLEAN_SECONDS:
            self._cleaned = time.monotonic()
            if self._cleaning is None or self._cleaning.done():  # beside the loop: it must not delay the leases
                self._cleaning = asyncio.create_task(self._clean(), name="cleaning")

    def _start(self, claim: Claim) -> None:
        task = asyncio.create_task(self._run(claim), name=f"execution {claim.execution_id}")
        self._running[claim.execution_id] = (claim, task)
        if claim.cancel_requested:
            self._stop_one(claim.execution_id, "cancel")

    def _stop_one(self, execution_id: str, why: str) -> None:
        if execution_id in self._running and execution_id not in self._stopped_by:
            self._stopped_by[execution_id] = why
            self._running[execution_id][1].cancel()

    async def _run(self, claim: Claim) -> None:
        execution_id, runner = claim.execution_id, Runner(self._tools, claim)
        try:
            await runner.run()
        except (LeaseLost, StoreUnavailable) as error:
            log.warning("execution %s: %s", execution_id, error)
        except asyncio.CancelledError:
            await self._end_stopped(claim, runner)
        except Exception:  # the lease runs out and somebody tries again
            log.exception("execution %s: its runner stumbled", execution_id)
        finally:
            if self._running.get(execution_id, (None,))[0] is claim:
                del self._running[execution_id]
            self._stopped_by.pop(execution_id, None)
            self.wake()

    async def _end_stopped(self, claim: Claim, runner: Runner) -> None:
        """End as it was stopped: first in the records, then in the storage. What was lost is somebody else's now."""
        why = self._stopped_by.get(claim.execution_id)
        with contextlib.suppress(LeaseLost, StoreUnavailable):
            if why == "cancel":
                await executions.end_cancelled(self._tools.store, claim)
                runner.watch.end("cancelled")
                await runner.remove_written()
            elif why == "shutdown":
                await executions.give_back(self._tools.store, claim)

    async def _clean(self) -> None:
        """Forget what is old. Every step may run twice or be cut off; nothing depends on it."""
        tools = self._tools
        with contextlib.suppress(ScanGraphError):
            for name in await evict_results(tools.store, tools.settings.executor.kept_results_bytes):
                await tools.storage.delete(name)
            await delete_expired(tools.store, tools.storage, now())
            days = tools.settings.executor.retention_days
            if days:
                await executions.forget(tools.store, tools.storage, now() - timedelta(days=days))
            if time.monotonic() - self._swept > _SWEEP_SECONDS:
                self._swept = time.monotonic()
                await sweep_orphans(tools.store, tools.storage, _ORPHAN_AGE)
