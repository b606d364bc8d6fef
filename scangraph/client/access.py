"""Who asks: a token that is given, or a login that renews itself."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Protocol

from scangraph.contracts.api import Tokens
from scangraph.contracts.errors import Unauthenticated

#: A token is renewed when this part of its life is over.
_WORN = 0.8
#: How long the end of a client waits for a renewal; no longer than a request of one takes.
_SETTLE_SECONDS = 10.0


@dataclass(frozen=True)
class Login:
    """What a login gave.

    Parameters
    ----------
    renew_at : float
        When the access token is old, in seconds since 1970 on this machine's clock; the server's may differ.
    """

    access_token: str
    refresh_token: str
    renew_at: float

    @classmethod
    def of(cls, tokens: Tokens) -> Login:
        """Return the login of an answer that came just now."""
        return cls(tokens.access_token, tokens.refresh_token, time.time() + tokens.expires_in * _WORN)


class Keep(Protocol):
    """Where a login is kept for several processes, of which only one at a time may renew it: a refresh token is good once."""

    def load(self) -> Login | None:
        """Return it as it is now."""
        ...

    def save(self, login: Login | None) -> None:
        """Replace it, or forget it."""
        ...

    def locked(self) -> contextlib.AbstractAsyncContextManager[None]:
        """Keep the other processes away."""
        ...


class Access:
    """Gives bearers for requests.

    Parameters
    ----------
    token : str or callable, optional
        A bearer, or what makes one; a callable is asked again when its token grows old.
    keep : Keep, optional
        Where a login is kept beyond this process.
    renew, log_in : callable
        Change a refresh token, or a name and a password, for new tokens.
    """

    def __init__(
        self,
        token: str | Callable[[], str] | None,
        keep: Keep | None,
        renew: Callable[[str], Awaitable[Tokens]],
        log_in: Callable[[str, str], Awaitable[Tokens]],
    ) -> None:
        self._source = token if callable(token) else None
        self._login = Login(token, "", float("inf")) if isinstance(token, str) else keep.load() if keep and not token else None
        self._keep, self._renew, self._log_in = keep, renew, log_in
        self._credentials: tuple[str, str] | None = None
        self._lock = asyncio.Lock()
        self._renewals: set[asyncio.Task[None]] = set()

    @property
    def seconds_left(self) -> float | None:
        """Time until the token that was given last is old; None where it is not known to grow old."""
        if self._login is None or self._login.renew_at == float("inf"):
            return None
        return max(self._login.renew_at - time.time(), 0.1)

    async def log_in(self, name: str, password: str) -> Tokens:
        """Begin a login. Name and password stay in this process, for when the refresh token is not good any more."""
        tokens = await self._log_in(name, password)
        async with self._locked():
            self._credentials, self._source = (name, password), None
            self._set(Login.of(tokens))
        return tokens

    async def forget(self) -> None:
        """End it, on this side."""
        async with self._locked():
            self._credentials = None
            self._source = None
            self._set(None)

    async def settle(self) -> None:
        """Let a renewal that is on its way end: the token that it was made with is used up, and the new one must be kept."""
        if self._renewals:
            await asyncio.wait(self._renewals, timeout=_SETTLE_SECONDS)

    def _locked(self) -> contextlib.AbstractAsyncContextManager[None]:
        return self._keep.locked() if self._keep else contextlib.nullcontext()

    def _set(self, login: Login | None) -> None:
        self._login = login
        if self._keep is not None:
            self._keep.save(login)

    async def bearer(self, refused: str | None = None) -> str | None:
        """Return a token that is good for a while; None where there is none, or no other than the refused one.

        Race: many requests find the token old at once. The first one renews it, and the others find it done. Race: the request
        that wanted it is cancelled meanwhile. The renewal goes on, or its answer would be lost, and with it the login.
        """
        if self._is_wanted(refused):
            renewal = asyncio.create_task(self._bring(refused))
            self._renewals.add(renewal)
            renewal.add_done_callback(self._renewals.discard)
            await asyncio.shield(renewal)
        if self._login is None or self._login.access_token == refused:
            return None
        return self._login.access_token

    def _is_wanted(self, refused: str | None) -> bool:
        """Whether there is no good token, and one can be had."""
        if self._login is None:
            return self._source is not None
        return (self._source is not None or bool(self._login.refresh_token)) and self._is_old(self._login, refused)

    async def _bring(self, refused: str | None) -> None:
        async with self._lock:
            if not self._is_wanted(refused):
                return
            if self._source is not None:
                made = await asyncio.to_thread(self._source)
                self._login = Login(made, "", _renewal_of(made))
            else:
                await self._change(refused)

    @staticmethod
    def _is_old(login: Login, refused: str | None) -> bool:
        return login.renew_at <= time.time() or login.access_token == refused

    async def _change(self, refused: str | None) -> None:
        async with self._locked():
            if self._keep is not None:
                self._login = self._keep.load()  # another process may have renewed it, or logged out
                if self._login is None or not self._is_old(self._login, refused):
                    return
            assert self._login is not None
            try:
                tokens = await self._renew(self._login.refresh_token)
            except Unauthenticated:
                self._set(None)
                if self._credentials is None:
                    raise
                tokens = await self._log_in(*self._credentials)
            self._set(Login.of(tokens))


def _renewal_of(token: str) -> float:
    """Return when a token is old, by its own claims; never where they cannot be read, which is the server's business."""
    try:
        payload = token.split(".")[1]
        claims: dict[str, Any] = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
        return time.time() + (float(claims["exp"]) - float(claims["iat"])) * _WORN
    except (ValueError, LookupError, TypeError):
        return float("inf")
