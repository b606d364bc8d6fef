"""The audit log: appended to by many, changed by nobody unseen."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from scangraph.contracts.errors import StoreUnavailable
from scangraph.store import Store, audit, now, open_store
from scangraph.store.audit import Access, Recorder

ANN = Access("a" * 36, "ann", "http", "GET /v1/files/{file_id}", "200", "file", "f" * 36, "10.0.0.1", "0" * 32)
OTHER = replace(ANN, object_id="e" * 36)


def sql(store: Store, run: Any, *statements: str) -> None:
    async def go() -> None:
        async with store.write() as session:
            for statement in statements:
                await session.execute(text(statement))

    run(go())


def unlocked(store: Store) -> str:
    """Statement by which the database's owner takes the guard away."""
    return "DROP TRIGGER audit_no_update" if store.is_sqlite else "DROP TRIGGER audit_only_appended ON audit"


def test_what_was_noted_is_found(store: Store, run: Any) -> None:
    assert run(audit.verify(store)) == audit.Verdict(0, "0:" + "0" * 64)
    run(audit.append(store, [ANN, OTHER, replace(ANN, account_id="b" * 36, account="bob", code="404")]))
    rows = run(audit.entries(store))
    assert [row.seq for row in rows] == [1, 2, 3]
    assert audit.view(rows[0]).items() >= ANN.__dict__.items()
    assert [row.seq for row in run(audit.entries(store, account="bob"))] == [3]
    assert [row.seq for row in run(audit.entries(store, account="a" * 36))] == [1, 2]
    assert [row.seq for row in run(audit.entries(store, object_id="f" * 36))] == [1, 3]
    assert [row.seq for row in run(audit.entries(store, limit=1))] == [3]
    assert run(audit.entries(store, since=now() + timedelta(seconds=5))) == []
    found = run(audit.verify(store))
    assert (found.rows, found.fault) == (3, "")
    assert found.head == f"3:{rows[2].digest}"


@pytest.mark.parametrize("statement", ["UPDATE audit SET code = '404'", "DELETE FROM audit", "DELETE FROM audit WHERE seq = 2"])
def test_the_database_refuses_to_change_it(statement: str, store: Store, run: Any) -> None:
    run(audit.append(store, [ANN, OTHER]))
    with pytest.raises((DBAPIError, StoreUnavailable)):
        sql(store, run, statement)
    assert run(audit.verify(store)).rows == 2


@pytest.mark.parametrize(
    ("forged", "fault"),
    [
        ("UPDATE audit SET account = 'eve' WHERE seq = 2", "row 2 is not what was written"),
        ("UPDATE audit SET seq = 9 WHERE seq = 2", "row 2 is missing"),
        ("UPDATE audit SET digest = (SELECT digest FROM audit WHERE seq = 1) WHERE seq = 3", "row 3 is not what was written"),
    ],
)
def test_who_can_change_it_is_seen(forged: str, fault: str, store: Store, run: Any) -> None:
    run(audit.append(store, [ANN, OTHER, ANN, OTHER]))
    sql(store, run, unlocked(store), forged)
    found = run(audit.verify(store))
    assert found.fault == fault
    assert found.rows == int(fault.split()[1]) - 1


def test_a_noted_head_shows_what_the_chain_alone_cannot(database_url: str, store: Store, run: Any) -> None:
    run(audit.append(store, [ANN, OTHER, ANN]))
    head = run(audit.verify(store)).head
    assert run(audit.verify(store, head)).fault == ""
    run(audit.append(store, [OTHER]))
    assert run(audit.verify(store, head)).fault == ""  # it goes on
    sql(
        store,
        run,
        *(["DROP TRIGGER audit_no_delete"] if store.is_sqlite else [unlocked(store)]),
        "DELETE FROM audit WHERE seq > 2",
    )
    assert run(audit.verify(store)).fault == ""  # a shorter chain is a chain
    assert "ends before row 3" in run(audit.verify(store, head)).fault
    run(audit.append(store, [OTHER, OTHER]))  # and so is another one
    assert run(audit.verify(store)).fault == ""
    assert "row 3 is not the one that was noted" in run(audit.verify(store, head)).fault


def test_many_processes_make_one_chain(database_url: str, run: Any) -> None:
    async def go() -> tuple[audit.Verdict, list[str]]:
        stores = await asyncio.gather(*(open_store(database_url) for _ in range(3)))
        recorders = [Recorder(store) for store in stores]
        everybody = [replace(ANN, account=f"{who}-{n}") for who in range(3) for n in range(40)]
        await asyncio.gather(*(recorders[n % 3].note(access) for n, access in enumerate(everybody)))
        found, rows = await audit.verify(stores[0]), await audit.entries(stores[0], limit=1000)
        await asyncio.gather(*(store.close() for store in stores))
        return found, sorted(row.account for row in rows) == sorted(access.account for access in everybody)  # type: ignore[return-value]

    found, all_there = run(go())
    assert (found.rows, found.fault, all_there) == (120, "", True)


def test_polls_are_told_once_a_minute_and_everything_else_each_time(
    store: Store, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def go() -> int:
        recorder = Recorder(store)
        for trace in ("1" * 32, "2" * 32):
            await recorder.note(replace(ANN, trace_id=trace), repeats=True)
            await recorder.note(replace(OTHER, action="DELETE /v1/files/{file_id}", trace_id=trace))
        await recorder.note(replace(ANN, code="404"), repeats=True)
        monkeypatch.setattr(audit, "_SAME_SECONDS", 0.0)
        await recorder.note(ANN, repeats=True)
        return len(await audit.entries(store))

    assert run(go()) == 1 + 2 + 1 + 1


def test_what_cannot_be_written_is_said(store: Store, run: Any) -> None:
    sql(store, run, "ALTER TABLE audit RENAME TO elsewhere")

    async def go() -> list[Any]:
        recorder = Recorder(store)
        refused = await asyncio.gather(*(recorder.note(ANN) for _ in range(3)), return_exceptions=True)
        async with store.write() as session:
            await session.execute(text("ALTER TABLE elsewhere RENAME TO audit"))
        await recorder.note(ANN)
        return [*refused, len(await audit.entries(store))]

    *refused, rows = run(go())
    assert all(isinstance(error, Exception) for error in refused)
    assert rows == 1
