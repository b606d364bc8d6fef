"""The web page: what `make setup` built of `ui/`, and a word where it was not built."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from fastapi import APIRouter, Request, Response
from starlette.exceptions import HTTPException

from deployments.gateway.services import Access

#: Where the build puts it; not in the repository.
BUILT = Path(__file__).resolve().parent / "page"
#: Nothing comes from elsewhere, nothing goes elsewhere, and no script or style stands in the HTML.
_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' blob: data:",
        "connect-src 'self'",
        "font-src 'self'",
        "worker-src 'self' blob:",
        "form-action 'self'",
        "frame-ancestors 'none'",
        "base-uri 'none'",
        "manifest-src 'self'",
    )
)
_HTML_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Cache-Control": "no-store",  # it names the assets of one build
}
_ASSET_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "public, max-age=31536000, immutable",  # its name has its hash
    "Vary": "Accept-Encoding",
}
_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".ico": "image/x-icon",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".map": "application/json",
    ".png": "image/png",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
    ".wasm": "application/wasm",
    ".webmanifest": "application/manifest+json",
    ".webp": "image/webp",
    ".woff2": "font/woff2",
}
#: What the build compressed beforehand, the smallest first.
_ENCODINGS = {"br": ".br", "gzip": ".gz"}
_NOT_BUILT = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>scangraph</title>
</head>
<body>
<main>
<h1>scangraph</h1>
<p>The service runs. Its web page was not built: that needs Node 20 or newer where <code>make setup</code> runs. Install it, run
<code>make setup</code> again and reload; nothing has to be started anew.</p>
<p>Everything can be done without the page: <a href="/docs">the interface</a>, the command <code>scangraph run</code>, and
Python.</p>
<p><strong>Research use only. Not a medical device.</strong></p>
</main>
</body>
</html>
"""


class _Asset(NamedTuple):
    """A file of the build, as it is sent."""

    data: bytes
    encoding: str | None


def page_routes(services: Access) -> APIRouter:
    """Make the routes: the page at its addresses, and what it loads."""
    router = APIRouter(include_in_schema=False)

    def folder() -> Path:
        return services().settings.gateway.page_dir or BUILT

    async def page() -> Response:
        return Response(await asyncio.to_thread(_html, folder()), 200, _HTML_HEADERS, "text/html; charset=utf-8")

    async def asset(name: str, request: Request) -> Response:
        kind = _TYPES.get(PurePosixPath(name).suffix)
        found = None
        if kind is not None and re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,200}", name):
            wanted = accepted(request.headers.get("accept-encoding", ""))
            found = await asyncio.to_thread(_read, folder() / "assets" / name, wanted)
        if found is None or kind is None:
            raise HTTPException(404, "the page has no such file; it may have been built anew, reload it")
        headers = _ASSET_HEADERS | ({"Content-Encoding": found.encoding} if found.encoding else {})
        return Response(found.data, 200, headers, kind)

    for path in ("/", "/executions/{execution_id}"):
        router.add_api_route(path, page, methods=["GET", "HEAD"])
    router.add_api_route("/assets/{name}", asset, methods=["GET", "HEAD"])
    return router


def accepted(header: str) -> tuple[str, ...]:
    """Return the encodings of ours that a client takes (RFC 9110, 12.5.3), the smallest first."""
    weights: dict[str, bool] = {}
    for entry in header.lower().split(","):
        name, _, weight = entry.partition(";")
        weights[name.strip()] = not re.fullmatch(r"\s*q\s*=\s*0(\.0{0,3})?\s*", weight)
    return tuple(name for name in _ENCODINGS if weights.get(name, weights.get("*", False)))


def _html(folder: Path) -> str:
    try:
        return (folder / "index.html").read_text()
    except OSError:
        return _NOT_BUILT


def _read(path: Path, encodings: tuple[str, ...]) -> _Asset | None:
    """Read a file, compressed where the client takes that and the build did it; None where it is not (or no more) there."""
    for name in encodings:
        try:
            return _Asset(path.with_name(path.name + _ENCODINGS[name]).read_bytes(), name)
        except OSError:
            continue
    try:
        return _Asset(path.read_bytes(), None)
    except OSError:
        return None
