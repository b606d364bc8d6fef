"""JPEG (ITU-T T.81, JFIF, Exif)."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import simplejpeg
from numpy.typing import NDArray

from deployments.imageio.pictures.colour import to_srgb
from deployments.imageio.pictures.exif import Exif, read_exif
from deployments.imageio.pictures.found import Found, PictureLimits, per_inch
from scangraph.contracts.errors import IntegrityError, InvalidHeader, Truncated, UnsupportedPixelType

_SOI, _SOS, _EOI = b"\xff\xd8", 0xDA, 0xD9
_ALONE = frozenset({0x01, *range(0xD0, 0xD8)})
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
#: Baseline, extended and progressive, by Huffman's codes or arithmetic ones; what is left is lossless or hierarchical.
_READABLE = frozenset({0xC0, 0xC1, 0xC2, 0xC9, 0xCA})
#: A progressive file has some ten scans, and each costs as much as the whole image.
_MOST_SCANS = 200
#: From this quality on colours keep their own resolution.
_FULL_COLOUR = 95


def read(data: bytes, name: str, limits: PictureLimits) -> Found:
    """Read a file; see `pictures.read_picture`."""
    if not data.startswith(_SOI):
        raise InvalidHeader(name=name, reason="its header is damaged")
    exif, jfif, profile, frame = Exif(), None, dict[int, bytes](), None
    for marker, segment in _segments(data, name):
        if marker == 0xE0 and segment[:5] == b"JFIF\0" and len(segment) >= 12:
            unit, x, y = struct.unpack_from(">BHH", segment, 7)
            jfif = per_inch(x, y, {1: "inch", 2: "cm"}.get(unit, ""))
        elif marker == 0xE1 and segment[:6] == b"Exif\0\0":
            exif = read_exif(segment[6:])
        elif marker == 0xE2 and segment[:12] == b"ICC_PROFILE\0" and len(segment) > 14:
            profile[segment[12]] = segment[14:]
        elif marker in _FRAMES:
            if frame is not None or len(segment) < 6:
                raise InvalidHeader(name=name, reason="it declares its size twice, or not whole")
            frame = (marker, *struct.unpack_from(">BHHB", segment))
    if frame is None:
        raise InvalidHeader(name=name, reason="it does not say how large it is")
    kind, bits, height, width, channels = frame
    if kind not in _READABLE or bits != 8 or channels not in {1, 3}:
        what = f"{channels} channels of {bits} bits" if kind in _READABLE else "a lossless or hierarchical one"
        raise UnsupportedPixelType(
            name=name, reason=f"JPEG is read in grey or colour of 8 bits; this is {what}. CMYK: convert it"
        )
    limits.check(name, [(width, height)])
    if data.count(b"\xff\xda") > _MOST_SCANS:
        raise InvalidHeader(name=name, reason=f"it has over {_MOST_SCANS} scans")
    try:
        # Strict: what libjpeg only warns of, and fills with grey, is an error.
        page = simplejpeg.decode_jpeg(data, "GRAY" if channels == 1 else "RGB")
    except ValueError as error:
        if "premature end" in str(error).lower():
            raise Truncated(name=name, reason="its pixels end early; it was cut, send it again") from None
        raise IntegrityError(name=name, reason=f"{error}; it was damaged, send it again") from None
    joined = b"".join(profile[number] for number in sorted(profile)) or None
    return Found([to_srgb(page, joined, name)], exif.orientation, jfif or exif.dpi)


def write(page: NDArray[Any], quality: int, dpi: tuple[float, float] | None) -> bytes:
    """Encode a page of 8 bits without alpha."""
    if page.shape[2] == 1:
        data = simplejpeg.encode_jpeg(page, quality, "GRAY", "Gray")
    else:
        data = simplejpeg.encode_jpeg(page, quality, "RGB", "444" if quality >= _FULL_COLOUR else "420")
    if dpi is None or data[6:11] != b"JFIF\0":
        return bytes(data)
    density = struct.pack(">BHH", 1, *(min(max(round(value), 1), 65535) for value in dpi))
    return bytes(data[:13]) + density + bytes(data[18:])


def _segments(data: bytes, name: str) -> Iterator[tuple[int, bytes]]:
    """Yield (marker, content) up to the first scan."""
    at = len(_SOI)
    while True:
        start = at
        while data[at : at + 1] == b"\xff":
            at += 1
        if at >= len(data):
            raise Truncated(name=name, reason="it ends inside its header; it was cut, send it again")
        if at == start:
            raise IntegrityError(name=name, reason="its header is damaged; send it again")
        marker = data[at]
        at += 1
        if marker in _ALONE:
            continue
        if marker in {_SOS, _EOI}:
            return
        length = int.from_bytes(data[at : at + 2], "big")
        if length < 2 or at + length > len(data):
            raise Truncated(name=name, reason="it ends inside its header; it was cut, send it again")
        yield marker, data[at + 2 : at + length]
        at += length
