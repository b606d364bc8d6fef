"""TIFF 6 and BigTIFF: pages of grey, palette or RGB, 1 to 16 bits, in strips or tiles.

The directories are walked here and every segment must inflate to exactly its pixels. What the usual readers fill with zeros, or
guess, is refused.
"""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import imagecodecs
import numpy as np
import tifffile
from numpy.typing import NDArray

from deployments.imageio.pictures.colour import to_srgb
from deployments.imageio.pictures.found import Found, PictureLimits, per_inch
from scangraph.contracts.errors import IntegrityError, InvalidHeader, TooManyPixels, Truncated, UnsupportedPixelType
from scangraph.contracts.images import has_alpha

_REDUCED, _WIDTH, _HEIGHT, _BITS, _COMPRESSION, _COLOURS, _FILL_ORDER = 254, 256, 257, 258, 259, 262, 266
_STRIPS, _ORIENTATION, _SAMPLES, _ROWS, _STRIP_BYTES, _X, _Y, _PLANES, _UNIT = 273, 274, 277, 278, 279, 282, 283, 284, 296
_PREDICTOR, _PALETTE, _TILE_WIDTH, _TILE_HEIGHT, _TILES, _TILE_BYTES = 317, 320, 322, 323, 324, 325
_EXTRA, _SAMPLE_FORMAT, _PROFILE = 338, 339, 34675
#: Type of a field -> struct's letter; texts are not read.
_TYPES = {1: "B", 3: "H", 4: "I", 5: "II", 7: "B", 16: "Q"}
_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _INDEXED = 0, 1, 2, 3
_MULTIPLIED = 1
_MOST_ENTRIES = 4096
_DIFFERENCES = 2
_MAX_PROFILE = 4 * 2**20

Codec = Callable[[bytes, int], bytes]


def _plain(data: bytes, size: int) -> bytes:
    return data[:size]


def _inflate(data: bytes, size: int) -> bytes:
    return bytes(imagecodecs.zlib_decode(data, out=size))


def _lzw(data: bytes, size: int) -> bytes:
    return bytes(imagecodecs.lzw_decode(data, out=size))


def _packbits(data: bytes, size: int) -> bytes:
    return bytes(imagecodecs.packbits_decode(data, out=size))


_CODECS: dict[int, Codec] = {1: _plain, 5: _lzw, 8: _inflate, 32946: _inflate, 32773: _packbits}


@dataclass(frozen=True)
class _Page:
    """A directory that makes sense: sizes in pixels, segments as (offset, bytes)."""

    width: int
    height: int
    bits: int
    samples: int
    colours: int
    extra: int
    compression: int
    differences: bool
    planar: bool
    reversed_bits: bool
    segment: tuple[int, int]
    tiled: bool
    segments: tuple[tuple[int, int], ...]
    palette: tuple[int, ...]
    profile: bytes | None


Fields = dict[int, tuple[Any, ...]]


def read(data: bytes, name: str, limits: PictureLimits) -> Found:
    """Read a file; see `pictures.read_picture`. Reduced copies of a page (thumbnails) are left out."""
    order = {b"II": "<", b"MM": ">"}.get(data[:2], "")
    if not order or struct.unpack_from(f"{order}H", data.ljust(4, b"\0"), 2)[0] not in {42, 43}:
        raise InvalidHeader(name=name, reason="its header is damaged")
    directories = list(_directories(data, order, name, limits))
    if not directories:
        raise InvalidHeader(name=name, reason="it has no page")
    wanted = [fields for fields in directories if not fields.get(_REDUCED, (0,))[0] & 1] or directories[:1]
    limits.check(name, [(_one(fields, _WIDTH, 0), _one(fields, _HEIGHT, 0)) for fields in wanted])
    pages = [_checked(fields, data, name) for fields in wanted]
    first = wanted[0]
    unit = {2: "inch", 3: "cm"}.get(_one(first, _UNIT, 2), "")
    dpi = per_inch(first[_X][0], first[_Y][0], unit) if _X in first and _Y in first else None
    orientations = {_one(fields, _ORIENTATION, 1) for fields in wanted}
    if len(orientations) > 1:
        raise InvalidHeader(name=name, reason="its pages are turned differently")
    return Found([to_srgb(_decoded(page, data, order, name), page.profile, name) for page in pages], orientations.pop(), dpi)


def write(pages: Sequence[NDArray[Any]], dpi: tuple[float, float] | None) -> bytes:
    """Encode pages; nothing is lost."""
    with io.BytesIO() as out:
        with tifffile.TiffWriter(out, bigtiff=sum(page.nbytes for page in pages) > 2**31) as file:
            for page in pages:
                file.write(
                    page if page.shape[2] > 1 else page[..., 0],
                    photometric="rgb" if page.shape[2] >= 3 else "minisblack",
                    planarconfig="contig" if page.shape[2] > 1 else None,
                    extrasamples=("unassalpha",) if has_alpha(page) else None,
                    compression="zlib",
                    compressionargs={"level": 1},
                    predictor=True,
                    resolution=dpi,
                    resolutionunit="inch" if dpi else None,
                    software=False,
                    metadata=None,
                )
        return out.getvalue()


# --- directories -----------------------------------------------------------------------------------------------------------


def _directories(data: bytes, order: str, name: str, limits: PictureLimits) -> Iterator[Fields]:
    """Yield the fields of each directory in the chain: tag -> values."""
    seen = set[int]()
    try:
        big = struct.unpack_from(f"{order}H", data, 2)[0] == 43
        at = struct.unpack_from(f"{order}Q", data, 8)[0] if big else struct.unpack_from(f"{order}I", data, 4)[0]
        while at:
            if at in seen:
                raise InvalidHeader(name=name, reason="its pages lead in a circle")
            if len(seen) > 4 * limits.max_pages:
                raise TooManyPixels(name=name, reason=f"it has over {limits.max_pages} pages")
            seen.add(at)
            count = struct.unpack_from(f"{order}{'Q' if big else 'H'}", data, at)[0]
            if not 0 < count <= _MOST_ENTRIES:
                raise InvalidHeader(name=name, reason=f"a page has {count} fields")
            start, entry = at + (8 if big else 2), 20 if big else 12
            yield {
                tag: values for number in range(count) for tag, values in _field(data, order, start + entry * number, big=big)
            }
            at = struct.unpack_from(f"{order}{'Q' if big else 'I'}", data, start + entry * count)[0]
    except struct.error:
        raise Truncated(name=name, reason="it ends inside a directory; it was cut, send it again") from None


def _field(data: bytes, order: str, at: int, *, big: bool) -> Iterator[tuple[int, tuple[Any, ...]]]:
    tag, kind = struct.unpack_from(f"{order}HH", data, at)
    (count,) = struct.unpack_from(f"{order}{'Q' if big else 'I'}", data, at + 4)
    if tag not in _KNOWN or kind not in _TYPES:
        return
    letters, room = _TYPES[kind], 8 if big else 4
    size = count * struct.calcsize(f"={letters}")
    where = at + (12 if big else 8)
    if size > room:
        where = struct.unpack_from(f"{order}{'Q' if big else 'I'}", data, where)[0]
    if where + size > len(data):
        raise struct.error("beyond the end")
    values: tuple[Any, ...] = struct.unpack_from(f"{order}{count * len(letters)}{letters[0]}", data, where)
    if len(letters) == 2:
        values = tuple(Fraction(a, b) if b else Fraction(0) for a, b in zip(values[::2], values[1::2], strict=True))
    yield tag, values


_KNOWN = frozenset(
    {_REDUCED, _WIDTH, _HEIGHT, _BITS, _COMPRESSION, _COLOURS, _FILL_ORDER, _STRIPS, _ORIENTATION, _SAMPLES, _ROWS}
    | {_STRIP_BYTES, _X, _Y, _PLANES, _UNIT, _PREDICTOR, _PALETTE, _TILE_WIDTH, _TILE_HEIGHT, _TILES, _TILE_BYTES}
    | {_EXTRA, _SAMPLE_FORMAT, _PROFILE}
)


def _one(fields: Fields, tag: int, default: int) -> int:
    values = fields.get(tag, ())
    return int(values[0]) if values else default


def _checked(fields: Fields, data: bytes, name: str) -> _Page:
    """Return a page, or say what about it is not read here, or not right."""
    width, height = _one(fields, _WIDTH, 0), _one(fields, _HEIGHT, 0)
    samples, colours = _one(fields, _SAMPLES, 1), _one(fields, _COLOURS, -1)
    depths = set(fields.get(_BITS, (1,)))
    bits = int(depths.pop()) if len(depths) == 1 else 0
    formats = set(fields.get(_SAMPLE_FORMAT, (1,)))
    usual = {_WHITE_IS_ZERO: 1, _BLACK_IS_ZERO: 1, _RGB: 3, _INDEXED: 1}.get(colours, 0)
    fine = bits in {8, 16} or (bits in {1, 2, 4} and samples == 1)
    if not usual or not usual <= samples <= usual + 1 or formats != {1} or not fine or (colours == _INDEXED and bits > 8):
        text = "TIFF is read in grey, palette or RGB, with alpha or without, of unsigned whole numbers of up to 16 bits"
        found = f"photometric {colours}, {samples} samples of {bits or 'differing'} bits, sample format {sorted(formats)}"
        raise UnsupportedPixelType(name=name, reason=f"{text}; this has {found}")
    compression = _one(fields, _COMPRESSION, 1)
    if compression not in _CODECS:
        hint = "save it uncompressed, or with LZW, Deflate or PackBits"
        raise UnsupportedPixelType(name=name, reason=f"compression {compression} is not read here: {hint}")
    predictor = _one(fields, _PREDICTOR, 1)
    if predictor not in {1, _DIFFERENCES} or (predictor == _DIFFERENCES and bits < 8):
        raise UnsupportedPixelType(name=name, reason=f"predictor {predictor} is not read here")
    tiled = _TILE_WIDTH in fields
    segment = (
        (_one(fields, _TILE_WIDTH, 0), _one(fields, _TILE_HEIGHT, 0))
        if tiled
        else (width, min(_one(fields, _ROWS, height), height))
    )
    if min(segment) <= 0 or max(segment) > 2**16 + max(width, height):
        raise InvalidHeader(name=name, reason=f"its strips or tiles are {segment[0]}×{segment[1]}")
    planar = _one(fields, _PLANES, 1) == 2 and samples > 1
    number = math.ceil(width / segment[0]) * math.ceil(height / segment[1]) * (samples if planar else 1)
    offsets = fields.get(_TILES if tiled else _STRIPS, ())
    sizes = fields.get(_TILE_BYTES if tiled else _STRIP_BYTES, ())
    if len(offsets) != number or len(sizes) != number:
        raise InvalidHeader(name=name, reason=f"it needs {number} strips or tiles and lists {len(offsets)}")
    if any(at + size > len(data) for at, size in zip(offsets, sizes, strict=True)):
        raise Truncated(name=name, reason="pixels lie behind its end; it was cut, send it again")
    palette = tuple(int(value) for value in fields.get(_PALETTE, ()))
    if colours == _INDEXED and len(palette) != 3 << bits:
        raise InvalidHeader(name=name, reason="its palette does not fit its depth")
    profile = bytes(fields[_PROFILE]) if 0 < len(fields.get(_PROFILE, ())) <= _MAX_PROFILE else None
    extra = _one(fields, _EXTRA, 0)
    return _Page(
        width,
        height,
        bits,
        samples,
        colours,
        extra,
        compression,
        predictor == _DIFFERENCES,
        planar,
        _one(fields, _FILL_ORDER, 1) == 2,
        segment,
        tiled,
        tuple(zip(offsets, sizes, strict=True)),
        palette,
        profile,
    )


# --- pixels ----------------------------------------------------------------------------------------------------------------


def _decoded(page: _Page, data: bytes, order: str, name: str) -> NDArray[Any]:
    """Return (height, width, channels), uint8 or uint16, as grey or RGB, alpha straight."""
    dtype = np.uint16 if page.bits == 16 else np.uint8
    stored = np.empty((page.height, page.width, page.samples), dtype)
    across, down = math.ceil(page.width / page.segment[0]), math.ceil(page.height / page.segment[1])
    for number, (at, size) in enumerate(page.segments):
        plane, place = divmod(number, across * down)
        top, left = place // across * page.segment[1], place % across * page.segment[0]
        rows = page.segment[1] if page.tiled else min(page.segment[1], page.height - top)
        block = _segment(page, data[at : at + size], rows, order, name)
        target = stored[top : top + rows, left : left + page.segment[0], plane : plane + 1 if page.planar else None]
        target[...] = block[: target.shape[0], : target.shape[1]]
    return _as_image(page, stored)


def _segment(page: _Page, data: bytes, rows: int, order: str, name: str) -> NDArray[Any]:
    """Return the pixels of a strip or tile, (rows, columns, samples), as stored."""
    columns, samples = page.segment[0], 1 if page.planar else page.samples
    row_bytes = (columns * samples * page.bits + 7) // 8
    if page.reversed_bits:
        data = bytes(imagecodecs.bitorder_decode(data))
    try:
        raw = _CODECS[page.compression](data, rows * row_bytes)
    except (imagecodecs.DelayedImportError, MemoryError):
        raise
    except (RuntimeError, ValueError) as error:  # what every codec's own error is
        raise IntegrityError(name=name, reason=f"{error}; it was damaged, send it again") from None
    if len(raw) < rows * row_bytes:
        raise Truncated(name=name, reason="a strip or tile has fewer pixels than it declares")
    packed = np.frombuffer(raw, np.uint8, rows * row_bytes).reshape(rows, row_bytes)
    if page.bits < 8:
        values = np.unpackbits(packed, axis=1).reshape(rows, -1, page.bits)
        weights = 1 << np.arange(page.bits - 1, -1, -1, dtype=np.uint8)
        return np.asarray((values * weights).sum(axis=2, dtype=np.uint8)[:, :columns, None])
    stored = packed if page.bits == 8 else packed.view(f"{order}u2")
    block = stored.reshape(rows, columns, samples).astype(np.uint8 if page.bits == 8 else np.uint16, copy=False)
    return np.cumsum(block, axis=1, dtype=block.dtype) if page.differences else block  # differences wrap, and so does this


def _as_image(page: _Page, stored: NDArray[Any]) -> NDArray[Any]:
    full = (1 << page.bits) - 1
    if page.colours == _INDEXED:
        table = np.array(page.palette, np.uint16).reshape(3, -1).T
        wide = bool((table % 257).any())  # 8-bit colours stand there times 257, or, by careless writers, times 256
        eight = not wide or not (table & 255).any()
        colours = (table >> 8).astype(np.uint8) if eight else table
        return np.ascontiguousarray(colours[stored[..., 0]])
    if page.colours == _WHITE_IS_ZERO:
        stored[..., 0] = full - stored[..., 0]
    if page.bits < 8:
        return np.asarray(stored * np.uint8(255 // full))
    if has_alpha(stored) and page.extra == _MULTIPLIED:
        alpha = stored[..., -1:].astype(np.float32)
        straight = np.divide(
            stored[..., :-1] * np.float32(full), alpha, out=np.zeros(stored[..., :-1].shape, np.float32), where=alpha > 0
        )
        stored[..., :-1] = np.minimum(straight, full).round().astype(stored.dtype)
    return stored
