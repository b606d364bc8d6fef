"""Labels that the table lacks: their numbers follow from their names, and their names travel with the mask."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest

from deployments.imageio.nifti import read_nifti, write_nifti
from deployments.smoothing.surfaces import label_map_to_scene
from scangraph.contracts import (
    FREE_NUMBERS,
    LabelMap,
    free_number,
    label_of,
    label_table,
    lookup_table,
    merge_label_maps,
    plain_name,
)
from scangraph.contracts.codec import from_bytes, to_bytes
from scangraph.contracts.errors import InvalidVolume, UnknownLabels

NODE = free_number("lymph_node", {})


def mask(number: int = NODE, name: str = "lymph_node") -> LabelMap:
    array = np.zeros((8, 9, 10), np.uint16)
    array[2:5, 2:6, 2:6], array[5:7, 6:8, 6:9] = number, 5
    return LabelMap(array, (2.0, 1.5, 1.0), labels=(5, number), names={number: name, 1: "of no label here"})


def test_numbers_follow_from_names_alone() -> None:
    names = [f"structure_{n}" for n in range(2000)]
    assert [free_number(name, {}) for name in names] == [free_number(name.upper(), {1000: "x"}) for name in names]
    taken: dict[int, str] = {}
    for name in names:
        taken[free_number(name, taken)] = name
    assert len(taken) == len(names)
    assert all(number in FREE_NUMBERS and number not in label_table() for number in taken)
    assert NODE == 12633  # on every machine, for ever: masks are kept
    assert free_number("bone", {NODE: "lymph_node", 1: "x"}) == free_number("bone", {})
    other = next(name for name in (f"s{n}" for n in range(10**6)) if free_number(name, {}) == NODE)
    assert free_number(other, {NODE: "lymph_node"}) == NODE + 1
    assert free_number("LYMPH_node", {7777: "lymph_node"}) == 7777


def test_names_are_written_plainly() -> None:
    assert plain_name(" Left Kidney (cyst)\n") == "Left_Kidney_cyst"
    assert plain_name("肾") == ""


def test_numbers_that_need_two_bytes_get_them() -> None:
    assert lookup_table({1: NODE, 2: 5}, 3).tolist() == [0, NODE, 5]
    assert lookup_table({1: NODE}, 3).dtype == np.uint16


def test_every_number_has_a_name_and_a_colour() -> None:
    assert label_of(5, {5: "not this"}).name == "liver"
    assert label_of(NODE, {NODE: "lymph_node"}).title == "lymph node"
    assert (label_of(150, {}).name, label_of(150, {}).color) == ("label_150", (160, 160, 160))
    assert label_of(NODE, {}).color != label_of(NODE + 1, {}).color


def test_names_survive_what_is_done_with_a_mask() -> None:
    original = mask()
    assert original.names == {NODE: "lymph_node"}
    for copy in (
        pickle.loads(pickle.dumps(original, protocol=5)),
        pickle.loads(pickle.dumps(original, protocol=4)),
        from_bytes(to_bytes(original)),
        original.reoriented("RAS"),
        original.on_grid_of(replace(original, origin_mm=(1.0, 0.0, 0.0))),
        merge_label_maps([LabelMap(np.ones((8, 9, 10), np.uint8), (2.0, 1.5, 1.0), labels=(1,)), original]),
    ):
        assert isinstance(copy, LabelMap)
        assert copy.names == original.names
    only = merge_label_maps([original], only=[5])
    assert (only.labels, only.names) == ((5,), {})


def test_bytes_of_masks_without_names_are_what_they_were() -> None:
    plain = LabelMap(np.ones((2, 2, 2), np.uint8), (1, 1, 1), labels=(1,))
    assert b"names" not in to_bytes(plain)


def test_one_number_for_two_names_is_no_mask() -> None:
    with pytest.raises(InvalidVolume, match="is 'lymph_node' in one mask and 'bone' in another"):
        merge_label_maps([mask(), mask(name="bone")])


def test_scenes_show_the_names() -> None:
    scene, _ = label_map_to_scene(mask())
    assert [surface.name for surface in scene.surfaces] == ["liver", "lymph_node"]
    assert scene.surfaces[1].color == label_of(NODE, {}).color
    assert not any("lymph_node" in note for note in scene.notes)  # it has no SNOMED code


def test_a_file_is_a_mask_where_its_numbers_are_named() -> None:
    data = write_nifti(mask())
    again = read_nifti(data, "mask.nii.gz", as_mask=True, names={NODE: "lymph_node", NODE + 1: "other"})
    assert isinstance(again, LabelMap)
    assert (again.labels, again.names) == ((5, NODE), {NODE: "lymph_node"})
    with pytest.raises(UnknownLabels, match=str(NODE)):
        read_nifti(data, "mask.nii.gz", as_mask=True)
