"""Networks and images of the sizes that hospitals have, made of random numbers."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage

from deployments.nnunet.plan import build_network
from deployments.nnunet.weights import NetworkFolder

_RESAMPLING: dict[str, Any] = {
    f"resampling_fn_{what}": "resample_data_or_seg_to_shape" for what in ("data", "seg", "probabilities")
} | {
    f"resampling_fn_{what}_kwargs": {"is_seg": what == "seg", "order": order, "order_z": 0, "force_separate_z": None}
    for what, order in (("data", 3), ("seg", 1), ("probabilities", 1))
}


def real_size(classes: int, patch: Sequence[int] = (128, 128, 128), spacing_mm: float = 1.5) -> NetworkFolder:
    """Return a network of the size that nnU-Net plans for CT: six stages of 32 to 320 features, 31 million parameters."""
    stages = 6
    arguments = {
        "n_stages": stages,
        "features_per_stage": [32, 64, 128, 256, 320, 320],
        "conv_op": "torch.nn.modules.conv.Conv3d",
        "kernel_sizes": [[3, 3, 3]] * stages,
        "strides": [[1, 1, 1], *[[2, 2, 2]] * (stages - 1)],
        "n_conv_per_stage": [2] * stages,
        "n_conv_per_stage_decoder": [2] * (stages - 1),
        "conv_bias": True,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }
    configuration = {
        "data_identifier": "nnUNetPlans_3d_fullres",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": list(patch),
        "median_image_size_in_voxels": [300.0] * 3,
        "spacing": [spacing_mm] * 3,
        "normalization_schemes": ["CTNormalization"],
        "use_mask_for_norm": [False],
        "batch_dice": True,
        "architecture": {
            "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
            "arch_kwargs": arguments,
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        },
        **_RESAMPLING,
    }
    plans = {
        "dataset_name": "Dataset999_Bench",
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": [spacing_mm] * 3,
        "original_median_shape_after_transp": [300] * 3,
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": {"3d_fullres": configuration},
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {
            "0": {"mean": 0.0, "std": 300.0, "percentile_00_5": -1000.0, "percentile_99_5": 1000.0, "median": 0.0}
        },
    }
    dataset = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, **{f"structure {n}": n for n in range(1, classes)}},
        "numTraining": 1,
        "file_ending": ".nii.gz",
    }
    folder = NetworkFolder(plans, dataset, "3d_fullres", "nnUNetTrainer", (0, 1, 2), [])
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = build_network(folder)
    return NetworkFolder(**{**vars(folder), "parameters": [dict(network.state_dict())]})


def image(shape: Sequence[int]) -> NDArray[np.int16]:
    """Return something smooth in Hounsfield units."""
    coarse = np.random.default_rng(1).normal(0, 600, [-(-n // 12) for n in shape]).astype(np.float32)
    result = np.empty(shape, np.int16)
    fine = ndimage.zoom(
        coarse, [n / c for n, c in zip(shape, coarse.shape, strict=True)], order=1, grid_mode=True, mode="nearest"
    )
    np.clip(fine, -1000, 1500, out=fine)
    result[...] = fine
    return result
