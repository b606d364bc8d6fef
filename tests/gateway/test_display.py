"""Copies for screens over HTTP: made once, kept, shared by equal files, and gone with the last of them."""

from __future__ import annotations

import asyncio
import gzip
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from deployments.imageio.nifti import read_nifti, write_nifti
from deployments.imageio.pictures import PictureLimits, read_picture, write_picture
from deployments.smoothing.surfaces import Options, label_map_to_scene
from scangraph.contracts import Image2D, LabelMap, Volume
from scangraph.store import executions, now
from scangraph.store import files as records
from tests.gateway.conftest import Gateway, problem


def ct(seed: int = 0) -> Volume:
    """A small CT whose voxels differ, 120 long on one side."""
    array = np.random.default_rng(seed).integers(-1000, 1000, (6, 8, 120)).astype(np.int16)
    return Volume(array, (3.0, 1.0, 0.5), (10.0, 20.0, 30.0))


def mask() -> LabelMap:
    array = np.zeros((6, 8, 120), np.uint8)
    array[2:4, 2:6, 10:90] = 2
    return LabelMap(array, (3.0, 1.0, 0.5), (10.0, 20.0, 30.0), labels=(2,))


def sent(client: httpx.Client, value: Volume | bytes, name: str = "ct.nii.gz") -> str:
    data = value if isinstance(value, bytes) else write_nifti(value)
    answer = client.post("/v1/files", files={"file": (name, data)})
    assert answer.status_code == 201, answer.text
    return str(answer.json()["download_url"])


def kept(gateway: Gateway) -> list[str]:
    """Names of all copies."""

    async def names() -> list[str]:
        return [stat.name async for stat in gateway.services[0].storage.list("display")]

    return sorted(gateway.run(names()))


@pytest.fixture
def alone(fresh: Callable[..., Gateway]) -> Gateway:
    return fresh()


@pytest.fixture
def two(fresh: Callable[..., Gateway]) -> Gateway:
    return fresh(replicas=2)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(disk)], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("only root can mount a small disk")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_copy_of_an_image_lies_where_the_image_lies(alone: Gateway) -> None:
    with alone.client() as client:
        url = sent(client, ct())
        answer = client.get(f"{url}/display?max=99")  # rounded down to 50
        assert answer.status_code == 200
        assert answer.headers["content-type"] == "application/gzip"
        assert "ct.display.nii.gz" in answer.headers["content-disposition"]
        assert answer.headers["x-content-type-options"] == "nosniff"
        copy, whole = read_nifti(answer.content, "a.nii.gz"), ct()
        assert copy.shape == (6, 8, 40)
        assert copy.spacing_mm == (3.0, 1.0, 1.5)
        assert np.allclose(copy.index_to_world((0, 0, 0)), whole.index_to_world((0, 0, 1)))
        assert np.allclose(copy.array, whole.array.reshape(6, 8, 40, 3).mean(axis=-1), atol=0.51)
        assert len(kept(alone)) == 1
        full = client.get(f"{url}/display")
        assert np.array_equal(read_nifti(full.content, "a.nii.gz").array, whole.array)
        found = client.get(f"{url}/metadata").json()["metadata"]["intensity"]
        assert (found["min"], found["max"]) == (whole.array.min(), whole.array.max())
        assert found["p01"] < found["p50"] < found["p99"]


def test_a_mask_is_shown_as_one_unless_it_is_wished_otherwise(alone: Gateway) -> None:
    with alone.client() as client:
        url = sent(client, mask(), "organs.nii.gz")
        copy = read_nifti(client.get(f"{url}/display?max=60").content, "a.nii.gz", as_mask=True)
        assert set(np.unique(copy.array).tolist()) == {0, 2}
        as_image = client.get(f"{url}/display?max=60&as=image")
        assert read_nifti(as_image.content, "a.nii.gz").array.dtype == np.int16
        assert len(kept(alone)) == 2
        refused = client.get(f"{sent(client, ct())}/display?as=mask")
        problem(refused, 422, "invalid-intensity")
        assert len(kept(alone)) == 2


def test_ranges_and_what_the_browser_has(alone: Gateway) -> None:
    with alone.client() as client:
        url = f"{sent(client, ct())}/display"
        whole = client.get(url)
        tag = whole.headers["etag"]
        assert client.get(url, headers={"If-None-Match": tag}).status_code == 304
        part = client.get(url, headers={"Range": "bytes=10-19"})
        assert (part.status_code, part.content) == (206, whole.content[10:20])
        assert part.headers["content-range"] == f"bytes 10-19/{len(whole.content)}"
        assert client.get(url, headers={"Range": "bytes=10-19", "If-Range": '"x"'}).status_code == 200
        beyond = client.get(url, headers={"Range": f"bytes={len(whole.content)}-"})
        problem(beyond, 416, "unsatisfiable-range")
        assert client.get(f"{url}?max=100").headers["etag"] != tag


def test_thumbnails(alone: Gateway) -> None:
    picture = write_picture(Image2D((np.full((300, 600, 3), 90, np.uint8),)))
    with alone.client() as client:
        for value, name, channels in ((ct(), "ct.nii.gz", 1), (mask(), "m.nii.gz", 3), (picture, "photo.png", 3)):
            url = f"{sent(client, value, name)}/thumbnail"
            answer = client.get(url)
            assert (answer.status_code, answer.headers["content-type"]) == (200, "image/png")
            page = read_picture(answer.content, "a.png", "png", PictureLimits()).pages[0]
            assert max(page.shape) <= 256
            assert page.shape[2] == channels
            assert client.get(url, headers={"If-None-Match": answer.headers["etag"]}).status_code == 304
        assert len(kept(alone)) == 3


def test_what_has_no_copy_says_so(alone: Gateway) -> None:
    with alone.client() as client:
        archive = sent(client, b"PK\x03\x04" + bytes(100), "a.zip")
        for what in ("display", "thumbnail"):
            assert "zip" in problem(client.get(f"{archive}/{what}"), 415, "unsupported-media")["detail"]
        picture = sent(client, write_picture(Image2D((np.zeros((4, 4, 1), np.uint8),))), "a.png")
        problem(client.get(f"{picture}/display"), 415, "unsupported-media")
        url = sent(client, ct())
        for wrong in ("max=0", "max=49", "max=401", "max=x", "as=scene"):
            problem(client.get(f"{url}/display?{wrong}"), 422, "invalid-request")
        alone.run(alone.services[0].storage.delete(client.get(f"{url}/metadata").json()["path"]))
        problem(client.get(f"{url}/display"), 404, "file-not-found")
    assert kept(alone) == []


def test_copies_are_as_private_as_their_files(alone: Gateway) -> None:
    with alone.client("ann") as ann, alone.client("bob") as bob, alone.client("root", "admin") as root:
        url = sent(ann, ct())
        assert ann.get(f"{url}/display").status_code == 200
        for what in ("display", "thumbnail"):
            problem(bob.get(f"{url}/{what}"), 404, "not-found")
            assert root.get(f"{url}/{what}").status_code == 200
            assert httpx.get(f"{alone.urls[0]}{url}/{what}").status_code == 401


def test_it_is_made_once_however_many_ask(two: Gateway) -> None:
    """In one replica; the other one may make it, too, and then finds it or throws its own away."""
    made: list[int] = []
    for number, services in enumerate(two.services):

        async def counted(*arguments: Any, own: Any = services.gate.derive, number: int = number) -> dict[str, Any]:
            made.append(number)
            await asyncio.sleep(0.2)
            found: dict[str, Any] = await own(*arguments)
            return found

        services.gate.derive = counted  # type: ignore[method-assign, assignment]
    with two.client() as first, two.client(replica=1) as second:
        url = sent(first, ct())

        def ask(n: int) -> bytes:
            answer = (first, second)[n % 2].get(f"{url}/display")
            assert answer.status_code == 200, answer.text
            return answer.content

        with ThreadPoolExecutor(12) as pool:
            answers = set(pool.map(ask, range(12)))
        assert len(answers) == 1
        assert sorted(made) == [0, 1]
        assert len(kept(two)) == 1
        assert all(not services.state["copies"] for services in two.services)
        assert ask(0) == ask(1)
        assert len(made) == 2


def test_whoever_leaves_stops_it_for_nobody(alone: Gateway) -> None:
    own = alone.services[0].gate.derive

    async def slow(*arguments: Any) -> dict[str, Any]:
        await asyncio.sleep(0.5)
        return await own(*arguments)

    alone.services[0].gate.derive = slow  # type: ignore[method-assign, assignment]
    with alone.client() as client:
        url = sent(client, ct())
        with pytest.raises(httpx.ReadTimeout):
            client.get(f"{url}/display", timeout=0.1)
        end = time.monotonic() + 10
        while not kept(alone):
            assert time.monotonic() < end
            time.sleep(0.05)
        assert client.get(f"{url}/display").status_code == 200


def test_a_full_storage_serves_without_keeping(fresh: Callable[..., Gateway], small_disk: Path) -> None:
    gateway = fresh(storage_url=small_disk.as_uri())
    array = np.random.default_rng(1).integers(-1000, 1000, (50, 50, 50)).astype(np.int16)
    with gateway.client() as client:
        url = sent(client, Volume(array, (1, 1, 1)))
        for _ in range(2):
            answer = client.get(f"{url}/display")
            assert answer.status_code == 200, answer.text
            assert np.array_equal(read_nifti(answer.content, "a.nii.gz").array, array)
            part = client.get(f"{url}/display", headers={"Range": "bytes=5-8"})
            assert part.content == answer.content[5:9]
        assert kept(gateway) == []


def test_equal_files_share_their_copies_which_go_with_the_last(alone: Gateway) -> None:
    with alone.client("ann") as ann, alone.client("bob") as bob:
        urls = [sent(ann, ct(7)), sent(bob, ct(7))]
        for client, url in zip((ann, bob), urls, strict=True):
            assert client.get(f"{url}/display").status_code == 200
            assert client.get(f"{url}/thumbnail").status_code == 200
        assert len(kept(alone)) == 2
        assert ann.delete(urls[0]).status_code == 204
        assert len(kept(alone)) == 2
        assert bob.get(f"{urls[1]}/display").status_code == 200
        assert bob.delete(urls[1]).status_code == 204
        assert kept(alone) == []


def test_they_go_with_what_expires_and_what_nobody_has_is_swept(fresh: Callable[..., Gateway]) -> None:
    gateway = fresh(files={"retention_days": 1})
    store, storage = gateway.store, gateway.services[0].storage
    with gateway.client() as client:
        assert client.get(f"{sent(client, ct())}/display").status_code == 200
        assert len(kept(gateway)) == 1
        gateway.run(records.delete_expired(store, storage, now() + timedelta(days=2)))
        assert kept(gateway) == []
        assert client.get("/v1/files").json()["items"] == []
        url = sent(client, ct(1))
        assert client.get(f"{url}/display").status_code == 200
        gateway.put("display/" + "0" * 64 + "/image-300-v1.nii.gz", b"left behind by a replica that died")
        gateway.run(records.sweep_orphans(store, storage, timedelta(0)))
        assert len(kept(gateway)) == 1  # that of the file that is there
        assert client.get(f"{url}/display").status_code == 200


def finished(gateway: Gateway, name: str = "ann") -> dict[str, Any]:
    """An execution whose scene was really saved, as the executor has it done."""
    gateway.put(f"own/{name}.nii.gz", b"read by nobody here")
    with gateway.client(name) as client:
        body = {"pipeline_id": "organs", "inputs": {"image": f"own/{name}.nii.gz"}}
        execution_id = client.post("/v1/executions", json=body).json()["execution_id"]
        claim = gateway.claim(execution_id)
        for step in claim.spec.steps:
            gateway.step(claim, step.id)
        mask = LabelMap(np.pad(np.full((9, 9, 9), 2, np.uint8), 2), (2.0, 1.0, 1.0), (5.0, 6.0, 7.0), labels=(2,))
        scene, _ = label_map_to_scene(mask, Options(levels=2))
        saved = gateway.run(gateway.services[0].gate.save(scene, "scene", f"results/{execution_id}/scene"))  # type: ignore[attr-defined]
        files = [executions.NewFile("scene", **entry) for entry in saved]
        assert gateway.run(executions.complete(gateway.store, claim, files, None))
        found: dict[str, Any] = client.get(f"/v1/executions/{execution_id}").json()
        return found


def test_a_scene_is_listed_with_its_surfaces(alone: Gateway) -> None:
    view = finished(alone)
    with alone.client() as client, alone.client("bob") as bob:
        assert [file["filename"].partition(".")[2] for file in view["output_files"]] == ["obj", "obj", "mtl", "manifest.json"]
        answers = [client.get(f"{file['download_url']}/display") for file in view["output_files"]]
        assert {answer.status_code for answer in answers} == {200}
        assert len({answer.headers["etag"] for answer in answers}) == 4
        about = answers[0].json()
        (structure,) = about["structures"]
        assert structure["name"] == "kidney_right"
        assert structure["url"] == f"{view['output_files'][0]['download_url']}/display/0.mz3"
        again = client.get(
            f"{view['output_files'][0]['download_url']}/display", headers={"If-None-Match": answers[0].headers["etag"]}
        )
        assert again.status_code == 304
        mesh = client.get(structure["url"])
        assert (mesh.status_code, mesh.headers["content-type"]) == (200, "application/octet-stream")
        raw = gzip.decompress(mesh.content)
        _, _, faces, vertices, _ = struct.unpack_from("<HHIII", raw)
        assert faces == structure["faces"]
        places = np.frombuffer(raw, "<f4", 3 * vertices, 16 + 12 * faces).reshape(-1, 3)
        assert np.abs(places.mean(axis=0) - (-11, -12, 19)).max() < 0.1  # the cube's middle, in RAS
        assert np.abs(np.array(structure["centre_mm"]) - (-11, -12, 19)).max() < 0.1
        problem(client.get(structure["url"].replace("0.mz3", "1.mz3")), 404, "file-not-found")
        problem(client.get(structure["url"].replace("0.mz3", "-1.mz3")), 422, "invalid-request")
        for url in (structure["url"], f"{view['output_files'][0]['download_url']}/display"):
            problem(bob.get(url), 404, "not-found")
        for name in kept(alone):
            alone.run(alone.services[0].storage.delete(name))
        problem(client.get(f"{view['output_files'][0]['download_url']}/display"), 404, "file-not-found")


def test_nobody_names_a_copy_as_an_input(alone: Gateway) -> None:
    with alone.client("root", "admin") as client:
        assert client.get(f"{sent(client, ct())}/display").status_code == 200
        (name,) = kept(alone)
        body = {"pipeline_id": "organs", "inputs": {"image": name}}
        problem(client.post("/v1/executions", json=body), 404, "not-found")
