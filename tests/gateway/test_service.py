"""Executions on a real service: real Ray, real models, and all of it killed. Single processes are in `tests/faults`."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import httpx
import numpy as np
import pytest
from websockets.sync.client import connect

from deployments.imageio.nifti import write_nifti
from scangraph.accounts_cli import local_token
from scangraph.contracts import Volume
from scangraph.phantoms import Phantom, make_phantom
from scangraph.settings import Settings
from scangraph.storage import open_storage

TERMINAL = {"completed", "failed", "cancelled"}


@pytest.fixture(scope="module")
def token(service: str, service_settings: Settings) -> str:
    return local_token(service_settings, minutes=120)


@pytest.fixture(scope="module")
def client(service: str, token: str) -> Any:
    with httpx.Client(base_url=service, timeout=300, headers={"Authorization": f"Bearer {token}"}) as client:
        yield client


@pytest.fixture(scope="module")
def portal(client: httpx.Client, phantom: Phantom) -> str:
    """The id of an uploaded CT."""
    data = write_nifti(phantom.volumes["portal"])
    answer = client.post("/v1/files", files={"file": ("portal.nii.gz", data)})
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


@pytest.fixture(scope="module")
def large(client: httpx.Client) -> str:
    """The id of an uploaded CT that takes a while."""
    whole = make_phantom(4242).volumes["portal"]
    volume = Volume(np.pad(whole.array, 60, mode="edge"), whole.spacing_mm, whole.origin_mm, whole.direction)
    answer = client.post("/v1/files", files={"file": ("large.nii.gz", write_nifti(volume))})
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


def start(client: httpx.Client, body: dict[str, Any], **headers: str) -> dict[str, Any]:
    answer = client.post("/v1/executions", json=body, headers=headers)
    assert answer.status_code in {200, 202}, answer.text
    found: dict[str, Any] = answer.json()
    return found


def wait(client: httpx.Client, execution_id: str, states: set[str] = TERMINAL, seconds: float = 240) -> dict[str, Any]:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            found: dict[str, Any] = client.get(f"/v1/executions/{execution_id}").json()
        except httpx.TransportError:
            found = {"status": "unreachable"}
        if found.get("status") in states:
            return found
        time.sleep(0.1)
    raise AssertionError(f"still {found}")


def test_a_whole_plan_of_a_kidney_operation(client: httpx.Client, phantom: Phantom) -> None:
    files = {name: (f"{name}.nii.gz", write_nifti(volume)) for name, volume in phantom.volumes.items() if name != "native"}
    wanted = {"arterial", "portal", "delayed"}
    form = {name: files[name] for name in wanted}
    answer = client.post("/v1/executions", files=form, data={"pipeline_id": "renal-planning"}, headers={"Prefer": "wait=240"})
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert body["status"] == "completed", body["error"]
    assert {f["name"] for f in body["output_files"]} == {
        "organs", "vessels", "ureters", "tumor", "merged", "mask", "scene", "preview", "manifest",
    }  # fmt: skip
    for file in body["output_files"]:
        content = client.get(file["download_url"]).content
        assert len(content) == file["size"]
        if file["name"] == "preview":
            assert content.startswith(b"\x89PNG")
    lineage = client.get(f"/v1/executions/{body['execution_id']}/provenance").json()
    manifest = next(f for f in body["output_files"] if f["name"] == "manifest")
    stored = json.loads(client.get(manifest["download_url"]).content)
    assert [o["sha256"] for o in stored["outputs"]] == [o["sha256"] for o in lineage["outputs"]]
    assert {s["model"]["id"] for s in lineage["steps"] if s["model"]} >= {"totalseg-demo", "vessel-demo"}
    starts = {s["step_id"]: s["started_at"] for s in body["steps"]}
    ends = {s["step_id"]: s["completed_at"] for s in body["steps"]}
    assert starts["merged"] >= max(ends[name] for name in ("organs", "vessels", "ureters", "tumor"))


def test_cancel_frees_the_processor_and_leaves_nothing(client: httpx.Client, large: str, service_settings: Settings) -> None:
    body = {"pipeline_id": "inference-totalseg", "inputs": {"image": large}, "parameters": {"step_size": 0.25}}
    execution_id = start(client, body)["execution_id"]
    end = time.monotonic() + 60
    while not any(s["progress"]["done"] for s in client.get(f"/v1/executions/{execution_id}").json()["steps"]):
        assert time.monotonic() < end
        time.sleep(0.1)
    asked = time.monotonic()
    assert client.post(f"/v1/executions/{execution_id}/cancel").status_code == 202
    found = wait(client, execution_id)
    assert found["status"] == "cancelled"
    assert time.monotonic() - asked < 5
    # Another one begins at once: the stage is free.
    other = start(client, {**body, "parameters": {"step_size": 1.0}}, Prefer="wait=60")
    assert other["status"] == "completed"
    storage = open_storage(service_settings.storage, service_settings.storage_options)

    async def left() -> list[str]:
        return [stat.name async for stat in storage.list(f"results/{execution_id}")]

    assert asyncio.run(left()) == []
    assert client.post(f"/v1/executions/{execution_id}/cancel").status_code == 409
    again = client.post(f"/v1/executions/{execution_id}/retry", headers={"Prefer": "wait=120"}).json()
    assert again["status"] == "completed"
    assert again["retry_of"] == execution_id


def test_progress_comes_live_and_is_replayed(client: httpx.Client, service: str, token: str, large: str) -> None:
    body = {"pipeline_id": "organs", "inputs": {"image": large}, "parameters": {"step_size": 0.3}}
    execution_id = start(client, body)["execution_id"]
    heard: list[dict[str, Any]] = []
    with connect(service.replace("http", "ws") + "/v1/ws") as socket:
        socket.send(json.dumps({"type": "auth", "token": token}))
        assert json.loads(socket.recv())["type"] == "auth_ok"
        socket.send(json.dumps({"type": "watch", "execution_id": execution_id, "seq": 0}))
        while not heard or heard[-1].get("status") not in TERMINAL:
            heard.append(json.loads(socket.recv(timeout=120)))
    assert heard[0]["type"] == "watching"
    told = [m for m in heard if "seq" in m and m["type"] == "progress"]
    assert [m["seq"] for m in told] == list(range(1, len(told) + 1))
    assert told[-1]["status"] == "completed"
    assert {f["name"] for f in told[-1]["output_files"]} == {"mask", "scene", "manifest"}
    percentages = [m["progress_percentage"] for m in told]
    assert percentages == sorted(percentages)
    assert any(0 < p < 50 for p in percentages)
    with connect(service.replace("http", "ws") + "/v1/ws") as socket:
        socket.send(json.dumps({"type": "auth", "token": token}))
        socket.recv()
        socket.send(json.dumps({"type": "watch", "execution_id": execution_id, "seq": told[2]["seq"]}))
        again = [json.loads(socket.recv(timeout=20)) for _ in range(len(told) - 2)]
    assert [m["seq"] for m in again[1:]] == [m["seq"] for m in told[3:]]
