"""Start and stop a local Ray with the graph on it, for `scangraph serve`, `run` and `demo`."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import shutil
import socket
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import ray
from ray import serve
from ray.serve.config import HTTPOptions, ProxyLocation

from scangraph.handles import APPLICATION, SERVICE_FILE, TOKEN_FILE, use_token
from scangraph.settings import Settings

#: What Serve's HTTP proxies call when they start. They inherit the variable from Ray, which inherits it from us; in a cluster
#: it stands in the environment of `ray start`.
DOOR = "deployments.gateway.door:middlewares"


@dataclass(frozen=True)
class Service:
    """A running local service."""

    url: str
    settings: Settings
    seconds_to_start: float


#: Says where Ray's temporary folder is.
_LEFTOVER = "ray-folder"


def free_port(host: str) -> int:
    """Return a port that is free now."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def port_is_free(host: str, port: int) -> bool:
    """Whether a server could listen there."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
        return True


@contextlib.contextmanager
def local_service(settings: Settings, *, http: bool = True) -> Iterator[Service]:
    """Run the graph on a Ray of its own until the block ends.

    Parameters
    ----------
    settings : Settings
        `port` 0 takes a free one.
    http : bool
        Without it nothing listens for requests; the graph is used by handles.
    """
    from graph import build_app  # the command line stands on top of everything; nothing below imports the graph

    start = time.monotonic()
    settings.storage_root.mkdir(parents=True, exist_ok=True)
    run_folder = settings.data / "run"
    run_folder.mkdir(parents=True, exist_ok=True)
    if not (settings.data / TOKEN_FILE).exists():
        _write_private(settings.data / TOKEN_FILE, secrets.token_hex(32))
    use_token(settings.data)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"] = DOOR
    # Unix sockets have short names, so Ray's own files cannot live in a deep data folder.
    _remove_leftovers(run_folder)
    temporary = Path(tempfile.mkdtemp(prefix="scangraph-"))
    (run_folder / _LEFTOVER).write_text(str(temporary))
    service_file = settings.data / SERVICE_FILE
    port = settings.port or free_port(settings.host)
    for name in ("ray", "ray.serve"):  # what Ray says about itself; failures arrive as errors
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Ray's own, about its own future
            ray.init(
                address="local",
                namespace="serve",
                num_cpus=settings.cpus,
                object_store_memory=settings.object_store_mb and settings.object_store_mb * 2**20,
                include_dashboard=False,
                log_to_driver=False,
                configure_logging=False,
                logging_level=logging.ERROR,
                _temp_dir=str(temporary),
            )
            settings = with_gpu_share(settings.model_copy(update={"port": port}))
            options = HTTPOptions(host=settings.host, port=port) if http else HTTPOptions(location=ProxyLocation.Disabled)
            serve.start(http_options=options, logging_config={"log_level": "WARNING", "enable_access_log": False})
            serve.run(build_app(settings), name=APPLICATION, route_prefix="/")
        address = ray.get_runtime_context().gcs_address
        url = f"http://{settings.host}:{port}"
        _write_private(service_file, json.dumps({"ray_address": address, "url": url if http else None, "pid": os.getpid()}))
        yield Service(url, settings, time.monotonic() - start)
    finally:
        service_file.unlink(missing_ok=True)
        with contextlib.suppress(Exception):  # a Ray that died on its own has nothing left to take down
            # Replicas finish what they do. `serve.shutdown()` would also kill the controller, and Ray complains of its death.
            serve.delete(APPLICATION)
        ray.shutdown()
        _remove_leftovers(run_folder)


def _remove_leftovers(run_folder: Path) -> None:
    """Remove Ray's temporary folder, ours or the one of a service that was killed and could not."""
    with contextlib.suppress(OSError):
        left = Path((run_folder / _LEFTOVER).read_text())
        if left.name.startswith("scangraph-") and left.parent == Path(tempfile.gettempdir()):
            shutil.rmtree(left, ignore_errors=True)
        (run_folder / _LEFTOVER).unlink()


def with_gpu_share(settings: Settings) -> Settings:
    """Fill in the GPU share: half a GPU where the cluster has one, none elsewhere."""
    if settings.nnunet.num_gpus is not None:
        return settings
    share = 0.5 if ray.cluster_resources().get("GPU", 0) >= 0.5 else 0.0
    return settings.model_copy(update={"nnunet": settings.nnunet.model_copy(update={"num_gpus": share})})


def _write_private(path: Path, text: str) -> None:
    """Write a file that only its owner may read, from its first moment on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
