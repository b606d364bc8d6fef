"""What the commands share: where they print, bars, and how parameters are written."""

from __future__ import annotations

import json
import threading
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from scangraph.contracts.errors import UsageError

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


class Bars:
    """Live progress, one line a step; plain lines where nobody watches. Any thread may show something."""

    def __init__(self) -> None:
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description:10}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[text]}", markup=False),
            TimeElapsedColumn(),
        )
        self._bars = Progress(*columns, console=err)
        self._tasks: dict[str, TaskID] = {}
        self._said: dict[str, str] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Bars:
        if err.is_terminal:
            self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if err.is_terminal:
            self._bars.stop()

    def show(self, name: str, text: str, done: float = 0, total: float | None = None, detail: str = "") -> None:
        """Show how far something is; `detail` changes often, and is for whoever watches."""
        with self._lock:
            if not err.is_terminal:
                if text and self._said.get(name) != text:
                    self._said[name] = text
                    err.print(f"{name}: {text}", markup=False)
                return
            if name not in self._tasks:
                self._tasks[name] = self._bars.add_task(name, total=None, text="")
            self._bars.update(self._tasks[name], total=total, completed=done, text=f"{text}{detail}")

    def remove(self, name: str) -> None:
        """Take a line away."""
        with self._lock:
            if name in self._tasks:
                self._bars.remove_task(self._tasks.pop(name))
            self._said.pop(name, None)


def parse_parameters(pairs: list[str]) -> dict[str, Any]:
    """Read `NAME=VALUE` pairs; a value is JSON, or else text."""
    values: dict[str, Any] = {}
    for pair in pairs:
        name, separator, text = pair.partition("=")
        if not separator:
            raise UsageError(detail=f"--set takes NAME=VALUE, got {pair!r}")
        try:
            values[name] = json.loads(text)
        except ValueError:
            values[name] = text
    return values


def show_table(table: Table) -> None:
    """Print a table. The first column, the ids, is always whole; what reads from a pipe gets every cell whole."""
    ids = table.columns[0]
    ids.no_wrap, ids.min_width = True, max((len(str(cell)) for cell in ids.cells), default=0)
    # A wide console of its own: a width that is given to `print` is cut to the console's.
    (out if out.is_terminal else Console(highlight=False, width=10_000)).print(table)


def complain(title: str, detail: str) -> None:
    """Print an error in one plain sentence."""
    err.print(f"[red]{escape(title)}.[/red] {escape(detail)}")
