"""The page's modules without a browser: node's own test runner on `ui/test/`."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from tests.ui.browser import ROOT


def test_the_modules_of_the_page() -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("there is no Node")
    version = subprocess.run([node, "--version"], capture_output=True, text=True, check=True).stdout
    if int(version.strip().lstrip("v").split(".")[0]) < 20:
        pytest.skip(f"Node {version.strip()} is older than 20")
    command = [node, "--test", "--test-reporter=tap", "ui/test/"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "# pass 0" not in done.stdout
