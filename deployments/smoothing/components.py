"""What the surface stage offers."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from scangraph.contracts import Component, Frame, Port


class SmoothParameters(BaseModel):
    """Parameters of `smoothing/base`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    structures: tuple[int, ...] | None = Field(None, description="label numbers to take; unset: all that occur")
    smoothing: float = Field(1.0, ge=0.0, le=1.0, description="0 leaves the voxels' steps, 1 smooths fully")
    frame: Frame = Field("LPS", description="LPS (DICOM, ITK, 3D Slicer) or RAS (NIfTI viewers)")


class PreviewParameters(BaseModel):
    """Parameters of `smoothing/preview`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    title: str = Field("", max_length=120, description="written above the picture")


BASE = Component(
    id="smoothing/base",
    version="1.0.0",
    title="Smoothed scene",
    description="Turns a mask into closed, smoothed surfaces in millimetres, one group and material per structure.",
    deployment="smoothing",
    inputs=(Port(name="mask", kind="mask", description="labels of the table"),),
    outputs=(Port(name="scene", kind="scene", description="surfaces in millimetres"),),
    parameters=SmoothParameters,
    constraints=("Structures are smoothed one by one: touching ones may part by a tenth of a millimetre.",),
)
PREVIEW = Component(
    id="smoothing/preview",
    version="1.0.0",
    title="Preview picture",
    description="Draws three slices with the mask over them, and the scene with a legend.",
    deployment="smoothing",
    inputs=(
        Port(name="image", kind="image", modality="CT", description="what the mask lies on"),
        Port(name="mask", kind="mask", description="drawn over the slices"),
        Port(name="scene", kind="scene", description="drawn in 3-D"),
    ),
    outputs=(Port(name="picture", kind="image2d", description="PNG"),),
    parameters=PreviewParameters,
    constraints=("Without OpenGL on the server the picture has no 3-D view and says so.",),
)

COMPONENTS = (BASE, PREVIEW)
