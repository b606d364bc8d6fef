"""Filters of a page, (height, width, channels) of uint8 or uint16.

Beyond its edges a page is mirrored; alpha stays as it is.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from scangraph.contracts.errors import UsageError
from scangraph.contracts.images import has_alpha

#: How far a Gaussian reaches, in standard deviations.
_REACH = 4.0
#: OpenCV's median of 16 bits knows windows of 3 and 5.
_WIDEST_16_BIT_MEDIAN = 2


def gaussian(colours: NDArray[Any], sigma: float) -> NDArray[Any]:
    """Smooth with a Gaussian of `sigma` pixels."""
    return _rounded(_blurred(colours, sigma), colours.dtype)


def median(colours: NDArray[Any], radius: int) -> NDArray[Any]:
    """Take the median of (2 radius + 1)² pixels; beyond the edges the last one is repeated."""
    if colours.dtype == np.uint16 and radius > _WIDEST_16_BIT_MEDIAN:
        raise UsageError(detail=f"the median of 16-bit images has a radius of {_WIDEST_16_BIT_MEDIAN} at most, got {radius}")
    return _shaped(cv2.medianBlur(colours, 2 * radius + 1))


def sharpen(colours: NDArray[Any], sigma: float, amount: float) -> NDArray[Any]:
    """Add the difference to the smoothed image, `amount` times (unsharp mask)."""
    values = colours.astype(np.float32)
    return _rounded(values + amount * (values - _blurred(colours, sigma)), colours.dtype)


def edge(colours: NDArray[Any]) -> NDArray[Any]:
    """Return how steep the brightness is (Sobel), grey; a straight step from black to white is white."""
    grey = grayscale(colours)[..., 0].astype(np.float32)
    slopes = (cv2.Sobel(grey, cv2.CV_32F, dx, 1 - dx, ksize=3, borderType=cv2.BORDER_REFLECT_101) for dx in (1, 0))
    return _rounded(np.hypot(*slopes).astype(np.float32)[..., None] / np.float32(4), colours.dtype)


def clahe(colours: NDArray[Any], clip: float, tiles: int) -> NDArray[Any]:
    """Even out contrast in tiles (contrast-limited adaptive histogram equalisation); of colours, the brightness."""
    equalize = cv2.createCLAHE(clip, (tiles, tiles)).apply
    if colours.shape[2] == 1:
        return _shaped(equalize(np.ascontiguousarray(colours[..., 0])))
    split = cv2.cvtColor(colours, cv2.COLOR_RGB2YCrCb)
    split[..., 0] = equalize(np.ascontiguousarray(split[..., 0]))
    return np.asarray(cv2.cvtColor(split, cv2.COLOR_YCrCb2RGB))


def grayscale(colours: NDArray[Any]) -> NDArray[Any]:
    """Return the brightness: 0.299 red, 0.587 green, 0.114 blue (Rec. 601)."""
    return colours if colours.shape[2] == 1 else _shaped(cv2.cvtColor(colours, cv2.COLOR_RGB2GRAY))


def invert(colours: NDArray[Any]) -> NDArray[Any]:
    """Turn black into white."""
    return np.asarray(np.iinfo(colours.dtype).max - colours)


def apply(page: NDArray[Any], name: str, **options: Any) -> NDArray[Any]:
    """Filter a page's colours by one of the above, with those of the options that it takes."""
    function, taken = _FILTERS[name]
    colours = np.ascontiguousarray(page[..., :-1]) if has_alpha(page) else page
    done = function(colours, *(options[option] for option in taken))
    return np.concatenate([done, page[..., -1:]], axis=2) if has_alpha(page) else done


_FILTERS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "gaussian": (gaussian, ("sigma",)),
    "median": (median, ("radius",)),
    "sharpen": (sharpen, ("sigma", "amount")),
    "edge": (edge, ()),
    "clahe": (clahe, ("clip", "tiles")),
    "grayscale": (grayscale, ()),
    "invert": (invert, ()),
}


def _blurred(colours: NDArray[Any], sigma: float) -> NDArray[np.float32]:
    side = 2 * int(_REACH * sigma + 0.5) + 1
    values = colours.astype(np.float32)
    return _shaped(cv2.GaussianBlur(values, (side, side), sigma, borderType=cv2.BORDER_REFLECT_101))


def _rounded(values: NDArray[np.float32], dtype: np.dtype[Any]) -> NDArray[Any]:
    return np.rint(np.clip(values, 0, np.iinfo(dtype).max)).astype(dtype)


def _shaped(values: NDArray[Any]) -> NDArray[Any]:
    """OpenCV leaves a single channel's axis out."""
    return values if values.ndim == 3 else values[..., None]
