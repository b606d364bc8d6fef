"""gRPC without Ray: what is said, what is refused, and that nothing is lost; chunks, order, sizes, cancellation."""

from __future__ import annotations

import functools
import hashlib
import queue
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from google.protobuf.json_format import MessageToDict
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from deployments.gateway.rpc import door, flow, images
from deployments.imageio.nifti import read_nifti, write_nifti
from scangraph.contracts import Volume
from scangraph.imageflow.v1 import imageflow_pb2 as pb
from scangraph.settings import load_settings
from scangraph.store import accounts, executions
from tests.gateway.rpc_server import RpcServer, chunks, rpc_serving

PIPELINE = "test-threshold"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RpcServer]:
    settings = load_settings(
        data=tmp_path_factory.mktemp("rpc"),
        gateway={"poll_seconds": 0.05, "stall_seconds": 5},
        grpc={"max_images": 3, "idle_seconds": 6},
    )
    with rpc_serving(settings) as server:
        yield server


def ct(value: int = 1, shape: tuple[int, int, int] = (6, 7, 8), seed: int | None = None) -> bytes:
    """A small CT; with a seed one that does not compress."""
    array = np.full(shape, value, np.int16)
    if seed is not None:
        array = np.random.default_rng(seed).integers(-1000, 1000, shape, dtype=np.int16)
    return write_nifti(Volume(array, (2.0, 1.5, 1.0)))


def wanted(**more: Any) -> pb.ImageMetadata:
    return pb.ImageMetadata(**{"filename": "ct.nii.gz", "pipeline_id": PIPELINE, **more})


def details(error: grpc.RpcError) -> tuple[status_pb2.Status, error_details_pb2.ErrorInfo, error_details_pb2.BadRequest]:
    """The three that are looked at."""
    trailers = dict(error.trailing_metadata())
    status = status_pb2.Status.FromString(trailers["grpc-status-details-bin"])
    info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    for detail in status.details:
        for kind in (info, bad):
            if detail.Is(kind.DESCRIPTOR):
                detail.Unpack(kind)
    return status, info, bad


def refused(call: Callable[[], Any], code: str, reason: str) -> error_details_pb2.ErrorInfo:
    """Check that a call ends with this."""

    def whole() -> None:
        answer = call()
        if hasattr(answer, "__next__"):
            list(answer)

    with pytest.raises(grpc.RpcError) as caught:
        whole()
    error = caught.value
    assert error.code().name == code, error.details()
    status, info, _ = details(error)
    assert (status.message, status.code) == (error.details(), error.code().value[0])
    assert (info.reason, info.domain, info.metadata["type"]) == (reason, "scangraph", f"urn:scangraph:problem:{reason}")
    assert "Traceback" not in error.details()
    return info


def finals(answers: Any) -> dict[str, pb.ProcessingResponse]:
    return {answer.image_id: answer for answer in answers if answer.is_final}


def complaints(answers: Any, image_id: str) -> str:
    return "; ".join(answer.error.detail for answer in answers if answer.image_id == image_id and answer.error.detail)


def files_of(server: RpcServer) -> set[str]:
    """What lies in the storage's folder of uploads."""
    folder = server.settings.storage_root / "files"
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} if folder.exists() else set()


def state_of(server: RpcServer, execution_id: str) -> str:
    return str(server.http.run(executions.load(server.http.services.store, execution_id)).execution.state)


def becomes(server: RpcServer, execution_id: str, state: str, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while state_of(server, execution_id) != state:
        assert time.monotonic() < end, state_of(server, execution_id)
        time.sleep(0.05)


# --- one image -------------------------------------------------------------------------------------------------------------


def test_an_image_goes_in_and_its_mask_comes_out(server: RpcServer) -> None:
    image = ct(7)
    metadata = wanted(
        client_id="mine",
        file_size=len(image),
        sha256=hashlib.sha256(image).digest(),
        parameters={"label": "42"},
        result_delivery=pb.RESULT_DELIVERY_CHUNKS,
        priority=pb.PRIORITY_HIGH,
    )
    with server.stub() as stub:
        answer = stub.ProcessSingleImage(pb.ImageRequest(metadata=metadata, data=image), metadata=server.bearer(), timeout=60)
    assert (answer.status, answer.is_final, answer.client_id) == (pb.STATUS_COMPLETED, True, "mine")
    assert answer.warnings == ["made by a test"]
    (result,) = answer.results
    assert hashlib.sha256(result.data).hexdigest() == next(f.sha256 for f in answer.output_files if f.file_id == result.file_id)
    mask = read_nifti(result.data, "mask.nii.gz", as_mask=True)
    assert set(np.unique(mask.array)) == {42}
    # The same by HTTP: it is one service.
    token = dict(server.bearer())["authorization"]
    with httpx.Client(base_url=server.http.url, headers={"Authorization": token}) as client:
        seen = client.get(f"/v1/executions/{answer.execution_id}").json()
        assert (seen["status"], seen["priority"], seen["parameters"]) == (
            "completed",
            "high",
            {"steps": {"run": {"label": 42}}},
        )
        assert client.get(f"/v1/files/{result.file_id}").content == result.data


def test_results_that_do_not_fit_are_ids_with_a_warning(tmp_path: Path) -> None:
    with rpc_serving(load_settings(data=tmp_path, grpc={"max_message_bytes": 2**16})) as small, small.stub() as stub:
        metadata = wanted(result_delivery=pb.RESULT_DELIVERY_CHUNKS)
        answer = stub.ProcessSingleImage(pb.ImageRequest(metadata=metadata, data=ct()), metadata=small.bearer(), timeout=60)
        assert answer.status == pb.STATUS_COMPLETED
        assert answer.output_files
        assert not answer.results
        assert any("do not fit" in warning for warning in answer.warnings)
        with pytest.raises(grpc.RpcError) as caught:
            stub.ProcessSingleImage(pb.ImageRequest(data=bytes(2**17)), metadata=small.bearer(), timeout=60)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED  # said by gRPC itself


def test_inputs_may_be_files_that_are_there(server: RpcServer) -> None:
    headers = {"Authorization": dict(server.bearer())["authorization"]}
    uploaded = httpx.post(f"{server.http.url}/v1/files", headers=headers, files={"file": ("ct.nii.gz", ct(3))}).json()["id"]
    files = pb.InputFiles(files=[pb.InputFile(file_id=uploaded)])
    with server.stub() as stub:
        answer = stub.ProcessSingleImage(
            pb.ImageRequest(metadata=wanted(inputs={"image": files})), metadata=server.bearer(), timeout=60
        )
        assert answer.status == pb.STATUS_COMPLETED
        both = pb.ImageRequest(metadata=wanted(inputs={"image": files}), data=ct(4))
        before = files_of(server)
        refused(lambda: stub.ProcessSingleImage(both, metadata=server.bearer()), "INVALID_ARGUMENT", "invalid-inputs")
        assert files_of(server) == before
        other = pb.ImageRequest(metadata=wanted(inputs={"image": files}))
        refused(lambda: stub.ProcessSingleImage(other, metadata=server.bearer("bob")), "NOT_FOUND", "not-found")


def test_who_may(server: RpcServer) -> None:
    request = pb.ImageRequest(metadata=wanted(), data=ct())
    with server.stub() as stub:
        for metadata in (
            list[tuple[str, str]](),
            [("authorization", "Bearer nobody's")],
            [("authorization", "Basic YTpi")],
            server.bearer() * 2,
            server.bearer(seconds=-10),
        ):
            for call in (
                functools.partial(stub.ProcessSingleImage, request),
                functools.partial(stub.ProcessImageStream, iter(())),
                functools.partial(stub.WatchExecution, pb.WatchRequest()),
            ):
                refused(functools.partial(call, metadata=metadata), "UNAUTHENTICATED", "unauthenticated")
        viewer = server.bearer("vera", "viewer")
        refused(lambda: stub.ProcessSingleImage(request, metadata=viewer), "PERMISSION_DENIED", "forbidden")
        refused(lambda: stub.ProcessImageStream(iter(()), metadata=viewer), "PERMISSION_DENIED", "forbidden")
        done = stub.ProcessSingleImage(request, metadata=server.bearer())
        watched = pb.WatchRequest(execution_id=done.execution_id)
        refused(lambda: stub.WatchExecution(watched, metadata=server.bearer("bob")), "NOT_FOUND", "not-found")
        assert [u.status for u in stub.WatchExecution(watched, metadata=server.bearer())] == [pb.STATUS_COMPLETED]


@pytest.mark.parametrize(
    ("metadata", "data", "code", "reason", "pointer"),
    [
        (wanted(pipeline_id=""), b"x", "INVALID_ARGUMENT", "invalid-inputs", "/pipeline_id"),
        (wanted(pipeline_id="no-such"), b"x", "NOT_FOUND", "not-found", None),
        (wanted(sha256=b"short"), b"x", "INVALID_ARGUMENT", "invalid-inputs", "/sha256"),
        (wanted(sha256=bytes(32)), ct(), "INVALID_ARGUMENT", "digest-mismatch", None),
        (wanted(file_size=3), ct(), "INVALID_ARGUMENT", "invalid-inputs", "/file_size"),
        (wanted(file_size=10**6), ct(), "INVALID_ARGUMENT", "invalid-inputs", "/file_size"),
        (wanted(file_size=2**63), ct(), "RESOURCE_EXHAUSTED", "upload-too-large", None),
        (wanted(parameters={"label": "forty"}), b"x", "INVALID_ARGUMENT", "invalid-inputs", "/parameters/label"),
        (wanted(parameters={"no_such": "1"}), ct(), "INVALID_ARGUMENT", "invalid-inputs", None),
        (wanted(parameters={"label": '"forty"'}), ct(), "INVALID_ARGUMENT", "invalid-inputs", None),
        (wanted(input="no_such"), ct(), "INVALID_ARGUMENT", "invalid-inputs", None),
        (wanted(priority=7), b"x", "INVALID_ARGUMENT", "invalid-inputs", "/priority"),
        (wanted(result_delivery=9), b"x", "INVALID_ARGUMENT", "invalid-inputs", "/result_delivery"),
        (wanted(idempotency_key="k" * 256), b"x", "INVALID_ARGUMENT", "invalid-inputs", "/idempotency_key"),
        (wanted(label_scheme="mine"), ct(), "INVALID_ARGUMENT", "invalid-inputs", "/label_scheme"),
        (wanted(), b"", "INVALID_ARGUMENT", "invalid-inputs", None),
        (wanted(input="image"), b"", "INVALID_ARGUMENT", "empty-file", None),
        (wanted(), ct()[:-20], "INVALID_ARGUMENT", "truncated", None),
        (wanted(), b"no image", "INVALID_ARGUMENT", "unsupported-media", None),
        (wanted(inputs={"image": pb.InputFiles(files=[pb.InputFile()])}), b"", "INVALID_ARGUMENT", "invalid-inputs", None),
        (wanted(inputs={"image": pb.InputFiles()}), b"", "INVALID_ARGUMENT", "invalid-inputs", None),
        (
            wanted(inputs={"image": pb.InputFiles(files=[pb.InputFile(path="../etc/passwd")])}),
            b"",
            "PERMISSION_DENIED",
            "path-refused",
            None,
        ),
    ],
)
def test_what_does_not_fit_is_refused_and_leaves_nothing(
    server: RpcServer, metadata: pb.ImageMetadata, data: bytes, code: str, reason: str, pointer: str | None
) -> None:
    before = files_of(server)
    with server.stub() as stub, pytest.raises(grpc.RpcError) as caught:
        stub.ProcessSingleImage(pb.ImageRequest(metadata=metadata, data=data), metadata=server.bearer(), timeout=60)
    _, info, bad = details(caught.value)
    assert (caught.value.code().name, info.reason) == (code, reason), caught.value.details()
    if pointer:
        assert pointer in {violation.field for violation in bad.field_violations}
    assert files_of(server) == before
    # In a stream it is told of the image, and the next one is done.
    with server.stub() as stub:
        parts = [*chunks(data, 1, "bad"), *chunks(ct(9), 2, "good", pipeline_id=PIPELINE)]
        parts[0].metadata.CopyFrom(metadata)
        told = finals(stub.ProcessImageStream(iter(parts), metadata=server.bearer(), timeout=60))
    problem = told["bad"].error
    assert (problem.code, problem.type) == (code, f"urn:scangraph:problem:{reason}")
    assert told["good"].status == pb.STATUS_COMPLETED


def test_bytes_that_are_no_message_are_refused(server: RpcServer) -> None:
    with grpc.insecure_channel(server.target) as channel:
        prefix = "/imageflow.v1.ImageProcessingService/"
        single, watch = channel.unary_unary(prefix + "ProcessSingleImage"), channel.unary_stream(prefix + "WatchExecution")
        both, check = channel.stream_stream(prefix + "ProcessImageStream"), channel.unary_unary("/grpc.health.v1.Health/Check")
        bad = b"\xff\xff\xff"
        refused(lambda: single(bad, metadata=server.bearer()), "INVALID_ARGUMENT", "invalid-message")
        refused(lambda: watch(bad, metadata=server.bearer()), "INVALID_ARGUMENT", "invalid-message")
        refused(lambda: both(iter([bad]), metadata=server.bearer()), "INVALID_ARGUMENT", "invalid-message")
        refused(lambda: check(bad), "INVALID_ARGUMENT", "invalid-message")


def test_what_fails_tells_why(server: RpcServer) -> None:
    request = pb.ImageRequest(metadata=wanted(parameters={"fail": "true", "label": "1"}), data=ct())
    with server.stub() as stub:
        info = refused(
            lambda: stub.ProcessSingleImage(request, metadata=server.bearer(), timeout=60), "INTERNAL", "stage-failed"
        )
        assert state_of(server, info.metadata["execution_id"]) == "failed"
        parts = chunks(ct(), 1, pipeline_id=PIPELINE, parameters={"fail": "true", "label": "2"})
        *_, last = stub.ProcessImageStream(parts, metadata=server.bearer(), timeout=60)
        assert (last.status, last.error.type) == (pb.STATUS_FAILED, "urn:scangraph:problem:stage-failed")


def test_a_key_makes_one_execution(server: RpcServer) -> None:
    request = pb.ImageRequest(metadata=wanted(idempotency_key="once"), data=ct(11))
    with server.stub() as stub:
        first = stub.ProcessSingleImage(request, metadata=server.bearer(), timeout=60)
        before = files_of(server)
        again = stub.ProcessSingleImage(request, metadata=server.bearer(), timeout=60)
        assert (again.execution_id, files_of(server)) == (first.execution_id, before)
        other = pb.ImageRequest(metadata=wanted(idempotency_key="once"), data=ct(12))
        refused(lambda: stub.ProcessSingleImage(other, metadata=server.bearer()), "INVALID_ARGUMENT", "idempotency-mismatch")
        assert files_of(server) == before


# --- leaving early ---------------------------------------------------------------------------------------------------------


def slow(label: int, seconds: float = 30) -> dict[str, str]:
    return {"seconds": str(seconds), "label": str(label)}


def newest(server: RpcServer) -> str:
    async def look() -> str:
        rows = await executions.list_executions(
            server.http.services.store,
            owner_id=None,
            state=None,
            pipeline=None,
            priority=None,
            created_after=None,
            created_before=None,
            before=None,
            limit=1,
        )
        return rows[0].id if rows else ""

    return server.http.run(look())


def starts(server: RpcServer, after: str) -> str:
    """Wait until an execution that was not there runs."""
    end = time.monotonic() + 20
    while (found := newest(server)) == after or state_of(server, found) != "running":
        assert time.monotonic() < end
        time.sleep(0.05)
    return found


def test_a_deadline_or_a_cancelled_call_cancels_the_execution(server: RpcServer) -> None:
    with server.stub() as stub:
        before = newest(server)
        request = pb.ImageRequest(metadata=wanted(parameters=slow(60)), data=ct(20))
        with pytest.raises(grpc.RpcError) as caught:
            stub.ProcessSingleImage(request, metadata=server.bearer(), timeout=2)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        becomes(server, newest(server), "cancelled")

        before = newest(server)
        request.metadata.parameters["label"] = "61"
        call = stub.ProcessSingleImage.future(request, metadata=server.bearer())
        running = starts(server, before)
        call.cancel()
        becomes(server, running, "cancelled")

        before = newest(server)
        stream = stub.ProcessImageStream(chunks(ct(21), 2, pipeline_id=PIPELINE, parameters=slow(62)), metadata=server.bearer())
        running = starts(server, before)
        stream.cancel()
        becomes(server, running, "cancelled")


def test_a_detached_execution_goes_on_and_a_watch_that_ends_ends_nothing(server: RpcServer) -> None:
    with server.stub() as stub:
        before = newest(server)
        request = pb.ImageRequest(metadata=wanted(parameters=slow(63, 3), detached=True), data=ct(22))
        call = stub.ProcessSingleImage.future(request, metadata=server.bearer())
        running = starts(server, before)
        call.cancel()
        watch = stub.WatchExecution(pb.WatchRequest(execution_id=running), metadata=server.bearer())
        assert next(watch).kind == pb.UPDATE_KIND_SNAPSHOT
        watch.cancel()
        becomes(server, running, "completed")


def test_a_cancelled_execution_is_told_as_such(server: RpcServer) -> None:
    with server.stub() as stub:
        before = newest(server)
        request = pb.ImageRequest(metadata=wanted(parameters=slow(64)), data=ct(23))
        call = stub.ProcessSingleImage.future(request, metadata=server.bearer())
        running = starts(server, before)
        watch = stub.WatchExecution(pb.WatchRequest(execution_id=running, after_seq=0), metadata=server.bearer(), timeout=60)
        server.http.run(executions.request_cancel(server.http.services.store, running))
        refused(call.result, "ABORTED", "already-ended")
        *_, last = watch
        assert (last.kind, last.status) == (pb.UPDATE_KIND_CANCELLED, pb.STATUS_CANCELLED)


def test_a_revoked_token_ends_what_listens(server: RpcServer) -> None:
    with server.stub() as stub:
        bearer = server.bearer("eve")
        before = newest(server)
        parts = chunks(ct(24), 1, pipeline_id=PIPELINE, parameters=slow(65, 6), detached=True)
        call = stub.ProcessImageStream(parts, metadata=bearer)
        running = starts(server, before)
        watch = stub.WatchExecution(pb.WatchRequest(execution_id=running), metadata=bearer)
        next(watch)
        server.http.run(accounts.set_enabled(server.http.services.store, "eve", False))
        refused(lambda: watch, "UNAUTHENTICATED", "unauthenticated")
        refused(lambda: call, "UNAUTHENTICATED", "unauthenticated")


# --- streams ---------------------------------------------------------------------------------------------------------------


class Script:
    """Messages that are sent when the test says so."""

    def __init__(self) -> None:
        self._messages: queue.Queue[pb.ImageChunk | None] = queue.Queue()

    def __iter__(self) -> Iterator[pb.ImageChunk]:
        while (message := self._messages.get()) is not None:
            yield message

    def send(self, *messages: pb.ImageChunk | None) -> None:
        for message in messages:
            self._messages.put(message)


def test_results_of_one_image_come_while_the_next_arrives(server: RpcServer) -> None:
    script = Script()
    with server.stub() as stub:
        answers = stub.ProcessImageStream(iter(script), metadata=server.bearer(), timeout=60)
        second = list(chunks(ct(31), 3, "b", pipeline_id=PIPELINE, result_delivery=pb.RESULT_DELIVERY_CHUNKS))
        script.send(second[0], *chunks(ct(30, seed=1), 4, "a", pipeline_id=PIPELINE, client_id="A"), second[1])
        first: list[pb.ProcessingResponse] = []
        while not first or not first[-1].is_final:
            first.append(next(answers))
        assert {answer.image_id for answer in first} == {"a"}
        assert {answer.client_id for answer in first} == {"A"}
        assert first[-1].status == pb.STATUS_COMPLETED
        numbers = [answer.seq for answer in first if answer.seq]
        assert numbers == sorted(set(numbers))
        script.send(second[2], None)
        rest = list(answers)
    assert {answer.image_id for answer in rest} == {"b"}
    pieces = [piece for answer in rest for piece in answer.results]
    assert [piece.chunk_number for piece in pieces] == list(range(len(pieces)))
    assert pieces[-1].is_final
    outputs = [file for answer in rest for file in answer.output_files if file.file_id == pieces[0].file_id]
    assert hashlib.sha256(b"".join(piece.data for piece in pieces)).hexdigest() == outputs[0].sha256


@pytest.mark.parametrize(
    ("spoil", "word"),
    [
        (lambda c: c.pop(1), "chunk 1 comes next"),
        (lambda c: c.reverse(), "begins with its metadata"),
        (lambda c: c.insert(1, c[0]), "chunk 1 comes next"),
        (lambda c: setattr(c[2], "total_chunks", 9), "9 chunks, after 4"),
        (lambda c: setattr(c[2], "is_final", True), "the final one"),
        (lambda c: setattr(c[3], "is_final", False), "not the final one"),
        (lambda c: c[1].metadata.CopyFrom(wanted()), "first chunk only"),
        (lambda c: c.pop(), "ended before the final chunk"),
    ],
)
def test_chunks_out_of_order_spoil_their_image_only(server: RpcServer, spoil: Any, word: str) -> None:
    before = files_of(server)
    spoiled = list(chunks(ct(33, seed=3), 4, "spoiled", pipeline_id=PIPELINE))
    spoil(spoiled)
    with server.stub() as stub:
        told = list(stub.ProcessImageStream(iter(spoiled), metadata=server.bearer(), timeout=60))
        assert word in complaints(told, "spoiled")
        assert all(answer.status == pb.STATUS_FAILED for answer in told)
        assert files_of(server) == before
        whole = list(chunks(ct(34), 2, "whole", pipeline_id=PIPELINE))
        mixed = [whole[0], *spoiled, whole[1]]
        told = list(stub.ProcessImageStream(iter(mixed), metadata=server.bearer(), timeout=60))
        assert complaints(told, "spoiled")
        assert finals(told)["whole"].status == pb.STATUS_COMPLETED


def test_an_image_that_stops_is_given_up_and_its_name_is_free_again(server: RpcServer) -> None:
    script = Script()
    with server.stub() as stub:
        answers = stub.ProcessImageStream(iter(script), metadata=server.bearer(), timeout=60)
        parts = list(chunks(ct(35), 3, "x", pipeline_id=PIPELINE))
        script.send(parts[0])
        given_up = next(answers)
        assert (given_up.error.code, given_up.error.type) == ("DEADLINE_EXCEEDED", "urn:scangraph:problem:upload-incomplete")
        script.send(parts[1], parts[2], *parts, None)
        *_, last = answers
        assert (last.image_id, last.status) == ("x", pb.STATUS_COMPLETED)


def test_a_stream_on_which_nothing_comes_ends(server: RpcServer) -> None:
    with server.stub() as stub:
        script = Script()
        refused(
            lambda: stub.ProcessImageStream(iter(script), metadata=server.bearer(), timeout=60), "DEADLINE_EXCEEDED", "idle"
        )
        script.send(None)


def test_no_more_images_arrive_at_once_than_may_and_the_others_wait_for_room(server: RpcServer) -> None:
    with server.stub() as stub:
        begun = [next(chunks(ct(40), 2, str(n), pipeline_id=PIPELINE)) for n in range(4)]
        rest = [list(chunks(ct(40), 2, str(n), pipeline_id=PIPELINE))[1] for n in range(4)]
        told = finals(stub.ProcessImageStream(iter([*begun, *rest]), metadata=server.bearer(), timeout=60))
        assert told["3"].error.type == "urn:scangraph:problem:too-many-streams"
        assert [told[str(n)].status for n in range(3)] == [pb.STATUS_COMPLETED] * 3

        many = [c for n in range(12) for c in chunks(ct(41), 1, str(n), pipeline_id=PIPELINE, parameters={"label": str(n + 1)})]
        told = finals(stub.ProcessImageStream(iter(many), metadata=server.bearer(), timeout=120))
        assert {answer.status for answer in told.values()} == {pb.STATUS_COMPLETED}
        assert len(told) == 12


def test_a_client_that_does_not_read_is_not_sent_more_than_a_window(server: RpcServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results of some megabytes stay in the storage until they are read."""
    shape = (128, 256, 256)
    big = write_nifti(Volume(np.random.default_rng(5).integers(-1, 2, shape, dtype=np.int16), (1, 1, 1)))
    sent = [0]
    put = flow.Line._put

    def counted(self: flow.Line, parcel: flow.Parcel) -> None:
        sent[0] += len(parcel.wire)
        put(self, parcel)

    monkeypatch.setattr(flow, "WINDOW", 2**18)
    for module in (flow, door):
        monkeypatch.setattr(module, "STEP", 2**16)
    monkeypatch.setattr(images, "_PIECE", 2**16)
    monkeypatch.setattr(flow.Line, "_put", counted)
    many = [c for n in range(8) for c in chunks(big, 16, str(n), pipeline_id=PIPELINE, result_delivery=2)]
    with server.stub() as stub:
        answers = stub.ProcessImageStream(iter(many), metadata=server.bearer(), timeout=120)
        first = next(answers)
        before = -1
        while sent[0] != before:
            before = sent[0]
            time.sleep(3)
        rest = list(answers)
    assert first.execution_id
    assert {answer.status for answer in finals(rest).values()} == {pb.STATUS_COMPLETED}
    assert len(finals(rest)) == 8
    total = sum(len(piece.data) for answer in rest for piece in answer.results)
    print("sent before anything was read", before, "of", total)
    # What the two ends of the connection hold besides is gRPC's.
    assert before < total / 2


# --- watching, health, reflection ------------------------------------------------------------------------------------------


def test_a_watch_goes_on_where_it_was(server: RpcServer) -> None:
    with server.stub() as stub:
        request = pb.ImageRequest(metadata=wanted(parameters=slow(70, 0.5)), data=ct(50))
        done = stub.ProcessSingleImage(request, metadata=server.bearer(), timeout=60)

        def watched(**after: int) -> list[pb.ExecutionUpdate]:
            wish = pb.WatchRequest(execution_id=done.execution_id, **after)
            return list(stub.WatchExecution(wish, metadata=server.bearer(), timeout=10))

        whole = watched(after_seq=0)
        assert [update.seq for update in whole] == list(range(1, len(whole) + 1))
        assert whole[-1].status == pb.STATUS_COMPLETED
        assert [file.name for file in whole[-1].output_files] == [file.name for file in done.output_files]
        assert {step.step_id for step in whole[-1].steps} == {"run"}
        half = len(whole) // 2
        assert watched(after_seq=half) == whole[half:]
        assert watched(after_seq=len(whole)) == []
        (snapshot,) = watched()
        assert snapshot == watched(after_seq=10**6)[0]
        assert (snapshot.kind, snapshot.seq) == (pb.UPDATE_KIND_SNAPSHOT, len(whole))
        assert MessageToDict(snapshot)["execution"]["pipeline"] == PIPELINE


def test_an_expired_token_ends_a_watch(server: RpcServer) -> None:
    with server.stub() as stub:
        before = newest(server)
        request = pb.ImageRequest(metadata=wanted(parameters=slow(71)), data=ct(51))
        call = stub.ProcessSingleImage.future(request, metadata=server.bearer())
        running = starts(server, before)
        watch = stub.WatchExecution(pb.WatchRequest(execution_id=running), metadata=server.bearer(seconds=2))
        refused(lambda: watch, "UNAUTHENTICATED", "unauthenticated")
        assert state_of(server, running) == "running"
        call.cancel()


def test_health_needs_no_token(server: RpcServer) -> None:
    with grpc.insecure_channel(server.target) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        name = "imageflow.v1.ImageProcessingService"
        for service in ("", name):
            assert health.Check(health_pb2.HealthCheckRequest(service=service)).status == 1
        assert set(health.List(health_pb2.HealthListRequest()).statuses) == {"", name}
        refused(lambda: health.Check(health_pb2.HealthCheckRequest(service="no.such")), "NOT_FOUND", "not-found")
        watch = health.Watch(health_pb2.HealthCheckRequest(service=name), timeout=30)
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        server.health["nnunet"] = "UNHEALTHY"
        try:
            assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
            assert health.Check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.SERVING
        finally:
            server.health.clear()
        watch.cancel()
        unknown = health.Watch(health_pb2.HealthCheckRequest(service="no.such"), timeout=30)
        assert next(unknown).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


def test_reflection_lists_the_services(server: RpcServer) -> None:
    with grpc.insecure_channel(server.target) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        (answer,) = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
    names = {service.name for service in answer.list_services_response.service}
    assert {"imageflow.v1.ImageProcessingService", "grpc.health.v1.Health"} <= names
