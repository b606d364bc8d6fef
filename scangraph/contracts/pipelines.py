"""What a pipeline is, and when it is one: a graph of steps whose ports fit."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, field_validator

from scangraph.contracts.components import Component, Phase, Port, PortKind

#: Names of steps, inputs and outputs; a dot separates a step from its port, so there is none in them.
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z][A-Za-z0-9_-]{0,62}$")]
Slug = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9-]{0,62}$")]
#: `input.<name>` or `<step>.<port>`.
Source = Annotated[str, StringConstraints(pattern=r"^[A-Za-z][A-Za-z0-9_-]{0,62}\.[A-Za-z][A-Za-z0-9_-]{0,62}$")]
#: What a pipeline's own inputs are called in a source.
INPUT = "input"


class PipelineInput(BaseModel):
    """A named input of a pipeline."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: PortKind
    description: str = Field("", max_length=1000)
    phase: Phase = "any"
    many: bool = False
    optional: bool = Field(False, description="may be left out; so may the ports that it feeds, which must be optional too")


class PipelineStep(BaseModel):
    """One component, and where its inputs come from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: Name
    component: str = Field(max_length=128, description="id of a component, e.g. `inference/totalseg`")
    inputs: dict[Name, Source | list[Source]] = Field(description="by port: `input.<name>`, `<step>.<port>`, or a list of them")
    parameters: dict[str, Any] = Field(default_factory=dict)
    timeout_seconds: float | None = Field(None, gt=0, le=86400, description="longest time of this step; unset: the service's")
    attempts: int | None = Field(None, ge=1, le=10, description="tries after transient failures; unset: the service's")


class PipelineSpec(BaseModel):
    """A pipeline: named inputs, steps, named outputs."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        json_schema_extra={
            "examples": [
                {
                    "name": "organs-smooth",
                    "title": "Organs, smoothed",
                    "inputs": {"image": {"kind": "image"}},
                    "steps": [
                        {"id": "organs", "component": "inference/totalseg", "inputs": {"image": "input.image"}},
                        {"id": "scene", "component": "smoothing/base", "inputs": {"mask": "organs.mask"}},
                    ],
                    "outputs": {"mask": "organs.mask", "scene": "scene.scene"},
                }
            ]
        },
    )

    name: Slug = Field(description="unique; may be used wherever the id may")
    title: str = Field("", max_length=200)
    description: str = Field("", max_length=4000)
    inputs: dict[Name, PipelineInput] = Field(min_length=1, max_length=32)
    steps: tuple[PipelineStep, ...] = Field(min_length=1, max_length=64)
    outputs: dict[Name, Source] = Field(min_length=1, max_length=64, description="by name: `<step>.<port>`")

    @field_validator("name")
    @classmethod
    def _no_id(cls, name: str) -> str:
        """Refuse a name that looks like an id: it could be another pipeline's, and both are looked for in one place."""
        if re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", name):
            raise ValueError("a name may not look like an id")
        return name

    def step(self, step_id: str) -> PipelineStep:
        """Return a step by its id."""
        return next(step for step in self.steps if step.id == step_id)


def sources(step: PipelineStep) -> Iterator[tuple[str, str, str]]:
    """Yield (port, step or `input`, port or input name) of everything a step takes."""
    for port, given in step.inputs.items():
        for source in [given] if isinstance(given, str) else given:
            origin, _, name = source.partition(".")
            yield port, origin, name


def needs(spec: PipelineSpec) -> dict[str, set[str]]:
    """Return step id -> ids of the steps whose outputs it takes."""
    return {step.id: {origin for _, origin, _ in sources(step) if origin != INPUT} for step in spec.steps}


def check_pipeline(spec: PipelineSpec, components: Mapping[str, Component]) -> list[dict[str, str]]:
    """Find everything that is wrong with a pipeline.

    Parameters
    ----------
    spec : PipelineSpec
        Well-formed; whether it makes sense is what is asked here.
    components : mapping
        What can be run, by id.

    Returns
    -------
    list of dict
        `pointer` (RFC 6901, into the specification) and `detail` of each fault, in the pipeline's order; empty if it is right.
    """
    faults: list[dict[str, str]] = []

    def fault(pointer: str, detail: str) -> None:
        faults.append({"pointer": pointer, "detail": detail})

    numbers: dict[str, int] = {}
    for number, step in enumerate(spec.steps):
        if step.id in numbers:
            fault(f"/steps/{number}/id", f"step {step.id!r} is there twice")
        elif step.id == INPUT:
            fault(f"/steps/{number}/id", f"no step may be called {INPUT!r}: that is what the pipeline's own inputs are called")
        numbers.setdefault(step.id, number)
    produced = _produced(spec, components)
    for number, step in enumerate(spec.steps):
        component = components.get(step.component)
        if component is None:
            known = ", ".join(components)
            fault(
                f"/steps/{number}/component", f"step {step.id!r}: there is no component {step.component!r}; there are {known}"
            )
            continue
        for pointer, detail in _check_step(step, component, spec, produced, numbers):
            fault(f"/steps/{number}{pointer}", f"step {step.id!r}: {detail}")
    for name, source in spec.outputs.items():
        origin, _, port = source.partition(".")
        if origin not in numbers:
            fault(f"/outputs/{name}", f"output {name!r}: there is no step {origin!r}")
        elif source not in produced and spec.step(origin).component in components:
            fault(f"/outputs/{name}", f"output {name!r}: step {origin!r} has no output {port!r}")
    try:
        TopologicalSorter({k: v & numbers.keys() for k, v in needs(spec).items()}).prepare()
    except CycleError as error:
        circle = error.args[1]
        fault(f"/steps/{numbers[circle[0]]}/inputs", f"the steps wait for each other: {' → '.join(reversed(circle))}")
    return faults


def _produced(spec: PipelineSpec, components: Mapping[str, Component]) -> dict[str, Port]:
    """Return source -> port, of everything that a step may take."""
    made = {
        f"{INPUT}.{name}": Port(name=name, kind=given.kind, phase=given.phase, many=given.many, optional=given.optional)
        for name, given in spec.inputs.items()
    }
    for step in spec.steps:
        if step.component in components:
            made.update({f"{step.id}.{port.name}": port for port in components[step.component].outputs})
    return made


def _check_step(
    step: PipelineStep, component: Component, spec: PipelineSpec, produced: Mapping[str, Port], steps: Mapping[str, int]
) -> Iterator[tuple[str, str]]:
    ports = {port.name: port for port in component.inputs}
    for name, port in ports.items():
        if name not in step.inputs and not port.optional:
            yield "/inputs", f"{component.id} needs an input {name!r} ({port.kind})"
    for name, given in step.inputs.items():
        pointer = f"/inputs/{name}"
        if name not in ports:
            yield pointer, f"{component.id} has no input {name!r}; it has {', '.join(ports)}"
            continue
        port = ports[name]
        listed = [given] if isinstance(given, str) else given
        if not listed:
            yield pointer, f"input {name!r} is an empty list"
        if not port.many and not isinstance(given, str):
            yield pointer, f"input {name!r} takes one value, not a list"
        for source in listed:
            origin, _, what = source.partition(".")
            if source not in produced:
                if origin == INPUT:
                    yield pointer, f"the pipeline has no input {what!r}; it has {', '.join(spec.inputs)}"
                elif origin not in steps:
                    yield pointer, f"there is no step {origin!r}"
                elif any(made.startswith(f"{origin}.") for made in produced):  # else its component is unknown, said there
                    yield pointer, f"step {origin!r} has no output {what!r}"
                continue
            made = produced[source]
            if made.kind != port.kind:
                yield pointer, f"input {name!r} takes a {port.kind}, {source} is a {made.kind}"
            elif "any" not in {made.phase, port.phase} and made.phase != port.phase:
                yield pointer, f"input {name!r} takes the {port.phase} phase, {source} is {made.phase}"
            if made.many and not port.many:
                yield pointer, f"input {name!r} takes one value, {source} is a list"
            if made.optional and not port.optional:
                yield pointer, f"input {name!r} is needed, but {source} may be left out"
    yield from ((f"/parameters/{name}", detail) for name, detail in check_step_parameters(component, step.parameters))


def check_step_parameters(component: Component, parameters: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return (pointer below the parameters, what is wrong), of each parameter that does not fit."""
    try:
        component.parameters.model_validate(dict(parameters))
    except ValidationError as error:
        return [("/".join(map(str, e["loc"])), e["msg"]) for e in error.errors()]
    return []


def assign_parameters(
    spec: PipelineSpec, components: Mapping[str, Component], given: Mapping[str, Any]
) -> tuple[dict[str, dict[str, Any]], list[dict[str, str]]]:
    """Give an execution's parameters to the steps.

    Parameters
    ----------
    given : mapping
        `{"steps": {id: {name: value}}}`, and flat names as aliases: a parameter's own where exactly one step has it, or
        `<step>_<parameter>`, as in `resize_width`.

    Returns
    -------
    parameters : dict
        Step id -> the pipeline's parameters with the given ones over them.
    faults : list of dict
        `pointer` (into `parameters`' parent) and `detail`.
    """
    faults: list[dict[str, str]] = []
    per_step = {step.id: dict(step.parameters) for step in spec.steps}
    takes = {step.id: set(components[step.component].parameters.model_fields) for step in spec.steps}
    pointers: dict[tuple[str, str], str] = {}
    for name, value in given.items():
        if name == "steps":
            continue
        owners = [(id_, own) for id_, names in takes.items() for own in names if name in {own, f"{id_}_{own}"}]
        if len(owners) == 1:
            owner, own = owners[0]
            per_step[owner][own] = value
            pointers[owner, own] = f"/parameters/{name}"
        else:
            several = ", ".join(id_ for id_, _ in owners)
            why = f"the steps {several} have it: say which, under `steps`" if owners else "no step has such a parameter"
            faults.append({"pointer": f"/parameters/{name}", "detail": f"{name}: {why}"})
    explicit = given.get("steps", {})
    if not isinstance(explicit, Mapping):
        faults.append({"pointer": "/parameters/steps", "detail": "must be an object: step id -> parameters"})
        explicit = {}
    for step, values in explicit.items():
        if step not in per_step or not isinstance(values, Mapping):
            detail = (
                f"there is no step {step!r}; there are {', '.join(per_step)}" if step not in per_step else "must be an object"
            )
            faults.append({"pointer": f"/parameters/steps/{step}", "detail": detail})
            continue
        per_step[step].update(values)
    for step in spec.steps:
        for name, detail in check_step_parameters(components[step.component], per_step[step.id]):
            pointer = pointers.get((step.id, name), f"/parameters/steps/{step.id}/{name}")
            faults.append({"pointer": pointer, "detail": f"step {step.id!r}: {detail}"})
    return per_step, faults


#: What the masks of several models name twice: the kidneys by side come from the organs, aorta and vena cava from the vessels.
_NAMED_TWICE = frozenset({"kidney", "aorta", "inferior_vena_cava"})


def built_in_pipelines(components: Sequence[Component], labels: Mapping[int, str]) -> list[PipelineSpec]:
    """Return the pipelines that are there from the start.

    Parameters
    ----------
    components : sequence of Component
        What can be run: each that reads nothing but files gets a pipeline of one step, named after it.
    labels : mapping
        Number -> name of the label table.
    """
    specs = [one_step_pipeline(c) for c in components if c.reads_files]
    known = {component.id: component for component in components}
    once = sorted(number for number, name in labels.items() if name not in _NAMED_TWICE)
    scene = {"id": "scene", "component": "smoothing/base"}
    written = [
        {
            "name": "organs",
            "title": "Organs",
            "description": "The organs of a CT, as a mask and as a scene.",
            "inputs": {"image": {"kind": "image", "description": "CT of any contrast phase"}},
            "steps": [
                {"id": "organs", "component": "inference/totalseg", "inputs": {"image": "input.image"}},
                {**scene, "inputs": {"mask": "organs.mask"}},
            ],
            "outputs": {"mask": "organs.mask", "scene": "scene.scene"},
        },
        {
            "name": "renal-planning",
            "title": "Planning of a kidney operation",
            "description": "Organs, vessels, ureters and tumor from the contrast phases in one mask, vessels and ureters "
            "repaired, the fat around the kidneys marked; and a scene.",
            "inputs": {
                "arterial": {"kind": "image", "phase": "arterial", "description": "CT in the arterial phase"},
                "portal": {"kind": "image", "phase": "portal", "description": "CT in the portal venous phase"},
                "delayed": {"kind": "image", "phase": "delayed", "description": "CT in the delayed (excretory) phase"},
            },
            "steps": [
                {"id": "organs", "component": "inference/totalseg", "inputs": {"image": "input.portal"}},
                {
                    "id": "vessels",
                    "component": "inference/vessel",
                    "inputs": {"image_A": "input.arterial", "image_P": "input.portal"},
                },
                {"id": "ureters", "component": "inference/ureter", "inputs": {"image_D": "input.delayed"}},
                {"id": "tumor", "component": "inference/tumor", "inputs": {"image": "input.portal"}},
                {
                    "id": "merged",
                    "component": "postprocess/merge",
                    "inputs": {"masks": ["organs.mask", "vessels.mask", "ureters.mask", "tumor.mask"]},
                    "parameters": {"structures": once},
                },
                {
                    "id": "vessel-repair",
                    "component": "postprocess/vessel",
                    "inputs": {"mask": "merged.mask"},
                    "parameters": {"vessels": "all", "skip_missing": True},
                },
                {
                    "id": "ureter-repair",
                    "component": "postprocess/ureter",
                    "inputs": {"mask": "vessel-repair.mask"},
                    "parameters": {"skip_missing": True},
                },
                {
                    "id": "fat",
                    "component": "postprocess/fat",
                    "inputs": {"masks": ["ureter-repair.mask"], "image": "input.portal"},
                    "parameters": {"skip_missing": True},
                },
                {**scene, "inputs": {"mask": "fat.mask"}},
                {
                    "id": "preview",
                    "component": "smoothing/preview",
                    "inputs": {"image": "input.portal", "mask": "fat.mask", "scene": "scene.scene"},
                },
            ],
            "outputs": {
                "organs": "organs.mask",
                "vessels": "vessels.mask",
                "ureters": "ureters.mask",
                "tumor": "tumor.mask",
                "merged": "merged.mask",
                "mask": "fat.mask",
                "scene": "scene.scene",
                "preview": "preview.picture",
            },
        },
        {
            "name": "resize-ai-detect",
            "title": "Resize, detect, convert",
            "description": "Makes a 2-D image smaller, finds objects in it, draws them and writes it in another format. "
            "Parameters: resize_width, ai_model, output_format.",
            "inputs": {"image": {"kind": "image2d", "description": "JPEG, PNG, TIFF or WebP"}},
            "steps": [
                {
                    "id": "resize",
                    "component": "image/resize",
                    "inputs": {"image": "input.image"},
                    "parameters": {"width": 1280, "enlarge": False},
                },
                {"id": "ai", "component": "image/detect", "inputs": {"image": "resize.image"}},
                {
                    "id": "output",
                    "component": "image/convert",
                    "inputs": {"image": "ai.image"},
                    "parameters": {"format": "jpeg"},
                },
            ],
            "outputs": {"image": "output.image", "boxes": "ai.boxes"},
        },
    ]
    for entry in written:
        spec = PipelineSpec.model_validate(entry)
        if all(step.component in known for step in spec.steps):
            specs.append(spec)
    return specs


def one_step_pipeline(component: Component) -> PipelineSpec:
    """Return the pipeline of a component's own endpoint."""
    ports = component.inputs
    return PipelineSpec.model_validate(
        {
            "name": pipeline_name(component.id),
            "title": component.title,
            "description": component.description,
            "inputs": {p.name: p.model_dump(include={"kind", "description", "phase", "many", "optional"}) for p in ports},
            "steps": [{"id": "run", "component": component.id, "inputs": {p.name: f"{INPUT}.{p.name}" for p in ports}}],
            "outputs": {p.name: f"run.{p.name}" for p in component.outputs},
        }
    )


def pipeline_name(component_id: str) -> str:
    """Name of the pipeline behind a component's endpoint: `inference/totalseg` -> `inference-totalseg`."""
    return re.sub(r"[^a-z0-9]+", "-", component_id.lower()).strip("-")
