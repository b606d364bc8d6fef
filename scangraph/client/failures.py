"""What went wrong, as the very classes that the server raised."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from scangraph.contracts import errors
from scangraph.contracts.api import Problem
from scangraph.contracts.errors import ScanGraphError, TransientError

_FIRST_DELAY, _LONGEST_DELAY = 0.25, 8.0


class ServerError(ScanGraphError):
    """An error that has no class here: of a newer server, of Serve, or of a proxy in between.

    Attributes
    ----------
    code : str
        Last part of the problem's `type`.
    status : int
        HTTP status.
    trace_id : str
        Under which the server's log knows it; empty where the answer was no problem+json.
    """

    def __init__(self, *, status: int, code: str, title: str, detail: str, **fields: Any) -> None:
        super().__init__(status=status, code=code, title=title, detail=detail, **fields)
        self.code, self.status, self.title = code, status, title  # type: ignore[misc]

    @property
    def trace_id(self) -> str:
        """The server's name for it."""
        return str(self.fields.get("trace_id", ""))


class ServerUnreachable(TransientError):
    """Nobody answers, or the connection ended before the answer."""

    code, title = "server-unreachable", "The server cannot be reached"
    template = "{url}: {reason}."


def _classes(base: type[ScanGraphError]) -> Iterator[type[ScanGraphError]]:
    for cls in base.__subclasses__():
        if cls.__module__ == errors.__name__ and "code" in vars(cls):
            yield cls
        yield from _classes(cls)


_BY_CODE = {cls.code: cls for cls in _classes(ScanGraphError)}


def from_problem(code: str, status: int, title: str, detail: str, **fields: Any) -> ScanGraphError:
    """Return the error of a code, with the server's sentence; its fields stayed on the server."""
    cls = _BY_CODE.get(code)
    if cls is None:
        return ServerError(status=status, code=code, title=title, detail=detail, **fields)
    error = cls.__new__(cls)
    error.template = "{detail}"  # type: ignore[misc]  # of this one: the sentence is made already
    ScanGraphError.__init__(error, detail=detail, **fields)
    error.status = status  # type: ignore[misc]
    # Another process gets the same sentence; the class alone would make one without its fields.
    error.__reduce__ = lambda: (_again, (code, status, title, error.fields))  # type: ignore[method-assign]
    return error


def _again(code: str, status: int, title: str, fields: Mapping[str, Any]) -> ScanGraphError:
    return from_problem(code, status, title, **fields)


def from_answer(status: int, content_type: str, body: bytes, where: str) -> ScanGraphError:
    """Turn an answer that is no success into an error."""
    if content_type.partition(";")[0].strip() == "application/problem+json":
        try:
            problem = Problem.model_validate_json(body, extra="ignore")
        except ValidationError:
            pass
        else:
            code = problem.type.rpartition(":")[2]
            fields = {"trace_id": problem.trace_id, **({"errors": problem.errors} if problem.errors else {})}
            return from_problem(code, problem.status, problem.title, problem.detail, **fields)
    detail = f"{where} answered {status}: {body[:200].decode(errors='replace').strip() or 'nothing else'}"
    return ServerError(status=status, code=f"http-{status}", title="The server gave an error", detail=detail)


def from_execution(execution_id: str, status: str, error: Mapping[str, Any] | None) -> ScanGraphError:
    """Return what an execution that did not complete ended with."""
    if error is None:
        return errors.AlreadyEnded(execution_id=execution_id, state=status, hint="start a new one to run it again")
    return from_problem(
        str(error.get("code", "stage-failed")),
        int(error.get("status", 500)),
        str(error.get("title", "The execution failed")),
        str(error.get("detail", "it failed")),
        execution_id=execution_id,
        **({"errors": error["errors"]} if error.get("errors") else {}),
    )


class Patience:
    """For how long failures are borne: sleeps between attempts, and raises once it has run out.

    Parameters
    ----------
    seconds : float
        From the first failure on, until something succeeds.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._until: float | None = None
        self._failures = 0

    def restore(self) -> None:
        """Something succeeded."""
        self._until, self._failures = None, 0

    async def bear(self, failure: ScanGraphError, at_least: float = 0) -> None:
        """Wait before the next attempt; raises the failure if there is no time for one."""
        moment = time.monotonic()
        if self._until is None:
            self._until = moment + self._seconds
        # Jitter, or everybody who was cut off at once comes back at once.
        delay = min(_FIRST_DELAY * 2**self._failures, _LONGEST_DELAY) * random.uniform(0.5, 1)  # noqa: S311
        delay = max(delay, at_least)
        self._failures += 1
        if moment + delay > self._until:
            raise failure
        await asyncio.sleep(delay)
