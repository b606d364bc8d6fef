"""2-D image files: what goes in comes out, upright and without a word about anybody; what is not whole is refused."""

from __future__ import annotations

import io
import itertools
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from PIL import Image, ImageCms

from deployments.imageio.pictures import PictureLimits, describe_picture, read_picture, write_picture
from scangraph.contracts import Image2D, ImageFile, ImageFormat
from scangraph.contracts.errors import (
    ImageFileError,
    IntegrityError,
    InvalidHeader,
    TooManyPixels,
    Truncated,
    UnsupportedDimensions,
    UnsupportedPixelType,
)

FORMATS: tuple[ImageFormat, ...] = ("jpeg", "png", "tiff", "webp")
LIMITS = PictureLimits(max_pixels=1_000_000, max_pages=10)


def read(data: bytes, file_format: ImageFormat) -> Image2D:
    return read_picture(data, "x", file_format, LIMITS)


def photograph(height: int = 60, width: int = 80, channels: int = 3, dtype: Any = np.uint8) -> NDArray[Any]:
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / 9 + c) + np.cos(y / 7 - c) + 2 for c in range(channels)]
    return (np.stack(waves, axis=-1) / 4 * np.iinfo(dtype).max).astype(dtype)


def pillow(image: Image.Image, file_format: str, **options: Any) -> bytes:
    with io.BytesIO() as out:
        image.save(out, file_format, **options)
        return out.getvalue()


# --- round trips -----------------------------------------------------------------------------------------------------------

pages = st.tuples(st.sampled_from([np.uint8, np.uint16]), st.integers(1, 40), st.integers(1, 40), st.integers(1, 4)).flatmap(
    lambda kind: hnp.arrays(kind[0], kind[1:])
)


@given(pages, st.sampled_from(["png", "tiff"]), st.none() | st.tuples(st.integers(1, 3000), st.integers(1, 3000)))
@settings(max_examples=60, deadline=None)
def test_png_and_tiff_keep_every_bit(page: NDArray[Any], file_format: ImageFormat, dpi: tuple[float, float] | None) -> None:
    again = read(write_picture(Image2D((page,), dpi, ImageFile(file_format))), file_format)
    assert again.pages[0].dtype == page.dtype
    assert np.array_equal(again.pages[0], page)
    assert (again.dpi is None) == (dpi is None)
    if dpi is not None and again.dpi is not None:  # PNG counts by the metre
        assert np.allclose(again.dpi, dpi, atol=0.02)
    assert again.file.format == file_format


def test_pages_of_a_tiff_may_differ() -> None:
    made = (photograph(), photograph(20, 30, 1, np.uint16), photograph(5, 5, 4))
    again = read(write_picture(Image2D(made, file=ImageFile("tiff"))), "tiff")
    for one, other in zip(again.pages, made, strict=True):
        assert one.dtype == other.dtype
        assert np.array_equal(one, other)
    assert describe_picture(again)["pages"] == 3


@pytest.mark.parametrize("channels", [3, 4])
def test_lossless_webp_keeps_every_bit(channels: int) -> None:
    page = photograph(channels=channels)
    page[..., 3:] |= 1  # WebP drops colours where nothing is seen
    again = read(write_picture(Image2D((page,), file=ImageFile("webp", lossless=True))), "webp")
    assert np.array_equal(again.pages[0], page)


@pytest.mark.parametrize("file_format", ["jpeg", "webp"])
def test_quality_is_what_it_says(file_format: ImageFormat) -> None:
    page, sizes, losses = photograph(200, 300), [], []
    page = np.clip(page + np.random.default_rng(0).normal(0, 8, page.shape), 0, 255).astype(np.uint8)
    for quality in (20, 60, 90, 100):
        data = write_picture(Image2D((page,), (300, 150), ImageFile(file_format, quality)))
        sizes.append(len(data))
        losses.append(float(np.abs(read(data, file_format).pages[0].astype(int) - page).mean()))
    assert sizes == sorted(sizes)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < (2 if file_format == "jpeg" else 6)  # WebP's colours have half the resolution


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_reads_as_pillow_reads_it(channels: int) -> None:
    page = photograph(channels=channels)
    data = write_picture(Image2D((page,), (300, 150), ImageFile("jpeg", 90)))
    with Image.open(io.BytesIO(data)) as opened:
        assert opened.info["dpi"] == (300, 150)
        assert np.abs(np.asarray(opened).reshape(page.shape).astype(int) - read(data, "jpeg").pages[0]).max() <= 2
    assert read(data, "jpeg").dpi == (300, 150)


# --- other writers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_adobe_deflate", "tiff_deflate", "packbits"])
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_tiffs_of_libtiff(mode: str, compression: str | None) -> None:
    if mode == "I;16":
        image = Image.fromarray(photograph(33, 21, 1, np.uint16)[..., 0])
    else:
        image = Image.fromarray(photograph(33, 21, 4)).convert(mode)
    wanted = np.asarray(image.convert({"P": "RGB", "1": "L"}.get(mode, mode)))
    found = read(pillow(image, "TIFF", compression=compression), "tiff").pages[0]
    assert np.array_equal(found.squeeze(), wanted)


@pytest.mark.parametrize("options", [{"predictor": True}, {"tile": (16, 32)}, {"byteorder": ">"}, {"planarconfig": "separate"},
                                     {"bigtiff": True}, {"rowsperstrip": 7}, {"photometric": "miniswhite"}])  # fmt: skip
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_tiffs_of_tifffile(options: dict[str, Any], dtype: Any) -> None:
    import tifffile

    grey = "photometric" in options
    page = photograph(50, 70, 1 if grey else 3, dtype)
    array = page[..., 0] if grey else page.transpose(2, 0, 1) if "planarconfig" in options else page
    with io.BytesIO() as out:
        tifffile.imwrite(out, array, **{"photometric": "rgb", "compression": "zlib", **options})
        found = read(out.getvalue(), "tiff").pages[0]
    assert np.array_equal(found, np.iinfo(dtype).max - page if grey else page)


@pytest.mark.parametrize(("mode", "bits"), [("1", 1), ("P", 2), ("P", 4), ("P", 8), ("L", 8), ("LA", 8), ("RGBA", 8)])
def test_pngs_of_libpng(mode: str, bits: int) -> None:
    image = Image.fromarray(photograph(33, 21, 4))
    image = image.convert("RGB").quantize(2**bits) if mode == "P" else image.convert(mode)
    found = read(pillow(image, "PNG", bits=bits), "png").pages[0]
    assert np.array_equal(found.squeeze(), np.asarray(image.convert({"P": "RGB", "1": "L"}.get(mode, mode))))


def test_premultiplied_alpha_is_made_straight() -> None:
    import tifffile

    page = np.zeros((2, 2, 4), np.uint8)
    page[0, 0], page[0, 1] = (100, 50, 0, 128), (255, 255, 255, 255)
    with io.BytesIO() as out:
        tifffile.imwrite(out, page, photometric="rgb", extrasamples=["assocalpha"])
        found = read(out.getvalue(), "tiff").pages[0]
    assert found[0].tolist() == [[199, 100, 0, 128], [255, 255, 255, 255]]
    assert found[1].tolist() == [[0, 0, 0, 0]] * 2


# --- which way is up ---------------------------------------------------------------------------------------------------------

#: Orientation -> how a picture must be turned, as Pillow calls it.
TURNS = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_honoured_once(orientation: int, file_format: ImageFormat) -> None:
    stored = Image.fromarray(photograph(48, 64))
    exif = Image.Exif()
    exif[0x112] = orientation
    exif[0x11A], exif[0x11B], exif[0x128] = 200.0, 100.0, 2
    options = {"lossless": True} if file_format == "webp" else {"quality": 95} if file_format == "jpeg" else {}
    if file_format == "tiff":
        data = pillow(stored, "TIFF", tiffinfo={0x112: orientation}, dpi=(200, 100))
    else:
        data = pillow(stored, file_format, exif=exif, **options)
    as_stored: Image.Image = stored
    if file_format == "jpeg":
        with Image.open(io.BytesIO(data)) as opened:
            as_stored = opened.convert("RGB")
    turn = TURNS[orientation]
    upright = np.asarray(as_stored if turn is None else as_stored.transpose(turn))
    found = read(data, file_format)
    assert np.abs(found.pages[0].astype(int) - upright).max() <= (2 if file_format == "jpeg" else 0)
    dpi: Any = (200, 100) if orientation < 5 else (100, 200)
    assert found.dpi == dpi
    assert [found.height, found.width] == list(upright.shape[:2])
    again = write_picture(found)
    with Image.open(io.BytesIO(again)) as opened:
        assert opened.getexif().get(0x112, 1) == 1
        assert opened.size == (found.width, found.height)


@given(st.binary(max_size=80))
@settings(deadline=None)
def test_damaged_exif_says_nothing(block: bytes) -> None:
    exif = b"Exif\0\0II*\0\x08\0\0\0" + block
    plain = write_picture(Image2D((photograph(8, 8),), file=ImageFile("jpeg")))
    data = plain[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + plain[2:]
    assert set(read(data, "jpeg").pages[0].shape[:2]) == {8}


# --- what is not carried on --------------------------------------------------------------------------------------------------

SECRET = b"Doe, Jane 1970"


@pytest.mark.parametrize("file_format", FORMATS)
def test_nothing_is_said_about_anybody(file_format: ImageFormat) -> None:
    image = Image.fromarray(photograph())
    exif = Image.Exif()
    exif[0x10E] = exif[0x13B] = SECRET.decode()
    exif.get_ifd(0x8825)[2] = (48.0, 8.0, 12.5)
    if file_format == "tiff":
        data = pillow(image, "TIFF", tiffinfo={270: SECRET.decode(), 315: SECRET.decode()})
    elif file_format == "png":
        from PIL.PngImagePlugin import PngInfo

        text = PngInfo()
        text.add_text("Patient", SECRET.decode())
        text.add_itxt("XML:com.adobe.xmp", SECRET.decode())
        data = pillow(image, "PNG", pnginfo=text, exif=exif)
    else:
        data = pillow(image, file_format, exif=exif, xmp=SECRET, **({"comment": SECRET} if file_format == "jpeg" else {}))
    assert SECRET in data
    found = read(data, file_format)
    for again in FORMATS:
        assert SECRET not in write_picture(Image2D(found.pages, found.dpi, ImageFile(again)))
    assert SECRET.decode() not in str(describe_picture(found))


# --- colours -----------------------------------------------------------------------------------------------------------------


def adobe_like() -> bytes:
    """sRGB's profile with red and green exchanged: whoever ignores it shows the wrong colours."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    count = struct.unpack_from(">I", profile, 128)[0]
    entries = {bytes(profile[132 + 12 * n : 136 + 12 * n]): 132 + 12 * n for n in range(count)}
    red, green = (bytes(profile[entries[tag] + 4 : entries[tag] + 12]) for tag in (b"rXYZ", b"gXYZ"))
    profile[entries[b"rXYZ"] + 4 : entries[b"rXYZ"] + 12], profile[entries[b"gXYZ"] + 4 : entries[b"gXYZ"] + 12] = green, red
    return bytes(profile)


@pytest.mark.parametrize("file_format", ["png", "jpeg", "tiff", "webp"])
def test_colours_become_srgb(file_format: ImageFormat) -> None:
    image = Image.fromarray(photograph())
    options: dict[str, Any] = {"lossless": True} if file_format == "webp" else {}
    plain = read(pillow(image, file_format, **options), file_format).pages[0].astype(int)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    same = read(pillow(image, file_format, icc_profile=srgb, **options), file_format).pages[0]
    assert np.array_equal(same, plain)
    turned = read(pillow(image, file_format, icc_profile=adobe_like(), **options), file_format).pages[0]
    assert np.abs(turned[..., :2].astype(int) - plain[..., 1::-1]).max() <= 3  # red and green have changed places
    assert b"acsp" not in write_picture(Image2D((turned,), file=ImageFile(file_format)))


def test_a_profile_that_cannot_be_used_is_refused_and_grey_stays() -> None:
    with pytest.raises(InvalidHeader, match="profile"):
        read(pillow(Image.fromarray(photograph()), "PNG", icc_profile=b"nonsense" * 40), "png")
    grey = photograph(channels=1)
    again = read(pillow(Image.fromarray(grey[..., 0]), "PNG", icc_profile=adobe_like()), "png")
    assert np.array_equal(again.pages[0], grey)


# --- hostile files -----------------------------------------------------------------------------------------------------------


def examples() -> dict[str, tuple[ImageFormat, bytes]]:
    page = photograph()
    made: dict[str, tuple[ImageFormat, bytes]] = {f: (f, write_picture(Image2D((page,), file=ImageFile(f)))) for f in FORMATS}
    made["progressive"] = ("jpeg", pillow(Image.fromarray(page), "JPEG", progressive=True))
    made["lzw"] = ("tiff", pillow(Image.fromarray(page), "TIFF", compression="tiff_lzw"))
    made["plain"] = ("tiff", pillow(Image.fromarray(page), "TIFF"))
    made["lossless"] = ("webp", write_picture(Image2D((page,), file=ImageFile("webp", lossless=True))))
    return made


EXAMPLES = examples()


@pytest.mark.parametrize("name", EXAMPLES)
def test_cut_anywhere_it_is_refused(name: str) -> None:
    file_format, data = EXAMPLES[name]
    step = max(1, len(data) // 150)
    for end in (*range(4, len(data), step), *range(max(4, len(data) - 12), len(data))):
        # Beyond JPEG's last scan only its end marker is left, and without it is the same picture.
        with pytest.raises((Truncated, IntegrityError, InvalidHeader)):
            read(data[:end], file_format)


@pytest.mark.parametrize("name", EXAMPLES)
@given(data=st.data())
@settings(max_examples=120, deadline=None)
def test_damage_is_an_error_or_a_picture(name: str, data: st.DataObject) -> None:
    file_format, whole = EXAMPLES[name]
    broken = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        broken[data.draw(st.integers(0, min(len(whole) - 1, 700)) | st.integers(0, len(whole) - 1))] = data.draw(
            st.integers(0, 255)
        )
    try:
        found = read(bytes(broken), file_format)
    except ImageFileError:
        return
    assert 0 < found.width * found.height <= LIMITS.max_pixels


@given(st.sampled_from(FORMATS), st.binary(max_size=300))
@settings(deadline=None)
def test_noise_is_refused(file_format: ImageFormat, noise: bytes) -> None:
    start = {"jpeg": b"\xff\xd8", "png": b"\x89PNG\r\n\x1a\n", "tiff": b"II*\0", "webp": b"RIFF"}[file_format]
    with pytest.raises(ImageFileError):
        read(start + noise, file_format)


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_of(width: int, height: int, *more: bytes) -> bytes:
    ihdr = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + ihdr + b"".join(more) + png_chunk(b"IEND", b"")


def tiff_of(*entries: tuple[int, int, int, int], after: int = 0) -> bytes:
    body = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + body + struct.pack("<I", after)


def jpeg_of(width: int, height: int) -> bytes:
    data = bytearray(write_picture(Image2D((photograph(8, 8),), file=ImageFile("jpeg"))))
    at = data.index(b"\xff\xc0")
    struct.pack_into(">HH", data, at + 5, height, width)
    return bytes(data)


def many_scans() -> bytes:
    data = pillow(Image.fromarray(photograph(8, 8)), "JPEG", progressive=True)
    at = data.rindex(b"\xff\xda")
    return data[:at] + data[at:-2] * 300 + data[-2:]


GREY8 = ((258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1))
WEBP_SIZE = struct.pack("<I", 10) + bytes(4) + b"\xff\x3f\0" * 2 + bytes(8)
LONG = zlib.compress(bytes(10**8))
BOMBS: dict[str, tuple[ImageFormat, Callable[[], bytes], type[ImageFileError]]] = {
    "a PNG of 2³¹ pixels": ("png", lambda: png_of(65535, 32768, png_chunk(b"IDAT", zlib.compress(bytes(100)))), TooManyPixels),
    "a PNG that cannot hold what it declares": (
        "png", lambda: png_of(1000, 1000, png_chunk(b"IDAT", zlib.compress(bytes(100)))), Truncated,
    ),
    "a PNG that holds less": ("png", lambda: png_of(300, 30, png_chunk(b"IDAT", zlib.compress(bytes(3000)))), IntegrityError),
    "a PNG without pixels": ("png", lambda: png_of(0, 5), InvalidHeader),
    "something behind a PNG": ("png", lambda: EXAMPLES["png"][1] + b"PK\x03\x04", IntegrityError),
    "an animated PNG": (
        "png", lambda: png_of(2, 2, png_chunk(b"acTL", bytes(8)), png_chunk(b"IDAT", zlib.compress(bytes(6)))),
        UnsupportedDimensions,
    ),
    "a profile that inflates to 100 MB": (
        "png",
        lambda: png_of(2, 2, png_chunk(b"iCCP", b"x\0\0" + LONG), png_chunk(b"IDAT", zlib.compress(bytes(6)))),
        InvalidHeader,
    ),
    "a JPEG of 4·10⁹ pixels": ("jpeg", lambda: jpeg_of(65535, 65535), TooManyPixels),
    "a JPEG larger than its scan": ("jpeg", lambda: jpeg_of(900, 900), Truncated),
    "a JPEG with hundreds of scans": ("jpeg", many_scans, InvalidHeader),
    "a JPEG in CMYK": ("jpeg", lambda: pillow(Image.new("CMYK", (9, 9)), "JPEG"), UnsupportedPixelType),
    "a TIFF of 10¹² pixels": (
        "tiff", lambda: tiff_of((256, 4, 1, 10**6), (257, 4, 1, 10**6), *GREY8), TooManyPixels,
    ),
    "a TIFF whose pages lead in a circle": ("tiff", lambda: tiff_of((256, 4, 1, 5), after=8), InvalidHeader),
    "a TIFF with strips behind its end": (
        "tiff",
        lambda: tiff_of((256, 4, 1, 5), (257, 4, 1, 5), *GREY8, (273, 4, 1, 9999), (278, 4, 1, 5), (279, 4, 1, 25)),
        Truncated,
    ),
    "a TIFF with a strip that is too short": (
        "tiff",
        lambda: tiff_of((256, 4, 1, 5), (257, 4, 1, 5), *GREY8, (273, 4, 1, 8), (278, 4, 1, 5), (279, 4, 1, 24)),
        Truncated,
    ),
    "a TIFF with a billion strips": ("tiff", lambda: tiff_of((256, 4, 1, 5), (273, 4, 2**30, 8)), Truncated),
    "a TIFF of floats": (
        "tiff", lambda: pillow(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"), UnsupportedPixelType,
    ),
    "a TIFF in JPEG": (
        "tiff", lambda: pillow(Image.fromarray(photograph()), "TIFF", compression="jpeg"), UnsupportedPixelType,
    ),
    "an animated WebP": (
        "webp",
        lambda: pillow(Image.new("RGB", (9, 9)), "WEBP", save_all=True, append_images=[Image.new("RGB", (9, 9), "red")]),
        UnsupportedDimensions,
    ),
    "a WebP of 10⁸ pixels": (
        "webp", lambda: b"RIFF" + struct.pack("<I", 30) + b"WEBPVP8X" + WEBP_SIZE,
        TooManyPixels,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_before_they_are_decoded(name: str) -> None:
    file_format, make, error = BOMBS[name]
    with pytest.raises(error):
        read(make(), file_format)


def test_pages_are_counted() -> None:
    image = Image.new("L", (4, 4))
    data = pillow(image, "TIFF", save_all=True, append_images=[image] * 10)
    with pytest.raises(TooManyPixels, match="10 pages"):
        read(data, "tiff")
    assert len(read_picture(data, "x", "tiff", PictureLimits(max_pages=11)).pages) == 11
    with pytest.raises(TooManyPixels, match="pixels"):
        read_picture(data, "x", "tiff", PictureLimits(max_pixels=175, max_pages=11))


def test_every_format_is_told_from_the_others() -> None:
    for one, other in itertools.permutations(FORMATS, 2):
        with pytest.raises(ImageFileError):
            read(EXAMPLES[one][1], other)
