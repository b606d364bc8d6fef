"""Requests in, progress out, and what goes wrong between: a real bridge, real records, a broker that speaks the protocol."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from sqlalchemy import select
from websockets.sync.client import connect

from scangraph.contracts.api import TERMINAL
from scangraph.contracts.messages import CORRELATION
from scangraph.store import accounts, executions, now, outbox
from scangraph.store.files import list_files
from scangraph.store.tables import Event
from tests.kafka.broker import Broker, headers, running
from tests.kafka.conftest import CT, DEAD, PIPELINE, PROGRESS, REQUESTS, SHA256, Doors, request
from tests.postgres import fresh_database, postgres_server
from tests.s3 import moto
from tests.servers import proxied


def put_file(doors: Doors, name: str = "ct.nii.gz") -> str:
    """Put a file into the storage, as a backend does, and return its URI."""
    root = doors.server.settings.storage_root
    root.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(CT)
    return (root / name).as_uri()


def events(doors: Doors) -> dict[str, list[Event]]:
    """Every execution's events, from the records."""

    async def read() -> list[Event]:
        async with doors.server.services.store.read() as session:
            return list((await session.execute(select(Event).order_by(Event.execution_id, Event.seq))).scalars())

    found: dict[str, list[Event]] = {}
    for event in doors.server.run(read()):
        found.setdefault(event.execution_id, []).append(event)
    return found


def ended(doors: Doors, number: int) -> bool:
    return sum(e.state in TERMINAL for e in doors.executions()) >= number


def heard(messages: list[Any]) -> dict[str, list[dict[str, Any]]]:
    """What a consumer makes of the progress topic: by execution, passing over what is not higher than what it has."""
    found: dict[str, list[dict[str, Any]]] = {}
    for message in messages:
        body = json.loads(message.value())
        assert message.key().decode() == body["execution_id"]
        had = found.setdefault(body["execution_id"], [])
        if not had or body["seq"] > had[-1]["seq"]:
            had.append(body)
    return found


def told_all(doors: Doors) -> Callable[[list[Any]], bool]:
    """Whether what was read from the progress topic is every event."""
    return lambda messages: sum(map(len, heard(messages).values())) >= sum(map(len, events(doors).values()))


# --- requests --------------------------------------------------------------------------------------------------------------


def test_every_way_to_give_a_file(doors: Doors, broker: Broker) -> None:
    kept = httpx.post(
        f"{doors.server.url}/v1/files", files={"file": ("ct.nii.gz", CT)}, headers=login(doors, "kafka", "a long secret kafka")
    )
    assert kept.status_code == 201, kept.text
    ways: list[dict[str, Any] | None] = [
        None,
        {"data": base64.b64encode(CT).decode(), "sha256": SHA256},
        {"file_id": kept.json()["id"]},
        {"file_id": kept.json()["id"], "sha256": SHA256},
        {"uri": put_file(doors), "sha256": SHA256},
        {"uri": "ct.nii.gz", "sha256": SHA256},
    ]
    for n, way in enumerate(ways):
        broker.put(REQUESTS, [request(f"way-{n}", way, parameters={"label": n + 1}, priority="high")])
    doors.until(lambda: ended(doors, len(ways)))
    rows = doors.executions()
    assert {row.state for row in rows} == {"completed"}
    assert {row.parameters["run"]["label"] for row in rows} == set(range(1, len(ways) + 1))
    assert {row.priority for row in rows} == {"high"}
    doors.until(doors.settled)
    messages = broker.read(PROGRESS, told_all(doors))
    assert {headers(m)[CORRELATION] for m in messages} == {f"way-{n}" for n in range(len(ways))}


def login(doors: Doors, name: str, password: str) -> dict[str, str]:
    answer = httpx.post(f"{doors.server.url}/v1/auth/login", json={"username": name, "password": password})
    return {"Authorization": f"Bearer {answer.json()['access_token']}"}


def test_sent_again_it_makes_nothing_new(doors: Doors, broker: Broker) -> None:
    broker.put(REQUESTS, [request(f"c-{n % 5}") for n in range(100)])
    doors.until(doors.settled)
    assert len(doors.executions()) == 5
    files = doors.server.run(list_files(doors.server.services.store, origin="upload", limit=200))
    assert len(files) == 5  # what the others brought was taken back
    stored = list((doors.server.settings.storage_root / "files").rglob("*.nii.gz"))
    assert len(stored) == 5
    status = doors.status()
    assert (status["accepted"], status["known"], status["refused"]) == (5, 95, 0)


def test_what_cannot_be_accepted_is_a_dead_letter(doors: Doors, broker: Broker) -> None:
    put_file(doors)
    other = doors.account("other")
    foreign = httpx.post(
        f"{doors.server.url}/v1/files", files={"file": ("ct.nii.gz", CT)}, headers=login(doors, "other", "a long secret other")
    ).json()["id"]
    wrong = "0" * 64
    bad = {
        b"not json": "invalid-message",
        b"[" * 20000: "invalid-message",
        b"": "invalid-message",
        request("x", {"file_id": foreign, "colour": "red"}): "invalid-message",
        request("x", {"uri": "ct.nii.gz"}): "invalid-message",
        request("x", {"uri": "ct.nii.gz", "file_id": foreign, "sha256": SHA256}): "invalid-message",
        request("x", {"data": "?"}): "invalid-message",
        request("x", pipeline_id="no-such"): "not-found",
        request("x", {"file_id": foreign}): "not-found",
        request("x", {"uri": "ct.nii.gz", "sha256": wrong}): "input-digest-mismatch",
        request("x", {"data": base64.b64encode(CT).decode(), "sha256": wrong}): "input-digest-mismatch",
        request("x", {"uri": "../../etc/passwd", "sha256": wrong}): "path-refused",
        request("x", {"uri": "s3://elsewhere/ct.nii.gz", "sha256": wrong}): "path-refused",
        request("x", {"uri": "none.nii.gz", "sha256": wrong}): "file-not-found",
        request("x", {"data": base64.b64encode(CT[:100]).decode(), "filename": "cut.nii.gz"}): "truncated",
        request("x", parameters={"lable": 3}): "invalid-inputs",
        request("x", {"data": base64.b64encode(bytes(9 * 2**20 // 16)).decode()}): "upload-too-large",
        json.dumps({"pipeline_id": PIPELINE, "inputs": {}}).encode(): "invalid-message",
    }
    broker.put(REQUESTS, list(bad), key=b"k", headers=[("trace", b"1")])
    broker.put(REQUESTS, [request("good")])
    broker.put(REQUESTS, [request("good", priority="low")])
    found = broker.read(DEAD, len(bad) + 1)
    assert {(m.value() or b""): headers(m)["scangraph-code"] for m in found if m.key()} == bad
    for message in found:
        told = headers(message)
        assert told["scangraph-topic"] == REQUESTS
        assert {"scangraph-partition", "scangraph-offset", "scangraph-detail", "scangraph-status"} <= told.keys()
        assert message.key() is None or told["trace"] == "1"
    assert [headers(m)["scangraph-code"] for m in found if not m.key()] == ["idempotency-mismatch"]
    doors.until(doors.settled)
    doors.until(lambda: ended(doors, 1))
    assert len(doors.executions()) == 1
    assert doors.status()["refused"] == len(bad) + 1
    assert other.id not in {row.owner_id for row in doors.executions()}


# --- what is away ------------------------------------------------------------------------------------------------------------


def test_without_an_account_messages_wait(broker: Broker, make_doors: Callable[..., Doors]) -> None:
    doors = make_doors(broker)
    doors.open()
    broker.put(REQUESTS, [request(f"c-{n}") for n in range(40)])
    doors.until(lambda: doors.status()["held"] == doors.server.settings.kafka.concurrent)
    doors.until(lambda: doors.status()["paused"])
    assert doors.status()["tries"] > 0
    assert broker.committed(REQUESTS, "scangraph") == (0, 40)
    doors.account()
    doors.until(doors.settled)
    assert len(doors.executions()) == 40
    assert doors.status()["refused"] == 0
    assert doors.until(lambda: not doors.status()["paused"]) is not None
    # A disabled account takes nothing in, either.
    doors.server.run(accounts.set_enabled(doors.server.services.store, "kafka", False))
    time.sleep(1.1)
    broker.put(REQUESTS, [request("late")])
    doors.until(lambda: doors.status()["held"] == 1)
    doors.server.run(accounts.set_enabled(doors.server.services.store, "kafka", True))
    doors.until(doors.settled)
    assert len(doors.executions()) == 41


def test_a_full_queue_is_waited_for(broker: Broker, make_doors: Callable[..., Doors]) -> None:
    from scangraph.settings import ExecutorSettings

    doors = make_doors(broker, executor=ExecutorSettings(max_pending=5, max_running=1))
    doors.account()
    doors.open()
    broker.put(REQUESTS, [request(f"c-{n}", parameters={"seconds": 0.05, "label": 1 + n}) for n in range(60)])
    doors.until(lambda: ended(doors, 60), 120)
    doors.until(doors.settled)
    assert doors.status()["tries"] > 0
    assert (len(doors.executions()), doors.status()["refused"]) == (60, 0)


def test_the_database_goes_and_comes_back(broker: Broker, make_doors: Callable[..., Doors]) -> None:
    with postgres_server() as server:
        url = asyncio.run(fresh_database(server))
        with proxied(urlsplit(server).port or 0) as proxy:
            behind = url.replace(urlsplit(server).netloc, f"postgres@{urlsplit(proxy.url).netloc}")
            doors = make_doors(broker, database_url=behind)
            doors.account()
            doors.open()
            broker.put(REQUESTS, [request("before")])
            doors.until(doors.settled)
            proxy.refusing = True
            proxy.cut()
            broker.put(REQUESTS, [request(f"c-{n}") for n in range(40)])
            doors.until(lambda: doors.status()["held"])
            assert doors.status()["unsent"] is None
            assert broker.committed(REQUESTS, "scangraph") == (1, 41)
            doors.bridges[0].check()
            proxy.refusing = False
            doors.until(doors.settled)
            assert (len(doors.executions()), doors.status()["refused"]) == (41, 0)
            doors.until(lambda: doors.status()["unsent"] == 0)
            for bridge in list(doors.bridges):
                doors.close(bridge)
            doors.server.run(doors.server.services.store.close())


def test_the_storage_goes_and_comes_back(broker: Broker, make_doors: Callable[..., Doors]) -> None:
    with moto() as server:
        doors = make_doors(broker, storage_url="s3://bucket/x", storage_options=server.options)
        doors.account()
        doors.open()
        broker.put(REQUESTS, [request("before")])
        doors.until(doors.settled)
        server.stop()
        broker.put(REQUESTS, [request(f"c-{n}") for n in range(4)])
        doors.until(lambda: doors.status()["held"], 120)
        assert doors.status()["refused"] == 0
        assert broker.committed(REQUESTS, "scangraph") == (1, 5)
        server.start()
        doors.until(doors.settled, 120)
        assert (len(doors.executions()), doors.status()["refused"]) == (5, 0)


@pytest.mark.parametrize("way", ["hanging", "refusing"])
def test_the_broker_goes_and_comes_back(make_doors: Callable[..., Doors], way: str) -> None:
    with running(tool=way == "refusing") as broker:
        doors = make_doors(broker)
        doors.account()
        doors.open()
        broker.put(REQUESTS, [request(f"before-{n}") for n in range(5)])
        doors.until(lambda: ended(doors, 5))
        with broker.hanging() if way == "hanging" else broker.refusing():
            doors.until(lambda: doors.status()["brokers"] == "away")
            body = {"pipeline_id": PIPELINE, "inputs": {"image": "meanwhile.nii.gz"}}
            put_file(doors, "meanwhile.nii.gz")
            headers_ = login(doors, "kafka", "a long secret kafka")
            for label in range(1, 6):  # the other doors go on
                answer = httpx.post(
                    f"{doors.server.url}/v1/executions", json={**body, "parameters": {"label": label}}, headers=headers_
                )
                assert answer.status_code == 202
            doors.until(lambda: ended(doors, 10))
            status = doors.until(lambda: (s := doors.status())["unsent"] and s["unsent_seconds"] > 1 and s)
            assert status["trouble"]
            doors.server.run(asyncio.sleep(0))
            doors.bridges[0].check()
        doors.until(lambda: doors.status()["brokers"] == "up")
        broker.put(REQUESTS, [request(f"after-{n}") for n in range(5)])
        doors.until(lambda: ended(doors, 15))
        doors.until(lambda: doors.status()["unsent"] == 0)
        found = heard(broker.read(PROGRESS, told_all(doors)))
        expected = events(doors)
        assert len(expected) == 15
        assert {key: [e["seq"] for e in had] for key, had in found.items()} == {
            key: [e.seq for e in had] for key, had in expected.items()
        }


def test_an_offset_waits_for_its_dead_letter(make_doors: Callable[..., Doors]) -> None:
    with running(tool=True) as broker:
        doors = make_doors(broker)
        doors.account()
        broker.put(REQUESTS, [b"not json"], key=b"k")
        broker.tell("fail 0 29 29")  # the next two that are produced: may not write there
        doors.open()
        (found,) = broker.read(DEAD, 1)
        assert (headers(found)["scangraph-code"], found.value(), found.key()) == ("invalid-message", b"not json", b"k")
        doors.until(doors.settled)
        status = doors.status()
        assert (status["tries"], status["refused"], status["held"]) == (2, 1, 0)


def test_what_is_too_large_with_its_reason_is_named(make_doors: Callable[..., Doors]) -> None:
    with running(tool=True) as broker:
        doors = make_doors(broker)
        doors.account()
        broker.put(REQUESTS, [b"not json"], key=b"k")
        broker.tell("fail 0 10")  # too large for the broker
        doors.open()
        (found,) = broker.read(DEAD, 1)
        assert (found.key(), found.value()) == (b"k", None)
        assert headers(found)["scangraph-value-sha256"] == hashlib.sha256(b"not json").hexdigest()
        doors.until(doors.settled)


def test_going_does_not_wait_for_brokers_that_hang(broker: Broker, make_doors: Callable[..., Doors]) -> None:
    doors = make_doors(broker)
    doors.account()
    bridge = doors.open()
    broker.put(REQUESTS, [request("before")])
    doors.until(doors.settled)
    broker.put(REQUESTS, [request("not committed")])
    doors.until(lambda: doors.status()["accepted"] == 2)
    with broker.hanging():
        began = time.monotonic()
        doors.close(bridge)
        assert time.monotonic() - began < 40
    doors.open()
    doors.until(doors.settled)
    assert len(doors.executions()) == 2


# --- replicas ----------------------------------------------------------------------------------------------------------------


def test_partitions_move_between_replicas(doors: Doors, broker: Broker) -> None:
    first = doors.bridges[0]
    total = 300
    put_file(doors)
    values = [
        request(f"c-{n}", {"uri": "ct.nii.gz", "sha256": SHA256}, parameters={"label": 1 + n % 200}) for n in range(total)
    ]
    broker.put(REQUESTS, values[:100], spread=True)
    doors.until(lambda: doors.status(first)["accepted"] > 20)
    second = doors.open()
    doors.until(lambda: doors.status(second)["partitions"])
    broker.put(REQUESTS, values[100:200], spread=True)
    doors.until(lambda: doors.status(second)["accepted"] > 5)
    assert not set(doors.status(first)["partitions"]) & set(doors.status(second)["partitions"])
    doors.close(first)
    broker.put(REQUESTS, values[200:], spread=True)
    doors.until(lambda: len(doors.status(second)["partitions"]) == 4)
    doors.until(doors.settled, 120)
    rows = doors.executions()
    assert len(rows) == total
    status = doors.status(second)
    assert status["refused"] == 0


def test_one_tells_at_a_time_and_another_takes_over(doors: Doors, broker: Broker) -> None:
    first, second = doors.bridges[0], doors.open()
    doors.until(lambda: doors.status(first)["telling"])
    broker.put(REQUESTS, [request(f"a-{n}") for n in range(5)])
    doors.until(lambda: ended(doors, 5))
    doors.until(lambda: doors.status(first)["unsent"] == 0)
    assert doors.status(second)["told"] == 0
    assert not doors.status(second)["telling"]
    doors.close(first)
    began = time.monotonic()
    doors.until(lambda: doors.status(second)["telling"])
    broker.put(REQUESTS, [request(f"b-{n}") for n in range(5)])
    doors.until(lambda: ended(doors, 10))
    doors.until(lambda: doors.status(second)["unsent"] == 0)
    assert doors.status(second)["told"] > 0
    assert time.monotonic() - began < 60
    found = heard(broker.read(PROGRESS, told_all(doors)))
    assert all([e["seq"] for e in had] == list(range(1, len(had) + 1)) for had in found.values())


# --- progress ----------------------------------------------------------------------------------------------------------------


def test_websocket_and_kafka_tell_the_same_history(doors: Doors, broker: Broker) -> None:
    token = login(doors, "kafka", "a long secret kafka")["Authorization"].removeprefix("Bearer ")
    broker.put(REQUESTS, [request("slow", parameters={"seconds": 1.0}), request("fails", parameters={"fail": True})])
    rows = doors.until(lambda: len(found := doors.executions()) == 2 and found)
    seen: dict[str, list[dict[str, Any]]] = {row.id: [] for row in rows}
    with connect(doors.server.url.replace("http", "ws") + "/v1/ws") as socket:
        socket.send(json.dumps({"type": "auth", "token": token}))
        for row in rows:
            socket.send(json.dumps({"type": "watch", "execution_id": row.id, "seq": 0}))
        while not all(had and had[-1]["status"] in TERMINAL for had in seen.values()):
            message = json.loads(socket.recv(30))
            if message["type"] in {"progress", "error", "cancelled"}:
                seen[message["execution_id"]].append(message)
    found = heard(broker.read(PROGRESS, told_all(doors)))
    assert found == seen
    ends = {had[-1]["status"]: had[-1] for had in found.values()}
    assert ends.keys() == {"completed", "failed"}
    assert ends["completed"]["output_files"]
    assert ends["failed"]["error"]["code"]


def test_what_was_not_told_is_not_forgotten(broker: Broker, make_doors: Callable[..., Doors]) -> None:
    doors = make_doors(broker)
    doors.account()
    s = doors.server.services
    put_file(doors)
    headers_ = login(doors, "kafka", "a long secret kafka")
    body = {"pipeline_id": PIPELINE, "inputs": {"image": "ct.nii.gz"}}
    assert httpx.post(f"{doors.server.url}/v1/executions", json=body, headers=headers_).status_code == 202
    doors.until(lambda: ended(doors, 1))
    (row,) = doors.executions()
    assert doors.server.run(executions.forget(s.store, s.storage, now())) == 0
    count, oldest = doors.server.run(outbox.waiting(s.store))
    assert count == row.last_seq
    assert oldest is not None
    doors.open()
    doors.until(lambda: doors.status()["unsent"] == 0)
    assert doors.server.run(executions.forget(s.store, s.storage, now())) == 1
    found = heard(broker.read(PROGRESS, row.last_seq))
    assert [e["seq"] for e in found[row.id]] == list(range(1, row.last_seq + 1))
