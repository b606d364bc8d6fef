"""What is counted and measured: declared here, reported anywhere, read at the gateway's `GET /metrics`.

Every process of the service belongs to a Ray, and Ray has an agent on each node that adds up what the node's processes report,
also those that have died. So a number needs no address and no registry of its own: it is handed to Ray, and in a process
without Ray it is dropped. Labels are few and come from the service itself (components, states, codes), never from a client:
no ids, no file names, nothing of a patient.
"""

from __future__ import annotations

import functools
import sys
from dataclasses import dataclass
from typing import Any, ClassVar

#: Bounds of what takes seconds: from a request's milliseconds to a night.
_SECONDS = (0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600, 1800, 3600)
#: Ray's agent knows how many values fell between two bounds, and guesses their sum from the middles. Hence a counter beside it.
EXACT_SUM = "_exact_sum"


@dataclass(frozen=True)
class Metric:
    """A number with a name, in base units.

    Parameters
    ----------
    name : str
        As Prometheus shows it; a counter gets `_total` behind it.
    help : str
        What it is, in a few words.
    labels : tuple of str
        What it is told apart by.
    """

    name: str
    help: str
    labels: tuple[str, ...] = ()

    kind: ClassVar[str]


@dataclass(frozen=True)
class Counter(Metric):
    """What only grows."""

    kind: ClassVar[str] = "counter"

    def add(self, number: float = 1, **labels: str) -> None:
        """Count."""
        if number > 0 and (made := _made(self)) is not None:
            made.inc(number, tags=labels)


@dataclass(frozen=True)
class Gauge(Metric):
    """What is, now, in this process; the page shows the sum over a node's processes.

    Ray hands a value on once, even if nobody takes it (an agent that is busy), and its agent forgets it after two
    intervals, which are 20 s where nothing else is set (Ray 2.60, `open_telemetry_metric_recorder` in C++ and in Python).
    So whoever sets a gauge sets it again every few seconds.
    """

    kind: ClassVar[str] = "gauge"

    def set(self, number: float, **labels: str) -> None:
        """Replace."""
        if (made := _made(self)) is not None:
            made.set(number, tags=labels)


@dataclass(frozen=True)
class Histogram(Metric):
    """How often something was how large."""

    bounds: tuple[float, ...] = _SECONDS

    kind: ClassVar[str] = "histogram"

    def observe(self, number: float, **labels: str) -> None:
        """Add one value."""
        if (made := _made(self)) is not None:
            made.observe(number, tags=labels)
            _made_sum(self).inc(max(number, 1e-9), tags=labels)  # Ray refuses to count nothing


def _made(metric: Metric) -> Any:
    """Return Ray's side of a metric, None in a process that belongs to no Ray."""
    ray = sys.modules.get("ray")
    return _made_once(metric) if ray is not None and ray.is_initialized() else None


@functools.cache
def _made_once(metric: Metric) -> Any:
    from ray.util import metrics

    if isinstance(metric, Histogram):
        return metrics.Histogram(metric.name, metric.help, boundaries=list(metric.bounds), tag_keys=metric.labels)
    made = metrics.Counter if isinstance(metric, Counter) else metrics.Gauge
    return made(metric.name, metric.help, tag_keys=metric.labels)


@functools.cache
def _made_sum(metric: Histogram) -> Any:
    from ray.util import metrics

    return metrics.Counter(metric.name + EXACT_SUM, f"Sum of {metric.name}", tag_keys=metric.labels)


# --- executions: reported where the records change ---------------------------------------------------------------------------

#: `pipeline` is the name of a built-in one; all others are "custom", for everybody may make as many as they like.
ACCEPTED = Counter("scangraph_executions_accepted", "Executions accepted", ("priority",))
ENDED = Counter("scangraph_executions_ended", "Executions ended", ("pipeline", "state"))
WAITED = Histogram("scangraph_execution_waiting_seconds", "From accepting to beginning", ("priority",))
RAN = Histogram("scangraph_execution_seconds", "From beginning to completing", ("pipeline",))
TAKEN_OVER = Counter("scangraph_executions_taken_over", "Executions taken over from an executor that went silent")
STEPS = Counter("scangraph_steps", "Steps ended: computed, known (an earlier result), failed", ("component", "outcome"))
STEP_SECONDS = Histogram("scangraph_step_seconds", "Computing of a step, in its stage", ("component",))

# --- stages ------------------------------------------------------------------------------------------------------------------

LOST = Counter("scangraph_lost_processes", "Steps tried again, or given up, because their process died", ("deployment",))
WORK_SECONDS = Gauge("scangraph_work_seconds", "Work before a stage, in seconds of one replica", ("deployment",))
WORK_STEPS = Gauge("scangraph_work_steps", "Steps before a stage or in it", ("deployment",))
ARGUMENTS = Counter(
    "scangraph_argument_bytes",
    "Volumes and masks given to a stage that were on its node, or elsewhere",
    ("deployment", "place"),
)
TILES = Counter("scangraph_tiles", "Tiles that networks have computed", ("component",))
MODELS_HELD = Gauge("scangraph_models_held", "Models in memory", ("deployment",))
MODELS_HELD_BYTES = Gauge("scangraph_models_held_bytes", "Weights of the models in memory, as stored", ("deployment",))
MODEL_HITS = Counter("scangraph_model_hits", "Models wanted that were in memory", ("deployment",))
MODEL_LOADS = Counter("scangraph_model_loads", "Models loaded", ("deployment",))
MODEL_EVICTIONS = Counter("scangraph_model_evictions", "Models that left the memory for others", ("deployment",))

# --- doors -------------------------------------------------------------------------------------------------------------------

REQUESTS = Counter("scangraph_requests", "Requests answered; code: HTTP status, or gRPC's name", ("door", "operation", "code"))
REQUEST_SECONDS = Histogram("scangraph_request_seconds", "From a request's head to the end of its answer", ("door",))
RECEIVED = Counter("scangraph_received_bytes", "Bodies received: uploads, messages", ("door", "operation"))
SENT = Counter("scangraph_sent_bytes", "Bodies sent: downloads, answers", ("door", "operation"))

# --- what the service stands on ----------------------------------------------------------------------------------------------

STORAGE_ERRORS = Counter("scangraph_storage_errors", "Calls that the storage failed", ("code",))
DATABASE_ERRORS = Counter("scangraph_database_errors", "Transactions that the database did not answer")

#: Everything that a process reports; the page adds what the records and Ray know (`deployments/gateway/metrics.py`).
REPORTED: tuple[Metric, ...] = tuple(value for value in list(globals().values()) if isinstance(value, Metric))
