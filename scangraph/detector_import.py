"""How an ONNX file becomes a detector. Nothing here reads it: the stage of 2-D images does, in its own environment."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from scangraph.contracts.errors import InvalidModel, ModelRefused
from scangraph.model_import import in_environment
from scangraph.models import Detector, DetectorManifest, put_in_place, staging, write_manifest

_NETWORK = "network.onnx"

#: File -> what it is; see `deployments.imaging.importing.look`.
Look = Callable[[Path], Mapping[str, Any]]


def import_detector(
    source: Path,
    target_parent: Path,
    look: Look,
    *,
    model_id: str | None = None,
    classes: Sequence[str] | None = None,
    license_: str | None = None,
) -> Detector:
    """Install an ONNX file as a detector under `target_parent`; half done, it leaves nothing.

    Parameters
    ----------
    look : callable
        Says what the file is.
    model_id, classes, license_
        Of the model; the first two by default as the file says.

    Raises
    ------
    ModelRefused
        If it is no YOLO network, or does not say what it finds.
    """
    name = model_id or re.sub(r"[^a-z0-9._-]+", "-", source.stem.lower()).strip("-._") or "detector"
    with staging(target_parent, name) as folder:
        if not source.is_file():
            raise ModelRefused(source=str(source), reason="there is no such file")
        shutil.copyfile(source, folder / _NETWORK)
        try:
            facts = look(folder / _NETWORK)
        except InvalidModel as error:
            raise ModelRefused(source=source.name, reason=str(error.fields["reason"])) from None
        found = tuple(classes or facts["names"])
        if not found or facts["classes"] not in {0, len(found)}:
            wanted = facts["classes"] or "all of them"
            reason = f"it finds {wanted} classes and names {len(found)}: name them in order, --classes cat,dog"
            raise ModelRefused(source=source.name, reason=reason)
        try:
            manifest = DetectorManifest(
                kind="detector",
                id=name,
                version="1",
                title=f"Detector {source.stem[:100]}",
                network=_NETWORK,
                classes=found,
                input_size=facts["input_size"],
                layout=facts["layout"],
                license=license_ or "not said",
                training_data="not said",
                files={},
            )
        except ValidationError as error:
            faults = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            raise ModelRefused(source=source.name, reason=faults) from None
        write_manifest(folder, manifest)
        installed = put_in_place(folder, target_parent)
        assert isinstance(installed, Detector)
        return installed


def looker(environment: Path) -> Look:
    """Return what looks into a file by a process of the stage's environment, which `make setup` made."""

    def look(source: Path) -> Mapping[str, Any]:
        return in_environment(environment, "deployments.imaging.importing", source)

    return look
