from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from deployments.nnunet.plan import build_network
from deployments.nnunet.predictor import Network, Precision
from deployments.nnunet.runtimes import complete_state
from deployments.nnunet.segmentation import ModelStore, onto_grid, segment
from deployments.nnunet.weights import read_network_folder
from scangraph.contracts import LabelMap, Volume
from scangraph.contracts.errors import InvalidParameters, ModelNotFound, WrongGrid
from scangraph.demo import dice
from scangraph.phantoms import Phantom
from tests.conftest import ROOT, constant_volume

SHIPPED = ROOT / "models"


@pytest.fixture(scope="module")
def store() -> ModelStore:
    return ModelStore([SHIPPED], torch.device("cpu"), held=4)


def ignore(done: int, total: int, message: str) -> None:
    pass


def run(store: ModelStore, task: str, **inputs: Volume) -> tuple[LabelMap, list[str]]:
    model, networks, _ = store.get(task, None)
    return segment(inputs, model, networks, step_size=0.5, on_progress=ignore)


def test_ureters_of_a_phantom_on_exactly_its_grid(store: ModelStore, phantom: Phantom) -> None:
    seen: list[tuple[int, int, str]] = []
    model, networks, _ = store.get("inference/ureter", None)
    image = phantom.volumes["delayed"]
    mask, warnings = segment({"image_D": image}, model, networks, step_size=0.5, on_progress=lambda *news: seen.append(news))
    assert (mask.shape, mask.spacing_mm, mask.origin_mm, mask.direction) == (
        image.shape,
        image.spacing_mm,
        image.origin_mm,
        image.direction,
    )
    assert mask.labels == (206,)
    assert set(mask.counts()) <= {206}
    assert dice(mask.array == 206, phantom.truth["ureters"].array == 206) > 0.6  # coarser than the model's own spacing
    tiles = [news for news in seen if news[1]]
    assert [done for done, _, _ in tiles] == list(range(tiles[-1][1] + 1))  # every tile, to the end
    assert any("synthetic phantoms" in w for w in warnings)


def test_the_result_does_not_depend_on_the_orientation(store: ModelStore, phantom: Phantom) -> None:
    image = phantom.volumes["delayed"]
    expected, _ = run(store, "inference/ureter", image_D=image)
    for codes in ("RAS", "SAL", "PIR"):
        turned = image.reoriented(codes)
        found, _ = run(store, "inference/ureter", image_D=turned)
        assert found.same_grid(turned)
        assert np.array_equal(found.reoriented(image.axcodes).array, expected.array)


@pytest.mark.parametrize("mirroring", [False, True])
def test_labels_equal_nnunets_own_predictor(phantom: Phantom, mirroring: bool) -> None:
    """A trained network, the untouched predictor, the promised bounds."""
    folder = read_network_folder(SHIPPED / "totalseg-demo/nnunet", ("0",))
    folder = replace(folder, mirror_axes=(0, 1, 2))
    image = phantom.volumes["portal"].reoriented("LPS")
    plans, network = PlansManager(folder.plans), build_network(folder)
    weights = [complete_state(network, fold) for fold in folder.parameters]
    peer = nnUNetPredictor(
        use_mirroring=mirroring, perform_everything_on_device=False, device=torch.device("cpu"), allow_tqdm=False
    )
    chosen = plans.get_configuration(folder.configuration)
    peer.manual_initialization(network, plans, chosen, weights, folder.dataset, folder.trainer, folder.mirror_axes)
    expected = peer.predict_single_npy_array(np.asarray(image.array, np.float32)[None], image.to_nnunet_props())
    ours = Network(folder, torch.device("cpu"), mirroring=mirroring)
    precisions: tuple[Precision, ...] = ("exact", "fast", "draft")
    found = {
        precision: ours.predict([image.array], image.spacing_mm, lambda *_: None, precision=precision)
        for precision in precisions
    }
    assert np.mean(found["exact"] != expected) <= 1e-4
    assert min(dices(found["exact"], expected)) >= 0.999
    assert np.mean(dices(found["fast"], found["exact"])) >= 0.999
    assert min(dices(found["fast"], found["exact"])) >= 0.995
    if not mirroring:  # which a draft leaves out
        assert np.mean(dices(found["draft"], found["exact"])) >= 0.95


def dices(one: np.ndarray, other: np.ndarray) -> list[float]:
    numbers = set(np.unique(one)) | set(np.unique(other))
    return [float(2 * ((one == n) & (other == n)).sum() / ((one == n).sum() + (other == n).sum())) for n in numbers - {0}]


def test_a_cancelled_prediction_stops_at_the_next_tile(store: ModelStore, phantom: Phantom) -> None:
    class LeftError(Exception):
        pass

    model, networks, _ = store.get("inference/ureter", None)
    calls = itertools.count()

    def leave(done: int, total: int, message: str) -> None:
        if total and next(calls) == 1:
            raise LeftError

    with pytest.raises(LeftError):
        segment({"image_D": phantom.volumes["delayed"]}, model, networks, step_size=0.5, on_progress=leave)
    assert next(calls) == 2


def test_second_phase_is_put_onto_the_first_ones_grid(store: ModelStore, phantom: Phantom) -> None:
    """P on a larger grid, shifted by whole voxels in the same space: the result lies on A's grid and is the same."""
    a, p = phantom.volumes["arterial"], phantom.volumes["portal"]
    expected, _ = run(store, "inference/vessel", image_A=a, image_P=p)
    wider = np.pad(p.array, 3, mode="edge")
    shifted = Volume(wider, p.spacing_mm, tuple(p.index_to_world([-3, -3, -3])), p.direction)
    found, _ = run(store, "inference/vessel", image_A=a, image_P=shifted)
    assert found.same_grid(a)
    assert found.counts().keys() == {204, 205}
    assert np.array_equal(found.array, expected.array)


def test_onto_grid_agrees_with_the_world() -> None:
    z, y, x = np.mgrid[:12, :14, :16]
    moving = Volume((z * 100 + y * 10 + x).astype(np.float32), (2, 1.5, 1), (5, 6, 7))
    fixed = Volume(np.zeros((6, 6, 6), np.int16), (2.2, 1.1, 0.9), (8, 9, 11))
    found = onto_grid(moving, fixed, "P", "A")
    index = moving.world_to_index(fixed.index_to_world([2, 3, 4]))
    assert found.array[2, 3, 4] == pytest.approx(index @ [100, 10, 1], abs=0.01)
    assert onto_grid(moving, moving.with_array(moving.array), "P", "A") is moving


def test_images_of_different_places_are_refused_with_both_extents(store: ModelStore) -> None:
    with pytest.raises(WrongGrid) as caught:
        run(store, "inference/vessel", image_A=constant_volume(0), image_P=constant_volume(0, origin_mm=(500, 0, 0)))
    assert caught.value.status == 422
    assert "image_A spans -" in caught.value.detail or "spans" in caught.value.detail
    assert "500…510" in caught.value.detail


def test_inputs_are_checked(store: ModelStore) -> None:
    with pytest.raises(InvalidParameters, match="image_P"):
        run(store, "inference/vessel", image_A=constant_volume(0))
    with pytest.raises(InvalidParameters, match="channels"):
        run(store, "inference/ureter", image_D=Volume(np.zeros((2, 4, 4, 4), np.int16), (1, 1, 1)))


def test_broken_limits_are_said(store: ModelStore, phantom: Phantom) -> None:
    a = phantom.volumes["arterial"]
    _, warnings = run(store, "inference/vessel", image_A=a, image_P=a)
    assert any("same image" in w for w in warnings)
    _, warnings = run(store, "inference/ureter", image_D=constant_volume(50, (40, 40, 40)))
    assert any("does not look like CT" in w for w in warnings)
    assert any("less than the 150 expected in its contrast phase" in w for w in warnings)


def test_models_are_kept_and_reloaded_when_their_folder_changes(tmp_path: Path) -> None:
    import shutil

    shutil.copytree(SHIPPED / "ureter-demo", tmp_path / "ureter-demo")
    store = ModelStore([tmp_path], torch.device("cpu"), held=1)
    assert store.get("inference/ureter", None)[2]
    _, first, loaded = store.get("inference/ureter", None)
    assert not loaded
    manifest = tmp_path / "ureter-demo/model.yaml"
    manifest.write_text(manifest.read_text().replace("1.0.0", "1.0.1"))
    model, second, loaded = store.get("inference/ureter", None)
    assert loaded
    assert second[0] is not first[0]
    assert model.manifest.version == "1.0.1"
    with pytest.raises(ModelNotFound):
        store.get("inference/ureter", "other")


def test_labels_of_several_networks_are_merged(store: ModelStore, phantom: Phantom) -> None:
    """As TotalSegmentator's five: two networks with numberings of their own."""
    model, networks, _ = store.get("inference/ureter", None)
    (entry,) = model.manifest.networks
    both = model.manifest.model_copy(update={"networks": (entry, entry.model_copy(update={"labels": {1: 208}}))})
    image = phantom.volumes["delayed"]
    mask, _ = segment(
        {"image_D": image}, replace_manifest(model, both), [*networks, *networks], step_size=1.0, on_progress=ignore
    )
    assert mask.labels == (206, 208)
    assert set(mask.counts()) == {208}  # the later network wins where both speak


def test_only_what_is_wanted(store: ModelStore, phantom: Phantom) -> None:
    model, networks, _ = store.get("inference/totalseg", None)
    image = {"image": phantom.volumes["portal"]}
    whole, _ = segment(image, model, networks, on_progress=ignore)
    wanted = sorted(whole.counts())[:2]
    some, _ = segment(image, model, networks, on_progress=ignore, structures=wanted)
    assert some.labels == tuple(wanted)
    assert np.array_equal(some.array, np.where(np.isin(whole.array, wanted), whole.array, 0))
    with pytest.raises(InvalidParameters, match="205"):
        segment(image, model, networks, on_progress=ignore, structures=[205])
    passes: list[int] = []
    twice = replace_manifest(model, replace_networks(model, [{1: 1}, {2: 2}]))
    for structures in ([1, 2], [2]):
        segment(
            image,
            twice,
            networks * 2,
            on_progress=lambda done, total, _: passes.append(total),
            structures=structures,
        )
    assert passes[-1] * 2 == max(passes)  # the other network was left out


def replace_networks(model, labels):  # type: ignore[no-untyped-def]
    entry = model.manifest.networks[0]
    return model.manifest.model_copy(update={"networks": tuple(entry.model_copy(update={"labels": own}) for own in labels)})


def replace_manifest(model, manifest):  # type: ignore[no-untyped-def]
    return model.model_copy(update={"manifest": manifest})
