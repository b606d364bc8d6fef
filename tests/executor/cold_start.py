"""A stage without replicas, on real Ray: a program, since a process has one Ray and the tests' has its own."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from ray import serve

from deployments.imageio.nifti import write_nifti
from scangraph.accounts_cli import local_token
from scangraph.cluster import local_service
from scangraph.contracts import LabelMap
from scangraph.handles import APPLICATION
from scangraph.settings import load_settings


def until(what: Callable[[], Any], seconds: float = 120) -> Any:
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end
        time.sleep(0.1)
    return found


def replicas(deployment: str) -> int:
    return sum(serve.status().applications[APPLICATION].deployments[deployment].replica_states.values())


def main(folder: Path) -> None:
    """Nobody needs the stage, nobody has it; who wants it is told that it starts; and it goes again."""
    rare = {"min_replicas": 0, "downscale_seconds": 1}
    stages = dict.fromkeys(("nnunet", "postprocess", "smoothing", "imaging"), rare)
    settings = load_settings(data=folder, port=0, cpus=2, object_store_mb=256, **stages)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's own threads warn about Ray's own sockets
        with local_service(settings) as service:
            headers = {"Authorization": f"Bearer {local_token(settings, minutes=10)}"}
            mask = LabelMap(np.pad(np.full((5, 5, 5), 2, np.uint8), 3), (1, 1, 1), labels=(2,))
            with httpx.Client(base_url=service.url, headers=headers, timeout=60) as client:
                assert client.get("/readyz").status_code == 200
                assert client.get("/v1/components").status_code == 200  # asks which models are warm, and starts nothing for it
                assert replicas("postprocess") == replicas("smoothing") == 0
                upload = {"file": ("mask.nii.gz", write_nifti(mask))}
                file = client.post("/v1/files", files=upload).raise_for_status().json()["id"]
                body = {"pipeline_id": "postprocess-merge", "inputs": {"masks": [file]}}
                execution = client.post("/v1/executions", json=body).json()["execution_id"]
                messages: list[str] = []

                def ended() -> bool:
                    record = client.get(f"/v1/executions/{execution}").json()
                    messages.extend(step["progress"]["message"] for step in record["steps"])
                    return record["status"] not in {"pending", "running"}

                until(ended)
                assert client.get(f"/v1/executions/{execution}").json()["status"] == "completed"
                assert "starting postprocess" in messages, set(messages)
                assert replicas("postprocess") == 1
                assert replicas("smoothing") == 0
                until(lambda: replicas("postprocess") == 0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
