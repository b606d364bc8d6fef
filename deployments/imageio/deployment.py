"""Files in and out: the only stage that reads and writes them, and the gate that hostile ones meet."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import mmap
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

from deployments.imageio.display import intensity, reduced, small_picture
from deployments.imageio.kinds import Kind, kind_of
from deployments.imageio.meshes import scene_copy, write_mz3
from deployments.imageio.nifti import Limits, read_nifti, write_nifti
from deployments.imageio.pictures import ENDINGS, PictureLimits, describe_picture, read_picture, write_picture
from scangraph import logs, tracing
from scangraph.contracts import Image2D, LabelMap, Scene, Surface, Volume
from scangraph.contracts.codec import Value, from_bytes, to_bytes
from scangraph.contracts.errors import (
    AlreadyWritten,
    EmptyFile,
    ImageFileError,
    InvalidIntensity,
    StorageFull,
    StorageUnavailable,
    UnknownLabels,
    UnsupportedMedia,
)
from scangraph.contracts.images import ImageFormat
from scangraph.copies import mesh_name, scene_name
from scangraph.models import label_names
from scangraph.scenefiles import SceneFile, scene_files
from scangraph.settings import ImageioSettings, TracingSettings
from scangraph.storage import open_storage

T = TypeVar("T")

#: Enough to tell every kind of file apart.
_MAGIC_BYTES = 512
#: Files of a result that are written at a time: each waits for the disk, or for the network.
_AT_ONCE = 8
#: Pixels of pictures that were looked into and not asked for yet: most are, in a moment, and decoding is what takes time.
_LATELY_BYTES = 128 * 2**20


class Imageio:
    """The only reader and writer of image files.

    Parameters
    ----------
    storage_url, storage_options
        As `open_storage` takes them.
    model_folders : sequence of Path
        Where models are installed. Their manifests name what masks may hold besides the label table: a mask file has no room
        for names that every viewer keeps.
    trace_to : TracingSettings, optional
        Where spans are sent.
    """

    def __init__(
        self,
        settings: ImageioSettings,
        storage_url: str,
        storage_options: Mapping[str, str],
        model_folders: Sequence[Path] = (),
        trace_to: TracingSettings | None = None,
    ) -> None:
        logs.configure()
        tracing.configure(trace_to or TracingSettings(), "imageio")
        self._model_folders = tuple(model_folders)
        self._limits = Limits(max_voxels=settings.max_voxels, max_inflated_bytes=settings.max_inflated_bytes)
        self._picture_limits = PictureLimits(settings.max_pixels, settings.max_pages)
        self._lately: OrderedDict[str, Image2D] = OrderedDict()
        self._storage = open_storage(storage_url, storage_options)
        self._threads = ThreadPoolExecutor(settings.concurrent, thread_name_prefix="file")

    async def ready(self) -> bool:
        """Answer: the stage is up."""
        return True

    # --- images ------------------------------------------------------------------------------------------------------------

    @tracing.joined
    async def read(self, path: str, as_mask: bool, scheme: str | None = None) -> Volume:
        """Read a stored file; raises what the storage and `read_nifti` raise."""
        return await self.decode(await self._storage.read(path), path, as_mask, scheme)

    async def decode(self, data: bytes, name: str, as_mask: bool, scheme: str | None = None) -> Volume:
        """Read a file's bytes."""
        return await self._in_thread(lambda: self._decode(data, name, as_mask, scheme))

    @tracing.joined
    async def read_picture(self, path: str) -> Image2D:
        """Read a stored 2-D image; raises what the storage and `pictures.read_picture` raise."""
        known = self._lately.pop(path, None)
        return known if known is not None else await self.decode_picture(await self._storage.read(path), path)

    async def decode_picture(self, data: bytes, name: str) -> Image2D:
        """Read a 2-D image's bytes."""
        name = Path(name).name
        kind = kind_of(data[:_MAGIC_BYTES])
        if kind is None or kind.name != "image2d":
            found = "of no kind that is known here" if kind is None else kind.media_type
            raise UnsupportedMedia(name=name, reason=f"it is no JPEG, PNG, TIFF or WebP, but {found}")
        return await self._in_thread(lambda: read_picture(data, name, _format(kind), self._picture_limits))

    async def write(self, volume: Volume, path: str) -> str:
        """Write an image or mask under a new name in the storage and return the name."""
        return await self._storage.write(path, await self.encode(volume))

    async def encode(self, value: Volume | Image2D) -> bytes:
        """Return an image or mask as `.nii.gz` bytes, a 2-D image's first page (all pages, as TIFF) as its `file` says."""
        if isinstance(value, Image2D):
            return await self._in_thread(lambda: write_picture(value))
        return await self._in_thread(lambda: write_nifti(value))

    @tracing.joined
    async def sha256(self, path: str) -> str:
        """Return a stored file's hash."""
        digest = hashlib.sha256()
        async for chunk in self._storage.stream(path, chunk=4 * 2**20):
            await self._in_thread(lambda chunk=chunk: digest.update(chunk))  # type: ignore[misc]
        return digest.hexdigest()

    @tracing.joined
    async def inspect(self, path: str) -> dict[str, Any]:
        """Say what a stored file is, by its content; an image is checked whole.

        Returns
        -------
        dict
            `kind`, `media_type`, and `header`: of an image `shape_zyx`, `spacing_mm` (z, y, x), `origin_mm` (x, y, z, LPS),
            `direction`, `dtype`, `decoded_bytes`, `readable_as` and `intensity` (`display.intensity`); of a 2-D one what
            `describe_picture` says. Free text in headers may name a patient and is left out.

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
        if kind.name not in {"nifti", "image2d"}:
            return {"kind": kind.name, "media_type": kind.media_type, "header": {}}
        data = await self._storage.read(path)
        if kind.name == "image2d":
            picture = await self.decode_picture(data, name)
            self._remember(path, picture)
            return {"kind": kind.name, "media_type": kind.media_type, "header": describe_picture(picture)}
        header = await self._in_thread(lambda: self._look(data, name))
        return {"kind": kind.name, "media_type": kind.media_type, "header": header}

    def _remember(self, path: str, picture: Image2D) -> None:
        """Hold an upload until it is read: nothing is written twice under one name, so it is still what is stored then."""
        self._lately[path] = picture
        while sum(held.nbytes for held in self._lately.values()) > _LATELY_BYTES:
            self._lately.popitem(last=False)

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
            **({"intensity": intensity(volume.array)} if "image" in readable else {}),
        }

    @tracing.joined
    async def derive(self, path: str, target: str, what: str, most: int = 0) -> dict[str, Any]:
        """Make a copy of a stored file for screens, and keep it under a new name.

        Parameters
        ----------
        what : str
            "image" or "mask": a `.nii.gz` of at most `most` voxels a side. "image-picture", "mask-picture" or
            "image2d-picture": a small PNG.

        Returns
        -------
        dict
            `size`; and `data`, the bytes, where the storage does not take them: who waits for them gets them all the same.

        Raises
        ------
        UnsupportedMedia
        ImageFileError, UnknownLabels
            If the file cannot be read as what it is to be.
        """
        data, name = await self._storage.read(path), Path(path).name
        kind, _, picture = what.partition("-")
        if kind == "image2d":
            page = await self.decode_picture(data, name)
            made = await self._in_thread(lambda: write_picture(small_picture(page)))
        else:
            made = await self._in_thread(lambda: self._derived(data, name, kind == "mask", bool(picture), most))
        try:
            await self._storage.write(target, made)
        except AlreadyWritten:  # by another replica, a moment ago; the same copy
            return {"size": (await self._storage.head(target)).size}
        except (StorageFull, StorageUnavailable):
            return {"size": len(made), "data": made}
        return {"size": len(made)}

    def _derived(self, data: bytes, name: str, as_mask: bool, picture: bool, most: int) -> bytes:
        volume = self._decode(data, name, as_mask, None)
        return write_picture(small_picture(volume)) if picture else write_nifti(reduced(volume, most), level=1)

    # --- results -----------------------------------------------------------------------------------------------------------

    @tracing.joined
    async def save(self, value: Value, kind: str, stem: str) -> list[dict[str, Any]]:
        """Write a result for people and read it back: when this returns, it is there.

        Parameters
        ----------
        kind : str
            Of the port it comes from: an image or mask becomes `.nii.gz`, a report `.json`, a scene or a 2-D image what its
            `files` or `file` say.
        stem : str
            Name in the storage, without its ending.

        Returns
        -------
        list of dict
            The main file first: `storage_name`, `filename`, `kind`, `media_type`, `size`, `sha256`, `header`.
        """
        planned = await self._in_thread(lambda: _plan(value, kind, Path(stem).name))
        *others, last = planned  # a scene's manifest says what was written: it is the last
        saved: list[dict[str, Any]] = []
        for start in range(0, len(others), _AT_ONCE):
            saved += await _all(self._save(file, stem) for file in others[start : start + _AT_ONCE])
        saved.append(await self._save(last, stem))
        if isinstance(value, Scene):
            await self._save_copy(value, saved[-1]["sha256"])
        return saved

    async def _save_copy(self, scene: Scene, digest: str) -> None:
        """Write a scene's copy for screens, its list last: where that is, everything is."""
        about, surfaces = await self._in_thread(lambda: scene_copy(scene))
        for start in range(0, len(surfaces), _AT_ONCE):
            batch = enumerate(surfaces[start : start + _AT_ONCE], start)
            await _all(self._write_mesh(surface, mesh_name(digest, number)) for number, surface in batch)
        await self._write_equal(scene_name(digest), about)

    async def _write_mesh(self, surface: Surface, name: str) -> None:
        await self._write_equal(name, await self._in_thread(lambda: write_mz3(surface)))

    async def _write_equal(self, name: str, data: bytes) -> None:
        """Write what has its content's name: what is there already is equal."""
        with contextlib.suppress(AlreadyWritten):
            await self._storage.write(name, data)

    async def _save(self, file: _Planned, stem: str) -> dict[str, Any]:
        data = await self._in_thread(file.encode)
        digest = await self._in_thread(lambda: hashlib.sha256(data).hexdigest())
        name = await self._write_or_adopt(data, digest, stem, file.ending)
        if await self.sha256(name) != digest:
            raise StorageUnavailable(path=name, reason="what was written could not be read back")
        return {
            "storage_name": name,
            "filename": f"{Path(stem).name}{file.ending}",
            "kind": file.kind.name,
            "media_type": file.kind.media_type,
            "size": len(data),
            "sha256": digest,
            "header": file.header,
        }

    async def _write_or_adopt(self, data: bytes | memoryview, digest: str, stem: str, ending: str) -> str:
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

    @tracing.joined
    async def keep(self, value: Value, path: str) -> int:
        """Keep a step's output for later runs and return its size; the name says what made it: one that is there is equal."""
        data = await self._in_thread(lambda: to_bytes(value))
        await self._write_equal(path, data)
        return len(data)

    @tracing.joined
    async def recall(self, path: str) -> Value:
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


async def _all(works: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Wait for all: none goes on when an error is told."""
    outcomes = await asyncio.gather(*works, return_exceptions=True)
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
    return cast("list[T]", outcomes)


class _Planned(NamedTuple):
    """A file that a result becomes."""

    ending: str
    kind: Kind
    header: dict[str, Any]
    encode: Callable[[], bytes | memoryview]


def _plan(value: Value, kind: str, stem: str) -> list[_Planned]:
    """Return the files of a result, the main one first. Each is encoded when its turn comes."""
    if kind == "scene" and isinstance(value, Scene):
        return [
            _Planned(
                file.name.removeprefix(stem),
                Kind(file.kind, file.media_type),
                _scene_header(value, file),
                partial(_spool, file),
            )
            for file in scene_files(value, stem)
        ]
    if kind in {"image", "mask"} and isinstance(value, Volume):
        encode = partial(write_nifti, value)
        return [_Planned(".nii.gz", Kind("nifti", "application/gzip"), _header(value), encode)]
    if kind == "image2d" and isinstance(value, Image2D):
        return _plan_picture(value)
    if kind == "report" and isinstance(value, bytes):
        return [_Planned(".json", Kind("report", "application/json"), {}, lambda: value)]
    raise TypeError(f"a {type(value).__name__} is no {kind}")


def _plan_picture(image: Image2D) -> list[_Planned]:
    """Return one file, or one for each page where the format holds one."""
    ending, media = ENDINGS[image.file.format], Kind("image2d", f"image/{image.file.format}")
    if image.file.format == "tiff" or len(image.pages) == 1:
        return [_Planned(ending, media, describe_picture(image), partial(write_picture, image))]
    return [
        _Planned(
            f"{f'-page{number + 1}' if number else ''}{ending}",
            media,
            describe_picture(image.with_pages([page])),
            partial(write_picture, image, number),
        )
        for number, page in enumerate(image.pages)
    ]


def _format(kind: Kind) -> ImageFormat:
    """Return the format of a 2-D image from its media type."""
    return cast("ImageFormat", kind.media_type.removeprefix("image/"))


def _spool(file: SceneFile) -> memoryview:
    """Write a file into a temporary one and map it: however large it is, only the system's cache holds it."""
    try:
        with tempfile.TemporaryFile() as out:
            file.write(out)
            out.flush()
            return memoryview(mmap.mmap(out.fileno(), 0, access=mmap.ACCESS_READ))
    except OSError as error:
        reason = f"a temporary file could not be written: {error.strerror}"
        full = error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
        raise (StorageFull if full else StorageUnavailable)(path=file.name, reason=reason) from error


def _header(value: Volume) -> dict[str, Any]:
    header = {"shape_zyx": list(value.shape), "spacing_mm": list(value.spacing_mm), "origin_mm": list(value.origin_mm)}
    header |= {"direction": [list(row) for row in value.direction], "dtype": str(value.array.dtype)}
    header["decoded_bytes"] = int(value.array.nbytes)
    if isinstance(value, LabelMap):
        return {**header, "readable_as": ["image", "mask"]}
    return {**header, "readable_as": ["image"], "intensity": intensity(value.array)}


def _scene_header(scene: Scene, file: SceneFile) -> dict[str, Any]:
    unit = {"unit": file.unit, "level": file.level} if file.unit else {}
    lines = {"lines": [line.name for line in scene.lines]} if scene.lines else {}
    return {"frame": scene.frame, **unit, "surfaces": [structure.surface.name for structure in file.structures], **lines}
