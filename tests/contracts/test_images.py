"""2-D images: what one is, and what its file can hold."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from scangraph.contracts import Image2D, ImageFile
from scangraph.contracts.errors import InvalidImage, UsageError

PAGE = np.zeros((4, 5, 3), np.uint8)


@pytest.mark.parametrize(
    "pages",
    [(), (PAGE[0],), (PAGE[:0],), (np.zeros((4, 5, 5), np.uint8),), (PAGE.astype(np.float32),), (PAGE, PAGE.astype(np.int16))],
)
def test_what_is_no_image_is_refused(pages: Any) -> None:
    with pytest.raises(InvalidImage):
        Image2D(pages)


@pytest.mark.parametrize(
    ("page", "formats"),
    [
        (PAGE, {"jpeg", "png", "tiff", "webp"}),
        (np.zeros((4, 5, 4), np.uint8), {"png", "tiff", "webp"}),
        (PAGE.astype(np.uint16), {"png", "tiff"}),
    ],
)
def test_an_image_fits_its_file(page: Any, formats: set[str]) -> None:
    names: Any = ("jpeg", "png", "tiff", "webp")
    for name in names:
        if name in formats:
            assert Image2D((page,), file=ImageFile(name)).with_pages([page]).file.format == name
        else:
            with pytest.raises(InvalidImage, match=name):
                Image2D((page,), file=ImageFile(name))
            assert Image2D((PAGE,), file=ImageFile(name)).with_pages([page]).file.format == "png"


def test_files_that_there_are_not() -> None:
    with pytest.raises(UsageError, match="jpeg, png, tiff, webp"):
        ImageFile("gif")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="quality"):
        ImageFile("jpeg", 0)


def test_what_it_says_of_itself() -> None:
    image = Image2D((PAGE, np.zeros((2, 2, 2), np.uint16)), (300, float("nan")))
    assert (image.shape, image.width, image.height, image.bits) == ((2, 4, 5), 5, 4, 16)
    assert (image.nbytes, image.dpi) == (60 + 16, None)
    assert repr(image) == "<Image2D 2 × 5×4 RGB 16 bits>"
