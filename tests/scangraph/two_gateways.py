"""Two gateways, and a model that comes while they run: a program, since a process has one Ray and the tests' has its own."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from deployments.imageio.nifti import write_nifti
from graph import catalog
from scangraph.accounts_cli import local_token
from scangraph.cluster import local_service
from scangraph.contracts import Volume, free_number
from scangraph.contracts.errors import UnknownComponent
from scangraph.handles import connect
from scangraph.model_import import Wish, converter, import_model
from scangraph.models import remove_model
from scangraph.settings import load_settings
from tests.conftest import ROOT
from tests.nnunet.folders import results_folder

NODE = free_number("portal_lymph_node", {})


def noise() -> Volume:
    return Volume(np.random.default_rng(3).normal(40, 200, (20, 22, 24)).astype(np.int16), (2.0, 1.5, 1.0))


def until(what: Callable[[], Any], seconds: float = 20) -> Any:
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end
        time.sleep(0.1)
    return found


def main(tmp_path: Path) -> None:
    """Real Ray: listed, run by endpoint, pipeline and handle; its names reach scene, picture and files; gone when removed."""
    settings = load_settings(
        data=tmp_path / "data", port=0, cpus=2, object_store_mb=512, gateway={"min_replicas": 2, "max_replicas": 2}
    )
    results = results_folder(tmp_path / "results")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's own threads warn about Ray's own sockets
        with local_service(settings) as service, connect(settings.data) as graph:
            headers = {"Authorization": f"Bearer {local_token(settings, minutes=10)}"}
            (settings.storage_root / "ct.nii.gz").write_bytes(write_nifti(noise()))
            target = settings.data / "models"

            def call(method: str, path: str, **more: Any) -> httpx.Response:
                # A connection of its own each time: the proxy gives it to either replica.
                return httpx.request(method, service.url + path, headers=headers, timeout=120, **more)

            assert call("POST", "/inference/belly", json={"image_path": "ct.nii.gz"}).status_code == 404
            import_model(results, target, catalog(settings), Wish(), converter(ROOT / ".envs/nnunet"))
            answers = [call("POST", "/inference/belly", json={"image_path": "ct.nii.gz"}) for _ in range(6)]
            assert {answer.status_code for answer in answers} == {200}, answers[0].text
            assert answers[0].json()["facts"]["model"]["id"] == "belly"
            assert call("GET", "/inference/belly").status_code == 405
            assert call("POST", "/inference/belly", json={"other": 1}).status_code == 422
            until(lambda: all(call("GET", "/v1/pipelines/inference-belly").status_code == 200 for _ in range(6)))
            until(lambda: all("/inference/belly" in call("GET", "/openapi.json").json()["paths"] for _ in range(6)))
            component = call("GET", "/v1/components/inference/belly").json()
            assert component["models"][0]["names"] == {str(NODE): "portal_lymph_node"}
            assert {"number": NODE, "name": "portal_lymph_node"}.items() <= call("GET", "/v1/labels").json()["items"][
                -1
            ].items()

            mask = graph.run("inference/belly", {"image": noise()}).result(120)
            assert mask.label(NODE).name == "portal_lymph_node"
            scene = graph.smooth(mask)
            assert "portal_lymph_node" in {surface.name for surface in scene.result(120).surfaces}
            assert graph.preview(scene, noise(), mask).result(120).width == 1600
            stored = settings.storage_root / answers[0].json()["mask_path"]
            again = graph.read_mask(stored)
            assert again.names == {NODE: "portal_lymph_node"}
            steps = [
                {"id": "belly", "component": "inference/belly", "inputs": {"image": "input.image"}},
                {"id": "scene", "component": "smoothing/base", "inputs": {"mask": "belly.mask"}},
            ]
            spec = {"name": "mine", "inputs": {"image": {"kind": "image"}}, "steps": steps, "outputs": {"scene": "scene.scene"}}
            until(lambda: call("POST", "/v1/pipelines:validate", json=spec).json()["valid"])

            remove_model(settings.model_folders, target, "belly")
            until(lambda: all(call("POST", "/inference/belly", json={}).status_code == 404 for _ in range(6)))
            until(lambda: call("GET", "/v1/pipelines/inference-belly").status_code == 404)
            with pytest.raises(UnknownComponent):
                until(lambda: graph.run("inference/belly", {"image": noise()}).result(120) and False)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
