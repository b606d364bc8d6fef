"""Resizing, filters and conversions against scipy, Pillow and their own definitions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from pydantic import ValidationError
from scipy import ndimage

from deployments.imaging.components import CONVERT, FILTER, RESIZE, ResizeParameters
from deployments.imaging.converting import convert, flatten, to_bits
from deployments.imaging.deployment import Imaging
from deployments.imaging.filtering import apply
from deployments.imaging.resizing import resize, target_size
from scangraph.contracts import Image2D, ImageFile
from scangraph.contracts.errors import TooManyPixels, UsageError
from scangraph.settings import ImagingSettings

OPTIONS = {"sigma": 1.5, "radius": 1, "amount": 1.0, "clip": 2.0, "tiles": 8}
KERNELS = ("nearest", "bilinear", "bicubic", "lanczos", "area")
DEPTHS = (np.uint8, np.uint16)


def page(channels: int = 3, dtype: Any = np.uint8, height: int = 48, width: int = 66) -> NDArray[Any]:
    return np.random.default_rng(channels).integers(0, np.iinfo(dtype).max, (height, width, channels), dtype, endpoint=True)


# --- resize ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "given", "wanted"),
    [
        ((1920, 1080), {"width": 640}, (640, 360)),
        ((1920, 1080), {"height": 540}, (960, 540)),
        ((1920, 1080), {"width": 600, "height": 600}, (600, 338)),
        ((1920, 1080), {"width": 600, "height": 100}, (178, 100)),
        ((1920, 1080), {"width": 600, "height": 600, "keep_aspect": False}, (600, 600)),
        ((100, 50), {"width": 640}, (640, 320)),
        ((100, 50), {"width": 640, "enlarge": False}, (100, 50)),
        ((100, 50), {"width": 640, "height": 20, "keep_aspect": False, "enlarge": False}, (100, 20)),
        ((5000, 1), {"width": 10}, (10, 1)),
    ],
)
def test_sizes(size: tuple[int, int], given: dict[str, Any], wanted: tuple[int, int]) -> None:
    parameters = ResizeParameters(**given)
    options = {"keep_aspect": parameters.keep_aspect, "enlarge": parameters.enlarge}
    assert target_size(size, parameters.width, parameters.height, **options) == wanted


@pytest.mark.parametrize("dtype", DEPTHS)
@pytest.mark.parametrize("kernel", KERNELS)
@given(st.integers(1, 4), st.integers(1, 90), st.integers(1, 90), st.integers(0, 65535))
@settings(max_examples=25, deadline=None)
def test_what_is_even_stays_even(kernel: str, dtype: Any, channels: int, width: int, height: int, value: int) -> None:
    even = np.full((31, 47, channels), value % (int(np.iinfo(dtype).max) + 1), dtype)
    even[..., -1:] = np.iinfo(dtype).max if channels in {2, 4} else even[..., -1:]
    done = resize(even, (width, height), kernel)
    assert done.shape == (height, width, channels)
    assert done.dtype == dtype
    assert (done == even[0, 0]).all()


@pytest.mark.parametrize("size", [(33, 24), (20, 11), (130, 100)])
@pytest.mark.parametrize("kernel", ["bilinear", "bicubic", "lanczos"])
def test_16_bits_are_as_exact_as_doubles(kernel: str, size: tuple[int, int]) -> None:
    image = page(3, np.uint16)
    exact = separable(image.astype(np.float64), size, kernel)
    assert np.abs(resize(image, size, kernel) - np.clip(exact, 0, 65535)).max() <= 0.52
    eight = page(3) // 2 + 64  # with room for what overshoots in between
    exact = separable(eight.astype(np.float64), size, kernel)
    assert np.abs(resize(eight, size, kernel) - exact).max() <= 1.3  # rounded twice


def separable(image: NDArray[np.float64], size: tuple[int, int], kernel: str) -> NDArray[np.float64]:
    for axis, wanted in ((0, size[1]), (1, size[0])):
        image = np.moveaxis(np.tensordot(weights(image.shape[axis], wanted, kernel), image, (1, axis)), 0, axis)
    return image


def weights(size: int, wanted: int, kernel: str) -> NDArray[np.float64]:
    """Rows of weights by the kernels' own formulas, widened where the image shrinks."""
    scale = max(size / wanted, 1)
    at = (np.arange(size) + 0.5)[None] - ((np.arange(wanted) + 0.5) * size / wanted)[:, None]
    x = np.abs(at / scale)
    if kernel == "bilinear":
        rows = np.maximum(1 - x, 0)
    elif kernel == "bicubic":
        near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
        rows = np.where(x < 1, near, np.where(x < 2, far, 0))
    else:
        rows = np.where(x < 3, np.sinc(x) * np.sinc(x / 3), 0)
    normal: NDArray[np.float64] = rows / rows.sum(axis=1, keepdims=True)
    return normal


@pytest.mark.parametrize("dtype", DEPTHS)
def test_area_is_the_mean_and_nearest_a_pixel(dtype: Any) -> None:
    image = page(3, dtype)
    mean = image.reshape(16, 3, 33, 2, 3).mean(axis=(1, 3), dtype=np.float64)
    assert np.abs(resize(image, (33, 16), "area") - mean).max() <= 0.51
    assert np.array_equal(resize(image, (22, 16), "nearest"), image[1::3, 1::3])
    assert np.array_equal(resize(image, (132, 96), "nearest"), image.repeat(2, axis=0).repeat(2, axis=1))


@pytest.mark.parametrize("kernel", [k for k in KERNELS if k != "nearest"])
def test_transparent_pixels_do_not_bleed(kernel: str) -> None:
    image = np.zeros((40, 40, 4), np.uint8)
    image[:, :20] = (200, 100, 50, 255)
    image[:, 20:] = (0, 255, 0, 0)
    done = resize(image, (11, 11), kernel)
    seen = done[done[..., 3] > 40]
    assert np.abs(seen[:, :3].astype(int) - (200, 100, 50)).max() <= 2


# --- filters -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DEPTHS)
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_filters_against_scipy(channels: int, dtype: Any) -> None:
    image, full = page(channels, dtype), float(np.iinfo(dtype).max)
    colours = image[..., : {1: 1, 2: 1, 3: 3, 4: 3}[channels]].astype(np.float64)
    tolerance = 0.51 + full * 1e-5  # scipy's Gaussian and OpenCV's differ in their last digits

    def filtered(name: str, **options: Any) -> NDArray[np.float64]:
        done = apply(image, name, **{**OPTIONS, **options})
        assert done.dtype == dtype
        if channels in {2, 4}:
            assert np.array_equal(done[..., -1], image[..., -1])
            done = done[..., :-1]
        return done.astype(np.float64)

    blurred = ndimage.gaussian_filter(colours, (2.3, 2.3, 0), mode="mirror", truncate=4)
    assert np.abs(filtered("gaussian", sigma=2.3) - blurred).max() <= tolerance
    sharp = np.clip(colours + 0.7 * (colours - blurred), 0, full)
    assert np.abs(filtered("sharpen", sigma=2.3, amount=0.7) - sharp).max() <= 2 * tolerance
    assert np.array_equal(filtered("median", radius=2), ndimage.median_filter(colours, (5, 5, 1), mode="nearest"))
    grey = colours @ (0.299, 0.587, 0.114) if colours.shape[2] == 3 else colours[..., 0]
    assert np.abs(filtered("grayscale")[..., 0] - grey).max() <= 0.51 + full * 2e-5
    slopes = [ndimage.sobel(np.rint(grey), axis, mode="mirror") for axis in (0, 1)]
    assert np.abs(filtered("edge")[..., 0] - np.clip(np.hypot(*slopes) / 4, 0, full)).max() <= 3 + full * 5e-5
    assert np.array_equal(filtered("invert"), full - colours)


@pytest.mark.parametrize("dtype", DEPTHS)
def test_clahe_raises_contrast_and_keeps_colours(dtype: Any) -> None:
    full = int(np.iinfo(dtype).max)
    y, x = np.mgrid[:128, :128]
    dull = (full * (0.45 + 0.05 * np.sin(x / 5) * np.sin(y / 9)))[..., None].astype(dtype)
    assert np.ptp(apply(dull, "clahe", **OPTIONS)) > 1.5 * np.ptp(dull)
    same = apply(np.repeat(dull, 3, axis=2), "clahe", **OPTIONS).astype(int)
    assert np.abs(same - apply(dull, "clahe", **OPTIONS)).max() <= 2 + full // 10_000  # grey stays grey, and is the same


def test_a_step_from_black_to_white_is_white() -> None:
    step = np.zeros((9, 9, 1), np.uint8)
    step[:, 5:] = 255
    assert apply(step, "edge", **OPTIONS)[4, :, 0].tolist() == [0, 0, 0, 0, 255, 255, 0, 0, 0]


def test_a_wide_median_of_16_bits_is_refused() -> None:
    with pytest.raises(UsageError, match="16-bit"):
        apply(page(1, np.uint16), "median", **{**OPTIONS, "radius": 3})


# --- convert -----------------------------------------------------------------------------------------------------------------


def test_depths() -> None:
    every = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
    assert np.array_equal(to_bits(to_bits(every, 16), 8), every)
    wide = np.arange(65536, dtype=np.uint16).reshape(256, 256, 1)
    assert np.abs(to_bits(wide, 8) - wide / 257).max() <= 0.5
    assert to_bits(wide, 16) is wide


def test_alpha_is_laid_on_white() -> None:
    assert flatten(np.array([[[10, 20, 30, 255], [10, 20, 30, 0], [0, 0, 0, 51]]], np.uint8)).tolist() == [
        [[10, 20, 30], [255, 255, 255], [204, 204, 204]]
    ]
    grey = page(2, np.uint16)
    with_pillow = Image.new("RGBA", (1, 1), (0, 100, 200, 128))
    on_white = Image.alpha_composite(Image.new("RGBA", (1, 1), "white"), with_pillow).convert("RGB")
    assert np.abs(flatten(np.asarray(with_pillow)).astype(int) - np.asarray(on_white)).max() <= 1
    assert flatten(grey).shape == (48, 66, 1)


@pytest.mark.parametrize("file_format", ["jpeg", "png", "tiff", "webp"])
@pytest.mark.parametrize("bits", [None, 8, 16])
@pytest.mark.parametrize("dtype", DEPTHS)
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_everything_fits_the_file_that_it_is_converted_to(file_format: Any, bits: Any, dtype: Any, channels: int) -> None:
    image = Image2D((page(channels, dtype), page(channels, np.uint8)), (300, 300), ImageFile("tiff"))
    file = ImageFile(file_format, 77, lossless=True)
    done, warnings = convert(image, file, bits)
    assert (done.file, done.dpi, len(done.pages)) == (file, (300, 300), 2)
    narrow = file_format in {"jpeg", "webp"}
    assert done.bits == (8 if narrow else bits or image.bits)
    lost = (narrow and dtype == np.uint16 and bits is None) + (file_format == "jpeg" and channels in {2, 4})
    assert len(warnings) == lost
    if not narrow and bits is None:
        assert all(a is b for a, b in zip(done.pages, image.pages, strict=True))


# --- the stage ---------------------------------------------------------------------------------------------------------------


def test_the_stage_runs_them_on_every_page() -> None:
    imaging = Imaging(ImagingSettings(max_pixels=20_000))
    image = Image2D((page(), page(4, np.uint16, 20, 30)), (300, 300), ImageFile("tiff"))

    def run(component: Any, **parameters: Any) -> Any:
        declared, function = imaging.operation(component.id)
        return function({"image": image}, declared.parameters.model_validate(parameters), lambda *_: None)

    (small,) = run(RESIZE, width=33).outputs
    assert [p.shape for p in small.pages] == [(24, 33, 3), (22, 33, 4)]
    assert (small.file, small.dpi) == (image.file, image.dpi)
    with pytest.raises(TooManyPixels):
        run(RESIZE, width=500)
    (grey,) = run(FILTER, filter="grayscale").outputs
    assert [p.shape[2] for p in grey.pages] == [1, 2]
    jpeg = run(CONVERT, format="jpeg", quality=5)
    assert jpeg.outputs[0].file == ImageFile("jpeg", 5)
    assert len(jpeg.warnings) == 2
    with pytest.raises(ValidationError, match="width, height"):
        run(RESIZE)
