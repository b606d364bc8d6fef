"""The service with its files in S3: by URL alone, with links for clients, and while the server is away, slow or refuses us."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from deployments.imageio.nifti import write_nifti
from scangraph.client import Client
from scangraph.doctor import examine
from scangraph.settings import Settings, load_settings
from scangraph.storage import open_storage
from scangraph.store.files import sweep_orphans
from tests.conftest import constant_volume
from tests.gateway.conftest import Gateway, gateway_on, problem
from tests.s3 import S3, Moto, Radosgw, moto, radosgw
from tests.servers import Proxy, Server, proxied, serving

GLB = b"glTF\x02\0\0\0"
SPEC = {
    "name": "threshold",
    "inputs": {"image": {"kind": "image"}},
    "steps": [{"id": "mask", "component": "test/threshold", "inputs": {"image": "input.image"}}],
    "outputs": {"mask": "mask.mask"},
}


@pytest.fixture(scope="module")
def quick() -> Iterator[Moto]:
    with moto() as server:
        yield server


@pytest.fixture(scope="module")
def ceph() -> Iterator[Radosgw]:
    with tempfile.TemporaryDirectory(prefix="ceph-", ignore_cleanup_errors=True) as folder, radosgw(Path(folder)) as server:
        yield server


@pytest.fixture(params=["quick", "ceph"])
def s3(request: pytest.FixtureRequest) -> S3:
    server: S3 = request.getfixturevalue(request.param)
    return server


def place(server: S3, folder: Path, **options: str) -> dict[str, Any]:
    """Return the settings that put a service's files there."""
    corner = hashlib.sha256(str(folder).encode()).hexdigest()[:12]
    return {"storage_url": f"{server.url}/{corner}", "storage_options": {**server.options, **options}}


def picture(size: int) -> bytes:
    return GLB + os.urandom(size - len(GLB))


def send(client: httpx.Client, data: bytes, name: str = "p.glb") -> httpx.Response:
    return client.post("/v1/files", files={"file": (name, data)})


# --- links -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def linking(s3: S3, tmp_path: Path) -> Iterator[Gateway]:
    with gateway_on(tmp_path, files={"link_seconds": 60}, **place(s3, tmp_path)) as gateway:
        yield gateway


def test_a_download_is_sent_on_to_s3(linking: Gateway) -> None:
    data, name = picture(300_000), "größe; 1.glb"
    with linking.client() as ann, linking.client("bob") as bob, httpx.Client() as anybody:
        sent = send(ann, data, name).json()
        url = sent["download_url"]
        answer = ann.get(url)
        assert (answer.status_code, answer.content, answer.headers["cache-control"]) == (307, b"", "no-store")
        link = answer.headers["location"]
        assert link.startswith("http://127.0.0.1")
        found = anybody.get(link)
        assert (found.status_code, found.content) == (200, data)
        assert found.headers["content-type"] == "model/gltf-binary"
        assert found.headers["content-disposition"] == "attachment; filename*=UTF-8''gr%C3%B6%C3%9Fe%3B%201.glb"
        part = anybody.get(link, headers={"Range": "bytes=100-199"})
        assert (part.status_code, part.content) == (206, data[100:200])
        assert ann.get(url, follow_redirects=True).content == data
        # What names our ETag is answered here: S3 has another one.
        tag = ann.head(url).headers["etag"]
        resumed = ann.get(url, headers={"Range": "bytes=100-", "If-Range": tag})
        assert (resumed.status_code, resumed.content) == (206, data[100:])
        assert ann.get(url, headers={"If-None-Match": tag}).status_code == 304
        # Nobody gets a link who may not have the file.
        assert "location" not in bob.get(url).headers
        problem(bob.get(url), 404, "not-found")
        problem(anybody.get(str(ann.base_url.join(url))), 401, "unauthenticated")
        ann.delete(url)
        problem(ann.get(url), 404, "not-found")
        assert anybody.get(link).status_code in {403, 404}


def test_a_link_ends(ceph: Radosgw, tmp_path: Path) -> None:
    with gateway_on(tmp_path, files={"link_seconds": 2}, **place(ceph, tmp_path)) as gateway, gateway.client() as ann:
        link = ann.get(send(ann, picture(5000)).json()["download_url"]).headers["location"]
        assert httpx.get(link).status_code == 200
        time.sleep(3)
        assert httpx.get(link).status_code == 403
        assert httpx.get(link.replace("Expires=2", "Expires=9999")).status_code == 403


def test_a_link_names_the_address_that_clients_reach(s3: S3, tmp_path: Path) -> None:
    with proxied(s3.port) as outside:
        files = {"link_seconds": 60, "link_endpoint": outside.url}
        with gateway_on(tmp_path, files=files, **place(s3, tmp_path)) as gateway, gateway.client() as ann:
            data = picture(5000)
            link = ann.get(send(ann, data).json()["download_url"]).headers["location"]
            assert link.startswith(outside.url)
            assert httpx.get(link).content == data


def test_without_the_setting_or_without_s3_there_are_no_links(quick: Moto, tmp_path: Path) -> None:
    data = picture(5000)
    for number, settings in enumerate((place(quick, tmp_path), {"files": {"link_seconds": 60}, "storage_url": ""})):
        with gateway_on(tmp_path / str(number), **settings) as gateway, gateway.client() as ann:
            answer = ann.get(send(ann, data).json()["download_url"])
            assert (answer.status_code, answer.content) == (200, data)


def test_our_client_follows_a_link_without_its_token(s3: S3, tmp_path: Path) -> None:
    with proxied(s3.port) as outside:
        files = {"link_seconds": 60, "link_endpoint": outside.url}
        with gateway_on(tmp_path, files=files, **place(s3, tmp_path)) as gateway:
            data = picture(12 * 2**20)
            with Client(gateway.urls[0], token=gateway.token(), patience=20) as client:
                sent = client.upload(picture_file(tmp_path, data))
                outside.cuts.append(("down", 6 * 2**20))  # the rest comes from the service
                client.download(sent.id, tmp_path / "back.glb")
            assert (tmp_path / "back.glb").read_bytes() == data
            assert outside.made == 1
            assert not outside.cuts


def picture_file(folder: Path, data: bytes) -> Path:
    path = folder / "sent.glb"
    path.write_bytes(data)
    return path


# --- what is left ----------------------------------------------------------------------------------------------------------

KILLED = """
import asyncio, json, os, sys
from scangraph.storage import open_storage
async def go():
    async with open_storage(sys.argv[1], json.loads(sys.argv[2])).writer(sys.argv[3]) as file:
        while True:
            await file.write(bytes(2**20))
            print(file.size, flush=True)
asyncio.run(go())
"""


def test_what_a_killed_upload_leaves_is_swept(s3: S3, tmp_path: Path) -> None:
    settings = load_settings(data=tmp_path, **place(s3, tmp_path))
    corner = settings.storage_url.rpartition("/")[2]
    command = [sys.executable, "-c", KILLED, settings.storage, json.dumps(settings.storage_options), "files/x/large.bin"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writing:
        assert writing.stdout is not None
        while int(writing.stdout.readline()) < 40 * 2**20:
            pass
        writing.send_signal(signal.SIGKILL)
    theirs = s3.client.create_multipart_upload(Bucket="bucket", Key=f"{corner}/theirs/files/y.bin")["UploadId"]
    assert s3.parts_left(corner) == [f"{corner}/files/x/large.bin", f"{corner}/theirs/files/y.bin"]
    with gateway_on(tmp_path, **place(s3, tmp_path)) as gateway:
        store, storage = gateway.store, gateway.services[0].storage
        if isinstance(s3, Radosgw):  # moto says that every upload began in 2010
            assert gateway.run(sweep_orphans(store, storage, timedelta(days=2))) == []
            assert len(s3.parts_left(corner)) == 2
        assert gateway.run(sweep_orphans(store, storage, timedelta(0))) == ["files/x/large.bin"]
    # What somebody else keeps beside the service's rooms is not ours.
    assert s3.parts_left(corner) == [f"{corner}/theirs/files/y.bin"]
    s3.client.abort_multipart_upload(Bucket="bucket", Key=f"{corner}/theirs/files/y.bin", UploadId=theirs)


def test_a_bucket_is_made_ready_once_and_again(s3: S3, tmp_path: Path) -> None:
    name = f"new-{os.urandom(4).hex()}"
    theirs = {"ID": "theirs", "Status": "Enabled", "Filter": {"Prefix": "logs/"}, "Expiration": {"Days": 9}}
    settings = {
        "SCANGRAPH_STORAGE_URL": f"s3://{name}/of/ours",
        "SCANGRAPH_STORAGE_OPTIONS": json.dumps(s3.options),
        "SCANGRAPH_DATA": str(tmp_path),
    }

    def call(*words: str, **changes: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "scangraph.cli", "storage", *words]
        environment = {**os.environ, **settings, **changes}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    first = call("prepare")
    assert first.returncode == 0, first.stderr
    assert "made the bucket" in first.stdout
    (rule,) = s3.client.get_bucket_lifecycle_configuration(Bucket=name)["Rules"]
    assert rule["AbortIncompleteMultipartUpload"] == {"DaysAfterInitiation": 2}
    assert rule["Filter"]["Prefix"] == "of/ours/"
    assert "Expiration" not in rule
    s3.client.put_bucket_lifecycle_configuration(Bucket=name, LifecycleConfiguration={"Rules": [theirs]})
    again = call("prepare", "--days", "3")
    assert again.returncode == 0, again.stderr
    assert "made the bucket" not in again.stdout
    rules = {rule["ID"]: rule for rule in s3.client.get_bucket_lifecycle_configuration(Bucket=name)["Rules"]}
    assert rules["theirs"]["Expiration"]["Days"] == 9
    assert rules["scangraph-unfinished-uploads"]["AbortIncompleteMultipartUpload"] == {"DaysAfterInitiation": 3}
    assert json.loads(call("lifecycle", "--days", "3").stdout)["Rules"][0]["ID"] in rules
    for bad, told in (("", "is no bucket"), ("nothing://x", "recognise")):
        refused = call("lifecycle" if not bad else "prepare", SCANGRAPH_STORAGE_URL=bad)
        assert (refused.returncode, "Traceback" in refused.stderr) != (0, True)
        assert told in refused.stdout + refused.stderr
    away = {**s3.options, "endpoint": "http://127.0.0.1:1"}
    lost = call("prepare", SCANGRAPH_STORAGE_OPTIONS=json.dumps(away))
    assert lost.returncode != 0
    assert "no connection" in lost.stdout + lost.stderr
    assert "Traceback" not in lost.stderr


# --- away, slow, refusing --------------------------------------------------------------------------------------------------


class Line:
    """A storage that can be taken away and given back with everything in it."""

    def __init__(self, server: S3, proxy: Proxy) -> None:
        self.server, self.proxy = server, proxy
        self.options = {"endpoint": proxy.url}

    def cut(self) -> None:
        """Take it away: Ceph's gateway ends as in a power cut; moto keeps nothing, so its line is cut."""
        if isinstance(self.server, Radosgw):
            self.server.stop()
        self.proxy.refusing = True
        self.proxy.cut()

    def mend(self) -> None:
        """Give it back."""
        if isinstance(self.server, Radosgw):
            self.server.start()
        self.proxy.refusing = False


@pytest.fixture
def line(s3: S3) -> Iterator[Line]:
    with proxied(s3.port) as proxy:
        line = Line(s3, proxy)
        yield line
        if proxy.refusing:
            line.mend()


def running(line: Line, tmp_path: Path, **changes: Any) -> Any:
    return serving(load_settings(data=tmp_path, **place(line.server, tmp_path, **line.options), **changes))


def client_of(server: Server) -> httpx.Client:
    server.account("ann", "editor")
    body = {"username": "ann", "password": "correct horse ann"}
    token = httpx.post(f"{server.url}/v1/auth/login", json=body).json()["access_token"]
    return httpx.Client(base_url=server.url, headers={"Authorization": f"Bearer {token}"}, timeout=60)


def test_an_upload_that_met_an_outage_is_sent_again(line: Line, tmp_path: Path) -> None:
    large, small = picture(30 * 2**20), picture(5000)
    tus = {"Tus-Resumable": "1.0.0"}
    with running(line, tmp_path) as server, client_of(server) as ann:
        kept = send(ann, small).json()
        place = ann.post("/v1/uploads", headers={**tus, "Upload-Length": str(len(large))}).headers["location"]
        part = {**tus, "Content-Type": "application/offset+octet-stream"}
        assert ann.patch(place, content=large[: 20 * 2**20], headers={**part, "Upload-Offset": "0"}).status_code == 204
        line.cut()
        for data in (small, large):
            answer = send(ann, data)
            assert "no connection" in problem(answer, 503, "storage-unavailable")["detail"]
            assert int(answer.headers["retry-after"]) > 0
            assert "127.0.0.1" not in answer.text
        problem(ann.get(kept["download_url"]), 503, "storage-unavailable")
        rest = {**part, "Upload-Offset": str(20 * 2**20)}
        problem(ann.patch(place, content=large[20 * 2**20 :], headers=rest), 503, "storage-unavailable")
        ready = ann.get("/readyz")
        assert (ready.status_code, list(ready.json()["not_ready"])) == (503, ["storage"])
        assert [file["id"] for file in ann.get("/v1/files").json()["items"]] == [kept["id"]]
        line.mend()
        assert ann.get("/readyz").status_code == 200
        assert ann.get(kept["download_url"]).content == small
        assert send(ann, large).status_code == 201
        offset = int(ann.head(place, headers=tus).headers["upload-offset"])
        assert offset >= 20 * 2**20  # what had arrived is there
        done = ann.patch(place, content=large[offset:], headers={**part, "Upload-Offset": str(offset)})
        assert ann.get(done.headers["content-location"]).content == large


@pytest.mark.parametrize("moment", ["sha256", "read", "save", "keep"])
def test_an_execution_waits_for_the_storage_and_completes(line: Line, tmp_path: Path, moment: str) -> None:
    with running(line, tmp_path, executor={"keep_from_seconds": 0}) as server, client_of(server) as ann:
        assert ann.post("/v1/pipelines", json=SPEC).status_code == 201
        server.run(server.services.storage.write("ct.nii.gz", write_nifti(constant_volume(40))))
        met: list[float] = []

        def before(method: str) -> None:
            if method == moment and not met:
                met.append(time.monotonic())
                line.cut()

        server.stages.before = before
        body = {"pipeline_id": "threshold", "inputs": {"image": "ct.nii.gz"}}
        execution = ann.post("/v1/executions", json=body).json()["execution_id"]
        until(lambda: met)
        time.sleep(4)
        seen = ann.get(f"/v1/executions/{execution}").json()
        assert seen["status"] == "running"
        line.mend()
        until(lambda: ann.get(f"/v1/executions/{execution}").json()["status"] not in {"pending", "running"})
        seen = ann.get(f"/v1/executions/{execution}").json()
        assert seen["status"] == "completed", seen
        for file in seen["output_files"]:
            assert hashlib.sha256(ann.get(file["download_url"]).content).hexdigest() == file["sha256"]


def test_a_waiting_execution_can_be_cancelled(line: Line, tmp_path: Path) -> None:
    with running(line, tmp_path) as server, client_of(server) as ann:
        ann.post("/v1/pipelines", json=SPEC)
        server.run(server.services.storage.write("ct.nii.gz", write_nifti(constant_volume(40))))
        server.stages.before = lambda method: line.cut() if method == "save" and not line.proxy.refusing else None
        body = {"pipeline_id": "threshold", "inputs": {"image": "ct.nii.gz"}}
        execution = ann.post("/v1/executions", json=body).json()["execution_id"]
        until(lambda: line.proxy.refusing)
        time.sleep(1)
        assert ann.post(f"/v1/executions/{execution}/cancel").status_code == 202
        until(lambda: ann.get(f"/v1/executions/{execution}").json()["status"] == "cancelled", 10)


def until(condition: Any, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_a_slow_storage_is_waited_for(line: Line, tmp_path: Path) -> None:
    data = picture(16 * 2**20)
    with running(line, tmp_path, gateway={"stall_seconds": 20}) as server, client_of(server) as ann:
        line.proxy.rate = 2 * 2**20
        begun = time.monotonic()
        answer = send(ann, data)
        assert answer.status_code == 201, answer.text
        assert time.monotonic() - begun > 3  # it was slow
        line.proxy.rate = None
        assert ann.get(answer.json()["download_url"]).content == data


@pytest.mark.parametrize(
    ("wrong", "told"),
    [({"secret_access_key": "guess"}, "refuses the secret key"), ({"access_key_id": "nobody"}, "does not know the access key")],
)
def test_wrong_credentials_are_said_at_the_start_and_in_every_answer(
    ceph: Radosgw, tmp_path: Path, wrong: dict[str, str], told: str
) -> None:
    settings = load_settings(data=tmp_path, **place(ceph, tmp_path, **wrong))
    with serving(settings) as server, client_of(server) as ann:
        ready = ann.get("/readyz")
        assert ready.status_code == 503
        assert told in ready.json()["not_ready"]["storage"]
        detail = problem(send(ann, picture(5000)), 503, "storage-unavailable")["detail"]
        assert told in detail
        assert "SCANGRAPH_STORAGE_OPTIONS" in detail
        assert "guess" not in detail
        assert ann.get("/v1/files").json()["items"] == []
    assert told in doctor(settings)


def doctor(settings: Settings) -> str:
    """Return what the check-up finds wrong with the storage, "" for nothing."""
    (found,) = [finding for finding in examine(settings) if finding.subject == "storage"]
    assert bool(found.mend) == (found.level == "error")
    return found.text if found.level == "error" else ""


def test_the_doctor_tries_the_bucket_and_leaves_nothing(s3: S3, tmp_path: Path) -> None:
    good = load_settings(data=tmp_path, **place(s3, tmp_path))
    assert doctor(good) == ""
    storage = open_storage(good.storage, good.storage_options)

    async def names() -> list[str]:
        return [stat.name async for stat in storage.list()]

    assert asyncio.run(names()) == []
    assert "no such bucket" in doctor(good.model_copy(update={"storage_url": "s3://nowhere/x"}))
    assert "no connection" in doctor(load_settings(data=tmp_path, **place(s3, tmp_path, endpoint="http://127.0.0.1:1")))
    assert "allow_http" in doctor(load_settings(data=tmp_path, **place(s3, tmp_path, allow_http="false")))
    assert "recognise" in doctor(good.model_copy(update={"storage_url": "nothing://x"}))
    assert "acces_key" in doctor(load_settings(data=tmp_path, **place(s3, tmp_path, acces_key="x")))
