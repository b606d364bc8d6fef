"""Signing in for browsers: as `/v1/auth/login`, with the tokens in cookies instead of in the answer."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from deployments.gateway import cookies, problems
from deployments.gateway.auth import authenticate, log_in, standings
from deployments.gateway.problems import documented
from deployments.gateway.services import Access, Services
from scangraph.contracts.api import Credentials, Session
from scangraph.contracts.errors import Unauthenticated
from scangraph.store import accounts

#: In which a refresh token may be used again: tabs, and a page that was left in the middle, know nothing of each other.
_LEEWAY_SECONDS = 30


def session_routes(services: Access) -> APIRouter:
    """Make the routes."""
    router = APIRouter(prefix="/v1/auth/session", tags=["accounts"])

    def begun(s: Services, chain: accounts.Chain, request: Request, response: Response) -> Session:
        account, auth = chain.account, s.settings.auth
        token, claims = s.tokens.sign(account.id, account.name, account.role, account.token_epoch)  # type: ignore[arg-type]
        cookies.give(
            request,
            response,
            {"access": (token, auth.access_seconds), "refresh": (chain.token, auth.refresh_seconds)},
        )
        response.headers["Cache-Control"] = "no-store"
        return Session(
            account=claims.name, account_id=account.id, role=claims.role, expires_at=claims.expires_at, renewable=True
        )

    @router.post(
        "",
        summary="Log in from the page: tokens in cookies",
        description="As `/v1/auth/login`, for browsers: the tokens go into cookies that scripts cannot read. Whoever has them "
        "needs no bearer. With everything but GET and HEAD, this included, the header `X-Scangraph-Page: 1` must come, "
        "and `Origin`, where there is one, must be the service's own.",
        operation_id="begin_session",
        responses=documented(401, 403, 413, 422, 429, 503),
    )
    async def begin(*, credentials: Credentials, request: Request, response: Response) -> Session:
        s = services()
        cookies.check(request, s.settings.gateway.origins)
        return begun(s, await log_in(s, credentials, request), request, response)

    @router.get(
        "",
        summary="Whose session the cookies are, if anybody's",
        operation_id="session",
        responses=documented(503),
    )
    async def current(*, request: Request, response: Response) -> Session:
        response.headers["Cache-Control"] = "no-store"
        renewable = cookies.token(request, "refresh") is not None
        try:
            found = await authenticate(services(), cookies.token(request) or "")
        except Unauthenticated:
            return Session(renewable=renewable)
        return Session(
            account=found.name,
            account_id=found.account_id,
            role=found.role,
            expires_at=found.expires_at,
            renewable=renewable,
        )

    @router.post(
        "/refresh",
        summary="Go on with a session: the next tokens, in cookies",
        operation_id="refresh_session",
        response_model=Session,
        responses=documented(401, 403, 503),
    )
    async def refresh(*, request: Request, response: Response) -> Session | Response:
        s = services()
        cookies.check(request, s.settings.gateway.origins)
        try:
            token = cookies.token(request, "refresh") or ""
            chain = await accounts.next_link(s.store, token, s.settings.auth.refresh_seconds, _LEEWAY_SECONDS)
        except Unauthenticated as error:
            refused = problems.from_error(error, request)
            cookies.take(request, refused)
            return refused
        standings(s).forget()
        return begun(s, chain, request, response)

    @router.delete(
        "",
        summary="End the session of these cookies, and have the browser forget them",
        operation_id="end_session",
        status_code=204,
        response_class=Response,
        responses=documented(403, 503),
    )
    async def end(*, request: Request) -> Response:
        s = services()
        cookies.check(request, s.settings.gateway.origins)
        try:
            found = await authenticate(s, cookies.token(request) or "")
            revoked = (found.account_id, found.jti, found.expires_at)
        except Unauthenticated:
            revoked = None
        await accounts.end_chain(s.store, cookies.token(request, "refresh") or "", revoked)
        standings(s).forget()
        response = Response(status_code=204, headers={"Cache-Control": "no-store"})
        cookies.take(request, response)
        return response

    return router
