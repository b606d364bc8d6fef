"""Files and resumable uploads in the records: who wins, who is refused, and what may be deleted."""

from __future__ import annotations

import asyncio
import uuid
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from scangraph.contracts.errors import InUse, InvalidCursor, NoSuch, TooManyRequests, UploadConflict
from scangraph.storage import Storage, open_storage
from scangraph.store import Store, cursors, files, now
from scangraph.store.files import NewFile
from scangraph.store.tables import Execution, File, Upload

HOUR = timedelta(hours=1)


def new(owner: str | None = "ann", **changes: Any) -> NewFile:
    file_id = str(uuid.uuid4())
    values = {
        "id": file_id,
        "owner_id": owner,
        "filename": "ct.nii.gz",
        "storage_name": f"files/{file_id}/ct.nii.gz",
        "kind": "nifti",
        "media_type": "application/gzip",
        "size": 10,
        "sha256": "0" * 64,
        "header": {"dtype": "int16"},
    }
    return NewFile(**{**values, **changes})


async def begin(store: Store, length: int = 100, owner: str = "ann", hours: float = 1, most: int = 5) -> Upload:
    expires = now() + timedelta(hours=hours)
    return await files.create_upload(
        store, owner_id=owner, filename="ct", length=length, state={"metadata": ""}, expires_at=expires, most=most
    )


async def execution(store: Store, state: str, inputs: dict[str, Any], execution_id: str = "e1") -> None:
    async with store.write() as session:
        await session.merge(
            Execution(
                id=execution_id,
                pipeline_id="p",
                revision=1,
                pipeline="p",
                inputs=inputs,
                parameters={},
                priority="normal",
                queue_key=0,
                state=state,
                created_at=now(),
            )
        )


# --- files -----------------------------------------------------------------------------------------------------------------


def test_rows_are_made_found_and_listed(store: Store, run: Any) -> None:
    async def go() -> None:
        added = [(await files.add_files(store, [new(owner)]))[0] for owner in ("ann", "bob", "ann")]
        await files.add_files(store, [new(kind="png")])
        first = await files.get_file(store, added[0].id)
        assert (first.filename, first.origin, first.header, first.expires_at) == (
            "ct.nii.gz",
            "upload",
            {"dtype": "int16"},
            None,
        )
        found = await files.by_storage_name(store, first.storage_name)
        assert found is not None
        assert found.id == first.id
        assert await files.by_storage_name(store, "elsewhere") is None
        with pytest.raises(NoSuch):
            await files.get_file(store, "nothing")
        mine = await files.list_files(store, owner_id="ann", kind="nifti")
        assert [row.id for row in mine] == [added[2].id, added[0].id]
        page = await files.list_files(store, limit=3)
        rest = await files.list_files(store, before=(page[-1].created_at, page[-1].id))
        assert len({row.id for row in [*page, *rest]}) == 4

    run(go())


def test_two_files_of_one_moment_are_both_listed_once(store: Store, run: Any) -> None:
    async def go() -> None:
        made = await files.add_files(store, [new() for _ in range(5)])
        assert len({row.created_at for row in made}) == 1
        seen: list[str] = []
        before = None
        while page := await files.list_files(store, before=before, limit=2):
            seen += [row.id for row in page]
            before = cursors.decode(cursors.encode(page[-1].created_at, page[-1].id))
        assert sorted(seen) == sorted(row.id for row in made)

    run(go())


def test_all_rows_or_none(store: Store, run: Any) -> None:
    async def go() -> None:
        one = new()
        with pytest.raises(Exception, match=r"(?i)unique"):
            await files.add_files(store, [one, new(storage_name=one.storage_name)])
        assert await files.list_files(store) == []

    run(go())


@pytest.mark.parametrize("as_path", [False, True])
@pytest.mark.parametrize("many", [False, True])
def test_what_work_needs_is_not_deleted(store: Store, run: Any, as_path: bool, many: bool) -> None:
    async def go() -> None:
        file, other = await files.add_files(store, [new(expires_at=now() - HOUR), new()])
        entry = {"file_id": None if as_path else file.id, "path": file.storage_name, "label_scheme": None}
        for state in ("pending", "running"):
            await execution(store, state, {"image": [entry] if many else entry})
            with pytest.raises(InUse, match="e1"):
                await files.delete_file(store, file.id)
            assert await files.expire_files(store, now()) == []
        await files.delete_file(store, other.id)
        await execution(store, "failed", {"image": entry})
        assert (await files.delete_file(store, file.id)).storage_name == file.storage_name
        with pytest.raises(NoSuch):
            await files.delete_file(store, file.id)

    run(go())


def test_files_expire(store: Store, run: Any) -> None:
    async def go() -> None:
        old, _, _ = await files.add_files(store, [new(expires_at=now() - HOUR), new(expires_at=now() + HOUR), new()])
        assert await files.expire_files(store, now()) == [old.storage_name]
        assert await files.expire_files(store, now()) == []
        assert len(await files.list_files(store)) == 2

    run(go())


def test_orphans_are_swept(store: Store, run: Any) -> None:
    async def go() -> None:
        storage: Storage = open_storage("memory://")
        (kept,) = await files.add_files(store, [new()])
        upload = await begin(store)
        writer = await files.take_upload(store, upload.id, 0)
        await files.advance_upload(store, upload.id, writer, [(0, 3, f"uploads/{upload.id}/0")])
        orphans = ["files/x/ct.nii.gz", f"uploads/{upload.id}/1"]
        for name in (kept.storage_name, f"uploads/{upload.id}/0", "mine/ct.nii.gz", *orphans):
            await storage.write(name, b"abc")
        assert await files.sweep_orphans(store, storage, HOUR) == []
        assert sorted(await files.sweep_orphans(store, storage, -HOUR)) == sorted(orphans)
        left = [stat.name async for stat in storage.list()]
        assert sorted(left) == sorted([kept.storage_name, f"uploads/{upload.id}/0", "mine/ct.nii.gz"])

    run(go())


def test_what_a_dead_process_was_writing_is_swept(store: Store, run: Any, tmp_path: Path) -> None:
    async def go() -> None:
        storage = open_storage(tmp_path.as_uri())
        (kept,) = await files.add_files(store, [new()])
        await storage.write(kept.storage_name, b"abc")
        staged = tmp_path / f"files/{uuid.uuid4()}/ct.nii.gz#1"
        for path in (staged, tmp_path / "mine" / "ct#1"):
            path.parent.mkdir(parents=True)
            path.write_bytes(b"abc")
        assert await files.sweep_orphans(store, storage, HOUR) == []
        assert await files.sweep_orphans(store, storage, -HOUR) == [str(staged.relative_to(tmp_path))]

    run(go())
    assert sorted(path.name for path in tmp_path.rglob("ct*") if path.is_file()) == ["ct#1", "ct.nii.gz"]


# --- uploads ---------------------------------------------------------------------------------------------------------------


def test_an_upload_goes_on_where_it_stopped(store: Store, run: Any) -> None:
    async def go() -> None:
        upload = await begin(store, 9)
        writer = await files.take_upload(store, upload.id, 0)
        assert await files.advance_upload(store, upload.id, writer, [(0, 2, "a"), (2, 1, "b")])
        assert await files.advance_upload(store, upload.id, writer, [(3, 4, "c")])
        assert (await files.get_upload(store, upload.id)).offset == 7
        assert [(p.start, p.size, p.storage_name) for p in await files.upload_parts(store, upload.id)] == [
            (0, 2, "a"),
            (2, 1, "b"),
            (3, 4, "c"),
        ]
        with pytest.raises(UploadConflict, match="7 bytes are there"):
            await files.take_upload(store, upload.id, 3)
        assert await files.hold_joining(store, upload.id, writer, now() + HOUR)
        with pytest.raises(UploadConflict, match="being made"):
            await files.take_upload(store, upload.id, 7)
        finished = await files.finish_upload(store, upload.id, writer, new())
        assert finished is not None
        assert sorted(finished[1]) == ["a", "b", "c"]
        done = await files.get_upload(store, upload.id)
        assert (done.offset, done.file_id, done.joining_until) == (9, finished[0].id, None)
        assert (await files.get_file(store, finished[0].id)).origin == "upload"
        assert await files.upload_parts(store, upload.id) == []

    run(go())


def test_of_two_writers_the_newest_counts(store: Store, run: Any) -> None:
    async def go() -> None:
        upload = await begin(store)
        old = await files.take_upload(store, upload.id, 0)
        newest = await files.take_upload(store, upload.id, 0)
        assert not await files.advance_upload(store, upload.id, old, [(0, 1, "old")])
        assert not await files.hold_joining(store, upload.id, old, now() + HOUR)
        assert await files.finish_upload(store, upload.id, old, new()) is None
        assert await files.advance_upload(store, upload.id, newest, [(0, 1, "new")])
        assert not await files.advance_upload(store, upload.id, newest, [(0, 1, "again")])
        assert [part.storage_name for part in await files.upload_parts(store, upload.id)] == ["new"]
        assert await files.list_files(store) == []

    run(go())


def test_of_many_at_once_one_wins(store: Store, run: Any) -> None:
    async def go() -> None:
        upload = await begin(store)
        writer = await files.take_upload(store, upload.id, 0)
        tries = [files.advance_upload(store, upload.id, writer, [(0, 5, f"part{n}")]) for n in range(10)]
        assert sum(await asyncio.gather(*tries)) == 1
        finishes = [files.finish_upload(store, upload.id, writer, new()) for _ in range(5)]
        assert sum(done is not None for done in await asyncio.gather(*finishes)) == 1
        assert len(await files.list_files(store)) == 1

    run(go())


def test_a_dead_joiner_holds_nobody_for_long(store: Store, run: Any) -> None:
    async def go() -> None:
        upload = await begin(store)
        dead = await files.take_upload(store, upload.id, 0)
        await files.hold_joining(store, upload.id, dead, now() - timedelta(seconds=1))
        writer = await files.take_upload(store, upload.id, 0)
        assert not await files.hold_joining(store, upload.id, dead, now() + HOUR)
        assert await files.finish_upload(store, upload.id, dead, new()) is None
        assert await files.finish_upload(store, upload.id, writer, new()) is not None

    run(go())


def test_uploads_end(store: Store, run: Any) -> None:
    async def go() -> None:
        dropped, late, kept = [await begin(store, hours=hours) for hours in (1, -1, 1)]
        writers = {}
        for upload in (dropped, kept):
            writers[upload.id] = await files.take_upload(store, upload.id, 0)
            await files.advance_upload(store, upload.id, writers[upload.id], [(0, 1, f"uploads/{upload.id}/0")])
        assert await files.drop_uploads(store, dropped.id) == [f"uploads/{dropped.id}/0"]
        assert not await files.advance_upload(store, dropped.id, writers[dropped.id], [(1, 1, "x")])
        for gone in (dropped, late):
            with pytest.raises(NoSuch):
                await files.get_upload(store, gone.id)
            with pytest.raises(NoSuch):
                await files.take_upload(store, gone.id, 0)
        assert await files.expire_files(store, now()) == []
        assert await files.expire_files(store, now() + 2 * HOUR) == [f"uploads/{kept.id}/0"]
        async with store.read() as session:
            assert await session.get(Upload, kept.id) is None
            assert await session.get(File, kept.id) is None

    run(go())


def test_an_account_begins_only_so_many(store: Store, run: Any) -> None:
    async def go() -> None:
        first = await begin(store, most=2)
        await begin(store, hours=-1, most=2)
        await begin(store, most=2)
        with pytest.raises(TooManyRequests):
            await begin(store, most=2)
        await begin(store, owner="bob", most=2)
        writer = await files.take_upload(store, first.id, 0)
        await files.finish_upload(store, first.id, writer, new())
        await begin(store, most=2)

    run(go())


# --- cursors ---------------------------------------------------------------------------------------------------------------


def test_cursors_keep_the_moment_exactly() -> None:
    moment = now()
    assert cursors.decode(cursors.encode(moment, "id")) == (moment, "id")


@pytest.mark.parametrize(
    "text", ["", "x", "????", "W10", "WyJ4IiwgInkiXQ", "é", "WyIyMDI2LTAxLTAxIiwieCJd", "bnVsbA", "e30", "\0"]
)
def test_what_is_no_cursor_of_ours_is_refused(text: str) -> None:
    with pytest.raises(InvalidCursor):
        cursors.decode(text)


def test_the_sweep_finds_abandoned_results_and_steps(store: Store, run: Any, tmp_path: Any) -> None:
    from scangraph.contracts import StepSummary
    from scangraph.store import executions, results
    from tests.store.test_executions import finish, submit, take

    async def go() -> None:
        storage = open_storage((tmp_path / "swept").as_uri())
        ended = await submit(store)
        await finish(store, await take(store))
        waiting = await submit(store)
        await results.keep_result(store, "known", "c/d", {"mask": "steps/known/mask"}, StepSummary(1, 1), 1)
        kept = [f"results/{ended}/scene.obj", f"results/{waiting}/a", "results/older/mask.nii.gz", "steps/known/mask", "mine/a"]
        left = [f"results/{ended}/scene-2.obj", "steps/unknown/mask"]
        for name in (*kept, *left):
            await storage.write(name, b"x")
        assert await files.sweep_orphans(store, storage, timedelta(days=1)) == []
        assert sorted(await files.sweep_orphans(store, storage, timedelta(seconds=-1))) == sorted(left)
        assert sorted([stat.name async for stat in storage.list()]) == sorted(kept)
        assert (await executions.load(store, waiting)).execution.state == "pending"

    run(go())
