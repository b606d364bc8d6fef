"""Compiling before the first request: numba compiles a function when it is first called."""

from __future__ import annotations

import numpy as np

from deployments.smoothing.surfaces import Options, label_map_to_scene
from scangraph.compiling import one_compiler
from scangraph.contracts import LabelMap


def compile_kernels() -> None:
    """Make small scenes in every way there is, so that all functions are compiled."""
    array = np.zeros((12, 12, 12), np.uint8)
    array[2:10, 2:10, 2:6] = 1
    array[2:10, 2:10, 6:10] = 2
    array[10, 10, 10] = 2
    mask = LabelMap(array, (1.0, 1.0, 1.0), labels=(1, 2))
    turned = LabelMap(np.moveaxis(array, 0, 2), (1.0, 1.0, 1.0), labels=(1, 2))
    with one_compiler():
        for one, options in ((mask, Options()), (turned, Options(structures=(1, 2))), (mask, Options(joint=True))):
            label_map_to_scene(one, options)
