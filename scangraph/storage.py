"""Named bytes in and out: the one place that knows where bytes live. A folder, memory, or S3, all through obstore.

Names are relative POSIX paths. Users and backends put files there themselves, so a name from a request is never trusted: it may
not leave the root, neither by `..` nor through a link, and what is written is never overwritten.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import os
import re
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, Self
from urllib.parse import unquote, urlsplit

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, NotFoundError
from obstore.store import LocalStore, MemoryStore, from_url

from scangraph import metrics, tracing
from scangraph.contracts.errors import (
    AlreadyWritten,
    FileMissing,
    InvalidSetting,
    PathRefused,
    StorageFull,
    StorageUnavailable,
)
from scangraph.s3 import Bucket

_CHUNK = 1024 * 1024
#: Size of a part of a multipart upload; S3 takes 5 MiB to 5 GiB and at most 10 000 of them, so files may have 80 GB.
_PART = 8 * 1024 * 1024
#: What a `Writer` puts in one request, and so "only if there is none": a part of a resumable upload, and a little more.
_SMALL = _PART + _PART // 2
#: What is larger gets a client of its own: to the HTTP library an answer is late from the first byte that is sent on.
_WHOLE = 64 * 1024 * 1024
#: The slowest sending that is waited for, in bytes a second, and the largest request that S3 takes.
_SLOWEST, _LARGEST = 1024 * 1024, 5 * 1024**3
#: Where what the storage itself needs is.
_OWN = ".scangraph"
#: As many write one name at once when the storage is tried.
_WRITERS = 8
_FULL = re.compile(r"os error (28|122|27)\b")  # ENOSPC, EDQUOT, EFBIG
_NOT_A_FOLDER = re.compile(r"os error (20|21|17|39)\b")
_ABSENT = re.compile(r"os error (2|20)\b")
_NO_BUCKET = re.compile(r"NoSuchBucket")
_S3_CODE = re.compile(r"<Code>(\w+)</Code>")
_S3_STATUS = re.compile(r"status code: (\d{3} [\w ]+)")
#: Addresses and paths are nobody's business but the operator's.
_PLACES = re.compile(r"https?://\S+|(?<!\w)/\S+")

#: What S3's codes mean for whoever runs the service.
_ADVICE = {
    "InvalidAccessKeyId": "the server does not know the access key; look at SCANGRAPH_STORAGE_OPTIONS or AWS_ACCESS_KEY_ID",
    "SignatureDoesNotMatch": "the server refuses the secret key; look at SCANGRAPH_STORAGE_OPTIONS or AWS_SECRET_ACCESS_KEY",
    "ExpiredToken": "the credentials have expired; give the service new ones",
    "AccessDenied": "the account may not do this; give it reading, writing, listing and deleting in the bucket",
    "RequestTimeTooSkewed": "this machine's clock and the server's disagree; set them",
    "QuotaExceeded": "the bucket's quota is used up",
}

#: An outage is told within seconds, not minutes: whoever waits can do better than wait. A whole request has no limit, for a
#: download takes as long as whoever reads it.
_READ_SECONDS = 30.0
_CLIENT: dict[str, Any] = {"connect_timeout": "3s", "timeout": "1day"}
_RETRY: dict[str, Any] = {
    "max_retries": 3,
    "retry_timeout": timedelta(seconds=15),
    "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=2), "base": 2},
}


@dataclass(frozen=True)
class Stat:
    """A stored file."""

    name: str
    size: int
    modified: datetime


class Storage:
    """Named bytes.

    Parameters
    ----------
    store : obstore store
        Where they are.
    local_root : Path, optional
        The folder, where it is one.
    patient : callable, optional
        Gives the same store with a client that waits so many seconds for an answer.
    bucket : Bucket, optional
        The same place in S3, for what the store cannot do.
    """

    def __init__(
        self,
        store: Any,
        local_root: Path | None = None,
        patient: Callable[[float], Any] | None = None,
        bucket: Bucket | None = None,
    ) -> None:
        self._store, self.local_root, self._patient, self._bucket = store, local_root, patient, bucket

    # --- names -------------------------------------------------------------------------------------------------------------

    def name_of(self, path: str) -> str:
        """Turn a path from a request into the name of a stored file; it may be absolute inside a local root.

        Raises
        ------
        PathRefused
            If the path has a scheme or a control character, is empty, or leads outside the root.
        """
        if not path or path.isspace():
            raise PathRefused(path=path, reason="it is empty")
        if "://" in path:
            raise PathRefused(path=path, reason="it has a scheme; only files of this storage can be named")
        if any(ord(c) < 32 for c in path) or "\\" in path:
            raise PathRefused(path=path, reason="it has a control character or a backslash")
        if ".." in PurePosixPath(path).parts:
            raise PathRefused(path=path, reason="it has a '..'")
        if max((len(part.encode()) for part in PurePosixPath(path).parts), default=0) > 255 or len(path.encode()) > 1024:
            raise PathRefused(path=path[:64] + "…", reason="it is too long")
        if self.local_root is None:
            if path.startswith("/"):
                raise PathRefused(path=path, reason="it is absolute, and this storage is no folder")
            name = PurePosixPath(path).as_posix()
            if name == ".":
                raise PathRefused(path=path, reason="it names no file")
            return name
        try:
            real = (self.local_root / path).resolve()
        except (OSError, RuntimeError) as error:  # a loop of links, a name that is too long
            raise PathRefused(path=path, reason="it cannot be resolved") from error
        if real == self.local_root or not real.is_relative_to(self.local_root):
            raise PathRefused(path=path, reason="it leads outside the storage")
        return real.relative_to(self.local_root).as_posix()

    # --- reading -----------------------------------------------------------------------------------------------------------

    async def head(self, path: str) -> Stat:
        """Return size and time of a file; raises as `read` does."""
        name = self.name_of(path)
        with _translated(path):
            meta = await obstore.head_async(self._store, name)
        return Stat(name, meta["size"], meta["last_modified"])

    @tracing.spanned("storage read")
    async def read(self, path: str) -> bytes:
        """Return a file's bytes.

        Raises
        ------
        PathRefused, FileMissing, StorageUnavailable
        """
        name = self.name_of(path)
        with _translated(path):
            answer = await obstore.get_async(self._store, name)
            return bytes(await answer.bytes_async())

    async def stream(self, path: str, start: int = 0, end: int | None = None, chunk: int = _CHUNK) -> AsyncIterator[bytes]:
        """Yield the bytes from `start` up to, not including, `end`; none are beyond its end. Raises as `read` does, at once."""
        name = self.name_of(path)
        if end is not None and end <= start:
            return
        options: Any = {"range": {"offset": start} if end is None else (start, end)} if start or end is not None else None
        try:
            with _translated(path):
                answer = await obstore.get_async(self._store, name, options=options)
        except StorageUnavailable:  # so it calls a range that begins at the end, too
            if options is None or (await self.head(path)).size > start:
                raise
            return
        with _translated(path):
            async for part in answer.stream(min_chunk_size=chunk):
                yield bytes(part)

    async def list(self, prefix: str = "") -> AsyncIterator[Stat]:
        """Yield the files in a folder and those below it, in no order; none if there is no such folder."""
        with _translated(prefix):
            async for batch in obstore.list(self._store, prefix.rstrip("/") or None):
                for meta in batch:
                    yield Stat(meta["path"], meta["size"], meta["last_modified"])

    # --- writing -----------------------------------------------------------------------------------------------------------

    @tracing.spanned("storage write")
    async def write(self, path: str, data: bytes | memoryview) -> str:
        """Write a new file, whole or not at all, and return its name.

        Raises
        ------
        AlreadyWritten
            If there is a file of that name: keys are write-once.
        PathRefused
            If the name cannot be had, as that below a file.
        StorageFull, StorageUnavailable
        """
        name, store = self.name_of(path), self._store
        if len(data) > _WHOLE and self._patient is not None:
            if len(data) > _LARGEST:
                async with self.writer(path) as file:
                    for start in range(0, len(data), _PART):
                        await file.write(bytes(data[start : start + _PART]))
                return name
            store = self._patient(_READ_SECONDS + len(data) / _SLOWEST)
        # Race: the answer is lost on its way and the request repeated. What then is there already carries this call's mark.
        mark = {} if self.local_root is not None else {"writer": uuid.uuid4().hex}
        try:
            with _translated(name, writing=True):
                # One request, even where parts were faster: for those, servers know no "only if there is none".
                await obstore.put_async(store, name, data, mode="create", attributes=mark or None, use_multipart=False)
        except AlreadyWritten:
            if not mark or await self._mark(name) != mark["writer"]:
                raise
        await self._settle(name)
        return name

    async def _mark(self, name: str) -> str | None:
        with _translated(name):
            attributes: dict[str, str] = dict((await obstore.get_async(self._store, name, options={"head": True})).attributes)
        return attributes.get("writer")

    def writer(self, path: str) -> Writer:
        """Return a context in which a new file is written piece by piece.

        It appears whole when the block ends, and never if the block raises. Race: two writers of one name; for uploads in
        parts not every S3 server has an "only if there is none" (Ceph 16 takes the header and overwrites), so large files get
        unique names, and a name that exists is refused before the first part goes.
        """
        return Writer(self, self.name_of(path))

    async def delete(self, path: str) -> None:
        """Delete a file; nothing happens if there is none."""
        name = self.name_of(path)
        with contextlib.suppress(FileMissing), _translated(name):
            await obstore.delete_async(self._store, name)

    # --- the place itself --------------------------------------------------------------------------------------------------

    async def reach(self) -> None:
        """Raise `StorageUnavailable` unless it answers, and answers us."""
        if self.local_root is not None and not await asyncio.to_thread(self.local_root.is_dir):
            raise StorageUnavailable(path="", reason="its folder is gone; mount it, or make it")
        with _translated(""):
            async for _ in obstore.list(self._store, f"{_OWN}/none"):
                break

    async def probe(self) -> None:
        """Write, list, read and delete small files; raises `StorageUnavailable` if any of it fails or overwrites."""
        await self.reach()
        name = f"{_OWN}/probe-{uuid.uuid4().hex}"
        try:
            # At once: servers have looked whether there is one, and then let everybody write.
            outcomes = await asyncio.gather(*(self.write(name, bytes([n])) for n in range(_WRITERS)), return_exceptions=True)
            for outcome in outcomes:
                if isinstance(outcome, BaseException) and not isinstance(outcome, AlreadyWritten):
                    raise outcome
            won = [n for n, outcome in enumerate(outcomes) if isinstance(outcome, str)]
            if len(won) != 1:
                reason = "it overwrites files: it does not keep to conditional writes (If-None-Match); take another server"
                raise StorageUnavailable(path="", reason=reason)
            found = [stat.name async for stat in self.list(_OWN)]
            if name not in found or await self.read(name) != bytes(won):
                raise StorageUnavailable(path="", reason="what was written is not what is read or listed")
        finally:
            await self.delete(name)

    async def prepare(self, rule: dict[str, Any]) -> tuple[str, ...]:
        """Make the bucket, with a lifecycle rule; returns what was done. Elsewhere there is nothing to do."""
        if self._bucket is None:
            return ()
        with _translated(""):
            return tuple(await asyncio.to_thread(self._bucket.prepare, rule))

    async def link(self, path: str, seconds: int, filename: str, media_type: str) -> str | None:
        """Return a URL by which anybody can download a file for so long, or None where there are none: not in S3.

        Parameters
        ----------
        filename, media_type : str
            What the answer's Content-Disposition and Content-Type say.
        """
        name = self.name_of(path)
        if self._bucket is None:
            return None
        with _translated(path):
            return await asyncio.to_thread(self._bucket.link, name, seconds, filename, media_type)

    async def sweep_parts(self, prefix: str, older_than: timedelta) -> tuple[str, ...]:
        """Delete what uploads in parts below a prefix left that never ended, and return their names; no list shows them."""
        if self._bucket is None:
            return ()
        with _translated(prefix):
            return tuple(await asyncio.to_thread(self._bucket.sweep, prefix, older_than))

    async def _settle(self, name: str) -> None:
        """Make a file in a folder survive a power cut: the store closes it without waiting for the disk."""
        if self.local_root is not None:
            await asyncio.to_thread(_sync, self.local_root / name)


class Writer:
    """A file that is being written. After the block `size` and `sha256` (hex) are known.

    What is small waits here until the block ends and goes in one request. The rest goes in parts while it comes, and no more
    than a few of them are here at a time.
    """

    def __init__(self, storage: Storage, name: str) -> None:
        self._storage, self.name, self.size, self.sha256 = storage, name, 0, ""
        self._hash = hashlib.sha256()
        self._pieces: asyncio.Queue[bytes | BaseException | None] = asyncio.Queue(maxsize=1)
        self._piece = bytearray()
        self._put: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        return self

    async def write(self, data: bytes) -> None:
        """Add bytes; waits while the storage is slower than whoever gives them."""
        self.size += len(data)
        self._piece += data
        if self._put is None and self.size > _SMALL:
            with contextlib.suppress(FileMissing):
                await self._storage.head(self.name)
                raise AlreadyWritten(path=self.name)
            self._put = asyncio.create_task(self._store())
        if self._put is not None and len(self._piece) >= _CHUNK:
            await self._pass_on()

    async def _pass_on(self) -> None:
        piece = await self._hashed()
        await self._give(piece)

    async def _hashed(self) -> bytes:
        """Take what waits here, and count it into the hash."""
        piece, self._piece = bytes(self._piece), bytearray()
        if len(piece) > _CHUNK // 2:  # hashlib lets other threads run meanwhile
            await asyncio.to_thread(self._hash.update, piece)
        else:
            self._hash.update(piece)
        return piece

    async def _give(self, piece: bytes | BaseException | None) -> None:
        """Hand a piece over, unless the storage has failed: then raise what it raised."""
        assert self._put is not None
        give = asyncio.ensure_future(self._pieces.put(piece))
        await asyncio.wait([give, self._put], return_when=asyncio.FIRST_COMPLETED)
        if not give.done():
            give.cancel()
        if self._put.done():
            self._put.result()

    async def _store(self) -> None:
        async def pieces() -> AsyncIterator[bytes]:
            while (piece := await self._pieces.get()) is not None:
                if isinstance(piece, BaseException):
                    raise piece
                yield piece

        with _translated(self.name, writing=True):
            await obstore.put_async(
                self._storage._store, self.name, pieces(), use_multipart=True, chunk_size=_PART, max_concurrency=2
            )

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            await self._abandon()
            return
        if self._put is None:
            await self._storage.write(self.name, await self._hashed())
            self.sha256 = self._hash.hexdigest()
            return
        try:
            if self._piece:
                await self._pass_on()
            await self._give(None)
        except BaseException:
            await self._abandon()
            raise
        await self._put
        self.sha256 = self._hash.hexdigest()
        await self._storage._settle(self.name)

    async def _abandon(self) -> None:
        """End without a file. The store drops what it has when the source of the pieces raises, not when a put is cancelled."""
        if self._put is None:
            return
        with contextlib.suppress(BaseException):
            await asyncio.shield(self._give(_Abandoned()))
        with contextlib.suppress(BaseException):
            await asyncio.wait_for(asyncio.shield(self._put), 30)


class _Abandoned(Exception):
    """The writer's block raised."""


def open_storage(url: str, options: Mapping[str, str] | None = None, link_endpoint: str = "") -> Storage:
    """Open the storage behind a URL.

    Parameters
    ----------
    url : str
        `file:///folder`, `s3://bucket/prefix` or `memory://`.
    options : mapping, optional
        obstore's configuration of the store (`endpoint`, `region`, `access_key_id`, …; for a server without TLS
        `allow_http: "true"`); for S3 the environment's `AWS_…` is read, too.
    link_endpoint : str
        Address of the S3 server that links name; the endpoint's, if there is none.

    Raises
    ------
    InvalidSetting
    """
    parts = urlsplit(url)
    if parts.scheme == "file":
        root = Path(unquote(parts.path))
        root.mkdir(parents=True, exist_ok=True)
        return Storage(LocalStore(str(root.resolve())), root.resolve())
    if parts.scheme == "memory":
        return Storage(MemoryStore())
    config = dict(options or {})
    client = dict(_CLIENT)
    if config.pop("allow_http", "").lower() in {"1", "true", "yes"}:
        client["allow_http"] = True

    def store(read_seconds: float) -> Any:
        patience: Any = {**client, "read_timeout": f"{read_seconds:.0f}s"}
        return from_url(url, config=config, client_options=patience, retry_config=_RETRY)  # type: ignore[call-overload]

    try:
        opened = store(_READ_SECONDS)
    except (BaseError, ValueError, TypeError) as error:
        raise InvalidSetting(section="storage", reason=str(error).partition("\n")[0]) from error
    bucket = Bucket(url, options or {}, link_endpoint) if parts.scheme == "s3" else None
    return Storage(opened, patient=store, bucket=bucket)


def _sync(path: Path) -> None:
    for target, flags in ((path, os.O_RDONLY), (path.parent, os.O_RDONLY | os.O_DIRECTORY)):
        with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
            descriptor = os.open(target, flags)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _counted(opened: Callable[..., Any]) -> Callable[..., Any]:
    """Let a context count the failures of the storage that leave it."""

    @functools.wraps(opened)
    @contextlib.contextmanager
    def counted(*arguments: Any, **named: Any) -> Any:
        try:
            with opened(*arguments, **named):
                yield
        except (StorageFull, StorageUnavailable) as error:
            metrics.STORAGE_ERRORS.add(code=error.code)
            raise

    return counted


@_counted
@contextlib.contextmanager
def _translated(path: str, writing: bool = False) -> Any:
    """Turn what the store raises into our errors; it tells its kinds of failure apart by their text only."""
    try:
        yield
    except (FileNotFoundError, NotFoundError) as error:
        if writing or _NO_BUCKET.search(str(error)):
            raise _away(path, str(error)) from error
        raise FileMissing(path=path) from error
    except AlreadyExistsError as error:
        raise AlreadyWritten(path=path) from error
    except (BaseError, OSError) as error:
        whole = str(error)
        if _FULL.search(whole):
            raise StorageFull(path=path, reason="no space left") from error
        if "os error 36" in whole or "InvalidPath" in type(error).__name__ or "are not supported" in whole.partition("\n")[0]:
            raise PathRefused(path=path, reason="the storage cannot have such a name") from error
        if writing and _NOT_A_FOLDER.search(whole):
            raise PathRefused(path=path, reason="a part of it is a file, or it is a folder") from error
        if _NOT_A_FOLDER.search(whole) or _ABSENT.search(whole):
            raise FileMissing(path=path) from error
        raise _away(path, whole) from error


def _away(path: str, text: str) -> StorageUnavailable:
    """Say what a store's error means, and what to do about it, without the server's address. Waiting may help, hence `away`."""
    code, status = _S3_CODE.search(text), _S3_STATUS.search(text)
    if _NO_BUCKET.search(text) or (code is status is None and "not found" in text):
        reason = "there is no such bucket or folder; make it, or look at SCANGRAPH_STORAGE_URL"
    elif code and code[1] in _ADVICE:
        reason = _ADVICE[code[1]]
    elif status and status[1].startswith(("401", "403")):  # an answer to HEAD has no code
        reason = "the server refuses the credentials; look at SCANGRAPH_STORAGE_OPTIONS or AWS_…"
    elif status:
        reason = f"the server answers {status[1].strip()}" + (f" ({code[1]})" if code else "")
    elif "builder error" in text:
        reason = 'its endpoint has no TLS; if that is meant, set allow_http to "true" in SCANGRAPH_STORAGE_OPTIONS'
    elif "error sending request" in text or "timed out" in text or "connection" in text.lower():
        reason = "there is no connection, or no answer in time"
    else:
        reason = _PLACES.sub("…", text.partition("\n")[0])[:200]
    return StorageUnavailable(path=path, reason=reason, away=True)
