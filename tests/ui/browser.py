"""A real browser in front of the page: Debian's Chromium, and what every test wants to know of it."""

from __future__ import annotations

import io
import os
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from playwright.sync_api import BrowserContext, ConsoleMessage, Locator, Page, Playwright, Request

ROOT = Path(__file__).resolve().parents[2]
BUILT = ROOT / "deployments" / "gateway" / "page"
#: WebGL2 without a GPU; containers have no user namespaces for the sandbox.
_FLAGS = ["--no-sandbox", "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--ignore-gpu-blocklist"]
#: How long a browser without a GPU may take for what a person would call at once.
PATIENCE_MS = 60_000


def chromium(playwright: Playwright):  # type: ignore[no-untyped-def]
    """Start the browser, or skip with the reason."""
    path = os.environ.get("SCANGRAPH_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        pytest.skip("there is no Chromium: run `sh runtime_envs/system.sh chromium` as root")
    if not (BUILT / "index.html").exists():
        pytest.skip("the page is not built: run `make setup` where Node 20 is")
    return playwright.chromium.launch(executable_path=path, args=_FLAGS)


@dataclass
class Visit:
    """A browser's window on the page, and everything that went wrong in it.

    Attributes
    ----------
    url : str
        The service's address, or a proxy's before it.
    complaints : list of str
        Errors and warnings of the console, uncaught errors, and requests to other hosts.
    """

    url: str
    context: BrowserContext
    page: Page = field(init=False)
    complaints: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.context.on("request", self._asked)
        self.page = self.tab()

    def tab(self) -> Page:
        """Open another tab."""
        page = self.context.new_page()
        page.set_default_timeout(PATIENCE_MS)
        page.on("console", self._said)
        page.on("websocket", lambda socket: self._asked_of(socket.url))
        page.on("pageerror", lambda error: self.complaints.append(f"uncaught: {error}"))
        return page

    def _said(self, message: ConsoleMessage) -> None:
        if message.type in {"error", "warning"}:
            self.complaints.append(f"console: {message.text} ({message.location.get('url')})")

    def _asked(self, request: Request) -> None:
        self._asked_of(request.url)

    def _asked_of(self, url: str) -> None:
        here, there = urlsplit(self.url), urlsplit(url)
        if there.scheme in {"http", "https", "ws", "wss"} and there.netloc != here.netloc:
            self.complaints.append(f"it asked another host: {url}")

    def sign_in(self, name: str, password: str) -> None:
        """Go through the form."""
        self.page.goto(self.url)
        self.page.get_by_label("Name").fill(name)
        self.page.get_by_label("Password").fill(password)
        self.page.get_by_role("button", name="Sign in").click()
        self.ready("start")

    def ready(self, which: str, page: Page | None = None) -> None:
        """Wait until a page is there and was drawn."""
        (page or self.page).wait_for_selector(f"html[data-ready={which}]", state="attached")

    def forgive(self, *parts: str) -> None:
        """Take complaints away that a test caused on purpose."""
        self.complaints = [said for said in self.complaints if not any(part in said for part in parts)]


def pixels(place: Locator) -> NDArray[np.uint8]:
    """Return what is on the screen there: rows, columns, RGB."""
    return np.asarray(Image.open(io.BytesIO(place.screenshot())).convert("RGB"))


def colours(picture: NDArray[np.uint8]) -> int:
    """Count the distinct colours, in steps of 8: an empty or a flat canvas has a handful."""
    return len(np.unique(picture.reshape(-1, 3) // 8, axis=0))


def lit(picture: NDArray[np.uint8]) -> float:
    """Return the share of pixels that are not nearly black."""
    return float((picture.max(axis=2) > 40).mean())


def differ(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> bool:
    """Whether more than a few pixels differ; a toolbar that wraps may cost a row."""
    rows, columns = (min(a, b) for a, b in zip(one.shape[:2], other.shape[:2], strict=True))
    apart = np.abs(one[:rows, :columns].astype(int) - other[:rows, :columns]).max(axis=2) > 16
    return float(apart.mean()) > 0.001


def until(page: Page, expression: str) -> None:
    """Wait until an expression is true in the page. Playwright's own way needs `eval`, which the policy forbids."""
    end = time.monotonic() + PATIENCE_MS / 1000
    while not page.evaluate(expression):
        assert time.monotonic() < end, f"never true: {expression}"
        page.wait_for_timeout(50)
