"""Fewer triangles for screens: a browser turns 150 000 of them smoothly, planners' surfaces have several times as many."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from deployments.smoothing.decimation import decimate
from scangraph.contracts import SCREEN_TRIANGLES, Scene, Surface

#: No structure gets fewer, however small its part.
_LEAST = 300


def with_screen(scene: Scene, most: int = SCREEN_TRIANGLES, workers: int = 1) -> Scene:
    """Give a scene coarser surfaces for screens, where none of its levels of detail is coarse enough.

    Parameters
    ----------
    most : int
        Triangles of all structures together, not counting that none gets fewer than 300. Each keeps the same part of its own.
    workers : int
        Structures decimated at once.
    """
    surfaces = scene.on_screen(most)
    total = sum(len(surface.faces) for surface in surfaces)
    if total <= most:
        return scene

    def coarser(surface: Surface) -> Surface:
        target = max(_LEAST, len(surface.faces) * most // total)
        if target >= len(surface.faces):
            return surface
        places, triangles, _, _ = decimate(surface.vertices_mm, surface.faces, target=target)
        return replace(surface, vertices_mm=places, faces=triangles, measures={})

    with ThreadPoolExecutor(workers) as pool:
        return replace(scene, screen=tuple(pool.map(coarser, surfaces)))
