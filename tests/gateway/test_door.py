"""The door in a real Serve proxy: flow control, deadlines, steering headers, and problems instead of plain text."""

from __future__ import annotations

import contextlib
import hashlib
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil
import pytest
from websockets.sync.client import connect

ROOT = Path(__file__).resolve().parents[2]
MB = 2**20


@dataclass(frozen=True)
class Served:
    url: str
    proxy: int
    replica: int

    @property
    def address(self) -> tuple[str, int]:
        parts = urlsplit(self.url)
        return str(parts.hostname), int(parts.port or 0)

    @contextlib.contextmanager
    def memory_grows_at_most(self, limit: float) -> Iterator[None]:
        """Watch the resident memory of proxy and replica while the block runs."""
        processes = {name: psutil.Process(getattr(self, name)) for name in ("proxy", "replica")}
        idle = {name: process.memory_info().rss for name, process in processes.items()}
        peak, stop = dict(idle), threading.Event()

        def watch() -> None:
            while not stop.wait(0.02):
                for name, process in processes.items():
                    peak[name] = max(peak[name], process.memory_info().rss)

        with ThreadPoolExecutor(1) as pool:
            watching = pool.submit(watch)
            try:
                yield
            finally:
                stop.set()
                watching.result()
        grown = {name: (peak[name] - idle[name]) / MB for name in processes}
        assert max(grown.values()) < limit, grown


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    command = [sys.executable, "-m", "tests.gateway.door_server"]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        said: list[str] = []
        reading = threading.Thread(target=said.extend, args=(process.stderr,))  # a full pipe would stop it
        reading.start()
        line = process.stdout.readline()
        try:
            assert line, "".join(said)
            yield Served(**json.loads(line))
        finally:
            process.stdin.close()
            draining = threading.Thread(target=process.stdout.read)
            draining.start()
            process.wait(60)
            draining.join()
            reading.join()


@pytest.fixture
def client(served: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=served.url, timeout=60) as client:
        yield client


def problem(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = response.json()
    assert (body["status"], body["type"]) == (status, f"urn:scangraph:problem:{code}")
    assert body["trace_id"]
    return body


def raw(served: Served, *pieces: bytes, pause: float = 0, limit: float = 30) -> tuple[httpx.Response | None, float]:
    """Send pieces with a pause behind each, and return what came back and after how long the connection was closed."""
    begun = time.monotonic()
    with socket.create_connection(served.address, timeout=limit) as connection:
        for piece in pieces:
            try:
                connection.sendall(piece)
            except OSError:
                break
            time.sleep(pause)
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            while data := connection.recv(2**16):
                answer += data
    seconds = time.monotonic() - begun
    if not answer:
        return None, seconds
    head, _, body = answer.partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    headers = [tuple(line.split(": ", 1)) for line in lines[1:]]
    return httpx.Response(int(lines[0].split()[1]), headers=headers, content=body), seconds  # type: ignore[arg-type]


# --- flow ------------------------------------------------------------------------------------------------------------------


def stream(size: int) -> Iterator[bytes]:
    block = bytes(range(256)) * 4096
    for start in range(0, size, MB):
        yield block[: size - start]


def test_a_body_arrives_whole(client: httpx.Client) -> None:
    size = 20 * MB + 12345
    answer = client.post("/main/sink", content=stream(size)).json()
    digest = hashlib.sha256()
    for piece in stream(size):
        digest.update(piece)
    assert (answer["size"], answer["sha256"]) == (size, digest.hexdigest())


def test_a_slow_handler_slows_the_upload_down(served: Served, client: httpx.Client) -> None:
    client.post("/main/sink", content=stream(32 * MB))  # what it needs anyway
    with served.memory_grows_at_most(100):
        answer = client.post("/main/sink?seconds_per_mb=0.015", content=stream(300 * MB)).json()
    assert answer["size"] == 300 * MB


def test_a_slow_client_slows_the_download_down(served: Served, client: httpx.Client) -> None:
    """Without the door everything would wait in Ray's object store, and from there go to the disk."""
    with client.stream("GET", "/main/source?size=300000000") as response, served.memory_grows_at_most(100):
        pieces = response.iter_raw(2**16)
        size = len(next(pieces))
        time.sleep(2)
        assert httpx.get(served.url + "/main/given").json() < 40 * MB
        assert size + sum(len(piece) for piece in pieces) == 300_000_000


def test_many_transfers_at_once(client: httpx.Client) -> None:
    def once(number: int) -> tuple[int, int]:
        sent = client.post("/main/sink?seconds_per_mb=0.01", content=stream(6 * MB + number)).json()["size"]
        got = len(client.get(f"/main/source?size={6 * MB + number}").content)
        return sent, got

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(once, range(8))) == [(6 * MB + number, 6 * MB + number) for number in range(8)]


def test_a_body_that_nobody_reads_does_not_hold_the_answer(client: httpx.Client) -> None:
    assert client.post("/main/ignore", content=bytes(20 * MB)).status_code == 204


def test_the_rest_of_a_body_that_was_answered_is_no_head(served: Served) -> None:
    """It comes when the answer is out, and the connection is good for the next request."""
    with socket.create_connection(served.address, timeout=30) as line:
        for _ in range(5):
            line.sendall(b"POST /main/ignore HTTP/1.1\r\nHost: x\r\nContent-Length: 201000\r\n\r\n" + bytes(1000))
            assert line.recv(2**16).startswith(b"HTTP/1.1 204 ")
            line.sendall(bytes(200_000))
        line.sendall(b"GET /main/headers HTTP/1.1\r\nHost: x\r\n\r\n")
        assert line.recv(2**16).startswith(b"HTTP/1.1 200 ")


def test_small_requests_and_websockets_are_as_ever(served: Served, client: httpx.Client) -> None:
    assert client.post("/main/echo", json={"a": 1}).json() == {"a": 1}
    with connect(served.url.replace("http", "ws") + "/main/ws") as talk:
        for text in ("abc", "x" * 500_000 + "y"):
            talk.send(text)
            assert talk.recv(10) == text[::-1]


def test_a_client_that_leaves_in_the_middle_disturbs_nobody(served: Served, client: httpx.Client) -> None:
    with socket.create_connection(served.address) as connection:
        connection.sendall(
            b"POST /main/sink?seconds_per_mb=0.01 HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999\r\n\r\n" + bytes(MB)
        )
    with client.stream("GET", "/main/source?size=100000000") as response:
        next(response.iter_raw(2**16))
    assert client.post("/main/sink", content=stream(5 * MB)).json()["size"] == 5 * MB


# --- deadlines -------------------------------------------------------------------------------------------------------------


def test_half_sent_heads_are_cut_off(served: Served) -> None:
    half = b"GET /main/headers HTTP/1.1\r\nHost: x\r\nX-Slow: "
    kinds: list[Callable[[], tuple[httpx.Response | None, float]]] = [
        lambda: raw(served, half),
        lambda: raw(served, half, *[b"a"] * 24, pause=0.5),  # it drips
        lambda: raw(served, b""),
        lambda: raw(served, b"\r\n"),
        lambda: raw(served, b"GET /main/headers HTTP/1.1\r\nHost: x\r\n\r\n" + half),  # the second on its connection
    ]
    with ThreadPoolExecutor(60) as pool:
        dripping, silent, blank, second = (pool.submit(kind) for kind in kinds[1:])
        halves = [pool.submit(kinds[0]) for _ in range(50)]
        for done in (*halves, dripping):
            response, seconds = done.result()
            assert response is not None
            problem(response, 408, "request-incomplete")
            assert 9 < seconds < 20
        for done in (silent, blank):
            assert done.result()[0] is None
            assert done.result()[1] < 20
        first, seconds = second.result()
        assert first is not None
        assert first.status_code == 200
        assert b"408" in first.content
        assert seconds < 20


def test_half_sent_and_dripping_bodies_are_cut_off(served: Served) -> None:
    head = b"POST /main/sink HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n"
    for pieces, pause in (([head + b"abc"], 0.0), ([head, *[b"a"] * 12], 0.5)):
        response, seconds = raw(served, *pieces, pause=pause)
        assert response is not None
        problem(response, 408, "upload-incomplete")
        assert 1.5 < seconds < 15


def test_too_much_head_and_what_is_not_http(served: Served) -> None:
    response, _ = raw(served, b"GET /main/headers HTTP/1.1\r\n", *[b"X-Many: " + b"a" * 8000 + b"\r\n"] * 40)
    assert response is None or problem(response, 431, "head-too-large")
    response, _ = raw(served, b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n")
    assert response is not None
    problem(response, 400, "bad-http")


# --- headers and answers ---------------------------------------------------------------------------------------------------


def test_headers_that_steer_serve_stay_outside(client: httpx.Client) -> None:
    steering = {
        "X-Request-Timeout-Seconds": "0.001",
        "x-request-disconnect-disabled": "?1",
        "serve_multiplexed_model_id": "a",
        "serve-multiplexed-model-id": "a",
        "X-Session-Id": "a",
        "x-session_id": "a",
        "X-Serve-Router-Anything": "a",
    }
    seen = client.get("/main/headers", headers={**steering, "X-Mine": "1"}).json()
    assert not {name.lower() for name in steering} & set(seen)
    assert seen["x-mine"] == "1"
    assert client.get("/main/sleep?seconds=0.5", headers=steering).status_code == 200


@pytest.mark.parametrize(("sent", "kept"), [("abc-1.2_3", True), ("a b", False), ("x" * 65, False), ("\xff\xfe", False)])
def test_a_clients_name_for_its_request_is_kept_if_it_is_harmless(client: httpx.Client, sent: str, kept: bool) -> None:
    response = client.get("/main/headers", headers=[(b"x-request-id", sent.encode("latin-1"))])
    assert response.status_code == 200
    assert (response.headers["x-request-id"] == sent) is kept
    assert response.json()["x-request-id"] == response.headers["x-request-id"]


def test_serves_own_answers_are_problems(client: httpx.Client) -> None:
    """Here `/nowhere` is known to none of Serve's applications; in the service, which has one for all, that means not yet."""
    answer = client.get("/nowhere", headers={"x-request-id": "abc"})
    assert problem(answer, 503, "starting")["trace_id"] == "abc"
    assert answer.headers["retry-after"] == "5"
    assert client.get("/-/healthz").text == "success"
    head = client.head("/nowhere")
    assert (head.status_code, head.content) == (503, b"")


def test_overload_is_a_503_that_says_when_to_come_back(client: httpx.Client) -> None:
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda _: client.get("/busy/sleep?seconds=1"), range(12)))
    refused = [answer for answer in answers if answer.status_code != 200]
    assert 0 < len(refused) < 12
    for answer in refused:
        problem(answer, 503, "overloaded")
        assert int(answer.headers["retry-after"]) > 0


def test_the_applications_own_errors_pass(client: httpx.Client) -> None:
    problem(client.get("/main/refuse"), 500, "internal-error")
    problem(client.post("/main/echo", content=b"x" * 2 * MB), 413, "body-too-large")


def test_a_replica_that_dies_is_a_503(client: httpx.Client) -> None:
    answer = client.post("/mortal/die", content=bytes(5 * MB))
    problem(answer, 503, "gateway-lost")
    assert int(answer.headers["retry-after"]) > 0
