"""Brokers that ask who one is, and are asked who they are: real TLS, real SASL."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from tests.certificates import certificate
from tests.kafka.broker import Broker
from tests.kafka.conftest import PROGRESS, REQUESTS, Doors, request
from tests.kafka.guard import Guard, guarded


def secured(guard: Guard, protocol: str, **changes: Any) -> dict[str, Any]:
    named = {"sasl_username": guard.name, "sasl_password": SecretStr(guard.password)} if "SASL" in protocol else {}
    return {"bootstrap_servers": guard.address, "security_protocol": protocol, **named, **changes}


@pytest.mark.parametrize(
    ("protocol", "mechanism"),
    [("SSL", None), ("SASL_SSL", "SCRAM-SHA-512"), ("SASL_SSL", "PLAIN"), ("SASL_PLAINTEXT", "SCRAM-SHA-512")],
)
def test_secured_brokers_are_served(
    broker: Broker, make_doors: Callable[..., Doors], tmp_path: Path, protocol: str, mechanism: str | None
) -> None:
    ours = theirs = None
    changes: dict[str, Any] = {"sasl_mechanism": mechanism} if mechanism else {}
    if "SSL" in protocol:
        ours = certificate(tmp_path / "guard", "127.0.0.1")
        changes["ca_file"] = ours
    if protocol == "SSL":  # who has no name has a certificate
        theirs = certificate(tmp_path / "client", "scangraph")
        changes |= {"certificate_file": theirs, "key_file": theirs.with_name("key.pem")}
    with guarded(broker.address, mechanism, ours, theirs) as guard:
        doors = make_doors(broker, kafka=secured(guard, protocol, **changes))
        doors.account()
        doors.open()
        broker.put(REQUESTS, [request(f"c-{n}") for n in range(3)])
        doors.until(doors.settled)
        assert len(doors.executions()) == 3
        doors.until(lambda: doors.status()["unsent"] == 0)
        assert broker.read(PROGRESS, 3)
        assert (doors.status()["brokers"], doors.status()["trouble"]) == ("up", None)
        assert guard.passed >= 2
        assert guard.refused == 0
        for bridge in list(doors.bridges):
            doors.close(bridge)


def test_a_wrong_password_is_named_and_loses_nothing(broker: Broker, make_doors: Callable[..., Doors], tmp_path: Path) -> None:
    ours = certificate(tmp_path / "guard", "127.0.0.1")
    with guarded(broker.address, "SCRAM-SHA-512", ours) as guard:
        doors = make_doors(broker, kafka=secured(guard, "SASL_SSL", ca_file=ours, sasl_mechanism="SCRAM-SHA-512"))
        doors.account()
        guard.password = "another one by now"
        doors.open()
        broker.put(REQUESTS, [request("waits")])
        doors.until(lambda: guard.refused)
        doors.until(lambda: "authentication" in str(doors.status()["trouble"]).lower())
        assert doors.status()["brokers"] != "up"
        assert guard.password not in str(doors.status())
        assert doors.executions() == []
        guard.password = Guard.password
        doors.until(doors.settled)
        assert len(doors.executions()) == 1
        doors.until(lambda: doors.status()["unsent"] == 0)
        assert (doors.status()["brokers"], doors.status()["trouble"]) == ("up", None)
        for bridge in list(doors.bridges):
            doors.close(bridge)


def test_a_broker_that_shows_another_certificate_is_not_told_the_password(
    broker: Broker, make_doors: Callable[..., Doors], tmp_path: Path
) -> None:
    ours, another = certificate(tmp_path / "guard", "127.0.0.1"), certificate(tmp_path / "another", "127.0.0.1")
    with guarded(broker.address, "PLAIN", another) as guard:
        doors = make_doors(broker, kafka=secured(guard, "SASL_SSL", ca_file=ours, sasl_mechanism="PLAIN"))
        doors.account()
        doors.open()
        doors.until(lambda: "certificate" in str(doors.status()["trouble"]).lower())
        assert (guard.passed, guard.refused) == (0, 0)
        assert doors.status()["brokers"] == "away"
        for bridge in list(doors.bridges):
            doors.close(bridge)
