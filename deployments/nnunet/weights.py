"""Read networks from nnU-Net folders without executing anything that a file says.

nnU-Net itself unpickles its checkpoints, and its plans name Python classes that are imported by name: a crafted folder runs
code (measured on nnU-Net 2.8.1). Here weights are safetensors, or checkpoints read with `weights_only`, and every class a plan
may name is on a list.
"""

from __future__ import annotations

import json
import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from scangraph.contracts.errors import InvalidModel

_UNET = "dynamic_network_architectures.architectures.unet."
ARCHITECTURES = frozenset(
    {
        _UNET + "PlainConvUNet",
        _UNET + "ResidualEncoderUNet",
        # Its name in plans of nnU-Net before 2.5; nnU-Net finds the class by its last part.
        "dynamic_network_architectures.architectures.residual_unet.ResidualEncoderUNet",
    }
)
#: Before nnU-Net 2.3.1, plans named only these and left the rest to be derived (nnU-Net's ConfigurationManager does).
_OLD_ARCHITECTURES = frozenset({"PlainConvUNet", "ResidualEncoderUNet"})
#: What an architecture's arguments may name, and what it stands for.
MODULES = frozenset(
    [
        f"torch.nn.modules.{kind}.{name}{d}d"
        for kind, name in (("conv", "Conv"), ("instancenorm", "InstanceNorm"))
        for d in (2, 3)
    ]
    + [
        f"torch.nn.modules.{kind}.{name}{d}d"
        for kind, name in (("batchnorm", "BatchNorm"), ("dropout", "Dropout"))
        for d in (2, 3)
    ]
    + ["torch.nn.LeakyReLU", "torch.nn.ReLU", "torch.nn.modules.activation.LeakyReLU", "torch.nn.modules.activation.ReLU"]
)
NORMALIZATIONS = frozenset(
    ["CTNormalization", "ZScoreNormalization", "NoNormalization", "RescaleTo01Normalization", "RGBTo01Normalization"]
)
RESAMPLERS = frozenset(
    ["resample_data_or_seg_to_shape", "resample_torch_fornnunet", "resample_torch_simple", "no_resampling_hack"]
)
#: What nnU-Net calls a fold's weights, the wanted one first.
CHECKPOINTS = ("checkpoint_final.pth", "checkpoint_best.pth")
PREPROCESSORS = frozenset(["DefaultPreprocessor"])
#: How trainers are called whose networks are what the plans say. Others may build another one; where its weights have the
#: same names and shapes, nothing but the trainer's name would tell.
_STOCK_TRAINER = re.compile(r"nnUNet_?Trainer")
#: nnU-Net's own trainers, and well-known ones of others, that are called so and yet build a network of their own.
OVERRIDING_TRAINERS = re.compile(
    r"nnUNetTrainerBN|nnUNet_?Trainer_?V?2?_?(UMamba|SwinUMamba|SwinUNETR|UNETR|MedNeXt|STUNet|LightMUNet|SegResNet|Primus|"
    r"UxLSTM|xLSTM|MedSAM|VMamba|nnFormer)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class NetworkFolder:
    """An nnU-Net results folder in memory.

    Parameters
    ----------
    plans, dataset : dict
        `plans.json` and `dataset.json`, checked.
    configuration : str
        Which of the plans' configurations the weights are for.
    trainer : str
        Name of nnU-Net's trainer class.
    mirror_axes : tuple of int or None
        Axes that training mirrored.
    parameters : list of dict
        State dict of each fold.
    """

    plans: dict[str, Any]
    dataset: dict[str, Any]
    configuration: str
    trainer: str
    mirror_axes: tuple[int, ...] | None
    parameters: list[dict[str, torch.Tensor]]


def read_network_folder(folder: Path, folds: tuple[str, ...]) -> NetworkFolder:
    """Read plans, dataset and the weights of some folds.

    A fold is `fold_<n>/weights.safetensors` with `checkpoint.json` (scangraph's own form) or nnU-Net's
    `fold_<n>/checkpoint_final.pth`, else `checkpoint_best.pth`.

    Raises
    ------
    InvalidModel
        If a file is missing, unreadable, tries to execute something, or names a class that is not on the list.
    """
    plans, dataset = _read_json(folder / "plans.json"), _read_json(folder / "dataset.json")
    read = [_read_fold(folder / f"fold_{fold}") for fold in folds]
    fields = read[0][0]
    for other, _ in read[1:]:
        if other != fields:
            raise InvalidModel(folder=str(folder), reason="its folds were not trained alike")
    configuration = str(fields["configuration"])
    check_plans(plans, configuration, folder)
    trainer = str(fields.get("trainer_name", "nnUNetTrainer"))
    if not _STOCK_TRAINER.match(trainer) or OVERRIDING_TRAINERS.match(trainer):
        raise InvalidModel(folder=str(folder), reason=f"its trainer {trainer!r} may build another network than the plans say")
    axes = fields.get("inference_allowed_mirroring_axes")
    mirror_axes = tuple(int(a) for a in axes) if axes else None
    return NetworkFolder(plans, dataset, configuration, trainer, mirror_axes, [weights for _, weights in read])


def check_plans(plans: dict[str, Any], configuration: str, folder: Path) -> None:
    """Refuse plans that name a class which is not on the lists; nnU-Net would import it."""

    def check(kind: str, name: Any, allowed: frozenset[str]) -> None:
        if name is not None and name not in allowed:
            raise InvalidModel(folder=str(folder), reason=f"its plans name the {kind} {name!r}, which is not allowed")

    configurations = plans.get("configurations", {})
    if configuration not in configurations:
        raise InvalidModel(folder=str(folder), reason=f"its plans have no configuration {configuration!r}")
    if "label_manager" in plans:
        check("label manager", plans["label_manager"], frozenset({"LabelManager"}))
    for settings in configurations.values():  # a configuration may inherit from any other
        architecture = settings.get("architecture", {})
        check("architecture", architecture.get("network_class_name"), ARCHITECTURES)
        check("architecture", settings.get("UNet_class_name"), _OLD_ARCHITECTURES)
        arguments = architecture.get("arch_kwargs", {})
        for name in architecture.get("_kw_requires_import", []):
            check("module", arguments.get(name), MODULES)
        for scheme in settings.get("normalization_schemes", []):
            check("normalization", scheme, NORMALIZATIONS)
        check("preprocessor", settings.get("preprocessor_name"), PREPROCESSORS)
        for key, value in settings.items():
            if key.startswith("resampling_fn") and not key.endswith("kwargs"):
                check("resampling function", value, RESAMPLERS)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InvalidModel(folder=str(path.parent), reason=f"{path.name} cannot be read ({error})") from None
    if not isinstance(content, dict):
        raise InvalidModel(folder=str(path.parent), reason=f"{path.name} is not a JSON object")
    return content


def _read_fold(fold: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return (fields, state dict) of one fold."""
    if (fold / "weights.safetensors").is_file():
        try:
            weights = load_file(fold / "weights.safetensors")
        except (SafetensorError, OSError) as error:
            raise InvalidModel(folder=str(fold), reason=f"weights.safetensors cannot be read ({error})") from None
        return _read_json(fold / "checkpoint.json"), {k: v.float() if v.is_floating_point() else v for k, v in weights.items()}
    path = next((fold / name for name in CHECKPOINTS if (fold / name).is_file()), None)
    if path is None:
        raise InvalidModel(folder=str(fold), reason=f"it has neither weights.safetensors nor {' nor '.join(CHECKPOINTS)}")
    # Scalars in nnU-Net's logging fields are numpy's; these classes hold numbers and can do nothing. numpy 1 had another name.
    scalar = np._core.multiarray.scalar  # type: ignore[attr-defined]
    allowed: list[Any] = [np.dtype, scalar, (scalar, "numpy.core.multiarray.scalar")]
    allowed += [type(np.dtype(code)) for code in ("f8", "f4", "i8", "i4", "?")]
    try:
        with torch.serialization.safe_globals(allowed):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        fields = {
            "configuration": checkpoint["init_args"]["configuration"],
            "trainer_name": checkpoint["trainer_name"],
            "inference_allowed_mirroring_axes": checkpoint.get("inference_allowed_mirroring_axes"),
        }
        return fields, _checked(checkpoint["network_weights"])
    except pickle.UnpicklingError:
        reason = f"{path.name} holds more than weights and was not executed; export it again with nnU-Net"
        raise InvalidModel(folder=str(fold), reason=reason) from None
    except (KeyError, AttributeError, TypeError, RuntimeError, OSError, EOFError, ValueError) as error:
        raise InvalidModel(folder=str(fold), reason=f"{path.name} cannot be read ({type(error).__name__})") from None


def _checked(weights: Any) -> dict[str, torch.Tensor]:
    """Refuse what is no state dict, and tensors that are more than the file has: a stride of 0 makes a terabyte of a byte."""
    for name, tensor in weights.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
            raise TypeError(name)
        if tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
            raise ValueError(name)
    return dict(weights)
