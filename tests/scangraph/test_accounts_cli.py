"""`scangraph accounts`, `scangraph token` and `scangraph audit`, on real records."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from scangraph.cli import app
from scangraph.contracts.errors import NameTaken, NoSuch, Unauthenticated, UsageError
from scangraph.settings import AuthSettings, load_settings
from scangraph.store import accounts, audit, open_store
from scangraph.store.accounts import InvalidName, WeakPassword
from scangraph.store.audit import Access
from scangraph.store.tables import Account
from scangraph.tokens import Tokens

PASSWORD = "a good long password"
Command = Callable[..., Result]


@pytest.fixture
def scangraph(tmp_path: Path) -> Command:
    def call(*words: str, typed: str = "", error: type[Exception] | None = None) -> Result:
        result = CliRunner().invoke(app, [*words, "--data", str(tmp_path)], input=typed)
        if error is None:
            assert result.exit_code == 0, (result.output, result.exception)
        else:
            assert isinstance(result.exception, error), (result.output, result.exception)
        return result

    return call


def login(data: Path, name: str, password: str) -> Account:
    async def go() -> Account:
        store = await open_store(f"sqlite:///{data}/scangraph.db")
        try:
            return await accounts.check_password(store, name, password)
        finally:
            await store.close()

    return asyncio.run(go())


def test_a_persons_account_from_first_to_last(scangraph: Command, tmp_path: Path) -> None:
    scangraph("accounts", "add", "ann", "--role", "editor", typed=f"{PASSWORD}\n{PASSWORD}\n")
    assert login(tmp_path, "ann", PASSWORD).role == "editor"
    scangraph("accounts", "role", "ann", "viewer")
    assert login(tmp_path, "ann", PASSWORD).role == "viewer"
    scangraph("accounts", "password", "ann", "--password-stdin", typed=f"{PASSWORD[::-1]}\n")
    with pytest.raises(Unauthenticated):
        login(tmp_path, "ann", PASSWORD)
    scangraph("accounts", "disable", "ann")
    assert "disabled" in scangraph("accounts", "list").stdout
    with pytest.raises(Unauthenticated):
        login(tmp_path, "ann", PASSWORD[::-1])
    scangraph("token", "--name", "ann", error=UsageError)
    scangraph("accounts", "enable", "ann")
    assert login(tmp_path, "ann", PASSWORD[::-1]).role == "viewer"
    scangraph("accounts", "remove", "ann")
    assert "ann" not in scangraph("accounts", "list").stdout
    for words in (("role", "ann", "viewer"), ("disable", "ann"), ("enable", "ann"), ("remove", "ann"), ("password", "ann")):
        scangraph("accounts", *words, error=NoSuch)


def test_a_backends_secret_is_shown_once_and_lets_it_in(scangraph: Command, tmp_path: Path) -> None:
    made = scangraph("accounts", "add", "backend", "--service")
    (secret,) = made.stdout.split()
    assert len(secret) == 43
    assert login(tmp_path, "backend", secret).kind == "service"
    assert secret not in scangraph("accounts", "list").output
    (another,) = scangraph("accounts", "password", "backend").stdout.split()
    assert login(tmp_path, "backend", another).role == "operator"
    with pytest.raises(Unauthenticated):
        login(tmp_path, "backend", secret)


def test_what_is_not_taken(scangraph: Command, tmp_path: Path) -> None:
    scangraph("accounts", "add", "ann", "--password-stdin", typed=f"{PASSWORD}\n")
    scangraph("accounts", "add", "ann", "--password-stdin", typed=f"{PASSWORD}\n", error=NameTaken)
    scangraph("accounts", "add", "bob", "--password-stdin", typed="short\n", error=WeakPassword)
    scangraph("accounts", "add", "bob", "--password-stdin", typed="x" * 257 + "\n", error=WeakPassword)
    for name in ("", " ann", "ann ", "ann\n", "a b", "-ann", "änn", "x" * 65, "a\0"):
        words = ("add", "--password-stdin", "--", name)
        result = CliRunner().invoke(app, ["accounts", *words], env={"SCANGRAPH_DATA": str(tmp_path)}, input=f"{PASSWORD}\n")
        assert isinstance(result.exception, InvalidName), name
    scangraph("accounts", "add", "bob", "--role", "god", "--password-stdin", typed=f"{PASSWORD}\n", error=UsageError)
    scangraph("accounts", "role", "ann", "god", error=UsageError)


def test_the_owner_of_the_folder_gets_a_token_without_a_password(scangraph: Command, tmp_path: Path) -> None:
    token = scangraph("token", "--minutes", "30").stdout.strip()
    claims = Tokens(AuthSettings(), tmp_path / "keys").verify(token)
    assert (claims.name, claims.role) == ("admin", "admin")
    name, password = (tmp_path / accounts.ADMIN_FILE).read_text().split()  # it was the first to come
    assert login(tmp_path, name, password).id == claims.account_id
    scangraph("token", "--name", "nobody", error=NoSuch)
    for minutes in ("0", "1441"):
        scangraph("token", "--minutes", minutes, error=SystemExit)


def test_the_audit_log_is_told_and_checked(scangraph: Command, tmp_path: Path) -> None:
    scangraph("accounts", "add", "ann", "--password-stdin", typed=f"{PASSWORD}\n")
    person = login(tmp_path, "ann", PASSWORD)

    async def fill() -> None:
        store = await open_store(load_settings(data=tmp_path).database)
        accesses = [Access(person.id, "ann", "http", "GET /v1/files/{file_id}", "200", "file", n * 36) for n in "ab"]
        await audit.append(store, accesses)
        await store.close()

    asyncio.run(fill())
    assert "file " + "a" * 36 in scangraph("audit").stdout
    (line,) = scangraph("audit", "--json", "--about", "b" * 36, "--account", "ann", "--since", "2020-01-01").stdout.splitlines()
    assert json.loads(line)["seq"] == 2
    head = scangraph("audit", "verify").stdout.split()[-1]
    assert scangraph("audit", "verify", "--head", head).stdout.startswith("2 rows")
    scangraph("audit", "verify", "--head", "3:" + head[2:], error=SystemExit)
    scangraph("audit", "verify", "--head", "3", error=UsageError)
    scangraph("audit", "--since", "yesterday", error=UsageError)
