"""The client against a real service: real Ray, real models, every byte compared on both ends."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from deployments.imageio.nifti import read_nifti, write_nifti
from scangraph.accounts_cli import local_token
from scangraph.client import Client, Update
from scangraph.contracts.errors import NotEnded
from scangraph.phantoms import Phantom
from scangraph.settings import Settings


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_a_scan_goes_up_and_its_organs_come_down(
    service: str, service_settings: Settings, phantom: Phantom, tmp_path: Path
) -> None:
    ct = tmp_path / "ct.nii.gz"
    ct.write_bytes(write_nifti(phantom.volumes["portal"]))
    updates: list[Update] = []
    with Client(service, token=lambda: local_token(service_settings)) as client:
        assert {"organs", "renal-planning"} <= {view.name for view in client.pipelines()}
        sent = client.upload(ct)
        assert (sent.sha256, sent.kind) == (sha256(ct.read_bytes()), "nifti")
        assert sent.metadata["shape_zyx"] == list(phantom.volumes["portal"].array.shape)
        done = client.run("organs", {"image": sent}, tmp_path / "out", on_update=updates.append)

        assert done.execution.status == "completed"
        assert done.execution.inputs["image"]["sha256"] == sent.sha256
        assert {output.name for output in done.execution.output_files} == {*client.pipeline("organs").spec.outputs, "manifest"}
        for output in done.execution.output_files:
            here = (tmp_path / "out" / output.filename).read_bytes()
            assert (len(here), sha256(here)) == (output.size, output.sha256)
            assert client.file(output.file_id).sha256 == output.sha256
        (mask,) = done.files["mask"]
        found = read_nifti(mask.read_bytes(), mask.name, as_mask=True)
        assert found.array.shape == phantom.volumes["portal"].array.shape
        assert np.count_nonzero(found.array)

        numbers = [update.seq for update in updates]
        assert None not in numbers
        assert numbers == sorted(set(numbers))  # type: ignore[type-var]
        assert updates[-1].output_files == done.execution.output_files
        lineage = client.provenance(done.execution.execution_id)
        assert lineage["pipeline"]["name"] == "organs"

        client.delete_file(sent.id)


def test_a_run_is_left_and_found_again(service: str, service_settings: Settings, phantom: Phantom, tmp_path: Path) -> None:
    """Whoever watched goes away; another client goes on from the last number, and cancels."""
    ct = tmp_path / "ct.nii.gz"
    ct.write_bytes(write_nifti(phantom.volumes["delayed"]))
    with Client(service, token=local_token(service_settings)) as client:
        started = client.start("renal-planning", {"arterial": ct, "portal": ct, "delayed": ct})
        first = next(client.watch(started.execution_id))
        with pytest.raises(NotEnded):
            client.retry(started.execution_id)
    with Client(service, token=local_token(service_settings)) as client:
        client.cancel(started.execution_id)
        rest = list(client.watch(started.execution_id, first.seq))
        assert [update.type for update in rest][-1] == "cancelled"
        assert (rest[0].seq or 0) == (first.seq or 0) + 1
        view = client.execution(started.execution_id)
        assert (view.status, view.output_files) == ("cancelled", [])
