"""Named bytes in and out of the storage folder: the one place that knows where bytes live.

Names are relative POSIX paths under the root. Users and backends put files there themselves, so a name from a request is
never trusted: it may not leave the root, neither by `..` nor through a link, and what is written is never overwritten.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path, PurePosixPath

from scangraph.contracts.errors import AlreadyWritten, FileMissing, PathRefused, StorageFull


class LocalStorage:
    """A folder.

    Parameters
    ----------
    root : Path
        Made where it is missing.
    """

    def __init__(self, root: Path) -> None:
        root.mkdir(parents=True, exist_ok=True)
        self.root = root.resolve()

    def name_of(self, path: str) -> str:
        """Turn a path from a request (relative to the root, or absolute inside it) into the name of a stored file.

        Raises
        ------
        PathRefused
            If the path has a scheme or a control character, is empty, or leads outside the root.
        """
        if not path or path.isspace():
            raise PathRefused(path=path, reason="it is empty")
        if "://" in path:
            raise PathRefused(path=path, reason="it has a scheme; only files of this storage can be named")
        if any(ord(c) < 32 for c in path) or "\\" in path:
            raise PathRefused(path=path, reason="it has a control character or a backslash")
        if ".." in PurePosixPath(path).parts:
            raise PathRefused(path=path, reason="it has a '..'")
        if max((len(part.encode()) for part in PurePosixPath(path).parts), default=0) > 255 or len(path.encode()) > 2048:
            raise PathRefused(path=path[:64] + "…", reason="it is too long")
        try:
            real = (self.root / path).resolve()
        except (OSError, RuntimeError) as error:  # a loop of links, a name that is too long
            raise PathRefused(path=path, reason="it cannot be resolved") from error
        if real == self.root or not real.is_relative_to(self.root):
            raise PathRefused(path=path, reason="it leads outside the storage")
        return real.relative_to(self.root).as_posix()

    def file(self, path: str) -> Path:
        """Return the real file behind a path from a request.

        Raises
        ------
        PathRefused, FileMissing
            If the path leads outside, or to nothing, or to something that is no regular file.
        """
        real = self.root / self.name_of(path)
        if not real.is_file():
            raise FileMissing(path=path)
        return real

    def read(self, path: str) -> bytes:
        """Return a file's bytes; raises as `file` does."""
        try:
            return self.file(path).read_bytes()
        except OSError as error:
            raise FileMissing(path=path) from error

    def write(self, path: str, data: bytes | memoryview) -> str:
        """Write a new file, whole or not at all, and return its name.

        Raises
        ------
        AlreadyWritten
            If there is a file of that name: keys are write-once.
        StorageFull
            If the disk has no room.
        """
        name = self.name_of(path)
        target = self.root / name
        temporary = target.parent / f".{target.name}.{secrets.token_hex(4)}.part"
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:  # also where a file stands in the way of a folder
            raise StorageFull(path=name, reason=error.strerror or str(error)) from error
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.link(temporary, target)  # unlike rename, fails where the target exists: two writers cannot both win
        except FileExistsError as error:
            raise AlreadyWritten(path=name) from error
        except OSError as error:
            raise StorageFull(path=name, reason=error.strerror or str(error)) from error
        finally:
            temporary.unlink(missing_ok=True)
        return name
