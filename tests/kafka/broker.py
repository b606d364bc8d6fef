"""librdkafka's mock cluster in a process of its own: it speaks Kafka's protocol to real clients, and keeps little.

The plain one runs everywhere and can only hang. `../shared/tools/kafka-mock`, where it is, also refuses connections and answers
with errors.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Consumer, Message, Producer, TopicPartition

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT.parent / "shared" / "tools" / "kafka-mock"
#: Made without a broker to begin with, of which librdkafka complains.
_PLAIN = """
import sys, confluent_kafka
cluster = confluent_kafka.Producer({"test.mock.num.brokers": 1, "log_level": 0})
print(",".join(f"{b.host}:{b.port}" for b in cluster.list_topics(timeout=20).brokers.values()), flush=True)
sys.stdin.read()
"""


class Broker:
    """A broker.

    Parameters
    ----------
    tool : bool
        Whether it must refuse connections and answer with errors on demand.
    """

    def __init__(self, tool: bool = False) -> None:
        if tool and not TOOL.exists():
            pytest.skip("the broker that refuses connections (../shared/tools/kafka-mock) is not on this machine")
        command = [sys.executable, *([str(TOOL)] if tool else ["-c", _PLAIN])]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.address = self._process.stdout.readline().strip()
        assert self.address
        self._producer = Producer({"bootstrap.servers": self.address, "log_level": 0})

    def tell(self, command: str) -> None:
        """Give the tool a command."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()
        assert self._process.stdout.readline().strip() == "ok", command

    @contextlib.contextmanager
    def hanging(self) -> Iterator[None]:
        """Answer nothing while the block lasts; connections stay open."""
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)

    @contextlib.contextmanager
    def refusing(self) -> Iterator[None]:
        """Take no connections while the block lasts."""
        self.tell("down")
        try:
            yield
        finally:
            self.tell("up")

    def put(self, topic: str, values: Sequence[bytes | None], spread: bool = False, **options: Any) -> None:
        """Produce messages, and wait until the broker has them. `spread` over the partitions, they have keys."""
        failed: list[Any] = []
        for number, value in enumerate(values):
            if spread:
                options["key"] = str(number).encode()
            self._producer.produce(topic, value, on_delivery=lambda e, _: failed.append(e) if e else None, **options)
        assert self._producer.flush(60) == 0
        assert not failed, failed

    def read(self, topic: str, enough: Any, seconds: float = 60) -> list[Message]:
        """Read a topic from its beginning until there is enough: a number, or a function of what was read."""
        wanted = enough if callable(enough) else lambda found: len(found) >= enough
        settings = {"bootstrap.servers": self.address, "group.id": uuid.uuid4().hex, "log_level": 0}
        consumer = Consumer({**settings, "enable.auto.commit": False, "auto.offset.reset": "earliest"})
        found: list[Message] = []
        try:
            end = time.monotonic() + seconds
            while not (partitions := consumer.list_topics(topic, timeout=20).topics[topic].partitions):
                assert time.monotonic() < end, f"{topic} is not there"
                time.sleep(0.1)
            consumer.assign([TopicPartition(topic, partition, 0) for partition in partitions])
            while not wanted(found):
                assert time.monotonic() < end, f"{topic}: {len(found)} messages are not enough"
                message = consumer.poll(0.2)
                if message is not None:
                    assert message.error() is None, message.error()
                    found.append(message)
        finally:
            consumer.close()
        return found

    def committed(self, topic: str, group: str) -> tuple[int, int]:
        """Return how many messages a group has committed, and how many there are."""
        consumer = Consumer({"bootstrap.servers": self.address, "group.id": group, "log_level": 0})
        try:
            partitions = [TopicPartition(topic, p) for p in consumer.list_topics(topic, timeout=20).topics[topic].partitions]
            there = sum(consumer.get_watermark_offsets(p, timeout=20)[1] for p in partitions)
            return sum(max(p.offset, 0) for p in consumer.committed(partitions, timeout=20)), there
        finally:
            consumer.close()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


def headers(message: Message) -> dict[str, str]:
    """A message's headers as text."""
    found: Any = message.headers() or []
    return {name: value.decode() for name, value in found}


@contextlib.contextmanager
def running(tool: bool = False) -> Iterator[Broker]:
    """Run a broker until the block ends."""
    broker = Broker(tool)
    try:
        yield broker
    finally:
        broker.close()
