"""The tables. `migrations/` makes them; a test fails when the two differ."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import JSON, BigInteger, Boolean, Float, ForeignKey, Index, Integer, MetaData, String, Text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from scangraph.store.database import UtcDateTime

_NAMES = {
    "ix": "ix_%(column_0_label)s",
    "uq": "uq_%(table_name)s_%(column_0_name)s",
    "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
    "pk": "pk_%(table_name)s",
}


class Base(DeclarativeBase):
    """Base of the tables."""

    metadata = MetaData(naming_convention=_NAMES)
    type_annotation_map = {datetime: UtcDateTime, dict[str, Any]: JSON, list[Any]: JSON, str: String(255), int: BigInteger}  # noqa: RUF012


def _id() -> Mapped[str]:
    return mapped_column(String(36), primary_key=True)


class Account(Base):
    """A person, or a service account of a backend."""

    __tablename__ = "accounts"

    id: Mapped[str] = _id()
    name: Mapped[str] = mapped_column(String(64), unique=True)
    kind: Mapped[str] = mapped_column(String(16))  # person | service
    role: Mapped[str] = mapped_column(String(16))
    password_hash: Mapped[str] = mapped_column(String(255))
    created_at: Mapped[datetime]
    disabled_at: Mapped[datetime | None]
    # Tokens of an earlier epoch are no longer good: one number revokes all of an account.
    token_epoch: Mapped[int] = mapped_column(Integer, default=0)


class RefreshToken(Base):
    """One link of a chain of rotating refresh tokens; only its hash is kept."""

    __tablename__ = "refresh_tokens"

    token_hash: Mapped[str] = mapped_column(String(64), primary_key=True)
    family: Mapped[str] = mapped_column(String(36), index=True)
    account_id: Mapped[str] = mapped_column(String(36), ForeignKey("accounts.id", ondelete="CASCADE"), index=True)
    created_at: Mapped[datetime]
    expires_at: Mapped[datetime] = mapped_column(index=True)
    used_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]


class RevokedToken(Base):
    """An access token that was logged out before it expired."""

    __tablename__ = "revoked_tokens"

    jti: Mapped[str] = mapped_column(String(36), primary_key=True)
    expires_at: Mapped[datetime] = mapped_column(index=True)


class Pipeline(Base):
    """A pipeline's name and its current revision."""

    __tablename__ = "pipelines"

    id: Mapped[str] = _id()
    name: Mapped[str | None] = mapped_column(String(64), unique=True)  # null once deleted: the name is free again
    owner_id: Mapped[str | None] = mapped_column(String(36))
    built_in: Mapped[bool] = mapped_column(Boolean)
    revision: Mapped[int] = mapped_column(Integer)
    created_at: Mapped[datetime] = mapped_column(index=True)
    updated_at: Mapped[datetime]
    deleted_at: Mapped[datetime | None]


class PipelineRevision(Base):
    """What a pipeline was at one time; never changed, never deleted while an execution names it."""

    __tablename__ = "pipeline_revisions"

    pipeline_id: Mapped[str] = mapped_column(String(36), ForeignKey("pipelines.id"), primary_key=True)
    revision: Mapped[int] = mapped_column(Integer, primary_key=True)
    spec: Mapped[dict[str, Any]]
    created_at: Mapped[datetime]
    created_by: Mapped[str | None] = mapped_column(String(36))


class File(Base):
    """A stored file: an upload or a result."""

    __tablename__ = "files"

    id: Mapped[str] = _id()
    owner_id: Mapped[str | None] = mapped_column(String(36), index=True)
    origin: Mapped[str] = mapped_column(String(16))  # upload | result
    filename: Mapped[str]  # for people; never used as a path
    storage_name: Mapped[str] = mapped_column(String(512), unique=True)
    kind: Mapped[str] = mapped_column(String(32))
    media_type: Mapped[str] = mapped_column(String(128))
    size: Mapped[int]
    sha256: Mapped[str] = mapped_column(String(64), index=True)
    # "metadata" is SQLAlchemy's own name.
    header: Mapped[dict[str, Any]] = mapped_column("header", default=dict)
    execution_id: Mapped[str | None] = mapped_column(String(36), ForeignKey("executions.id", ondelete="CASCADE"), index=True)
    output: Mapped[str | None] = mapped_column(String(64))  # name of the pipeline's output
    created_at: Mapped[datetime] = mapped_column(index=True)
    expires_at: Mapped[datetime | None] = mapped_column(index=True)


class Upload(Base):
    """A resumable upload (tus). Once all its bytes are there it is a file, and the row stays until it expires, to say so."""

    __tablename__ = "uploads"

    id: Mapped[str] = _id()
    owner_id: Mapped[str | None] = mapped_column(String(36), index=True)
    filename: Mapped[str]
    length: Mapped[int]
    offset: Mapped[int] = mapped_column("received", default=0)
    state: Mapped[dict[str, Any]] = mapped_column(default=dict)  # what its metadata said
    # Who writes: the newest request. One that hangs on a dead connection finds another name here and gives up.
    writer: Mapped[str | None] = mapped_column(String(36))
    # While the parts are joined nobody else may begin; the joiner puts this off while it lives.
    joining_until: Mapped[datetime | None]
    file_id: Mapped[str | None] = mapped_column(String(36))
    created_at: Mapped[datetime]
    expires_at: Mapped[datetime] = mapped_column(index=True)


class UploadPart(Base):
    """Bytes of a resumable upload, in an object of their own."""

    __tablename__ = "upload_parts"

    upload_id: Mapped[str] = mapped_column(String(36), ForeignKey("uploads.id", ondelete="CASCADE"), primary_key=True)
    start: Mapped[int] = mapped_column(primary_key=True)
    size: Mapped[int]
    storage_name: Mapped[str] = mapped_column(String(512))


class Execution(Base):
    """A pipeline's revision at work on inputs."""

    __tablename__ = "executions"

    id: Mapped[str] = _id()
    owner_id: Mapped[str | None] = mapped_column(String(36), index=True)
    pipeline_id: Mapped[str] = mapped_column(String(36), index=True)
    revision: Mapped[int] = mapped_column(Integer)
    pipeline: Mapped[str] = mapped_column(String(64))  # its name then
    inputs: Mapped[dict[str, Any]]
    parameters: Mapped[dict[str, Any]]
    input_bytes: Mapped[int | None]  # of the decoded images; null where not known
    retry_of: Mapped[str | None] = mapped_column(String(36))
    priority: Mapped[str] = mapped_column(String(8))
    # When it was created, plus the ageing time for each step below `high`: the queue's order, in which nobody starves.
    queue_key: Mapped[float] = mapped_column(Float)
    state: Mapped[str] = mapped_column(String(16))
    error: Mapped[dict[str, Any] | None]
    created_at: Mapped[datetime]
    started_at: Mapped[datetime | None]
    completed_at: Mapped[datetime | None]
    cancel_requested_at: Mapped[datetime | None]
    lease_owner: Mapped[str | None] = mapped_column(String(64))
    lease_until: Mapped[datetime | None]
    # Grows with every claim; whoever writes must name it, so that a process that was thought dead cannot.
    fence: Mapped[int] = mapped_column(Integer, default=0)
    last_seq: Mapped[int] = mapped_column(Integer, default=0)
    # W3C trace context of the request that made it: its trace goes on after the queue, and after a restart.
    traceparent: Mapped[str | None] = mapped_column(String(55))

    __table_args__ = (
        Index("ix_executions_queue", "state", "queue_key"),
        Index("ix_executions_list", "created_at", "id"),
    )


class Step(Base):
    """A step of an execution."""

    __tablename__ = "steps"

    execution_id: Mapped[str] = mapped_column(String(36), ForeignKey("executions.id", ondelete="CASCADE"), primary_key=True)
    step_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    position: Mapped[int] = mapped_column(Integer)
    component: Mapped[str] = mapped_column(String(128))
    version: Mapped[str] = mapped_column(String(32))
    state: Mapped[str] = mapped_column(String(16))
    started_at: Mapped[datetime | None]
    completed_at: Mapped[datetime | None]
    done: Mapped[int] = mapped_column(Integer, default=0)
    total: Mapped[int] = mapped_column(Integer, default=0)
    message: Mapped[str] = mapped_column(Text, default="")
    attempts: Mapped[int] = mapped_column(Integer, default=0)
    cached: Mapped[bool] = mapped_column(Boolean, default=False)
    seconds: Mapped[float | None]
    peak_mb: Mapped[float | None]
    resources: Mapped[dict[str, Any]] = mapped_column(default=dict)
    warnings: Mapped[list[Any]] = mapped_column(default=list)
    facts: Mapped[dict[str, Any]] = mapped_column(default=dict)
    error: Mapped[dict[str, Any] | None]
    # What makes its result: hash over component, version, models, parameters and inputs.
    result_key: Mapped[str | None] = mapped_column(String(64))


class Event(Base):
    """What listeners are told, numbered without a gap within an execution."""

    __tablename__ = "events"

    execution_id: Mapped[str] = mapped_column(String(36), ForeignKey("executions.id", ondelete="CASCADE"), primary_key=True)
    seq: Mapped[int] = mapped_column(Integer, primary_key=True)
    kind: Mapped[str] = mapped_column(String(16))  # progress | error | cancelled
    body: Mapped[dict[str, Any]]
    created_at: Mapped[datetime]


class Outbox(Base):
    """An event that a message broker has not got yet. Rows are there only where one is configured."""

    __tablename__ = "outbox"

    # Grows within an execution as its numbers do: both are given under the execution's row lock.
    position: Mapped[int] = mapped_column(BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True)
    execution_id: Mapped[str] = mapped_column(String(36), ForeignKey("executions.id", ondelete="CASCADE"), index=True)
    seq: Mapped[int] = mapped_column(Integer)

    # A position is never used again: somebody slow may still take it away.
    __table_args__ = ({"sqlite_autoincrement": True},)


class Lease(Base):
    """Work that one process at a time does, and who has it until when."""

    __tablename__ = "leases"

    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    holder: Mapped[str] = mapped_column(String(64))
    until: Mapped[datetime]


class IdempotencyKey(Base):
    """A key that made something, and what."""

    __tablename__ = "idempotency_keys"

    owner_id: Mapped[str] = mapped_column(String(36), primary_key=True)
    key: Mapped[str] = mapped_column(String(255), primary_key=True)
    body_sha256: Mapped[str] = mapped_column(String(64))
    execution_id: Mapped[str] = mapped_column(String(36), ForeignKey("executions.id", ondelete="CASCADE"), index=True)
    created_at: Mapped[datetime] = mapped_column(index=True)


class Audit(Base):
    """Who accessed whose data (`audit.py`). The database refuses to change or delete a row."""

    __tablename__ = "audit"

    seq: Mapped[int] = mapped_column(BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=False)
    at: Mapped[datetime]
    account_id: Mapped[str] = mapped_column(String(36), index=True)
    account: Mapped[str] = mapped_column(String(64))  # its name then
    address: Mapped[str] = mapped_column(String(64))
    door: Mapped[str] = mapped_column(String(16))
    action: Mapped[str] = mapped_column(String(128))
    kind: Mapped[str] = mapped_column(String(16))
    object_id: Mapped[str] = mapped_column(String(36), index=True)
    code: Mapped[str] = mapped_column(String(32))
    trace_id: Mapped[str] = mapped_column(String(32))
    digest: Mapped[str] = mapped_column(String(64))


class StepResult(Base):
    """A step's result that is kept, by what made it."""

    __tablename__ = "step_results"

    key: Mapped[str] = mapped_column(String(64), primary_key=True)
    component: Mapped[str] = mapped_column(String(128))
    outputs: Mapped[dict[str, Any]]  # port -> storage name
    summary: Mapped[dict[str, Any]]
    size: Mapped[int]
    created_at: Mapped[datetime]
    used_at: Mapped[datetime] = mapped_column(index=True)
