"""Who asks, and what they may."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from limits import RateLimitItem, RateLimitItemPerMinute
from limits.aio.storage import MemoryStorage
from limits.aio.strategies import MovingWindowRateLimiter

from deployments.gateway import cookies
from deployments.gateway.entrance import PRINCIPAL
from deployments.gateway.problems import documented
from deployments.gateway.services import Access, Services
from scangraph.contracts.api import Credentials, Identity, RefreshRequest, Role, Tokens
from scangraph.contracts.errors import Forbidden, TooManyRequests, Unauthenticated
from scangraph.intake import Principal
from scangraph.store import accounts
from scangraph.store.tables import Account

#: For how long a replica believes what it knows of accounts and revoked tokens.
_STANDING_SECONDS = 1.0
#: Each check of a password takes 64 MiB and a core for some 50 ms; the others wait, no more of them than requests may.
_LOGINS_AT_ONCE = 2

_bearer = HTTPBearer(auto_error=False, scheme_name="bearer", bearerFormat="JWT", description="from POST /v1/auth/login")


class Standings:
    """A replica's knowledge of which tokens are still good, looked up at most once a second for all requests together."""

    def __init__(self) -> None:
        self._known = accounts.Standing({}, frozenset())
        self._until = 0.0
        self._forgotten = 0
        self._lock = asyncio.Lock()

    async def get(self, services: Services) -> accounts.Standing:
        """Return it.

        Race: somebody logs out while the records are being read. `forget` was called since, so they are read again.
        """
        while time.monotonic() >= self._until:
            async with self._lock:
                if (moment := time.monotonic()) >= self._until:
                    forgotten = self._forgotten
                    self._known = await accounts.standing(services.store)
                    if forgotten == self._forgotten:
                        self._until = moment + _STANDING_SECONDS
                        break
        return self._known

    def forget(self) -> None:
        """Look again at the next request."""
        self._forgotten += 1
        self._until = 0.0


def standings(services: Services) -> Standings:
    """Return the replica's."""
    found: Standings = services.state.setdefault("standings", Standings())
    return found


async def authenticate(services: Services, token: str) -> Principal:
    """Return who a token belongs to; raises `Unauthenticated`."""
    claims = services.tokens.verify(token)
    principal = Principal(claims.account_id, claims.name, claims.role, claims.jti, claims.expires_at, claims.epoch)
    if not await still_good(services, principal):
        raise Unauthenticated(reason="The token was revoked")
    return principal


async def still_good(services: Services, principal: Principal) -> bool:
    """Whether a token that was good is good now."""
    standing = await standings(services).get(services)
    return principal.jti not in standing.revoked and standing.epochs.get(principal.account_id) == principal.epoch


def requires(services: Access, role: Role) -> Callable[..., Awaitable[Principal]]:
    """Return the dependency that lets only this role, and those above it, pass."""

    async def principal(
        request: Request, bearer: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]
    ) -> Principal:
        s = services()
        token = bearer.credentials if bearer else None
        if token is None and not _names_bearer(request):  # a bearer goes before a cookie, even one that is no good
            token = cookies.checked_token(request, s.settings.gateway.origins)
        if token is None:
            raise Unauthenticated(reason="The request has no bearer token")
        found = await authenticate(s, token)
        request.scope[PRINCIPAL] = found
        if not found.may(role):
            raise Forbidden(action=f"{request.method} {request.url.path}", needed=role, role=found.role)
        return found

    return principal


def _names_bearer(request: Request) -> bool:
    return request.headers.get("authorization", "").strip().lower().startswith("bearer")


async def log_in(services: Services, credentials: Credentials, request: Request) -> accounts.Chain:
    """Begin a session of whoever has this name and password.

    Raises
    ------
    Unauthenticated, TooManyRequests
    """
    limit: LoginLimit = services.state.setdefault("login_limit", LoginLimit(services.settings.auth.logins_per_minute))
    async with limit.attempt(credentials.username, request.client.host if request.client else ""):
        account = await accounts.check_password(services.store, credentials.username, credentials.password)
        chain = await accounts.begin_chain(services.store, account, services.settings.auth.refresh_seconds)
    standings(services).forget()  # a new account is known at once
    return chain


class LoginLimit:
    """How often a name, or an address, may fail. Kept in the replica's memory: several replicas allow as many times more."""

    def __init__(self, per_minute: int) -> None:
        self._limiter = MovingWindowRateLimiter(MemoryStorage())
        self._name, self._address = RateLimitItemPerMinute(per_minute), RateLimitItemPerMinute(per_minute * 5)
        self._turns = asyncio.Semaphore(_LOGINS_AT_ONCE)

    @contextlib.asynccontextmanager
    async def attempt(self, name: str, address: str) -> AsyncIterator[None]:
        """Let somebody try, and count it where `Unauthenticated` comes of it; a success counts nothing.

        Race: many guesses at once would all be looked at before the first of them has failed. So they wait for each other, and
        each is looked at again when its turn comes.

        Raises
        ------
        TooManyRequests
        """
        keys = (self._name, ("name", name)), (self._address, ("address", network(address)))
        await self._check(keys)
        async with self._turns:
            await self._check(keys)
            try:
                yield
            except Unauthenticated:
                for limit, key in keys:
                    await self._limiter.hit(limit, *key)
                raise

    async def _check(self, keys: Iterable[tuple[RateLimitItem, tuple[str, str]]]) -> None:
        for limit, key in keys:
            if not await self._limiter.test(limit, *key):
                reset, _ = await self._limiter.get_window_stats(limit, *key)
                seconds = max(int(reset - time.time()) + 1, 1)
                raise TooManyRequests(what="Too many failed logins.", retry_after_seconds=seconds)


def network(address: str) -> str:
    """Return what counts as one address: of IPv6 the first 64 bits, all of which one customer has.

    It is the peer's. What is said in X-Forwarded-For is believed only where the peer is 127.0.0.1, a reverse proxy on this
    machine, or one that `FORWARDED_ALLOW_IPS` names (uvicorn's rules, Serve has no others). Behind any other proxy everybody
    has one address, and its limit, five times a name's.
    """
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return ""
    if isinstance(ip, ipaddress.IPv4Address):
        return str(ip)
    return str(ip.ipv4_mapped or ipaddress.ip_network((ip, 64), strict=False))


def auth_routes(services: Access) -> APIRouter:
    """Make the routes."""
    router = APIRouter(prefix="/v1", tags=["accounts"])
    anybody = Depends(requires(services, "viewer"))

    def answer(s: Services, chain: accounts.Chain, response: Response) -> Tokens:
        account: Account = chain.account
        token, _ = s.tokens.sign(account.id, account.name, account.role, account.token_epoch)  # type: ignore[arg-type]
        response.headers["Cache-Control"] = "no-store"
        seconds = s.settings.auth.access_seconds
        return Tokens(access_token=token, expires_in=seconds, refresh_token=chain.token, role=account.role)

    @router.post(
        "/auth/login",
        summary="Log in with name and password",
        operation_id="login",
        responses=documented(401, 413, 422, 429, 503),
    )
    async def login(credentials: Credentials, request: Request, response: Response) -> Tokens:
        s = services()
        return answer(s, await log_in(s, credentials, request), response)

    @router.post(
        "/auth/refresh",
        summary="Change a refresh token for new ones",
        operation_id="refresh",
        responses=documented(401, 413, 422, 503),
    )
    async def refresh(body: RefreshRequest, response: Response) -> Tokens:
        s = services()
        chain = await accounts.next_link(s.store, body.refresh_token, s.settings.auth.refresh_seconds)
        standings(s).forget()
        return answer(s, chain, response)

    @router.post(
        "/auth/logout",
        summary="End this token and every refresh token of the account",
        operation_id="logout",
        status_code=204,
        responses=documented(401, 503),
    )
    async def logout(*, principal: Principal = anybody) -> None:
        s = services()
        await accounts.log_out(s.store, principal.account_id, principal.jti, principal.expires_at)
        standings(s).forget()

    @router.get("/auth/me", summary="Who am I?", operation_id="me", responses=documented(401, 503))
    async def me(*, principal: Principal = anybody) -> Identity:
        return Identity(
            account_id=principal.account_id, name=principal.name, role=principal.role, expires_at=principal.expires_at
        )

    @router.get("/jwks.json", summary="The public keys that our tokens are checked with", operation_id="jwks")
    async def jwks(response: Response) -> dict[str, Any]:
        response.headers["Cache-Control"] = "public, max-age=300"
        return services().tokens.jwks()

    return router
