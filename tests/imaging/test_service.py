"""2-D images through the whole service: real Ray, real HTTP, the shipped detector."""

from __future__ import annotations

import io
import json
import time
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from models.training.instruments import CLASSES, draw_picture
from scangraph.accounts_cli import local_token
from scangraph.settings import Settings

SEED = 3_000_001


@pytest.fixture(scope="module")
def client(service: str, service_settings: Settings) -> Any:
    token = local_token(service_settings, minutes=60)
    with httpx.Client(base_url=service, timeout=300, headers={"Authorization": f"Bearer {token}"}) as client:
        yield client


def encoded(pixels: Any, file_format: str, **options: Any) -> bytes:
    with io.BytesIO() as out:
        Image.fromarray(pixels).save(out, file_format, **options)
        return out.getvalue()


def upload(client: httpx.Client, data: bytes, name: str) -> dict[str, Any]:
    answer = client.post("/v1/files", files={"file": (name, data)})
    assert answer.status_code == 201, answer.text
    found: dict[str, Any] = answer.json()
    return found


def ended(client: httpx.Client, body: dict[str, Any]) -> dict[str, Any]:
    answer = client.post("/v1/executions", json=body, headers={"Prefer": "wait=120"})
    assert answer.status_code in {200, 202}, answer.text
    url = f"/v1/executions/{answer.json()['execution_id']}"
    while (found := client.get(url).json())["status"] not in {"completed", "failed", "cancelled"}:
        time.sleep(0.05)
    assert found["status"] == "completed", found
    return dict(found)


def opened(client: httpx.Client, url: str) -> Image.Image:
    image = Image.open(io.BytesIO(client.get(url).content))
    image.load()
    return image


def test_resize_ai_detect_by_the_flat_names(client: httpx.Client) -> None:
    picture = draw_picture(SEED, 1920, 1080)
    exif = Image.Exif()
    exif[0x112], exif[0x10E] = 3, "Jane Doe"  # stored upside down
    file = upload(client, encoded(picture.pixels[::-1, ::-1], "JPEG", quality=92, exif=exif), "tray.jpg")
    assert (file["kind"], file["media_type"]) == ("image2d", "image/jpeg")
    metadata = client.get(f"/v1/files/{file['id']}/metadata").json()["metadata"]
    assert {name: metadata[name] for name in ("width", "height", "pages", "bits")} == {
        "width": 1920, "height": 1080, "pages": 1, "bits": 8,
    }  # fmt: skip
    parameters = {"resize_width": 960, "ai_model": "instruments-demo", "output_format": "webp"}
    found = ended(client, {"pipeline_id": "resize-ai-detect", "inputs": {"image": file["id"]}, "parameters": parameters})
    outputs = {entry["name"]: entry for entry in found["output_files"]}
    assert {name: (entry["kind"], entry["media_type"]) for name, entry in outputs.items() if name != "manifest"} == {
        "image": ("image2d", "image/webp"),
        "boxes": ("report", "application/json"),
    }
    assert outputs["image"]["filename"] == "image.webp"
    assert any("demonstration" in warning for warning in found["warnings"])
    drawn = opened(client, outputs["image"]["download_url"])
    assert (drawn.format, drawn.size) == ("WEBP", (960, 540))
    assert b"Jane" not in client.get(outputs["image"]["download_url"]).content
    (page,) = json.loads(client.get(outputs["boxes"]["download_url"]).content)["pages"]
    assert (page["width"], page["height"]) == (960, 540)
    truth = [(CLASSES[kind], box / 2) for kind, box in zip(picture.classes, picture.boxes, strict=True)]
    right = [any(name == box["name"] and iou(box["box"], true) > 0.5 for name, true in truth) for box in page["boxes"]]
    assert sum(right) >= len(truth) / 2  # upright, in the resized image's pixels, by a network that is small


def iou(a: Any, b: Any) -> float:
    shared = np.prod(np.maximum(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0))
    return float(shared / (np.prod(np.subtract(a[2:], a[:2])) + np.prod(np.subtract(b[2:], b[:2])) - shared))


def test_the_endpoints_work_by_themselves(client: httpx.Client) -> None:
    grey = np.random.default_rng(0).integers(0, 65536, (40, 60), np.uint16)
    path = upload(client, encoded(grey, "TIFF"), "x-ray.tif")["path"]

    def run(name: str, **body: Any) -> dict[str, Any]:
        answer = client.post(f"/image/{name}", json={"image_path": path, **body})
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def stored(path: str) -> Image.Image:
        found = next(f for f in client.get("/v1/files", params={"limit": 100}).json()["items"] if f["path"] == path)
        return opened(client, f"/v1/files/{found['id']}")

    small = stored(run("resize", width=30)["image_path"])
    assert (small.format, small.size, small.mode) == ("TIFF", (30, 20), "I;16")
    mean = grey.reshape(20, 2, 30, 2).mean(axis=(1, 3))
    assert np.abs(np.asarray(small) - mean).max() <= 0.51
    same = stored(run("convert", format="png")["image_path"])
    assert same.format == "PNG"
    assert np.array_equal(np.asarray(same), grey)
    assert np.array_equal(np.asarray(stored(run("filter", filter="invert")["image_path"])), 65535 - grey)
    lossy = run("convert", format="jpeg", quality=50)
    assert stored(lossy["image_path"]).format == "JPEG"
    assert "16" in lossy["warnings"][0]
    assert json.loads(client.get(f"/v1/executions/{run('detect')['execution_id']}").text)["status"] == "completed"


def problem(answer: httpx.Response, status: int, code: str) -> str:
    assert (answer.status_code, answer.json().get("type")) == (status, f"urn:scangraph:problem:{code}"), answer.text
    return str(answer.json()["detail"])


def test_what_does_not_fit_is_told_and_nothing_is_lost(client: httpx.Client) -> None:
    jpeg = encoded(draw_picture(SEED, 320, 240).pixels, "JPEG")
    file = upload(client, jpeg, "a.jpg")
    before = len(client.get("/v1/files", params={"limit": 100}).json()["items"])
    problem(client.post("/v1/files", files={"file": ("a.jpg", jpeg[:-3000])}), 422, "truncated")
    problem(client.post("/v1/files", files={"file": ("a.png", b"\x89PNG\r\n\x1a\n" + bytes(50))}), 422, "integrity")
    detail = problem(
        client.post("/v1/executions", json={"pipeline_id": "organs", "inputs": {"image": file["id"]}}), 422, "invalid-inputs"
    )
    assert "image2d" in detail
    problem(client.post("/inference/totalseg", json={"image_path": file["path"]}), 422, "invalid-inputs")
    assert "width" in problem(client.post("/image/resize", json={"image_path": file["path"]}), 422, "invalid-inputs")
    problem(client.post("/image/filter", json={"image_path": file["path"], "filter": "magic"}), 422, "invalid-request")
    assert "scissors" in problem(
        client.post("/image/detect", json={"image_path": file["path"], "classes": ["unicorn"]}), 422, "invalid-parameters"
    )
    problem(client.post("/image/detect", json={"image_path": file["path"], "model": "none"}), 404, "model-not-found")
    problem(client.post("/image/resize", json={"image_path": file["path"], "width": 60000}), 413, "too-many-pixels")
    assert len(client.get("/v1/files", params={"limit": 100}).json()["items"]) == before


def test_the_detector_is_listed(client: httpx.Client) -> None:
    listed = {entry["id"]: entry for entry in client.get("/v1/components").json()["items"]}
    assert {"image/resize", "image/filter", "image/convert", "image/detect"} <= listed.keys()
    (model,) = listed["image/detect"]["models"]
    assert (model["id"], model["demo"], model["classes"]) == ("instruments-demo", True, list(CLASSES))
    assert listed["image/detect"]["pipeline"] == "image-detect"
