"""A browser's tokens in cookies, which no script can read, and the rules that keep the pages of others from using them.

A cookie goes along with whatever a browser asks of us, also where another page made it ask. So `SameSite=Strict`; and what
changes something must bear a header that no page can send to another origin without asking first (CORS), which nobody here
answers. Where the browser says which page it was (`Origin`, `Sec-Fetch-Site`), it must be ours.
"""

from __future__ import annotations

import re
from typing import Literal
from urllib.parse import urlsplit

from fastapi import Request, Response, WebSocket
from starlette.requests import HTTPConnection

from scangraph.contracts.errors import CrossSite, Unauthenticated

#: What the page sends with everything but GET and HEAD.
PAGE_HEADER = "X-Scangraph-Page"
_READING = frozenset({"GET", "HEAD"})

_Kind = Literal["access", "refresh"]


def token(connection: HTTPConnection, kind: _Kind = "access") -> str | None:
    """Return the token that came in a cookie, if one did."""
    return connection.cookies.get(_name(connection, kind)) or None


def checked_token(request: Request, origins: tuple[str, ...]) -> str | None:
    """Return the access token that came in a cookie, if what is asked may be asked by cookie.

    Raises
    ------
    CrossSite
    """
    found = token(request)
    if found is not None and request.method not in _READING:
        check(request, origins)
    return found


def socket_token(socket: WebSocket, origins: tuple[str, ...]) -> str:
    """Return the access token of the cookie that came with a WebSocket's handshake.

    A handshake has no preflight and no headers of the page's own, so the browser must say that the page is ours.

    Raises
    ------
    Unauthenticated
    """
    found, origin = token(socket), socket.headers.get("origin")
    if found is None or origin is None or not _is_ours(socket, origin, origins):
        raise Unauthenticated(reason="No token came, and no cookie from the service's own page")
    return found


def check(request: Request, origins: tuple[str, ...]) -> None:
    """Let only our own page pass; raises `CrossSite`."""
    origin, site = request.headers.get("origin"), request.headers.get("sec-fetch-site")
    if request.headers.get(PAGE_HEADER) != "1":
        raise CrossSite(reason=f"the header {PAGE_HEADER}: 1 is missing")
    if site not in {None, "same-origin"}:
        raise CrossSite(reason=f"the browser says that the page is {site}")
    if origin is not None and not _is_ours(request, origin, origins):
        raise CrossSite(
            reason="its Origin is not this address; a proxy must pass on Host, or SCANGRAPH_GATEWAY__ORIGINS name it"
        )


def give(request: Request, response: Response, tokens: dict[_Kind, tuple[str, int]]) -> None:
    """Put tokens, with their lives in seconds, into cookies."""
    for kind, (value, seconds) in tokens.items():
        name, secure = _name(request, kind), _is_https(request)
        response.set_cookie(name, value, max_age=seconds, path="/", secure=secure, httponly=True, samesite="strict")


def take(request: Request, response: Response) -> None:
    """Have the browser forget them."""
    kinds: tuple[_Kind, ...] = ("access", "refresh")
    for kind in kinds:
        name, secure = _name(request, kind), _is_https(request)
        response.delete_cookie(name, path="/", secure=secure, httponly=True, samesite="strict")


def _name(connection: HTTPConnection, kind: _Kind) -> str:
    """Return the cookie's name.

    Over TLS with the prefix that only this very host can set. With the port, since browsers do not tell apart by ports whose a
    cookie is, and two services on one machine would throw each other's people out.
    """
    port = re.search(r":(\d{1,5})$", connection.headers.get("host", ""))
    name = f"scangraph-{port[1]}-{kind}" if port else f"scangraph-{kind}"
    return f"__Host-{name}" if _is_https(connection) else name


def _is_https(connection: HTTPConnection) -> bool:
    """Whether the browser came by TLS. A proxy's X-Forwarded-Proto is believed of whom `auth.network` says."""
    return connection.scope["scheme"] in {"https", "wss"}


def _is_ours(connection: HTTPConnection, origin: str, origins: tuple[str, ...]) -> bool:
    if origin in origins:
        return True
    try:
        named = urlsplit(origin)
    except ValueError:
        return False
    # A page by http of the same name may be anybody's who sits on the wire.
    by_tls = named.scheme == "https" or not _is_https(connection)
    return by_tls and bool(named.netloc) and named.netloc == connection.headers.get("host")
