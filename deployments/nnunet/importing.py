"""Turn an nnU-Net results folder into scangraph's own form: weights that are only weights, each tensor once.

`python -m deployments.nnunet.importing SOURCE TARGET FOLD…` is what `scangraph models install` starts in this stage's own
environment: the command itself has no torch, and what a strange folder does to a process, it does to this one.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

with warnings.catch_warnings():
    # Importing nnU-Net before its folders are set prints and warns about training, which does not concern us.
    warnings.simplefilter("ignore")
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
    from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from deployments.nnunet.weights import NetworkFolder, read_network_folder
from scangraph.contracts.errors import InvalidModel

#: Exit status of the command when it refuses a folder; its last line is then the error's fields.
REFUSED = 3


def convert(source: Path, target: Path, folds: Sequence[str]) -> dict[str, Any]:
    """Write a network folder anew: its dataset as it is, its plans in today's form and of this network only, its weights safe.

    Parameters
    ----------
    source : Path
        With `plans.json`, `dataset.json` and `fold_<n>/`; in nnU-Net's form or in ours.
    target : Path
        An empty folder, or none.
    folds : sequence of str
        The wanted ones.

    Returns
    -------
    dict
        What the model's manifest needs: `configuration`, `trainer`, `spacing_mm` (z, y, x), `channels`.

    Raises
    ------
    InvalidModel
        If it cannot be read, names what is not allowed, needs another network's result, or if the weights are not those of the
        network that the plans describe.
    """
    read = read_network_folder(source, tuple(folds))
    try:
        described, configuration, tensors = _build(read)
    except InvalidModel:
        raise
    except Exception as error:  # nnU-Net looks at plans and labels as if they were its own
        reason = f"its plans make no network ({type(error).__name__}: {error})"
        raise InvalidModel(folder=str(source), reason=reason) from None
    if described.pop("cascade"):
        reason = f"{read.configuration} starts from the result of another network; install its 3d_fullres or 3d_lowres instead"
        raise InvalidModel(folder=str(source), reason=reason)
    fields = {
        "configuration": read.configuration,
        "trainer_name": read.trainer,
        "inference_allowed_mirroring_axes": list(read.mirror_axes) if read.mirror_axes else None,
    }
    plans = {**read.plans, "configurations": {read.configuration: configuration}}
    target.mkdir(parents=True, exist_ok=True)
    for name, content in (("plans.json", plans), ("dataset.json", read.dataset)):
        _write_json(target / name, content)
    for fold, weights in zip(folds, read.parameters, strict=True):
        folder = target / f"fold_{fold}"
        folder.mkdir()
        save_file(_each_once(weights, tensors, source), folder / "weights.safetensors")
        _write_json(folder / "checkpoint.json", fields)
    return described


def _build(read: NetworkFolder) -> tuple[dict[str, Any], dict[str, Any], list[tuple[tuple[str, ...], torch.Size]]]:
    """Build the network without memory for its weights.

    Returns
    -------
    (dict, dict, list)
        What it is; its configuration, which inherits from no other and has its architecture written out, as old plans have
        not; (names, shape) of each of its tensors.
    """
    plans = PlansManager(read.plans)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that plans are of an old form is no news here
        configuration = plans.get_configuration(read.configuration)
    channels = determine_num_input_channels(plans, configuration, read.dataset)
    with torch.device("meta"):
        network = get_network_from_plans(
            configuration.network_arch_class_name,
            configuration.network_arch_init_kwargs,
            configuration.network_arch_init_kwargs_req_import,
            channels,
            plans.get_label_manager(read.dataset).num_segmentation_heads,
            allow_init=False,
            deep_supervision=False,
        )
    names = defaultdict[int, list[str]](list)
    state = network.state_dict(keep_vars=True)
    for name, tensor in state.items():
        names[id(tensor)].append(name)
    own = configuration.spacing
    # A two-dimensional network leaves the slices where they are.
    spacing = list(map(float, (*plans.original_median_spacing_after_transp[: 3 - len(own)], *own)))
    described = {
        "configuration": read.configuration,
        "trainer": read.trainer,
        "spacing_mm": [spacing[axis] for axis in plans.transpose_backward],
        "channels": channels,
        "cascade": configuration.previous_stage_name is not None,
    }
    full = {key: value for key, value in configuration.configuration.items() if key != "inherits_from"}
    return described, full, [(tuple(group), state[group[0]].shape) for group in names.values()]


def _each_once(
    weights: Mapping[str, torch.Tensor], tensors: list[tuple[tuple[str, ...], torch.Size]], source: Path
) -> dict[str, torch.Tensor]:
    """Keep one name of each tensor: nnU-Net's modules know one by up to three."""
    kept, left = {}, set(weights)
    for names, shape in tensors:
        there = [name for name in names if name in weights]
        if not there or weights[there[0]].shape != shape:
            raise InvalidModel(
                folder=str(source), reason=f"its weights do not fit the network of its plans, first at {names[0]}"
            )
        kept[there[0]] = weights[there[0]].contiguous()
        left -= set(there)
    if left:
        reason = f"its weights have more than the network of its plans, first {min(left)}"
        raise InvalidModel(folder=str(source), reason=reason)
    return kept


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")


def main() -> None:
    """Convert a folder; say on the last line what it is, or why not."""
    source, target, *folds = sys.argv[1:]
    try:
        print(json.dumps(convert(Path(source), Path(target), folds)))
    except InvalidModel as error:
        print(json.dumps(error.fields))
        raise SystemExit(REFUSED) from None


if __name__ == "__main__":
    main()
