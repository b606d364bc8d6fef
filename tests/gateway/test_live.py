"""Live progress over WebSocket: nothing is missed, nothing is shown to strangers, nobody's slowness costs memory."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
from sqlalchemy import insert
from websockets.asyncio.client import connect as connect_async
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect
from websockets.typing import Origin

from deployments.gateway import live
from scangraph.contracts.api import Role
from scangraph.store import accounts, executions
from scangraph.store.tables import Event, Execution
from tests.gateway.conftest import Gateway

ENDED = {"completed", "failed", "cancelled"}


def start(gateway: Gateway, pipeline: str = "organs", name: str = "ann") -> str:
    """Accept an execution, and return its id."""
    with contextlib.suppress(Exception):
        gateway.put("live/ct.nii.gz", b"read by nobody here")
    with gateway.client(name) as client:
        body = {"pipeline_id": pipeline, "inputs": {"image": "live/ct.nii.gz"}}
        answer = client.post("/v1/executions", json=body)
        assert answer.status_code == 202, answer.text
        return str(answer.json()["execution_id"])


def address(gateway: Gateway, replica: int = 0) -> str:
    return gateway.urls[replica].replace("http", "ws") + "/v1/ws"


def say(socket: Any, **message: Any) -> None:
    socket.send(json.dumps(message))


def hear(socket: ClientConnection, seconds: float = 10) -> dict[str, Any]:
    message: dict[str, Any] = json.loads(socket.recv(timeout=seconds))
    return message


@contextlib.contextmanager
def conversation(
    gateway: Gateway, name: str = "ann", role: Role = "operator", replica: int = 0, **options: Any
) -> Iterator[ClientConnection]:
    """A WebSocket whose token was taken."""
    with connect(address(gateway, replica), **options) as socket:
        say(socket, type="auth", token=gateway.token(name, role))
        told = hear(socket)
        assert (told["type"], told["name"]) == ("auth_ok", name)
        yield socket


def closing(socket: ClientConnection, seconds: float = 10) -> int:
    """Read until the server closes, and return its code."""
    while True:
        try:
            socket.recv(timeout=seconds)
        except ConnectionClosed as closed:
            return closed.rcvd.code if closed.rcvd else 1006


def silent(socket: ClientConnection, seconds: float = 0.4) -> bool:
    """Whether nothing comes."""
    try:
        socket.recv(timeout=seconds)
    except TimeoutError:
        return True
    return False


# --- who may listen --------------------------------------------------------------------------------------------------------


def test_a_token_comes_first(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    with connect(address(gateway)) as socket:
        say(socket, type="watch", execution_id="x")
        assert closing(socket) == 4401
    with connect(address(gateway)) as socket:
        say(socket, type="auth", token="nobody's")
        assert closing(socket) == 4401
    monkeypatch.setattr(live, "_AUTH_SECONDS", 0.5)
    with connect(address(gateway)) as socket:
        begun = time.monotonic()
        while time.monotonic() < begun + 0.4:  # being lively is not enough
            say(socket, type="ping")
            assert hear(socket)["type"] == "pong"
            time.sleep(0.05)
        assert closing(socket) == 4401
        assert time.monotonic() - begun < 3


def test_pages_of_others_may_not_connect(gateway: Gateway) -> None:
    with pytest.raises(InvalidStatus) as caught:
        connect(address(gateway), origin=Origin("https://evil.example"))
    assert caught.value.response.status_code == 403
    with connect(address(gateway), origin=Origin(gateway.urls[0])) as socket:
        say(socket, type="ping")
        assert hear(socket)["type"] == "pong"


def test_executions_of_others_are_not_there(gateway: Gateway) -> None:
    execution_id = start(gateway)
    with conversation(gateway, "bob") as socket:
        for wanted in (execution_id, "no-such-thing"):
            say(socket, type="watch", execution_id=wanted, seq=0)
            told = hear(socket)
            assert (told["type"], told["code"], told["status"]) == ("problem", "not-found", 404)
            assert told["execution_id"] == wanted
            assert told["detail"] == f"There is no execution {wanted!r}, or it is not yours."
    with conversation(gateway, "root", "admin") as socket:
        say(socket, type="watch", execution_id=execution_id)
        assert hear(socket)["type"] == "watching"


def test_another_token_sees_only_its_own(gateway: Gateway) -> None:
    execution_id = start(gateway)
    with conversation(gateway, "root", "admin") as socket:
        say(socket, type="watch", execution_id=execution_id)
        assert [hear(socket)["type"] for _ in range(2)] == ["watching", "snapshot"]
        say(socket, type="auth", token=gateway.token("bob"))
        assert hear(socket) == {"type": "auth_ok", "name": "bob", "role": "operator"}
        gateway.claim(execution_id)
        assert silent(socket)
        say(socket, type="auth", token="nobody's")
        assert closing(socket) == 4401


def test_a_revoked_token_ends_the_conversation(gateway: Gateway) -> None:
    with conversation(gateway, "lea", replica=1) as socket, gateway.client("lea") as client:
        token = gateway.token("lea")
        say(socket, type="auth", token=token)
        assert hear(socket)["type"] == "auth_ok"
        begun = time.monotonic()
        client.headers["Authorization"] = f"Bearer {token}"
        assert client.post("/v1/auth/logout").status_code == 204
        assert closing(socket) == 4401
        assert time.monotonic() - begun < 6
    gateway.account("max", "operator")
    with conversation(gateway, "max") as socket:
        gateway.run(accounts.set_enabled(gateway.store, "max", enabled=False))
        assert closing(socket) == 4401


def test_a_token_s_end_ends_the_conversation_unless_another_comes(gateway: Gateway) -> None:
    with connect(address(gateway)) as short, connect(address(gateway)) as long:
        for socket in (short, long):
            say(socket, type="auth", token=gateway.token(seconds=2))
            assert hear(socket)["type"] == "auth_ok"
        say(long, type="auth", token=gateway.token(seconds=60))
        assert hear(long)["type"] == "auth_ok"
        begun = time.monotonic()
        assert closing(short) == 4401
        assert time.monotonic() - begun < 4
        time.sleep(0.5)
        say(long, type="ping")
        assert hear(long)["type"] == "pong"


# --- what is told ----------------------------------------------------------------------------------------------------------


def test_snapshot_then_progress_then_the_end(gateway: Gateway) -> None:
    execution_id = start(gateway)
    with conversation(gateway, replica=1) as socket:  # the work is seen from the other replica, too
        say(socket, type="watch", execution_id=execution_id)
        watching, snapshot = hear(socket), hear(socket)
        assert watching == {"type": "watching", "execution_id": execution_id, "seq": 1, "ended": False}
        assert snapshot["seq"] == 1
        assert snapshot["execution"]["status"] == "pending"
        assert snapshot["execution"]["queue_position"] >= 1
        claim = gateway.claim(execution_id)
        gateway.run(executions.write_down(gateway.store, claim, [executions.StepStarted("organs")]))
        gateway.progress(claim, "organs", 5)
        gateway.complete(claim)
        told: list[dict[str, Any]] = []
        while not told or told[-1]["status"] not in ENDED:
            told.append(hear(socket))
        assert silent(socket)
    assert [message["seq"] for message in told] == list(range(2, len(told) + 2))
    assert {message["type"] for message in told} == {"progress"}
    half = next(m for m in told if m["current_step"] == "organs" and m["progress_percentage"] > 0)
    assert half["progress_percentage"] == 25  # half of one of two steps
    assert (told[-1]["status"], told[-1]["progress_percentage"]) == ("completed", 100)
    assert {file["name"] for file in told[-1]["output_files"]} == {"mask", "scene"}
    assert all(file["download_url"] == f"/v1/files/{file['file_id']}" for file in told[-1]["output_files"])


def test_failures_and_cancels_say_what_they_are(gateway: Gateway) -> None:
    failed, cancelled = start(gateway), start(gateway)
    with conversation(gateway) as socket, gateway.client() as client:
        for execution_id in (failed, cancelled):
            say(socket, type="watch", execution_id=execution_id, seq=1)
            assert hear(socket)["type"] == "watching"
        gateway.fail(gateway.claim(failed), "organs")
        while (told := hear(socket))["status"] not in ENDED:
            pass
        assert (told["type"], told["status"]) == ("error", "failed")
        assert told["error"]["code"] == "out-of-memory"
        assert client.post(f"/v1/executions/{cancelled}/cancel").status_code == 202
        told = hear(socket)
        assert (told["type"], told["execution_id"], told["status"]) == ("cancelled", cancelled, "cancelled")


def test_what_was_missed_is_told_from_its_number_on(gateway: Gateway) -> None:
    execution_id = start(gateway)
    gateway.complete(gateway.claim(execution_id))
    last = gateway.run(executions.newest(gateway.store, [execution_id]))[execution_id]
    for replica, seq in ((0, 0), (1, 2), (0, last - 1)):
        with conversation(gateway, replica=replica) as socket:
            say(socket, type="watch", execution_id=execution_id, seq=seq)
            assert hear(socket)["seq"] == last
            assert [hear(socket)["seq"] for _ in range(last - seq)] == list(range(seq + 1, last + 1))
            assert silent(socket, 0.2)
    with conversation(gateway) as socket:
        say(socket, type="watch", execution_id=execution_id, seq=last)
        assert hear(socket)["type"] == "watching"
        assert silent(socket, 0.2)
        say(socket, type="watch", execution_id=execution_id, seq=10**30)  # of another life: begin anew
        assert [hear(socket)["type"] for _ in range(2)] == ["watching", "snapshot"]


def test_whoever_comes_back_misses_nothing(gateway: Gateway) -> None:
    """The connection breaks again and again, each time to another replica, while the work goes on."""
    execution_id = start(gateway)

    def work() -> None:
        claim = gateway.claim(execution_id)
        gateway.run(executions.write_down(gateway.store, claim, [executions.StepStarted("organs")]))
        for done in range(40):
            gateway.progress(claim, "organs", done, 40)
            time.sleep(0.01)
        gateway.complete(claim)

    worker = threading.Thread(target=work)
    worker.start()
    heard: list[int] = []
    status, visit = "", 0
    while status not in ENDED:
        visit += 1
        with conversation(gateway, replica=visit % 2) as socket:
            say(socket, type="watch", execution_id=execution_id, seq=heard[-1] if heard else 0)
            assert hear(socket)["type"] == "watching"
            for _ in range(visit % 5 + 1):
                message = hear(socket)
                heard.append(message["seq"])
                status = message["status"]
                if status in ENDED:
                    break
            socket.socket.close()  # without a word
    worker.join()
    assert visit > 5
    assert heard == list(range(1, len(heard) + 1))


def test_enough_is_enough(gateway: Gateway) -> None:
    execution_id = start(gateway)
    with conversation(gateway) as socket:
        say(socket, type="watch", execution_id=execution_id)
        assert [hear(socket)["type"] for _ in range(2)] == ["watching", "snapshot"]
        say(socket, type="unwatch", execution_id=execution_id)
        assert hear(socket) == {"type": "unwatched", "execution_id": execution_id}
        say(socket, type="unwatch", execution_id=execution_id)
        assert hear(socket)["type"] == "unwatched"
        gateway.claim(execution_id)
        assert silent(socket)
        say(socket, type="watch", execution_id=execution_id, seq=1)
        assert [hear(socket)["type"] for _ in range(2)] == ["watching", "progress"]


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("{", "invalid-message"),
        ("", "invalid-message"),
        ("null", "invalid-message"),
        ("[" * 30_000, "invalid-message"),
        ('{"type": "shout"}', "invalid-message"),
        ('{"type": "ping", "more": 1}', "invalid-message"),
        ('{"type": "watch"}', "invalid-message"),
        ('{"type": "watch", "execution_id": "x", "seq": -1}', "invalid-message"),
        ('{"type": "watch", "execution_id": "\\ud800"}', "invalid-message"),
        ('{"type": "watch", "execution_id": "' + "x" * 100 + '"}', "invalid-message"),
        (json.dumps({"type": "auth", "token": "x" * 70_000}), "message-too-long"),
        (b"\x00\xff", "invalid-message"),
    ],
)
def test_what_is_not_understood_is_said(gateway: Gateway, text: str | bytes, code: str) -> None:
    with conversation(gateway) as socket:
        socket.send(text)
        told = hear(socket)
        assert (told["type"], told["code"]) == ("problem", code)
        say(socket, type="ping")
        assert hear(socket)["type"] == "pong"  # and life goes on


def test_a_nul_is_no_execution(gateway: Gateway) -> None:
    with conversation(gateway) as socket:
        say(socket, type="watch", execution_id="a\0b")
        told = hear(socket)
        assert (told["type"], told["status"]) in {("problem", 404), ("problem", 422)}


# --- many, and slow ones ---------------------------------------------------------------------------------------------------


def test_a_thousand_are_watched_and_no_more(gateway: Gateway) -> None:
    """All of them from the beginning, which is one question about each."""
    execution_id = start(gateway)
    record = gateway.run(executions.load(gateway.store, execution_id))
    row = record.execution

    async def more() -> list[str]:
        columns = [column.key for column in Execution.__table__.columns]
        rows = [{**{key: getattr(row, key) for key in columns}, "id": f"many-{n}-{id(gateway)}"} for n in range(1001)]
        moment = row.created_at
        body = {"status": "cancelled", "progress_percentage": 0}
        told = [{"execution_id": r["id"], "seq": 1, "kind": "cancelled", "body": body, "created_at": moment} for r in rows]
        async with gateway.store.write() as session:
            for start in range(0, len(rows), 100):
                await session.execute(insert(Execution), [{**r, "state": "cancelled"} for r in rows[start : start + 100]])
            await session.execute(insert(Event), told)
        return [str(r["id"]) for r in rows]

    ids = gateway.run(more())
    with conversation(gateway, max_queue=None) as socket:
        for each in ids:
            say(socket, type="watch", execution_id=each, seq=0)
        kinds: dict[str, set[str]] = {}
        told = 0
        while told < 2001:
            message = hear(socket)
            kinds.setdefault(message["type"], set()).add(message["execution_id"])
            told += 1
    assert kinds["problem"] == {ids[-1]}
    assert kinds["watching"] == kinds["cancelled"] == set(ids[:-1])


def test_two_hundred_listeners(gateway: Gateway) -> None:
    ids = [start(gateway) for _ in range(5)]
    token = gateway.token()
    ready = threading.Semaphore(0)

    async def listen(number: int) -> list[int]:
        execution_id, heard = ids[number % len(ids)], []
        async with connect_async(address(gateway, number % 2), open_timeout=60) as socket:
            await socket.send(json.dumps({"type": "auth", "token": token}))
            await socket.send(json.dumps({"type": "watch", "execution_id": execution_id, "seq": 0}))
            async for text in socket:
                message = json.loads(text)
                if message["type"] == "watching":
                    ready.release()
                if message["type"] == "progress":
                    heard.append(message["seq"])
                    if message["status"] in ENDED:
                        break
        return heard

    async def all_of_them() -> list[list[int]]:
        return await asyncio.gather(*(listen(number) for number in range(200)))

    heard: list[list[int]] = []
    listening = threading.Thread(target=lambda: heard.extend(asyncio.run(all_of_them())))
    listening.start()
    for _ in range(200):
        assert ready.acquire(timeout=30)
    for execution_id in ids:
        gateway.complete(gateway.claim(execution_id))
    listening.join(60)
    assert len(heard) == 200
    assert all(numbers == list(range(1, len(numbers) + 1)) for numbers in heard)
    end = time.monotonic() + 5
    while any(live.hub(services)._listeners for services in gateway.services):
        assert time.monotonic() < end  # nobody is remembered who has left
        time.sleep(0.05)


def test_whoever_does_not_read_costs_no_memory_and_is_left(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "_SEND_SECONDS", 2.0)
    execution_id = start(gateway)
    claim = gateway.claim(execution_id)
    error = {"code": "stage-failed", "status": 500, "title": "It failed", "detail": "x" * 2**20}
    gateway.run(executions.fail(gateway.store, claim, error))
    with conversation(gateway, max_queue=1, max_size=None, ping_interval=None, close_timeout=0.1) as socket:
        process = psutil.Process()
        before, most = process.memory_info().rss, 0
        with contextlib.suppress(ConnectionClosed):
            for _ in range(200):
                say(socket, type="watch", execution_id=execution_id)
        end = time.monotonic() + 20
        while live.hub(gateway.services[0])._listeners:
            most = max(most, process.memory_info().rss)
            assert time.monotonic() < end
            time.sleep(0.05)
        assert most - before < 60 * 2**20  # of 200 MiB
