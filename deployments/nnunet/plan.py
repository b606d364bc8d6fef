"""What nnU-Net's plans say, as numbers: the only reader of `plans.json` besides `weights.py`, which checks it first."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

with warnings.catch_warnings():
    # Importing nnU-Net before its folders are set prints and warns about training, which does not concern us.
    warnings.simplefilter("ignore")
    from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape, determine_do_sep_z_and_axis
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
    from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from deployments.nnunet.resampling import Rule
from deployments.nnunet.weights import NetworkFolder
from scangraph.contracts.errors import InvalidModel

_SPLINES = "resample_data_or_seg_to_shape"
_TORCH = frozenset({"resample_torch_fornnunet", "resample_torch_simple"})


@dataclass(frozen=True)
class Resampler:
    """A resampling function of the plans, with its arguments."""

    name: str
    order: int
    order_z: int
    force_separate_z: bool | None
    anisotropy: float

    def rule(self, spacing_mm: Sequence[float], new_spacing_mm: Sequence[float]) -> Rule:
        """Return how it goes from one spacing to another."""
        separate, axis = determine_do_sep_z_and_axis(
            self.force_separate_z, np.array(spacing_mm), np.array(new_spacing_mm), self.anisotropy
        )
        return Rule(self.order, int(axis) if separate else None, self.order_z)


@dataclass(frozen=True)
class Normalization:
    """How a channel's values are normalised: nnU-Net's scheme, and for CT its constants.

    Parameters
    ----------
    scheme : str
        nnU-Net's class name.
    lower, upper, mean, std : float
        Of the training set's foreground (CTNormalization).
    inside_only : bool
        Whether only voxels inside the non-zero region are normalised (ZScoreNormalization).
    """

    scheme: str
    lower: float = 0
    upper: float = 0
    mean: float = 0
    std: float = 1
    inside_only: bool = False


@dataclass(frozen=True)
class Plan:
    """One configuration of a model.

    Parameters
    ----------
    patch : (z, y, x)
        Of the network's input, in its axes; a 2-D network's has one slice.
    flat : bool
        Whether the network is 2-D.
    spacing_mm : tuple of float or None
        Of the network's grid, in its axes; None where a 2-D network takes the image's own (its first axis).
    transpose_forward : tuple of int
        From the image's axes to the network's.
    normalizations : tuple of Normalization
        One per channel.
    image_resampler, logit_resampler : Resampler
        To the network's grid, and back.
    numbers : tuple of int
        Label of each class; with regions, 0 and then each region's in the order in which they are painted.
    regions : bool
        Whether channels are regions.
    classes : int
        Of the network's output.
    """

    patch: tuple[int, int, int]
    flat: bool
    spacing_mm: tuple[float | None, float, float]
    transpose_forward: tuple[int, int, int]
    normalizations: tuple[Normalization, ...]
    image_resampler: Resampler
    logit_resampler: Resampler
    numbers: tuple[int, ...]
    regions: bool
    classes: int

    @property
    def channels(self) -> int:
        """How many images it takes."""
        return len(self.normalizations)

    def grid(self, shape: Sequence[int], spacing_mm: Sequence[float]) -> tuple[tuple[int, int, int], tuple[float, ...]]:
        """Return (shape, spacing) of the network's grid for an image of that shape and spacing, all in the network's axes."""
        wanted = tuple(
            float(own if target is None else target) for target, own in zip(self.spacing_mm, spacing_mm, strict=True)
        )
        z, y, x = (int(n) for n in compute_new_shape(shape, spacing_mm, wanted))
        return (z, y, x), wanted


def read_plan(folder: NetworkFolder) -> Plan:
    """Read a checked folder's plans.

    Raises
    ------
    InvalidModel
        If it needs what this engine does not have: an earlier stage's result (cascade), or an unusual resampling.
    """
    plans = PlansManager(folder.plans)
    configuration = plans.get_configuration(folder.configuration)
    if configuration.previous_stage_name is not None:
        stage = configuration.previous_stage_name
        raise InvalidModel(folder=folder.configuration, reason=f"it is the second stage of a cascade and needs {stage!r} first")
    labels = plans.get_label_manager(folder.dataset)
    patch = tuple(int(n) for n in configuration.patch_size)
    flat = len(patch) == 2
    spacing = tuple(float(s) for s in configuration.spacing)
    normalizations = []
    for channel, scheme in enumerate(configuration.normalization_schemes):
        found = plans.foreground_intensity_properties_per_channel.get(str(channel), {})
        normalizations.append(
            Normalization(
                scheme,
                float(found.get("percentile_00_5", 0)),
                float(found.get("percentile_99_5", 0)),
                float(found.get("mean", 0)),
                float(found.get("std", 1)),
                bool(configuration.use_mask_for_norm[channel]) and scheme == "ZScoreNormalization",
            )
        )
    numbers = [0, *labels.regions_class_order] if labels.has_regions else list(labels.all_labels)
    settings = configuration.configuration
    return Plan(
        patch=(1, patch[0], patch[1]) if flat else (patch[0], patch[1], patch[2]),
        flat=flat,
        spacing_mm=(None, spacing[-2], spacing[-1]) if len(spacing) == 2 else (spacing[0], spacing[1], spacing[2]),
        transpose_forward=tuple(plans.transpose_forward),
        normalizations=tuple(normalizations),
        image_resampler=_resampler(settings, "resampling_fn_data", (0, 1, 2, 3, 4, 5)),
        logit_resampler=_resampler(settings, "resampling_fn_probabilities", (0, 1)),
        numbers=tuple(int(n) for n in numbers),
        regions=bool(labels.has_regions),
        classes=int(labels.num_segmentation_heads),
    )


def _resampler(settings: dict[str, Any], key: str, orders: Sequence[int]) -> Resampler:
    name, arguments = settings[key], settings.get(f"{key}_kwargs", {})
    if name == _SPLINES:
        order, order_z = int(arguments.get("order", 3)), int(arguments.get("order_z", 0))
        forced = arguments.get("force_separate_z", False)
    elif name in _TORCH and arguments.get("mode", "linear") == "linear":
        # Trilinear, with voxels aligned at their edges and going on outside: splines of order 1.
        order, order_z, forced = 1, 0, arguments.get("force_separate_z") if name == "resample_torch_fornnunet" else False
    else:
        raise InvalidModel(folder="plans.json", reason=f"{key} is {name!r} with {arguments}, which is not supported")
    if order not in orders or order_z not in orders:
        raise InvalidModel(folder="plans.json", reason=f"{key} has the order {order} ({order_z}); known are {orders}")
    return Resampler(name, order, order_z, forced, float(arguments.get("separate_z_anisotropy_threshold", 3)))


def build_network(folder: NetworkFolder) -> torch.nn.Module:
    """Build the network that the plans describe, without weights."""
    plans = PlansManager(folder.plans)
    configuration = plans.get_configuration(folder.configuration)
    network: torch.nn.Module = get_network_from_plans(
        configuration.network_arch_class_name,
        configuration.network_arch_init_kwargs,
        configuration.network_arch_init_kwargs_req_import,
        determine_num_input_channels(plans, configuration, folder.dataset),
        plans.get_label_manager(folder.dataset).num_segmentation_heads,
        allow_init=False,
        deep_supervision=False,
    )
    return network.eval()


def normalize_whole(image: NDArray[np.float32], scheme: Normalization) -> NDArray[np.float32]:
    """Normalise an image that needs to be seen whole first, in place.

    Parameters
    ----------
    image : ndarray of float32
        A channel, or the part of it that is not zero.
    scheme : Normalization
        How.
    """
    if scheme.scheme == "ZScoreNormalization":
        image -= image.mean()
        image /= max(float(image.std()), 1e-8)
    elif scheme.scheme == "RescaleTo01Normalization":
        image -= image.min()
        image /= max(float(image.max()), 1e-8)
    elif scheme.scheme == "RGBTo01Normalization":
        image /= 255
    return image
