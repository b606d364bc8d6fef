"""A real PostgreSQL server for tests, in a folder of its own."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from scangraph.cluster import free_port


def _programs() -> Path:
    """Where initdb is, newest version first."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), reverse=True)
    if found:
        return found[0].parent
    path = shutil.which("initdb")
    if path is None:
        pytest.skip("PostgreSQL is not installed (Debian: apt-get install postgresql)")
    return Path(path).resolve().parent


@dataclass(frozen=True)
class Postgres:
    """A running server.

    Attributes
    ----------
    url : str
        Without a database's name.
    folder : str
        Its data.
    control : tuple of str
        `pg_ctl`, as whoever the server runs as.
    options : str
        What it was started with.
    """

    url: str
    folder: str
    control: tuple[str, ...]
    options: str

    def restart(self) -> None:
        """End as in a power cut, and come back."""
        log = f"{Path(self.folder).parent}/log"
        words = ["-D", self.folder, "-w", "-l", log, "-o", self.options, "-m", "immediate", "restart"]
        subprocess.run([*self.control, *words], capture_output=True, check=True)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Have all of it stand still: connections stay, and nobody answers."""
        pid = int((Path(self.folder) / "postmaster.pid").read_text().split()[0])
        server = psutil.Process(pid)
        some = [server, *server.children(recursive=True)]
        for process in some:
            process.suspend()
        try:
            yield
        finally:
            for process in reversed(some):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.resume()


@contextlib.contextmanager
def postgres_server() -> Iterator[str]:
    """Give a URL without the database's name; the server ends with the block."""
    with postgres() as server:
        yield server.url


@contextlib.contextmanager
def postgres() -> Iterator[Postgres]:
    """Run a server until the block ends."""
    programs, port = _programs(), free_port("127.0.0.1")
    # It refuses to run as root, and its socket's path must be short.
    as_owner = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    user = "postgres" if as_owner else os.environ.get("USER", "postgres")
    with tempfile.TemporaryDirectory(prefix="pg-", ignore_cleanup_errors=True) as folder:
        Path(folder).chmod(0o777)
        data = f"{folder}/data"

        def call(*command: str) -> None:
            done = subprocess.run([*as_owner, *command], capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.skip(f"PostgreSQL does not start here: {done.stderr.strip()[-200:]}")

        call(str(programs / "initdb"), "-D", data, "-A", "trust", "-U", user, "-N")
        options = f"-p {port} -k {folder} -h 127.0.0.1 -c fsync=off -c max_connections=200"
        control = str(programs / "pg_ctl")
        call(control, "-D", data, "-w", "-l", f"{folder}/log", "-o", options, "start")
        try:
            yield Postgres(f"postgresql+asyncpg://{user}@127.0.0.1:{port}", data, (*as_owner, control), options)
        finally:
            subprocess.run([*as_owner, control, "-D", data, "-m", "immediate", "stop"], capture_output=True, check=False)


async def fresh_database(server: str) -> str:
    """Make an empty database on a server and return its URL."""
    name = f"test_{uuid.uuid4().hex}"
    engine = create_async_engine(f"{server}/postgres", isolation_level="AUTOCOMMIT")
    async with engine.connect() as connection:
        await connection.execute(text(f"CREATE DATABASE {name}"))
    await engine.dispose()
    return f"{server}/{name}"
