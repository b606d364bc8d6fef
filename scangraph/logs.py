"""Log lines: where they go, what each says, and what none may say.

Serve gives each of its processes a file that rotates; our lines go there, too, and one formatter writes all of them: JSON or
text, with deployment, replica, execution and trace. Names of files may be names of patients. So an error is logged by its
code, and whatever a library or a traceback says passes `scrubbed`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
from collections.abc import Iterator
from contextvars import ContextVar
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler
from typing import Any

from scangraph import tracing
from scangraph.contracts.errors import ScanGraphError

_OWN, _SERVE = "scangraph", "ray.serve"
_execution: ContextVar[str | None] = ContextVar("scangraph_execution", default=None)
#: What a line of ours may say besides its sentence: `log.info("…", extra={"code": …})`.
_FIELDS = ("execution_id", "code", "component", "pipeline", "state", "attempt", "seconds")

_UUID = r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
#: (what a text may hold, what is written instead)
_TELLING = (
    # Our errors in a traceback: their sentences are made of fields.
    (re.compile(r"(scangraph\.contracts\.errors\.\w+|deployments\.[\w.]+): .*"), r"\1"),
    # The system's: `[Errno 2] No such file or directory: '…'`.
    (re.compile(r"(\[Errno \d+\] [^:'\"\n]*): .*"), r"\1"),
    # An upload in the storage.
    (re.compile(rf"((?:files|uploads)/{_UUID}/)[^\s'\"<>|:,)]+"), r"\1…"),
    # Whatever else looks like an image's name.
    (re.compile(r"[^\s'\"/\\]+\.(nii\.gz|nii|dcm|jpe?g|tiff?|webp|bmp|nrrd|mha)\b", re.IGNORECASE), r"….\1"),
)


@contextlib.contextmanager
def about(execution_id: str, traceparent: str | None = None) -> Iterator[None]:
    """Put an execution's id, and a trace's where one is given, into the lines of the block."""
    token = _execution.set(execution_id.partition("/")[0])
    try:
        with tracing.following(traceparent):
            yield
    finally:
        _execution.reset(token)


def enter(execution_id: str) -> None:
    """Put an execution's id into whatever its own task says from here on."""
    _execution.set(execution_id)


def scrubbed(text: str) -> str:
    """Return a text without what may name a file."""
    for pattern, instead in _TELLING:
        text = pattern.sub(instead, text)
    return text


def _argument(value: Any) -> Any:
    """Return what is written for an argument: an error's code instead of its sentence."""
    return tracing.code_of(value) if isinstance(value, BaseException) else value


class _Formatter(logging.Formatter):
    """What the two formats share.

    Parameters
    ----------
    deployment, replica : str
        Whose lines they are.
    """

    def __init__(self, deployment: str, replica: str) -> None:
        super().__init__()
        self._deployment, self._replica = deployment, replica

    def fields(self, record: logging.LogRecord) -> dict[str, Any]:
        """Return all that a line says, without what is not known."""
        arguments = record.args
        if isinstance(arguments, tuple):
            record.args = tuple(map(_argument, arguments))
        error = record.exc_info[1] if record.exc_info else None
        found = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "message": scrubbed(record.getMessage()),
            "logger": record.name,
            "deployment": self._deployment,
            "replica": self._replica,
            "execution_id": _execution.get(),
            "trace_id": tracing.trace_id(),
        }
        record.args = arguments
        if error is not None:
            found["code"] = tracing.code_of(error)
            found["traceback"] = scrubbed(self.formatException(record.exc_info))  # type: ignore[arg-type]
        found |= {name: value for name in _FIELDS if (value := getattr(record, name, None)) is not None}
        return {name: value for name, value in found.items() if value is not None}


class JsonLines(_Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """Write one line."""
        return json.dumps(self.fields(record), ensure_ascii=False, default=str)


class TextLines(_Formatter):
    """One line to be read, and a traceback below it."""

    def format(self, record: logging.LogRecord) -> str:
        """Write one line."""
        said = self.fields(record)
        head = " ".join(str(said.pop(name)) for name in ("time", "level", "deployment", "message"))
        traceback = said.pop("traceback", None)
        for name in ("logger", "replica"):
            del said[name]
        rest = " ".join(f"{name}={value}" for name, value in said.items())
        return "\n".join(part for part in (f"{head} [{rest}]" if rest else head, traceback) if part)


def is_failure(record: logging.LogRecord) -> bool:
    """Whether a line is about more than a refusal: of that who asked is told, and whoever runs the service need not be."""
    error = record.exc_info[1] if record.exc_info else None
    return not (isinstance(error, ScanGraphError) and error.status < 500)


def configure(deployment: str | None = None) -> None:
    """Let a process of Serve write our lines, by our formatter, where it writes its own; anywhere else nothing happens.

    Level, format and folder are those that Serve was given for the process (`graph.py`, `scangraph/cluster.py`). A replica
    calls it once, at its start.

    Parameters
    ----------
    deployment : str, optional
        Whose process it is; a replica knows by itself.
    """
    serve, root = logging.getLogger(_SERVE), logging.getLogger()
    targets: list[logging.Handler] = [getattr(handler, "target", handler) for handler in serve.handlers]
    if not any(isinstance(target, RotatingFileHandler) for target in targets):
        return  # no process of Serve: a test, a command, a notebook
    replica = str(os.getpid())
    if deployment is None:
        from ray.serve import get_replica_context

        context = get_replica_context()
        deployment, replica = context.deployment, context.replica_tag
    as_json = any("json" in type(target.formatter).__name__.lower() for target in targets)
    for target in targets:
        target.setFormatter((JsonLines if as_json else TextLines)(deployment, replica))
    # What libraries have to say, too: without a handler Python writes it to stderr as it is, names and all.
    root.handlers = list(serve.handlers)
    serve.addFilter(is_failure)  # Serve writes every error that leaves a replica, with its traceback
    logging.getLogger(_OWN).setLevel(serve.level)
