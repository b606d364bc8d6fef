"""What can be run: what the stages declare, and what installed models add while the service runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from scangraph.contracts.components import Component
from scangraph.models import Model, installed_models

#: How old what is known may be. Who asks for an id that is not known is answered from the folders.
_SECONDS = 1.0


class Catalog(Mapping[str, Component]):
    """Components by id.

    Each process has its own and all look at the same folders, so that nobody has to be told of a model: not a second replica,
    not the executor. A stage that stands still takes no part in it.

    Parameters
    ----------
    fixed : sequence of Component
        What the stages declare. A model whose task is one of them serves it; every other task is a component of its own.
    folders : sequence of Path
        Where models are.
    declare : callable
        Makes the declaration of a model's own component.
    """

    def __init__(self, fixed: Sequence[Component], folders: Sequence[Path], declare: Callable[[Model], Component]) -> None:
        self.fixed: Mapping[str, Component] = {component.id: component for component in fixed}
        self.folders = tuple(folders)
        self._declare = declare
        self._made: dict[str, Component] = {}
        self._known: Mapping[str, Component] = self.fixed
        self._looked = float("-inf")

    def _look(self, *, now: bool = False) -> Mapping[str, Component]:
        if now or time.monotonic() - self._looked > _SECONDS:
            made, known = {}, dict(self.fixed)
            for model in sorted(installed_models(self.folders), key=lambda model: model.manifest.demo):  # as they are chosen
                if model.manifest.task not in known:
                    made[model.digest] = self._made.get(model.digest) or self._declare(model)
                    known[model.manifest.task] = made[model.digest]
            self._made, self._known, self._looked = made, known, time.monotonic()
        return self._known

    def __getitem__(self, component_id: str) -> Component:
        known = self._look()
        return known[component_id] if component_id in known else self._look(now=True)[component_id]

    def __iter__(self) -> Iterator[str]:
        return iter(self._look())

    def __len__(self) -> int:
        return len(self._look())
