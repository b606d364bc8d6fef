"""How much memory a prediction takes, and whether it is there: better refused before than killed after."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

#: Left to everybody else.
_RESERVE = 256 * 2**20
_CGROUP = Path("/sys/fs/cgroup")


class Need(NamedTuple):
    """Bytes by purpose."""

    image: int
    sums: int
    network: int
    labels: int


class NotEnoughMemory(MemoryError):
    """A prediction needs more than is free.

    Parameters
    ----------
    device : str
        `main` or `GPU`.
    needed_mb, free_mb : int
        Estimated, and found.
    """

    def __init__(self, device: str, needed_mb: int, free_mb: int) -> None:
        super().__init__(device, needed_mb, free_mb)
        self.device, self.needed_mb, self.free_mb = device, needed_mb, free_mb


def check_memory(need: Need, device: torch.device) -> None:
    """Refuse what will not fit.

    Raises
    ------
    NotEnoughMemory
    """
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        _refuse("GPU", need.image + need.sums + need.network, free)
        _refuse("main", need.labels, free_memory())
    else:
        _refuse("main", sum(need), free_memory())


def free_memory() -> int:
    """Return the bytes that this process may still take: of the machine, and of its cgroup."""
    free = int(psutil.virtual_memory().available)
    with contextlib.suppress(OSError, ValueError):
        limit = int((_CGROUP / "memory.max").read_text())  # "max" where there is none
        used = int((_CGROUP / "memory.current").read_text())
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        free = min(free, limit - used + int(stat.get("inactive_file", 0)))
    return free


def _refuse(device: str, needed: int, free: int) -> None:
    if needed + _RESERVE > free:
        raise NotEnoughMemory(device, needed // 2**20, free // 2**20)
