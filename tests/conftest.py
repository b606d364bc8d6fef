"""What tests share: the sample data, small phantoms, and one running service for those that need it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from ray._private import auto_init_hook

from scangraph.contracts import LabelMap, Volume
from scangraph.phantoms import Phantom, make_phantom
from scangraph.settings import Settings, load_settings
from tests.s3 import in_own_place

# The same examples every time, so that what fails does so for who changed something; `--hypothesis-profile=wide` has others.
hypothesis.settings.register_profile("suite", deadline=None, derandomize=True)
hypothesis.settings.register_profile("wide", deadline=None)
hypothesis.settings.load_profile("suite")

ROOT = Path(__file__).resolve().parents[1]
SHARED_DATA = ROOT.parent / "shared" / "data"


def pytest_configure() -> None:
    """Let no thread that outlives a test's Ray start another one."""
    auto_init_hook.enable_auto_connect = False


@pytest.fixture(scope="session")
def sample_ct() -> Path:
    """A real abdominal CT."""
    return _sample("ct.nii.gz")


@pytest.fixture(scope="session")
def sample_mask() -> Path:
    """Its segmentation: 61 labels."""
    return _sample("ct_total_seg.nii.gz")


def _sample(name: str) -> Path:
    path = SHARED_DATA / name
    if not path.exists():
        pytest.skip(f"the sample data ({name} in ../shared/data) is not on this machine")
    return path


@pytest.fixture(scope="session")
def phantom() -> Phantom:
    """A coarse synthetic patient, cut down to what lies around the ureters: quick to segment."""
    whole = make_phantom(4242, spacing_mm=(4.0, 3.0, 3.0), oblique=(0.0, 0.0, 0.0))
    found = np.argwhere(whole.truth["ureters"].array)
    low, high = np.maximum(found.min(axis=0) - 4, 0), found.max(axis=0) + 5

    def cut(volume: Volume) -> Volume:
        array = volume.array[low[0] : high[0], low[1] : high[1], low[2] : high[2]]
        origin = tuple(volume.index_to_world(low))
        return replace(volume, array=array, origin_mm=origin)

    volumes = {name: cut(volume) for name, volume in whole.volumes.items()}
    truth = {name: cut(mask) for name, mask in whole.truth.items()}
    return replace(whole, volumes=volumes, truth=truth)  # type: ignore[arg-type]


@pytest.fixture
def ball() -> LabelMap:
    """A ball of radius 8 mm labelled 2, and a box labelled 5, on an oblique anisotropic grid."""
    z, y, x = np.mgrid[:24, :30, :36]
    spacing = (1.5, 1.0, 0.8)
    distance = np.sqrt(((z - 11) * 1.5) ** 2 + ((y - 14) * 1.0) ** 2 + ((x - 14) * 0.8) ** 2)
    array = np.where(distance < 8, 2, 0).astype(np.uint8)
    array[5:15, 8:20, 28:34] = 5
    turn = np.deg2rad(20)
    direction = ((np.cos(turn), -np.sin(turn), 0), (np.sin(turn), np.cos(turn), 0), (0, 0, 1))
    return LabelMap(array, spacing, (-30.0, 40.0, 500.0), direction, (2, 5))


@pytest.fixture(scope="session", autouse=True)
def shared_cache(request: pytest.FixtureRequest) -> None:
    """Let all services of a run, and of the next run, share what takes long to compile. They run in other processes, too."""
    os.environ.setdefault("SCANGRAPH_CACHE_DIR", str(request.config.cache.mkdir("scangraph")))


@pytest.fixture(scope="session")
def service_settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Settings of the session's service: a data folder of its own, a free port."""
    return in_own_place(load_settings(data=tmp_path_factory.mktemp("data"), port=0, cpus=2, object_store_mb=1024))


@pytest.fixture(scope="session")
def service(service_settings: Settings) -> Iterator[str]:
    """URL of a real service: real Ray, real HTTP, every stage in its environment."""
    for stage in ("base", "nnunet", "smoothing", "postprocess", "imaging"):
        if not (service_settings.environments_dir / stage / "scangraph-lock").exists():
            pytest.skip(f"environment {stage!r} is not built: run `make setup`")
    from scangraph.cluster import local_service

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's own threads warn about Ray's own sockets
        with local_service(service_settings) as running:
            yield running.url


def constant_volume(
    value: int, shape: tuple[int, int, int] = (8, 9, 10), origin_mm: tuple[float, float, float] = (0, 0, 0)
) -> Volume:
    """A volume of one value."""
    return Volume(np.full(shape, value, np.int16), (2.0, 1.5, 1.0), origin_mm)
