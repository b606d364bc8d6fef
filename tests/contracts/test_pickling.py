"""Contracts pickle without a copy and without numpy's names, so that stages may use numpy 1 and numpy 2 side by side."""

from __future__ import annotations

import copy
import os
import pickle
import pickletools
import subprocess
import sys
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pytest

from scangraph.contracts import LabelMap, Scene, Volume
from tests.contracts.exchange import assert_equal, check, examples, write

ROOT = Path(__file__).resolve().parents[2]
NUMPY_1 = ROOT / ".envs" / "numpy1" / "bin" / "python"
needs_numpy_1 = pytest.mark.skipif(not NUMPY_1.exists(), reason="needs .envs/numpy1: python3 runtime_envs/build.py numpy1")

every_example = pytest.mark.parametrize("name", examples())
every_protocol = pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))


@every_example
@every_protocol
def test_round_trip(name: str, protocol: int) -> None:
    example = examples()[name]
    assert_equal(pickle.loads(pickle.dumps(example, protocol)), example)


@every_example
def test_round_trip_by_cloudpickle_and_copy(name: str) -> None:
    example = examples()[name]
    assert_equal(pickle.loads(cloudpickle.dumps(example)), example)
    assert_equal(copy.deepcopy(example), example)


@every_example
@every_protocol
def test_no_name_of_numpy_is_in_the_stream(name: str, protocol: int) -> None:
    texts = strings(pickle.dumps(examples()[name], protocol))
    assert "scangraph.contracts" in " ".join(texts)
    assert not [text for text in texts if "numpy" in text]


def test_the_check_for_numpys_names_can_fail() -> None:
    assert [text for text in strings(pickle.dumps(np.zeros(3))) if "numpy" in text]


def strings(stream: bytes) -> list[str]:
    """Every text in a pickle, module and class names included, array bytes not."""
    return [argument for _, argument, _ in pickletools.genops(stream) if isinstance(argument, str)]


# --- without a copy ---------------------------------------------------------------------------------------------------


def out_of_band(value: Any) -> tuple[bytes, list[pickle.PickleBuffer]]:
    buffers: list[pickle.PickleBuffer] = []
    return pickle.dumps(value, 5, buffer_callback=buffers.append), buffers


@pytest.mark.parametrize("cls", [Volume, LabelMap])
def test_arrays_travel_out_of_band_without_a_copy(cls: type[Volume]) -> None:
    sent = cls(np.arange(1_000_000, dtype=np.uint32).reshape(100, 100, 100), (1, 1, 1))
    stream, buffers = out_of_band(sent)
    assert len(stream) < 1000
    received = pickle.loads(stream, buffers=buffers)
    assert np.shares_memory(received.array, sent.array)
    assert_equal(received, sent)


def test_scenes_travel_out_of_band_without_a_copy() -> None:
    sent = examples()["scene"]
    assert isinstance(sent, Scene)
    stream, buffers = out_of_band(sent)
    received = pickle.loads(stream, buffers=buffers)
    assert np.shares_memory(received.surfaces[0].vertices_mm, sent.surfaces[0].vertices_mm)
    assert np.shares_memory(received.surfaces[0].faces, sent.surfaces[0].faces)


def test_read_only_buffers_make_read_only_arrays() -> None:
    stream, buffers = out_of_band(examples()["mask"])
    received = pickle.loads(stream, buffers=[bytes(buffer.raw()) for buffer in buffers])
    assert not received.array.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        received.array[0] = 1


# --- between numpy 1 and numpy 2 --------------------------------------------------------------------------------------


def numpy_1(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error"}
    return subprocess.run([str(NUMPY_1), *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def exchange(job: str, folder: Path) -> None:
    done = numpy_1("tests/contracts/exchange.py", job, str(folder))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("1.26.")


def test_this_interpreter_has_numpy_2() -> None:
    assert np.__version__.startswith("2."), sys.executable


@needs_numpy_1
def test_numpy_1_reads_what_numpy_2_wrote(tmp_path: Path) -> None:
    write(tmp_path)
    exchange("check", tmp_path)


@needs_numpy_1
def test_numpy_2_reads_what_numpy_1_wrote(tmp_path: Path) -> None:
    exchange("write", tmp_path)
    check(tmp_path)


@needs_numpy_1
def test_numpy_1_cannot_read_a_bare_array_of_numpy_2(tmp_path: Path) -> None:
    """What the contracts are spared; if this ever works, they could be simpler."""
    path = tmp_path / "array.pickle"
    path.write_bytes(pickle.dumps(np.zeros(3), 5))
    done = numpy_1("-c", f"import pickle, pathlib; pickle.loads(pathlib.Path({str(path)!r}).read_bytes())")
    assert done.returncode == 1
    assert "No module named 'numpy._core" in done.stderr
