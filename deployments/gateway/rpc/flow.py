"""What goes between Serve's gRPC proxy and a replica, in both directions, no faster than it is taken.

Serve lets a replica pull a client's messages one by one, but takes a replica's answers as fast as they are made, into a queue
without an end; and it drops an error's details. So for calls with a stream the two ends speak a small protocol of their own
inside of Serve's: the door (`door.py`, in the proxy) hands on no more than a window of what the replica has not asked for, and
the replica sends no more than a window that the client's connection has not taken. HTTP's door does the same (`../flow.py`).

door → replica: a client's message (`bytes`), `None` where the client will send no more, or how many bytes its connection has
taken (`int`). Replica → door: `Parcel`s.
"""

from __future__ import annotations

import asyncio
import struct
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable
from dataclasses import dataclass

#: Bytes on their way between proxy and replica, in each direction and for each call. One message may go over it.
WINDOW = 4 * 2**20
#: What has been read, or taken, is told every so many bytes; well under the window, or both would wait for each other.
STEP = 2**19

_MESSAGE, _READ, _END = b"\0", b"\1", b"\2"
_SIZE = struct.Struct(">I")


class Gone(Exception):
    """The client, or the proxy that spoke for it, is not there any more."""


@dataclass(frozen=True)
class Ending:
    """How a call ends.

    Parameters
    ----------
    code : str
        gRPC's name of the status.
    detail : str
        Its sentence.
    status : bytes
        google.rpc.Status with the details; empty for OK.
    """

    code: str = "OK"
    detail: str = ""
    status: bytes = b""


@dataclass(frozen=True)
class Parcel:
    """What a replica gives Serve in the place of a message."""

    wire: bytes

    def SerializeToString(self) -> bytes:  # noqa: N802 - protobuf's name, by which Serve asks
        """Return what goes to the door."""
        return self.wire


def message_parcel(message: bytes) -> Parcel:
    """Pack a message for the client."""
    return Parcel(_MESSAGE + message)


def read_parcel(size: int) -> Parcel:
    """Pack the news that so many bytes of the client's have been read."""
    return Parcel(_READ + _SIZE.pack(size))


def end_parcel(ending: Ending) -> Parcel:
    """Pack the end of a call."""
    code, detail = ending.code.encode(), ending.detail.encode()
    return Parcel(b"".join([_END, bytes([len(code)]), code, _SIZE.pack(len(detail)), detail, ending.status]))


def unpack(wire: bytes) -> bytes | int | Ending:
    """Return a message, how much was read, or how the call ends."""
    kind, rest = wire[:1], wire[1:]
    if kind == _MESSAGE:
        return rest
    if kind == _READ:
        return int(_SIZE.unpack(rest)[0])
    start = 1 + rest[0]
    code, end = rest[1:start].decode(), start + _SIZE.size + _SIZE.unpack_from(rest, start)[0]
    return Ending(code, rest[start + _SIZE.size : end].decode(), rest[end:])


class Line:
    """The replica's end of a call with a stream."""

    def __init__(self) -> None:
        self._inbox: deque[bytes] = deque()
        self._outbox: deque[Parcel] = deque()
        self._news, self._post = asyncio.Event(), asyncio.Event()
        self._unread = self._sent = 0
        self._ended = self._gone = False
        #: Of messages, for whoever counts.
        self.received_bytes = self.sent_bytes = 0

    async def receive(self) -> bytes | None:
        """Return the client's next message, None after the last.

        Raises
        ------
        Gone
        """
        while not self._inbox:
            if self._gone:
                raise Gone
            if self._ended:
                return None
            self._news.clear()
            await self._news.wait()
        message = self._inbox.popleft()
        self._unread += len(message)
        self.received_bytes += len(message)
        if self._unread >= STEP:
            self._put(read_parcel(self._unread))
            self._unread = 0
        return message

    async def send(self, message: bytes) -> None:
        """Send a message, once there is room for it.

        Raises
        ------
        Gone
        """
        while self._sent >= WINDOW and not self._gone:
            self._news.clear()
            await self._news.wait()
        if self._gone:
            raise Gone
        self._sent += len(message)
        self.sent_bytes += len(message)
        self._put(message_parcel(message))

    def _put(self, parcel: Parcel) -> None:
        self._outbox.append(parcel)
        self._post.set()

    async def _listen(self, coming: AsyncIterable[bytes | int | None]) -> None:
        try:
            async for item in coming:
                if item is None:
                    self._ended = True
                elif isinstance(item, int):
                    self._sent -= item
                else:
                    self._inbox.append(item)
                self._wake()
        finally:
            self._gone = True
            self._wake()

    def _wake(self) -> None:
        # Several may wait: who reads, and all who send.
        self._news.set()


async def converse(
    coming: AsyncIterable[bytes | int | None], work: Callable[[Line], Awaitable[Ending]]
) -> AsyncGenerator[Parcel]:
    """Let somebody work on a call, and yield what Serve is to be given.

    Where Serve cancels this, the work is cancelled; it has ended when this has.
    """
    line = Line()
    listening = asyncio.create_task(line._listen(coming))
    working = asyncio.ensure_future(work(line))
    working.add_done_callback(lambda _: line._post.set())
    try:
        while True:
            while line._outbox:
                yield line._outbox.popleft()
            if working.done():
                break
            line._post.clear()
            await line._post.wait()
        yield end_parcel(working.result())
    finally:
        working.cancel()
        listening.cancel()
        await asyncio.gather(working, listening, return_exceptions=True)
