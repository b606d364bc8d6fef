"""The stage of 2-D images."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deployments.imaging.components import (
    CONVERT,
    DETECT,
    FILTER,
    RESIZE,
    ConvertParameters,
    DetectParameters,
    FilterParameters,
    ResizeParameters,
)
from scangraph.contracts import Image2D, ImageFile
from scangraph.contracts.errors import InvalidParameters, ScanGraphError
from scangraph.settings import ImagingSettings
from scangraph.stage import Report, Stage, StepOutput


class Imaging(Stage):
    """2-D images to 2-D images, and what is in them."""

    def __init__(self, settings: ImagingSettings, model_folders: tuple[Path, ...] = ()) -> None:
        import cv2

        from deployments.imaging import converting, detecting, filtering, networks, resizing

        threads = settings.threads or len(os.sched_getaffinity(0))
        cv2.setNumThreads(threads)
        self._converting, self._detecting, self._filtering, self._resizing = converting, detecting, filtering, resizing
        self._networks = networks.Networks(model_folders, settings.models_held, threads, gpu=settings.num_gpus > 0)
        self._max_pixels = settings.max_pixels
        super().__init__({RESIZE: self._resize, FILTER: self._filter, CONVERT: self._convert, DETECT: self._detect})
        self._thread.submit(self._warm_up)  # in the thread of the steps: whoever comes first waits for the rest of it

    def _warm_up(self) -> None:
        """Load the detector that is used unless another one is named: the first request need not wait for it."""
        try:
            self._networks.get(self._networks.choose(DETECT.id, None))
        except ScanGraphError:
            return  # it is said to whoever asks for it

    async def identity(self, component_id: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """Return the detector that would be used: another one gives another result."""
        self.operation(component_id)
        if component_id != DETECT.id:
            return {}
        model = await asyncio.to_thread(self._networks.choose, component_id, parameters.get("model"))
        return {"model": model.describe()}

    async def warm(self) -> list[str]:
        """Return the SHA-256 of the models that this replica holds in memory."""
        return self._networks.warm

    async def check_health(self) -> None:
        """Say anew what is held, as often as Serve looks at the replica: Ray forgets a gauge that is not repeated."""
        self._networks.tell()

    def _resize(self, inputs: Mapping[str, Any], parameters: ResizeParameters, report: Report) -> StepOutput:
        image: Image2D = inputs["image"]
        sizes = [
            self._resizing.target_size(
                (page.shape[1], page.shape[0]),
                parameters.width,
                parameters.height,
                keep_aspect=parameters.keep_aspect,
                enlarge=parameters.enlarge,
            )
            for page in image.pages
        ]
        self._resizing.check_pixels(sizes, self._max_pixels)
        pages = []
        for number, (page, size) in enumerate(zip(image.pages, sizes, strict=True)):
            report(number, len(sizes), "pages")
            pages.append(self._resizing.resize(page, size, parameters.filter))
        return StepOutput((image.with_pages(pages),), facts={"from": [image.width, image.height], "to": list(sizes[0])})

    def _filter(self, inputs: Mapping[str, Any], parameters: FilterParameters, report: Report) -> StepOutput:
        image: Image2D = inputs["image"]
        pages = []
        for number, page in enumerate(image.pages):
            report(number, len(image.pages), "pages")
            pages.append(self._filtering.apply(page, parameters.filter, **parameters.model_dump(exclude={"filter"})))
        return StepOutput((image.with_pages(pages),))

    def _convert(self, inputs: Mapping[str, Any], parameters: ConvertParameters, report: Report) -> StepOutput:
        report(0, 1, "converting")
        file = ImageFile(parameters.format, parameters.quality, parameters.lossless)
        image, warnings = self._converting.convert(inputs["image"], file, parameters.bits)
        return StepOutput((image,), tuple(warnings), {"format": file.format, "bits": image.bits, "pages": len(image.pages)})

    def _detect(self, inputs: Mapping[str, Any], parameters: DetectParameters, report: Report) -> StepOutput:
        image: Image2D = inputs["image"]
        report(0, len(image.pages), "pages")
        model = self._networks.choose(DETECT.id, parameters.model)
        network, names = self._networks.get(model), model.manifest.classes
        if unknown := set(parameters.classes or ()) - set(names):
            detail = f"{model.manifest.id} does not know {', '.join(sorted(unknown))}; it knows {', '.join(names)}"
            raise InvalidParameters(component=DETECT.id, detail=detail)
        wanted = None if parameters.classes is None else [names.index(name) for name in parameters.classes]
        choice = self._detecting.Choice(parameters.confidence, parameters.iou, wanted, parameters.max_boxes)
        pages, told = [], []
        for number, page in enumerate(image.pages):
            report(number, len(image.pages), "pages")
            boxes = self._detecting.detect(page, network, network.facts.layout, network.facts.input_size, names, choice)
            pages.append(self._detecting.draw(page, boxes) if parameters.draw and boxes else page)
            size = {"page": number + 1, "width": page.shape[1], "height": page.shape[0]}
            told.append({**size, "boxes": [box.describe() for box in boxes]})
        text = json.dumps({"model": model.describe(), "classes": list(names), "pages": told}, indent=1).encode()
        facts = {"model": model.describe(), "device": network.device, "boxes": sum(len(page["boxes"]) for page in told)}
        return StepOutput((image.with_pages(pages), text), model.warnings, facts)
