"""Where a call goes: to a replica on the node that has most of its arguments, while one there has room.

Ray brings arguments to where they are needed, which is right, and on a network of nodes takes as long as the network does: so a
second step on the same CT goes where the first one has brought it. The router works in the caller's process, and the caller
owns the references it gives; so where they are is known there, without asking anybody.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import ray
from ray.experimental import get_local_object_locations
from ray.serve._private.request_router.pow_2_router import PowerOfTwoChoicesRequestRouter
from ray.serve.request_router import PendingRequest, ReplicaID, RunningReplica

from scangraph import metrics

#: Below that it does not matter where a call goes.
_MATTERS_BYTES = 2**20
#: Steps that a replica may have before locality counts no more: one at work, and one that waits for it.
_ROOM = 2


def references(arguments: Any) -> Iterator[ray.ObjectRef[Any]]:
    """Yield the references among a call's arguments, those in lists and mappings too."""
    if isinstance(arguments, ray.ObjectRef):
        yield arguments
    elif isinstance(arguments, Mapping):
        for value in arguments.values():
            yield from references(value)
    elif isinstance(arguments, list | tuple):
        for value in arguments:
            yield from references(value)


def bytes_by_node(arguments: Any) -> tuple[Counter[str], int]:
    """Return how many bytes of a call's arguments each node has, and how many there are; what is small lies in no store."""
    there: Counter[str] = Counter()
    total = 0
    if refs := list(references(arguments)):
        for found in get_local_object_locations(refs).values():
            size = found["object_size"] or 0
            if found["node_ids"]:
                total += size
            for node in found["node_ids"]:
                there[node] += size
    return there, total


class NearTheData(PowerOfTwoChoicesRequestRouter):
    """Serve's own router, which first looks at the node that has the data."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._here: dict[ReplicaID, set[str]] = defaultdict(set)  # calls from this process that have not ended

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Choose the replicas that may get a call, the wanted ones first."""
        anybody = await super().choose_replicas(candidate_replicas, pending_request)
        if pending_request is None or len(self._replicas) < 2:
            return anybody
        there, total = bytes_by_node(pending_request.args)
        if total < _MATTERS_BYTES:
            return anybody
        best = max(there.values())
        near = [
            replica
            for name, replica in self._replicas.items()
            if there[replica.node_id] == best and len(self._here[name]) < _ROOM
        ]
        if not near:
            return anybody
        return [[min(near, key=lambda replica: len(self._here[replica.replica_id]))], *anybody]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """Count what must be copied to the node that the call has gone to."""
        super().on_request_routed(pending_request, replica_id, result)
        self._here[replica_id].add(pending_request.metadata.internal_request_id)
        there, total = bytes_by_node(pending_request.args)
        replica = self._replicas.get(replica_id)
        if total and replica is not None:
            local = there[replica.node_id]
            name = replica_id.deployment_id.name
            metrics.ARGUMENTS.add(local, deployment=name, place="here")
            metrics.ARGUMENTS.add(total - local, deployment=name, place="elsewhere")

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Note the end of a call."""
        super().on_request_completed(replica_id, internal_request_id)
        calls = self._here.get(replica_id)
        if calls is not None:
            calls.discard(internal_request_id)
            if not calls:
                del self._here[replica_id]
