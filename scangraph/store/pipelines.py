"""Pipelines and their immutable revisions."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import and_, or_, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from scangraph.contracts.errors import BuiltIn, NameTaken, NoSuch, PreconditionFailed
from scangraph.contracts.pipelines import PipelineSpec
from scangraph.store.database import Store, now, whole
from scangraph.store.tables import Pipeline, PipelineRevision

#: Built-in pipelines have the same id in every installation.
_NAMESPACE = uuid.UUID("7f0d2c1e-6a53-4d0e-9a38-5c1b2f9e7a10")


@dataclass(frozen=True)
class Stored:
    """A revision of a pipeline."""

    id: str
    name: str
    revision: int
    built_in: bool
    owner_id: str | None
    created_at: datetime
    updated_at: datetime
    spec: PipelineSpec

    @property
    def etag(self) -> str:
        """Strong ETag: a revision never changes."""
        return f'"{self.id}.{self.revision}"'


def _stored(row: Pipeline, revision: PipelineRevision) -> Stored:
    spec = PipelineSpec.model_validate(revision.spec)
    return Stored(
        row.id, row.name or spec.name, revision.revision, row.built_in, row.owner_id, row.created_at, row.updated_at, spec
    )


@whole
async def create_pipeline(store: Store, spec: PipelineSpec, owner_id: str | None) -> Stored:
    """Make a pipeline's first revision. Race: two of one name; the name is unique in the table.

    Raises
    ------
    NameTaken
    """
    pipeline_id = str(uuid.uuid4())
    try:
        async with store.write() as session:
            return await _make(session, pipeline_id, spec, owner_id, built_in=False)
    except IntegrityError as error:
        raise NameTaken(kind="pipeline", name=spec.name) from error


async def _make(session: AsyncSession, pipeline_id: str, spec: PipelineSpec, owner_id: str | None, *, built_in: bool) -> Stored:
    moment = now()
    row = Pipeline(
        id=pipeline_id, name=spec.name, owner_id=owner_id, built_in=built_in, revision=1, created_at=moment, updated_at=moment
    )
    session.add(row)
    await session.flush()
    return await _revise(session, row, spec, 1, owner_id)


async def _revise(session: AsyncSession, row: Pipeline, spec: PipelineSpec, number: int, author: str | None) -> Stored:
    stored = spec.model_dump(mode="json")
    revision = PipelineRevision(pipeline_id=row.id, revision=number, spec=stored, created_at=now(), created_by=author)
    session.add(revision)
    row.revision, row.name, row.updated_at = number, spec.name, now()
    await session.flush()
    return _stored(row, revision)


@whole
async def find_pipeline(store: Store, name: str) -> Stored:
    """Find a pipeline by its id or name, or one revision of it by `name@number`.

    Raises
    ------
    NoSuch
    """
    plain, at, number = name.partition("@")
    async with store.read() as session:
        row = await _row(session, plain)
        wanted = int(number) if number.isdecimal() and len(number) < 10 else row.revision if row and not at else None
        revision = await session.get(PipelineRevision, (row.id, wanted)) if row and wanted is not None else None
        if row is None or revision is None:
            raise NoSuch(kind="pipeline", id=name)
        return _stored(row, revision)


@whole
async def find_revision(store: Store, pipeline_id: str, revision: int) -> Stored:
    """Return the revision that an execution names, also of a deleted pipeline."""
    async with store.read() as session:
        row, found = await session.get(Pipeline, pipeline_id), await session.get(PipelineRevision, (pipeline_id, revision))
        if row is None or found is None:
            raise NoSuch(kind="pipeline", id=f"{pipeline_id}@{revision}")
        return _stored(row, found)


async def _row(session: AsyncSession, name: str, *, lock: bool = False) -> Pipeline | None:
    query = select(Pipeline).where(or_(Pipeline.id == name, Pipeline.name == name), Pipeline.deleted_at.is_(None))
    return (await session.execute(query.with_for_update() if lock else query)).scalar_one_or_none()


@whole
async def list_pipelines(store: Store, *, before: tuple[datetime, str] | None = None, limit: int = 50) -> Sequence[Stored]:
    """List the current revisions, the newest pipeline first."""
    joined = and_(PipelineRevision.pipeline_id == Pipeline.id, PipelineRevision.revision == Pipeline.revision)
    query = select(Pipeline, PipelineRevision).join(PipelineRevision, joined).where(Pipeline.deleted_at.is_(None))
    if before is not None:
        at, last = before
        query = query.where(or_(Pipeline.created_at < at, and_(Pipeline.created_at == at, Pipeline.id < last)))
    query = query.order_by(Pipeline.created_at.desc(), Pipeline.id.desc()).limit(limit)
    async with store.read() as session:
        return [_stored(row, revision) for row, revision in (await session.execute(query)).all()]


@whole
async def update_pipeline(store: Store, name: str, spec: PipelineSpec, author: str | None, etag: str) -> Stored:
    """Make the next revision, if the current one is still `etag`; the same specification again makes none.

    Race: two editors. The row is locked (SQLite: there is one writer), so the second finds another ETag than it read.

    Raises
    ------
    NoSuch, BuiltIn, PreconditionFailed, NameTaken
    """
    try:
        async with store.write() as session:
            row, current = await _changeable(session, name, etag)
            if current.spec == spec.model_dump(mode="json"):
                return _stored(row, current)
            return await _revise(session, row, spec, row.revision + 1, author)
    except IntegrityError as error:
        raise NameTaken(kind="pipeline", name=spec.name) from error


@whole
async def delete_pipeline(store: Store, name: str, etag: str) -> None:
    """Take a pipeline away; its revisions stay for the executions that name them, and its name is free again."""
    async with store.write() as session:
        row, _ = await _changeable(session, name, etag)
        row.name, row.deleted_at = None, now()


async def _changeable(session: AsyncSession, name: str, etag: str) -> tuple[Pipeline, PipelineRevision]:
    row = await _row(session, name, lock=True)
    current = await session.get(PipelineRevision, (row.id, row.revision)) if row else None
    if row is None or current is None:
        raise NoSuch(kind="pipeline", id=name)
    if row.built_in:
        raise BuiltIn(name=row.name)
    found = _stored(row, current).etag
    if etag not in {found, "*"}:
        raise PreconditionFailed(kind="pipeline", id=name, etag=found)
    return row, current


@whole
async def find_built_in(store: Store, spec: PipelineSpec) -> Stored:
    """Return a built-in pipeline, made now where it is not there yet: its component may be younger than the last sync.

    Raises
    ------
    NameTaken
        If somebody has another pipeline of its name.
    """
    key = str(uuid.uuid5(_NAMESPACE, spec.name))
    async with store.read() as session:
        row = await session.get(Pipeline, key)
        revision = await session.get(PipelineRevision, (key, row.revision)) if row and not row.deleted_at else None
        if row is not None and revision is not None and revision.spec == spec.model_dump(mode="json"):
            return _stored(row, revision)
    with contextlib.suppress(IntegrityError):  # another replica was faster, or somebody has the name: looked at next
        await _bring(store, key, spec)
    async with store.read() as session:
        row = await session.get(Pipeline, key)
        revision = await session.get(PipelineRevision, (key, row.revision)) if row and not row.deleted_at else None
        if row is None or revision is None:
            raise NameTaken(kind="pipeline", name=spec.name)
        return _stored(row, revision)


async def _bring(store: Store, key: str, spec: PipelineSpec | None) -> None:
    """Bring one built-in pipeline up to date, or take it away."""
    async with store.write() as session:
        row = (await session.execute(select(Pipeline).where(Pipeline.id == key).with_for_update())).scalar_one_or_none()
        if spec is None:
            if row is not None:
                row.name, row.deleted_at = None, now()
        elif row is None:
            await _make(session, key, spec, None, built_in=True)
        else:
            row.deleted_at = None
            current = await session.get(PipelineRevision, (key, row.revision))
            if current is None or current.spec != spec.model_dump(mode="json"):
                await _revise(session, row, spec, row.revision + 1, None)
            row.name = spec.name


@whole
async def sync_built_in(store: Store, specs: Sequence[PipelineSpec]) -> None:
    """Bring the built-in pipelines up to date: a changed one gets a new revision, one that is no more is taken away.

    Race: several replicas start at once. Ids follow from names, so nothing is made twice, and the loser has nothing to do.
    """
    wanted = {str(uuid.uuid5(_NAMESPACE, spec.name)): spec for spec in specs}
    async with store.read() as session:
        rows = (await session.execute(select(Pipeline).where(Pipeline.built_in))).scalars().all()
        known = {row.id: (row, await session.get(PipelineRevision, (row.id, row.revision))) for row in rows}
    outdated = [
        key
        for key, spec in wanted.items()
        if key not in known
        or known[key][0].deleted_at
        or (r := known[key][1]) is None
        or r.spec != spec.model_dump(mode="json")
    ]
    gone = [key for key, (row, _) in known.items() if key not in wanted and row.deleted_at is None]
    for key in (*outdated, *gone):
        try:
            await _bring(store, key, wanted.get(key))
        except IntegrityError:
            continue
