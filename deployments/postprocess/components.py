"""What the mask stage offers."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from scangraph.contracts import Component, Port


class MergeParameters(BaseModel):
    """Parameters of `postprocess/merge`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    structures: tuple[int, ...] | None = Field(None, description="label numbers to take from the masks; unset: all")


MERGE = Component(
    id="postprocess/merge",
    version="1.0.0",
    title="Merge masks",
    description="Paints masks over each other on the first one's grid; where several name a voxel, the later one wins.",
    deployment="postprocess",
    inputs=(Port(name="masks", kind="mask", many=True, description="masks of one patient, the most important last"),),
    outputs=(Port(name="mask", kind="mask", description="all of them in one"),),
    parameters=MergeParameters,
    constraints=("Masks on another grid than the first are looked up by nearest neighbour.",),
)

COMPONENTS = (MERGE,)
