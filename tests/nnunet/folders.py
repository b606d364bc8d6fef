"""nnU-Net results folders as its trainers leave them, with tiny networks of random weights."""

from __future__ import annotations

import json
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from deployments.nnunet.weights import NetworkFolder, read_network_folder
from scangraph import totalsegmentator
from scangraph.contracts import label_table

CONV3D, NORM3D = "torch.nn.modules.conv.Conv3d", "torch.nn.modules.instancenorm.InstanceNorm3d"
ORGANS = {"background": 0, "spleen": 1, "Kidney Right": 2, "portal lymph node": 3}

_RESAMPLING = {f"resampling_fn_{what}": "resample_data_or_seg_to_shape" for what in ("data", "seg", "probabilities")} | {
    f"resampling_fn_{what}_kwargs": {"is_seg": what == "seg", "order": order, "order_z": 0, "force_separate_z": None}
    for what, order in (("data", 3), ("seg", 1), ("probabilities", 1))
}


def plans(
    dataset: str, spacing: Sequence[float], channels: int, *, old: bool = False, configuration: str = "3d_fullres", **extra: Any
) -> dict[str, Any]:
    """Return plans of a network of two stages; `old`: as nnU-Net wrote them before 2.3.1."""
    threes, strides = [[3, 3, 3]] * 2, [[1, 1, 1], [2, 2, 2]]
    if old:
        network: dict[str, Any] = {
            "UNet_class_name": "PlainConvUNet",
            "UNet_base_num_features": 4,
            "unet_max_num_features": 320,
            "n_conv_per_stage_encoder": [1, 1],
            "n_conv_per_stage_decoder": [1],
            "num_pool_per_axis": [1, 1, 1],
            "pool_op_kernel_sizes": strides,
            "conv_kernel_sizes": threes,
        }
    else:
        arguments = {
            "n_stages": 2,
            "features_per_stage": [4, 8],
            "conv_op": CONV3D,
            "kernel_sizes": threes,
            "strides": strides,
            "n_conv_per_stage": [1, 1],
            "n_conv_per_stage_decoder": [1],
            "conv_bias": True,
            "norm_op": NORM3D,
            "norm_op_kwargs": {"eps": 1e-5, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        }
        name = "dynamic_network_architectures.architectures.unet.PlainConvUNet"
        imported = ["conv_op", "norm_op", "dropout_op", "nonlin"]
        network = {"architecture": {"network_class_name": name, "arch_kwargs": arguments, "_kw_requires_import": imported}}
    intensities = {"mean": 50.0, "std": 100.0, "percentile_00_5": -500.0, "percentile_99_5": 500.0, "median": 40.0}
    return {
        "dataset_name": dataset,
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": list(spacing),
        "original_median_shape_after_transp": [32, 32, 32],
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": {
            configuration: {
                "data_identifier": f"nnUNetPlans_{configuration}",
                "preprocessor_name": "DefaultPreprocessor",
                "batch_size": 2,
                "patch_size": [16, 16, 16],
                "median_image_size_in_voxels": [32.0, 32.0, 32.0],
                "spacing": list(spacing),
                "normalization_schemes": ["CTNormalization"] * channels,
                "use_mask_for_norm": [False] * channels,
                "batch_dice": True,
                **_RESAMPLING,
                **network,
                **extra,
            }
        },
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {str(c): intensities for c in range(channels)},
    }


def results_folder(
    parent: Path,
    dataset: str = "Dataset042_Belly",
    labels: Mapping[str, Any] = ORGANS,
    *,
    order: Sequence[int] | None = None,
    channels: Sequence[str] = ("CT",),
    folds: Sequence[str] = ("0",),
    trainer: str = "nnUNetTrainer",
    configuration: str = "3d_fullres",
    spacing: Sequence[float] = (2.0, 1.5, 1.0),
    old: bool = False,
    seed: int = 0,
    **extra: Any,
) -> Path:
    """Write `<dataset>/<trainer>__nnUNetPlans__<configuration>` and return it."""
    folder = parent / dataset / f"{trainer}__nnUNetPlans__{configuration}"
    folder.mkdir(parents=True)
    described: dict[str, Any] = {
        "channel_names": {str(number): name for number, name in enumerate(channels)},
        "labels": dict(labels),
        "numTraining": 12,
        "file_ending": ".nii.gz",
    }
    if order is not None:
        described["regions_class_order"] = list(order)
    planned = plans(dataset, spacing, len(channels), old=old, configuration=configuration, **extra)
    for name, content in (("dataset", described), ("plans", planned), ("dataset_fingerprint", {"spacings": []})):
        (folder / f"{name}.json").write_text(json.dumps(content))
    for number, fold in enumerate(folds):
        (folder / f"fold_{fold}" / "validation").mkdir(parents=True)
        (folder / f"fold_{fold}" / "progress.png").write_bytes(b"\x89PNG")
        (folder / f"fold_{fold}" / "validation" / "summary.json").write_text("{}")
        torch.manual_seed(seed + number)
        weights = build(planned, described, configuration).state_dict()
        write_checkpoint(folder / f"fold_{fold}" / "checkpoint_final.pth", weights, trainer, configuration)
    return folder


def flat_folder(parent: Path) -> NetworkFolder:
    """Write and read a 2-D network."""
    arguments = plans("Dataset043_Flat", (1.0, 1.0), 1)["configurations"]["3d_fullres"]["architecture"]
    flat = {
        "conv_op": CONV3D.replace("3d", "2d"),
        "norm_op": NORM3D.replace("3d", "2d"),
        "kernel_sizes": [[3, 3]] * 2,
        "strides": [[1, 1], [2, 2]],
    }
    architecture = {**arguments, "arch_kwargs": {**arguments["arch_kwargs"], **flat}}
    folder = results_folder(
        parent, "Dataset043_Flat", configuration="2d", architecture=architecture, patch_size=[16, 16], spacing=(1.2, 1.3)
    )
    return read_network_folder(folder, ("0",))


def build(planned: Mapping[str, Any], described: Mapping[str, Any], configuration: str) -> torch.nn.Module:
    """Build a network as nnU-Net does."""
    manager = PlansManager(dict(planned))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nnU-Net's about old plans
        chosen = manager.get_configuration(configuration)
    network: torch.nn.Module = get_network_from_plans(
        chosen.network_arch_class_name,
        chosen.network_arch_init_kwargs,
        chosen.network_arch_init_kwargs_req_import,
        determine_num_input_channels(manager, chosen, dict(described)),
        manager.get_label_manager(dict(described)).num_segmentation_heads,
        deep_supervision=False,
    )
    return network


def write_checkpoint(path: Path, weights: Mapping[str, Any], trainer: str, configuration: str, **extra: Any) -> None:
    """Write what nnU-Net's trainer saves."""
    checkpoint = {
        "network_weights": dict(weights),
        "optimizer_state": {"state": {}, "param_groups": [{"lr": 0.01}]},
        "grad_scaler_state": None,
        "logging": {"mean_fg_dice": [np.float64(0.5)], "epoch_end_timestamps": [1.0]},
        "_best_ema": np.float32(0.5),
        "current_epoch": 1000,
        "init_args": {"configuration": configuration, "fold": 0},
        "trainer_name": trainer,
        "inference_allowed_mirroring_axes": None if "NoMirroring" in trainer else (0, 1, 2),
        **extra,
    }
    torch.save(checkpoint, path)


def export(folder: Path, archive: Path) -> Path:
    """Pack a results folder as `nnUNetv2_export_model_to_zip` does: paths begin with the dataset."""
    with zipfile.ZipFile(archive, "a", zipfile.ZIP_DEFLATED) as opened:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                opened.write(path, path.relative_to(folder.parents[1]).as_posix())
    return archive


#: TotalSegmentator's folders, as its downloads are called.
TOTALSEGMENTATOR = {
    291: ("Dataset291_TotalSegmentator_part1_organs_1559subj", "nnUNetTrainerNoMirroring", 1.5),
    292: ("Dataset292_TotalSegmentator_part2_vertebrae_1532subj", "nnUNetTrainerNoMirroring", 1.5),
    293: ("Dataset293_TotalSegmentator_part3_cardiac_1559subj", "nnUNetTrainerNoMirroring", 1.5),
    294: ("Dataset294_TotalSegmentator_part4_muscles_1559subj", "nnUNetTrainerNoMirroring", 1.5),
    295: ("Dataset295_TotalSegmentator_part5_ribs_1559subj", "nnUNetTrainerNoMirroring", 1.5),
    297: ("Dataset297_TotalSegmentator_total_3mm_1559subj", "nnUNetTrainer_4000epochs_NoMirroring", 3.0),
    298: ("Dataset298_TotalSegmentator_total_6mm_1559subj", "nnUNetTrainer_4000epochs_NoMirroring", 6.0),
}


def totalsegmentator_folder(parent: Path, number: int) -> Path:
    """Write one of TotalSegmentator's datasets, with its real classes."""
    name, trainer, spacing = TOTALSEGMENTATOR[number]
    names = [label_table()[n].name for n in totalsegmentator.CLASSES[number]]
    labels = {"background": 0, **{name: n for n, name in enumerate(names, start=1)}}
    return results_folder(parent, name, labels, trainer=trainer, spacing=(spacing,) * 3, old=True, seed=number)
