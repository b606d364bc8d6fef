"""2-D images: pages of pixels that cross process boundaries, and how they want to be written.

What a file says about the person or the place in front of the camera is not in here: of its metadata only the resolution is.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, SupportsIndex, get_args

import numpy as np
from numpy.typing import NDArray

from scangraph.contracts.errors import InvalidImage, UsageError

ImageFormat = Literal["jpeg", "png", "tiff", "webp"]
#: Channels of a page -> what they are.
CHANNELS = {1: "grey", 2: "grey with alpha", 3: "RGB", 4: "RGB with alpha"}


@dataclass(frozen=True)
class ImageFile:
    """How an image wants to be written.

    Parameters
    ----------
    format : "jpeg", "png", "tiff" or "webp"
        PNG and TIFF keep every pixel; JPEG and WebP hold 8 bits, JPEG no alpha.
    quality : int
        1 to 100, of JPEG and of WebP that is not lossless.
    lossless : bool
        Of WebP.

    Raises
    ------
    UsageError
        If there is no such format or quality.
    """

    format: ImageFormat = "png"
    quality: int = 90
    lossless: bool = False

    def __post_init__(self) -> None:
        if self.format not in get_args(ImageFormat):
            raise UsageError(detail=f"an image is written as {', '.join(get_args(ImageFormat))}, not as {self.format!r}")
        if not 1 <= self.quality <= 100:
            raise UsageError(detail=f"a quality is 1 to 100, got {self.quality}")

    def holds(self, page: NDArray[Any]) -> bool:
        """Whether pixels of this kind fit into the format."""
        return (self.format in {"png", "tiff"} or page.dtype == np.uint8) and not (self.format == "jpeg" and has_alpha(page))


def has_alpha(page: NDArray[Any]) -> bool:
    """Whether the last channel of a page says how opaque it is."""
    return page.shape[2] in {2, 4}


def _rebuild(
    pages: tuple[tuple[str, tuple[int, int, int], Any], ...], dpi: tuple[float, float] | None, file: tuple[Any, ...]
) -> Image2D:
    """Make an image from what `Image2D.__reduce_ex__` wrote; its values were checked when it was made."""
    image = object.__new__(Image2D)
    arrays = tuple(np.frombuffer(data, np.dtype(dtype)).reshape(shape) for dtype, shape, data in pages)
    for name, value in (("pages", arrays), ("dpi", dpi), ("file", ImageFile(*file))):
        object.__setattr__(image, name, value)
    return image


@dataclass(frozen=True, eq=False)
class Image2D:
    """A picture of one or more pages, upright.

    Parameters
    ----------
    pages : tuple of ndarray, shape (height, width, channels), uint8 or uint16
        Row 0 is the top. Channels are grey, grey and alpha, RGB, or RGB and alpha; colours are sRGB, alpha is straight (not
        multiplied in), 255 or 65535 is opaque. Arrays that came through the object store are read-only views.
    dpi : (x, y), optional
        Pixels per inch, where the file said so.
    file : ImageFile
        What it becomes when it is saved; it can hold every page.

    Raises
    ------
    InvalidImage
        If there is no page, or one has another shape or type, or the file cannot hold it.

    Notes
    -----
    Pickles as `Volume` does: no numpy class is named, the buffers travel out of band.
    """

    pages: tuple[NDArray[Any], ...]
    dpi: tuple[float, float] | None = None
    file: ImageFile = field(default_factory=ImageFile)

    def __post_init__(self) -> None:
        pages = tuple(np.asarray(page) for page in self.pages)
        if not pages:
            raise InvalidImage(detail="an image has at least one page")
        for page in pages:
            if page.ndim != 3 or 0 in page.shape or page.shape[2] not in CHANNELS or page.dtype not in (np.uint8, np.uint16):
                raise InvalidImage(
                    detail=f"a page is (height, width, 1 to 4 channels) of uint8 or uint16, got {page.shape} {page.dtype}"
                )
            if not self.file.holds(page):
                bits = page.dtype.itemsize * 8
                raise InvalidImage(detail=f"{self.file.format} cannot hold {CHANNELS[page.shape[2]]} of {bits} bits")
        if self.dpi is not None:
            x, y = map(float, self.dpi)
            object.__setattr__(self, "dpi", (x, y) if np.isfinite((x, y)).all() and min(x, y) > 0 else None)
        object.__setattr__(self, "pages", pages)

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        def packed(page: NDArray[Any]) -> tuple[str, tuple[int, ...], Any]:
            raw = np.ascontiguousarray(page).reshape(-1).view(np.uint8)
            return page.dtype.str, page.shape, pickle.PickleBuffer(raw.data) if int(protocol) >= 5 else raw.tobytes()

        file = (self.file.format, self.file.quality, self.file.lossless)
        return _rebuild, (tuple(packed(page) for page in self.pages), self.dpi, file)

    def __repr__(self) -> str:
        return f"<Image2D {len(self.pages)} × {self.width}×{self.height} {CHANNELS[self.pages[0].shape[2]]} {self.bits} bits>"

    @property
    def width(self) -> int:
        """Pixels of the first page's rows."""
        return int(self.pages[0].shape[1])

    @property
    def height(self) -> int:
        """Rows of the first page."""
        return int(self.pages[0].shape[0])

    @property
    def shape(self) -> tuple[int, int, int]:
        """Pages, and height and width of the first."""
        return (len(self.pages), self.height, self.width)

    @property
    def bits(self) -> int:
        """Bits of a value, the most of all pages."""
        return max(page.dtype.itemsize for page in self.pages) * 8

    @property
    def nbytes(self) -> int:
        """Bytes of all pixels."""
        return sum(page.nbytes for page in self.pages)

    def with_pages(self, pages: Iterable[NDArray[Any]]) -> Image2D:
        """Give the same image other pixels; what its file cannot hold makes it a PNG."""
        pages = tuple(pages)
        return replace(self, pages=pages, file=self.file if all(map(self.file.holds, pages)) else ImageFile())
