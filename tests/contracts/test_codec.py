"""Values as bytes: exact, and damaged in no bit."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from scangraph.contracts import Image2D, ImageFile, LabelMap, Line, Scene, SceneFiles, Surface, Volume
from scangraph.contracts.codec import from_bytes, to_bytes
from scangraph.contracts.errors import DamagedResult

TURN = ((0.6, -0.8, 0.0), (0.8, 0.6, 0.0), (0.0, 0.0, 1.0))
NUMBERS = [np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.float32, np.float64, np.bool_]


@st.composite
def volumes(draw: st.DrawFn) -> Volume:
    shape = draw(hnp.array_shapes(min_dims=3, max_dims=4, max_side=6))
    array = draw(hnp.arrays(draw(st.sampled_from(NUMBERS)), shape))
    if draw(st.booleans()):
        array = array[..., ::-1]  # not contiguous
    return Volume(array, (1.5, 0.7, 0.1 + 0.2), (-1e3, 1 / 3, 5.0), TURN)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=6,
)
json_objects = st.dictionaries(st.text(max_size=9), json_values, max_size=3)


@st.composite
def scenes(draw: st.DrawFn) -> Scene:
    surfaces = []
    for number in range(draw(st.integers(0, 4))):
        vertices = draw(hnp.arrays(np.float32, (draw(st.integers(0, 9)), 3), elements=st.floats(-1e3, 1e3, width=32)))
        faces = draw(hnp.arrays(np.int32, (draw(st.integers(0, 9)), 3), elements=st.integers(0, 8)))
        more = draw(json_objects), draw(st.integers(0, 3))
        surfaces.append(Surface(draw(st.text(max_size=20)), number, (number, 2, 255), vertices, faces, *more))
    frame: Any = draw(st.sampled_from(["LPS", "RAS"]))
    notes = tuple(draw(st.lists(st.text(), max_size=3)))
    formats: Any = draw(st.permutations(["obj", "glb", "stl", "ply"]))[: draw(st.integers(1, 4))]
    files = SceneFiles(tuple(formats), draw(st.booleans()), draw(st.booleans()), draw(st.sampled_from(["m", "mm"])))
    lines = tuple(
        Line(f"line {n}", n, (1, 2, 3), np.arange(6, dtype=np.float32).reshape(2, 3) + n, np.array([[0, 1]], np.int32))
        for n in range(draw(st.integers(0, 2)))
    )
    screen = tuple(surfaces[: draw(st.integers(0, 2))])
    return Scene(tuple(surfaces), frame, notes, files, draw(json_objects), lines, screen)


def same_array(one: Any, other: Any) -> bool:
    return bool(one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes())


@given(volumes())
def test_volumes_come_back_bit_for_bit(volume: Volume) -> None:
    again = from_bytes(to_bytes(volume))
    assert type(again) is Volume
    assert same_array(again.array, volume.array)
    assert (again.spacing_mm, again.origin_mm, again.direction) == (volume.spacing_mm, volume.origin_mm, volume.direction)
    assert not again.array.flags.writeable


@given(hnp.arrays(st.sampled_from([np.uint8, np.uint16, np.uint32]), (3, 4, 5)), st.sets(st.integers(1, 255)))
def test_label_maps_keep_their_labels(array: Any, labels: set[int]) -> None:
    mask = LabelMap(array, (1, 2, 3), (0, 0, 0), TURN, tuple(labels))
    again = from_bytes(to_bytes(mask))
    assert type(again) is LabelMap
    assert same_array(again.array, mask.array)
    assert again.labels == mask.labels
    assert again.same_grid(mask)


@given(scenes())
def test_scenes_keep_all_that_they_say(scene: Scene) -> None:
    again = from_bytes(to_bytes(scene))
    assert isinstance(again, Scene)
    assert (again.frame, again.notes, len(again.surfaces)) == (scene.frame, scene.notes, len(scene.surfaces))
    assert (again.files, again.facts) == (scene.files, scene.facts)
    assert len(again.screen) == len(scene.screen)
    for line, before in zip(again.lines, scene.lines, strict=True):
        assert (line.name, line.label, line.color) == (before.name, before.label, before.color)
        assert same_array(line.points_mm, before.points_mm)
        assert same_array(line.segments, before.segments)
    for one, other in zip((*again.surfaces, *again.screen), (*scene.surfaces, *scene.screen), strict=True):
        assert (one.name, one.label, one.color) == (other.name, other.label, other.color)
        assert (one.measures, one.level) == (other.measures, other.level)
        assert same_array(one.vertices_mm, other.vertices_mm)
        assert same_array(one.faces, other.faces)


@given(
    st.lists(
        st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4)).flatmap(
            lambda shape: hnp.arrays(st.sampled_from([np.uint8, np.uint16]), shape)
        ),
        min_size=1,
        max_size=3,
    ),
    st.none() | st.tuples(st.floats(1, 9999), st.floats(1, 9999)),
)
def test_images_keep_every_page(pages: list[Any], dpi: tuple[float, float] | None) -> None:
    image = Image2D(tuple(pages), dpi, ImageFile("tiff", 12, lossless=True))
    again = from_bytes(to_bytes(image))
    assert isinstance(again, Image2D)
    assert (again.dpi, again.file) == (image.dpi, image.file)
    assert all(same_array(one, other) for one, other in zip(again.pages, image.pages, strict=True))


def test_scenes_of_older_versions_decode() -> None:
    """As 0.1.0 wrote it, before scenes said anything about their files."""
    old = (
        "c2NhbmdyYXBoAAEKNAEAAAAAAADsAAAANfQZN0+5h1t7mesV95lP7M2ndPqPplTIsw8O/RdXAhF7InR5cGUiOiJTY2VuZSIsImZy"
        "YW1lIjoiUkFTIiwibm90ZXMiOlsiYSBub3RlIl0sInN1cmZhY2VzIjpbeyJuYW1lIjoia2lkbmV5X2xlZnQiLCJsYWJlbCI6Mywi"
        "Y29sb3IiOlsxLDIsM119XSwiYXJyYXlzIjpbeyJkdHlwZSI6IjxmNCIsInNoYXBlIjpbNCwzXSwic2l6ZSI6NDgsImRlZmxhdGVk"
        "IjpmYWxzZX0seyJkdHlwZSI6IjxpNCIsInNoYXBlIjpbMiwzXSwic2l6ZSI6MjQsImRlZmxhdGVkIjpmYWxzZX1dfQAAgD8AAAAA"
        "AAAAAAAAAAAAAIA/AAAAAAAAAAAAAAAAAACAPwAAAAAAAAAAAAAAAAAAAAACAAAAAQAAAAAAAAABAAAAAwAAAA=="
    )
    again = from_bytes(base64.b64decode(old))
    assert isinstance(again, Scene)
    (surface,) = again.surfaces
    assert (again.frame, again.notes, again.files, again.facts) == ("RAS", ("a note",), SceneFiles(), {})
    assert (surface.name, surface.label, surface.color, surface.measures, surface.level) == ("kidney_left", 3, (1, 2, 3), {}, 0)
    assert np.array_equal(surface.faces, [[0, 2, 1], [0, 1, 3]])
    assert to_bytes(again) == base64.b64decode(old)  # what says no more is written as before


@given(st.binary())
def test_bytes_come_back(data: bytes) -> None:
    assert from_bytes(to_bytes(data)) == data


def test_other_byte_orders_come_back_as_ours() -> None:
    array = np.arange(60, dtype=">i2").reshape(3, 4, 5)
    again = from_bytes(to_bytes(Volume(array, (1, 1, 1))))
    assert isinstance(again, Volume)
    assert again.array.dtype == np.dtype("<i2")
    assert np.array_equal(again.array, array)


def test_equal_values_give_equal_bytes_and_masks_get_small() -> None:
    array = np.zeros((40, 60, 80), np.uint8)
    array[10:30, 20:40, 30:50] = 2
    mask = LabelMap(array, (1, 1, 1), labels=(2,))
    assert to_bytes(mask) == to_bytes(LabelMap(array.copy(), (1, 1, 1), labels=(2,)))
    assert len(to_bytes(mask)) < array.nbytes / 50


@settings(max_examples=30)
@given(st.data())
def test_every_damage_is_noticed(data: st.DataObject) -> None:
    whole = to_bytes(LabelMap(np.arange(24, dtype=np.uint8).reshape(2, 3, 4), (1, 1, 1), labels=tuple(range(1, 24))))
    position = data.draw(st.integers(0, len(whole) - 1))
    flipped = bytearray(whole)
    flipped[position] ^= data.draw(st.integers(1, 255))
    for damaged in (bytes(flipped), whole[:position], whole + b"\0"):
        with pytest.raises(DamagedResult):
            from_bytes(damaged)


@pytest.mark.parametrize("filling", [b" ", b"1"])  # JSON may be followed by blanks
def test_every_damage_before_the_head_is_noticed(filling: bytes) -> None:
    whole = to_bytes(filling * 40)
    for position in range(whole.index(b'{"type"')):
        for more in range(1, 256):
            damaged = bytearray(whole)
            damaged[position] = (damaged[position] + more) % 256
            with pytest.raises(DamagedResult):
                from_bytes(bytes(damaged))


def test_strangers_are_refused() -> None:
    with pytest.raises(TypeError):
        to_bytes(object())  # type: ignore[arg-type]
    import pickle

    with pytest.raises(DamagedResult):
        from_bytes(pickle.dumps({"a": 1}))
