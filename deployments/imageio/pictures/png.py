"""PNG (ISO/IEC 15948)."""

from __future__ import annotations

import struct
import zlib
from typing import Any

import imagecodecs
import numpy as np
from numpy.typing import NDArray

from deployments.imageio.pictures.colour import to_srgb
from deployments.imageio.pictures.exif import Exif, read_exif
from deployments.imageio.pictures.found import Found, PictureLimits, per_inch
from scangraph.contracts.errors import IntegrityError, InvalidHeader, Truncated, UnsupportedDimensions

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
#: Colour type -> (values a pixel has, bits they may have).
_TYPES = {0: (1, {1, 2, 4, 8, 16}), 2: (3, {8, 16}), 3: (1, {1, 2, 4, 8}), 4: (2, {8, 16}), 6: (4, {8, 16})}
#: What the decoder is shown; texts, times and profiles are not.
_SHOWN = frozenset({b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"})
_BEST_RATIO = 1032
_MAX_PROFILE = 4 * 2**20
_METRE = 1
#: As fast as it gets: rows as differences, runs only. Photographs deflate hardly better at any level.
_LEVEL, _STRATEGY_RLE, _FILTER_SUB = 1, 3, 16


def read(data: bytes, name: str, limits: PictureLimits) -> Found:
    """Read a file; see `pictures.read_picture`."""
    chunks = _chunks(data, name) if data.startswith(_SIGNATURE) else []
    if not chunks or chunks[0][0] != b"IHDR" or len(chunks[0][1]) != 13:
        raise InvalidHeader(name=name, reason="it does not begin with its size")
    width, height, bits, colour, deflate, filtering, interlaced = struct.unpack(">IIBBBBB", chunks[0][1])
    if colour not in _TYPES or bits not in _TYPES[colour][1] or deflate or filtering or interlaced > 1:
        raise InvalidHeader(name=name, reason=f"colour type {colour} of {bits} bits, or its coding, is none of PNG's")
    limits.check(name, [(width, height)])
    found = {kind: bytes(content) for kind, content in chunks if kind in {b"eXIf", b"pHYs", b"iCCP", b"acTL"}}
    if b"acTL" in found:
        raise UnsupportedDimensions(name=name, reason="it is an animation")
    declared = height * (1 + (width * bits * _TYPES[colour][0] + 7) // 8)
    deflated = sum(len(content) for kind, content in chunks if kind == b"IDAT")
    if declared > _BEST_RATIO * deflated:
        raise Truncated(name=name, reason=f"it declares {declared} bytes, and {deflated} compressed ones cannot hold them")
    plain = b"".join([_SIGNATURE, *(_chunk(kind, content) for kind, content in chunks if kind in _SHOWN)])
    try:
        page = imagecodecs.png_decode(plain)
    except (imagecodecs.PngError, ValueError) as error:
        raise IntegrityError(name=name, reason=f"{error}; it was damaged, send it again") from None
    page = np.asarray(page) if page.ndim == 3 else np.asarray(page)[..., None]
    exif = read_exif(found[b"eXIf"]) if b"eXIf" in found else Exif()
    profile = _profile(found[b"iCCP"], name) if b"iCCP" in found else None
    return Found([to_srgb(page, profile, name)], exif.orientation, _resolution(found.get(b"pHYs", b"")) or exif.dpi)


def write(page: NDArray[Any], dpi: tuple[float, float] | None) -> bytes:
    """Encode a page; nothing is lost."""
    data = bytes(imagecodecs.png_encode(page, _LEVEL, strategy=_STRATEGY_RLE, filter=_FILTER_SUB))
    if dpi is None:
        return data
    physical = _chunk(b"pHYs", struct.pack(">IIB", *(min(max(round(value / 0.0254), 1), 2**31 - 1) for value in dpi), _METRE))
    end = len(_SIGNATURE) + 25  # IHDR goes first, and is always this long
    return data[:end] + physical + data[end:]


def _chunks(data: bytes, name: str) -> list[tuple[bytes, memoryview]]:
    """Return all chunks, each with the right checksum, up to the end of the file and no farther."""
    at, view, chunks = len(_SIGNATURE), memoryview(data), list[tuple[bytes, memoryview]]()
    while True:
        if at + 12 > len(data):
            raise Truncated(name=name, reason="it ends before its last chunk; it was cut, send it again")
        length, kind = struct.unpack_from(">I4s", data, at)
        if at + 12 + length > len(data):
            raise Truncated(name=name, reason="it ends inside a chunk; it was cut, send it again")
        if zlib.crc32(view[at + 4 : at + 8 + length]) != int.from_bytes(data[at + 8 + length : at + 12 + length], "big"):
            raise IntegrityError(name=name, reason="a checksum does not fit; it was damaged, send it again")
        chunks.append((kind, view[at + 8 : at + 8 + length]))
        at += 12 + length
        if kind == b"IEND":
            break
    if at < len(data):
        raise IntegrityError(name=name, reason="other data follows the image")
    return chunks


def _chunk(kind: bytes, content: bytes | memoryview) -> bytes:
    return b"".join(
        [struct.pack(">I4s", len(content), kind), content, struct.pack(">I", zlib.crc32(content, zlib.crc32(kind)))]
    )


def _resolution(content: bytes) -> tuple[float, float] | None:
    if len(content) != 9:
        return None
    x, y, unit = struct.unpack(">IIB", content)
    return per_inch(x, y, "m" if unit == _METRE else "")


def _profile(content: bytes, name: str) -> bytes:
    """Inflate a colour profile, which is named before it begins."""
    inflater = zlib.decompressobj()
    try:
        profile = inflater.decompress(content[content.index(b"\0") + 2 :], _MAX_PROFILE)
    except (ValueError, zlib.error):
        profile = b""
    if not profile or not inflater.eof:
        raise InvalidHeader(name=name, reason="its colour profile is damaged")
    return profile
