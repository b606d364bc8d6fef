"""Whoever gets patients' data is in the log first, by whatever door."""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from typing import Any

import pytest
from sqlalchemy import text
from websockets.sync.client import connect

from deployments.imageio.nifti import write_nifti
from scangraph.store import audit
from scangraph.store.tables import Audit
from tests.conftest import constant_volume
from tests.gateway.conftest import Gateway, problem


def rows(gateway: Gateway, since: int = 0) -> Sequence[Audit]:
    return [row for row in gateway.run(audit.entries(gateway.store, limit=10_000)) if row.seq > since]


def told(gateway: Gateway, since: int) -> list[tuple[str, str, str, str, str]]:
    return [(row.account, row.action, row.kind, row.object_id, row.code) for row in rows(gateway, since)]


@pytest.fixture
def since(gateway: Gateway) -> int:
    return max((row.seq for row in rows(gateway)), default=0)


def test_files(gateway: Gateway, since: int) -> None:
    with gateway.client("ann") as ann, gateway.client("bob") as bob:
        file = gateway.upload(ann)
        ann.get(f"/v1/files/{file}")
        ann.get(f"/v1/files/{file}")  # a viewer asks again and again
        ann.get(f"/v1/files/{file}/metadata")
        ann.get("/v1/files")
        assert bob.get(f"/v1/files/{file}").status_code == 404
        assert bob.get("/v1/files/Müller, Anna.nii.gz").status_code in {404, 422}
        ann.delete(f"/v1/files/{file}")
    content, nowhere = "GET /v1/files/{file_id}", [row for row in told(gateway, since) if row[0] == "bob"][1]
    assert told(gateway, since) == [
        ("ann", "POST /v1/files", "file", file, "201"),
        ("ann", content, "file", file, "200"),
        ("ann", f"{content}/metadata", "file", file, "200"),
        ("ann", "GET /v1/files", "", "", "200"),
        ("bob", content, "file", file, "404"),
        nowhere,
        ("ann", "DELETE /v1/files/{file_id}", "file", file, "204"),
    ]
    assert nowhere[2:4] == ("file", "")  # not what a client wrote
    everything = json.dumps([audit.view(row) for row in rows(gateway, since)])
    assert "ct.nii" not in everything
    assert "ller" not in everything
    assert {row.address for row in rows(gateway, since)} == {"127.0.0.1"}
    assert all(len(row.trace_id) == 32 for row in rows(gateway, since))
    assert gateway.run(audit.verify(gateway.store)).fault == ""


def test_executions_and_who_watches_them(gateway: Gateway, since: int) -> None:
    with gateway.client("ann") as ann:
        body = {"pipeline_id": "organs", "inputs": {"image": gateway.upload(ann)}}
        execution = ann.post("/v1/executions", json=body).json()["execution_id"]
        ann.get(f"/v1/executions/{execution}")
        ann.get(f"/v1/executions/{execution}/provenance")
        ann.post(f"/v1/executions/{execution}/cancel")
    for name in ("ann", "eve"):
        with connect(gateway.urls[0].replace("http", "ws") + "/v1/ws") as socket:
            socket.send(json.dumps({"type": "auth", "token": gateway.token(name)}))
            socket.recv(10)
            socket.send(json.dumps({"type": "watch", "execution_id": execution}))
            socket.recv(10)
    one = "/v1/executions/{execution_id}"
    assert told(gateway, since)[1:] == [
        ("ann", "POST /v1/executions", "execution", execution, "202"),
        ("ann", f"GET {one}", "execution", execution, "200"),
        ("ann", f"GET {one}/provenance", "execution", execution, "200"),
        ("ann", f"POST {one}/cancel", "execution", execution, "202"),
        ("ann", "watch", "execution", execution, "OK"),
        ("eve", "watch", "execution", execution, "NOT_FOUND"),
    ]


def test_what_is_nobodys_data_and_what_nobody_asked_is_not_in_it(gateway: Gateway, since: int) -> None:
    with gateway.client("ann") as ann:
        for path in ("/v1/components", "/v1/labels", "/v1/pipelines", "/v1/auth/me", "/healthz", "/openapi.json"):
            assert ann.get(path).status_code == 200
        del ann.headers["Authorization"]
        assert ann.get("/v1/files").status_code == 401
        assert ann.get(f"/v1/files/{uuid.uuid4()}").status_code == 401
    assert told(gateway, since) == []


def test_a_direct_endpoint_names_its_execution(gateway: Gateway, since: int) -> None:
    with gateway.client("ann") as ann:
        gateway.put("Anna.nii.gz", write_nifti(constant_volume(7)))
        answer = ann.post("/inference/totalseg", json={"image_path": "Anna.nii.gz"}, headers={"Prefer": "respond-async"})
        assert answer.status_code == 202, answer.text
    action = [row for row in told(gateway, since) if "totalseg" in row[1]]
    assert action == [("ann", "POST /inference/totalseg", "execution", answer.json()["execution_id"], "202")]


def test_what_cannot_be_written_down_is_not_answered(fresh: Any) -> None:
    gateway: Gateway = fresh()

    async def rename(old: str, new: str) -> None:
        async with gateway.store.write() as session:
            await session.execute(text(f"ALTER TABLE {old} RENAME TO {new}"))

    with gateway.client() as client:
        file = gateway.upload(client)
        gateway.run(rename("audit", "elsewhere"))
        problem(client.get(f"/v1/files/{file}"), 503, "store-unavailable")
        gateway.run(rename("elsewhere", "audit"))
        assert client.get(f"/v1/files/{file}").status_code == 200
