"""Logins of a person, kept in a file that only this person may read."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from scangraph.client import locks
from scangraph.client.access import Login
from scangraph.contracts.errors import UsageError

_LOCK_SECONDS = 30.0


class LoginFile:
    """The file.

    Parameters
    ----------
    path : Path
        Made, with its folder, when the first login is kept.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def servers(self) -> list[str]:
        """Addresses of the servers with a login, the last one first."""
        return list(self._read())

    def keep(self, url: str) -> KeptLogin:
        """Return the place of one server's login."""
        return KeptLogin(self, url.rstrip("/"))

    def _read(self) -> dict[str, dict[str, Any]]:
        try:
            logins = json.loads(self.path.read_text())["logins"]
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise UsageError(detail=f"{self.path} cannot be read ({error}); delete it and log in again") from None
        return logins if isinstance(logins, dict) else {}

    def _write(self, logins: dict[str, dict[str, Any]]) -> None:
        """Replace the file. It is private from its first moment on, and whole at any moment."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".{self.path.name}.{secrets.token_hex(4)}")
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            json.dump({"logins": logins}, file, indent=2)
        temporary.replace(self.path)


@dataclass(frozen=True)
class KeptLogin:
    """One server's login in the file."""

    file: LoginFile
    url: str

    def load(self) -> Login | None:
        """Return it as it is now."""
        try:
            return Login(**self.file._read()[self.url])
        except (KeyError, TypeError):
            return None

    def save(self, login: Login | None) -> None:
        """Replace it, or forget it."""
        others = {url: kept for url, kept in self.file._read().items() if url != self.url}
        self.file._write({self.url: asdict(login), **others} if login else others)

    @contextlib.asynccontextmanager
    async def locked(self) -> AsyncIterator[None]:
        """Keep the other commands away; one that holds it for longer than any renewal takes is not waited for."""
        self.file.path.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(self.file.path.with_suffix(".lock"), os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOCK_SECONDS):
                    while not locks.take(lock):  # noqa: ASYNC110 - another process holds it
                        await asyncio.sleep(0.05)
            yield
        finally:
            os.close(lock)
