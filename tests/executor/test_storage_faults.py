"""A storage that fills up or goes away while executions run: nothing is `completed` that cannot be read."""

from __future__ import annotations

import asyncio
import subprocess
from pathlib import Path
from typing import Any

import pytest

from deployments.imageio.nifti import write_nifti
from scangraph.settings import load_settings
from scangraph.store import open_store
from scangraph.store.executions import Record
from tests.conftest import constant_volume
from tests.executor.test_executor import House
from tests.s3 import moto


def in_house(test: Any, data: Path, **changes: Any) -> None:
    async def main() -> None:
        settings = load_settings(data=data, executor={"lease_seconds": 1, "storage_patience_seconds": 5}, **changes)
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


async def all_is_readable(house: House, record: Record) -> None:
    for file in record.files:
        assert len(await house.storage.read(file.storage_name)) == file.size


def test_s3_is_a_storage_like_any_other(tmp_path: Path) -> None:
    with moto() as server:

        async def test(house: House) -> None:
            house.executor()
            record = await house.wait(await house.submit(), seconds=60)
            assert record.execution.state == "completed", record.execution.error
            await all_is_readable(house, record)

        in_house(test, tmp_path, storage_url="s3://bucket/x", storage_options=server.options)


def test_an_outage_of_s3_that_outlasts_our_patience_ends_in_failed_and_a_retry_works(tmp_path: Path) -> None:
    with moto() as server:

        async def test(house: House) -> None:
            def before(method: str) -> None:
                if method == "save":
                    server.stop()

            house.stages.before = before
            house.executor()
            record = await house.wait(await house.submit(), seconds=200)
            assert record.execution.state == "failed"
            assert record.execution.error is not None
            assert record.execution.error["code"] == "storage-unavailable"
            assert record.files == ()
            house.stages.before = lambda _: None
            server.start()  # with nothing in it: what was kept is made again
            await house.storage.write("ct.nii.gz", write_nifti(constant_volume(40)))
            record = await house.wait(await house.submit(), seconds=60)
            assert record.execution.state == "completed", record.execution.error
            await all_is_readable(house, record)

        in_house(test, tmp_path, storage_url="s3://bucket/x", storage_options=server.options)


def test_a_full_disk_ends_in_failed_leaves_nothing_and_space_mends_it(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("only root can mount a small disk")

    async def test(house: House) -> None:
        def before(method: str) -> None:
            if method == "save" and not (disk / "fat").exists():
                with (disk / "fat").open("wb") as file:
                    try:
                        file.write(bytes(10**6))
                    except OSError:
                        return

        house.stages.before = before
        house.executor()
        record = await house.wait(await house.submit())
        assert record.execution.state == "failed"
        assert record.execution.error is not None
        assert record.execution.error["code"] == "storage-full"
        assert await house.names(f"results/{record.execution.id}/") == []
        (disk / "fat").write_bytes(b"")
        record = await house.wait(await house.submit())
        assert record.execution.state == "completed", record.execution.error
        await all_is_readable(house, record)

    try:
        in_house(test, tmp_path / "data", storage_url=disk.as_uri())
    finally:
        subprocess.run(["umount", str(disk)], check=True)
