"""Where the body is: known answers, and that nothing of it is lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from numpy.typing import NDArray

from deployments.nnunet.body import Blocks, block_max, body_blocks, union
from scangraph.phantoms import Phantom

SPACING = (2.0, 1.0, 1.5)


def mask_of(blocks: Blocks, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    labels = np.ones(shape, np.uint8)
    blocks.clear_outside(labels)
    return labels


def cylinder(shape: tuple[int, int, int] = (30, 120, 90), radius_mm: float = 25) -> NDArray[np.bool_]:
    _, y, x = np.meshgrid(*[(np.arange(n) - n / 2) * s for n, s in zip(shape, SPACING, strict=True)], indexing="ij")
    inside: NDArray[np.bool_] = np.hypot(y, x) < radius_mm
    return inside


def test_a_body_with_holes_is_found_whole_and_grown_by_the_margin() -> None:
    body = cylinder()
    ct = np.where(body, 40, -1000).astype(np.int16)
    ct[:, 55:65, 40:50] = -1000  # a lung, open to the first and the last slice
    ct += np.random.default_rng(1).normal(0, 25, ct.shape).astype(np.int16)
    distance = np.hypot(*np.meshgrid((np.arange(120) - 60) * 1.0, (np.arange(90) - 45) * 1.5, indexing="ij"))
    for margin in (0.0, 8.0):
        found = mask_of(body_blocks(ct, SPACING, margin), ct.shape)
        assert found[body].all()
        assert found[:, distance < 25 + margin - 1.5].all()
        assert not found[:, distance > 25 + np.sqrt(2) * (margin + 2 * 4)].any()


@pytest.mark.parametrize("image", ["no air", "other units", "a crop with air inside", "all air"])
def test_what_does_not_look_like_a_body_in_air(image: str) -> None:
    ct = np.full((6, 60, 50), 40, np.int16)
    if image == "other units":
        ct[:] = np.where(cylinder((6, 60, 50), 15), 1064, 24)
    elif image == "a crop with air inside":
        ct[:, 20:30, 20:30] = -1000
    elif image == "all air":
        ct[:] = -1000
    assert body_blocks(ct, SPACING).inside.all() == (image != "all air")


def test_highest_values_of_blocks() -> None:
    image = np.random.default_rng(2).normal(0, 100, (7, 9, 10)).astype(np.int16)
    found = block_max(image[::-1], (2, 4, 3))
    for z, y, x in np.ndindex(found.shape):
        assert found[z, y, x] == image[::-1][2 * z : 2 * z + 2, 4 * y : 4 * y + 4, 3 * x : 3 * x + 3].max()
    assert found.shape == (4, 3, 4)


def test_masks_turn_with_their_image() -> None:
    rng = np.random.default_rng(3)
    blocks = Blocks(rng.random((3, 4, 5)) < 0.5, (2, 3, 1))
    whole = mask_of(blocks, (5, 11, 5))
    turned = mask_of(blocks.transposed((2, 0, 1)), (5, 5, 11))
    assert np.array_equal(turned, whole.transpose(2, 0, 1))
    other = Blocks(rng.random((3, 4, 5)) < 0.5, (2, 3, 1))
    assert np.array_equal(mask_of(union([blocks, other]), (5, 11, 5)), whole | mask_of(other, (5, 11, 5)))


def test_nothing_of_a_phantom_is_outside(phantom: Phantom) -> None:
    image = phantom.volumes["portal"].reoriented("LPS")
    found = mask_of(body_blocks(image.array, image.spacing_mm, 0), image.shape)
    for truth in phantom.truth.values():
        assert found[truth.reoriented("LPS").array > 0].all()


def test_nothing_of_a_patient_is_outside(sample_ct: Path, sample_mask: Path) -> None:
    """All 61 structures lie inside, without a margin, and a third of the image outside."""
    ct: Any = nibabel.load(sample_ct)
    mask: Any = nibabel.load(sample_mask)
    truth = np.asarray(mask.dataobj)
    image = np.asarray(ct.dataobj).transpose(2, 1, 0)
    found = mask_of(body_blocks(image, ct.header.get_zooms()[::-1], 0), image.shape)
    assert found[truth.transpose(2, 1, 0) > 0].all()
    assert 0.6 < found.mean() < 0.75
