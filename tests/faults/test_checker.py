"""The checker finds what was planted, and nothing where there is nothing."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from benchmarks.faults.checker import check, counts, results


def life(who: str, name: str, execution_id: str, digest: str) -> list[dict[str, Any]]:
    """What a client writes down of an execution that nothing happens to."""
    of_it: dict[str, Any] = {"who": who, "execution_id": execution_id}
    key = {"key": f"1-{name}", "work": name}
    return [
        {"event": "sent", "who": who, **key},
        {"event": "acknowledged", **of_it, **key},
        {"event": "seen", **of_it, "status": "completed"},
        {"event": "acknowledged", **of_it, **key},
        {"event": "found", **of_it, "status": "completed", "error": None, "same": True},
        {"event": "result", **of_it, "work": name, "files": {"mask": digest}, "declared": {"mask": digest}},
        {"event": "events", **of_it, "told": [[1, "pending"], [2, "running"], [3, "running"], [4, "completed"]]},
    ]


def log() -> list[dict[str, Any]]:
    """Two accounts, three executions, one file."""
    return [
        {"event": "stored", "who": "alice", "file_id": "f1", "sha256": "aa"},
        *life("alice", "organs", "a1", "11"),
        *life("alice", "picture", "a2", "22"),
        *life("bob", "organs", "b1", "33"),
        {"event": "fetched", "who": "alice", "file_id": "f1", "sha256": "aa"},
        {"event": "refused", "who": "bob", "path": "/", "status": 503, "problem": ""},
        {"event": "listed", "who": "alice", "ids": ["a2", "a1"]},
        {"event": "listed", "who": "bob", "ids": ["b1"]},
        {"event": "tried", "who": "bob", "what": "execution", "status": 404},
    ]


def of(lines: list[dict[str, Any]], event: str, execution_id: str | None = None) -> dict[str, Any]:
    """Return the last such line."""
    return [line for line in lines if line["event"] == event and execution_id in {None, line.get("execution_id")}][-1]


def test_a_quiet_log_has_no_fault() -> None:
    assert check(log(), results(log())) == []
    assert results(log()) == {
        ("alice", "organs"): {"mask": "11"},
        ("alice", "picture"): {"mask": "22"},
        ("bob", "organs"): {"mask": "33"},
    }
    assert counts(log()) == {"sent": 3, "acknowledged": 6, "refused": 1, "unanswered": 0}


def lose(lines: list[dict[str, Any]]) -> None:
    lines.remove(of(lines, "found", "a2"))


def lose_from_list(lines: list[dict[str, Any]]) -> None:
    of(lines, "listed")["ids"].remove("b1")


def lose_file(lines: list[dict[str, Any]]) -> None:
    of(lines, "fetched")["sha256"] = "bb"


def lose_file_wholly(lines: list[dict[str, Any]]) -> None:
    lines.remove(of(lines, "fetched"))


def accept_twice(lines: list[dict[str, Any]]) -> None:
    lines += life("bob", "organs", "b2", "33")
    of(lines, "listed")["ids"] += ["b2"]


def fail(lines: list[dict[str, Any]]) -> None:
    for event in ("seen", "found"):
        of(lines, event, "a1")["status"] = "failed"
    of(lines, "events", "a1")["told"][-1][1] = "failed"


def end_twice(lines: list[dict[str, Any]]) -> None:
    of(lines, "events", "a1")["told"].append([5, "failed"])


def end_never(lines: list[dict[str, Any]]) -> None:
    of(lines, "events", "a1")["told"].pop()


def go_on(lines: list[dict[str, Any]]) -> None:
    of(lines, "events", "a1")["told"].append([5, "running"])


def skip(lines: list[dict[str, Any]]) -> None:
    del of(lines, "events", "a1")["told"][1]


def change_the_end(lines: list[dict[str, Any]]) -> None:
    of(lines, "seen", "b1")["status"] = "cancelled"


def change_it_later(lines: list[dict[str, Any]]) -> None:
    of(lines, "found", "b1")["same"] = False


def differ(lines: list[dict[str, Any]]) -> None:
    line = of(lines, "result", "a2")
    line["files"]["mask"] = line["declared"]["mask"] = "23"


def leave_a_file_out(lines: list[dict[str, Any]]) -> None:
    line = of(lines, "result", "a2")
    line["files"], line["declared"] = {}, {}


def lie(lines: list[dict[str, Any]]) -> None:
    of(lines, "result", "a2")["declared"]["mask"] = "23"


def list_anothers(lines: list[dict[str, Any]]) -> None:
    of(lines, "listed")["ids"].append("a1")


def let_in(lines: list[dict[str, Any]]) -> None:
    of(lines, "tried")["status"] = 200


def hand_out_anothers(lines: list[dict[str, Any]]) -> None:
    for line in lines:
        if line.get("execution_id") == "b1":
            line["execution_id"] = "a1"
    of(lines, "listed")["ids"] = ["a1"]


@pytest.mark.parametrize(
    ("plant", "said"),
    [
        (lose, "lost: a2 of alice was acknowledged and is not found"),
        (lose_from_list, "lost: b1 of bob was acknowledged and is not listed"),
        (lose_file, "lost: file f1 of alice"),
        (lose_file_wholly, "lost: file f1 of alice"),
        (accept_twice, "bob's 1-organs was accepted as 2 executions: b1, b2"),
        (fail, "a1 of alice is failed"),
        (end_twice, "a1 has 2 ends in its history: completed, failed"),
        (end_never, "a1 has 0 ends in its history: none"),
        (go_on, "a1 has 1 ends in its history"),
        (skip, "a1 has a history with gaps: [1, 3, 4]"),
        (change_the_end, "b1 was cancelled, and then completed"),
        (change_it_later, "b1 is not what it was when it had ended"),
        (differ, "a2 (alice's picture) differs from the quiet run in mask"),
        (leave_a_file_out, "a2 (alice's picture) differs from the quiet run in mask"),
        (lie, "a2: its files are not what it says of them"),
        (list_anothers, "bob sees alice's a1 in a list"),
        (let_in, "bob asked for another's execution and was answered 200"),
        (hand_out_anothers, "bob was given alice's a1"),
    ],
)
def test_what_was_planted_is_found(plant: Any, said: str) -> None:
    lines = copy.deepcopy(log())
    plant(lines)
    faults = check(lines, results(log()))
    assert any(said in fault for fault in faults), faults
