"""Writes the Grafana dashboard beside it:  python cluster/observability/dashboard.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

#: Title, unit of Grafana, {legend: expression}, in rows of three.
_PANELS: list[tuple[str, str, dict[str, str]]] = [
    ("Executions that wait and run", "short", {
        "{{state}}": 'sum by (state) (scangraph_executions{state=~"pending|running"})',
    }),
    ("Ended, per minute", "short", {
        "{{state}}": "60 * sum by (state) (rate(scangraph_executions_ended_total[$__rate_interval]))",
    }),
    ("First of the queue", "s", {"waits": "scangraph_queue_oldest_seconds"}),
    ("Waiting before the beginning", "s", {
        "median": "histogram_quantile(0.5, sum by (le) (rate(scangraph_execution_waiting_seconds_bucket[$__rate_interval])))",
        "95 %": "histogram_quantile(0.95, sum by (le) (rate(scangraph_execution_waiting_seconds_bucket[$__rate_interval])))",
    }),
    ("Executions, mean", "s", {
        "{{pipeline}}": "sum by (pipeline) (rate(scangraph_execution_seconds_sum[$__rate_interval]))"
        " / sum by (pipeline) (rate(scangraph_execution_seconds_count[$__rate_interval]))",
    }),
    ("Steps, 95 %", "s", {
        "{{component}}": "histogram_quantile(0.95,"
        " sum by (component, le) (rate(scangraph_step_seconds_bucket[$__rate_interval])))",
    }),
    ("Steps known from before", "percentunit", {
        "known": 'sum(rate(scangraph_steps_total{outcome="known"}[$__rate_interval]))'
        " / sum(rate(scangraph_steps_total[$__rate_interval]))",
    }),
    ("Tiles a second", "short", {"{{component}}": "sum by (component) (rate(scangraph_tiles_total[$__rate_interval]))"}),
    ("Work before the stages", "s", {"{{deployment}}": "sum by (deployment) (scangraph_work_seconds)"}),
    ("Steps before the stages", "short", {"{{deployment}}": "sum by (deployment) (scangraph_work_steps)"}),
    ("Arguments copied between nodes", "Bps", {
        "{{deployment}}": 'sum by (deployment) (rate(scangraph_argument_bytes_total{place="elsewhere"}[$__rate_interval]))',
    }),
    ("Models in memory", "bytes", {"{{deployment}} {{node}}": "scangraph_models_held_bytes"}),
    ("Models wanted, per minute", "short", {
        "{{deployment}}, there": "60 * sum by (deployment) (rate(scangraph_model_hits_total[$__rate_interval]))",
        "{{deployment}}, loaded": "60 * sum by (deployment) (rate(scangraph_model_loads_total[$__rate_interval]))",
        "{{deployment}}, evicted": "60 * sum by (deployment) (rate(scangraph_model_evictions_total[$__rate_interval]))",
    }),
    ("Object store", "bytes", {
        "{{place}} {{node}}": "scangraph_object_store_bytes",
        "free {{node}}": "scangraph_object_store_available_bytes",
    }),
    ("Lost processes", "short", {
        "{{deployment}}": "sum by (deployment) (increase(scangraph_lost_processes_total[$__rate_interval]))",
        "executions taken over": "sum(increase(scangraph_executions_taken_over_total[$__rate_interval]))",
    }),
    ("Requests a second", "reqps", {
        "{{door}} {{code}}": "sum by (door, code) (rate(scangraph_requests_total[$__rate_interval]))",
    }),
    ("Requests, 95 %", "s", {
        "{{door}}": "histogram_quantile(0.95,"
        " sum by (door, le) (rate(scangraph_request_seconds_bucket[$__rate_interval])))",
    }),
    ("Bodies", "Bps", {
        "received {{door}}": "sum by (door) (rate(scangraph_received_bytes_total[$__rate_interval]))",
        "sent {{door}}": "sum by (door) (rate(scangraph_sent_bytes_total[$__rate_interval]))",
    }),
    ("Storage and database errors", "short", {
        "{{code}}": "sum by (code) (increase(scangraph_storage_errors_total[$__rate_interval]))",
        "database": "sum(increase(scangraph_database_errors_total[$__rate_interval]))",
    }),
    ("Up", "short", {"database": "scangraph_database_up", "{{node}}": "scangraph_node_up"}),
    ("In the records", "short", {"{{state}}": "sum by (state) (scangraph_executions)"}),
]  # fmt: skip
_WIDE, _HIGH = 8, 7


def dashboard() -> dict[str, Any]:
    """Return the dashboard."""
    source = {"type": "prometheus", "uid": "${source}"}
    panels = [
        {
            "id": number + 1,
            "title": title,
            "type": "timeseries",
            "datasource": source,
            "gridPos": {"x": number % 3 * _WIDE, "y": number // 3 * _HIGH, "w": _WIDE, "h": _HIGH},
            "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
            "targets": [
                {"refId": chr(65 + i), "datasource": source, "expr": expression, "legendFormat": legend}
                for i, (legend, expression) in enumerate(series.items())
            ],
        }
        for number, (title, unit, series) in enumerate(_PANELS)
    ]
    return {
        "uid": "scangraph",
        "title": "scangraph",
        "schemaVersion": 39,
        "refresh": "30s",
        "time": {"from": "now-3h", "to": "now"},
        "templating": {"list": [{"name": "source", "type": "datasource", "query": "prometheus"}]},
        "panels": panels,
    }


if __name__ == "__main__":
    Path(__file__).with_name("dashboard.json").write_text(json.dumps(dashboard(), indent=1) + "\n")
