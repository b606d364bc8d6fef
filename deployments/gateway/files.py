"""Files: uploads streamed into the storage, downloads streamed out of it."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal
from urllib.parse import quote, urlencode

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.responses import StreamingResponse
from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header
from starlette.requests import ClientDisconnect

from deployments.gateway import problems
from deployments.gateway.auth import requires
from deployments.gateway.services import Access, Services
from scangraph.contracts.api import FileMetadata, FilePage, FileView
from scangraph.contracts.errors import (
    DigestMismatch,
    FileMissing,
    InvalidInputs,
    UnsatisfiableRange,
    UploadIncomplete,
    UploadTooLarge,
)
from scangraph.intake import Principal, discard, inspected, keep, new_file, own_file, safe_name
from scangraph.store import cursors
from scangraph.store import files as records
from scangraph.store.derived import drop_derived
from scangraph.store.files import NewFile
from scangraph.store.tables import File
from scangraph.store.views import download_url, file_metadata, file_view

#: What a browser must not do with somebody's upload.
INERT = {"X-Content-Type-Options": "nosniff", "Content-Security-Policy": "sandbox; default-src 'none'"}
#: A part's headers.
_HEADERS, _HEADER_BYTES = 16, 4096
_PARTS = 256


@dataclass(frozen=True)
class Form:
    """A multipart form: its text fields, and its files by their field, which are stored and have no row yet."""

    fields: dict[str, str] = field(default_factory=dict)
    files: list[tuple[str, NewFile]] = field(default_factory=list)


# --- receiving -------------------------------------------------------------------------------------------------------------


async def receive_form(
    request: Request, services: Services, principal: Principal, *, file_fields: Callable[[str], bool], most: int = 64
) -> Form:
    """Read a multipart form, its files straight into the storage, and let the gate look at them.

    The files have no rows yet: `keep` makes them, `discard` deletes the bytes. Whatever goes wrong in here leaves nothing.

    Parameters
    ----------
    file_fields : callable
        Whether a field of this name is a file.
    most : int
        Files that the form may have.

    Raises
    ------
    InvalidInputs
        If it is no such form; points at the field.
    UploadTooLarge, UploadIncomplete, DigestMismatch
    ScanGraphError
        Whatever the gate or the storage raises.
    """
    limit = services.settings.files.max_upload_bytes
    room = most * limit + services.settings.gateway.max_body_bytes
    if int(request.headers.get("content-length") or 0) > room:
        raise UploadTooLarge(limit=limit)
    problems.allow_body(request, room)
    reader = _FormReader(services, principal, file_fields, most)
    form = reader.form
    try:
        await reader.read(request)
        for number, (name, file) in enumerate(form.files):
            form.files[number] = (name, await inspected(services, file))
    except BaseException:
        await asyncio.shield(discard(services, [file for _, file in form.files]))
        raise
    return form


class _FormReader:
    """A form as it comes in: nothing of it waits here for more than one message."""

    def __init__(self, services: Services, principal: Principal, file_fields: Callable[[str], bool], most: int) -> None:
        self._services, self._principal = services, principal
        self._is_file, self._most = file_fields, most
        self._room = services.settings.gateway.max_body_bytes
        self.form = Form()

    async def read(self, request: Request) -> None:
        """Read all of it."""
        announced = _sha256_in(request.headers.get("content-digest"))
        whole = hashlib.sha256() if announced else None
        parts = 0
        async with contextlib.aclosing(_form_events(request, whole)) as events:
            async for headers in events:
                if isinstance(headers, bytes) or headers is None:  # between parts there is nothing
                    continue
                parts += 1
                if parts > _PARTS:
                    raise _unfit("", f"it has more than {_PARTS} fields")
                await self._read_part(headers, events, request)
        if whole is not None and whole.digest() != announced:
            raise DigestMismatch(algorithm="SHA-256")

    async def _read_part(self, headers: dict[bytes, bytes], events: AsyncIterator[_Event], request: Request) -> None:
        kind, options = parse_options_header(headers.get(b"content-disposition"))
        if kind != b"form-data" or b"name" not in options:
            raise _unfit("", "a field has no name")
        name = _decoded(options[b"name"])
        is_file = b"filename" in options
        if is_file and not self._is_file(name):
            raise _unfit(name, "there is no such file field")
        if not is_file and self._is_file(name):
            raise _unfit(name, "send it as a file, with a filename")
        if is_file:
            await self._read_file(name, _decoded(options[b"filename"]), headers, events, request)
            return
        if name in self.form.fields:
            raise _unfit(name, "it is there twice")
        text = b""
        async for piece in _until_end(events):
            self._room -= len(piece)
            if self._room < 0:
                limit = self._services.settings.gateway.max_body_bytes
                raise _unfit(name, f"all text together may have {limit} bytes")
            text += piece
        self.form.fields[name] = _decoded(text)

    async def _read_file(
        self, name: str, filename: str, headers: dict[bytes, bytes], events: AsyncIterator[_Event], request: Request
    ) -> None:
        if len(self.form.files) >= self._most:
            raise _unfit(name, f"more than {self._most} {'file' if self._most == 1 else 'files'}")
        file, limit, size = (
            new_file(self._services, self._principal, filename),
            self._services.settings.files.max_upload_bytes,
            0,
        )
        # It is in the form before it is in the storage: a cancellation in the last moment must not forget it.
        self.form.files.append((name, file))
        async with self._services.storage.writer(file.storage_name) as out:
            async for piece in _until_end(events):
                size += len(piece)
                if size > limit:
                    raise UploadTooLarge(limit=limit)
                await out.write(piece)
        file = NewFile(**{**file.__dict__, "size": size, "sha256": out.sha256})
        self.form.files[-1] = (name, file)
        announced = [_sha256_in(headers.get(header, b"").decode("latin-1")) for header in (b"repr-digest", b"content-digest")]
        if self._most == 1:
            announced.append(_sha256_in(request.headers.get("repr-digest")))
        if any(digest is not None and digest.hex() != file.sha256 for digest in announced):
            raise DigestMismatch(algorithm="SHA-256")


#: A part's headers, a piece of its content, or None at its end.
_Event = dict[bytes, bytes] | bytes | None


async def _form_events(request: Request, whole: Any) -> AsyncGenerator[_Event]:
    kind, options = parse_options_header(request.headers.get("content-type"))
    if kind != b"multipart/form-data" or not options.get(b"boundary"):
        raise _unfit("", "the body must be multipart/form-data, with a boundary")
    events: list[_Event] = []
    headers: dict[bytes, bytes] = {}
    names, values, state = bytearray(), bytearray(), {"ended": False}

    def header_end() -> None:
        headers[bytes(names).lower()] = bytes(values)
        names.clear()
        values.clear()

    def headers_finished() -> None:
        events.append(dict(headers))
        headers.clear()

    callbacks: Any = {
        "on_header_field": lambda data, start, end: names.extend(data[start:end]),
        "on_header_value": lambda data, start, end: values.extend(data[start:end]),
        "on_header_end": header_end,
        "on_headers_finished": headers_finished,
        "on_part_data": lambda data, start, end: events.append(data[start:end]),
        "on_part_end": lambda: events.append(None),
        "on_end": lambda: state.update(ended=True),
    }
    try:
        parser = MultipartParser(options[b"boundary"], callbacks, max_header_count=_HEADERS, max_header_size=_HEADER_BYTES)
        async for piece in request.stream():
            if whole is not None:
                whole.update(piece)
            parser.write(piece)
            for event in events:
                yield event
            events.clear()
    except FormParserError as error:
        raise _unfit("", f"the form cannot be read: {error}") from error
    except ClientDisconnect as error:
        raise UploadIncomplete(detail="The connection ended in the middle of the body.") from error
    if not state["ended"]:
        raise _unfit("", "the form ends before its last boundary; it was cut, send it again")


async def _until_end(events: AsyncIterator[_Event]) -> AsyncIterator[bytes]:
    async for event in events:
        if not isinstance(event, bytes):
            return
        yield event


def _decoded(text: bytes) -> str:
    try:
        return text.decode()
    except UnicodeDecodeError:
        return text.decode("latin-1")


def _unfit(name: str, reason: str) -> InvalidInputs:
    pointer = "/" + name.replace("~", "~0").replace("/", "~1") if name else ""
    return InvalidInputs(detail=f"{pointer or 'form'}: {reason}", errors=[{"pointer": pointer, "detail": reason}])


def _sha256_in(header: str | None) -> bytes | None:
    """Return the SHA-256 of a digest header (RFC 9530), b"" for one that cannot be read; other algorithms are not looked at."""
    for entry in (header or "").split(","):
        algorithm, _, value = entry.strip().partition("=")
        if algorithm.lower() == "sha-256":
            try:
                return base64.b64decode(value.strip().removeprefix(":").removesuffix(":"), validate=True)
            except ValueError:
                return b""
    return None


# --- sending ---------------------------------------------------------------------------------------------------------------


def _content_headers(file: File) -> dict[str, str]:
    plain = safe_name(file.filename)
    digest = base64.b64encode(bytes.fromhex(file.sha256)).decode()
    return {
        "ETag": f'"{file.sha256}"',
        "Accept-Ranges": "bytes",
        "Content-Disposition": f"attachment; filename=\"{plain}\"; filename*=UTF-8''{quote(file.filename, safe='')}",
        "Content-Type": file.media_type,
        "Repr-Digest": f"sha-256=:{digest}:",
        "Last-Modified": file.created_at.strftime("%a, %d %b %Y %H:%M:%S GMT"),
        "Cache-Control": "private, no-cache",
        **INERT,
    }


def asked_range(request: Request, size: int, tag: str) -> tuple[int, int] | None:
    """Return (first byte, byte behind the last) that the request asks for, or None for the whole of it (RFC 9110, 14.2).

    Raises
    ------
    UnsatisfiableRange
    """
    asked = re.fullmatch(r"bytes=\s*(\d{0,18})-(\d{0,18})\s*", request.headers.get("range", ""))
    condition = request.headers.get("if-range")
    # A date is no strong validator here: only the ETag makes a part fit to the parts that the client has.
    if asked is None or asked[0].strip() == "bytes=-" or (condition is not None and condition != tag):
        return None
    first, last = asked[1], asked[2]
    if not first:
        start, end = max(size - int(last), 0), size
    else:
        start, end = int(first), min(int(last) + 1, size) if last else size
        if last and int(last) < start:
            return None  # not a range at all
    if start >= end:
        raise UnsatisfiableRange(size=size)
    return start, end


def is_known(request: Request, tag: str) -> bool:
    """Whether the client has it already (If-None-Match)."""
    known = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
    return tag in known or known == ["*"]


def unsatisfiable(error: UnsatisfiableRange, request: Request) -> Response:
    """Answer a range that is not there."""
    response = problems.from_error(error, request)
    response.headers["Content-Range"] = f"bytes */{error.fields['size']}"
    return response


async def _sent_on(services: Services, file: File, request: Request) -> Response | None:
    """Return the way to S3, where it is wished. If-Range names our ETag, which S3 does not know: that is answered from here."""
    seconds = services.settings.files.link_seconds
    if seconds is None or request.method != "GET" or "if-range" in request.headers:
        return None
    link = await services.storage.link(file.storage_name, seconds, file.filename, file.media_type)
    return None if link is None else Response(status_code=307, headers={"Location": link, "Cache-Control": "no-store", **INERT})


async def _content(services: Services, file: File, request: Request) -> Response:
    headers = _content_headers(file)
    if is_known(request, headers["ETag"]):
        return Response(status_code=304, headers={name: headers[name] for name in ("ETag", "Cache-Control")})
    try:
        asked = asked_range(request, file.size, headers["ETag"]) if request.method == "GET" else None
    except UnsatisfiableRange as error:
        return unsatisfiable(error, request)
    try:
        await services.storage.head(file.storage_name)
    except FileMissing as error:
        raise FileMissing(path=f"{file.storage_name} (the record is here, the bytes are gone)") from error
    if (sent_on := await _sent_on(services, file, request)) is not None:
        return sent_on
    start, end = asked or (0, file.size)
    headers["Content-Length"] = str(end - start)
    if asked:
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{file.size}"
    if request.method == "HEAD":
        return Response(status_code=200, headers=headers)
    return StreamingResponse(services.storage.stream(file.storage_name, start, end), 206 if asked else 200, headers)


# --- routes ----------------------------------------------------------------------------------------------------------------

_FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file"],
                    "properties": {"file": {"type": "string", "format": "binary", "description": "the file"}},
                    "additionalProperties": False,
                }
            }
        },
    }
}
_BINARY: dict[str, Any] = {"content": {"*/*": {"schema": {"type": "string", "format": "binary"}}}}


def file_routes(services: Access) -> APIRouter:
    """Return the routes under `/v1/files`."""
    router = APIRouter(prefix="/v1/files", tags=["files"])
    viewer, operator = Depends(requires(services, "viewer")), Depends(requires(services, "operator"))

    async def upload(request: Request, response: Response, principal: Principal = operator) -> FileView:
        """Send a file as the field `file` of a multipart form.

        It is streamed into the storage and checked on arrival: its kind is found by its content, and a NIfTI must be whole and
        safe. `Repr-Digest: sha-256=:…:` (of the file) is verified if it is there. For bad connections there is `/v1/uploads`.
        """
        form = await receive_form(request, services(), principal, file_fields=lambda name: name == "file", most=1)
        if form.fields or not form.files:
            await discard(services(), [file for _, file in form.files])
            raise (
                _unfit("file", "it is missing") if not form.files else _unfit(next(iter(form.fields)), "there is no such field")
            )
        (file,) = await keep(services(), [file for _, file in form.files])
        response.headers["Location"] = download_url(file.id)
        return file_view(file)

    async def listed(
        request: Request,
        response: Response,
        kind: Annotated[str | None, Query(max_length=32, description="as in the answers")] = None,
        origin: Literal["upload", "result"] | None = None,
        limit: Annotated[int, Query(ge=1, le=200)] = 50,
        cursor: Annotated[str | None, Query(max_length=256)] = None,
        principal: Principal = viewer,
    ) -> FilePage:
        owner = None if principal.may("admin") else principal.account_id
        before = cursors.decode(cursor) if cursor is not None else None
        store = services().store
        rows = await records.list_files(store, owner_id=owner, kind=kind, origin=origin, before=before, limit=limit + 1)
        following = cursors.encode(rows[limit - 1].created_at, rows[limit - 1].id) if len(rows) > limit else None
        if following:
            query = {name: value for name, value in request.query_params.items() if name != "cursor"}
            response.headers["Link"] = f'<{request.url.path}?{urlencode({**query, "cursor": following})}>; rel="next"'
        return FilePage(items=[file_view(row) for row in rows[:limit]], next_cursor=following)

    async def content(file_id: str, request: Request, principal: Principal = viewer) -> Response:
        """The bytes, whole or one range of them (`Range`, `If-Range`). `Repr-Digest` is the SHA-256 of the whole file.

        A service that keeps its files in S3 may answer 307 with a link to them there, good for a while: follow it without
        the token.
        """
        return await _content(services(), await own_file(services(), principal, file_id), request)

    async def metadata(file_id: str, principal: Principal = viewer) -> FileMetadata:
        file = await own_file(services(), principal, file_id)
        return file_metadata(file)

    async def delete(file_id: str, principal: Principal = operator) -> Response:
        await own_file(services(), principal, file_id)
        file = await records.delete_file(services().store, file_id)
        await services().storage.delete(file.storage_name)
        await drop_derived(services().store, services().storage, [file.sha256])
        return Response(status_code=204)

    router.add_api_route(
        "",
        upload,
        methods=["POST"],
        status_code=201,
        summary="Send a file",
        responses=problems.documented(401, 403, 408, 413, 415, 422, 429, 500, 503, 507),
        openapi_extra=_FORM,
    )
    router.add_api_route(
        "", listed, methods=["GET"], summary="Your files, the newest first", responses=problems.documented(401, 403, 422, 503)
    )
    ranged: dict[int | str, dict[str, Any]] = {
        200: {"description": "the whole file", **_BINARY},
        206: {"description": "the part that was asked for", **_BINARY},
        304: {"description": "you have it"},
        307: {"description": "it is at `Location`, for a while", "headers": {"Location": {"schema": {"type": "string"}}}},
    }
    for method in ("GET", "HEAD"):
        router.add_api_route(
            "/{file_id}",
            content,
            methods=[method],
            summary="A file's content" if method == "GET" else "What GET would say, without the content",
            response_class=Response,
            responses={**ranged, **problems.documented(401, 403, 404, 416, 422, 503)},
            operation_id=f"{method.lower()}_file",
        )
    router.add_api_route(
        "/{file_id}/metadata",
        metadata,
        methods=["GET"],
        summary="What is known about a file",
        responses=problems.documented(401, 403, 404, 422, 503),
    )
    router.add_api_route(
        "/{file_id}",
        delete,
        methods=["DELETE"],
        status_code=204,
        response_class=Response,
        summary="Delete a file",
        responses=problems.documented(401, 403, 404, 409, 422, 503),
    )
    return router
