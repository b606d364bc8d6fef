#!/usr/bin/env python3
"""Asks processes of this container whether they are well: `health gcs raylet proxy gateway service`.

Standard library only, for there is no wget in the images. Ray and its proxy answer
`success`, the gateway (does it answer?) and the service (is all of it ready?) 200. Exit code 1 says that something did not.
"""

from __future__ import annotations

import os
import sys
import urllib.request

PORT = os.environ.get("SCANGRAPH_PORT", "8000")
ADDRESSES = {
    "gcs": "http://127.0.0.1:8265/api/gcs_healthz",
    "raylet": "http://127.0.0.1:52365/api/local_raylet_healthz",
    "proxy": f"http://127.0.0.1:{PORT}/-/healthz",
    "gateway": f"http://127.0.0.1:{PORT}/healthz",
    "service": f"http://127.0.0.1:{PORT}/readyz",
}


OURS = {"gateway", "service"}


def well(name: str, seconds: float = 4) -> bool:
    """Whether one of them answers as it should; says so where it does not."""
    try:
        with urllib.request.urlopen(ADDRESSES[name], timeout=seconds) as answer:  # noqa: S310 - addresses of our own
            body: bytes = answer.read(65536)
    except (OSError, ValueError) as error:  # of HTTP (it is an OSError), of the line, or of what was said
        print(f"{name}: {error}")
        return False
    if name not in OURS and b"success" not in body:
        print(f"{name}: answered something else")
        return False
    return True


if __name__ == "__main__":
    wanted = sys.argv[1:] or ["service"]
    if unknown := set(wanted) - ADDRESSES.keys():
        sys.exit(f"knows {', '.join(ADDRESSES)}, not {', '.join(sorted(unknown))}")
    answers = [well(name) for name in wanted]  # each says what is wrong with it
    sys.exit(0 if all(answers) else 1)
