"""Through Ray's object store: the reader gets a read-only view of shared memory, never a copy of its own."""

from __future__ import annotations

import secrets
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray

from scangraph.contracts import LabelMap, Volume
from scangraph.handles import TOKEN_FILE, use_token

ROOT = Path(__file__).resolve().parents[2]
MIB = 1024**2
SIZE = 128 * MIB


@pytest.fixture(scope="module", autouse=True)
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    if ray.is_initialized():  # another test's, when only some are run
        yield
        return
    folder = tmp_path_factory.mktemp("ray")
    (folder / TOKEN_FILE).parent.mkdir()
    (folder / TOKEN_FILE).write_text(secrets.token_hex(32))
    use_token(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's own, about its own future
        ray.init(address="local", num_cpus=1, object_store_memory=512 * MIB, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def own_memory() -> int:
    """Bytes of memory that this process shares with nobody."""
    memory = psutil.Process().memory_info()
    return int(memory.rss - memory.shared)


class Reader:
    """A process that reads volumes and says what it costs."""

    def read(self, volume: Volume) -> dict[str, Any]:
        """Touch every byte, and say what arrived."""
        before = own_memory()
        return {
            "total": int(volume.array.sum(dtype=np.int64)),
            "touched": own_memory() - before,
            "type": type(volume).__name__,
            "shape": volume.array.shape,
            "dtype": volume.array.dtype.str,
            "spacing_mm": volume.spacing_mm,
            "origin_mm": volume.origin_mm,
            "read_only": not volume.array.flags.writeable,
        }

    def own_memory(self) -> int:
        """Bytes of this process alone."""
        return own_memory()

    def copy(self, volume: Volume) -> int:
        """What a reader must not do: growth with a private copy held."""
        before = own_memory()
        held = volume.array.copy()
        grown = own_memory() - before
        assert held.base is None
        return grown

    def flip(self, volume: Volume) -> Volume:
        """Give a volume back."""
        return volume.reoriented("RAS")


@pytest.fixture(scope="module")
def reader() -> Any:
    remote: Any = ray.remote(num_cpus=0, runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}})(Reader)
    actor = remote.remote()
    ray.get(actor.read.remote(Volume(np.zeros((2, 2, 2), np.int16), (1, 1, 1))))  # whatever is loaded once is loaded now
    return actor


@pytest.fixture(scope="module")
def volume() -> Volume:
    array = np.arange(SIZE // 2, dtype=np.int64).astype(np.int16).reshape(64, 1024, 1024)
    return Volume(array, (2.5, 0.7, 0.8), (1, 2, 3))


def test_reading_makes_no_copy(reader: Any, volume: Volume) -> None:
    ref = ray.put(volume)
    before = ray.get(reader.own_memory.remote())
    seen = [ray.get(reader.read.remote(ref)) for _ in range(3)]
    after = ray.get(reader.own_memory.remote())
    assert seen[0].pop("touched") < SIZE / 16
    assert seen[0] == {
        "type": "Volume",
        "shape": (64, 1024, 1024),
        "dtype": "<i2",
        "total": int(volume.array.sum(dtype=np.int64)),
        "spacing_mm": (2.5, 0.7, 0.8),
        "origin_mm": (1.0, 2.0, 3.0),
        "read_only": True,
    }
    assert after - before < SIZE / 16


def test_the_measurement_sees_a_copy(reader: Any, volume: Volume) -> None:
    assert ray.get(reader.copy.remote(ray.put(volume))) > SIZE * 15 / 16


def test_getting_makes_no_copy_either(volume: Volume) -> None:
    ref = ray.put(volume)
    before = own_memory()
    first, second = ray.get(ref), ray.get(ref)
    assert int(first.array.max()) == 32767
    assert own_memory() - before < SIZE / 16
    assert np.shares_memory(first.array, second.array)
    with pytest.raises(ValueError, match="read-only"):
        first.array[0] = 0


def test_results_come_back_whole(reader: Any) -> None:
    sent = LabelMap(np.arange(60, dtype=np.uint8).reshape(3, 4, 5), (3, 2, 1), labels=(1, 2))
    back = ray.get(reader.flip.remote(sent))
    assert type(back) is LabelMap
    assert (back.axcodes, back.labels) == ("RAS", (1, 2))
    np.testing.assert_array_equal(back.array, sent.array[:, ::-1, ::-1])
