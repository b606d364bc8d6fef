"""Compiling loops once a machine: numba's cache is not made for two processes that write it at once."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def one_compiler() -> Iterator[None]:
    """Let one process at a time compile; who comes second finds everything done.

    The lock lies in the folder where numba keeps what it compiled (`NUMBA_CACHE_DIR`, which `runtime_envs` sets for each
    stage). Where none is set, in a notebook, nobody waits.
    """
    folder = os.environ.get("NUMBA_CACHE_DIR")
    if folder is None:
        yield
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    with (Path(folder) / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
