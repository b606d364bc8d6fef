"""A whole service without Ray, for tests of what talks to one; and a proxy that breaks connections."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import uvicorn

from deployments.executor.runner import HeldInputs, Tools
from deployments.executor.scheduler import Scheduler
from deployments.gateway.app import build_app
from deployments.gateway.services import Services
from scangraph.contracts.api import Role
from scangraph.contracts.pipelines import built_in_pipelines
from scangraph.settings import Settings
from scangraph.storage import open_storage
from scangraph.store import accounts, open_store
from scangraph.store.pipelines import sync_built_in
from scangraph.tokens import Tokens
from tests.executor.local import COMPONENTS, LocalStages
from tests.s3 import in_own_place

T = TypeVar("T")


class Loop:
    """An event loop in a thread."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T], seconds: float = 60) -> T:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(seconds)

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


@dataclass
class Server:
    """The gateway's real application under uvicorn, with real records, a real executor, and the tests' small stages."""

    settings: Settings
    port: int = 0
    services: Services = field(init=False)
    stages: LocalStages = field(init=False)

    def __post_init__(self) -> None:
        self.settings = in_own_place(self.settings)
        self._thread = Loop()
        self._listen: socket.socket | None = None
        self._thread.run(self._open())
        self.up()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run something in the server's loop."""
        return self._thread.run(work)

    def account(self, name: str, role: Role = "operator") -> str:
        """Make an account and return its password."""
        password = "correct horse " + name
        self.run(accounts.create_account(self.services.store, name, role, password))
        time.sleep(1.1)  # a replica knows its accounts for a second
        return password

    async def _open(self) -> None:
        settings = self.settings
        store = await open_store(settings.database, outbox=settings.kafka.on)
        await accounts.ensure_admin(store, settings.data)
        await sync_built_in(store, built_in_pipelines(COMPONENTS, {}))
        self.stages = LocalStages(settings)
        components = {component.id: component for component in COMPONENTS}
        storage = open_storage(settings.storage, settings.storage_options, settings.files.link_endpoint)
        self._scheduler = Scheduler(Tools(settings, store, storage, self.stages, components, HeldInputs(2**20)), 2**30)

        async def wake() -> None:
            self._scheduler.wake()

        async def nothing() -> dict[str, Any]:
            return {}

        tokens = Tokens(settings.auth, settings.data / "keys")
        gate: Any = self.stages.imageio
        self.services = Services(settings, store, storage, components, gate, wake, tokens, nothing, nothing)

    def up(self) -> None:
        """Listen."""
        listen = socket.socket()
        listen.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listen.bind(("127.0.0.1", self.port))
        self.port = listen.getsockname()[1]
        app = build_app(COMPONENTS, lambda: self.services, self.settings.gateway)
        config = uvicorn.Config(app, log_level="critical", lifespan="off", timeout_graceful_shutdown=1)
        self._uvicorn, self._listen = uvicorn.Server(config), listen
        self._serving = asyncio.run_coroutine_threadsafe(self._uvicorn.serve(sockets=[listen]), self._thread.loop)
        while not self._uvicorn.started:
            time.sleep(0.01)

    def down(self) -> None:
        """Listen no more; what was accepted is worked on."""
        if self._listen is not None:
            self._uvicorn.should_exit = True
            self._serving.result(30)
            self._listen.close()
            self._listen = None

    def close(self) -> None:
        """End everything."""

        async def end() -> None:
            await self._scheduler.stop()
            await self.services.store.close()

        self.down()
        self.run(end())
        self._thread.stop()


@contextlib.contextmanager
def serving(settings: Settings) -> Iterator[Server]:
    """Run a service until the block ends."""
    server = Server(settings)
    try:
        yield server
    finally:
        server.close()


class Proxy:
    """Passes TCP on to a port, and breaks connections when it was told to.

    Attributes
    ----------
    cuts : list of (direction, bytes)
        After so many bytes in a direction (`up`: to the server) every connection is reset; then the next one counts.
    made : int
        Connections so far.
    refusing : bool
        Whether new ones are reset at once.
    rate : float or None
        Bytes a second that each connection carries up.
    """

    def __init__(self, port: int) -> None:
        self._target, self._thread = port, Loop()
        self.rate: float | None
        self.cuts: list[tuple[Literal["up", "down"], int]] = []
        self.made, self.refusing, self.rate = 0, False, None
        self._open: set[asyncio.StreamWriter] = set()
        self._server = self._thread.run(self._start())
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def _start(self) -> asyncio.Server:
        return await asyncio.start_server(self._pass, "127.0.0.1", 0)

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.made += 1
        if self.refusing:
            writer.transport.abort()
            return
        try:
            reader_up, writer_up = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            writer.transport.abort()
            return
        self._open |= {writer, writer_up}
        await asyncio.gather(self._pump("up", reader, writer_up), self._pump("down", reader_up, writer))
        self._open -= {writer, writer_up}

    async def _pump(self, direction: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                if self.cuts and self.cuts[0][0] == direction:
                    left = self.cuts[0][1] - len(data)
                    if left <= 0:
                        self.cuts.pop(0)
                        self._cut()
                        return
                    self.cuts[0] = (self.cuts[0][0], left)
                if self.rate is not None and direction == "up":
                    await asyncio.sleep(len(data) / self.rate)
                writer.write(data)
                await writer.drain()
        writer.close()

    def _cut(self) -> None:
        for writer in self._open:
            writer.transport.abort()

    def cut(self) -> None:
        """Break every connection now."""
        self._thread.loop.call_soon_threadsafe(self._cut)

    def close(self) -> None:
        """End."""

        async def end() -> None:
            self._server.close()
            self._cut()
            others = asyncio.all_tasks() - {asyncio.current_task()}
            await asyncio.wait(others, timeout=2) if others else None

        self._thread.run(end())
        self._thread.stop()


@contextlib.contextmanager
def proxied(port: int) -> Iterator[Proxy]:
    """Run a proxy until the block ends."""
    proxy = Proxy(port)
    try:
        yield proxy
    finally:
        proxy.close()
