"""The door on real Ray: a thousand messages, and its process killed in the middle."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from websockets.sync.client import connect

from benchmarks.service import ServiceProcess
from deployments.imageio.nifti import write_nifti
from scangraph.contracts import LabelMap
from scangraph.handles import SERVICE_FILE
from scangraph.imageflow.v1 import imageflow_pb2 as pb
from scangraph.imageflow.v1 import imageflow_pb2_grpc
from tests.kafka.broker import Broker, headers, running
from tests.kafka.conftest import DEAD, PROGRESS, REQUESTS

MESSAGES = 1000


@pytest.fixture(scope="module")
def broker() -> Iterator[Broker]:
    with running() as broker:
        yield broker


@pytest.fixture(scope="module")
def service(broker: Broker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    data = tmp_path_factory.mktemp("data")
    (data / "storage").mkdir()
    array = np.zeros((4, 8, 8), np.uint8)
    array[1:3, 2:6, 2:6] = 2
    (data / "storage" / "mask.nii.gz").write_bytes(write_nifti(LabelMap(array, (1, 1, 1), labels=(2,))))
    kafka = {"SCANGRAPH_KAFKA__BOOTSTRAP_SERVERS": broker.address, "SCANGRAPH_KAFKA__SESSION_SECONDS": "6"}
    service = ServiceProcess(data, {**kafka, "SCANGRAPH_OBJECT_STORE_MB": "512"})
    try:
        service.start()
        yield service
    finally:
        service.stop()


@pytest.fixture(scope="module")
def client(service: ServiceProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=service.url, timeout=60, headers={"Authorization": f"Bearer {service.token()}"}) as client:
        yield client


def door(client: httpx.Client) -> dict[str, Any]:
    answer = client.get("/v1/doors")
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()["kafka"]
    return found


def executions(client: httpx.Client) -> list[dict[str, Any]]:
    found, cursor = [], None
    while True:
        page = client.get("/v1/executions", params={"limit": 200, **({"cursor": cursor} if cursor else {})}).json()
        found += page["items"]
        if (cursor := page["next_cursor"]) is None:
            return found


def until(true: Any, seconds: float, what: Any) -> Any:
    end = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < end, what()
        time.sleep(0.2)
    return found


@pytest.mark.slow
def test_a_thousand_messages_and_a_killed_bridge(service: ServiceProcess, client: httpx.Client, broker: Broker) -> None:
    # Without its account the door holds what comes, and the service is as ready as ever.
    assert client.get("/readyz").status_code == 200
    sha256 = hashlib.sha256((service.data / "storage" / "mask.nii.gz").read_bytes()).hexdigest()
    values = [
        json.dumps(
            {
                "correlation_id": f"c-{n}",
                "pipeline_id": "postprocess-merge",
                "inputs": {"masks": [{"uri": "mask.nii.gz", "sha256": sha256}]},
                "parameters": {"structures": [2, 5 + n % 90]},
            }
        ).encode()
        for n in range(MESSAGES)
    ]
    broker.put(REQUESTS, values)
    broker.put(REQUESTS, [b"not json"])
    until(lambda: door(client).get("held"), 60, lambda: door(client))
    service.command("accounts", "add", "kafka", "--service")
    until(lambda: len(executions(client)) > 200, 120, lambda: door(client))
    victims = service.processes("kafka")
    assert victims
    for process in victims:
        process.kill()
    assert len(executions(client)) < MESSAGES
    until(lambda: broker.committed(REQUESTS, "scangraph") == (MESSAGES + 1, MESSAGES + 1), 240, lambda: door(client))
    rows = executions(client)
    assert len(rows) == MESSAGES
    assert client.get("/readyz").status_code == 200
    codes = {headers(message)["scangraph-code"] for message in broker.read(DEAD, 1)}
    assert codes == {"invalid-message"}

    # What is told: of each execution every number from 1 on, whatever was told twice.
    def of_all(messages: list[Any]) -> bool:
        return len({m.key() for m in messages}) == MESSAGES and any(b'"completed"' in m.value() for m in messages)

    messages = broker.read(PROGRESS, of_all, 120)
    assert {headers(m)["correlation-id"] for m in messages} == {f"c-{n}" for n in range(MESSAGES)}
    seen: Counter[str] = Counter()
    for message in messages:
        body = json.loads(message.value() or b"")
        if body["seq"] == seen[body["execution_id"]] + 1:
            seen[body["execution_id"]] += 1
        assert body["seq"] <= seen[body["execution_id"]]
    assert set(seen) == {row["execution_id"] for row in rows}


@pytest.mark.slow
def test_every_door_tells_the_same_of_one_execution(service: ServiceProcess, client: httpx.Client, broker: Broker) -> None:
    wish = {"pipeline_id": "postprocess-merge", "inputs": {"masks": [{"path": "mask.nii.gz"}]}}
    accepted = client.post("/v1/executions", json=wish, headers={"Prefer": "respond-async"})
    assert accepted.status_code == 202, accepted.text
    execution_id = accepted.json()["execution_id"]
    by_socket: list[dict[str, Any]] = []

    def listen() -> None:
        with connect(f"{service.url.replace('http', 'ws')}/v1/ws") as socket:
            socket.send(json.dumps({"type": "auth", "token": service.token()}))
            socket.send(json.dumps({"type": "watch", "execution_id": execution_id, "seq": 0}))
            while not by_socket or by_socket[-1]["status"] != "completed":
                message = json.loads(socket.recv(timeout=60))
                if message["type"] in {"progress", "error", "cancelled"}:
                    by_socket.append(message)

    listener = threading.Thread(target=listen)
    listener.start()
    target = json.loads((service.data / SERVICE_FILE).read_text())["grpc"]
    with grpc.insecure_channel(target) as channel:
        stub = imageflow_pb2_grpc.ImageProcessingServiceStub(channel)
        bearer = [("authorization", f"Bearer {service.token()}")]
        request = pb.WatchRequest(execution_id=execution_id, after_seq=0)
        by_grpc = list(stub.WatchExecution(request, metadata=bearer, timeout=60))
    listener.join(60)

    def of_it(messages: list[Any]) -> bool:
        mine = [json.loads(m.value() or b"") for m in messages if m.key() == execution_id.encode()]
        return any(body["status"] == "completed" for body in mine)

    told = [m for m in broker.read(PROGRESS, of_it, 60) if m.key() == execution_id.encode()]
    by_kafka = {body["seq"]: body for body in (json.loads(m.value() or b"") for m in told)}
    last = by_socket[-1]["output_files"]
    for body in [*by_kafka.values(), *by_socket]:  # on the way: what could be read when it was told
        files = body.pop("output_files", [])
        assert files == last if body["status"] == "completed" else all(file in last for file in files)
    assert [by_kafka[seq] for seq in sorted(by_kafka)] == by_socket
    assert [message["seq"] for message in by_socket] == list(range(1, len(by_socket) + 1))
    names = {"pending": pb.STATUS_PENDING, "running": pb.STATUS_RUNNING, "completed": pb.STATUS_COMPLETED}
    assert [(u.seq, u.status, u.progress_percentage, u.current_step) for u in by_grpc] == [
        (m["seq"], names[m["status"]], m["progress_percentage"], m["current_step"] or "") for m in by_socket
    ]
    assert [file["name"] for file in last] == ["mask", "manifest"]
    assert [file.file_id for file in by_grpc[-1].output_files] == [file["file_id"] for file in last]
