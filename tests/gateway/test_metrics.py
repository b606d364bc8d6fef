"""The page's families, its guard, and that what is drawn and what alarms exist."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import httpx
import yaml
from prometheus_client.parser import text_string_to_metric_families

from deployments.gateway.metrics import Page
from scangraph import metrics
from scangraph.store.executions import Census
from tests.conftest import ROOT
from tests.gateway.conftest import Gateway, problem

FOLDER = ROOT / "cluster/observability"
_ENDINGS = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "info": ("_info",)}


def known() -> dict[str, set[str]]:
    """Names that an expression can use, with their labels."""
    page = Page(Census({("pending", "custom"): 1}, {"normal": 1}, 0.0), {"10.0.0.1": ""})
    declared = {metric.name: metric.labels for metric in metrics.REPORTED}
    own = {
        "scangraph_executions": ("state", "pipeline"),
        "scangraph_object_store_bytes": ("place",),
        "scangraph_queue_length": ("priority",),
    }
    found = {}
    for family in page.collect():
        labels = {*declared.get(family.name, own.get(family.name, ())), "node"}
        for ending in _ENDINGS.get(family.type, ("",)):
            found[family.name + ending] = labels | ({"le"} if ending == "_bucket" else set())
    return found


def expressions() -> list[str]:
    board = json.loads((FOLDER / "dashboard.json").read_text())
    alerts = yaml.safe_load((FOLDER / "alerts.yml").read_text())
    drawn = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    return drawn + [rule["expr"] for group in alerts["groups"] for rule in group["rules"]]


def test_what_is_drawn_and_what_alarms_exists() -> None:
    there, used = known(), set()
    for expression in expressions():
        names = set(re.findall(r"\bscangraph_\w+", expression))
        assert names
        assert names <= there.keys(), expression
        labels = {label for group in re.findall(r"by \(([^)]*)\)", expression) for label in re.split(r",\s*", group)}
        labels |= set(re.findall(r"[{,]\s*(\w+)\s*=", expression))
        assert labels <= set().union(*(there[name] for name in names)), expression
        used |= names
    # Nothing is measured that nobody looks at.
    unseen = {m.name for m in metrics.REPORTED if not used & {m.name + end for end in ("", "_total", "_bucket", "_sum")}}
    assert unseen == {"scangraph_executions_accepted", "scangraph_models_held"}


def test_the_dashboard_is_what_its_script_writes() -> None:
    code = f"import json, runpy; print(json.dumps(runpy.run_path({str(FOLDER / 'dashboard.py')!r})['dashboard']()))"
    made = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert made == json.loads((FOLDER / "dashboard.json").read_text())
    config = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    assert all((FOLDER / name).exists() for name in config["rule_files"])


def test_labels_are_few_and_units_are_base_units() -> None:
    for metric in metrics.REPORTED:
        assert metric.name.startswith("scangraph_")
        assert set(metric.labels) <= {
            "pipeline", "state", "priority", "component", "outcome", "deployment", "door", "operation", "code", "place"
        }  # fmt: skip
        assert not re.search(r"_(ms|mb|kb|minutes|percent)\b", metric.name)
        if isinstance(metric, metrics.Histogram):
            assert metric.name.endswith("_seconds")
            assert list(metric.bounds) == sorted(metric.bounds)


def series(text: str) -> dict[str, float]:
    families = text_string_to_metric_families(text)
    return {f"{s.name}{sorted(s.labels.items())}": s.value for family in families for s in family.samples}


def test_the_records_are_counted(fresh: Callable[..., Gateway]) -> None:
    gateway = fresh(replicas=2, metrics={"access": "open"})

    def page(replica: int) -> dict[str, float]:
        return series(httpx.get(f"{gateway.urls[replica]}/metrics").text)

    with gateway.client("ed", "editor") as client:
        body = {"pipeline_id": "organs", "inputs": {"image": gateway.upload(client)}, "priority": "high"}
        ids = [client.post("/v1/executions", json=body).json()["execution_id"] for _ in range(3)]
        spec = client.get("/v1/pipelines/organs").json()["spec"]
        assert client.post("/v1/pipelines", json={**spec, "name": "hans-mueller"}).status_code == 201
        assert client.post("/v1/executions", json={**body, "pipeline_id": "hans-mueller"}).status_code == 202
        gateway.complete(gateway.claim(ids[0]))
        client.post(f"/v1/executions/{ids[1]}/cancel")
    for replica in (0, 1):
        found = page(replica)
        numbers = {(s, p): found[f"scangraph_executions{[('pipeline', p), ('state', s)]}"] for s in ("pending", "completed",
                   "cancelled", "failed") for p in ("organs", "custom")}  # fmt: skip
        assert {key: n for key, n in numbers.items() if n} == {
            ("pending", "organs"): 1, ("completed", "organs"): 1, ("cancelled", "organs"): 1, ("pending", "custom"): 1
        }  # fmt: skip
        assert found["scangraph_queue_length[('priority', 'high')]"] == 2
        assert 0 < found["scangraph_queue_oldest_seconds[]"] < 60
        assert not any("mueller" in name for name in found)


def test_who_may_look(fresh: Callable[..., Gateway]) -> None:
    gateway = fresh()
    with gateway.client("ann", "operator") as client:
        problem(client.get("/metrics"), 403, "forbidden")
    with gateway.client("root", "admin") as client:
        assert client.get("/metrics").status_code == 200
    for header in ({}, {"Authorization": "Bearer"}, {"Authorization": "Basic eDp5"}, {"Authorization": "Bearer é".encode()}):
        sent: Any = header
        problem(httpx.get(f"{gateway.urls[0]}/metrics", headers=sent), 401, "unauthenticated")


def test_nobody_may_look(fresh: Callable[..., Gateway]) -> None:
    gateway = fresh(metrics={"access": "off"})
    with gateway.client("root", "admin") as client:
        problem(client.get("/metrics"), 404, "not-found")
