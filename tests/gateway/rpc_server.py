"""gRPC's door and methods without Ray: Serve's own server class, our door in it, and a replica that is called directly."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import grpc
from ray.serve._private.grpc_util import enable_server_reflection, gRPCGenericServer
from ray.serve._private.proxy_request_response import gRPCStreamingType
from ray.serve.grpc_util import RayServegRPCContext, gRPCInputStream

from deployments.gateway.rpc import door
from deployments.gateway.rpc.methods import Rpc
from scangraph.contracts.api import Role
from scangraph.imageflow.v1 import imageflow_pb2 as pb
from scangraph.imageflow.v1 import imageflow_pb2_grpc
from scangraph.settings import Settings
from scangraph.store import accounts
from tests.servers import Server


def factory(replica: Rpc) -> Callable[..., Any]:
    """What Serve makes handlers with, where the replica is in this process."""

    def make(service_method: str, streaming_type: gRPCStreamingType) -> Any:
        method = getattr(replica, service_method.rpartition("/")[2])

        async def unary(request: bytes, context: Any) -> bytes:
            wire: bytes = (await method(request, grpc_context=RayServegRPCContext(context))).SerializeToString()
            return wire

        async def stream(messages: AsyncIterator[Any], context: Any) -> AsyncIterator[bytes]:
            try:
                async with contextlib.aclosing(
                    method(gRPCInputStream(messages), grpc_context=RayServegRPCContext(context))
                ) as parcels:
                    async for parcel in parcels:
                        yield parcel.SerializeToString()
            finally:
                context.peer()  # as Serve does for its access log, also when the call is long over

        return unary if streaming_type is gRPCStreamingType.UNARY_UNARY else stream

    return make


@dataclass
class RpcServer:
    """A whole service, by HTTP and by gRPC."""

    settings: Settings
    http: Server = field(init=False)
    target: str = field(init=False)
    health: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.http = Server(self.settings)
        replica = Rpc()
        replica.services = self.http.services

        async def readiness() -> dict[str, str]:
            return self.health

        self.http.services.readiness = readiness
        self._roles: dict[str, Any] = {}
        self.http.run(self._listen(replica))

    async def _listen(self, replica: Rpc) -> None:
        door.prepare(self.settings)
        self._server = gRPCGenericServer(factory(replica))
        door.add_services(None, self._server)
        enable_server_reflection(self._server)
        self.target = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        await self._server.start()

    def close(self) -> None:
        self.http.run(self._server.stop(0.1))
        self.http.close()

    def bearer(self, name: str = "ann", role: Role = "operator", seconds: int | None = None) -> list[tuple[str, str]]:
        """Metadata of somebody's call."""
        services = self.http.services
        if name not in self._roles:
            account = self.http.run(accounts.create_account(services.store, name, role, accounts.new_secret()))
            self._roles[name] = account
            services.state.pop("standings", None)  # a replica knows its accounts for a second
        account = self._roles[name]
        token, _ = services.tokens.sign(account.id, name, role, account.token_epoch, seconds)
        return [("authorization", f"Bearer {token}")]

    @contextlib.contextmanager
    def stub(self, **options: Any) -> Iterator[imageflow_pb2_grpc.ImageProcessingServiceStub]:
        with grpc.insecure_channel(self.target, **options) as channel:
            yield imageflow_pb2_grpc.ImageProcessingServiceStub(channel)


@contextlib.contextmanager
def rpc_serving(settings: Settings) -> Iterator[RpcServer]:
    """Run it until the block ends."""
    server = RpcServer(settings)
    try:
        yield server
    finally:
        server.close()


def chunks(image: bytes, pieces: int, image_id: str = "", **metadata: Any) -> Iterator[pb.ImageChunk]:
    """Cut an image."""
    size = -(-len(image) // pieces)
    for number in range(pieces):
        yield pb.ImageChunk(
            image_id=image_id,
            metadata=pb.ImageMetadata(**metadata) if number == 0 else None,
            data=image[number * size : (number + 1) * size],
            chunk_number=number,
            is_final=number == pieces - 1,
            total_chunks=pieces,
        )
