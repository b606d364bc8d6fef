"""The graph. What is bound here is what runs; nothing else happens here.

HTTP, gRPC ──► gateway ──► executor ─┬─► imageio      files ◄─► arrays        base env, CPU
Kafka ◄─► kafka ─────────────┘       ├─► nnunet       volume ─► label map     own env,  a fraction of a GPU
Python ─ scangraph.connect() ────────┼─► postprocess  masks  ─► mask          own env,  CPU
                                     ├─► smoothing    mask   ─► scene         own env,  CPU
                                     └─► imaging      picture ─► picture      own env,  CPU or a fraction of a GPU
"""

# No `from __future__ import annotations`: Serve looks at the builder's annotations.
from typing import Any

from ray import serve
from ray.serve import Application

from deployments.executor.deployment import Executor
from deployments.gateway.deployment import build_gateway
from deployments.imageio.deployment import Imageio
from deployments.imaging import components as imaging
from deployments.imaging.deployment import Imaging
from deployments.kafka.deployment import Kafka
from deployments.nnunet import components as nnunet
from deployments.nnunet.deployment import Nnunet
from deployments.postprocess import components as postprocess
from deployments.postprocess.deployment import Postprocess
from deployments.smoothing import components as smoothing
from deployments.smoothing.deployment import Smoothing
from runtime_envs import check, placement, runtime_env
from scangraph import autoscaling
from scangraph.catalog import Catalog
from scangraph.settings import Settings, StageSettings, load_settings

#: Between Serve's looks at a replica. One that died is replaced at the next look; Serve's own pause is 10 s.
LOOK_SECONDS = 2.0
COMPONENTS = (*nnunet.COMPONENTS, *postprocess.COMPONENTS, *smoothing.COMPONENTS, *imaging.COMPONENTS)


def catalog(settings: Settings) -> Catalog:
    """Return what can be run with these settings: the above, and a component of its own for every other installed model."""
    return Catalog(COMPONENTS, settings.model_folders, nnunet.component_of)


def build_app(settings: Settings) -> Application:
    """Bind the deployments, once their environments are known to start."""
    s = settings
    check(s)
    told = {"log_level": s.log_level, "encoding": s.log.format.upper(), "enable_access_log": False}
    logging = {**told, "logs_dir": str(s.log.folder) if s.log.folder else None}

    def place(name: str) -> dict[str, Any]:
        return {"runtime_env": runtime_env(name, s), "resources": placement(name, s)}

    def policy(cls: type, **arguments: Any) -> dict[str, Any]:
        return {"policy": {"policy_function": f"{cls.__module__}:{cls.__name__}", "policy_kwargs": arguments}}

    def stage(cls: type, name: str, share: StageSettings, *arguments: Any, num_gpus: float = 0, **scaling: Any) -> Application:
        deployment = serve.deployment(
            name=name,
            ray_actor_options={"num_cpus": share.num_cpus, "num_gpus": num_gpus, **place(name)},
            autoscaling_config={
                "min_replicas": share.min_replicas,
                "max_replicas": share.max_replicas,
                "upscale_delay_s": share.upscale_seconds,
                "downscale_delay_s": share.downscale_seconds,
                **(scaling or policy(autoscaling.Queued, work_seconds=share.work_seconds)),
            },
            graceful_shutdown_timeout_s=share.shutdown_seconds,
            health_check_period_s=LOOK_SECONDS,
            max_surge_percent=share.surge_percent,
            logging_config=logging,
            request_router_config={"request_router_class": "scangraph.routing:NearTheData"},
            max_ongoing_requests=64,  # a stage works on one and queues the rest, see scangraph.stage
        )
        return deployment(cls).bind(*arguments)

    def control(cls: type, name: str, *arguments: Any, **options: Any) -> Application:
        deployment = serve.deployment(
            name=name,
            ray_actor_options={"num_cpus": 0, **place(name)},
            logging_config=logging,
            max_ongoing_requests=s.gateway.max_requests,
            health_check_period_s=LOOK_SECONDS,
            max_surge_percent=100,  # the old ones serve until the new ones do
            **options,
        )
        return deployment(cls).bind(*arguments)

    stages = {
        "imageio": stage(
            Imageio,
            "imageio",
            *(s.imageio, s.imageio, s.storage, s.storage_options, s.model_folders, s.tracing),
            target_ongoing_requests=s.imageio.concurrent,
        ),
        "nnunet": stage(
            Nnunet, "nnunet", s.nnunet, s.nnunet, s.model_folders, s.cache / "nnunet", num_gpus=s.nnunet.num_gpus or 0
        ),
        "postprocess": stage(Postprocess, "postprocess", s.postprocess, num_gpus=s.postprocess.num_gpus or 0),
        "smoothing": stage(Smoothing, "smoothing", s.smoothing, s.smoothing),
        "imaging": stage(Imaging, "imaging", s.imaging, s.imaging, s.model_folders, num_gpus=s.imaging.num_gpus),
    }
    one = {"min_replicas": 1, "max_replicas": 1, "look_back_period_s": 15, **policy(autoscaling.Told)}
    executor = control(Executor, "executor", s, catalog(s), stages, autoscaling_config=one)
    doors = {}
    if s.kafka.on:
        doors["kafka"] = control(Kafka, "kafka", s, catalog(s), executor, stages["imageio"], num_replicas=s.kafka.replicas)
    gateway = build_gateway(COMPONENTS, s.gateway)
    replicas = {
        "min_replicas": s.gateway.min_replicas,
        "max_replicas": s.gateway.max_replicas,
        "target_ongoing_requests": s.gateway.target_requests,
    }
    waiting = {"autoscaling_config": replicas, "max_queued_requests": s.gateway.max_queued}
    return control(gateway, "gateway", s, catalog(s), executor, stages["imageio"], doors, **waiting)


def build(args: dict[str, Any]) -> Application:
    """Build from a Serve config file: `import_path: graph:build`; its `args` are settings and go before the environment."""
    return build_app(load_settings(**args))
