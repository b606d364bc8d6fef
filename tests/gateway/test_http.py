"""The HTTP door of a real service."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import time
from pathlib import Path, PurePosixPath
from typing import Any

import httpx
import nibabel
import numpy as np
import psutil
import pytest

from deployments.imageio.nifti import read_nifti, write_nifti
from scangraph.accounts_cli import local_token
from scangraph.contracts import LabelMap, label_table
from scangraph.contracts.errors import AlreadyWritten
from scangraph.phantoms import Phantom
from scangraph.settings import Settings
from scangraph.storage import open_storage


@pytest.fixture(scope="module")
def client(service: str, service_settings: Settings) -> Any:
    headers = {"Authorization": f"Bearer {local_token(service_settings, minutes=120)}"}
    with httpx.Client(base_url=service, timeout=300, headers=headers) as client:
        yield client


class Shelf:
    """The service's storage, wherever it is."""

    def __init__(self, settings: Settings) -> None:
        self.at = open_storage(settings.storage, settings.storage_options)

    def put(self, name: str, data: bytes) -> None:
        """Store what is not there yet."""

        async def write() -> None:
            with contextlib.suppress(AlreadyWritten):
                await self.at.write(name, data)

        asyncio.run(write())

    def get(self, name: str) -> bytes:
        """Read."""
        return asyncio.run(self.at.read(name))


@pytest.fixture(scope="module")
def storage(service_settings: Settings, service: str, phantom: Phantom) -> Shelf:
    """The service's storage, with the phantom in it."""
    shelf = Shelf(service_settings)
    for name, volume in phantom.volumes.items():
        shelf.put(f"{name}.nii.gz", write_nifti(volume))
    for name, mask in phantom.truth.items():
        shelf.put(f"true-{name}.nii.gz", write_nifti(mask))
    return shelf


def problem(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = response.json()
    assert body["type"] == f"urn:scangraph:problem:{code}"
    assert body["status"] == status
    assert body["trace_id"]
    assert "Traceback" not in response.text
    return body


def test_health_and_readiness(client: httpx.Client) -> None:
    assert client.get("/healthz").json() == {"status": "ok"}
    ready = client.get("/readyz")
    assert (ready.status_code, ready.json()["not_ready"]) == (200, {})


def test_components_and_labels(client: httpx.Client) -> None:
    items = {c["id"]: c for c in client.get("/v1/components").json()["items"]}
    assert {"inference/totalseg", "inference/vessel", "inference/ureter", "inference/tumor", "smoothing/base"} <= items.keys()
    ureter = items["inference/ureter"]
    assert ureter["inputs"][0]["path_name"] == "image_D_path"
    assert any("delayed" in text for text in ureter["constraints"])
    assert ureter["models"][0]["demo"] is True
    assert client.get("/v1/components/inference/ureter").json() == ureter
    problem(client.get("/v1/components/inference/nothing"), 404, "unknown-component")
    labels = client.get("/v1/labels").json()["items"]
    assert len(labels) == len(label_table())


def test_openapi_describes_every_component(client: httpx.Client) -> None:
    document = client.get("/openapi.json").json()
    assert document["openapi"].startswith("3.1")
    vessel = document["paths"]["/inference/vessel"]["post"]
    assert "portal" in vessel["description"]
    assert "application/problem+json" in vessel["responses"]["422"]["content"]
    assert "/smoothing/preview" not in document["paths"]  # takes a scene, which no path can name
    assert client.get("/docs").status_code == 200


def test_the_main_job_by_http(client: httpx.Client, storage: Shelf, phantom: Phantom) -> None:
    """CT in, mask and scene out; what is known is not computed again, and a model is loaded once."""
    body = {"image_D_path": "delayed.nii.gz"}
    first = client.post("/inference/ureter", json=body)
    assert first.status_code == 200, first.text
    second = client.post("/inference/ureter", json=body).json()
    assert (first.json()["attempts"], second["attempts"]) == (1, 0)
    third = client.post("/inference/ureter", json={**body, "step_size": 0.6}).json()
    assert third["attempts"] == 1
    assert third["facts"]["model_loaded"] is False
    assert second["mask_path"] != first.json()["mask_path"]  # results are never overwritten
    masks = [read_nifti(storage.get(a["mask_path"]), "m.nii.gz", as_mask=True) for a in (first.json(), second)]
    assert np.array_equal(masks[0].array, masks[1].array)
    used = client.get("/v1/components/inference/ureter").json()["models"][0]
    assert (used["sha256"], used["warm"]) == (second["facts"]["model"]["sha256"], True)
    assert third["facts"]["precision"] == "fast"
    assert masks[0].same_grid(phantom.volumes["delayed"])
    assert any("synthetic phantoms" in w for w in second["warnings"])
    assert second["facts"]["model"]["id"] == "ureter-demo"

    merged = client.post("/postprocess/merge", json={"mask_paths": ["true-organs.nii.gz", second["mask_path"]]}).json()
    scene = client.post("/smoothing/base", json={"mask_path": merged["mask_path"]}).json()
    text = storage.get(scene["obj_path"]).decode()
    assert "g ureter" in text
    assert "g kidney_left" in text
    mtl = text.partition("mtllib ")[2].partition("\n")[0]
    assert storage.get(str(PurePosixPath(scene["obj_path"]).with_name(mtl)))


def test_absolute_paths_are_answered_in_kind(client: httpx.Client, storage: Shelf) -> None:
    root = storage.at.local_root
    if root is None:
        pytest.skip("this storage is no folder: it has no absolute paths")
    answer = client.post("/smoothing/base", json={"mask_path": f"{root}/true-vessels.nii.gz", "structures": [204]}).json()
    assert Path(answer["obj_path"]).is_absolute()
    assert Path(answer["obj_path"]).is_relative_to(root)
    assert Path(answer["obj_path"]).read_text().count("\ng ") == 1


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("nothing.nii.gz", 404, "file-not-found"),
        ("../secret", 403, "path-refused"),
        ("/etc/passwd", 403, "path-refused"),
        ("s3://bucket/key", 403, "path-refused"),
        ("text.nii.gz", 415, "unsupported-media"),
        ("cut.nii.gz", 422, "truncated"),
        ("foreign.nii.gz", 422, "unknown-labels"),
    ],
)
def test_bad_files_are_clear_4xx(client: httpx.Client, storage: Shelf, path: str, status: int, code: str) -> None:
    whole = storage.get("true-organs.nii.gz")
    storage.put("text.nii.gz", b"this is text" * 99)
    storage.put("cut.nii.gz", whole[: len(whole) // 2])
    array = np.full((3, 3, 3), 190, np.uint8)
    storage.put("foreign.nii.gz", write_nifti(LabelMap(array, (1, 1, 1), labels=(190,))))
    body = problem(client.post("/smoothing/base", json={"mask_path": path}), status, code)
    assert path.rpartition("/")[2] in body["detail"]


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ({}, "/image_path"),
        ({"image_path": "portal.nii.gz", "surprise": 1}, "/surprise"),
        ({"image_path": 7}, "/image_path"),
        ({"image_path": "portal.nii.gz", "step_size": 9}, "/step_size"),
        ({"image_path": ""}, "/image_path"),
    ],
)
def test_requests_that_do_not_fit_point_at_the_field(client: httpx.Client, body: dict[str, Any], pointer: str) -> None:
    errors = problem(client.post("/inference/tumor", json=body), 422, "invalid-request")["errors"]
    assert pointer in [e["pointer"] for e in errors]


def test_every_other_error_is_a_problem_too(client: httpx.Client) -> None:
    problem(client.get("/nothing"), 404, "not-found")
    problem(client.get("/inference/tumor"), 405, "method-not-allowed")
    problem(client.post("/inference/tumor", content=b"{", headers={"content-type": "application/json"}), 422, "invalid-request")
    problem(client.post("/inference/tumor", content=b"x" * 2_000_000), 413, "body-too-large")

    def chunks() -> Any:
        for _ in range(40):
            yield b"x" * 65536

    problem(client.post("/inference/tumor", content=chunks()), 413, "body-too-large")
    problem(client.post("/inference/tumor", json={"image_path": "a.nii.gz", "model": "none-such"}), 404, "file-not-found")


def test_an_unknown_model_is_named(client: httpx.Client, storage: Shelf) -> None:
    body = problem(
        client.post("/inference/tumor", json={"image_path": "portal.nii.gz", "model": "none-such"}), 404, "model-not-found"
    )
    assert "tumor-demo" in body["detail"]


def test_little_overlap_names_both_extents(client: httpx.Client, storage: Shelf, phantom: Phantom) -> None:
    portal = phantom.volumes["portal"]
    far = type(portal)(portal.array, portal.spacing_mm, (900.0, 0.0, 0.0), portal.direction)
    storage.put("far.nii.gz", write_nifti(far))
    body = {"image_A_path": "arterial.nii.gz", "image_P_path": "far.nii.gz"}
    detail = problem(client.post("/inference/vessel", json=body), 422, "extents-do-not-overlap")["detail"]
    assert "image_A spans" in detail
    assert "image_P spans" in detail


def nnunet_replica() -> psutil.Process:
    """The process that runs the segmentation, found among our own children."""
    for process in psutil.Process().children(recursive=True):
        if any(":nnunet" in part for part in process.cmdline()):
            return process
    raise AssertionError("there is no nnunet replica")


def test_a_killed_replica_is_retried_and_the_next_request_works(client: httpx.Client, storage: Shelf) -> None:
    import threading

    body = {"image_path": "portal.nii.gz", "step_size": 0.25}
    answers: list[httpx.Response] = []
    request = threading.Thread(target=lambda: answers.append(client.post("/inference/totalseg", json=body)))
    request.start()
    time.sleep(3)  # into the tiles; where the machine is faster than that, the kill comes after the answer and nothing is lost
    nnunet_replica().kill()
    request.join(timeout=240)
    (answer,) = answers
    if answer.status_code == 200:
        assert answer.json()["attempts"] >= 1
    else:
        problem(answer, 503, "stage-lost")
    again = client.post("/inference/ureter", json={"image_D_path": "delayed.nii.gz"})
    assert again.status_code == 200, again.text


@pytest.mark.parametrize(
    ("component", "path"),
    [
        ("vessel", "mask_path"),
        ("ureter", "mask_path"),
        ("fat", "mask_paths"),
        ("sample", "mask_path"),
        ("skeleton", "mask_path"),
        ("clean", "mask_path"),
        ("merge", "mask_paths"),
    ],
)
def test_masks_that_do_not_fit_are_named(client: httpx.Client, storage: Shelf, component: str, path: str) -> None:
    """A number outside the table, a structure that is not there, another grid: 422 with the reason, by every component."""
    strange = np.zeros((8, 8, 8), np.uint8)
    strange[2:6, 2:6, 2:6] = 250
    storage.put("strange.nii.gz", gzip.compress(nibabel.Nifti1Image(strange, np.diag([2, 2, 2, 1])).to_bytes()))
    lung = LabelMap(np.where(strange, 10, 0).astype(np.uint8), (2, 2, 2), labels=(10,))
    storage.put("lung.nii.gz", write_nifti(lung))

    def ask(name: str, **body: Any) -> httpx.Response:
        return client.post(f"/postprocess/{component}", json={path: [name] if path == "mask_paths" else name, **body})

    assert "250" in problem(ask("strange.nii.gz"), 422, "unknown-labels")["detail"]
    if component in {"vessel", "ureter", "fat", "sample"}:
        problem(ask("lung.nii.gz"), 422, "labels-missing")
    elif component != "merge":  # they take any structure, and name the wished ones that are not there
        body = problem(ask("lung.nii.gz", structures=[63]), 422, "labels-missing")
        assert "inferior_vena_cava" in body["detail"]
    if path == "mask_paths":
        both = {path: ["lung.nii.gz", "true-organs.nii.gz"], **({"resample": False} if component == "merge" else {})}
        body = problem(client.post(f"/postprocess/{component}", json=both), 422, "grids-differ")
        assert "8×8×8 voxels of 2×2×2 mm" in body["detail"]
