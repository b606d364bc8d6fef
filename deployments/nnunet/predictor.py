"""One nnU-Net network, ready to predict: the seam behind which the inference engine is exchanged.

What the rest of the stage sees is `Network(folder, …).predict(channels, spacing_mm, on_tile) -> labels`. Behind it stands,
for now, nnU-Net's own predictor (Isensee et al., Nature Methods 2021), its network built from the plans and its tile loop
replaced, so that tiles are counted, a cancelled request stops, and running out of memory is an error, not a silent retry.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

with warnings.catch_warnings():
    # Importing nnU-Net before its folders are set prints and warns about training, which does not concern us.
    warnings.simplefilter("ignore")
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
    from nnunetv2.inference.sliding_window_prediction import compute_gaussian
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
    from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from deployments.nnunet.weights import NetworkFolder
from scangraph.contracts.errors import InvalidModel

#: Called after every tile as `on_tile(done, total)`; what it raises stops the prediction.
OnTile = Callable[[int, int], None]


class _TiledPredictor(nnUNetPredictor):  # type: ignore[misc]
    """nnU-Net's predictor with a tile loop that can be watched and stopped."""

    on_tile: OnTile

    @torch.inference_mode()
    def _internal_predict_sliding_window_return_logits(
        self, data: torch.Tensor, slicers: Sequence[Any], do_on_device: bool = True
    ) -> torch.Tensor:
        device = self.device if do_on_device else torch.device("cpu")
        data = data.to(device)
        logits = torch.zeros((self.label_manager.num_segmentation_heads, *data.shape[1:]), dtype=torch.half, device=device)
        weight = torch.zeros(data.shape[1:], dtype=torch.half, device=device)
        gaussian = compute_gaussian(
            tuple(self.configuration_manager.patch_size), sigma_scale=1.0 / 8, value_scaling_factor=10, device=device
        )
        for done, tile in enumerate(slicers):
            self.on_tile(done, len(slicers))
            patch = data[tile][None].contiguous().to(self.device)
            logits[tile] += self._internal_maybe_mirror_and_predict(patch)[0].to(device) * gaussian
            weight[tile[1:]] += gaussian
        self.on_tile(len(slicers), len(slicers))
        logits /= weight
        return logits


def complete_state(network: torch.nn.Module, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Give every name of a network's state its tensor; nnU-Net's modules know one tensor by up to three names, files by one.

    Raises
    ------
    InvalidModel
        If the weights are not this network's.
    """
    state = network.state_dict()
    shared = {state[name].data_ptr(): tensor for name, tensor in weights.items() if name in state}
    complete = {name: weights.get(name, shared.get(tensor.data_ptr())) for name, tensor in state.items()}
    wrong = [name for name, tensor in complete.items() if tensor is None or tensor.shape != state[name].shape]
    wrong += [name for name in weights if name not in state]
    if wrong:
        raise InvalidModel(folder="weights", reason=f"they do not fit the network of the plans, first at {wrong[0]}")
    return {name: tensor for name, tensor in complete.items() if tensor is not None}


class Network:
    """A loaded network.

    Parameters
    ----------
    folder : NetworkFolder
        Checked plans and weights.
    device : torch.device
        Where it computes.
    mirroring : bool
        Average over mirrored copies along the axes that training mirrored: slower by 2 to the number of axes.
    """

    def __init__(self, folder: NetworkFolder, device: torch.device, *, mirroring: bool) -> None:
        plans = PlansManager(folder.plans)
        configuration = plans.get_configuration(folder.configuration)
        network = get_network_from_plans(
            configuration.network_arch_class_name,
            configuration.network_arch_init_kwargs,
            configuration.network_arch_init_kwargs_req_import,
            determine_num_input_channels(plans, configuration, folder.dataset),
            plans.get_label_manager(folder.dataset).num_segmentation_heads,
            allow_init=False,
            deep_supervision=False,
        )
        parameters = [complete_state(network, weights) for weights in folder.parameters]
        network.load_state_dict(parameters[0])
        predictor = _TiledPredictor(
            use_gaussian=True,
            use_mirroring=mirroring and folder.mirror_axes is not None,
            perform_everything_on_device=device.type == "cuda",
            device=device,
            allow_tqdm=False,
        )
        predictor.manual_initialization(
            network, plans, configuration, parameters, folder.dataset, folder.trainer, folder.mirror_axes
        )
        self._predictor = predictor
        self.channels = len(folder.dataset.get("channel_names", folder.dataset.get("modality", {})))
        self.patch = tuple(configuration.patch_size)

    def predict(
        self, channels: Sequence[NDArray[Any]], spacing_mm: Sequence[float], on_tile: OnTile, step_size: float = 0.5
    ) -> NDArray[np.unsignedinteger[Any]]:
        """Segment an image.

        Parameters
        ----------
        channels : sequence of ndarray, shape (z, y, x)
            One per input channel, on one grid.
        spacing_mm : (z, y, x)
            Of that grid; the network works at its own and the labels come back on this one.
        on_tile : callable
            Called before every tile; may raise to stop.
        step_size : float
            Distance of neighbouring tiles as a part of their size.

        Returns
        -------
        ndarray of unsigned integers, shape (z, y, x)
            Labels in the network's own numbering.
        """
        self._predictor.on_tile = on_tile
        self._predictor.tile_step_size = step_size
        image = np.stack([np.asarray(channel, dtype=np.float32) for channel in channels])
        labels: NDArray[np.unsignedinteger[Any]] = self._predictor.predict_single_npy_array(
            image, {"spacing": list(spacing_mm)}
        )
        return labels.astype(np.uint16 if labels.max(initial=0) > 255 else np.uint8, copy=False)
