"""The client against the real application, real records and a real executor; some of it through a proxy that cuts."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import json
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn

import scangraph
from deployments.imageio.nifti import write_nifti
from scangraph.client import AsyncClient, Client, Login, ServerError, ServerUnreachable, Update, calls
from scangraph.client import transfer as transfer_module
from scangraph.client.failures import from_answer, from_problem
from scangraph.client.logins import LoginFile
from scangraph.contracts import errors
from scangraph.contracts.api import InputFile
from scangraph.contracts.errors import (
    AlreadyEnded,
    Forbidden,
    InvalidInputs,
    InvalidPipeline,
    NoSuch,
    NotEnded,
    PreconditionFailed,
    ScanGraphError,
    StageFailed,
    TooManyRequests,
    Unauthenticated,
    UsageError,
)
from scangraph.contracts.pipelines import PipelineSpec
from scangraph.settings import load_settings
from tests.conftest import constant_volume
from tests.servers import Proxy, Server, proxied, serving

SPEC = {
    "name": "chain",
    "inputs": {"image": {"kind": "image"}},
    "steps": [
        {"id": "mask", "component": "test/threshold", "inputs": {"image": "input.image"}},
        {"id": "scene", "component": "test/box", "inputs": {"mask": "mask.mask"}},
    ],
    "outputs": {"mask": "mask.mask", "scene": "scene.scene"},
}
GLB = b"glTF\x02\0\0\0"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    settings = load_settings(
        data=tmp_path_factory.mktemp("data"),
        auth={"access_seconds": 900, "logins_per_minute": 5},
        gateway={"poll_seconds": 0.05, "stall_seconds": 2},
        executor={"lease_seconds": 5},
    )
    with serving(settings) as running:
        password = running.account("ann", "editor")
        with Client(running.url) as client:
            client.login("ann", password)
            client.create_pipeline(SPEC)
        yield running


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    with Client(server.url, patience=10) as client:
        client.login("ann", "correct horse ann")
        yield client


@pytest.fixture
def proxy(server: Server) -> Iterator[Proxy]:
    with proxied(server.port) as proxy:
        yield proxy


@pytest.fixture
def behind(proxy: Proxy, server: Server) -> Iterator[Client]:
    """A client behind the proxy."""
    with Client(proxy.url, patience=10) as client:
        client.login("ann", "correct horse ann")
        yield client


@pytest.fixture
def ct(tmp_path: Path) -> Path:
    path = tmp_path / "ct.nii.gz"
    path.write_bytes(write_nifti(constant_volume(int(time.time() * 1000) % 1000 + 1)))  # no result is known from before
    return path


def glb(size: int) -> bytes:
    return GLB + np.random.default_rng(size).bytes(size - len(GLB))


def slow(seconds: float, label: int = 5) -> dict[str, Any]:
    return {"steps": {"mask": {"seconds": seconds, "label": label}}}


# --- the whole way ------------------------------------------------------------------------------------------------------------


def test_run_sends_runs_watches_and_fetches(client: Client, ct: Path, tmp_path: Path) -> None:
    updates: list[Update] = []
    transfers: list[tuple[str, int, int]] = []
    done = client.run(
        "chain",
        {"image": ct},
        tmp_path / "out",
        parameters=slow(0.3),
        on_update=updates.append,
        on_transfer=lambda *a: transfers.append(a),
    )
    assert done.execution.status == "completed"
    assert done.execution.priority == "normal"
    assert [path.name for path in done.files["mask"]] == ["mask.nii.gz"]
    for output in done.execution.output_files:
        data = (tmp_path / "out" / output.filename).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (output.size, output.sha256)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(o.filename for o in done.execution.output_files)
    assert updates[0].type == "snapshot"
    assert updates[-1].status == "completed"
    assert updates[-1].output_files == done.execution.output_files
    assert updates[-1].steps["scene"].completed_at is not None
    numbers = [update.seq for update in updates]
    assert numbers == sorted(numbers)  # type: ignore[type-var]
    assert {name for name, _, _ in transfers} == {"ct.nii.gz"} | {o.filename for o in done.execution.output_files}
    lineage = client.provenance(done.execution.execution_id)
    assert lineage["pipeline"]["name"] == "chain"


def test_async_client_is_the_same(server: Server, ct: Path, tmp_path: Path) -> None:
    async def go() -> None:
        async with scangraph.AsyncClient(server.url) as client:
            await client.login("ann", "correct horse ann")
            done = await asyncio.gather(*(client.run("chain", {"image": ct}, tmp_path / str(n)) for n in range(4)))
            assert len({one.execution.execution_id for one in done}) == 4
            assert [v.name async for v in client.pipelines()]

    asyncio.run(go())


def test_every_method_has_a_blocking_face() -> None:
    def public(cls: type) -> set[str]:
        return {name for name in vars(cls) if not name.startswith("_")}

    assert public(AsyncClient) == public(Client)


def test_what_may_be_given_for_an_input(client: Client, ct: Path) -> None:
    sent = client.upload(ct)
    for given in (ct, str(ct), sent, sent.id, InputFile(path=sent.path)):
        view = client.wait(client.start("chain", {"image": given}).execution_id, 20)
        assert view.status == "completed"
        assert view.inputs["image"]["sha256"] == sent.sha256
    with pytest.raises(UsageError, match="no file of this machine"):
        client.start("chain", {"image": "nowhere.nii.gz"})
    with pytest.raises(InvalidInputs) as caught:
        client.start("chain", {"image": [sent.id], "other": sent.id})
    assert {e["pointer"] for e in caught.value.fields["errors"]} == {"/inputs/image", "/inputs/other"}
    assert caught.value.fields["trace_id"]


def test_start_with_one_key_is_one_execution(client: Client, ct: Path) -> None:
    sent = client.upload(ct)
    ids = {client.start("chain", {"image": sent}, idempotency_key="k-" + sent.id).execution_id for _ in range(3)}
    assert len(ids) == 1


def test_cancel_retry_and_the_errors_of_an_end(client: Client, ct: Path, tmp_path: Path) -> None:
    started = client.start("chain", {"image": ct}, parameters=slow(60), priority="high")
    assert started.status in {"pending", "running"}
    with pytest.raises(TimeoutError):
        client.wait(started.execution_id, 0.3)
    with pytest.raises(NotEnded):
        client.retry(started.execution_id)
    with pytest.raises(UsageError, match="wait for its end"):
        client.fetch(started.execution_id, tmp_path)
    client.cancel(started.execution_id)
    view = client.wait(started.execution_id, 20)
    assert (view.status, view.priority) == ("cancelled", "high")
    assert client.cancel(started.execution_id).status == "cancelled"
    with pytest.raises(AlreadyEnded):
        client.fetch(started.execution_id, tmp_path)
    again = client.retry(started.execution_id)
    client.cancel(again.execution_id)
    assert client.execution(again.execution_id).retry_of == started.execution_id
    with pytest.raises(StageFailed) as caught:
        client.run("chain", {"image": ct}, tmp_path / "none", parameters={"steps": {"mask": {"fail": True}}})
    assert caught.value.fields["execution_id"] in {v.execution_id for v in client.executions(status="failed")}
    assert not (tmp_path / "none").exists()


def test_lists_go_over_all_pages(client: Client, ct: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "_PAGE", 4)
    sent = client.upload(ct)
    made = [client.start("chain", {"image": sent}).execution_id for _ in range(11)]
    found = [view.execution_id for view in client.executions(pipeline="chain")]
    assert len(found) == len(set(found))
    assert set(made) <= set(found)
    assert sent.id in {view.id for view in client.files(origin="upload", kind="nifti")}
    for execution_id in made:
        client.wait(execution_id, 60)


# --- pipelines, components, files ---------------------------------------------------------------------------------------------


def test_pipelines(client: Client) -> None:
    made = client.create_pipeline({**SPEC, "name": "mine"})
    assert (made.revision, made.etag) == (1, client.pipeline("mine").etag)
    changed = client.update_pipeline("mine", {**SPEC, "name": "mine", "title": "Changed"}, made.etag)
    assert (changed.revision, changed.spec.title) == (2, "Changed")
    assert client.pipeline("mine@1").spec.title == ""
    with pytest.raises(PreconditionFailed):
        client.update_pipeline("mine", SPEC, made.etag)
    assert {"mine", "chain", "test-threshold"} <= {view.name for view in client.pipelines()}
    assert client.validate_pipeline(PipelineSpec.model_validate(SPEC)).valid
    wrong = {**SPEC, "outputs": {"mask": "mask.nothing"}}
    assert client.validate_pipeline(wrong).errors[0]["pointer"] == "/outputs/mask"
    with pytest.raises(InvalidPipeline) as caught:
        client.create_pipeline({**wrong, "name": "wrong"})
    assert caught.value.fields["errors"][0]["pointer"] == "/outputs/mask"
    with pytest.raises(InvalidPipeline, match="/name"):
        client.create_pipeline({**SPEC, "name": "No Slug"})
    client.delete_pipeline("mine", changed.etag)
    with pytest.raises(NoSuch, match="mine"):
        client.pipeline("mine")


def test_components_and_labels(client: Client) -> None:
    assert {c["id"] for c in client.components()} == {"test/threshold", "test/box"}
    assert client.component("test/box")["id"] == "test/box"
    with pytest.raises(errors.UnknownComponent, match="test/nothing"):
        client.component("test/nothing")
    assert {label.name for label in client.labels()} >= {"aorta", "ureter"}


def test_files(client: Client, ct: Path, tmp_path: Path) -> None:
    sent = client.upload(ct)
    assert (sent.filename, sent.kind) == ("ct.nii.gz", "nifti")
    assert sent.metadata["shape_zyx"] == [8, 9, 10]
    opened = io.BytesIO(b"before" + glb(100))
    opened.seek(6)
    assert client.upload(opened, "p.glb").size == 100
    assert client.file(sent.id) == sent
    assert client.download(sent.id, tmp_path / "copy.nii.gz").read_bytes() == ct.read_bytes()
    (tmp_path / "folder").mkdir()
    assert client.download(sent.id, tmp_path / "folder") == tmp_path / "folder" / "ct.nii.gz"
    client.delete_file(sent.id)
    with pytest.raises(NoSuch):
        client.delete_file(sent.id)
    with pytest.raises(NoSuch):
        client.download(sent.id, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["copy.nii.gz", "ct.nii.gz", "folder"]
    with pytest.raises(errors.ScanGraphError):
        client.upload(io.BytesIO(b"GIF89a" + bytes(20)), "x.nii.gz")
    with pytest.raises(UsageError, match="cannot be read"):
        client.upload(tmp_path / "none")


@pytest.mark.parametrize(("name", "plain"), [("../../x", "x"), ("a\\b", "b"), ("..", "file"), ("", "file"), ("ä b", "ä b")])
def test_a_servers_name_stays_in_the_folder(name: str, plain: str) -> None:
    assert transfer_module.plain_name(name) == plain


# --- who asks -----------------------------------------------------------------------------------------------------------------


def test_login_errors(server: Server) -> None:
    with Client(server.url) as client:
        with pytest.raises(Unauthenticated):
            client.me()
        with pytest.raises(Unauthenticated):
            client.login("ann", "wrong")
        with pytest.raises(Unauthenticated):
            list(client.watch("x"))
    with Client(server.url) as client:
        for _ in range(6):
            with pytest.raises((Unauthenticated, TooManyRequests)) as caught:
                client.login("nobody", "wrong")
        assert isinstance(caught.value, TooManyRequests)
        assert caught.value.fields["retry_after_seconds"] > 0


def test_logout_ends_it(server: Server) -> None:
    server.account("leo", "viewer")
    with Client(server.url) as client:
        assert client.login("leo", "correct horse leo").role == "viewer"
        assert client.me().name == "leo"
        with pytest.raises(Forbidden, match="operator"):
            client.upload(io.BytesIO(glb(50)), "p.glb")
        client.logout()
        with pytest.raises(Unauthenticated):
            client.me()


class Box:
    """A keep in memory, shared by clients as a file is by processes."""

    def __init__(self) -> None:
        self.login: Login | None = None
        self.lock = asyncio.Lock()
        self.saved = 0

    def load(self) -> Login | None:
        return self.login

    def save(self, login: Login | None) -> None:
        self.login, self.saved = login, self.saved + 1

    def locked(self) -> asyncio.Lock:
        return self.lock


def test_an_old_token_is_renewed_once_for_all(server: Server) -> None:
    async def go() -> None:
        box: Any = Box()
        async with AsyncClient(server.url, keep=box) as one, AsyncClient(server.url, keep=box) as two:
            await one.login("ann", "correct horse ann")
            box.login = Login(box.login.access_token, box.login.refresh_token, 0)  # old
            async with AsyncClient(server.url, keep=box) as three:
                names = await asyncio.gather(*(c.me() for c in (one, three, one, three) for _ in range(5)))
            assert {n.name for n in names} == {"ann"}
            assert box.saved == 2  # the login, and one renewal
            # Refused though it should be good: renewed as well, and whoever comes later finds the new one.
            box.login = Login("x.y.z", box.login.refresh_token, time.time() + 600)
            async with AsyncClient(server.url, keep=box) as four:
                assert (await four.me()).name == "ann"
            assert box.saved == 3
            with pytest.raises(Unauthenticated):
                await two.me()  # it was made before there was a login

    asyncio.run(go())


def test_a_renewal_outlives_the_request_that_wanted_it(server: Server) -> None:
    """Its answer would be lost, and the token that it was made with is used up."""

    async def go() -> None:
        box: Any = Box()
        async with AsyncClient(server.url, keep=box) as client:
            await client.login("ann", "correct horse ann")
        box.login = old = Login(box.login.access_token, box.login.refresh_token, 0)
        async with AsyncClient(server.url, keep=box) as client:
            asking = asyncio.create_task(client.me())
            while not client._session.access._renewals:  # noqa: ASYNC110
                await asyncio.sleep(0)
            await asyncio.sleep(0.001)  # it is on its way
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking
        assert box.login.refresh_token != old.refresh_token
        async with AsyncClient(server.url, keep=box) as client:
            box.login = Login(box.login.access_token, box.login.refresh_token, 0)
            assert (await client.me()).name == "ann"

    asyncio.run(go())


def test_logins_at_several_servers_are_kept_apart(server: Server, tmp_path: Path) -> None:
    """Race: one process logs in at a server, while another one renews the login at another in the same file."""
    file = LoginFile(tmp_path / "config" / "logins.json")

    async def go() -> None:
        other, here = file.keep("http://other"), file.keep(server.url)
        async with AsyncClient(server.url, keep=here) as client:
            async with other.locked():
                logging_in = asyncio.create_task(client.login("ann", "correct horse ann"))
                await asyncio.sleep(1)
                assert here.load() is None
                other.save(Login("a", "r", 0))
            await logging_in
        assert here.load() is not None
        assert other.load() == Login("a", "r", 0)
        assert file.servers() == [server.url, "http://other"]
        assert file.path.stat().st_mode & 0o777 == 0o600

    asyncio.run(go())


def test_a_login_outlives_its_refresh_token(server: Server) -> None:
    """Somebody logged the account out everywhere: who still knows the password logs in again."""
    with Client(server.url) as client, Client(server.url) as other:
        client.login("ann", "correct horse ann")
        other.login("ann", "correct horse ann")
        other.logout()
        access = client._client._session.access
        assert access._login is not None
        access._login = Login("x.y.z", access._login.refresh_token, 0)
        assert client.me().name == "ann"


def test_a_token_may_be_made_when_it_is_needed(server: Server) -> None:
    made: list[str] = []

    def make() -> str:
        async def sign() -> str:
            from scangraph.store import accounts

            account = await accounts.find_account(server.services.store, "ann")
            return server.services.tokens.sign(account.id, "ann", "editor", account.token_epoch, 2)[0]

        made.append(server.run(sign()))
        return made[-1]

    with Client(server.url, token=make) as client:
        client.me()
        client.me()
        assert len(made) == 1
        time.sleep(1.8)
        client.me()
        assert len(made) == 2
    with Client(server.url, token=made[-1]) as client:
        client.me()
    with Client(server.url, token="nonsense") as client, pytest.raises(Unauthenticated):
        client.me()


def test_a_watch_outlives_its_token(server: Server, client: Client, ct: Path) -> None:
    """The connection is told the new token before the old one expires; one that was revoked means another connection."""
    made: list[str] = []

    def make() -> str:
        async def sign() -> str:
            from scangraph.store import accounts

            account = await accounts.find_account(server.services.store, "ann")
            return server.services.tokens.sign(account.id, "ann", "editor", account.token_epoch, 3)[0]

        made.append(server.run(sign()))
        return made[-1]

    started = client.start("chain", {"image": ct}, parameters=slow(6))
    with Client(server.url, token=make) as short:
        kinds = [update.type for update in short.watch(started.execution_id)]
    assert kinds.count("snapshot") == 1
    assert kinds[-1] == "progress"
    assert len(made) >= 3


# --- faults -------------------------------------------------------------------------------------------------------------------


def test_an_upload_goes_on_after_cuts(behind: Client, proxy: Proxy, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer_module, "LARGE", 2**20)
    data = glb(40 * 2**20 + 17)
    proxy.cuts = [("up", 9 * 2**20), ("up", 13 * 2**20), ("down", 1), ("up", 5 * 2**20)]
    seen: list[int] = []
    sent = behind.upload(io.BytesIO(data), "large.glb", on_bytes=lambda done, total: seen.append(done))
    assert not proxy.cuts
    assert (sent.size, sent.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert seen[-1] == len(data)
    assert seen != sorted(seen)  # it began again somewhere, but nowhere near the beginning
    assert sum(view.sha256 == sent.sha256 for view in behind.files()) == 1


def test_a_lost_answer_to_an_upload_goes_on_resumably(behind: Client, proxy: Proxy) -> None:
    data = glb(3 * 2**20)
    proxy.cuts = [("up", 2 * 2**20)]
    sent = behind.upload(io.BytesIO(data), "p.glb")
    assert sent.sha256 == hashlib.sha256(data).hexdigest()


def test_a_download_goes_on_after_cuts(behind: Client, proxy: Proxy, tmp_path: Path) -> None:
    data = glb(24 * 2**20)
    sent = behind.upload(io.BytesIO(data), "p.glb")
    proxy.cuts = [("down", 7 * 2**20), ("down", 5 * 2**20), ("down", 100)]
    seen: list[int] = []
    path = behind.download(sent.id, tmp_path / "p.glb", on_bytes=lambda done, total: seen.append(done))
    assert not proxy.cuts
    assert path.read_bytes() == data
    assert seen == sorted(seen)  # no byte came twice
    assert [p.name for p in tmp_path.iterdir()] == ["p.glb"]


def test_damage_is_seen(server: Server, client: Client, tmp_path: Path) -> None:
    sent = client.upload(io.BytesIO(glb(5000)), "p.glb")
    storage = server.services.storage
    damaged = b"x" + server.run(storage.read(sent.path))[1:]
    server.run(storage.delete(sent.path))
    server.run(storage.write(sent.path, damaged))
    (tmp_path / "p.glb").write_bytes(b"what was there")
    with pytest.raises(errors.DigestMismatch):
        client.download(sent.id, tmp_path / "p.glb")
    assert (tmp_path / "p.glb").read_bytes() == b"what was there"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_watch_misses_nothing_when_it_is_cut(behind: Client, client: Client, proxy: Proxy, ct: Path) -> None:
    started = client.start("chain", {"image": ct}, parameters=slow(4))
    numbers, kinds = [], []
    for update in behind.watch(started.execution_id):
        numbers.append(update.seq)
        kinds.append(update.type)
        if len(numbers) in {2, 4, 5}:
            proxy.cut()
    assert kinds.count("snapshot") == 1
    assert numbers == list(range(numbers[0] or 0, (numbers[0] or 0) + len(numbers)))
    assert update.status == "completed"


def test_where_there_is_no_websocket_the_server_is_asked(client: Client, ct: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from scangraph.client.session import Session

    monkeypatch.setattr(Session, "websocket_url", property(lambda self: self.url.replace("http", "ws") + "/nothing"))
    started = client.start("chain", {"image": ct}, parameters=slow(1))
    updates = list(client.watch(started.execution_id))
    assert updates[-1].status == "completed"
    assert {update.type for update in updates} == {"snapshot"}
    assert len(updates) < 20


def test_a_server_that_comes_back_is_waited_for(server: Server, client: Client, ct: Path) -> None:
    sent = client.upload(ct)
    started = client.start("chain", {"image": sent}, parameters=slow(2))
    server.down()
    threading.Timer(2, server.up).start()
    assert client.start("chain", {"image": sent}).execution_id
    assert client.wait(started.execution_id, 30).status == "completed"


def test_one_that_does_not_come_back_is_an_error() -> None:
    with Client("http://127.0.0.1:9", patience=0.5) as client:
        began = time.monotonic()
        with pytest.raises(ServerUnreachable, match="127.0.0.1:9"):
            client.me()
        with pytest.raises(ServerUnreachable):
            list(client.watch("x"))
        with pytest.raises(ServerUnreachable):
            client.upload(io.BytesIO(glb(50)), "p.glb")
        assert time.monotonic() - began < 5


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://x", "http://", "http://[", "http://x:port"])
def test_addresses(url: str) -> None:
    with pytest.raises(UsageError, match="no address"):
        Client(url)


@pytest.fixture
def scripted() -> Iterator[Callable[..., tuple[str, list[dict[str, Any]]]]]:
    """A server that answers with what it was given, in order, and notes what it was asked."""
    stops = []

    def start(*answers: tuple[int, dict[str, str], bytes]) -> tuple[str, list[dict[str, Any]]]:
        asked: list[dict[str, Any]] = []
        left = list(answers)

        async def app(scope: Any, receive: Any, send: Any) -> None:
            while (await receive()).get("more_body"):
                pass
            headers = {key.decode(): value.decode() for key, value in scope["headers"]}
            asked.append({"method": scope["method"], "path": scope["path"], "at": time.monotonic(), **headers})
            status, extra, body = left.pop(0) if len(left) > 1 else left[0]
            head = [(key.encode(), value.encode()) for key, value in extra.items()]
            await send({"type": "http.response.start", "status": status, "headers": head})
            await send({"type": "http.response.body", "body": body})

        config = uvicorn.Config(app, port=0, log_level="critical", lifespan="off", timeout_graceful_shutdown=1)
        running = uvicorn.Server(config)
        thread = threading.Thread(target=running.run)
        thread.start()
        while not running.started:
            time.sleep(0.01)
        stops.append((running, thread))
        return f"http://127.0.0.1:{running.servers[0].sockets[0].getsockname()[1]}", asked

    yield start
    for running, thread in stops:
        running.should_exit = True
        thread.join()


JSON, PROBLEM = {"content-type": "application/json"}, {"content-type": "application/problem+json"}


def problem(status: int, code: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    body = {"type": f"urn:scangraph:problem:{code}", "title": "T", "status": status, "detail": "Said {so}.", "trace_id": "t1"}
    return status, {**PROBLEM, **headers}, json.dumps(body).encode()


ACCEPTED = (202, JSON, b'{"execution_id": "e", "status": "pending", "something_newer": 1}')


def test_retry_after_is_obeyed_and_the_key_stays(scripted: Any) -> None:
    busy = problem(429, "queue-full", **{"retry-after": "1"})
    url, asked = scripted(busy, problem(503, "overloaded"), (502, {}, b"<html>"), problem(503, "gateway-lost"), ACCEPTED)
    with Client(url, token="t") as client:
        assert client.start("p", {}).execution_id == "e"
    assert len(asked) == 5
    assert asked[1]["at"] - asked[0]["at"] >= 1
    assert len({one["idempotency-key"] for one in asked}) == 1


def test_retry_after_may_be_a_date(scripted: Any) -> None:
    when = format_datetime(datetime.now(UTC) + timedelta(seconds=2), usegmt=True)
    url, asked = scripted((503, {"retry-after": when}, b"busy"), ACCEPTED)
    with Client(url, token="t") as client:
        assert client.start("p", {}).execution_id == "e"
    assert asked[1]["at"] - asked[0]["at"] > 0.7


def test_an_upload_goes_on_when_its_gateway_was_lost(scripted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The proxy answers for it; so does one that found us too slow."""
    monkeypatch.setattr(transfer_module, "LARGE", 0)
    data = glb(100)
    at, file = {"upload-offset": "50"}, {"upload-offset": "100", "scangraph-file": "f"}
    view = {
        "id": "f",
        "filename": "p.glb",
        "kind": "glb",
        "media_type": "model/gltf-binary",
        "size": 100,
        "path": "files/f/p.glb",
        "created_at": "2026-01-01T00:00:00Z",
        "origin": "upload",
        "download_url": "/v1/files/f",
        "metadata": {},
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    url, asked = scripted(
        (201, {"location": "/v1/uploads/u"}, b""),
        problem(503, "gateway-lost"),
        (200, at, b""),
        problem(408, "upload-incomplete"),
        (200, at, b""),
        (204, file, b""),
        (200, JSON, json.dumps(view).encode()),
    )
    with Client(url, token="t") as client:
        assert client.upload(io.BytesIO(data), "p.glb").id == "f"
    sent = [(one["method"], one.get("upload-offset")) for one in asked]
    assert sent[1:6] == [("PATCH", "0"), ("HEAD", None), ("PATCH", "50"), ("HEAD", None), ("PATCH", "50")]


def test_what_may_not_be_sent_twice_is_not(scripted: Any) -> None:
    url, asked = scripted(problem(503, "gateway-lost"))
    with Client(url, token="t", patience=5) as client:
        with pytest.raises(errors.GatewayLost, match="Said {so}") as caught:
            client.create_pipeline(SPEC)
        assert len(asked) == 1
        with pytest.raises(errors.GatewayLost):
            client.login("ann", "x")
        assert len(asked) == 2
    assert (caught.value.status, caught.value.code) == (503, "gateway-lost")


def test_a_wait_that_is_too_long_is_an_error(scripted: Any) -> None:
    url, asked = scripted(problem(503, "store-unavailable", **{"retry-after": "30"}))
    with Client(url, token="t", patience=3) as client, pytest.raises(errors.StoreUnavailable, match="Said"):
        client.me()
    assert len(asked) == 1


def test_a_deletion_whose_answer_was_lost_is_done(scripted: Any) -> None:
    url, asked = scripted(problem(503, "gateway-lost"), problem(404, "not-found"))
    with Client(url, token="t") as client:
        client.delete_file("f")
    assert len(asked) == 2


def test_what_is_no_scangraph_is_said(scripted: Any) -> None:
    url, _ = scripted((200, {"content-type": "text/html"}, b"<html>"))
    with Client(url, token="t") as client, pytest.raises(ServerError, match="is it a scangraph"):
        client.me()


def test_every_code_comes_back_as_its_class() -> None:
    def below(cls: type[ScanGraphError]) -> Iterator[type[ScanGraphError]]:
        for one in cls.__subclasses__():
            if one.__module__ == errors.__name__ and "code" in vars(one):
                yield one
            yield from below(one)

    classes = list(below(ScanGraphError))
    assert len({cls.code for cls in classes}) == len(classes) > 50
    for cls in classes:
        made = from_problem(cls.code, cls.status, cls.title, "Because {of} this.")
        assert type(made) is cls
        assert str(made) == made.detail == "Because {of} this."
        again = pickle.loads(pickle.dumps(made))
        assert (type(again), again.detail, again.status) == (cls, made.detail, made.status)
    plain = from_answer(500, "text/plain", b"oh", "there")
    assert isinstance(plain, ServerError)
    assert plain.code == "http-500"


def test_the_blocking_client_refuses_to_wait_for_itself(client: Client, ct: Path) -> None:
    with pytest.raises(RuntimeError, match="callback"):
        client.upload(ct, on_bytes=lambda *_: print(client.me()))


def test_a_generator_that_is_left_lets_go(client: Client, ct: Path) -> None:
    started = client.start("chain", {"image": ct}, parameters=slow(30))
    for update in client.watch(started.execution_id):
        assert update.status in {"pending", "running"}
        break
    client.cancel(started.execution_id)
    client.wait(started.execution_id, 20)


def test_a_generator_may_outlive_its_client(client: Client, server: Server, ct: Path) -> None:
    started = client.start("chain", {"image": ct}, parameters=slow(30))
    with Client(server.url) as other:
        other.login("ann", "correct horse ann")
        updates = other.watch(started.execution_id)
        assert next(updates).type == "snapshot"
    updates.close()
    with pytest.raises(RuntimeError, match="closed"):
        other.me()
    client.cancel(started.execution_id)
    client.wait(started.execution_id, 20)


def test_a_watch_from_the_last_number_ends_too(client: Client, ct: Path) -> None:
    started = client.start("chain", {"image": ct})
    last = list(client.watch(started.execution_id))[-1]
    (again,) = client.watch(started.execution_id, last.seq)
    assert (again.status, again.seq) == ("completed", last.seq)


def test_tokens_are_only_read_for_their_age() -> None:
    from scangraph.client.access import _renewal_of

    body = base64.urlsafe_b64encode(json.dumps({"iat": 1000, "exp": 1100}).encode()).decode().rstrip("=")
    assert 70 < _renewal_of(f"x.{body}.y") - time.time() <= 80
    assert _renewal_of("opaque") == float("inf")
