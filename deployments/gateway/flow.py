"""Flow control between Serve's HTTP proxy and a replica, in both directions.

Serve hands on what comes in as fast as it comes, into queues without an end: the client of a slow handler fills the replica's
memory with its upload, and a fast handler fills it with the download of a slow client. Neither queue can be seen from an
application. But Serve passes on messages that it does not know, so the two ends can tell each other how far they are: the
door (`door.py`, in the proxy) hands on no more than a window of body that `Flow` (here, in the replica) has not asked for, and
`Flow` lets the application send no more than a window that the client's connection has not taken. TCP does the rest.
"""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

#: Bytes on their way between proxy and replica, in each direction and for each request.
WINDOW = 4 * 2**20
#: A message about progress is sent every so many bytes; well under the window, or both would wait for each other.
STEP = 2**19
#: Where the door says that it is there (ASGI: `scope["extensions"]`). No client can forge it; without a door nothing changes.
EXTENSION = "scangraph.flow"
#: Replica to door: the application has read so many bytes of the request's body.
READ = "scangraph.flow.read"
#: Door to replica: the client's connection has taken so many bytes of the response's body.
TAKEN = "scangraph.flow.taken"


class Flow:
    """The replica's end. It stands in front of everything else in the application."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: D102 - ASGI's own signature
        if scope["type"] != "http" or EXTENSION not in scope.get("extensions", {}):
            await self._app(scope, receive, send)
            return
        exchange = _Exchange(receive, send)
        try:
            await self._app(scope, exchange.receive, exchange.send)
        finally:
            await exchange.close()


class _Exchange:
    """One request and its response."""

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive, self._send = receive, send
        self._inbox: asyncio.Queue[Message] = asyncio.Queue()
        self._reader: asyncio.Task[None] | None = None
        self._news = asyncio.Event()
        self._read = self._sent = 0
        self._gone = False

    async def receive(self) -> Message:
        """Give the application its next message, and tell the door how far it is."""
        if self._read >= STEP:
            await self._send({"type": READ, "bytes": self._read})
            self._read = 0
        self._start()
        message = await self._inbox.get()
        if message["type"] == "http.disconnect":
            self._inbox.put_nowait(message)  # whoever asks again hears it again
        self._read += len(message.get("body", b""))
        return message

    async def send(self, message: Message) -> None:
        """Send the application's message, once there is room for it."""
        body = len(message.get("body", b"")) if message["type"] == "http.response.body" else 0
        # One message may go over the window: what is left of a step is not told, and must never stop a large one.
        while body and self._sent >= WINDOW and not self._gone:
            self._start()
            self._news.clear()
            await self._news.wait()
        self._sent += body
        await self._send(message)

    def _start(self) -> None:
        """Begin to read: the application and the sender both wait for messages, and neither may take the other's."""
        if self._reader is None:
            self._reader = asyncio.create_task(self._dispatch())

    async def _dispatch(self) -> None:
        try:
            while not self._gone:
                message = await self._receive()
                if message["type"] == TAKEN:
                    self._sent -= message["bytes"]
                else:
                    self._gone = message["type"] == "http.disconnect"
                    self._inbox.put_nowait(message)
                self._news.set()
        except Exception:  # Serve's channel broke: to the application that is a client who is gone
            self._inbox.put_nowait({"type": "http.disconnect"})
            raise
        finally:
            self._gone = True
            self._news.set()

    async def close(self) -> None:
        """Stop reading."""
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.wait([self._reader])
            if not self._reader.cancelled():
                self._reader.exception()  # the application has heard of it
