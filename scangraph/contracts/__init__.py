"""What crosses a process boundary: numpy, pydantic and nothing else of ours or of others."""

from scangraph.contracts.components import WAITING, Component, NoParameters, Port, Progress, StepSummary
from scangraph.contracts.images import Image2D, ImageFile, ImageFormat
from scangraph.contracts.labels import (
    FREE_NUMBERS,
    SCHEMES,
    Label,
    check_labels,
    free_number,
    label_number,
    label_of,
    label_table,
    lookup_table,
    plain_name,
)
from scangraph.contracts.scenes import SCREEN_TRIANGLES, Frame, GlbUnit, Line, Scene, SceneFiles, SceneFormat, Surface
from scangraph.contracts.volumes import LabelMap, Volume, merge_label_maps

__all__ = [
    "FREE_NUMBERS",
    "SCHEMES",
    "SCREEN_TRIANGLES",
    "WAITING",
    "Component",
    "Frame",
    "GlbUnit",
    "Image2D",
    "ImageFile",
    "ImageFormat",
    "Label",
    "LabelMap",
    "Line",
    "NoParameters",
    "Port",
    "Progress",
    "Scene",
    "SceneFiles",
    "SceneFormat",
    "StepSummary",
    "Surface",
    "Volume",
    "check_labels",
    "free_number",
    "label_number",
    "label_of",
    "label_table",
    "lookup_table",
    "merge_label_maps",
    "plain_name",
]
