"""Which files a scene becomes, and how each is written."""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from scangraph.contracts import Line, Scene, SceneFormat
from scangraph.scenefiles.glb import write_glb
from scangraph.scenefiles.manifest import ManifestFile, make_manifest
from scangraph.scenefiles.obj import write_mtl, write_obj
from scangraph.scenefiles.ply import write_ply
from scangraph.scenefiles.stl import write_stl
from scangraph.scenefiles.structures import Sink, Structure, lines_of, structures_of

MANIFEST_ENDING = ".manifest.json"
#: PLY has no registered type.
_MEDIA_TYPES = {
    "obj": "model/obj",
    "mtl": "model/mtl",
    "glb": "model/gltf-binary",
    "stl": "model/stl",
    "ply": "model/ply",
    "zip": "application/zip",
    "json": "application/json",
}
#: zlib's fastest: OBJ shrinks to a third, the binary formats to three fifths.
_ZIP_LEVEL = 1
#: From here on an entry may have more than 2 GiB, which must be said before it is written.
_LARGE_TRIANGLES = 10_000_000


class _Measured:
    """Counts and hashes what is written, and passes it on."""

    def __init__(self, out: Sink | None) -> None:
        self._out, self.size, self.hash = out, 0, hashlib.sha256()

    def write(self, data: bytes | memoryview, /) -> None:
        self.size += memoryview(data).nbytes
        self.hash.update(data)
        if self._out is not None:
            self._out.write(data)


@dataclass
class SceneFile:
    """A file that a scene becomes.

    Parameters
    ----------
    name : str
        Its own; the files of a scene lie beside each other.
    kind : str
        obj, mtl, glb, stl, ply, zip or json.
    unit : "mm", "m" or None
        Of the coordinates in it, as a viewer shows them.
    level : int or None
        Level of detail; None for what serves all.
    structures : sequence of Structure
        What is in it.
    """

    name: str
    kind: str
    unit: str | None
    level: int | None
    structures: Sequence[Structure] = field(repr=False)
    _write: Callable[[Any], None] = field(repr=False)
    _known: tuple[int, str] | None = field(default=None, repr=False)

    @property
    def media_type(self) -> str:
        """As HTTP names it."""
        return _MEDIA_TYPES[self.kind]

    def write(self, out: BinaryIO) -> None:
        """Write it, block by block; a .zip wants a file that can seek."""
        if self.kind == "zip":
            self._write(out)
        else:
            self._note(out)

    def measure(self) -> tuple[int, str]:
        """Return its size and SHA-256; what was not written yet is written into nothing. A .zip has none of its own."""
        return self._known or self._note(None)

    def _note(self, out: Sink | None) -> tuple[int, str]:
        measured = _Measured(out)
        self._write(measured)
        self._known = measured.size, measured.hash.hexdigest()
        return self._known


def scene_files(scene: Scene, stem: str) -> list[SceneFile]:
    """Plan the files of a scene, as its `files` wish.

    Parameters
    ----------
    scene : Scene
        Surfaces in mm; equal scenes give equal bytes.
    stem : str
        What all names begin with: `<stem>.obj`, `<stem>.kidney_left.obj`, `<stem>_lod1.obj`, `<stem>.manifest.json`.

    Returns
    -------
    list of SceneFile
        The main file first, the manifest last. Write them in this order: the manifest says what was written.

    Raises
    ------
    ValueError
        If a vertex is not finite or absurdly far away, or a triangle has a corner that is no vertex.
    """
    levels = structures_of(scene)
    everything = [structure for structures in levels.values() for structure in structures]
    lines = lines_of(scene, everything)
    files: list[SceneFile] = []
    for kind in scene.files.formats:
        unit = scene.files.glb_unit if kind == "glb" else "mm"
        for level, structures in levels.items():
            name = f"{stem}_lod{level}" if level else stem
            parts = {name: structures}
            if scene.files.per_structure and structures:
                parts = {f"{name}.{structure.file_key}": [structure] for structure in structures}
            if scene.files.per_structure and lines and kind == "obj" and level == 0:
                parts[f"{stem}.centrelines"] = []
            for part, some in parts.items():
                # Only OBJ has lines; they lie beside the finest surfaces, or by themselves.
                own = lines if part in {stem, f"{stem}.centrelines"} else []
                write = _writer(kind, scene, some, f"{stem}.mtl", own)
                files.append(SceneFile(f"{part}.{kind}", kind, unit, level, some, write))
        if kind == "obj":
            write = partial(write_mtl, structures=everything, lines=lines)
            files.append(SceneFile(f"{stem}.mtl", "mtl", None, None, everything, write))
    archive = f"{stem}.zip" if scene.files.zipped else None
    described = tuple(files)

    def write_manifest(out: Sink) -> None:
        entries = [_describe(file) for file in described]
        out.write(make_manifest(scene, everything, entries, archive).to_bytes())

    files.append(SceneFile(f"{stem}{MANIFEST_ENDING}", "json", None, None, everything, write_manifest))
    if archive is None:
        return files
    large = sum(len(structure.surface.faces) for structure in everything) > _LARGE_TRIANGLES
    pack = partial(_write_zip, files=files, large=large)
    return [SceneFile(archive, "zip", None, None, everything, pack), files[-1]]


def _describe(file: SceneFile) -> ManifestFile:
    size, digest = file.measure()
    return ManifestFile(
        name=file.name,
        kind=file.kind,
        media_type=file.media_type,
        unit=file.unit,
        level=file.level,
        structures=list(dict.fromkeys(structure.key for structure in file.structures)),
        size=size,
        sha256=digest,
    )


def write_scene(scene: Scene, stem: str) -> dict[str, bytes]:
    """Return the files of a scene, name -> bytes, in the order of `scene_files`, which says more."""
    written = {}
    for file in scene_files(scene, stem):
        out = io.BytesIO()
        file.write(out)
        written[file.name] = out.getvalue()
    return written


def save_scene(scene: Scene, folder: Path | str, stem: str = "scene") -> list[Path]:
    """Write the files of a scene into a folder, in place of files of the same names; return their paths, the main one first."""
    paths = []
    for file in scene_files(scene, stem):
        path = Path(folder) / file.name
        with path.open("wb") as out:
            file.write(out)
        paths.append(path)
    return paths


def _writer(
    format_name: SceneFormat, scene: Scene, some: Sequence[Structure], mtl_name: str, lines: Sequence[tuple[str, Line]]
) -> Callable[[Sink], None]:
    if format_name == "obj":
        return partial(write_obj, scene=scene, structures=some, mtl_name=mtl_name, lines=lines)
    if format_name == "glb":
        return partial(write_glb, scene=scene, structures=some, unit=scene.files.glb_unit)
    return partial(write_stl if format_name == "stl" else write_ply, scene=scene, structures=some)


def _write_zip(out: BinaryIO, files: Sequence[SceneFile], large: bool) -> None:
    # Entries get no time of their own (1980, the oldest that a .zip can say): equal scenes give equal bytes.
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=_ZIP_LEVEL) as archive:
        for file in files:
            with archive.open(file.name, "w", force_zip64=large) as inside:
                file.write(inside)  # type: ignore[arg-type]
