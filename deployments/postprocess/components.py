"""What the mask stage offers."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from scangraph.contracts import Component, Port

#: Every component's outputs change with this stage's algorithms.
VERSION = "1.1.0"


class _Parameters(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class MergeParameters(_Parameters):
    """Parameters of `postprocess/merge`."""

    structures: tuple[int, ...] | None = Field(None, description="label numbers to take from the masks; unset: all")
    priority: tuple[int, ...] = Field(
        (), description="label numbers that win whatever mask they are in, the most important first; then later masks win"
    )
    resample: bool = Field(True, description="look masks on other grids up by nearest neighbour; false: refuse them")


class CleanParameters(_Parameters):
    """Parameters of `postprocess/clean`."""

    structures: tuple[int, ...] | None = Field(None, description="label numbers to work on; unset: all that occur")
    min_mm3: float = Field(0.0, ge=0, description="pieces smaller than this are removed")
    keep_largest: int | None = Field(None, ge=1, description="so many of the largest pieces of each label stay; unset: all")
    fill_holes: bool = Field(False, description="enclosed background becomes the label around it")
    split: dict[int, tuple[int, int]] = Field(
        default_factory=dict, description="label number -> numbers of its right and left part, as in {201: [2, 3]}"
    )


class _Skipping(_Parameters):
    skip_missing: bool = Field(
        False, description="pass a mask on as it is, with a warning, where it lacks what is worked on; false: refuse it"
    )


class _RepairParameters(_Skipping):
    remove_specks: bool = Field(False, description="take pieces out that are too small to be vessels")
    dry_run: bool = Field(False, description="leave the mask as it is, and only list what would be done")
    resample: bool = Field(False, description="interpolate an image that lies on another grid; false: refuse it")


class VesselParameters(_RepairParameters):
    """Parameters of `postprocess/vessel`."""

    vessels: Literal["arteries", "veins", "all"] = Field("arteries", description="which trees are repaired")
    structures: tuple[int, ...] | None = Field(None, description="label numbers of one tree, instead of `vessels`")
    max_gap_mm: float = Field(25.0, gt=0, le=60, description="the longest gap of all; thin vessels have shorter limits")
    max_angle_deg: float = Field(60.0, gt=0, le=90, description="how far an end may turn towards the other")
    max_radius_ratio: float = Field(2.2, ge=1, le=5, description="how much thicker one end may be than the other")
    min_confidence: float = Field(0.25, ge=0, le=1, description="bridges below are listed as rejected")


class UreterParameters(_RepairParameters):
    """Parameters of `postprocess/ureter`."""

    structures: tuple[int, ...] = Field((206,), min_length=1, description="label numbers of the ureters")
    anchor: bool = Field(
        True, description="lead the ends to renal pelvis or kidney and to the bladder, where the mask has them"
    )
    max_gap_mm: float = Field(40.0, gt=0, le=80, description="the longest gap")
    max_angle_deg: float = Field(75.0, gt=0, le=90, description="how far an end may turn towards the other")
    max_radius_ratio: float = Field(3.0, ge=1, le=5, description="how much thicker one end may be than the other")
    min_confidence: float = Field(0.1, ge=0, le=1, description="bridges below are listed as rejected")


class SkeletonParameters(_Parameters):
    """Parameters of `postprocess/skeleton`."""

    structures: tuple[int, ...] | None = Field(None, description="label numbers; unset: all tubular ones that occur")
    min_mm3: float = Field(6.0, ge=0, description="smaller pieces are left out")
    backend: Literal["auto", "scipy", "cugraph"] = Field(
        "auto", description="who works on the graphs; auto: cugraph for millions of voxels where a GPU and the extra are there"
    )


class FatParameters(_Skipping):
    """Parameters of `postprocess/fat`."""

    distance_mm: float = Field(12.0, ge=3, le=30, description="how far from the kidney the fat reaches")
    resample: bool = Field(False, description="interpolate an image, look up masks on another grid; false: refuse them")


def _masks(text: str) -> Port:
    return Port(name="masks", kind="mask", many=True, description=text)


def _mask(text: str) -> Port:
    return Port(name="mask", kind="mask", description=text)


def _image(text: str) -> Port:
    return Port(name="image", kind="image", modality="CT", optional=True, description=text)


_REPAIR_LIMITS = (
    "Only background is painted: no other structure is crossed, and nothing is bridged beyond the limits.",
    "What ends at the scan's edge stays as it is.",
)

MERGE = Component(
    id="postprocess/merge",
    version="1.1.0",
    title="Merge masks",
    description="Paints masks over each other on the first one's grid, by priority, and counts where they disagree.",
    deployment="postprocess",
    inputs=(_masks("masks of one patient, the most important last"),),
    outputs=(_mask("all of them in one"),),
    parameters=MergeParameters,
    constraints=("Masks on another grid than the first are looked up by nearest neighbour.",),
)
CLEAN = Component(
    id="postprocess/clean",
    version=VERSION,
    title="Clean a mask",
    description="Removes small pieces, keeps the largest, fills holes and splits left from right, label by label.",
    deployment="postprocess",
    inputs=(_mask("labels of the table"),),
    outputs=(_mask("tidied up, on the same grid"),),
    parameters=CleanParameters,
    constraints=("Without options nothing is changed.",),
)
VESSEL = Component(
    id="postprocess/vessel",
    version=VERSION,
    title="Repair vessels",
    description="Reconnects broken arteries and veins along their centrelines and lists every bridge.",
    deployment="postprocess",
    inputs=(_mask("arteries or veins among its labels"), _image("contrast-enhanced CT, which weighs the bridges")),
    outputs=(_mask("with the gaps closed, on the same grid"),),
    parameters=VesselParameters,
    constraints=_REPAIR_LIMITS,
)
URETER = Component(
    id="postprocess/ureter",
    version=VERSION,
    title="Repair ureters",
    description="Reconnects broken ureters, each side for itself, from the renal pelvis or kidney to the bladder.",
    deployment="postprocess",
    inputs=(_mask("ureters among its labels; kidneys and bladder help"), _image("CT, which weighs the bridges")),
    outputs=(_mask("with the gaps closed, on the same grid"),),
    parameters=UreterParameters,
    constraints=_REPAIR_LIMITS,
)
SKELETON = Component(
    id="postprocess/skeleton",
    version=VERSION,
    title="Centrelines",
    description="Traces the centrelines of vessels and ureters as a graph, in JSON, and as lines for a scene.",
    deployment="postprocess",
    inputs=(_mask("tubular structures among its labels"),),
    outputs=(
        Port(name="graph", kind="report", description="nodes and edges in LPS mm, with radii, lengths and tortuosity"),
        Port(name="lines", kind="scene", description="the centrelines as lines"),
    ),
    parameters=SkeletonParameters,
    constraints=("A tree a piece: of a ring in a vessel one place is left open.",),
)
FAT = Component(
    id="postprocess/fat",
    version=VERSION,
    title="Perirenal fat",
    description="Marks the fat around the kidneys, by Hounsfield units where a CT is given, else estimated from masks alone.",
    deployment="postprocess",
    inputs=(
        _masks("kidneys, tumor and whatever bounds them, in one mask or several; merged, the last on top"),
        _image("CT, without contrast or with"),
    ),
    outputs=(_mask("the masks with fat in their background"),),
    parameters=FatParameters,
    constraints=("Without a CT the fat is an estimate, better the more organs, muscles and bones the masks have.",),
)
SAMPLE = Component(
    id="postprocess/sample",
    version=VERSION,
    title="Mask from a template",
    description="Fills a patient's mask with a template's structures, warped onto what both have, with a confidence for each.",
    deployment="postprocess",
    inputs=(
        _mask("what is known of the patient; all of it stays"),
        Port(
            name="template",
            kind="mask",
            optional=True,
            description="another patient's mask; unset: a synthetic patient's",
            also=("templete_path",),
        ),
    ),
    outputs=(_mask("the patient's structures and the template's"),),
    constraints=(
        "What comes from the template is a guess: never plan on it.",
        "Tumors and cysts of the template never come along.",
    ),
)

COMPONENTS = (MERGE, CLEAN, VESSEL, URETER, SKELETON, FAT, SAMPLE)
