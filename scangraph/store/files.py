"""Files and resumable uploads: what is stored, whose it is, and until when.

Bytes are in the storage, records here. An object comes before its row and goes after it, so a row always has its bytes, and a
process that dies in between leaves an object that no row names: `sweep_orphans` removes those.
"""

from __future__ import annotations

import asyncio
import re
import uuid
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import CursorResult, Update, and_, delete, func, insert, or_, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from scangraph.contracts.api import TERMINAL
from scangraph.contracts.errors import InUse, NoSuch, TooManyRequests, UploadConflict
from scangraph.copies import DISPLAY
from scangraph.storage import Storage
from scangraph.store.database import Store, now, whole
from scangraph.store.derived import drop_derived, nobodys_copies
from scangraph.store.executions import input_entries
from scangraph.store.tables import Execution, File, StepResult, Upload, UploadPart

#: Where uploads are in the storage, and the parts of resumable ones. Whoever puts files there by hand keeps out of these.
FILES, UPLOADS, RESULTS, STEPS = "files/", "uploads/", "results/", "steps/"
#: Rows that one transaction deletes, or names that one query asks for.
_BATCH = 500


@dataclass(frozen=True)
class NewFile:
    """A stored object that is to get a row."""

    id: str
    owner_id: str | None
    filename: str
    storage_name: str
    kind: str
    media_type: str
    size: int
    sha256: str
    header: dict[str, Any] = field(default_factory=dict)
    expires_at: datetime | None = None


@whole
async def add_files(store: Store, files: Iterable[NewFile]) -> list[File]:
    """Make the rows of uploads, all or none."""
    moment = now()
    rows = [File(**asdict(file), origin="upload", created_at=moment) for file in files]
    async with store.write() as session:
        session.add_all(rows)
    return rows


@whole
async def get_file(store: Store, file_id: str) -> File:
    """Return a file; whose it is, is for the caller to look at.

    Raises
    ------
    NoSuch
    """
    async with store.read() as session:
        row = await session.get(File, file_id)
    if row is None:
        raise NoSuch(kind="file", id=file_id)
    return row


@whole
async def by_storage_name(store: Store, name: str) -> File | None:
    """Return the file whose bytes are stored under `name`, if it has a row."""
    async with store.read() as session:
        return (await session.execute(select(File).where(File.storage_name == name))).scalar_one_or_none()


@whole
async def output_file(store: Store, execution_id: str, output: str, ending: str) -> File | None:
    """Return that file of an execution's output whose name ends so."""
    query = select(File).where(File.execution_id == execution_id, File.output == output)
    async with store.read() as session:
        files = (await session.execute(query)).scalars()
        return next((file for file in files if file.filename.endswith(ending)), None)


@whole
async def list_files(
    store: Store,
    *,
    owner_id: str | None = None,
    kind: str | None = None,
    origin: str | None = None,
    before: tuple[datetime, str] | None = None,
    limit: int = 50,
) -> list[File]:
    """List files, the newest first.

    Parameters
    ----------
    owner_id : str, optional
        Only this account's.
    before : (created_at, id), optional
        Where the last page ended.
    """
    query = select(File).order_by(File.created_at.desc(), File.id.desc()).limit(limit)
    conditions = {File.owner_id: owner_id, File.kind: kind, File.origin: origin}
    query = query.where(*(column == value for column, value in conditions.items() if value is not None))
    if before is not None:
        at, last = before
        query = query.where(or_(File.created_at < at, and_(File.created_at == at, File.id < last)))
    async with store.read() as session:
        return list((await session.execute(query)).scalars())


@whole
async def delete_file(store: Store, file_id: str) -> File:
    """Take a file's row away and return it; its bytes are deleted by the caller, after this.

    Race: an execution that reads it is accepted meanwhile. `executions.accept` holds the rows of its inputs until it is there,
    so this either waits and then finds the execution, or is first, and the execution finds no file.

    Raises
    ------
    NoSuch
    InUse
        While an execution that waits or runs has it among its inputs or results.
    """
    async with store.write() as session:
        row = (await session.execute(select(File).where(File.id == file_id).with_for_update())).scalar_one_or_none()
        if row is None:
            raise NoSuch(kind="file", id=file_id)
        users = await users_of_files(session)
        if using := sorted(users.get(row.id, set()) | users.get(row.storage_name, set())):
            hint = "wait until it has ended, or cancel it"
            raise InUse(kind="file", id=file_id, users=f"execution {', '.join(using[:3])}", hint=hint)
        if row.execution_id is not None:
            of_it = select(Execution.state).where(Execution.id == row.execution_id)
            if (await session.execute(of_it)).scalar_one_or_none() not in {None, *TERMINAL}:
                hint = "it is a result of it; wait until it has ended, or cancel it"
                raise InUse(kind="file", id=file_id, users=f"execution {row.execution_id}", hint=hint)
        await session.delete(row)
    return row


async def expire_files(store: Store, moment: datetime) -> list[str]:
    """Take away files that are past their time and not in use, and uploads that were not finished in theirs.

    Returns the names of their bytes, for the caller to delete. Race: a file becomes an input meanwhile. `executions.accept`
    holds its row, and this passes over what is held.
    """
    return [file.storage_name for file in await _expire_files(store, moment)] + await _expire_uploads(store, moment)


async def delete_expired(store: Store, storage: Storage, moment: datetime) -> None:
    """Delete what `expire_files` takes away, and the copies that were made of it."""
    files = await _expire_files(store, moment)
    for name in [*(file.storage_name for file in files), *await _expire_uploads(store, moment)]:
        await storage.delete(name)
    await drop_derived(store, storage, (file.sha256 for file in files))


@whole
async def _expire_files(store: Store, moment: datetime) -> list[File]:
    async with store.write() as session:
        query = select(File).where(File.expires_at <= moment).order_by(File.expires_at).limit(_BATCH)
        query = query.with_for_update(skip_locked=True)
        rows = (await session.execute(query)).scalars().all()
        users = await users_of_files(session) if rows else {}
        old = [row for row in rows if row.id not in users and row.storage_name not in users]
        for row in old:
            await session.delete(row)
        return old


@whole
async def _expire_uploads(store: Store, moment: datetime) -> list[str]:
    async with store.read() as session:
        query = select(Upload.id).where(Upload.expires_at <= moment).order_by(Upload.expires_at).limit(_BATCH)
        old = (await session.execute(query)).scalars().all()
    return await drop_uploads(store, *old) if old else []


async def users_of_files(session: AsyncSession) -> dict[str, set[str]]:
    """Return file id or storage name -> the executions that wait or run and read it."""
    working = select(Execution.id, Execution.inputs).where(Execution.state.in_(("pending", "running")))
    users: dict[str, set[str]] = {}
    for execution_id, inputs in (await session.execute(working)).all():
        for entry in input_entries(inputs):
            for name in (entry.get("file_id"), entry.get("path")):
                if name:
                    users.setdefault(name, set()).add(execution_id)
    return users


@whole
async def unnamed(store: Store, names: Collection[str]) -> set[str]:
    """Return those of the storage names that no file and no upload has."""
    left = list(names)
    known: set[str] = set()
    async with store.read() as session:
        for start in range(0, len(left), _BATCH):
            some = left[start : start + _BATCH]
            for column in (File.storage_name, UploadPart.storage_name):
                known.update((await session.execute(select(column).where(column.in_(some)))).scalars())
    return set(left) - known


async def sweep_orphans(store: Store, storage: Storage, older_than: timedelta) -> list[str]:
    """Delete what a process left that died between an object and its row, and return its names.

    An object without a row may also be one whose row is about to come; hence the age, which no request reaches.
    """
    swept: list[str] = []
    if storage.local_root is not None:
        swept += await asyncio.to_thread(_sweep_staged, storage.local_root, now() - older_than)
    for prefix in (FILES, UPLOADS, RESULTS, STEPS, DISPLAY):
        swept += await storage.sweep_parts(prefix, older_than)
    for prefix in (FILES, UPLOADS):
        old = [stat.name async for stat in storage.list(prefix) if stat.modified < now() - older_than]
        for name in await unnamed(store, old):
            await storage.delete(name)
            swept.append(name)
    for prefix, nobodys in ((RESULTS, _abandoned_results), (STEPS, _forgotten_steps), (DISPLAY, nobodys_copies)):
        old = [stat.name async for stat in storage.list(prefix) if stat.modified < now() - older_than]
        for name in await nobodys(store, old):
            await storage.delete(name)
            swept.append(name)
    return swept


@whole
async def _abandoned_results(store: Store, names: Collection[str]) -> set[str]:
    """Return those without a row whose execution has ended; of one that is not in the records, nobody knows whose it is."""
    left = await unnamed(store, names)
    ids = list({_second(name) for name in left})
    ended: set[str] = set()
    async with store.read() as session:
        for start in range(0, len(ids), _BATCH):
            query = select(Execution.id).where(Execution.id.in_(ids[start : start + _BATCH]), Execution.state.in_(TERMINAL))
            ended.update((await session.execute(query)).scalars())
    return {name for name in left if _second(name) in ended}


@whole
async def _forgotten_steps(store: Store, names: Collection[str]) -> set[str]:
    """Return the bytes of step results that nobody could find."""
    keys = list({_second(name) for name in names})
    known: set[str] = set()
    async with store.read() as session:
        for start in range(0, len(keys), _BATCH):
            query = select(StepResult.key).where(StepResult.key.in_(keys[start : start + _BATCH]))
            known.update((await session.execute(query)).scalars())
    return {name for name in names if _second(name) not in known}


def _second(name: str) -> str:
    return name.split("/")[1]


def _sweep_staged(root: Path, before: datetime) -> list[str]:
    """Delete what the store was writing in a folder when its process died: `name#1`, which it never lists."""
    swept = []
    for folder in (FILES, UPLOADS, RESULTS, STEPS, DISPLAY):
        for path in (root / folder).rglob("*#*"):
            staged = re.fullmatch(r".+#\d+", path.name) and path.is_file()
            if staged and path.stat().st_mtime < before.timestamp():
                path.unlink(missing_ok=True)
                swept.append(path.relative_to(root).as_posix())
    return swept


# --- resumable uploads -----------------------------------------------------------------------------------------------------


@whole
async def create_upload(
    store: Store,
    *,
    owner_id: str | None,
    filename: str,
    length: int,
    state: dict[str, Any],
    expires_at: datetime,
    most: int,
) -> Upload:
    """Begin an upload.

    Parameters
    ----------
    most : int
        Uploads that the account may have begun and not finished. Two requests at the limit may both pass.

    Raises
    ------
    TooManyRequests
    """
    moment = now()
    async with store.write() as session:
        unfinished = (Upload.owner_id == owner_id, Upload.file_id.is_(None), Upload.expires_at > moment)
        count = (await session.execute(select(func.count()).select_from(Upload).where(*unfinished))).scalar_one()
        if count >= most:
            what = f"{count} uploads are begun and not finished; finish or delete (DELETE /v1/uploads/<id>) one."
            raise TooManyRequests(what=what, retry_after_seconds=60)
        row = Upload(
            id=str(uuid.uuid4()),
            owner_id=owner_id,
            filename=filename,
            length=length,
            offset=0,
            state=state,
            created_at=moment,
            expires_at=expires_at,
        )
        session.add(row)
    return row


@whole
async def get_upload(store: Store, upload_id: str) -> Upload:
    """Return an upload; raises `NoSuch`, also when its time is over."""
    async with store.read() as session:
        row = await session.get(Upload, upload_id)
    if row is None or row.expires_at <= now():
        raise NoSuch(kind="upload", id=upload_id)
    return row


@whole
async def upload_parts(store: Store, upload_id: str) -> Sequence[UploadPart]:
    """Return what has arrived, in order."""
    async with store.read() as session:
        query = select(UploadPart).where(UploadPart.upload_id == upload_id).order_by(UploadPart.start)
        return (await session.execute(query)).scalars().all()


@whole
async def take_upload(store: Store, upload_id: str, offset: int) -> str:
    """Become the one who writes from `offset` on, and return the name that the further calls need.

    Race: the client lost its connection and comes back while the old request still waits for bytes. The newest one writes; what
    the old one does from here on is refused.

    Raises
    ------
    NoSuch
    UploadConflict
        If the upload is elsewhere than at `offset`, or its parts are being joined.
    """
    async with store.write() as session:
        row = (await session.execute(select(Upload).where(Upload.id == upload_id).with_for_update())).scalar_one_or_none()
        if row is None or row.expires_at <= now():
            raise NoSuch(kind="upload", id=upload_id)
        if row.joining_until is not None and row.joining_until > now():
            raise UploadConflict(reason="All bytes are there and the file is being made of them")
        if row.offset != offset:
            raise UploadConflict(reason=f"{row.offset} bytes are there, and the part begins at {offset}")
        row.writer = str(uuid.uuid4())
        return row.writer


@whole
async def advance_upload(store: Store, upload_id: str, writer: str, parts: Sequence[tuple[int, int, str]]) -> bool:
    """Note that parts (start, size, storage name) arrived; False, and nothing noted, if somebody else writes by now.

    Race: two PATCHes at one offset. The update names writer and offset, so it applies for one of them.
    """
    start = parts[0][0]
    end = parts[-1][0] + parts[-1][1]
    async with store.write() as session:
        mine = update(Upload).where(Upload.id == upload_id, Upload.writer == writer, Upload.offset == start)
        if not await _changed(session, mine.values(offset=end)):
            return False
        rows = [{"upload_id": upload_id, "start": at, "size": size, "storage_name": name} for at, size, name in parts]
        await session.execute(insert(UploadPart), rows)
        return True


@whole
async def hold_joining(store: Store, upload_id: str, writer: str, until: datetime | None) -> bool:
    """Keep others from writing until then (None: let them); False if somebody else writes by now.

    Race: the joiner dies. Nobody puts the time off any more, and the next request takes over.
    """
    async with store.write() as session:
        mine = update(Upload).where(Upload.id == upload_id, Upload.writer == writer, Upload.file_id.is_(None))
        return await _changed(session, mine.values(joining_until=until))


@whole
async def finish_upload(store: Store, upload_id: str, writer: str, new: NewFile) -> tuple[File, list[str]] | None:
    """Turn an upload into a file and return it with the names of the parts, or None if somebody else writes by now.

    Race: two joiners, one of which was thought dead. The update names the writer, so one of them makes the file.
    """
    file = File(**asdict(new), origin="upload", created_at=now())
    async with store.write() as session:
        mine = update(Upload).where(Upload.id == upload_id, Upload.writer == writer, Upload.file_id.is_(None))
        if not await _changed(session, mine.values(offset=Upload.length, file_id=new.id, joining_until=None, writer=None)):
            return None
        names = await _forget_parts(session, [upload_id])
        session.add(file)
    return file, names


@whole
async def drop_uploads(store: Store, *upload_ids: str) -> list[str]:
    """Forget uploads and return the names of their parts, for the caller to delete; whoever still writes is refused."""
    async with store.write() as session:
        await session.execute(select(Upload.id).where(Upload.id.in_(upload_ids)).with_for_update())  # no part is added now
        names = await _forget_parts(session, upload_ids)
        await session.execute(delete(Upload).where(Upload.id.in_(upload_ids)))
        return names


async def _forget_parts(session: AsyncSession, upload_ids: Sequence[str]) -> list[str]:
    named = select(UploadPart.storage_name).where(UploadPart.upload_id.in_(upload_ids))
    names = list((await session.execute(named)).scalars())
    await session.execute(delete(UploadPart).where(UploadPart.upload_id.in_(upload_ids)))
    return names


async def _changed(session: AsyncSession, statement: Update) -> bool:
    result = await session.execute(statement.execution_options(synchronize_session=False))
    return isinstance(result, CursorResult) and result.rowcount == 1
