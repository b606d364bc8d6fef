"""A trained network as a model folder, and what that folder scores on phantoms it has not seen."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from numpy.typing import NDArray
from safetensors.torch import load_model, save_model
from torch import nn

from models.training.data import dataset_description
from models.training.fit import CONFIGURATION
from models.training.tasks import Task
from scangraph import phantoms
from scangraph.contracts import label_table, lookup_table

TRAINING_DATA = (
    "Synthetic phantoms made by scangraph.phantoms, seeds {first} to {last}; no patient data. For demonstration and tests, "
    "not clinically valid."
)


def write_network(folder: Path, task: Task, plans: dict[str, Any], network: nn.Module, cases: int) -> None:
    """Write plans, dataset description and fold 0 of a network, its weights as float16."""
    (folder / "fold_0").mkdir(parents=True, exist_ok=True)
    _write_json(folder / "plans.json", {key: value for key, value in plans.items() if key != "continue_training"})
    _write_json(folder / "dataset.json", dataset_description(task, cases))
    checkpoint = {
        "configuration": CONFIGURATION,
        "inference_allowed_mirroring_axes": None,
        # The stock trainer with the same architecture, not this project's subclass: any nnU-Net can look it up.
        "trainer_name": "nnUNetTrainerNoMirroring",
    }
    _write_json(folder / "fold_0" / "checkpoint.json", checkpoint)
    # float16 halves the files; save_model writes tensors that nnU-Net's U-Net holds under two names only once.
    save_model(copy.deepcopy(network).cpu().half(), str(folder / "fold_0" / "weights.safetensors"))


def load_network(folder: Path) -> nnUNetPredictor:
    """Build nnU-Net's own predictor from a written network, without mirroring, at its default tile step."""
    plans = json.loads((folder / "plans.json").read_text())
    dataset = json.loads((folder / "dataset.json").read_text())
    manager = PlansManager(plans)
    configuration = manager.get_configuration(CONFIGURATION)
    network = get_network_from_plans(
        configuration.network_arch_class_name,
        configuration.network_arch_init_kwargs,
        configuration.network_arch_init_kwargs_req_import,
        len(dataset["channel_names"]),
        manager.get_label_manager(dataset).num_segmentation_heads,
        allow_init=False,
        deep_supervision=False,
    )
    load_model(network, folder / "fold_0" / "weights.safetensors")
    predictor = nnUNetPredictor(use_mirroring=False, device=torch.device("cpu"), verbose=False, allow_tqdm=False)
    weights = copy.deepcopy(network.state_dict())
    predictor.manual_initialization(network, manager, configuration, [weights], dataset, "nnUNetTrainerNoMirroring", None)
    return predictor


def evaluate(folder: Path, task: Task, seeds: Iterable[int]) -> list[dict[int, float]]:
    """Dice of every label-table number on the phantom of each seed, on that phantom's own grid.

    A label that neither truth nor prediction has is left out; one that only the prediction has counts as 0.
    """
    predictor = load_network(folder)
    to_table = lookup_table(dict(enumerate(task.labels, start=1)), len(task.labels) + 1)
    scores = []
    for seed in seeds:
        phantom = phantoms.make_phantom(seed)
        images = [phantom.volumes[phase] for phase in task.images(seed)]
        stack = np.stack([image.array for image in images]).astype(np.float32)
        predicted = predictor.predict_single_npy_array(stack, images[0].to_nnunet_props())
        scores.append(dice(to_table[predicted], phantom.truth[task.truth].array, task.labels))
    return scores


def dice(predicted: NDArray[np.uint8], truth: NDArray[np.uint8], labels: Iterable[int]) -> dict[int, float]:
    """Dice overlap of two masks (z, y, x) for each label that at least one of them has."""
    scores = {}
    for label in labels:
        a, b = predicted == label, truth == label
        size = int(a.sum()) + int(b.sum())
        if size:
            scores[label] = 2 * int((a & b).sum()) / size
    return scores


def write_manifest(folder: Path, name: str, task: Task, training_seeds: list[int], scores: dict[int, dict[int, float]]) -> None:
    """Write `model.yaml`: what the model is, what it may be used for, and the checksums of its files."""
    by_label = {n: [s[n] for s in scores.values() if n in s] for n in task.labels}
    names = {n: label_table()[n].name for n in task.labels}
    manifest = {
        "id": f"{name}-demo",
        "version": "1.0.0",
        "title": task.title,
        "task": task.component,
        "demo": True,
        "research_use_only": True,
        "inputs": [{"name": c.name, "modality": "CT", "phase": c.phase} for c in task.channels],
        "networks": [{"folder": "nnunet", "folds": ["0"], "labels": dict(enumerate(task.labels, start=1))}],
        "spacing_mm": list(task.spacing_mm),
        "mirroring": False,
        **({} if task.roi is None else {"roi": task.roi}),
        "license": "Apache-2.0",
        "training_data": TRAINING_DATA.format(first=training_seeds[0], last=training_seeds[-1]),
        "metrics": {
            "cases": len(scores),
            "seeds": list(scores),
            "dice_mean": {names[n]: round(float(np.mean(v)), 4) for n, v in by_label.items() if v},
            "dice_min": {names[n]: round(float(np.min(v)), 4) for n, v in by_label.items() if v},
        },
        "files": {
            path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name != "model.yaml"
        },
    }
    (folder / "model.yaml").write_text(yaml.safe_dump(manifest, sort_keys=False, width=120))


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")
