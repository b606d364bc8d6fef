"""What a component declares about itself, and what it says while it runs.

A declaration is all that gateway, executor, command line and page know of a component: its typed ports, its parameters, its
limits, and which deployment runs it. None of them is changed when a component is added.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

PortKind = Literal["image", "mask", "scene", "image2d", "report"]
Phase = Literal["any", "native", "arterial", "portal", "delayed"]

#: What the file of each kind of port is called in requests and answers: `image` -> `image_path`, a scene -> `obj_path`.
_PATH_NAMES: dict[str, str] = {"scene": "obj", "report": "json"}


#: Kinds that a file can be read as; scenes and reports are made.
READABLE = frozenset({"image", "mask", "image2d"})


class NoParameters(BaseModel):
    """A component without parameters."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Port(BaseModel):
    """A typed input or output of a component.

    Parameters
    ----------
    name : str
        `image`, `mask`, …; unique among the component's inputs, or outputs.
    kind : str
        What goes through it; a report is JSON text (bytes).
    phase : str
        For images: the contrast phase that is expected.
    many : bool
        Whether it takes a list.
    also : tuple of str
        Other names of its field in JSON, for clients that write it so.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    kind: PortKind
    description: str = ""
    modality: str | None = None
    phase: Phase = "any"
    many: bool = False
    optional: bool = False
    also: tuple[str, ...] = ()

    @property
    def path_name(self) -> str:
        """Its field in JSON: `image_A` -> `image_A_path`, a scene -> `obj_path`, several `masks` -> `mask_paths`."""
        stem = _PATH_NAMES.get(self.kind, self.name)
        return f"{stem.removesuffix('s')}_paths" if self.many else f"{stem}_path"


class Component(BaseModel):
    """One operation of the graph.

    Parameters
    ----------
    id : str
        `<family>/<name>`, as in its URL.
    deployment : str
        Name of the Serve deployment that runs it; equal to the stage's folder and environment.
    parameters : type of BaseModel
        Validates and documents the parameters.
    uses_models : bool
        Whether a model decides the result, too: its stage is asked which one before each run.
    constraints : tuple of str
        Its limits in plain words, shown wherever it is described.
    """

    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True)

    id: str
    version: str
    title: str
    description: str
    deployment: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    parameters: type[BaseModel] = NoParameters
    uses_models: bool = False
    constraints: tuple[str, ...] = ()

    @property
    def reads_files(self) -> bool:
        """Whether all that it takes can be read from files, so that it has an endpoint and a pipeline of its own."""
        return all(port.kind in READABLE for port in self.inputs)

    def describe(self) -> dict[str, Any]:
        """Return the declaration as plain JSON values, the parameters as a JSON Schema."""
        described = self.model_dump(mode="json", exclude={"parameters"})
        for direction in ("inputs", "outputs"):
            for port, entry in zip(getattr(self, direction), described[direction], strict=True):
                entry["path_name"] = port.path_name
        described["parameters"] = self.parameters.model_json_schema()
        return described


#: The message of a step that is in its stage's queue.
WAITING = "waiting"


@dataclass(frozen=True)
class Progress:
    """How far a step is: `done` of `total` units (tiles, structures), 0 of 0 where nothing can be counted.

    Parameters
    ----------
    resources : dict, optional
        What the process that works on it uses: `cpu_percent` (100 is one core), `rss_mb`.
    """

    done: int
    total: int
    message: str = ""
    resources: dict[str, float] | None = None


@dataclass(frozen=True)
class StepSummary:
    """What a finished step says about itself; the outputs follow it in the stream, one item a port, in the ports' order.

    Parameters
    ----------
    seconds : float
        Wall time inside the stage.
    peak_mb : float
        Highest resident memory of the stage's process while the step ran.
    warnings : tuple of str
        Limits that the input breaks, and what the user must know about the result.
    facts : dict
        Plain values worth keeping: model id and version, counts.
    """

    seconds: float
    peak_mb: float
    warnings: tuple[str, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)
