"""The page's files, as the gateway gives them; and what it says where they were not built."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from deployments.gateway.page import accepted
from tests.gateway.conftest import Gateway, problem

SCRIPT = b"export const answer = 42;\n" * 50


@pytest.fixture
def built(tmp_path: Path) -> Path:
    """A build, as Vite leaves one."""
    page = tmp_path / "page"
    (page / "assets").mkdir(parents=True)
    (page / "index.html").write_text('<!doctype html><script type="module" src="/assets/index-1a2b.js"></script>')
    (page / "assets/index-1a2b.js").write_bytes(SCRIPT)
    (page / "assets/index-1a2b.js.gz").write_bytes(gzip.compress(SCRIPT))
    (page / "assets/index-1a2b.js.br").write_bytes(b"as brotli would have it")
    (page / "assets/plain.svg").write_text("<svg/>")
    (page / "assets/.hidden.js").write_text("no")
    (tmp_path / "secret.js").write_text("no")
    return page


@pytest.fixture
def url(fresh: Callable[..., Gateway], built: Path) -> str:
    return fresh(gateway={"page_dir": built}).urls[0]


def test_the_page_is_at_its_addresses_and_takes_nothing_from_elsewhere(url: str) -> None:
    for path in ("/", "/executions/3f1c", "/executions/never-was"):
        answer = httpx.get(url + path)
        assert answer.status_code == 200
        assert answer.headers["content-type"] == "text/html; charset=utf-8"
        assert "index-1a2b.js" in answer.text
        assert answer.headers["cache-control"] == "no-store"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cross-origin-opener-policy"] == "same-origin"
        rules = dict(rule.split(" ", 1) for rule in answer.headers["content-security-policy"].split("; "))
        assert rules["default-src"] == rules["frame-ancestors"] == rules["base-uri"] == "'none'"
        assert rules["script-src"] == rules["style-src"] == rules["connect-src"] == "'self'"
        assert httpx.head(url + path).headers["content-length"] == answer.headers["content-length"]


def test_assets_are_kept_for_good_and_sent_as_small_as_the_client_takes_them(url: str) -> None:
    for wish, encoding in (("gzip, deflate, br", "br"), ("gzip", "gzip"), ("br;q=0, gzip", "gzip"), ("identity", None)):
        answer = httpx.get(url + "/assets/index-1a2b.js", headers={"Accept-Encoding": wish}, follow_redirects=False)
        assert (answer.status_code, answer.headers.get("content-encoding")) == (200, encoding)
        assert answer.headers["content-type"] == "text/javascript; charset=utf-8"
        assert "immutable" in answer.headers["cache-control"]
        assert answer.headers["vary"] == "Accept-Encoding"
        if encoding != "br":
            assert answer.content == SCRIPT
    plain = httpx.get(url + "/assets/plain.svg")
    assert (plain.headers["content-type"], plain.text) == ("image/svg+xml", "<svg/>")
    assert "content-encoding" not in plain.headers


@pytest.mark.parametrize(
    "name",
    ["never.js", "..%2Fsecret.js", "..%2f..%2fsecret.js", ".hidden.js", "index-1a2b.js.gz", "index.html", "x.py", "%00.js"],
)
def test_nothing_else_is_given(url: str, name: str) -> None:
    problem(httpx.get(f"{url}/assets/{name}"), 404, "not-found")


def test_without_a_build_it_says_what_to_do(fresh: Callable[..., Any], tmp_path: Path) -> None:
    url = fresh(gateway={"page_dir": tmp_path / "none"}).urls[0]
    answer = httpx.get(url + "/")
    assert answer.status_code == 200
    assert "make setup" in answer.text
    assert "/docs" in answer.text
    assert "Research use only" in answer.text
    assert "<script" not in answer.text
    assert "<style" not in answer.text
    problem(httpx.get(url + "/assets/index.js"), 404, "not-found")
    assert httpx.get(url + "/healthz").status_code == 200


def test_what_a_client_takes() -> None:
    assert accepted("") == accepted("identity") == accepted("gzip;q=0, *;q=0.0") == ()
    assert accepted("GZIP; q=0.5,br") == accepted("*") == ("br", "gzip")
    assert accepted("*, br;q=0") == ("gzip",)
