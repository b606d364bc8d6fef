"""scangraph: CT scans in, label masks, repaired masks and surgical 3-D scenes out. Research use only.

>>> import scangraph
>>> graph = scangraph.connect()                                # doctest: +SKIP
>>> client = scangraph.Client("http://127.0.0.1:8000")         # doctest: +SKIP
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from scangraph.contracts import LabelMap, Scene, Surface, Volume

if TYPE_CHECKING:
    from scangraph.client import AsyncClient, Client
    from scangraph.handles import Connection, connect

__version__ = "0.1.0"
__all__ = ["AsyncClient", "Client", "Connection", "LabelMap", "Scene", "Surface", "Volume", "connect"]

#: Ray takes seconds to import, and a client's machine has none; whoever wants only the contracts pays for neither.
_LATER = {"AsyncClient": "client", "Client": "client", "Connection": "handles", "connect": "handles"}


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(importlib.import_module(f"{__name__}.{_LATER[name]}"), name)
    raise AttributeError(f"module 'scangraph' has no attribute {name!r}")
