from __future__ import annotations

import gzip
import struct
import tracemalloc
import zlib
from typing import Any

import numpy as np
import pytest

from deployments.imageio.gate import GzipMember, deflate
from scangraph.contracts import errors

NAME = "a.nii.gz"
#: Two sections and a bit; noise, so that none is tiny.
BODY = np.random.default_rng(0).integers(0, 16, 2 * 2**22 + 1000).astype(np.uint8).tobytes()
HEADER = bytes(range(100))
WHOLE = HEADER + BODY
OWN = deflate([memoryview(HEADER), memoryview(BODY)], level=3)
TABLE = range(16, 12 + struct.unpack_from("<H", OWN, 10)[0])


def inflate(data: bytes, length: int = len(WHOLE), **kwargs: Any) -> bytes:
    return GzipMember(memoryview(data), NAME).inflate(length, **kwargs).tobytes()


def changed(data: bytes, at: int, value: bytes) -> bytes:
    return data[:at] + value + data[at + len(value) :]


def flipped(data: bytes, at: int, bit: int = 0) -> bytes:
    return changed(data, at, bytes([data[at] ^ (1 << bit)]))


def with_header(flags: int, fields: bytes, body: bytes = b"hello" * 9) -> bytes:
    """A member with optional header fields."""
    plain = gzip.compress(body, 6, mtime=0)
    return plain[:3] + bytes([flags]) + plain[4:10] + fields + plain[10:]


@pytest.mark.parametrize("level", [0, 1, 2, 3])
def test_everybody_reads_what_is_written(level: int) -> None:
    data = deflate([memoryview(HEADER), memoryview(BODY)], level=level)
    assert gzip.decompress(data) == WHOLE
    assert inflate(data) == WHOLE
    decompressor = zlib.decompressobj(31)
    assert decompressor.decompress(data) == WHOLE
    assert decompressor.eof
    assert not decompressor.unused_data, "one member only"


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_bytes_do_not_depend_on_threads(threads: int) -> None:
    assert deflate([memoryview(HEADER), memoryview(BODY)], level=3, threads=threads) == OWN
    assert inflate(OWN, threads=threads) == WHOLE


def test_sections_are_inflated_on_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(GzipMember, "_inflate_stream")
    assert inflate(OWN) == WHOLE
    with pytest.raises(AttributeError):
        inflate(gzip.compress(WHOLE))


def test_a_large_file_has_larger_sections(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table must fit the extra field's 64 KiB."""
    monkeypatch.setattr("deployments.imageio.gate._SECTION", 64)
    data = deflate([memoryview(HEADER), memoryview(BODY)], level=1)
    assert gzip.decompress(data) == WHOLE
    monkeypatch.delattr(GzipMember, "_inflate_stream")
    assert inflate(data) == WHOLE


@pytest.mark.parametrize("bit", [0, 7])
def test_a_wrong_table_changes_nothing(bit: int) -> None:
    for at in TABLE:
        assert inflate(flipped(OWN, at, bit)) == WHOLE


def test_a_lying_table_changes_nothing() -> None:
    """Sums that are right, sections that are not."""
    at = TABLE.start + 8
    first, second = OWN[at : at + 8], OWN[at + 8 : at + 16]
    assert first != second
    assert inflate(changed(OWN, at, second + first)) == WHOLE
    inflated, deflated = struct.unpack("<II", first)
    assert inflate(changed(OWN, at, struct.pack("<IIII", inflated - 1, deflated, inflated + 1, deflated))) == WHOLE
    merged = struct.pack("<II", 0, 0) + struct.pack("<II", len(HEADER), struct.unpack_from("<I", OWN, TABLE.start + 4)[0])
    assert inflate(changed(OWN, TABLE.start, merged)) == WHOLE


def test_a_stream_that_ends_between_sections_is_refused() -> None:
    """Table, checksum and length are right, but every other reader would stop after the first section."""
    parts = [b"first" * 50, b"second" * 50]
    deflated = [zlib.compress(part, wbits=-15) for part in parts]
    table = b"".join(struct.pack("<II", len(p), len(d)) for p, d in zip(parts, deflated, strict=True))
    extra = b"SG" + struct.pack("<H", len(table)) + table
    whole = b"".join(parts)
    data = b"\x1f\x8b\x08\x04" + bytes(6) + struct.pack("<H", len(extra)) + extra + b"".join(deflated)
    with pytest.raises(errors.IntegrityError):
        inflate(data + struct.pack("<II", zlib.crc32(whole), len(whole)), len(whole))


@pytest.mark.parametrize("where", [0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.999])
def test_damage_in_any_section_is_found(where: float) -> None:
    start = TABLE.stop + 1
    at = start + int(where * (len(OWN) - 8 - start))
    with pytest.raises(errors.ImageFileError) as caught:
        inflate(flipped(OWN, at, 3))
    assert caught.value.code in {"integrity", "truncated", "inflated-too-large"}


@pytest.mark.parametrize("data", [OWN, gzip.compress(WHOLE, 1)], ids=["own", "foreign"])
def test_trailer_is_believed(data: bytes) -> None:
    for at in range(len(data) - 8, len(data)):
        with pytest.raises(errors.IntegrityError, match=f"{NAME}: its checksum"):
            inflate(flipped(data, at))


def test_every_cut_is_truncated() -> None:
    data = deflate([memoryview(b"header"), memoryview(b"body" * 50)], level=3)
    for length in range(2, len(data)):
        with pytest.raises(errors.Truncated, match=NAME):
            inflate(data[:length], 206)


def test_lengths_must_be_exact() -> None:
    with pytest.raises(errors.Truncated, match=f"{len(WHOLE)} of the {len(WHOLE) + 1} bytes"):
        inflate(OWN, len(WHOLE) + 1)
    with pytest.raises(errors.InflatedTooLarge, match=f"past the {len(WHOLE) - 1} bytes"):
        inflate(OWN, len(WHOLE) - 1)


@pytest.mark.parametrize("data", [OWN, gzip.compress(WHOLE, 1)], ids=["own", "foreign"])
@pytest.mark.parametrize(
    ("rest", "kind"), [(OWN, errors.InflatedTooLarge), (b"\x1f\x8b", errors.InflatedTooLarge), (b"\0x", errors.IntegrityError)]
)
def test_nothing_follows(data: bytes, rest: bytes, kind: type[errors.ImageFileError]) -> None:
    with pytest.raises(kind, match=NAME):
        inflate(data + rest)


def test_zeros_may_follow() -> None:
    assert inflate(OWN + bytes(511)) == WHOLE


@pytest.mark.parametrize(
    ("flags", "fields"),
    [
        (8, b"DOE^JANE.nii\0"),
        (16, b"a comment\0"),
        (24, b"DOE^JANE.nii\0a comment\0"),
        (4, b"\x06\0XX\2\0ab"),
        (4, b"\0\0"),
        (4, b"\x03\0abc"),
        (12, b"\x06\0SG\2\0abDOE^JANE\0"),
        (1, b""),
    ],
)
def test_optional_header_fields_are_skipped(flags: int, fields: bytes) -> None:
    assert inflate(with_header(flags, fields), 45) == b"hello" * 9


def test_header_checksum() -> None:
    plain = with_header(2, b"")
    crc = struct.pack("<H", zlib.crc32(plain[:10]) & 0xFFFF)
    assert inflate(plain[:10] + crc + plain[10:], 45) == b"hello" * 9
    with pytest.raises(errors.IntegrityError, match="checksum of gzip's header"):
        inflate(plain[:10] + flipped(crc, 0) + plain[10:], 45)


@pytest.mark.parametrize(
    "data",
    [changed(OWN, 2, b"\7"), changed(OWN, 3, b"\x24"), with_header(8, b"x" * 100_000), with_header(16, b"x" * 100_000)],
    ids=["method", "reserved flag", "endless name", "endless comment"],
)
def test_a_wrong_header_is_damage(data: bytes) -> None:
    with pytest.raises(errors.IntegrityError, match="gzip's header"):
        inflate(data)


@pytest.mark.parametrize("flags", [4, 8, 16, 2])
def test_a_header_may_be_cut(flags: int) -> None:
    with pytest.raises(errors.Truncated, match="inside gzip's header"):
        inflate(with_header(flags, b"ab\xff")[:11])


def test_head_and_check() -> None:
    member = GzipMember(memoryview(OWN), NAME)
    assert member.head(150) == WHOLE[:150]
    assert GzipMember(memoryview(gzip.compress(b"abc")), NAME).head(150) == b"abc"
    member.check(len(WHOLE))
    with pytest.raises(errors.InflatedTooLarge, match="1000 bytes allowed"):
        member.check(1000)
    with pytest.raises(errors.IntegrityError):
        GzipMember(memoryview(flipped(OWN, len(OWN) - 8)), NAME).check(len(WHOLE))


def test_memory_is_bounded() -> None:
    """Neither what a few bytes declare nor what a bomb inflates to is ever allocated."""
    bomb = gzip.compress(bytes(300 * 2**20), 1)
    tracemalloc.start()
    try:
        with pytest.raises(errors.InflatedTooLarge):
            inflate(bomb, 352)
        with pytest.raises(errors.Truncated, match="cannot hold"):
            inflate(bomb, 2**40)
        with pytest.raises(errors.Truncated, match="cannot hold"):
            inflate(gzip.compress(b"72 bytes"), 2**30)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 32 * 2**20
