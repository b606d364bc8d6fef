"""What the segmentation stage offers."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from scangraph.contracts import Component, Port, label_of
from scangraph.models import Model

VERSION = "2.1.0"


class SegmentParameters(BaseModel):
    """Parameters of every segmentation."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str | None = Field(None, description="id of an installed model; unset: the installed one for this task")
    structures: tuple[int, ...] | None = Field(
        None,
        description="label numbers that are wanted; unset: all. Of a model in parts only those that have them are computed",
    )
    precision: Literal["exact", "fast", "draft"] = Field(
        "fast",
        description="exact: nnU-Net's labels up to rounding; fast: the network in bfloat16 or float16; "
        "draft: larger steps and no mirrored copies, for a first look",
    )
    step_size: float | None = Field(
        None,
        ge=0.25,
        le=1.0,
        description="distance of neighbouring tiles as a part of their size; unset: 0.5, and 0.8 in a draft",
    )
    skip_air: bool | None = Field(
        None,
        description="what is farther than 20 mm outside of the body is background, and tiles that hold nothing of the body are "
        "not computed (CT only); labels inside do not change. Unset: yes, but not where exact",
    )
    roi: Literal["auto"] | None = Field(
        None,
        description="auto: a coarser model looks first, and only the box around what it finds is segmented; for large images. "
        "Unset: the whole image",
    )


def _image(name: str, phase: str, text: str) -> Port:
    return Port.model_validate({"name": name, "kind": "image", "modality": "CT", "phase": phase, "description": text})


def _mask(text: str) -> Port:
    return Port(name="mask", kind="mask", description=text)


TOTALSEG = Component(
    id="inference/totalseg",
    version=VERSION,
    uses_models=True,
    title="Organs",
    description="Segments the organs of an abdominal CT of any contrast phase.",
    deployment="nnunet",
    inputs=(_image("image", "any", "CT in Hounsfield units"),),
    outputs=(_mask("organs, on the image's grid"),),
    parameters=SegmentParameters,
    constraints=(
        "CT only.",
        "An image finer than 1 mm gives no better result than one of 1 mm: it is worked on at the model's spacing.",
    ),
)
VESSEL = Component(
    id="inference/vessel",
    version=VERSION,
    uses_models=True,
    title="Arteries and veins",
    description="Segments arteries and veins from the arterial and the portal phase; the result lies on image_A's grid.",
    deployment="nnunet",
    inputs=(
        _image("image_A", "arterial", "CT in the arterial phase; the result lies on its grid"),
        _image("image_P", "portal", "CT in the portal venous phase; resampled onto image_A by its geometry"),
    ),
    outputs=(_mask("arteries and veins, on image_A's grid"),),
    parameters=SegmentParameters,
    constraints=(
        "Only the arterial (A) and the portal venous (P) phase.",
        "Both images must show the same part of the same patient; they are not registered to each other.",
    ),
)
URETER = Component(
    id="inference/ureter",
    version=VERSION,
    uses_models=True,
    title="Ureters",
    description="Segments the ureters from the delayed (excretory) phase.",
    deployment="nnunet",
    inputs=(_image("image_D", "delayed", "CT in the delayed phase, with contrast in the ureters"),),
    outputs=(_mask("ureters, on the image's grid"),),
    parameters=SegmentParameters,
    constraints=("Only the delayed (D) phase: without contrast in the ureters nothing reliable is found.",),
)
TUMOR = Component(
    id="inference/tumor",
    version=VERSION,
    uses_models=True,
    title="Kidney tumor and cyst",
    description="Segments kidneys, tumors and cysts from the arterial or portal phase.",
    deployment="nnunet",
    inputs=(_image("image", "any", "CT in the arterial or portal phase"),),
    outputs=(_mask("kidney, tumor and cyst, on the image's grid"),),
    parameters=SegmentParameters,
    constraints=("Contrast-enhanced CT; without contrast a tumor cannot be told from the kidney.",),
)

COMPONENTS = (TOTALSEG, VESSEL, URETER, TUMOR)

#: Structures that a description names; the others are counted.
_NAMED = 8


def component_of(model: Model) -> Component:
    """Declare the component of a model that serves none of the above."""
    manifest = model.manifest
    found = [label_of(number, manifest.names).title for number in manifest.labels]
    more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    spacing = " × ".join(f"{s:g}" for s in manifest.spacing_mm)
    modalities = sorted({entry.modality for entry in manifest.inputs})
    return Component(
        id=manifest.task,
        version=VERSION,
        uses_models=True,
        title=manifest.title,
        description=f"Segments {', '.join(found[:_NAMED])}{more} with the installed model {manifest.id}.",
        deployment="nnunet",
        inputs=tuple(
            Port(name=entry.name, kind="image", modality=entry.modality, phase=entry.phase, description=entry.modality)
            for entry in manifest.inputs
        ),
        outputs=(_mask(f"what was found, on {manifest.inputs[0].name}'s grid"),),
        parameters=SegmentParameters,
        constraints=(f"{' and '.join(modalities)} only.", f"It is worked on at {spacing} mm (z × y × x)."),
    )
