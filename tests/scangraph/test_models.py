from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from scangraph import models
from scangraph.contracts.errors import InvalidModel, ModelNotFound, UnknownComponent, UsageError
from scangraph.local_cli import manifest_of_nnunet
from tests.conftest import ROOT

SHIPPED = ROOT / "models"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(SHIPPED / "ureter-demo", tmp_path / "shipped" / "ureter-demo"))


def edit(folder: Path, **changes: object) -> None:
    content = yaml.safe_load((folder / "model.yaml").read_text())
    (folder / "model.yaml").write_text(yaml.safe_dump({**content, **changes}))


def test_shipped_models_are_whole_say_what_they_are_and_reach_their_marks() -> None:
    """The figures are those of the training run, on phantoms of unseen seeds."""
    found = {m.manifest.task: m for m in models.installed_models([SHIPPED])}
    assert found.keys() == {"inference/totalseg", "inference/vessel", "inference/ureter", "inference/tumor"}
    assert models.invalid_models([SHIPPED]) == []
    for model in found.values():
        models.verify_files(model)
        assert model.manifest.demo
        assert "Synthetic phantoms" in model.manifest.training_data
        assert "real patient" in model.warnings[0]
        assert model.manifest.metrics["cases"] == 10
    least = {"inference/totalseg": 0.90, "inference/vessel": 0.80, "inference/ureter": 0.75}
    for task, mark in least.items():
        scores = found[task].manifest.metrics["dice_mean"]
        assert min(scores.values()) >= mark, (task, scores)
    assert found["inference/tumor"].manifest.metrics["dice_mean"]["tumor"] >= 0.80
    size = sum(p.stat().st_size for m in found.values() for p in m.folder.rglob("*") if p.is_file())
    assert size < 8 * 2**20


def test_installed_goes_before_shipped_and_swapping_the_folder_updates(copy: Path, tmp_path: Path) -> None:
    folders = (tmp_path / "data", copy.parent)
    assert models.choose_model(folders, "inference/ureter").folder == copy
    edit(copy, version="2.0.0", demo=False)
    installed = models.install_model(copy, tmp_path / "data")
    assert installed.folder == tmp_path / "data" / "ureter-demo"
    chosen = models.choose_model(folders, "inference/ureter")
    assert (chosen.folder, chosen.manifest.version) == (installed.folder, "2.0.0")
    assert chosen.warnings == ()
    edit(copy, version="3.0.0")
    models.install_model(copy, tmp_path / "data")
    assert models.choose_model(folders, "inference/ureter").manifest.version == "3.0.0"


def test_what_is_not_installed_is_named(copy: Path) -> None:
    with pytest.raises(ModelNotFound, match="ureter-demo"):
        models.choose_model([copy.parent], "inference/ureter", "real-ureter")
    with pytest.raises(ModelNotFound, match="none"):
        models.choose_model([copy.parent], "inference/tumor")


def test_changed_missing_and_unlisted_files_are_refused(copy: Path) -> None:
    weights = copy / "nnunet/fold_0/weights.safetensors"
    original = weights.read_bytes()
    weights.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
    with pytest.raises(InvalidModel, match="weights.safetensors"):
        models.verify_files(models.read_model(copy))
    weights.unlink()
    with pytest.raises(InvalidModel, match="missing"):
        models.verify_files(models.read_model(copy))
    weights.write_bytes(original)
    (copy / "nnunet/fold_0/checkpoint_final.pth").write_bytes(b"surprise")
    with pytest.raises(InvalidModel, match="checkpoint_final.pth is not named"):
        models.verify_files(models.read_model(copy))


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"research_use_only": False}, "research_use_only"),
        ({"networks": [{"folder": "../..", "labels": {1: 206}}]}, "outside"),
        ({"networks": [{"folder": "nnunet", "labels": {1: 150}}]}, "150"),
        ({"files": {"../../etc/passwd": "0"}}, "outside"),
        ({"surprise": 1}, "surprise"),
        ({"id": "../up"}, "id"),
    ],
)
def test_bad_manifests_are_refused_and_do_not_hide_the_others(copy: Path, change: dict[str, object], cause: str) -> None:
    good = shutil.copytree(copy, copy.with_name("good"))
    edit(copy, **change)
    with pytest.raises(InvalidModel, match=cause):
        models.read_model(copy)
    assert [m.folder for m in models.installed_models([copy.parent])] == [good]
    assert len(models.invalid_models([copy.parent])) == 1


def test_a_manifest_that_is_no_yaml(copy: Path) -> None:
    (copy / "model.yaml").write_text("a: [")
    with pytest.raises(InvalidModel, match="not YAML"):
        models.read_model(copy)


def test_a_failed_install_changes_nothing(copy: Path, tmp_path: Path) -> None:
    models.install_model(copy, tmp_path / "data")
    (copy / "nnunet/plans.json").write_text("{}")
    edit(copy, version="9.9.9")
    with pytest.raises(InvalidModel):
        models.install_model(copy, tmp_path / "data")
    assert models.read_model(tmp_path / "data" / "ureter-demo").manifest.version == "1.0.0"
    assert [p.name for p in (tmp_path / "data").iterdir()] == ["ureter-demo"]


def test_nnunet_folders_become_models(copy: Path) -> None:
    network = copy / "nnunet"
    manifest = manifest_of_nnunet(network, "inference/ureter", "mine", None, ("0",), "CC-BY")
    assert manifest.networks[0].labels == {1: 206}
    assert not manifest.demo
    dataset = json.loads((network / "dataset.json").read_text())
    (network / "dataset.json").write_text(json.dumps({**dataset, "labels": {"background": 0, "left ureter": 1}}))
    with pytest.raises(UsageError, match="left ureter"):
        manifest_of_nnunet(network, "inference/ureter", "mine", None, ("0",), "CC-BY")
    assert manifest_of_nnunet(network, "inference/ureter", "mine", "1=206", ("0",), "x").networks[0].labels == {1: 206}
    with pytest.raises(UnknownComponent):
        manifest_of_nnunet(network, "inference/nothing", None, None, ("0",), "x")
    with pytest.raises(UsageError, match="fold_4"):
        manifest_of_nnunet(network, "inference/ureter", None, "1=206", ("4",), "x")
