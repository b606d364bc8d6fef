"""TotalSegmentator's weights: which dataset finds what.

Source: TotalSegmentator v2, `totalsegmentator/map_to_binary.py` (`class_map_5_parts`, `map_taskid_to_partname_ct`) and
`python_api.py` (task ids), Apache-2.0; Wasserthal et al., Radiology: AI 2023. Its label n is the n-th number of the range:
`class_map_5_parts` cuts the 117 classes of `total` into five pieces, in their order.
"""

from __future__ import annotations

import re

#: Dataset -> numbers of the label table that its labels 1, 2, … stand for.
CLASSES = {
    291: range(1, 25),  # organs
    292: range(25, 51),  # vertebrae
    293: range(51, 69),  # heart and vessels
    294: range(69, 92),  # limbs, muscles, brain and skull
    295: range(92, 118),  # ribs
    297: range(1, 118),  # all of them, at 3 mm
    298: range(1, 118),  # all of them, at 6 mm
}
#: `total` at 1.5 mm: five networks; where two of them name a voxel, the later one wins, as in TotalSegmentator.
PARTS = (291, 292, 293, 294, 295)
#: What the models are called that find all 117 classes.
IDS = {291: "totalsegmentator", 297: "totalsegmentator-3mm", 298: "totalsegmentator-6mm"}
TITLES = {291: "TotalSegmentator, 1.5 mm", 297: "TotalSegmentator, 3 mm", 298: "TotalSegmentator, 6 mm"}
#: The component that they serve.
TASK = "inference/totalseg"
#: TotalSegmentator turns every image before its networks see it.
ORIENTATION = "RAS"
LICENSE = "Apache-2.0 (TotalSegmentator, open tasks)"
TRAINING_DATA = "TotalSegmentator's training data, University Hospital Basel (Wasserthal et al., Radiology: AI 2023)"


def number_of(dataset_name: str) -> int | None:
    """Return the number of one of TotalSegmentator's datasets by its name, None for those of others."""
    found = re.fullmatch(r"Dataset(\d{3})_TotalSegmentator\w*", dataset_name)
    number = int(found[1]) if found else None
    return number if number in CLASSES else None
