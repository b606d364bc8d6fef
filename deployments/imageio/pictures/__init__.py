"""2-D image files in and out: JPEG, PNG, TIFF and WebP.

Each format's own header is read here, and the limits are kept, before a codec sees a byte. Pixels come out upright and in sRGB.
Of all metadata only the resolution goes on, because the rest may name a patient or a place.
"""

from __future__ import annotations

from typing import Any

from deployments.imageio.pictures import jpeg, png, tiff, webp
from deployments.imageio.pictures.found import Found, PictureLimits, upright
from scangraph.contracts.images import CHANNELS, Image2D, ImageFile, ImageFormat, has_alpha

__all__ = ["ENDINGS", "Found", "PictureLimits", "describe_picture", "read_picture", "write_picture"]

_READERS = {"jpeg": jpeg.read, "png": png.read, "tiff": tiff.read, "webp": webp.read}
ENDINGS = {"jpeg": ".jpg", "png": ".png", "tiff": ".tif", "webp": ".webp"}


def read_picture(data: bytes, name: str, file_format: ImageFormat, limits: PictureLimits) -> Image2D:
    """Read an image file whole.

    Parameters
    ----------
    name : str
        What it is called in messages.
    file_format : str
        As its first bytes say.

    Returns
    -------
    Image2D
        Turned as its orientation tag says; `file` is of the format that it came in.

    Raises
    ------
    Truncated, IntegrityError, InvalidHeader
        If it is not a whole file of its format.
    UnsupportedPixelType, UnsupportedDimensions, TooManyPixels
    """
    found = _READERS[file_format](data, name, limits)
    pages = tuple(upright(page, found.orientation) for page in found.pages)
    dpi = found.dpi if found.dpi is None or found.orientation < 5 else found.dpi[::-1]
    return Image2D(pages, dpi, ImageFile(file_format))


def write_picture(image: Image2D, page: int = 0) -> bytes:
    """Encode an image as its `file` says: TIFF has all pages, the others have one."""
    file = image.file
    if file.format == "tiff":
        return tiff.write(image.pages, image.dpi)
    pixels = image.pages[page]
    if file.format == "jpeg":
        return jpeg.write(pixels, file.quality, image.dpi)
    if file.format == "webp":
        return webp.write(pixels, file.quality, lossless=file.lossless)
    return png.write(pixels, image.dpi)


def describe_picture(image: Image2D) -> dict[str, Any]:
    """Return what a file's record says of the image: size and depth of the first page, and how many there are."""
    first = image.pages[0]
    return {
        "width": image.width,
        "height": image.height,
        "pages": len(image.pages),
        "channels": CHANNELS[first.shape[2]],
        "alpha": has_alpha(first),
        "bits": image.bits,
        "dpi": list(image.dpi) if image.dpi else None,
        "decoded_bytes": image.nbytes,
    }
