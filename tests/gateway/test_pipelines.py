"""Pipelines over HTTP."""

from __future__ import annotations

import json
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.gateway.conftest import Gateway, problem

SPEC: dict[str, Any] = {
    "name": "organs-smooth",
    "title": "Organs, smoothed",
    "inputs": {"image": {"kind": "image"}},
    "steps": [
        {"id": "organs", "component": "inference/totalseg", "inputs": {"image": "input.image"}},
        {"id": "scene", "component": "smoothing/base", "inputs": {"mask": "organs.mask"}},
    ],
    "outputs": {"mask": "organs.mask", "scene": "scene.scene"},
}


def spec(**changes: Any) -> dict[str, Any]:
    return {**SPEC, "name": f"p-{uuid.uuid4().hex[:12]}", **changes}


def test_life_of_a_pipeline(gateway: Gateway) -> None:
    with gateway.client("ed", "editor") as client:
        wish = spec()
        made = client.post("/v1/pipelines", json=wish)
        assert made.status_code == 201, made.text
        body, tag = made.json(), made.headers["ETag"]
        assert (body["revision"], body["built_in"], body["owner"]) == (1, False, gateway.account("ed", "editor").id)
        assert made.headers["Location"] == f"/v1/pipelines/{body['id']}"
        assert not tag.startswith("W/")

        for address in (body["id"], wish["name"], f"{wish['name']}@1", f"{body['id']}@1"):
            found = client.get(f"/v1/pipelines/{address}")
            assert (found.json(), found.headers["ETag"]) == (body, tag)
            for known in (tag, f'"other", W/{tag}', "*"):
                same = client.get(f"/v1/pipelines/{address}", headers={"If-None-Match": known})
                assert (same.status_code, same.content, same.headers["ETag"]) == (304, b"", tag)
        assert client.get(f"/v1/pipelines/{wish['name']}", headers={"If-None-Match": '"other"'}).status_code == 200

        address, change = f"/v1/pipelines/{wish['name']}", {**wish, "title": "Another"}
        problem(client.put(address, json=change), 428, "precondition-required")
        problem(client.put(address, json=change, headers={"If-Match": '"other"'}), 412, "precondition-failed")
        second = client.put(address, json=change, headers={"If-Match": tag})
        assert (second.status_code, second.json()["revision"]) == (200, 2)
        assert second.headers["ETag"] != tag
        problem(client.put(address, json=wish, headers={"If-Match": tag}), 412, "precondition-failed")
        again = client.put(address, json=change, headers={"If-Match": second.headers["ETag"]})
        assert again.json()["revision"] == 2  # the same once more is no revision
        assert client.get(f"{address}@1").json()["spec"]["title"] == SPEC["title"]
        problem(client.get(f"{address}@3"), 404, "not-found")

        problem(client.delete(address), 428, "precondition-required")
        problem(client.delete(address, headers={"If-Match": tag}), 412, "precondition-failed")
        assert client.delete(address, headers={"If-Match": second.headers["ETag"]}).status_code == 204
        problem(client.get(address), 404, "not-found")
        assert client.post("/v1/pipelines", json=wish).status_code == 201  # its name is free again


def test_faults_point_at_the_step(gateway: Gateway) -> None:
    steps = [
        {"id": "a", "component": "inference/nothing", "inputs": {"image": "input.image"}},
        {"id": "b", "component": "smoothing/base", "inputs": {"mask": "input.image"}, "parameters": {"smoothing": 7}},
    ]
    wish = spec(steps=steps, outputs={"scene": "b.scene"})
    with gateway.client("ed", "editor") as client:
        errors = problem(client.post("/v1/pipelines", json=wish), 422, "invalid-pipeline")["errors"]
        assert [e["pointer"] for e in errors] == [
            "/steps/0/component", "/steps/1/inputs/mask", "/steps/1/parameters/smoothing",
        ]  # fmt: skip
        dry = client.post("/v1/pipelines:validate", json=wish)
        assert (dry.status_code, dry.json()) == (200, {"valid": False, "errors": errors})
        dry = client.post("/v1/pipelines/organs:validate", json=wish)
        assert dry.json() == {"valid": False, "errors": errors}
        for body in (spec(), None):
            assert client.post("/v1/pipelines/organs:validate", json=body).json() == {"valid": True, "errors": []}
        problem(client.post("/v1/pipelines/none:validate"), 404, "not-found")
        malformed = problem(client.post("/v1/pipelines", json=spec(steps=[])), 422, "invalid-request")
        assert malformed["errors"][0]["pointer"] == "/steps"
        problem(client.get(f"/v1/pipelines/{wish['name']}"), 404, "not-found")


def test_built_in_pipelines_are_there_and_stay_as_they_are(gateway: Gateway) -> None:
    with gateway.client("root", "admin") as client:
        names = {
            item["name"] for item in client.get("/v1/pipelines", params={"limit": 200}).json()["items"] if item["built_in"]
        }
        assert names == {
            "organs", "renal-planning", "inference-totalseg", "inference-vessel", "inference-ureter", "inference-tumor",
            "postprocess-merge", "postprocess-clean", "postprocess-vessel", "postprocess-ureter", "postprocess-skeleton",
            "postprocess-fat", "postprocess-sample", "smoothing-base",
        }  # fmt: skip
        found = client.get("/v1/pipelines/renal-planning")
        headers = {"If-Match": found.headers["ETag"]}
        problem(client.put("/v1/pipelines/renal-planning", json=spec(), headers=headers), 409, "built-in")
        problem(client.delete("/v1/pipelines/renal-planning", headers=headers), 409, "built-in")
        copy = client.post("/v1/pipelines", json={**found.json()["spec"], "name": spec()["name"]})
        assert copy.status_code == 201, copy.text
        problem(client.post("/v1/pipelines", json=spec(name="organs")), 409, "name-taken")


def test_roles_and_owners(gateway: Gateway) -> None:
    with gateway.client("ed", "editor") as ed, gateway.client("eva", "editor") as eva:
        made = ed.post("/v1/pipelines", json=spec())
        address, headers = f"/v1/pipelines/{made.json()['id']}", {"If-Match": made.headers["ETag"]}
        assert eva.get(address).status_code == 200  # everybody sees all
        problem(eva.put(address, json=spec(), headers=headers), 403, "forbidden")
        problem(eva.delete(address, headers=headers), 403, "forbidden")
        for name, role in (("ann", "operator"), ("vic", "viewer")):
            with gateway.client(name, role) as client:  # type: ignore[arg-type]
                assert client.get(address).status_code == 200
                assert client.get("/v1/pipelines").status_code == 200
                assert client.post("/v1/pipelines:validate", json=spec()).json()["valid"]
                problem(client.post("/v1/pipelines", json=spec()), 403, "forbidden")
                problem(client.put(address, json=spec(), headers=headers), 403, "forbidden")
                problem(client.delete(address, headers=headers), 403, "forbidden")
        with gateway.client("root", "admin") as admin:
            assert admin.delete(address, headers=headers).status_code == 204
    for method, path in (("GET", "/v1/pipelines"), ("POST", "/v1/pipelines"), ("GET", address), ("DELETE", address)):
        answer = httpx.request(method, gateway.urls[0] + path)
        problem(answer, 401, "unauthenticated")
        assert answer.headers["WWW-Authenticate"].startswith("Bearer")


def test_of_two_editors_one_wins(gateway: Gateway) -> None:
    """Race: many change one revision at once, on both replicas."""
    with gateway.client("ed", "editor") as one, gateway.client("ed", "editor", replica=1) as other:
        made = one.post("/v1/pipelines", json=spec())
        address, headers = f"/v1/pipelines/{made.json()['id']}", {"If-Match": made.headers["ETag"]}

        def put(number: int) -> int:
            client = (one, other)[number % 2]
            body = {**made.json()["spec"], "title": f"edit {number}"}
            return client.put(address, json=body, headers=headers).status_code

        with ThreadPoolExecutor(8) as pool:
            assert sorted(pool.map(put, range(16))) == [200] + [412] * 15
        assert one.get(address).json()["revision"] == 2

        name = spec()["name"]
        with ThreadPoolExecutor(8) as pool:
            made_of = list(pool.map(lambda n: (one, other)[n % 2].post("/v1/pipelines", json=spec(name=name)), range(8)))
        assert sorted(a.status_code for a in made_of) == [201] + [409] * 7


def test_pages_have_no_gaps_and_no_repeats(gateway: Gateway) -> None:
    with gateway.client("ed", "editor") as client:
        before = [client.post("/v1/pipelines", json=spec()).json()["id"] for _ in range(7)]
        seen: list[str] = []
        address: str | None = "/v1/pipelines?limit=2"
        while address:
            page = client.get(address)
            seen += [item["id"] for item in page.json()["items"]]
            client.post("/v1/pipelines", json=spec())  # comes in front of what is left
            address = page.links.get("next", {}).get("url")
            assert (address is None) == (page.json()["next_cursor"] is None)
        assert len(seen) == len(set(seen))
        assert [i for i in seen if i in before] == before[::-1]
        problem(client.get("/v1/pipelines", params={"cursor": "nonsense"}), 422, "invalid-cursor")
        problem(client.get("/v1/pipelines", params={"limit": 0}), 422, "invalid-request")


@pytest.mark.parametrize("address", ["x" * 300, "organs@", "organs@0", "organs@-1", "organs@99999999999", "@1", "é"])
def test_addresses_of_nothing(gateway: Gateway, address: str) -> None:
    with gateway.client("ed", "editor") as client:
        problem(client.get(f"/v1/pipelines/{address}"), 404, "not-found")


def test_a_nul_names_nothing(gateway: Gateway) -> None:
    with gateway.client("ed", "editor") as client:
        for address in ("pipelines/%00", "pipelines/a%00b@1", "executions/%00", "executions?pipeline=%00"):
            answer = client.get(f"/v1/{address}")
            assert answer.status_code in {200, 404, 422}, answer.text  # SQLite finds nothing, PostgreSQL refuses to look


def test_a_name_is_never_somebody_elses_id(gateway: Gateway) -> None:
    """Whoever looks for the id would find two."""
    with gateway.client("ed", "editor") as client:
        id_like = "a" + str(uuid.uuid4())[1:]
        errors = problem(client.post("/v1/pipelines", json=spec(name=id_like)), 422, "invalid-request")["errors"]
        assert errors[0]["pointer"] == "/name"


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"\xff\xfe",
        b"null",
        b'"\\ud800"',
        b"[" * 100_000,
        json.dumps({**SPEC, "name": "lone", "\ud800": 1}).encode(),
        json.dumps(spec(title="\ud800")).encode(),
        json.dumps(
            spec(steps=[{**SPEC["steps"][0], "parameters": {"\ud800": "\udfff"}}], outputs={"mask": "organs.mask"})
        ).encode(),
        json.dumps(
            spec(steps=[{**SPEC["steps"][0], "parameters": {"step_size": float("nan")}}], outputs={"mask": "organs.mask"})
        ).encode(),
        json.dumps(
            spec(steps=[{**SPEC["steps"][0], "timeout_seconds": float("inf")}], outputs={"mask": "organs.mask"})
        ).encode(),
    ],
)
def test_bodies_that_are_none(gateway: Gateway, content: bytes) -> None:
    with gateway.client("ed", "editor") as client:
        answer = client.post("/v1/pipelines", content=content, headers={"Content-Type": "application/json"})
        assert answer.status_code == 422, answer.text
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.json()["type"] in {"urn:scangraph:problem:invalid-request", "urn:scangraph:problem:invalid-pipeline"}
