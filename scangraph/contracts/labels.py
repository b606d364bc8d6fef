"""The label table: every number a mask may hold, with name, colour and SNOMED CT code.

Numbers 1-117 and their names are TotalSegmentator v2's `total` classes (Wasserthal et al., Radiology AI 2023), codes as its
SNOMED mapping gives them; from 201 on they are scangraph's own, so that one uint8 mask can hold everything.

A model of somebody else may find what the table lacks. Such a label has a number from 1000 on that follows from its name
(`free_number`): the same on every machine and after every installation, so that masks of different models can be merged and a
file stays what it was. Its name stands in the model's manifest and travels with the mask (`LabelMap.names`).
"""

from __future__ import annotations

import colorsys
import hashlib
import re
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from scangraph.contracts.errors import UnknownLabels

Laterality = Literal["left", "right"]

#: number, name, colour (RGB), SNOMED CT concept, side where the concept does not say it (L, R or -)
_TABLE = """
1 spleen 9d6ca2 78961009 -
2 kidney_right b9664d 64033007 R
3 kidney_left c76e53 64033007 L
4 gallbladder 8bad62 28231008 -
5 liver a8533b 10200004 -
6 stomach d8847e 69695003 -
7 pancreas e0a86a 15776009 -
8 adrenal_gland_right e8c468 23451007 R
9 adrenal_gland_left fad370 23451007 L
10 lung_upper_lobe_left c9a8b8 45653009 L
11 lung_lower_lobe_left b890a4 90572001 L
12 lung_upper_lobe_right c9a8b8 45653009 R
13 lung_middle_lobe_right d4b6c4 72481006 -
14 lung_lower_lobe_right b890a4 90572001 R
15 esophagus c99a86 32849002 -
16 trachea a9c6d6 44567001 -
17 thyroid_gland b0626c 69748006 -
18 small_bowel dba58c 30315005 -
19 duodenum cf9878 38848004 -
20 colon c48668 71854001 -
21 urinary_bladder dcb85c 89837001 -
22 prostate c8907c 41216001 -
23 kidney_cyst_left 7dbed3 367643001 L
24 kidney_cyst_right 74b0c4 367643001 R
25 sacrum dccfae 54735007 -
26 vertebrae_S1 d1b88a 65985001 -
27 vertebrae_L5 c6bd9b 49668003 -
28 vertebrae_L4 e5cfa5 11994002 -
29 vertebrae_L3 dbca90 36470004 -
30 vertebrae_L2 d1c1a3 14293000 -
31 vertebrae_L1 c6ba8f 66794005 -
32 vertebrae_T12 e5ca97 23215003 -
33 vertebrae_T11 dbd0ab 12989004 -
34 vertebrae_T10 d1bd96 7610001 -
35 vertebrae_T9 c6b883 82687006 -
36 vertebrae_T8 e5d4b3 11068009 -
37 vertebrae_T7 dbcd9d 62487009 -
38 vertebrae_T6 d1b88a 45296009 -
39 vertebrae_T5 c6bd9b 56401006 -
40 vertebrae_T4 e5cfa5 73071006 -
41 vertebrae_T3 dbca90 1626008 -
42 vertebrae_T2 d1c1a3 53733008 -
43 vertebrae_T1 c6ba8f 64864005 -
44 vertebrae_C7 e5ca97 87391001 -
45 vertebrae_C6 dbd0ab 36054005 -
46 vertebrae_C5 d1bd96 36978003 -
47 vertebrae_C4 c6b883 5329002 -
48 vertebrae_C3 e5d4b3 113205007 -
49 vertebrae_C2 dbcd9d 39976000 -
50 vertebrae_C1 d1b88a 14806007 -
51 heart ba4d4a 80891009 -
52 aorta d8372f 15825003 -
53 pulmonary_vein c05a64 122972007 -
54 brachiocephalic_trunk d64a3a 12691009 -
55 subclavian_artery_right d64a3a 29700009 R
56 subclavian_artery_left e74f3e 29700009 L
57 common_carotid_artery_right d64a3a 32062004 R
58 common_carotid_artery_left e74f3e 32062004 L
59 brachiocephalic_vein_left 3e74c6 8887007 L
60 brachiocephalic_vein_right 3a6cb8 8887007 R
61 atrial_appendage_left b8584e 68786006 -
62 superior_vena_cava 2f62b4 48345005 -
63 inferior_vena_cava 2b5cb0 64131007 -
64 portal_vein_and_splenic_vein 4f7fc4 110765007 -
65 iliac_artery_left e94f40 73634005 L
66 iliac_artery_right d84a3c 73634005 R
67 iliac_vena_left 4074cb 46027005 L
68 iliac_vena_right 3c6cbc 46027005 R
69 humerus_left f4e7c6 85050009 L
70 humerus_right e2d6b8 85050009 R
71 scapula_left f4e7c6 79601000 L
72 scapula_right e2d6b8 79601000 R
73 clavicula_left f4e7c6 51299004 L
74 clavicula_right e2d6b8 51299004 R
75 femur_left f4e7c6 71341001 L
76 femur_right e2d6b8 71341001 R
77 hip_left e9dab3 29836001 L
78 hip_right d8caa6 29836001 R
79 spinal_cord eedc7c 2748008 -
80 gluteus_maximus_left b55f52 181674001 L
81 gluteus_maximus_right a8584c 181674001 R
82 gluteus_medius_left be6c61 78333006 L
83 gluteus_medius_right b0645a 78333006 R
84 gluteus_minimus_left c67870 75297007 L
85 gluteus_minimus_right b87068 75297007 R
86 autochthon_left ac564b 244849004 L
87 autochthon_right a05046 244849004 R
88 iliopsoas_left b96556 68455001 L
89 iliopsoas_right ac5e50 68455001 R
90 brain e0b8b0 12738006 -
91 skull e6dcc2 89546000 -
92 rib_left_1 d6c8a2 48535007 L
93 rib_left_2 e4d8b6 78247007 L
94 rib_left_3 d6c8a2 25888004 L
95 rib_left_4 e4d8b6 25523003 L
96 rib_left_5 d6c8a2 15339008 L
97 rib_left_6 e4d8b6 59558009 L
98 rib_left_7 d6c8a2 24915002 L
99 rib_left_8 e4d8b6 5953002 L
100 rib_left_9 d6c8a2 22565002 L
101 rib_left_10 e4d8b6 77644006 L
102 rib_left_11 d6c8a2 58830002 L
103 rib_left_12 e4d8b6 43993008 L
104 rib_right_1 d6c8a2 48535007 R
105 rib_right_2 e4d8b6 78247007 R
106 rib_right_3 d6c8a2 25888004 R
107 rib_right_4 e4d8b6 25523003 R
108 rib_right_5 d6c8a2 15339008 R
109 rib_right_6 e4d8b6 59558009 R
110 rib_right_7 d6c8a2 24915002 R
111 rib_right_8 e4d8b6 5953002 R
112 rib_right_9 d6c8a2 22565002 R
113 rib_right_10 e4d8b6 77644006 R
114 rib_right_11 d6c8a2 58830002 R
115 rib_right_12 e4d8b6 43993008 R
116 sternum e2d6b8 56873002 -
117 costal_cartilages b8ccb4 50016007 -
201 kidney c0704f 64033007 -
202 tumor e8c22e 108369006 -
203 cyst 5fb4d0 367643001 -
204 artery e0332b 51114001 -
205 vein 2a5fc0 29092000 -
206 ureter f0a51e 87953007 -
207 fat f2e2a0 55603005 -
208 renal_pelvis e69a3c 25990002 -
"""

#: Numberings of other projects that are accepted when named: scheme -> its number -> ours.
SCHEMES: dict[str, dict[int, int]] = {"kits": {1: 201, 2: 202, 3: 203}}
#: Numbers of labels that the table lacks; the last one is what a uint16 can say.
FREE_NUMBERS = range(1000, 65536)
#: The colour of numbers that nobody gave.
_GREY = (160, 160, 160)
#: Multiples of the golden ratio's fraction spread hues evenly, however many there are.
_GOLDEN = 0.6180339887


class Label(BaseModel):
    """One row of the table."""

    model_config = ConfigDict(frozen=True)

    number: int
    name: str
    color: tuple[int, int, int]
    snomed_code: str = Field("", description="empty where the table lacks the label")
    laterality: Laterality | None = None

    @property
    def title(self) -> str:
        """The name as a person writes it."""
        return self.name.replace("_", " ")


@cache
def label_table() -> dict[int, Label]:
    """Return every label by its number, ascending."""
    table = {}
    for row in _TABLE.split("\n")[1:-1]:
        number, name, color, code, side = row.split(" ")
        red, green, blue = bytes.fromhex(color)
        laterality: Laterality | None = "left" if side == "L" else "right" if side == "R" else None
        table[int(number)] = Label(
            number=int(number), name=name, color=(red, green, blue), snomed_code=code, laterality=laterality
        )
    return table


def label_number(name: str) -> int:
    """Return the number of a label by its name.

    Raises
    ------
    KeyError
        If the table has no such name.
    """
    for label in label_table().values():
        if label.name == name:
            return label.number
    raise KeyError(name)


def label_of(number: int, names: Mapping[int, str]) -> Label:
    """Return what is known of a number: its row of the table, else its name among `names`, else a name made of the number."""
    found = label_table().get(number)
    if found is None:
        red, green, blue = colorsys.hls_to_rgb(number * _GOLDEN % 1, 0.6, 0.55)
        color = (round(255 * red), round(255 * green), round(255 * blue)) if number in FREE_NUMBERS else _GREY
        found = Label(number=number, name=names.get(number, f"label_{number}"), color=color)
    return found


def plain_name(text: str) -> str:
    """Write a label's name as the table writes names: at most 64 letters, digits and single underscores; may be empty."""
    return re.sub(r"[^A-Za-z0-9]+", "_", text).strip("_")[:64].rstrip("_")


def free_number(name: str, taken: Mapping[int, str]) -> int:
    """Return the number of a label that the table lacks.

    Parameters
    ----------
    name : str
        As `plain_name` writes it; capitals do not matter.
    taken : mapping
        Number -> name of those that are known here. The same name keeps its number; where two names lead to one number
        (a chance of 1 in 64536 for each pair), the later one gets the next that is free.
    """
    known = {other.lower(): number for number, other in taken.items()}
    if name.lower() in known:
        return known[name.lower()]
    place = int.from_bytes(hashlib.sha256(name.lower().encode()).digest()[:8], "big")
    while FREE_NUMBERS[place % len(FREE_NUMBERS)] in taken:
        place += 1
    return FREE_NUMBERS[place % len(FREE_NUMBERS)]


def check_labels(numbers: Iterable[int], name: str, names: Mapping[int, str] | None = None) -> None:
    """Refuse numbers that nobody names.

    Parameters
    ----------
    numbers : iterable of int
        Numbers that occur; 0 is background.
    name : str
        What the mask is called in the message.
    names : mapping, optional
        Number -> name of labels that the table lacks.

    Raises
    ------
    UnknownLabels
        Naming the numbers.
    """
    unknown = sorted({int(n) for n in numbers} - label_table().keys() - (names or {}).keys() - {0})
    if unknown:
        shown = ", ".join(map(str, unknown[:20])) + (", …" if len(unknown) > 20 else "")
        raise UnknownLabels(name=name, numbers=shown)


def lookup_table(mapping: Mapping[int, int], size: int) -> NDArray[np.unsignedinteger[Any]]:
    """Return an array that renumbers a mask by indexing: `lookup_table({1: 201}, 4)[mask]`; unnamed numbers become 0.

    It is of uint8 where all numbers fit, else of uint16, and so is what it gives.
    """
    table: NDArray[np.unsignedinteger[Any]] = np.zeros(size, np.uint8 if max(mapping.values(), default=0) < 256 else np.uint16)
    for own, number in mapping.items():
        if own < size:
            table[own] = number
    return table
