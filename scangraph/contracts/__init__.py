"""What crosses a process boundary: numpy, pydantic and nothing else of ours or of others."""

from scangraph.contracts.components import WAITING, Component, NoParameters, Port, Progress, StepSummary
from scangraph.contracts.labels import SCHEMES, Label, check_labels, label_number, label_table, lookup_table
from scangraph.contracts.scenes import Frame, Scene, Surface
from scangraph.contracts.volumes import LabelMap, Volume, merge_label_maps

__all__ = [
    "SCHEMES",
    "WAITING",
    "Component",
    "Frame",
    "Label",
    "LabelMap",
    "NoParameters",
    "Port",
    "Progress",
    "Scene",
    "StepSummary",
    "Surface",
    "Volume",
    "check_labels",
    "label_number",
    "label_table",
    "lookup_table",
    "merge_label_maps",
]
