"""WebP (RFC 9649), one picture."""

from __future__ import annotations

import struct
from typing import Any

import imagecodecs
import numpy as np
from numpy.typing import NDArray

from deployments.imageio.pictures.colour import to_srgb
from deployments.imageio.pictures.exif import Exif, read_exif
from deployments.imageio.pictures.found import Found, PictureLimits
from scangraph.contracts.errors import IntegrityError, InvalidHeader, Truncated, UnsupportedDimensions

_ANIMATED = 2


def read(data: bytes, name: str, limits: PictureLimits) -> Found:
    """Read a file; see `pictures.read_picture`."""
    if data[:4] != b"RIFF":
        raise InvalidHeader(name=name, reason="its header is damaged")
    if len(data) < 20 or len(data) < 8 + int.from_bytes(data[4:8], "little"):
        raise Truncated(name=name, reason="it is shorter than it declares; it was cut, send it again")
    sizes, exif, profile = list[tuple[int, int]](), Exif(), None
    at, end = 12, 8 + int.from_bytes(data[4:8], "little")
    while at + 8 <= end:
        kind, length = struct.unpack_from("<4sI", data, at)
        content = data[at + 8 : min(at + 8 + length, end)]
        if len(content) < length:
            raise Truncated(name=name, reason="it ends inside a chunk; it was cut, send it again")
        if (kind == b"VP8X" and content[:1] and content[0] & _ANIMATED) or kind in {b"ANIM", b"ANMF"}:
            raise UnsupportedDimensions(name=name, reason="it is an animation")
        if kind in {b"VP8X", b"VP8 ", b"VP8L"}:
            sizes.append(_size(kind, content, name))
        elif kind == b"EXIF":
            exif = read_exif(content.removeprefix(b"Exif\0\0"))
        elif kind == b"ICCP":
            profile = content
        at += 8 + length + length % 2
    if not sizes:
        raise InvalidHeader(name=name, reason="it has no picture")
    for size in sizes:  # the canvas, and the picture on it
        limits.check(name, [size])
    try:
        page = np.asarray(imagecodecs.webp_decode(data))
    except (imagecodecs.WebpError, ValueError) as error:
        raise IntegrityError(name=name, reason=f"{error}; it was damaged, send it again") from None
    return Found([to_srgb(page, profile, name)], exif.orientation, exif.dpi)


def write(page: NDArray[Any], quality: int, *, lossless: bool) -> bytes:
    """Encode a page of 8 bits. WebP has no grey: it comes back as three equal channels."""
    colours = page if page.shape[2] >= 3 else np.concatenate([*[page[..., :1]] * 3, page[..., 1:]], axis=2)
    return bytes(imagecodecs.webp_encode(np.ascontiguousarray(colours), quality, lossless=lossless))


def _size(kind: bytes, content: bytes, name: str) -> tuple[int, int]:
    if kind == b"VP8X" and len(content) >= 10:
        return int.from_bytes(content[4:7], "little") + 1, int.from_bytes(content[7:10], "little") + 1
    if kind == b"VP8 " and len(content) >= 10 and content[3:6] == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<HH", content, 6)
        return width & 0x3FFF, height & 0x3FFF
    if kind == b"VP8L" and len(content) >= 5 and content[0] == 0x2F:
        bits = int.from_bytes(content[1:5], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    raise InvalidHeader(name=name, reason="its header is damaged")
