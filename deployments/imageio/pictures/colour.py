"""Colour profiles: pixels become sRGB, and the profile stays behind.

Grey values are left as they are, whatever profile they have: in an X-ray they are measurements.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import imagecodecs
import numpy as np
from numpy.typing import NDArray

from scangraph.contracts.errors import InvalidHeader

#: Profiles have some kB; the largest in use, with tables for printers, a few MB.
_MAX_BYTES = 4 * 2**20
_HEADER_BYTES = 128
#: How far from sRGB, of 255, a profile may lead and still be called sRGB: there are a dozen of these.
_SAME = 2


def to_srgb(page: NDArray[Any], profile: bytes | None, name: str) -> NDArray[Any]:
    """Return the pixels in sRGB.

    Parameters
    ----------
    page : ndarray, shape (height, width, channels)
    profile : bytes, optional
        ICC profile from the file; without one the pixels are sRGB.

    Raises
    ------
    InvalidHeader
        If the profile cannot be read: its colours would be guessed.
    """
    if profile is None or page.shape[2] < 3 or _is_srgb(profile, name):
        return page
    colours = _transformed(np.ascontiguousarray(page[..., :3]), profile, name)
    return colours if page.shape[2] == 3 else np.concatenate([colours, page[..., 3:]], axis=2)


@lru_cache(maxsize=32)
def _is_srgb(profile: bytes, name: str) -> bool:
    """Tell whether a profile changes nothing that can be seen, on a lattice of colours."""
    steps = np.linspace(0, 255, 9).round().astype(np.uint8)
    lattice = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(27, 27, 3)
    return bool(np.abs(_transformed(lattice, profile, name).astype(int) - lattice).max() <= _SAME)


def _transformed(pixels: NDArray[Any], profile: bytes, name: str) -> NDArray[Any]:
    space = profile[16:20]
    if not _HEADER_BYTES < len(profile) <= _MAX_BYTES or profile[36:40] != b"acsp" or space != b"RGB ":
        raise InvalidHeader(name=name, reason=f"its colour profile is damaged, or not one of RGB ({space!r})")
    try:
        done = imagecodecs.cms_transform(
            pixels, profile, imagecodecs.cms_profile("srgb"), colorspace="rgb", outcolorspace="rgb"
        )
    except (imagecodecs.CmsError, ValueError) as error:
        raise InvalidHeader(name=name, reason=f"its colour profile cannot be used: {error}") from None
    return np.asarray(done)
