"""Environments: what pip is configured with serves uv too, nothing is built twice, and a failure says which stage and why."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from runtime_envs import build
from runtime_envs.build import APART, EXTRAS, HERE, LOCKED, SERVING, SetupError, build_page, fingerprint, uv_environment

TINY = "tiny"


def pins(stage: str) -> dict[str, str]:
    """Version of each distribution in a lock."""
    lines = [line for line in (HERE / f"{stage}.txt").read_text().splitlines() if not line.startswith("#")]
    return dict(line.split("==") for line in lines)


# --- pip's configuration ------------------------------------------------------------------------------------------------------


def configured(text: str, folder: Path, **variables: str) -> dict[str, str]:
    """The variables that uv gets where pip has this configuration."""
    (folder / "pip.conf").write_text(text)
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "UV_", "SSL_"))}
    config = str(folder / "pip.conf") if text else os.devnull
    return uv_environment(sys.executable, {**plain, "PIP_CONFIG_FILE": config, **variables})


# The registries in these tests are made up (example.org: RFC 2606; a, b and c are no hosts), and nothing is asked of them.


def test_pips_wheel_folders_and_indexes_become_uvs(tmp_path: Path) -> None:
    text = """
[global]
index-url = https://example.org/main
extra-index-url =
    https://example.org/one
    https://example.org/two
find-links = /wheels
    https://example.org/wheels
cert = /etc/company.pem
"""
    env = configured(text, tmp_path)
    assert env["UV_DEFAULT_INDEX"] == "https://example.org/main"
    assert env["UV_INDEX"] == "https://example.org/one https://example.org/two"
    assert env["UV_FIND_LINKS"] == "/wheels,https://example.org/wheels"
    assert env["SSL_CERT_FILE"] == "/etc/company.pem"
    assert env["UV_INDEX_STRATEGY"] == "unsafe-best-match"


def test_pips_variables_go_before_its_files_and_install_before_global(tmp_path: Path) -> None:
    text = (
        "[global]\nindex-url = https://a\nfind-links = /a\n[install]\nindex-url = https://b\n[wheel]\nindex-url = https://c\n"
    )
    env = configured(text, tmp_path, PIP_FIND_LINKS="/b /c")
    assert env["UV_DEFAULT_INDEX"] == "https://b"
    assert env["UV_FIND_LINKS"] == "/b,/c"


def test_the_users_own_uv_settings_win(tmp_path: Path) -> None:
    text = "[global]\nextra-index-url = https://example.org/pip\nfind-links = /pip\ncert = /pip.pem\n"
    own = {"UV_INDEX": "https://example.org/own", "UV_FIND_LINKS": "/own", "UV_INDEX_STRATEGY": "first-index"}
    own |= {"UV_LINK_MODE": "copy", "UV_HTTP_TIMEOUT": "7", "SSL_CERT_FILE": "/own.pem"}
    env = configured(text, tmp_path, **own)
    assert {name: env[name] for name in own} == own


def test_without_a_configuration_the_normal_registry_serves(tmp_path: Path) -> None:
    env = configured("", tmp_path)
    assert not {"UV_INDEX", "UV_DEFAULT_INDEX", "UV_FIND_LINKS", "UV_INDEX_STRATEGY", "SSL_CERT_FILE"} & env.keys()
    assert env["PATH"] == os.environ["PATH"]


# --- building -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def env() -> dict[str, str]:
    return uv_environment(sys.executable, dict(os.environ))


@pytest.fixture(scope="module")
def uv(env: dict[str, str]) -> str:
    return build.find_uv(env)


def make(folder: Path, lock: str, uv: str, env: dict[str, str]) -> str:
    """Build the environment `tiny` of a lock in a folder of its own."""
    (folder / f"{TINY}.txt").write_text(lock)
    return build.build(TINY, uv, env, locks=folder, envs=folder / "envs")


def packages(python: Path) -> str:
    """Name and version of what an environment holds."""
    code = "import importlib.metadata as m; print(*(f'{d.name}=={d.version}' for d in m.distributions()))"
    return subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True).stdout


def test_builds_what_the_lock_says_and_only_once(tmp_path: Path, uv: str, env: dict[str, str]) -> None:
    python = tmp_path / "envs" / TINY / "bin" / "python"
    idna, attrs = (f"{name}=={pins('base')[name]}" for name in ("idna", "attrs"))
    assert make(tmp_path, idna, uv, env).startswith("tiny: built in")
    assert idna in packages(python)
    assert "pip==" in packages(python)  # Ray-built environments and people expect it

    (python.parent / "mark").touch()
    assert make(tmp_path, idna, uv, env) == "tiny: up to date"
    assert (python.parent / "mark").exists()

    assert make(tmp_path, attrs, uv, env).startswith("tiny: built in")
    assert attrs in packages(python)
    assert idna not in packages(python)
    assert not (python.parent / "mark").exists()


def test_a_wrong_pin_names_stage_and_cause_and_is_tried_again(tmp_path: Path, uv: str, env: dict[str, str]) -> None:
    for _ in range(2):  # a half-built environment is not taken for a built one
        with pytest.raises(SetupError) as caught:
            make(tmp_path, "numpy==99.99", uv, env)
        assert "environment 'tiny'" in str(caught.value)
        assert "numpy==99.99" in str(caught.value)
        assert "Traceback" not in str(caught.value)


def test_an_unknown_stage_ends_in_a_message(capsys: pytest.CaptureFixture[str]) -> None:
    assert build.main(["magic"]) == 1
    shown = capsys.readouterr()
    assert "setup failed: no lock file for stage 'magic'" in shown.err


def test_another_python_ends_in_a_message(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 13, 0))
    assert build.main([]) == 2
    assert "needs Python 3.11" in capsys.readouterr().out


def test_fingerprint_follows_everything_an_environment_is_made_from(tmp_path: Path) -> None:
    lock = tmp_path / "tiny.txt"
    lock.write_text("torch==1")
    before = fingerprint(lock, {"PATH": "/a"})
    assert fingerprint(lock, {"PATH": "/b"}) == before
    assert fingerprint(lock, {"UV_TORCH_BACKEND": "cpu"}) != before
    assert fingerprint(lock, {"UV_TORCH_BACKEND": "cpu"}) != fingerprint(lock, {"UV_TORCH_BACKEND": "cu130"})
    lock.write_text("torch==2")
    assert fingerprint(lock, {"PATH": "/a"}) != before


def test_a_base_environment_runs_the_graph_and_the_command(tmp_path: Path, uv: str, env: dict[str, str]) -> None:
    build.build("base", uv, env, envs=tmp_path)
    bin_folder = tmp_path / "base" / "bin"
    code = "import graph, scangraph.handles, ray, numpy; print(ray.__version__, numpy.__version__)"
    done = subprocess.run([str(bin_folder / "python"), "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.split() == [pins("base")["ray"], pins("base")["numpy"]], done.stderr
    command = subprocess.run(
        [str(bin_folder / "scangraph"), "--help"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert command.returncode == 0, command.stderr
    assert "Usage" in command.stdout


def test_the_builder_runs_before_anything_is_installed() -> None:
    done = subprocess.run(
        [sys.executable, "-I", "-S", str(HERE / "build.py"), "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "--lock" in done.stdout


# --- the locks ----------------------------------------------------------------------------------------------------------------


def test_every_list_has_a_lock() -> None:
    assert {path.stem for path in HERE.glob("*.in")} == set(LOCKED)
    assert {path.stem for path in HERE.glob("*.txt")} - {"overrides"} == set(LOCKED)


@pytest.mark.parametrize("stage", LOCKED)
def test_locks_are_exact_and_fit_every_machine(stage: str) -> None:
    locked = pins(stage)
    assert all(re.fullmatch(r"[\w.!]+", version) for version in locked.values()), "a pin with a local build or a range"
    # Each torch build pins its own CUDA packages; what is made for GPUs alone has its own.
    only_gpus = "cugraph-cu13" in locked
    unwanted = r"triton|torchvision|openvino-telemetry" + ("" if only_gpus else "|nvidia|cuda")
    assert not [name for name in locked if re.match(unwanted, name)]


@pytest.mark.parametrize("stage", LOCKED)
def test_locks_hold_what_is_asked_for(stage: str) -> None:
    for line in (HERE / f"{stage}.in").read_text().splitlines():
        name, _, version = re.sub(r"\[.*\]", "", line.partition("#")[0]).strip().lower().partition("==")
        if name and not name.startswith("-r"):
            assert pins(stage)[name].startswith(version)


def test_serving_stages_are_parts_of_one_environment() -> None:
    whole = pins("dev")
    for stage in SERVING:
        assert pins(stage).items() <= whole.items()
        assert {"ray", "numpy", "pydantic"} <= pins(stage).keys()


def test_extras_have_the_same_pins_and_more() -> None:
    assert not set(EXTRAS) & set(SERVING)  # so nothing builds them unasked
    whole = pins("dev")
    for extra in EXTRAS:
        plain, apart = pins(extra.partition("-")[0]), set(APART.get(extra, ()))
        assert plain.keys() < pins(extra).keys()
        # What an extra may have in another version is what its packages forbid, and no more than that.
        assert {name for name, version in pins(extra).items() if whole.get(name, version) != version} == apart


def test_the_old_interpreter_differs_in_numpy_alone() -> None:
    old, new = pins("numpy1"), pins("dev")
    assert old["numpy"].startswith("1.26.")
    assert {name for name in old if old[name] != new[name]} == {"numpy"}


# --- the page --------------------------------------------------------------------------------------------------------------

_BUNDLER = """
const { mkdirSync, copyFileSync, writeFileSync } = require('node:fs')
const out = process.argv[process.argv.indexOf('--outDir') + 1]
mkdirSync(out + '/assets', { recursive: true })
writeFileSync(out + '/assets/left.js', 'half')
copyFileSync('index.html', out + '/index.html')
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A checkout with a page whose bundler needs no packages."""
    if shutil.which("npm") is None:
        pytest.skip("npm is not on this machine")
    (tmp_path / "deployments/gateway").mkdir(parents=True)
    ui = tmp_path / "ui"
    ui.mkdir()
    (ui / "index.html").write_text("first")
    (ui / "bundle.cjs").write_text(_BUNDLER)
    about = {"name": "page", "version": "1.0.0", "scripts": {"build": "node bundle.cjs", "prepare": "exit 9"}}
    (ui / "package.json").write_text(json.dumps(about))
    whole = {"name": "page", "version": "1.0.0", "lockfileVersion": 3, "packages": {"": {"name": "page", "version": "1.0.0"}}}
    (ui / "package-lock.json").write_text(json.dumps(whole))
    return tmp_path


def test_the_page_is_built_when_it_changed(home: Path) -> None:
    page = home / "deployments/gateway/page"
    assert build_page(dict(os.environ), home).startswith("page: built in")
    assert (page / "index.html").read_text() == "first"
    assert build_page(dict(os.environ), home) == "page: up to date"
    (home / "ui/node_modules/left").mkdir(parents=True)  # what npm leaves there is no source
    (home / "ui/node_modules/left/a.js").write_text("")
    assert build_page(dict(os.environ), home) == "page: up to date"
    (home / "ui/index.html").write_text("second")
    (page / "assets/old.js").write_text("")
    assert build_page(dict(os.environ), home).startswith("page: built in")
    assert (page / "index.html").read_text() == "second"
    assert not (page / "assets/old.js").exists()
    assert sorted(path.name for path in page.parent.iterdir()) == ["page"]


def test_what_cannot_be_built_leaves_what_is_there(home: Path) -> None:
    page = home / "deployments/gateway/page"
    assert build_page(dict(os.environ), home).startswith("page: built in")
    (home / "ui/index.html").unlink()
    said = build_page(dict(os.environ), home)
    assert said.startswith("page: not built, the one that is there stays: bundling ui/ failed")
    assert "ENOENT" in said
    assert (page / "index.html").read_text() == "first"
    assert sorted(path.name for path in page.parent.iterdir()) == ["page"]
    (home / "ui/package-lock.json").write_text("nothing that npm understands")
    assert "fetching the page's packages failed" in build_page(dict(os.environ), home)


def test_without_node_the_page_is_left_out(home: Path, tmp_path: Path) -> None:
    said = build_page({"PATH": str(tmp_path)}, home)
    assert said == "page: not built, the service runs without it: it needs Node 20.19 or newer with npm, and there is none"
    for name, text in (("node", "#!/bin/sh\necho v18.19.0\n"), ("npm", "#!/bin/sh\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    assert build_page({"PATH": str(tmp_path)}, home).endswith("and this is 18.19")
    assert build_page(dict(os.environ), tmp_path / "none") == "page: not built, there is no ui/ here"
