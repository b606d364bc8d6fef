"""Replicas that come and go, and where calls go; see `cold_start.py` and `two_nodes.py`."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator

import pytest

from scangraph.settings import load_settings
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, subprocess.Popen[str]]]:
    """Both at once: they wait more than they work."""
    for stage in ("base", "nnunet", "postprocess"):
        if not (load_settings().environments_dir / stage / "scangraph-lock").exists():
            pytest.skip(f"environment {stage!r} is not built: run `make setup`")
    wanted = {"two_nodes": [], "cold_start": [str(tmp_path_factory.mktemp("cold") / "data")]}
    with contextlib.ExitStack() as stack:
        yield {
            name: stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-m", f"tests.executor.{name}", *arguments],
                    cwd=ROOT,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
            for name, arguments in wanted.items()
        }


@pytest.mark.parametrize("name", ["two_nodes", "cold_start"])
def test_on_real_ray(programs: dict[str, subprocess.Popen[str]], name: str) -> None:
    """A call goes to the node that has its data; a stage starts for the first who wants it, and goes again."""
    try:
        _, said = programs[name].communicate(timeout=400)
    except subprocess.TimeoutExpired:
        programs[name].terminate()
        raise
    assert programs[name].returncode == 0, said[-3000:]
