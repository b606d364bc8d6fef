"""SECURITY.md names files and tests; they are there."""

from __future__ import annotations

import re

import pytest

from tests.conftest import ROOT

TEXT = (ROOT / "SECURITY.md").read_text()


@pytest.mark.parametrize("named", sorted(set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", TEXT))), ids="::".join)
def test_a_test_that_is_named_is_there(named: tuple[str, str]) -> None:
    file, test = named
    assert re.search(rf"^def {test}\(", (ROOT / file).read_text(), re.MULTILINE)


def test_files_that_are_named_are_there() -> None:
    rows = [line.split("|")[3] for line in TEXT.splitlines() if line.count("|") == 5 and "`" in line and "where" not in line]
    named = {name for row in rows for name in re.findall(r"`([\w/.-]+)`", row) if "/" in name}
    assert len(named) > 10
    assert [name for name in named if not (ROOT / name).exists()] == []
