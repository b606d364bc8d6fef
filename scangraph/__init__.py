"""scangraph: CT scans in, label masks, repaired masks and surgical 3-D scenes out. Research use only.

>>> import scangraph
>>> graph = scangraph.connect()          # doctest: +SKIP
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from scangraph.contracts import LabelMap, Scene, Surface, Volume

if TYPE_CHECKING:
    from scangraph.handles import Connection, connect

__version__ = "0.1.0"
__all__ = ["Connection", "LabelMap", "Scene", "Surface", "Volume", "connect"]


def __getattr__(name: str) -> Any:
    # Ray takes seconds to import; whoever wants only the contracts does not pay for it.
    if name in {"Connection", "connect"}:
        from scangraph import handles

        return getattr(handles, name)
    raise AttributeError(f"module 'scangraph' has no attribute {name!r}")
