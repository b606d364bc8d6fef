"""Copies of files for screens: bytes without rows, named after the hash of what they were made of.

Equal files share theirs, whoever they belong to; who may see a copy is who may see a file that it was made of. They go when the
last such file goes. Race: one is being made meanwhile; then it is an orphan, and swept.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from sqlalchemy import select

from scangraph.copies import DISPLAY
from scangraph.storage import Storage
from scangraph.store.database import Store, whole
from scangraph.store.tables import File

#: Hashes that one query asks for.
_BATCH = 500


async def drop_derived(store: Store, storage: Storage, digests: Iterable[str]) -> None:
    """Delete the copies of files that are gone, unless an equal file is left."""
    for digest in await _of_nobody(store, set(digests)):
        for stat in [stat async for stat in storage.list(f"{DISPLAY}{digest}")]:
            await storage.delete(stat.name)


async def nobodys_copies(store: Store, names: Collection[str]) -> set[str]:
    """Return those of the copies that belong to no file."""
    gone = await _of_nobody(store, {_digest(name) for name in names})
    return {name for name in names if _digest(name) in gone}


def _digest(name: str) -> str:
    return name.split("/")[1]


@whole
async def _of_nobody(store: Store, digests: Collection[str]) -> set[str]:
    left, known = list(digests), set[str]()
    async with store.read() as session:
        for start in range(0, len(left), _BATCH):
            query = select(File.sha256).where(File.sha256.in_(left[start : start + _BATCH]))
            known.update((await session.execute(query)).scalars())
    return set(left) - known
