"""One task through nnU-Net's own fingerprint, planner, preprocessor and trainer, made small enough for a CPU."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from nnunetv2.experiment_planning.plan_and_preprocess_api import (
    extract_fingerprint_dataset,
    plan_experiment_dataset,
    preprocess_dataset,
)
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from nnunetv2.training.nnUNetTrainer.variants.data_augmentation.nnUNetTrainerNoMirroring import nnUNetTrainerNoMirroring
from torch import nn

from models.training.tasks import Task

PLANS = "nnUNetPlans"
#: Name of the small configuration in the plans.
CONFIGURATION = "3d_demo"
STEPS_PER_EPOCH = 50


class DemoTrainer(nnUNetTrainerNoMirroring):  # type: ignore[misc]
    """nnU-Net's trainer without mirroring (left and right kidney differ), whose CPU passes run in bfloat16.

    The architecture, loss and augmentation are nnU-Net's; a step takes a third of the time with AMX.
    """

    optimizer_name: Literal["sgd", "adamw"] = "sgd"

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, PolyLRScheduler]:
        """Return nnU-Net's SGD, or the AdamW of its `nnUNetTrainerAdam`, with its polynomial schedule."""
        if self.optimizer_name == "sgd":
            return cast("tuple[torch.optim.Optimizer, PolyLRScheduler]", super().configure_optimizers())
        self.initial_lr = 5e-3
        optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=self.initial_lr, weight_decay=self.weight_decay, amsgrad=True
        )
        return optimizer, PolyLRScheduler(optimizer, self.initial_lr, self.num_epochs)

    def initialize(self) -> None:
        """Build the network, then let its forward pass run in bfloat16 and hand float32 to the loss."""
        super().initialize()
        if self.device.type == "cpu":
            self.network.forward = _in_bfloat16(self.network.forward)


def _in_bfloat16(forward: Callable[[torch.Tensor], Any]) -> Callable[[torch.Tensor], Any]:
    def wrapped(data: torch.Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            output = forward(data)
        return [o.float() for o in output] if isinstance(output, (list, tuple)) else output.float()

    return wrapped


def prepare(task: Task, processes: int) -> dict[str, Any]:
    """Fingerprint, plan and preprocess the raw dataset of a task; returns its plans with the small configuration only."""
    _augmentation_processes(1)  # the planner hands this to torch.set_num_threads, which refuses the 0 that training wants
    extract_fingerprint_dataset(task.number, num_processes=processes, show_progress_bar=False, verbose=False)
    plans, _ = plan_experiment_dataset(task.number, overwrite_target_spacing=task.spacing_mm)
    plans["configurations"] = {CONFIGURATION: _small(plans["configurations"]["3d_fullres"], task)}
    folder = _preprocessed(task)
    (folder / f"{PLANS}.json").write_text(json.dumps(plans, indent=1, default=_plain))
    preprocess_dataset(task.number, PLANS, (CONFIGURATION,), (processes,), show_progress_bar=False)
    loaded: dict[str, Any] = json.loads((folder / f"{PLANS}.json").read_text())
    return loaded


def _augmentation_processes(count: int) -> None:
    os.environ["nnUNet_n_proc_DA"] = str(count)  # noqa: SIM112 nnU-Net's spelling


def _preprocessed(task: Task) -> Path:
    return Path(os.environ["nnUNet_preprocessed"]) / task.dataset  # noqa: SIM112 nnU-Net's spelling


def _small(planned: dict[str, Any], task: Task) -> dict[str, Any]:
    """Shrink the planner's full-resolution configuration to a task's patch and features; everything else stays as planned."""
    stages = len(task.features)
    architecture = planned["architecture"]
    arch_kwargs = {
        **architecture["arch_kwargs"],
        "n_stages": stages,
        "features_per_stage": list(task.features),
        "kernel_sizes": [[3, 3, 3]] * stages,
        "strides": [[1, 1, 1]] + [[2, 2, 2]] * (stages - 1),
        "n_conv_per_stage": [2] * stages,
        "n_conv_per_stage_decoder": [2] * (stages - 1),
    }
    return {
        **planned,
        "data_identifier": f"{PLANS}_{CONFIGURATION}",
        "batch_size": 2,
        "patch_size": list(task.patch),
        # Many patches hold none of a thin or small structure; Dice over the batch keeps their gradient meaningful.
        "batch_dice": True,
        "architecture": {**architecture, "arch_kwargs": arch_kwargs},
    }


def _plain(value: Any) -> Any:
    """Turn numpy's arrays and scalars, which the planner leaves in its plans, into JSON."""
    return value.tolist()


def train(task: Task, plans: dict[str, Any], device: str, iterations: int) -> DemoTrainer:
    """Train fold 0 and return the trainer with its final weights."""
    _augmentation_processes(0)  # augment in this process: the other core trains another task
    dataset = json.loads((_preprocessed(task) / "dataset.json").read_text())
    torch.manual_seed(task.number)
    # nnU-Net's augmentation draws from numpy's global state.
    np.random.seed(task.number)  # noqa: NPY002
    trainer = DemoTrainer({**plans, "continue_training": False}, CONFIGURATION, 0, dataset, torch.device(device))
    trainer.optimizer_name = task.optimizer
    trainer.num_iterations_per_epoch = min(STEPS_PER_EPOCH, iterations)
    trainer.num_val_iterations_per_epoch = 4
    trainer.num_epochs = max(1, iterations // STEPS_PER_EPOCH)
    trainer.disable_checkpointing = True  # the final weights are exported from memory
    trainer.initialize()
    trainer.run_training()
    return trainer


def progress_table(trainer: DemoTrainer) -> str:
    """Training log: one line an epoch with learning rate, losses, pseudo-Dice of every label and seconds."""
    get = trainer.logger.get_value
    lines = ["epoch  lr       train_loss  val_loss  seconds  pseudo_dice"]
    for epoch in range(trainer.num_epochs):
        seconds = get("epoch_end_timestamps", step=epoch) - get("epoch_start_timestamps", step=epoch)
        dice = " ".join(f"{float(d):.3f}" for d in get("dice_per_class_or_region", step=epoch))
        rate, loss, check = (float(get(key, step=epoch)) for key in ("lrs", "train_losses", "val_losses"))
        lines.append(f"{epoch + 1:5d}  {rate:.5f}  {loss:10.4f}  {check:8.4f}  {seconds:7.1f}  {dice}")
    return "\n".join(lines) + "\n"


def network_of(trainer: DemoTrainer) -> nn.Module:
    """Return the bare network, without what `torch.compile` puts around it on a GPU."""
    return cast("nn.Module", getattr(trainer.network, "_orig_mod", trainer.network))
