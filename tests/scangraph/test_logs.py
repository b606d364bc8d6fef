"""What log lines say, and what they do not."""

from __future__ import annotations

import json
import logging
import sys

import pytest

from scangraph import logs, tracing
from scangraph.contracts.errors import FileMissing, StageFailed

ID = "0b1f0d5e-5b3f-4d3c-9a52-0f3c7f6b8a11"
NAME = "Mueller_Hans_1954.nii.gz"


def record(message: str, *arguments: object, error: BaseException | None = None, **extra: object) -> logging.LogRecord:
    info = (type(error), error, error.__traceback__) if error is not None else None
    made = logging.LogRecord("scangraph", logging.WARNING, __file__, 1, message, arguments, info)
    made.__dict__.update(extra)
    return made


def line(*arguments: object, **named: object) -> dict[str, object]:
    found: dict[str, object] = json.loads(logs.JsonLines("executor", "r1").format(record(*arguments, **named)))  # type: ignore[arg-type]
    return found


def test_a_line_says_whose_it_is() -> None:
    with logs.about(f"{ID}/organs", "00-" + "ab" * 16 + "-" + "cd" * 8 + "-01"):
        found = line("done", code="x", unknown="not said")
    assert found.pop("time")
    assert found == {
        "level": "WARNING", "message": "done", "logger": "scangraph", "deployment": "executor", "replica": "r1",
        "execution_id": ID, "trace_id": "ab" * 16, "code": "x",
    }  # fmt: skip
    assert "execution_id" not in line("later")


def raised(error: BaseException) -> BaseException:
    try:
        raise error
    except type(error) as caught:
        return caught


@pytest.mark.parametrize(
    "error",
    [
        FileMissing(path=f"files/{ID}/{NAME}"),
        FileMissing(path="patients/Mueller/ct"),
        FileNotFoundError(2, "No such file or directory", f"/data/files/{ID}/{NAME}"),
        FileNotFoundError(2, "No such file or directory", "/data/Mueller_Hans_1954"),
        ValueError(f"cannot read {NAME}"),
        ValueError(f"/data/files/{ID}/Mueller_Hans_1954.obj: what is it?"),
    ],
)
def test_an_error_is_told_without_names(error: BaseException) -> None:
    for found in (line("it failed", error=raised(error)), line("it failed: %s", raised(error)), line("it failed: %r", error)):
        assert "Mueller" not in json.dumps(found)
    found = line("it failed", error=raised(error))
    assert found["code"] == tracing.code_of(error)
    assert type(error).__name__ in str(found["traceback"])
    assert "in raised" in str(found["traceback"])


def test_a_chain_of_errors_is_told_without_names() -> None:
    try:
        try:
            raise FileMissing(path=NAME)
        except FileMissing as inner:
            raise StageFailed(component="a/b", error="x", execution_id=ID) from inner
    except StageFailed:
        found = line("%s failed", "it", error=sys.exc_info()[1])
    assert "Mueller" not in json.dumps(found)
    assert found["code"] == "stage-failed"


def test_a_refusal_is_no_failure() -> None:
    refused, failed = raised(FileMissing(path="ct")), raised(StageFailed(stage="nnunet"))
    told = [logs.is_failure(record("Request failed.", error=error)) for error in (refused, failed, raised(ValueError()), None)]
    assert told == [False, True, True, True]


def test_a_text_for_people() -> None:
    with logs.about(ID):
        text = logs.TextLines("gateway", "r1").format(record("hello %d", 5, error=raised(ValueError("why")), seconds=2))
    head, *rest = text.splitlines()
    assert " WARNING gateway hello 5 [" in head
    assert f"execution_id={ID}" in head
    assert rest[-1] == "ValueError: why"


def test_what_is_harmless_stays() -> None:
    for text in (f"steps/{'ab' * 32}/mask was not kept", f"results/{ID}/mask", "0 of 3 replicas", "version 2.60.0"):
        assert logs.scrubbed(text) == text


def test_no_process_of_serve_is_left_alone() -> None:
    before = list(logging.getLogger().handlers), logging.getLogger("scangraph").level
    logs.configure()
    assert (list(logging.getLogger().handlers), logging.getLogger("scangraph").level) == before
