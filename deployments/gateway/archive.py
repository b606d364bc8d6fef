"""An execution's results as one .zip, written while it is sent: nothing of it waits here."""

from __future__ import annotations

import zipfile
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime

from scangraph.scenefiles.structures import NOTICE
from scangraph.storage import Storage
from scangraph.store.tables import File

#: From here on an entry's size needs 64 bits, which must be said before it is known.
_LARGE = 2**31 - 1
_CONTENTS = "CONTENTS.txt"


class _Outlet:
    """What `zipfile` writes into; it cannot seek, so sizes and checksums follow each entry."""

    def __init__(self) -> None:
        self._written: list[bytes] = []

    def write(self, data: bytes) -> int:
        self._written.append(bytes(data))
        return len(data)

    def flush(self) -> None:
        """There is nothing to wait for."""

    def taken(self) -> bytes:
        """Return what was written since the last time."""
        data, self._written = b"".join(self._written), []
        return data


async def zipped(storage: Storage, files: Sequence[File], about: str) -> AsyncIterator[bytes]:
    """Yield a .zip of stored files, not compressed: what is large in it is so already.

    Parameters
    ----------
    about : str
        First line of the list of contents, which says of each file what units and which frame it is in.
    """
    outlet = _Outlet()
    with zipfile.ZipFile(outlet, "w", zipfile.ZIP_STORED) as archive:  # type: ignore[call-overload]
        moment = max((file.created_at for file in files), default=datetime.now(UTC))
        archive.writestr(_entry(_CONTENTS, moment), _contents(files, about))
        for file, name in zip(files, _names(files), strict=True):
            with archive.open(_entry(name, file.created_at), "w", force_zip64=file.size >= _LARGE) as inside:
                async for piece in storage.stream(file.storage_name):
                    inside.write(piece)
                    yield outlet.taken()
    yield outlet.taken()


def _entry(name: str, moment: datetime) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name, (max(moment.year, 1980), *moment.timetuple()[1:6]))
    entry.external_attr = 0o644 << 16
    return entry


def _names(files: Sequence[File]) -> list[str]:
    """Return names in which no two files meet, also where capitals do not matter."""
    names: list[str] = []
    for file in files:
        name, taken = file.filename, {_CONTENTS.lower(), *(other.lower() for other in names)}
        if name.lower() in taken:
            name = f"{file.output or 'file'}.{name}"
        while name.lower() in taken:
            name = f"_{name}"
        names.append(name)
    return names


def _contents(files: Sequence[File], about: str) -> str:
    rows = [f"{name}\n    {_place(file)}; SHA-256 {file.sha256}" for file, name in zip(files, _names(files), strict=True)]
    return "\n".join([about, NOTICE, "", *rows, ""])


def _place(file: File) -> str:
    """Say what the numbers in a file mean."""
    header = file.header or {}
    if file.kind == "nifti":
        return "NIfTI: its affine leads to millimetres in RAS; Hounsfield units, or numbers of labels"
    if "frame" in header:
        unit = {"mm": "millimetres", "m": "metres"}.get(header.get("unit") or "", "")
        return f"{file.media_type}: {unit + ' in ' if unit else 'of a scene in '}the frame {header['frame']}"
    return file.media_type
