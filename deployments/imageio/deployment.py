"""Image files in and out,."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from deployments.imageio.nifti import Limits, read_nifti, write_nifti
from scangraph.contracts import Volume
from scangraph.settings import ImageioSettings
from scangraph.storage import LocalStorage

T = TypeVar("T")


class Imageio:
    """The only reader and writer of image files; the gate that hostile files meet."""

    def __init__(self, settings: ImageioSettings, storage_root: Path) -> None:
        self._limits = Limits(max_voxels=settings.max_voxels, max_inflated_bytes=settings.max_inflated_bytes)
        self._storage = LocalStorage(storage_root)
        self._threads = ThreadPoolExecutor(settings.concurrent, thread_name_prefix="file")

    async def ready(self) -> bool:
        """Answer: the stage is up."""
        return True

    async def read(self, path: str, as_mask: bool, scheme: str | None = None) -> Volume:
        """Read a stored file; raises what `storage` and `read_nifti` raise."""
        return await self._in_thread(lambda: self._decode(self._storage.read(path), path, as_mask, scheme))

    async def decode(self, data: bytes, name: str, as_mask: bool, scheme: str | None = None) -> Volume:
        """Read a file's bytes."""
        return await self._in_thread(lambda: self._decode(data, name, as_mask, scheme))

    async def write(self, volume: Volume, path: str) -> str:
        """Write an image or mask under a new name in the storage and return the name."""
        return await self._in_thread(lambda: self._storage.write(path, write_nifti(volume)))

    async def encode(self, volume: Volume) -> bytes:
        """Return an image or mask as `.nii.gz` bytes."""
        return await self._in_thread(lambda: write_nifti(volume))

    def _decode(self, data: bytes, name: str, as_mask: bool, scheme: str | None) -> Volume:
        return read_nifti(data, Path(name).name, limits=self._limits, as_mask=as_mask, scheme=scheme)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)
