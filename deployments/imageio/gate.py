"""Gzip in and out (RFC 1952): one member, inflated to its end, with the right checksum and length, and nothing behind it.

A deflate stream can only be inflated from its start, on one core. So `deflate` compresses sections that know nothing of each
other, as pigz does, which gives one ordinary member; where they begin is written into the header's extra field, which other
readers skip. `inflate` takes that table as a hint on how to use all cores and believes only the checksum: where the table does
not fit the stream, the stream is inflated from its start like anybody else's.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate

import numpy as np
from isal import igzip_lib, isal_zlib
from numpy.typing import NDArray

from scangraph.contracts.errors import InflatedTooLarge, IntegrityError, Truncated

_MAGIC = b"\x1f\x8b"
_DEFLATED = 8
_CHECKED, _EXTRA, _NAMED, _COMMENTED, _RESERVED = 2, 4, 8, 16, 0xE0
_UNKNOWN_SYSTEM = 255
_HEADER_BYTES, _TRAILER_BYTES = 10, 8
_LONGEST_TEXT = 2**16
#: Deflate codes at best 258 bytes in 2 bits; a file that declares more than this cannot be whole.
_BEST_RATIO = 1032
_RAW_WBITS = -15
_PIECE = 2**20
_INPUT = 2**16
#: Measured: smaller ones cost time between them, larger ones leave cores idle at the end of a mask.
_SECTION = 2**22
#: The extra field's table of sections: two letters, then (inflated, deflated) bytes of each. Its length is a 16-bit number.
_TABLE = b"SG"
_MOST_SECTIONS = 8000
_DAMAGED = "it was damaged, send it again"
_CUT = "it was cut, send it again"


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def is_gzip(data: memoryview) -> bool:
    """Whether the first bytes, as far as they are there, are gzip's."""
    return _MAGIC.startswith(bytes(data[: len(_MAGIC)]))


def deflate(parts: Sequence[memoryview], *, level: int, threads: int | None = None) -> bytes:
    """Compress parts, one after the other, into one gzip member.

    Parameters
    ----------
    parts : sequence of memoryview
        Bytes. The result depends on them and on `level` alone.
    level : int
        ISA-L's, 0 to 3.
    threads : int, optional
        Sections that are compressed at once; all cores by default.
    """
    size = max(_SECTION, -(-sum(map(len, parts)) // (_MOST_SECTIONS - len(parts))))
    sections = [part[start : start + size] for part in parts for start in range(0, len(part), size)]

    def compress(number: int) -> tuple[bytes, int]:
        compressor = isal_zlib.compressobj(level, isal_zlib.DEFLATED, _RAW_WBITS)
        last = number == len(sections) - 1
        deflated = compressor.compress(sections[number])
        deflated += compressor.flush(isal_zlib.Z_FINISH if last else isal_zlib.Z_FULL_FLUSH)
        return deflated, isal_zlib.crc32(sections[number])

    with ThreadPoolExecutor(threads or cores()) as pool:
        done = list(pool.map(compress, range(len(sections))))
    crc = _combine([crc for _, crc in done], [len(section) for section in sections])
    table = b"".join(struct.pack("<II", len(s), len(d)) for s, (d, _) in zip(sections, done, strict=True))
    extra = _TABLE + struct.pack("<H", len(table)) + table
    # No time and no system in the header: equal volumes are equal files.
    header = _MAGIC + struct.pack("<BBIBBH", _DEFLATED, _EXTRA, 0, 0, _UNKNOWN_SYSTEM, len(extra)) + extra
    trailer = struct.pack("<II", crc, sum(map(len, sections)) % 2**32)
    return b"".join([header, *(deflated for deflated, _ in done), trailer])


class GzipMember:
    """A file that must be one gzip member and nothing else.

    Parameters
    ----------
    data : memoryview
        The whole file, as bytes.
    name : str
        What it is called in messages.

    Raises
    ------
    Truncated
        If the file ends inside gzip's header; the methods raise it if it ends later than that.
    IntegrityError
        If gzip's header is damaged; the methods raise it for what follows, checksum included.
    """

    def __init__(self, data: memoryview, name: str) -> None:
        self._data, self._name = data, name
        self._start, self._sections = _read_header(data, name)

    def head(self, length: int) -> bytes:
        """Return the first `length` inflated bytes, or all of a shorter stream."""
        stream, head = _Stream(self._data, self._start, self._name), b""
        while len(head) < length and (piece := stream.read(length - len(head))):
            head += piece
        return head

    def check(self, limit: int) -> None:
        """Inflate all of it, keep nothing, and raise what is wrong with it; InflatedTooLarge past `limit` bytes."""
        stream = _Stream(self._data, self._start, self._name)
        while stream.read(_PIECE):
            if stream.length > limit:
                raise InflatedTooLarge(name=self._name, reason=f"it inflates past the {limit} bytes allowed")
        stream.finish()

    def inflate(self, length: int, *, threads: int | None = None) -> NDArray[np.uint8]:
        """Inflate all of it, which must be exactly `length` bytes.

        Returns
        -------
        ndarray
            (length,) uint8, read-only.

        Raises
        ------
        Truncated
            If there are fewer bytes.
        InflatedTooLarge
            If there are more, or another member follows.
        IntegrityError
            If stream, checksum or recorded length are wrong, or anything but zeros follows.
        """
        if length > _BEST_RATIO * len(self._data):
            self.check(length)
            size = len(self._data)
            raise Truncated(name=self._name, reason=f"it declares {length} bytes, and {size} compressed ones cannot hold them")
        out = np.empty(length, np.uint8)
        view = memoryview(out.data)
        if not self._inflate_sections(view, threads or cores()):
            self._inflate_stream(view)
        out.flags.writeable = False
        return out

    def _inflate_sections(self, out: memoryview, threads: int) -> bool:
        """Inflate by the table of sections, all at once; False, with anything in `out`, where the table does not fit."""
        inflated, deflated = ([section[i] for section in self._sections] for i in (0, 1))
        if sum(inflated) != len(out) or self._start + sum(deflated) + _TRAILER_BYTES != len(self._data):
            return False
        into = list(accumulate(inflated, initial=0))
        begin = list(accumulate(deflated, initial=self._start))

        def section(number: int) -> int | None:
            inflater = igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_DEFLATE)
            # One byte more than it may hold, so that the inflater goes on to the section's end.
            piece = inflater.decompress(self._data[begin[number] : begin[number + 1]], inflated[number] + 1)
            last = number == len(inflated) - 1
            whole = inflater.eof and not inflater.unused_data if last else inflater.needs_input and not inflater.eof
            if not whole or len(piece) != inflated[number]:
                return None
            out[into[number] : into[number + 1]] = piece
            return isal_zlib.crc32(piece)

        try:
            with ThreadPoolExecutor(threads) as pool:
                crcs = [crc for crc in pool.map(section, range(len(inflated))) if crc is not None]
        except igzip_lib.IsalError:  # type: ignore[misc] # its stub forgets the base class
            return False
        trailer = struct.pack("<II", _combine(crcs, inflated), len(out) % 2**32) if len(crcs) == len(inflated) else b""
        return trailer == self._data[begin[-1] :]

    def _inflate_stream(self, out: memoryview) -> None:
        stream, length = _Stream(self._data, self._start, self._name), 0
        while length < len(out) and (piece := stream.read(min(_PIECE, len(out) - length))):
            out[length : length + len(piece)] = piece
            length += len(piece)
        if stream.read(1):
            raise InflatedTooLarge(name=self._name, reason=f"it inflates past the {len(out)} bytes its header declares")
        stream.finish()
        if length < len(out):
            reason = f"it has {length} of the {len(out)} bytes its header declares; {_CUT}"
            raise Truncated(name=self._name, reason=reason)


class _Stream:
    """A deflate stream, inflated piece by piece from its start."""

    def __init__(self, data: memoryview, start: int, name: str) -> None:
        self._data, self._next, self._name = data, start, name
        self._inflater = igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_DEFLATE)
        self._crc = 0
        self.length = 0

    def read(self, most: int) -> bytes:
        """Return the next 1 to `most` bytes, or none at the stream's end."""
        while not self._inflater.eof:
            given = self._data[self._next : self._next + _INPUT] if self._inflater.needs_input else self._data[:0]
            if self._inflater.needs_input and not given:
                raise Truncated(name=self._name, reason=f"it ends after {self.length} inflated bytes; {_CUT}")
            self._next += len(given)
            try:
                piece: bytes = self._inflater.decompress(given, most)
            except igzip_lib.IsalError:  # type: ignore[misc] # its stub forgets the base class
                reason = f"its compressed data is wrong after {self.length} inflated bytes; {_DAMAGED}"
                raise IntegrityError(name=self._name, reason=reason) from None
            if piece:
                self._crc = isal_zlib.crc32(piece, self._crc)
                self.length += len(piece)
                return piece
        return b""

    def finish(self) -> None:
        """Check what follows the stream: its checksum and length, and then nothing.

        Zeros are nothing: tapes and block devices pad with them, and gzip ignores them.
        """
        end = self._next - len(self._inflater.unused_data)
        trailer, rest = self._data[end : end + _TRAILER_BYTES], bytes(self._data[end + _TRAILER_BYTES :])
        if len(trailer) < _TRAILER_BYTES:
            raise Truncated(name=self._name, reason=f"it ends before its checksum; {_CUT}")
        if struct.unpack("<II", trailer) != (self._crc, self.length % 2**32):
            raise IntegrityError(name=self._name, reason=f"its checksum does not fit its {self.length} bytes; {_DAMAGED}")
        if rest.startswith(_MAGIC):
            raise InflatedTooLarge(name=self._name, reason="a second compressed member follows the image")
        if rest.strip(b"\0"):
            raise IntegrityError(name=self._name, reason="other data follows the image")


def _read_header(data: memoryview, name: str) -> tuple[int, list[tuple[int, int]]]:
    """Return where the deflate stream begins, and the table of its sections, empty where there is none."""
    if len(data) < _HEADER_BYTES:
        raise Truncated(name=name, reason=f"it ends inside gzip's header; {_CUT}")
    method, flags = data[2], data[3]
    if method != _DEFLATED or flags & _RESERVED:
        raise IntegrityError(name=name, reason=f"gzip's header is wrong; {_DAMAGED}")
    start, sections = _HEADER_BYTES, []
    if flags & _EXTRA:
        length = int.from_bytes(data[start : start + 2], "little")
        sections = _find_table(bytes(data[start + 2 : start + 2 + length]))
        start += 2 + length
    for flag in (_NAMED, _COMMENTED):
        if flags & flag:  # skipped unread: a file's name may be a patient's
            length = bytes(data[start : start + _LONGEST_TEXT]).find(0)
            if length < 0 and start + _LONGEST_TEXT < len(data):
                raise IntegrityError(name=name, reason=f"gzip's header has no end; {_DAMAGED}")
            start = len(data) if length < 0 else start + length + 1
    if flags & _CHECKED:
        checksum = bytes(data[start : start + 2])
        if len(checksum) == 2 and checksum != struct.pack("<H", isal_zlib.crc32(data[:start]) % 2**16):
            raise IntegrityError(name=name, reason=f"the checksum of gzip's header is wrong; {_DAMAGED}")
        start += 2
    if start >= len(data):
        raise Truncated(name=name, reason=f"it ends inside gzip's header; {_CUT}")
    return start, sections


def _find_table(extra: bytes) -> list[tuple[int, int]]:
    """Return the (inflated, deflated) bytes of each section from gzip's extra field."""
    while len(extra) >= 4:
        length = int.from_bytes(extra[2:4], "little")
        field = extra[4 : 4 + length]
        if extra[:2] == _TABLE and len(field) % 8 == 0:
            return [(inflated, deflated) for inflated, deflated in struct.iter_unpack("<II", field)]
        extra = extra[4 + length :]
    return []


def _combine(crcs: Sequence[int], lengths: Sequence[int]) -> int:
    """Return the checksum of the whole from those of its parts."""
    total = 0
    for crc, length in zip(crcs, lengths, strict=True):
        total = isal_zlib.crc32_combine(total, crc, length)
    return total
