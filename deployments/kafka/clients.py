"""librdkafka's clients: how they are set up, and a producer that says when the broker has what it was given."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

from confluent_kafka import KafkaError, KafkaException, Message, Producer

from scangraph.contracts.errors import InvalidSetting
from scangraph.settings import KafkaSettings

log = logging.getLogger("scangraph")

Headers = list[tuple[str, str | bytes | None]]
#: How long the question whether the brokers are there may take.
_ASK_SECONDS = 3.0
#: More than any broker takes: what is too large is for the broker to say.
_ANY_SIZE = 1_000_000_000
_POLL_SECONDS = 0.2


class Letter(NamedTuple):
    """What is given to the broker."""

    topic: str
    key: bytes | None
    value: bytes | None
    headers: Headers


class Line:
    """What is known of the line to the brokers. Its troubles are logged once, not as often as they are met."""

    def __init__(self) -> None:
        self.up: bool | None = None
        self.trouble: str | None = None

    def heard(self, error: KafkaError | None) -> None:
        """Note what a client met, None where it met the broker."""
        if error is None:
            if self.up is False:
                log.warning("the Kafka brokers answer again")
            self.up, self.trouble = True, None
            return
        if error.code() in _AWAY:
            if self.up is not False:
                log.warning("the Kafka brokers do not answer (%s); nothing is lost, and all goes on when they do", error.name())
            self.up = False
        elif self.trouble != error.str():
            log.warning("Kafka: %s", error.str())
        self.trouble = error.str()


_AWAY = {KafkaError._ALL_BROKERS_DOWN, KafkaError._TRANSPORT, KafkaError._TIMED_OUT, KafkaError._RESOLVE}


def configuration(settings: KafkaSettings) -> dict[str, Any]:
    """Return what all clients are set up with."""
    s = settings
    found: dict[str, Any] = {
        "client.id": "scangraph",
        "log_level": 0,  # what matters is heard as an error, and told by `Line`
        "topic.metadata.refresh.interval.ms": 10_000,
        "reconnect.backoff.max.ms": 2_000,
        **s.options,
        "bootstrap.servers": s.bootstrap_servers,
        "security.protocol": s.security_protocol,
    }
    if s.sasl_username:
        found |= {
            "sasl.mechanism": s.sasl_mechanism,
            "sasl.username": s.sasl_username,
            "sasl.password": s.sasl_password.get_secret_value(),
        }
    files = {"ssl.ca.location": s.ca_file, "ssl.certificate.location": s.certificate_file, "ssl.key.location": s.key_file}
    found |= {name: str(path) for name, path in files.items() if path is not None}
    if s.key_password.get_secret_value():
        found["ssl.key.password"] = s.key_password.get_secret_value()
    return found


def check_configuration(settings: KafkaSettings) -> None:
    """Make a client of the settings and let it go again, so that what librdkafka refuses is refused at the start.

    Raises
    ------
    InvalidSetting
    """
    try:
        Producer(configuration(settings))
    except (KafkaException, ValueError, TypeError) as error:
        reason = error.args[0].str() if isinstance(error, KafkaException) else str(error)
        raise InvalidSetting(section="kafka", reason=reason) from None


class Sender:
    """A producer that never gives up: what it was given is tried until the broker has it, in order.

    confluent-kafka's asyncio producer takes no headers, so this is the plain one, with a thread that hears its reports.

    Parameters
    ----------
    settings : KafkaSettings
        Whose brokers.
    line : Line
        Told of troubles.
    """

    def __init__(self, settings: KafkaSettings, line: Line) -> None:
        self._line, self._closed = line, threading.Event()
        self._configuration = {
            **configuration(settings),
            "enable.idempotence": True,  # no reordering and no doubling by the client's own repeating
            "message.timeout.ms": 0,
            "message.max.bytes": _ANY_SIZE,
            "linger.ms": 5,
            "error_cb": line.heard,
        }
        self._producer = Producer(self._configuration)
        self._thread = threading.Thread(target=self._hear, name="kafka reports", daemon=True)
        self._thread.start()

    def _hear(self) -> None:
        while not self._closed.is_set():
            self._producer.poll(_POLL_SECONDS)

    async def send(self, letters: Sequence[Letter]) -> list[KafkaError | None]:
        """Send, wait until the broker has answered for each, however long, and return what it said: None for got it."""
        producer = self._producer
        answers = await asyncio.gather(*(self._produce(producer, letter) for letter in letters))
        fatal = next((error for error in answers if error is not None and error.fatal()), None)
        if fatal is not None and producer is self._producer:  # it will take nothing any more
            log.error("Kafka: the producer is made anew after %s", fatal.str())
            self._producer = Producer(self._configuration)
            producer.purge()
            await asyncio.to_thread(producer.flush, 1)  # the others that wait for it hear that it is over
        return list(answers)

    @staticmethod
    def _produce(producer: Producer, letter: Letter) -> asyncio.Future[KafkaError | None]:
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[KafkaError | None] = loop.create_future()
        report = functools.partial(_report, loop, answer)
        try:
            producer.produce(letter.topic, letter.value, letter.key, on_delivery=report, headers=letter.headers)
        except KafkaException as error:
            answer.set_result(error.args[0])
        except BufferError:
            answer.set_result(KafkaError(KafkaError._QUEUE_FULL))
        return answer

    async def ask(self) -> None:
        """Ask the brokers whether they are there, and tell the line."""
        try:
            await asyncio.to_thread(self._producer.list_topics, timeout=_ASK_SECONDS)
        except KafkaException as error:
            self._line.heard(error.args[0])
        else:
            self._line.heard(None)

    def close(self) -> None:
        """Let go of what was not sent."""
        self._closed.set()
        self._thread.join()
        self._producer.purge()
        self._producer.flush(1)


def _report(
    loop: asyncio.AbstractEventLoop, answer: asyncio.Future[KafkaError | None], error: KafkaError | None, _: Message
) -> None:
    def note() -> None:
        if not answer.done():
            answer.set_result(error)

    with contextlib.suppress(RuntimeError):  # the loop has ended
        loop.call_soon_threadsafe(note)
