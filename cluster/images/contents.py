"""What is in each image, and what of its environments is thrown out.

    python3 cluster/images/contents.py .envs/nnunet        # throws out, and says what that saved

Standard library only: the build runs it before anything else is there.

An environment is copied as it was built from its lock; nothing in it is changed, and what is thrown out is this one list. The
Dockerfile and `sizes.py` both use it, and `tests/cluster/test_images.py` runs the service from what stays.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath


@dataclass(frozen=True)
class Image:
    """An image, which stands on `base` but for `base` itself.

    Parameters
    ----------
    name : str
        Target in the Dockerfile; the image is `scangraph-<name>`.
    environments : tuple of str
        Locks whose environments it adds.
    system : tuple of str
        Debian's packages that it adds.
    target_mb : int or None
        What it may weigh as a whole, compressed.
    """

    name: str
    environments: tuple[str, ...]
    system: tuple[str, ...] = ()
    target_mb: int | None = None


#: What pictures of scenes are drawn with (runtime_envs/system.sh).
DRAWING = ("libegl1", "libgl1-mesa-dri")
IMAGES = (
    Image("base", ("base",), target_mb=450),
    Image("nnunet", ("nnunet",), target_mb=1200),
    Image("smoothing", ("smoothing",), DRAWING, target_mb=700),
    Image("postprocess", ("postprocess",), target_mb=600),
    Image("imaging", ("imaging",)),
    Image("whole", ("nnunet", "smoothing", "postprocess", "imaging"), DRAWING),
)
#: What of the checkout is in every image.
CODE = ("graph.py", "scangraph", "deployments", "runtime_envs", "models", "LICENSE")

#: Thrown out: pattern -> why nothing needs it. One with a slash is a path in `site-packages`, one without is a name anywhere; a
#: folder goes with all that is in it. Type stubs (`*.pyi`) stay: scikit-image reads its own when it is imported.
THROWN_OUT = {
    "__pycache__": "made again in /tmp at the first import: what is written at a build belongs to no lock",
    "tests": "the packages' own tests",
    "*.a": "static libraries are for compilers, and there is none",
    "*.h": "headers are for compilers",
    "*.hpp": "headers are for compilers",
    "pip": "nothing is installed in an image",
    "pip-*.dist-info": "as above",
    "wheel": "makes packages",
    "wheel-*.dist-info": "as above",
    "onnx/backend/test": "onnx's own tests",
    "openvino/include": "headers",
    "ray/dashboard/client/build/static/js": "the page of Ray's dashboard; its interface, which KubeRay asks, stays",
    "ray/jars": "Ray for Java",
    "ray/llm": "serves language models",
    "ray/rllib": "learns by reinforcement",
    "ray/train": "trains on clusters",
    "ray/tune": "searches hyperparameters",
    "torch/bin/*[Tt]est*": "torch's C++ tests",
    "torch/bin/protoc*": "a compiler",
    "torch/include": "headers; torch's own compiler wants a C++ compiler, and OpenVINO does its work",
    "torch/test": "torch's C++ tests",
    "vtkmodules/*Accelerators*": "VTK on GPUs by viskores; pictures are drawn by OpenGL",
    "vtkmodules/*ChartsCore*": "VTK's diagrams",
    "vtkmodules/*InteractionWidgets*": "what a mouse moves",
    "vtkmodules/libviskores_*": "as its accelerators",
}
_ANYWHERE = tuple(pattern for pattern in THROWN_OUT if "/" not in pattern)
_PLACES = tuple(pattern for pattern in THROWN_OUT if "/" in pattern)


def thrown_out(path: PurePosixPath) -> str | None:
    """Return the pattern by which a path, relative to `site-packages`, is thrown out, folders above it aside."""
    for pattern in _PLACES:
        if len(path.parts) == pattern.count("/") + 1 and fnmatch(str(path), pattern):
            return pattern
    return next((pattern for pattern in _ANYWHERE if fnmatch(path.name, pattern)), None)


def site_packages(environment: Path) -> Path:
    """Return where an environment's packages are."""
    (found,) = environment.glob("lib/python3.*/site-packages")
    return found


def walk(environment: Path) -> Iterator[tuple[Path, str | None]]:
    """Yield every file and link of an environment, and folders that are thrown out, with the pattern that says so."""
    packages = site_packages(environment)

    def said(path: Path) -> str | None:
        inside = path.is_relative_to(packages) and not path.is_symlink()
        return thrown_out(PurePosixPath(path.relative_to(packages))) if inside else None

    for root, folders, files in os.walk(environment):
        here = Path(root)
        for name in sorted(folders):
            pattern = said(here / name)
            if pattern or (here / name).is_symlink():
                folders.remove(name)
                yield here / name, pattern
        folders.sort()
        yield from ((here / name, said(here / name)) for name in sorted(files))


def size_of(path: Path) -> int:
    """Return the bytes of a file, or of a folder with all that is in it."""
    if path.is_dir() and not path.is_symlink():
        return sum(file.lstat().st_size for file in path.rglob("*") if not file.is_dir())
    return path.lstat().st_size


def throw_out(environment: Path) -> int:
    """Delete what is thrown out, and return how many bytes that were."""
    saved = 0
    for path, pattern in list(walk(environment)):
        if pattern is None:
            continue
        saved += size_of(path)
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    return saved


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        print(f"{argument}: {throw_out(Path(argument)) / 1e6:.0f} MB thrown out")
