"""Pipelines and their revisions, on every database."""

from __future__ import annotations

import asyncio
import uuid
from typing import Any

import pytest
from sqlalchemy import func, select

from deployments.nnunet.components import COMPONENTS as NNUNET
from deployments.postprocess.components import COMPONENTS as POSTPROCESS
from deployments.smoothing.components import COMPONENTS as SMOOTHING
from scangraph.contracts import label_table
from scangraph.contracts.errors import BuiltIn, NameTaken, NoSuch, PreconditionFailed
from scangraph.contracts.pipelines import PipelineSpec, built_in_pipelines
from scangraph.store import Store, open_store, pipelines
from scangraph.store.pipelines import Stored
from scangraph.store.tables import PipelineRevision

COMPONENTS = (*NNUNET, *POSTPROCESS, *SMOOTHING)
BUILT_IN = built_in_pipelines(COMPONENTS, {number: label.name for number, label in label_table().items()})


def spec(name: str = "mine", title: str = "") -> PipelineSpec:
    return PipelineSpec.model_validate(
        {
            "name": name,
            "title": title,
            "inputs": {"image": {"kind": "image"}},
            "steps": [{"id": "run", "component": "inference/totalseg", "inputs": {"image": "input.image"}}],
            "outputs": {"mask": "run.mask"},
        }
    )


async def revisions(store: Store) -> int:
    async with store.read() as session:
        return int((await session.execute(select(func.count()).select_from(PipelineRevision))).scalar_one())


async def all_of(store: Store) -> dict[str, Stored]:
    return {found.name: found for found in await pipelines.list_pipelines(store, limit=200)}


def test_revisions_never_change(store: Store, run: Any) -> None:
    async def go() -> None:
        first = await pipelines.create_pipeline(store, spec(), "me")
        assert (first.revision, first.owner_id, first.built_in) == (1, "me", False)
        second = await pipelines.update_pipeline(store, "mine", spec(title="Two"), "other", first.etag)
        assert (second.id, second.revision, second.owner_id) == (first.id, 2, "me")
        assert first.etag != second.etag
        same = await pipelines.update_pipeline(store, first.id, spec(title="Two"), "me", second.etag)
        assert same.etag == second.etag
        third = await pipelines.update_pipeline(store, "mine", spec("yours", "Three"), "me", "*")
        assert (third.name, third.revision) == ("yours", 3)
        for name in (first.id, "yours"):
            assert (await pipelines.find_pipeline(store, name)).spec == spec("yours", "Three")
            assert (await pipelines.find_pipeline(store, f"{name}@1")).spec == spec()
            assert (await pipelines.find_pipeline(store, f"{name}@2")).spec == spec(title="Two")
        for name in ("mine", "yours@4", "yours@0", "yours@", "yours@-1", "yours@one", "@1", "", "yours@1@1"):
            with pytest.raises(NoSuch):
                await pipelines.find_pipeline(store, name)
        with pytest.raises(PreconditionFailed):
            await pipelines.update_pipeline(store, "yours", spec(), "me", first.etag)
        with pytest.raises(NoSuch):
            await pipelines.update_pipeline(store, "yours@1", spec(), "me", "*")

    run(go())


def test_a_name_belongs_to_one_and_is_free_when_that_is_gone(store: Store, run: Any) -> None:
    async def go() -> None:
        outcomes = await asyncio.gather(
            *(pipelines.create_pipeline(store, spec(), "me") for _ in range(6)), return_exceptions=True
        )
        (first,) = (outcome for outcome in outcomes if isinstance(outcome, Stored))
        assert sum(isinstance(outcome, NameTaken) for outcome in outcomes) == 5
        other = await pipelines.create_pipeline(store, spec("other"), "me")
        with pytest.raises(NameTaken):
            await pipelines.update_pipeline(store, "other", spec(), "me", other.etag)
        assert (await pipelines.find_pipeline(store, "other")).revision == 1
        with pytest.raises(PreconditionFailed):
            await pipelines.delete_pipeline(store, "mine", '"old"')
        await pipelines.delete_pipeline(store, "mine", first.etag)
        for name in ("mine", first.id):
            with pytest.raises(NoSuch):
                await pipelines.find_pipeline(store, name)
        with pytest.raises(NoSuch):
            await pipelines.delete_pipeline(store, first.id, "*")
        again = await pipelines.create_pipeline(store, spec(title="Again"), "me")
        assert again.id != first.id
        kept = await pipelines.find_revision(store, first.id, 1)  # what executions name stays
        assert (kept.name, kept.spec) == ("mine", spec())
        with pytest.raises(NoSuch):
            await pipelines.find_revision(store, first.id, 2)

    run(go())


def test_of_many_changes_at_once_one_wins(store: Store, run: Any) -> None:
    """Two replicas on one database."""

    async def go() -> None:
        other = await open_store(store.url)
        try:
            first = await pipelines.create_pipeline(store, spec(), "me")
            changes = (
                pipelines.update_pipeline((store, other)[n % 2], "mine", spec(title=f"edit {n}"), "me", first.etag)
                for n in range(8)
            )
            outcomes = await asyncio.gather(
                *changes, pipelines.delete_pipeline(other, "mine", first.etag), return_exceptions=True
            )
            lost = [outcome for outcome in outcomes if isinstance(outcome, (PreconditionFailed, NoSuch))]
            assert len(lost) == 8, outcomes
            assert await revisions(store) in {1, 2}
        finally:
            await other.close()

    run(go())


def test_pages_follow_each_other(store: Store, run: Any) -> None:
    async def go() -> None:
        made = [(await pipelines.create_pipeline(store, spec(f"p-{n}"), "me")).id for n in range(7)]
        seen: list[str] = []
        before = None
        while page := await pipelines.list_pipelines(store, before=before, limit=3):
            seen += [found.id for found in page]
            before = page[-1].created_at, page[-1].id
        assert seen == made[::-1]

    run(go())


def test_built_in_ones_are_there_once_whoever_starts(store: Store, run: Any) -> None:
    async def go() -> None:
        others = [await open_store(store.url) for _ in range(3)]
        try:
            await asyncio.gather(*(pipelines.sync_built_in(each, BUILT_IN) for each in (store, *others, store)))
        finally:
            await asyncio.gather(*(other.close() for other in others))
        found = await all_of(store)
        assert {name: stored.spec for name, stored in found.items()} == {wanted.name: wanted for wanted in BUILT_IN}
        assert all(stored.built_in and stored.revision == 1 and stored.owner_id is None for stored in found.values())
        assert found["organs"].id == str(uuid.uuid5(pipelines._NAMESPACE, "organs"))  # the same everywhere
        for change in (
            pipelines.update_pipeline(store, "organs", spec(), "me", found["organs"].etag),
            pipelines.delete_pipeline(store, "organs", "*"),
        ):
            with pytest.raises(BuiltIn):
                await change

    run(go())


def test_built_in_ones_follow_the_version_that_runs(store: Store, run: Any) -> None:
    async def go() -> None:
        await pipelines.sync_built_in(store, [spec("a"), spec("b")])
        own = await pipelines.create_pipeline(store, spec("own"), "me")
        before = await all_of(store)
        await pipelines.sync_built_in(store, [spec("a"), spec("b")])
        assert await all_of(store) == before
        await pipelines.sync_built_in(store, [spec("a", "Better")])
        found = await all_of(store)
        assert {name: stored.revision for name, stored in found.items()} == {"a": 2, "own": 1}
        assert found["own"] == own
        assert (await pipelines.find_revision(store, before["b"].id, 1)).spec == spec("b")
        await pipelines.sync_built_in(store, [spec("a"), spec("b")])  # back again, where it was
        found = await all_of(store)
        assert (found["a"].revision, found["b"].revision) == (3, 1)
        assert found["b"].id == before["b"].id

    run(go())


def test_a_built_in_one_does_not_take_a_name_away(store: Store, run: Any) -> None:
    """A new version brings a pipeline whose name somebody has: theirs stays, the others come."""

    async def go() -> None:
        own = await pipelines.create_pipeline(store, spec("later", "Mine"), "me")
        await pipelines.sync_built_in(store, [spec("a"), spec("later"), spec("z")])
        found = await all_of(store)
        assert found.keys() == {"a", "later", "z"}
        assert found["later"] == own

    run(go())
