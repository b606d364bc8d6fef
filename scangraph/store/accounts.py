"""Accounts, passwords, and which tokens are still good."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import re
import secrets
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError
from sqlalchemy import delete, func, or_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.sql import ColumnElement

from scangraph.contracts.api import Role
from scangraph.contracts.errors import NameTaken, NoSuch, Unauthenticated, UsageError
from scangraph.store.database import Store, now, whole
from scangraph.store.tables import Account, RefreshToken, RevokedToken

#: argon2id with the library's defaults (RFC 9106's second recommendation: 64 MiB, 3 passes).
_hasher = PasswordHasher()
#: Each check takes 64 MiB and a core for some 50 ms: a flood of logins must not take all.
_AT_ONCE = 2
#: Checked where there is no such account, so that its absence cannot be told by the time that it takes.
_NOBODY = "$argon2id$v=19$m=65536,t=3,p=4$rhcBkDrT8S/dTjji3taY7A$JPKKqlCBy6SqQQoWmUVt4/9n1FjKBfzOlLfmI2RF4JI"  # of nobody
_SHORTEST = 12
#: What a login's body may hold.
_LONGEST = 256
_NAMES = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@+-]{0,63}")
ADMIN_FILE = "admin-password"


class WeakPassword(UsageError):
    """A password that is guessed."""

    code, title = "weak-password", "The password does not fit"
    template = "A password has {shortest} to {longest} characters."


class InvalidName(UsageError):
    """A name that nobody could log in with, or that looks like another."""

    code, title = "invalid-name", "The name does not fit"
    template = "{name!r}: a name has 1 to 64 of the characters A-Z a-z 0-9 . _ @ + -, and begins with a letter or a digit."


@dataclass(frozen=True)
class Chain:
    """A refresh token, and whose it is."""

    token: str
    family: str
    account: Account


# --- accounts --------------------------------------------------------------------------------------------------------------


async def create_account(store: Store, name: str, role: Role, password: str, kind: str = "person") -> Account:
    """Make an account. Race: two of one name; the name is unique in the table.

    Raises
    ------
    NameTaken, InvalidName, WeakPassword
    """
    if not _NAMES.fullmatch(name):
        raise InvalidName(name=name)
    _check_strength(password)
    hashed = await _hash(password)
    return await _insert_account(store, name, role, hashed, kind)


@whole
async def _insert_account(store: Store, name: str, role: Role, hashed: str, kind: str) -> Account:
    row = Account(id=str(uuid.uuid4()), name=name, kind=kind, role=role, password_hash=hashed, created_at=now(), token_epoch=0)
    try:
        async with store.write() as session:
            session.add(row)
    except IntegrityError as error:
        raise NameTaken(kind="account", name=name) from error
    return row


def _check_strength(password: str) -> None:
    if not _SHORTEST <= len(password) <= _LONGEST:
        raise WeakPassword(shortest=_SHORTEST, longest=_LONGEST)


def new_secret() -> str:
    """Return a service account's secret: 256 random bits.

    It is kept like a password. A plain hash would be as safe for so many bits; one way of checking is simpler, and takes the
    same time for a person, a backend and nobody.
    """
    return secrets.token_urlsafe(32)


@whole
async def find_account(store: Store, name: str) -> Account:
    """Find an account by its name or id; raises `NoSuch`."""
    async with store.read() as session:
        query = select(Account).where((Account.name == name) | (Account.id == name))
        row = (await session.execute(query)).scalar_one_or_none()
    if row is None:
        raise NoSuch(kind="account", id=name)
    return row


@whole
async def list_accounts(store: Store) -> Sequence[Account]:
    """List the accounts by name."""
    async with store.read() as session:
        return (await session.execute(select(Account).order_by(Account.name))).scalars().all()


async def set_password(store: Store, name: str, password: str) -> None:
    """Give another password; tokens given before are no longer good."""
    _check_strength(password)
    await _change(store, name, {"password_hash": await _hash(password)})


async def set_role(store: Store, name: str, role: Role) -> None:
    """Give another role; tokens given before are no longer good."""
    await _change(store, name, {"role": role})


async def set_enabled(store: Store, name: str, enabled: bool) -> None:
    """Let an account log in, or not; tokens given before are no longer good."""
    await _change(store, name, {"disabled_at": None if enabled else now()})


@whole
async def _change(store: Store, name: str, values: dict[str, object]) -> None:
    async with store.write() as session:
        query = update(Account).where((Account.name == name) | (Account.id == name))
        changed = query.values(**values, token_epoch=Account.token_epoch + 1).returning(Account.id)
        account_id = (await session.execute(changed)).scalar_one_or_none()
        if account_id is None:
            raise NoSuch(kind="account", id=name)
        await session.execute(delete(RefreshToken).where(RefreshToken.account_id == account_id))


@whole
async def remove_account(store: Store, name: str) -> None:
    """Take an account away; its executions and files stay, for an admin to see."""
    async with store.write() as session:
        query = delete(Account).where((Account.name == name) | (Account.id == name)).returning(Account.id)
        if (await session.execute(query)).scalar_one_or_none() is None:
            raise NoSuch(kind="account", id=name)


async def ensure_admin(store: Store, data: Path) -> Path | None:
    """Make the first admin, where there is no account at all, and write its password into the data folder.

    Returns
    -------
    Path or None
        The file (mode 0600) with name and password, if one was made.

    Notes
    -----
    Race: several replicas start at once. The file is written first, under another name; the account's name is unique, so one
    replica makes it, and only that one puts its file in place.
    """
    if await list_accounts(store):
        return None
    password = secrets.token_urlsafe(18)
    target, temporary = data / ADMIN_FILE, data / f".{ADMIN_FILE}-{secrets.token_hex(4)}"
    await asyncio.to_thread(_write_private, temporary, f"admin\n{password}\n")
    try:
        await create_account(store, "admin", "admin", password)
    except NameTaken:
        temporary.unlink()
        return None
    temporary.replace(target)
    return target


def _write_private(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


# --- logging in ------------------------------------------------------------------------------------------------------------

_WRONG = "Name or password is wrong, or the account is disabled"
_checks: dict[asyncio.AbstractEventLoop, asyncio.Semaphore] = {}


def _check_slot() -> asyncio.Semaphore:
    loop = asyncio.get_running_loop()
    for closed in [other for other in _checks if other.is_closed()]:
        del _checks[closed]
    return _checks.setdefault(loop, asyncio.Semaphore(_AT_ONCE))


async def _hash(password: str) -> str:
    async with _check_slot():
        return await asyncio.to_thread(_hasher.hash, password)


async def check_password(store: Store, name: str, password: str) -> Account:
    """Return the account, if the password is its own and it may log in.

    Raises
    ------
    Unauthenticated
        In the same words and the same time, whatever was wrong.
    """
    account: Account | None = None
    with contextlib.suppress(NoSuch):
        account = await find_account(store, name)
        account = account if account.name == name else None

    def check() -> bool:
        try:
            return _hasher.verify(account.password_hash if account else _NOBODY, password)
        except (VerificationError, InvalidHashError):
            return False

    async with _check_slot():
        right = await asyncio.to_thread(check)
    if account is None or not right or account.disabled_at is not None:
        raise Unauthenticated(reason=_WRONG)
    if _hasher.check_needs_rehash(account.password_hash):
        await _rehash(store, account.id, await _hash(password))
    return account


@whole
async def _rehash(store: Store, account_id: str, hashed: str) -> None:
    async with store.write() as session:
        await session.execute(update(Account).where(Account.id == account_id).values(password_hash=hashed))


def _digest(token: str) -> str:
    """Refresh tokens are 256 random bits: a plain hash keeps them as safe as a slow one would."""
    return hashlib.sha256(token.encode()).hexdigest()


@whole
async def begin_chain(store: Store, account: Account, seconds: int) -> Chain:
    """Give the first refresh token of a login.

    Race: the account is changed after its old password was checked; its epoch says so.

    Raises
    ------
    Unauthenticated
    """
    token, family, moment = secrets.token_urlsafe(32), str(uuid.uuid4()), now()
    async with store.write() as session:
        held = await _hold(session, Account.id == account.id)
        if held is None or held.token_epoch != account.token_epoch:
            raise Unauthenticated(reason=_WRONG)
        await session.execute(delete(RefreshToken).where(RefreshToken.expires_at < moment))
        session.add(_link(token, family, account.id, moment, seconds))
    return Chain(token, family, account)


async def _hold(session: AsyncSession, which: ColumnElement[bool]) -> Account | None:
    """Return an account that may log in, and let nobody else change it or its chains until this transaction ends.

    Every transaction on chains begins here (SQLite has one writer anyhow). Without it PostgreSQL lets one of them insert a
    link that another one's `DELETE` or `UPDATE`, begun a moment earlier, does not see: it would outlive a logout or a new
    password.
    """
    query = select(Account).where(which, Account.disabled_at.is_(None)).with_for_update(key_share=True)
    return (await session.execute(query)).scalar_one_or_none()


def _link(token: str, family: str, account_id: str, moment: datetime, seconds: int) -> RefreshToken:
    return RefreshToken(
        token_hash=_digest(token),
        family=family,
        account_id=account_id,
        created_at=moment,
        expires_at=moment + timedelta(seconds=seconds),
    )


@whole
async def next_link(store: Store, token: str, seconds: int, leeway: int = 0) -> Chain:
    """Give the next refresh token for this one, which is good once.

    Used again, it was stolen, or its thief was first: the whole chain ends (RFC 9700, 4.14.2). Race: two tabs refresh with one
    token at once; one gets the next link, and the chain ends for both. Clients refresh in one place; those that have none, as
    a browser's tabs, get some seconds of leeway from its first use on, in which each gets a link of its own.

    Raises
    ------
    Unauthenticated
    """
    refused = Unauthenticated(reason="The refresh token is not good any more")
    moment, digest = now(), _digest(token)
    holder = select(RefreshToken.account_id).where(RefreshToken.token_hash == digest)
    async with store.read() as session:  # who only guesses does not make others wait for the one writer of SQLite
        if (await session.execute(holder)).scalar_one_or_none() is None:
            raise refused
    async with store.write() as session:
        account = await _hold(session, Account.id == holder.scalar_subquery())
        if account is None:
            raise refused
        fresh_enough: ColumnElement[bool] = RefreshToken.used_at.is_(None)
        if leeway:  # not a leeway of nothing: who asked earlier and came later would find a use after its own moment
            fresh_enough = or_(fresh_enough, RefreshToken.used_at > moment - timedelta(seconds=leeway))
        mine = update(RefreshToken).where(RefreshToken.token_hash == digest, fresh_enough)
        first_use = func.coalesce(RefreshToken.used_at, moment)
        used = mine.where(RefreshToken.revoked_at.is_(None), RefreshToken.expires_at > moment).values(used_at=first_use)
        query = used.returning(RefreshToken.family).execution_options(synchronize_session=False)
        family = (await session.execute(query)).scalar_one_or_none()
        if family is not None:
            fresh = secrets.token_urlsafe(32)
            session.add(_link(fresh, family, account.id, moment, seconds))
            return Chain(fresh, family, account)
        stolen = select(RefreshToken.family).where(RefreshToken.token_hash == digest).scalar_subquery()
        ended = update(RefreshToken).where(RefreshToken.family == stolen).values(revoked_at=moment)
        await session.execute(ended.execution_options(synchronize_session=False))
    raise refused


@whole
async def log_out(store: Store, account_id: str, jti: str, expires_at: datetime) -> None:
    """End an access token now, and every chain of the account."""
    async with store.write() as session:
        await _hold(session, Account.id == account_id)
        await session.execute(delete(RevokedToken).where(RevokedToken.expires_at < now()))
        known = await session.get(RevokedToken, jti)
        if known is None:
            session.add(RevokedToken(jti=jti, expires_at=expires_at))
        await session.execute(delete(RefreshToken).where(RefreshToken.account_id == account_id))


@whole
async def end_chain(store: Store, token: str, access: tuple[str, str, datetime] | None = None) -> None:
    """End the chain of a refresh token, and an access token (account's id, jti, its end); the account's others stay."""
    holder = select(RefreshToken.account_id).where(RefreshToken.token_hash == _digest(token)).scalar_subquery()
    async with store.write() as session:
        await _hold(session, Account.id == (access[0] if access else holder))
        if access is not None:
            await session.execute(delete(RevokedToken).where(RevokedToken.expires_at < now()))
            if await session.get(RevokedToken, access[1]) is None:
                session.add(RevokedToken(jti=access[1], expires_at=access[2]))
        family = select(RefreshToken.family).where(RefreshToken.token_hash == _digest(token)).scalar_subquery()
        ended = delete(RefreshToken).where(RefreshToken.family == family)
        await session.execute(ended.execution_options(synchronize_session=False))


@dataclass(frozen=True)
class Standing:
    """What decides whether a signed token is still good."""

    epochs: dict[str, int]  # of accounts that may act
    revoked: frozenset[str]


@whole
async def standing(store: Store) -> Standing:
    """Return what every token is checked against.

    Accounts are few, and the denylist holds a quarter of an hour: one look a moment serves all requests of that moment.
    """
    async with store.read() as session:
        accounts = await session.execute(select(Account.id, Account.token_epoch).where(Account.disabled_at.is_(None)))
        revoked = await session.execute(select(RevokedToken.jti).where(RevokedToken.expires_at > now()))
        return Standing(dict(accounts.all()), frozenset(revoked.scalars()))
