from __future__ import annotations

import gzip
import io
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import example, given, settings
from hypothesis import strategies as st

from deployments.imageio.nifti import Limits, read_nifti, write_nifti
from scangraph.contracts import LabelMap, Volume, errors

SECRET = b"DOE^JANE 1970"


def nibabel_bytes(image: Any, compress: bool = True) -> bytes:
    data = image.to_bytes()
    return gzip.compress(data, 6) if compress else bytes(data)


def make(
    edit: Callable[[Any], None] | None = None, dtype: Any = np.int16, array: Any = None, cls: Any = nib.Nifti1Image
) -> bytes:
    """Write a small file by nibabel, with its header edited byte by byte afterwards."""
    if array is None:
        array = (np.arange(4 * 5 * 6).reshape(6, 5, 4) % 100).astype(dtype)
    image = cls(array, np.diag([-1.0, -1.5, 2.0, 1.0]))
    image.set_sform(image.affine, 1)
    image.set_qform(image.affine, 1)
    image.header["descrip"] = SECRET
    raw = bytearray(image.to_bytes())
    if edit:
        header = image.header.copy()
        header["magic"] = bytes(raw[344:348] if cls is nib.Nifti1Image else raw[4:12])
        header["vox_offset"] = 352 if cls is nib.Nifti1Image else 544
        header["scl_slope"], header["scl_inter"] = 1, 0  # nibabel shows NaN where the file says 1 and 0
        edit(header)
        raw[: len(header.binaryblock)] = header.binaryblock
    return gzip.compress(bytes(raw), 6)


def setter(**fields: Any) -> Callable[[Any], None]:
    def edit(header: Any) -> None:
        for name, value in fields.items():
            header[name] = value

    return edit


def pixdim(index: int, value: float) -> Callable[[Any], None]:
    def edit(header: Any) -> None:
        header["pixdim"][index] = value

    return edit


def srow(value: float) -> Callable[[Any], None]:
    def edit(header: Any) -> None:
        header["srow_x"][0] = value

    return edit


def disagree(header: Any) -> None:
    header["srow_x"][3] = 50


def shear(header: Any) -> None:
    header["qform_code"] = 0
    header["srow_x"][1] = 0.5


def singular(header: Any) -> None:
    header["qform_code"] = 0
    header["srow_y"] = header["srow_x"]


def dims(*values: int) -> Callable[[Any], None]:
    def edit(header: Any) -> None:
        header["dim"] = [*values, *[1] * (8 - len(values))]

    return edit


GOOD = make()
INNER = gzip.decompress(GOOD)

HOSTILE: dict[str, tuple[bytes, str, type[errors.ScanGraphError], int]] = {
    "empty": (b"", "a.nii.gz", errors.EmptyFile, 422),
    "text": (b"hello, this is no image at all" * 20, "a.nii.gz", errors.UnsupportedMedia, 415),
    "text without .gz": (b"hello, this is no image at all" * 20, "a.nii", errors.UnsupportedMedia, 415),
    "plain NIfTI named .nii.gz": (INNER, "a.nii.gz", errors.UnsupportedMedia, 415),
    "compressed text": (gzip.compress(b"hello" * 200), "a.nii.gz", errors.UnsupportedMedia, 415),
    "cut in half": (GOOD[: len(GOOD) // 2], "a.nii.gz", errors.Truncated, 422),
    "checksum cut off": (GOOD[:-8], "a.nii.gz", errors.Truncated, 422),
    "declared longer": (gzip.compress(INNER[:-10]), "a.nii.gz", errors.Truncated, 422),
    "plain, cut": (INNER[:-10], "a.nii", errors.Truncated, 422),
    "72 bytes that declare 1 GiB": (
        gzip.compress(gzip.decompress(make(dims(3, 1024, 1024, 512)))[:352]),
        "a.nii.gz",
        errors.Truncated,
        422,
    ),
    "bad checksum": (GOOD[:-8] + bytes([GOOD[-8] ^ 1]) + GOOD[-7:], "a.nii.gz", errors.IntegrityError, 422),
    "garbage after it": (GOOD + b"garbage", "a.nii.gz", errors.IntegrityError, 422),
    "too many voxels": (make(dims(3, 2000, 2000, 2000)), "a.nii.gz", errors.TooManyVoxels, 413),
    "inflates past its length": (gzip.compress(INNER + bytes(100)), "a.nii.gz", errors.InflatedTooLarge, 413),
    "plain, longer": (INNER + bytes(1), "a.nii", errors.InflatedTooLarge, 413),
    "second member": (GOOD + GOOD, "a.nii.gz", errors.InflatedTooLarge, 413),
    "negative size": (make(dims(3, 4, -5, 6)), "a.nii.gz", errors.InvalidHeader, 422),
    "zero size": (make(dims(3, 4, 0, 6)), "a.nii.gz", errors.InvalidHeader, 422),
    "eight dimensions": (make(dims(8, 6, 5, 4)), "a.nii.gz", errors.InvalidHeader, 422),
    "bad magic": (make(setter(magic=b"bad")), "a.nii.gz", errors.InvalidHeader, 422),
    "pair": (make(setter(magic=b"ni1")), "a.nii.gz", errors.UnsupportedMedia, 415),
    "offset NaN": (make(setter(vox_offset=np.nan)), "a.nii.gz", errors.InvalidHeader, 422),
    "offset inside the header": (make(setter(vox_offset=100)), "a.nii.gz", errors.InvalidHeader, 422),
    "bitpix": (make(setter(bitpix=8)), "a.nii.gz", errors.InvalidHeader, 422),
    "unknown type": (make(setter(datatype=77)), "a.nii.gz", errors.InvalidHeader, 422),
    "NaN sform": (make(srow(np.nan)), "a.nii.gz", errors.InvalidGeometry, 422),
    "pixdim 0": (make(pixdim(1, 0)), "a.nii.gz", errors.InvalidGeometry, 422),
    "pixdim NaN": (make(pixdim(2, np.nan)), "a.nii.gz", errors.InvalidGeometry, 422),
    "pixdim 1e30": (make(pixdim(3, 1e30)), "a.nii.gz", errors.InvalidGeometry, 422),
    "sheared": (make(shear), "a.nii.gz", errors.InvalidGeometry, 422),
    "singular": (make(singular), "a.nii.gz", errors.InvalidGeometry, 422),
    "quaternion": (make(setter(quatern_b=0.9, quatern_c=0.9)), "a.nii.gz", errors.InvalidGeometry, 422),
    "qform against sform": (make(disagree), "a.nii.gz", errors.AmbiguousGeometry, 422),
    "no geometry": (make(setter(qform_code=0, sform_code=0)), "a.nii.gz", errors.MissingGeometry, 422),
    "slope NaN": (make(setter(scl_slope=np.nan)), "a.nii.gz", errors.InvalidIntensity, 422),
    "slope 1e38": (make(setter(scl_slope=1e38)), "a.nii.gz", errors.InvalidIntensity, 422),
    "beyond int16": (make(dtype=np.int32, array=np.full((3, 3, 3), 40000, np.int32)), "a.nii.gz", errors.InvalidIntensity, 422),
    "NaN voxel": (make(array=np.full((3, 3, 3), np.nan, np.float32)), "a.nii.gz", errors.InvalidIntensity, 422),
    "infinite voxel": (make(array=np.full((3, 3, 3), np.inf, np.float32)), "a.nii.gz", errors.InvalidIntensity, 422),
    "complex": (make(array=np.ones((3, 3, 3), np.complex64)), "a.nii.gz", errors.UnsupportedPixelType, 415),
    "RGB": (make(setter(datatype=128, bitpix=24)), "a.nii.gz", errors.UnsupportedPixelType, 415),
    "2-D": (make(dims(2, 4, 5)), "a.nii.gz", errors.UnsupportedDimensions, 422),
    "4-D": (make(dims(4, 6, 5, 2, 2)), "a.nii.gz", errors.UnsupportedDimensions, 422),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_refuses(case: str) -> None:
    data, name, kind, status = HOSTILE[case]
    with pytest.raises(kind) as caught:
        read_nifti(data, name)
    assert type(caught.value) is kind
    assert caught.value.status == status
    assert name in caught.value.detail
    assert SECRET.decode() not in str(caught.value)


def test_every_cut_is_refused() -> None:
    for length in range(len(GOOD)):
        with pytest.raises(errors.Truncated if length else errors.EmptyFile):
            read_nifti(GOOD[:length], "a.nii.gz")
    for length in range(4, len(INNER)):
        with pytest.raises(errors.Truncated):
            read_nifti(INNER[:length], "a.nii")


def test_no_flipped_bit_gives_another_image() -> None:
    expected = read_nifti(GOOD, "a.nii.gz")
    refused = 0
    for byte, bit in itertools.product(range(len(GOOD)), range(8)):
        damaged = bytearray(GOOD)
        damaged[byte] ^= 1 << bit
        try:
            found = read_nifti(bytes(damaged), "a.nii.gz")
        except errors.ScanGraphError:
            refused += 1
        else:
            assert found.same_grid(expected)
            assert np.array_equal(found.array, expected.array)
    assert refused > 0.8 * 8 * len(GOOD)


def test_damage_is_called_damage() -> None:
    """Stored, not compressed: every flip reaches the header as it is, and would be another geometry, size or type."""
    stored = gzip.compress(INNER, 0)
    start = stored.index(INNER[:100])
    codes = []
    for at in range(start, start + len(INNER)):
        damaged = bytearray(stored)
        damaged[at] ^= 1
        with pytest.raises(errors.ImageFileError) as caught:
            read_nifti(bytes(damaged), "a.nii.gz")
        codes.append(caught.value.code)
    # A size that grew past a limit, or shrank below what follows, is refused before all is inflated.
    assert set(codes) <= {"integrity", "too-many-voxels", "inflated-too-large"}
    assert codes.count("integrity") >= len(codes) - 12


def test_limits_are_settings() -> None:
    with pytest.raises(errors.TooManyVoxels, match="120 voxels, more than the 100"):
        read_nifti(GOOD, "a.nii.gz", limits=Limits(max_voxels=100))
    with pytest.raises(errors.InflatedTooLarge):
        read_nifti(GOOD, "a.nii.gz", limits=Limits(max_inflated_bytes=400))


def test_a_bomb_is_refused_before_it_inflates() -> None:
    """1 MB that inflates to 1 GiB behind a header of 120 voxels."""
    bomb = gzip.compress(INNER + bytes(256 * 2**20), 9)
    with pytest.raises(errors.InflatedTooLarge):
        read_nifti(bomb, "a.nii.gz")


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("cls", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("dtype", ["u1", "i1", "i2", "u2", "i4", "f4", "f8"])
def test_reads_types_and_byte_orders(order: Any, cls: Any, dtype: str) -> None:
    array = np.random.default_rng(1).integers(0, 100, (3, 4, 5)).astype(dtype)
    header = cls.header_class(endianness=order)
    image = cls(array.astype(np.dtype(dtype).newbyteorder(order)), np.diag([-1.0, -2.0, 3.0, 1.0]), header)
    image.set_data_dtype(np.dtype(dtype).newbyteorder(order))
    image.set_sform(image.affine, 1)
    found = read_nifti(nibabel_bytes(image), "a.nii.gz")
    assert found.spacing_mm == pytest.approx((3, 2, 1))
    assert found.array.dtype == np.int16
    assert np.array_equal(found.array, array.transpose(2, 1, 0))


def test_slope_zero_means_unscaled() -> None:
    found = read_nifti(make(setter(scl_slope=0, scl_inter=100)), "a.nii.gz")
    assert found.array.max() == 99


def test_scaling_is_applied_and_stays_whole_where_it_can() -> None:
    assert read_nifti(make(setter(scl_slope=2, scl_inter=-1000)), "a.nii.gz").array.dtype == np.int16
    half = read_nifti(make(setter(scl_slope=0.5, scl_inter=-10)), "a.nii.gz")
    assert half.array.dtype == np.float32
    assert half.array.flat[1] == pytest.approx(0.5 * 20 - 10)  # the second voxel along x holds 20


@pytest.mark.parametrize(("units", "factor"), [(1, 1000.0), (2, 1.0), (3, 0.001), (0, 1.0)])
def test_units_become_millimetres(units: int, factor: float) -> None:
    array = np.zeros((3, 3, 3), np.int16)
    image = nib.Nifti1Image(array, np.diag([-2.0, -2.0, 2.0, 1.0]) / [[factor], [factor], [factor], [1]])
    image.header["xyzt_units"] = units
    image.set_sform(image.affine, 1)
    assert read_nifti(nibabel_bytes(image), "a.nii.gz").spacing_mm == pytest.approx((2, 2, 2))


def test_one_slice_t1_and_plain_files_pass() -> None:
    image = nib.Nifti1Image(np.ones((5, 4, 1, 1), np.int16), np.diag([-1.0, -1.0, 5.0, 1.0]))
    image.set_sform(image.affine, 1)
    assert read_nifti(nibabel_bytes(image, compress=False), "a.nii").shape == (1, 4, 5)
    assert read_nifti(GOOD + bytes(512), "padded by a tape.nii.gz").shape == (4, 5, 6)


rotations = st.tuples(*[st.floats(-1, 1) for _ in range(4)]).filter(lambda q: sum(v * v for v in q) > 0.1)


@settings(max_examples=60, deadline=None)
@given(
    quaternion=rotations,
    mirrored=st.booleans(),
    spacing=st.tuples(*[st.floats(0.2, 6)] * 3),
    origin=st.tuples(*[st.floats(-900, 900)] * 3),
    seed=st.integers(0, 99),
)
def test_round_trip(quaternion: Any, mirrored: bool, spacing: Any, origin: Any, seed: int) -> None:
    """Any rigid grid survives to 1e-4 mm, and SimpleITK and nibabel see the same."""
    w, x, y, z = np.asarray(quaternion) / np.linalg.norm(quaternion)
    direction = np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    ) * np.array([1, 1, -1 if mirrored else 1])
    array = np.random.default_rng(seed).integers(-1024, 3071, (5, 6, 7)).astype(np.int16)
    volume = Volume(array, spacing, origin, direction)
    data = write_nifti(volume)
    found = read_nifti(data, "a.nii.gz")
    assert np.array_equal(found.array, array)
    corners = [[0, 0, 0], [4, 5, 6], [0, 5, 0]]
    assert np.abs(found.index_to_world(corners) - volume.index_to_world(corners)).max() < 2e-4
    seen = nib.Nifti1Image.from_bytes(gzip.decompress(data))
    assert np.abs(seen.affine - volume.affine_ras).max() < 2e-4
    assert np.abs(seen.get_qform() - volume.affine_ras).max() < 1e-3


@pytest.mark.parametrize(
    "codes", ["".join(p) for axes in itertools.permutations(["LR", "PA", "SI"]) for p in itertools.product(*axes)]
)
def test_all_48_orientations(codes: str, tmp_path: Path) -> None:
    volume = Volume(np.arange(60, dtype=np.int16).reshape(3, 4, 5), (3, 2, 1), (10, -20, 30)).reoriented(codes)
    path = tmp_path / "a.nii.gz"
    path.write_bytes(write_nifti(volume))
    found = read_nifti(path.read_bytes(), path.name)
    assert found.axcodes == codes
    assert np.array_equal(found.array, volume.array)
    image = sitk.ReadImage(str(path))
    last = [n - 1 for n in volume.shape]
    assert np.allclose(image.TransformIndexToPhysicalPoint(last[::-1]), volume.index_to_world(last), atol=1e-4)
    assert np.array_equal(sitk.GetArrayFromImage(image), volume.array)


def tilted(degrees_xyz: tuple[float, float, float]) -> Any:
    """Direction cosines of a grid turned about x, then y, then z."""
    turned = np.eye(3)
    for axis, degrees in enumerate(degrees_xyz):
        c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
        i, j = [(1, 2), (0, 2), (0, 1)][axis]
        turn = np.eye(3)
        turn[[i, i, j, j], [i, j, i, j]] = c, -s, s, c
        turned = turn @ turned
    return turned


@pytest.mark.parametrize("tilt", [(0, 0, 0), (30, 0, 0), (12, -7, 55), (0, 0, 0.03), (90, 0, 45), (179.98, 0.01, 0)])
@pytest.mark.parametrize("handed", [1, -1])
def test_the_far_corner_of_a_real_ct(tilt: Any, handed: int, tmp_path: Path) -> None:
    direction = tilted(tilt) * [1, 1, handed]
    volume = Volume(np.zeros((300, 512, 512), np.uint8), (1.25, 0.7421875, 0.7421875), (-187.3, -312.9, 412.7), direction)
    data = write_nifti(volume, level=1)
    corner = [299, 511, 511]
    expected = volume.index_to_world(corner)
    found = read_nifti(data, "a.nii.gz")
    assert np.abs(found.index_to_world(corner) - expected).max() < 1e-4
    header = nib.Nifti1Header.from_fileobj(io.BytesIO(gzip.GzipFile(fileobj=io.BytesIO(data)).read(352)))
    assert (header["qform_code"], header["sform_code"]) == (1, 1)
    assert np.abs(header.get_sform() @ [511, 511, 299, 1] - [*(expected * [-1, -1, 1]), 1]).max() < 1e-4
    # 32-bit quaternions are no better near half-turns: facts of the format, not of this writer.
    assert np.abs(header.get_qform() @ [511, 511, 299, 1] - [*(expected * [-1, -1, 1]), 1]).max() < 0.5


@settings(max_examples=60, deadline=None)
@example(tilt=(0.0, 0.0, 0.036), origin=(0.0, 0.0, 0.0))
@given(tilt=st.tuples(*[st.floats(-0.1, 0.1)] * 3), origin=st.tuples(*[st.floats(-500, 500)] * 3))
def test_almost_straight_files_of_simpleitk_pass(tmp_path_factory: Any, tilt: Any, origin: Any) -> None:
    """Near LPS, a half-turn in NIfTI's RAS, quaternions lose up to 6e-4 rad, 0.5 mm here: not an ambiguity."""
    image = sitk.GetImageFromArray(np.zeros((10, 10, 10), np.int16))
    image.SetSpacing((80.0, 80.0, 80.0))
    image.SetOrigin(origin)
    image.SetDirection(tilted(tilt).ravel().tolist())
    path = tmp_path_factory.mktemp("tilt") / "a.nii.gz"
    sitk.WriteImage(image, str(path))
    found = read_nifti(path.read_bytes(), path.name)
    corner = image.TransformIndexToPhysicalPoint((9, 9, 9))
    assert np.abs(found.index_to_world([9, 9, 9]) - corner).max() < 1e-3


@pytest.mark.parametrize("left_out", ["qform_code", "sform_code"])
@pytest.mark.parametrize("handed", [1, -1])
def test_one_geometry_is_enough(left_out: str, handed: int, tmp_path: Path) -> None:
    affine = np.eye(4)
    affine[:3, :3] = tilted((20, -35, 50)) * [1, 1, handed] * [0.8, 0.9, 2.5]
    affine[:3, 3] = -120, 44, 310
    image = nib.Nifti1Image(np.arange(60, dtype=np.int16).reshape(3, 4, 5), affine)
    image.set_qform(affine, 1)
    image.set_sform(affine, 1)
    image.header[left_out] = 0
    path = tmp_path / "a.nii.gz"
    path.write_bytes(nibabel_bytes(image))
    found = read_nifti(path.read_bytes(), path.name)
    assert np.abs(found.affine_ras - affine).max() < 2e-5
    peer = sitk.ReadImage(str(path))
    assert np.abs(found.index_to_world([4, 3, 2]) - peer.TransformIndexToPhysicalPoint((2, 3, 4))).max() < 1e-4


@pytest.mark.parametrize(
    ("edit", "kind", "says"),
    [
        (lambda h: h["srow_x"].__setitem__(3, h["srow_x"][3] + 0.5), errors.AmbiguousGeometry, "0.5 mm apart"),
        (lambda h: h.__setitem__("quatern_d", 0.999), errors.AmbiguousGeometry, "apart"),
        (lambda h: h["pixdim"].__setitem__(0, -h["pixdim"][0]), errors.AmbiguousGeometry, "apart"),
        (lambda h: h["pixdim"].__setitem__(0, np.nan), errors.InvalidGeometry, "quaternion"),
        (lambda h: h["pixdim"].__setitem__(3, 2.1), errors.AmbiguousGeometry, "two voxel sizes"),
        (lambda h: h.__setitem__("qoffset_x", np.nan), errors.InvalidGeometry, "not finite"),
        (lambda h: h.__setitem__("qoffset_x", 1e30), errors.InvalidGeometry, "not finite"),
        (lambda h: h.__setitem__("xyzt_units", 5), errors.InvalidHeader, "unit 5"),
        (lambda h: h.__setitem__("magic", b"n+2"), errors.InvalidHeader, "magic"),
        (lambda h: h.__setitem__("scl_inter", np.inf), errors.InvalidIntensity, "shifted by inf"),
        (lambda h: h.__setitem__("scl_inter", 32700), errors.InvalidIntensity, "to 32799"),
        (lambda h: h.__setitem__("vox_offset", 1e30), errors.InvalidHeader, "begin at byte 1e"),
        (lambda h: h.__setitem__("vox_offset", 352.5), errors.InvalidHeader, "begin at byte 352.5"),
    ],
)
def test_refuses_and_says_why(edit: Callable[[Any], Any], kind: type[errors.ImageFileError], says: str) -> None:
    with pytest.raises(kind, match=says) as caught:
        read_nifti(make(edit), "a.nii.gz")
    assert type(caught.value) is kind


def test_a_quaternion_may_be_rounded() -> None:
    """b² + c² + d² a little above 1, as 32 bits leave it, is a half-turn."""
    edited = make(setter(sform_code=0, quatern_d=np.nextafter(np.float32(1), np.float32(2))))
    assert read_nifti(edited, "a.nii.gz").same_grid(read_nifti(GOOD, "a.nii.gz"), 1e-5)


@pytest.mark.parametrize("length", [1.0008, 0.9992])
def test_a_direction_a_little_off_unit_length_can_be_read_back(length: float) -> None:
    direction = ((1.0, 5e-4, 0.0), (0.0, length, 0.0), (0.0, 0.0, 1.0 / length))
    volume = Volume(np.zeros((200, 200, 200), np.uint8), (1, 1, 1), (0, 0, 0), direction)
    found = read_nifti(write_nifti(volume), "a.nii.gz")
    assert np.abs(found.index_to_world([199] * 3) - volume.index_to_world([199] * 3)).max() < 1e-4


def test_inflated_voxels_are_not_copied() -> None:
    found = read_nifti(GOOD, "a.nii.gz").array
    assert found.base is not None
    assert not found.flags.writeable
    plain = read_nifti(INNER, "a.nii").array
    assert np.shares_memory(plain, np.frombuffer(INNER, np.uint8))


@pytest.mark.parametrize("odd", [352, 353, 355, 368])
def test_extensions_are_skipped(odd: int) -> None:
    raw = bytearray(INNER)
    raw[108:112] = np.float32(odd).tobytes()
    raw[352:352] = SECRET.ljust(odd - 352, b"x")[: odd - 352]
    found = read_nifti(gzip.compress(bytes(raw)), "a.nii.gz")
    assert np.array_equal(found.array, read_nifti(GOOD, "a.nii.gz").array)
    assert found.array.flags.aligned


@pytest.mark.parametrize("data", [GOOD, None])
def test_threads_change_nothing(data: bytes | None) -> None:
    volume = Volume(np.random.default_rng(2).integers(-1000, 1000, (40, 200, 200)).astype(np.int16), (1, 1, 1))
    assert write_nifti(volume, threads=1) == write_nifti(volume, threads=3)
    data = data or write_nifti(volume)
    one, three = (read_nifti(data, "a.nii.gz", threads=n).array for n in (1, 3))
    assert np.array_equal(one, three)


@pytest.mark.parametrize(
    ("dtype", "expected"), [("f2", "f4"), ("?", "i2"), (">i2", "i2"), (">f4", "f4"), ("i8", "i2"), ("u4", "i2"), ("f8", "f4")]
)
def test_writes_any_number(dtype: str, expected: str) -> None:
    array = (np.arange(24).reshape(2, 3, 4) % 2 / (2 if expected == "f4" else 1)).astype(dtype)
    found = read_nifti(write_nifti(Volume(array, (1, 1, 1))), "a.nii.gz").array
    assert found.dtype == expected
    assert np.array_equal(found, array)


def test_a_writer_refuses_what_is_no_number() -> None:
    with pytest.raises(errors.UnsupportedPixelType, match="longdouble|float128"):
        write_nifti(Volume(np.zeros((2, 2, 2), np.longdouble), (1, 1, 1)))


@settings(max_examples=60, deadline=None)
@given(
    numbers=st.lists(st.sampled_from([*range(118), *range(201, 209)]), min_size=1, max_size=9),
    shape=st.tuples(*[st.integers(1, 9)] * 3),
    dtype=st.sampled_from(["u1", "u2", "i2", "f4", ">i4"]),
    seed=st.integers(0, 99),
)
def test_labels_are_the_numbers_that_occur(numbers: list[int], shape: Any, dtype: str, seed: int) -> None:
    array = np.random.default_rng(seed).choice(np.array(numbers), shape).astype(dtype)
    found = read_nifti(write_nifti(Volume(array, (1, 1, 1))), "m.nii.gz", as_mask=True)
    assert isinstance(found, LabelMap)
    assert found.labels == tuple(n for n in np.unique(array).tolist() if n)
    assert found.array.dtype == np.uint8
    assert np.array_equal(found.array, array)


def test_rare_labels_are_found() -> None:
    array = np.zeros((2, 64, 64), np.uint8)
    array[1, 40:50] = 7
    array[1, 63, 60:] = 52, 3, 201, 63
    found = read_nifti(write_nifti(Volume(array, (1, 1, 1))), "m.nii.gz", as_mask=True)
    assert isinstance(found, LabelMap)
    assert found.labels == (3, 7, 52, 63, 201)


def test_schemes_have_names() -> None:
    with pytest.raises(errors.InvalidParameters, match="'amos' is not one of kits"):
        read_nifti(GOOD, "m.nii.gz", as_mask=True, scheme="amos")


def test_masks(ball: LabelMap) -> None:
    found = read_nifti(write_nifti(ball), "m.nii.gz", as_mask=True)
    assert isinstance(found, LabelMap)
    assert found.labels == (2, 5)
    assert found.array.dtype == np.uint8
    header = nib.Nifti1Image.from_bytes(gzip.decompress(write_nifti(ball))).header
    assert header["intent_code"] == 1002
    assert bytes(header["descrip"]).strip(b"\0") == b"scangraph"


def test_masks_with_foreign_numbers_name_them() -> None:
    data = write_nifti(Volume(np.full((2, 2, 2), 150, np.uint8), (1, 1, 1)))
    with pytest.raises(errors.UnknownLabels, match="150"):
        read_nifti(data, "m.nii.gz", as_mask=True)


def test_kits_scheme_renumbers() -> None:
    data = write_nifti(Volume(np.arange(4, dtype=np.uint8).reshape(1, 2, 2), (1, 1, 1)))
    found = read_nifti(data, "m.nii.gz", as_mask=True, scheme="kits")
    assert found.array.ravel().tolist() == [0, 201, 202, 203]
    with pytest.raises(errors.InvalidIntensity, match="no label 5"):
        read_nifti(write_nifti(Volume(np.full((2, 2, 2), 5, np.uint8), (1, 1, 1))), "m.nii.gz", as_mask=True, scheme="kits")


@pytest.mark.parametrize("values", [[-1, 0], [0, 70000], [0.5, 1.0]])
def test_what_is_no_mask_is_refused(values: list[float]) -> None:
    dtype = np.float32 if 0.5 in values else np.int32
    with pytest.raises(errors.InvalidIntensity):
        read_nifti(make(array=np.array(values, dtype).reshape(2, 1, 1)), "m.nii.gz", as_mask=True)


def test_a_writer_cannot_hold_channels() -> None:
    with pytest.raises(errors.UnsupportedDimensions):
        write_nifti(Volume(np.zeros((2, 3, 4, 5), np.int16), (1, 1, 1)))


def test_the_real_ct_and_its_known_values(sample_ct: Path, sample_mask: Path) -> None:
    ct = read_nifti(sample_ct.read_bytes(), "ct.nii.gz")
    peer = sitk.ReadImage(str(sample_ct))
    assert np.array_equal(ct.array, sitk.GetArrayFromImage(peer))
    assert np.allclose(ct.index_to_world([111, 100, 121]), peer.TransformIndexToPhysicalPoint((121, 100, 111)), atol=1e-3)
    mask = read_nifti(sample_mask.read_bytes(), "m.nii.gz", as_mask=True)
    assert isinstance(mask, LabelMap)
    volumes = mask.volumes_ml()
    assert len(volumes) == 61
    for number, ml, ras in ((2, 192.6, (69.6, 132.1, 345.7)), (3, 137.4, (-78.1, 125.6, 357.4))):
        assert volumes[number] == pytest.approx(ml, abs=0.05)
        centre = mask.index_to_world(np.argwhere(mask.array == number).mean(axis=0)) * [-1, -1, 1]
        assert centre == pytest.approx(ras, abs=0.06)
    assert volumes[52] == pytest.approx(49.7, abs=0.05)


def test_output_is_reproducible_and_one_member(ball: LabelMap) -> None:
    data = write_nifti(ball)
    assert data == write_nifti(ball)
    stream = io.BytesIO(data)
    with gzip.GzipFile(fileobj=stream) as file:
        assert len(file.read()) == 352 + ball.array.nbytes
