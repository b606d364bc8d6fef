"""Files: sent whole or resumably, fetched with ranges, and compared by their SHA-256 either way."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import os
import secrets
from collections.abc import AsyncIterator, Callable
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

import httpx

from scangraph.client.failures import Patience, ServerUnreachable
from scangraph.client.session import LONG, NeverSent, Session, Wish, kind_of, segment
from scangraph.contracts.api import FileMetadata, FileView
from scangraph.contracts.errors import DigestMismatch, NoSuch, ScanGraphError, UploadConflict, UsageError

#: Called with the bytes that are over there, or here, and all of them.
OnBytes = Callable[[int, int], None]

#: From this size on an upload is resumable.
LARGE = 32 * 2**20
#: What one request of a resumable upload sends.
CHUNK = 16 * 2**20
_PIECE = 2**20
_TUS = {"Tus-Resumable": "1.0.0"}


def nothing(done: int, total: int) -> None:
    """Tell nobody."""


def plain_name(name: str, otherwise: str = "file") -> str:
    """Return the last part of a name that somebody else chose: it names a file in this folder and no other."""
    last = PurePosixPath(name.replace("\\", "/").replace("\0", "")).name
    return otherwise if last in {"", ".", ".."} else last


# --- sending ---------------------------------------------------------------------------------------------------------------


class _Source:
    """An open file from its present position on, hashed as far as it was read."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._start = file.tell()
        self.size = file.seek(0, os.SEEK_END) - self._start
        self._digest, self._hashed = hashlib.sha256(), 0

    async def read(self, offset: int, size: int) -> bytes:
        """Read bytes; what is read for the first time is hashed. Nobody may leave a gap."""

        def read() -> bytes:
            self._file.seek(self._start + offset)
            data = self._file.read(size)
            if len(data) < min(size, self.size - offset):
                raise UsageError(detail="the file became shorter while it was sent")
            new = data[max(self._hashed - offset, 0) :]
            self._digest.update(new)
            self._hashed += len(new)
            return data

        return await asyncio.to_thread(read)

    async def sha256(self) -> str:
        """Return the hash of all of it."""
        while self._hashed < self.size:
            await self.read(self._hashed, _PIECE)
        return self._digest.hexdigest()


async def upload(session: Session, file: BinaryIO, filename: str, on_bytes: OnBytes = nothing) -> FileMetadata:
    """Send a file from its present position on.

    Raises
    ------
    DigestMismatch
        If what arrived is not what was read here.
    """
    source = _Source(file)
    if source.size < LARGE:
        try:
            view = await _send_form(session, source, filename)
        except ScanGraphError as failure:
            # The answer was lost, perhaps with a file behind it. From here on the way on which that can be found out.
            if isinstance(failure, NeverSent) or kind_of(failure) != "lost":
                raise
        else:
            on_bytes(source.size, source.size)
            return await _checked(session, view.id, await source.sha256())
    file_id = await _Resumable(session, source, filename, on_bytes).send()
    return await _checked(session, file_id, await source.sha256())


async def _send_form(session: Session, source: _Source, filename: str) -> FileView:
    data = await source.read(0, source.size)
    digest = base64.b64encode(bytes.fromhex(await source.sha256())).decode()
    headers = {"Repr-Digest": f"sha-256=:{digest}:"}
    files = {"file": (filename, data, "application/octet-stream")}
    # Refused means that nothing was kept, whatever the method.
    return await session.ask(FileView, Wish("POST", "/v1/files", files=files, headers=headers, seconds=LONG), "refused")


async def _checked(session: Session, file_id: str, sha256: str) -> FileMetadata:
    found = await session.ask(FileMetadata, Wish("GET", f"/v1/files/{segment(file_id)}/metadata"))
    if found.sha256 != sha256:
        await session.request(Wish("DELETE", f"/v1/files/{segment(file_id)}"))
        raise DigestMismatch(algorithm="SHA-256")
    return found


class _Resumable:
    """An upload by tus 1.0 that goes on after every loss of the connection."""

    def __init__(self, session: Session, source: _Source, filename: str, on_bytes: OnBytes) -> None:
        self._session, self._source, self._filename, self._on_bytes = session, source, filename, on_bytes
        self._patience = Patience(session.patience)

    async def send(self) -> str:
        """Send it and return the file's id."""
        name = base64.b64encode(self._filename.encode()).decode()
        headers = {**_TUS, "Upload-Length": str(self._source.size), "Upload-Metadata": f"filename {name}"}
        # An upload that was begun twice costs nothing: the other one expires.
        begun = await self._session.request(Wish("POST", "/v1/uploads", headers=headers), "always", self._patience)
        path = f"/v1/uploads/{segment(PurePosixPath(begun.headers['location']).name)}"
        offset, file_id = 0, _file_in(begun)
        while not file_id:
            try:
                offset, file_id = await self._send_part(path, offset)
                self._patience.restore()
            except ScanGraphError as failure:
                # A conflict: the request that we lost is still being worked on, or kept more than we heard of. 408: we were
                # too slow, or what stands in between was; what arrived is kept.
                if not (isinstance(failure, UploadConflict) or failure.status == 408 or kind_of(failure) == "lost"):
                    raise
                await self._patience.bear(failure)
                reached, file_id = await self._ask(path)
                if reached > offset:
                    self._patience.restore()
                offset = reached
        self._on_bytes(self._source.size, self._source.size)
        return file_id

    async def _send_part(self, path: str, offset: int) -> tuple[int, str | None]:
        end = min(offset + CHUNK, self._source.size)

        async def body() -> AsyncIterator[bytes]:
            for start in range(offset, end, _PIECE):
                piece = await self._source.read(start, min(_PIECE, end - start))
                yield piece
                self._on_bytes(start + len(piece), self._source.size)

        headers = {
            **_TUS,
            "Upload-Offset": str(offset),
            "Content-Type": "application/offset+octet-stream",
            "Content-Length": str(end - offset),
        }
        answer = await self._session.request(
            Wish("PATCH", path, body=body, headers=headers, seconds=LONG), "refused", self._patience
        )
        return int(answer.headers["upload-offset"]), _file_in(answer)

    async def _ask(self, path: str) -> tuple[int, str | None]:
        answer = await self._session.request(Wish("HEAD", path, headers=_TUS, seconds=LONG), None, self._patience)
        return int(answer.headers["upload-offset"]), _file_in(answer)


def _file_in(answer: httpx.Response) -> str | None:
    """Return the file that an upload became."""
    return answer.headers.get("scangraph-file") or None


# --- fetching --------------------------------------------------------------------------------------------------------------


class Content(NamedTuple):
    """What is known of a file's content."""

    file_id: str
    size: int
    sha256: str


async def download(session: Session, content: Content, target: Path, on_bytes: OnBytes = nothing) -> None:
    """Fetch a file: under another name first, and under its own once every byte of it is right.

    Raises
    ------
    DigestMismatch
    """
    temporary = target.with_name(f".{target.name[:200]}.{secrets.token_hex(4)}.part")
    patience, digest, done = Patience(session.patience), hashlib.sha256(), 0
    try:
        with temporary.open("wb") as file:
            while done < content.size:
                try:
                    async for piece in _pieces(session, content, done):
                        await asyncio.to_thread(file.write, piece)
                        digest.update(piece)
                        done += len(piece)
                        on_bytes(done, content.size)
                        patience.restore()
                    failure: ScanGraphError = ServerUnreachable(url=session.url, reason="the content ended early")
                except ScanGraphError as error:
                    if kind_of(error) == "final":
                        raise
                    failure = error
                if done < content.size:
                    await patience.bear(failure, float(failure.fields.get("retry_after_seconds", 0)))
            if digest.hexdigest() != content.sha256:
                raise DigestMismatch(algorithm="SHA-256")
            file.flush()
            await asyncio.to_thread(os.fsync, file.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


async def _pieces(session: Session, content: Content, start: int) -> AsyncIterator[bytes]:
    """Yield the content from a byte on, as far as one connection carries."""
    part = {"Range": f"bytes={start}-", "If-Range": f'"{content.sha256}"'} if start else {}
    # Content-coded bytes would be counted and hashed wrongly.
    headers = {"Accept-Encoding": "identity", **part}
    async with session.send(Wish("GET", f"/v1/files/{segment(content.file_id)}", headers=headers, follow=True)) as response:
        if start and response.status_code != 206:
            raise NoSuch(kind="file", id=content.file_id)  # another content stands there by now
        async for piece in response.aiter_raw(_PIECE):
            yield piece


async def fetch_whole(session: Session, wish: Wish, target: Path) -> None:
    """Fetch what is made while it is sent, and so has neither size nor ranges: until one connection carries all of it."""
    temporary = target.with_name(f".{target.name[:200]}.{secrets.token_hex(4)}.part")
    patience = Patience(session.patience)
    try:
        while True:
            try:
                with temporary.open("wb") as file:
                    async with session.send(wish) as response:
                        async for piece in response.aiter_raw(_PIECE):
                            await asyncio.to_thread(file.write, piece)
                    file.flush()
                    await asyncio.to_thread(os.fsync, file.fileno())
                break
            except ScanGraphError as failure:
                if kind_of(failure) == "final":
                    raise
                await patience.bear(failure, float(failure.fields.get("retry_after_seconds", 0)))
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
