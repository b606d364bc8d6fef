"""Zip archives from strangers: looked through as a whole first, then only what is wanted is unpacked."""

from __future__ import annotations

import shutil
import stat
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from pydantic import BaseModel, ConfigDict

from scangraph.contracts.errors import ModelRefused

_CHUNK = 1 << 20
#: Below this size a high ratio costs nothing: JSON of zeros is small all the same.
_RATIO_FROM_BYTES = 16 * 2**20


class ArchiveLimits(BaseModel):
    """What an archive may hold. Weights hardly deflate, text tenfold; a bomb a thousandfold."""

    model_config = ConfigDict(frozen=True)

    entries: int = 10_000
    total_bytes: int = 64 * 2**30
    ratio: float = 100


def unpack(archive: Path, target: Path, wanted: Callable[[PurePosixPath], bool], limits: ArchiveLimits | None = None) -> None:
    """Unpack some files of a zip archive under a folder.

    Parameters
    ----------
    archive : Path
        Of a stranger.
    target : Path
        Where its paths begin.
    wanted : callable
        Which files are unpacked. The others are judged by what is declared of them, and never opened.
    limits : ArchiveLimits, optional
        What it may hold.

    Raises
    ------
    ModelRefused
        If it is no archive, is damaged or encrypted, holds links, paths that lead out of it, one path twice, or more than the
        limits or the disk allow: declared, or found when it is unpacked.
    """
    limits = limits or ArchiveLimits()

    def refuse(reason: str) -> ModelRefused:
        return ModelRefused(source=archive.name, reason=reason)

    try:
        with zipfile.ZipFile(archive) as opened:
            entries = opened.infolist()
            _look_through(entries, limits, refuse)
            chosen = [entry for entry in entries if not entry.is_dir() and wanted(PurePosixPath(entry.filename))]
            needed = sum(entry.file_size for entry in chosen)
            target.mkdir(parents=True, exist_ok=True)
            if (free := shutil.disk_usage(target).free) < needed:
                raise refuse(f"unpacked it needs {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free")
            for entry in chosen:
                _write(opened, entry, target / entry.filename, refuse)
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError, UnicodeDecodeError) as error:
        raise refuse(f"it is no sound zip archive ({error})") from None


def _look_through(entries: list[zipfile.ZipInfo], limits: ArchiveLimits, refuse: Callable[[str], ModelRefused]) -> None:
    if len(entries) > limits.entries:
        raise refuse(f"it has {len(entries)} entries, more than {limits.entries}")
    if (total := sum(entry.file_size for entry in entries)) > limits.total_bytes:
        raise refuse(f"it declares {total / 2**30:.0f} GiB, more than {limits.total_bytes / 2**30:.0f}")
    seen = set[PurePosixPath]()
    for entry in entries:
        # What the archive says, before zipfile cuts a name at NUL or turns backslashes.
        name, path = entry.orig_filename, PurePosixPath(entry.filename)
        if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name or ":" in path.parts[0] or not path.parts:
            raise refuse(f"the path {name!r} leads out of it")
        kind = stat.S_IFMT(entry.external_attr >> 16)
        if kind not in {0, stat.S_IFREG, stat.S_IFDIR}:
            raise refuse(f"{name} is {'a link' if kind == stat.S_IFLNK else 'no plain file'}")
        if path in seen:
            raise refuse(f"{name} is in it twice")
        seen.add(path)
        if entry.flag_bits & 1 or entry.compress_type not in {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}:
            raise refuse(f"{name} is encrypted, or compressed in an unusual way")
        if entry.file_size > max(_RATIO_FROM_BYTES, limits.ratio * entry.compress_size):
            raise refuse(f"{name} would inflate {entry.file_size / max(entry.compress_size, 1):.0f} times")


def _write(opened: zipfile.ZipFile, entry: zipfile.ZipInfo, path: Path, refuse: Callable[[str], ModelRefused]) -> None:
    """Inflate one file; zipfile gives no byte more than was declared, and checks the sum of those that it gives."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with opened.open(entry) as source, path.open("xb") as file:
            shutil.copyfileobj(source, file, _CHUNK)
    except FileExistsError:  # two names that differ only for those who tell capitals apart
        raise refuse(f"{entry.filename} is in it twice") from None
    if (size := path.stat().st_size) != entry.file_size:
        raise refuse(f"{entry.filename} has {size} bytes, {entry.file_size} were declared")
