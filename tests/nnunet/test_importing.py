"""Networks as users have them: every shape they come in, and those that nobody should have."""

from __future__ import annotations

import ast
import json
import os
import shutil
import stat
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import nnunetv2
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from deployments.nnunet.components import COMPONENTS, component_of
from deployments.nnunet.importing import convert
from deployments.nnunet.predictor import Network
from deployments.nnunet.segmentation import segment
from deployments.nnunet.weights import OVERRIDING_TRAINERS, read_network_folder
from scangraph.archives import ArchiveLimits, unpack
from scangraph.catalog import Catalog
from scangraph.contracts import Volume, free_number, label_number
from scangraph.contracts.errors import InvalidModel, ModelRefused, ScanGraphError, UnknownComponent
from scangraph.model_import import Wish, converter, import_model
from scangraph.models import Model, choose_model, installed_models, verify_files
from tests.conftest import ROOT
from tests.nnunet.folders import (
    ORGANS,
    TOTALSEGMENTATOR,
    build,
    export,
    plans,
    results_folder,
    totalsegmentator_folder,
    write_checkpoint,
)


class Shelf:
    """Where models are installed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.catalog = Catalog(COMPONENTS, (folder,), component_of)

    def install(self, source: Path, **wish: Any) -> Model:
        return import_model(source, self.folder, self.catalog, Wish(**wish), convert)

    def refuses(self, source: Path, why: str, error: type[ScanGraphError] = ModelRefused, **wish: Any) -> None:
        before = sorted(self.folder.rglob("*")) if self.folder.exists() else []
        with pytest.raises(error, match=why):
            self.install(source, **wish)
        assert (sorted(self.folder.rglob("*")) if self.folder.exists() else []) in (before, [])


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(tmp_path / "models")


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """TotalSegmentator's results folder with everything in it."""
    folder = tmp_path_factory.mktemp("totalsegmentator")
    for number in TOTALSEGMENTATOR:
        totalsegmentator_folder(folder, number)
    return folder


def predict(model: Model, volume: Volume) -> Any:
    networks = [
        Network(read_network_folder(model.folder / n.folder, n.folds), torch.device("cpu"), mirroring=False)
        for n in model.manifest.networks
    ]
    inputs = {entry.name: volume for entry in model.manifest.inputs}
    return segment(inputs, model, networks, step_size=1.0, on_progress=lambda *_: None)[0]


def noise(shape: tuple[int, int, int] = (16, 18, 20)) -> Volume:
    values = np.random.default_rng(3).normal(40, 200, shape).astype(np.int16)
    return Volume(values, (2.0, 1.5, 1.0))


# --- shapes ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["network", "dataset", "results", "archive", "folder of archives"])
def test_a_network_is_taken_however_it_is_given(given: str, shelf: Shelf, tmp_path: Path) -> None:
    network = results_folder(tmp_path / "results", folds=("0", "1"))
    (tmp_path / "zips").mkdir()
    archive = export(network, tmp_path / "zips" / "belly.zip")
    source = {
        "network": network,
        "dataset": network.parent,
        "results": network.parents[1],
        "archive": archive,
        "folder of archives": archive.parent,
    }[given]
    model = shelf.install(source)
    manifest = model.manifest
    assert (manifest.id, manifest.task, manifest.title) == ("belly", "inference/belly", "Belly")
    node = free_number("portal_lymph_node", {})
    assert manifest.networks[0].labels == {1: label_number("spleen"), 2: label_number("kidney_right"), 3: node}
    assert manifest.names == {node: "portal_lymph_node"}
    assert manifest.spacing_mm == (2.0, 1.5, 1.0)
    assert sorted(manifest.files) == [
        "nnunet/dataset.json",
        "nnunet/fold_0/checkpoint.json",
        "nnunet/fold_0/weights.safetensors",
        "nnunet/plans.json",
    ]
    assert json.loads((model.folder / "nnunet/plans.json").read_text()) == json.loads((network / "plans.json").read_text())
    assert sorted(path.name for path in shelf.folder.iterdir()) == ["belly"]
    assert shelf.catalog["inference/belly"].description.startswith("Segments spleen, kidney right, portal lymph node with")
    assert [port.path_name for port in shelf.catalog["inference/belly"].inputs] == ["image_path"]


def test_weights_are_the_same_each_once_and_predict_the_same(shelf: Shelf, tmp_path: Path) -> None:
    network = results_folder(tmp_path, folds=("0", "all"))
    model = shelf.install(network, folds=("0", "all"))
    for fold in ("0", "all"):
        theirs = torch.load(network / f"fold_{fold}/checkpoint_final.pth", weights_only=False)["network_weights"]
        ours = load_file(model.folder / f"nnunet/fold_{fold}/weights.safetensors")
        assert len(ours) == len({tensor.data_ptr() for tensor in theirs.values()}) < len(theirs)
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    before = Network(read_network_folder(network, ("0",)), torch.device("cpu"), mirroring=False)
    after = Network(read_network_folder(model.folder / "nnunet", ("0",)), torch.device("cpu"), mirroring=False)
    arguments: Any = ([noise().array], (2.0, 1.5, 1.0), lambda *_: None)
    assert np.array_equal(before.predict(*arguments), after.predict(*arguments))
    assert read_network_folder(model.folder / "nnunet", ("0",)).mirror_axes == (0, 1, 2)


def test_labels_of_ones_own_have_their_numbers_and_names_in_the_mask(shelf: Shelf, tmp_path: Path) -> None:
    model = shelf.install(results_folder(tmp_path))
    mask = predict(model, noise())
    node = free_number("portal_lymph_node", {})
    assert mask.array.dtype == np.uint16
    assert set(mask.counts()) <= {1, 2, node}
    assert node in mask.counts()


def test_plans_without_an_architecture(shelf: Shelf, tmp_path: Path) -> None:
    network = results_folder(tmp_path, old=True)
    model = shelf.install(network)
    written = json.loads((model.folder / "nnunet/plans.json").read_text())["configurations"]["3d_fullres"]
    today = plans("Dataset042_Belly", (2.0, 1.5, 1.0), 1)["configurations"]["3d_fullres"]["architecture"]
    assert written["architecture"] == today
    assert predict(model, noise()).counts()


def test_regions_are_named_by_what_is_left_of_them(shelf: Shelf, tmp_path: Path) -> None:
    labels = {"background": 0, "kidney": [1, 2, 3], "masses": [2, 3], "tumor": 2}
    model = shelf.install(results_folder(tmp_path, "Dataset220_KiTS2023", labels, order=(1, 3, 2)))
    masses = free_number("masses", {})
    assert model.manifest.networks[0].labels == {1: label_number("kidney"), 3: masses, 2: label_number("tumor")}
    assert model.manifest.names == {masses: "masses"}
    assert set(predict(model, noise()).counts()) <= {201, 202, masses}


def test_several_channels_become_several_inputs(shelf: Shelf, tmp_path: Path) -> None:
    model = shelf.install(results_folder(tmp_path, channels=("CT arterial", "T2")))
    assert [(i.name, i.modality) for i in model.manifest.inputs] == [("image_CT_arterial", "CT"), ("image_T2", "T2")]
    component = shelf.catalog["inference/belly"]
    assert [port.path_name for port in component.inputs] == ["image_CT_arterial_path", "image_T2_path"]
    assert predict(model, noise()).counts()


def test_a_network_may_serve_a_known_task(shelf: Shelf, tmp_path: Path) -> None:
    pair = results_folder(tmp_path, "Dataset007_Vessel", {"background": 0, "artery": 1, "vein": 2}, channels=("CT", "CT"))
    model = shelf.install(pair, task="inference/vessel", license="CC-BY-4.0")
    assert [(i.name, i.phase) for i in model.manifest.inputs] == [("image_A", "arterial"), ("image_P", "portal")]
    assert (model.manifest.id, model.manifest.license) == ("vessel-nnunet", "CC-BY-4.0")
    assert choose_model([shelf.folder], "inference/vessel").digest == model.digest
    assert set(shelf.catalog) == {component.id for component in COMPONENTS}
    shelf.refuses(pair, "2 images, and inference/ureter has the inputs image_D", task="inference/ureter")
    shelf.refuses(pair, "inference/nothing", UnknownComponent, task="inference/nothing")
    shelf.refuses(pair, "there is a component inference/vessel; say --task", model_id="vessel")
    other = shelf.install(pair)
    assert other.manifest.task == "inference/vessel-nnunet"


def test_labels_by_hand(shelf: Shelf, tmp_path: Path) -> None:
    network = results_folder(tmp_path)
    model = shelf.install(network, labels={1: 5, 3: 206}, model_id="mine")
    assert (model.manifest.labels, model.manifest.names) == ((5, 206), {})
    shelf.refuses(network, "it has no label 7", labels={7: 1})
    shelf.refuses(network, "the label table has no number 999", labels={1: 999})


def test_one_name_has_one_number_in_all_models(shelf: Shelf, tmp_path: Path) -> None:
    first = shelf.install(results_folder(tmp_path / "a", "Dataset001_A", {"background": 0, "Lymph-node": 1, "bone!": 2}))
    second = shelf.install(results_folder(tmp_path / "b", "Dataset002_B", {"background": 0, "lymph node": 2, "nerve": 1}))
    number = first.manifest.networks[0].labels[1]
    assert second.manifest.networks[0].labels[2] == number
    assert (first.manifest.names[number], second.manifest.names[number]) == ("Lymph_node", "Lymph_node")


def test_the_same_again_replaces_and_a_new_version_is_another_digest(shelf: Shelf, tmp_path: Path) -> None:
    first = shelf.install(results_folder(tmp_path / "a", seed=1))
    second = shelf.install(results_folder(tmp_path / "b", seed=2))
    assert [model.digest for model in installed_models([shelf.folder])] == [second.digest] != [first.digest]


# --- TotalSegmentator --------------------------------------------------------------------------------------------------------


def test_total_is_five_networks_merged_into_117_classes(parts: Path, shelf: Shelf) -> None:
    model = shelf.install(parts, dataset="total")
    manifest = model.manifest
    assert (manifest.id, manifest.task, manifest.orientation) == ("totalsegmentator", "inference/totalseg", "RAS")
    assert [len(network.labels) for network in manifest.networks] == [24, 26, 18, 23, 26]
    assert manifest.labels == tuple(range(1, 118))
    assert (manifest.spacing_mm, manifest.names) == ((1.5, 1.5, 1.5), {})
    verify_files(model)
    folders = (shelf.folder, ROOT / "models")
    assert choose_model(folders, "inference/totalseg").digest == model.digest
    found = set(predict(model, noise()).counts())
    assert len(found) > 5
    assert found <= set(range(1, 118))


@pytest.mark.parametrize(
    ("number", "name", "spacing"), [(297, "totalsegmentator-3mm", 3.0), (298, "totalsegmentator-6mm", 6.0)]
)
def test_coarse_variants(number: int, name: str, spacing: float, parts: Path, shelf: Shelf) -> None:
    model = shelf.install(parts, dataset=str(number))
    assert (model.manifest.id, model.manifest.spacing_mm) == (name, (spacing,) * 3)
    assert model.manifest.networks[0].labels == {n: n for n in range(1, 118)}
    assert model.manifest.task == "inference/totalseg"


def test_five_archives_are_one_model_and_a_lone_part_is_its_own(parts: Path, shelf: Shelf, tmp_path: Path) -> None:
    for number in (291, 292, 293, 294, 295):
        name = TOTALSEGMENTATOR[number][0]
        export(next((parts / name).iterdir()), tmp_path / f"{name}.zip")
    model = shelf.install(tmp_path)
    assert model.manifest.id == "totalsegmentator"
    assert [network.labels[1] for network in model.manifest.networks] == [1, 25, 51, 69, 92]
    part = shelf.install(tmp_path / f"{TOTALSEGMENTATOR[292][0]}.zip", model_id="vertebrae")
    assert (part.manifest.task, part.manifest.labels) == ("inference/vertebrae", tuple(range(25, 51)))


def test_what_is_ambiguous_is_named(parts: Path, shelf: Shelf, tmp_path: Path) -> None:
    shelf.refuses(parts, "it holds total, Dataset297_\\S+, Dataset298_\\S+; choose one with --dataset")
    shelf.refuses(parts, "it holds no 299", dataset="299")
    shelf.refuses(parts, "--labels is for one network", dataset="total", labels={1: 1})
    some = tmp_path / "some"
    for number in (291, 292, 293, 294):
        name = TOTALSEGMENTATOR[number][0]
        shutil.copytree(parts / name, some / name)
    shelf.refuses(some, "five parts there is no 295")
    shelf.refuses(some, "five parts there is no 295", dataset="total")
    both = tmp_path / "both"
    results_folder(both)
    results_folder(both, configuration="3d_lowres", spacing=(4, 4, 4))
    shelf.refuses(both, "nnUNetTrainer__nnUNetPlans__3d_fullres, nnUNetTrainer__nnUNetPlans__3d_lowres; choose one with --conf")
    shelf.refuses(both, "has no 2d", configuration="2d")
    assert shelf.install(both, configuration="3d_lowres").manifest.id == "belly-3d-lowres"
    shelf.refuses(both, "no fold_4; it has 0", configuration="3d_fullres", folds=("4",))


# --- refused -----------------------------------------------------------------------------------------------------------------


class Payload:
    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


def test_a_checkpoint_that_carries_code_is_not_executed(shelf: Shelf, tmp_path: Path) -> None:
    network = results_folder(tmp_path)
    checkpoint = network / "fold_0/checkpoint_final.pth"
    write_checkpoint(checkpoint, {}, "nnUNetTrainer", "3d_fullres", extra=Payload(tmp_path / "executed"))
    shelf.refuses(network, "more than weights and was not executed", InvalidModel)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "weights", [[1, 2], {"a": 1}, {1: torch.zeros(1)}, {"a": torch.zeros(1).expand(10**12)}, {"a": torch.eye(2).to_sparse()}]
)
def test_weights_that_are_none(weights: Any, shelf: Shelf, tmp_path: Path) -> None:
    network = results_folder(tmp_path)
    path = network / "fold_0/checkpoint_final.pth"
    fields = torch.load(path, weights_only=False)
    torch.save({**fields, "network_weights": weights}, path)
    shelf.refuses(network, r"checkpoint_final\.pth (cannot be read|holds more)", InvalidModel)


def test_residual_encoders_and_several_trainings(shelf: Shelf, tmp_path: Path) -> None:
    planned = plans("Dataset042_Belly", (2, 1.5, 1), 1)["configurations"]["3d_fullres"]["architecture"]
    arguments = {**planned["arch_kwargs"], "n_blocks_per_stage": planned["arch_kwargs"]["n_conv_per_stage"]}
    del arguments["n_conv_per_stage"]
    name = "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet"
    architecture = {**planned, "network_class_name": name, "arch_kwargs": arguments}
    network = results_folder(tmp_path, architecture=architecture, folds=("1", "all"))
    model = shelf.install(network)
    assert model.manifest.networks[0].folds == ("all",)
    assert predict(model, noise()).counts()


def test_names_are_checked_before_anything_is_made(shelf: Shelf, tmp_path: Path) -> None:
    network = results_folder(tmp_path)
    shelf.refuses(network, "no name for a model", model_id="../../evil")
    shelf.refuses(results_folder(tmp_path / "x", "Dataset009_肾"), "no name for a model")
    assert shelf.install(network, model_id="belly.v2").manifest.task == "inference/belly-v2"


def test_checkpoints_of_numpy_1_are_read(shelf: Shelf, tmp_path: Path) -> None:
    network = results_folder(tmp_path)
    path = network / "fold_0/checkpoint_final.pth"
    with zipfile.ZipFile(path) as opened:
        entries = {name: opened.read(name) for name in opened.namelist()}
    with zipfile.ZipFile(path, "w") as opened:
        for name, content in entries.items():
            opened.writestr(name, content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert b"numpy.core.multiarray" in entries["checkpoint_final/data.pkl"].replace(b"_core", b"core")
    shelf.install(network)


@pytest.mark.parametrize(
    ("trainer", "taken"),
    [
        ("nnUNetTrainer_4000epochs_NoMirroring", True),
        ("nnUNetTrainerDiceCELoss_noSmooth", True),
        ("nnUNetTrainerBN", False),
        ("nnUNetTrainerUMambaBot", False),
        ("nnUNetTrainerV2_MedNeXt_S_kernel3", False),
        ("nnUNet_Primus_M_Trainer", False),
        ("MyTrainer", False),
    ],
)
def test_trainers_that_build_another_network_are_refused_by_name(
    trainer: str, taken: bool, shelf: Shelf, tmp_path: Path
) -> None:
    network = results_folder(tmp_path, trainer=trainer)
    if taken:
        assert trainer in shelf.install(network).manifest.training_data
    else:
        shelf.refuses(network, trainer, InvalidModel)


def test_every_trainer_of_nnunet_that_overrides_the_architecture_is_known(tmp_path: Path) -> None:
    bases: dict[str, list[str]] = {}
    overriding: set[str] = set()
    for path in (Path(nnunetv2.__path__[0]) / "training/nnUNetTrainer").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and node.name != "nnUNetTrainer":
                bases[node.name] = [base.id for base in node.bases if isinstance(base, ast.Name)]
                if any(isinstance(m, ast.FunctionDef) and m.name == "build_network_architecture" for m in node.body):
                    overriding.add(node.name)

    def overrides(name: str) -> bool:
        return name in overriding or any(map(overrides, bases.get(name, ())))

    refused = set()
    network = results_folder(tmp_path)
    fields = torch.load(network / "fold_0/checkpoint_final.pth", weights_only=False)
    for name in bases:
        torch.save({**fields, "trainer_name": name}, network / "fold_0/checkpoint_final.pth")
        try:
            read_network_folder(network, ("0",))
        except InvalidModel:
            refused.add(name)
    assert refused == {name for name in bases if overrides(name)}
    assert OVERRIDING_TRAINERS.match("nnUNetTrainerBN")


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_unknown_architectures_are_refused_by_name(shelf: Shelf, tmp_path: Path) -> None:
    network = results_folder(tmp_path / "new")
    planned = plans("Dataset042_Belly", (2, 1.5, 1), 1)
    primus = "dynamic_network_architectures.architectures.primus.Primus"
    planned["configurations"]["3d_fullres"]["architecture"]["network_class_name"] = primus
    edit(network / "plans.json", **planned)
    shelf.refuses(network, primus, InvalidModel)
    old = results_folder(tmp_path / "old", old=True)
    planned = plans("Dataset042_Belly", (2, 1.5, 1), 1, old=True)
    planned["configurations"]["3d_fullres"]["UNet_class_name"] = "MyUNet"
    edit(old / "plans.json", **planned)
    shelf.refuses(old, "MyUNet", InvalidModel)


def test_weights_of_another_network_are_refused(shelf: Shelf, tmp_path: Path) -> None:
    network = results_folder(tmp_path)
    edit(network / "dataset.json", labels={"background": 0, "spleen": 1})
    shelf.refuses(network, "do not fit the network of its plans, first at decoder.seg_layers", InvalidModel)
    edit(network / "dataset.json", labels=ORGANS)
    described, planned = (json.loads((network / f"{name}.json").read_text()) for name in ("dataset", "plans"))
    weights = {**build(planned, described, "3d_fullres").state_dict(), "extra.weight": torch.zeros(1)}
    write_checkpoint(network / "fold_0/checkpoint_final.pth", weights, "nnUNetTrainer", "3d_fullres")
    shelf.refuses(network, "more than the network of its plans, first extra.weight", InvalidModel)


@pytest.mark.parametrize(
    ("name", "changes", "why", "error"),
    [
        ("dataset.json", {"labels": {"0": "background", "1": "spleen"}}, "does not name its labels", ModelRefused),
        ("dataset.json", {"labels": {"background": 0}}, "names no labels", ModelRefused),
        ("dataset.json", {"channel_names": ["CT"]}, "does not name its channels", ModelRefused),
        ("plans.json", {"configurations": {}}, "no configuration '3d_fullres'", InvalidModel),
        ("plans.json", {"label_manager": "os.system"}, "os.system", InvalidModel),
        ("plans.json", {"transpose_backward": "abc"}, "make no network", InvalidModel),
    ],
)
def test_descriptions_that_do_not_fit(
    name: str, changes: dict[str, Any], why: str, error: type[ScanGraphError], shelf: Shelf, tmp_path: Path
) -> None:
    network = results_folder(tmp_path)
    edit(network / name, **changes)
    shelf.refuses(network, why, error)


def test_cascades_are_refused_with_the_way_out(shelf: Shelf, tmp_path: Path) -> None:
    network = results_folder(tmp_path, configuration="3d_cascade_fullres", previous_stage="3d_lowres")
    shelf.refuses(network, "starts from the result of another network; install its 3d_fullres", InvalidModel)


def test_links_in_folders_are_refused(shelf: Shelf, tmp_path: Path) -> None:
    network = results_folder(tmp_path)
    (network / "fold_0/notes.txt").symlink_to("/etc/hostname")
    shelf.refuses(network, "fold_0/notes.txt is a link")
    (network / "fold_0/notes.txt").unlink()
    os.mkfifo(network / "fold_0/notes.txt")
    shelf.refuses(network, "fold_0/notes.txt is no plain file")


def test_what_is_no_network(shelf: Shelf, tmp_path: Path) -> None:
    shelf.refuses(tmp_path / "nothing", "there is no such file or folder")
    (tmp_path / "empty").mkdir()
    shelf.refuses(tmp_path / "empty", "no network is in it")
    (tmp_path / "text.zip").write_text("this is no archive")
    shelf.refuses(tmp_path / "text.zip", "no sound zip archive")
    network = results_folder(tmp_path / "cut")
    whole = export(network, tmp_path / "cut.zip").read_bytes()
    (tmp_path / "cut.zip").write_bytes(whole[: len(whole) // 2])
    shelf.refuses(tmp_path / "cut.zip", "no sound zip archive")
    damaged = bytearray(whole)
    place = whole.index(b"checkpoint_final.pth") + 200
    damaged[place : place + 40] = bytes(40)
    (tmp_path / "damaged.zip").write_bytes(damaged)
    shelf.refuses(tmp_path / "damaged.zip", "no sound zip archive")


# --- hostile archives --------------------------------------------------------------------------------------------------------


def entries(names: Sequence[str], **attributes: Any) -> Iterator[tuple[zipfile.ZipInfo, bytes]]:
    for name in names:
        info = zipfile.ZipInfo(name)
        for key, value in attributes.items():
            setattr(info, key, value)
        yield info, b"{}"


@pytest.mark.parametrize(
    ("names", "attributes", "why"),
    [
        (["../../../plans.json"], {}, "leads out of it"),
        (["/etc/plans.json"], {}, "leads out of it"),
        (["C:/plans.json"], {}, "leads out of it"),
        (["a\\..\\plans.json"], {}, "leads out of it"),
        (["link"], {"external_attr": (stat.S_IFLNK | 0o777) << 16}, "is a link"),
        (["pipe"], {"external_attr": (stat.S_IFIFO | 0o777) << 16}, "no plain file"),
        (["d/plans.json", "d/./plans.json"], {}, "in it twice"),
        ([f"file{n}" for n in range(30)], {}, "30 entries"),
    ],
)
def test_hostile_names_are_refused(names: list[str], attributes: Mapping[str, Any], why: str, tmp_path: Path) -> None:
    archive = tmp_path / "hostile.zip"
    with zipfile.ZipFile(archive, "w") as opened:
        for info, content in entries(names, **attributes):
            opened.writestr(info, content)
    target = tmp_path / "deep" / "target"
    with pytest.raises(ModelRefused, match=why):
        unpack(archive, target, lambda _: True, ArchiveLimits(entries=20))
    assert not target.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) in (["hostile.zip"], ["deep", "hostile.zip"])


def test_bombs_are_refused_by_what_they_declare_and_what_they_do(shelf: Shelf, tmp_path: Path) -> None:
    network = results_folder(tmp_path / "results")
    with (network / "fold_0/checkpoint_final.pth").open("ab") as file:
        file.write(bytes(64 * 2**20))
    archive = export(network, tmp_path / "bomb.zip")
    shelf.refuses(archive, "would inflate \\d+ times")
    with pytest.raises(ModelRefused, match="declares 0 GiB, more than 0"):
        unpack(archive, tmp_path / "out", lambda _: True, ArchiveLimits(total_bytes=2**20))
    # One that declares less than it holds.
    lying = tmp_path / "lying.zip"
    with zipfile.ZipFile(lying, "w", zipfile.ZIP_DEFLATED) as opened:
        opened.writestr("plans.json", bytes(2**20))
    honest = lying.read_bytes()
    size = (2**20).to_bytes(4, "little")
    assert honest.count(size) == 2
    lying.write_bytes(honest.replace(size, (100).to_bytes(4, "little")))
    with pytest.raises(ModelRefused, match="no sound zip archive"):
        unpack(lying, tmp_path / "out2", lambda _: True)
    assert sum(path.stat().st_size for path in (tmp_path / "out2").rglob("*")) <= 100


def test_what_is_not_wanted_is_not_unpacked(tmp_path: Path) -> None:
    network = results_folder(tmp_path / "results", folds=("0", "1"))
    archive = export(network, tmp_path / "belly.zip")
    seen: list[Path] = []

    def look(source: Path, target: Path, folds: Sequence[str]) -> Mapping[str, Any]:
        seen.extend(path.relative_to(source) for path in sorted(source.rglob("*")) if path.is_file())
        return convert(source, target, folds)

    shelf = Shelf(tmp_path / "models")
    import_model(archive, shelf.folder, shelf.catalog, Wish(folds=("1",)), look)
    assert [path.as_posix() for path in seen] == ["dataset.json", "fold_1/checkpoint_final.pth", "plans.json"]


# --- the stage's own process -------------------------------------------------------------------------------------------------


def test_the_command_converts_and_hands_refusals_over(tmp_path: Path) -> None:
    environment = ROOT / ".envs" / "nnunet"
    if not (environment / "bin" / "python").exists():
        pytest.skip("environment 'nnunet' is not built: run `make setup`")
    network = results_folder(tmp_path / "results")
    facts = converter(environment)(network, tmp_path / "out", ("0",))
    assert facts == {"configuration": "3d_fullres", "trainer": "nnUNetTrainer", "spacing_mm": [2.0, 1.5, 1.0], "channels": 1}
    assert (tmp_path / "out/fold_0/weights.safetensors").is_file()
    (network / "fold_0/checkpoint_final.pth").write_bytes(b"no weights")
    with pytest.raises(InvalidModel, match=r"checkpoint_final\.pth cannot be read"):
        converter(environment)(network, tmp_path / "again", ("0",))
    with pytest.raises(ModelRefused, match="make setup"):
        converter(tmp_path)(network, tmp_path / "again", ("0",))
