"""Who accessed whose data. Rows are appended; the database refuses to change them, and each vouches for the one before.

A row names an account, an operation, an execution or a file by its id, and how it ended. Nothing in it was written by a client:
no file's name, no path, no parameter. Its digest covers the row and the digest before, so whoever changes one row, takes one
away or puts one in must rewrite all that follow; who has noted a digest elsewhere sees that, too.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import select, text

from scangraph.store.database import Store, now, whole
from scangraph.store.tables import Audit

#: Any number will do, as long as every process takes the same one (PostgreSQL, `pg_advisory_xact_lock`).
_LOCK = 0x5CAA
#: What stands before the first row's digest.
_NOTHING = "0" * 64
#: The same account doing the same to the same object again within so many seconds is not told again.
_SAME_SECONDS = 60.0
_MOST_KNOWN = 10_000
_PAGE = 1000


@dataclass(frozen=True)
class Access:
    """Somebody did something to somebody's data.

    Parameters
    ----------
    account_id, account : str
        Who; the name as it was.
    door : str
        `http`, `ws`, `grpc` or `kafka`.
    action : str
        Method and template of a route, or the name of an operation.
    code : str
        How it ended, in the door's words.
    kind, object_id : str
        `file`, `execution`, `upload`, and its UUID; empty for a list.
    address : str
        Network that the request came from, where that is known.
    trace_id : str
        Of the request.
    """

    account_id: str
    account: str
    door: str
    action: str
    code: str
    kind: str = ""
    object_id: str = ""
    address: str = ""
    trace_id: str = ""


@dataclass(frozen=True)
class Verdict:
    """What a check of the whole log found.

    Parameters
    ----------
    rows : int
        That are right, from the first one on.
    head : str
        `seq:digest` of the last of them: note it elsewhere.
    fault : str
        What is wrong with the next one; empty if nothing is.
    """

    rows: int
    head: str
    fault: str = ""


def digest(row: Audit, before: str) -> str:
    """Return a row's digest, given the one before."""
    told = [row.seq, row.at.isoformat(), row.account_id, row.account, row.address, row.door, row.action]
    told += [row.kind, row.object_id, row.code, row.trace_id]
    return hashlib.sha256(f"{before}{json.dumps(told, ensure_ascii=True)}".encode()).hexdigest()


@whole
async def append(store: Store, accesses: Iterable[Access]) -> None:
    """Write accesses down, in their order.

    Race: two processes would both continue the same last row. SQLite lets one write at a time; in PostgreSQL a lock does.
    """
    async with store.write() as session:
        if not store.is_sqlite:
            await session.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})
        last = (await session.execute(select(Audit.seq, Audit.digest).order_by(Audit.seq.desc()).limit(1))).first()
        seq, before = (last.seq, last.digest) if last else (0, _NOTHING)
        for access in accesses:
            seq += 1
            row = Audit(seq=seq, at=now(), **access.__dict__)
            before = row.digest = digest(row, before)
            session.add(row)


class Recorder:
    """A process's way to the log: what comes while a transaction is written goes into the next one, together."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._waiting: list[tuple[Access, asyncio.Future[None]]] = []
        self._writer: asyncio.Task[None] | None = None
        self._known: dict[Access, float] = {}

    async def note(self, access: Access, *, repeats: bool = False) -> None:
        """Return when an access is in the log.

        Parameters
        ----------
        access : Access
            What happened.
        repeats : bool
            Whether it may be one of many alike, a poll or a range of a file: then the first of a minute stands for all.

        Raises
        ------
        StoreUnavailable
            What cannot be written down must not happen.
        """
        alike = Access(**{**access.__dict__, "trace_id": ""})
        moment = time.monotonic()
        if repeats and self._known.get(alike, -_SAME_SECONDS) > moment - _SAME_SECONDS:
            return
        written: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((access, written))
        if self._writer is None or self._writer.done():
            self._writer = asyncio.create_task(self._write())
        await written
        if repeats:
            if len(self._known) >= _MOST_KNOWN:
                self._known = {key: at for key, at in self._known.items() if at > moment - _SAME_SECONDS}
            if len(self._known) < _MOST_KNOWN:
                self._known[alike] = moment

    async def _write(self) -> None:
        while self._waiting:
            some, self._waiting = self._waiting, []
            failure: Exception | None = None
            try:
                await append(self._store, [access for access, _ in some])
            except Exception as error:  # whatever it is, those who wait must hear it
                failure = error
            for _, written in some:
                if written.done():  # its request has gone
                    continue
                if failure is None:
                    written.set_result(None)
                else:
                    written.set_exception(failure)


async def entries(
    store: Store,
    *,
    account: str | None = None,
    object_id: str | None = None,
    since: datetime | None = None,
    limit: int = 100,
) -> Sequence[Audit]:
    """Return the newest rows that fit, oldest first."""
    wanted = select(Audit).order_by(Audit.seq.desc()).limit(limit)
    if account is not None:
        wanted = wanted.where((Audit.account == account) | (Audit.account_id == account))
    if object_id is not None:
        wanted = wanted.where(Audit.object_id == object_id)
    if since is not None:
        wanted = wanted.where(Audit.at >= since)
    async with store.read() as session:
        return list(reversed((await session.scalars(wanted)).all()))


async def _all(store: Store) -> AsyncIterator[Audit]:
    seen = -1
    while True:
        async with store.read() as session:
            page = (await session.scalars(select(Audit).where(Audit.seq > seen).order_by(Audit.seq).limit(_PAGE))).all()
        for row in page:
            yield row
        if not page:
            return
        seen = page[-1].seq


async def verify(store: Store, head: str | None = None) -> Verdict:
    """Check every row, and that the log goes on from a head that was noted earlier.

    Parameters
    ----------
    head : str, optional
        `seq:digest`. Without it nobody can see that rows are missing at the end.
    """
    rows, before = 0, _NOTHING
    noted, _, noted_digest = (head or "0:").partition(":")

    def verdict(fault: str = "") -> Verdict:
        return Verdict(rows, f"{rows}:{before}", fault)

    async for row in _all(store):
        if row.seq != rows + 1:
            return verdict(f"row {rows + 1} is missing")
        if row.digest != digest(row, before):
            return verdict(f"row {row.seq} is not what was written")
        rows, before = row.seq, row.digest
        if str(rows) == noted and before != noted_digest:
            return verdict(f"row {noted} is not the one that was noted: the log was written anew")
    if int(noted) > rows:
        return verdict(f"the log ends before row {noted}, which was noted")
    return verdict()


def view(row: Audit) -> dict[str, Any]:
    """Return a row as it is told."""
    told = {name: getattr(row, name) for name in Access.__dataclass_fields__}
    return {"seq": row.seq, "at": row.at.isoformat(), **told, "digest": row.digest}
