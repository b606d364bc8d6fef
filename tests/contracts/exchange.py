"""Write the contracts' pickles, or read and check them: run by interpreters with different numpy.

python tests/contracts/exchange.py write|check FOLDER
"""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import numpy as np

from scangraph.contracts import Image2D, ImageFile, LabelMap, Scene, SceneFiles, Surface, Volume

GEOMETRY = {
    "spacing_mm": (2.5, 0.7, 0.8),
    "origin_mm": (-123.25, 45.5, -1007.125),
    "direction": ((0, 0.6, 0.8), (1, 0, 0), (0, 0.8, -0.6)),
}
FORMATS = ("4", "5", "5-out-of-band")


def examples() -> dict[str, Volume | LabelMap | Scene | Image2D]:
    """One of each, the arrays of many types and none of the easy kind."""
    ramp = np.arange(2 * 3 * 4 * 5)
    made: dict[str, Volume | LabelMap | Scene | Image2D] = {
        f"volume-{dtype.replace('>', 'big-').replace('?', 'bool')}": Volume(ramp.astype(dtype).reshape(2, 3, 4, 5), **GEOMETRY)  # type: ignore[arg-type]
        for dtype in ("i2", ">i2", "f2", "f4", "f8", "u8", "?")
    }
    made["volume-strided"] = Volume(ramp.reshape(6, 4, 5), **GEOMETRY).reoriented("RAS")  # type: ignore[arg-type]
    made["mask"] = LabelMap((ramp % 7).astype(np.uint8).reshape(6, 4, 5), **GEOMETRY, labels=tuple(range(1, 7)))  # type: ignore[arg-type]
    corner = Surface("liver", 5, (168, 83, 59), ramp[:12].reshape(4, 3), np.array([(0, 1, 2), (0, 2, 3)]))  # type: ignore[arg-type]
    nothing = Surface("spleen", 1, (1, 2, 3), np.zeros((0, 3), np.float32), np.zeros((0, 3), np.int32))
    made["scene"] = Scene((corner, nothing), "RAS", ("a demonstration",))
    box = np.array([(0, 1, 2), (9, 10, 11)], np.float32)
    measures = {
        "box_mm": box,
        "genus": np.int64(0),
        "watertight": np.bool_(True),
        "area_cm2": np.float32(0.5),
        "warnings": ("cut",),
    }
    coarse = Surface("liver", 5, (168, 83, 59), corner.vertices_mm, corner.faces, measures, np.int8(1))  # type: ignore[arg-type]
    files = SceneFiles(("glb", "obj"), per_structure=True, zipped=True, glb_unit="mm")
    made["scene-measured"] = Scene((corner, coarse), files=files, facts={"spacing_mm": np.array([2.5, 0.7, 0.8])})
    pages = (ramp.astype(np.uint8).reshape(10, 4, 3), ramp.astype(np.uint16).reshape(3, 40, 1)[:, ::-2])
    made["image2d"] = Image2D(pages, (300, 72.5), ImageFile("tiff"))
    made["image2d-jpeg"] = Image2D(pages[:1], file=ImageFile("jpeg", 33))
    return made


def write(folder: Path) -> None:
    """Pickle every example in every format."""
    for name, example in examples().items():
        for kind in FORMATS:
            buffers: list[pickle.PickleBuffer] = []
            collect = buffers.append if kind == "5-out-of-band" else None
            (folder / f"{name}.{kind}").write_bytes(pickle.dumps(example, int(kind[0]), buffer_callback=collect))
            for k, buffer in enumerate(buffers):
                (folder / f"{name}.{kind}.{k}").write_bytes(buffer.raw())


def check(folder: Path) -> None:
    """Read every pickle and compare it with what this interpreter would have written."""
    for name, example in examples().items():
        for kind in FORMATS:
            parts = sorted(folder.glob(f"{name}.{kind}.*"), key=lambda path: int(path.suffix[1:]))
            assert bool(parts) == (kind == "5-out-of-band"), parts
            again = pickle.loads((folder / f"{name}.{kind}").read_bytes(), buffers=[part.read_bytes() for part in parts])
            assert_equal(again, example)


def assert_equal(again: Volume | Scene | Image2D, example: Volume | Scene | Image2D) -> None:
    """Equal in every field, bit for bit."""
    assert type(again) is type(example)
    if isinstance(example, Volume):
        assert isinstance(again, Volume)
        assert again.array.dtype == example.array.dtype
        np.testing.assert_array_equal(again.array, example.array, strict=True)
        assert (again.spacing_mm, again.origin_mm, again.direction) == (
            example.spacing_mm,
            example.origin_mm,
            example.direction,
        )
        assert getattr(again, "labels", None) == getattr(example, "labels", None)
    elif isinstance(example, Image2D):
        assert isinstance(again, Image2D)
        assert (again.dpi, again.file) == (example.dpi, example.file)
        for page, other_page in zip(again.pages, example.pages, strict=True):
            np.testing.assert_array_equal(page, other_page, strict=True)
    else:
        assert isinstance(again, Scene)
        assert (again.frame, again.notes) == (example.frame, example.notes)
        assert (again.files, again.facts) == (example.files, example.facts)
        for one, other in zip(again.surfaces, example.surfaces, strict=True):
            assert (one.name, one.label, one.color) == (other.name, other.label, other.color)
            assert (one.measures, one.level) == (other.measures, other.level)
            np.testing.assert_array_equal(one.vertices_mm, other.vertices_mm, strict=True)
            np.testing.assert_array_equal(one.faces, other.faces, strict=True)


if __name__ == "__main__":
    {"write": write, "check": check}[sys.argv[1]](Path(sys.argv[2]))
    print(np.__version__)
