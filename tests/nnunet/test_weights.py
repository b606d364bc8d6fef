from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from deployments.nnunet.weights import read_network_folder
from scangraph.contracts.errors import InvalidModel
from tests.conftest import ROOT


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(ROOT / "models/ureter-demo/nnunet", tmp_path / "nnunet"))


def as_checkpoint(folder: Path, **extra: Any) -> Path:
    """Write nnU-Net's own form of the weights, with what its trainer logs."""
    fold = folder / "fold_0"
    fields = json.loads((fold / "checkpoint.json").read_text())
    checkpoint = {
        "network_weights": load_file(fold / "weights.safetensors"),
        "init_args": {"configuration": fields["configuration"]},
        "trainer_name": fields["trainer_name"],
        "inference_allowed_mirroring_axes": fields["inference_allowed_mirroring_axes"],
        "logging": {"ema_fg_dice": [np.float64(0.5), np.float32(0.25)]},
        "_best_ema": np.float64(0.5),
        **extra,
    }
    torch.save(checkpoint, fold / "checkpoint_final.pth")
    (fold / "weights.safetensors").unlink()
    return fold / "checkpoint_final.pth"


def test_both_forms_hold_the_same_weights(folder: Path) -> None:
    ours = read_network_folder(folder, ("0",))
    as_checkpoint(folder)
    theirs = read_network_folder(folder, ("0",))
    assert ours.configuration == theirs.configuration
    assert ours.parameters[0].keys() == theirs.parameters[0].keys()
    for name, tensor in theirs.parameters[0].items():
        assert torch.equal(tensor.float(), ours.parameters[0][name])


class Payload:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


def test_a_checkpoint_that_carries_code_is_refused_unexecuted(folder: Path, tmp_path: Path) -> None:
    as_checkpoint(folder, payload=Payload(str(tmp_path / "executed")))
    with pytest.raises(InvalidModel, match="more than weights"):
        read_network_folder(folder, ("0",))
    assert not (tmp_path / "executed").exists()
    pickle.dumps(Payload("x"))  # the payload itself is sound: the refusal is not an accident


def test_files_that_are_no_weights(folder: Path) -> None:
    fold = folder / "fold_0"
    (fold / "weights.safetensors").write_bytes(b"\x10" * 64)
    with pytest.raises(InvalidModel, match=r"weights\.safetensors"):
        read_network_folder(folder, ("0",))
    (fold / "weights.safetensors").unlink()
    with pytest.raises(InvalidModel, match="neither"):
        read_network_folder(folder, ("0",))
    (fold / "checkpoint_final.pth").write_bytes(b"not a checkpoint")
    with pytest.raises(InvalidModel):
        read_network_folder(folder, ("0",))


def _edit(folder: Path, path: tuple[str, ...], value: Any) -> None:
    plans = json.loads((folder / "plans.json").read_text())
    (configuration,) = plans["configurations"]
    place = plans["configurations"][configuration]
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    (folder / "plans.json").write_text(json.dumps(plans))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("architecture", "network_class_name"), "os.system"),
        (("architecture", "arch_kwargs", "conv_op"), "subprocess.Popen"),
        (("architecture", "arch_kwargs", "nonlin"), "antigravity"),
        (("normalization_schemes",), ["EvilNormalization"]),
        (("preprocessor_name",), "EvilPreprocessor"),
        (("resampling_fn_data",), "evil_resampler"),
    ],
)
def test_plans_may_only_name_known_classes(folder: Path, path: tuple[str, ...], value: Any) -> None:
    _edit(folder, path, value)
    with pytest.raises(InvalidModel, match="not allowed"):
        read_network_folder(folder, ("0",))


def test_other_trainers_are_refused_by_name(folder: Path) -> None:
    path = folder / "fold_0/checkpoint.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "trainer_name": "MySpecialTrainer"}))
    with pytest.raises(InvalidModel, match="MySpecialTrainer"):
        read_network_folder(folder, ("0",))
