"""What a file is, by its first bytes; names lie."""

from __future__ import annotations

import zlib
from typing import NamedTuple


class Kind(NamedTuple):
    """A kind of file."""

    name: str
    media_type: str


#: (offset, bytes, kind); the formats' own signatures.
_SIGNATURES: tuple[tuple[int, bytes, Kind], ...] = (
    (0, b"\x89PNG\r\n\x1a\n", Kind("image2d", "image/png")),
    (0, b"\xff\xd8\xff", Kind("image2d", "image/jpeg")),
    (0, b"II*\x00", Kind("image2d", "image/tiff")),
    (0, b"MM\x00*", Kind("image2d", "image/tiff")),
    (0, b"II+\x00", Kind("image2d", "image/tiff")),
    (0, b"MM\x00+", Kind("image2d", "image/tiff")),
    (8, b"WEBP", Kind("image2d", "image/webp")),
    (128, b"DICM", Kind("dicom", "application/dicom")),
    (0, b"PK\x03\x04", Kind("zip", "application/zip")),
    (0, b"glTF", Kind("glb", "model/gltf-binary")),
    (344, b"n+1\x00", Kind("nifti", "application/octet-stream")),
    (344, b"ni1\x00", Kind("nifti", "application/octet-stream")),
    (4, b"n+2\x00\r\n\x1a\n", Kind("nifti", "application/octet-stream")),
)
_GZIP = b"\x1f\x8b\x08"
_TEXT = frozenset(range(32, 127)) | frozenset(b"\t\r\n")


def kind_of(start: bytes) -> Kind | None:
    """Return the kind of a file that starts with these bytes (512 are enough), or None.

    What is gzip is taken for NIfTI, and the gate then says what is wrong with it.
    """
    for offset, signature, kind in _SIGNATURES:
        if start[offset : offset + len(signature)] == signature:
            return kind
    if start.startswith(_GZIP):
        return Kind("nifti", "application/gzip") if _inflates(start) else None
    lines = [line.strip() for line in start.split(b"\n")[:-1]]
    if set(start) <= _TEXT and any(line.startswith((b"v ", b"o ", b"g ", b"mtllib ")) for line in lines):
        return Kind("obj", "model/obj")
    return None


def _inflates(start: bytes) -> bool:
    try:
        zlib.decompressobj(wbits=31).decompress(start, 64)
    except zlib.error:
        return False
    return True
