"""Copies of files for screens: made by imageio when they are first asked for, kept under the file's hash, served from there."""

from __future__ import annotations

import asyncio
import hashlib
import json
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal, NamedTuple
from urllib.parse import quote

from fastapi import APIRouter, Depends, Path, Query, Request, Response
from fastapi.responses import StreamingResponse

from deployments.gateway.auth import requires
from deployments.gateway.files import INERT, asked_range, is_known, unsatisfiable
from deployments.gateway.problems import documented
from deployments.gateway.services import Access, Services
from scangraph.contracts.errors import FileMissing, UnsatisfiableRange, UnsupportedMedia
from scangraph.copies import copy_name, mesh_name, scene_name
from scangraph.intake import Principal, own_file, safe_name
from scangraph.scenefiles.files import MANIFEST_ENDING
from scangraph.store.files import output_file
from scangraph.store.tables import File

#: Sizes are rounded down to these steps, so that nobody has a hundred copies made of one file.
_STEP, _LEAST, _LARGEST = 50, 50, 400


class Copy(NamedTuple):
    """A copy of a file.

    Parameters
    ----------
    name : str
        In the storage.
    data : bytes, optional
        The copy itself, where the storage had no room for it.
    """

    name: str
    size: int
    data: bytes | None = None


async def copy_of(services: Services, file: File, what: str, ending: str, most: int = 0) -> Copy:
    """Return a copy of a file for screens, made now if there is none.

    Race: many ask at once. In this replica one has it made and all wait for that; of two replicas the second's is adopted or
    thrown away, for they are equal. Who leaves meanwhile stops nothing: the next one will ask for it, too.

    Parameters
    ----------
    what, most
        As `Imageio.derive` takes them.
    ending : str
        Of the copy's name.
    """
    name = copy_name(file.sha256, f"{what}-{most}" if most else what, ending)
    try:
        return Copy(name, (await services.storage.head(name)).size)
    except FileMissing:
        pass
    making: dict[str, asyncio.Task[Copy]] = services.state.setdefault("copies", {})
    if name not in making:

        async def make() -> Copy:
            try:
                made = await services.gate.derive(file.storage_name, name, what, most)
                return Copy(name, made["size"], made.get("data"))
            finally:
                del making[name]

        making[name] = asyncio.create_task(make(), name="copy")
        making[name].add_done_callback(lambda task: task.cancelled() or task.exception())  # all may have left
    return await asyncio.shield(making[name])


def answered(services: Services, copy: Copy, request: Request, filename: str, media_type: str) -> Response:
    """Answer with a copy, or one range of it. Its name tells it apart from every other one."""
    tag = f'"{hashlib.sha256(f"{request.url.path} {copy.name}".encode()).hexdigest()[:32]}"'
    headers = {"ETag": tag, "Cache-Control": "private, no-cache", **INERT}
    if is_known(request, tag):
        return Response(status_code=304, headers=headers)
    try:
        start, end = asked = asked_range(request, copy.size, tag) or (0, copy.size)
    except UnsatisfiableRange as error:
        return unsatisfiable(error, request)
    part = asked != (0, copy.size)
    headers |= {"Accept-Ranges": "bytes", "Content-Type": media_type, "Content-Length": str(end - start)}
    headers["Content-Disposition"] = f"inline; filename=\"{safe_name(filename)}\"; filename*=UTF-8''{quote(filename, safe='')}"
    if part:
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{copy.size}"
    if copy.data is not None:
        return Response(copy.data[start:end], 206 if part else 200, headers)
    return StreamingResponse(services.storage.stream(copy.name, start, end), 206 if part else 200, headers)


async def scene_of(services: Services, file: File) -> str:
    """Return the digest that the copy of a scene is kept under, for any of the scene's files.

    Raises
    ------
    UnsupportedMedia
        If it is no file of a scene that was made here.
    """
    manifest = None
    if file.execution_id and file.output:
        manifest = await output_file(services.store, file.execution_id, file.output, MANIFEST_ENDING)
    if manifest is None:
        reason = f"there are copies for screens of images, masks and scenes of results, and it is {file.kind}; fetch it itself"
        raise UnsupportedMedia(name=file.filename, reason=reason)
    return manifest.sha256


async def _kept(services: Services, name: str) -> Copy:
    try:
        return Copy(name, (await services.storage.head(name)).size)
    except FileMissing as error:
        raise FileMissing(path=f"{name} (of the scene no copy for screens was kept, or its list is shorter)") from error


def _stem(file: File) -> str:
    name = PurePosixPath(file.filename)
    return name.name.removesuffix(".gz").removesuffix(".nii") if file.kind == "nifti" else name.stem


def _read_as(file: File, wished: str | None) -> str:
    """Return what a NIfTI is shown as: a mask where it may be one, for no CT may."""
    readable = (file.header or {}).get("readable_as") or ["image"]
    return wished or ("mask" if "mask" in readable else "image")


_As = Annotated[
    Literal["image", "mask"] | None,
    Query(alias="as", description="how a NIfTI is read; unset: as a mask, where all its values are known labels"),
]
_BINARY: dict[str, Any] = {"schema": {"type": "string", "format": "binary"}}
_HERE: dict[int | str, dict[str, Any]] = {304: {"description": "you have it"}}


def display_routes(services: Access) -> APIRouter:
    """Return the routes of copies under `/v1/files`."""
    router = APIRouter(prefix="/v1/files", tags=["files"])
    viewer = Depends(requires(services, "viewer"))

    async def display(
        file_id: str,
        request: Request,
        most: Annotated[
            int, Query(alias="max", ge=_LEAST, le=_LARGEST, description="voxels a side; rounded down to a multiple of 50")
        ] = 300,
        read_as: _As = None,
        principal: Principal = viewer,
    ) -> Response:
        """Of an image or a mask a `.nii.gz` at the same place in the world: blocks of voxels are made one voxel each.

        Of any file of a scene JSON: `structures`, each with name, colour, measures, warnings and the `url` of a surface with
        few triangles, and `lines`; all in RAS mm. Copies are for screens: measure in the file itself.
        """
        s = services()
        file = await own_file(s, principal, file_id)
        if file.kind != "nifti":
            name = scene_name(await scene_of(s, file))
            about = json.loads(await s.storage.read((await _kept(s, name)).name))
            for number, structure in enumerate(about["structures"]):
                structure["url"] = f"/v1/files/{file.id}/display/{number}.mz3"
            listed = Copy(name, len(data := json.dumps(about, ensure_ascii=False).encode()), data)
            return answered(s, listed, request, f"{_stem(file)}.display.json", "application/json")
        most -= most % _STEP
        what = _read_as(file, read_as)
        copy = await copy_of(s, file, what, ".nii.gz", most)
        filename = f"{_stem(file)}.display.nii.gz"
        return answered(s, copy, request, filename, "application/gzip")

    async def mesh(
        file_id: str,
        number: Annotated[int, Path(ge=0, le=99_999, description="place in the list's `structures`")],
        request: Request,
        principal: Principal = viewer,
    ) -> Response:
        """A gzipped MZ3: triangles and vertices, RAS mm."""
        s = services()
        file = await own_file(s, principal, file_id)
        copy = await _kept(s, mesh_name(await scene_of(s, file), number))
        return answered(s, copy, request, f"{_stem(file)}.{number}.mz3", "application/octet-stream")

    async def thumbnail(file_id: str, request: Request, read_as: _As = None, principal: Principal = viewer) -> Response:
        """A PNG of at most 256 pixels a side: of a CT its middle coronal and axial slices, of a mask the fullest ones."""
        s = services()
        file = await own_file(s, principal, file_id)
        if file.kind not in {"nifti", "image2d"}:
            reason = f"there are thumbnails of images, masks and 2-D images, and it is {file.kind}"
            raise UnsupportedMedia(name=file.filename, reason=reason)
        what = f"{_read_as(file, read_as) if file.kind == 'nifti' else 'image2d'}-picture"
        copy = await copy_of(s, file, what, ".png")
        return answered(s, copy, request, f"{_stem(file)}.thumbnail.png", "image/png")

    failures = documented(401, 404, 413, 415, 416, 422, 500, 503)
    router.add_api_route(
        "/{file_id}/display",
        display,
        methods=["GET"],
        summary="A copy for screens",
        operation_id="get_display",
        response_class=Response,
        responses={
            200: {
                "description": "the copy; of a scene the list of its structures",
                "content": {"application/gzip": _BINARY, "application/json": {"schema": {"type": "object"}}},
            },
            206: {"description": "the part that was asked for", "content": {"application/gzip": _BINARY}},
            **_HERE,
            **failures,
        },
    )
    router.add_api_route(
        "/{file_id}/display/{number}.mz3",
        mesh,
        methods=["GET"],
        summary="One surface of a scene's copy",
        operation_id="get_display_mesh",
        response_class=Response,
        responses={
            200: {"description": "the surface", "content": {"application/octet-stream": _BINARY}},
            206: {"description": "the part that was asked for", "content": {"application/octet-stream": _BINARY}},
            **_HERE,
            **failures,
        },
    )
    router.add_api_route(
        "/{file_id}/thumbnail",
        thumbnail,
        methods=["GET"],
        summary="A small picture",
        operation_id="get_thumbnail",
        response_class=Response,
        responses={
            200: {"description": "the picture", "content": {"image/png": _BINARY}},
            206: {"description": "the part that was asked for", "content": {"image/png": _BINARY}},
            **_HERE,
            **failures,
        },
    )
    return router
