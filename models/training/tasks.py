"""The four demonstration models: what each sees, learns and is small in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from scangraph import phantoms

#: Seeds of the phantoms that train, and of those that only measure. `phantoms.DEMO_SEED` is in neither.
FIRST_TRAINING_SEED = 1000
EVALUATION_SEEDS = tuple(range(2000, 2010))


@dataclass(frozen=True)
class Channel:
    """One input of a network.

    Attributes
    ----------
    name : str
        The port's name in the model's manifest.
    phase : str
        The phase its manifest asks for; "any" makes no difference between them.
    phases : tuple of str
        Phantom phases it is trained on, taken in turn from case to case.
    """

    name: str
    phase: str
    phases: tuple[str, ...]


@dataclass(frozen=True)
class Task:
    """A model to train.

    Attributes
    ----------
    number : int
        nnU-Net's dataset number.
    component : str
        Id of the component it serves.
    title : str
    truth : str
        The phantom's mask it learns; its label-table numbers, in order, are the network's labels 1, 2, ...
    channels : tuple of Channel
    spacing_mm : (z, y, x)
        What it works at.
    patch : (z, y, x)
        Voxels of a tile; multiples of 8.
    features : tuple of int
        Width of the U-Net's stages, each at half the resolution of the one before.
    iterations : int
        Training steps.
    optimizer : "sgd" or "adamw"
        nnU-Net's own SGD, or AdamW where that does not get going in so few steps.
    roi : dict, optional
        The manifest's `roi`: around what of another model it may look only.
    """

    number: int
    component: str
    title: str
    truth: str
    channels: tuple[Channel, ...]
    spacing_mm: tuple[float, float, float]
    patch: tuple[int, int, int]
    features: tuple[int, ...]
    iterations: int
    optimizer: Literal["sgd", "adamw"] = "sgd"
    roi: dict[str, Any] | None = None

    @property
    def dataset(self) -> str:
        """Name of nnU-Net's dataset folder."""
        return f"Dataset{self.number:03d}_phantom_{self.truth}"

    @property
    def labels(self) -> tuple[int, ...]:
        """Label-table numbers of the network's labels 1, 2, ..."""
        return phantoms.TASK_LABELS[self.truth]

    def images(self, seed: int) -> tuple[str, ...]:
        """Phases that a seed's phantom shows to the channels."""
        return tuple(channel.phases[seed % len(channel.phases)] for channel in self.channels)


# Thin tubes need the finer grid: at 2 mm a ureter is two to three voxels wide. Organs need context instead, to tell left from
# right, and so do tumors: with small patches, most of them around kidneys, the network also found tumors in muscle and bowel.
# Where small structures share a loss with large ones (seven organs; a cyst in a kidney) SGD still called everything
# background, or kidney, after 400 steps and more; AdamW had found great vessels after 240.
TASKS: dict[str, Task] = {
    "ureter": Task(
        904,
        "inference/ureter",
        "Ureters in the delayed phase (demonstration)",
        "ureters",
        (Channel("image_D", "delayed", ("delayed",)),),
        spacing_mm=(2.0, 2.0, 2.0),
        patch=(64, 64, 64),
        features=(8, 16, 32, 64),
        iterations=1100,
        # From the kidneys to the bladder; a third of the tiles, and fewer mistakes elsewhere.
        roi={"task": "inference/totalseg", "structures": [2, 3, 21], "margin_mm": 20},
    ),
    "vessel": Task(
        902,
        "inference/vessel",
        "Arteries and veins from the arterial and portal phase (demonstration)",
        "vessels",
        (Channel("image_A", "arterial", ("arterial",)), Channel("image_P", "portal", ("portal",))),
        spacing_mm=(2.0, 2.0, 2.0),
        patch=(64, 64, 80),
        features=(8, 16, 32, 64),
        iterations=1100,
    ),
    "tumor": Task(
        903,
        "inference/tumor",
        "Kidney, tumor and cyst (demonstration)",
        "tumor",
        (Channel("image", "any", ("arterial", "portal")),),
        spacing_mm=(3.0, 3.0, 3.0),
        patch=(64, 64, 80),
        features=(8, 16, 32, 64),
        iterations=1300,
        optimizer="adamw",
    ),
    "totalseg": Task(
        901,
        "inference/totalseg",
        "Organs and great vessels (demonstration)",
        "organs",
        (Channel("image", "any", phantoms.PHASES),),
        spacing_mm=(3.0, 3.0, 3.0),
        patch=(64, 64, 80),
        features=(8, 16, 32, 64),
        iterations=900,
        optimizer="adamw",
    ),
}
