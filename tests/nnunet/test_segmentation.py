from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from deployments.nnunet.body import body_blocks
from deployments.nnunet.plan import build_network
from deployments.nnunet.predictor import Network, Precision
from deployments.nnunet.runtimes import complete_state
from deployments.nnunet.segmentation import Guide, ModelStore, onto_grid, segment
from deployments.nnunet.weights import read_network_folder
from scangraph.contracts import LabelMap, Volume
from scangraph.contracts.errors import InvalidParameters, ModelNotFound, WrongGrid
from scangraph.demo import dice
from scangraph.phantoms import Phantom, make_phantom
from tests.conftest import ROOT, constant_volume
from tests.nnunet.folders import flat_folder

SHIPPED = ROOT / "models"


@pytest.fixture(scope="module")
def store() -> ModelStore:
    return ModelStore([SHIPPED], torch.device("cpu"), held=4)


def ignore(done: int, total: int, message: str) -> None:
    pass


def run(store: ModelStore, task: str, **inputs: Volume) -> tuple[LabelMap, list[str]]:
    model, networks, _ = store.get(task, None)
    return segment(inputs, model, networks, step_size=0.5, on_progress=ignore)[:2]


def test_ureters_of_a_phantom_on_exactly_its_grid(store: ModelStore, phantom: Phantom) -> None:
    seen: list[tuple[int, int, str]] = []
    model, networks, _ = store.get("inference/ureter", None)
    image = phantom.volumes["delayed"]
    mask, warnings, _ = segment({"image_D": image}, model, networks, step_size=0.5, on_progress=lambda *news: seen.append(news))
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
    mask, *_ = segment(
        {"image_D": image}, replace_manifest(model, both), [*networks, *networks], step_size=1.0, on_progress=ignore
    )
    assert mask.labels == (206, 208)
    assert set(mask.counts()) == {208}  # the later network wins where both speak


def test_only_what_is_wanted(store: ModelStore, phantom: Phantom) -> None:
    model, networks, _ = store.get("inference/totalseg", None)
    image = {"image": phantom.volumes["portal"]}
    whole, *_ = segment(image, model, networks, on_progress=ignore)
    wanted = sorted(whole.counts())[:2]
    some, *_ = segment(image, model, networks, on_progress=ignore, structures=wanted)
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


def test_what_is_far_from_the_body_is_not_computed(store: ModelStore, phantom: Phantom) -> None:
    model, networks, _ = store.get("inference/ureter", None)
    image = phantom.volumes["delayed"].reoriented("LPS")
    lonely = replace(image, array=np.pad(image.array, ((0, 0), (0, 0), (0, 110)), constant_values=-1000))
    whole, _, facts = segment({"image_D": lonely}, model, networks, on_progress=ignore)
    assert facts["tiles_skipped"] == 0
    found, _, fewer = segment({"image_D": lonely}, model, networks, on_progress=ignore, skip_air=True)
    assert fewer["tiles_skipped"] > 0
    assert fewer["tiles"] + fewer["tiles_skipped"] == facts["tiles"]
    body = np.ones(lonely.shape, np.uint8)
    body_blocks(lonely.array, lonely.spacing_mm).clear_outside(body)
    assert np.array_equal(found.array, whole.array * body)
    other = model.manifest.model_copy(
        update={"inputs": tuple(entry.model_copy(update={"modality": "MR"}) for entry in model.manifest.inputs)}
    )
    _, _, none = segment({"image_D": lonely}, replace_manifest(model, other), networks, on_progress=ignore, skip_air=True)
    assert none["tiles_skipped"] == 0  # what is air is known of CT only


@pytest.fixture(scope="module")
def patient() -> Phantom:
    return make_phantom(4242, spacing_mm=(4.0, 3.0, 3.0), oblique=(0.0, 0.0, 0.0))


def guide_of(store: ModelStore, structures: tuple[int, ...] = (2, 3), margin_mm: float = 20) -> Guide:
    model, networks, _ = store.get("inference/totalseg", None)
    return Guide(model, networks, structures, margin_mm)


@pytest.mark.parametrize("codes", ["LPS", "SAL"])
def test_a_region_is_segmented_as_if_it_were_the_image(store: ModelStore, patient: Phantom, codes: str) -> None:
    model, networks, _ = store.get("inference/ureter", None)
    image = patient.volumes["delayed"].reoriented(codes)
    found, _, facts = segment({"image_D": image}, model, networks, on_progress=ignore, guide=guide_of(store))
    roi = facts["roi"]
    assert roi["model"]["id"] == "totalseg-demo"
    box = tuple(slice(*side) for side in roi["box"])
    assert np.prod([part.stop - part.start for part in box]) < 0.8 * image.array.size
    part = Volume(image.array[box], image.spacing_mm, tuple(image.index_to_world([p.start for p in box])), image.direction)
    alone, _, _ = segment({"image_D": part}, model, networks, on_progress=ignore)
    expected = np.zeros(image.shape, np.uint8)
    expected[box] = alone.array
    assert np.array_equal(found.array, expected)
    assert found.same_grid(image)
    kidneys = patient.truth["organs"].reoriented(codes).array
    outside = np.ones(image.shape, bool)
    outside[box] = False
    assert not (np.isin(kidneys, (2, 3)) & outside).any()
    # The box fills the networks' tile, or the image.
    tile = networks[0].tile_voxels(image.reoriented("LPS").spacing_mm)
    lengths = [p.stop - p.start for p in box] if codes == "LPS" else None
    assert lengths is None or all(n >= min(t, whole) for n, t, whole in zip(lengths, tile, image.shape, strict=True))


def test_where_no_region_is_found_the_whole_image_is_segmented(store: ModelStore, phantom: Phantom) -> None:
    model, networks, _ = store.get("inference/ureter", None)
    water = constant_volume(0, (30, 40, 40), (4.0, 3.0, 3.0))
    mask, warnings, facts = segment({"image_D": water}, model, networks, on_progress=ignore, guide=guide_of(store))
    assert facts["roi"]["box"] is None
    assert any("the whole image was segmented" in warning for warning in warnings)
    assert mask.same_grid(water)


def test_what_a_region_cuts_is_said(store: ModelStore, phantom: Phantom) -> None:
    """The box of one kidney's tile, and a model that finds large organs."""
    model, networks, _ = store.get("inference/totalseg", None)
    image = phantom.volumes["portal"]
    larger = replace(image, array=np.pad(image.array, 30, mode="edge"))
    _, warnings, facts = segment({"image": larger}, model, networks, on_progress=ignore, guide=guide_of(store, (2,), 0))
    assert facts["roi"]["box"] is not None
    assert any("reach the side of the region" in warning for warning in warnings)


def test_two_dimensional_networks_are_models_like_others(tmp_path: Path, phantom: Phantom) -> None:
    flat = flat_folder(tmp_path)
    network = Network(flat, torch.device("cpu"), mirroring=False)
    model, _, _ = ModelStore([SHIPPED], torch.device("cpu"), held=1).get("inference/ureter", None)
    twice = replace_manifest(model, replace_networks(model, [{1: 206, 2: 2, 3: 3}]))
    image = phantom.volumes["delayed"].reoriented("RAS")
    mask, _, facts = segment({"image_D": image}, twice, [network], on_progress=ignore, precision="exact")
    turned = image.reoriented("LPS")
    expected = network.predict([turned.array], turned.spacing_mm, ignore_tile, precision="exact")
    assert np.array_equal(mask.reoriented("LPS").array, np.array([0, 206, 2, 3], np.uint8)[expected])
    assert facts["tiles"] >= image.shape[0]
    assert len(mask.counts()) > 1


def ignore_tile(done: int, total: int) -> None:
    pass


def replace_networks(model, labels):  # type: ignore[no-untyped-def]
    entry = model.manifest.networks[0]
    return model.manifest.model_copy(update={"networks": tuple(entry.model_copy(update={"labels": own}) for own in labels)})


def replace_manifest(model, manifest):  # type: ignore[no-untyped-def]
    return model.model_copy(update={"manifest": manifest})
