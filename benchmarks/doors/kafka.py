"""The Kafka door: messages a second, and how long one takes until its client hears that it was accepted.

    python -m benchmarks.doors.kafka [--messages 500]

A whole service (`scangraph serve`, SQLite) and librdkafka's mock cluster as the broker, both on this machine, with a small
component (`postprocess/merge`), whose executor works meanwhile. Two kinds of message: a file in the storage named by URI and
SHA-256, and a small file inside the message.

1. All messages at once: time until the last one is in the records, and until its first event is on the progress topic.
2. One at a time: from giving it to the broker until its first event (`seq` 1) is read from the progress topic.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

import numpy as np
from confluent_kafka import Consumer, TopicPartition

from benchmarks.load import percentile
from benchmarks.service import ServiceProcess
from deployments.imageio.nifti import write_nifti
from scangraph.contracts import LabelMap
from tests.kafka.broker import Broker, headers, running

REQUESTS, PROGRESS = "image-processing-requests", "processing-progress"


class Listener:
    """Reads the progress topic and notes when each request was first heard of."""

    def __init__(self, broker: Broker) -> None:
        settings = {"bootstrap.servers": broker.address, "group.id": uuid.uuid4().hex, "enable.auto.commit": False}
        self._consumer = Consumer(settings)
        while not (found := self._consumer.list_topics(PROGRESS, timeout=20).topics[PROGRESS].partitions):
            time.sleep(0.1)
        self._consumer.assign([TopicPartition(PROGRESS, partition, 0) for partition in found])
        self.heard: dict[str, float] = {}

    def until(self, names: set[str], seconds: float = 300) -> None:
        """Read until all of these were accepted."""
        end = time.monotonic() + seconds
        while not names <= self.heard.keys():
            if time.monotonic() > end:
                raise TimeoutError(f"{len(names - self.heard.keys())} were not heard of")
            message = self._consumer.poll(0.5)
            if message is None or message.error() is not None:
                continue
            if json.loads(message.value() or b"{}")["seq"] == 1:
                self.heard.setdefault(headers(message)["correlation-id"], time.monotonic())

    def close(self) -> None:
        """End."""
        self._consumer.close()


def request(name: str, given: dict[str, Any], label: int) -> bytes:
    """Return a message's value."""
    body = {"correlation_id": name, "pipeline_id": "postprocess-merge", "inputs": {"masks": [given]}}
    return json.dumps({**body, "parameters": {"structures": [2, label]}}).encode()


def measure(broker: Broker, kind: str, given: dict[str, Any], number: int) -> dict[str, Any]:
    """Measure one kind of message."""
    broker.put(REQUESTS, [request(f"{kind}-first", given, 3)])
    listener = Listener(broker)
    try:
        listener.until({f"{kind}-first"})
        alone = []
        for n in range(50):
            start = time.monotonic()
            broker.put(REQUESTS, [request(f"{kind}-one-{n}", given, 5 + n)])
            listener.until({f"{kind}-one-{n}"})
            alone.append(listener.heard[f"{kind}-one-{n}"] - start)
        names = {f"{kind}-{n}" for n in range(number)}
        start = time.monotonic()
        broker.put(REQUESTS, [request(f"{kind}-{n}", given, 5 + n % 90) for n in range(number)], spread=True)
        listener.until(names)
        seconds = max(listener.heard[name] for name in names) - start
    finally:
        listener.close()
    return {
        "kind": kind,
        "bytes a message": len(request(f"{kind}-0", given, 5)),
        "messages": number,
        "messages/s": round(number / seconds, 1),
        "alone, ms p50/p99/max": [percentile(alone, part) for part in (0.5, 0.99, 1)],
    }


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--messages", type=int, default=500)
    arguments = parser.parse_args()
    array = np.zeros((4, 8, 8), np.uint8)
    array[1:3, 2:6, 2:6] = 2
    mask = write_nifti(LabelMap(array, (1, 1, 1), labels=(2,)))
    with tempfile.TemporaryDirectory(prefix="scangraph-kafka-") as folder, running() as broker:
        data = Path(folder)
        (data / "storage").mkdir()
        (data / "storage" / "mask.nii.gz").write_bytes(mask)
        service = ServiceProcess(data, {"SCANGRAPH_KAFKA__BOOTSTRAP_SERVERS": broker.address})
        service.start(300)
        try:
            service.command("accounts", "add", "kafka", "--service")
            named = {"uri": "mask.nii.gz", "sha256": hashlib.sha256(mask).hexdigest()}
            inline = {"data": base64.b64encode(mask).decode(), "filename": "mask.nii.gz"}
            for kind, given in (("named", named), ("inline", inline)):
                print(measure(broker, kind, given, arguments.messages), flush=True)
            memory = {name: service.memory_mb(name) for name in ("kafka", "gateway", "executor")}
            print({"MB after": memory}, flush=True)
        finally:
            service.stop()


if __name__ == "__main__":
    main()
