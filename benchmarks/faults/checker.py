"""Reads what clients wrote down, and finds what should not have happened.

A line is one thing that a client saw, as `benchmarks.faults.clients.Client` writes it. Nothing here asks the service.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

TERMINAL = frozenset({"completed", "failed", "cancelled"})
#: Answers to whoever asks for what is another's.
SHUT = frozenset({403, 404})

Line = Mapping[str, Any]
#: By account and piece of work: file name -> SHA-256.
Results = dict[tuple[str, str], dict[str, str]]


def results(lines: Iterable[Line]) -> Results:
    """Return what came of each piece of work."""
    return {(line["who"], line["work"]): dict(line["files"]) for line in lines if line["event"] == "result"}


def check(lines: Iterable[Line], quiet: Results | None = None) -> list[str]:
    """Return a sentence for each fault.

    Parameters
    ----------
    lines : iterable of mapping
        What all clients saw, in order.
    quiet : dict, optional
        What comes of the same work where nothing disturbs it (`results` of that run's lines).

    Notes
    -----
    What was acknowledged exists, and is `completed`; it ended once, and stayed what it was; its files are what a quiet run
    makes; and nobody saw what is another's.
    """
    by_event: dict[str, list[Line]] = defaultdict(list)
    for line in lines:
        by_event[line["event"]].append(line)
    return [
        *_lost(by_event),
        *_ended_otherwise(by_event),
        *_changed(by_event),
        *_differing(by_event, quiet or {}),
        *_foreign(by_event),
    ]


def _lost(by_event: Mapping[str, list[Line]]) -> Iterable[str]:
    """What was acknowledged and is not there, or is there twice."""
    ids: dict[tuple[str, str], set[str]] = defaultdict(set)
    for line in by_event["acknowledged"]:
        ids[line["who"], line["key"]].add(line["execution_id"])
    for (who, key), some in ids.items():
        if len(some) > 1:
            yield f"{who}'s {key} was accepted as {len(some)} executions: {', '.join(sorted(some))}"
    found = {line["execution_id"] for line in by_event["found"]}
    listed = {execution_id for line in by_event["listed"] for execution_id in line["ids"]}
    for line in _once(by_event["acknowledged"], "execution_id"):
        for where, there in (("found", found), ("listed", listed)):
            if line["execution_id"] not in there:
                yield f"lost: {line['execution_id']} of {line['who']} was acknowledged and is not {where}"
    fetched = {line["file_id"]: line["sha256"] for line in by_event["fetched"]}
    for line in by_event["stored"]:
        if fetched.get(line["file_id"]) != line["sha256"]:
            yield f"lost: file {line['file_id']} of {line['who']} was acknowledged and is not what was sent"


def _ended_otherwise(by_event: Mapping[str, list[Line]]) -> Iterable[str]:
    for line in by_event["found"]:
        if line["status"] != "completed":
            yield f"{line['execution_id']} of {line['who']} is {line['status']}: {line.get('error')}"


def _changed(by_event: Mapping[str, list[Line]]) -> Iterable[str]:
    """Executions that ended more than once, went on after their end, or have gaps in what was told of them."""
    ended: dict[str, str] = {}
    for line in (*by_event["seen"], *by_event["found"]):
        before = ended.get(line["execution_id"])
        if before is not None and line["status"] != before:
            yield f"{line['execution_id']} was {before}, and then {line['status']}"
        if line["status"] in TERMINAL:
            ended[line["execution_id"]] = line["status"]
    for line in by_event["found"]:
        if not line["same"]:
            yield f"{line['execution_id']} is not what it was when it had ended"
    for line in by_event["events"]:
        told = [status for _, status in line["told"]]
        ends = [status for status in told if status in TERMINAL]
        if len(ends) != 1 or told[-1] != ends[0]:
            yield f"{line['execution_id']} has {len(ends)} ends in its history: {', '.join(ends) or 'none'}"
        if [number for number, _ in line["told"]] != list(range(1, len(told) + 1)):
            yield f"{line['execution_id']} has a history with gaps: {[number for number, _ in line['told']]}"


def _differing(by_event: Mapping[str, list[Line]], quiet: Results) -> Iterable[str]:
    for line in by_event["result"]:
        if line["files"] != line["declared"]:
            yield f"{line['execution_id']}: its files are not what it says of them"
        expected = quiet.get((line["who"], line["work"]))
        if expected is not None and line["files"] != expected:
            names = sorted(name for name in {*expected, *line["files"]} if expected.get(name) != line["files"].get(name))
            yield f"{line['execution_id']} ({line['who']}'s {line['work']}) differs from the quiet run in {', '.join(names)}"


def _foreign(by_event: Mapping[str, list[Line]]) -> Iterable[str]:
    owner: dict[str, str] = {}
    for line in by_event["acknowledged"]:
        other = owner.setdefault(line["execution_id"], line["who"])
        if other != line["who"]:
            yield f"{line['who']} was given {other}'s {line['execution_id']}"
    for line in by_event["listed"]:
        for execution_id in line["ids"]:
            if owner.get(execution_id, line["who"]) != line["who"]:
                yield f"{line['who']} sees {owner[execution_id]}'s {execution_id} in a list"
    for line in by_event["tried"]:
        if line["status"] not in SHUT:
            yield f"{line['who']} asked for another's {line['what']} and was answered {line['status']}"


def _once(lines: Iterable[Line], field: str) -> Iterable[Line]:
    return {line[field]: line for line in lines}.values()


def counts(lines: Iterable[Line]) -> dict[str, int]:
    """Return how often clients sent, were accepted, were refused, and heard nothing."""
    found = Counter(str(line["event"]) for line in lines)
    return {name: found[name] for name in ("sent", "acknowledged", "refused", "unanswered")}
