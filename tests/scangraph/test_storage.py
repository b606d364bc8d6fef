from __future__ import annotations

import os
from pathlib import Path

import pytest

from scangraph.contracts.errors import AlreadyWritten, FileMissing, PathRefused, StorageFull
from scangraph.storage import LocalStorage


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    (tmp_path / "secret.txt").write_text("secret")
    return LocalStorage(tmp_path / "storage")


REFUSED = [
    "",
    " ",
    "..",
    "../secret.txt",
    "a/../../secret.txt",
    "/etc/passwd",
    "file:///etc/passwd",
    "s3://bucket/key",
    "a\0b",
    "a\\b",
    ".",
    "x" * 5000,
]


@pytest.mark.parametrize("path", REFUSED)
def test_nothing_leads_outside(storage: LocalStorage, path: str) -> None:
    with pytest.raises(PathRefused):
        storage.read(path)
    with pytest.raises(PathRefused):
        storage.write(path, b"x")


def test_links_that_lead_outside_are_refused_and_inner_ones_are_not(storage: LocalStorage) -> None:
    storage.write("real.txt", b"inside")
    (storage.root / "out.txt").symlink_to(storage.root.parent / "secret.txt")
    (storage.root / "folder").symlink_to(storage.root.parent)
    (storage.root / "in.txt").symlink_to(storage.root / "real.txt")
    (storage.root / "loop").symlink_to(storage.root / "loop")
    for path in ("out.txt", "folder/secret.txt", "loop"):
        with pytest.raises((PathRefused, FileMissing)):
            storage.read(path)
    assert storage.read("in.txt") == b"inside"


def test_absolute_paths_inside_are_the_same_file(storage: LocalStorage) -> None:
    name = storage.write("a/b.nii.gz", b"data")
    assert name == "a/b.nii.gz"
    assert storage.name_of(str(storage.root / name)) == name
    assert storage.read(str(storage.root / name)) == b"data"


def test_missing_files_and_folders(storage: LocalStorage) -> None:
    storage.write("folder/file", b"")
    for path in ("nothing.nii.gz", "folder"):
        with pytest.raises(FileMissing, match=path):
            storage.read(path)


def test_keys_are_write_once_and_leave_nothing_behind(storage: LocalStorage) -> None:
    storage.write("a", b"first")
    with pytest.raises(AlreadyWritten):
        storage.write("a", b"second")
    assert storage.read("a") == b"first"
    assert [p.name for p in storage.root.iterdir()] == ["a"]


def test_a_folder_that_cannot_be_written_is_said(storage: LocalStorage) -> None:
    storage.write("file", b"")
    with pytest.raises(StorageFull, match="file/below"):
        storage.write("file/below", b"x")
    assert os.listdir(storage.root) == ["file"]  # noqa: PTH208 - names, as the system lists them
