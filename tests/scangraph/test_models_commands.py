"""`scangraph models`, as a process of its own; and a model that comes while the service runs."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from graph import catalog
from scangraph.contracts import Volume, free_number
from scangraph.contracts.errors import NameTaken
from scangraph.contracts.pipelines import one_step_pipeline
from scangraph.local_cli import app
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
        store = await open_store(f"sqlite:///{tmp_path}/records.db")
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


def test_a_model_that_comes_while_two_gateways_run(tmp_path: Path) -> None:
    """Real Ray: listed, run by endpoint, pipeline and handle; its names reach scene, picture and files; gone when removed."""
    settings = load_settings(data=tmp_path / "data")
    for stage in ("base", "nnunet", "smoothing", "postprocess"):
        if not (settings.environments_dir / stage / "scangraph-lock").exists():
            pytest.skip(f"environment {stage!r} is not built: run `make setup`")
    command = [sys.executable, "-m", "tests.scangraph.two_gateways", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
