"""Model folders: what a model says about itself, and where it is found.

A model is a folder with `model.yaml`; swapping the folder is all it takes to update a model. Nothing here loads weights.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pydantic
import yaml
from pydantic import BaseModel, ConfigDict, Field

from scangraph.contracts.components import Phase
from scangraph.contracts.errors import InvalidModel, ModelNotFound
from scangraph.contracts.labels import label_table

MANIFEST = "model.yaml"
DEMO_WARNING = (
    "{id} holds demonstration weights, trained on synthetic phantoms only: on a real patient its result means nothing. "
    "Install real weights with `scangraph models install FOLDER --task {task}` (nnU-Net results folders, TotalSegmentator's)."
)


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelInput(_Part):
    """One input channel: the component's port it comes from, and what the network was trained on."""

    name: str
    modality: str = "CT"
    phase: Phase = "any"


class ModelNetwork(_Part):
    """One nnU-Net results folder; a model may be several whose labels are merged (TotalSegmentator's `total` is five)."""

    folder: str
    folds: tuple[str, ...] = ("0",)
    labels: dict[int, int]


class ModelManifest(_Part):
    """`model.yaml`."""

    id: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    version: str
    title: str
    task: str
    demo: bool = False
    research_use_only: Literal[True] = True
    inputs: tuple[ModelInput, ...] = Field(min_length=1)
    networks: tuple[ModelNetwork, ...] = Field(min_length=1)
    spacing_mm: tuple[float, float, float]
    #: Where the index axes x, y, z led in training; nnU-Net's `…WithReorient` readers give RAS.
    orientation: str = Field("LPS", pattern="^[LRPASI]{3}$")
    mirroring: bool = False
    files: dict[str, str]
    license: str
    training_data: str
    metrics: dict[str, Any] = Field(default_factory=dict)

    @property
    def labels(self) -> tuple[int, ...]:
        """Numbers of the label table that the model can give."""
        return tuple(sorted({number for network in self.networks for number in network.labels.values()} - {0}))


class Model(_Part):
    """A manifest and the folder it stands in."""

    folder: Path
    manifest: ModelManifest
    #: SHA-256 of model.yaml, which holds those of all other files: it names exactly one set of weights.
    digest: str

    @property
    def warnings(self) -> tuple[str, ...]:
        """What must be said with every result."""
        return (DEMO_WARNING.format(id=self.manifest.id, task=self.manifest.task),) if self.manifest.demo else ()

    def describe(self) -> dict[str, Any]:
        """What an answer says about the model that made it."""
        manifest = self.manifest
        return {"id": manifest.id, "version": manifest.version, "demo": manifest.demo, "sha256": self.digest}


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_model(folder: Path) -> Model:
    """Read and check a manifest, without reading the weights.

    Raises
    ------
    InvalidModel
        If it is missing, not valid, names labels the table lacks, or files outside its folder.
    """
    try:
        text = (folder / MANIFEST).read_bytes()
        manifest = ModelManifest.model_validate(yaml.safe_load(text))
    except OSError as error:
        raise InvalidModel(folder=str(folder), reason=f"{MANIFEST} cannot be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise InvalidModel(folder=str(folder), reason=f"{MANIFEST} is not YAML: {error}") from None
    except pydantic.ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise InvalidModel(folder=str(folder), reason=f"{MANIFEST}: {faults}") from None
    if unknown := set(manifest.labels) - label_table().keys():
        raise InvalidModel(folder=str(folder), reason=f"it maps to labels that are not in the table: {sorted(unknown)}")
    names = [*manifest.files, *(network.folder for network in manifest.networks)]
    outside = [name for name in names if not (folder / name).resolve().is_relative_to(folder.resolve())]
    if outside:
        raise InvalidModel(folder=str(folder), reason=f"these paths lead outside the folder: {outside}")
    return Model(folder=folder, manifest=manifest, digest=hashlib.sha256(text).hexdigest())


def verify_files(model: Model) -> None:
    """Compare every file with its SHA-256, and refuse files that a network folder has but the manifest does not name.

    Raises
    ------
    InvalidModel
        Naming the first file that is missing, changed or unlisted.
    """

    def refuse(reason: str) -> None:
        raise InvalidModel(folder=str(model.folder), reason=reason)

    for name, expected in model.manifest.files.items():
        path = model.folder / name
        if not path.is_file():
            refuse(f"{name} is missing")
        if sha256_of(path) != expected.lower():
            refuse(f"{name} is not the file the manifest names (SHA-256 differs)")
    for network in model.manifest.networks:
        for path in (model.folder / network.folder).rglob("*"):
            if path.is_file() and path.relative_to(model.folder).as_posix() not in model.manifest.files:
                refuse(f"{path.relative_to(model.folder)} is not named in the manifest")


def installed_models(folders: Sequence[Path]) -> list[Model]:
    """List the valid models of several folders, those of earlier folders first.

    Invalid folders are left out here and named by `invalid_models`, so that one bad folder does not stop the others.
    """
    return [model for model in _scan(folders) if isinstance(model, Model)]


def invalid_models(folders: Sequence[Path]) -> list[InvalidModel]:
    """List what is wrong with the folders that hold a manifest but are no valid model."""
    return [error for error in _scan(folders) if isinstance(error, InvalidModel)]


def _scan(folders: Sequence[Path]) -> list[Model | InvalidModel]:
    found: list[Model | InvalidModel] = []
    for parent in folders:
        for manifest in sorted(parent.glob(f"*/{MANIFEST}")):
            try:
                found.append(read_model(manifest.parent))
            except InvalidModel as error:
                found.append(error)
    return found


def choose_model(folders: Sequence[Path], task: str, model_id: str | None = None) -> Model:
    """Return the model for a component: the named one, else the first found, real weights before demonstration weights.

    Raises
    ------
    ModelNotFound
        If none is installed, or none of that name.
    """
    models = [model for model in installed_models(folders) if model.manifest.task == task]
    fitting = [model for model in models if model_id in (None, model.manifest.id)]
    if not fitting:
        known = ", ".join(m.manifest.id for m in models) or "none"
        raise ModelNotFound(model=model_id or "(any)", component=task, known=known)
    return min(fitting, key=lambda model: model.manifest.demo)  # stable: the first of equals


def install_model(source: Path, target_parent: Path, manifest: ModelManifest | None = None) -> Model:
    """Copy a model folder under `target_parent`, replacing an older one of the same id in one step.

    Parameters
    ----------
    source : Path
        A folder with `model.yaml`, or any folder when `manifest` describes it.
    manifest : ModelManifest, optional
        Written into the copy; its `files` are computed.

    Raises
    ------
    InvalidModel
        If what was copied does not verify; nothing is changed then.
    """
    name = (manifest or read_model(source).manifest).id
    target_parent.mkdir(parents=True, exist_ok=True)
    staging = target_parent / f".{name}.{os.getpid()}.part"
    shutil.rmtree(staging, ignore_errors=True)
    try:
        shutil.copytree(source, staging, symlinks=False)
        if manifest is not None:
            paths = [p for p in sorted(staging.rglob("*")) if p.is_file() and p.name != MANIFEST]
            files = {p.relative_to(staging).as_posix(): sha256_of(p) for p in paths}
            content = manifest.model_copy(update={"files": files}).model_dump(mode="json")
            (staging / MANIFEST).write_text(yaml.safe_dump(content, sort_keys=False))
        verify_files(read_model(staging))
        target = target_parent / name
        shutil.rmtree(target, ignore_errors=True)
        staging.rename(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return read_model(target)
