"""NIfTI files behind a gate: every byte is accounted for before a voxel is believed.

The usual readers accept files that are cut, damaged or contradict themselves, and return wrong voxels or invented millimetres
(59 hostile files were tried). So the header is read here (NIfTI-1 and -2, https://nifti.nimh.nih.gov), the file is inflated to
its end under a limit, its checksum and exact length are required, and two geometries must agree. Free-text fields may name a
patient: they are never kept, shown or logged.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import numpy as np
from numpy.typing import NDArray

from deployments.imageio.gate import GzipMember, deflate, is_gzip
from scangraph.contracts import SCHEMES, LabelMap, Volume, check_labels, lookup_table
from scangraph.contracts.errors import (
    AmbiguousGeometry,
    EmptyFile,
    ImageFileError,
    InflatedTooLarge,
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

_LABEL_INTENT = 1002
_MM, _METRE, _MICRON = 2, 1, 3
_TO_MM = {0: 1.0, _METRE: 1000.0, _MM: 1.0, _MICRON: 0.001}
_SPACING_RANGE_MM = (1e-3, 1e3)
_FARTHEST_MM = 1e6
#: How far the corners of two geometries may lie apart and still be one; scanners' rounded headers differ by less.
_AGREEMENT_MM = 0.1
#: A quaternion is kept as b, c, d in 32 bits: near half-turns, and LPS is one in RAS, a = √(1 - b² - c² - d²) is all rounding.
_QUATERNION_ERROR_RAD = 7e-4
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
    data: bytes | memoryview,
    name: str,
    *,
    limits: Limits | None = None,
    as_mask: bool = False,
    scheme: str | None = None,
    names: Mapping[int, str] | None = None,
    threads: int | None = None,
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
    names : mapping, optional
        For masks: number -> name of labels that the table lacks.
    threads : int, optional
        Sections inflated at once, of files that `write_nifti` wrote; all cores by default.

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
    InvalidParameters
        If nobody named the scheme.
    """
    if scheme is not None and scheme not in SCHEMES:
        raise InvalidParameters(component="label_scheme", detail=f"{scheme!r} is not one of {', '.join(SCHEMES)}")
    header, content = _open(memoryview(data).cast("B"), name, limits or Limits(), threads)
    count = math.prod(header.shape_zyx)
    raw = np.frombuffer(content, header.pixels, count, header.offset).reshape(header.shape_zyx)
    raw = np.require(raw, requirements="A")  # an extension of odd length would leave numbers across words
    try:
        if not as_mask:
            return Volume.from_affine_lps(_intensities(raw, header.scale, name), header.affine_lps)
        array = _labels(raw, header.scale, name)
        numbers = _occurring(array)
        if scheme is not None:
            table = SCHEMES[scheme]
            unknown = sorted(numbers - table.keys() - {0})
            if unknown:
                raise InvalidIntensity(name=name, reason=f"the scheme {scheme!r} has no label {unknown[0]}")
            array = lookup_table(table, max(numbers) + 1)[array]
            numbers = {table.get(number, 0) for number in numbers}
        check_labels(numbers, name, names)
        return LabelMap.from_affine_lps(array, header.affine_lps, labels=tuple(numbers), names=names or {})
    except InvalidVolume as error:
        raise InvalidGeometry(name=name, reason=error.detail) from None


def write_nifti(volume: Volume, *, level: int | None = None, threads: int | None = None) -> bytes:
    """Write a `.nii.gz` file (NIfTI-1, one gzip member, the same bytes for the same volume).

    Parameters
    ----------
    volume : Volume or LabelMap
        A label map is marked as one (intent 1002), so that viewers do not tint the background.
    level : int, optional
        ISA-L's, 0 to 3. By default what was measured to be both fastest and smallest: 3 for images, 1 for masks.
    threads : int, optional
        Sections compressed at once; all cores by default.

    Raises
    ------
    UnsupportedDimensions
        If an axis is longer than NIfTI-1 can say, or there are channels.
    UnsupportedPixelType
        If the array holds neither whole numbers nor fractions of at most 64 bits.
    """
    array = volume.array
    if array.ndim != 3 or max(array.shape) > np.iinfo(np.int16).max:
        raise UnsupportedDimensions(name="result", reason=f"NIfTI-1 cannot hold an image of shape {array.shape}")
    if array.dtype == np.float16:
        array = array.astype(np.float32)
    if array.dtype.kind == "b":
        array = array.astype(np.uint8)
    if array.dtype.str[1:] not in _CODES:
        raise UnsupportedPixelType(name="result", reason=f"an array of {array.dtype} is neither a CT nor a mask")
    array = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    voxels = memoryview(array.reshape(-1).view(np.uint8))  # type: ignore[arg-type]
    if level is None:
        level = 1 if isinstance(volume, LabelMap) else 3
    return deflate([memoryview(_make_header(volume, array)), voxels], level=level, threads=threads)


# --- bytes -------------------------------------------------------------------------------------------------------------------


def _open(data: memoryview, name: str, limits: Limits, threads: int | None) -> tuple[_Header, memoryview | NDArray[np.uint8]]:
    """Return the header and the whole inflated file, of exactly the length that the header declares."""
    if not len(data):
        raise EmptyFile(name=name, reason="it has 0 bytes; send it again")
    if not is_gzip(data):
        if name.lower().endswith(".gz"):
            raise UnsupportedMedia(name=name, reason="it is called .gz but is not compressed; send a real .nii.gz")
        header = _read_header(bytes(data[: _NIFTI2.itemsize]), name, limits)
        _check_length(len(data), header.end, name)
        return header, data
    member = GzipMember(data, name)
    try:
        header = _read_header(member.head(_NIFTI2.itemsize), name, limits)
    except (TooManyVoxels, InflatedTooLarge):
        raise  # what is too large is not inflated to learn more
    except ImageFileError:
        # A damaged file is called damaged, not what its damaged header seems to say.
        member.check(limits.max_inflated_bytes)
        raise
    return header, member.inflate(header.end, threads=threads)


def _check_length(found: int, declared: int, name: str) -> None:
    if found < declared:
        raise Truncated(
            name=name, reason=f"it has {found} of the {declared} bytes its header declares; it was cut, send it again"
        )
    if found > declared:
        raise InflatedTooLarge(name=name, reason=f"it has {found - declared} bytes more than its header declares")


# --- header ------------------------------------------------------------------------------------------------------------------


def _read_header(head: bytes, name: str, limits: Limits) -> _Header:
    def refuse(reason: str) -> NoReturn:
        raise InvalidHeader(name=name, reason=reason)

    fields = _find_layout(head, name)
    magic = bytes(fields["magic"])
    if magic in {b"ni1", b"ni2"}:
        raise UnsupportedMedia(name=name, reason="it is the header of a .hdr/.img pair; send one .nii.gz")
    if magic != (b"n+1" if fields.dtype.itemsize == _NIFTI1.itemsize else b"n+2\0\r\n\x1a\n"):
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
    qform = sform = None
    if int(fields["qform_code"]) > 0:
        qform = _qform(fields, pixdim, _TO_MM[units], name)
        _check_affine(qform, pixdim, shape_zyx, name)
    if int(fields["sform_code"]) > 0:
        rows = fields["srow"].astype(np.float64).reshape(3, 4) * _TO_MM[units]
        sform = _LPS_TO_RAS @ np.vstack([rows, [0, 0, 0, 1]])
        _check_affine(sform, pixdim, shape_zyx, name)
    if qform is not None and sform is not None and not _agree(qform, sform, shape_zyx):
        apart = _apart_mm(qform, sform, shape_zyx)
        reason = f"its qform and sform place it up to {apart:.1f} mm apart; set both alike, or one code to 0"
        raise AmbiguousGeometry(name=name, reason=reason)
    # Where both are there they agree, and the sform has all its digits; a quaternion's are rounded to 32 bits.
    affine = qform if sform is None else sform
    if affine is None:
        raise MissingGeometry(name=name, reason="it has neither qform nor sform, so its place and size are unknown")
    return affine


def _qform(fields: Any, spacing_mm: NDArray[np.float64], to_mm: float, name: str) -> NDArray[np.float64]:
    b, c, d = (float(v) for v in fields["quatern"])
    squares = b * b + c * c + d * d
    if not math.isfinite(squares + float(fields["pixdim"][0])) or squares > 1 + 1e-4:
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


def _apart_mm(first: NDArray[np.float64], second: NDArray[np.float64], shape_zyx: tuple[int, int, int]) -> float:
    """Return the largest distance along an axis between the corners of a grid in two geometries."""
    corners = np.array([[*corner, 1] for corner in itertools.product(*((0, n) for n in shape_zyx[::-1]))])
    return float(np.abs((corners @ (first - second).T)[:, :3]).max())


def _agree(qform: NDArray[np.float64], sform: NDArray[np.float64], shape_zyx: tuple[int, int, int]) -> bool:
    """Whether two geometries differ by no more than rounding."""
    diagonal = np.linalg.norm(np.linalg.norm(sform[:3, :3], axis=0) * shape_zyx[::-1])
    return bool(_apart_mm(qform, sform, shape_zyx) <= _AGREEMENT_MM + _QUATERNION_ERROR_RAD * diagonal)


def _check_affine(affine: NDArray[np.float64], pixdim: NDArray[np.float64], shape_zyx: tuple[int, int, int], name: str) -> None:
    if not np.isfinite(affine).all() or np.abs(affine).max() > _FARTHEST_MM:
        raise InvalidGeometry(name=name, reason="its place in space is not finite")
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    if spacing.min() < _SPACING_RANGE_MM[0] or abs(np.linalg.det(affine[:3, :3] / np.where(spacing > 0, spacing, 1))) < 1e-3:
        raise InvalidGeometry(name=name, reason="its axes do not span space")
    cosines = affine[:3, :3] / spacing
    if np.abs(cosines.T @ cosines - np.eye(3)).max() > 2e-3:
        raise InvalidGeometry(name=name, reason="its axes are sheared; resample it onto a rectangular grid")
    if np.abs((spacing - pixdim) * shape_zyx[::-1]).max() > _AGREEMENT_MM:
        sizes = " and ".join("×".join(f"{v:g}" for v in s) for s in (pixdim, spacing))
        raise AmbiguousGeometry(name=name, reason=f"its header gives two voxel sizes, {sizes} mm")


# --- voxels ------------------------------------------------------------------------------------------------------------------


def _intensities(raw: NDArray[Any], scale: tuple[float, float] | None, name: str) -> NDArray[Any]:
    """Return Hounsfield units: int16 where all are whole, else float32; plane by plane, so that nothing wider is kept."""
    if scale is None and np.can_cast(raw.dtype, np.int16):
        return raw.astype(np.int16, copy=False)
    slope, intercept = scale or (1.0, 0.0)
    low, high = sorted(value * slope + intercept for value in _range(raw, name))
    limits = np.iinfo(np.int16)
    if low < limits.min or high > limits.max:
        raise InvalidIntensity(name=name, reason=f"its values run from {low:g} to {high:g}, which is no CT in Hounsfield units")
    if scale is None and raw.dtype.kind in "iu":
        return raw.astype(np.int16)
    whole = np.empty(raw.shape, np.int16)
    for plane, target in zip(raw, whole, strict=True):
        scaled = plane.astype(np.float64) * slope + intercept if scale else plane
        np.rint(scaled, out=target, casting="unsafe")
        if not np.array_equal(target, scaled):
            break
    else:
        return whole
    if scale is None:
        return raw.astype(np.float32, copy=False)
    values = np.empty(raw.shape, np.float32)
    for plane, target in zip(raw, values, strict=True):
        target[:] = plane.astype(np.float64) * slope + intercept
    return values


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


def _occurring(labels: NDArray[Any]) -> set[int]:
    """Return the numbers in a mask."""
    if labels.itemsize > 1:
        return set(np.unique(labels).tolist())
    found: set[int] = set()
    for plane in labels:  # deleting the known numbers runs at the speed of memory, ten times that of counting or sorting
        rest = plane.tobytes()
        while rest := rest.translate(None, bytes(found)):
            found.update(rest[:256])
    return found


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
    # A direction may be a little off unit length; what viewers take as spacing must be what the sform says.
    spacing = np.linalg.norm(ras[:3, :3], axis=0)
    quaternion, qfac = _quaternion(ras[:3, :3] / spacing)
    fields["pixdim"] = [qfac, *spacing, 0, 0, 0, 0]
    fields["quatern"], fields["qoffset"], fields["qform_code"] = quaternion, ras[:3, 3], 1
    if not _agree(_qform(fields, spacing, 1.0, ""), volume.affine_lps, volume.shape):
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
