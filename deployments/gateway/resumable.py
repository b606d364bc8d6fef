"""Resumable uploads: tus 1.0 (https://tus.io/protocols/resumable-upload) at `/v1/uploads`.

What arrives is kept in the storage in parts of a few MB, each an object of its own with a row, so that any replica can go on
where any other stopped, whatever happened to it. The last part gets no row: its bytes count once the file is there. So
an upload whose offset equals its length *is* a file, and one whose joining was cut off asks for its last part once more.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import secrets
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from datetime import timedelta
from email.utils import format_datetime
from typing import Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from deployments.gateway import problems
from deployments.gateway.auth import requires
from deployments.gateway.services import Access, Services
from scangraph.contracts.errors import (
    ChecksumMismatch,
    InvalidUpload,
    NoSuch,
    ScanGraphError,
    TusVersion,
    UploadConflict,
    UploadTooLarge,
    UsageError,
)
from scangraph.intake import Principal, discard_unnamed, inspected, new_file, shown_name
from scangraph.store import files as records
from scangraph.store import now
from scangraph.store.database import whole
from scangraph.store.files import UPLOADS, NewFile
from scangraph.store.tables import Upload
from scangraph.store.views import download_url

VERSION = "1.0.0"
EXTENSIONS = "creation,creation-with-upload,expiration,termination,checksum"
CHECKSUMS: dict[str, Callable[[], Any]] = {"sha1": lambda: hashlib.sha1(usedforsecurity=False), "sha256": hashlib.sha256}
_CONTENT = "application/offset+octet-stream"
#: What is lost at most when the gateway's process dies.
PART = 8 * 2**20
_METADATA_BYTES = 4096
#: A joiner says that it lives every third of this.
_JOINING = timedelta(seconds=15)
#: How long HEAD waits for a joiner before it says how things stand.
_PATIENCE_SECONDS = 20.0
#: A line on which nothing comes for so long has ended for whoever comes back on another,
_SILENT_SECONDS = 0.3
#: who waits so long for one that still brings bytes.
_DRAINING_SECONDS = 2.0
_OVERTAKEN = "Another request writes to this upload by now"


class _TusRoute(APIRoute):
    """Speaks the protocol's version in every answer, and listens to nothing else."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        inner = super().get_route_handler()

        async def handle(request: Request) -> Response:
            try:
                if request.method != "OPTIONS" and request.headers.get("tus-resumable") != VERSION:
                    raise TusVersion
                response: Response = await inner(request)
            except ScanGraphError as error:
                response = problems.from_error(error, request)
                if isinstance(error, TusVersion):
                    response.headers["Tus-Version"] = VERSION
            except HTTPException as error:
                raise HTTPException(
                    error.status_code, error.detail, {**(error.headers or {}), "Tus-Resumable": VERSION}
                ) from error
            response.headers["Tus-Resumable"] = VERSION
            return response

        return handle


# --- receiving -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Part:
    start: int
    size: int
    name: str


#: How a body ends: because it does, or because the client left, or fell silent.
_ENDS = (StopAsyncIteration, ClientDisconnect, asyncio.CancelledError, HTTPException)


class _Receiving:
    """One request's bytes, on their way into an upload."""

    def __init__(self, services: Services, request: Request, upload: Upload, writer: str, principal: Principal) -> None:
        self._services, self._request, self._upload, self._writer = services, request, upload, writer
        self._principal = principal
        self._stream = request.stream()
        self._reading: asyncio.Future[bytes] | None = None
        self._left: BaseException | None = None
        self._last = time.monotonic()
        self._kept = asyncio.Event()
        self._offset = upload.offset
        self._check, self._announced = _checksum(request)
        self._pending: list[_Part] = []

    def leave(self, why: BaseException) -> None:
        """Let the body end here: the client is gone, or back on another line."""
        self._left = why
        if self._reading is not None:
            self._reading.cancel()

    @property
    def silent_seconds(self) -> float:
        """How long nothing has come."""
        return time.monotonic() - self._last

    async def ended(self, seconds: float) -> bool:
        """Wait at most so long until what came is kept, and return whether it is."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._kept.wait()
        return self._kept.is_set()

    @whole
    async def run(self) -> tuple[int, str | None]:
        """Keep what comes and return the offset reached, and the file's id once it is whole.

        What came before a connection broke is kept. With a checksum it is not: nobody could say whether it is right.
        It runs in a task of its own: Serve cancels the request of a client who left again and again, and nothing could be kept.
        A file that is being made is made to its end, too: that takes as long for whoever comes back.
        """
        problems.allow_body(self._request, self._upload.length - self._offset)
        end: BaseException | None = None
        lines = _lines(self._services)
        lines[self._upload.id] = self
        try:
            while end is None:
                part, end = await self._receive_part()
                if part is None:
                    break
                self._pending.append(part)
                self._offset += part.size
                if self._check is None and self._offset < self._upload.length:
                    await self._note()
            if self._check is not None:
                self._verify(end)
            if self._pending and self._offset < self._upload.length:
                await self._note()
            if self._pending or self._upload.length == 0:
                last, self._pending = self._pending, []
                return self._offset, await _join(self._services, self._upload, self._writer, last, self._principal)
            _complain(end)
            return self._offset, None
        finally:
            self._kept.set()
            if lines.get(self._upload.id) is self:
                del lines[self._upload.id]
            await discard_unnamed(self._services, [lost.name for lost in self._pending])

    async def _receive_part(self) -> tuple[_Part | None, BaseException | None]:
        """Store the next part; returns it, if there was a byte, and what ended the body, if it ended."""
        room = self._upload.length - self._offset
        piece, end = await self._next_piece()
        if end is not None:
            return None, end
        name, size = f"{UPLOADS}{self._upload.id}/{self._offset:015d}-{secrets.token_hex(4)}", 0
        async with self._services.storage.writer(name) as out:
            while end is None:
                size += len(piece)
                if size > room:
                    raise UploadTooLarge(limit=self._upload.length)
                if self._check is not None:
                    self._check.update(piece)
                await out.write(piece)
                if PART <= size < room:
                    break
                piece, end = await self._next_piece()
        return _Part(self._offset, size, name), end

    async def _next_piece(self) -> tuple[bytes, BaseException | None]:
        """Return the next bytes, or what ended them."""
        piece = b""
        try:
            while not piece:
                if self._left is not None:
                    return b"", self._left
                self._reading = asyncio.ensure_future(anext(self._stream))
                piece = await self._reading
                self._last = time.monotonic()
        except _ENDS as end:
            if isinstance(end, HTTPException) and end.status_code != 408:  # more than was announced
                raise
            return b"", self._left or end
        return piece, None

    async def _note(self) -> None:
        """Give the pending parts their rows."""
        parts = [(part.start, part.size, part.name) for part in self._pending]
        if not await records.advance_upload(self._services.store, self._upload.id, self._writer, parts):
            raise UploadConflict(reason=_OVERTAKEN)
        self._pending.clear()

    def _verify(self, end: BaseException | None) -> None:
        _complain(end)
        algorithm, digest = self._announced
        if self._check.digest() != digest:
            raise ChecksumMismatch(algorithm=algorithm)


def _lines(services: Services) -> dict[str, _Receiving]:
    """Return what this replica receives, by upload."""
    found: dict[str, _Receiving] = services.state.setdefault("lines", {})
    return found


def _complain(end: BaseException | None) -> None:
    """Raise what ended a body, unless it simply ended."""
    if isinstance(end, ClientDisconnect):
        raise HTTPException(408, "the connection ended in the middle of the part") from end
    if end is not None and not isinstance(end, StopAsyncIteration):
        raise end


async def _join(services: Services, upload: Upload, writer: str, last: list[_Part], principal: Principal) -> str:
    """Make a file of an upload's parts and the ones without a row, and return its id.

    Raises
    ------
    UploadConflict
        If somebody else finished it, or began to write meanwhile.
    """
    store, storage = services.store, services.storage
    new = new_file(services, principal, upload.filename)
    holding = asyncio.create_task(_hold(services, upload.id, writer))
    try:
        if not await records.hold_joining(store, upload.id, writer, now() + _JOINING):
            raise UploadConflict(reason=_OVERTAKEN)
        names = [part.storage_name for part in await records.upload_parts(store, upload.id)]
        async with storage.writer(new.storage_name) as out:
            for name in [*names, *(part.name for part in last)]:
                async for piece in storage.stream(name):
                    await out.write(piece)
        new = NewFile(**{**new.__dict__, "size": out.size, "sha256": out.sha256})
        finished = await records.finish_upload(store, upload.id, writer, await inspected(services, new))
        if finished is None:
            raise UploadConflict(reason=_OVERTAKEN)
    except BaseException as error:
        with contextlib.suppress(ScanGraphError):
            if not await records.unnamed(store, [new.storage_name]):
                return new.id  # the commit's answer was lost, not the commit
            await storage.delete(new.storage_name)
            if isinstance(error, UsageError) and not isinstance(error, UploadConflict):  # the gate refuses it, now and ever
                for name in await records.drop_uploads(store, upload.id):
                    await storage.delete(name)
            else:
                await records.hold_joining(store, upload.id, writer, None)
        raise
    else:
        with contextlib.suppress(ScanGraphError):  # swept later
            for name in finished[1]:
                await storage.delete(name)
        return finished[0].id
    finally:
        holding.cancel()
        with contextlib.suppress(ScanGraphError):
            for part in last:
                await storage.delete(part.name)


async def _hold(services: Services, upload_id: str, writer: str) -> None:
    while True:
        await asyncio.sleep(_JOINING.total_seconds() / 3)
        with contextlib.suppress(ScanGraphError):
            await records.hold_joining(services.store, upload_id, writer, now() + _JOINING)


# --- headers ---------------------------------------------------------------------------------------------------------------


def _number(request: Request, header: str) -> int:
    text = request.headers.get(header, "")
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise InvalidUpload(header=header, reason="it must be there and be a whole number")
    return int(text)


def _checksum(request: Request) -> tuple[Any, tuple[str, bytes]]:
    """Return a running hash and (algorithm, digest) to compare it with; None without the header."""
    header = request.headers.get("upload-checksum")
    if header is None:
        return None, ("", b"")
    algorithm, _, value = header.partition(" ")
    if algorithm not in CHECKSUMS:
        raise InvalidUpload(header="Upload-Checksum", reason=f"the algorithms are {', '.join(CHECKSUMS)}")
    try:
        return CHECKSUMS[algorithm](), (algorithm, base64.b64decode(value, validate=True))
    except ValueError as error:
        raise InvalidUpload(header="Upload-Checksum", reason="the checksum is not base64") from error


def _metadata(header: str) -> dict[str, str]:
    if len(header) > _METADATA_BYTES:
        raise InvalidUpload(header="Upload-Metadata", reason=f"it may have {_METADATA_BYTES} bytes")
    values = {}
    for pair in filter(None, (entry.strip() for entry in header.split(","))):
        key, _, value = pair.partition(" ")
        try:
            values[key] = base64.b64decode(value, validate=True).decode()
        except ValueError as error:
            raise InvalidUpload(header="Upload-Metadata", reason=f"the value of {key!r} is not UTF-8 in base64") from error
    return values


def _standing(upload: Upload) -> dict[str, str]:
    """Return the headers that say how far an upload is."""
    headers = {
        "Upload-Offset": str(upload.offset),
        "Upload-Expires": format_datetime(upload.expires_at, usegmt=True),
        "Cache-Control": "no-store",
    }
    return headers | _whole(upload.file_id)


def _whole(file_id: str | None) -> dict[str, str]:
    return {"Scangraph-File": file_id, "Content-Location": download_url(file_id)} if file_id else {}


# --- routes ----------------------------------------------------------------------------------------------------------------


async def _own_upload(services: Services, principal: Principal, upload_id: str) -> Upload:
    """Return an account's upload. Nobody else's business, not even an admin's: there is nothing to see yet."""
    upload = await records.get_upload(services.store, upload_id)
    if upload.owner_id != principal.account_id:
        raise NoSuch(kind="upload", id=upload_id)
    return upload


async def _begin(services: Services, request: Request, principal: Principal) -> Response:
    limit = services.settings.files.max_upload_bytes
    length = _number(request, "Upload-Length")
    if length > limit:
        raise UploadTooLarge(limit=limit)
    sends = request.headers.get("content-type") == _CONTENT
    _checksum(request)  # before anything is made
    header = request.headers.get("upload-metadata", "")
    values = _metadata(header)
    upload = await records.create_upload(
        services.store,
        owner_id=principal.account_id,
        filename=shown_name(values.get("filename") or values.get("name") or "file"),
        length=length,
        state={"metadata": header},
        expires_at=now() + timedelta(hours=services.settings.files.resumable_hours),
        most=services.settings.files.max_open_uploads,
    )
    headers = {**_standing(upload), "Location": f"/v1/uploads/{upload.id}"}
    if sends or length == 0:
        offset, file_id = await _receive(services, request, upload, principal)
        headers |= {"Upload-Offset": str(offset), **_whole(file_id)}
    return Response(status_code=201, headers=headers)


async def _receive(services: Services, request: Request, upload: Upload, principal: Principal) -> tuple[int, str | None]:
    writer = await records.take_upload(services.store, upload.id, upload.offset)
    receiving = _Receiving(services, request, upload, writer, principal)
    try:
        return await receiving.run()
    except asyncio.CancelledError:
        receiving.leave(asyncio.CancelledError())
        raise


async def _append(services: Services, request: Request, upload_id: str, principal: Principal) -> Response:
    if request.headers.get("content-type") != _CONTENT:
        raise HTTPException(415, f"a part's Content-Type is {_CONTENT}", {"Accept": _CONTENT})
    offset = _number(request, "Upload-Offset")
    upload = await _own_upload(services, principal, upload_id)
    if await _settled(services, upload_id, ends=True):
        upload = await _own_upload(services, principal, upload_id)
    if upload.offset != offset:
        raise UploadConflict(reason=f"{upload.offset} bytes are there, and the part begins at {offset}")
    if upload.file_id is not None:
        return Response(status_code=204, headers=_standing(upload))
    offset, file_id = await _receive(services, request, upload, principal)
    return Response(status_code=204, headers={**_standing(upload), "Upload-Offset": str(offset), **_whole(file_id)})


async def _settled(services: Services, upload_id: str, *, ends: bool) -> bool:
    """Let the line that wrote until now bring what it still has; False if there was none in this replica.

    Race: a line breaks, and the client is back before its last bytes are through (a browser repeats a request on a fresh
    connection within a millisecond). The newcomer would begin where the upload was before that line, and overtake it. One
    who only asks ends nothing: the line may be alive, and slow.
    """
    line = _lines(services).get(upload_id)
    if line is None:
        return False
    begun = time.monotonic()
    while line.silent_seconds < _SILENT_SECONDS and time.monotonic() - begun < _DRAINING_SECONDS:
        if await line.ended(_SILENT_SECONDS / 10):
            return True
    if ends:
        line.leave(UploadConflict(reason=_OVERTAKEN))
        await line.ended(_DRAINING_SECONDS)
    return True


async def _show(services: Services, upload_id: str, principal: Principal) -> Response:
    upload = await _own_upload(services, principal, upload_id)
    if await _settled(services, upload_id, ends=False):
        upload = await _own_upload(services, principal, upload_id)
    # A client that lost its connection while the parts are joined would have to send the last one again.
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_PATIENCE_SECONDS):
            while upload.joining_until is not None and upload.joining_until > now():
                await asyncio.sleep(services.settings.gateway.poll_seconds)
                upload = await _own_upload(services, principal, upload_id)
    headers = {**_standing(upload), "Upload-Length": str(upload.length)}
    if upload.state.get("metadata"):
        headers["Upload-Metadata"] = upload.state["metadata"]
    return Response(status_code=200, headers=headers)


async def _drop(services: Services, upload_id: str, principal: Principal) -> Response:
    await _own_upload(services, principal, upload_id)
    for name in await records.drop_uploads(services.store, upload_id):
        await services.storage.delete(name)
    return Response(status_code=204)


def _header(name: str, description: str, *, required: bool = False) -> dict[str, Any]:
    return {"in": "header", "name": name, "required": required, "description": description, "schema": {"type": "string"}}


_RESUMABLE = _header("Tus-Resumable", "the protocol's version, 1.0.0", required=True)
_SUM = _header("Upload-Checksum", "`sha1` or `sha256`, a space, and the checksum of this body in base64")
_BODY = {"content": {_CONTENT: {"schema": {"type": "string", "format": "binary"}}}}


def upload_routes(services: Access) -> APIRouter:
    """Return the routes under `/v1/uploads`."""
    router = APIRouter(prefix="/v1/uploads", tags=["uploads"], route_class=_TusRoute)
    operator = Depends(requires(services, "operator"))

    async def options() -> Response:
        """What this server's tus can do; needs no token."""
        headers = {
            "Tus-Version": VERSION,
            "Tus-Extension": EXTENSIONS,
            "Tus-Max-Size": str(services().settings.files.max_upload_bytes),
            "Tus-Checksum-Algorithm": ",".join(CHECKSUMS),
        }
        return Response(status_code=204, headers=headers)

    async def begin(request: Request, principal: Principal = operator) -> Response:
        """Begin a resumable upload of `Upload-Length` bytes, and send the first ones along if you like.

        `Location` is where the rest goes, until `Upload-Expires`. The name of the file goes into `Upload-Metadata`
        (`filename <base64>`).
        """
        return await _begin(services(), request, principal)

    async def show(upload_id: str, principal: Principal = operator) -> Response:
        """How far an upload is (`Upload-Offset`), and once it is whole, which file it became (`Scangraph-File`)."""
        return await _show(services(), upload_id, principal)

    async def append(upload_id: str, request: Request, principal: Principal = operator) -> Response:
        """Send the bytes from `Upload-Offset` on, as many as you like.

        What arrives is kept even if the connection breaks, unless it came with a checksum. With the last byte the upload
        becomes a file: it is checked like one, and `Scangraph-File` is its id.
        """
        return await _append(services(), request, upload_id, principal)

    async def drop(upload_id: str, principal: Principal = operator) -> Response:
        """Give an upload up. A file that it became already stays."""
        return await _drop(services(), upload_id, principal)

    async def overridden(upload_id: str, request: Request, principal: Principal = operator) -> Response:
        """PATCH and DELETE for those whose network knows only POST (the protocol asks for it)."""
        method = request.headers.get("x-http-method-override", "")
        if method == "PATCH":
            return await append(upload_id, request, principal)
        if method == "DELETE":
            return await drop(upload_id, principal)
        raise HTTPException(405, "Method Not Allowed", {"Allow": "HEAD, PATCH, DELETE, OPTIONS"})

    one = "/{upload_id}"
    for path in ("", one):
        router.add_api_route(path, options, methods=["OPTIONS"], status_code=204, include_in_schema=False)
    errors = (400, 401, 403, 404, 408, 409, 412, 413, 415, 422, 429, 460, 500, 503, 507)
    empty: dict[str, Any] = {"response_class": Response}
    router.add_api_route(
        "",
        begin,
        methods=["POST"],
        status_code=201,
        summary="Begin a resumable upload (tus)",
        responses=problems.documented(*errors),
        openapi_extra={
            "parameters": [
                _RESUMABLE,
                _header("Upload-Length", "bytes of the whole file", required=True),
                _header("Upload-Metadata", "`filename <base64>`"),
                _SUM,
            ],
            "requestBody": _BODY,
        },
        **empty,
    )
    router.add_api_route(
        one,
        show,
        methods=["HEAD"],
        summary="How far it is",
        responses=problems.documented(401, 403, 404, 412, 503),
        openapi_extra={"parameters": [_RESUMABLE]},
        **empty,
    )
    router.add_api_route(
        one,
        append,
        methods=["PATCH"],
        status_code=204,
        summary="Send a part",
        responses=problems.documented(*errors),
        openapi_extra={
            "parameters": [_RESUMABLE, _header("Upload-Offset", "where the part begins", required=True), _SUM],
            "requestBody": {"required": True, **_BODY},
        },
        **empty,
    )
    router.add_api_route(
        one,
        drop,
        methods=["DELETE"],
        status_code=204,
        summary="Give it up",
        responses=problems.documented(401, 403, 404, 412, 503),
        openapi_extra={"parameters": [_RESUMABLE]},
        **empty,
    )
    router.add_api_route(one, overridden, methods=["POST"], status_code=204, include_in_schema=False, **empty)
    return router
