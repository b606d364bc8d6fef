"""What a pipeline is: known cases, and properties over random graphs."""

from __future__ import annotations

import random
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from deployments.nnunet.components import COMPONENTS as NNUNET
from deployments.postprocess.components import COMPONENTS as POSTPROCESS
from deployments.smoothing.components import COMPONENTS as SMOOTHING
from scangraph.contracts import Component, Port, label_table
from scangraph.contracts.pipelines import (
    PipelineSpec,
    assign_parameters,
    built_in_pipelines,
    check_pipeline,
    needs,
    one_step_pipeline,
    pipeline_name,
)

REAL = (*NNUNET, *POSTPROCESS, *SMOOTHING)


class Knobs(BaseModel):
    """Parameters of the test's components."""

    model_config = ConfigDict(extra="forbid")

    level: int = Field(1, ge=0, le=9)
    sides: tuple[int, ...] = ()


class Others(Knobs):
    """One more."""

    only_here: float = 0.5


def component(id: str, inputs: tuple[Port, ...], outputs: tuple[Port, ...], knobs: type[BaseModel] = Knobs) -> Component:  # noqa: A002
    return Component(
        id=id, version="1", title=id, description="", deployment="t", inputs=inputs, outputs=outputs, parameters=knobs
    )


MASK = (Port(name="mask", kind="mask"),)
PARTS = {
    c.id: c
    for c in (
        component("t/segment", (Port(name="image", kind="image"),), MASK),
        component("t/late", (Port(name="image", kind="image", phase="delayed"),), MASK),
        component("t/repair", (*MASK, Port(name="hint", kind="mask", optional=True)), MASK, Others),
        component("t/merge", (Port(name="masks", kind="mask", many=True),), MASK),
        component("t/scene", MASK, (Port(name="scene", kind="scene"),)),
    )
}


def spec(steps: list[dict[str, Any]], inputs: Any = None, outputs: Any = None) -> PipelineSpec:
    inputs = inputs or {"image": {"kind": "image"}}
    outputs = outputs or {"out": f"{steps[-1]['id']}.mask"}
    return PipelineSpec.model_validate({"name": "p", "inputs": inputs, "steps": steps, "outputs": outputs})


def step(id: str, component: str, **inputs: Any) -> dict[str, Any]:  # noqa: A002
    return {"id": id, "component": f"t/{component}", "inputs": inputs}


SEGMENT = step("a", "segment", image="input.image")


@pytest.mark.parametrize(
    ("steps", "pointers"),
    [
        ([SEGMENT], []),
        ([SEGMENT, step("b", "repair", mask="a.mask")], []),
        ([step("b", "repair", mask="a.mask"), SEGMENT], []),  # the order of writing says nothing
        ([SEGMENT, step("b", "merge", masks=["a.mask", "a.mask"])], []),
        ([SEGMENT, step("b", "merge", masks="a.mask")], []),
        ([SEGMENT, SEGMENT], ["/steps/1/id"]),
        ([step("input", "segment", image="input.image")], ["/steps/0/id"]),
        ([step("a", "none", image="input.image")], ["/steps/0/component"]),
        ([step("a", "segment")], ["/steps/0/inputs"]),
        ([step("a", "segment", image="input.image", more="input.image")], ["/steps/0/inputs/more"]),
        ([step("a", "segment", image=["input.image"])], ["/steps/0/inputs/image"]),
        ([step("a", "segment", image="input.other")], ["/steps/0/inputs/image"]),
        ([step("a", "segment", image="z.mask")], ["/steps/0/inputs/image"]),
        ([SEGMENT, step("b", "repair", mask="a.scene")], ["/steps/1/inputs/mask"]),
        ([SEGMENT, step("b", "repair", mask="input.image")], ["/steps/1/inputs/mask"]),
        ([SEGMENT, step("b", "merge", masks=[])], ["/steps/1/inputs/masks"]),
        ([SEGMENT, step("b", "merge", masks=["a.mask", "input.image"])], ["/steps/1/inputs/masks"]),
        ([step("a", "repair", mask="b.mask"), step("b", "repair", mask="a.mask")], ["/steps/0/inputs"]),
        ([step("a", "repair", mask="a.mask")], ["/steps/0/inputs"]),
        ([{**SEGMENT, "parameters": {"level": 10, "no": 1}}], ["/steps/0/parameters/level", "/steps/0/parameters/no"]),
    ],
)
def test_faults_point_at_what_is_wrong(steps: list[dict[str, Any]], pointers: list[str]) -> None:
    faults = check_pipeline(spec(steps), PARTS)
    assert [fault["pointer"] for fault in faults] == pointers, faults


def test_a_fault_is_told_once() -> None:
    """What follows from an unknown component is no other fault."""
    steps = [step("a", "none", image="input.image"), step("b", "repair", mask="a.mask")]
    assert [f["pointer"] for f in check_pipeline(spec(steps), PARTS)] == ["/steps/0/component"]
    for name, source in (("x", "z.mask"), ("x", "b.nothing")):
        faults = check_pipeline(spec([SEGMENT, steps[1]], outputs={name: source}), PARTS)
        assert [f["pointer"] for f in faults] == ["/outputs/x"]


def test_phases_lists_and_what_may_be_missing() -> None:
    late = [step("a", "late", image="input.image")]
    assert not check_pipeline(spec(late), PARTS)
    assert not check_pipeline(spec(late, {"image": {"kind": "image", "phase": "delayed"}}), PARTS)
    portal = check_pipeline(spec(late, {"image": {"kind": "image", "phase": "portal"}}), PARTS)
    assert [f["pointer"] for f in portal] == ["/steps/0/inputs/image"]
    many = {"masks": {"kind": "mask", "many": True}}
    assert not check_pipeline(spec([step("a", "merge", masks="input.masks")], many), PARTS)
    assert check_pipeline(spec([step("a", "repair", mask="input.masks")], many), PARTS)
    optional = {"mask": {"kind": "mask"}, "hint": {"kind": "mask", "optional": True}}
    assert not check_pipeline(spec([step("a", "repair", mask="input.mask", hint="input.hint")], optional), PARTS)
    assert check_pipeline(spec([step("a", "repair", mask="input.hint", hint="input.mask")], optional), PARTS)


@pytest.mark.parametrize(
    "change",
    [
        {"name": "Capital"}, {"name": "1st"}, {"name": "a_b"}, {"name": ""}, {"name": "a" * 64}, {"name": "a\n"},
        {"name": "c0ffee00-0000-4000-8000-000000000000"},
        {"inputs": {}}, {"steps": []}, {"outputs": {}}, {"more": 1}, {"inputs": {"a.b": {"kind": "image"}}},
        {"outputs": {"out": "a"}}, {"outputs": {"out": "a.b.c"}}, {"outputs": {"out": "a."}},
        {"inputs": {"i": {"kind": "film"}}}, {"steps": [{**SEGMENT, "timeout_seconds": 0}]},
        {"steps": [{**SEGMENT, "attempts": 0}]}, {"steps": [{**SEGMENT, "attempts": 11}]},
        {"steps": [{**SEGMENT, "id": "x"}] * 65},
    ],
)  # fmt: skip
def test_what_is_no_specification(change: dict[str, Any]) -> None:
    right = {"name": "p", "inputs": {"image": {"kind": "image"}}, "steps": [SEGMENT], "outputs": {"out": "a.mask"}}
    PipelineSpec.model_validate(right)
    with pytest.raises(ValidationError):
        PipelineSpec.model_validate({**right, **change})


def random_chain(rng: random.Random) -> list[dict[str, Any]]:
    """Steps that each take what earlier ones made."""
    made = ["a.mask"]
    steps = [SEGMENT]
    for number in range(rng.randrange(1, 12)):
        name = f"s{number}"
        match rng.randrange(3):
            case 0:
                steps.append(step(name, "repair", mask=rng.choice(made), hint=rng.choice(made)))
            case 1:
                steps.append(step(name, "merge", masks=rng.choices(made, k=rng.randrange(1, 4))))
            case _:
                steps.append(step(name, "late", image="input.image"))
        made.append(f"{name}.mask")
    return steps


@pytest.mark.parametrize("seed", range(30))
def test_any_graph_without_a_circle_is_right_in_any_order(seed: int) -> None:
    rng = random.Random(seed)
    steps = random_chain(rng)
    wish = spec(steps)
    rng.shuffle(steps)
    shuffled = spec(steps, outputs=wish.outputs)
    assert not check_pipeline(shuffled, PARTS)
    assert needs(shuffled) == needs(wish)
    assert PipelineSpec.model_validate_json(shuffled.model_dump_json()) == shuffled
    # Closing any circle is found: an ancestor takes what its descendant made.
    waits = needs(shuffled)
    for descendant in waits:
        for ancestor in waits[descendant]:
            closed = [dict(s) for s in steps]
            at = next(s for s in closed if s["id"] == ancestor)
            if at["component"] == "t/repair":
                at["inputs"] = {**at["inputs"], "hint": f"{descendant}.mask"}
                faults = check_pipeline(spec(closed, outputs=wish.outputs), PARTS)
                assert len(faults) == 1
                assert "wait for each other" in faults[0]["detail"]


@pytest.mark.parametrize("seed", range(30))
def test_any_missing_step_is_found(seed: int) -> None:
    rng = random.Random(seed)
    steps = random_chain(rng)
    wish = spec(steps)
    gone = rng.choice([s["id"] for s in steps])
    left = [s for s in steps if s["id"] != gone]
    if not left:
        return
    source = f"{left[-1]['id']}.mask"
    faults = check_pipeline(spec(left, outputs={"out": source}), PARTS)
    orphans = [number for number, s in enumerate(left) if gone in needs(wish)[s["id"]]]
    assert {int(f["pointer"].split("/")[2]) for f in faults} == set(orphans)
    assert bool(faults) == bool(orphans)


def test_parameters_find_their_steps() -> None:
    two = spec([{**SEGMENT, "parameters": {"level": 3}}, step("b", "repair", mask="a.mask")])
    assert assign_parameters(two, PARTS, {}) == ({"a": {"level": 3}, "b": {}}, [])
    assert assign_parameters(two, PARTS, {"only_here": 1.0})[0]["b"] == {"only_here": 1.0}
    given = {"steps": {"a": {"level": 4}}, "only_here": 0.1}
    assert assign_parameters(two, PARTS, given) == ({"a": {"level": 4}, "b": {"only_here": 0.1}}, [])
    assert two.step("a").parameters == {"level": 3}  # the pipeline itself stays as it is
    # A step's name before it says which one, as in `resize_width`.
    assert assign_parameters(two, PARTS, {"a_level": 7})[0]["a"] == {"level": 7}
    _, (fault,) = assign_parameters(two, PARTS, {"a_nothing": 7})
    assert fault["pointer"] == "/parameters/a_nothing"
    # What is said under `steps` is said more exactly than a flat name.
    both = {"only_here": 0.1, "steps": {"b": {"only_here": 0.2}}}
    assert assign_parameters(two, PARTS, both)[0]["b"] == {"only_here": 0.2}


@pytest.mark.parametrize(
    ("given", "pointers"),
    [
        ({"level": 1}, ["/parameters/level"]),  # both have it
        ({"nothing": 1}, ["/parameters/nothing"]),
        ({"only_here": "x"}, ["/parameters/only_here"]),
        ({"steps": {"z": {}}}, ["/parameters/steps/z"]),
        ({"steps": {"a": 1}}, ["/parameters/steps/a"]),
        ({"steps": []}, ["/parameters/steps"]),
        ({"steps": {"a": {"level": 99}}}, ["/parameters/steps/a/level"]),
        ({"steps": {"a": {"sides": [1, "x"]}}}, ["/parameters/steps/a/sides/1"]),
        ({"steps": {"a": {"no": 1}, "b": {"level": -1}}, "more": 0},
         ["/parameters/more", "/parameters/steps/a/no", "/parameters/steps/b/level"]),
    ],
)  # fmt: skip
def test_faults_of_parameters_point_at_them(given: dict[str, Any], pointers: list[str]) -> None:
    two = spec([SEGMENT, step("b", "repair", mask="a.mask")])
    _, faults = assign_parameters(two, PARTS, given)
    assert [fault["pointer"] for fault in faults] == pointers


def test_built_in_pipelines_are_right() -> None:
    labels = {number: label.name for number, label in label_table().items()}
    known = {c.id: c for c in REAL}
    specs = built_in_pipelines(REAL, labels)
    for built_in in specs:
        assert check_pipeline(built_in, known) == []
        assert assign_parameters(built_in, known, {})[1] == []
    names = [built_in.name for built_in in specs]
    assert len(set(names)) == len(names)
    assert {"organs", "renal-planning", "inference-totalseg", "smoothing-base", "postprocess-merge"} <= set(names)
    assert "smoothing-preview" not in names  # takes a scene, which no file is
    plan = next(s for s in specs if s.name == "renal-planning")
    assert needs(plan)["merged"] == {"organs", "vessels", "ureters", "tumor"}
    assert not any(needs(plan)[first] for first in ("organs", "vessels", "ureters", "tumor"))  # they run side by side
    taken = plan.step("merged").parameters["structures"]
    assert {"kidney", "aorta", "inferior_vena_cava"}.isdisjoint(labels[n] for n in taken)


@pytest.mark.parametrize(
    "beside", [{}, {"mask": "input.mask"}, {"image": "input.image"}, {"image": "input.image", "mask": "input.mask"}]
)
def test_any_pipeline_with_a_scene_can_end_with_its_picture(beside: dict[str, str]) -> None:
    written = PipelineSpec.model_validate(
        {
            "name": "pictured",
            "inputs": {"mask": {"kind": "mask"}, "image": {"kind": "image", "optional": True}},
            "steps": [
                {"id": "scene", "component": "smoothing/base", "inputs": {"mask": "input.mask"}},
                {"id": "preview", "component": "smoothing/preview", "inputs": {"scene": "scene.scene", **beside}},
            ],
            "outputs": {"preview": "preview.picture"},
        }
    )
    assert check_pipeline(written, {c.id: c for c in REAL}) == []


def test_pipelines_without_their_components_are_not_offered() -> None:
    names = {s.name for s in built_in_pipelines([c for c in REAL if c.id != "postprocess/merge"], {})}
    assert "renal-planning" not in names
    assert "organs" in names


def test_an_endpoint_is_a_pipeline_of_one_step() -> None:
    for real in REAL:
        made = one_step_pipeline(real)
        assert made.name == pipeline_name(real.id)
        assert check_pipeline(made, {real.id: real}) == []
        assert list(made.inputs) == [p.name for p in real.inputs]
        assert list(made.outputs) == [p.name for p in real.outputs]
        assert [made.inputs[p.name].many for p in real.inputs] == [p.many for p in real.inputs]
