"""Files in and out: the only stage that reads and writes them, and the gate that hostile ones meet."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from deployments.imageio.kinds import Kind, kind_of
from deployments.imageio.nifti import Limits, read_nifti, write_nifti
from scangraph.contracts import LabelMap, Scene, Volume
from scangraph.contracts.codec import from_bytes, to_bytes
from scangraph.contracts.errors import (
    AlreadyWritten,
    EmptyFile,
    ImageFileError,
    InvalidIntensity,
    StorageUnavailable,
    UnknownLabels,
    UnsupportedMedia,
)
from scangraph.models import label_names
from scangraph.obj import write_obj
from scangraph.settings import ImageioSettings
from scangraph.storage import open_storage

T = TypeVar("T")

#: Enough to tell every kind of file apart.
_MAGIC_BYTES = 512


class Imageio:
    """The only reader and writer of image files.

    Parameters
    ----------
    storage_url, storage_options
        As `open_storage` takes them.
    model_folders : sequence of Path
        Where models are installed. Their manifests name what masks may hold besides the label table: a mask file has no room
        for names that every viewer keeps.
    """

    def __init__(
        self,
        settings: ImageioSettings,
        storage_url: str,
        storage_options: Mapping[str, str],
        model_folders: Sequence[Path] = (),
    ) -> None:
        self._model_folders = tuple(model_folders)
        self._limits = Limits(max_voxels=settings.max_voxels, max_inflated_bytes=settings.max_inflated_bytes)
        self._storage = open_storage(storage_url, storage_options)
        self._threads = ThreadPoolExecutor(settings.concurrent, thread_name_prefix="file")

    async def ready(self) -> bool:
        """Answer: the stage is up."""
        return True

    # --- images ------------------------------------------------------------------------------------------------------------

    async def read(self, path: str, as_mask: bool, scheme: str | None = None) -> Volume:
        """Read a stored file; raises what the storage and `read_nifti` raise."""
        return await self.decode(await self._storage.read(path), path, as_mask, scheme)

    async def decode(self, data: bytes, name: str, as_mask: bool, scheme: str | None = None) -> Volume:
        """Read a file's bytes."""
        return await self._in_thread(lambda: self._decode(data, name, as_mask, scheme))

    async def write(self, volume: Volume, path: str) -> str:
        """Write an image or mask under a new name in the storage and return the name."""
        return await self._storage.write(path, await self.encode(volume))

    async def encode(self, volume: Volume) -> bytes:
        """Return an image or mask as `.nii.gz` bytes."""
        return await self._in_thread(lambda: write_nifti(volume))

    async def sha256(self, path: str) -> str:
        """Return a stored file's hash."""
        digest = hashlib.sha256()
        async for chunk in self._storage.stream(path, chunk=4 * 2**20):
            await self._in_thread(lambda chunk=chunk: digest.update(chunk))  # type: ignore[misc]
        return digest.hexdigest()

    async def inspect(self, path: str) -> dict[str, Any]:
        """Say what a stored file is, by its content; an image is checked whole.

        Returns
        -------
        dict
            `kind`, `media_type`, and `header`: of an image `shape_zyx`, `spacing_mm` (z, y, x), `origin_mm` (x, y, z, LPS),
            `direction`, `dtype`, `decoded_bytes` and `readable_as`. Free text in headers may name a patient and is left out.

        Raises
        ------
        EmptyFile, UnsupportedMedia
            If it is of no kind that is known here.
        ImageFileError
            What the gate finds wrong with an image.
        """
        name = Path(path).name
        if not (await self._storage.head(path)).size:
            raise EmptyFile(name=name, reason="it has no bytes")
        start = b"".join([chunk async for chunk in self._storage.stream(path, 0, _MAGIC_BYTES)])
        kind = kind_of(start)
        if kind is None:
            raise UnsupportedMedia(name=name, reason="its content is of no kind that is known here; see the README's table")
        if kind.name != "nifti":
            return {"kind": kind.name, "media_type": kind.media_type, "header": {}}
        data = await self._storage.read(path)
        header = await self._in_thread(lambda: self._look(data, name))
        return {"kind": kind.name, "media_type": kind.media_type, "header": header}

    def _look(self, data: bytes, name: str) -> dict[str, Any]:
        """Read it as an image and, where its values allow, as a mask; one must go."""
        volume, readable = None, []
        try:
            volume = self._decode(data, name, as_mask=False, scheme=None)
            readable.append("image")
        except InvalidIntensity as error:
            refusal: ImageFileError | UnknownLabels = error
        if volume is None or (volume.array.dtype.kind in "iu" and int(volume.array.min()) >= 0):
            try:
                mask = self._decode(data, name, as_mask=True, scheme=None)
                volume = mask if volume is None else volume
                readable.append("mask")
            except (ImageFileError, UnknownLabels) as error:
                refusal = error
        if volume is None:
            raise refusal
        return {
            "shape_zyx": list(volume.shape),
            "spacing_mm": list(volume.spacing_mm),
            "origin_mm": list(volume.origin_mm),
            "direction": [list(row) for row in volume.direction],
            "dtype": str(volume.array.dtype),
            "decoded_bytes": int(volume.array.nbytes),
            "readable_as": readable,
        }

    # --- results -----------------------------------------------------------------------------------------------------------

    async def save(self, value: Volume | Scene | bytes, kind: str, stem: str) -> list[dict[str, Any]]:
        """Write a result for people and read it back: when this returns, it is there.

        Parameters
        ----------
        kind : str
            Of the port it comes from: an image or mask becomes `.nii.gz`, a scene `.obj` and `.mtl`, a picture `.png`,
            a report `.json`.
        stem : str
            Name in the storage, without its ending.

        Returns
        -------
        list of dict
            The main file first: `storage_name`, `filename`, `kind`, `media_type`, `size`, `sha256`, `header`.
        """
        encoded = await self._in_thread(lambda: _encode(value, kind, Path(stem).name))
        header = _header(value)
        return [await self._save(data, ending, file, stem, header) for ending, (file, data) in encoded.items()]

    async def _save(self, data: bytes, ending: str, kind: Kind, stem: str, header: dict[str, Any]) -> dict[str, Any]:
        digest = hashlib.sha256(data).hexdigest()
        name = await self._write_or_adopt(data, digest, stem, ending)
        if await self.sha256(name) != digest:
            raise StorageUnavailable(path=name, reason="what was written could not be read back")
        return {
            "storage_name": name,
            "filename": f"{Path(stem).name}{ending}",
            "kind": kind.name,
            "media_type": kind.media_type,
            "size": len(data),
            "sha256": digest,
            "header": header,
        }

    async def _write_or_adopt(self, data: bytes, digest: str, stem: str, ending: str) -> str:
        """Race: an executor that died, or is slow, has written it before. Equal bytes are adopted, others get another name."""
        number = 1
        while True:
            name = f"{stem}{ending}" if number == 1 else f"{stem}-{number}{ending}"
            try:
                return await self._storage.write(name, data)
            except AlreadyWritten:
                if await self.sha256(name) == digest:
                    return self._storage.name_of(name)
                number += 1

    async def keep(self, value: Volume | Scene | bytes, path: str) -> int:
        """Keep a step's output for later runs and return its size; the name says what made it: one that is there is equal."""
        data = await self._in_thread(lambda: to_bytes(value))
        try:
            await self._storage.write(path, data)
        except AlreadyWritten:
            return len(data)
        return len(data)

    async def recall(self, path: str) -> Volume | Scene | bytes:
        """Return a kept output.

        Raises
        ------
        FileMissing, DamagedResult
        """
        data = await self._storage.read(path)
        return await self._in_thread(lambda: from_bytes(data))

    def _decode(self, data: bytes, name: str, as_mask: bool, scheme: str | None) -> Volume:
        names = label_names(self._model_folders) if as_mask else None
        return read_nifti(data, Path(name).name, limits=self._limits, as_mask=as_mask, scheme=scheme, names=names)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)


_NIFTI = Kind("nifti", "application/gzip")


def _encode(value: Volume | Scene | bytes, kind: str, stem: str) -> dict[str, tuple[Kind, bytes]]:
    """Return ending -> (kind, bytes) of the files of a result, the main one first."""
    if kind == "scene" and isinstance(value, Scene):
        obj, mtl = write_obj(value, f"{stem}.mtl")
        return {".obj": (Kind("obj", "model/obj"), bytes(obj)), ".mtl": (Kind("mtl", "model/mtl"), bytes(mtl))}
    if kind in {"image", "mask"} and isinstance(value, Volume):
        return {".nii.gz": (_NIFTI, write_nifti(value))}
    if kind == "image2d" and isinstance(value, bytes):
        return {".png": (Kind("png", "image/png"), value)}
    if kind == "report" and isinstance(value, bytes):
        return {".json": (Kind("json", "application/json"), value)}
    raise TypeError(f"a {type(value).__name__} is no {kind}")


def _header(value: Volume | Scene | bytes) -> dict[str, Any]:
    if isinstance(value, Volume):
        header = {"shape_zyx": list(value.shape), "spacing_mm": list(value.spacing_mm), "origin_mm": list(value.origin_mm)}
        header |= {"direction": [list(row) for row in value.direction], "dtype": str(value.array.dtype)}
        readable = ["image", "mask"] if isinstance(value, LabelMap) else ["image"]
        return {**header, "decoded_bytes": int(value.array.nbytes), "readable_as": readable}
    if isinstance(value, Scene):
        names = {"surfaces": [surface.name for surface in value.surfaces], "lines": [line.name for line in value.lines]}
        return {
            "frame": value.frame,
            "unit": "mm",
            **{key: found for key, found in names.items() if found or key == "surfaces"},
        }
    return {}
