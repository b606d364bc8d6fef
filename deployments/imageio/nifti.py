"""NIfTI files behind a gate: every byte is accounted for before a voxel is believed.

The usual readers accept files that are cut, damaged or contradict themselves, and return wrong voxels or invented millimetres
(59 hostile files were tried). So the header is read here (NIfTI-1 and -2, https://nifti.nimh.nih.gov), the file is inflated to
its end under a limit, its checksum and exact length are required, and two geometries must agree. Free-text fields may name a
patient: they are never kept, shown or logged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import numpy as np
from isal import isal_zlib
from isal.igzip_lib import IsalError
from numpy.typing import NDArray

from scangraph.contracts import SCHEMES, LabelMap, Volume, check_labels, lookup_table
from scangraph.contracts.errors import (
    AmbiguousGeometry,
    EmptyFile,
    ImageFileError,
    InflatedTooLarge,
    IntegrityError,
    InvalidGeometry,
    InvalidHeader,
    InvalidIntensity,
    InvalidParameters,
    InvalidVolume,
    MissingGeometry,
    TooManyVoxels,
    Truncated,
    UnsupportedDimensions,
    UnsupportedMedia,
    UnsupportedPixelType,
)

_GZIP_MAGIC = b"\x1f\x8b"
_GZIP_WBITS = 31
#: Deflate codes at best 258 bytes in 2 bits; a file that declares more than this cannot be whole.
_DEFLATE_RATIO = 1032
_LABEL_INTENT = 1002
_MM, _METRE, _MICRON = 2, 1, 3
_TO_MM = {0: 1.0, _METRE: 1000.0, _MM: 1.0, _MICRON: 0.001}
_SPACING_RANGE_MM = (1e-3, 1e3)
_FARTHEST_MM = 1e6
#: How far the corners of two geometries may lie apart and still be one; scanners' rounded headers differ by less.
_AGREEMENT_MM = 0.1
_LARGEST_OFFSET = 16 * 2**20
_LARGEST_SLOPE = 1e6
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])

_PIXELS = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8"}
_UNSUPPORTED_PIXELS = {1: "binary", 32: "complex", 128: "RGB", 1536: "float128", 1792: "complex", 2048: "complex", 2304: "RGBA"}
_CODES = {np.dtype(name).str[1:]: code for code, name in _PIXELS.items()}


def _fields(size: int, **at: tuple[str | tuple[str, int], int]) -> np.dtype[Any]:
    formats = [form for form, _ in at.values()]
    return np.dtype({"names": list(at), "formats": formats, "offsets": [offset for _, offset in at.values()], "itemsize": size})


#: Only the fields that matter here; what is not named is never looked at.
_NIFTI1 = _fields(
    348,
    sizeof_hdr=("i4", 0),
    dim=(("i2", 8), 40),
    intent_code=("i2", 68),
    datatype=("i2", 70),
    bitpix=("i2", 72),
    pixdim=(("f4", 8), 76),
    vox_offset=("f4", 108),
    scl_slope=("f4", 112),
    scl_inter=("f4", 116),
    xyzt_units=("u1", 123),
    cal_max=("f4", 124),
    descrip=("S80", 148),
    qform_code=("i2", 252),
    sform_code=("i2", 254),
    quatern=(("f4", 3), 256),
    qoffset=(("f4", 3), 268),
    srow=(("f4", 12), 280),
    magic=("S4", 344),
)
_NIFTI2 = _fields(
    540,
    sizeof_hdr=("i4", 0),
    magic=("S8", 4),
    datatype=("i2", 12),
    bitpix=("i2", 14),
    dim=(("i8", 8), 16),
    pixdim=(("f8", 8), 104),
    vox_offset=("i8", 168),
    scl_slope=("f8", 176),
    scl_inter=("f8", 184),
    qform_code=("i4", 344),
    sform_code=("i4", 348),
    quatern=(("f8", 3), 352),
    qoffset=(("f8", 3), 376),
    srow=(("f8", 12), 400),
    xyzt_units=("i4", 500),
    intent_code=("i4", 504),
)


@dataclass(frozen=True)
class Limits:
    """What a file may hold.

    Parameters
    ----------
    max_voxels : int
        Voxels of an image.
    max_inflated_bytes : int
        Bytes a file may inflate to.
    """

    max_voxels: int = 1024**3
    max_inflated_bytes: int = 8 * 1024**3


@dataclass(frozen=True)
class _Header:
    """A header whose fields passed the policy; `end` is the exact length of the inflated file."""

    shape_zyx: tuple[int, int, int]
    pixels: np.dtype[Any]
    offset: int
    end: int
    scale: tuple[float, float] | None
    affine_lps: NDArray[np.float64]


def read_nifti(
    data: bytes | memoryview, name: str, *, limits: Limits | None = None, as_mask: bool = False, scheme: str | None = None
) -> Volume:
    """Read a `.nii.gz` or `.nii` file.

    Parameters
    ----------
    data : bytes-like
        The whole file.
    name : str
        What it is called in messages; its ending tells a compressed file from a plain one.
    limits : Limits, optional
        What it may hold.
    as_mask : bool
        Read labels instead of intensities.
    scheme : str, optional
        For masks: a numbering of `SCHEMES` other than the label table's.

    Returns
    -------
    Volume or LabelMap
        LPS. Intensities are int16 where all are whole, else float32; labels uint8, or uint16 where they need it. The array may
        be a read-only view of the inflated file.

    Raises
    ------
    ImageFileError
        One of its kinds, by the policy that README.md lists: the file, what was found, and what to do.
    UnknownLabels
        If a mask holds numbers that nobody named.
    """
    limits = limits or Limits()
    header, content = _open(memoryview(data).cast("B"), name, limits)
    count = math.prod(header.shape_zyx)
    raw = np.frombuffer(content, header.pixels, count, header.offset).reshape(header.shape_zyx)
    if as_mask:
        array = _labels(raw, header.scale, name)
        if scheme is not None:
            if scheme not in SCHEMES:
                raise InvalidParameters(component="label_scheme", detail=f"{scheme!r} is not one of {', '.join(SCHEMES)}")
            unknown = sorted(set(np.unique(array).tolist()) - SCHEMES[scheme].keys() - {0})
            if unknown:
                raise InvalidIntensity(name=name, reason=f"the scheme {scheme!r} has no label {unknown[0]}")
            array = lookup_table(SCHEMES[scheme], int(array.max(initial=0)) + 1)[array]
        try:
            mask = LabelMap.from_affine_lps(array, header.affine_lps)
        except InvalidVolume as error:
            raise InvalidGeometry(name=name, reason=error.detail) from None
        numbers = tuple(mask.counts())
        check_labels(numbers, name)
        return LabelMap(mask.array, mask.spacing_mm, mask.origin_mm, mask.direction, numbers)
    try:
        return Volume.from_affine_lps(_intensities(raw, header.scale, name), header.affine_lps)
    except InvalidVolume as error:
        raise InvalidGeometry(name=name, reason=error.detail) from None


def write_nifti(volume: Volume, *, level: int = 1) -> bytes:
    """Write a `.nii.gz` file (NIfTI-1, one gzip member, the same bytes for the same volume).

    Parameters
    ----------
    volume : Volume or LabelMap
        A label map is marked as one (intent 1002), so that viewers do not tint the background.
    level : int
        ISA-L's, 0 to 3.

    Raises
    ------
    UnsupportedDimensions
        If an axis is longer than NIfTI-1 can say, or there are channels.
    """
    array = volume.array
    if array.ndim != 3 or max(array.shape) > np.iinfo(np.int16).max:
        raise UnsupportedDimensions(name="result", reason=f"NIfTI-1 cannot hold an image of shape {array.shape}")
    if array.dtype.kind == "f" and array.dtype.itemsize == 2:
        array = array.astype(np.float32)
    if array.dtype.kind == "b":
        array = array.astype(np.uint8)
    array = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    header = _make_header(volume, array)
    compressor = isal_zlib.compressobj(level, isal_zlib.DEFLATED, _GZIP_WBITS)
    body = memoryview(array.reshape(-1).view(np.uint8))  # type: ignore[arg-type]
    return b"".join((compressor.compress(header), compressor.compress(body), compressor.flush()))


# --- bytes -------------------------------------------------------------------------------------------------------------------


def _open(data: memoryview, name: str, limits: Limits) -> tuple[_Header, bytes | memoryview]:
    """Return the header and the whole inflated file, of exactly the length that the header declares."""
    if not len(data):
        raise EmptyFile(name=name, reason="it has 0 bytes; send it again")
    if data[:2] != _GZIP_MAGIC:
        if name.lower().endswith(".gz"):
            raise UnsupportedMedia(name=name, reason="it is called .gz but is not compressed; send a real .nii.gz")
        header = _read_header(bytes(data[:540]), name, limits)
        _check_length(len(data), header.end, name)
        return header, data
    head = _inflate_head(data, name)
    header = _read_header(head, name, limits)
    if header.end > (len(data) + 64) * _DEFLATE_RATIO:
        raise Truncated(name=name, reason=f"it declares {header.end} bytes, and its {len(data)} cannot hold them")
    stream = isal_zlib.decompressobj(_GZIP_WBITS)
    try:
        content = stream.decompress(data, header.end + 1)
    except IsalError:  # type: ignore[misc] # its stub forgets the base class
        raise IntegrityError(
            name=name, reason="its compressed data or checksum is wrong; it was damaged, send it again"
        ) from None
    if len(content) > header.end:
        raise InflatedTooLarge(name=name, reason=f"it inflates past the {header.end} bytes its header declares")
    if not stream.eof:
        # All output may be there while the checksum behind it is not.
        raise Truncated(name=name, reason=f"it ends after {len(content)} of {header.end} bytes; it was cut, send it again")
    _check_length(len(content), header.end, name)
    _check_rest(bytes(stream.unused_data), name)
    return header, content


def _inflate_head(data: memoryview, name: str) -> bytes:
    try:
        return bytes(isal_zlib.decompressobj(_GZIP_WBITS).decompress(bytes(data[: 64 * 1024]), 540))
    except IsalError:  # type: ignore[misc] # its stub forgets the base class
        raise IntegrityError(
            name=name, reason="its compressed data is wrong from the start; it was damaged, send it again"
        ) from None


def _check_length(found: int, declared: int, name: str) -> None:
    if found < declared:
        raise Truncated(
            name=name, reason=f"it has {found} of the {declared} bytes its header declares; it was cut, send it again"
        )
    if found > declared:
        raise InflatedTooLarge(name=name, reason=f"it has {found - declared} bytes more than its header declares")


def _check_rest(rest: bytes, name: str) -> None:
    """Refuse whatever follows the first gzip member; only zeros, which tapes and block devices pad with, mean nothing."""
    if not rest.strip(b"\0"):
        return
    if rest.startswith(_GZIP_MAGIC):
        raise InflatedTooLarge(name=name, reason="a second compressed member follows the image")
    raise IntegrityError(name=name, reason="other data follows the image")


# --- header ------------------------------------------------------------------------------------------------------------------


def _read_header(head: bytes, name: str, limits: Limits) -> _Header:
    def refuse(reason: str) -> NoReturn:
        raise InvalidHeader(name=name, reason=reason)

    fields = _find_layout(head, name)
    magic = bytes(fields["magic"])
    if magic in {b"ni1", b"ni2"}:
        raise UnsupportedMedia(name=name, reason="it is the header of a .hdr/.img pair; send one .nii.gz")
    if magic not in {b"n+1", b"n+2\0\r\n\x1a\n"}:
        refuse("its magic is not NIfTI's")
    dim = [int(n) for n in fields["dim"]]
    if not 1 <= dim[0] <= 7:
        refuse(f"it declares {dim[0]} dimensions")
    if min(dim[1 : dim[0] + 1]) <= 0:
        refuse(f"it declares the size {'×'.join(map(str, dim[1 : dim[0] + 1]))}")
    if dim[0] < 3 or math.prod(dim[4 : dim[0] + 1]) != 1:
        size = "×".join(map(str, dim[1 : dim[0] + 1]))
        raise UnsupportedDimensions(name=name, reason=f"it is {size}; send one 3-D image")
    shape = (dim[3], dim[2], dim[1])
    voxels = math.prod(shape)
    if voxels > limits.max_voxels:
        raise TooManyVoxels(name=name, reason=f"it declares {voxels} voxels, more than the {limits.max_voxels} allowed")

    code = int(fields["datatype"])
    if code in _UNSUPPORTED_PIXELS:
        raise UnsupportedPixelType(name=name, reason=f"its voxels are {_UNSUPPORTED_PIXELS[code]}; send a CT or a mask")
    if code not in _PIXELS:
        refuse(f"it has the unknown data type {code}")
    pixels = np.dtype(_PIXELS[code]).newbyteorder("<" if fields.dtype["dim"].base.byteorder in "<=" else ">")
    if int(fields["bitpix"]) != 8 * pixels.itemsize:
        refuse(f"its data type has {8 * pixels.itemsize} bits a voxel, it declares {int(fields['bitpix'])}")
    offset = float(fields["vox_offset"])
    least = 352 if fields.dtype.itemsize == _NIFTI1.itemsize else 544
    if not (math.isfinite(offset) and offset == int(offset) and least <= offset <= _LARGEST_OFFSET):
        refuse(f"its voxels begin at byte {offset:g}")
    end = int(offset) + voxels * pixels.itemsize
    if end > limits.max_inflated_bytes:
        raise InflatedTooLarge(name=name, reason=f"it declares {end} bytes, more than the {limits.max_inflated_bytes} allowed")
    return _Header(shape, pixels, int(offset), end, _scaling(fields, name), _geometry(fields, shape, name))


def _find_layout(head: bytes, name: str) -> Any:
    """Return the fields as NIfTI-1 or -2 of whichever byte order makes the first number a header's size."""
    for layout in (_NIFTI1, _NIFTI2):
        orders: tuple[Literal["<", ">"], ...] = ("<", ">")
        for order in orders:
            if int.from_bytes(head[:4], "little" if order == "<" else "big") == layout.itemsize:
                if len(head) < layout.itemsize:
                    raise Truncated(name=name, reason="it ends inside its header; it was cut, send it again")
                return np.frombuffer(head, layout.newbyteorder(order), 1)[0]
    if len(head) < 4:
        raise Truncated(name=name, reason="it ends inside its header; it was cut, send it again")
    raise UnsupportedMedia(name=name, reason="it is not a NIfTI file; send .nii.gz")


def _scaling(fields: Any, name: str) -> tuple[float, float] | None:
    """Return (slope, intercept), or None for stored values as they are. A slope of 0 means unscaled, whatever the intercept."""
    slope, intercept = float(fields["scl_slope"]), float(fields["scl_inter"])
    if slope == 0:
        return None
    if not (math.isfinite(slope) and math.isfinite(intercept) and max(abs(slope), abs(intercept)) <= _LARGEST_SLOPE):
        raise InvalidIntensity(name=name, reason=f"its values are scaled by {slope:g} and shifted by {intercept:g}")
    return None if (slope, intercept) == (1, 0) else (slope, intercept)


def _geometry(fields: Any, shape_zyx: tuple[int, int, int], name: str) -> NDArray[np.float64]:
    """Return index (x, y, z) -> LPS millimetres, from qform and sform, which must agree where both are set."""
    units = int(fields["xyzt_units"]) & 7
    if units not in _TO_MM:
        raise InvalidHeader(name=name, reason=f"it has the unknown length unit {units}")
    pixdim = np.abs(fields["pixdim"][1:4].astype(np.float64)) * _TO_MM[units]
    low, high = _SPACING_RANGE_MM
    if not (np.isfinite(pixdim).all() and pixdim.min() >= low and pixdim.max() <= high):
        raise InvalidGeometry(name=name, reason=f"its voxels measure {'×'.join(f'{p:g}' for p in pixdim)} mm")
    found = []
    if int(fields["qform_code"]) > 0:
        found.append(_qform(fields, pixdim, _TO_MM[units], name))
    if int(fields["sform_code"]) > 0:
        rows = fields["srow"].astype(np.float64).reshape(3, 4) * _TO_MM[units]
        found.append(_LPS_TO_RAS @ np.vstack([rows, [0, 0, 0, 1]]))
    if not found:
        raise MissingGeometry(name=name, reason="it has neither qform nor sform, so its place and size are unknown")
    for affine in found:
        _check_affine(affine, pixdim, name)
    if len(found) == 2:
        corners = np.array([[x, y, z, 1] for x in (0, shape_zyx[2]) for y in (0, shape_zyx[1]) for z in (0, shape_zyx[0])])
        apart = np.abs((corners @ (found[0] - found[1]).T)[:, :3]).max()
        if apart > _AGREEMENT_MM:
            reason = f"its qform and sform place it up to {apart:.1f} mm apart; set both alike, or one code to 0"
            raise AmbiguousGeometry(name=name, reason=reason)
    # Where both are there they agree, and the sform has all its digits; a quaternion's are rounded to 32 bits.
    return found[-1]


def _qform(fields: Any, spacing_mm: NDArray[np.float64], to_mm: float, name: str) -> NDArray[np.float64]:
    b, c, d = (float(v) for v in fields["quatern"])
    squares = b * b + c * c + d * d
    if not math.isfinite(squares) or squares > 1 + 1e-4:
        raise InvalidGeometry(name=name, reason="its quaternion is not a rotation")
    if squares > 1 - 1e-7:  # 180°: rounding must not leave a real part
        scale = 1 / math.sqrt(squares)
        a, b, c, d = 0.0, b * scale, c * scale, d * scale
    else:
        a = math.sqrt(1 - squares)
    rotation = np.array(
        [
            [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
            [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
            [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - b * b - c * c],
        ]
    )
    if float(fields["pixdim"][0]) < 0:  # qfac: a left-handed grid
        rotation[:, 2] *= -1
    affine = np.eye(4)
    affine[:3, :3] = rotation * spacing_mm
    affine[:3, 3] = fields["qoffset"].astype(np.float64) * to_mm
    return np.asarray(_LPS_TO_RAS @ affine)


def _check_affine(affine: NDArray[np.float64], pixdim: NDArray[np.float64], name: str) -> None:
    if not np.isfinite(affine).all() or np.abs(affine).max() > _FARTHEST_MM:
        raise InvalidGeometry(name=name, reason="its place in space is not finite")
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    if spacing.min() < _SPACING_RANGE_MM[0] or abs(np.linalg.det(affine[:3, :3] / np.where(spacing > 0, spacing, 1))) < 1e-3:
        raise InvalidGeometry(name=name, reason="its axes do not span space")
    cosines = affine[:3, :3] / spacing
    if np.abs(cosines.T @ cosines - np.eye(3)).max() > 2e-3:
        raise InvalidGeometry(name=name, reason="its axes are sheared; resample it onto a rectangular grid")
    if np.abs(spacing / pixdim - 1).max() > 0.01:
        sizes = " and ".join("×".join(f"{v:g}" for v in s) for s in (pixdim, spacing))
        raise AmbiguousGeometry(name=name, reason=f"its header gives two voxel sizes, {sizes} mm")


# --- voxels ------------------------------------------------------------------------------------------------------------------


def _intensities(raw: NDArray[Any], scale: tuple[float, float] | None, name: str) -> NDArray[Any]:
    """Return Hounsfield units: int16 where all are whole, else float32."""
    low, high = _range(raw, name)
    if scale:
        slope, intercept = scale
        low, high = sorted((low * slope + intercept, high * slope + intercept))
    limits = np.iinfo(np.int16)
    if low < limits.min or high > limits.max:
        raise InvalidIntensity(name=name, reason=f"its values run from {low:g} to {high:g}, which is no CT in Hounsfield units")
    if scale is None and raw.dtype.kind in "iu":
        return raw.astype(np.int16, copy=False)
    slope, intercept = scale or (1.0, 0.0)
    if raw.dtype.kind in "iu" and slope == int(slope) and intercept == int(intercept):
        return (raw.astype(np.int32) * int(slope) + int(intercept)).astype(np.int16)
    scaled = raw.astype(np.float64) * slope + intercept if scale else raw
    whole = np.empty(raw.shape, np.int16)
    for plane, target in zip(scaled, whole, strict=True):
        np.rint(plane, out=target, casting="unsafe")
        if not np.array_equal(target, plane):
            return scaled.astype(np.float32)
    return whole


def _labels(raw: NDArray[Any], scale: tuple[float, float] | None, name: str) -> NDArray[Any]:
    """Return labels as uint8, or uint16 where a number needs it."""
    low, high = _range(raw, name)
    values = raw if scale is None else raw.astype(np.float64) * scale[0] + scale[1]
    if scale is not None:
        low, high = float(values.min()), float(values.max())
    if low < 0 or high > np.iinfo(np.uint16).max:
        raise InvalidIntensity(name=name, reason=f"its values run from {low:g} to {high:g}, which are no labels")
    labels = values.astype(np.uint8 if high <= 255 else np.uint16, copy=False)
    if values.dtype.kind == "f" and not np.array_equal(labels, values):
        raise InvalidIntensity(name=name, reason="it has fractions, which are no labels")
    return labels


def _range(raw: NDArray[Any], name: str) -> tuple[float, float]:
    low, high = float(raw.min()), float(raw.max())
    if not (math.isfinite(low) and math.isfinite(high)):  # NaN wins in both
        raise InvalidIntensity(name=name, reason="it has voxels that are not finite numbers")
    return low, high


# --- writing -----------------------------------------------------------------------------------------------------------------


def _make_header(volume: Volume, array: NDArray[Any]) -> bytes:
    fields = np.zeros((), _NIFTI1.newbyteorder("<"))
    z, y, x = array.shape
    fields["sizeof_hdr"], fields["magic"], fields["vox_offset"] = 348, b"n+1", 352
    fields["dim"] = [3, x, y, z, 1, 1, 1, 1]
    fields["datatype"], fields["bitpix"] = _CODES[array.dtype.str[1:]], 8 * array.dtype.itemsize
    fields["scl_slope"] = 1
    fields["xyzt_units"] = _MM
    fields["descrip"] = b"scangraph"
    if isinstance(volume, LabelMap):
        fields["intent_code"], fields["cal_max"] = _LABEL_INTENT, max(volume.labels, default=1)
    ras = volume.affine_ras
    fields["srow"], fields["sform_code"] = ras[:3].ravel(), 1
    quaternion, qfac = _quaternion(ras[:3, :3] / np.asarray(volume.spacing_mm[::-1]))
    fields["pixdim"] = [qfac, *volume.spacing_mm[::-1], 0, 0, 0, 0]
    fields["quatern"], fields["qoffset"], fields["qform_code"] = quaternion, ras[:3, 3], 1
    if (
        np.abs(_LPS_TO_RAS @ _qform(fields, np.asarray(volume.spacing_mm[::-1]), 1.0, "") - ras).max() * max(x, y, z)
        > _AGREEMENT_MM / 2
    ):
        fields["qform_code"] = 0  # axes that are not quite orthogonal are more than a quaternion can say
    return fields.tobytes() + bytes(4)


def _quaternion(cosines: NDArray[np.float64]) -> tuple[tuple[float, float, float], float]:
    """Return ((b, c, d), qfac) of the rotation nearest to a matrix of direction cosines (a ≥ 0; method of Bar-Itzhack 2000)."""
    qfac = 1.0 if np.linalg.det(cosines) > 0 else -1.0
    m = cosines * np.array([1, 1, qfac])
    # The eigenvector of the largest eigenvalue is the best rotation, also where m is only nearly one.
    k = np.array(
        [
            [m[0, 0] - m[1, 1] - m[2, 2], m[1, 0] + m[0, 1], m[2, 0] + m[0, 2], m[2, 1] - m[1, 2]],
            [m[1, 0] + m[0, 1], m[1, 1] - m[0, 0] - m[2, 2], m[2, 1] + m[1, 2], m[0, 2] - m[2, 0]],
            [m[2, 0] + m[0, 2], m[2, 1] + m[1, 2], m[2, 2] - m[0, 0] - m[1, 1], m[1, 0] - m[0, 1]],
            [m[2, 1] - m[1, 2], m[0, 2] - m[2, 0], m[1, 0] - m[0, 1], m[0, 0] + m[1, 1] + m[2, 2]],
        ]
    )
    b, c, d, a = np.linalg.eigh(k / 3)[1][:, -1]
    sign = 1.0 if a >= 0 else -1.0
    return (float(b * sign), float(c * sign), float(d * sign)), qfac


__all__ = ["ImageFileError", "Limits", "read_nifti", "write_nifti"]
