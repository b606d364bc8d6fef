"""What the readers of all formats share: limits, orientation, resolution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scangraph.contracts.errors import InvalidHeader, TooManyPixels

_CM_PER_INCH = Fraction("2.54")


@dataclass(frozen=True)
class PictureLimits:
    """What a file may declare.

    Parameters
    ----------
    max_pixels : int
        Of all pages together.
    max_pages : int
    """

    max_pixels: int = 200_000_000
    max_pages: int = 1000

    def check(self, name: str, sizes: Sequence[tuple[int, int]]) -> None:
        """Raise `TooManyPixels`, or `InvalidHeader` for a page without pixels; sizes are (width, height)."""
        if len(sizes) > self.max_pages:
            raise TooManyPixels(name=name, reason=f"it has over {self.max_pages} pages")
        if any(min(size) <= 0 for size in sizes):
            raise InvalidHeader(name=name, reason="it declares a page without pixels")
        if (total := sum(width * height for width, height in sizes)) > self.max_pixels:
            raise TooManyPixels(name=name, reason=f"it declares {total} pixels, {self.max_pixels} are allowed")


@dataclass(frozen=True)
class Found:
    """What a reader found.

    Parameters
    ----------
    pages : sequence of ndarray, shape (height, width, channels)
        As stored, before the orientation is applied.
    orientation : int
        1 to 8, as EXIF and TIFF number them.
    dpi : (x, y), optional
        Of the stored pixels.
    """

    pages: Sequence[NDArray[Any]]
    orientation: int = 1
    dpi: tuple[float, float] | None = None


def upright(page: NDArray[Any], orientation: int) -> NDArray[Any]:
    """Turn a page so that its row 0 is the top; what is no orientation (1 to 8) counts as upright, as everywhere."""
    if not 2 <= orientation <= 8:
        return page
    if orientation >= 5:  # 5: transposed; 6, 7, 8: that, and then as 2, 3, 4 by turns
        page = page.transpose(1, 0, 2)
    if orientation in {2, 3, 6, 7}:
        page = page[:, ::-1]
    if orientation in {3, 4, 7, 8}:
        page = page[::-1]
    return np.ascontiguousarray(page)


def per_inch(x: Fraction | float, y: Fraction | float, unit: str) -> tuple[float, float] | None:
    """Return pixels per inch from pixels per "inch", "cm" or "m"; None where they say nothing."""
    if unit not in {"inch", "cm", "m"} or not 0 < x < 1e7 or not 0 < y < 1e7:
        return None
    factor = {"inch": Fraction(1), "cm": _CM_PER_INCH, "m": _CM_PER_INCH / 100}[unit]
    return round(float(x * factor), 4), round(float(y * factor), 4)
