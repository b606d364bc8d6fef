"""The graph. What is bound here is what runs; nothing else happens here.

HTTP ──► gateway ──► executor ─┬─► imageio      files ◄─► volumes       base env, CPU
                               ├─► nnunet       volume ─► label map     own env,  a fraction of a GPU
Python ─ scangraph.connect() ──┼─► postprocess  masks  ─► mask          base env, CPU
                               └─► smoothing    mask   ─► scene         own env,  CPU
"""

from __future__ import annotations

from typing import Any

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
from scangraph.settings import Settings, StageSettings, load_settings

COMPONENTS = (*nnunet.COMPONENTS, *postprocess.COMPONENTS, *smoothing.COMPONENTS)


def build_app(settings: Settings) -> Application:
    """Bind the deployments."""

    def placed(stage: str, share: StageSettings, num_gpus: float = 0) -> dict[str, Any]:
        return {
            "ray_actor_options": {
                "num_cpus": share.num_cpus,
                "num_gpus": num_gpus,
                "runtime_env": runtime_env(stage, settings),
            },
            "autoscaling_config": {
                "min_replicas": share.min_replicas,
                "max_replicas": share.max_replicas,
                "target_ongoing_requests": 2,
            },
            "graceful_shutdown_timeout_s": share.shutdown_seconds,
            "max_ongoing_requests": 64,  # a stage works on one and queues the rest; see scangraph.stage
        }

    def control(stage: str) -> dict[str, Any]:
        return {"num_cpus": 0, "runtime_env": runtime_env(stage, settings)}

    s = settings
    imageio = Imageio.options(**placed("imageio", s.imageio)).bind(s.imageio, s.storage_root)
    stages = {
        "imageio": imageio,
        "nnunet": Nnunet.options(**placed("nnunet", s.nnunet, s.nnunet.num_gpus or 0)).bind(s.nnunet, s.model_folders),
        "postprocess": Postprocess.options(**placed("postprocess", s.postprocess)).bind(),
        "smoothing": Smoothing.options(**placed("smoothing", s.smoothing)).bind(),
    }
    executor = Executor.options(ray_actor_options=control("executor"), max_ongoing_requests=s.gateway.max_requests).bind(
        s.executor, s.storage_root, COMPONENTS, stages
    )
    gateway = build_gateway(COMPONENTS, s.gateway.max_body_bytes).options(
        ray_actor_options=control("gateway"),
        max_ongoing_requests=s.gateway.max_requests,
        autoscaling_config={"min_replicas": s.gateway.min_replicas, "max_replicas": s.gateway.max_replicas},
    )
    return gateway.bind(COMPONENTS, executor, s.model_folders)  # type: ignore[no-any-return]


def build(args: dict[str, Any]) -> Application:
    """Build from a Serve config file: `import_path: graph:build`, `args:` are settings, which go before the environment."""
    return build_app(load_settings(**args))
