"""Detection: every layout gives the boxes that were put in, in the image's own pixels; hostile networks are refused."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from deployments.imaging.components import DETECT
from deployments.imaging.deployment import Imaging
from deployments.imaging.detecting import Box, Choice, detect, draw, letterbox, suppress
from deployments.imaging.layouts import recognise
from deployments.imaging.networks import Network
from scangraph.contracts import Image2D
from scangraph.contracts.errors import InvalidModel, InvalidParameters, ModelNotFound
from scangraph.models import DetectorManifest, choose_detector, installed_detectors, installed_models, write_manifest
from scangraph.settings import ImagingSettings
from tests.imaging.networks import SIZE, build, constant_network, output_of

LAYOUTS = ("v5", "v8", "end-to-end")
NAMES = ("cat", "dog", "owl")
#: Two of one class that overlap by 0.75, one of another in the same place, one elsewhere.
ROWS = [
    (8.0, 20.0, 40.0, 44.0, 0, 0.9),
    (10.0, 22.0, 42.0, 46.0, 0, 0.8),
    (8.0, 20.0, 40.0, 44.0, 2, 0.7),
    (50.0, 18.0, 60.0, 30.0, 1, 0.4),
]


def boxes_of(rows: Any, layout: str, page: Any, choice: Choice) -> list[Box]:
    network = Network(constant_network(output_of(layout, rows)), "test")
    assert network.facts.layout.name == layout
    return detect(page, network, network.facts.layout, network.facts.input_size, NAMES, choice)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_boxes_come_back_in_the_images_pixels(layout: str) -> None:
    page = np.zeros((100, 200, 3), np.uint8)  # scaled by 0.32 into 64 × 32, and moved down by 16
    rows = ROWS if layout != "end-to-end" else [ROWS[0], *ROWS[2:]]
    found = boxes_of(rows, layout, page, Choice(confidence=0.25, iou=0.5))
    assert [(box.name, box.class_number) for box in found] == [("cat", 0), ("owl", 2), ("dog", 1)]
    assert np.allclose([box.confidence for box in found], [0.9, 0.7, 0.4], atol=1e-5)
    assert np.allclose(found[0].corners, (25, 12.5, 125, 87.5), atol=1e-4)
    assert np.allclose(found[2].corners, (156.25, 6.25, 187.5, 43.75), atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_wanted_is_chosen(layout: str) -> None:
    page = np.zeros((SIZE, SIZE, 1), np.uint8)
    assert len(boxes_of(ROWS, layout, page, Choice(confidence=0.3, iou=0.9))) == 4
    assert [b.name for b in boxes_of(ROWS, layout, page, Choice(confidence=0.75))] == (
        ["cat", "cat"] if layout == "end-to-end" else ["cat"]
    )
    assert [b.name for b in boxes_of(ROWS, layout, page, Choice(classes=[1, 2]))] == ["owl", "dog"]
    assert [b.name for b in boxes_of(ROWS, layout, page, Choice(most=1))] == ["cat"]
    assert boxes_of(ROWS, layout, page, Choice(confidence=0.95)) == []
    beyond = boxes_of([(-10.0, -10.0, 100.0, 20.0, 1, 0.5)], layout, page, Choice())
    assert beyond[0].corners == (0, 0, 64, 20)


@given(st.integers(1, 300), st.integers(1, 300))
@settings(max_examples=40, deadline=None)
def test_a_page_lies_in_the_square_with_its_aspect(width: int, height: int) -> None:
    page = np.full((height, width, 3), (255, 0, 0), np.uint8)
    planes, fit = letterbox(page, (96, 64))
    assert planes.shape == (1, 3, 96, 64)
    red = np.argwhere((planes[0, 0] > 0.9) & (planes[0, 1] < 0.1))
    low, high = red.min(axis=0)[::-1], red.max(axis=0)[::-1] + 1
    assert tuple(low) == fit.moved
    assert np.allclose(high - low, (width * fit.scale[0], height * fit.scale[1]))
    factor = min(96 / height, 64 / width)
    assert np.abs(high - low - np.array([width, height]) * factor).max() <= max(0.5, 1 - factor * min(width, height))
    rest = np.delete(planes[0].reshape(3, -1), np.ravel_multi_index(red.T, (96, 64)), axis=1)
    assert np.allclose(rest, 114 / 255)


def test_pixels_reach_the_network_as_they_are() -> None:
    page = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), np.uint8)
    planes, _ = letterbox(page, (SIZE, SIZE))
    assert np.allclose(planes[0].transpose(1, 2, 0), page / 255, atol=1e-6)
    clear = np.concatenate([page, np.zeros((SIZE, SIZE, 1), np.uint8)], axis=2)
    assert np.allclose(letterbox(clear, (SIZE, SIZE))[0], 1)  # transparent is white
    assert np.allclose(letterbox(page.astype(np.uint16) * 257, (SIZE, SIZE))[0], planes)


boxes = st.lists(st.tuples(*[st.integers(0, 30)] * 2, *[st.integers(1, 30)] * 2, st.integers(0, 2)), max_size=25)


@given(boxes, st.floats(0.05, 1))
@settings(deadline=None)
def test_suppression_by_its_definition(rows: list[tuple[int, ...]], limit: float) -> None:
    corners = np.array([(x, y, x + w, y + h) for x, y, w, h, _ in rows], float).reshape(-1, 4)
    classes = np.array([row[4] for row in rows], int)
    # A division may be off by a bit: what overlaps as much as the limit allows may be told either way.
    assume(all(abs(iou(one, other) - limit) > 1e-12 for one, other in itertools.combinations(corners, 2)))
    kept: list[int] = []
    for number in range(len(rows)):
        clash = [other for other in kept if classes[other] == classes[number] and iou(corners[other], corners[number]) > limit]
        if not clash:
            kept.append(number)
    assert suppress(corners, classes, limit).tolist() == kept


def iou(a: Any, b: Any) -> float:
    covered = np.zeros((2, 64, 64), bool)
    for part, (x1, y1, x2, y2) in zip(covered, (a.astype(int), b.astype(int)), strict=True):
        part[y1:y2, x1:x2] = True
    return float((covered[0] & covered[1]).sum() / (covered[0] | covered[1]).sum())


@pytest.mark.parametrize(
    ("shape", "size", "name", "classes"),
    [
        ((1, 25200, 85), (640, 640), "v5", 80),  # YOLOv5, v7
        ((1, 84, 8400), (640, 640), "v8", 80),  # YOLOv8, v9, v11, v12
        ((1, 8400, 84), (640, 640), "v8", 80),
        ((1, 300, 6), (640, 640), "end-to-end", 0),  # YOLOv10, v26
        ((1, 5, 8400), (640, 640), "v8", 1),
        ((1, 25200, 6), (640, 640), "v5", 1),
        ((1, 102000, 85), (1280, 1280), "v5", 80),  # with cells of 64: P6
        ((1, 84, 6300), (480, 640), "v8", 80),
        ((1, 1000), (224, 224), None, 0),
        ((1, 116, 8401), (640, 640), None, 0),
        ((2, 84, 8400), (640, 640), None, 0),
    ],
)
def test_layouts_are_told_by_their_shapes(shape: Any, size: tuple[int, int], name: str | None, classes: int) -> None:
    layout = recognise(shape, size)
    assert (layout.name if layout else None) == name
    assert layout is None or layout.classes == classes


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_boxes_are_drawn(dtype: Any, channels: int) -> None:
    page = np.full((60, 80, channels), np.iinfo(dtype).max, dtype)
    drawn = draw(page, [Box(0, "cat", 0.5, (20, 30, 60, 50))])
    assert drawn.dtype == dtype
    assert drawn.shape == (60, 80, 4 if channels in {2, 4} else 3)
    assert (drawn[30, 20:60, 1] < np.iinfo(dtype).max / 2).all()
    assert (drawn[40, 22:58] == np.iinfo(dtype).max).all()
    assert (page == np.iinfo(dtype).max).all()


# --- networks ----------------------------------------------------------------------------------------------------------------


def test_a_network_says_what_it_is() -> None:
    metadata = {"names": "{0: 'cat', 1: 'dog', 2: 'owl'}", "imgsz": "[64, 64]"}
    output = output_of("v8", ROWS)
    facts = Network(constant_network(output, shape=(1, 3, "h", "w"), metadata=metadata), "test").facts
    assert (facts.input_size, facts.names) == ((64, 64), NAMES)
    half = Network(constant_network(output, kind=TensorProto.FLOAT16), "test")
    assert half.facts.layout.name == "v8"
    harmless = {"names": "__import__('os').abort()"}
    assert Network(constant_network(output, metadata=harmless), "test").facts.names == ()


def external() -> bytes:
    tensor = numpy_helper.from_array(np.zeros(3, np.float32), "known")
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")
    return build([helper.make_node("Add", ["images", "known"], ["output0"])], [tensor])


def external_in_a_branch() -> bytes:
    inner = onnx.load_model_from_string(external()).graph.initializer[0]
    branch = helper.make_graph(
        [helper.make_node("Identity", ["known"], ["x"])],
        "b",
        [],
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, None)],
        [inner],
    )
    node = helper.make_node("If", ["yes"], ["output0"], then_branch=branch, else_branch=branch)
    return build([node], [numpy_helper.from_array(np.array(True), "yes")])


def external_constant() -> bytes:
    inner = onnx.load_model_from_string(external()).graph.initializer[0]
    return build([helper.make_node("Constant", [], ["output0"], value=inner)], [])


def custom() -> bytes:
    node = helper.make_node("Surprise", ["images"], ["output0"], domain="org.example")
    return build([node], [], domains=["org.example"])


def no_detector() -> bytes:
    return build([helper.make_node("Flatten", ["images"], ["output0"])], [], out=(1, 3 * SIZE * SIZE))


def never_fits() -> bytes:
    wrong = numpy_helper.from_array(np.zeros((5, 7), np.float32), "wrong")
    return build([helper.make_node("MatMul", ["images", "wrong"], ["output0"])], [wrong], shape=(1, 3, "h", "w"))


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (external(), "other files"),
        (external_in_a_branch(), "other files"),
        (external_constant(), "other files"),
        (custom(), "Surprise"),
        (b"", "no ONNX file"),
        (b"\x08\x08PK\x03\x04 nonsense", "no ONNX file"),
        (constant_network(output_of("v8", ROWS))[:-400], "no ONNX file|cannot load"),
        (no_detector(), "no YOLO network"),
        (never_fits(), "does not run|cannot load"),
        (constant_network(output_of("v8", ROWS), shape=(1, 1, SIZE, SIZE)), "must take one image"),
    ],
)
def test_other_networks_are_refused(data: bytes, why: str) -> None:
    with pytest.raises(InvalidModel, match=why):
        Network(data, "test")


# --- the stage ---------------------------------------------------------------------------------------------------------------


def install(
    parent: Path, name: str, *, demo: bool = False, classes: tuple[str, ...] = NAMES, data: bytes | None = None
) -> Path:
    folder = parent / name
    folder.mkdir(parents=True)
    (folder / "network.onnx").write_bytes(data or constant_network(output_of("v8", ROWS)))
    manifest = DetectorManifest(
        kind="detector", id=name, version="1", title=name, demo=demo, network="network.onnx", classes=classes,
        input_size=(SIZE, SIZE), license="none", training_data="none", files={},
    )  # fmt: skip
    write_manifest(folder, manifest)
    return folder


def stage(parent: Path) -> Imaging:
    return Imaging(ImagingSettings(threads=1), (parent,))


def run(imaging: Imaging, image: Image2D, **parameters: Any) -> tuple[Image2D, dict[str, Any], Any]:
    component, function = imaging.operation(DETECT.id)
    output = function({"image": image}, component.parameters.model_validate(parameters), lambda *_: None)
    drawn, report = output.outputs
    return drawn, json.loads(report), output


def test_the_stage_tells_page_by_page(tmp_path: Path) -> None:
    install(tmp_path, "pets")
    image = Image2D((np.full((100, 200, 3), 90, np.uint8), np.full((64, 64, 1), 90, np.uint16)))
    drawn, report, output = run(stage(tmp_path), image)
    assert [(page["width"], page["height"], len(page["boxes"])) for page in report["pages"]] == [(200, 100, 3), (64, 64, 3)]
    assert report["pages"][0]["boxes"][0] == {"class": 0, "name": "cat", "confidence": 0.9, "box": [25.0, 12.5, 125.0, 87.5]}
    assert (report["model"]["id"], output.facts["boxes"], output.warnings) == ("pets", 6, ())
    assert not np.array_equal(drawn.pages[0], image.pages[0])
    plain, again, _ = run(stage(tmp_path), image, draw=False)
    assert all(np.array_equal(a, b) for a, b in zip(plain.pages, image.pages, strict=True))
    assert again == report
    _, told, _ = run(stage(tmp_path), image, classes=["owl"], confidence=0.6)
    assert {box["name"] for page in told["pages"] for box in page["boxes"]} == {"owl"}


def test_what_the_stage_cannot_do_is_said(tmp_path: Path) -> None:
    image = Image2D((np.zeros((8, 8, 3), np.uint8),))
    with pytest.raises(ModelNotFound):
        run(stage(tmp_path), image)
    folder = install(tmp_path, "pets")
    with pytest.raises(InvalidParameters, match="cat, dog, owl"):
        run(stage(tmp_path), image, classes=["unicorn"])
    with pytest.raises(ModelNotFound, match="pets"):
        run(stage(tmp_path), image, model="none")
    (folder / "network.onnx").write_bytes(constant_network(output_of("v8", ROWS[:1])))
    with pytest.raises(InvalidModel, match="SHA-256"):
        run(stage(tmp_path), image)
    install(tmp_path, "a-few", classes=("cat",))
    with pytest.raises(InvalidModel, match="3 classes"):
        run(stage(tmp_path), image, model="a-few")


def test_detectors_are_no_segmentations_and_real_ones_go_first(tmp_path: Path) -> None:
    install(tmp_path, "a-demo", demo=True)
    install(tmp_path, "pets")
    assert [model.manifest.id for model in installed_detectors([tmp_path])] == ["pets", "a-demo"]
    assert installed_models([tmp_path]) == []
    assert choose_detector([tmp_path], "image/detect").manifest.id == "pets"
    _, _, output = run(stage(tmp_path), Image2D((np.zeros((8, 8, 3), np.uint8),)), model="a-demo")
    assert "demonstration" in output.warnings[0]
