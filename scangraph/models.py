"""Model folders: what a model says about itself, where it is found, and how it gets there.

A model is a folder with `model.yaml`; swapping the folder is all it takes to update a model. Nothing here loads weights.
How nnU-Net's own folders become models is in `model_import`.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import math
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Self

import pydantic
import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from scangraph.contracts.components import Phase
from scangraph.contracts.errors import InvalidModel, ModelNotFound, ModelRefused
from scangraph.contracts.labels import FREE_NUMBERS, label_table, plain_name
from scangraph.contracts.pipelines import Name

MANIFEST = "model.yaml"
#: A model's name, and that of its folder.
ID = r"^[a-z0-9][a-z0-9._-]*$"
#: A component's id as models may make them: its endpoint and the name of its pipeline follow from it, and from no other.
TASK = r"^[a-z0-9]+/[a-z0-9]+(-[a-z0-9]+)*$"
_LEFTOVER_SECONDS = 86400
#: How much larger a voxel makes a model worth to be run before another one.
_COARSER = 2
DEMO_WARNING = (
    "{id} holds demonstration weights, trained on synthetic phantoms only: on a real patient its result means nothing. "
    "Install real weights with `scangraph models install FILE|FOLDER --task {task}` (nnU-Net's and TotalSegmentator's)."
)
DEMO_DETECTOR = (
    "{id} holds demonstration weights, trained on drawn pictures only: in a photograph its boxes mean nothing. "
    "Install a real detector with `scangraph models install FILE.onnx`."
)


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelInput(_Part):
    """One input channel: the component's port it comes from, and what the network was trained on."""

    name: Name
    modality: str = Field("CT", max_length=64)
    phase: Phase = "any"


class ModelNetwork(_Part):
    """One nnU-Net results folder; a model may be several whose labels are merged (TotalSegmentator's `total` is five)."""

    folder: str
    folds: tuple[str, ...] = ("0",)
    labels: dict[int, int]


class ModelRoi(_Part):
    """Where a model may look only, if that is wanted: around what a coarser model finds."""

    task: str = Field(pattern=TASK, max_length=60)
    #: Which model of that task; unset: the one that its component would use.
    model: str | None = Field(None, pattern=ID, max_length=100)
    #: Label numbers of that model; what this one finds lies in their box, grown by the margin.
    structures: tuple[int, ...] = Field(min_length=1)
    margin_mm: float = Field(20, ge=0, le=200)


class _Manifest(_Part):
    """What `model.yaml` says of every model."""

    id: str = Field(pattern=ID, max_length=100)
    version: str
    title: str = Field(max_length=200)
    task: str = Field(pattern=TASK, max_length=60)
    demo: bool = False
    research_use_only: Literal[True] = True
    files: dict[str, str]
    license: str
    training_data: str
    metrics: dict[str, Any] = Field(default_factory=dict)


class DetectorManifest(_Manifest):
    """`model.yaml` of a network that finds boxes in 2-D images."""

    #: Tells it from a segmentation's.
    kind: Literal["detector"]
    task: str = Field("image/detect", pattern=TASK, max_length=60)
    #: The ONNX file.
    network: str
    #: What it finds, in the order of its outputs.
    classes: tuple[str, ...] = Field(min_length=1)
    #: (height, width) that the network is given; images are scaled into it, with their aspect.
    input_size: tuple[int, int]
    #: How its output is to be read; unset: as its shape says.
    layout: Literal["v5", "v8", "end-to-end"] | None = None

    @property
    def folders(self) -> tuple[str, ...]:
        """What may hold nothing but the files that are named."""
        return (".",)


class ModelManifest(_Manifest):
    """`model.yaml` of a segmentation."""

    inputs: tuple[ModelInput, ...] = Field(min_length=1)
    networks: tuple[ModelNetwork, ...] = Field(min_length=1)
    #: Number -> name of labels that the label table lacks.
    names: dict[int, str] = Field(default_factory=dict)
    spacing_mm: tuple[float, float, float]
    #: Where the index axes x, y, z led in training; nnU-Net's `…WithReorient` readers give RAS.
    orientation: str = Field("LPS", pattern="^[LRPASI]{3}$")
    mirroring: bool = False
    roi: ModelRoi | None = None

    @model_validator(mode="after")
    def _inputs_differ(self) -> Self:
        if len({entry.name for entry in self.inputs}) < len(self.inputs):
            raise ValueError("two inputs have one name")
        return self

    @property
    def labels(self) -> tuple[int, ...]:
        """Numbers that the model can give: of the label table, or of `names`."""
        return tuple(sorted({number for network in self.networks for number in network.labels.values()} - {0}))

    @property
    def folders(self) -> tuple[str, ...]:
        """What may hold nothing but the files that are named."""
        return tuple(network.folder for network in self.networks)


class Installed(_Part):
    """A manifest and the folder it stands in."""

    folder: Path
    manifest: ModelManifest | DetectorManifest
    #: SHA-256 of model.yaml, which holds those of all other files: it names exactly one set of weights.
    digest: str

    @property
    def warnings(self) -> tuple[str, ...]:
        """What must be said with every result."""
        text = DEMO_DETECTOR if isinstance(self.manifest, DetectorManifest) else DEMO_WARNING
        return (text.format(id=self.manifest.id, task=self.manifest.task),) if self.manifest.demo else ()

    def describe(self) -> dict[str, Any]:
        """What an answer says about the model that made it."""
        manifest = self.manifest
        return {"id": manifest.id, "version": manifest.version, "demo": manifest.demo, "sha256": self.digest}


class Model(Installed):
    """A segmentation."""

    manifest: ModelManifest


class Detector(Installed):
    """A network that finds boxes in 2-D images."""

    manifest: DetectorManifest


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_model(folder: Path) -> Model:
    """Read and check a segmentation's manifest; see `read_manifest`."""
    model = read_manifest(folder)
    if not isinstance(model, Model):
        raise InvalidModel(folder=str(folder), reason="it is a detector, not a segmentation")
    return model


def read_manifest(folder: Path) -> Model | Detector:
    """Read and check a manifest, without reading the weights.

    Raises
    ------
    InvalidModel
        If it is missing, not valid, names labels the table lacks, or files outside its folder.
    """
    try:
        text = (folder / MANIFEST).read_bytes()
        content = yaml.safe_load(text)
        of_detector = isinstance(content, dict) and content.get("kind") == "detector"
        manifest = (DetectorManifest if of_detector else ModelManifest).model_validate(content)
    except OSError as error:
        raise InvalidModel(folder=str(folder), reason=f"{MANIFEST} cannot be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise InvalidModel(folder=str(folder), reason=f"{MANIFEST} is not YAML: {error}") from None
    except pydantic.ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise InvalidModel(folder=str(folder), reason=f"{MANIFEST}: {faults}") from None
    digest = hashlib.sha256(text).hexdigest()
    if isinstance(manifest, DetectorManifest):
        if manifest.network not in manifest.files:
            raise InvalidModel(folder=str(folder), reason=f"its network {manifest.network} is not among its files")
        _refuse_outside(folder, [*manifest.files, manifest.network])
        return Detector(folder=folder, manifest=manifest, digest=digest)
    if unknown := set(manifest.labels) - label_table().keys() - manifest.names.keys():
        raise InvalidModel(folder=str(folder), reason=f"it maps to labels that nobody names: {sorted(unknown)}")
    if wrong := [n for n, name in manifest.names.items() if n not in FREE_NUMBERS or not name or plain_name(name) != name]:
        reason = f"label {wrong[0]} of its own needs a number from 1000 on and a name of letters, digits and underscores"
        raise InvalidModel(folder=str(folder), reason=reason)
    _refuse_outside(folder, [*manifest.files, *manifest.folders])
    return Model(folder=folder, manifest=manifest, digest=digest)


def _refuse_outside(folder: Path, names: Sequence[str]) -> None:
    outside = [name for name in names if not (folder / name).resolve().is_relative_to(folder.resolve())]
    if outside:
        raise InvalidModel(folder=str(folder), reason=f"these paths lead outside the folder: {outside}")


def verify_files(model: Installed) -> None:
    """Compare every file with its SHA-256, and refuse files that a network folder has but the manifest does not name.

    Raises
    ------
    InvalidModel
        Naming the first file that is missing, changed or unlisted.
    """
    for difference in differences(model):
        raise InvalidModel(folder=str(model.folder), reason=difference)


def differences(model: Installed) -> Iterator[str]:
    """Say, file by file, how a folder differs from its manifest."""
    for name, expected in model.manifest.files.items():
        path = model.folder / name
        if not path.is_file():
            yield f"{name} is missing"
        elif sha256_of(path) != expected.lower():
            yield f"{name} is not the file the manifest names (SHA-256 differs)"
    for part in model.manifest.folders:
        for path in sorted((model.folder / part).rglob("*")):
            name = path.relative_to(model.folder).as_posix()
            if path.is_file() and name != MANIFEST and name not in model.manifest.files:
                yield f"{path.relative_to(model.folder)} is not named in the manifest"


def installed_models(folders: Sequence[Path]) -> list[Model]:
    """List the valid segmentations of several folders, those of earlier folders first.

    Invalid folders are left out here and named by `invalid_models`, so that one bad folder does not stop the others.
    """
    return [model for model in _scan(folders) if isinstance(model, Model)]


def installed_detectors(folders: Sequence[Path]) -> list[Detector]:
    """List the valid detectors of several folders, in the order in which they are chosen: real ones before demonstrations."""
    found = [model for model in _scan(folders) if isinstance(model, Detector)]
    return sorted(found, key=lambda model: model.manifest.demo)


def choose_detector(folders: Sequence[Path], task: str, model_id: str | None = None) -> Detector:
    """Return the detector for a component: the named one, else the first; raises `ModelNotFound`."""
    models = [model for model in installed_detectors(folders) if model.manifest.task == task]
    for model in models:
        if model_id in {None, model.manifest.id}:
            return model
    known = ", ".join(m.manifest.id for m in models) or "none"
    raise ModelNotFound(model=model_id or "(any)", component=task, known=known)


def invalid_models(folders: Sequence[Path]) -> list[InvalidModel]:
    """List what is wrong with the folders that hold a manifest but are no valid model."""
    return [error for error in _scan(folders) if isinstance(error, InvalidModel)]


def _scan(folders: Sequence[Path]) -> list[Model | Detector | InvalidModel]:
    found: list[Model | Detector | InvalidModel] = []
    for parent in folders:
        for manifest in sorted(parent.glob(f"[!.]*/{MANIFEST}")):  # what begins with a dot is being installed
            try:
                stat = manifest.stat()
                found.append(_read_again(manifest.parent, (stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)))
            except InvalidModel as error:
                found.append(error)
            except OSError:  # swapped while we looked
                continue
    return found


@lru_cache(maxsize=256)
def _read_again(folder: Path, stamp: tuple[int, ...]) -> Model | Detector:
    """Read a manifest that may have been read before; it is asked for at every request."""
    del stamp
    return read_manifest(folder)


def label_names(folders: Sequence[Path]) -> dict[int, str]:
    """Return number -> name of the labels that installed models have and the label table lacks."""
    return {number: name for model in reversed(installed_models(folders)) for number, name in model.manifest.names.items()}


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


def coarse_model(folders: Sequence[Path], model: Model, wanted: Iterable[int]) -> tuple[Model, ModelRoi] | None:
    """Return the model that shows where another one has to look, and how; None where there is none.

    It is the one that the manifest names (`roi`), else the coarsest of the installed models that know all wanted labels, work
    on voxels at least twice as large, and take one image of the same modality, or the same inputs. A demonstration shows the
    way only to demonstrations.
    """
    own = model.manifest
    if own.roi is not None:
        try:
            found = choose_model(folders, own.roi.task, own.roi.model)
        except ModelNotFound:
            return None
        fits = _can_guide(found.manifest, own) and set(own.roi.structures) <= set(found.manifest.labels)
        return (found, own.roi) if fits else None
    labels = tuple(sorted(set(wanted)))
    fitting = [
        other
        for other in installed_models(folders)
        if labels
        and _can_guide(other.manifest, own)
        and set(labels) <= set(other.manifest.labels)
        and math.prod(other.manifest.spacing_mm) >= _COARSER * math.prod(own.spacing_mm)
    ]
    if not fitting:
        return None
    best = max(fitting, key=lambda other: (not other.manifest.demo, math.prod(other.manifest.spacing_mm)))
    return best, ModelRoi(task=best.manifest.task, model=best.manifest.id, structures=labels)


def _can_guide(coarse: ModelManifest, fine: ModelManifest) -> bool:
    """Tell whether a model can be given what another one is given."""
    names = [entry.name for entry in coarse.inputs]
    same_kind = {entry.modality for entry in coarse.inputs} == {fine.inputs[0].modality}
    alike = len(names) == 1 or names == [entry.name for entry in fine.inputs]
    return same_kind and alike and (fine.demo or not coarse.demo)


def install_model(source: Path, target_parent: Path) -> Model | Detector:
    """Copy a model folder under `target_parent`, replacing an older one of the same id in one step.

    Raises
    ------
    ModelRefused
        If it holds links or what is no plain file.
    InvalidModel
        If what was copied does not verify; nothing is changed then.
    """
    model = read_manifest(source)
    with staging(target_parent, model.manifest.id) as folder:
        refuse_links(source)
        shutil.copytree(source, folder, dirs_exist_ok=True)
        return put_in_place(folder, target_parent)


@contextlib.contextmanager
def staging(target_parent: Path, name: str) -> Iterator[Path]:
    """Give a new folder beside the models that nobody sees, gone at the end whatever happens; left by a kill, a day later."""
    target_parent.mkdir(parents=True, exist_ok=True)
    for left in target_parent.glob(".*.part"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > _LEFTOVER_SECONDS:
                shutil.rmtree(left, ignore_errors=True)
    folder = target_parent / f".{name}.{os.getpid()}.part"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_manifest(folder: Path, manifest: ModelManifest | DetectorManifest) -> None:
    """Write `model.yaml`, with the SHA-256 of every file that is there."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path != folder / MANIFEST]
    files = {path.relative_to(folder).as_posix(): sha256_of(path) for path in paths}
    content = manifest.model_copy(update={"files": files}).model_dump(mode="json")
    (folder / MANIFEST).write_text(yaml.safe_dump(content, sort_keys=False))


def put_in_place(folder: Path, target_parent: Path) -> Model | Detector:
    """Verify a staged model and make it the one of its id; at no moment is there none."""
    model = read_manifest(folder)
    verify_files(model)
    target = target_parent / model.manifest.id
    if not target.is_dir() or not _exchanged(folder, target):
        shutil.rmtree(target, ignore_errors=True)
        folder.rename(target)
    return read_manifest(target)


def _exchanged(one: Path, other: Path) -> bool:
    """Let two folders change places in one step (renameat2(2)); False where the system cannot."""
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    with contextlib.suppress(AttributeError):
        done: int = ctypes.CDLL(None).renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange)
        return done == 0
    return False


def remove_model(folders: Sequence[Path], installed: Path, model_id: str) -> Path:
    """Take an installed model away; it is gone in one step, and who has loaded it goes on with it.

    Parameters
    ----------
    folders : sequence of Path
        Where models are looked for.
    installed : Path
        The one among them that models are removed from; what is shipped stays.

    Raises
    ------
    ModelNotFound
        If there is none of this name.
    ModelRefused
        If it is not ours to remove.
    """
    model = find_model(folders, model_id)
    if model.folder.parent != installed:
        raise ModelRefused(source=model_id, reason=f"it is in {model.folder}, and only models below {installed} are removed")
    with staging(installed, model.folder.name) as bin_:
        model.folder.rename(bin_ / "removed")
    return model.folder


def find_model(folders: Sequence[Path], model_id: str) -> Model | Detector:
    """Return the first installed model of a name.

    Raises
    ------
    ModelNotFound
    """
    models = [model for model in _scan(folders) if not isinstance(model, InvalidModel)]
    for model in models:
        if model.manifest.id == model_id:
            return model
    known = ", ".join(model.manifest.id for model in models) or "none"
    raise ModelNotFound(model=model_id, component="any component", known=known)


def refuse_links(folder: Path) -> None:
    """Refuse a folder that holds anything but folders and plain files: a link leads anywhere, a pipe never ends.

    Raises
    ------
    ModelRefused
    """
    for path in folder.rglob("*"):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            what = "a link" if path.is_symlink() else "no plain file"
            raise ModelRefused(source=str(folder), reason=f"{path.relative_to(folder)} is {what}")
