"""The compose file, as far as it can be looked at without a container engine: nothing here has started it."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from deployments.gateway.page import BUILT
from scangraph.settings import Settings, describe_settings, load_settings
from tests.conftest import ROOT

FILE = ROOT / "cluster/compose.yaml"
COMPOSE: dict[str, Any] = yaml.safe_load(FILE.read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = [name for name, service in SERVICES.items() if "build" in service]


@pytest.fixture
def secrets(tmp_path: Path) -> Path:
    """What the script makes, in a copy of its folder."""
    (tmp_path / "secrets.sh").write_bytes((ROOT / "cluster/secrets.sh").read_bytes())
    subprocess.run(["sh", str(tmp_path / "secrets.sh")], check=True, capture_output=True)
    return tmp_path / "secrets"


def environment(service: str) -> dict[str, str]:
    found: dict[str, str] = SERVICES[service].get("environment", {})
    return found


def test_it_is_what_the_specification_knows() -> None:
    program = Path(sys.executable).with_name("check-jsonschema")
    command = [str(program), "--builtin-schema", "vendor.compose-spec", str(FILE)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_specification_would_see_a_fault(tmp_path: Path) -> None:
    broken = tmp_path / "compose.yaml"
    broken.write_text(FILE.read_text().replace("healthcheck:", "healthchek:", 1))
    program = Path(sys.executable).with_name("check-jsonschema")
    command = [str(program), "--builtin-schema", "vendor.compose-spec", str(broken)]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 1


@pytest.mark.parametrize("service", OURS)
def test_every_variable_is_a_setting_and_together_they_load(
    service: str, secrets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = {name for name, _, _ in describe_settings(load_settings())} | {"SCANGRAPH_SECRETS"}
    given = {name: value for name, value in environment(service).items() if name.startswith("SCANGRAPH_")}
    assert given.keys() <= known
    mounted = tmp_path / "mounted"
    mounted.mkdir()
    for name in SERVICES[service]["secrets"]:
        (mounted / name).write_bytes((secrets / name).read_bytes())
        if name.startswith("scangraph_"):
            assert name.removeprefix("scangraph_") in Settings.model_fields
    for name, value in given.items():
        assert isinstance(value, str), f"{name}: YAML reads {value!r} as no text"
        monkeypatch.setenv(name, str(mounted) if value == "/run/secrets" else value)
    settings = load_settings()
    assert settings.storage == "s3://scangraph/files"
    assert settings.storage_options["secret_access_key"]
    assert settings.database.startswith("postgresql+asyncpg://" if service == "scangraph" else "sqlite")


def test_every_file_that_is_mounted_exists_and_every_secret_is_made(secrets: Path) -> None:
    for name, secret in COMPOSE["secrets"].items():
        assert (secrets.parent / secret["file"]).is_file(), name
    for service in SERVICES.values():
        assert set(service.get("secrets", [])) <= COMPOSE["secrets"].keys()
        for volume in service.get("volumes", []):
            source, target = volume.split(":")[:2]
            assert source in COMPOSE["volumes"] if "/" not in source else (FILE.parent / source).exists(), volume
            assert target.startswith("/")
        build = service.get("build")
        if build:
            assert (FILE.parent / build["context"]).resolve() == ROOT
            assert (ROOT / build["dockerfile"]).is_file()
    used = {name for service in SERVICES.values() for name in service.get("secrets", [])}
    assert used == COMPOSE["secrets"].keys()


def test_addresses_are_those_of_the_services(secrets: Path) -> None:
    options = json.loads((secrets / "scangraph_storage_options").read_text())
    endpoint = urlsplit(options["endpoint"])
    assert endpoint.hostname in SERVICES
    assert f"-s3.port={endpoint.port}" in SERVICES[str(endpoint.hostname)]["command"]
    database = urlsplit((secrets / "scangraph_database_url").read_text())
    assert (database.username, database.path.strip("/")) == (
        environment(str(database.hostname))["POSTGRES_USER"],
        environment(str(database.hostname))["POSTGRES_DB"],
    )
    port, grpc = (environment("scangraph")[name] for name in ("SCANGRAPH_PORT", "SCANGRAPH_GRPC__PORT"))
    assert SERVICES["scangraph"]["ports"] == [f"127.0.0.1:{number}:{number}" for number in (port, grpc)]
    assert SERVICES["scangraph"]["healthcheck"]["test"] == ["CMD", "health", "service"]


def test_kafka_has_our_topics_and_takes_our_messages() -> None:
    ours = load_settings().kafka
    topics = re.findall(r"for topic in (.*); do", SERVICES["topics"]["command"][-1])[0].split()
    assert topics == [ours.requests_topic, ours.progress_topic, ours.dead_letter_topic]
    broker = environment("kafka")
    for limit in ("KAFKA_MESSAGE_MAX_BYTES", "KAFKA_REPLICA_FETCH_MAX_BYTES"):
        assert int(broker[limit]) > ours.max_inline_bytes * 4 / 3 + 2**16
    named = dict(entry.split("://") for entry in broker["KAFKA_ADVERTISED_LISTENERS"].split(","))
    listens = dict(entry.split("://") for entry in broker["KAFKA_LISTENERS"].split(","))
    assert named["INSIDE"] == environment("scangraph")["SCANGRAPH_KAFKA__BOOTSTRAP_SERVERS"]
    assert {name: address.rpartition(":")[2] for name, address in named.items()}.items() <= {
        name: address.strip(":") for name, address in listens.items()
    }.items()
    assert SERVICES["kafka"]["ports"] == [f"{named['HOST']}:{listens['HOST'].strip(':')}"]
    protocols = dict(entry.split(":") for entry in broker["KAFKA_LISTENER_SECURITY_PROTOCOL_MAP"].split(","))
    assert protocols.keys() == listens.keys()
    assert broker["KAFKA_CONTROLLER_QUORUM_VOTERS"] == f"{broker['KAFKA_NODE_ID']}@kafka{listens['CONTROLLER']}"


def test_prometheus_scrapes_the_service_and_grafana_asks_prometheus() -> None:
    config = yaml.safe_load((FILE.parent / "observability/prometheus.yml").read_text())
    (job,) = config["scrape_configs"]
    assert job["static_configs"][0]["targets"] == [f"scangraph:{environment('scangraph')['SCANGRAPH_PORT']}"]
    token = job["authorization"]["credentials_file"]
    assert token == environment("scangraph")["SCANGRAPH_METRICS__TOKEN_FILE"]
    assert all(Path(token).name in SERVICES[name]["secrets"] for name in ("scangraph", "prometheus"))
    mounted = {volume.split(":")[1] for volume in SERVICES["prometheus"]["volumes"]}
    assert {f"/etc/prometheus/{name}" for name in ("prometheus.yml", *config["rule_files"])} <= mounted
    sources = yaml.safe_load((FILE.parent / "observability/grafana/datasources.yml").read_text())["datasources"]
    assert {urlsplit(source["url"]).hostname for source in sources} <= SERVICES.keys()
    for source in sources:
        address = urlsplit(source["url"])
        assert SERVICES[str(address.hostname)]["ports"] == [f"127.0.0.1:{address.port}:{address.port}"]
    (provider,) = yaml.safe_load((FILE.parent / "observability/grafana/dashboards.yml").read_text())["providers"]
    shown = [volume.split(":") for volume in SERVICES["grafana"]["volumes"] if provider["options"]["path"] in volume]
    assert [(FILE.parent / source).name for source, *_ in shown] == ["dashboard.json"]
    assert environment("grafana")["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"] == shown[0][1]
    wanted = {row["datasource"]["type"] for row in _rows((FILE.parent / "observability/dashboard.json").read_text())}
    assert wanted <= {source["type"] for source in sources}
    assert urlsplit(environment("scangraph")["SCANGRAPH_TRACING__ENDPOINT"]).hostname in SERVICES


def _rows(dashboard: str) -> list[dict[str, Any]]:
    return [panel for panel in json.loads(dashboard)["panels"] if "datasource" in panel]


def test_both_sides_have_the_same_passwords(secrets: Path) -> None:
    database = urlsplit((secrets / "scangraph_database_url").read_text())
    assert database.password == (secrets / "postgres_password").read_text()
    options = json.loads((secrets / "scangraph_storage_options").read_text())
    (identity,) = json.loads((secrets / "s3.json").read_text())["identities"]
    assert identity["credentials"] == [{"accessKey": options["access_key_id"], "secretKey": options["secret_access_key"]}]


def test_secrets_are_random_kept_from_others_and_made_once(secrets: Path, tmp_path: Path) -> None:
    assert stat.S_IMODE(secrets.stat().st_mode) == 0o700
    made = {path.name: path.read_bytes() for path in secrets.iterdir()}
    passwords = [made[name] for name in made if name.endswith("_password") or name == "metrics-token"]
    assert len(set(passwords)) == len(passwords)
    assert all(re.fullmatch(rb"[0-9a-f]{48}", password) for password in passwords)
    again = subprocess.run(["sh", str(tmp_path / "secrets.sh")], check=True, capture_output=True, text=True)
    assert "nothing is changed" in again.stdout
    assert made == {path.name: path.read_bytes() for path in secrets.iterdir()}
    ignored = subprocess.run(["git", "check-ignore", "-q", "cluster/secrets/s3.json"], cwd=ROOT, check=False)
    assert ignored.returncode == 0
    text = FILE.read_text()
    assert not re.search(r"(?i)(password|secret_?key|token): *[\"']?[A-Za-z0-9]{6,}", text), "a secret in the file"


def test_images_are_pinned_and_whatever_serves_has_a_health_check() -> None:
    for name, service in SERVICES.items():
        _, _, tag = service["image"].partition(":")
        assert re.search(r"\d+\.\d+", tag) or name in OURS, f"{name}: {service['image']}"
        looked_at = service.get("healthcheck", {}).get("test", [""])[0] in {"CMD", "CMD-SHELL"}
        waited_for = any(name in other.get("depends_on", {}) for other in SERVICES.values())
        assert service["restart"] == "no" or looked_at or (name == "jaeger" and not waited_for), name
    for service in SERVICES.values():
        for other, how in service.get("depends_on", {}).items():
            ends = SERVICES[other]["restart"] == "no"
            assert how["condition"] == ("service_completed_successfully" if ends else "service_healthy")
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:")


def test_the_image_starts_what_there_is() -> None:
    lines = (ROOT / "cluster/images/Dockerfile").read_text()
    command = SERVICES["storage"]["command"]
    assert command[0] == "scangraph"
    done = subprocess.run(
        [sys.executable, "-m", "scangraph.cli", *command[1:], "--help"], capture_output=True, check=False, env=dict(os.environ)
    )
    assert done.returncode == 0
    # The page is built where Node is, and goes to where the gateway looks for it.
    page, lines = BUILT.relative_to(ROOT).as_posix(), (ROOT / "cluster/images/Dockerfile").read_text()
    assert re.search(r"^FROM node:\d+-bookworm-slim AS page$", lines, re.MULTILINE)
    assert f"COPY --from=page /srv/scangraph/{page} {page}\n" in lines
    ignored = (ROOT / "cluster/images/Dockerfile.dockerignore").read_text().split()
    assert {"cluster/secrets", ".envs", ".git", "**/node_modules", page} <= set(ignored)
