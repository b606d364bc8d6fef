"""The mask stage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deployments.postprocess.components import MERGE, MergeParameters
from scangraph.contracts import merge_label_maps
from scangraph.stage import Report, Stage, StepOutput


class Postprocess(Stage):
    """Masks to masks."""

    def __init__(self) -> None:
        super().__init__({MERGE: _merge})


def _merge(inputs: Mapping[str, Any], parameters: MergeParameters, report: Report) -> StepOutput:
    masks = inputs["masks"]
    report(0, len(masks), "merging")
    merged = merge_label_maps(masks, only=parameters.structures)
    grids = sum(not mask.same_grid(masks[0]) for mask in masks)
    warnings = (f"{grids} of {len(masks)} masks lay on another grid than the first.",) if grids else ()
    volumes = {str(number): round(ml, 3) for number, ml in merged.volumes_ml().items()}
    names = {str(number): name for number, name in merged.names.items()}
    return StepOutput((merged,), warnings, {"volumes_ml": volumes, **({"names": names} if names else {})})
