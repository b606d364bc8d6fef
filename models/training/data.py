"""Phantoms on disk, as nnU-Net wants its raw data. The files of a phantom are shared by all tasks."""

# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

import json
import os
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import SimpleITK as sitk

from models.training.tasks import Task
from scangraph import phantoms
from scangraph.contracts import Volume, label_table

#: Cases that only watch the training for over-fitting (nnU-Net's validation set of fold 0).
HELD_OUT = 4


def write_phantoms(folder: Path, seeds: Iterable[int], processes: int) -> None:
    """Write the phases and masks of every seed that is not there yet, as `<seed>_<phase or task>.nii.gz`."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = [seed for seed in seeds if not (folder / f"{seed}.done").exists()]
    with ProcessPoolExecutor(processes) as pool:
        for _ in pool.map(partial(_write_phantom, folder), missing):
            pass


def _write_phantom(folder: Path, seed: int) -> None:
    phantom = phantoms.make_phantom(seed)
    for name, volume in {**phantom.volumes, **phantom.truth}.items():
        sitk.WriteImage(_to_sitk(volume), str(folder / f"{seed}_{name}.nii.gz"))
    (folder / f"{seed}.done").touch()  # last: an interrupted run writes the phantom again


def _to_sitk(volume: Volume) -> sitk.Image:
    image = sitk.GetImageFromArray(volume.array)
    image.SetSpacing(volume.spacing_mm[::-1])
    image.SetOrigin(volume.origin_mm)
    image.SetDirection([cosine for row in volume.direction for cosine in row])
    return image


def write_dataset(raw: Path, phantom_folder: Path, task: Task, seeds: list[int]) -> None:
    """Write the nnU-Net raw dataset of a task: masks in the network's own numbering, images by reference."""
    folder = raw / task.dataset
    (folder / "labelsTr").mkdir(parents=True, exist_ok=True)
    cases = {}
    for seed in seeds:
        mask = sitk.ReadImage(str(phantom_folder / f"{seed}_{task.truth}.nii.gz"))
        mask = sitk.ChangeLabel(mask, {float(number): float(i) for i, number in enumerate(task.labels, start=1)})
        label = folder / "labelsTr" / f"case_{seed}.nii.gz"
        sitk.WriteImage(mask, str(label))
        images = [phantom_folder / f"{seed}_{phase}.nii.gz" for phase in task.images(seed)]
        cases[f"case_{seed}"] = {
            "images": [os.path.relpath(i, folder) for i in images],
            "label": os.path.relpath(label, folder),
        }
    description = dataset_description(task, len(seeds))
    (folder / "dataset.json").write_text(json.dumps({**description, "dataset": cases}, indent=1))
    names = sorted(cases)
    split = [{"train": names[:-HELD_OUT], "val": names[-HELD_OUT:]}]
    (folder / "splits_final.json").write_text(json.dumps(split, indent=1))


def dataset_description(task: Task, cases: int) -> dict[str, object]:
    """Return the parts of nnU-Net's dataset.json that a model needs; every channel is "CT", which chooses CT normalisation."""
    names = [label_table()[number].name for number in task.labels]
    return {
        "channel_names": {str(i): "CT" for i in range(len(task.channels))},
        "labels": {"background": 0, **{name: i for i, name in enumerate(names, start=1)}},
        "numTraining": cases,
        "file_ending": ".nii.gz",
    }
