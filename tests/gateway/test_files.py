"""Files over HTTP: multipart and tus uploads, ranges, and what is left when anything goes wrong; on a real server."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gzip
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import httpx
import nibabel
import numpy as np
import pytest
import uvicorn
from fastapi import FastAPI, Request
from tusclient.client import TusClient

from deployments.gateway import problems
from deployments.gateway.files import file_routes, receive_form
from deployments.gateway.resumable import PART, upload_routes
from deployments.gateway.services import Services
from deployments.imageio.deployment import Imageio
from scangraph.contracts.api import Role
from scangraph.contracts.errors import NoSuch, StoreUnavailable
from scangraph.intake import discard, keep, safe_name, shown_name
from scangraph.settings import Settings, load_settings
from scangraph.storage import open_storage
from scangraph.store import accounts, now, open_store
from scangraph.store import files as records
from scangraph.store.tables import Execution
from scangraph.tokens import Tokens
from tests.s3 import in_own_place

LIMIT = 40 * 2**20
GLB = b"glTF\x02\0\0\0"


def settings_for(data: Path, stall_seconds: float = 1.5) -> Settings:
    files = {"max_upload_bytes": LIMIT, "max_open_uploads": 3}
    return in_own_place(load_settings(data=data, files=files, gateway={"stall_seconds": stall_seconds}))


async def open_services(settings: Settings) -> Services:
    nothing: Any = None
    store = await open_store(settings.database)

    async def wake() -> None: ...

    return Services(
        settings=settings,
        store=store,
        storage=open_storage(settings.storage, settings.storage_options),
        components={},
        tokens=Tokens(settings.auth, settings.data / "keys"),
        gate=Imageio(settings.imageio, settings.storage, settings.storage_options),
        wake=wake,
        readiness=nothing,
        models=nothing,
    )


def build_app(services: Callable[[], Services], settings: Settings) -> FastAPI:
    app = FastAPI()
    problems.install(app, settings.gateway.max_body_bytes, settings.gateway.stall_seconds)
    app.include_router(file_routes(services))
    app.include_router(upload_routes(services))
    return app


async def bearer(services: Services, name: str, role: Role) -> dict[str, str]:
    """Return the header of an account that is made where there is none."""
    try:
        account = await accounts.find_account(services.store, name)
    except NoSuch:
        account = await accounts.create_account(services.store, name, role, accounts.new_secret())
        await asyncio.sleep(1.1)  # a replica knows its accounts for a second
    token, _ = services.tokens.sign(account.id, name, role, account.token_epoch)
    return {"Authorization": f"Bearer {token}"}


@dataclass
class Server:
    """uvicorn in a thread, with an event loop that tests may use too."""

    url: str
    services: Services
    loop: asyncio.AbstractEventLoop

    def run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(30)

    def headers(self, name: str = "ann", role: Role = "operator") -> dict[str, str]:
        headers: dict[str, str] = self.run(bearer(self.services, name, role))
        return headers

    def client(self, name: str = "ann", role: Role = "operator") -> httpx.Client:
        return httpx.Client(base_url=self.url, headers=self.headers(name, role), timeout=30)

    def stored(self) -> list[str]:
        root = self.services.storage.local_root
        if root is not None:  # with what is not finished, too
            return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())

        async def names() -> list[str]:
            return sorted([stat.name async for stat in self.services.storage.list()])

        found: list[str] = self.run(names())
        return found

    def rows(self) -> list[Any]:
        return list(self.run(records.list_files(self.services.store)))

    def eventually(self, condition: Callable[[], bool], seconds: float = 10) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, self.stored()
            time.sleep(0.05)


@contextlib.contextmanager
def serving(settings: Settings, extend: Callable[[FastAPI, Callable[[], Services]], None] | None = None) -> Iterator[Server]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def run(work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, loop).result(60)

    try:
        services: Services = run(open_services(settings))
    except BaseException:
        loop.call_soon_threadsafe(loop.stop)
        raise
    app = build_app(lambda: services, settings)
    if extend is not None:
        extend(app, lambda: services)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off", timeout_graceful_shutdown=2))
        serving = asyncio.run_coroutine_threadsafe(server.serve(sockets=[listening]), loop)
        while not server.started:
            time.sleep(0.01)
        try:
            yield Server(f"http://127.0.0.1:{listening.getsockname()[1]}", services, loop)
        finally:
            server.should_exit = True
            serving.result(30)
            run(services.store.close())
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with serving(settings_for(tmp_path)) as server:
        yield server


def nifti(shape: tuple[int, int, int] = (8, 9, 10), seed: int = 0) -> bytes:
    values = np.random.default_rng(seed).integers(-1000, 1000, shape).astype(np.int16)
    image = nibabel.Nifti1Image(values, np.diag([-1.5, -2, 3, 1]))
    image.header.set_xyzt_units("mm")
    return gzip.compress(image.to_bytes(), 1, mtime=0)


def glb(size: int, seed: int = 0) -> bytes:
    return GLB + np.random.default_rng(seed).bytes(size - len(GLB))


def problem(response: httpx.Response, status: int, code: str, pointer: str | None = None) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = response.json()
    assert (body["status"], body["type"]) == (status, f"urn:scangraph:problem:{code}")
    if pointer is not None:
        assert [error["pointer"] for error in body["errors"]] == [pointer]
    return body


def send(client: httpx.Client, data: bytes, name: str = "ct.nii.gz", **more: Any) -> httpx.Response:
    return client.post("/v1/files", files={"file": (name, data)}, **more)


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def digest(data: bytes) -> str:
    return f"sha-256=:{base64.b64encode(hashlib.sha256(data).digest()).decode()}:"


# --- multipart -------------------------------------------------------------------------------------------------------------


def test_a_file_goes_in_and_comes_out(server: Server) -> None:
    data = nifti()
    with server.client() as client:
        response = send(client, data, "Bauch müde/../CT 1.nii.gz", headers={"Repr-Digest": digest(data)})
        assert response.status_code == 201, response.text
        view = response.json()
        assert response.headers["location"] == view["download_url"] == f"/v1/files/{view['id']}"
        assert (view["kind"], view["size"], view["sha256"]) == ("nifti", len(data), sha(data))
        assert (view["filename"], view["origin"], view["expires_at"]) == ("CT 1.nii.gz", "upload", None)
        assert view["path"] == f"files/{view['id']}/CT_1.nii.gz"
        assert server.stored() == [view["path"]]
        metadata = client.get(f"{view['download_url']}/metadata").json()
        assert metadata["metadata"]["shape_zyx"] == [10, 9, 8]
        assert {name: metadata[name] for name in view} == view
        assert client.get(view["download_url"]).content == data
        assert client.delete(view["download_url"]).status_code == 204
        problem(client.get(view["download_url"]), 404, "not-found")
        problem(client.delete(view["download_url"]), 404, "not-found")
    assert server.stored() == []


def test_the_content_decides_what_it_is_and_what_it_is_not_leaves_nothing(server: Server) -> None:
    with server.client() as client:
        assert send(client, glb(1000), "a.nii.gz").json()["kind"] == "glb"
        problem(send(client, b"what is this?", "ct.nii.gz"), 415, "unsupported-media")
        problem(send(client, nifti()[:-20]), 422, "truncated")
        problem(send(client, b""), 422, "empty-file")
    assert len(server.stored()) == len(server.rows()) == 1


def test_forms_that_do_not_fit(server: Server) -> None:
    data = nifti()
    with server.client() as client:
        problem(client.post("/v1/files", files={"image": ("a", data)}), 422, "invalid-inputs", "/image")
        problem(client.post("/v1/files", files=[("file", ("a", data)), ("file", ("b", data))]), 422, "invalid-inputs", "/file")
        problem(client.post("/v1/files", files={"file": ("a", data)}, data={"x": "1"}), 422, "invalid-inputs", "/x")
        problem(client.post("/v1/files", files={"x": (None, "1")}), 422, "invalid-inputs", "/file")
        problem(client.post("/v1/files", files={"file": (None, "text")}), 422, "invalid-inputs", "/file")
        problem(client.post("/v1/files", json={}), 422, "invalid-inputs", "")
        problem(
            client.post("/v1/files", content=b"x", headers={"Content-Type": "multipart/form-data"}), 422, "invalid-inputs", ""
        )
        kind = {"Content-Type": "multipart/form-data; boundary=b"}
        opened = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n' + data
        problem(client.post("/v1/files", content=opened, headers=kind), 422, "invalid-inputs", "")
        problem(client.post("/v1/files", content=b"--b\r\nnonsense", headers=kind), 422, "invalid-inputs", "")
        problem(client.post("/v1/files", content=b"--b\r\nX: " + b"a" * 9999, headers=kind), 422, "invalid-inputs", "")
        unnamed = b"--b\r\nContent-Disposition: form-data\r\n\r\nx\r\n--b--\r\n"
        problem(client.post("/v1/files", content=unnamed, headers=kind), 422, "invalid-inputs", "")
        problem(send(client, data, headers={"Repr-Digest": digest(b"")}), 422, "digest-mismatch")
        problem(send(client, data, headers={"Repr-Digest": "sha-256=:???:"}), 422, "digest-mismatch")
        problem(send(client, data, headers={"Content-Digest": digest(data)}), 422, "digest-mismatch")  # it is of the body
        body = opened + b"\r\n--b--\r\n"
        assert client.post("/v1/files", content=body, headers={**kind, "Content-Digest": digest(body)}).status_code == 201
    assert len(server.stored()) == len(server.rows()) == 1


def test_a_file_over_the_limit_is_refused_while_it_comes(server: Server) -> None:
    def chunks() -> Iterator[bytes]:
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        for _ in range(45):
            yield bytes(2**20)

    with server.client() as client:
        problem(send(client, bytes(LIMIT + 1)), 413, "upload-too-large")
        kind = {"Content-Type": "multipart/form-data; boundary=b"}
        with contextlib.suppress(httpx.WriteError):  # the answer may come before all is sent
            problem(client.post("/v1/files", content=chunks(), headers=kind), 413, "upload-too-large")
        assert send(client, glb(LIMIT)).status_code == 201
    assert len(server.stored()) == 1


class CancelsLikeServe:
    """Cancels the request of a client who left, at every await again."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        with anyio.CancelScope() as cancelling:

            async def watched() -> Any:
                message = await receive()
                if message["type"] == "http.disconnect":
                    cancelling.cancel()
                    await anyio.sleep_forever()
                return message

            await self.app(scope, watched, send)


@contextlib.contextmanager
def cut_off(data: Path, how: str) -> Iterator[Server]:
    """A server whose clients leave (and whose requests are cancelled then), or fall silent."""

    def extend(app: FastAPI, services: Callable[[], Services]) -> None:
        if how == "cancelled":
            app.add_middleware(CancelsLikeServe)

    with serving(settings_for(data, 1.5 if how == "silent" else 20), extend) as server:
        yield server


def talk(server: Server, request: str, body: bytes, announced: int, *, wait: bool) -> bytes:
    """Send a request's head and the beginning of its body, and break off (or stay, silent, for the answer)."""
    parts = httpx.URL(server.url)
    lines = [request, "Host: x", *(f"{name}: {value}" for name, value in server.headers().items())]
    lines += [f"Content-Length: {announced}", "", ""]
    with socket.create_connection((parts.host, parts.port or 0), timeout=20) as connection:
        connection.sendall("\r\n".join(lines).encode() + body)
        answer = b""
        while wait and (more := connection.recv(2**16)):
            answer += more
        return answer


@pytest.mark.parametrize("how", ["gone", "silent", "cancelled"])
def test_an_upload_cut_at_half_leaves_no_row_and_no_file(tmp_path: Path, how: str) -> None:
    data = glb(10 * 2**20)
    head = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    request = "POST /v1/files HTTP/1.1\r\nContent-Type: multipart/form-data; boundary=b"
    with cut_off(tmp_path, how) as server:
        answer = talk(server, request, head + data[: len(data) // 2], len(data) + 200, wait=how == "silent")
        if how == "silent":
            assert b"408 " in answer.split(b"\r\n")[0]
            assert b"upload-incomplete" in answer
        server.eventually(lambda: server.stored() == [])
        time.sleep(0.2)
        assert server.stored() == []
        assert server.rows() == []


def test_a_database_that_fails_leaves_no_file(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fails(*args: Any) -> Any:
        raise StoreUnavailable(reason="gone", retry_after_seconds=2)

    with server.client() as client:
        monkeypatch.setattr(records, "add_files", fails)
        problem(send(client, nifti()), 503, "store-unavailable")
        assert server.stored() == []
        monkeypatch.undo()
        assert send(client, nifti()).status_code == 201


def test_a_row_whose_commit_was_not_confirmed_keeps_its_file(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    real = records.add_files

    async def commits_and_fails(*args: Any) -> Any:
        await real(*args)
        raise StoreUnavailable(reason="gone", retry_after_seconds=2)

    monkeypatch.setattr(records, "add_files", commits_and_fails)
    with server.client() as client:
        problem(send(client, nifti()), 503, "store-unavailable")
        assert [row.storage_name for row in server.rows()] == server.stored()
        assert client.get(f"/v1/files/{server.rows()[0].id}").content == nifti()


def test_a_form_with_many_files_and_fields(tmp_path: Path) -> None:
    from fastapi import Depends

    from deployments.gateway.auth import requires
    from scangraph.intake import Principal

    def extend(app: FastAPI, services: Callable[[], Services]) -> None:
        operator = Depends(requires(services, "operator"))

        async def form(request: Request, principal: Principal = operator) -> Any:
            form = await receive_form(request, services(), principal, file_fields=lambda name: name in {"A", "P"}, most=2)
            if form.fields.get("keep") != "yes":
                await discard(services(), [file for _, file in form.files])
                return form.fields
            rows = await keep(services(), [file for _, file in form.files])
            return [[name, row.id, row.sha256] for (name, _), row in zip(form.files, rows, strict=True)]

        form.__annotations__ = {"request": Request, "principal": Principal}
        app.add_api_route("/form", form, methods=["POST"])

    with serving(settings_for(tmp_path), extend) as server, server.client() as client:
        files = [("A", ("a.nii.gz", nifti(seed=1))), ("P", ("p.nii.gz", nifti(seed=2)))]
        assert client.post("/form", files=files, data={"parameters": '{"ä": 1}'}).json() == {"parameters": '{"ä": 1}'}
        assert server.stored() == []
        kept = client.post("/form", files=files, data={"keep": "yes"}).json()
        assert [entry[::2] for entry in kept] == [["A", sha(nifti(seed=1))], ["P", sha(nifti(seed=2))]]
        problem(client.post("/form", files=[*files, ("A", ("x", GLB))], data={"keep": "yes"}), 422, "invalid-inputs", "/A")
        problem(client.post("/form", files=[*files[:1], ("P", ("x", b"?"))]), 415, "unsupported-media")
        problem(client.post("/form", files=files, data={"x": "y" * 2_000_000}), 422, "invalid-inputs", "/x")
        problem(client.post("/form", files=files, data={"x": ["1", "2"]}), 422, "invalid-inputs", "/x")
        assert len(server.stored()) == len(server.rows()) == 2


@pytest.mark.parametrize(
    ("name", "shown", "safe"),
    [
        ("ct.nii.gz", "ct.nii.gz", "ct.nii.gz"),
        ("C:\\scans\\a b.glb", "a b.glb", "a_b.glb"),
        ("../../etc/passwd", "passwd", "passwd"),
        ("..", "..", "file"),
        ("", "file", "file"),
        ("\x00\n\u202egpj.exe", "gpj.exe", "gpj.exe"),
        ("Müller ☃.nii", "Müller ☃.nii", "Muller_.nii"),
        ("日本", "日本", "file"),
        ("a" * 300 + ".nii.gz", "a" * 200, "a" * 100),
        ("b" * 150 + ".nii.gz", "b" * 150 + ".nii.gz", "b" * 93 + ".nii.gz"),
    ],
)
def test_names_are_for_people_and_never_paths(name: str, shown: str, safe: str) -> None:
    assert (shown_name(name), safe_name(name)) == (shown, safe)


# --- downloads -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def one(server: Server) -> Iterator[tuple[httpx.Client, str, bytes]]:
    with server.client() as client:
        data = glb(3 * 2**20 + 17)
        yield client, send(client, data, "ä x;y.glb").json()["download_url"], data


def test_headers_of_a_download(one: tuple[httpx.Client, str, bytes]) -> None:
    client, url, data = one
    for response in (client.get(url), client.head(url)):
        headers = response.headers
        assert response.status_code == 200
        assert headers["etag"] == f'"{sha(data)}"'
        assert headers["repr-digest"] == digest(data)
        assert headers["content-length"] == str(len(data))
        assert headers["accept-ranges"] == "bytes"
        assert headers["content-type"] == "model/gltf-binary"
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["content-security-policy"] == "sandbox; default-src 'none'"
        assert headers["content-disposition"] == "attachment; filename=\"a_x_y.glb\"; filename*=UTF-8''%C3%A4%20x%3By.glb"
    assert client.head(url).content == b""


def test_ranges(one: tuple[httpx.Client, str, bytes]) -> None:
    client, url, data = one
    size = len(data)
    cases = {
        "bytes=0-0": (0, 1),
        "bytes=5-9": (5, 10),
        f"bytes={size - 3}-": (size - 3, size),
        "bytes=-4": (size - 4, size),
        f"bytes=-{size * 2}": (0, size),
        f"bytes=100-{size * 5}": (100, size),
        f"bytes={2**20 - 1}-{2**21}": (2**20 - 1, 2**21 + 1),
    }
    for asked, (start, end) in cases.items():
        response = client.get(url, headers={"Range": asked})
        assert response.status_code == 206
        assert response.headers["content-range"] == f"bytes {start}-{end - 1}/{size}"
        assert response.headers["content-length"] == str(end - start)
        assert response.content == data[start:end]
    for whole in ("bytes=0-1,4-5", "lines=1-2", "bytes=9-5", "bytes=-", "bytes=a-b", "bytes=" + "9" * 30 + "-"):
        response = client.get(url, headers={"Range": whole})
        assert (response.status_code, response.content) == (200, data), whole
    for beyond in (f"bytes={size}-", f"bytes={size + 5}-{size + 9}", "bytes=-0"):
        response = client.get(url, headers={"Range": beyond})
        problem(response, 416, "unsatisfiable-range")
        assert response.headers["content-range"] == f"bytes */{size}"
    assert client.head(url, headers={"Range": "bytes=0-1"}).headers["content-length"] == str(size)


def test_conditions(one: tuple[httpx.Client, str, bytes]) -> None:
    client, url, data = one
    tag = f'"{sha(data)}"'
    for known in (tag, f'"x", {tag}', f"W/{tag}", "*"):
        response = client.get(url, headers={"If-None-Match": known, "Range": "bytes=0-1"})
        assert (response.status_code, response.content, response.headers["etag"]) == (304, b"", tag)
    assert client.get(url, headers={"If-None-Match": '"x"'}).status_code == 200
    for condition, status in ((tag, 206), (f"W/{tag}", 200), ('"x"', 200), ("Sat, 21 Nov 2026 06:00:00 GMT", 200)):
        assert client.get(url, headers={"If-Range": condition, "Range": "bytes=0-1"}).status_code == status


def test_a_row_without_its_bytes_says_so(server: Server, one: tuple[httpx.Client, str, bytes]) -> None:
    client, url, _ = one
    server.run(server.services.storage.delete(server.stored()[0]))
    assert "the bytes are gone" in problem(client.get(url), 404, "file-not-found")["detail"]
    assert client.delete(url).status_code == 204


def test_lists_have_pages_and_filters(server: Server) -> None:
    with server.client() as client:
        ids = [send(client, nifti(seed=n) if n % 2 else glb(100, n)).json()["id"] for n in range(5)][::-1]
        assert [item["id"] for item in client.get("/v1/files").json()["items"]] == ids
        seen, page = [], client.get("/v1/files?limit=2&origin=upload")
        for _ in range(5):
            seen += [item["id"] for item in page.json()["items"]]
            cursor = page.json()["next_cursor"]
            if cursor is None:
                assert "link" not in page.headers
                break
            link = page.links["next"]["url"]
            assert "origin=upload" in link
            page = client.get(link)
        assert seen == ids
        assert [item["kind"] for item in client.get("/v1/files?kind=nifti").json()["items"]] == ["nifti"] * 2
        assert client.get("/v1/files?origin=result").json() == {"items": [], "next_cursor": None}
        problem(client.get("/v1/files?cursor=zzz"), 422, "invalid-cursor")
        problem(client.get("/v1/files?limit=0"), 422, "invalid-request")


def test_everybody_sees_their_own_and_an_admin_all(server: Server) -> None:
    with server.client("ann") as ann, server.client("bob") as bob, server.client("root", "admin") as admin:
        url = send(ann, glb(100)).json()["download_url"]
        missing = problem(bob.get("/v1/files/" + "0" * 36), 404, "not-found")["detail"].replace("0" * 36, "ID")
        for response in (bob.get(url), bob.get(f"{url}/metadata"), bob.delete(url)):
            assert problem(response, 404, "not-found")["detail"].replace(url.split("/")[-1], "ID") == missing
        assert bob.head(url).status_code == 404
        assert bob.get("/v1/files").json()["items"] == []
        assert len(admin.get("/v1/files").json()["items"]) == 1
        assert admin.get(url).status_code == 200
        with server.client("ann", "viewer") as viewer:
            assert viewer.get(url).status_code == 200
            problem(send(viewer, glb(100)), 403, "forbidden")
            problem(viewer.delete(url), 403, "forbidden")
        for method, path in (
            ("GET", "/v1/files"),
            ("POST", "/v1/files"),
            ("GET", url),
            ("DELETE", url),
            ("GET", url + "/metadata"),
        ):
            problem(httpx.request(method, server.url + path), 401, "unauthenticated")


def test_what_an_execution_reads_is_not_deleted(server: Server) -> None:
    with server.client() as client:
        view = send(client, nifti()).json()

        async def begin(state: str) -> None:
            async with server.services.store.write() as session:
                row = Execution(
                    id="e1",
                    pipeline_id="p",
                    revision=1,
                    pipeline="p",
                    inputs={"image": [{"file_id": view["id"], "path": view["path"]}]},
                    parameters={},
                    priority="normal",
                    queue_key=0,
                    state=state,
                    created_at=now(),
                )
                await session.merge(row)

        for state in ("pending", "running"):
            server.run(begin(state))
            assert "e1" in problem(client.delete(view["download_url"]), 409, "in-use")["detail"]
        server.run(begin("completed"))
        assert client.delete(view["download_url"]).status_code == 204


def test_the_document_describes_every_route(server: Server) -> None:
    document = httpx.get(server.url + "/openapi.json").json()
    operations = [op for path in document["paths"].values() for name, op in path.items()]
    assert len(operations) == 10
    for operation in operations:
        assert operation["summary"]
        assert "401" in operation["responses"]


# --- tus -------------------------------------------------------------------------------------------------------------------

TUS = {"Tus-Resumable": "1.0.0"}
PART_TYPE = {"Content-Type": "application/offset+octet-stream"}


def begin(client: httpx.Client, length: int, name: str = "ct.nii.gz", **more: str) -> str:
    headers = {**TUS, "Upload-Length": str(length), "Upload-Metadata": f"filename {base64.b64encode(name.encode()).decode()}"}
    response = client.post("/v1/uploads", headers={**headers, **more})
    assert response.status_code == 201, response.text
    assert response.headers["tus-resumable"] == "1.0.0"
    return str(response.headers["location"])


def append(client: httpx.Client, url: str, offset: int, data: Any, **more: str) -> httpx.Response:
    return client.patch(url, content=data, headers={**TUS, **PART_TYPE, "Upload-Offset": str(offset), **more})


def offset_of(client: httpx.Client, url: str) -> int:
    response = client.head(url, headers=TUS)
    assert response.status_code == 200
    assert response.headers["cache-control"] == "no-store"
    return int(response.headers["upload-offset"])


def test_tuspy_uploads_and_resumes(server: Server, tmp_path: Path) -> None:
    data = glb(20 * 2**20 + 5)
    source = tmp_path / "Köln.glb"
    source.write_bytes(data)
    tus = TusClient(server.url + "/v1/uploads", headers=server.headers())
    with source.open("rb") as stream:
        first = tus.uploader(file_stream=stream, chunk_size=3 * 2**20, metadata={"filename": source.name}, upload_checksum=True)
        for _ in range(3):
            first.upload_chunk()
        again = tus.uploader(file_stream=stream, chunk_size=9 * 2**20, url=str(first.url))
        assert again.offset == 9 * 2**20
        again.upload()
    with server.client() as client:
        said = client.head(str(again.url), headers=TUS).headers
        assert said["upload-offset"] == said["upload-length"] == str(len(data))
        file = f"/v1/files/{said['scangraph-file']}"
        assert said["content-location"] == file
        assert client.get(file).content == data
        assert client.get(f"{file}/metadata").json()["filename"] == "Köln.glb"
        assert client.delete(file).status_code == 204
    assert server.stored() == []


def test_every_way_to_begin(server: Server) -> None:
    data = nifti()
    with server.client() as client:
        options = httpx.options(server.url + "/v1/uploads")
        assert options.status_code == 204
        assert options.headers["tus-version"] == "1.0.0"
        assert set(options.headers["tus-extension"].split(",")) >= {
            "creation",
            "creation-with-upload",
            "expiration",
            "checksum",
        }
        assert options.headers["tus-max-size"] == str(LIMIT)
        headers = {**TUS, **PART_TYPE, "Upload-Length": str(len(data))}
        whole = client.post("/v1/uploads", content=data, headers=headers)
        assert whole.status_code == 201
        assert whole.headers["upload-offset"] == str(len(data))
        assert client.get(f"/v1/files/{whole.headers['scangraph-file']}").content == data
        half = client.post("/v1/uploads", content=data[:100], headers=headers)
        assert half.headers["upload-offset"] == "100"
        rest = append(client, half.headers["location"], 100, data[100:])
        assert rest.status_code == 204
        assert client.get(rest.headers["content-location"]).content == data
        assert append(client, half.headers["location"], len(data), b"").status_code == 204
        problem(client.post("/v1/uploads", headers={**TUS, "Upload-Length": "0"}), 422, "empty-file")


def test_requests_that_tus_refuses(server: Server) -> None:
    with server.client() as client:
        post: Any = lambda **headers: client.post("/v1/uploads", headers={k.replace("_", "-"): v for k, v in headers.items()})  # noqa: E731
        refused = post(Upload_Length="5")
        problem(refused, 412, "tus-version")
        assert refused.headers["tus-version"] == refused.headers["tus-resumable"] == "1.0.0"
        for bad in ("", "-1", "x", "9" * 20, "1.5"):
            problem(post(**TUS, Upload_Length=bad), 400, "invalid-upload")
        problem(post(**TUS, Upload_Defer_Length="1"), 400, "invalid-upload")
        problem(post(**TUS, Upload_Length=str(LIMIT + 1)), 413, "upload-too-large")
        problem(post(**TUS, Upload_Length="5", Upload_Metadata="filename ???"), 400, "invalid-upload")
        url = begin(client, 5)
        problem(client.patch(url, content=b"x", headers={**TUS, "Upload-Offset": "0"}), 415, "unsupported-media")
        problem(append(client, url, 1, b"x"), 409, "upload-conflict")
        problem(append(client, url, 0, b"123456"), 413, "body-too-large")
        problem(append(client, url, 0, iter([b"123456"])), 413, "body-too-large")
        problem(append(client, url, 0, b"x", **{"Upload-Checksum": "md5 abc"}), 400, "invalid-upload")
        assert offset_of(client, url) == 0
        problem(append(client, url.rsplit("/", 1)[0] + "/nothing", 0, b"x"), 404, "not-found")
        with server.client("root", "admin") as other, server.client("ann", "viewer") as viewer:
            assert other.head(url, headers=TUS).status_code == 404
            problem(append(other, url, 0, b"12345"), 404, "not-found")
            problem(append(viewer, url, 0, b"12345"), 403, "forbidden")
        begin(client, 5)
        begin(client, 5)
        refused = client.post("/v1/uploads", headers={**TUS, "Upload-Length": "5"})
        problem(refused, 429, "too-many-requests")
        assert client.delete(url, headers=TUS).status_code == 204
        begin(client, 5)
        overriding = {**TUS, "X-HTTP-Method-Override": "DELETE"}
        problem(client.post(url, headers=overriding), 404, "not-found")
        problem(client.post(url, headers={**TUS, "X-HTTP-Method-Override": "PUT"}), 405, "method-not-allowed")
    assert server.stored() == []


def test_checksums(server: Server) -> None:
    data = glb(2 * PART + 100)

    def sums(kind: str, part: bytes) -> dict[str, str]:
        return {"Upload-Checksum": f"{kind} {base64.b64encode(hashlib.new(kind, part).digest()).decode()}"}

    with server.client() as client:
        url = begin(client, len(data))
        refused = append(client, url, 0, data[: PART + 10], **sums("sha1", b"other"))
        problem(refused, 460, "checksum-mismatch")
        assert refused.headers["tus-resumable"] == "1.0.0"
        assert offset_of(client, url) == 0
        assert server.stored() == []
        assert append(client, url, 0, data[: PART + 10], **sums("sha1", data[: PART + 10])).status_code == 204
        problem(append(client, url, PART + 10, data[PART + 10 :], **sums("sha256", data)), 460, "checksum-mismatch")
        done = append(client, url, PART + 10, data[PART + 10 :], **sums("sha256", data[PART + 10 :]))
        assert client.get(done.headers["content-location"]).content == data
    assert len(server.stored()) == 1


@pytest.mark.parametrize("how", ["gone", "silent", "cancelled"])
def test_what_came_before_the_cut_is_kept(tmp_path: Path, how: str) -> None:
    data = glb(12 * 2**20)
    with cut_off(tmp_path, how) as server, server.client() as client:
        url = begin(client, len(data))
        request = (
            f"PATCH {url} HTTP/1.1\r\nTus-Resumable: 1.0.0\r\nUpload-Offset: 0\r\nContent-Type: {PART_TYPE['Content-Type']}"
        )
        answer = talk(server, request, data[: 10 * 2**20], len(data), wait=how == "silent")
        assert how != "silent" or b"408" in answer
        server.eventually(lambda: offset_of(client, url) == 10 * 2**20)
        assert len(server.stored()) == 2
        done = append(client, url, 10 * 2**20, data[10 * 2**20 :])
        assert client.get(done.headers["content-location"]).content == data
        server.eventually(lambda: len(server.stored()) == 1)


def test_a_file_is_made_also_when_the_client_leaves_meanwhile(tmp_path: Path) -> None:
    data = glb(30 * 2**20)
    with cut_off(tmp_path, "cancelled") as server, server.client() as client:
        url = begin(client, len(data))
        request = (
            f"PATCH {url} HTTP/1.1\r\nTus-Resumable: 1.0.0\r\nUpload-Offset: 0\r\nContent-Type: {PART_TYPE['Content-Type']}"
        )
        talk(server, request, data, len(data), wait=False)
        server.eventually(lambda: offset_of(client, url) == len(data))
        said = client.head(url, headers=TUS).headers
        assert client.get(said["content-location"]).content == data
        server.eventually(lambda: len(server.stored()) == 1)


def test_who_comes_back_ends_the_line_that_hangs_and_what_it_brought_counts(server: Server) -> None:
    """An old connection hangs. A browser does not even ask how far it is: it repeats the request on a new one."""
    data = glb(2**20)
    parts = httpx.URL(server.url)
    token = server.headers()["Authorization"]
    with server.client() as client:
        url = begin(client, len(data))
        head = f"PATCH {url} HTTP/1.1\r\nHost: x\r\nAuthorization: {token}\r\nTus-Resumable: 1.0.0\r\nUpload-Offset: 0\r\n"
        head += f"Content-Type: application/offset+octet-stream\r\nContent-Length: {len(data)}\r\n\r\n"
        with socket.create_connection((parts.host, parts.port or 0), timeout=20) as old:
            old.sendall(head.encode() + data[:1000])
            time.sleep(0.1)
            assert offset_of(client, url) == 0  # who asks ends nothing
            old.sendall(data[1000:2000])
            problem(append(client, url, 0, data), 409, "upload-conflict")
            assert b"HTTP/1.1 409" in old.recv(2**16)
        assert offset_of(client, url) == 2000
        done = append(client, url, 2000, data[2000:])
        assert client.get(done.headers["content-location"]).content == data
    server.eventually(lambda: len(server.stored()) == len(server.rows()) == 1)


def test_parallel_parts_at_one_offset_do_not_both_win(server: Server) -> None:
    data = glb(300_000)
    with server.client() as client:
        url = begin(client, len(data))
        answers: list[httpx.Response] = []

        def once() -> None:
            with server.client() as own:
                answers.append(append(own, url, 0, data[:200_000]))

        threads = [threading.Thread(target=once) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted({answer.status_code for answer in answers}) in ([204, 409], [204])
        assert [answer.status_code for answer in answers].count(204) == 1
        assert offset_of(client, url) == 200_000
        assert append(client, url, 200_000, data[200_000:]).status_code == 204
    assert len(server.stored()) == 1


def test_what_the_gate_refuses_is_gone(server: Server) -> None:
    with server.client() as client:
        url = begin(client, 13)
        problem(append(client, url, 0, b"what is this?"), 415, "unsupported-media")
        assert client.head(url, headers=TUS).status_code == 404
    assert server.stored() == []


def test_uploads_end_when_they_are_given_up_or_too_old(server: Server) -> None:
    store, storage = server.services.store, server.services.storage
    with server.client() as client:
        url, other = begin(client, 5000), begin(client, 5000)
        append(client, url, 0, bytes(2000))
        append(client, other, 0, bytes(2000))
        assert len(server.stored()) == 2
        assert client.delete(url, headers=TUS).status_code == 204
        assert len(server.stored()) == 1
        problem(append(client, url, 2000, bytes(2000)), 404, "not-found")
        upload = server.run(records.get_upload(store, other.rsplit("/", 1)[1]))
        names = server.run(records.expire_files(store, upload.expires_at))
        assert names == server.stored()
        for name in names:
            server.run(storage.delete(name))
        assert client.head(other, headers=TUS).status_code == 404


def test_an_upload_survives_the_death_of_its_gateway(tmp_path: Path) -> None:
    data = glb(30 * 2**20)
    serve = "import sys; from tests.gateway.test_files import serve_alone; serve_alone(sys.argv[1])"
    root = Path(__file__).resolve().parents[2]

    @contextlib.contextmanager
    def gateway() -> Iterator[tuple[int, httpx.Client]]:
        command = [sys.executable, "-c", serve, str(tmp_path)]
        with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout is not None
                address = process.stdout.readline().strip()
                headers = json.loads((tmp_path / "bearer").read_text())
                with httpx.Client(base_url=address, headers=headers, timeout=30) as client:
                    yield process.pid, client
            finally:
                process.kill()

    with gateway() as (pid, client):
        url = begin(client, len(data))

        def pieces() -> Iterator[bytes]:
            yield data[: 25 * 2**20]
            with httpx.Client(base_url=client.base_url, headers=client.headers) as watching:
                while offset_of(watching, url) < 3 * PART:
                    time.sleep(0.1)
            os.kill(pid, signal.SIGKILL)
            yield data[25 * 2**20 :]

        with pytest.raises(httpx.TransportError):
            append(client, url, 0, pieces())
    with gateway() as (_, client):
        offset = offset_of(client, url)
        assert 3 * PART <= offset < 25 * 2**20
        done = append(client, url, offset, data[offset:])
        assert client.get(done.headers["content-location"]).content == data


def serve_alone(folder: str) -> None:
    """Serve until the process is killed; prints the address."""
    with serving(settings_for(Path(folder), stall_seconds=60)) as server:
        Path(folder, "bearer").write_text(json.dumps(server.headers()))
        print(server.url, flush=True)
        signal.sigwait([signal.SIGTERM])
