"""Results together in one .zip, executions deleted with all that is theirs, and what a pipeline's runs take."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import httpx
import pytest
from sqlalchemy import func, insert, select

from deployments.gateway import archive
from scangraph.client import Client
from scangraph.store import executions, now
from scangraph.store.tables import Event, Execution, File, Outbox, Step
from tests.gateway.conftest import Gateway, problem
from tests.gateway.test_display import ct, kept, sent
from tests.gateway.test_executions import begin, clear


@pytest.fixture
def alone(fresh: Callable[..., Gateway]) -> Gateway:
    return fresh()


def done(gateway: Gateway, client: httpx.Client, file_id: str | None = None) -> str:
    """An execution that has completed, with a file for each output."""
    execution_id = begin(client, file_id or gateway.upload(client), pipeline="organs")
    gateway.complete(gateway.claim(execution_id))
    return execution_id


def opened(answer: httpx.Response) -> dict[str, bytes]:
    """What is in a .zip; every checksum is looked at."""
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/zip"
    with zipfile.ZipFile(io.BytesIO(answer.content)) as found:
        assert found.testzip() is None
        assert {entry.compress_type for entry in found.infolist()} == {zipfile.ZIP_STORED}
        return {name: found.read(name) for name in found.namelist()}


# --- the .zip --------------------------------------------------------------------------------------------------------------


def test_results_in_one_file(alone: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    with alone.client() as client, alone.client("bob") as bob:
        execution_id = done(alone, client)
        url = f"/v1/executions/{execution_id}/files.zip"
        answer = client.get(url)
        assert "organs-" + execution_id[:8] in answer.headers["content-disposition"]
        inside = opened(answer)
        assert list(inside) == ["CONTENTS.txt", "mask.bin", "scene.bin"]
        assert (inside["mask.bin"], inside["scene.bin"]) == (b"mask", b"scene")
        contents = inside["CONTENTS.txt"].decode()
        assert "Research use only" in contents
        assert execution_id in contents
        assert "millimetres in RAS" in contents
        assert list(opened(client.get(f"{url}?outputs=scene"))) == ["CONTENTS.txt", "scene.bin"]
        wrong = problem(client.get(f"{url}?outputs=scene,nothing"), 422, "invalid-inputs")
        assert "mask, scene" in wrong["detail"]
        problem(bob.get(url), 404, "not-found")
        problem(client.get("/v1/executions/none/files.zip"), 404, "not-found")
        waiting = begin(client, alone.upload(client))
        problem(client.get(f"/v1/executions/{waiting}/files.zip"), 404, "not-found")
        monkeypatch.setattr(archive, "_LARGE", 0)  # as if each had more than 2 GiB
        assert opened(client.get(url)) == inside
        alone.run(alone.services[0].storage.delete(f"results/{execution_id}/mask.bin"))
        problem(client.get(url), 404, "file-not-found")  # not a .zip that is cut


def test_files_of_one_name_do_not_meet(alone: Gateway) -> None:
    with alone.client() as client:
        execution_id = begin(client, alone.upload(client), pipeline="organs")
        claim = alone.claim(execution_id)
        for step in claim.spec.steps:
            alone.step(claim, step.id)
        files = []
        names = (("mask", "a.bin"), ("scene", "A.bin"), ("scene", "contents.txt"), ("scene", "scene.A.bin"), ("mask", "A.bin"))
        for number, (output, filename) in enumerate(names):
            stored = f"results/{execution_id}/{number}"
            alone.put(stored, str(number).encode())
            header = {"frame": "LPS", "unit": "mm"} if output == "scene" else {}
            files.append(executions.NewFile(output, stored, filename, "obj", "model/obj", 1, f"{number}" * 64, header))
        assert alone.run(executions.complete(alone.store, claim, files, None))
        inside = opened(client.get(f"/v1/executions/{execution_id}/files.zip"))
        contents = inside.pop("CONTENTS.txt").decode()
        assert sorted(inside.values()) == [b"0", b"1", b"2", b"3", b"4"]
        assert len({name.lower() for name in inside}) == 5
        assert "millimetres in the frame LPS" in contents


# --- deleting --------------------------------------------------------------------------------------------------------------


def test_what_has_ended_is_deleted_with_all_that_is_its_own(gateway: Gateway) -> None:
    clear(gateway)
    with gateway.client() as client, gateway.client("bob") as bob:
        image = gateway.upload(client)
        execution_id = begin(client, image, pipeline="organs")
        url = f"/v1/executions/{execution_id}"
        assert "cancel it" in problem(client.delete(url), 409, "still-at-work")["detail"]
        gateway.complete(gateway.claim(execution_id))
        files = [file["file_id"] for file in client.get(url).json()["output_files"]]
        problem(bob.delete(url), 404, "not-found")
        with gateway.client("vera", "viewer") as viewer:
            problem(viewer.delete(url), 403, "forbidden")
        assert client.delete(url).status_code == 204
        problem(client.get(url), 404, "not-found")
        problem(client.delete(url), 404, "not-found")
        for file_id in files:
            problem(client.get(f"/v1/files/{file_id}"), 404, "not-found")
        assert client.get(f"/v1/files/{image}").status_code == 200

        async def left() -> list[int]:
            counts = []
            async with gateway.store.read() as session:
                for table, column in ((Execution, Execution.id), (Step, Step.execution_id), (Event, Event.execution_id)):
                    query = select(func.count()).select_from(table).where(column == execution_id)
                    counts.append(int((await session.execute(query)).scalar_one()))
            return counts

        assert gateway.run(left()) == [0, 0, 0]

        async def stored() -> list[str]:
            return [stat.name async for stat in gateway.services[0].storage.list(f"results/{execution_id}")]

        assert gateway.run(stored()) == []


def test_a_result_that_is_somebody_s_input_stays(alone: Gateway) -> None:
    with alone.client() as client:
        execution_id = done(alone, client)
        path = client.get(f"/v1/executions/{execution_id}").json()["output_files"][0]["path"]
        body = {"pipeline_id": "organs", "inputs": {"image": {"path": path}}}
        user = client.post("/v1/executions", json=body).json()["execution_id"]
        assert user in problem(client.delete(f"/v1/executions/{execution_id}"), 409, "in-use")["detail"]
        assert client.get(f"/v1/executions/{execution_id}").json()["output_files"]
        assert client.post(f"/v1/executions/{user}/cancel").status_code == 202
        assert client.delete(f"/v1/executions/{execution_id}").status_code == 204
        assert client.delete(f"/v1/executions/{user}").status_code == 204


def test_what_a_broker_was_not_told_stays(alone: Gateway) -> None:
    with alone.client() as client:
        execution_id = done(alone, client)

        async def untold() -> None:
            async with alone.store.write() as session:
                await session.execute(insert(Outbox).values(execution_id=execution_id, seq=1))

        alone.run(untold())
        problem(client.delete(f"/v1/executions/{execution_id}"), 409, "in-use")
        assert len(client.get(f"/v1/executions/{execution_id}").json()["output_files"]) == 2


def test_what_was_cut_off_in_the_middle_is_deleted_again(alone: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    with alone.client() as client:
        execution_id = done(alone, client)
        storage = alone.services[0].storage
        whole = storage.delete

        async def dies(path: str) -> None:
            raise OSError("the process is killed here")

        monkeypatch.setattr(storage, "delete", dies)
        assert client.delete(f"/v1/executions/{execution_id}").status_code == 500
        monkeypatch.setattr(storage, "delete", whole)
        view = client.get(f"/v1/executions/{execution_id}").json()
        assert (view["status"], view["output_files"]) == ("completed", [])
        assert client.delete(f"/v1/executions/{execution_id}").status_code == 204


def test_copies_of_results_go_with_them(alone: Gateway) -> None:
    with alone.client() as client:
        image = sent(client, ct())
        assert client.get(f"{image}/display").status_code == 200
        execution_id = begin(client, image.rpartition("/")[2], pipeline="organs")
        claim = alone.claim(execution_id)
        for step in claim.spec.steps:
            alone.step(claim, step.id)
        (saved,) = alone.run(alone.services[0].gate.save(ct(9), "image", f"results/{execution_id}/mask"))  # type: ignore[attr-defined]
        assert alone.run(executions.complete(alone.store, claim, [executions.NewFile("mask", **saved)], None))
        (file,) = client.get(f"/v1/executions/{execution_id}").json()["output_files"]
        assert client.get(f"{file['download_url']}/thumbnail").status_code == 200
        assert len(kept(alone)) == 2
        assert client.delete(f"/v1/executions/{execution_id}").status_code == 204
        assert len(kept(alone)) == 1
        # What is old goes in the same way.
        execution_id = done(alone, client, image.rpartition("/")[2])

        async def of_the_image() -> None:
            async with alone.store.write() as session:
                digest = (await session.execute(select(File.sha256).where(File.origin == "upload"))).scalar_one()
                files = (await session.execute(select(File).where(File.execution_id == execution_id))).scalars()
                for row in files:
                    row.sha256 = digest  # a result that equals its input

        alone.run(of_the_image())
        alone.run(executions.forget(alone.store, alone.services[0].storage, now() + timedelta(days=1)))
        assert len(kept(alone)) == 1  # the upload has still that hash
        assert client.delete(image).status_code == 204
        assert kept(alone) == []


# --- what it takes ---------------------------------------------------------------------------------------------------------


def test_a_pipeline_tells_how_long_it_takes(alone: Gateway) -> None:
    with alone.client() as client:
        listed = {item["name"]: item for item in client.get("/v1/pipelines").json()["items"]}
        assert listed["organs"]["expected_seconds"] is None
        for seconds in (5, 60, 9):
            execution_id = done(alone, client)

            async def took(execution_id: str = execution_id, seconds: int = seconds) -> None:
                async with alone.store.write() as session:
                    row = await session.get(Execution, execution_id)
                    assert row is not None
                    row.started_at = row.completed_at - timedelta(seconds=seconds)

            alone.run(took())
        listed = {item["name"]: item for item in client.get("/v1/pipelines").json()["items"]}
        assert listed["organs"]["expected_seconds"] == 9
        assert listed["renal-planning"]["expected_seconds"] is None
        assert client.get("/v1/pipelines/organs").json()["expected_seconds"] == 9


# --- the client ------------------------------------------------------------------------------------------------------------


def test_the_client_fetches_and_deletes(alone: Gateway, tmp_path: Path) -> None:
    with alone.client() as raw, Client(alone.urls[0], token=alone.token()) as client:
        image = sent(raw, ct()).rpartition("/")[2]
        execution_id = done(alone, raw, image)
        assert client.display(image, most=50) == raw.get(f"/v1/files/{image}/display?max=50").content
        assert client.thumbnail(image).startswith(b"\x89PNG")
        path = client.zip(execution_id, tmp_path, ["mask"])
        assert path == tmp_path / f"{execution_id}.zip"
        with zipfile.ZipFile(path) as found:
            assert found.read("mask.bin") == b"mask"
        assert [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".") and entry.suffix == ".part"] == []
        client.delete_execution(execution_id)
        assert raw.get(f"/v1/executions/{execution_id}").status_code == 404
