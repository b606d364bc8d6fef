"""`resize-ai-detect` from the queue to its files: real records, storage and stages, in one process."""

from __future__ import annotations

import asyncio
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from deployments.executor.runner import HeldInputs, Tools
from deployments.executor.scheduler import Scheduler
from deployments.imaging.components import COMPONENTS
from deployments.imaging.deployment import Imaging
from models.training.instruments import draw_picture
from scangraph.contracts.pipelines import assign_parameters, built_in_pipelines, check_pipeline
from scangraph.settings import HOME, load_settings
from scangraph.storage import open_storage
from scangraph.store import executions, open_store
from scangraph.store.executions import NewExecution, QueueLimits, Record
from scangraph.store.pipelines import create_pipeline
from tests.executor.local import LocalStages

KNOWN = {component.id: component for component in COMPONENTS}
SPEC = next(spec for spec in built_in_pipelines(COMPONENTS, {}) if spec.name == "resize-ai-detect")


def run(folder: Path, data: bytes, given: dict[str, Any]) -> tuple[Record, dict[str, bytes]]:
    """Run the pipeline on a file; return its record, and file name -> bytes of what it wrote."""
    assert check_pipeline(SPEC, KNOWN) == []
    parameters, faults = assign_parameters(SPEC, KNOWN, given)
    assert faults == []

    async def main() -> tuple[Record, dict[str, bytes]]:
        settings = load_settings(data=folder)
        store, storage = await open_store(settings.database), open_storage(settings.storage, settings.storage_options)
        await storage.write("tray", data)
        stages = LocalStages(settings, Imaging(settings.imaging, (HOME / "models",)))  # type: ignore[arg-type]
        scheduler = Scheduler(Tools(settings, store, storage, stages, KNOWN, HeldInputs(2**30)), 2**30)
        try:
            pipeline = await create_pipeline(store, SPEC, None)
            inputs = {"image": {"file_id": None, "path": "tray", "label_scheme": None}}
            versions = {component.id: component.version for component in COMPONENTS}
            new = NewExecution(None, pipeline.id, pipeline.revision, SPEC, inputs, parameters, versions, input_bytes=100)
            execution_id, _ = await executions.accept(store, new, QueueLimits(10, 10, 900))
            scheduler.wake()
            for _ in range(3000):
                record = await executions.load(store, execution_id)
                if record.execution.state not in {"pending", "running"}:
                    break
                await asyncio.sleep(0.02)
            return record, {file.filename: await storage.read(file.storage_name) for file in record.files}
        finally:
            await scheduler.stop()
            await store.close()

    return asyncio.run(main())


def jpeg(pixels: Any) -> bytes:
    with io.BytesIO() as out:
        Image.fromarray(pixels).save(out, "JPEG", quality=95)
        return out.getvalue()


@pytest.mark.parametrize("file_format", ["jpeg", "png", "tiff", "webp"])
def test_an_image_goes_through_by_the_flat_names(tmp_path: Path, file_format: str) -> None:
    data = jpeg(draw_picture(2_000_000, 1920, 1080).pixels)
    given = {"resize_width": 800, "ai_model": "instruments-demo", "output_format": file_format, "confidence": 0.1}
    record, files = run(tmp_path, data, given)
    assert record.execution.state == "completed", record.execution.error
    (name,) = files.keys() - {"boxes.json", "manifest.json"}
    with Image.open(io.BytesIO(files[name])) as image:
        assert (image.format or "").lower() == file_format
        assert image.size == (800, 450)
    report = json.loads(files["boxes.json"])
    boxes = np.array([box["box"] for box in report["pages"][0]["boxes"]])
    assert len(boxes) > 0
    assert (boxes >= 0).all()
    assert (boxes <= (800, 450, 800, 450)).all()
    assert report["model"]["id"] == "instruments-demo"


def test_a_hostile_file_fails_in_the_gates_words(tmp_path: Path) -> None:
    data = jpeg(draw_picture(0, 320, 240).pixels)
    record, files = run(tmp_path, data[: len(data) // 2], {})
    assert record.execution.state == "failed"
    assert (record.execution.error or {})["code"] == "truncated"
    assert files == {}
