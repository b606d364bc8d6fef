"""Which of the locked packages have known faults.

    python -m cluster.audit [LOCK ...]

Asks an advisory database that speaks OSV (`SCANGRAPH_OSV`, else OSV's own) for all pins at once. Exit code 1: something was
found; 3: nobody could be asked, and nothing is known.
"""

from __future__ import annotations

import json
import os
import sys
import urllib.request
from collections.abc import Iterable, Mapping
from pathlib import Path

from runtime_envs import pins

OSV = "https://api.osv.dev"
_AT_ONCE = 500
_SECONDS = 30


def locked(locks: Iterable[str]) -> dict[tuple[str, str], list[str]]:
    """Return every (package, version) of some locks, with the locks that have it."""
    found: dict[tuple[str, str], list[str]] = {}
    for lock in locks:
        for pin in pins(lock):
            name, _, version = pin.partition(" ;")[0].strip().partition("==")
            found.setdefault((name.partition("[")[0], version), []).append(lock)
    return found


def known_faults(packages: Mapping[tuple[str, str], list[str]], server: str) -> dict[tuple[str, str], list[str]]:
    """Return the ids of advisories of each package that has some.

    Raises
    ------
    OSError
        If the server cannot be asked.
    """
    everything, found = list(packages), {}
    for start in range(0, len(everything), _AT_ONCE):
        some = everything[start : start + _AT_ONCE]
        queries = [{"package": {"name": name, "ecosystem": "PyPI"}, "version": version} for name, version in some]
        body = json.dumps({"queries": queries}).encode()
        request = urllib.request.Request(f"{server}/v1/querybatch", body, {"Content-Type": "application/json"})  # noqa: S310
        with urllib.request.urlopen(request, timeout=_SECONDS) as answer:  # noqa: S310 - what the operator names
            results = json.load(answer)["results"]
        for package, result in zip(some, results, strict=True):
            if ids := [advisory["id"] for advisory in result.get("vulns", [])]:
                found[package] = ids
    return found


def main(argv: list[str]) -> int:
    """Say what is known."""
    locks = argv or sorted(
        path.stem for path in Path(__file__).parents[1].glob("runtime_envs/*.txt") if path.stem != "overrides"
    )
    packages, server = locked(locks), os.environ.get("SCANGRAPH_OSV", OSV)
    try:
        found = known_faults(packages, server)
    except (OSError, ValueError, KeyError) as error:
        print(f"{server} could not be asked: {error}. Of {len(packages)} packages nothing is known.", file=sys.stderr)
        return 3
    for (name, version), ids in sorted(found.items()):
        print(f"{name} {version} ({', '.join(packages[name, version])}): {', '.join(ids)}")
    print(f"{len(packages)} packages of {len(locks)} locks, {len(found)} with known faults")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
