"""Requests: sent with a bearer, repeated where that is safe, their errors raised."""

from __future__ import annotations

import contextlib
import math
import ssl
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, Literal, TypeVar
from urllib.parse import SplitResult, quote, urlsplit

import httpx
from pydantic import BaseModel, ValidationError

from scangraph.client.access import Access, Keep
from scangraph.client.failures import Patience, ServerError, ServerUnreachable, from_answer
from scangraph.contracts.api import Credentials, RefreshRequest, Tokens
from scangraph.contracts.errors import ScanGraphError, UsageError

M = TypeVar("M", bound=BaseModel)

#: After which failures a request may be sent again. A connection that was never made is always tried again.
#: always: it does no harm twice; refused: after a 429 or 503, which say that nothing was done; never.
Repeat = Literal["always", "refused", "never"]
#: Serve's proxy lost the gateway while it worked: a 503, but not one that says that nothing was done.
_LOST_CODES = frozenset({"gateway-lost"})
_NEVER_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.ProxyError)
#: uvicorn closes an idle connection after 5 s.
_IDLE_SECONDS = 4.0
#: How long an answer may take; where it waits until a large file was looked at, it takes longer.
SHORT, LONG = 60.0, 900.0
#: Less than other processes wait for the login's lock (`logins`), a connection's 10 s included.
_RENEWAL_SECONDS = 15.0

Body = Callable[[], AsyncIterator[bytes]]


@dataclass(frozen=True)
class Wish:
    """One request, that can be made as often as it takes."""

    method: str
    path: str
    params: Mapping[str, Any] | None = None
    json: Any = None
    body: Body | bytes | None = None
    files: Any = None
    headers: Mapping[str, str] | None = None
    seconds: float = SHORT
    with_bearer: bool = True
    follow: bool = False


class Session:
    """Connections to one server.

    Parameters
    ----------
    url : str
        The server's address.
    token, keep
        See `Access`.
    patience : float
        Seconds for which failures that may pass are borne.
    tls : ssl.SSLContext, optional
        How the server's certificate is checked; by default with what the system trusts.
    """

    def __init__(
        self,
        url: str,
        token: str | Callable[[], str] | None = None,
        keep: Keep | None = None,
        patience: float = 60,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        parts = _parts(url)
        self.url, self.patience = url.rstrip("/"), patience
        self.tls = (tls or ssl.create_default_context()) if parts.scheme == "https" else None
        self.access = Access(token, keep, self._renew, self._log_in)
        self._http = httpx.AsyncClient(
            base_url=self.url,
            verify=self.tls or True,
            limits=httpx.Limits(max_connections=32, keepalive_expiry=_IDLE_SECONDS),
            headers={"User-Agent": "scangraph-client"},
        )

    @property
    def websocket_url(self) -> str:
        """Address of the live updates."""
        return "ws" + self.url.removeprefix("http") + "/v1/ws"

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    # --- requests ----------------------------------------------------------------------------------------------------------

    async def request(self, wish: Wish, repeat: Repeat | None = None, patience: Patience | None = None) -> httpx.Response:
        """Send a request and return its answer, which is a success.

        Parameters
        ----------
        repeat : str, optional
            By default what the method, or an Idempotency-Key, allows.
        patience : Patience, optional
            Of a larger undertaking that this is a part of.

        Raises
        ------
        ScanGraphError
            What the server said; after a repetition `fields["repeated"]` is set, for an earlier attempt may have worked.
        ServerUnreachable
        """
        if repeat is None:
            keyed = "Idempotency-Key" in (wish.headers or {})
            repeat = "always" if wish.method in {"GET", "HEAD"} or keyed else "refused" if wish.method != "POST" else "never"
        patience, lost = patience or Patience(self.patience), False
        while True:
            try:
                async with self.send(wish) as response:
                    await response.aread()
                    return response
            except NeverSent as failure:
                await patience.bear(failure)
            except ScanGraphError as failure:
                if lost:
                    failure.fields["repeated"] = True
                kind = kind_of(failure)
                if kind == "final" or repeat == "never" or (kind == "lost" and repeat != "always"):
                    raise
                lost = lost or kind == "lost"
                await patience.bear(failure, float(failure.fields.get("retry_after_seconds", 0)))

    async def ask(self, model: type[M], wish: Wish, repeat: Repeat | None = None) -> M:
        """Send a request and return its answer as a model. What a newer server adds is not looked at."""
        return self.read(model, await self.request(wish, repeat))

    def read(self, model: type[M], response: httpx.Response) -> M:
        """Read an answer."""
        try:
            return model.model_validate_json(response.content, extra="ignore")
        except ValidationError as error:
            where = f"{response.request.method} {response.request.url}"
            detail = f"{where} did not answer with a {model.__name__}; is it a scangraph, and not older than this client?"
            title = "The server's answer cannot be understood"
            raise ServerError(status=response.status_code, code="unexpected-answer", title=title, detail=detail) from error

    @contextlib.asynccontextmanager
    async def send(self, wish: Wish) -> AsyncIterator[httpx.Response]:
        """Send a request once, and give its answer with the body still to come.

        Raises
        ------
        NeverSent
            If there was no connection.
        ServerUnreachable
            If it broke; inside the block too.
        """
        refused: str | None = None
        while True:
            token = await self.access.bearer(refused) if wish.with_bearer else None
            last = token is None or refused is not None
            try:
                # Elsewhere httpx sends no bearer.
                response = await self._http.send(self._build(wish, token), stream=True, follow_redirects=wish.follow)
                try:
                    # Nothing was done with a request whose token was refused; it is worth another one, once.
                    if response.status_code != 401 or last or await self.access.bearer(token) is None:
                        await _check(response)
                        yield response
                        return
                    refused = token
                finally:
                    await response.aclose()
            except _NEVER_SENT as error:
                raise NeverSent(url=self.url, reason=_reason(error)) from error
            except httpx.TransportError as error:
                raise ServerUnreachable(url=self.url, reason=_reason(error)) from error

    def _build(self, wish: Wish, token: str | None) -> httpx.Request:
        headers = {**(wish.headers or {}), **({"Authorization": f"Bearer {token}"} if token else {})}
        content = wish.body() if callable(wish.body) else wish.body
        params = {name: value for name, value in (wish.params or {}).items() if value is not None}
        return self._http.build_request(
            wish.method,
            wish.path,
            params=params or None,
            json=wish.json,
            content=content,
            files=wish.files,
            headers=headers,
            timeout=httpx.Timeout(SHORT, connect=10, pool=None, read=wish.seconds),
        )

    # --- tokens ------------------------------------------------------------------------------------------------------------

    async def _log_in(self, name: str, password: str) -> Tokens:
        if not name or not password:
            raise UsageError(detail="a login takes a name and a password")
        body = Credentials.model_construct(username=name, password=password).model_dump()
        return await self.ask(Tokens, Wish("POST", "/v1/auth/login", json=body, with_bearer=False))

    async def _renew(self, refresh_token: str) -> Tokens:
        # Never repeated once it was sent: a refresh token that comes twice counts as stolen. Nor waited for: other processes
        # wait for the login's lock meanwhile; whoever asked has patience, and comes again.
        body = RefreshRequest(refresh_token=refresh_token).model_dump()
        wish = Wish("POST", "/v1/auth/refresh", json=body, with_bearer=False, seconds=_RENEWAL_SECONDS)
        return self.read(Tokens, await self.request(wish, "never", Patience(0)))


class NeverSent(ServerUnreachable):
    """There was no connection, so nothing was done."""


def segment(text: str, safe: str = "") -> str:
    """Quote an id for a path; an empty one, or dots, would be another address."""
    if not text.strip("."):
        raise UsageError(detail=f"{text!r} is no id and no name")
    return quote(text, safe=safe)


def _parts(url: str) -> SplitResult:
    with contextlib.suppress(ValueError):
        parts = urlsplit(url)
        if parts.scheme in {"http", "https"} and parts.hostname and (parts.port is None or parts.port):
            return parts
    raise UsageError(detail=f"{url!r} is no address of a server; one looks like http://127.0.0.1:8000")


def kind_of(failure: ScanGraphError) -> Literal["refused", "lost", "final"]:
    """Say whether nothing was done, nobody knows, or it is final."""
    if isinstance(failure, ServerUnreachable) or failure.code in {*_LOST_CODES, "http-502", "http-504"}:
        return "lost"
    return "refused" if failure.status in {429, 503} else "final"


async def _check(response: httpx.Response) -> None:
    if response.is_success:
        return
    body = await response.aread()
    error = from_answer(response.status_code, response.headers.get("content-type", ""), body, str(response.request.url))
    if (wait := _retry_after(response.headers.get("retry-after", ""))) is not None:
        error.fields.setdefault("retry_after_seconds", wait)
    raise error


def _retry_after(header: str) -> int | None:
    """Read `Retry-After`: seconds, or a date (RFC 9110, 10.2.3), as proxies send it."""
    if header.isdecimal():
        return int(header)
    with contextlib.suppress(ValueError, TypeError):
        return max(math.ceil(parsedate_to_datetime(header).timestamp() - time.time()), 0)
    return None


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}{f' ({error})' if str(error) else ''}"
