"""The label table, row by row where its numbers are promised elsewhere."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scangraph.contracts import SCHEMES, check_labels, label_number, label_table, lookup_table
from scangraph.contracts.errors import UnknownLabels

TOTAL = range(1, 118)
OURS = {201: "kidney", 202: "tumor", 203: "cyst", 204: "artery", 205: "vein", 206: "ureter", 207: "fat", 208: "renal_pelvis"}
TOTALSEGMENTATOR_V2 = {
    1: "spleen",
    2: "kidney_right",
    3: "kidney_left",
    5: "liver",
    21: "urinary_bladder",
    23: "kidney_cyst_left",
    24: "kidney_cyst_right",
    25: "sacrum",
    26: "vertebrae_S1",
    27: "vertebrae_L5",
    50: "vertebrae_C1",
    51: "heart",
    52: "aorta",
    63: "inferior_vena_cava",
    64: "portal_vein_and_splenic_vein",
    79: "spinal_cord",
    90: "brain",
    92: "rib_left_1",
    104: "rib_right_1",
    116: "sternum",
    117: "costal_cartilages",
}


def test_numbers() -> None:
    assert list(label_table()) == [*TOTAL, *OURS]
    assert all(label.number == number for number, label in label_table().items())


@pytest.mark.parametrize(("number", "name"), [*TOTALSEGMENTATOR_V2.items(), *OURS.items()])
def test_promised_names(number: int, name: str) -> None:
    assert label_table()[number].name == name
    assert label_number(name) == number


def test_names_are_unique_and_unknown_ones_raise() -> None:
    names = [label.name for label in label_table().values()]
    assert len(set(names)) == len(names)
    assert [label_number(name) for name in names] == list(label_table())
    with pytest.raises(KeyError):
        label_number("appendix")


def test_every_row_has_a_colour_and_a_snomed_code() -> None:
    for label in label_table().values():
        assert len(label.color) == 3
        assert all(0 <= channel <= 255 for channel in label.color)
        assert max(label.color) > 100, f"{label.name} is too dark to see on a CT"
        assert is_sctid(label.snomed_code), label


def is_sctid(code: str) -> bool:
    """Whether the last digit of a SNOMED CT identifier is its Verhoeff check digit, so that typing errors show."""
    multiply = [
        [(a + b) % 5 if b < 5 else (a + b) % 5 + 5 for b in range(5)] + [(a + b) % 5 + 5 for b in range(5)] for a in range(5)
    ]
    multiply += [[(a - b) % 5 + 5 for b in range(5)] + [(a - b) % 5 for b in range(5)] for a in range(5)]
    turns = [list(range(10))]
    for _ in range(7):
        turns.append([[1, 5, 7, 6, 2, 8, 3, 0, 9, 4][d] for d in turns[-1]])
    check = 0
    for place, digit in enumerate(reversed(code)):
        check = multiply[check][turns[place % 8][int(digit)]]
    return check == 0 and code.isascii() and 6 <= len(code) <= 18


def test_snomed_check_can_fail() -> None:
    assert is_sctid("64033007")  # kidney
    assert not is_sctid("64033006")
    assert not is_sctid("46033007")


def test_sides_are_those_of_the_names() -> None:
    table = {label.name: label for label in label_table().values()}
    for label in table.values():
        assert label.laterality is None or label.laterality in label.name
    pairs = [
        (table[name], table[name.replace("left", "right")])
        for name in table
        if name.replace("left", "right") in table.keys() - {name}
    ]
    assert len(pairs) > 30
    for left, right in pairs:
        if left.snomed_code == right.snomed_code:
            assert (left.laterality, right.laterality) == ("left", "right"), f"nothing tells {left.name} from {right.name}"


def test_title_is_how_a_person_writes_it() -> None:
    assert label_table()[63].title == "inferior vena cava"


# --- checking and renumbering -----------------------------------------------------------------------------------------


def test_known_labels_pass() -> None:
    check_labels([0, *label_table()], "mask")
    check_labels(np.unique(np.array([0, 5, 208], np.uint8)), "mask")
    check_labels([], "mask")


@pytest.mark.parametrize("number", [118, 200, 209, 255, -1, 65535])
def test_unknown_labels_are_named(number: int) -> None:
    with pytest.raises(UnknownLabels, match=f"liver.nii.gz holds the label numbers {number},"):
        check_labels([0, 5, number], "liver.nii.gz")


def test_many_unknown_labels_are_cut() -> None:
    with pytest.raises(UnknownLabels) as caught:
        check_labels(range(1000), "mask")
    assert "118, 119" in str(caught.value)
    assert "137, …" in str(caught.value)
    assert len(str(caught.value)) < 400


def test_schemes_lead_into_the_table() -> None:
    assert SCHEMES["kits"] == {1: label_number("kidney"), 2: label_number("tumor"), 3: label_number("cyst")}
    for scheme in SCHEMES.values():
        check_labels(scheme.values(), "scheme")


def test_lookup_table_known_answer() -> None:
    mask = np.array([[0, 1, 2], [3, 2, 4]], np.uint8)
    assert lookup_table(SCHEMES["kits"], 5)[mask].tolist() == [[0, 201, 202], [203, 202, 0]]
    assert lookup_table({1: 201, 9: 202}, 2).tolist() == [0, 201]


@given(st.dictionaries(st.integers(0, 300), st.integers(0, 255)), st.integers(1, 257))
def test_lookup_table_maps_what_is_named_and_clears_the_rest(mapping: dict[int, int], size: int) -> None:
    table = lookup_table(mapping, size)
    assert table.dtype == np.uint8
    assert table.tolist() == [mapping.get(own, 0) for own in range(size)]
