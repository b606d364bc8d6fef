"""Say what an ONNX file is: `python -m deployments.imaging.importing FILE`, started by `scangraph models install`.

The command itself has no onnxruntime, and what a strange file does to a process, it does to this one.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from deployments.imaging.networks import Network
from scangraph.contracts.errors import InvalidModel

#: Exit status of the command when it refuses a file; its last line is then the error's fields.
REFUSED = 3


def look(source: Path) -> dict[str, Any]:
    """Load a file and run it once.

    Returns
    -------
    dict
        What the manifest needs: `input_size` (height, width), `layout`, `classes` (how many; 0 where nobody can tell) and
        `names`.

    Raises
    ------
    InvalidModel
        If it is no YOLO network, or not to be trusted.
    """
    try:
        data = source.read_bytes()
    except OSError as error:
        raise InvalidModel(folder=str(source), reason=f"it cannot be read: {error.strerror}") from None
    facts = Network(data, source.name).facts
    layout = facts.layout
    return {
        "input_size": list(facts.input_size),
        "layout": layout.name,
        "classes": layout.classes,
        "names": list(facts.names),
    }


def main() -> None:
    """Look at a file; say on the last line what it is, or why not."""
    try:
        print(json.dumps(look(Path(sys.argv[1]))))
    except InvalidModel as error:
        print(json.dumps(error.fields))
        raise SystemExit(REFUSED) from None


if __name__ == "__main__":
    main()
