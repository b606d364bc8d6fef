"""`scangraph audit`: who accessed whose data; for whoever owns the data folder, on the same machine, service up or not."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from scangraph.accounts_cli import Data, with_store
from scangraph.contracts.errors import UsageError
from scangraph.store import audit

app = typer.Typer(help="Who accessed whose data.", invoke_without_command=True)
out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


@app.callback()
def show(
    context: typer.Context,
    account: Annotated[str | None, typer.Option(help="only this account's, by name or id")] = None,
    about: Annotated[str | None, typer.Option(help="only what was done to this file, execution or upload")] = None,
    since: Annotated[str | None, typer.Option(help="only from then on: 2026-11-21, or 2026-11-21T18:00+00:00")] = None,
    limit: Annotated[int, typer.Option(min=1, help="at most so many, the newest")] = 100,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object a line")] = False,
    data: Data = None,
) -> None:
    """List accesses, the newest last: number, UTC, account, where from, what, to which object, how it ended."""
    if context.invoked_subcommand:
        return
    moment = _moment(since) if since else None
    rows = with_store(data, lambda store, _: audit.entries(store, account=account, object_id=about, since=moment, limit=limit))
    if as_json:
        for row in rows:
            print(json.dumps(audit.view(row)))
        return
    for row in rows:
        did = f"{row.door} {row.action}  {row.kind} {row.object_id}".rstrip()
        out.print(f"{row.seq}  {row.at:%Y-%m-%d %H:%M:%S}  {escape(row.account)}  {row.address or '-'}  {did}  {row.code}")


@app.command()
def verify(
    head: Annotated[str | None, typer.Option(help="seq:digest, as it was told before: the log must go on from there")] = None,
    data: Data = None,
) -> None:
    """Check that nothing in the log was changed, and tell its head: note that elsewhere, and give it next time."""
    if head is not None and not (head.partition(":")[0].isdigit() and len(head.partition(":")[2]) == 64):
        raise UsageError(detail="--head is a number, a colon and 64 hexadecimal digits, as `verify` tells it")
    found = with_store(data, lambda store, _: audit.verify(store, head))
    if found.fault:
        err.print(f"[red]Something was changed:[/red] {found.fault}. Right are the first {found.rows} rows.")
        raise typer.Exit(1)
    out.print(f"{found.rows} rows, none of them changed. head {found.head}")


def _moment(text: str) -> datetime:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise UsageError(detail=f"{text!r} is no time; 2026-11-21 or 2026-11-21T18:00+00:00 is") from None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
