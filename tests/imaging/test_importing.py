"""An ONNX file becomes a detector, or says why not; looked into by a process of the stage's own environment."""

from __future__ import annotations

from pathlib import Path

import pytest

from deployments.imaging.components import DETECT
from scangraph.contracts.errors import ModelRefused
from scangraph.detector_import import import_detector, looker
from scangraph.models import choose_detector, find_model, installed_detectors
from scangraph.settings import HOME
from tests.imaging.networks import SIZE, constant_network, output_of

ENVIRONMENT = HOME / ".envs" / "imaging"
pytestmark = pytest.mark.skipif(not (ENVIRONMENT / "scangraph-lock").exists(), reason="needs .envs/imaging: run `make setup`")

ROWS = [(8.0, 20.0, 40.0, 44.0, 0, 0.9)]
NAMED = {"names": "{0: 'cat', 1: 'dog', 2: 'owl'}"}


def file(folder: Path, data: bytes) -> Path:
    path = folder / "My Cats.onnx"
    path.write_bytes(data)
    return path


def test_a_file_becomes_a_detector(tmp_path: Path) -> None:
    source, models = file(tmp_path, constant_network(output_of("v5", ROWS), metadata=NAMED)), tmp_path / "models"
    model = import_detector(source, models, looker(ENVIRONMENT), license_="CC0")
    manifest = model.manifest
    assert (manifest.id, manifest.task, manifest.classes) == ("my-cats", DETECT.id, ("cat", "dog", "owl"))
    assert (manifest.layout, manifest.input_size, manifest.license) == ("v5", (SIZE, SIZE), "CC0")
    assert choose_detector((models, HOME / "models"), DETECT.id).manifest.id == "my-cats"  # before the demonstration
    again = import_detector(source, models, looker(ENVIRONMENT), model_id="pets", classes=["a", "b", "c"])
    assert again.manifest.classes == ("a", "b", "c")
    assert find_model((models,), "pets").digest == again.digest


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"PK\x03\x04 a zip, perhaps", "no ONNX file"),
        (constant_network(output_of("v8", ROWS)), "finds 3 classes and names 0"),
        (constant_network(output_of("v8", ROWS, classes=4), metadata=NAMED), "finds 4 classes and names 3"),
    ],
)
def test_what_is_refused_leaves_nothing(tmp_path: Path, data: bytes, why: str) -> None:
    with pytest.raises(ModelRefused, match=why) as refused:
        import_detector(file(tmp_path, data), tmp_path / "models", looker(ENVIRONMENT))
    assert "My Cats.onnx" in refused.value.detail
    assert installed_detectors((tmp_path / "models",)) == []
    assert list((tmp_path / "models").iterdir()) == []


def test_no_file_and_no_environment_are_said(tmp_path: Path) -> None:
    with pytest.raises(ModelRefused, match="no such file"):
        import_detector(tmp_path / "none.onnx", tmp_path / "models", looker(ENVIRONMENT))
    source = file(tmp_path, constant_network(output_of("v8", ROWS), metadata=NAMED))
    with pytest.raises(ModelRefused, match="make setup"):
        import_detector(source, tmp_path / "models", looker(tmp_path / "nowhere"))
