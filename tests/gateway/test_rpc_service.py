"""gRPC on a real service: Serve's own proxy, a replica in its process, stages in theirs, clients from outside."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import psutil
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from websockets.sync.client import connect

from benchmarks.service import ServiceProcess
from deployments.imageio.nifti import read_nifti, write_nifti
from scangraph.accounts_cli import local_token
from scangraph.contracts import LabelMap, Volume
from scangraph.handles import SERVICE_FILE
from scangraph.imageflow.v1 import imageflow_pb2 as pb
from scangraph.imageflow.v1 import imageflow_pb2_grpc
from scangraph.settings import Settings
from tests.conftest import ROOT
from tests.gateway.rpc_server import chunks

BUF = "@bufbuild/buf@1.75.0"
NAME = "imageflow.v1.ImageProcessingService"


@pytest.fixture(scope="module")
def target(service: str, service_settings: Settings) -> str:
    """Where gRPC is, once every stage is ready."""
    assert service
    found = str(json.loads((service_settings.data / SERVICE_FILE).read_text())["grpc"])
    with grpc.insecure_channel(found) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        end = time.monotonic() + 200
        while health.Check(health_pb2.HealthCheckRequest(service=NAME), timeout=30).status != 1:
            assert time.monotonic() < end
            time.sleep(0.5)
    return found


@pytest.fixture(scope="module")
def token(service: str, service_settings: Settings) -> str:
    return local_token(service_settings, minutes=120)


@pytest.fixture(scope="module")
def bearer(token: str) -> list[tuple[str, str]]:
    return [("authorization", f"Bearer {token}")]


@pytest.fixture
def stub(target: str) -> Iterator[Any]:
    with grpc.insecure_channel(target) as channel:
        yield imageflow_pb2_grpc.ImageProcessingServiceStub(channel)


def mask(side: int = 5) -> bytes:
    """A cube, and a speck that `postprocess/clean` may take away."""
    array = np.pad(np.full((side, side, side), 2, np.uint8), 4)
    array[1, 1, 1] = 2
    return write_nifti(LabelMap(array, (1, 1, 1), labels=(2,)))


def test_a_mask_is_cleaned(stub: Any, bearer: Any) -> None:
    metadata = pb.ImageMetadata(
        filename="mask.nii.gz",
        pipeline_id="postprocess-clean",
        parameters={"steps": '{"run": {"min_mm3": 5}}'},
        result_delivery=pb.RESULT_DELIVERY_CHUNKS,
    )
    answer = stub.ProcessSingleImage(pb.ImageRequest(metadata=metadata, data=mask()), metadata=bearer, timeout=120)
    cleaned = read_nifti(answer.results[0].data, "mask.nii.gz", as_mask=True).array
    assert (cleaned > 0).sum() == 125


def test_errors_come_with_their_details_through_serves_proxy(stub: Any, bearer: Any) -> None:
    request = pb.ImageRequest(metadata=pb.ImageMetadata(pipeline_id="no-such"), data=b"x")
    for call, metadata, code, reason in (
        (lambda m: stub.ProcessSingleImage(request, metadata=m), [], "UNAUTHENTICATED", "unauthenticated"),
        (lambda m: stub.ProcessSingleImage(request, metadata=m), bearer, "NOT_FOUND", "not-found"),
        (lambda m: list(stub.ProcessImageStream(iter(()), metadata=m)), [], "UNAUTHENTICATED", "unauthenticated"),
        (lambda m: list(stub.WatchExecution(pb.WatchRequest(execution_id="x"), metadata=m)), bearer, "NOT_FOUND", "not-found"),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            call(metadata)
        error = caught.value
        status = status_pb2.Status.FromString(dict(error.trailing_metadata())["grpc-status-details-bin"])
        info = error_details_pb2.ErrorInfo()
        status.details[0].Unpack(info)
        assert (error.code().name, info.reason, status.message) == (code, reason, error.details())


def test_metadata_does_not_steer_serve(stub: Any, bearer: Any) -> None:
    steering = [("application", "another"), ("multiplexed_model_id", "x"), ("session_id", "y"), ("request_id", "a b;c")]
    request = pb.ImageRequest(metadata=pb.ImageMetadata(filename="m.nii.gz", pipeline_id="postprocess-clean"), data=mask())
    answer = stub.ProcessSingleImage(request, metadata=[*bearer, *steering], timeout=120)
    assert answer.status == pb.STATUS_COMPLETED


def test_it_listens_where_http_listens(target: str) -> None:
    import psutil

    port = int(target.rpartition(":")[2])
    addresses = {c.laddr.ip for c in psutil.net_connections("tcp") if c.laddr and c.laddr.port == port and c.status == "LISTEN"}
    assert {address.removeprefix("::ffff:") for address in addresses} == {"127.0.0.1"}


def test_a_stream_of_masks(stub: Any, bearer: Any) -> None:
    images = {str(n): mask(5 + n) for n in range(4)}
    parts = [
        list(chunks(image, 3, name, filename="m.nii.gz", pipeline_id="postprocess-clean")) for name, image in images.items()
    ]
    interleaved = [chunk for turn in zip(*parts, strict=True) for chunk in turn]
    told = list(stub.ProcessImageStream(iter(interleaved), metadata=bearer, timeout=240))
    assert {t.image_id for t in told if t.is_final and t.status == pb.STATUS_COMPLETED} == set(images)


def test_a_deadline_reaches_the_execution(stub: Any, bearer: Any, service: str, token: str) -> None:
    volume = Volume(np.zeros((160, 220, 220), np.int16), (2, 2, 2))
    headers = {"Authorization": f"Bearer {token}"}
    with httpx.Client(base_url=service, headers=headers, timeout=60) as client:
        image = write_nifti(volume)
        parts = chunks(image, 3, filename="ct.nii.gz", pipeline_id="inference-totalseg")
        call = stub.ProcessImageStream(parts, metadata=bearer, timeout=100)
        execution_id = next(call).execution_id
        call.cancel()
        end = time.monotonic() + 100
        while (state := client.get(f"/v1/executions/{execution_id}").json()["status"]) not in {"cancelled", "completed"}:
            assert time.monotonic() < end, state
            time.sleep(0.3)
        assert state == "cancelled"


def test_what_clients_do_is_no_error_in_the_logs(stub: Any, bearer: Any, service_settings: Settings) -> None:
    for number in range(5):
        parts = chunks(mask(9 + number), 1, filename="m.nii.gz", pipeline_id="postprocess-clean")
        told = stub.ProcessImageStream(parts, metadata=bearer, timeout=100)
        next(told)
        told.cancel()
    cut = chunks(mask()[:-9], 1, filename="m.nii.gz", pipeline_id="postprocess-clean")
    ends = list(stub.ProcessImageStream(cut, metadata=bearer, timeout=100))
    assert ends[-1].error.code == "INVALID_ARGUMENT"
    time.sleep(2)  # what is left behind is reported when it is collected; there is nothing to wait for but that no line comes
    logs = service_settings.data / "logs"
    (proxy,), (imageio,) = logs.glob("proxy_*.log"), logs.glob("replica_*_imageio_*.log")
    assert "never retrieved" not in proxy.read_text()
    assert "Request failed" not in imageio.read_text()


def test_a_call_whose_gateway_is_killed_ends_and_the_same_call_again_finds_its_execution(stub: Any, bearer: Any) -> None:
    image = write_nifti(Volume(np.ones((160, 220, 220), np.int16), (2, 2, 2)))

    def call() -> Any:
        parts = chunks(image, 3, filename="ct.nii.gz", pipeline_id="inference-totalseg", idempotency_key="asked twice")
        return stub.ProcessImageStream(parts, metadata=bearer, timeout=240)

    told = call()
    execution_id = next(told).execution_id
    for process in ServiceProcess.matching(psutil.Process().children(recursive=True), "gateway"):
        process.kill()
    with pytest.raises(grpc.RpcError) as broken:
        list(told)
    codes = {broken.value.code()}
    end, again = time.monotonic() + 200, None
    while again is None:
        try:
            again = list(call())
        except grpc.RpcError as error:
            codes.add(error.code())
            assert time.monotonic() < end
            time.sleep(0.5)
    assert codes == {grpc.StatusCode.UNAVAILABLE}
    assert {each.execution_id for each in again} == {execution_id}
    assert again[-1].status == pb.STATUS_COMPLETED


def test_a_websocket_and_grpc_tell_the_same_history(stub: Any, bearer: Any, service: str, token: str) -> None:
    """Both begin while it runs, and both from number 0."""
    image = mask(9)
    chunk = pb.ImageChunk(
        metadata=pb.ImageMetadata(filename="m.nii.gz", pipeline_id="postprocess-clean", detached=True),
        data=image,
        is_final=True,
    )
    told = stub.ProcessImageStream(iter([chunk]), metadata=bearer, timeout=120)
    execution_id = next(told).execution_id
    heard: list[dict[str, Any]] = []

    def listen() -> None:
        with connect(service.replace("http", "ws") + "/v1/ws") as socket:
            socket.send(json.dumps({"type": "auth", "token": token}))
            socket.recv()
            socket.send(json.dumps({"type": "watch", "execution_id": execution_id, "seq": 0}))
            while not heard or heard[-1].get("status") not in {"completed", "failed", "cancelled"}:
                message = json.loads(socket.recv(timeout=100))
                if "status" in message:
                    heard.append(message)

    listener = threading.Thread(target=listen)
    listener.start()
    wish = pb.WatchRequest(execution_id=execution_id, after_seq=0)
    updates = list(stub.WatchExecution(wish, metadata=bearer, timeout=120))
    listener.join(120)
    list(told)
    assert [u.seq for u in updates] == list(range(1, len(updates) + 1))
    names = {"completed": pb.STATUS_COMPLETED, "running": pb.STATUS_RUNNING, "pending": pb.STATUS_PENDING}
    mine = [(u.seq, u.status, u.progress_percentage, u.current_step, sorted(s.step_id for s in u.steps)) for u in updates]
    theirs = [
        (m["seq"], names[m["status"]], m["progress_percentage"], m["current_step"] or "", sorted(m["step_details"]))
        for m in heard
    ]
    assert mine == theirs


# --- from outside ----------------------------------------------------------------------------------------------------------


def test_the_examples_run(target: str, token: str, tmp_path: Path) -> None:
    for name, side in (("one", 5), ("two", 6)):
        (tmp_path / f"{name}.nii.gz").write_bytes(mask(side))
    (tmp_path / "bad.nii.gz").write_bytes(mask()[:-9])
    environment = {**os.environ, "SCANGRAPH_TOKEN": token, "PYTHONPATH": str(ROOT)}

    def run(example: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "examples" / example), target, "postprocess-clean", *arguments]
        return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False)

    done = run("grpc_sync.py", "one.nii.gz", "bad.nii.gz", "two.nii.gz")
    assert done.returncode == 1, done.stderr
    assert done.stdout.count("STATUS_COMPLETED") == 2
    assert "bad.nii.gz: INVALID_ARGUMENT" in done.stderr
    assert (read_nifti((tmp_path / "two.nii.gz.mask.nii.gz").read_bytes(), "m.nii.gz", as_mask=True).array > 0).sum() == 217
    for _ in range(2):  # the second time it is the same execution
        watched = run("grpc_async.py", "one.nii.gz")
        assert watched.returncode == 0, watched.stderr
        assert "STATUS_COMPLETED 100 %" in watched.stdout.splitlines()[-1]
    assert run("grpc_async.py", "bad.nii.gz").returncode == 1


def test_buf_curl_works_from_outside(target: str, token: str, tmp_path: Path) -> None:
    if not shutil.which("npx"):
        pytest.skip("npx is not on this machine")
    look = subprocess.run(["npx", "--yes", BUF, "--version"], cwd=tmp_path, capture_output=True, timeout=200, check=False)
    if look.returncode:
        pytest.skip("the npm registry did not give @bufbuild/buf")
    image = mask()
    body = {
        "metadata": {
            "filename": "m.nii.gz",
            "pipelineId": "postprocess-clean",
            "sha256": _base64(hashlib.sha256(image).digest()),
        },
        "data": _base64(image),
    }
    command = ["npx", "--yes", BUF, "curl", "--protocol", "grpc", "--http2-prior-knowledge", "--reflect"]

    def curl(data: Any, *more: str) -> subprocess.CompletedProcess[str]:
        url = f"http://{target}/{NAME}/ProcessSingleImage"
        full = [*command, *more, "-d", json.dumps(data), url]
        return subprocess.run(full, cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False)

    done = curl(body, "-H", f"Authorization: Bearer {token}")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["status"] == "STATUS_COMPLETED"
    refused = curl(body)
    assert "unauthenticated" in refused.stderr.lower()


def _base64(data: bytes) -> str:
    import base64

    return base64.b64encode(data).decode()


# --- anything at all -------------------------------------------------------------------------------------------------------

WORDS = st.one_of(st.text(max_size=20), st.sampled_from(["", "postprocess-clean", "mask", "image", "a\0b", "organs@9", "../x"]))
FILES = st.builds(
    lambda given: pb.InputFiles(files=[pb.InputFile(**file) for file in given]),
    st.lists(st.fixed_dictionaries({}, optional={"file_id": WORDS, "label_scheme": WORDS}), max_size=3),
)
METADATA = st.builds(
    pb.ImageMetadata,
    filename=WORDS,
    content_type=WORDS,
    pipeline_id=WORDS,
    file_size=st.integers(0, 2**64 - 1),
    parameters=st.dictionaries(WORDS, st.one_of(WORDS, st.just("{}"), st.just('{"run": {"min_mm3": 1}}')), max_size=3),
    client_id=WORDS,
    priority=st.integers(-(2**31), 2**31 - 1),
    sha256=st.binary(max_size=33),
    input=WORDS,
    inputs=st.dictionaries(WORDS, FILES, max_size=2),
    label_scheme=WORDS,
    result_delivery=st.integers(-2, 5),
    detached=st.booleans(),
    idempotency_key=WORDS,
)
CHUNK = st.builds(
    pb.ImageChunk,
    metadata=st.one_of(st.none(), METADATA),
    data=st.binary(max_size=50),
    chunk_number=st.integers(0, 3),
    is_final=st.booleans(),
    total_chunks=st.integers(0, 3),
    image_id=st.sampled_from(["", "a", "b"]),
)
NOTHING_OF_OURS = {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.UNAVAILABLE}
FUZZ = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def outcome(call: Any) -> list[Any]:
    """What is answered; an end that blames the service fails the test."""
    try:
        answer = call()
        return list(answer) if hasattr(answer, "__next__") else [answer]
    except grpc.RpcError as error:
        told = error
    assert told.code() not in NOTHING_OF_OURS, (told.code(), told.details())
    assert "Traceback" not in told.details()
    return []


@FUZZ
@given(metadata=st.one_of(st.none(), METADATA), data=st.binary(max_size=100))
def test_any_request_gets_an_answer_that_does_not_blame_the_service(stub: Any, bearer: Any, metadata: Any, data: bytes) -> None:
    outcome(lambda: stub.ProcessSingleImage(pb.ImageRequest(metadata=metadata, data=data), metadata=bearer, timeout=30))


@FUZZ
@given(st.lists(CHUNK, max_size=8))
def test_any_chunks_get_answers_that_do_not_blame_the_service(stub: Any, bearer: Any, messages: list[pb.ImageChunk]) -> None:
    for answer in outcome(lambda: stub.ProcessImageStream(iter(messages), metadata=bearer, timeout=30)):
        assert answer.error.code not in {"INTERNAL", "UNKNOWN"}, answer.error


@FUZZ
@given(execution_id=WORDS, after=st.one_of(st.none(), st.integers(0, 2**64 - 1)))
def test_any_watch_gets_an_answer_that_does_not_blame_the_service(
    stub: Any, bearer: Any, execution_id: str, after: int | None
) -> None:
    outcome(
        lambda: stub.WatchExecution(pb.WatchRequest(execution_id=execution_id, after_seq=after), metadata=bearer, timeout=30)
    )


@FUZZ
@given(method=st.sampled_from(["ProcessSingleImage", "ProcessImageStream", "WatchExecution"]), wire=st.binary(max_size=60))
def test_any_bytes_get_an_answer_that_does_not_blame_the_service(target: str, bearer: Any, method: str, wire: bytes) -> None:
    with grpc.insecure_channel(target) as channel:
        if method == "ProcessSingleImage":
            outcome(lambda: channel.unary_unary(f"/{NAME}/{method}")(wire, metadata=bearer, timeout=30))
        elif method == "WatchExecution":
            outcome(lambda: channel.unary_stream(f"/{NAME}/{method}")(wire, metadata=bearer, timeout=30))
        else:
            outcome(lambda: channel.stream_stream(f"/{NAME}/{method}")(iter([wire]), metadata=bearer, timeout=30))
