"""A guard before a broker: TLS, and a name and password asked for by SASL, as secured brokers ask.

librdkafka's mock cluster knows neither. The guard speaks what comes before the first real request (KIP-43, KIP-152; SCRAM is
RFC 5802) and passes on the rest. Answers name brokers by address: that is replaced by the guard's, of the same length.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import hmac
import secrets
import ssl
import struct
from collections.abc import Iterator
from pathlib import Path

from tests.servers import Loop

API_VERSIONS, SASL_HANDSHAKE, SASL_AUTHENTICATE = 18, 17, 36
_REFUSED, _UNKNOWN_MECHANISM = 58, 33
_ROUNDS = 4096


class Guard:
    """Listens on `address`, and lets those pass who know the password.

    Parameters
    ----------
    broker : str
        Where the broker listens, `127.0.0.1:port`.
    mechanism : str or None
        `PLAIN` or `SCRAM-SHA-512`; None: nobody is asked for a name.
    certificate : pathlib.Path or None
        Of the guard, its key beside it; None: no TLS.
    clients : pathlib.Path or None
        Certificate that clients must have.

    Attributes
    ----------
    passed, refused : int
        Connections.
    """

    name, password = "scangraph", "correct horse battery"

    def __init__(
        self, broker: str, mechanism: str | None, certificate: Path | None = None, clients: Path | None = None
    ) -> None:
        host, _, port = broker.rpartition(":")
        self._behind, self._mechanism, self._thread = (host, int(port)), mechanism, Loop()
        self.passed = self.refused = 0
        tls = None
        if certificate is not None:
            tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            tls.load_cert_chain(certificate, certificate.with_name("key.pem"))
            if clients is not None:
                tls.load_verify_locations(clients)
                tls.verify_mode = ssl.CERT_REQUIRED
        self._server = self._thread.run(self._listen(tls))
        self._port = self._server.sockets[0].getsockname()[1]
        self.address = f"127.0.0.1:{self._port}"

    async def _listen(self, tls: ssl.SSLContext | None) -> asyncio.Server:
        return await asyncio.start_server(self._meet, "127.0.0.1", 0, ssl=tls)

    async def _meet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up, down = await asyncio.open_connection(*self._behind)
        try:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                if self._mechanism is None or await self._asked(reader, writer, up, down):
                    self.passed += 1
                    ways = [
                        asyncio.ensure_future(self._pass_up(reader, down)),
                        asyncio.ensure_future(self._pass_down(up, writer)),
                    ]
                    try:
                        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
                    finally:
                        for way in ways:
                            way.cancel()
        finally:
            for line in (writer, down):
                line.transport.abort()

    # --- who is it? ----------------------------------------------------------------------------------------------------------

    async def _asked(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, up: asyncio.StreamReader, down: asyncio.StreamWriter
    ) -> bool:
        scram = _Scram(self.name, self.password)
        while True:
            frame = await _frame(reader)
            key, version, number = struct.unpack_from(">hhi", frame)
            body = _after_client(frame)
            if key == API_VERSIONS:
                _send(down, frame)
                answer = await _frame(up)
                _send(writer, _with_sasl(answer, version))
            elif key == SASL_HANDSHAKE:
                wanted = body[2:].decode()
                known = str(self._mechanism).encode()
                error = 0 if wanted == self._mechanism else _UNKNOWN_MECHANISM
                _send(writer, struct.pack(">ihih", number, error, 1, len(known)) + known)
            elif key == SASL_AUTHENTICATE:
                said = body[4:]
                told = scram.answer(said) if self._mechanism != "PLAIN" else self._plain(said)
                if told is None:
                    self.refused += 1
                    reason = b"who are you?"
                    _send(writer, struct.pack(">ihh", number, _REFUSED, len(reason)) + reason + struct.pack(">i", 0))
                    await writer.drain()
                    return False
                session = struct.pack(">q", 0) if version >= 1 else b""
                _send(writer, struct.pack(">ihhi", number, 0, -1, len(told)) + told + session)
                if self._mechanism == "PLAIN" or scram.known:
                    return True
            else:  # a request before the password
                self.refused += 1
                return False

    def _plain(self, said: bytes) -> bytes | None:
        return b"" if said == f"\0{self.name}\0{self.password}".encode() else None

    # --- the rest ------------------------------------------------------------------------------------------------------------

    @staticmethod
    async def _pass_up(reader: asyncio.StreamReader, down: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                down.write(data)
                await down.drain()

    async def _pass_down(self, up: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host = self._behind[0].encode()
        theirs, ours = (host + struct.pack(">i", port) for port in (self._behind[1], self._port))
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while True:
                _send(writer, (await _frame(up)).replace(theirs, ours))
                await writer.drain()

    def close(self) -> None:
        """End."""

        async def end() -> None:
            self._server.close()
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.wait(others, timeout=2) if others else None

        self._thread.run(end())
        self._thread.stop()


class _Scram:
    """The server's side of SCRAM-SHA-512, without channel binding."""

    def __init__(self, name: str, password: str) -> None:
        self._name, self._password, self.known = name, password, False
        self._first = self._answer = ""

    def answer(self, said: bytes) -> bytes | None:
        """Return what follows what the client said; None where it is not whom it says it is."""
        text = said.decode()
        if not self._first:
            self._first = text.removeprefix("n,,")
            fields = dict(part.split("=", 1) for part in self._first.split(","))
            self._salt = secrets.token_bytes(16)
            nonce, salt = fields["r"] + secrets.token_hex(8), base64.b64encode(self._salt).decode()
            self._answer = f"r={nonce},s={salt},i={_ROUNDS}"
            return self._answer.encode() if fields["n"] == self._name else None
        bare, _, proof = text.rpartition(",p=")
        salted = hashlib.pbkdf2_hmac("sha512", self._password.encode(), self._salt, _ROUNDS)
        signed = f"{self._first},{self._answer},{bare}".encode()
        key = hmac.digest(salted, b"Client Key", "sha512")
        signature = hmac.digest(hashlib.sha512(key).digest(), signed, "sha512")
        expected = bytes(a ^ b for a, b in zip(key, signature, strict=True))
        self.known = hmac.compare_digest(base64.b64decode(proof), expected)
        server = hmac.digest(hmac.digest(salted, b"Server Key", "sha512"), signed, "sha512")
        return b"v=" + base64.b64encode(server) if self.known else None


async def _frame(reader: asyncio.StreamReader) -> bytes:
    return await reader.readexactly(int.from_bytes(await reader.readexactly(4)))


def _send(writer: asyncio.StreamWriter, frame: bytes) -> None:
    writer.write(len(frame).to_bytes(4) + frame)


def _after_client(frame: bytes) -> bytes:
    (length,) = struct.unpack_from(">h", frame, 8)
    return frame[10 + max(length, 0) :]


def _with_sasl(answer: bytes, version: int) -> bytes:
    """Add the two requests of SASL to an answer that says which there are (ApiVersions 0-3)."""
    added = [(SASL_HANDSHAKE, 0, 1), (SASL_AUTHENTICATE, 0, 1)]
    if version < 3:
        (count,) = struct.unpack_from(">i", answer, 6)
        more = b"".join(struct.pack(">hhh", *entry) for entry in added)
        return answer[:6] + struct.pack(">i", count + len(added)) + more + answer[10:]
    assert answer[6] + len(added) < 128  # a count of one byte
    more = b"".join(struct.pack(">hhhB", *entry, 0) for entry in added)
    return answer[:6] + bytes([answer[6] + len(added)]) + more + answer[7:]


@contextlib.contextmanager
def guarded(
    broker: str, mechanism: str | None, certificate: Path | None = None, clients: Path | None = None
) -> Iterator[Guard]:
    """Run a guard until the block ends."""
    guard = Guard(broker, mechanism, certificate, clients)
    try:
        yield guard
    finally:
        guard.close()
