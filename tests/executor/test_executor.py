"""Executions from the queue to their end: real records, real storage, real stages, in one process."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select

from deployments.executor.runner import HeldInputs, Tools
from deployments.executor.scheduler import Scheduler
from deployments.imageio.nifti import write_nifti
from scangraph.contracts.errors import InUse, StorageUnavailable
from scangraph.contracts.pipelines import PipelineSpec, check_pipeline
from scangraph.settings import Settings, load_settings
from scangraph.storage import open_storage
from scangraph.store import Store, executions, open_store
from scangraph.store.executions import NewExecution, QueueLimits, Record
from scangraph.store.files import delete_file
from scangraph.store.pipelines import create_pipeline
from scangraph.store.tables import StepResult
from tests.conftest import constant_volume
from tests.executor.local import COMPONENTS, LocalStages
from tests.s3 import in_own_place

SPEC = PipelineSpec.model_validate(
    {
        "name": "diamond",
        "inputs": {"image": {"kind": "image"}},
        "steps": [
            {"id": "left", "component": "test/threshold", "inputs": {"image": "input.image"}, "parameters": {"label": 2}},
            {"id": "right", "component": "test/threshold", "inputs": {"image": "input.image"}, "parameters": {"label": 3}},
            {"id": "scene", "component": "test/box", "inputs": {"mask": "left.mask", "other": "right.mask"}},
        ],
        "outputs": {"mask": "right.mask", "scene": "scene.scene"},
    }
)
KNOWN = {component.id: component for component in COMPONENTS}
LIMITS = QueueLimits(10_000, 10_000, 900)


class House:
    """Everything that an executor needs, in a folder."""

    def __init__(self, settings: Settings, store: Store) -> None:
        self.settings, self.store = settings, store
        self.storage = open_storage(settings.storage, settings.storage_options)
        self.stages = LocalStages(settings)
        self.schedulers: list[Scheduler] = []

    def executor(self) -> Scheduler:
        tools = Tools(self.settings, self.store, self.storage, self.stages, KNOWN, HeldInputs(2**30))
        self.schedulers.append(Scheduler(tools, 2**30))
        return self.schedulers[-1]

    async def submit(self, parameters: dict[str, dict[str, Any]] | None = None, spec: PipelineSpec = SPEC) -> str:
        from scangraph.contracts.errors import NameTaken
        from scangraph.store.pipelines import find_pipeline

        assert not check_pipeline(spec, KNOWN)
        try:
            pipeline = await create_pipeline(self.store, spec, None)
        except NameTaken:
            pipeline = await find_pipeline(self.store, spec.name)
        full = {step.id: {**step.parameters, **(parameters or {}).get(step.id, {})} for step in spec.steps}
        inputs = {"image": {"file_id": None, "path": "ct.nii.gz", "label_scheme": None}}
        versions = {component.id: component.version for component in COMPONENTS}
        new = NewExecution(None, pipeline.id, pipeline.revision, spec, inputs, full, versions, input_bytes=100)
        execution_id, _ = await executions.accept(self.store, new, LIMITS)
        for scheduler in self.schedulers:
            scheduler.wake()
        return execution_id

    async def wait(self, execution_id: str, until: Callable[[Record], bool] | None = None, seconds: float = 30) -> Record:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            record = await executions.load(self.store, execution_id)
            if until(record) if until else record.execution.state in {"completed", "failed", "cancelled"}:
                return record
            await asyncio.sleep(0.02)
        raise AssertionError(f"still {record.execution.state}")

    async def kept(self, number: int) -> None:
        """Wait for that many kept results."""
        query = select(func.count()).select_from(StepResult)
        for _ in range(500):
            async with self.store.read() as session:
                if (await session.execute(query)).scalar_one() >= number:
                    return
            await asyncio.sleep(0.02)
        raise AssertionError("the results were not kept")

    async def names(self, prefix: str) -> list[str]:
        return sorted([stat.name async for stat in self.storage.list(prefix)])


@pytest.fixture
def in_house(tmp_path: Path) -> Callable[..., None]:
    """Run an async test with a house of its own."""

    def go(test: Callable[[House], Any], **changes: Any) -> None:
        async def main() -> None:
            settings = in_own_place(
                load_settings(data=tmp_path, executor={"lease_seconds": 1, "keep_from_seconds": 0, **changes})
            )
            store = await open_store(settings.database)
            house = House(settings, store)
            await house.storage.write("ct.nii.gz", write_nifti(constant_volume(40)))
            try:
                await test(house)
            finally:
                for scheduler in house.schedulers:
                    await scheduler.stop()
                await store.close()

        asyncio.run(main())

    return go


def states(record: Record) -> dict[str, str]:
    return {step.step_id: step.state for step in record.steps}


def test_a_diamond_runs_to_its_files_and_manifest(in_house: Any) -> None:
    async def test(house: House) -> None:
        house.executor()
        record = await house.wait(await house.submit())
        assert record.execution.state == "completed", record.execution.error
        assert states(record) == {"left": "completed", "right": "completed", "scene": "completed"}
        assert [f.output for f in record.files] == ["mask", "scene", "scene", "scene", "manifest"]
        for file in record.files:
            data = await house.storage.read(file.storage_name)
            assert (len(data), hashlib.sha256(data).hexdigest()) == (file.size, file.sha256)
        manifest = json.loads(await house.storage.read(record.files[-1].storage_name))
        assert file_hashes(record) <= set(json.dumps(manifest).replace('"', " ").split())
        assert manifest["inputs"]["image"]["sha256"] == hashlib.sha256(await house.storage.read("ct.nii.gz")).hexdigest()
        assert record.steps[0].warnings == ["made by a test"]
        assert record.steps[0].started_at <= record.steps[0].completed_at <= record.execution.completed_at  # type: ignore[operator]

    in_house(test)


def file_hashes(record: Record) -> set[str]:
    return {file.sha256 for file in record.files if file.output != "manifest"}


def test_known_results_are_not_computed_again_and_a_change_runs_only_what_depends_on_it(in_house: Any) -> None:
    async def test(house: House) -> None:
        house.executor()
        first = await house.wait(await house.submit())
        assert sorted(house.stages.worker.calls) == [("box", 5), ("threshold", 2), ("threshold", 3)]
        house.stages.worker.calls.clear()
        again = await house.wait(await house.submit())
        assert house.stages.worker.calls == []
        assert all(step.cached and step.attempts == 0 for step in again.steps)
        assert file_hashes(again) == file_hashes(first)
        assert again.steps[0].warnings == ["made by a test"]
        changed = await house.wait(await house.submit({"right": {"label": 4}}))
        assert sorted(house.stages.worker.calls) == [("box", 5), ("threshold", 4)]
        assert changed.execution.state == "completed"
        house.stages.worker.calls.clear()
        house.stages.worker.model = "2"
        await house.wait(await house.submit())
        assert len(house.stages.worker.calls) == 3

    in_house(test)


def test_without_kept_results_everything_runs_again(in_house: Any) -> None:
    async def test(house: House) -> None:
        house.executor()
        for _ in range(2):
            await house.wait(await house.submit())
        assert len(house.stages.worker.calls) == 6
        assert await house.names("steps/") == []

    in_house(test, kept_results_bytes=0)


def test_what_is_made_again_sooner_than_read_is_not_kept(in_house: Any) -> None:
    async def test(house: House) -> None:
        house.executor()
        for _ in range(2):
            await house.wait(await house.submit({"left": {"seconds": 0.5}}))
        await house.kept(1)
        assert sorted(house.stages.worker.calls) == [
            ("box", 5),
            ("box", 5),
            ("threshold", 2),
            ("threshold", 3),
            ("threshold", 3),
        ]
        assert len({name.split("/")[1] for name in await house.names("steps/")}) == 1

    in_house(test, keep_from_seconds=0.4)


def test_two_at_once_compute_a_result_once(in_house: Any) -> None:
    async def test(house: House) -> None:
        ids = [await house.submit({"left": {"seconds": 0.3}}) for _ in range(4)]
        house.executor()
        records = [await house.wait(execution_id) for execution_id in ids]
        assert {record.execution.state for record in records} == {"completed"}
        assert len(house.stages.worker.calls) == 3
        assert len({frozenset(file_hashes(record)) for record in records}) == 1

    in_house(test)


@pytest.mark.parametrize("damage", ["gone", "damaged"])
def test_a_kept_result_that_is_lost_is_made_again(in_house: Any, damage: str) -> None:
    async def test(house: House) -> None:
        house.executor()
        first = await house.wait(await house.submit())
        for name in await house.names("steps/"):
            data = await house.storage.read(name)
            await house.storage.delete(name)
            if damage == "damaged":
                await house.storage.write(name, data[:-9])
        again = await house.wait(await house.submit())
        assert again.execution.state == "completed", again.execution.error
        assert file_hashes(again) == file_hashes(first)

    in_house(test)


def test_a_failing_step_ends_the_execution_and_leaves_nothing(in_house: Any) -> None:
    async def test(house: House) -> None:
        house.executor()
        record = await house.wait(await house.submit({"left": {"fail": True}, "right": {"seconds": 5}}))
        assert record.execution.state == "failed"
        assert record.execution.error is not None
        assert record.execution.error["code"] == "stage-failed"
        assert "ZeroDivisionError" in record.execution.error["detail"]
        assert states(record)["left"] == "failed"
        assert states(record)["scene"] == "skipped"
        assert await house.names(f"results/{record.execution.id}/") == []
        assert (await house.wait(await house.submit())).execution.state == "completed"

    in_house(test)


def test_a_step_that_takes_too_long_is_stopped(in_house: Any) -> None:
    async def test(house: House) -> None:
        house.executor()
        steps = [{**step.model_dump(), "timeout_seconds": 0.3} for step in SPEC.steps]
        spec = PipelineSpec.model_validate({**SPEC.model_dump(), "name": "hurried", "steps": steps})
        record = await house.wait(await house.submit({"right": {"seconds": 30}}, spec))
        assert record.execution.error is not None
        assert record.execution.error["code"] == "step-timed-out"
        await asyncio.sleep(0.2)
        assert not house.stages.worker.busy.is_set()

    in_house(test)


def test_cancel_stops_the_work_and_leaves_no_output(in_house: Any) -> None:
    async def test(house: House) -> None:
        scheduler = house.executor()
        execution_id = await house.submit({"left": {"seconds": 60}})
        await house.wait(execution_id, lambda _: house.stages.worker.busy.is_set())
        asked = time.monotonic()
        await executions.request_cancel(house.store, execution_id)
        scheduler.wake()
        record = await house.wait(execution_id)
        assert record.execution.state == "cancelled"
        while house.stages.worker.busy.is_set():
            await asyncio.sleep(0.01)
            assert time.monotonic() - asked < 5
        assert await house.names("results/") == []
        assert not scheduler.running
        assert (await house.wait(await house.submit())).execution.state == "completed"

    in_house(test)


def test_progress_is_told_while_a_step_runs(in_house: Any) -> None:
    async def test(house: House) -> None:
        house.executor()
        execution_id = await house.submit({"left": {"seconds": 2.5}})
        record = await house.wait(execution_id)
        told = await executions.events_since(house.store, {execution_id: 0})
        messages = {e.body["step_details"].get("left", {}).get("progress", {}).get("message") for e in told}
        assert "tiles" in messages
        assert any(e.body["step_details"].get("left", {}).get("resource_usage", {}).get("rss_mb", 0) > 10 for e in told)
        assert record.execution.state == "completed"

    in_house(test)


def test_an_executor_that_stops_gives_back_and_another_goes_on_from_what_is_done(in_house: Any) -> None:
    async def test(house: House) -> None:
        first = house.executor()
        execution_id = await house.submit({"scene": {"seconds": 60}})
        await house.wait(execution_id, lambda r: states(r) == {"left": "completed", "right": "completed", "scene": "running"})
        await house.kept(2)
        await first.stop()
        record = await executions.load(house.store, execution_id)
        assert record.execution.state == "pending"
        house.stages.worker.calls.clear()
        house.executor()
        await house.wait(execution_id, lambda r: states(r)["scene"] == "running" and house.stages.worker.busy.is_set())
        assert house.stages.worker.calls == [("box", 5)]

    in_house(test)


def test_an_executor_that_vanishes_is_replaced_after_its_lease(in_house: Any) -> None:
    async def test(house: House) -> None:
        first = house.executor()
        execution_id = await house.submit({"left": {"seconds": 2}})
        await house.wait(execution_id, lambda _: house.stages.worker.busy.is_set())
        first._loop.cancel()  # it does not renew any more, but its work goes on: the worst kind of dead
        house.executor()
        record = await house.wait(execution_id)
        assert record.execution.state == "completed", record.execution.error
        assert record.execution.fence == 2
        told = await executions.events_since(house.store, {execution_id: 0})
        assert sum(event.body["status"] == "completed" for event in told) == 1
        await asyncio.sleep(0.5)
        for file in record.files:
            assert hashlib.sha256(await house.storage.read(file.storage_name)).hexdigest() == file.sha256

    in_house(test)


def test_a_storage_that_does_not_answer_for_a_moment_costs_nothing_but_time(in_house: Any, monkeypatch: Any) -> None:
    async def test(house: House) -> None:
        failures = {"save": 1, "read": 1}

        def before(method: str) -> None:
            if failures.get(method, 0) > 0:
                failures[method] -= 1
                raise StorageUnavailable(path="x", reason="a test said so")

        house.stages.before = before
        house.executor()
        record = await house.wait(await house.submit())
        assert record.execution.state == "completed", record.execution.error

    in_house(test)


def test_a_storage_that_stays_away_ends_in_failed_not_in_completed(in_house: Any) -> None:
    async def test(house: House) -> None:
        def before(method: str) -> None:
            if method == "save":
                raise StorageUnavailable(path="x", reason="a test said so")

        house.stages.before = before
        house.executor()
        record = await house.wait(await house.submit())
        assert record.execution.state == "failed"
        assert record.execution.error is not None
        assert record.execution.error["code"] == "storage-unavailable"
        assert record.files == ()

    in_house(test)


def test_a_missing_or_bad_input_fails_with_the_gates_own_words(in_house: Any) -> None:
    async def test(house: House) -> None:
        await house.storage.delete("ct.nii.gz")
        house.executor()
        record = await house.wait(await house.submit())
        assert record.execution.error is not None
        assert record.execution.error["code"] == "file-not-found"
        await house.storage.write("ct.nii.gz", b"\x1f\x8b nonsense")
        record = await house.wait(await house.submit())
        assert record.execution.error is not None
        assert record.execution.error["status"] in {415, 422}

    in_house(test)


def test_no_more_run_at_once_than_may(in_house: Any) -> None:
    async def test(house: House) -> None:
        ids = [await house.submit({"left": {"seconds": 0.2, "label": 10 + n}}) for n in range(6)]
        scheduler = house.executor()
        most = 0
        while {(await executions.load(house.store, e)).execution.state for e in ids} != {"completed"}:
            most = max(most, len(scheduler.running))
            await asyncio.sleep(0.01)
        assert most == 2

    in_house(test, max_running=2)


def test_an_input_that_a_backend_replaced_is_another_input(in_house: Any) -> None:
    async def test(house: House) -> None:
        house.executor()
        first = await house.wait(await house.submit())
        await house.storage.delete("ct.nii.gz")
        await house.storage.write("ct.nii.gz", write_nifti(constant_volume(-40)))
        second = await house.wait(await house.submit())
        assert file_hashes(first) != file_hashes(second)
        assert not second.steps[0].cached
        assert first.execution.inputs["image"]["sha256"] != second.execution.inputs["image"]["sha256"]

    in_house(test)


def test_an_output_can_be_read_while_the_rest_is_at_work(in_house: Any) -> None:
    async def test(house: House) -> None:
        house.executor()
        execution_id = await house.submit({"scene": {"seconds": 2}})
        early = await house.wait(execution_id, lambda record: bool(record.files))
        assert (early.execution.state, [file.output for file in early.files]) == ("running", ["mask"])
        data = await house.storage.read(early.files[0].storage_name)
        assert hashlib.sha256(data).hexdigest() == early.files[0].sha256
        with pytest.raises(InUse, match="result"):
            await delete_file(house.store, early.files[0].id)
        record = await house.wait(execution_id)
        assert [f.output for f in record.files] == ["mask", "scene", "scene", "scene", "manifest"]
        assert record.files[0].id == early.files[0].id
        events = await executions.events_since(house.store, {execution_id: 0})
        assert ["mask"] in [event.body.get("new_outputs") for event in events]

    in_house(test)


def test_outputs_of_what_does_not_complete_are_gone(in_house: Any) -> None:
    async def test(house: House) -> None:
        scheduler = house.executor()
        for knobs in ({"seconds": 30}, {"fail": True}):
            execution_id = await house.submit({"scene": knobs})
            if "seconds" in knobs:
                await house.wait(execution_id, lambda record: bool(record.files))
                await executions.request_cancel(house.store, execution_id)
                scheduler.wake()
            record = await house.wait(execution_id)
            assert record.execution.state in {"cancelled", "failed"}
            assert record.files == ()
            for _ in range(100):
                if not (left := await house.names(f"results/{execution_id}")):
                    break
                await asyncio.sleep(0.02)
            assert left == []

    in_house(test)


def test_another_executor_goes_on_with_outputs_that_are_there(in_house: Any) -> None:
    async def test(house: House) -> None:
        first = house.executor()
        execution_id = await house.submit({"scene": {"seconds": 2}})
        early = await house.wait(execution_id, lambda record: bool(record.files))
        await first.stop()
        house.schedulers.remove(first)
        house.executor()
        record = await house.wait(execution_id)
        assert record.execution.state == "completed", record.execution.error
        assert [f.output for f in record.files] == ["mask", "scene", "scene", "scene", "manifest"]
        assert record.files[0].id == early.files[0].id

    in_house(test)
