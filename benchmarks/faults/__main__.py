"""Run scenarios on a service of their own: `python -m benchmarks.faults [scenario …]`; without any, all of them.

Prints one line of JSON a scenario, the quiet run first; exits 1 if the checker finds a fault.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import signal
import sys
import tempfile
from pathlib import Path

from benchmarks.faults.clients import mixture
from benchmarks.faults.scenarios import ON_TWO, SCENARIOS, World, run

#: A store that can be filled, and room for two versions at once.
_SETTINGS = {"SCANGRAPH_OBJECT_STORE_MB": "512", "SCANGRAPH_CPUS": "4"}


def main() -> int:
    """Run them."""
    known = dict.fromkeys([*SCENARIOS, *ON_TWO])
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=__doc__)
    parser.add_argument("--organs", type=int, default=2, help="executions of organs that each of the two accounts sends")
    parser.add_argument("--keep", type=Path, help="folder to put the clients' logs into")
    parser.add_argument("scenarios", nargs="*", metavar="scenario", help=f"of {', '.join(known)}")
    arguments = parser.parse_args()
    if unknown := set(arguments.scenarios) - known.keys():
        parser.error(f"there is no scenario {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the service ends, too
    wanted, good = arguments.scenarios or list(known), True
    for on_two, scenarios in ((False, SCENARIOS), (True, ON_TWO)):
        names = [name for name in wanted if name in scenarios and name != "quiet"]
        if names or (not on_two and "quiet" in wanted):
            good &= _run(["quiet", *names], on_two, arguments.organs, arguments.keep)
    return 0 if good else 1


def _run(names: list[str], on_two: bool, organs: int, keep: Path | None) -> bool:
    """Run scenarios one after the other on one service; return whether all went well."""
    good = True
    with tempfile.TemporaryDirectory(prefix="scangraph-faults-") as folder:
        world = World(Path(folder), dict(_SETTINGS), on_two)
        try:
            world.start()
            for name in names:
                figures = asyncio.run(run(world, name, mixture(organs)))
                good &= not figures["faults"]
                print(json.dumps(figures), flush=True)
        finally:
            world.stop()
            if keep:
                keep.mkdir(parents=True, exist_ok=True)
                for log in (*world.data.glob("clients-*.jsonl"), *world.data.glob("*.log")):
                    shutil.copyfile(log, keep / log.name)
    return good


if __name__ == "__main__":
    sys.exit(main())
