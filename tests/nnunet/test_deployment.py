"""The stage: which model guides which, and what an answer says about it."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from deployments.nnunet.deployment import Nnunet
from scangraph.contracts import LabelMap, StepSummary, Volume
from scangraph.models import Model, coarse_model, find_model
from scangraph.phantoms import Phantom
from scangraph.settings import NnunetSettings
from tests.conftest import ROOT

SHIPPED = ROOT / "models"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    """The shipped models, and variants of the organ model that differ in what their manifests say."""
    parent = tmp_path_factory.mktemp("models")
    changes: dict[str, dict[str, Any]] = {
        "coarser": {"spacing_mm": [6.0, 6.0, 6.0]},
        "coarsest": {"spacing_mm": [9.0, 9.0, 9.0]},
        "hardly-coarser": {"spacing_mm": [3.1, 3.1, 3.1]},
        "of-mr": {"spacing_mm": [12.0, 12.0, 12.0], "inputs": [{"name": "image", "modality": "MR"}]},
        "real": {"demo": False, "spacing_mm": [2.0, 2.0, 2.0]},
        "lost": {"roi": {"task": "inference/nowhere", "structures": [1]}},
        "without-bladder": {"roi": {"task": "inference/tumor", "structures": [21]}},
    }
    for name, change in changes.items():
        shutil.copytree(SHIPPED / "totalseg-demo", parent / name)
        manifest = parent / name / "model.yaml"
        content = {**yaml.safe_load(manifest.read_text()), "id": name, "task": f"inference/{name}", **change}
        manifest.write_text(yaml.safe_dump(content))
    return (parent, SHIPPED)


@pytest.mark.parametrize(
    ("model", "guide"),
    [
        ("ureter-demo", "totalseg-demo"),  # as its manifest says
        ("totalseg-demo", "coarsest"),
        ("coarser", "coarsest"),
        ("coarsest", None),  # there is none with larger voxels
        ("hardly-coarser", "coarsest"),
        ("of-mr", None),
        ("real", None),  # a demonstration shows it nothing
        ("lost", None),
        ("without-bladder", None),  # the named model does not know what is looked for
        ("vessel-demo", None),  # nobody else knows arteries
    ],
)
def test_which_model_shows_where_to_look(folders: tuple[Path, ...], model: str, guide: str | None) -> None:
    chosen = find_model(folders, model)
    assert isinstance(chosen, Model)
    found = coarse_model(folders, chosen, chosen.manifest.labels)
    assert (found[0].manifest.id if found else None) == guide


@pytest.fixture(scope="module")
def stage() -> Iterator[Nnunet]:
    stage = Nnunet(NnunetSettings(num_gpus=0), (SHIPPED,), None)
    yield stage
    stage._thread.shutdown()


def run(stage: Nnunet, task: str, image: Volume, port: str, **parameters: Any) -> tuple[StepSummary, LabelMap]:
    async def items() -> list[Any]:
        async def given() -> Volume:
            return image

        return [item async for item in stage.run(task, {port: given()}, parameters, "one")]

    *_, summary, mask = asyncio.run(items())
    return summary, mask


def test_an_answer_says_which_model_and_box(stage: Nnunet, phantom: Phantom) -> None:
    image = phantom.volumes["delayed"]
    summary, mask = run(stage, "inference/ureter", image, "image_D", roi="auto")
    roi = summary.facts["roi"]
    assert roi["model"] == find_model([SHIPPED], "totalseg-demo").describe()
    assert all(0 <= low < high <= n for (low, high), n in zip(roi["box"], image.shape, strict=True))
    assert summary.facts["tiles"] > 0
    assert mask.same_grid(image)


def test_where_nothing_can_guide_the_whole_image_is_segmented(stage: Nnunet, phantom: Phantom) -> None:
    image = phantom.volumes["arterial"]
    summary, mask = run(stage, "inference/tumor", image, "image", roi="auto")
    assert any(warning.startswith("roi: no coarser model for tumor-demo") for warning in summary.warnings)
    assert "roi" not in summary.facts
    whole = run(stage, "inference/tumor", image, "image")[1]
    assert (mask.array == whole.array).all()


def test_the_guide_is_a_part_of_the_results_identity(stage: Nnunet) -> None:
    plain = asyncio.run(stage.identity("inference/ureter", {}))
    guided = asyncio.run(stage.identity("inference/ureter", {"roi": "auto"}))
    none = asyncio.run(stage.identity("inference/tumor", {"roi": "auto"}))
    assert plain.keys() == {"model"}
    assert guided == {**plain, "roi_model": find_model([SHIPPED], "totalseg-demo").describe()}
    assert none["roi_model"] is None
