"""Before and after, as a picture: a vessel, ureters, fat and a template, all of synthetic patients.

    python -m benchmarks.postprocess.pictures [docs/postprocess.png]

Red is what was there, blue what a repair has painted.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from benchmarks.postprocess.derived import patient
from deployments.postprocess.fat import FAT, perirenal_fat
from deployments.postprocess.repairing import repair_ureters, repair_vessels
from deployments.postprocess.templates import sample
from scangraph.contracts import LabelMap, label_table
from tests.postprocess.trees import ARTERY, URETER, make_case, make_ureters

Picture = NDArray[np.float64]
WHITE, NEW = np.ones(3), np.array([0.05, 0.25, 0.75])


def shadow(mask: LabelMap, only: tuple[int, ...] | None = None, new: NDArray[np.bool_] | None = None) -> Picture:
    """The structures seen from the front, each in its colour and darker where it is thicker; `new` voxels in blue, on top."""
    turned = mask.reoriented("LPS").array
    out = np.ones((turned.shape[0], turned.shape[2], 3))
    for number in only or [int(n) for n in np.unique(turned) if n]:
        thick = (turned == number).sum(axis=1)
        weight = np.where(thick > 0, 0.35 + 0.6 * np.clip(thick / 12, 0, 1), 0)[..., None]
        out = (1 - weight) * out + weight * np.asarray(label_table()[number].color) / 255
    if new is not None:
        out[mask.with_array(new.astype(np.uint8)).reoriented("LPS").array.any(axis=1)] = NEW
    return out[::-1]


def slice_of(mask: LabelMap, hu: NDArray[Any], z: int) -> Picture:
    """An axial slice: the CT in grey, labels in their colours over it."""
    turned = mask.reoriented("LPS").array[z]
    grey = np.clip((np.asarray(hu, float) + 200) / 450, 0, 1)[..., None] * WHITE
    for number in np.unique(turned[turned > 0]):
        grey[turned == number] = 0.45 * grey[turned == number] + 0.55 * np.asarray(label_table()[int(number)].color) / 255
    return grey


def pairs() -> list[tuple[str, Picture, Picture, float]]:
    """Return (title, before, after, height over width of a pixel)."""
    from scangraph.phantoms import make_phantom

    case, ureters = make_case(4), make_ureters(3)
    done, led = repair_vessels(case.mask), repair_ureters(ureters.mask)
    made = []
    for title, mask, result, only in (
        (f"vessel: {len(done.facts['bridges'])} bridges", case.mask, done.mask, (ARTERY,)),
        (f"ureters: {len(led.facts['bridges'])} bridges", ureters.mask, led.mask, (2, 3, 21, URETER)),
    ):
        aspect = mask.spacing_mm[0] / mask.spacing_mm[2]
        made.append((title, shadow(mask, only), shadow(result, only, result.array != mask.array), aspect))

    body = make_phantom(5, spacing_mm=(3.0, 1.5, 1.5), oblique=(0, 0, 0))
    organs = body.truth["organs"]
    fat = perirenal_fat(organs).mask
    z = int(np.argmax((fat.reoriented("LPS").array == FAT).sum(axis=(1, 2))))
    hu = body.volumes["portal"].reoriented("LPS").array[z]
    made.append(("fat, estimated", slice_of(organs, hu, z), slice_of(fat, hu, z), 1.0))

    whole = patient(7)
    keep = np.isin(whole.array, (2, 3, 5))
    known = LabelMap(
        np.where(keep, whole.array, 0).astype(np.uint8), whole.spacing_mm, whole.origin_mm, whole.direction, (2, 3, 5)
    )
    made.append(("sample: from another patient", shadow(known), shadow(sample(known, patient(0)).mask), 1.0))
    return made


def main() -> None:
    mpl.use("Agg")
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/postprocess.png")
    shown = pairs()
    figure = Figure(figsize=(3.0 * len(shown), 5.6), layout="constrained")
    axes = figure.subplots(2, len(shown))
    for column, (title, before, after, aspect) in enumerate(shown):
        for row, (word, picture) in enumerate((("before", before), ("after", after))):
            panel = axes[row, column]
            panel.imshow(picture, aspect=aspect, interpolation="nearest")
            panel.set_title(f"{title}" if row == 0 else "", fontsize=10)
            panel.set_xticks([])
            panel.set_yticks([])
            if column == 0:
                panel.set_ylabel(word, fontsize=10)
    figure.savefig(target, dpi=75)
    print(f"{target}: {target.stat().st_size / 1024:.0f} kB")


if __name__ == "__main__":
    main()
