"""Values as bytes, for keeping a step's result: no pickle, nothing in it is executed, and damage is noticed.

Layout: magic, length and SHA-256 of the rest; a JSON head; then each array's bytes, deflated where that gains.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scangraph.contracts.errors import DamagedResult
from scangraph.contracts.images import Image2D, ImageFile
from scangraph.contracts.scenes import Line, Scene, SceneFiles, Surface
from scangraph.contracts.volumes import LabelMap, Volume

_MAGIC = b"scangraph\x00\x01\n"
_FIXED = struct.Struct("<QI32s")  # bytes that follow, bytes of the head, SHA-256 of head and arrays
#: Masks deflate a hundredfold at the fastest level; CT hardly at all, so a sample of the array decides.
_LEVEL, _SAMPLE, _GAIN = 1, 1 << 20, 0.8

Value = Volume | LabelMap | Scene | Image2D | bytes


def to_bytes(value: Value) -> bytes:
    """Encode a value; equal values give equal bytes."""
    arrays: list[NDArray[Any]] = []
    head = _describe(value, arrays)
    packed, entries = [], []
    for array in arrays:
        raw = np.ascontiguousarray(array, array.dtype.newbyteorder("<")).reshape(-1).view(np.uint8).data
        sample = raw[:_SAMPLE]
        deflated = len(sample) > 64 and len(zlib.compress(sample, _LEVEL)) < _GAIN * len(sample)
        data = zlib.compress(raw, _LEVEL) if deflated else bytes(raw)
        entries.append(
            {"dtype": array.dtype.newbyteorder("<").str, "shape": array.shape, "size": len(data), "deflated": deflated}
        )
        packed.append(data)
    text = json.dumps({**head, "arrays": entries}, separators=(",", ":")).encode()
    digest = hashlib.sha256(text)
    for data in packed:
        digest.update(data)
    fixed = _FIXED.pack(len(text) + sum(map(len, packed)), len(text), digest.digest())
    return b"".join((_MAGIC, fixed, text, *packed))


def from_bytes(data: bytes) -> Value:
    """Decode a value; its arrays are read-only, as those from the object store are.

    Raises
    ------
    DamagedResult
        If a single bit is not what was written.
    """
    start = len(_MAGIC) + _FIXED.size
    if len(data) < start or data[: len(_MAGIC)] != _MAGIC:
        raise DamagedResult(reason="it does not begin as one")
    size, head_size, digest = _FIXED.unpack(data[len(_MAGIC) : start])
    if len(data) != start + size or head_size > size:
        raise DamagedResult(reason=f"it has {len(data) - start} bytes, {size} were written")
    if hashlib.sha256(memoryview(data)[start:]).digest() != digest:
        raise DamagedResult(reason="its checksum does not fit")
    # The head's own length is not in the checksum: so it has to end where the arrays begin.
    try:
        head = json.loads(data[start : start + head_size])
    except ValueError:
        raise DamagedResult(reason="its head does not end where it should") from None
    if head_size + sum(entry["size"] for entry in head["arrays"]) != size:
        raise DamagedResult(reason="its arrays do not begin where they should")
    at, arrays = start + head_size, []
    for entry in head["arrays"]:
        raw = memoryview(data)[at : at + entry["size"]]
        at += entry["size"]
        array = np.frombuffer(zlib.decompress(raw) if entry["deflated"] else raw, np.dtype(entry["dtype"]))
        arrays.append(array.reshape(entry["shape"]))
    return _build(head, arrays)


def _describe(value: Value, arrays: list[NDArray[Any]]) -> dict[str, Any]:
    if isinstance(value, Volume):
        arrays.append(value.array)
        geometry = {"spacing_mm": value.spacing_mm, "origin_mm": value.origin_mm, "direction": value.direction}
        if isinstance(value, LabelMap):
            # A list of pairs: JSON's keys are texts. Left out where there are none, so that such bytes stay what they were.
            names = {"names": list(value.names.items())} if value.names else {}
            return {"type": "LabelMap", **geometry, "labels": value.labels, **names}
        return {"type": "Volume", **geometry}
    if isinstance(value, Scene):
        surfaces = [_surface(surface, arrays) for surface in value.surfaces]
        for line in value.lines:
            arrays += [line.points_mm, line.segments]
        lines = [{"name": line.name, "label": line.label, "color": line.color} for line in value.lines]
        screen = [_surface(surface, arrays) for surface in value.screen]
        files = asdict(value.files) if value.files != SceneFiles() else None
        more = _given(files=files, facts=value.facts, lines=lines, screen=screen)
        return {"type": "Scene", "frame": value.frame, "notes": value.notes, "surfaces": surfaces, **more}
    if isinstance(value, Image2D):
        arrays += value.pages
        return {"type": "Image2D", "dpi": value.dpi, "file": asdict(value.file)}
    if isinstance(value, bytes):
        arrays.append(np.frombuffer(value, np.uint8))
        return {"type": "bytes"}
    raise TypeError(f"a {type(value).__name__} is no result of a step")


def _surface(surface: Surface, arrays: list[NDArray[Any]]) -> dict[str, Any]:
    arrays += [surface.vertices_mm, surface.faces]
    entry = {"name": surface.name, "label": surface.label, "color": surface.color}
    return {**entry, **_given(measures=surface.measures, level=surface.level)}


def _surfaces(entries: Sequence[Mapping[str, Any]], arrays: Sequence[NDArray[Any]]) -> tuple[Surface, ...]:
    return tuple(
        Surface(
            entry["name"],
            entry["label"],
            tuple(entry["color"]),
            arrays[2 * n],
            arrays[2 * n + 1],
            entry.get("measures", {}),
            entry.get("level", 0),
        )
        for n, entry in enumerate(entries)
    )


def _given(**fields: Any) -> dict[str, Any]:
    """Leave out what is empty, so that bytes of values without it stay what they were."""
    return {name: value for name, value in fields.items() if value}


def _build(head: Mapping[str, Any], arrays: list[NDArray[Any]]) -> Value:
    if head["type"] == "bytes":
        return arrays[0].tobytes()
    if head["type"] == "Image2D":
        return Image2D(tuple(arrays), tuple(head["dpi"]) if head["dpi"] else None, ImageFile(**head["file"]))
    if head["type"] == "Scene":
        surfaces = _surfaces(head["surfaces"], arrays)
        files = SceneFiles(**head.get("files", {}))
        rest = arrays[2 * len(surfaces) :]
        lines = tuple(
            Line(entry["name"], entry["label"], tuple(entry["color"]), rest[2 * n], rest[2 * n + 1])
            for n, entry in enumerate(head.get("lines", ()))
        )
        screen = _surfaces(head.get("screen", ()), rest[2 * len(lines) :])
        return Scene(surfaces, head["frame"], tuple(head["notes"]), files, head.get("facts", {}), lines, screen)
    x, y, z = (tuple(row) for row in head["direction"])
    geometry = (tuple(head["spacing_mm"]), tuple(head["origin_mm"]), (x, y, z))
    if head["type"] == "LabelMap":
        return LabelMap(arrays[0], *geometry, tuple(head["labels"]), dict(head.get("names", ())))
    return Volume(arrays[0], *geometry)
