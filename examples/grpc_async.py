"""Start an execution that outlives its call, watch it, and take the watch up again where it was, with asyncio.

python examples/grpc_async.py 127.0.0.1:9000 postprocess-clean mask.nii.gz    # $SCANGRAPH_TOKEN: scangraph token
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import sys
from pathlib import Path

import grpc

from scangraph.imageflow.v1 import imageflow_pb2 as pb
from scangraph.imageflow.v1 import imageflow_pb2_grpc


async def main(target: str, pipeline: str, name: str, image: bytes) -> int:
    """Send one image, and print every event."""
    bearer = [("authorization", f"Bearer {os.environ['SCANGRAPH_TOKEN']}")]
    metadata = pb.ImageMetadata(
        filename=name,
        pipeline_id=pipeline,
        sha256=hashlib.sha256(image).digest(),
        idempotency_key=hashlib.sha256(image + pipeline.encode()).hexdigest(),  # so that repeating it is safe
        detached=True,
    )
    chunk = pb.ImageChunk(metadata=metadata, data=image, is_final=True)
    async with grpc.aio.insecure_channel(target) as channel:
        stub = imageflow_pb2_grpc.ImageProcessingServiceStub(channel)
        started = stub.ProcessImageStream(iter([chunk]), metadata=bearer, timeout=60)
        first = await anext(aiter(started))
        started.cancel()  # as a broken line would
        if first.error.detail:
            print(f"{first.error.code}: {first.error.detail}", file=sys.stderr)
            return 1
        seen = 0
        while True:
            wish = pb.WatchRequest(execution_id=first.execution_id, after_seq=seen)
            try:
                async for update in stub.WatchExecution(wish, metadata=bearer):
                    seen = update.seq
                    print(f"{seen}: {pb.Status.Name(update.status)} {update.progress_percentage:.0f} % {update.current_step}")
                return 0 if update.status == pb.STATUS_COMPLETED else 1
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE:
                    print(f"{error.code().name}: {error.details()}", file=sys.stderr)
                    return 2
                await asyncio.sleep(1)  # and on, where it was


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    file = Path(sys.argv[3])
    sys.exit(asyncio.run(main(sys.argv[1], sys.argv[2], file.name, file.read_bytes())))
