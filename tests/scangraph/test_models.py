from __future__ import annotations

import os
import shutil
import threading
import time
from pathlib import Path

import pytest
import yaml

from deployments.nnunet.components import COMPONENTS, component_of
from scangraph import models
from scangraph.catalog import Catalog
from scangraph.contracts.errors import InvalidModel, ModelNotFound, ModelRefused
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
        (
            {"networks": [{"folder": "nnunet", "labels": {1: 150}}], "names": {150: "bone"}},
            "150 of its own needs a number from",
        ),
        ({"names": {1500: "a name\n"}}, "1500"),
        ({"task": "inference/../v1"}, "task"),
        ({"inputs": [{"name": "a name"}]}, "inputs.0.name"),
        ({"inputs": [{"name": "image"}, {"name": "image"}]}, "one name"),
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


def test_links_are_not_followed(copy: Path, tmp_path: Path) -> None:
    (copy / "nnunet/fold_0/more").symlink_to("/etc")
    with pytest.raises(ModelRefused, match="fold_0/more is a link"):
        models.install_model(copy, tmp_path / "data")
    assert list((tmp_path / "data").iterdir()) == []


def test_what_differs_is_said_file_by_file(copy: Path) -> None:
    model = models.read_model(copy)
    assert list(models.differences(model)) == []
    (copy / "nnunet/plans.json").write_text("{}")
    (copy / "training.log").unlink()
    (copy / "nnunet/fold_0/more").touch()
    assert sorted(models.differences(model)) == [
        "nnunet/fold_0/more is not named in the manifest",
        "nnunet/plans.json is not the file the manifest names (SHA-256 differs)",
        "training.log is missing",
    ]


def test_only_what_was_installed_is_removed(copy: Path, tmp_path: Path) -> None:
    installed = tmp_path / "data"
    folders = (installed, copy.parent)
    with pytest.raises(ModelRefused, match="only models below"):
        models.remove_model(folders, installed, "ureter-demo")
    models.install_model(copy, installed)
    assert models.remove_model(folders, installed, "ureter-demo") == installed / "ureter-demo"
    assert list(installed.iterdir()) == []
    assert models.find_model(folders, "ureter-demo").folder == copy
    with pytest.raises(ModelNotFound, match="ureter-demo"):
        models.remove_model(folders, installed, "../shipped/ureter-demo")


def test_a_model_that_is_being_installed_is_not_seen(copy: Path) -> None:
    with models.staging(copy.parent, "x") as folder:
        shutil.copytree(copy, folder, dirs_exist_ok=True)
        assert [model.folder for model in models.installed_models([copy.parent])] == [copy]


def test_what_a_killed_install_left_is_removed_a_day_later(tmp_path: Path) -> None:
    fresh, old = tmp_path / ".a.1.part", tmp_path / ".b.1.part"
    for folder in (fresh, old):
        (folder / "nnunet").mkdir(parents=True)
    os.utime(old, (0, 0))
    with models.staging(tmp_path, "x"):
        assert fresh.exists()
        assert not old.exists()


def test_there_is_a_model_while_it_is_replaced(copy: Path, tmp_path: Path) -> None:
    """Somebody looks all the time; without an exchange in one step they would find nothing now and then."""
    models.install_model(copy, tmp_path)
    missed, stop = [], threading.Event()

    def look() -> None:
        while not stop.is_set():
            if not (tmp_path / "ureter-demo" / "model.yaml").exists():
                missed.append(1)
            time.sleep(1e-5)

    watching = threading.Thread(target=look)
    watching.start()
    for number in range(8):
        edit(copy, version=f"2.0.{number}")
        models.install_model(copy, tmp_path)
    stop.set()
    watching.join()
    assert models.find_model([tmp_path], "ureter-demo").manifest.version == "2.0.7"
    assert os.uname().sysname != "Linux" or not missed


# --- the catalog -------------------------------------------------------------------------------------------------------------


def test_the_catalog_follows_the_folders(copy: Path, tmp_path: Path) -> None:
    installed = tmp_path / "data"
    catalog = Catalog(COMPONENTS, (installed, copy.parent), component_of)
    assert set(catalog) == {component.id for component in COMPONENTS}
    edit(copy, id="mine", task="inference/mine", names={1234: "my_duct"}, networks=[{"folder": "nnunet", "labels": {1: 1234}}])
    models.install_model(copy, installed)
    component = catalog["inference/mine"]  # asked by name it is found at once
    assert "my duct with the installed model mine" in component.description
    assert catalog["inference/mine"] is component
    assert models.label_names((installed,)) == {1234: "my_duct"}
    models.remove_model((installed,), installed, "mine")
    shutil.rmtree(copy)
    fresh = Catalog(COMPONENTS, (installed, copy.parent), component_of)
    assert "inference/mine" not in fresh
    assert len(fresh) == len(COMPONENTS)
