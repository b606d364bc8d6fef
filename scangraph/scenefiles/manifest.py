"""What a scene's files are, for programs: `<stem>.manifest.json` beside them."""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

import scangraph
from scangraph.contracts import Frame, Scene
from scangraph.contracts.labels import Laterality
from scangraph.scenefiles.glb import axes_in_words
from scangraph.scenefiles.structures import NOTICE, Structure, notes_of, one_line

#: Grows when a reader of the last one would misread the next.
FORMAT_VERSION = 1
_AXES = {
    "LPS": "x leads to the patient's left, y to the back, z to the head (LPS, as in DICOM, ITK and 3D Slicer)",
    "RAS": "x leads to the patient's right, y to the front, z to the head (RAS, as in NIfTI)",
}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ManifestFile(_Strict):
    """A file of the scene."""

    name: str = Field(description="in the same folder or archive")
    kind: str = Field(description="obj, mtl, glb, stl or ply")
    media_type: str
    unit: str | None = Field(description="of the coordinates as a viewer shows them, mm or m; null where there are none")
    level: int | None = Field(description="level of detail, 0 is the finest; null for what serves all")
    structures: list[str] = Field(description="objects in it, in their order")
    size: int = Field(description="bytes")
    sha256: str


class ManifestStructure(_Strict):
    """A structure at one level of detail."""

    object: str = Field(description="what it is called in the files")
    label: int = Field(description="its number in masks")
    name: str = Field(description="as in the label table, or as its model calls it")
    title: str
    laterality: Laterality | None
    snomed_code: str | None = Field(description="SNOMED CT concept; null where the label table lacks the structure")
    color: tuple[int, int, int] = Field(description="sRGB, 0-255")
    level: int
    vertices: int
    triangles: int
    measures: dict[str, Any] = Field(
        description="as far as they were taken: voxel_volume_ml and mesh_volume_ml; area_cm2; box_mm, lowest and highest "
        "corner in the scene's frame; watertight; genus; components; distance_mm to the mask's boundary (mean, p95, max); "
        "distance_from_mask_mm, from there to the surface, which sees what it has lost; touches_edge of the scan; warnings"
    )


class SceneManifest(_Strict):
    """A scene and its files."""

    format_version: int = FORMAT_VERSION
    notice: str = NOTICE
    generator: str = "scangraph"
    generator_version: str = Field(default_factory=lambda: scangraph.__version__)
    frame: Frame
    unit: str = Field("mm", description="of everything here, and of every file that does not say another one")
    coordinates: str = Field(description="the convention in words")
    glb_coordinates: str | None = Field(description="what differs in GLB files, and the way back; null where there are none")
    archive: str | None = Field(description="the .zip that holds the files, if one does")
    notes: list[str]
    facts: dict[str, Any] = Field(description="about the whole scene: the source's grid, parameters")
    files: list[ManifestFile]
    structures: list[ManifestStructure]

    def to_bytes(self) -> bytes:
        """Return strict JSON; equal manifests give equal bytes."""
        text = json.dumps(self.model_dump(mode="json"), indent=1, ensure_ascii=False, allow_nan=False)
        return f"{text}\n".encode("utf-8", "replace")


def make_manifest(scene: Scene, structures: list[Structure], files: list[ManifestFile], archive: str | None) -> SceneManifest:
    """Describe a scene and the files that were made of it."""
    unit = scene.files.glb_unit
    return SceneManifest(
        frame=scene.frame,
        coordinates=f"The scanner's world in millimetres, right-handed: {_AXES[scene.frame]}. RAS is LPS with x and y negated.",
        glb_coordinates=axes_in_words(scene, unit) if "glb" in scene.files.formats else None,
        archive=archive,
        notes=notes_of(scene),
        facts=dict(scene.facts),
        files=files,
        structures=[_describe(structure) for structure in structures],
    )


def _describe(structure: Structure) -> ManifestStructure:
    surface, label = structure.surface, structure.label
    return ManifestStructure(
        object=structure.key,
        label=surface.label,
        name=one_line(label.name),
        title=one_line(label.title),
        laterality=label.laterality,
        snomed_code=label.snomed_code or None,
        color=surface.color,
        level=surface.level,
        vertices=len(surface.vertices_mm),
        triangles=len(surface.faces),
        measures=dict(surface.measures),
    )
