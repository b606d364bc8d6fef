"""`scangraph models`, as a process of its own; and a model that comes while the service runs."""

from __future__ import annotations

import asyncio
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from typer.testing import CliRunner

from deployments.imageio.nifti import write_nifti
from graph import catalog
from scangraph.accounts_cli import local_token
from scangraph.cluster import local_service
from scangraph.contracts import Volume, free_number
from scangraph.contracts.errors import NameTaken, UnknownComponent
from scangraph.contracts.pipelines import one_step_pipeline
from scangraph.handles import connect
from scangraph.local_cli import app
from scangraph.model_import import Wish, converter, import_model
from scangraph.models import remove_model
from scangraph.settings import load_settings
from scangraph.store import open_store
from scangraph.store.pipelines import create_pipeline, find_built_in, sync_built_in
from tests.conftest import ROOT
from tests.nnunet.folders import export, results_folder
from tests.scangraph.test_cli import scangraph

NODE = free_number("portal_lymph_node", {})


def noise() -> Volume:
    return Volume(np.random.default_rng(3).normal(40, 200, (20, 22, 24)).astype(np.int16), (2.0, 1.5, 1.0))


def command(*arguments: str | Path, data: Path, status: int = 0) -> str:
    """Run a command in this process and return what it says."""
    done = CliRunner().invoke(app, [*map(str, arguments), "--data", str(data)], env={"COLUMNS": "200"})
    assert done.exit_code == status, done.output
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.output


def test_install_list_show_verify_remove(tmp_path: Path) -> None:
    archive = export(results_folder(tmp_path / "results"), tmp_path / "belly.zip")
    data = tmp_path / "data"
    data.mkdir()
    said = scangraph("models", "install", archive, data=data).stdout
    assert "belly 1.0.0 is installed for inference/belly" in said
    assert f"{NODE} portal_lymph_node" in said
    listed = command("models", "list", data=data)
    assert "inference/belly" in listed
    assert "totalseg-demo" in listed
    declared = json.loads(command("components", "--json", data=data))
    assert "inference/belly" in {component["id"] for component in declared}
    shown = command("models", "show", "belly", data=data)
    for text in ("portal lymph node", str(NODE), "2 × 1.5 × 1 mm", "Dataset042_Belly (nnUNetTrainer, 3d_fullres)"):
        assert text in shown
    assert "4 files are what they were" in command("models", "verify", "belly", data=data)
    (data / "models/belly/nnunet/plans.json").write_text("{}")
    said = command("models", "verify", data=data, status=1)
    assert "belly: nnunet/plans.json is not the file" in said
    assert "ureter-demo 1.0.0" in said
    assert "is removed" in command("models", "remove", "belly", data=data)
    assert list((data / "models").iterdir()) == []
    (tmp_path / "results/Dataset042_Belly/nnUNetTrainer__nnUNetPlans__3d_fullres/fold_0/checkpoint_final.pth").write_bytes(b"x")
    done = scangraph("models", "install", tmp_path / "results", data=data, check=False)
    assert done.returncode == 1
    assert "checkpoint_final.pth cannot be read" in done.stderr
    assert list((data / "models").iterdir()) == []


def test_a_pipeline_of_that_name_is_never_run_instead(tmp_path: Path) -> None:
    spec = one_step_pipeline(catalog(load_settings(data=tmp_path))["inference/ureter"])

    async def check() -> None:
        store = await open_store(f"sqlite+aiosqlite:///{tmp_path}/records.db")
        made = await find_built_in(store, spec)
        assert (made.built_in, made.name, made.revision) == (True, "inference-ureter", 1)
        assert await find_built_in(store, spec) == made
        changed = await find_built_in(store, spec.model_copy(update={"title": "new"}))
        assert (changed.id, changed.revision) == (made.id, 2)
        await sync_built_in(store, [])
        await create_pipeline(store, spec, None)
        with pytest.raises(NameTaken, match="inference-ureter"):
            await find_built_in(store, spec)
        await store.close()

    asyncio.run(check())


def until(what: Callable[[], Any], seconds: float = 20) -> Any:
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end
        time.sleep(0.1)
    return found


def test_a_model_that_comes_while_two_gateways_run(tmp_path: Path) -> None:
    """Real Ray: listed, run by endpoint, pipeline and handle; its names reach scene, picture and files; gone when removed."""
    settings = load_settings(
        data=tmp_path / "data", port=0, cpus=2, object_store_mb=512, gateway={"min_replicas": 2, "max_replicas": 2}
    )
    for stage in ("base", "nnunet", "smoothing"):
        if not (settings.environments_dir / stage / "scangraph-lock").exists():
            pytest.skip(f"environment {stage!r} is not built: run `make setup`")
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
            assert graph.preview(noise(), mask, scene).result(120).startswith(b"\x89PNG")
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
