"""The stage that reads and writes files, on a real storage."""

from __future__ import annotations

import asyncio
import errno
import gzip
import hashlib
import json
import os
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deployments.imageio.deployment import Imageio
from deployments.imageio.kinds import kind_of
from deployments.imageio.nifti import read_nifti, write_nifti
from scangraph.contracts import Image2D, ImageFile, LabelMap, Line, Scene, SceneFiles, Surface, Volume
from scangraph.contracts.errors import (
    DamagedResult,
    EmptyFile,
    FileMissing,
    ImageFileError,
    StorageFull,
    StorageUnavailable,
    UnsupportedMedia,
)
from scangraph.scenefiles import SceneManifest, write_scene
from scangraph.settings import ImageioSettings
from scangraph.storage import Storage, open_storage

PICTURE = Image2D((np.arange(24, dtype=np.uint8).reshape(2, 4, 3),))


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return open_storage(tmp_path.as_uri())


@pytest.fixture
def imageio(tmp_path: Path) -> Imageio:
    return Imageio(ImageioSettings(), tmp_path.as_uri(), {})


def put(storage: Storage, name: str, data: bytes) -> str:
    return asyncio.run(storage.write(name, data))


def ct(low: int = -100) -> Volume:
    return Volume(np.arange(low, low + 60, dtype=np.int16).reshape(3, 4, 5), (2.0, 1.5, 1.0), (1.0, 2.0, 3.0))


def scene() -> Scene:
    vertices = np.eye(4, 3, dtype=np.float32)
    faces = np.array([[0, 2, 1], [0, 1, 3], [1, 2, 3], [2, 0, 3]], np.int32)
    return Scene((Surface("kidney_left", 3, (1, 2, 3), vertices, faces),), "LPS")


# --- what is it? -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "kind"),
    [
        (b"\x89PNG\r\n\x1a\n" + bytes(20), "image2d"),
        (b"\xff\xd8\xff\xe0" + bytes(20), "image2d"),
        (b"II*\x00" + bytes(20), "image2d"),
        (b"MM\x00*" + bytes(20), "image2d"),
        (b"RIFF\x20\0\0\0WEBPVP8 ", "image2d"),
        (bytes(128) + b"DICM" + bytes(20), "dicom"),
        (b"PK\x03\x04" + bytes(20), "zip"),
        (b"glTF\x02\0\0\0", "glb"),
        (b"# made by hand\no thing\nv 0 0 0\nv 1 0 0\n", "obj"),
        (bytes(344) + b"n+1\x00", "nifti"),
        (gzip.compress(b"whatever"), "nifti"),
        (b"", None),
        (b"text\n" * 50, None),
        (b"<html>v 0 0 0</html>\n", None),
        (b"\x1f\x8b\x08 nonsense that does not inflate", None),
        (b"MZ\x90\x00" + bytes(500), None),
    ],
)
def test_kinds_are_found_by_content(start: bytes, kind: str | None) -> None:
    found = kind_of(start)
    assert (found.name if found else None) == kind


def test_an_image_is_described_by_its_header_and_never_by_its_name(imageio: Imageio, storage: Storage) -> None:
    put(storage, "picture.png", write_nifti(ct()))
    found = asyncio.run(imageio.inspect("picture.png"))
    assert found["kind"] == "nifti"
    assert found["header"] == {
        "shape_zyx": [3, 4, 5],
        "spacing_mm": [2.0, 1.5, 1.0],
        "origin_mm": [1.0, 2.0, 3.0],
        "direction": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
        "dtype": "int16",
        "decoded_bytes": 120,
        "readable_as": ["image"],
        "intensity": {"min": -100, "max": -41, "p01": pytest.approx(-99.41), "p50": -70.5, "p99": pytest.approx(-41.59)},
    }


def test_what_may_be_a_mask_is_said(imageio: Imageio, storage: Storage) -> None:
    array = np.full((3, 4, 5), 2, np.uint8)
    put(storage, "mask", write_nifti(LabelMap(array, (1, 1, 1), labels=(2,))))
    put(storage, "numbers", write_nifti(LabelMap(array + 188, (1, 1, 1), labels=(190,))))  # no label of the table
    assert asyncio.run(imageio.inspect("mask"))["header"]["readable_as"] == ["image", "mask"]
    assert asyncio.run(imageio.inspect("numbers"))["header"]["readable_as"] == ["image"]


def test_bad_files_are_refused_in_the_gates_words(imageio: Imageio, storage: Storage) -> None:
    whole = write_nifti(ct())
    for name, data, error in (
        ("empty", b"", EmptyFile),
        ("text", b"hello\n" * 9, UnsupportedMedia),
        ("cut", whole[: len(whole) // 2], ImageFileError),
        ("zeros", gzip.compress(bytes(400)), ImageFileError),
    ):
        put(storage, name, data)
        with pytest.raises(error):
            asyncio.run(imageio.inspect(name))
    with pytest.raises(FileMissing):
        asyncio.run(imageio.inspect("none"))


# --- results ---------------------------------------------------------------------------------------------------------------


def test_results_are_written_read_back_and_described(imageio: Imageio, storage: Storage) -> None:
    mask = LabelMap(np.full((3, 4, 5), 2, np.uint8), (2, 1, 1), labels=(2,))
    for value, kind, endings in (
        (ct(), "image", [".nii.gz"]),
        (mask, "mask", [".nii.gz"]),
        (scene(), "scene", [".obj", ".mtl", ".manifest.json"]),
        (PICTURE, "image2d", [".png"]),
        (replace(PICTURE, file=ImageFile("jpeg")), "image2d", [".jpg"]),
        (replace(PICTURE, pages=PICTURE.pages * 2), "image2d", [".png", "-page2.png"]),
        (replace(PICTURE, pages=PICTURE.pages * 2, file=ImageFile("tiff")), "image2d", [".tif"]),
    ):
        saved = asyncio.run(imageio.save(value, kind, f"results/1/{kind}"))
        assert [entry["filename"] for entry in saved] == [f"{kind}{ending}" for ending in endings]
        for entry in saved:
            data = asyncio.run(storage.read(entry["storage_name"]))
            assert (len(data), hashlib.sha256(data).hexdigest()) == (entry["size"], entry["sha256"])
    again = read_nifti(asyncio.run(storage.read("results/1/mask.nii.gz")), "mask.nii.gz", as_mask=True)
    assert np.array_equal(again.array, mask.array)
    obj = asyncio.run(storage.read("results/1/scene.obj"))
    assert b"mtllib scene.mtl" in obj
    with pytest.raises(TypeError):
        asyncio.run(imageio.save(scene(), "mask", "results/1/wrong"))


FOUR = SceneFiles(("glb", "ply", "stl", "obj"))


@pytest.mark.parametrize(
    ("files", "main"),
    [
        (FOUR, "scene.obj"),
        (SceneFiles(("stl", "glb")), "scene.stl"),
        (replace(FOUR, per_structure=True), "scene.kidney_left.obj"),
        (replace(FOUR, zipped=True), "scene.zip"),
    ],
)
def test_a_scene_is_saved_as_it_wants(imageio: Imageio, storage: Storage, files: SceneFiles, main: str) -> None:
    wanted = replace(scene(), files=files)
    saved = asyncio.run(imageio.save(wanted, "scene", "results/1/scene"))
    expected = write_scene(wanted, "scene")
    assert {e["filename"]: asyncio.run(storage.read(e["storage_name"])) for e in saved} == expected
    assert [e["filename"] for e in saved] == list(expected)
    assert saved[0]["filename"] == main
    types = {
        "obj": "model/obj", "mtl": "model/mtl", "glb": "model/gltf-binary", "stl": "model/stl", "ply": "model/ply",
        "zip": "application/zip", "json": "application/json",
    }  # fmt: skip
    for entry in saved:
        data = expected[entry["filename"]]
        assert (entry["size"], entry["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
        assert entry["media_type"] == types[entry["kind"]]
        assert entry["filename"].endswith(entry["kind"])
        assert entry["header"]["surfaces"] == ["kidney_left"]
        assert entry["header"].get("unit") == {"glb": "m", "mtl": None, "zip": None, "json": None}.get(entry["kind"], "mm")
    manifest = SceneManifest.model_validate_json(expected["scene.manifest.json"])
    if not files.zipped:
        assert [(f.name, f.sha256) for f in manifest.files] == [(e["filename"], e["sha256"]) for e in saved[:-1]]
    assert asyncio.run(imageio.save(wanted, "scene", "results/1/scene")) == saved  # equal bytes are adopted


def test_a_scene_brings_its_copy_for_screens(imageio: Imageio, storage: Storage) -> None:
    """Under its manifest's hash: a list in RAS, and a gzipped MZ3 for each structure, as NiiVue reads it."""
    line = Line("ureters", 52, (9, 8, 7), np.array([[1, 2, 3], [4, 5, 6]], np.float32), np.array([[0, 1]], np.int32))
    known = replace(scene().surfaces[0], measures={"mesh_volume_ml": 7.5, "area_cm2": 2, "warnings": ["cut"]})
    other = Surface("mine", 4000, (200, 100, 50), np.eye(4, 3, dtype=np.float32) * 10, known.faces)
    wanted = replace(scene(), surfaces=(known, other), lines=(line,), notes=("a demonstration",))
    saved = asyncio.run(imageio.save(wanted, "scene", "results/1/scene"))
    folder = f"display/{saved[-1]['sha256']}"
    about = json.loads(asyncio.run(storage.read(f"{folder}/scene-v1.json")))
    assert (about["frame"], about["unit"]) == ("RAS", "mm")
    assert "a demonstration" in about["notes"]
    assert about["lines"] == [
        {"name": "ureters", "label": 52, "rgb": [9, 8, 7], "points_mm": [[-1, -2, 3], [-4, -5, 6]], "segments": [[0, 1]]}
    ]
    first, second = about["structures"]
    assert (first["name"], first["label"], first["rgb"], first["faces"]) == ("kidney_left", 3, [1, 2, 3], 4)
    assert (first["volume_ml"], first["area_mm2"], first["warnings"]) == (7.5, 200, ["cut"])
    assert (second["title"], second["laterality"]) == ("mine", None)
    assert second["volume_ml"] == pytest.approx(other.volume_ml)
    assert second["box_mm"] == [[-10, -10, 0], [0, 0, 10]]
    # Three right triangles in the planes of the axes, and the slanted one.
    areas = np.array([50, 50, 50, 50 * 3**0.5])
    places = np.array([[-1, -1, 0], [-1, 0, 1], [0, -1, 1], [-1, -1, 1]]) * 10 / 3
    assert second["centre_mm"] == pytest.approx((areas @ places / areas.sum()).tolist(), abs=1e-3)
    raw = gzip.decompress(asyncio.run(storage.read(f"{folder}/scene-1-v1.mz3")))
    magic, attributes, faces, vertices, skip = struct.unpack_from("<HHIII", raw)
    assert (magic, attributes, faces, vertices, skip) == (0x5A4D, 3, 4, 4, 0)
    assert np.array_equal(np.frombuffer(raw, "<i4", 12, 16).reshape(4, 3), other.faces)
    places = np.frombuffer(raw, "<f4", 12, 64).reshape(4, 3)
    assert len(raw) == 64 + 48
    assert np.array_equal(places, other.vertices_mm * np.array([-1, -1, 1], np.float32))
    # The same scene of another execution; and one that differs in a structure which is not in its main file.
    again = asyncio.run(imageio.save(wanted, "scene", "results/2/scene"))
    assert again[-1]["sha256"] == saved[-1]["sha256"]
    apart = replace(wanted, files=SceneFiles(per_structure=True))
    moved = replace(apart, surfaces=(known, replace(other, vertices_mm=other.vertices_mm + 1)))
    one, two = (asyncio.run(imageio.save(s, "scene", f"results/{n}/scene")) for n, s in ((3, apart), (4, moved)))
    assert one[0]["sha256"] == two[0]["sha256"]
    assert one[-1]["sha256"] != two[-1]["sha256"]


@pytest.mark.parametrize(("number", "error"), [(errno.ENOSPC, StorageFull), (errno.EACCES, StorageUnavailable)])
def test_no_room_for_a_temporary_file_is_said(imageio: Imageio, number: int, error: Any, monkeypatch: Any) -> None:
    def refuse() -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(error, match="temporary file"):
        asyncio.run(imageio.save(scene(), "scene", "results/1/scene"))


def test_what_another_executor_wrote_is_adopted_if_equal(imageio: Imageio, storage: Storage) -> None:
    (first,) = asyncio.run(imageio.save(ct(), "image", "results/1/a"))
    (again,) = asyncio.run(imageio.save(ct(), "image", "results/1/a"))
    assert again == first
    (other,) = asyncio.run(imageio.save(ct(-50), "image", "results/1/a"))
    assert other["storage_name"] == "results/1/a-2.nii.gz"
    assert other["filename"] == "a.nii.gz"
    assert asyncio.run(storage.read("results/1/a.nii.gz")) != asyncio.run(storage.read("results/1/a-2.nii.gz"))


def test_a_storage_that_gives_back_something_else_is_found_out(imageio: Imageio, monkeypatch: Any) -> None:
    async def lie(path: str) -> str:
        return "0" * 64

    monkeypatch.setattr(imageio, "sha256", lie)
    results: tuple[tuple[Any, str], ...] = ((ct(), "image"), (replace(scene(), files=FOUR), "scene"))
    for value, kind in results:
        with pytest.raises(StorageUnavailable, match="could not be read back"):
            asyncio.run(imageio.save(value, kind, "results/1/a"))


def test_many_files_keep_their_order(imageio: Imageio, storage: Storage) -> None:
    (surface,) = scene().surfaces
    many = tuple(replace(surface, name=f"part {n}", label=1000 + n) for n in range(30))
    wanted = replace(scene(), surfaces=many, files=replace(FOUR, per_structure=True))
    saved = asyncio.run(imageio.save(wanted, "scene", "results/1/scene"))
    expected = write_scene(wanted, "scene")
    assert [entry["filename"] for entry in saved] == list(expected)
    assert {entry["filename"]: entry["sha256"] for entry in saved} == {
        n: hashlib.sha256(d).hexdigest() for n, d in expected.items()
    }


def test_kept_results_come_back(imageio: Imageio, storage: Storage) -> None:
    size = asyncio.run(imageio.keep(scene(), "steps/k/scene"))
    assert size == asyncio.run(imageio.keep(scene(), "steps/k/scene"))  # the name says what made it
    again = asyncio.run(imageio.recall("steps/k/scene"))
    assert isinstance(again, Scene)
    assert again.surfaces[0].name == "kidney_left"
    data = asyncio.run(storage.read("steps/k/scene"))
    asyncio.run(storage.delete("steps/k/scene"))
    put(storage, "steps/k/scene", data[:-1])
    with pytest.raises(DamagedResult):
        asyncio.run(imageio.recall("steps/k/scene"))
    with pytest.raises(FileMissing):
        asyncio.run(imageio.recall("steps/none"))


def test_hashes_are_of_the_stored_bytes(imageio: Imageio, storage: Storage) -> None:
    data = np.random.default_rng(1).bytes(9 * 2**20)
    put(storage, "a", data)
    assert asyncio.run(imageio.sha256("a")) == hashlib.sha256(data).hexdigest()
