"""The protocol: its style, what it must not break, and that its code is what the compiler makes of it."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from pathlib import Path

import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorSet

from runtime_envs import build
from scangraph.imageflow.v1 import imageflow_pb2 as pb
from tests.conftest import ROOT

BUF = ["npx", "--yes", "@bufbuild/buf@1.75.0"]


@pytest.fixture(scope="module")
def buf() -> list[str]:
    if not shutil.which("npx"):
        pytest.skip("npx is not on this machine")
    if subprocess.run([*BUF, "--version"], cwd=ROOT / "proto", capture_output=True, timeout=200, check=False).returncode:
        pytest.skip("the npm registry did not give @bufbuild/buf")
    return BUF


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=200, check=False)


def test_style_and_compatibility(buf: list[str]) -> None:
    linted = run([*buf, "lint"], ROOT / "proto")
    assert linted.returncode == 0, linted.stdout
    kept = run([*buf, "breaking", "--against", "released/v1.binpb"], ROOT / "proto")
    assert kept.returncode == 0, kept.stdout


def test_a_change_that_breaks_clients_is_found(buf: list[str], tmp_path: Path) -> None:
    shutil.copytree(ROOT / "proto", tmp_path / "proto")
    source = tmp_path / "proto/imageflow/v1/imageflow.proto"
    changed = source.read_text().replace("uint64 file_size = 4", "uint64 file_size = 40")
    assert changed != source.read_text()
    source.write_text(changed)
    found = run([*buf, "breaking", "--against", "released/v1.binpb"], tmp_path / "proto")
    assert found.returncode != 0
    assert "file_size" in found.stdout


def test_the_released_names_and_numbers_are_there() -> None:
    """Without npx, too: every field, value and method of the last release is what it was."""
    released = FileDescriptorSet.FromString((ROOT / "proto/released/v1.binpb").read_bytes())
    (file,) = [f for f in released.file if f.package == "imageflow.v1"]
    for message in file.message_type:
        now = pb.DESCRIPTOR.message_types_by_name[message.name]
        for field in message.field:
            assert now.fields_by_number[field.number].name == field.name
    for enum in file.enum_type:
        assert {v.name: v.number for v in enum.value}.items() <= dict(getattr(pb, enum.name).items()).items()
    (service,) = file.service
    assert {m.name for m in service.method} <= set(pb.DESCRIPTOR.services_by_name[service.name].methods_by_name)


def test_the_settled_numbers() -> None:
    """Where the design contradicts itself, this is what was agreed."""
    metadata, chunk = pb.ImageMetadata.DESCRIPTOR.fields_by_name, pb.ImageChunk.DESCRIPTOR.fields_by_name
    assert (metadata["file_size"].number, metadata["client_id"].number) == (4, 6)
    assert {"data", "is_final"} <= set(chunk)
    assert pb.STATUS_CANCELLED == 4
    assert not pb.ImageMetadata().HasField("priority")


def test_the_code_is_made_of_this_protocol() -> None:
    made = ROOT / "scangraph/imageflow/made-from"
    texts = [(build.HERE / f"{build.COMPILER}.txt").read_text()]
    texts += [source.read_text() for source in sorted((ROOT / "proto").glob("imageflow/**/*.proto"))]
    assert made.read_text() == hashlib.sha256("\0".join(texts).encode()).hexdigest(), "run `make setup-dev`"
