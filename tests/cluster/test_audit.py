"""The audit of the locks, against a database of our own; and against the real one, where that can be reached."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from cluster import audit
from runtime_envs import pins


class _Database(http.server.BaseHTTPRequestHandler):
    known = {("jinja2", "2.4.1"): ["GHSA-1", "PYSEC-2"]}  # noqa: RUF012

    def do_POST(self) -> None:
        queries = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["queries"]
        keys = [(query["package"]["name"], query["version"]) for query in queries]
        assert all(query["package"]["ecosystem"] == "PyPI" for query in queries)
        results = [{"vulns": [{"id": i} for i in self.known[key]]} if key in self.known else {} for key in keys]
        body = json.dumps({"results": results}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def database() -> Iterator[str]:
    with http.server.HTTPServer(("127.0.0.1", 0), _Database) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_every_pin_of_every_lock_is_asked_for() -> None:
    packages = audit.locked(["base", "nnunet"])
    assert len({name for name, _ in packages}) == len(packages)  # one version of each
    assert packages["numpy", dict(pin.split("==") for pin in pins("base") if "==" in pin)["numpy"]] == ["base", "nnunet"]
    assert all(version[0].isdigit() for _, version in packages)


def test_what_is_known_is_told(database: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    packages = {("jinja2", "2.4.1"): ["base"], ("numpy", "2.4.6"): ["base"]}
    assert audit.known_faults(packages, database) == {("jinja2", "2.4.1"): ["GHSA-1", "PYSEC-2"]}
    monkeypatch.setattr(audit, "_AT_ONCE", 1)
    assert audit.known_faults(packages, database) == {("jinja2", "2.4.1"): ["GHSA-1", "PYSEC-2"]}
    monkeypatch.setenv("SCANGRAPH_OSV", database)
    assert audit.main(["base"]) == 0
    monkeypatch.setitem(_Database.known, next(iter(audit.locked(["base"]))), ["CVE-1"])
    assert audit.main(["base"]) == 1
    assert "CVE-1" in capsys.readouterr().out


def test_who_cannot_be_asked_has_not_said_that_all_is_well(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SCANGRAPH_OSV", "http://127.0.0.1:1")
    assert audit.main(["base"]) == 3
    assert "nothing is known" in capsys.readouterr().err


def test_no_locked_package_that_serves_has_a_known_fault(capfd: pytest.CaptureFixture[str]) -> None:
    found: Any = audit.main(["base", "nnunet", "smoothing", "postprocess", "imaging"])
    told = capfd.readouterr()
    if found == 3:
        pytest.skip(told.err.strip())
    assert found == 0, told.out
