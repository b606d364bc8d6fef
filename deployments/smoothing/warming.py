"""Compiling before the first request: numba compiles a function when it is first called, and keeps it beside the source."""

from __future__ import annotations

import contextlib
import fcntl
from pathlib import Path

import numpy as np

from deployments.smoothing.surfaces import Options, label_map_to_scene
from scangraph.contracts import LabelMap


def compile_kernels(cache: Path | None = None) -> None:
    """Make small scenes in every way there is, so that all functions are compiled.

    Parameters
    ----------
    cache : Path, optional
        Folder for the lock under which it is done: numba's cache is not made for two processes that write at once, and the
        second has nothing left to do.
    """
    with contextlib.ExitStack() as held:
        if cache is not None:
            cache.mkdir(parents=True, exist_ok=True)
            fcntl.flock(held.enter_context((cache / "numba.lock").open("w")), fcntl.LOCK_EX)
        _make_small_scenes()


def _make_small_scenes() -> None:
    array = np.zeros((12, 12, 12), np.uint8)
    array[2:10, 2:10, 2:6] = 1
    array[2:10, 2:10, 6:10] = 2
    array[10, 10, 10] = 2
    mask = LabelMap(array, (1.0, 1.0, 1.0), labels=(1, 2))
    turned = LabelMap(np.moveaxis(array, 0, 2), (1.0, 1.0, 1.0), labels=(1, 2))
    for one, options in ((mask, Options()), (turned, Options(structures=(1, 2))), (mask, Options(joint=True))):
        label_map_to_scene(one, options)
