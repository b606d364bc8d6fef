"""Python access to a running service."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import scangraph
from scangraph.contracts import LabelMap, Progress, merge_label_maps
from scangraph.contracts.errors import InvalidParameters, NotRunning, ScanGraphError, UnknownComponent
from scangraph.demo import dice
from scangraph.handles import Connection, connect
from scangraph.phantoms import Phantom
from scangraph.settings import Settings
from tests.conftest import ROOT, constant_volume


@pytest.fixture(scope="module")
def graph(service: str) -> Iterator[Connection]:
    with scangraph.connect() as graph:
        yield graph


def test_volume_in_label_map_out(graph: Connection, phantom: Phantom) -> None:
    seen: list[Progress] = []
    call = graph.ureter(phantom.volumes["delayed"], on_progress=seen.append)
    mask = call.result(timeout=300)
    assert isinstance(mask, LabelMap)
    assert mask.same_grid(phantom.volumes["delayed"])
    assert dice(mask.array == 206, phantom.truth["ureters"].array == 206) > 0.6
    assert any(p.total and p.done < p.total for p in seen)
    assert not mask.array.flags.writeable  # a view of the object store
    assert any("synthetic" in w for w in call.warnings)
    assert call.step().summary.seconds > 0


def test_calls_pass_on_references_and_can_be_awaited(graph: Connection, phantom: Phantom) -> None:
    organs, vessels = phantom.truth["organs"], phantom.truth["vessels"]
    merged = graph.merge([graph.put(organs), vessels])
    scene = graph.smooth(merged)

    async def both() -> tuple[LabelMap, scangraph.Scene]:
        return await merged, await scene

    mask, surfaces = asyncio.run(both())
    assert np.array_equal(mask.array, merge_label_maps([organs, vessels]).array)
    assert {s.label for s in surfaces.surfaces} == set(mask.counts())
    picture = graph.preview(scene, phantom.volumes["portal"], merged)
    assert (picture.result(timeout=120).width, picture.result().height) == (1600, 900)
    assert graph.encode(picture).startswith(b"\x89PNG")


def test_errors_come_as_themselves(graph: Connection) -> None:
    with pytest.raises(UnknownComponent, match="inference/totalseg"):
        graph.run("inference/nothing", {})
    with pytest.raises(InvalidParameters, match="'image_P' is missing"):
        graph.run("inference/vessel", {"image_A": constant_volume(0)})
    with pytest.raises(InvalidParameters, match="surprise"):
        graph.tumor(constant_volume(0), surprise=1)
    with pytest.raises(ScanGraphError, match="overlap"):
        graph.vessel(constant_volume(0), constant_volume(0, origin_mm=(500, 0, 0))).result()


def test_files_pass_the_gate(graph: Connection, phantom: Phantom, tmp_path: Path) -> None:
    path = tmp_path / "mask.nii.gz"
    path.write_bytes(graph.encode(phantom.truth["organs"]))
    assert np.array_equal(graph.read_mask(path).array, phantom.truth["organs"].array)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ScanGraphError, match=r"mask\.nii\.gz"):
        graph.read(path)


def test_from_another_process(service: str, service_settings: Settings) -> None:
    """A script outside: finds the service by its data folder, with its token."""
    script = (
        "import numpy as np, scangraph\n"
        "from scangraph.contracts import LabelMap\n"
        "mask = LabelMap(np.pad(np.full((5, 5, 5), 2, np.uint8), 3), (1, 1, 1), labels=(2,))\n"
        "with scangraph.connect() as graph:\n"
        "    print(len(graph.smooth(mask).result(120).surfaces), 'surface')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "SCANGRAPH_DATA": str(service_settings.data), "HOME": str(service_settings.data)},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert "1 surface" in done.stdout, done.stderr[-2000:]


def test_what_is_not_running_says_how_to_start_it(tmp_path: Path) -> None:
    script = "import scangraph\nscangraph.connect()"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "SCANGRAPH_DATA": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "NotRunning" in done.stderr
    assert "scangraph serve" in done.stderr
    assert issubclass(NotRunning, Exception)
    assert connect is scangraph.connect
