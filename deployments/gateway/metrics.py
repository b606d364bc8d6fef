"""`GET /metrics`: one page for the whole service, whichever replica gives it.

What processes report is added up by Ray's agent of their node and lives on when they die; the page asks every node's agent,
keeps what is ours and gives it our names. What is now (executions by state, the queue) is counted in the records, where all
replicas see the same. A node's numbers carry its address: were they added up, a node that leaves would look like a restart.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import itertools
import os
import secrets
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from fastapi import APIRouter, Request, Response
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from starlette.exceptions import HTTPException

import scangraph
from deployments.gateway.auth import authenticate
from deployments.gateway.services import Access, Services
from scangraph import metrics
from scangraph.contracts import Component
from scangraph.contracts.api import TERMINAL
from scangraph.contracts.errors import Forbidden, StorageFull, StorageUnavailable, StoreUnavailable, Unauthenticated
from scangraph.store.executions import Census, census

#: Ray puts this before every name.
_RAYS = "ray_"
_NODE = "node"
_OBJECTS, _ROOM = "object_store_memory", "object_store_available_memory"
#: Ray's word for where an object lies -> ours.
_PLACES = {"MMAP_SHM": "memory", "MMAP_DISK": "disk", "SPILLED": "spilled", "WORKER_HEAP": "processes"}

#: Labels' values, of one series.
Values = tuple[str, ...]


class Page(Collector):
    """All that is known now.

    Parameters
    ----------
    counted : Census or None
        From the records; None where they cannot be reached.
    pages : mapping
        Node's address -> what its agent says, None where it does not answer.
    components : iterable of Component
        What can be run.
    """

    def __init__(self, counted: Census | None, pages: Mapping[str, str | None], components: Iterable[Component] = ()) -> None:
        self._counted, self._pages = counted, pages
        components = list(components)
        executions = counted.executions if counted is not None else {}
        # A counter that appears with its first event shows no increase at this event: it must have been 0 before.
        self._known: dict[str, list[str]] = {
            "state": sorted(TERMINAL),
            "pipeline": sorted({pipeline for _, pipeline in executions}),
            "priority": list(counted.waiting) if counted is not None else [],
            "component": sorted(component.id for component in components),
            "deployment": sorted({component.deployment for component in components}),
            "place": ["here", "elsewhere"],
            "outcome": ["computed", "known", "failed"],
            "code": [StorageFull.code, StorageUnavailable.code],
        }

    def collect(self) -> Iterator[Metric]:
        """Yield every family."""
        yield InfoMetricFamily("scangraph_build", "What runs", {"version": scangraph.__version__})
        yield GaugeMetricFamily("scangraph_database_up", "Whether the records answer", int(self._counted is not None))
        nodes = GaugeMetricFamily("scangraph_node_up", "Whether a node's agent answers", labels=[_NODE])
        for node, page in self._pages.items():
            nodes.add_metric([node], int(page is not None))
        yield nodes
        if self._counted is not None:
            yield from _from_records(self._counted)
        yield from self._from_nodes({node: _series(page) for node, page in self._pages.items() if page is not None})

    def _from_nodes(self, series: Mapping[str, _Series]) -> Iterator[Metric]:
        for metric in metrics.REPORTED:
            labels = [*metric.labels, _NODE]
            if isinstance(metric, metrics.Counter):
                counter = CounterMetricFamily(metric.name, metric.help, labels=labels)
                never = dict.fromkeys(itertools.product(*(self._known.get(label, ()) for label in metric.labels)), 0.0)
                for node, found in series.items():
                    for values, number in {**never, **found.sums(f"{metric.name}_total", metric.labels)}.items():
                        counter.add_metric([*values, node], number)
                yield counter
            elif isinstance(metric, metrics.Histogram):
                histogram = HistogramMetricFamily(metric.name, metric.help, labels=labels)
                for node, found in series.items():
                    total = found.sums(f"{metric.name}{metrics.EXACT_SUM}_total", metric.labels)
                    for values, buckets in found.buckets(metric).items():
                        histogram.add_metric([*values, node], buckets, total.get(values, 0.0))
                yield histogram
            else:
                gauge = GaugeMetricFamily(metric.name, metric.help, labels=labels)
                for node, found in series.items():
                    for values, number in found.sums(metric.name, metric.labels).items():
                        gauge.add_metric([*values, node], number)
                yield gauge
        yield from _objects(series)


def _from_records(counted: Census) -> Iterator[Metric]:
    executions = GaugeMetricFamily(
        "scangraph_executions",
        "Executions in the records; pipelines that are not built in are custom",
        labels=["state", "pipeline"],
    )
    for (state, pipeline), number in counted.executions.items():
        executions.add_metric([state, pipeline], number)
    waiting = GaugeMetricFamily("scangraph_queue_length", "Executions that wait", labels=["priority"])
    for priority, number in counted.waiting.items():
        waiting.add_metric([priority], number)
    oldest = GaugeMetricFamily("scangraph_queue_oldest_seconds", "How long the first of the queue has waited")
    oldest.add_metric([], counted.oldest_seconds)
    yield from (executions, waiting, oldest)


def _objects(series: Mapping[str, _Series]) -> Iterator[Metric]:
    """Yield what Ray itself knows of the objects on their way."""
    objects = GaugeMetricFamily("scangraph_object_store_bytes", "Volumes and results on their way", labels=["place", _NODE])
    room = GaugeMetricFamily("scangraph_object_store_available_bytes", "What the object store has left", labels=[_NODE])
    for node, found in series.items():
        for (place,), number in found.sums(_OBJECTS, ("Location",)).items():
            if place in _PLACES:
                objects.add_metric([_PLACES[place], node], number)
        for number in found.sums(_ROOM, ()).values():
            room.add_metric([node], number)
    yield from (objects, room)


class _Series:
    """What one agent says: sample's name without Ray's prefix -> its labels and value, one for each process."""

    def __init__(self) -> None:
        self.samples: dict[str, list[tuple[dict[str, str], float]]] = defaultdict(list)

    def sums(self, name: str, labels: Values) -> dict[Values, float]:
        """Add up a sample over the node's processes."""
        found: dict[Values, float] = defaultdict(float)
        for given, number in self.samples.get(name, ()):
            found[tuple(given.get(label, "") for label in labels)] += number
        return found

    def buckets(self, metric: metrics.Metric) -> dict[Values, list[tuple[str, float]]]:
        """Return the buckets (bound, number up to it) of a histogram."""
        found = self.sums(f"{metric.name}_bucket", (*metric.labels, "le"))
        buckets: dict[Values, list[tuple[str, float]]] = defaultdict(list)
        for values, number in sorted(found.items(), key=lambda item: float(item[0][-1])):
            buckets[values[:-1]].append((values[-1], number))
        return buckets


def _series(page: str) -> _Series:
    """Read an agent's page: some thousand lines, of which few are ours."""
    ours = (f"{_RAYS}scangraph_", f"{_RAYS}{_OBJECTS}", f"{_RAYS}{_ROOM}")
    lines = "".join(f"{line}\n" for line in page.splitlines() if line.removeprefix("# TYPE ").startswith(ours))
    found = _Series()
    for family in text_string_to_metric_families(lines):
        for sample in family.samples:
            found.samples[sample.name.removeprefix(_RAYS)].append((sample.labels, sample.value))
    return found


# --- who may look ------------------------------------------------------------------------------------------------------------


def make_token(file: Path) -> None:
    """Make the scraper's bearer, if there is none; of many replicas that start at once, one does."""
    with contextlib.suppress(FileExistsError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as out:
            out.write(secrets.token_urlsafe(32))


async def _check(s: Services, request: Request) -> None:
    """Let the bearer of the file pass, as it is now (it may be exchanged at any time), and an admin's.

    Raises
    ------
    Unauthenticated, Forbidden
    """
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not token:
        raise Unauthenticated(reason="The request has no bearer token")
    with contextlib.suppress(OSError):
        wanted = (await asyncio.to_thread(s.settings.metrics_token_file.read_bytes)).strip()
        if wanted and hmac.compare_digest(token.encode("latin-1"), wanted):
            return
    principal = await authenticate(s, token)
    if not principal.may("admin"):
        raise Forbidden(action="looking at the metrics", needed="admin", role=principal.role)


def metrics_routes(services: Access) -> APIRouter:
    """Make the route."""
    router = APIRouter(include_in_schema=False)

    @router.get("/metrics")
    async def metrics(request: Request) -> Response:
        s = services()
        access = s.settings.metrics.access
        if access == "off":
            raise HTTPException(404, "Not Found")
        if access == "token":
            await _check(s, request)
        counted, pages = await asyncio.gather(_counted(s), s.pages())
        encode, media_type = choose_encoder(request.headers.get("accept", ""))
        page = await asyncio.to_thread(encode, Page(counted, pages, s.components.values()))
        return Response(page, media_type=media_type)

    return router


async def _counted(s: Services) -> Census | None:
    try:
        return await census(s.store)
    except StoreUnavailable:
        return None
