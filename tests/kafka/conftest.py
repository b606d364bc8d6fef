"""A bridge on a real gateway, real records and a real executor, beside a broker that speaks Kafka's protocol."""

from __future__ import annotations

import base64
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from deployments.imageio.nifti import write_nifti
from deployments.kafka.bridge import Bridge
from scangraph.settings import KafkaSettings, Settings, load_settings
from scangraph.store import accounts, executions
from scangraph.store.tables import Account, Execution
from tests.conftest import constant_volume
from tests.kafka.broker import Broker, running
from tests.servers import Server, serving

CT = write_nifti(constant_volume(7))
SHA256 = hashlib.sha256(CT).hexdigest()
REQUESTS, PROGRESS, DEAD = "image-processing-requests", "processing-progress", "image-processing-requests.dead-letter"
PIPELINE = "test-threshold"


@pytest.fixture
def broker() -> Iterator[Broker]:
    with running() as broker:
        yield broker


@dataclass
class Doors:
    """A service, and bridges that come and go."""

    server: Server
    broker: Broker
    bridges: list[Bridge] = field(default_factory=list)

    def account(self, name: str = "kafka") -> Account:
        row: Account = self.server.run(
            accounts.create_account(self.server.services.store, name, "operator", "a long secret " + name, "service")
        )
        return row

    def open(self) -> Bridge:
        async def make() -> Bridge:
            return Bridge(self.server.services)

        self.bridges.append(self.server.run(make()))
        return self.bridges[-1]

    def close(self, bridge: Bridge) -> None:
        self.bridges.remove(bridge)
        self.server.run(bridge.stop())

    def status(self, bridge: Bridge | None = None) -> dict[str, Any]:
        return self.server.run((bridge or self.bridges[0]).status())

    def executions(self) -> list[Execution]:
        return self.server.run(executions.list_executions(self.server.services.store, limit=5000))

    def until(self, true: Callable[[], Any], seconds: float = 60) -> Any:
        """Wait until something is so, and return it."""
        end = time.monotonic() + seconds
        while not (found := true()):
            assert time.monotonic() < end, [self.status(bridge) for bridge in self.bridges]
            time.sleep(0.05)
        return found

    def settled(self) -> bool:
        """Whether everything that was asked is committed."""
        committed, there = self.broker.committed(REQUESTS, "scangraph")
        return committed == there


def settings_for(broker: Broker, folder: Path, **changes: Any) -> Settings:
    kafka = KafkaSettings(bootstrap_servers=broker.address, session_seconds=6, lease_seconds=2, longest_pause_seconds=0.5)
    update = {"max_inline_bytes": 2**19, **changes.pop("kafka", {})}
    return load_settings(data=folder, kafka=kafka.model_copy(update=update), **changes)


@pytest.fixture
def make_doors(tmp_path: Path) -> Iterator[Callable[..., Doors]]:
    """Start a service beside a broker; what was opened is closed at the end."""
    made: list[Any] = []

    def make(broker: Broker, **changes: Any) -> Doors:
        context = serving(settings_for(broker, tmp_path / f"data{len(made)}", **changes))
        doors = Doors(context.__enter__(), broker)
        made.append((doors, context))
        return doors

    yield make
    for doors, context in made:
        for bridge in list(doors.bridges):
            doors.close(bridge)
        context.__exit__(None, None, None)


@pytest.fixture
def doors(broker: Broker, make_doors: Callable[..., Doors]) -> Doors:
    """A service with an account for Kafka and one bridge."""
    doors = make_doors(broker)
    doors.account()
    doors.open()
    return doors


def request(correlation_id: str, given: dict[str, Any] | None = None, **changes: Any) -> bytes:
    """A request's value."""
    given = given or {"data": base64.b64encode(CT).decode(), "filename": "ct.nii.gz"}
    body = {"correlation_id": correlation_id, "pipeline_id": PIPELINE, "inputs": {"image": given}, **changes}
    return json.dumps(body).encode()
