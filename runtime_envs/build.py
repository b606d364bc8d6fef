#!/usr/bin/env python3
"""Build one virtual environment per stage from the locked pins beside this file.

    python3.11 runtime_envs/build.py [STAGE ...]        make what is missing or outdated (default: every serving stage)
    python3.11 runtime_envs/build.py --lock [STAGE ...] resolve the `.in` files again into the `.txt` locks

Besides, `../proto` is compiled into `scangraph/imageflow`, where it changed, by the compiler in `.envs/protoc`; and the web
page, `../ui`, is bundled into `deployments/gateway/page`, where it changed and Node is there. All else works without the page.

Standard library only: this runs before anything is installed. uv does the work (in a small venv of its own, `.envs/tools`)
and hard-links every file out of one cache, so a second environment with the same torch costs seconds and no space.
"""

from __future__ import annotations

import argparse
import ast
import concurrent.futures
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
ENVS = HERE.parent / ".envs"
UV_VERSION = "0.13.8"
SERVING = ("base", "nnunet", "smoothing", "postprocess", "imaging")
#: Stages with more than they need, which a setting chooses; built only when they are named.
EXTRAS = ("smoothing-open3d", "postprocess-cugraph")
#: What an extra's packages want in another version than everybody else; all other pins are `dev`'s.
APART = {"postprocess-cugraph": ("numba", "llvmlite", "pandas")}
#: What compiles `proto/`; nothing runs in it.
COMPILER = "protoc"
#: The oldest Node that bundles the page.
NODE = (20, 19)
#: `dev` goes first and constrains the serving stages' locks, so that one environment can hold all of them for tests and
#: notebooks; `numpy1`, an old interpreter for the pickling test, stands by itself.
LOCKED = ("dev", *SERVING, *EXTRAS, COMPILER, "numpy1")
#: torch's own CUDA packages stay out of the locks: each torch build pins its own exactly, and the CPU build has none.
TORCH_BUILD_ONLY = re.compile(r"^(nvidia-|cuda-|triton\b)", re.IGNORECASE)


class SetupError(Exception):
    """An environment could not be built; the message names the stage and the cause."""


def pip_configuration(python: str, environ: dict[str, str]) -> dict[str, str]:
    """Read what `pip install` would use, because uv does not: an offline wheel folder or a company index must serve both."""
    command = [python, "-m", "pip", "config", "list"]
    out = subprocess.run(command, env=environ, capture_output=True, text=True, check=False).stdout
    scopes: dict[str, dict[str, str]] = {"global": {}, "install": {}, ":env:": {}}  # the later goes before the earlier
    for line in out.splitlines():
        key, _, value = line.partition("=")
        scope, _, name = key.rpartition(".")
        if scope in scopes:
            scopes[scope][name] = " ".join(ast.literal_eval(value).split())  # pip prints repr(), with \n between entries
    return {name: value for values in scopes.values() for name, value in values.items()}


def uv_environment(python: str, environ: dict[str, str]) -> dict[str, str]:
    """Return `environ` with uv's variables filled from pip's configuration where the user has not set them."""
    env = dict(environ)
    pip = pip_configuration(python, environ)
    given = {
        "UV_FIND_LINKS": pip.get("find-links", "").replace(" ", ","),
        "UV_INDEX": pip.get("extra-index-url", ""),
        "UV_DEFAULT_INDEX": pip.get("index-url", ""),
        "SSL_CERT_FILE": pip.get("cert", ""),
    }
    for name, value in given.items():
        if value:
            env.setdefault(name, value)
    # pip takes the best version of all its indexes; uv by default the first index that knows the name.
    if pip.get("extra-index-url"):
        env.setdefault("UV_INDEX_STRATEGY", "unsafe-best-match")
    env.setdefault("UV_HTTP_TIMEOUT", "180")
    env.setdefault("UV_LINK_MODE", "hardlink")
    env.setdefault("UV_CONCURRENT_DOWNLOADS", "8")
    return env


def run(purpose: str, command: list[str], env: dict[str, str], given: str = "", at: Path | None = None) -> None:
    """Run one command, `given` on its input; turn its failure into a message that names the purpose and the cause."""
    done = subprocess.run(command, env=env, input=given, capture_output=True, text=True, check=False, cwd=at)
    if done.returncode:
        cause = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("WARNING")]
        raise SetupError(f"{purpose} failed:\n  " + "\n  ".join(cause[-12:]))


def find_uv(env: dict[str, str]) -> str:
    """Install the pinned uv beside the environments (never into the user's Python) and return its path."""
    tools = ENVS / "tools"
    uv = tools / "bin" / "uv"
    marker = tools / f"uv-{UV_VERSION}"
    if not (uv.exists() and marker.exists()):
        run("making the venv of uv", [sys.executable, "-m", "venv", "--clear", str(tools)], env)
        run(f"installing uv {UV_VERSION}", [str(tools / "bin/python"), "-m", "pip", "install", "-q", f"uv=={UV_VERSION}"], env)
        marker.touch()
    return str(uv)


def fingerprint(lock: Path, env: dict[str, str]) -> str:
    """What an environment was made from; an equal fingerprint means that there is nothing to do."""
    made_from = [lock.read_text(), (HERE / "overrides.txt").read_text(), sys.version, env.get("UV_TORCH_BACKEND", "")]
    return hashlib.sha256("\0".join(made_from).encode()).hexdigest()


def build(stage: str, uv: str, env: dict[str, str], locks: Path = HERE, envs: Path = ENVS) -> str:
    """Make `<envs>/<stage>` equal to `<locks>/<stage>.txt` and return one line that says what was done."""
    start = time.monotonic()
    lock = locks / f"{stage}.txt"
    if not lock.exists():
        raise SetupError(f"no lock file for stage {stage!r}: expected {lock}")
    target = envs / stage
    marker = target / "scangraph-lock"
    wanted = fingerprint(lock, env)
    if marker.exists() and marker.read_text() == wanted and (target / "bin/python").exists():
        return f"{stage}: up to date"
    marker.unlink(missing_ok=True)
    purpose = f"building environment {stage!r} from {lock.name}"
    run(purpose, [uv, "venv", "-q", "--clear", "--seed", "--python", sys.executable, str(target)], env)
    python = str(target / "bin/python")
    install = [uv, "pip", "install", "-q", "--python", python, "--override", str(HERE / "overrides.txt"), "-r", str(lock)]
    run(purpose, install, env)
    # The command `scangraph`; the other stages find the code by their working directory, and so do images, which have it later.
    if stage in ("base", "dev") and (HERE.parent / "pyproject.toml").exists():
        run(purpose, [uv, "pip", "install", "-q", "--python", python, "--no-deps", "-e", str(HERE.parent)], env)
    marker.write_text(wanted)
    return f"{stage}: built in {time.monotonic() - start:.0f} s"


def compile_proto(env: dict[str, str], home: Path = HERE.parent, envs: Path = ENVS) -> str:
    """Make `scangraph/imageflow` out of `proto/imageflow` and return one line that says what was done.

    Below `scangraph`, so that whatever can import that can import these: Serve's proxies, replicas, and a client's machine.
    """
    sources = sorted((home / "proto").glob("imageflow/**/*.proto"))
    target = home / "scangraph" / "imageflow"
    marker = target / "made-from"
    made_from = [(HERE / f"{COMPILER}.txt").read_text(), *(source.read_text() for source in sources)]
    wanted = hashlib.sha256("\0".join(made_from).encode()).hexdigest()
    if marker.exists() and marker.read_text() == wanted:
        return "proto: up to date"
    marker.unlink(missing_ok=True)
    command = [str(envs / COMPILER / "bin/python"), "-m", "grpc_tools.protoc", f"--proto_path=scangraph={home / 'proto'}"]
    command += [f"--{kind}_out={home}" for kind in ("python", "pyi", "grpc_python")]
    run("compiling proto/", [*command, *(f"scangraph/{source.relative_to(home / 'proto')}" for source in sources)], env)
    marker.write_text(wanted)
    return "proto: compiled"


def build_page(environ: dict[str, str], home: Path = HERE.parent) -> str:
    """Make `deployments/gateway/page` out of `ui` and return one line that says what was done, or why it was not.

    Packages come by npm in exactly the versions of `ui/package-lock.json`, and no script of theirs is run. The new page is put
    into the old one's place when it is whole: a service that runs gives either.
    """
    start, ui, target = time.monotonic(), home / "ui", home / "deployments" / "gateway" / "page"
    if not (ui / "package-lock.json").exists():
        return "page: not built, there is no ui/ here"
    sources = sorted(path for path in ui.rglob("*") if path.is_file() and "node_modules" not in path.relative_to(ui).parts)
    parts = [part for path in sources for part in (path.relative_to(ui).as_posix().encode(), path.read_bytes())]
    wanted = hashlib.sha256(b"\0".join(parts)).hexdigest()
    if (target / "made-from").exists() and (target / "made-from").read_text() == wanted:
        return "page: up to date"
    stays = "the one that is there stays" if (target / "index.html").exists() else "the service runs without it"
    node, npm = (shutil.which(name, path=environ.get("PATH", "")) for name in ("node", "npm"))
    found = _node_version(node, environ) if node and npm else None
    if found is None or found < NODE:
        has = "there is none" if found is None else f"this is {'.'.join(map(str, found))}"
        return f"page: not built, {stays}: it needs Node {'.'.join(map(str, NODE))} or newer with npm, and {has}"
    made = target.with_name(f".page-{os.getpid()}")
    try:
        _install_packages(str(npm), ui, environ)
        bundle = [str(npm), "run", "--silent", "build", "--", "--outDir", str(made), "--emptyOutDir"]
        run("bundling ui/", bundle, environ, at=ui)
        (made / "made-from").write_text(wanted)
        old = target.with_name(f".page-{os.getpid()}-old")
        if target.exists():
            target.rename(old)
        made.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    except (SetupError, OSError) as error:
        shutil.rmtree(made, ignore_errors=True)
        return f"page: not built, {stays}: {error}"
    return f"page: built in {time.monotonic() - start:.0f} s"


def _node_version(node: str, environ: dict[str, str]) -> tuple[int, ...] | None:
    out = subprocess.run([node, "--version"], env=environ, capture_output=True, text=True, check=False).stdout
    found = re.match(r"v(\d+)\.(\d+)", out)
    return (int(found[1]), int(found[2])) if found else None


def _install_packages(npm: str, ui: Path, environ: dict[str, str]) -> None:
    """Install what the lock says, unless it is there already."""
    marker, wanted = ui / "node_modules" / "made-from", hashlib.sha256((ui / "package-lock.json").read_bytes()).hexdigest()
    if marker.exists() and marker.read_text() == wanted:
        return
    run("fetching the page's packages", [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund"], environ, at=ui)
    marker.parent.mkdir(exist_ok=True)
    marker.write_text(wanted)


def lock(uv: str, env: dict[str, str], stages: Sequence[str] = LOCKED) -> None:
    """Resolve the `.in` files again."""
    for stage in stages:
        target = HERE / f"{stage}.txt"
        command = [uv, "pip", "compile", "-q", "--upgrade", "--python-version", "3.11", "--no-header", "--no-annotate"]
        command += ["--no-emit-index-url", "--no-emit-find-links", "--override", str(HERE / "overrides.txt")]
        shared: list[str] = []
        if stage in (*SERVING, *EXTRAS, COMPILER):
            apart = APART.get(stage, ())
            shared = [pin for pin in (HERE / "dev.txt").read_text().splitlines() if pin.partition("==")[0] not in apart]
            command += ["-c", "-"]
        run(f"resolving {stage}.in", [*command, str(HERE / f"{stage}.in"), "-o", str(target)], env, "\n".join(shared))
        pins = target.read_text().splitlines()
        if any(line.startswith("torch==") for line in pins):
            pins = [line for line in pins if not TORCH_BUILD_ONLY.match(line)]
        # A build's local version ("+cpu") is the machine's choice, not the lock's.
        pins = [re.sub(r"^(torch==[^+\s]+)\+\S+", r"\1", line) for line in pins]
        head = f"# Locked by `make lock` from {stage}.in; do not edit."
        target.write_text("\n".join([head, *pins]) + "\n")
        print(f"{stage}: {len(pins)} pins")


def main(argv: list[str] | None = None) -> int:
    """Build the environments in parallel and say what was done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", help=f"of {', '.join(LOCKED)}; default: {', '.join(SERVING)}, and all for --lock")
    parser.add_argument("--lock", action="store_true", help="resolve again instead of building")
    arguments = parser.parse_args(argv)
    if sys.version_info[:2] != (3, 11):
        print(f"scangraph needs Python 3.11, this is {sys.version.split()[0]}: run `make PYTHON=/path/to/python3.11`")
        return 2
    env = uv_environment(sys.executable, dict(os.environ))
    try:
        uv = find_uv(env)
        if arguments.lock:
            lock(uv, env, arguments.stages or LOCKED)
            return 0
        # The largest first, so that its downloads overlap everything else.
        stages = sorted({COMPILER, *(arguments.stages or SERVING)}, key=lambda s: s not in ("dev", "nnunet"))
        with concurrent.futures.ThreadPoolExecutor() as pool:
            jobs = [pool.submit(build, stage, uv, env) for stage in stages]
            failures = []
            for job in concurrent.futures.as_completed(jobs):
                try:
                    print(job.result(), flush=True)
                except SetupError as error:
                    failures.append(error)
        if failures:
            raise SetupError("\n".join(str(error) for error in failures))
        print(compile_proto(env), flush=True)
        print(build_page(dict(os.environ)), flush=True)
    except SetupError as error:
        print(f"setup failed: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
