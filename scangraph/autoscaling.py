"""How many replicas a stage wants: for the work that waits for it, not for the number of its requests.

The executors know what waits: which steps, how long such steps took on images of that size, how many tiles are done. They
report it as a deployment's own numbers, as Serve lets every deployment do. Serve's policies run in its controller, one object a
deployment, all in one process: the executors' policy (`Told`) notes there what they reported, the stages' (`Queued`) decide by
it. Delays and bounds around that are Serve's.

Serve sends policies by value, this module's globals included; hence `_board`, which imports the one that the controller has.
"""

from __future__ import annotations

import importlib
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

#: Names of what executors report, with the deployment's before them.
WORK, STEPS = "work_seconds", "steps"

#: What an application's executors told last: deployment -> (seconds of work, steps), by application. In Serve's controller.
BOARD: dict[str, dict[str, tuple[float, int]]] = {}


def wanted_replicas(seconds: float, steps: int, work_seconds: float, requests: float = 0) -> int:
    """Say how many replicas a stage wants.

    Parameters
    ----------
    seconds : float
        Work before it: what waits, and what is left of the steps it is at.
    steps : int
        In so many pieces, of which none can be divided.
    work_seconds : float
        Work that one replica may have before it.
    requests : float
        Calls that it has, also by those who call it without an executor; their work is unknown, so one replica stays for them.
    """
    return max(min(math.ceil(seconds / work_seconds), steps), int(steps > 0 or requests > 0))


def reported(work: Mapping[str, tuple[float, int]]) -> dict[str, float]:
    """Return what an executor reports to Serve, from (seconds, steps) by deployment."""
    told = {f"{name}.{WORK}": round(seconds, 3) for name, (seconds, _) in work.items()}
    return told | {f"{name}.{STEPS}": float(steps) for name, (_, steps) in work.items()}


def added_up(newest: Mapping[str, Iterable[float]]) -> dict[str, tuple[float, int]]:
    """Return (seconds, steps) by deployment, of what all executors reported last."""
    found: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for name, values in newest.items():
        deployment, _, what = name.rpartition(".")
        if what in (WORK, STEPS):
            found[deployment][what == STEPS] += sum(values)
    return {deployment: (seconds, round(steps)) for deployment, (seconds, steps) in found.items()}


class Told:
    """The executors' policy: their number stays; what they report is noted for the stages."""

    def __call__(self, ctx: Any) -> tuple[int, dict[str, Any]]:
        """Return the number of replicas, and nothing to remember."""
        series = ctx.raw_metrics or {}
        newest = {name: [points[-1].value for points in found.values() if points] for name, found in series.items()}
        if work := added_up(newest):
            _board()[ctx.app_name] = work
        return ctx.target_num_replicas, {}


class Queued:
    """A stage's policy: replicas for the work before it.

    Parameters
    ----------
    work_seconds : float
        Work that one replica may have before it.
    """

    def __init__(self, work_seconds: float) -> None:
        self._work_seconds = work_seconds

    def __call__(self, ctx: Any) -> tuple[int, dict[str, Any]]:
        """Return the number of replicas, and nothing to remember. While no executor has told anything, all stays as it is."""
        told = _board().get(ctx.app_name)
        if told is None:
            return ctx.target_num_replicas, {}
        seconds, steps = told.get(ctx.deployment_name, (0.0, 0))
        return wanted_replicas(seconds, steps, self._work_seconds, ctx.total_num_requests), {}


def _board() -> dict[str, dict[str, tuple[float, int]]]:
    found: dict[str, dict[str, tuple[float, int]]] = importlib.import_module("scangraph.autoscaling").BOARD
    return found
