"""How much memory a prediction takes, and whether it is there: better refused before than killed after."""

from __future__ import annotations

from typing import NamedTuple

import torch

from scangraph.memory import free_memory

#: Left to everybody else.
_RESERVE = 256 * 2**20


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


def _refuse(device: str, needed: int, free: int) -> None:
    if needed + _RESERVE > free:
        raise NotEnoughMemory(device, needed // 2**20, free // 2**20)
