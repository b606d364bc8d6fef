"""Depth, alpha and format: what a file can hold."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from scangraph.contracts.images import Image2D, ImageFile, has_alpha


def to_bits(page: NDArray[Any], bits: int) -> NDArray[Any]:
    """Return a page with values of 8 or 16 bits; black stays black and white stays white."""
    if page.dtype.itemsize * 8 == bits:
        return page
    if bits == 16:
        return page.astype(np.uint16) * np.uint16(257)
    return ((page.astype(np.uint32) + 128) // 257).astype(np.uint8)


def flatten(page: NDArray[Any]) -> NDArray[Any]:
    """Return a page without alpha, laid on white."""
    if not has_alpha(page):
        return page
    full = np.iinfo(page.dtype).max
    alpha = page[..., -1:].astype(np.float32) / full
    return np.rint(page[..., :-1] * alpha + full * (1 - alpha)).astype(page.dtype)


def convert(image: Image2D, file: ImageFile, bits: int | None = None) -> tuple[Image2D, list[str]]:
    """Make an image fit a file.

    Returns
    -------
    (Image2D, list of str)
        The image, and what it had to lose.
    """
    warnings, pages = [], list(image.pages)
    narrow = file.format in {"jpeg", "webp"}
    if narrow and bits is None and image.bits == 16:
        warnings.append(f"{file.format} has 8 bits: the image's 16 were rounded.")
    wanted = 8 if narrow else bits
    if wanted is not None:
        pages = [to_bits(page, wanted) for page in pages]
    if file.format == "jpeg" and any(map(has_alpha, pages)):
        warnings.append("jpeg has no alpha: what was transparent is white.")
        pages = [flatten(page) for page in pages]
    return Image2D(tuple(pages), image.dpi, file), warnings
