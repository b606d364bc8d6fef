"""How networks as users have them become models: nnU-Net's export archives and results folders, TotalSegmentator's weights.

Nothing here reads weights. What is in a folder is said by its names and its two JSON files; the weights are converted by the
segmentation stage in its own environment (`deployments/nnunet/importing.py`), which is also who judges them.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import ValidationError

from scangraph import totalsegmentator
from scangraph.archives import unpack
from scangraph.catalog import Catalog
from scangraph.contracts.errors import InvalidModel, ModelRefused, UnknownComponent
from scangraph.contracts.labels import free_number, label_table, plain_name
from scangraph.models import (
    ID,
    TASK,
    Model,
    ModelInput,
    ModelManifest,
    ModelNetwork,
    label_names,
    put_in_place,
    read_model,
    refuse_links,
    staging,
    write_manifest,
)
from scangraph.settings import HOME

#: (nnU-Net's folder, one to write, the folds) -> what the network is: `spacing_mm`, `channels`, `trainer`, `configuration`.
Converter = Callable[[Path, Path, Sequence[str]], Mapping[str, Any]]

#: What installed models serve, unless they are told another task.
_FAMILY = "inference"
_JSON = ("plans.json", "dataset.json")
_WEIGHTS = ("checkpoint_final.pth", "checkpoint_best.pth", "weights.safetensors", "checkpoint.json")
#: How many folders below what was given a network may lie.
_DEEPEST = 3
#: Exit status of the converter when it refuses what it was given.
_REFUSED = 3
#: A JSON file of a network is a few kB; what is larger is something else.
_MAX_JSON_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Wish:
    """What the user says about a network; None where the network itself says it.

    Parameters
    ----------
    model_id : str
        The model's name.
    task : str
        The component that it serves, if not one of its own.
    labels : mapping
        Its label -> number of the label table, if not by name.
    folds : sequence of str
        Which folds; default fold 0, else the only training on everything, else the first.
    dataset, configuration : str
        Which one, where there are several: `Dataset004_Hippocampus` or 4, or `total` for TotalSegmentator's five parts;
        `3d_fullres` or the whole name of its folder.
    license : str
        Of the weights.
    mirroring : bool
        Average over mirrored copies, as nnU-Net does by default; several times slower.
    """

    model_id: str | None = None
    task: str | None = None
    labels: Mapping[int, int] | None = None
    folds: Sequence[str] | None = None
    dataset: str | None = None
    configuration: str | None = None
    license: str | None = None
    mirroring: bool = False


@dataclass(frozen=True)
class Found:
    """A network that is there, in a folder or still in an archive.

    Parameters
    ----------
    dataset, layout : str
        Names of nnU-Net's two folders: `Dataset004_Hippocampus`, `nnUNetTrainer__nnUNetPlans__3d_fullres`.
    folder : Path
        Where its JSON files lie (those of archives are unpacked).
    folds : tuple of str
        Which are there.
    archive : (Path, PurePosixPath), optional
        Where it comes from, and its path in there.
    """

    dataset: str
    layout: str
    folder: Path
    folds: tuple[str, ...]
    archive: tuple[Path, PurePosixPath] | None = None

    @property
    def configuration(self) -> str:
        """The last part of `<trainer>__<plans>__<configuration>`."""
        return self.layout.rpartition("__")[2]


def import_model(source: Path, target_parent: Path, catalog: Catalog, wish: Wish, convert: Converter) -> Model:
    """Install a network, or TotalSegmentator's five, as one model under `target_parent`; half done, it leaves nothing.

    Parameters
    ----------
    source : Path
        An archive of `nnUNetv2_export_model_to_zip`; a results folder, or a folder above it; or a folder of such archives.
    target_parent : Path
        Where installed models are.
    catalog : Catalog
        Components that there are, and what installed labels are called.
    wish : Wish
        What the user says.
    convert : callable
        Checks and converts the weights of one network.

    Raises
    ------
    ModelRefused, InvalidModel, UnknownComponent
        If it is not what it should be; nothing is changed then.
    """
    with staging(target_parent, "IMPORT") as work:  # in capitals, which no model's name has
        networks = select(find_networks(source, work), source.name, wish.dataset, wish.configuration)
        plan = _Plan(source.name, networks, catalog, wish)
        with staging(target_parent, plan.model_id) as folder:
            facts = []
            for name, network in zip(plan.folders, networks, strict=True):
                folds = _folds(network, wish.folds)
                facts.append(convert(_unpacked(network, folds), folder / name, folds))
            write_manifest(folder, plan.manifest(facts))
            return read_model(put_in_place(folder, target_parent).folder)


def converter(environment: Path) -> Converter:
    """Return what converts weights in a process of the segmentation stage's environment.

    Parameters
    ----------
    environment : Path
        Of the stage, made by `make setup`.
    """

    def convert(source: Path, target: Path, folds: Sequence[str]) -> Mapping[str, Any]:
        return in_environment(environment, "deployments.nnunet.importing", source, str(target.resolve()), *folds)

    return convert


def in_environment(environment: Path, module: str, source: Path, *arguments: str) -> Mapping[str, Any]:
    """Let a stage's module look at a strange file, in a process of the stage's environment; return what it says.

    Raises
    ------
    ModelRefused
        If there is no such environment.
    InvalidModel
        If it refuses the file, or dies of it.
    """
    python = environment / "bin" / "python"
    if not python.exists():
        raise ModelRefused(source=source.name, reason=f"there is no {python} to convert it with; run `make setup`")
    command = [str(python), "-m", module, str(source.resolve()), *arguments]
    done = subprocess.run(command, cwd=HOME, capture_output=True, text=True, check=False)
    said = (done.stdout or done.stderr).strip().rpartition("\n")[2]
    if done.returncode == _REFUSED:
        raise InvalidModel(**json.loads(said))
    if done.returncode:
        raise InvalidModel(folder=str(source), reason=f"its conversion ended with status {done.returncode}: {said}")
    facts: dict[str, Any] = json.loads(said)
    return facts


# --- what is there -----------------------------------------------------------------------------------------------------------


def find_networks(source: Path, work: Path) -> list[Found]:
    """Find the networks in an archive, a folder, or a folder of archives.

    Parameters
    ----------
    work : Path
        Where the JSON files of archives are unpacked.

    Raises
    ------
    ModelRefused
        If there is none, or if an archive or a link is not to be trusted.
    """
    if source.is_dir():
        folders = sorted({path.parent for depth in range(_DEEPEST + 1) for path in source.glob("*/" * depth + "plans.json")})
        found = [_in_folder(folder) for folder in folders]
        archives = sorted(source.glob("*.zip"))
    elif source.is_file():
        found, archives = [], [source]
    else:
        raise ModelRefused(source=str(source), reason="there is no such file or folder")
    for number, archive in enumerate(archives):
        found += _in_archive(archive, work / str(number))
    if not found:
        reason = "no network is in it: a network is a folder with plans.json, dataset.json and fold_<n>"
        raise ModelRefused(source=source.name, reason=reason)
    return found


def _in_folder(folder: Path) -> Found:
    refuse_links(folder)
    folds = [path.name.removeprefix("fold_") for path in sorted(folder.glob("fold_*")) if path.is_dir()]
    return _found(folder, folds, folder.resolve().parent.name, folder.resolve().name)


def _in_archive(archive: Path, work: Path) -> Iterator[Found]:
    there: list[PurePosixPath] = []

    def wanted(path: PurePosixPath) -> bool:
        there.append(path)
        return path.name in _JSON and len(path.parts) <= _DEEPEST + 1

    unpack(archive, work, wanted)
    for plans in (path for path in there if path.name == "plans.json" and (work / path).is_file()):
        inside = plans.parent
        folds = {path.parent.name.removeprefix("fold_") for path in there if path.parent.parent == inside}
        folds &= {path.parent.name.removeprefix("fold_") for path in there if path.name in _WEIGHTS}
        names = (archive.stem, *inside.parts)
        yield _found(work / inside, sorted(folds), names[-2] if len(names) > 1 else "", names[-1], (archive, inside))


def _found(
    folder: Path, folds: Sequence[str], dataset: str, layout: str, archive: tuple[Path, PurePosixPath] | None = None
) -> Found:
    if not dataset.startswith("Dataset"):  # a folder that was taken out of its place
        dataset = str(read_json(folder / "plans.json").get("dataset_name", dataset))
    return Found(dataset, layout, folder, tuple(folds), archive)


def _unpacked(network: Found, folds: Sequence[str]) -> Path:
    """Return the network's folder; of an archive, the weights of the wanted folds are unpacked beside its JSON files."""
    if network.archive is not None:
        archive, inside = network.archive
        wanted = {inside / f"fold_{fold}" / name for fold in folds for name in _WEIGHTS}
        top = network.folder.parents[len(inside.parts) - 1] if inside.parts else network.folder
        unpack(archive, top, wanted.__contains__)
    return network.folder


def _folds(network: Found, wanted: Sequence[str] | None) -> tuple[str, ...]:
    if not network.folds:
        raise ModelRefused(source=network.dataset, reason=f"{network.layout} has no fold")
    folds = tuple(wanted or [next((fold for fold in ("0", "all") if fold in network.folds), network.folds[0])])
    if missing := [fold for fold in folds if fold not in network.folds]:
        reason = f"{network.layout} has no fold_{missing[0]}; it has {', '.join(network.folds)}"
        raise ModelRefused(source=network.dataset, reason=reason)
    return folds


def read_json(path: Path) -> dict[str, Any]:
    """Read one of a network's JSON files.

    Raises
    ------
    ModelRefused
    """
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise ModelRefused(source=path.name, reason="it is too large to be nnU-Net's")
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelRefused(source=path.name, reason=f"it cannot be read ({type(error).__name__})") from None
    if not isinstance(content, dict):
        raise ModelRefused(source=path.name, reason="it is no JSON object")
    return content


# --- which of it -------------------------------------------------------------------------------------------------------------


def select(found: Sequence[Found], source: str, dataset: str | None = None, configuration: str | None = None) -> list[Found]:
    """Choose the networks of one model: one, or TotalSegmentator's five parts in their order.

    Raises
    ------
    ModelRefused
        If there are several and it is not said which, or there is none of that name.
    """
    parts = {totalsegmentator.number_of(network.dataset): network.dataset for network in found}
    missing = [str(part) for part in totalsegmentator.PARTS if part not in parts]
    five = [] if missing else [parts[part] for part in totalsegmentator.PARTS]
    names = list(dict.fromkeys(network.dataset for network in found))
    choices = [*(["total"] if five else []), *(name for name in names if name not in five)]
    if dataset is None:
        if len(choices) > 1:
            some = 0 < len(missing) < len(totalsegmentator.PARTS)
            hint = f" (of TotalSegmentator's five parts there is no {', '.join(missing)})" if some else ""
            raise ModelRefused(source=source, reason=f"it holds {', '.join(choices)}{hint}; choose one with --dataset")
        dataset = choices[0]
    if dataset == "total":
        if missing:
            raise ModelRefused(source=source, reason=f"of TotalSegmentator's five parts there is no {', '.join(missing)}")
        chosen = five
    else:
        chosen = [name for name in names if name == dataset or _is_number(name, dataset)][:1]
        if not chosen:
            raise ModelRefused(source=source, reason=f"it holds no {dataset}; it holds {', '.join(choices)}")
    return [_one(found, name, configuration, source) for name in chosen]


def _is_number(name: str, given: str) -> bool:
    return given.isdecimal() and name.startswith(f"Dataset{int(given):03}_")


def _one(found: Sequence[Found], dataset: str, configuration: str | None, source: str) -> Found:
    networks = [network for network in found if network.dataset == dataset]
    fitting = [network for network in networks if configuration in {None, network.layout, network.configuration}]
    if len(fitting) == 1:
        return fitting[0]
    names = ", ".join(network.layout for network in fitting or networks)
    if fitting:
        raise ModelRefused(source=source, reason=f"{dataset} has {names}; choose one with --configuration")
    raise ModelRefused(source=source, reason=f"{dataset} has no {configuration}; it has {names}")


# --- what it becomes ---------------------------------------------------------------------------------------------------------


class _Plan:
    """What a model of some networks will be called, serve and find."""

    def __init__(self, source: str, networks: Sequence[Found], catalog: Catalog, wish: Wish) -> None:
        self._source, self._networks, self._catalog, self._wish = source, networks, catalog, wish
        first = networks[0]
        self._known = totalsegmentator.number_of(first.dataset)
        whole = self._known if len(networks) > 1 or self._known not in totalsegmentator.PARTS else None
        self._title = totalsegmentator.TITLES[whole] if whole else re.sub(r"^Dataset\d+_", "", first.dataset) or first.layout
        self.model_id = wish.model_id or (totalsegmentator.IDS[whole] if whole else self._own_name(first))
        self.folders = [f"part-{totalsegmentator.number_of(n.dataset)}" for n in networks] if len(networks) > 1 else ["nnunet"]
        self._task = wish.task or (totalsegmentator.TASK if whole else f"{_FAMILY}/{_slug(self.model_id)}")
        if not re.fullmatch(ID, self.model_id):
            raise ModelRefused(source=source, reason=f"{self.model_id!r} is no name for a model; say --id NAME")
        if wish.task and wish.task not in catalog:
            raise UnknownComponent(component=wish.task, known=", ".join(catalog))
        if not re.match(TASK, self._task):
            raise ModelRefused(source=source, reason=f"{self._task} is no name for a component; say another --id")
        if not wish.task and not whole and self._task in catalog.fixed:
            reason = f"there is a component {self._task}; say --task {self._task} if the model serves it, else another --id"
            raise ModelRefused(source=source, reason=reason)
        if wish.labels is not None and len(networks) > 1:
            raise ModelRefused(source=source, reason="--labels is for one network, and these are five whose labels are known")
        taken = label_names(catalog.folders)
        #: Number -> name of labels that the label table lacks.
        self._names: dict[int, str] = {}
        self._mappings = []
        for network in networks:
            mapping, new = self._labels(network, {**taken, **self._names})
            self._mappings.append(mapping)
            self._names |= new

    def _own_name(self, network: Found) -> str:
        """Make a name of the dataset's; of a configuration other than the usual one, too."""
        usual = network.configuration in {"3d_fullres", network.layout}
        name = _slug(self._title if usual else f"{self._title}-{network.configuration}")[:40].strip("-")
        return f"{name}-nnunet" if f"{_FAMILY}/{name}" in self._catalog.fixed else name

    def manifest(self, facts: Sequence[Mapping[str, Any]]) -> ModelManifest:
        """Describe the model, its `files` not yet named."""
        wish, first = self._wish, self._networks[0]
        plans, dataset = read_json(first.folder / "plans.json"), read_json(first.folder / "dataset.json")
        networks = [
            ModelNetwork(folder=folder, folds=_folds(network, wish.folds), labels=mapping)
            for folder, network, mapping in zip(self.folders, self._networks, self._mappings, strict=True)
        ]
        reorients = str(plans.get("image_reader_writer", "")).endswith("WithReorient")
        trained = [f"{n.dataset} ({f['trainer']}, {f['configuration']})" for n, f in zip(self._networks, facts, strict=True)]
        try:
            return ModelManifest(
                id=self.model_id,
                version="1.0.0",
                title=self._title,
                task=self._task,
                inputs=self._inputs(dataset, int(facts[0]["channels"])),
                networks=tuple(networks),
                names=self._names,
                spacing_mm=facts[0]["spacing_mm"],
                orientation=totalsegmentator.ORIENTATION if self._known or reorients else "LPS",
                mirroring=wish.mirroring,
                files={},
                license=wish.license or (totalsegmentator.LICENSE if self._known else "not stated"),
                training_data=f"{totalsegmentator.TRAINING_DATA if self._known else 'not stated'}; {', '.join(trained)}",
            )
        except ValidationError as error:
            faults = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            raise ModelRefused(source=self._source, reason=f"no manifest can be made of it ({faults})") from None

    def _inputs(self, dataset: Mapping[str, Any], channels: int) -> tuple[ModelInput, ...]:
        listed = dataset.get("channel_names", dataset.get("modality", {}))
        try:
            names = [str(listed[key]) for key in sorted(listed, key=int)]
        except (TypeError, ValueError):
            raise ModelRefused(source=self._source, reason="its dataset.json does not name its channels by number") from None
        modalities = ["CT" if name.upper().startswith("CT") else name[:32] for name in names]
        if len(names) != channels:
            raise ModelRefused(source=self._source, reason=f"it names {len(names)} channels and takes {channels}")
        component = self._catalog.get(self._task)
        if component is not None and (component.id in self._catalog.fixed or self._wish.task):
            ports = component.inputs
            if len(ports) != channels:
                reason = f"it takes {channels} images, and {self._task} has the inputs {', '.join(p.name for p in ports)}"
                raise ModelRefused(source=self._source, reason=reason)
            return tuple(ModelInput(name=p.name, modality=m, phase=p.phase) for p, m in zip(ports, modalities, strict=True))
        plain = [f"image_{plain_name(name) or number}" for number, name in enumerate(names)]
        if channels == 1:
            plain = ["image"]
        elif len(set(plain)) < channels:
            plain = [f"image_{number}" for number in range(channels)]
        return tuple(ModelInput(name=name[:63], modality=m) for name, m in zip(plain, modalities, strict=True))

    def _labels(self, network: Found, taken: Mapping[int, str]) -> tuple[dict[int, int], dict[int, str]]:
        """Return (its label -> ours, number -> name of those that the table lacks)."""
        own = own_labels(read_json(network.folder / "dataset.json"), network.dataset)
        known = totalsegmentator.number_of(network.dataset)
        if self._wish.labels is not None:
            if unknown := sorted(set(self._wish.labels) - own.keys()):
                reason = f"it has no label {unknown[0]}; it has {', '.join(map(str, own))}"
                raise ModelRefused(source=network.dataset, reason=reason)
            if unknown := sorted(set(self._wish.labels.values()) - label_table().keys()):
                raise ModelRefused(source=network.dataset, reason=f"the label table has no number {unknown[0]}")
            return dict(self._wish.labels), {}
        if known is not None:
            classes = totalsegmentator.CLASSES[known]
            if set(own) != set(range(1, len(classes) + 1)):
                reason = f"it has {len(own)} labels, and TotalSegmentator's dataset {known} has {len(classes)}"
                raise ModelRefused(source=network.dataset, reason=reason)
            return dict(enumerate(classes, start=1)), {}
        table = {label.name.lower(): label.number for label in label_table().values()}
        mapping, new = dict[int, int](), dict[int, str]()
        for number, name in own.items():
            plain = plain_name(name) or f"label_{number}"
            mapping[number] = table[plain.lower()] if plain.lower() in table else free_number(plain, {**taken, **new})
            if mapping[number] not in label_table():
                new[mapping[number]] = {**taken, **new}.get(mapping[number], plain)
        return mapping, new


def own_labels(dataset: Mapping[str, Any], source: str) -> dict[int, str]:
    """Return what the numbers of a network's masks are called, by its `dataset.json`.

    Regions are painted over each other in the order of `regions_class_order`, each with its number there (nnU-Net's
    LabelManager): a number then stands for what is left of its region.

    Raises
    ------
    ModelRefused
        If the file does not say.
    """
    try:
        labels = {str(name): value for name, value in dataset["labels"].items() if name not in {"background", "ignore"}}
        if any(isinstance(value, list) and len(value) > 1 for value in labels.values()):
            numbers = [int(number) for number in dataset["regions_class_order"]]
        else:
            numbers = [int(value[0] if isinstance(value, list) else value) for value in labels.values()]
        own = dict(zip(numbers, labels, strict=True))
    except (KeyError, TypeError, ValueError, IndexError, AttributeError):
        reason = "its dataset.json does not name its labels as nnU-Net v2 does"
        raise ModelRefused(source=source, reason=reason) from None
    if not own or len(own) != len(labels) or min(own) < 1:
        raise ModelRefused(source=source, reason="its dataset.json names no labels, or one number twice")
    return own


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
