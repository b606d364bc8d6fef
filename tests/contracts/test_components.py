"""What a component says about itself."""

from __future__ import annotations

import json

import pytest
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from scangraph.contracts import Component, NoParameters, Port


class Dilate(BaseModel):
    """Parameters to describe."""

    model_config = ConfigDict(extra="forbid")

    radius_mm: float = Field(1.5, gt=0, description="how far")


COMPONENT = Component(
    id="postprocess/dilate",
    version="1.2.0",
    title="Dilate",
    description="Grows a mask.",
    deployment="postprocess",
    inputs=(
        Port(name="image_A", kind="image", modality="CT", phase="arterial"),
        Port(name="masks", kind="mask", many=True, optional=True),
    ),
    outputs=(Port(name="scene", kind="scene"),),
    parameters=Dilate,
    constraints=("Masks only.",),
)


@pytest.mark.parametrize(
    ("port", "path_name"),
    [
        (Port(name="image", kind="image"), "image_path"),
        (Port(name="image_A", kind="image"), "image_A_path"),
        (Port(name="mask", kind="mask"), "mask_path"),
        (Port(name="masks", kind="mask", many=True), "mask_paths"),
        (Port(name="scene", kind="scene"), "obj_path"),
        (Port(name="scenes", kind="scene", many=True), "obj_paths"),
        (Port(name="preview", kind="image2d"), "preview_path"),
    ],
)
def test_path_names(port: Port, path_name: str) -> None:
    assert port.path_name == path_name


def test_description_is_json_and_complete() -> None:
    described = COMPONENT.describe()
    assert json.loads(json.dumps(described)) == described
    assert described.keys() == Component.model_fields.keys()
    assert {name: described[name] for name in ("id", "version", "title", "deployment", "constraints")} == {
        "id": "postprocess/dilate",
        "version": "1.2.0",
        "title": "Dilate",
        "deployment": "postprocess",
        "constraints": ["Masks only."],
    }


def test_description_of_ports() -> None:
    described = COMPONENT.describe()
    assert [port["path_name"] for port in described["inputs"]] == ["image_A_path", "mask_paths"]
    assert [port["path_name"] for port in described["outputs"]] == ["obj_path"]
    first = described["inputs"][0]
    assert (first["kind"], first["modality"], first["phase"], first["optional"]) == ("image", "CT", "arterial", False)


def test_description_of_parameters_is_a_json_schema() -> None:
    schema = COMPONENT.describe()["parameters"]
    assert schema["properties"]["radius_mm"] == {
        "default": 1.5,
        "description": "how far",
        "exclusiveMinimum": 0,
        "title": "Radius Mm",
        "type": "number",
    }
    assert schema["additionalProperties"] is False


def test_components_without_parameters_refuse_them() -> None:
    plain = COMPONENT.model_copy(update={"parameters": NoParameters})
    assert plain.describe()["parameters"]["properties"] == {}
    with pytest.raises(ValidationError):
        NoParameters.model_validate({"radius_mm": 1})


def test_declarations_cannot_change() -> None:
    with pytest.raises(ValidationError):
        COMPONENT.version = "2"  # type: ignore[misc]
    with pytest.raises(ValidationError):
        COMPONENT.inputs[0].optional = True  # type: ignore[misc]


def test_unknown_kinds_and_phases_are_refused() -> None:
    with pytest.raises(ValidationError):
        Port.model_validate({"name": "x", "kind": "video"})
    with pytest.raises(ValidationError):
        Port.model_validate({"name": "x", "kind": "image", "phase": "late"})
