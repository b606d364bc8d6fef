"""Executions over HTTP: accepted, looked at, cancelled, retried; the tests do the executor's part."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

import scangraph
from deployments.imageio.nifti import write_nifti
from scangraph.contracts import Scene, SceneFiles, Surface
from scangraph.contracts.errors import AlreadyWritten
from scangraph.scenefiles import SceneManifest, write_scene
from scangraph.store import executions
from scangraph.store.executions import NewFile
from tests.conftest import constant_volume
from tests.gateway.conftest import Gateway, mask_bytes, problem

ORGANS = "inference-totalseg"


def post(client: httpx.Client, file_id: str, pipeline: str = ORGANS, headers: Any = None, **more: Any) -> httpx.Response:
    body = {"pipeline_id": pipeline, "inputs": {"image": file_id}, **more}
    return client.post("/v1/executions", json=body, headers=headers)


def begin(client: httpx.Client, file_id: str, **more: Any) -> str:
    answer = post(client, file_id, **more)
    assert answer.status_code == 202, answer.text
    return str(answer.json()["execution_id"])


def clear(gateway: Gateway) -> None:
    """End what waits, so that the next one in the queue is the test's own."""
    for row in gateway.run(executions.list_executions(gateway.store, state="pending", limit=10_000)):
        gateway.run(executions.request_cancel(gateway.store, row.id))


def test_life_of_an_execution(gateway: Gateway) -> None:
    clear(gateway)
    with gateway.client() as client, gateway.client(replica=1) as elsewhere:
        image, woken = gateway.upload(client), gateway.woken
        answer = post(client, image, "organs", parameters={"step_size": 0.6, "steps": {"scene": {"frame": "RAS"}}})
        assert answer.status_code == 202, answer.text
        assert (answer.json()["status"], answer.json()["queue_position"]) == ("pending", 1)
        execution_id = answer.json()["execution_id"]
        assert answer.headers["Location"] == f"/v1/executions/{execution_id}"
        assert int(answer.headers["Retry-After"]) > 0
        assert gateway.woken > woken

        address = answer.headers["Location"]
        view = elsewhere.get(address)
        assert "Retry-After" in view.headers
        body = view.json()
        assert (body["status"], body["pipeline"], body["revision"], body["priority"]) == ("pending", "organs", 1, "normal")
        assert [s["status"] for s in body["steps"]] == ["pending", "pending"]
        assert body["parameters"]["steps"]["organs"] == {"step_size": 0.6}
        assert body["inputs"]["image"]["file_id"] == image

        claim = gateway.claim(execution_id)
        gateway.run(executions.write_down(gateway.store, claim, [executions.StepStarted("organs")]))
        gateway.progress(claim, "organs", 5)
        body = client.get(address).json()
        assert (body["status"], body["current_step"], body["progress_percentage"]) == ("running", "organs", 25.0)
        assert body["steps"][0]["progress"] == {"done": 5, "total": 10, "message": "tiles"}

        gateway.complete(claim)
        view = client.get(address)
        assert "Retry-After" not in view.headers
        body = view.json()
        assert (body["status"], body["progress_percentage"], body["current_step"]) == ("completed", 100, None)
        assert body["warnings"] == ["cut at the border"]
        assert {f["name"] for f in body["output_files"]} == {"mask", "scene"}
        for file in body["output_files"]:
            assert client.get(file["download_url"]).content == file["name"].encode()
        assert body["created_at"] < body["started_at"] < body["completed_at"]
        assert all(s["started_at"] <= s["completed_at"] for s in body["steps"])

        lineage = client.get(f"{address}/provenance").json()
        assert lineage["inputs"]["image"]["sha256"] == client.get(f"/v1/files/{image}/metadata").json()["sha256"]
        assert lineage["pipeline"]["spec"] == client.get("/v1/pipelines/organs").json()["spec"]
        assert [(s["component"], s["result_key"], s["cached"]) for s in lineage["steps"]] == [
            ("inference/totalseg", "k", False), ("smoothing/base", "k", False),
        ]  # fmt: skip
        assert lineage["steps"][0]["model"] == {"id": "m", "version": "2"}
        assert {o["name"]: o["steps"] for o in lineage["outputs"]} == {"mask": ["organs"], "scene": ["organs", "scene"]}
        assert {o["sha256"] for o in lineage["outputs"]} == {f["sha256"] for f in body["output_files"]}


def test_every_file_of_a_scene_is_listed_and_fetched(gateway: Gateway, tmp_path: Path) -> None:
    clear(gateway)
    vertices, faces = np.eye(4, 3) * 10, [[0, 2, 1], [0, 1, 3], [1, 2, 3], [2, 0, 3]]
    thing = Surface("tumor", 202, (232, 194, 46), np.array(vertices), np.array(faces), {"mesh_volume_ml": 0.17})
    scene = Scene((thing,), files=SceneFiles(("glb", "stl", "ply", "obj")))
    with gateway.client() as client:
        execution_id = begin(client, gateway.upload(client), pipeline="organs")
        claim = gateway.claim(execution_id)
        for step in claim.spec.steps:
            gateway.step(claim, step.id)
        imageio: Any = gateway.services[0].gate
        saved = gateway.run(imageio.save(scene, "scene", f"results/{execution_id}/scene"))
        files = [NewFile(output="scene", **entry) for entry in saved]
        assert gateway.run(executions.complete(gateway.store, claim, files, None))

        listed = client.get(f"/v1/executions/{execution_id}").json()["output_files"]
        expected = write_scene(scene, "scene")
        assert [file["filename"] for file in listed] == list(expected)
        assert [file["kind"] for file in listed] == ["scene", None, "scene", "scene", "scene", None]
        for file in listed:
            answer = client.get(file["download_url"])
            assert answer.content == expected[file["filename"]]
            assert answer.headers["content-type"] == file["media_type"]
            assert f'filename="{file["filename"]}"' in answer.headers["content-disposition"]
        glb = next(file for file in listed if file["filename"] == "scene.glb")
        assert glb["media_type"] == "model/gltf-binary"
        told = client.get(f"/v1/files/{glb['file_id']}/metadata").json()
        assert (told["kind"], told["metadata"]["unit"], told["metadata"]["surfaces"]) == ("glb", "m", ["tumor"])
    with scangraph.Client(gateway.urls[0], token=gateway.token()) as typed:
        paths = typed.fetch(execution_id, tmp_path)["scene"]
    assert {path.name: path.read_bytes() for path in paths} == expected
    manifest = SceneManifest.model_validate_json(expected["scene.manifest.json"])
    assert manifest.structures[0].measures == {"mesh_volume_ml": 0.17}


def test_a_form_brings_its_files(gateway: Gateway) -> None:
    with gateway.client() as client:
        data = write_nifti(constant_volume(3))
        one = {"image_A": ("a.nii.gz", data), "image_P": ("p.nii.gz", data)}
        fields = {"pipeline_id": "inference-vessel", "parameters": '{"step_size": 0.7}', "priority": "high"}
        answer = client.post("/v1/executions", data=fields, files=one)
        assert answer.status_code == 202, answer.text
        body = client.get(answer.headers["Location"]).json()
        assert (body["priority"], body["parameters"]) == ("high", {"steps": {"run": {"step_size": 0.7}}})
        assert body["inputs"].keys() == {"image_A", "image_P"}
        assert body["inputs"]["image_A"]["sha256"] == hashlib.sha256(data).hexdigest()

        # `input_files` fill the inputs in the pipeline's order, beside what has a name.
        listed = [("input_files", (f"{name}.nii.gz", data)) for name in ("arterial", "portal")]
        named = [("delayed", ("late.nii.gz", data))]
        answer = client.post("/v1/executions", data={"pipeline_id": "renal-planning"}, files=listed + named)
        assert answer.status_code == 202, answer.text
        inputs = client.get(answer.headers["Location"]).json()["inputs"]
        names = {name: client.get(f"/v1/files/{e['file_id']}/metadata").json()["filename"] for name, e in inputs.items()}
        assert names == {"arterial": "arterial.nii.gz", "portal": "portal.nii.gz", "delayed": "late.nii.gz"}

        masks = [("input_files", (f"{n}.nii.gz", mask_bytes())) for n in range(3)]
        answer = client.post("/v1/executions", data={"pipeline_id": "postprocess-merge"}, files=masks)
        assert answer.status_code == 202, answer.text
        assert len(client.get(answer.headers["Location"]).json()["inputs"]["masks"]) == 3


def test_a_form_that_is_refused_leaves_nothing(gateway: Gateway) -> None:
    data = write_nifti(constant_volume(4))
    with gateway.client("fay") as client:

        def refused(fields: Any, files: Any, status: int, code: str) -> None:
            problem(client.post("/v1/executions", data=fields, files=files), status, code)

        image = [("image", ("ct.nii.gz", data))]
        refused({"pipeline_id": "no-such-pipeline"}, image, 404, "not-found")
        refused({"pipeline_id": ORGANS}, [*image, ("more", ("b.nii.gz", data))], 422, "invalid-inputs")
        refused({"pipeline_id": ORGANS}, image * 2, 422, "invalid-inputs")
        refused({"pipeline_id": ORGANS}, [("input_files", ("a.nii.gz", data))] * 2, 422, "invalid-inputs")
        refused({"pipeline_id": ORGANS, "parameters": '{"step_size": 9}'}, image, 422, "invalid-inputs")
        refused({"pipeline_id": ORGANS, "parameters": "{"}, image, 422, "invalid-inputs")
        refused({"pipeline_id": ORGANS, "priority": "urgent"}, image, 422, "invalid-request")
        refused({}, image, 422, "invalid-request")
        refused({"pipeline_id": ORGANS}, {"image": ("ct.nii.gz", data[: len(data) // 2])}, 422, "truncated")
        assert client.get("/v1/files").json()["items"] == []
        storage = gateway.services[0].storage

        async def kept() -> list[str]:
            return [stat.name async for stat in storage.list("files/") if await storage.read(stat.name) == data]

        assert gateway.run(kept()) == []


def picture() -> bytes:
    file = io.BytesIO()
    Image.new("L", (4, 4)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("inputs", "pointers"),
    [
        ({}, ["/inputs/image"]),
        ({"image": []}, ["/inputs/image"]),
        ({"image": ["here.nii.gz"]}, ["/inputs/image"]),
        ({"image": "here.nii.gz", "film": "here.nii.gz"}, ["/inputs/film"]),
        ({"image": {}}, ["/inputs/image"]),
        ({"image": {"file_id": "a", "path": "b"}}, ["/inputs/image"]),
    ],
)
def test_inputs_that_do_not_fit_are_pointed_at(gateway: Gateway, inputs: Any, pointers: list[str]) -> None:
    with contextlib.suppress(AlreadyWritten):
        gateway.put("here.nii.gz", b"there is something")
    with gateway.client() as client:
        answer = client.post("/v1/executions", json={"pipeline_id": ORGANS, "inputs": inputs})
        assert [e["pointer"] for e in problem(answer, 422, "invalid-inputs")["errors"]] == pointers


def test_kinds_and_parameters_are_checked(gateway: Gateway) -> None:
    with gateway.client() as client:
        image = gateway.upload(client)
        png = client.post("/v1/files", files={"file": ("a.png", picture())}).json()["id"]
        mask = client.post("/v1/files", files={"file": ("m.nii.gz", mask_bytes())}).json()["id"]
        errors = problem(post(client, png), 422, "invalid-inputs")["errors"]
        assert errors[0]["pointer"] == "/inputs/image"
        assert "image" in errors[0]["detail"]
        merge = {"pipeline_id": "postprocess-merge", "inputs": {"masks": [mask, {"file_id": mask, "label_scheme": "kits"}]}}
        answer = client.post("/v1/executions", json=merge)
        assert answer.status_code == 202, answer.text
        given = client.get(answer.headers["Location"]).json()["inputs"]["masks"]
        assert [entry["label_scheme"] for entry in given] == [None, "kits"]
        errors = problem(post(client, image, parameters={"step_size": 9, "more": 1}), 422, "invalid-inputs")["errors"]
        assert [e["pointer"] for e in errors] == ["/parameters/more", "/parameters/step_size"]
        problem(post(client, image, "nothing"), 404, "not-found")
        problem(post(client, image, f"{ORGANS}@2"), 404, "not-found")
        problem(post(client, str(uuid.uuid4())), 404, "not-found")
        problem(client.post("/v1/executions", content=b"x", headers={"Content-Type": "text/plain"}), 415, "unsupported-media")
        for content in (b"", b"{", b"\xff", b"[" * 100_000, b'{"pipeline_id": "\\ud800", "inputs": {}}'):
            headers = {"Content-Type": "application/json"}
            assert client.post("/v1/executions", content=content, headers=headers).status_code == 422, content[:20]


def test_paths_are_the_storages_own_and_nobody_elses(gateway: Gateway) -> None:
    data = write_nifti(constant_volume(5))
    gateway.put(f"shared/{uuid.uuid4()}.nii.gz", data)
    name = f"in/{uuid.uuid4()}.nii.gz"
    gateway.put(name, data)
    root = gateway.services[0].storage.local_root
    with gateway.client() as ann, gateway.client("bob") as bob, gateway.client("root", "admin") as admin:
        for path in (name, {"path": name}, *([f"{root}/{name}"] if root else [])):
            found = ann.get(f"/v1/executions/{begin(ann, path)}").json()["inputs"]["image"]  # type: ignore[arg-type]
            assert (found["path"], found["file_id"]) == (name, None)
        problem(post(ann, "in/nothing.nii.gz"), 404, "file-not-found")
        for path in ("../x.nii.gz", "/etc/passwd", "s3://b/x"):
            problem(post(ann, path), 403, "path-refused")
        image = gateway.upload(ann)
        stored = ann.get(f"/v1/files/{image}/metadata").json()["path"]
        own = ann.get(f"/v1/executions/{begin(ann, stored)}").json()["inputs"]["image"]
        assert own["file_id"] == image  # a path below files/ is its record
        assert begin(admin, stored)
        problem(post(bob, stored), 404, "not-found")
        problem(post(bob, image), 404, "not-found")
        for path in (f"files/{uuid.uuid4()}/x.nii.gz", "steps/x/mask", "uploads/x", f"results/{uuid.uuid4()}/x"):
            problem(post(bob, path), 404, "not-found")


def test_only_ones_own_are_there(gateway: Gateway) -> None:
    with gateway.client() as ann, gateway.client("bob") as bob, gateway.client("root", "admin") as admin:
        execution_id = begin(ann, gateway.upload(ann))
        address = f"/v1/executions/{execution_id}"
        for method, path in (("GET", ""), ("GET", "/provenance"), ("POST", "/cancel"), ("POST", "/retry")):
            problem(bob.request(method, address + path), 404, "not-found")
            problem(httpx.request(method, gateway.urls[0] + address + path), 401, "unauthenticated")
        with gateway.client("vic", "viewer") as vic:
            problem(post(vic, "x"), 403, "forbidden")
            problem(vic.post(f"{address}/cancel"), 403, "forbidden")
            problem(vic.post(f"{address}/retry"), 403, "forbidden")
            assert vic.get("/v1/executions").json()["items"] == []
        assert admin.get(address).json()["execution_id"] == execution_id

        def listed(client: httpx.Client, **params: Any) -> list[str]:
            return [
                item["execution_id"] for item in client.get("/v1/executions", params={"limit": 200, **params}).json()["items"]
            ]

        owner = gateway.account("ann", "operator").id
        assert execution_id in listed(ann)
        assert execution_id in listed(admin)
        assert execution_id in listed(admin, owner=owner)
        assert execution_id in listed(ann, owner=owner)
        assert execution_id not in listed(bob)
        assert execution_id not in listed(admin, owner=gateway.account("bob", "operator").id)
        problem(bob.get("/v1/executions", params={"owner": owner}), 403, "forbidden")
        assert admin.post(f"{address}/cancel").status_code == 202


def test_lists_are_filtered(gateway: Gateway) -> None:
    clear(gateway)
    with gateway.client("lia") as client:
        image, begun = gateway.upload(client), datetime.now(UTC)
        waiting = begin(client, image, priority="low")
        failed = begin(client, image, pipeline="organs", priority="high")
        gateway.fail(gateway.claim(failed), "organs")

        def listed(**params: Any) -> set[str]:
            answer = client.get("/v1/executions", params=params)
            assert answer.status_code == 200, answer.text
            return {item["execution_id"] for item in answer.json()["items"]}

        assert listed() == {waiting, failed}
        assert listed(status="failed") == {failed} == listed(pipeline="organs") == listed(priority="high")
        assert listed(pipeline=client.get(f"/v1/pipelines/{ORGANS}").json()["id"]) == {waiting}
        assert listed(created_after=begun.isoformat()) == {waiting, failed}
        assert listed(created_before=begun.isoformat()) == set()
        later = (begun + timedelta(hours=1)).replace(tzinfo=None)
        assert listed(created_after=later.isoformat()) == set()  # without a zone: UTC
        for far in ("0001-01-01T00:00:00+23:59", "9999-12-31T23:59:59-23:59"):
            assert client.get("/v1/executions", params={"created_after": far}).status_code in {200, 422}
        for bad in ({"status": "done"}, {"limit": 201}, {"limit": 0}, {"created_after": "yesterday"}):
            problem(client.get("/v1/executions", params=bad), 422, "invalid-request")
        problem(client.get("/v1/executions", params={"cursor": "x"}), 422, "invalid-cursor")


def test_pages_have_no_gaps_and_no_repeats_while_new_ones_come(gateway: Gateway) -> None:
    with gateway.client("pam") as client, gateway.client("pam", replica=1) as other:
        image = gateway.upload(client)
        before = [begin(client, image) for _ in range(9)]
        stop, more = threading.Event(), []

        def insert() -> None:
            while not stop.is_set():
                more.append(begin(other, image))

        thread = threading.Thread(target=insert)
        thread.start()
        try:
            seen: list[str] = []
            address: str | None = "/v1/executions?limit=2&status=pending"
            while address:
                page = client.get(address)
                seen += [item["execution_id"] for item in page.json()["items"]]
                address = page.links.get("next", {}).get("url")
        finally:
            stop.set()
            thread.join()
        assert len(seen) == len(set(seen))
        assert [i for i in seen if i in before] == before[::-1]


def test_one_key_is_one_execution(gateway: Gateway) -> None:
    """Race: fifty at once, on both replicas."""
    with gateway.client("ida") as one, gateway.client("ida", replica=1) as other:
        image, headers = gateway.upload(one), {"Idempotency-Key": str(uuid.uuid4())}
        with ThreadPoolExecutor(50) as pool:
            answers = list(pool.map(lambda n: post((one, other)[n % 2], image, headers=headers), range(50)))
        assert {a.status_code for a in answers} == {202}, [a.text for a in answers if a.status_code != 202][:1]
        assert len({a.json()["execution_id"] for a in answers}) == 1
        assert sum("Idempotency-Replayed" not in a.headers for a in answers) == 1
        assert len(one.get("/v1/executions").json()["items"]) == 1
        problem(post(one, image, headers=headers, priority="high"), 422, "idempotency-mismatch")
        with gateway.client("bob") as bob:  # a key is its account's
            assert "Idempotency-Replayed" not in post(bob, gateway.upload(bob), headers=headers).headers
        problem(post(one, image, headers={"Idempotency-Key": "x" * 256}), 422, "invalid-request")
        problem(post(one, image, headers={"Idempotency-Key": ""}), 422, "invalid-request")


def test_a_key_answers_the_same_after_its_file_is_gone(gateway: Gateway) -> None:
    with gateway.client("ivy") as client:
        image, headers = gateway.upload(client), {"Idempotency-Key": str(uuid.uuid4())}
        first = post(client, image, headers=headers).json()["execution_id"]
        client.post(f"/v1/executions/{first}/cancel")
        assert client.delete(f"/v1/files/{image}").status_code == 204
        again = post(client, image, headers=headers)
        assert (again.status_code, again.json()["execution_id"]) == (202, first), again.text
        assert again.json()["status"] == "cancelled"
        problem(post(client, image), 404, "not-found")


def test_a_key_holds_for_forms_and_their_files(gateway: Gateway) -> None:
    with gateway.client("ira") as client:
        headers, fields = {"Idempotency-Key": str(uuid.uuid4())}, {"pipeline_id": ORGANS}

        def send(value: int) -> httpx.Response:
            files = {"image": ("ct.nii.gz", write_nifti(constant_volume(value)))}
            return client.post("/v1/executions", data=fields, files=files, headers=headers)

        first, again = send(1), send(1)
        assert (first.status_code, again.status_code) == (202, 202), again.text
        assert first.json()["execution_id"] == again.json()["execution_id"]
        assert again.headers["Idempotency-Replayed"] == "true"
        problem(send(2), 422, "idempotency-mismatch")
        assert len(client.get("/v1/files").json()["items"]) == 1  # what came twice is gone again


def test_a_full_queue_says_when_to_come_again(fresh: Callable[..., Gateway]) -> None:
    gateway = fresh(executor={"max_pending": 5, "max_pending_per_account": 3})
    with gateway.client() as ann, gateway.client("bob") as bob:
        mine, his = gateway.upload(ann), gateway.upload(bob)
        headers = {"Idempotency-Key": "k"}
        first = begin(ann, mine, headers=headers)
        begin(ann, mine)
        begin(ann, mine)
        answer = post(ann, mine)
        problem(answer, 429, "queue-full")
        assert int(answer.headers["Retry-After"]) > 0
        assert begin(ann, mine, headers=headers) == first  # what was accepted stays accepted
        begin(bob, his)
        begin(bob, his)
        problem(post(bob, his), 429, "queue-full")  # in all
        problem(bob.post("/smoothing/base", json={"mask_path": "m.nii.gz"}), 404, "file-not-found")
        with gateway.client("bob") as again:
            form = {"image": ("ct.nii.gz", write_nifti(constant_volume(7)))}
            problem(again.post("/v1/executions", data={"pipeline_id": ORGANS}, files=form), 429, "queue-full")
            assert len(again.get("/v1/files").json()["items"]) == 1
        assert ann.post(f"/v1/executions/{first}/cancel").status_code == 202
        begin(bob, his)


def test_cancel_and_retry(gateway: Gateway) -> None:
    clear(gateway)
    with gateway.client() as client:
        image = gateway.upload(client)
        waiting = begin(client, image, parameters={"step_size": 0.9}, priority="low")
        problem(client.post(f"/v1/executions/{waiting}/retry"), 409, "not-retryable")
        answer = client.post(f"/v1/executions/{waiting}/cancel")
        assert (answer.status_code, answer.json()["status"]) == (202, "cancelled")
        problem(client.post(f"/v1/executions/{waiting}/cancel"), 409, "already-ended")

        headers = {"Idempotency-Key": str(uuid.uuid4())}
        again = client.post(f"/v1/executions/{waiting}/retry", headers=headers)
        assert again.status_code == 202, again.text
        fresh = again.json()["execution_id"]
        assert again.headers["Location"] == f"/v1/executions/{fresh}"
        assert client.post(f"/v1/executions/{waiting}/retry", headers=headers).json()["execution_id"] == fresh
        old, new = (client.get(f"/v1/executions/{i}").json() for i in (waiting, fresh))
        assert new["retry_of"] == waiting
        assert all(old[key] == new[key] for key in ("pipeline_id", "revision", "inputs", "parameters", "priority"))

        claim = gateway.claim(fresh)
        problem(client.post(f"/v1/executions/{fresh}/retry"), 409, "not-retryable")
        for _ in range(2):  # while it runs, a wish may be said twice
            answer = client.post(f"/v1/executions/{fresh}/cancel")
            assert (answer.status_code, answer.json()["status"]) == (202, "running")
        assert client.get(f"/v1/executions/{fresh}").json()["cancel_requested_at"]
        gateway.run(executions.end_cancelled(gateway.store, claim))
        assert client.get(f"/v1/executions/{fresh}").json()["status"] == "cancelled"

        third = begin(client, image)
        gateway.complete(gateway.claim(third))
        problem(client.post(f"/v1/executions/{third}/cancel"), 409, "already-ended")
        problem(client.post(f"/v1/executions/{third}/retry"), 409, "not-retryable")
        for path in ("cancel", "retry"):
            problem(client.post(f"/v1/executions/{uuid.uuid4()}/{path}"), 404, "not-found")


def test_a_retry_runs_the_revision_that_failed(gateway: Gateway) -> None:
    clear(gateway)
    with gateway.client("ed", "editor") as client:
        spec = {**client.get("/v1/pipelines/organs").json()["spec"], "name": f"p-{uuid.uuid4().hex[:8]}"}
        made = client.post("/v1/pipelines", json=spec)
        failed = begin(client, gateway.upload(client), pipeline=spec["name"])
        gateway.fail(gateway.claim(failed), "organs")
        view = client.get(f"/v1/executions/{failed}").json()
        assert (view["status"], view["error"]["code"]) == ("failed", "out-of-memory")
        assert [s["status"] for s in view["steps"]] == ["failed", "skipped"]
        address, tag = f"/v1/pipelines/{made.json()['id']}", made.headers["ETag"]
        changed = client.put(address, json={**spec, "title": "New"}, headers={"If-Match": tag})
        assert client.delete(address, headers={"If-Match": changed.headers["ETag"]}).status_code == 204
        again = client.post(f"/v1/executions/{failed}/retry").json()["execution_id"]
        assert client.get(f"/v1/executions/{again}").json()["revision"] == 1
        gateway.complete(gateway.claim(again))
        assert client.get(f"/v1/executions/{again}/provenance").json()["pipeline"]["spec"] == spec


def later(seconds: float, work: Callable[[], None]) -> threading.Timer:
    timer = threading.Timer(seconds, work)
    timer.start()
    return timer


def test_who_prefers_waits(gateway: Gateway) -> None:
    clear(gateway)
    with gateway.client() as client:
        image = gateway.upload(client)
        begun = time.monotonic()
        answer = post(client, image, headers={"Prefer": "wait=1"})
        assert (answer.status_code, answer.headers["Preference-Applied"]) == (202, "wait=1")
        assert 0.9 < time.monotonic() - begun < 5
        assert "Preference-Applied" not in post(client, image, headers={"Prefer": "handling=lenient, wait=soon"}).headers
        clear(gateway)
        timer = later(1, lambda: gateway.complete(gateway.claim()))
        answer = post(client, image, headers={"Prefer": "respond-later, wait=30"})
        timer.join()
        assert (answer.status_code, answer.json()["status"]) == (200, "completed"), answer.text
        assert answer.json()["output_files"]


def test_direct_endpoints_go_the_same_road(gateway: Gateway) -> None:
    clear(gateway)
    folder = uuid.uuid4().hex
    gateway.put(f"{folder}/m.nii.gz", mask_bytes())
    root = gateway.services[0].storage.local_root
    with gateway.client() as client:
        for prefix in ("", f"{root}/") if root else ("",):
            path = f"{prefix}{folder}/m.nii.gz"
            timer = later(0.4, lambda: gateway.complete(gateway.claim()))
            answer = client.post("/postprocess/merge", json={"mask_paths": [path], "structures": [2]})
            timer.join()
            assert answer.status_code == 200, answer.text
            body = answer.json()
            assert body["mask_path"] == f"{prefix}results/{body['execution_id']}/mask.bin"
            assert (body["attempts"], body["seconds"], body["warnings"]) == (1, 1.5, ["cut at the border"])
            view = client.get(f"/v1/executions/{body['execution_id']}").json()
            assert (view["pipeline"], view["parameters"]) == ("postprocess-merge", {"steps": {"run": {"structures": [2]}}})

        body = {"mask_path": f"{folder}/m.nii.gz", "label_scheme": "kits"}
        key = {"Idempotency-Key": str(uuid.uuid4())}
        answer = client.post("/smoothing/base", json=body, headers={"Prefer": "respond-async", **key})
        assert (answer.status_code, answer.headers["Preference-Applied"]) == (202, "respond-async")
        execution_id = answer.json()["execution_id"]
        assert answer.headers["Location"] == f"/v1/executions/{execution_id}"
        again = client.post("/smoothing/base", json=body, headers={"Prefer": "wait=0", **key})
        assert (again.status_code, again.json()["execution_id"]) == (202, execution_id)
        assert again.headers["Idempotency-Replayed"] == "true"
        assert client.get(answer.headers["Location"]).json()["inputs"]["mask"]["label_scheme"] == "kits"

        gateway.fail(gateway.claim(execution_id), "run")
        failed = problem(client.post("/smoothing/base", json=body, headers=key), 507, "out-of-memory")
        assert failed["execution_id"] == execution_id
        assert failed["detail"] == "it took 9 GB"

        answer = client.post("/smoothing/base", json=body, headers={"Prefer": "respond-async"})
        timer = later(0.3, lambda: clear(gateway))
        cancelled = client.post("/smoothing/base", json=body)
        timer.join()
        problem(cancelled, 409, "already-ended")
        problem(client.post("/smoothing/base", json={**body, "smoothing": 9}), 422, "invalid-request")
        problem(httpx.post(f"{gateway.urls[0]}/smoothing/base", json=body), 401, "unauthenticated")
        with gateway.client("vic", "viewer") as vic:
            problem(vic.post("/smoothing/base", json=body), 403, "forbidden")


def test_who_leaves_does_not_cancel(gateway: Gateway) -> None:
    clear(gateway)
    name = f"{uuid.uuid4().hex}.nii.gz"
    gateway.put(name, mask_bytes())
    with gateway.client("lea") as client:
        with pytest.raises(httpx.ReadTimeout):
            client.post("/smoothing/base", json={"mask_path": name}, timeout=0.7)
        (item,) = client.get("/v1/executions").json()["items"]
        assert item["status"] == "pending"
        gateway.complete(gateway.claim(item["execution_id"]))
        assert client.get(f"/v1/executions/{item['execution_id']}").json()["status"] == "completed"


def test_estimates_come_from_history_and_are_honest(fresh: Callable[..., Gateway]) -> None:
    gateway = fresh()
    with gateway.client() as client:
        image = gateway.upload(client)
        first = begin(client, image)
        assert client.get(f"/v1/executions/{first}").json()["estimated_completion"] is None  # nothing is known
        claim = gateway.claim(first)
        time.sleep(0.3)
        gateway.complete(claim)
        answer = post(client, image).json()
        estimate = datetime.fromisoformat(answer["estimated_completion"]) - datetime.now(UTC)
        assert timedelta(0) < estimate < timedelta(seconds=5)
        json.dumps(answer)
