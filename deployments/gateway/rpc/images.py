"""An image on its way: received, its execution accepted and followed, its results told; and many, in chunks of one stream."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any

from deployments.gateway.auditing import note_execution
from deployments.gateway.live import hub
from deployments.gateway.rpc.flow import Gone, Line
from deployments.gateway.rpc.messages import Wish, is_image, output_files, parse, read_wish, response_of, status_of
from deployments.gateway.rpc.status import problem_of, to_problem
from deployments.gateway.services import Services
from scangraph import tracing
from scangraph.contracts.api import TERMINAL, InputFile
from scangraph.contracts.errors import (
    AlreadyEnded,
    DigestMismatch,
    EmptyFile,
    Idle,
    InvalidChunk,
    InvalidInputs,
    ScanGraphError,
    TooManyStreams,
    UploadIncomplete,
    UploadTooLarge,
)
from scangraph.contracts.pipelines import PipelineSpec
from scangraph.handles import new_execution_id, own_error
from scangraph.imageflow.v1 import imageflow_pb2 as pb
from scangraph.intake import Principal, fingerprint, keep, look, receive, submit, take_back
from scangraph.store import executions, pipelines
from scangraph.store.executions import Record
from scangraph.store.tables import File

log = logging.getLogger("scangraph")

Tell = Callable[[pb.ProcessingResponse], Awaitable[None]]
#: Results go out in pieces of this size.
_PIECE = 2**19
#: Images of a stream that were given up and still come, before the stream is given up.
_MOST_DROPPED = 1000


# --- one image -------------------------------------------------------------------------------------------------------------


async def process(
    services: Services, principal: Principal, wish: Wish, pieces: AsyncIterator[bytes] | None, tell: Tell
) -> Record:
    """Take an image in, run its pipeline, tell of each event, and return the record of the end.

    Where this is cancelled, or nobody hears what is told, the execution is cancelled, unless it is detached.

    Raises
    ------
    ScanGraphError
        What keeps the execution from being accepted.
    """
    execution_id = await _accepted(services, principal, wish, pieces)
    try:
        record = await look(services, execution_id)
        await tell(pb.ProcessingResponse(execution_id=execution_id, status=status_of(record.execution.state)))
        if record.execution.state not in TERMINAL:
            async for event in hub(services).events(execution_id, record.execution.last_seq):
                if event.body["status"] not in TERMINAL:
                    await tell(response_of(event))
            record = await look(services, execution_id)
        return record
    except BaseException:
        if not wish.detached:
            _in_background(services, _cancel(services, execution_id))
        raise


async def _accepted(services: Services, principal: Principal, wish: Wish, pieces: AsyncIterator[bytes] | None) -> str:
    """Receive the image, and have the execution accepted; return its id."""
    stored = await pipelines.find_pipeline(services.store, wish.execution.pipeline_id)
    if (wish.size or 0) > services.settings.files.max_upload_bytes:
        raise UploadTooLarge(limit=services.settings.files.max_upload_bytes)
    first = await anext(pieces, None) if pieces is not None else None
    file = None
    if first is None and wish.input:
        raise EmptyFile(name=wish.filename, reason="it has no bytes")
    if first is not None and pieces is not None:
        file = await receive(services, principal, wish.filename, _checked(_joined(first, pieces), wish))

    async def settle() -> str:
        files, rows = [file] if file is not None else [], list[File]()
        try:
            inputs: dict[str, Any] = dict(wish.execution.inputs)
            rows = await keep(services, files)
            for row in rows:
                given = {"file_id": row.id, "label_scheme": wish.label_scheme}
                inputs[_place(stored.spec, wish)] = InputFile.model_validate(given)
            words = (wish.execution.model_dump(mode="json"), wish.input, wish.label_scheme, [f.sha256 for f in files])
            key = (wish.key, fingerprint("imageflow.v1", *words)) if wish.key else None
            execution_id, replayed = await submit(
                services, principal, stored, inputs, wish.execution.parameters, wish.execution.priority, key
            )
            await note_execution(services, principal, "grpc", "process", execution_id, "OK")
        except BaseException:
            await take_back(services, files, rows)
            raise
        if replayed:
            await take_back(services, files, rows)
        return execution_id

    # Race: the client leaves while the execution is being accepted. Then only this task knows which one to cancel.
    settling = _in_background(services, settle())
    try:
        return await asyncio.shield(settling)
    except asyncio.CancelledError:
        if not wish.detached:
            _in_background(services, _cancel_when_known(services, settling))
        raise


def _place(spec: PipelineSpec, wish: Wish) -> str:
    """Return the input that the image is for."""
    if wish.input and wish.input in wish.execution.inputs:
        detail = f"input {wish.input!r} is given twice, as a file and as the image"
    elif wish.input:
        return wish.input
    elif free := [name for name in spec.inputs if name not in wish.execution.inputs]:
        return free[0]
    else:
        detail = "every input has a file already, and there is an image besides"
    raise InvalidInputs(detail=detail, errors=[{"pointer": "/inputs", "detail": detail}])


async def _joined(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for piece in rest:
        yield piece


async def _checked(pieces: AsyncIterable[bytes], wish: Wish) -> AsyncIterator[bytes]:
    """Pass an image on; in the end it must be what was announced."""
    size, digest = 0, hashlib.sha256()
    async for piece in pieces:
        size += len(piece)
        if wish.size is not None and size > wish.size:
            raise _wrong_size(wish.size, "more came")
        if wish.sha256:
            digest.update(piece)
        yield piece
    if wish.size is not None and size < wish.size:
        raise _wrong_size(wish.size, f"{size} came")
    if wish.sha256 and digest.hexdigest() != wish.sha256:
        raise DigestMismatch(algorithm="SHA-256")


def _wrong_size(announced: int, found: str) -> InvalidInputs:
    detail = f"the image was announced with {announced} bytes, and {found}"
    return InvalidInputs(detail=detail, errors=[{"pointer": "/file_size", "detail": detail}])


async def _cancel(services: Services, execution_id: str) -> None:
    with contextlib.suppress(AlreadyEnded):
        await executions.request_cancel(services.store, execution_id)
        await services.wake()


async def _cancel_when_known(services: Services, settling: asyncio.Task[str]) -> None:
    with contextlib.suppress(ScanGraphError):  # it was not accepted, which nobody is there to hear
        await _cancel(services, await settling)


def _in_background(services: Services, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
    """Start what goes on without its caller; the loop itself holds tasks only weakly."""
    tasks: set[asyncio.Task[Any]] = services.state.setdefault("rpc_tasks", set())
    task = asyncio.create_task(work)
    tasks.add(task)

    def ended(task: asyncio.Task[Any]) -> None:
        tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) and not isinstance(error, ScanGraphError):
            log.error("after a call had ended", exc_info=error)

    task.add_done_callback(ended)
    return task


async def result_pieces(services: Services, record: Record) -> AsyncIterator[pb.ResultChunk]:
    """Yield the bytes of the results that are images, in pieces."""
    for file in filter(is_image, record.files):
        number, left = 0, file.size
        async for piece in services.storage.stream(file.storage_name, chunk=_PIECE):
            left -= len(piece)
            yield pb.ResultChunk(output=file.output or "", file_id=file.id, chunk_number=number, data=piece, is_final=left <= 0)
            number += 1


def ended_response(record: Record) -> pb.ProcessingResponse:
    """Show how an execution ended."""
    row, completed = record.execution, record.execution.state == "completed"
    warnings = dict.fromkeys(warning for step in record.steps for warning in step.warnings or ())
    return pb.ProcessingResponse(
        execution_id=row.id,
        seq=row.last_seq,
        status=status_of(row.state),
        progress_percentage=100 if completed else 0,
        output_files=output_files(record.files) if completed else [],
        warnings=list(warnings),
    )


def unforeseen(error: BaseException) -> tuple[ScanGraphError, str]:
    """Return what is told of an error that nobody raised on purpose, and under which id the log has it."""
    trace_id, cause = tracing.trace_id() or new_execution_id(), own_error(error)
    if isinstance(cause, ScanGraphError):
        return cause, trace_id
    log.error("trace %s: a gRPC call failed", trace_id, exc_info=error)
    return ScanGraphError(
        detail=f"The service failed in a way nobody foresaw; its log has it under trace {trace_id}."
    ), trace_id


# --- a stream of them ------------------------------------------------------------------------------------------------------


class _Arriving:
    """An image whose chunks still come: who reads the stream puts them in, the image's own task takes them out."""

    def __init__(self, image_id: str, metadata: pb.ImageMetadata) -> None:
        self.image_id, self.metadata = image_id, metadata
        self._pieces: deque[bytes] = deque()
        self._news = asyncio.Event()
        self._next = self._size = 0
        self._total: int | None = None
        self._ended = self._left = False
        self._fault: ScanGraphError | None = None

    async def put(self, chunk: pb.ImageChunk) -> None:
        """Take a chunk, once the one before it is on its way to the storage."""
        fault = self._fault_of(chunk)
        if fault:
            self.fail(InvalidChunk(chunk=chunk.chunk_number, image=self.image_id, reason=fault))
            return
        self._next += 1
        if chunk.data:
            self._pieces.append(chunk.data)
        self._ended = chunk.is_final
        self._news.set()
        while self._pieces and not self._left:
            self._news.clear()
            await self._news.wait()

    def _fault_of(self, chunk: pb.ImageChunk) -> str:
        if chunk.chunk_number != self._next:
            return f"chunk {self._next} comes next"
        if self._next and chunk.HasField("metadata"):
            return "metadata comes with the first chunk only"
        if self._total is not None and chunk.total_chunks not in {0, self._total}:
            return f"it says that there are {chunk.total_chunks} chunks, after {self._total}"
        self._total = chunk.total_chunks or self._total
        if self._total is not None and chunk.is_final != (self._next == self._total - 1):
            return f"there are {self._total} chunks, and this one is {'' if chunk.is_final else 'not '}the final one"
        return ""

    def fail(self, error: ScanGraphError) -> None:
        """Give the image up."""
        self._fault = self._fault or error
        self._news.set()

    def leave(self) -> None:
        """Take nothing more."""
        self._left = True
        self._pieces.clear()
        self._news.set()

    async def pieces(self) -> AsyncIterator[bytes]:
        """Yield the image; raises where it was given up."""
        while True:
            if self._fault:
                raise self._fault
            if self._pieces:
                piece = self._pieces.popleft()
                self._news.set()
                yield piece
            elif self._ended:
                return
            else:
                self._news.clear()
                await self._news.wait()


class ImageStream:
    """One call of ProcessImageStream.

    Parameters
    ----------
    services : Services
        Everything behind the doors.
    line : Line
        To the client.
    authenticate : callable
        Who asks, looked at anew for each image.
    """

    def __init__(self, services: Services, line: Line, authenticate: Callable[[], Awaitable[Principal]]) -> None:
        self._services, self._line, self._authenticate = services, line, authenticate
        self._arriving: dict[str, _Arriving] = {}
        self._dropped: set[str] = set()
        self._jobs: set[asyncio.Task[None]] = set()
        self._ended = asyncio.Event()
        self._most = services.settings.grpc.max_images

    async def run(self) -> None:
        """Work until the client has sent its last image and heard of it."""
        try:
            while (wire := await self._next()) is not None:
                await self._take(parse(pb.ImageChunk, wire))
            for image in list(self._arriving.values()):
                image.fail(UploadIncomplete(detail=f"The stream ended before the final chunk of image {image.image_id!r}."))
            while self._jobs:
                await self._a_job_ends()
        finally:
            for job in self._jobs:
                job.cancel()
            await asyncio.gather(*self._jobs, return_exceptions=True)

    async def _next(self) -> bytes | None:
        """Return the client's next message, and give up what stops in the middle."""
        settings = self._services.settings
        while True:
            patience = settings.gateway.stall_seconds if self._arriving else settings.grpc.idle_seconds
            try:
                async with asyncio.timeout(patience):
                    return await self._line.receive()
            except TimeoutError:
                for image in list(self._arriving.values()):
                    image.fail(UploadIncomplete(detail=f"Image {image.image_id!r} stopped for {patience:g} s."))
                    self._drop(image.image_id)
                if not self._jobs:
                    raise Idle(detail=f"Nothing came for {patience:g} s.") from None

    async def _take(self, chunk: pb.ImageChunk) -> None:
        image = self._arriving.get(chunk.image_id)
        if image is None:
            if not chunk.HasField("metadata"):
                await self._stray(chunk)
                return
            self._dropped.discard(chunk.image_id)
            if len(self._arriving) >= self._most:
                hint = "Send an image's final chunk before you begin another"
                await self._refuse(chunk, TooManyStreams(what="Too many images arrive at once", limit=self._most, hint=hint))
                return
            # What is at work needs no chunk to come to its end: to wait for it here is what slows the client down.
            while len(self._jobs) - len(self._arriving) >= self._most:
                await self._a_job_ends()
            principal = await self._authenticate()
            image = self._arriving[chunk.image_id] = _Arriving(chunk.image_id, chunk.metadata)
            job = asyncio.create_task(self._job(image, principal))
            self._jobs.add(job)
            job.add_done_callback(self._job_ended)
        await image.put(chunk)
        if chunk.is_final:
            self._arriving.pop(chunk.image_id, None)
            self._dropped.discard(chunk.image_id)

    async def _stray(self, chunk: pb.ImageChunk) -> None:
        """Look at a chunk of no image: the rest of one that was given up, or a beginning without metadata."""
        if chunk.image_id not in self._dropped:
            reason = "an image begins with its metadata"
            await self._refuse(chunk, InvalidChunk(chunk=chunk.chunk_number, image=chunk.image_id, reason=reason))
        elif chunk.is_final:
            self._dropped.discard(chunk.image_id)

    async def _refuse(self, chunk: pb.ImageChunk, error: ScanGraphError) -> None:
        if not chunk.is_final:
            self._drop(chunk.image_id)
        client_id = chunk.metadata.client_id
        await self._tell(
            pb.ProcessingResponse(
                image_id=chunk.image_id, client_id=client_id, status=pb.STATUS_FAILED, error=problem_of(error), is_final=True
            )
        )

    def _drop(self, image_id: str) -> None:
        self._arriving.pop(image_id, None)
        self._dropped.add(image_id)
        if len(self._dropped) > _MOST_DROPPED:
            hint = "Read the answers, and stop sending what is refused"
            raise TooManyStreams(what="Too many images were given up", limit=_MOST_DROPPED, hint=hint)

    async def _job(self, image: _Arriving, principal: Principal) -> None:
        """See one image through; whatever is wrong with it is told of it."""

        async def tell(response: pb.ProcessingResponse) -> None:
            response.image_id, response.client_id = image.image_id, image.metadata.client_id
            await self._tell(response)

        try:
            wish = read_wish(image.metadata)
            record = await process(self._services, principal, wish, image.pieces(), tell)
            ended = ended_response(record)
            if record.execution.state == "failed":
                ended.error.CopyFrom(to_problem(record.execution.error or {}))
            if wish.chunks and record.execution.state == "completed":
                await tell(ended)
                async for piece in result_pieces(self._services, record):
                    await tell(pb.ProcessingResponse(execution_id=ended.execution_id, status=ended.status, results=[piece]))
                ended = pb.ProcessingResponse(execution_id=ended.execution_id, seq=ended.seq, status=ended.status)
                ended.progress_percentage = 100
            ended.is_final = True
            await tell(ended)
        except Gone:
            raise
        except Exception as error:  # an image's boundary: the others go on
            cause, _ = unforeseen(error)
            await tell(pb.ProcessingResponse(status=pb.STATUS_FAILED, error=problem_of(cause), is_final=True))
        finally:
            image.leave()
            if self._arriving.get(image.image_id) is image:
                self._drop(image.image_id)

    async def _tell(self, response: pb.ProcessingResponse) -> None:
        await self._line.send(response.SerializeToString())

    def _job_ended(self, job: asyncio.Task[None]) -> None:
        self._jobs.discard(job)
        self._ended.set()
        if not job.cancelled():
            job.exception()  # the client is gone, of which the stream hears by itself

    async def _a_job_ends(self) -> None:
        self._ended.clear()
        await self._ended.wait()
