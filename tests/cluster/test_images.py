"""The images, as far as they can be looked at without a container engine; and the service runs from what they would hold."""

from __future__ import annotations

import errno
import http.server
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from PIL import Image as Picture

from cluster.images import contents, sizes
from cluster.images.contents import CODE, IMAGES, THROWN_OUT, Image, throw_out, walk
from cluster.images.sbom import normal, sbom
from deployments.imageio.nifti import write_nifti
from runtime_envs import pins
from runtime_envs.build import SERVING
from scangraph.cluster import proxies_environment
from scangraph.phantoms import Phantom
from scangraph.settings import Settings
from tests.conftest import ROOT

FOLDER = ROOT / "cluster/images"
ENVS = ROOT / ".envs"


def stages() -> dict[str, list[str]]:
    """Stage of the Dockerfile -> its instructions, each on one line."""
    text = re.sub(r"\\\n", " ", (FOLDER / "Dockerfile").read_text())
    found: dict[str, list[str]] = {}
    name = ""
    for line in text.splitlines():
        if match := re.match(r"FROM (\S+) AS (\S+)$", line):
            name = match[2]
            found[name] = [*found.get(match[1], []), line]
        elif line and not line.startswith("#"):
            found.setdefault(name, []).append(line)
    return found


STAGES = stages()


def test_what_serves_proxies_need_is_in_every_image() -> None:
    needed = {name: value for name, value in proxies_environment(Settings()).items() if name.startswith("RAY_SERVE_")}
    told = next(line for line in STAGES["base"] if line.startswith("ENV PATH=")).removeprefix("ENV ").split()
    assert needed.items() <= dict(pair.split("=", 1) for pair in told).items()


def built(*names: str) -> None:
    for name in names:
        if not (ENVS / name / "scangraph-lock").exists():
            pytest.skip(f"environment {name!r} is not built: run `make setup`")


@pytest.mark.parametrize("image", IMAGES, ids=lambda image: image.name)
def test_an_image_is_what_its_list_says(image: Image) -> None:
    lines = STAGES[image.name]
    copied = {target for line in lines for target in re.findall(r"COPY --from=\S+ \S+ (\.envs/\S+)$", line)}
    assert copied == {f".envs/{name}" for name in ("base", *image.environments)}
    for name in ("base", *image.environments):
        assert any(f"COPY --from=build-{name} /srv/scangraph/.envs/{name} .envs/{name}" == line for line in lines)
        making = " ".join(STAGES[f"build-{name}"])
        assert f"build.py {name} " in making
        assert f"contents.py .envs/{name}" in making  # what is thrown out
    said = [line for line in lines if line.startswith("COPY ") and "--" not in line]
    assert {name for line in said for name in line.split()[1:-1]} == set(CODE)
    assert [line for line in lines if line.startswith("USER ")][-1] == "USER 1000:1000"
    health = [line for line in lines if line.startswith("HEALTHCHECK ")][-1]
    asked = json.loads(health.partition("CMD ")[2])
    assert asked[0] == "health"
    assert f'"{asked[1]}": ' in (FOLDER / "health.py").read_text()
    assert any(f"sbom {image.name} >" in line for line in lines)
    installed = {word for line in lines if "apt-get install" in line for word in line.split() if word.startswith("lib")}
    assert {re.sub(r"\W+$", "", word) for word in installed} - {"lists/*"} >= set(image.system)
    assert not re.search(r"\b(gcc|g\+\+|make|build-essential|curl|git)\b", " ".join(lines))


def test_images_are_those_of_the_environments_and_all_are_built() -> None:
    assert {image.environments[0] for image in IMAGES if len(image.environments) == 1} == set(SERVING)
    bake = json.loads((FOLDER / "bake.json").read_text())
    targets = bake["target"]
    assert {target.get("target") for target in targets.values()} - {None} == {image.name for image in IMAGES}
    assert set(bake["group"]["default"]["targets"]) == targets.keys() - {"common"}
    assert (ROOT / targets["common"]["dockerfile"]).is_file()
    base = re.findall(r"^ARG PYTHON=python:(3\.11\.\d+)-slim-\w+$", (FOLDER / "Dockerfile").read_text(), re.MULTILINE)
    assert len(base) == 1
    service = yaml.safe_load((ROOT / "cluster/compose.yaml").read_text())["services"]["scangraph"]
    assert service["build"]["target"] == "whole"
    assert service["read_only"] is True
    ignored = (FOLDER / "Dockerfile.dockerignore").read_text().split()
    assert {"cluster/secrets", ".envs", ".git"} <= set(ignored)


@pytest.fixture
def small_environment(tmp_path: Path) -> Path:
    packages = tmp_path / "env/lib/python3.11/site-packages"
    files = ["ray/jars/a.jar", "ray/core.py", "numpy/tests/test_a.py", "numpy/linalg/tests/b.py", "skimage/__init__.pyi"]
    files += ["torch/include/a.h", "torch/testing/a.py", "pip/x.py", "vtkmodules/libviskores_a.so", "x/__pycache__/a.pyc"]
    for name in [*files, "s/c.a"]:
        (packages / name).parent.mkdir(parents=True, exist_ok=True)
        (packages / name).write_bytes(b"12345")
    (packages / "link").symlink_to(packages / "ray/jars")
    (tmp_path / "env/bin").mkdir()
    (tmp_path / "env/bin/pip").write_bytes(b"12345")
    return tmp_path / "env"


def test_what_is_thrown_out_is_the_list_and_nothing_else(small_environment: Path) -> None:
    packages = small_environment / "lib/python3.11/site-packages"
    before = {path for path, pattern in walk(small_environment) if pattern is None}
    assert throw_out(small_environment) == 8 * 5
    left = {path for path in small_environment.rglob("*") if path.is_symlink() or path.is_file()}
    names = {path.relative_to(packages).as_posix() for path in left if path.is_relative_to(packages)}
    assert names == {"ray/core.py", "skimage/__init__.pyi", "torch/testing/a.py", "link"}
    assert (small_environment / "bin/pip").exists()
    assert left == before
    assert throw_out(small_environment) == 0


def test_every_entry_of_the_list_finds_something() -> None:
    built(*SERVING)
    found = {pattern for name in SERVING for _, pattern in walk(ENVS / name)} - {None}
    assert THROWN_OUT.keys() - found <= {"__pycache__"}  # which is there once something has run


def test_a_layer_weighs_what_a_registry_would_be_sent(tmp_path: Path) -> None:
    import gzip
    import tarfile

    (tmp_path / "a").write_bytes(os.urandom(300_000))
    (tmp_path / "b").write_bytes(bytes(900_000))
    os.link(tmp_path / "a", tmp_path / "c")
    layer = sizes.weigh("x", sorted(tmp_path.iterdir()), tmp_path)
    with tempfile.TemporaryFile() as file:
        with tarfile.open(fileobj=file, mode="w") as tar:
            tar.add(tmp_path, arcname=".")
        file.seek(0)
        real = len(gzip.compress(file.read(), 6))
    assert layer.compressed == pytest.approx(real, rel=0.05)


def test_the_base_and_postprocess_images_keep_to_their_targets() -> None:
    """The two that take seconds to weigh; `python -m cluster.images.sizes` weighs all, and knows Debian's packages too."""
    built("base", "postprocess")
    by_name = {image.name: image for image in IMAGES}
    base = sum(layer.compressed or 0 for layer in sizes.layers_of(by_name["base"])) / 1e6 + sizes.PYTHON_IMAGE_MB
    assert base <= (by_name["base"].target_mb or 0)
    assert base + sum(layer.compressed or 0 for layer in sizes.layers_of(by_name["postprocess"])) / 1e6 <= 600


@pytest.mark.parametrize("image", IMAGES, ids=lambda image: image.name)
def test_the_bill_of_materials_is_valid_and_is_the_locks(image: Image, tmp_path: Path) -> None:
    built("base", *image.environments)
    status = tmp_path / "status"
    status.write_text(
        "Package: libegl1\nStatus: install ok installed\nArchitecture: amd64\nVersion: 1.6.0-1+b1\nDescription: a\n b: c\n\n"
        "Package: gone\nStatus: deinstall ok config-files\nArchitecture: amd64\nVersion: 1\n"
    )
    told = sbom(image, ENVS, status)
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(told)) is None
    components = told["components"]
    python = {(c["name"], c["version"].partition("+")[0]) for c in components if "pypi" in c["bom-ref"]}
    locked = {tuple(pin.partition(" ;")[0].split("==")) for name in ("base", *image.environments) for pin in pins(name)}
    assert {name for name, _ in python - {(normal(name), version) for name, version in locked}} <= {"setuptools"}  # uv's seed
    assert {(normal(name), version) for name, version in locked} <= python
    assert {c["name"] for c in components if "pkg:deb" in c["bom-ref"]} == {"libegl1"}
    assert {"totalseg-demo"} <= {c["name"] for c in components if c["type"] == "machine-learning-model"}
    with_licence = [c for c in components if "licenses" in c]
    assert len(with_licence) > 0.9 * len(components) - 1


class _Answers(http.server.BaseHTTPRequestHandler):
    said = b"success"

    def do_GET(self) -> None:
        self.send_response(503 if self.said == b"away" else 200)
        self.end_headers()
        self.wfile.write(self.said)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def answering() -> Iterator[int]:
    with http.server.HTTPServer(("127.0.0.1", 0), _Answers) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(("said", "proxy", "service"), [(b"success", 0, 0), (b"draining", 1, 0), (b"away", 1, 1)])
def test_health_is_what_is_answered(
    said: bytes, proxy: int, service: int, answering: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_Answers, "said", said)

    def code(*asked: str, port: int = answering) -> int:
        command = [sys.executable, str(FOLDER / "health.py"), *asked]
        return subprocess.run(command, env={"SCANGRAPH_PORT": str(port)}, capture_output=True, check=False).returncode

    assert (code("proxy"), code("service"), code("gateway")) == (proxy, service, service)
    assert code("service", "proxy") == max(proxy, service)
    assert code("somebody") == 1
    assert code("service", port=1) == 1


# --- the service runs from what stays ----------------------------------------------------------------------------------------


def copy(tree: Path) -> None:
    """Lay out what `whole` holds, by hard links."""
    for name in CODE:
        for path in [ROOT / name] if (ROOT / name).is_file() else sorted((ROOT / name).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                link(path, tree / path.relative_to(ROOT))
    for name in SERVING:
        for path, pattern in walk(ENVS / name):
            if pattern is None and not path.name.startswith(("__editable__", "__editable___")):
                link(path, tree / path.relative_to(ROOT))
    # The folders of what is thrown out are there, and empty where nothing else is in them.
    for pattern in THROWN_OUT:
        if "*" not in pattern and "/" in pattern:
            for packages in tree.glob(".envs/*/lib/python3.11/site-packages"):
                if (contents.site_packages(ENVS / packages.parents[2].name) / pattern).exists():
                    (packages / pattern).parent.mkdir(parents=True, exist_ok=True)


def link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_symlink():
        target.symlink_to(source.readlink())
    else:
        os.link(source, target)


SCRIPT = """
import os, sys, tempfile, urllib.request
from pathlib import Path
import ray, scangraph
from scangraph.accounts_cli import local_token
from scangraph.client import Client
from scangraph.cluster import local_service
from scangraph.settings import HOME, load_settings

work = Path(sys.argv[1])
assert all(Path(module.__file__).is_relative_to(HOME) for module in (ray, scangraph)), HOME

# What KubeRay asks the head's dashboard.
os.environ.update(RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0")
with tempfile.TemporaryDirectory(prefix="scangraph-", ignore_cleanup_errors=True) as folder:
    quiet = {"log_to_driver": False, "_temp_dir": folder}
    context = ray.init(address="local", num_cpus=1, include_dashboard=True, dashboard_port=0, **quiet)
    for path in ("api/gcs_healthz", "api/serve/applications/"):
        with urllib.request.urlopen(f"http://{context.dashboard_url}/{path}", timeout=60) as answer:
            assert answer.status == 200, path
    ray.shutdown()

# Every stage, its largest libraries, and the drawing of pictures.
with local_service(load_settings(data=work / "data", port=0, cpus=2, object_store_mb=512)) as service:
    with Client(service.url, token=lambda: local_token(service.settings)) as client:
        phases = {phase: work / f"{phase}.nii.gz" for phase in ("arterial", "portal", "delayed")}
        planned = client.run("renal-planning", phases, work / "planned")
        seen = client.run("resize-ai-detect", {"image": work / "a.png"}, work / "seen")
print("MADE", *sorted({*planned.files, *seen.files}))
"""


@pytest.mark.slow
def test_the_service_runs_from_what_stays(tmp_path: Path, phantom: Phantom) -> None:
    built(*SERVING)
    tree, work = tmp_path / "srv", tmp_path / "work"
    try:
        copy(tree)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        pytest.skip("the environments are on another file system, and are too large to be copied")
    work.mkdir()
    for phase, volume in phantom.volumes.items():
        (work / f"{phase}.nii.gz").write_bytes(write_nifti(volume))
    Picture.fromarray(np.arange(96 * 128 * 3, dtype=np.uint8).reshape(96, 128, 3)).save(work / "a.png")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "RAY_", "VIRTUAL_ENV"))}
    # As in the image: bytecode goes elsewhere, and the code is found by its path.
    environment |= {"PYTHONPATH": str(tree), "PYTHONPYCACHEPREFIX": str(tmp_path / "pycache")}
    command = [str(tree / ".envs/base/bin/python"), "-c", SCRIPT, str(work)]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert {"mask", "scene", "preview", "boxes"} <= set(done.stdout.rpartition("MADE ")[2].split())
    assert not list(tree.rglob("__pycache__"))
