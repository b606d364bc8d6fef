"""What the surface stage offers."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from scangraph.contracts import Component, Frame, Port


class SmoothParameters(BaseModel):
    """Parameters of `smoothing/base`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    structures: tuple[int, ...] | None = Field(
        None, min_length=1, max_length=255, description="label numbers to take; unset: all that occur"
    )
    smoothing: float = Field(
        1.0, ge=0.0, le=2.0, description="0 leaves the voxels' steps, 1 takes them away, 2 also what is smaller than 15 mm"
    )
    error_mm: float = Field(
        0.05, ge=0.0, le=5.0, description="how far fewer triangles may move a surface (root mean square); 0 leaves all of them"
    )
    triangles: int | None = Field(
        None, ge=100, description="triangles wanted of all structures together; then error_mm does not count"
    )
    joint: bool = Field(False, description="touching structures share their boundary; unset, each is smoothed by itself")
    gap_mm: float = Field(0.0, ge=0.0, le=2.0, description="space between touching structures, with joint; 0: none")
    min_volume_mm3: float = Field(0.0, ge=0.0, description="smaller pieces are left out; 0: all stay, as vessels' pieces must")
    levels: int = Field(1, ge=1, le=4, description="levels of detail; each coarser one has a quarter of the triangles")
    formats: tuple[Literal["obj", "glb", "stl", "ply"], ...] = Field(
        ("obj",), min_length=1, description="files that are written, beside the manifest"
    )
    per_structure: bool = Field(False, description="one file for each structure instead of one with all")
    zipped: bool = Field(False, description="all files in one .zip")
    glb_unit: Literal["m", "mm"] = Field("m", description="of GLB files; glTF wants metres")
    frame: Frame = Field("LPS", description="LPS (DICOM, ITK, 3D Slicer) or RAS (NIfTI viewers)")
    strict: bool = Field(False, description="a surface outside the tolerances is an error instead of a warning")


class PreviewParameters(BaseModel):
    """Parameters of `smoothing/preview`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    title: str = Field("", max_length=120, description="written above the picture")


BASE = Component(
    id="smoothing/base",
    version="2.0.0",
    title="Smoothed scene",
    description="Turns a mask into closed, smoothed surfaces in millimetres, one group and material per structure.",
    deployment="smoothing",
    inputs=(Port(name="mask", kind="mask", description="labels of the table"),),
    outputs=(Port(name="scene", kind="scene", description="surfaces in millimetres"),),
    parameters=SmoothParameters,
    constraints=(
        "Up to 255 structures.",
        "Unless joint, structures are smoothed one by one: touching ones may part by a tenth of a millimetre.",
    ),
)
PREVIEW = Component(
    id="smoothing/preview",
    version="2.1.0",
    title="Preview picture",
    description="Draws the scene from the front, the left and above, with a legend; beside it three slices of image and mask.",
    deployment="smoothing",
    inputs=(
        Port(name="image", kind="image", modality="CT", description="sliced beside the scene", optional=True),
        Port(name="mask", kind="mask", description="drawn over the slices", optional=True),
        Port(name="scene", kind="scene", description="drawn in 3-D"),
    ),
    outputs=(Port(name="picture", kind="image2d", description="PNG"),),
    parameters=PreviewParameters,
    constraints=("Without OpenGL on the server the picture has no 3-D view and says so.",),
)

COMPONENTS = (BASE, PREVIEW)
