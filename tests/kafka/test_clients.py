"""Settings of the door, and what librdkafka makes of them."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from ray.serve._private.build_app import build_app as build_serve_app

from deployments.kafka.clients import check_configuration, configuration
from graph import build_app
from scangraph.contracts.errors import InvalidMessage, InvalidSetting
from scangraph.contracts.messages import read_request
from scangraph.settings import KafkaSettings, describe_settings, load_settings

SERVERS = "127.0.0.1:1"


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"options": {"linger.ms": "20"}},
        {"security_protocol": "SSL"},
        {"security_protocol": "SASL_SSL", "sasl_username": "me", "sasl_password": "secret"},
        {"security_protocol": "SASL_PLAINTEXT", "sasl_mechanism": "PLAIN", "sasl_username": "me", "sasl_password": "secret"},
    ],
)
def test_librdkafka_takes_it(settings: dict[str, Any]) -> None:
    check_configuration(KafkaSettings(bootstrap_servers=SERVERS, **settings))


@pytest.mark.parametrize(
    "settings",
    [
        {"options": {"no.such": "1"}},
        {"options": {"linger.ms": "soon"}},
        {"security_protocol": "SSL", "ca_file": "/no/such/file"},
        {"security_protocol": "SSL", "certificate_file": __file__, "key_file": __file__},
    ],
)
def test_librdkafka_refuses_it_at_the_start(settings: dict[str, Any]) -> None:
    with pytest.raises(InvalidSetting):
        check_configuration(KafkaSettings(bootstrap_servers=SERVERS, **settings))


@pytest.mark.parametrize(
    "settings",
    [
        {"security_protocol": "SASL_SSL"},
        {"sasl_username": "me", "sasl_password": "secret"},
        {"ca_file": "/ca.pem"},
        {"security_protocol": "SSL", "certificate_file": "/c.pem"},
        {"progress_topic": "same", "requests_topic": "same"},
        {"colour": "red"},
    ],
)
def test_what_contradicts_itself_or_would_not_be_used_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        KafkaSettings(bootstrap_servers=SERVERS, **settings)


def test_a_password_reaches_librdkafka_and_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"BOOTSTRAP_SERVERS": SERVERS, "SECURITY_PROTOCOL": "SASL_SSL", "SASL_USERNAME": "me"}.items():
        monkeypatch.setenv(f"SCANGRAPH_KAFKA__{name}", value)
    monkeypatch.setenv("SCANGRAPH_KAFKA__SASL_PASSWORD", "hush-hush")
    settings = pickle.loads(pickle.dumps(load_settings()))
    assert configuration(settings.kafka)["sasl.password"] == "hush-hush"
    assert "hush-hush" not in repr(settings) + str(describe_settings(settings))


def test_options_do_not_undo_promises() -> None:
    from deployments.kafka.clients import Line
    from deployments.kafka.requests import Requests

    async def settle(_: Any) -> None: ...

    undo = {"enable.auto.commit": "true", "group.id": "other", "bootstrap.servers": "other:1"}
    requests = Requests(KafkaSettings(bootstrap_servers=SERVERS, options=undo), settle, Line())
    found = requests._configuration()
    assert (found["enable.auto.commit"], found["group.id"], found["bootstrap.servers"]) == (False, "scangraph", SERVERS)


def test_the_correlation_id_may_be_in_the_header() -> None:
    value = b'{"pipeline_id": "organs", "inputs": {"image": {"file_id": "f"}}}'
    assert read_request(value, "from the header").correlation_id == "from the header"
    with pytest.raises(InvalidMessage) as caught:
        read_request(value)
    assert caught.value.fields["errors"] == [{"pointer": "/correlation_id", "detail": "Field required"}]
    named = value.replace(b"{", b'{"correlation_id": "in the value", ', 1)
    assert read_request(named, "from the header").correlation_id == "in the value"


def test_faults_are_pointed_at_and_not_repeated() -> None:
    value = b'{"correlation_id": "c", "pipeline_id": "organs", "inputs": {"image": {"file_id": "f", "patient": "Jane Doe"}}}'
    with pytest.raises(InvalidMessage) as caught:
        read_request(value)
    assert "/inputs/image" in caught.value.detail
    assert "Jane" not in str(caught.value.fields)


def test_without_brokers_there_is_no_door(tmp_path: Path) -> None:
    settings = load_settings(data=tmp_path)
    assert "kafka" not in deployments(build_app(settings))
    on = KafkaSettings(bootstrap_servers=SERVERS)
    assert "kafka" in deployments(build_app(settings.model_copy(update={"kafka": on})))


def deployments(app: Any) -> set[str]:
    """Names of what is bound in an application."""
    return {deployment.name for deployment in build_serve_app(app, name="scangraph").deployments}
