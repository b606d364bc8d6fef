"""Deploy the graph once more onto a running local service: `python -m benchmarks.faults.redeploy DATA [ENVIRONMENTS]`.

Every deployment gets a new version, as after an update. Prints one line for each deployment that is not healthy at the end, and
exits 1 if there is one.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import ray
from ray import serve

from graph import build_app
from scangraph.cluster import with_gpu_share
from scangraph.contracts.errors import ScanGraphError
from scangraph.handles import APPLICATION, SERVICE_FILE, use_token
from scangraph.settings import load_settings


def main(data: Path, environments: Path | None = None) -> int:
    """Deploy, and wait until Serve says that it went well or did not."""
    changes = {"environments_dir": environments} if environments else {}
    settings = load_settings(data=data, **changes)
    log = settings.log.model_copy(update={"folder": settings.log.folder or settings.data / "logs"})
    told = json.loads((data / SERVICE_FILE).read_text())
    use_token(data)
    ray.init(told["ray_address"], namespace="serve", log_to_driver=False, logging_level=logging.ERROR)
    settings = settings.model_copy(update={"log": log, "port": int(told["url"].rpartition(":")[2])})
    try:
        serve.run(build_app(with_gpu_share(settings)), name=APPLICATION, route_prefix="/")
    except ScanGraphError as error:  # refused before anything was changed
        print(error)
        return 1
    except RuntimeError as error:
        print(" ".join(str(error).split())[-300:])
    application = serve.status().applications[APPLICATION]
    for name, deployment in application.deployments.items():
        if deployment.status != "HEALTHY":
            print(f"{name}: {deployment.status}: {' '.join(deployment.message.split())[:600]}")
    return int(application.status != "RUNNING")


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:])))
