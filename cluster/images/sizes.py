"""What each image would weigh, layer by layer, without a container engine.

    python -m cluster.images.sizes [IMAGE ...]

Each layer is what the Dockerfile would copy from this checkout and its `.envs`, as a tar stream, compressed as it goes and
thrown away. Compression is gzip, which registries get by default, by isal at level 3: somewhat larger than what gzip's level 6
makes, so the figures are on the safe side. Debian's packages are taken as apt offers them, unpacked and compressed alike; of
Python's own image only its publisher's figure is known here.
"""

from __future__ import annotations

import argparse
import io
import subprocess
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from isal import igzip

from cluster.images.contents import CODE, IMAGES, Image, size_of, walk
from scangraph.settings import HOME

#: `python:3.11-slim-bookworm` for amd64, compressed, as its publisher says; not measured here.
PYTHON_IMAGE_MB = 46


@dataclass(frozen=True)
class Layer:
    """A layer's weight; bytes are None where it was not measured."""

    name: str
    files: int
    bytes: int | None
    compressed: int | None


class _Counter(io.RawIOBase):
    """Counts what is written, and keeps nothing."""

    def __init__(self) -> None:
        self.written = 0

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        size = memoryview(data).nbytes  # type: ignore[arg-type]
        self.written += size
        return size


def weigh(name: str, paths: Iterable[Path], root: Path) -> Layer:
    """Compress a layer of these files, links and folders and return its weight."""
    counter, files = _Counter(), 0
    inodes: dict[tuple[int, int], int] = {}  # Mesa's drivers are one file with many names
    with (
        igzip.IGzipFile(fileobj=cast(io.BytesIO, counter), mode="wb", compresslevel=3) as packed,
        tarfile.open(fileobj=packed, mode="w|") as tar,
    ):
        for path in paths:
            tar.add(path, arcname=str(path.relative_to(root)), recursive=False)
            files, told = files + 1, path.lstat()
            inodes[told.st_dev, told.st_ino] = told.st_size
    return Layer(name, files, sum(inodes.values()), counter.written)


def environment_files(environment: Path) -> Iterator[Path]:
    """Yield what is copied of an environment."""
    return (path for path, pattern in walk(environment) if pattern is None)


def code_files(root: Path = HOME) -> Iterator[Path]:
    """Yield what is copied of the checkout."""
    for name in CODE:
        for path in sorted((root / name).rglob("*")) if (root / name).is_dir() else [root / name]:
            if path.is_file() and "__pycache__" not in path.parts:
                yield path


def system_layer(packages: tuple[str, ...]) -> Layer:
    """Weigh Debian packages with everything that a slim image lacks of what they need."""
    name = " ".join(packages)
    command = ["apt-cache", "depends", "--recurse", "--no-recommends", "--no-suggests", "--no-conflicts", "--no-breaks"]
    command += ["--no-replaces", "--no-enhances", *packages]
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        wanted = {line for line in told.splitlines() if line and not line.startswith((" ", "<"))}
        listed = subprocess.run(["apt-cache", "show", *sorted(wanted)], capture_output=True, text=True, check=True).stdout
        # The slim image has what is required and what Python needs; both are there already.
        needed = sorted(wanted - _in_slim_image(listed))
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run(["apt-get", "download", "-qq", *needed], cwd=folder, capture_output=True, check=True)
            for package in Path(folder).glob("*.deb"):
                subprocess.run(["dpkg-deb", "-x", str(package), f"{folder}/root"], check=True)
            root = Path(folder) / "root"
            doc = root / "usr/share/doc"  # the slim image leaves it out, too
            found = [path for path in sorted(root.rglob("*")) if not path.is_dir() and not path.is_relative_to(doc)]
            return weigh(name, found, root)
    except (OSError, subprocess.CalledProcessError):
        return Layer(f"{name} (not measured: no apt that could download it)", 0, None, None)


#: What of Debian Python's slim image has because Python, or apt, is linked with it.
_LINKED = frozenset(
    [
        "ca-certificates",
        "gcc-12-base",
        "libbz2-1.0",
        "libc6",
        "libexpat1",
        "libffi8",
        "libgcc-s1",
        "liblzma5",
        "libncursesw6",
        "libreadline8",
        "libsqlite3-0",
        "libssl3",
        "libstdc++6",
        "libtinfo6",
        "libzstd1",
        "netbase",
        "readline-common",
        "tzdata",
        "zlib1g",
    ]
)


def _in_slim_image(listed: str) -> set[str]:
    """Return which of the packages listed are in Python's slim image already."""
    there = set(_LINKED)
    for stanza in listed.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in stanza.splitlines() if ": " in line and not line.startswith(" "))
        if fields.get("Priority") == "required" or fields.get("Essential") == "yes":
            there.add(fields.get("Package", ""))
    return there


def layers_of(image: Image, envs: Path = HOME / ".envs") -> list[Layer]:
    """Weigh the layers that an image adds to the one it stands on."""
    layers = [system_layer(image.system)] if image.system else []
    layers += [weigh(f".envs/{name}", environment_files(envs / name), envs) for name in image.environments]
    if image.name == "base":
        layers.append(weigh("code and demonstration models", code_files(), HOME))
    return layers


def saved(image: Image, envs: Path = HOME / ".envs") -> dict[str, int]:
    """Return how many bytes each entry of the list of what is thrown out saves in an image's environments."""
    found: dict[str, int] = {}
    for name in image.environments:
        for path, pattern in walk(envs / name):
            if pattern is not None:
                found[pattern] = found.get(pattern, 0) + size_of(path)
    return found


def main(argv: list[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="*", help=", ".join(image.name for image in IMAGES))
    wanted = set(parser.parse_args(argv).images)
    if unknown := wanted - {image.name for image in IMAGES}:
        parser.error(f"no such image: {', '.join(sorted(unknown))}")
    chosen = [image for image in IMAGES if not wanted or image.name in wanted]
    with ThreadPoolExecutor() as pool:
        base = pool.submit(layers_of, IMAGES[0])
        others = {image.name: pool.submit(layers_of, image) for image in chosen if image.name != "base"}
        below = sum(layer.compressed or 0 for layer in base.result()) / 1e6 + PYTHON_IMAGE_MB
        print("| image | layer | files | MB | compressed MB | target |\n|---|---|---|---|---|---|")
        for image in chosen:
            layers = base.result() if image.name == "base" else others[image.name].result()
            whole = below if image.name == "base" else below + sum(layer.compressed or 0 for layer in layers) / 1e6
            for layer in layers:
                size, packed = (f"{n / 1e6:.0f}" if n is not None else "?" for n in (layer.bytes, layer.compressed))
                print(f"| | {layer.name} | {layer.files} | {size} | {packed} | |")
            target = f"≤ {image.target_mb}" if image.target_mb else ""
            beside = "Python" if image.name == "base" else "base"
            print(f"| **{image.name}** | with {beside} | | | **{whole:.0f}** | {target} |")
    print("\nThrown out, MB:")
    for image in chosen:
        entries = sorted(saved(image).items(), key=lambda entry: -entry[1])
        print(f"  {image.name}: {', '.join(f'{name} {size / 1e6:.0f}' for name, size in entries if size >= 5e5)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
