"""What `pip install .` brings: a client, and nothing of a server."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT

NEEDED = {"numpy", "pydantic", "httpx", "websockets", "typer", "rich"}
FOLDERS = ("scangraph", "deployments", "runtime_envs")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy, for setuptools builds in place."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("pyproject.toml", "README.md", "LICENSE", "graph.py"):
        shutil.copy(ROOT / name, copy / name)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


def run(*line: str | Path, cwd: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("SCANGRAPH_", "PYTHONPATH"))}
    done = subprocess.run(
        [str(part) for part in line],
        cwd=cwd,
        env={**plain, "COLUMNS": "200", "SCANGRAPH_CONFIG": str(cwd)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def installed(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment into which the checkout was installed, as anybody would."""
    folder = tmp_path_factory.mktemp("client")
    run(sys.executable, "-m", "venv", folder / "env", cwd=folder)
    done = run(folder / "env/bin/pip", "install", "-q", checkout, cwd=folder, check=False)
    if done.returncode:
        if re.search(r"No matching distribution|Could not find a version|[Cc]onnection", done.stderr):
            pytest.skip("pip can reach no index here: " + done.stderr.strip().splitlines()[-1])
        raise AssertionError(done.stderr)
    return folder


def test_a_client_is_small_and_works(installed: Path) -> None:
    python = installed / "env/bin/python"
    code = "import importlib.metadata as m; print(*sorted(d.name.lower() for d in m.distributions()))"
    there = set(run(python, "-c", code, cwd=installed).stdout.split())
    assert there >= NEEDED
    assert not there & {"ray", "fastapi", "sqlalchemy", "pydantic-settings", "pyyaml", "obstore", "torch"}
    code = "import scangraph, sys; c = scangraph.Client('http://127.0.0.1:9', patience=0); print(c.url); c.close()"
    assert run(python, "-c", code, cwd=installed).stdout == "http://127.0.0.1:9\n"
    code = "import asyncio, scangraph; asyncio.run(scangraph.AsyncClient('http://127.0.0.1:9').close())"
    run(python, "-c", code, cwd=installed)


def test_its_command_has_what_a_client_has(installed: Path) -> None:
    command = installed / "env/bin/scangraph"
    shown = run(command, "--help", cwd=installed).stdout
    for name in ("login", "logout", "run", "status", "watch", "cancel", "retry", "pipelines", "files", "scangraph[server]"):
        assert name in shown
    assert "serve " not in shown
    for arguments, said in (
        (("run", "inference/vessel", "x"), "scangraph[server]"),
        (("status",), "no server is known"),
        (("login", "--server", "http://127.0.0.1:9", "--user", "u", "--password-stdin"), "cannot be reached"),
    ):
        done = run(command, *arguments, cwd=installed, check=False)
        assert done.returncode == 1
        assert said in done.stderr or "a name and a password" in done.stderr
        assert "Traceback" not in done.stderr


def test_every_module_is_in_the_package(checkout: Path, tmp_path: Path) -> None:
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path, checkout, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())
    wanted = {
        str(path.relative_to(ROOT))
        for folder in FOLDERS
        for pattern in ("*.py", "*.mako", "*.in", "*.txt", "py.typed")
        for path in (ROOT / folder).rglob(pattern)
        if "__pycache__" not in path.parts
    }
    assert wanted | {"graph.py"} <= packed
    assert not {name for name in packed if "__pycache__" in name}
