"""The graph. What is bound here is what runs; nothing else happens here.

HTTP ──► gateway ──► executor ─┬─► imageio      files ◄─► volumes       base env, CPU
├─► nnunet       volume ─► label map     own env,  a fraction of a GPU
Python ─ scangraph.connect() ──┼─► postprocess  masks  ─► mask          base env, CPU
└─► smoothing    mask   ─► scene         own env,  CPU
"""

# No `from __future__ import annotations`: Serve looks at the builder's annotations.
from typing import Any

from ray import serve
from ray.serve import Application

from deployments.executor.deployment import Executor
from deployments.gateway.deployment import build_gateway
from deployments.imageio.deployment import Imageio
from deployments.nnunet import components as nnunet
from deployments.nnunet.deployment import Nnunet
from deployments.postprocess import components as postprocess
from deployments.postprocess.deployment import Postprocess
from deployments.smoothing import components as smoothing
from deployments.smoothing.deployment import Smoothing
from runtime_envs import runtime_env
from scangraph.catalog import Catalog
from scangraph.settings import Settings, StageSettings, load_settings

COMPONENTS = (*nnunet.COMPONENTS, *postprocess.COMPONENTS, *smoothing.COMPONENTS)


def catalog(settings: Settings) -> Catalog:
    """Return what can be run with these settings: the above, and a component of its own for every other installed model."""
    return Catalog(COMPONENTS, settings.model_folders, nnunet.component_of)


def build_app(settings: Settings) -> Application:
    """Bind the deployments."""
    s = settings

    def stage(cls: type, name: str, share: StageSettings, *arguments: Any, num_gpus: float = 0) -> Application:
        deployment = serve.deployment(
            name=name,
            ray_actor_options={"num_cpus": share.num_cpus, "num_gpus": num_gpus, "runtime_env": runtime_env(name, s)},
            autoscaling_config={
                "min_replicas": share.min_replicas,
                "max_replicas": share.max_replicas,
                "target_ongoing_requests": 2,
            },
            graceful_shutdown_timeout_s=share.shutdown_seconds,
            max_ongoing_requests=64,  # a stage works on one and queues the rest, see scangraph.stage
        )
        return deployment(cls).bind(*arguments)

    def control(cls: type, name: str, *arguments: Any, **options: Any) -> Application:
        deployment = serve.deployment(
            name=name,
            ray_actor_options={"num_cpus": 0, "runtime_env": runtime_env(name, s)},
            max_ongoing_requests=s.gateway.max_requests,
            **options,
        )
        return deployment(cls).bind(*arguments)

    stages = {
        "imageio": stage(Imageio, "imageio", s.imageio, s.imageio, s.storage, s.storage_options, s.model_folders),
        "nnunet": stage(
            Nnunet, "nnunet", s.nnunet, s.nnunet, s.model_folders, s.cache / "nnunet", num_gpus=s.nnunet.num_gpus or 0
        ),
        "postprocess": stage(Postprocess, "postprocess", s.postprocess),
        "smoothing": stage(Smoothing, "smoothing", s.smoothing, s.smoothing, s.cache / "smoothing"),
    }
    executor = control(Executor, "executor", s, catalog(s), stages)
    gateway = build_gateway(COMPONENTS, s.gateway)
    replicas = {"min_replicas": s.gateway.min_replicas, "max_replicas": s.gateway.max_replicas}
    return control(gateway, "gateway", s, catalog(s), executor, stages["imageio"], autoscaling_config=replicas)


def build(args: dict[str, Any]) -> Application:
    """Build from a Serve config file: `import_path: graph:build`; its `args` are settings and go before the environment."""
    return build_app(load_settings(**args))
