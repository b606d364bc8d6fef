"""What an image is made of, as CycloneDX 1.6.

    python -m cluster.images.sbom nnunet > nnunet.cdx.json

Python packages are those installed in the image's environments, which are the locks'; Debian's are what dpkg knows, where this
runs in an image; and the models that are shipped.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Any

import scangraph
from cluster.images.contents import IMAGES, Image, site_packages
from scangraph.models import installed_detectors, installed_models
from scangraph.settings import HOME

DPKG = Path("/var/lib/dpkg/status")
#: SPDX expressions are written with these; whatever else a package says of its licence is a name.
_SPDX = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]*(?: (?:AND|OR|WITH) [A-Za-z0-9][A-Za-z0-9.+-]*)*")


def normal(name: str) -> str:
    """Return a Python package's name as locks write it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _licences(distribution: Distribution) -> list[dict[str, Any]]:
    told: Any = distribution.metadata  # an email.message.Message, which the annotations hide
    if expression := told.get("License-Expression"):
        return [{"expression": expression}] if _SPDX.fullmatch(expression) else [{"license": {"name": expression}}]
    classified = [c.rpartition(" :: ")[2] for c in told.get_all("Classifier") or () if c.startswith("License :: ")]
    text = (told.get("License") or "").strip().partition("\n")[0]
    names = classified or ([text] if text and len(text) < 100 else [])
    return [{"license": {"name": name}} for name in dict.fromkeys(names)]


def python_packages(environments: Iterator[Path]) -> Iterator[dict[str, Any]]:
    """Yield the packages installed in environments, each once."""
    found: dict[tuple[str, str], Distribution] = {}
    for environment in environments:
        for distribution in distributions(path=[str(site_packages(environment))]):
            name = normal(distribution.metadata["Name"])
            if name not in {"pip", "wheel", "scangraph"}:  # thrown out of images; and ourselves
                found[name, distribution.version] = distribution
    for (name, version), distribution in sorted(found.items()):
        purl = f"pkg:pypi/{name}@{version.replace('+', '%2B')}"
        component = {"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl}
        yield component | ({"licenses": licences} if (licences := _licences(distribution)) else {})


def debian_packages(status: Path = DPKG) -> Iterator[dict[str, Any]]:
    """Yield what dpkg has installed."""
    if not status.exists():
        return
    for stanza in status.read_text(errors="replace").split("\n\n"):
        fields = dict(line.split(": ", 1) for line in stanza.splitlines() if ": " in line and not line.startswith(" "))
        if fields.get("Status", "").endswith(" installed"):
            name, version, machine = fields["Package"], fields["Version"], fields["Architecture"]
            quoted = version.replace("+", "%2B").replace(":", "%3A")
            purl = f"pkg:deb/debian/{name}@{quoted}?arch={machine}"
            yield {"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl}


def shipped_models(folder: Path = HOME / "models") -> Iterator[dict[str, Any]]:
    """Yield the models that every image has."""
    for model in (*installed_models((folder,)), *installed_detectors((folder,))):
        told = model.manifest
        component = {"type": "machine-learning-model", "bom-ref": f"model/{told.id}@{told.version}", "name": told.id}
        yield component | {"version": told.version, "licenses": [{"license": {"name": told.license}}]}


def sbom(image: Image, envs: Path = HOME / ".envs", status: Path = DPKG) -> dict[str, Any]:
    """Return an image's bill of materials, with what it stands on."""
    locks = dict.fromkeys(("base", *image.environments))
    components = [*python_packages(envs / lock for lock in locks), *debian_packages(status), *shipped_models()]
    itself = {"type": "container", "bom-ref": "image", "name": f"scangraph-{image.name}", "version": scangraph.__version__}
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": itself},
        "components": components,
        "dependencies": [{"ref": "image", "dependsOn": [component["bom-ref"] for component in components]}],
    }


def main(argv: list[str] | None = None) -> int:
    """Print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", choices=[image.name for image in IMAGES])
    wanted = parser.parse_args(argv).image
    json.dump(sbom(next(image for image in IMAGES if image.name == wanted)), sys.stdout, indent=1)
    print()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
