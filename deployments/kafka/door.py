"""One message: accepted, refused to the dead letters, or held until what is away comes back."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import random
import time
from collections import Counter
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

from confluent_kafka import KafkaError, Message

from deployments.kafka.clients import Headers, Letter, Sender
from scangraph.contracts.api import InputFile
from scangraph.contracts.errors import (
    STATUS_NAMES,
    DoorClosed,
    FatalError,
    InputDigestMismatch,
    NoSuch,
    ScanGraphError,
    TransientError,
    UploadTooLarge,
)
from scangraph.contracts.messages import CORRELATION, DEAD, KEY_PREFIX, MessageInput, ProcessingRequest, read_request
from scangraph.intake import Intake, Principal, fingerprint, keep, path_of, receive, submit, take_back
from scangraph.settings import KafkaSettings
from scangraph.store import accounts, executions, pipelines
from scangraph.store.audit import Access, Recorder
from scangraph.store.files import NewFile
from scangraph.store.tables import File
from scangraph.tracing import Entry, entering

log = logging.getLogger("scangraph")

#: For how long what is known of the account is believed.
_STANDING_SECONDS = 1.0
#: Times that a message is tried when nobody knows what is wrong: it may be the message.
_ATTEMPTS = 3
_SHORTEST_PAUSE = 0.2
_ALWAYS = datetime.max.replace(tzinfo=UTC)


class Unforeseen(FatalError):
    """The service stumbled over a message, again and again."""

    code, title = "internal-error", "The service failed"
    template = "The service failed at this message ({kind}); its log says where."


class Door:
    """Settles messages.

    Parameters
    ----------
    intake : Intake
        Takes work in.
    sender : Sender
        Takes dead letters away.

    Attributes
    ----------
    counts : Counter
        `accepted`, `known` (accepted before) and `refused` messages, and `tries` that found something away.
    held : int
        Messages that wait for what is away.
    """

    def __init__(self, intake: Intake, sender: Sender) -> None:
        self._intake, self._sender = intake, sender
        self._settings: KafkaSettings = intake.settings.kafka
        self.counts: Counter[str] = Counter()
        self.held = 0
        self._principal: tuple[float, Principal] | None = None
        self._audit = Recorder(intake.store)

    async def settle(self, message: Message) -> None:
        """Return when a message need not come again: its execution is in the records, or it is among the dead letters.

        What is away is waited for, however long; a refusal is the message's own fault only.
        """
        traceparent = dict(message.headers() or []).get("traceparent")
        sent = traceparent.decode(errors="replace") if isinstance(traceparent, bytes) else None
        with entering("kafka", "request", sent) as entry:
            entry.received = len(message.value() or b"")
            await self._settle(message, entry)

    async def _settle(self, message: Message, entry: Entry) -> None:
        tries = failures = 0
        while True:
            try:
                await self._accept(message)
                entry.code = "OK"
                return
            except TransientError as error:
                self._note_held(message, tries, error)
            except ScanGraphError as error:
                entry.code = STATUS_NAMES[error.status].grpc
                if await self._refuse(message, error):
                    return
            except Exception as error:  # the process boundary: one message must not end the reading
                failures += 1
                entry.code = "INTERNAL"
                log.exception("Kafka: %s stumbled (%d of %d)", _place(message), failures, _ATTEMPTS)
                if failures >= _ATTEMPTS and await self._refuse(message, Unforeseen(kind=type(error).__name__)):
                    return
            self.counts["tries"] += 1
            self.held += 1
            try:
                longest = min(_SHORTEST_PAUSE * 2**tries, self._settings.longest_pause_seconds)
                await asyncio.sleep(random.uniform(longest / 2, longest))  # noqa: S311 – no secret
            finally:
                self.held -= 1
            tries = min(tries + 1, 20)

    def _note_held(self, message: Message, tries: int, error: TransientError) -> None:
        if tries == 0:
            log.warning("Kafka: %s is held: %s", _place(message), error.code)

    # --- accepting -------------------------------------------------------------------------------------------------------

    async def _accept(self, message: Message) -> None:
        headers = dict(message.headers() or [])
        named = headers.get(CORRELATION)
        request = read_request(message.value(), named.decode(errors="replace") if isinstance(named, bytes) else named)
        intake, principal = self._intake, await self._account()
        key = (KEY_PREFIX + request.correlation_id, fingerprint("kafka", request.model_dump(mode="json")))
        if known_as := await executions.replay(intake.store, principal.account_id, key):
            await self._note(principal, known_as)
            self.counts["known"] += 1
            return
        stored = await pipelines.find_pipeline(intake.store, request.pipeline_id)
        files: list[NewFile] = []
        rows: list[File] = []
        try:
            inputs = await self._inputs(principal, request, files)
            rows = await keep(intake, files)
            execution_id, known = await submit(intake, principal, stored, inputs, request.parameters, request.priority, key)
        except BaseException:
            await take_back(intake, files, rows)
            raise
        if known:
            await take_back(intake, files, rows)
        await self._note(principal, execution_id)
        self.counts["known" if known else "accepted"] += 1

    async def _note(self, principal: Principal, execution_id: str) -> None:
        """Write down who had data worked on. Where this fails the message comes again, finds its execution, and comes here."""
        access = Access(principal.account_id, principal.name, "kafka", "request", "OK", "execution", execution_id)
        await self._audit.note(access, repeats=True)

    async def _inputs(self, principal: Principal, request: ProcessingRequest, files: list[NewFile]) -> dict[str, Any]:
        """Return the inputs as the intake takes them; what is inside the message becomes a file, and is added to `files`."""
        inputs: dict[str, Any] = {}
        for name, given in request.inputs.items():
            listed = given if isinstance(given, list) else [given]
            found = [await self._input(principal, name, one, files) for one in listed]
            inputs[name] = found if isinstance(given, list) else found[0]
        return inputs

    async def _input(self, principal: Principal, name: str, given: MessageInput, files: list[NewFile]) -> InputFile:
        if given.uri is not None:
            path = path_of(self._intake, given.uri)
            return InputFile(path=path, sha256=given.sha256, label_scheme=given.label_scheme)
        if given.file_id is not None:
            return InputFile(file_id=given.file_id, sha256=given.sha256, label_scheme=given.label_scheme)
        limit = self._settings.max_inline_bytes
        if len(given.data or "") > 4 * (limit // 3 + 1):
            raise UploadTooLarge(limit=limit)
        content = given.content()
        found = hashlib.sha256(content).hexdigest()
        if given.sha256 not in {None, found}:
            raise InputDigestMismatch(name=name, announced=given.sha256, found=found)

        async def pieces() -> AsyncIterator[bytes]:
            yield content

        file = await receive(self._intake, principal, given.filename, pieces(), limit)
        files.append(file)
        return InputFile(file_id=file.id, label_scheme=given.label_scheme)

    async def _account(self) -> Principal:
        """Return whose executions they are.

        Raises
        ------
        DoorClosed
            While there is no such account, or it may not run anything: that is not the message's fault.
        """
        if self._principal is not None and self._principal[0] > time.monotonic():
            return self._principal[1]
        name = self._settings.account
        try:
            row = await accounts.find_account(self._intake.store, name)
        except NoSuch:
            hint = f"`scangraph accounts add {name} --service` makes one"
            raise DoorClosed(door="Kafka", reason=f"there is no account {name!r}; {hint}") from None
        principal = Principal(row.id, row.name, row.role, "", _ALWAYS, row.token_epoch)  # type: ignore[arg-type]
        if row.disabled_at is not None or not principal.may("operator"):
            raise DoorClosed(door="Kafka", reason=f"the account {name!r} is disabled, or no operator")
        self._principal = (time.monotonic() + _STANDING_SECONDS, principal)
        return principal

    # --- refusing --------------------------------------------------------------------------------------------------------

    async def _refuse(self, message: Message, error: ScanGraphError) -> bool:
        """Put a message among the dead letters as it came, with the reason; whether the broker has it."""
        headers: Headers = [*(message.headers() or []), *_reason(message, error)]
        letter = Letter(self._settings.dead_letter_topic, message.key(), message.value(), headers)
        (answer,) = await self._sender.send([letter])
        if answer is not None and answer.code() == KafkaError.MSG_SIZE_TOO_LARGE:
            # It was just small enough without the reason. It is named; its topic keeps it for as long as it keeps anything.
            value = message.value() or b""
            dropped: Headers = [
                (f"{DEAD}value-bytes", str(len(value)).encode()),
                (f"{DEAD}value-sha256", hashlib.sha256(value).hexdigest().encode()),
            ]
            (answer,) = await self._sender.send([letter._replace(value=None, headers=[*_reason(message, error), *dropped])])
        if answer is not None:
            log.warning("Kafka: %s cannot be put among the dead letters: %s", _place(message), answer.str())
            return False
        log.warning("Kafka: %s is refused: %s", _place(message), error.code)
        self.counts["refused"] += 1
        return True


def _reason(message: Message, error: ScanGraphError) -> Headers:
    told = {
        "code": error.code,
        "status": str(error.status),
        "title": error.title,
        "detail": error.detail[:4096],
        "errors": json.dumps(error.fields["errors"])[:16384] if error.fields.get("errors") else None,
        "topic": message.topic(),
        "partition": str(message.partition()),
        "offset": str(message.offset()),
        "at": datetime.now(UTC).isoformat(),
    }
    return [(DEAD + name, value.encode()) for name, value in told.items() if value is not None]


def _place(message: Message) -> str:
    """Name a message in the log by nothing of what it says."""
    return f"{message.topic()}[{message.partition()}]@{message.offset()}"
