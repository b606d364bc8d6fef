"""`scangraph doctor`: looks at what the service needs of this machine, and says how to mend what is missing."""

from __future__ import annotations

import asyncio
import ctypes.util
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from runtime_envs import command_for, lock_of
from scangraph.cluster import port_is_free
from scangraph.contracts.errors import InvalidModel, ScanGraphError
from scangraph.models import installed_detectors, installed_models, invalid_models, verify_files
from scangraph.settings import Settings
from scangraph.storage import open_storage

_STORAGE_MEND = (
    "Look at SCANGRAPH_STORAGE_URL and SCANGRAPH_STORAGE_OPTIONS (endpoint, region, access_key_id, secret_access_key; "
    'allow_http "true" without TLS) or AWS_… variables.'
)

Level = Literal["ok", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; `mend` says what to do about it."""

    level: Level
    subject: str
    text: str
    mend: str = ""


def examine(settings: Settings) -> list[Finding]:
    """Look at everything; nothing is changed, but a small file is written into the storage and deleted."""
    checks = (_python, _processor, _gpu, _memory, _disk, _environments, _libraries, _port, _storage, _models)
    return [finding for check in checks for finding in check(settings)]


def _python(_: Settings) -> Iterator[Finding]:
    good = sys.version_info[:2] == (3, 11)
    yield Finding("ok" if good else "error", "Python", sys.version.split()[0], "" if good else "Use Python 3.11.")


def _processor(settings: Settings) -> Iterator[Finding]:
    cores = os.cpu_count() or 1
    flags: set[str] = set()
    info = Path("/proc/cpuinfo")
    if info.exists():
        flags = set(next((line for line in info.read_text().splitlines() if line.startswith("flags")), "").split())
    names = {"avx2": "AVX2", "avx512f": "AVX-512", "avx512_bf16": "AVX-512 bf16", "amx_bf16": "AMX bf16"}
    have = ", ".join(title for flag, title in names.items() if flag in flags) or "no vector extensions known here"
    slow = bool(flags) and "avx2" not in flags
    mend = "Segmentation will be very slow: use a machine with AVX2, or a GPU." if slow else ""
    yield Finding("warning" if slow else "ok", "processor", f"{settings.cpus or cores} of {cores} cores, {have}", mend)


def _gpu(settings: Settings) -> Iterator[Finding]:
    if not any(Path("/dev").glob("nvidia[0-9]*")):
        wanted = bool(settings.nnunet.num_gpus)
        mend = "Install NVIDIA's driver, or set SCANGRAPH_NNUNET__NUM_GPUS=0." if wanted else ""
        yield Finding("error" if wanted else "ok", "GPU", "none; the CPU is used", mend)
        return
    python = settings.environments_dir / "nnunet/bin/python"
    cpu_build = any((settings.environments_dir / "nnunet").glob("lib/*/site-packages/torch-*+cpu.dist-info"))
    if python.exists() and cpu_build:
        yield Finding("warning", "GPU", "there, but torch is a CPU build", "Run `UV_TORCH_BACKEND=auto make setup`.")
    else:
        yield Finding("ok", "GPU", "an NVIDIA device is there")


def _memory(_: Settings) -> Iterator[Finding]:
    memory = psutil.virtual_memory()
    low = memory.available < 6 * 2**30
    mend = "Close other programs: one 512×512×300 CT needs about 6 GB." if low else ""
    yield Finding(
        "warning" if low else "ok", "memory", f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GB free", mend
    )
    shm = Path("/dev/shm")  # noqa: S108 - looked at, not written
    if shm.is_dir():
        free = shutil.disk_usage(shm).free
        small = free < 2 * 2**30
        mend = "Arrays go to /tmp instead and are slower: mount a larger /dev/shm (docker: --shm-size=8g)." if small else ""
        yield Finding("warning" if small else "ok", "shared memory", f"{free / 2**30:.1f} GB free in /dev/shm", mend)


def _disk(settings: Settings) -> Iterator[Finding]:
    folder = settings.data
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if not os.access(folder, os.W_OK):
        yield Finding("error", "data folder", f"{settings.data} cannot be written", "Set SCANGRAPH_DATA to a folder of yours.")
    low = free < 5 * 2**30
    mend = "Free space, or set SCANGRAPH_DATA to another disk." if low else ""
    yield Finding("warning" if low else "ok", "disk", f"{free / 2**30:.1f} GB free at {settings.data}", mend)


def _environments(settings: Settings) -> Iterator[Finding]:
    if settings.environments == "ray-built":
        yield Finding("ok", "environments", "made by Ray on every node when a stage starts")
        return
    if settings.environments == "images":
        yield Finding("ok", "environments", "in the images of the stages' nodes")
        return
    for stage in ("base", "nnunet", "smoothing", "postprocess", "imaging"):
        lock = lock_of(stage, settings)
        folder = settings.environments_dir / lock
        good = (folder / "scangraph-lock").exists()
        text = f"{lock}: {'built' if good else 'missing or unfinished'}"
        yield Finding("ok" if good else "error", "environments", text, "" if good else f"Run `{command_for(lock)}`.")


def _libraries(settings: Settings) -> Iterator[Finding]:
    wanted: list[tuple[str, str, str, str, Level]] = [
        ("EGL", "the 3-D view of pictures", "libegl1 libgl1-mesa-dri", "make setup", "warning")
    ]
    if settings.smoothing.open3d:
        wanted.append(("usb-1.0", "open3d", "libusb-1.0-0", "make setup-open3d", "error"))
    for name, purpose, packages, command, level in wanted:
        found = ctypes.util.find_library(name)
        mend = "" if found else f"Debian: apt-get install {packages} (or run `{command}` as root)."
        yield Finding("ok" if found else level, "libraries", f"{name} ({purpose}): {found or 'missing'}", mend)


def _port(settings: Settings) -> Iterator[Finding]:
    free = settings.port == 0 or port_is_free(settings.host, settings.port)
    mend = "" if free else "A service may be running already; else choose another: `make serve PORT=8123`."
    yield Finding(
        "ok" if free else "warning", "port", f"{settings.host}:{settings.port} is {'free' if free else 'taken'}", mend
    )
    if settings.host not in {"127.0.0.1", "localhost", "::1"}:
        text = f"listens on {settings.host}, and there are no accounts yet: whoever reaches it may use it"
        yield Finding("warning", "port", text, "Set SCANGRAPH_HOST=127.0.0.1.")


def storage_fault(settings: Settings) -> str | None:
    """Return what is wrong with the storage, after trying everything that the service does there."""
    try:
        asyncio.run(open_storage(settings.storage, settings.storage_options).probe())
    except ScanGraphError as error:
        return str(error.fields.get("reason", error.detail))
    return None


def _storage(settings: Settings) -> Iterator[Finding]:
    if not settings.storage_url:
        return  # it is in the data folder, which was looked at
    fault = storage_fault(settings)
    text = fault or "written, read, listed and deleted, and nothing is overwritten"
    yield Finding("error" if fault else "ok", "storage", f"{settings.storage_url}: {text}", _STORAGE_MEND if fault else "")


def _models(settings: Settings) -> Iterator[Finding]:
    for error in invalid_models(settings.model_folders):
        yield Finding("error", "models", error.detail, "Install the model again, or remove its folder.")
    models = installed_models(settings.model_folders)
    for model in (*models, *installed_detectors(settings.model_folders)):
        try:
            verify_files(model)
        except InvalidModel as error:
            yield Finding("error", "models", error.detail, "Install the model again, or remove its folder.")
            continue
        text = f"{model.manifest.id} {model.manifest.version} for {model.manifest.task}"
        demo = model.manifest.demo
        mend = "For real patients install real weights: `scangraph models install --help`." if demo else ""
        yield Finding("ok", "models", text + (" (demonstration only)" if demo else ""), mend)
    if not models:
        yield Finding("error", "models", f"none in {settings.models_dir}", "Set SCANGRAPH_MODELS_DIR, or install models.")
