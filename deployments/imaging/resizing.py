"""Pages of other sizes. Where an image shrinks, every filter but `nearest` takes in all that a new pixel covers."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from scangraph.contracts.errors import TooManyPixels
from scangraph.contracts.images import has_alpha

_KERNELS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


def target_size(
    size: tuple[int, int], width: int | None, height: int | None, *, keep_aspect: bool, enlarge: bool
) -> tuple[int, int]:
    """Return the (width, height) that a page becomes; at least one of both is given."""
    across = width / size[0] if width else None
    down = height / size[1] if height else None
    if across is None or down is None or keep_aspect:
        across = down = min(factor for factor in (across, down) if factor is not None)
    if not enlarge:
        across, down = min(across, 1.0), min(down, 1.0)
    return max(1, round(size[0] * across)), max(1, round(size[1] * down))


def check_pixels(sizes: list[tuple[int, int]], limit: int) -> None:
    """Raise `TooManyPixels` where new pages would be too large."""
    if (total := sum(width * height for width, height in sizes)) > limit:
        raise TooManyPixels(name="the result", reason=f"it would have {total} pixels, {limit} are allowed")


def resize(page: NDArray[Any], size: tuple[int, int], kernel: str) -> NDArray[Any]:
    """Resample a page.

    Parameters
    ----------
    page : ndarray, shape (height, width, channels), uint8 or uint16
        With straight alpha, which weighs the colours: what is transparent does not bleed.
    size : (width, height)
    kernel : str
        `nearest`, `bilinear`, `bicubic`, `lanczos` or `area`.

    Returns
    -------
    ndarray
        Of the same type; values are rounded, and clipped where a kernel overshoots. Pillow does both for 8 bits after each of
        two passes.
    """
    height, width = page.shape[:2]
    if size == (width, height):
        return page
    if kernel == "nearest":
        return _shaped(cv2.resize(page, size, interpolation=cv2.INTER_NEAREST_EXACT))
    if has_alpha(page):
        return _resize_weighted(page, size, kernel)
    if kernel == "area":
        if size[0] <= width and size[1] <= height:
            return _shaped(cv2.resize(page, size, interpolation=cv2.INTER_AREA))
        kernel = "bilinear"
    if page.dtype == np.uint8:
        plain = Image.fromarray(page if page.shape[2] > 1 else page[..., 0])
        return _shaped(np.asarray(plain.resize(size, _KERNELS[kernel])))
    return _rounded(_as_floats(page.astype(np.float32), size, kernel), page.dtype)


def _resize_weighted(page: NDArray[Any], size: tuple[int, int], kernel: str) -> NDArray[Any]:
    full = np.float32(np.iinfo(page.dtype).max)
    floats = page.astype(np.float32)
    alpha = floats[..., -1:] / full
    done = _as_floats(np.concatenate([floats[..., :-1] * alpha, alpha], axis=2), size, kernel)
    opaque = done[..., -1:]
    colours = np.divide(done[..., :-1], opaque, out=np.zeros_like(done[..., :-1]), where=opaque > 0.5 / full)
    return _rounded(np.concatenate([colours, opaque * full], axis=2), page.dtype)


def _as_floats(page: NDArray[np.float32], size: tuple[int, int], kernel: str) -> NDArray[np.float32]:
    if kernel == "area" and size[0] <= page.shape[1] and size[1] <= page.shape[0]:
        return _shaped(cv2.resize(page, size, interpolation=cv2.INTER_AREA))
    how = _KERNELS.get(kernel, Image.Resampling.BILINEAR)
    planes = [Image.fromarray(np.ascontiguousarray(page[..., c])).resize(size, how) for c in range(page.shape[2])]
    return np.stack([np.asarray(plane) for plane in planes], axis=2)


def _rounded(values: NDArray[np.float32], dtype: np.dtype[Any]) -> NDArray[Any]:
    return np.rint(np.clip(values, 0, np.iinfo(dtype).max)).astype(dtype)


def _shaped(values: NDArray[Any]) -> NDArray[Any]:
    """OpenCV and Pillow leave a single channel's axis out."""
    return values if values.ndim == 3 else values[..., None]
