"""Cold and warm start: environments, service, first and second request: `python -m benchmarks.starts`."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from scangraph.cluster import local_service
from scangraph.handles import connect
from scangraph.phantoms import make_phantom
from scangraph.settings import HOME, load_settings


def main() -> None:
    """Measure and print."""
    start = time.monotonic()
    subprocess.run([sys.executable, str(HOME / "runtime_envs/build.py")], check=True, capture_output=True)
    print(f"set-up repeated            {time.monotonic() - start:6.1f} s")
    image = make_phantom(4242).volumes["delayed"]
    with tempfile.TemporaryDirectory() as folder:
        settings = load_settings(data=Path(folder), port=0)
        with local_service(settings) as service:
            print(f"service start              {service.seconds_to_start:6.1f} s")
            with connect() as graph:
                for name in ("first request (loads model)", "second request"):
                    start = time.monotonic()
                    summary = graph.ureter(image).step().summary
                    took = time.monotonic() - start
                    print(f"{name:28} {took:6.1f} s   {summary.seconds:.1f} s in the stage, {summary.peak_mb:.0f} MB")


if __name__ == "__main__":
    main()
