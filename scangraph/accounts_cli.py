"""`scangraph accounts` and `scangraph token`: for whoever owns the data folder, on the same machine, service up or not."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, TypeVar, get_args

import typer
from rich.console import Console
from rich.table import Table

from scangraph.contracts.api import Role
from scangraph.contracts.errors import UsageError
from scangraph.settings import Settings, load_settings
from scangraph.store import Store, open_store
from scangraph.store import accounts as records
from scangraph.store.accounts import ADMIN_FILE, ensure_admin, find_account, new_secret
from scangraph.tokens import Tokens

__all__ = ["ADMIN_FILE", "app", "local_token", "token"]

T = TypeVar("T")

app = typer.Typer(help="People and backends that may use the service.", no_args_is_help=True)
out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)

Data = Annotated[Path | None, typer.Option(help="data folder, instead of $SCANGRAPH_DATA")]
Name = Annotated[str, typer.Argument(help="the account's name")]
Stdin = Annotated[bool, typer.Option("--password-stdin", help="read the password from standard input")]
_ROLES = ", ".join(get_args(Role))


def with_store(data: Path | None, work: Callable[[Store, Settings], Awaitable[T]]) -> T:
    """Open the records, work on them, close them."""
    settings = load_settings(**({"data": data} if data else {}))

    async def go() -> T:
        settings.data.mkdir(parents=True, exist_ok=True)
        store = await open_store(settings.database)
        try:
            return await work(store, settings)
        finally:
            await store.close()

    return asyncio.run(go())


def _role(text: str) -> Role:
    for role in get_args(Role):
        if role == text:
            found: Role = role
            return found
    raise UsageError(detail=f"there is no role {text!r}; there are {_ROLES}")


def _password(from_stdin: bool) -> str:
    if from_stdin:
        return sys.stdin.readline().rstrip("\n")
    return str(typer.prompt("Password", hide_input=True, confirmation_prompt=True))


@app.command()
def add(
    name: Name,
    role: Annotated[str, typer.Option(help=f"one of {_ROLES}; each may do what those of less may")] = "operator",
    service: Annotated[bool, typer.Option(help="a backend's account: its secret is made, and shown once")] = False,
    password_stdin: Stdin = False,
    data: Data = None,
) -> None:
    """Make an account."""
    wanted = _role(role)
    secret = new_secret() if service else _password(password_stdin)
    kind = "service" if service else "person"
    with_store(data, lambda store, _: records.create_account(store, name, wanted, secret, kind))
    err.print(f"{name} is {wanted}.")
    if service:
        err.print("Its secret, shown only now (POST /v1/auth/login takes it as the password):")
        out.print(secret)


@app.command("list")
def listed(data: Data = None) -> None:
    """List the accounts."""
    table = Table("name", "role", "kind", "made", "", box=None, pad_edge=False)
    for row in with_store(data, lambda store, _: records.list_accounts(store)):
        table.add_row(row.name, row.role, row.kind, f"{row.created_at:%Y-%m-%d}", "disabled" if row.disabled_at else "")
    out.print(table)


@app.command()
def role(name: Name, new_role: Annotated[str, typer.Argument(metavar="ROLE", help=_ROLES)], data: Data = None) -> None:
    """Give another role."""
    with_store(data, lambda store, _: records.set_role(store, name, _role(new_role)))
    err.print(f"{name} is {new_role}; it must log in again.")


@app.command()
def password(name: Name, password_stdin: Stdin = False, data: Data = None) -> None:
    """Give another password; a service account gets another secret."""

    async def change(store: Store, _: Settings) -> str | None:
        account = await find_account(store, name)
        secret = new_secret() if account.kind == "service" else None
        await records.set_password(store, name, secret or _password(password_stdin))
        return secret

    secret = with_store(data, change)
    if secret:
        out.print(secret)
    err.print(f"{name} must log in again.")


@app.command()
def disable(name: Name, data: Data = None) -> None:
    """Lock an account out, at once."""
    with_store(data, lambda store, _: records.set_enabled(store, name, enabled=False))
    err.print(f"{name} is locked out.")


@app.command()
def enable(name: Name, data: Data = None) -> None:
    """Let an account in again."""
    with_store(data, lambda store, _: records.set_enabled(store, name, enabled=True))
    err.print(f"{name} may log in.")


@app.command()
def remove(name: Name, data: Data = None) -> None:
    """Take an account away; its executions and files stay, for an admin to see."""
    with_store(data, lambda store, _: records.remove_account(store, name))
    err.print(f"{name} is gone.")


def local_token(settings: Settings, name: str = "admin", minutes: int = 15) -> str:
    """Make a bearer with the service's own key, which only the owner of the data folder can read."""

    async def make(store: Store, settings: Settings) -> str:
        await ensure_admin(store, settings.data)
        account = await find_account(store, name)
        if account.disabled_at is not None:
            raise UsageError(detail=f"{name} is disabled: the service would refuse its token")
        signer = Tokens(settings.auth, settings.data / "keys")
        role = _role(account.role)
        return signer.sign(account.id, account.name, role, account.token_epoch, minutes * 60)[0]

    return with_store(settings.data, make)


def token(
    name: Annotated[str, typer.Option(help="whose")] = "admin",
    minutes: Annotated[int, typer.Option(min=1, max=1440, help="how long it is good")] = 15,
    data: Data = None,
) -> None:
    """Print a bearer token, without a password: for whoever owns the data folder."""
    print(local_token(load_settings(**({"data": data} if data else {})), name, minutes))
