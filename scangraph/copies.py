"""Where copies of files for screens are in the storage: under the hash of what they were made of."""

from __future__ import annotations

#: Whoever puts files into the storage by hand keeps out of here.
DISPLAY = "display/"
#: Part of each copy's name: it grows when copies are made in another way, and the old ones are not looked at any more.
_VERSION = 1


def copy_name(digest: str, what: str, ending: str) -> str:
    """Return the name of a copy of a file with this SHA-256."""
    return f"{DISPLAY}{digest}/{what}-v{_VERSION}{ending}"


def scene_name(digest: str) -> str:
    """Return the name of what is known of a scene's copy; the digest is its manifest's, which names every other file."""
    return copy_name(digest, "scene", ".json")


def mesh_name(digest: str, number: int) -> str:
    """Return the name of the surface of a scene's copy at this place in its list."""
    return copy_name(digest, f"scene-{number}", ".mz3")
