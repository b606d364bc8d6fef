"""The two things of an EXIF block that concern pixels: which way is up, and how large they are."""

from __future__ import annotations

import struct
from fractions import Fraction
from typing import NamedTuple

from deployments.imageio.pictures.found import per_inch

_ORIENTATION, _X, _Y, _UNIT = 0x112, 0x11A, 0x11B, 0x128
_SHORT, _LONG, _RATIONAL = 3, 4, 5
_MOST_ENTRIES = 512


class Exif(NamedTuple):
    """Orientation 1 to 8, and pixels per inch."""

    orientation: int = 1
    dpi: tuple[float, float] | None = None


def read_exif(block: bytes) -> Exif:
    """Read a TIFF structure as it stands in JPEG, PNG and WebP files. A damaged one says nothing; it is not carried on."""
    try:
        order = {b"II": "<", b"MM": ">"}[block[:2]]
        magic, at = struct.unpack_from(f"{order}HI", block, 2)
        (count,) = struct.unpack_from(f"{order}H", block, at)
        if magic != 42 or count > _MOST_ENTRIES:
            return Exif()
        found: dict[int, Fraction] = {}
        for start in range(at + 2, at + 2 + 12 * count, 12):
            tag, kind, number = struct.unpack_from(f"{order}HHI", block, start)
            if tag not in {_ORIENTATION, _X, _Y, _UNIT} or number != 1:
                continue
            if kind == _RATIONAL:
                (where,) = struct.unpack_from(f"{order}I", block, start + 8)
                found[tag] = Fraction(*struct.unpack_from(f"{order}II", block, where))
            elif kind in {_SHORT, _LONG}:
                found[tag] = Fraction(struct.unpack_from(f"{order}{'H' if kind == _SHORT else 'I'}", block, start + 8)[0])
    except (KeyError, struct.error, ZeroDivisionError):
        return Exif()
    unit = {2: "inch", 3: "cm"}.get(int(found.get(_UNIT, Fraction(2))), "")
    dpi = per_inch(found[_X], found[_Y], unit) if _X in found and _Y in found else None
    orientation = int(found.get(_ORIENTATION, Fraction(1)))
    return Exif(orientation if 1 <= orientation <= 8 else 1, dpi)
