"""One service and one browser for all tests of the page."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import numpy as np
import pytest

pytest.importorskip("playwright", reason="playwright is in the dev environment: run `make setup-dev`")

from playwright.sync_api import Browser, sync_playwright

from deployments.imageio.nifti import write_nifti
from scangraph.contracts import Volume
from scangraph.phantoms import make_phantom
from scangraph.settings import Settings
from tests.ui.browser import ROOT, Visit, chromium

NAME, PASSWORD = "surgeon", "correct horse battery"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = chromium(playwright)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def client(browser: Browser, service: str, service_settings: Settings) -> Iterator[httpx.Client]:
    """The service as the page's account sees it; the browser comes first, since without one nothing need start.

    The account is made by the command: playwright's loop runs in this thread, and no other one can.
    """
    command = [sys.executable, "-m", "scangraph.cli", "accounts", "add", NAME, "--role", "editor", "--password-stdin"]
    environment = {**os.environ, "SCANGRAPH_DATA": str(service_settings.data)}
    done = subprocess.run(command, input=PASSWORD, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    time.sleep(1.1)  # a replica knows its accounts for a second
    with httpx.Client(base_url=service, timeout=300) as client:
        answer = client.post("/v1/auth/login", json={"username": NAME, "password": PASSWORD})
        client.headers["Authorization"] = f"Bearer {answer.json()['access_token']}"
        yield client


@pytest.fixture
def visit(browser: Browser, client: httpx.Client) -> Iterator[Callable[..., Visit]]:
    """Make visits, signed in; at their ends nothing may have been complained of."""
    visits: list[Visit] = []

    def begin(url: str | None = None, sign_in: bool = True, **options: Any) -> Visit:
        options.setdefault("viewport", {"width": 1440, "height": 900})
        made = Visit(url or str(client.base_url).rstrip("/"), browser.new_context(**options))
        visits.append(made)
        if sign_in:
            made.sign_in(NAME, PASSWORD)
        return made

    yield begin
    complaints = [said for made in visits for said in made.complaints]
    for made in visits:
        made.context.close()
    assert not complaints, complaints


@pytest.fixture(scope="session")
def slow_scan() -> bytes:
    """A CT that takes the demonstration model a while: a phantom in much air, which is not to be skipped."""
    whole = make_phantom(4242).volumes["portal"]
    volume = Volume(np.pad(whole.array, 50, mode="edge"), whole.spacing_mm, whole.origin_mm, whole.direction)
    return write_nifti(volume)
