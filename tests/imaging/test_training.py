"""What the demonstration detector is trained and measured on."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from deployments.imaging.detecting import Box, Choice, detect
from deployments.imaging.networks import Networks
from models.training.detector import FIRST_EVALUATION_SEED, average_precision
from models.training.instruments import CLASSES, Picture, draw_picture
from scangraph.models import DetectorManifest, choose_detector, verify_files

MODELS = Path(__file__).resolve().parents[2] / "models"


def test_a_seed_is_a_picture_and_its_boxes_lie_around_what_was_drawn() -> None:
    for seed in range(20):
        one, other = draw_picture(seed, 320, 240), draw_picture(seed, 320, 240)
        assert np.array_equal(one.pixels, other.pixels)
        assert np.array_equal(one.boxes, other.boxes)
        assert len(one.boxes) == len(one.classes)
        if len(one.boxes):
            assert one.boxes[:, :2].min() >= 0
            assert (one.boxes[:, 2:] <= (320, 240)).all()
    assert not np.array_equal(draw_picture(0, 320, 240).pixels, draw_picture(1, 320, 240).pixels)


def box(corner: float, confidence: float, number: int = 0) -> Box:
    return Box(number, CLASSES[number], confidence, (corner, 0, corner + 10, 10))


def picture(*corners: float) -> Picture:
    boxes = np.array([(corner, 0, corner + 10, 10) for corner in corners], float).reshape(-1, 4)
    return Picture(np.zeros((10, 100, 3), np.uint8), boxes, np.zeros(len(corners), np.int64))


def test_average_precision_by_hand() -> None:
    truth = [picture(0, 50), picture(0)]
    perfect = [[box(0, 0.9), box(50, 0.8)], [box(0, 0.7)]]
    assert average_precision(perfect, truth, 0, [0.5, 0.95]).tolist() == [1, 1]
    assert average_precision([[], []], truth, 0, [0.5]).tolist() == [0]
    # Right, wrong, right, and one is missed: precision is 1 up to a third of the recalls, then two thirds, then 0.
    some = [[box(0, 0.9), box(30, 0.8), box(50, 0.7)], []]
    at = np.linspace(0, 1, 101)
    wanted = np.where(at <= 1 / 3, 1, np.where(at <= 2 / 3, 2 / 3, 0)).mean()
    assert np.isclose(average_precision(some, truth, 0, [0.5])[0], wanted)
    twice = [[box(0, 0.9), box(0, 0.8), box(50, 0.7)], [box(0, 0.6)]]
    assert average_precision(twice, truth, 0, [0.5])[0] < 1  # the same thing counts once
    shifted = [[box(2, 0.9), box(52, 0.8)], [box(2, 0.7)]]  # IoU 2/3
    assert average_precision(shifted, truth, 0, [0.5, 0.7]).tolist() == [1, 0]


def test_the_shipped_detector_is_what_its_manifest_says() -> None:
    model = choose_detector((MODELS,), "image/detect", "instruments-demo")
    verify_files(model)
    manifest = model.manifest
    assert isinstance(manifest, DetectorManifest)
    assert manifest.demo
    assert sum(path.stat().st_size for path in model.folder.iterdir()) < 2 * 2**20
    network = Networks((MODELS,), 1, 1, gpu=False).get(model)
    truth = [draw_picture(FIRST_EVALUATION_SEED + number, 640, 480) for number in range(40)]
    facts = network.facts
    found = [detect(p.pixels, network, facts.layout, facts.input_size, CLASSES, Choice(confidence=0.001)) for p in truth]
    scores = np.mean([average_precision(found, truth, number, [0.5])[0] for number in range(len(CLASSES))])
    assert abs(scores - manifest.metrics["map_50"]) < 0.12  # on 40 of the pictures on which it was measured
