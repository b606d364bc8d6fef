"""The client for code without coroutines: `AsyncClient` on an event loop in a thread of its own, and nothing else."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import ssl
import threading
import weakref
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

from scangraph.client.access import Keep
from scangraph.client.calls import AsyncClient

T = TypeVar("T")
P = ParamSpec("P")


class _Loop:
    """An event loop that runs in a thread."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        #: What is being iterated over.
        self.iterators: set[AsyncGenerator[Any]] = set()
        self.thread = threading.Thread(target=self.loop.run_forever, name="scangraph-client", daemon=True)
        self.thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine to its end; when the caller is interrupted, so is the coroutine."""
        if threading.current_thread() is self.thread:
            work.close()
            raise RuntimeError("a callback of the client may not call it: it would wait for itself")
        if self.loop.is_closed():
            work.close()
            raise RuntimeError("the client is closed")
        future = asyncio.run_coroutine_threadsafe(work, self.loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def stop(self, last: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Do a last thing, and end."""
        if threading.current_thread() is self.thread:  # forgotten, and found by the collector in here
            self.loop.stop()
            return
        # The outermost generators close those inside them. `shutdown_asyncgens` closes all at the same time, and one that is
        # being closed cannot be closed: its connection stayed open.
        for work in (*(_close(iterator) for iterator in list(self.iterators)), last(), _end_tasks()):
            with contextlib.suppress(Exception):
                self.run(work)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()


async def _close(iterator: AsyncGenerator[Any]) -> None:
    await iterator.aclose()


async def _end_tasks() -> None:
    """End what still runs on this loop, as `asyncio.run` does."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


def _blocking(
    method: Callable[Concatenate[AsyncClient, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[Client, P], T]:
    @functools.wraps(method)
    def call(self: Client, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self._loop.run(method(self._client, *args, **kwargs))

    return call


def _iterating(
    method: Callable[Concatenate[AsyncClient, P], AsyncGenerator[T]],
) -> Callable[Concatenate[Client, P], Generator[T]]:
    @functools.wraps(method)
    def call(self: Client, /, *args: P.args, **kwargs: P.kwargs) -> Generator[T]:
        items = method(self._client, *args, **kwargs)
        self._loop.iterators.add(items)

        async def following() -> tuple[T] | None:
            try:
                return (await anext(items),)
            except StopAsyncIteration:
                return None

        try:
            while (item := self._loop.run(following())) is not None:
                yield item[0]
        finally:
            self._loop.iterators.discard(items)
            if not self._loop.loop.is_closed():  # else it was ended with it
                self._loop.run(_close(items))

    return call


class Client:
    """A client of one server; see `AsyncClient` for the parameters and the methods, which are the same.

    It may be used from several threads.

    Examples
    --------
    >>> with Client("http://127.0.0.1:8000", token="…") as client:                    # doctest: +SKIP
    ...     done = client.run("organs", {"image": "ct.nii.gz"}, "results")
    ...     print(done.files["mask"], done.execution.warnings)
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | Callable[[], str] | None = None,
        patience: float = 60,
        tls: ssl.SSLContext | None = None,
        keep: Keep | None = None,
    ) -> None:
        self._client = AsyncClient(url, token=token, patience=patience, tls=tls, keep=keep)
        self._loop = _Loop()
        # Also when it is forgotten, and when Python ends.
        self._stop = weakref.finalize(self, self._loop.stop, self._client.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @property
    def url(self) -> str:
        """Address of the server."""
        return self._client.url

    def close(self) -> None:
        """Close the connections. The login stays good; `logout` ends it."""
        self._stop()

    login = _blocking(AsyncClient.login)
    logout = _blocking(AsyncClient.logout)
    me = _blocking(AsyncClient.me)

    pipelines = _iterating(AsyncClient.pipelines)
    pipeline = _blocking(AsyncClient.pipeline)
    create_pipeline = _blocking(AsyncClient.create_pipeline)
    update_pipeline = _blocking(AsyncClient.update_pipeline)
    delete_pipeline = _blocking(AsyncClient.delete_pipeline)
    validate_pipeline = _blocking(AsyncClient.validate_pipeline)
    components = _blocking(AsyncClient.components)
    component = _blocking(AsyncClient.component)
    labels = _blocking(AsyncClient.labels)

    upload = _blocking(AsyncClient.upload)
    files = _iterating(AsyncClient.files)
    file = _blocking(AsyncClient.file)
    download = _blocking(AsyncClient.download)
    download_output = _blocking(AsyncClient.download_output)
    display = _blocking(AsyncClient.display)
    thumbnail = _blocking(AsyncClient.thumbnail)
    delete_file = _blocking(AsyncClient.delete_file)

    start = _blocking(AsyncClient.start)
    execution = _blocking(AsyncClient.execution)
    executions = _iterating(AsyncClient.executions)
    cancel = _blocking(AsyncClient.cancel)
    retry = _blocking(AsyncClient.retry)
    provenance = _blocking(AsyncClient.provenance)
    watch = _iterating(AsyncClient.watch)
    wait = _blocking(AsyncClient.wait)
    run = _blocking(AsyncClient.run)
    fetch = _blocking(AsyncClient.fetch)
    zip = _blocking(AsyncClient.zip)
    delete_execution = _blocking(AsyncClient.delete_execution)
