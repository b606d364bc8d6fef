"""Accounts, passwords, refresh tokens."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from argon2 import PasswordHasher

from scangraph.contracts.errors import NameTaken, NoSuch, Unauthenticated
from scangraph.store import Store, accounts, now
from scangraph.store.accounts import WeakPassword

PASSWORD = "a good long password"


def test_a_password_lets_its_own_account_in(store: Store, run: Any) -> None:
    async def go() -> None:
        made = await accounts.create_account(store, "alice", "editor", PASSWORD)
        assert PASSWORD not in made.password_hash
        assert made.password_hash.startswith("$argon2id$")
        assert (await accounts.check_password(store, "alice", PASSWORD)).id == made.id
        for name, word in (("alice", PASSWORD + "!"), ("nobody", PASSWORD), (made.id, PASSWORD), ("alice", "")):
            with pytest.raises(Unauthenticated, match="Name or password is wrong"):
                await accounts.check_password(store, name, word)
        await accounts.set_enabled(store, "alice", enabled=False)
        with pytest.raises(Unauthenticated, match="Name or password is wrong"):
            await accounts.check_password(store, "alice", PASSWORD)
        await accounts.set_enabled(store, "alice", enabled=True)
        await accounts.set_password(store, "alice", PASSWORD[::-1])
        assert (await accounts.check_password(store, "alice", PASSWORD[::-1])).id == made.id

    run(go())


def test_names_are_unique_and_passwords_long(store: Store, run: Any) -> None:
    async def go() -> None:
        outcomes = await asyncio.gather(
            *(accounts.create_account(store, "alice", "viewer", PASSWORD) for _ in range(4)), return_exceptions=True
        )
        assert sum(isinstance(outcome, NameTaken) for outcome in outcomes) == 3
        with pytest.raises(WeakPassword):
            await accounts.create_account(store, "bob", "viewer", "short")
        with pytest.raises(NoSuch):
            await accounts.set_role(store, "nobody", "admin")
        await accounts.remove_account(store, "alice")
        assert await accounts.list_accounts(store) == []

    run(go())


def test_every_change_ends_the_tokens_given_before(store: Store, run: Any) -> None:
    async def go() -> None:
        made = await accounts.create_account(store, "alice", "editor", PASSWORD)
        for change in (
            accounts.set_role(store, "alice", "viewer"),
            accounts.set_password(store, "alice", PASSWORD),
            accounts.set_enabled(store, "alice", enabled=True),
        ):
            account = await accounts.find_account(store, "alice")
            chain = await accounts.begin_chain(store, account, 60)
            await change
            assert (await accounts.standing(store)).epochs[made.id] == account.token_epoch + 1
            with pytest.raises(Unauthenticated):
                await accounts.next_link(store, chain.token, 60)
        await accounts.set_enabled(store, "alice", enabled=False)
        assert made.id not in (await accounts.standing(store)).epochs

    run(go())


def test_refresh_tokens_are_good_once_and_a_second_use_ends_the_chain(store: Store, run: Any) -> None:
    async def go() -> None:
        account = await accounts.create_account(store, "alice", "editor", PASSWORD)
        first = await accounts.begin_chain(store, account, 60)
        other = await accounts.begin_chain(store, account, 60)
        second = await accounts.next_link(store, first.token, 60)
        third = await accounts.next_link(store, second.token, 60)
        assert len({first.token, second.token, third.token}) == 3
        with pytest.raises(Unauthenticated):
            await accounts.next_link(store, first.token, 60)  # the thief, or the robbed
        with pytest.raises(Unauthenticated):
            await accounts.next_link(store, third.token, 60)
        await accounts.next_link(store, other.token, 60)  # another login is not touched
        late = await accounts.begin_chain(store, account, -1)
        for token in (late.token, "made up"):
            with pytest.raises(Unauthenticated):
                await accounts.next_link(store, token, 60)

    run(go())


def test_of_many_uses_at_once_at_most_one_wins(store: Store, run: Any) -> None:
    async def go() -> None:
        account = await accounts.create_account(store, "alice", "editor", PASSWORD)
        chain = await accounts.begin_chain(store, account, 60)
        outcomes = await asyncio.gather(*(accounts.next_link(store, chain.token, 60) for _ in range(8)), return_exceptions=True)
        assert sum(isinstance(outcome, accounts.Chain) for outcome in outcomes) == 1

    run(go())


@pytest.mark.parametrize("change", ["logout", "password", "role", "theft"])
def test_no_link_outlives_what_ended_its_chain(store: Store, run: Any, change: str) -> None:
    """Whoever refreshes at that moment gets nothing that is good afterwards."""

    async def go() -> None:
        account = await accounts.create_account(store, "alice", "editor", PASSWORD)
        hashed = await accounts._hash(PASSWORD)
        for n in range(25):
            account = await accounts.find_account(store, "alice")
            first = await accounts.begin_chain(store, account, 60)
            second = await accounts.next_link(store, first.token, 60)

            async def end(n: int = n, first: accounts.Chain = first, account: Any = account) -> None:
                match change:
                    case "logout":
                        await accounts.log_out(store, account.id, f"jti-{n}", now() + timedelta(seconds=60))
                    case "password":
                        await accounts._change(store, "alice", {"password_hash": hashed})
                    case "role":
                        await accounts.set_role(store, "alice", "editor")
                    case _:
                        with pytest.raises(Unauthenticated):
                            await accounts.next_link(store, first.token, 60)

            last, _ = await asyncio.gather(accounts.next_link(store, second.token, 60), end(), return_exceptions=True)
            for chain in (second, last):
                if isinstance(chain, accounts.Chain):
                    with pytest.raises(Unauthenticated):
                        await accounts.next_link(store, chain.token, 60)

    run(go())


def test_a_login_that_was_overtaken_gets_nothing(store: Store, run: Any) -> None:
    async def go() -> None:
        await accounts.create_account(store, "alice", "editor", PASSWORD)
        for change in (
            lambda: accounts.set_role(store, "alice", "viewer"),
            lambda: accounts.set_enabled(store, "alice", enabled=False),
            lambda: accounts.remove_account(store, "alice"),
        ):
            account = await accounts.find_account(store, "alice")  # its password was found right
            await change()
            with pytest.raises(Unauthenticated):
                await accounts.begin_chain(store, account, 60)

    run(go())


def test_a_hash_of_weaker_parameters_is_made_anew_at_login(store: Store, run: Any) -> None:
    async def go() -> None:
        await accounts.create_account(store, "alice", "editor", PASSWORD)
        weak = PasswordHasher(time_cost=1, memory_cost=8192, parallelism=1).hash(PASSWORD)
        await accounts._change(store, "alice", {"password_hash": weak})
        for _ in range(2):
            await accounts.check_password(store, "alice", PASSWORD)
            found = (await accounts.find_account(store, "alice")).password_hash
            assert found.startswith("$argon2id$v=19$m=65536,t=3,p=4$")

    run(go())


def test_logging_out_ends_the_token_and_the_chains(store: Store, run: Any) -> None:
    async def go() -> None:
        account = await accounts.create_account(store, "alice", "editor", PASSWORD)
        chain = await accounts.begin_chain(store, account, 60)
        await accounts.log_out(store, account.id, "jti-1", now() + timedelta(seconds=60))
        await accounts.log_out(store, account.id, "jti-1", now() + timedelta(seconds=60))
        await accounts.log_out(store, account.id, "jti-0", now() - timedelta(seconds=1))
        assert (await accounts.standing(store)).revoked == {"jti-1"}
        with pytest.raises(Unauthenticated):
            await accounts.next_link(store, chain.token, 60)

    run(go())


def test_the_first_start_makes_one_admin_and_says_where_its_password_is(store: Store, run: Any, tmp_path: Path) -> None:
    async def go() -> None:
        made = await asyncio.gather(*(accounts.ensure_admin(store, tmp_path / "data") for _ in range(4)))
        (file,) = {path for path in made if path is not None}
        assert file.stat().st_mode & 0o777 == 0o600
        name, password = file.read_text().split()
        assert (await accounts.check_password(store, name, password)).role == "admin"
        assert await accounts.ensure_admin(store, tmp_path / "data") is None
        assert [path.name for path in (tmp_path / "data").iterdir()] == ["admin-password"]

    run(go())
