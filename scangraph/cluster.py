"""Start and stop a local Ray with the graph on it, for `scangraph serve`, `run` and `demo`."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import socket
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import ray
from ray import serve
from ray._private import auto_init_hook
from ray.serve.config import HTTPOptions, ProxyLocation, gRPCOptions

from scangraph.handles import APPLICATION, SERVICE_FILE, TOKEN_FILE, use_token
from scangraph.settings import Settings, StageSettings
from scangraph.supervising import LEFTOVER, remove_leftovers

#: What Serve's HTTP proxies call when they start. They inherit the variable from Ray, which inherits it from us; in a cluster
#: it stands in the environment of `ray start`.
DOOR = "deployments.gateway.door:middlewares"
#: What Serve's gRPC proxies call when they start.
SERVICES = "deployments.gateway.rpc.door.add_services"
#: How Serve's controller looks after its proxies. A dead one is told by three looks; Serve's pause between them, 10 s, makes an
#: absence of 30 s. And one that is not up within 5 s is killed and begun anew, with which a busy machine is never done.
_PROXIES_CARE = {"RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "2", "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60"}


@dataclass(frozen=True)
class Service:
    """A running local service."""

    url: str
    settings: Settings
    seconds_to_start: float
    grpc: str | None = None


_KEPT_LOGS_SECONDS = 30 * 86400


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
        `port` 0 takes a free one, and so does `grpc.port`.
    http : bool
        Without it nothing listens for requests; the graph is used by handles.
    """
    from graph import build_app  # the command line stands on top of everything; nothing below imports the graph

    start = time.monotonic()
    log = settings.log.model_copy(update={"folder": settings.log.folder or settings.data / "logs"})
    settings = settings.model_copy(update={"log": log})
    _prune_logs(settings.data / "logs")
    settings.storage_root.mkdir(parents=True, exist_ok=True)
    run_folder = settings.data / "run"
    run_folder.mkdir(parents=True, exist_ok=True)
    if not (settings.data / TOKEN_FILE).exists():
        _write_private(settings.data / TOKEN_FILE, secrets.token_hex(32))
    use_token(settings.data)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # A thread of Serve's that outlives the service would start another Ray, and end the process with a fault as it exits.
    auto_init_hook.enable_auto_connect = False
    # Unix sockets have short names, so Ray's own files cannot live in a deep data folder.
    remove_leftovers(run_folder)
    temporary = Path(tempfile.mkdtemp(prefix="scangraph-"))
    (run_folder / LEFTOVER).write_text(str(temporary))
    service_file = settings.data / SERVICE_FILE
    port = settings.port or free_port(settings.host)
    grpc = grpc_port(settings, port) if http and settings.grpc.enabled else None
    for name in ("ray", "ray.serve"):  # what Ray says about itself; failures arrive as errors
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), _environment(proxies_environment(settings)):
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
                _system_config={"metrics_report_interval_ms": int(settings.metrics.interval_seconds * 1000)},
            )
            settings = with_gpu_share(settings.model_copy(update={"port": port}))
            options = HTTPOptions(host=settings.host, port=port) if http else HTTPOptions(location=ProxyLocation.Disabled)
            told = {"log_level": "WARNING", "encoding": settings.log.format.upper(), "enable_access_log": False}
            serve.start(
                http_options=options,
                grpc_options=grpc_options(settings, grpc),
                logging_config={**told, "logs_dir": str(settings.log.folder)},
            )
            serve.run(build_app(settings), name=APPLICATION, route_prefix="/")
        address = ray.get_runtime_context().gcs_address
        url = f"http://{settings.host}:{port}"
        target = f"{settings.host}:{grpc}" if grpc else None
        told = {"ray_address": address, "url": url if http else None, "grpc": target, "pid": os.getpid()}
        _write_private(service_file, json.dumps(told))
        yield Service(url, settings, time.monotonic() - start, target)
    finally:
        service_file.unlink(missing_ok=True)
        with contextlib.suppress(Exception):  # a Ray that died on its own has nothing left to take down
            # Replicas finish what they do. `serve.shutdown()` would also kill the controller, and Ray complains of its death.
            serve.delete(APPLICATION)
        ray.shutdown()
        remove_leftovers(run_folder)


def grpc_port(settings: Settings, http_port: int) -> int:
    """Return the port for gRPC: the wanted one, or 1000 above HTTP's if that is free, or any free one."""
    near = http_port + 1000
    if settings.grpc.port is None and settings.port and near < 65536 and port_is_free(settings.host, near):
        return near
    return settings.grpc.port or free_port(settings.host)


def grpc_options(settings: Settings, port: int | None) -> gRPCOptions:
    """Return what Serve is told of gRPC; None for its port leaves it out."""
    services = [SERVICES] if port else []
    return gRPCOptions(
        port=port or 0, grpc_servicer_functions=services, enable_reflection=bool(port) and settings.grpc.reflection
    )


def proxies_environment(settings: Settings) -> dict[str, str]:
    """Return what Serve's proxies, and who looks after them, must find in their environment."""
    grpc = {
        f"SCANGRAPH_GRPC__{name.upper()}": str(getattr(settings.grpc, name)) for name in ("max_message_bytes", "max_streams")
    }
    return {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": DOOR, "SCANGRAPH_HOST": settings.host, **_PROXIES_CARE, **grpc}


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Set variables for as long as processes are started that inherit them."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _prune_logs(folder: Path) -> None:
    """Remove old files of processes that are no more: each process has its own, which rotates, and then stays."""
    with contextlib.suppress(OSError):
        for file in folder.glob("*.log*"):
            if time.time() - file.stat().st_mtime > _KEPT_LOGS_SECONDS:
                file.unlink()


def with_gpu_share(settings: Settings) -> Settings:
    """Fill in the GPU shares where the cluster has a GPU: half of one for networks, a quarter for cugraph; none elsewhere."""
    there = ray.cluster_resources().get("GPU", 0)
    networks, graphs = 0.5, 0.25 if settings.postprocess.cugraph else 0.0
    filled: dict[str, StageSettings] = {}
    if settings.nnunet.num_gpus is None:
        filled["nnunet"] = settings.nnunet.model_copy(update={"num_gpus": networks if there >= networks else 0.0})
    if settings.postprocess.num_gpus is None:
        filled["postprocess"] = settings.postprocess.model_copy(
            update={"num_gpus": graphs if there >= networks + graphs else 0.0}
        )
    return settings.model_copy(update=filled)


def _write_private(path: Path, text: str) -> None:
    """Write a file that only its owner may read, from its first moment on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
