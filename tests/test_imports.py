"""Who may import whom (ARCHITECTURE.md), as one table and two checks.

Statically: every import in the source, even inside functions, is in its room's row. Really: every room is imported by a
process in which whatever its row does not have cannot be imported, so that what an import drags in counts too. Modules are
found by walking the folders; a stage that is not in the table fails.
"""

from __future__ import annotations

import ast
import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from runtime_envs import lock_of, pins
from runtime_envs.build import TORCH_BUILD_ONLY

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Room:
    """What the modules of a room may import besides the standard library.

    Parameters
    ----------
    libraries : str
        What its source may name.
    ours : str
        Our packages that its source may name.
    environment : str
        The lock whose packages are there when it is imported; "" for a script, which is not.
    ray : bool
        Whether Ray is, too.
    """

    libraries: str
    ours: str
    environment: str = "base"
    ray: bool = False


#: What each stage's own code is made with.
STAGES = {
    "imageio": "numpy pydantic isal simplejpeg imagecodecs tifffile",
    "nnunet": "numpy pydantic torch nnunetv2 safetensors SimpleITK scipy numba openvino psutil",
    "smoothing": "numpy pydantic vtk vtkmodules pyvista trimesh numba matplotlib scipy open3d",
    "postprocess": "numpy pydantic scipy numba cugraph cudf cupy",
    "imaging": "numpy pydantic cv2 PIL onnx onnxruntime google",
    "executor": "pydantic",
    "kafka": "pydantic confluent_kafka",
    "gateway": "pydantic fastapi starlette uvicorn limits python_multipart sqlalchemy httpx prometheus_client"
    " grpc grpc_health google",
}
#: Those that work by handles, and so stand on Ray as a whole.
CONTROL = ("executor", "gateway")
#: Modules of scangraph/ that talk to a cluster, and those of the command that stands on top of everything.
CONNECTING = ("handles", "routing")
#: Those that keep things: the database, the storage, the keys, and what takes work in.
KEEPING = ("store", "storage", "s3", "tokens", "intake")
#: What every process tells of itself. Ray is asked only where it is there already.
TELLING = ("metrics", "tracing", "logs")
REMOTE = ("remote_cli", "terminal")
COMMAND = ("cli", "local_cli", "accounts_cli", "audit_cli", "cluster", "demo", "doctor")

ROOMS = {
    "contracts": Room("numpy pydantic", ours="scangraph.contracts", environment="numpy1"),
    "shared": Room("numpy pydantic pydantic_settings yaml psutil", ours="scangraph"),
    "keeping": Room("pydantic sqlalchemy alembic argon2 jwt cryptography obstore botocore", ours="scangraph"),
    "telling": Room("opentelemetry ray", ours="scangraph"),
    "client": Room("pydantic httpx websockets", ours="scangraph.contracts scangraph.client"),
    "client's command": Room("pydantic httpx websockets typer rich", ours="scangraph"),
    "stubs": Room("grpc google", ours="scangraph"),
    "connecting": Room("pydantic ray", ours="scangraph", ray=True),
    "command": Room("numpy pydantic ray psutil typer rich", ours="scangraph runtime_envs graph", ray=True),
    "graph": Room("ray", ours="scangraph deployments runtime_envs", ray=True),
    "runtime_envs": Room("", ours="scangraph"),
    "build": Room("", ours="", environment=""),
}
for stage, libraries in STAGES.items():
    own = f"scangraph deployments.{stage}"
    # The functions and classes on arrays, and what the graph is bound from, where the stage's own environment is not.
    ROOMS[stage] = Room(libraries, own, environment=lock_of(stage), ray=stage in CONTROL)
    ROOMS[f"{stage} (deployment)"] = Room(f"{libraries} ray", own, ray=True)


def room_of(module: str) -> str:
    """Name of the room a module belongs to."""
    match module.split("."):
        case ["graph"]:
            return "graph"
        case ["runtime_envs", "build"]:
            return "build"
        case ["runtime_envs"]:
            return "runtime_envs"
        case ["scangraph", "contracts", *_]:
            return "contracts"
        case ["scangraph", name, *_] if name in KEEPING:
            return "keeping"
        case ["scangraph", name] if name in TELLING:
            return "telling"
        case ["scangraph", "client", *_]:
            return "client"
        case ["scangraph", "imageflow", *_]:
            return "stubs"
        case ["scangraph", name] if name in REMOTE:
            return "client's command"
        case ["scangraph", name] if name in CONNECTING:
            return "connecting"
        case ["scangraph", name] if name in COMMAND:
            return "command"
        case ["scangraph", *_]:
            return "shared"
        case ["deployments"]:
            return "shared"  # empty
        case ["deployments", "gateway", "rpc", "door"]:
            return "gateway (deployment)"  # inside Serve's proxy, too
        case ["deployments", stage, "deployment" | "components"]:
            return f"{stage} (deployment)"
        case ["deployments", stage, name] if (stage, name) in {("executor", "stages"), ("gateway", "door")}:
            return f"{stage} (deployment)"  # handles to the stages; what runs inside Serve's proxy
        case ["deployments", stage, *_]:
            return stage
    return module


def find_modules(root: Path) -> dict[str, Path]:
    """Every module of ours below a checkout, by its name."""
    files = [
        root / "graph.py",
        *(f for top in ("scangraph", "deployments", "runtime_envs") for f in (root / top).rglob("*.py")),
    ]
    parts = {file: file.relative_to(root).with_suffix("").parts for file in files if file.exists()}
    # alembic's scripts are no modules: alembic runs them.
    parts = {file: names for file, names in parts.items() if "migrations" not in names}
    return {".".join(p[:-1] if p[-1] == "__init__" else p): file for file, p in sorted(parts.items())}


def by_room(modules: Iterable[str]) -> dict[str, list[str]]:
    """Modules of each room."""
    rooms: dict[str, list[str]] = {}
    for module in modules:
        rooms.setdefault(room_of(module), []).append(module)
    return rooms


MODULES = find_modules(ROOT)
OURS = {name.partition(".")[0] for name in MODULES}


def test_every_module_has_a_room() -> None:
    homeless = {room: names for room, names in by_room(MODULES).items() if room not in ROOMS}
    assert not homeless, f"add these to the table: {homeless}"
    assert set(STAGES) == {name.split(".")[1] for name in MODULES if name.startswith("deployments.")}


# --- what the source says -----------------------------------------------------------------------------------------------------


def is_below(module: str, packages: Iterable[str]) -> bool:
    """Whether a module is one of the packages or inside one."""
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def imported(source: str) -> set[str]:
    """Modules that a source names in its imports, wherever they stand."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("." * node.level + (node.module or ""))
    return names


def strangers(source: str, room: Room) -> set[str]:
    """Imports of a source that its room does not allow."""
    allowed = {*sys.stdlib_module_names, *room.libraries.split(), *room.ours.split()}
    return {name for name in imported(source) if not is_below(name, allowed)}


@pytest.mark.parametrize("module", MODULES)
def test_source_imports_only_what_its_room_may(module: str) -> None:
    found = strangers(MODULES[module].read_text(), ROOMS[room_of(module)])
    assert not found, f"{module} ({room_of(module)}) imports {sorted(found)}"


# --- what importing does ------------------------------------------------------------------------------------------------------

_IMPORT = """
import importlib, json, sys
task = json.load(sys.stdin)
sys.path[:0] = task["path"]
sys.modules.update(dict.fromkeys(task["hidden"]))
failures = {}
for room in task["rooms"]:
    for name in [name for name in sys.modules if name.partition(".")[0] in task["ours"]]:
        del sys.modules[name]
    sys.modules.update(dict.fromkeys(room["hidden"]))
    for name in room["modules"]:
        try:
            importlib.import_module(name)
        except Exception as error:
            failures[name] = f"{type(error).__name__}: {error}"
print(json.dumps(failures))
"""


def plain(name: str) -> str:
    """A distribution's name as locks spell it."""
    return re.sub(r"[-_.]+", "-", name).lower()


@functools.cache
def installed() -> dict[str, set[str]]:
    """Importable names of this environment, with the distributions they come from."""
    # Asked of a fresh interpreter: once imported, Ray shows what it carries inside itself as installed.
    code = "import importlib.metadata, json; print(json.dumps(importlib.metadata.packages_distributions()))"
    found = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    return {name: {plain(d) for d in of} for name, of in found.items() if name not in OURS | sys.stdlib_module_names}


def hidden_libraries(environment: str, ray: bool) -> list[str]:
    """Installed names that an environment does not have."""
    there = {plain(re.split(r"[=\[ ;]", pin)[0]) for pin in pins(environment)} - (set() if ray else {"ray"})
    return [name for name, of in installed().items() if not of & there and not any(map(TORCH_BUILD_ONLY.match, of))]


def hidden_modules(room: Room, modules: Iterable[str]) -> list[str]:
    """Modules of ours that a room may not import."""
    ours = room.ours.split()
    there = {*modules, *(name.rpartition(".")[0] for name in (*ours, *modules))}
    return [name for name in MODULES if not is_below(name, ours) and name not in there]


def failed_imports(rooms: Sequence[tuple[Room, Sequence[str]]], *path: Path) -> dict[str, str]:
    """Import the modules of rooms with one environment in one process, each room afresh; return what went wrong."""
    ((environment, ray),) = {(room.environment, room.ray) for room, _ in rooms}
    task = {
        "path": [str(p) for p in (*path, ROOT)],
        "ours": sorted(OURS),
        "hidden": hidden_libraries(environment, ray),
        "rooms": [{"hidden": hidden_modules(room, modules), "modules": modules} for room, modules in rooms],
    }
    command = [sys.executable, "-c", _IMPORT]
    done = subprocess.run(command, input=json.dumps(task), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    failures: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return failures


def test_rooms_import_with_nothing_but_what_they_may() -> None:
    groups: dict[tuple[str, bool], list[tuple[Room, Sequence[str]]]] = {}
    for name, modules in by_room(MODULES).items():
        room = ROOMS[name]
        if room.environment:
            groups.setdefault((room.environment, room.ray), []).append((room, modules))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        failures = {module: why for failed in pool.map(failed_imports, groups.values()) for module, why in failed.items()}
    assert not failures, json.dumps(failures, indent=2)


# --- that both can fail -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("contracts", "import ray"),
        ("contracts", "from scangraph import handles"),
        ("contracts", "from . import handles"),
        ("shared", "def f():\n    import torch"),
        ("shared", "from deployments.nnunet.segmentation import segment"),
        ("nnunet", "if True:\n    from ray import serve"),
        ("nnunet", "import deployments.smoothing.surfaces"),
        ("smoothing (deployment)", "def f():\n    import torch.nn"),
        ("executor", "from deployments import nnunet"),
        ("gateway", "import numpy"),
        ("build", "import numpy"),
    ],
)
def test_a_planted_import_is_seen_in_the_source(room: str, source: str) -> None:
    assert strangers("import json\n" + source, ROOMS[room])


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("contracts", "import ray"),
        ("contracts", "import skimage"),
        ("contracts", "import scangraph.storage"),
        ("shared", "import scangraph.handles"),  # allowed by name, but it brings Ray
        ("shared", "import deployments.imageio"),
        ("imageio", "import ray"),
        ("nnunet", "import vtk"),
        ("nnunet (deployment)", "import deployments.nnunet.segmentation"),  # outside __init__
        ("smoothing", "import torch"),
        ("executor", "import deployments.nnunet.components"),
        ("gateway", "import torch"),
        ("graph", "import SimpleITK"),
    ],
)
def test_a_planted_import_fails(room: str, source: str, tmp_path: Path) -> None:
    (tmp_path / "planted.py").write_text(source)
    assert "planted" in failed_imports([(ROOMS[room], ["planted"])], tmp_path)


def test_a_new_stage_is_found(tmp_path: Path) -> None:
    (tmp_path / "deployments" / "magic").mkdir(parents=True)
    (tmp_path / "deployments" / "magic" / "wand.py").touch()
    found = find_modules(tmp_path)
    assert list(found) == ["deployments.magic.wand"]
    assert by_room(found).keys() - ROOMS.keys() == {"magic"}


def test_what_is_allowed_stays_importable(tmp_path: Path) -> None:
    """The opposite of the planted imports: hiding too much would prove nothing."""
    (tmp_path / "planted.py").write_text("import torch, nnunetv2, SimpleITK, scangraph.models, deployments.nnunet.components")
    room = ROOMS["nnunet"]
    assert not failed_imports([(room, ["planted"])], tmp_path)
    assert failed_imports([(replace(room, environment="base"), ["planted"])], tmp_path)


def test_rooms_in_one_process_do_not_open_each_others_doors(tmp_path: Path) -> None:
    (tmp_path / "first.py").write_text("import deployments.imageio.nifti")
    (tmp_path / "second.py").write_text("import deployments.imageio.nifti")
    rooms = [(ROOMS["imageio"], ["first"]), (ROOMS["shared"], ["second"])]
    assert failed_imports(rooms, tmp_path).keys() == {"second"}
