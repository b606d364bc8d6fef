"""What is seen of a real service from outside: numbers, traces and lines; and whose names are not."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.service import ServiceProcess
from deployments.imageio.nifti import write_nifti
from scangraph.contracts import LabelMap, Volume
from scangraph.phantoms import Phantom, make_phantom
from tests.observability.collector import Collector, orphans

#: A file's name that says too much, and the parts of it that survive any tidying up.
TELLING, PARTS = "Mueller^Hans_1954.nii.gz", ("Mueller", "Hans_1954")
TERMINAL = {"completed", "failed", "cancelled"}


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.close()


@pytest.fixture(scope="module")
def running(collector: Collector, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    settings = {
        "SCANGRAPH_TRACING__ENDPOINT": f"http://127.0.0.1:{collector.port}",
        "SCANGRAPH_METRICS__INTERVAL_SECONDS": "1",
        "RAY_metrics_report_interval_ms": "1000",  # an agent forgets what has not been said anew for two of these
        "SCANGRAPH_EXECUTOR__LEASE_SECONDS": "2",
        "SCANGRAPH_EXECUTOR__KEEP_FROM_SECONDS": "0",
        "SCANGRAPH_GATEWAY__MIN_REPLICAS": "2",
        "SCANGRAPH_GATEWAY__MAX_REPLICAS": "2",
        "SCANGRAPH_CPUS": "2",
        "SCANGRAPH_OBJECT_STORE_MB": "1024",
    }
    running = ServiceProcess(tmp_path_factory.mktemp("seen"), settings)
    for stage in ("base", "nnunet", "smoothing", "postprocess"):
        if not (Path(__file__).parents[2] / ".envs" / stage / "scangraph-lock").exists():
            pytest.skip(f"environment {stage!r} is not built: run `make setup`")
    running.start(240)
    yield running
    running.stop()


@pytest.fixture(scope="module")
def client(running: ServiceProcess) -> Iterator[httpx.Client]:
    headers = {"Authorization": f"Bearer {running.token()}"}
    with httpx.Client(base_url=running.url, timeout=240, headers=headers) as client:
        yield client


@pytest.fixture(scope="module")
def mask(client: httpx.Client) -> str:
    array = np.zeros((12, 12, 12), np.uint8)
    array[3:9, 3:9, 3:9] = 2
    return upload(client, LabelMap(array, (2.0, 2.0, 2.0), labels=(2,)), TELLING)


@pytest.fixture(scope="module")
def large(client: httpx.Client, phantom: Phantom) -> str:
    """A CT that takes a while."""
    whole = make_phantom(4242).volumes["portal"]
    return upload(client, Volume(np.pad(whole.array, 60, mode="edge"), whole.spacing_mm, whole.origin_mm, whole.direction))


def upload(client: httpx.Client, volume: Volume, name: str = TELLING) -> str:
    answer = client.post("/v1/files", files={"file": (name, write_nifti(volume))})
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


def new_trace() -> tuple[str, str, str]:
    """A client's trace: its id, the client's own span, and the header."""
    trace_id, span_id = np.random.default_rng().bytes(16).hex(), np.random.default_rng().bytes(8).hex()
    return trace_id, span_id, f"00-{trace_id}-{span_id}-01"


def merge(client: httpx.Client, mask: str, keep: int, **headers: str) -> dict[str, Any]:
    """Run a small execution, another one for each number, and wait for it."""
    body = {"pipeline_id": "postprocess-merge", "inputs": {"masks": [mask]}, "parameters": {"structures": [2, keep]}}
    answer = client.post("/v1/executions", json=body, headers={"Prefer": "wait=120", **headers})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def wait(client: httpx.Client, execution_id: str, states: set[str] = TERMINAL, seconds: float = 240) -> dict[str, Any]:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found: dict[str, Any] = client.get(f"/v1/executions/{execution_id}").json()
        if found.get("status") in states:
            return found
        time.sleep(0.2)
    raise AssertionError(f"still {found}")


def scrape(client: httpx.Client) -> dict[str, float]:
    """The page, by series; each sample is looked at."""
    answer = client.get("/metrics")
    assert answer.status_code == 200, answer.text
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            assert sample.name.startswith("scangraph_"), sample
            labels = ",".join(f"{k}={v}" for k, v in sorted(sample.labels.items()) if k != "node")
            assert f"{sample.name}{{{labels}}}" not in found  # one node: one series
            found[f"{sample.name}{{{labels}}}"] = sample.value
    return found


def settled(client: httpx.Client, name: str, value: float, seconds: float = 30) -> dict[str, float]:
    """Wait until a series has a value: processes report once a second."""
    end = time.monotonic() + seconds
    while (found := scrape(client)).get(name) != value:
        assert time.monotonic() < end, f"{name} is {found.get(name)}, not {value}"
        time.sleep(0.3)
    return found


def log_lines(running: ServiceProcess) -> list[dict[str, Any]]:
    lines = []
    for file in sorted((running.data / "logs").glob("[pr]*.log")):
        lines += [json.loads(line) for line in file.read_text().splitlines()]
    return lines


def test_numbers_of_a_small_execution(client: httpx.Client, running: ServiceProcess, mask: str) -> None:
    ended = "scangraph_executions_ended_total{pipeline=postprocess-merge,state=completed}"
    before = scrape(client)
    assert before[ended] == 0  # it is there before anything has happened
    done = [merge(client, mask, number) for number in (5, 6, 7)]
    assert merge(client, mask, 7)["steps"][0]["cached"]
    settled(client, "scangraph_requests_total{code=200,door=http,operation=POST /v1/executions}", 4)  # from both replicas
    found = settled(client, ended, before[ended] + 4)
    assert found["scangraph_steps_total{component=postprocess/merge,outcome=computed}"] == 3
    assert found["scangraph_steps_total{component=postprocess/merge,outcome=known}"] == 1
    assert found["scangraph_step_seconds_count{component=postprocess/merge}"] == 3
    # Exactly what the executions themselves say, not what Ray's agent makes up from buckets.
    assert found["scangraph_step_seconds_sum{component=postprocess/merge}"] == pytest.approx(
        sum(max(d["steps"][0]["seconds"], 1e-9) for d in done), abs=1e-6
    )
    assert found["scangraph_executions{pipeline=postprocess-merge,state=completed}"] == 4
    assert found["scangraph_queue_length{priority=normal}"] == 0
    assert found["scangraph_queue_oldest_seconds{}"] == 0
    assert found["scangraph_execution_waiting_seconds_count{priority=normal}"] == 4
    assert found["scangraph_received_bytes_total{door=http,operation=POST /v1/files}"] > 100
    assert found["scangraph_object_store_bytes{place=memory}"] > 0
    assert found["scangraph_database_up{}"] == found["scangraph_node_up{}"] == 1


def test_the_page_is_guarded(client: httpx.Client, running: ServiceProcess) -> None:
    assert httpx.get(f"{running.url}/metrics").status_code == 401
    assert httpx.get(f"{running.url}/metrics", headers={"Authorization": "Bearer no"}).status_code == 401
    file = running.data / "metrics-token"
    assert file.stat().st_mode & 0o777 == 0o600
    for _ in range(4):  # both replicas
        assert httpx.get(f"{running.url}/metrics", headers={"Authorization": f"Bearer {file.read_text()}"}).status_code == 200
    file.write_text("another\n")
    assert httpx.get(f"{running.url}/metrics", headers={"Authorization": "Bearer another"}).status_code == 200
    accept = {"Accept": "application/openmetrics-text; version=1.0.0"}
    assert client.get("/metrics", headers=accept).text.endswith("# EOF\n")


def test_one_trace_from_the_client_to_the_files(client: httpx.Client, collector: Collector) -> None:
    mask = upload(client, LabelMap(np.full((9, 9, 9), 2, np.uint8), (2.0, 2.0, 2.0), labels=(2,)))  # decoded by nobody yet
    trace_id, client_span, header = new_trace()
    execution_id = merge(client, mask, 8, traceparent=header)["execution_id"]
    spans = collector.wait(trace_id, lambda found: any(s.name == "execution" for s in found))
    assert not orphans(spans, client_span)
    assert len({span.span_id for span in spans}) == len(spans)
    by_name = {span.name: span for span in spans}
    assert by_name["http POST /v1/executions"].parent_id == client_span
    assert by_name["execution"].parent_id == by_name["http POST /v1/executions"].span_id
    assert by_name["step"].parent_id == by_name["execution"].span_id
    assert set(by_name["postprocess postprocess/merge"].events) <= {"begun"}  # a quick step says nothing before its result
    assert by_name["execution"].attributes["scangraph.execution_id"] == execution_id
    assert by_name["execution"].attributes["scangraph.state"] == "completed"
    for name in ("imageio read", "imageio save", "imageio keep", "storage read", "storage write"):
        assert "scangraph-imageio" in {span.service for span in spans if span.name == name}, name
    assert {span.service for span in spans} == {f"scangraph-{name}" for name in ("gateway", "executor", "imageio")}


def test_what_failed_says_so_everywhere_under_one_id(
    client: httpx.Client, collector: Collector, running: ServiceProcess
) -> None:
    trace_id, _, header = new_trace()
    volume = Volume(np.zeros((8, 8, 8), np.int16), (2.0, 2.0, 2.0))
    body = {"image_path": client.get(f"/v1/files/{upload(client, volume)}/metadata").json()["path"], "model": "none"}
    answer = client.post("/inference/totalseg", json=body, headers={"traceparent": header})
    assert answer.status_code >= 400
    problem = answer.json()
    assert problem["trace_id"] == trace_id
    spans = collector.wait(trace_id, lambda found: any(s.name == "execution" for s in found))
    execution = next(span for span in spans if span.name == "execution")
    code = problem["type"].rpartition(":")[2]
    assert (execution.attributes["scangraph.state"], execution.error) == ("failed", code)
    assert next(span.error for span in spans if span.name == "step") == code
    lines = [line for line in log_lines(running) if line.get("trace_id") == trace_id and line["message"] == "execution ended"]
    assert [(line["code"], line["state"], line["deployment"]) for line in lines] == [(code, "failed", "executor")]
    assert lines[0]["execution_id"] == problem["execution_id"]
    other = client.get("/v1/executions/nothing").json()
    assert re.fullmatch("[0-9a-f]{32}", other["trace_id"])


def test_the_trace_goes_on_when_the_executor_dies(
    client: httpx.Client, collector: Collector, running: ServiceProcess, large: str
) -> None:
    trace_id, client_span, header = new_trace()
    body = {"pipeline_id": "organs", "inputs": {"image": large}, "parameters": {"step_size": 0.4}}
    execution_id = client.post("/v1/executions", json=body, headers={"traceparent": header}).json()["execution_id"]
    end = time.monotonic() + 120
    while not any(s["progress"]["done"] for s in client.get(f"/v1/executions/{execution_id}").json()["steps"]):
        assert time.monotonic() < end
        time.sleep(0.1)
    for process in running.processes("executor"):
        process.kill()
    assert wait(client, execution_id)["status"] == "completed"
    spans = collector.wait(trace_id, lambda found: any(s.name == "execution" for s in found))
    assert not orphans(spans, client_span)
    (execution,) = [span for span in spans if span.name == "execution"]
    assert execution.attributes["scangraph.attempt"] == 2
    assert sorted(s.attributes["scangraph.step"] for s in spans if s.name == "step") == ["organs", "scene"]
    assert (
        settled(client, "scangraph_executions_taken_over_total{}", 1)["scangraph_tiles_total{component=inference/totalseg}"] > 0
    )
    # Some seconds after the model was used last, and the agent of these tests forgets what is not said anew for two.
    held = settled(client, "scangraph_models_held{deployment=nnunet}", 1)
    assert held["scangraph_models_held_bytes{deployment=nnunet}"] > 1000
    settled(client, "scangraph_models_held{deployment=imaging}", 1)  # loaded at its start


def test_a_lost_process_is_counted(client: httpx.Client, running: ServiceProcess, large: str) -> None:
    body = {"pipeline_id": "inference-totalseg", "inputs": {"image": large}, "parameters": {"step_size": 0.45}}
    execution_id = client.post("/v1/executions", json=body).json()["execution_id"]
    end = time.monotonic() + 120
    while not any(s["progress"]["done"] for s in client.get(f"/v1/executions/{execution_id}").json()["steps"]):
        assert time.monotonic() < end
        time.sleep(0.1)
    for process in running.processes("nnunet"):
        process.kill()
    assert wait(client, execution_id)["status"] == "completed"
    settled(client, "scangraph_lost_processes_total{deployment=nnunet}", 1)


def test_no_line_number_or_span_names_the_patient(
    client: httpx.Client, collector: Collector, running: ServiceProcess, mask: str
) -> None:
    # Refused, not there, damaged in the storage after its acceptance, and gone: what errors say names the file.
    assert client.post("/v1/files", files={"file": (TELLING, b"no image")}).status_code == 415
    assert client.post("/inference/totalseg", json={"image_path": TELLING}).status_code == 404
    assert client.get(f"/v1/files/{TELLING}").status_code == 404
    assert client.get(f"/{TELLING}").status_code == 404
    volume = Volume(np.zeros((8, 8, 8), np.int16), (2.0, 2.0, 2.0))
    for ruin in (lambda path: path.write_bytes(path.read_bytes()[:60]), Path.unlink):
        file_id = upload(client, volume)
        stored = client.get(f"/v1/files/{file_id}/metadata").json()["path"]
        assert any(part in stored for part in PARTS)  # so that it could be found
        ruin(running.data / "storage" / stored)
        body = {"pipeline_id": "inference-totalseg", "inputs": {"image": file_id}}
        answer = client.post("/v1/executions", json=body, headers={"Prefer": "wait=120"})
        assert answer.json()["status"] == "failed", answer.text
    time.sleep(3)
    seen = {"/metrics": client.get("/metrics").text, "spans": "".join(span.raw for span in collector.spans())}
    session = Path((running.data / "run" / "ray-folder").read_text())
    files = [*(running.data / "logs").rglob("*"), *session.glob("session_2*/logs/**/*"), running.data / "serve.log"]
    seen |= {str(file): file.read_text(errors="replace") for file in files if file.is_file()}
    assert len(seen) > 10
    leaks = {where: part for where, text in seen.items() for part in PARTS if part in text}
    assert not leaks
    lines = log_lines(running)
    # Serve writes one line of a replica before the replica's own code begins.
    assert {line["message"] for line in lines if "time" not in line} <= {"Started initializing replica."}
    lines = [line for line in lines if "time" in line]
    assert {line["deployment"] for line in lines} >= {"gateway", "executor", "imageio"}
    assert all({"time", "level", "message", "deployment", "replica"} <= line.keys() for line in lines)
    assert any(line.get("execution_id") and line.get("trace_id") for line in lines)


def test_a_collector_that_is_away_delays_and_loses_nothing(
    tmp_path: Path, client: httpx.Client, running: ServiceProcess, collector: Collector, mask: str
) -> None:
    """Last in this file: the collector goes away, and comes back."""
    collector.close()
    began = time.monotonic()
    done = [merge(client, mask, number)["status"] for number in range(10, 22)]
    seconds = time.monotonic() - began
    assert done == ["completed"] * 12
    # One waiting for the collector would take its 5 s at least once for each.
    assert seconds < 12 * 5
    again = Collector(collector.port)
    try:
        trace_id, client_span, header = new_trace()
        merge(client, mask, 30, traceparent=header)
        spans = again.wait(trace_id, lambda found: any(s.name == "execution" for s in found), 90)
        assert not orphans(spans, client_span)
    finally:
        again.close()
    assert all(process.status() != psutil.STATUS_ZOMBIE for process in running.processes("gateway"))
