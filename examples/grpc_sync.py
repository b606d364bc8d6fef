"""Send images through a pipeline by gRPC, and write the masks that come back.

    python examples/grpc_sync.py 127.0.0.1:9000 postprocess-clean mask.nii.gz …    # $SCANGRAPH_TOKEN: scangraph token

The stubs (`scangraph.imageflow.v1`) are made by `make setup`; in another language by any compiler, from `proto/`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc

from scangraph.imageflow.v1 import imageflow_pb2 as pb
from scangraph.imageflow.v1 import imageflow_pb2_grpc

PIECE = 2**19


def chunks(paths: list[Path], pipeline: str) -> Iterator[pb.ImageChunk]:
    """Cut the files into chunks, one file after the other; they are read as fast as the service takes them."""
    for path in paths:
        size, sent, number = path.stat().st_size, 0, 0
        metadata = pb.ImageMetadata(
            filename=path.name, file_size=size, pipeline_id=pipeline, result_delivery=pb.RESULT_DELIVERY_CHUNKS
        )
        with path.open("rb") as file:
            while number == 0 or sent < size:
                data = file.read(PIECE)
                sent += len(data)
                yield pb.ImageChunk(
                    image_id=str(path),
                    metadata=metadata if number == 0 else None,
                    data=data,
                    chunk_number=number,
                    is_final=sent >= size,
                )
                number += 1


def main(target: str, pipeline: str, *names: str) -> int:
    """Send, and write `<name>.<output>` for each result."""
    metadata = [("authorization", f"Bearer {os.environ['SCANGRAPH_TOKEN']}")]
    files: dict[str, str] = {}  # id of a result -> its name
    failed = 0
    with grpc.insecure_channel(target) as channel:
        stub = imageflow_pb2_grpc.ImageProcessingServiceStub(channel)
        try:
            for told in stub.ProcessImageStream(chunks([Path(n) for n in names], pipeline), metadata=metadata, timeout=600):
                files |= {file.file_id: f"{told.image_id}.{file.filename}" for file in told.output_files}
                for piece in told.results:
                    with Path(files[piece.file_id]).open("ab" if piece.chunk_number else "wb") as out:
                        out.write(piece.data)
                if told.error.detail:
                    failed += 1
                    print(f"{told.image_id}: {told.error.code}: {told.error.detail}", file=sys.stderr)
                elif told.is_final:
                    print(f"{told.image_id}: {pb.Status.Name(told.status)}")
        except grpc.RpcError as error:
            print(f"{error.code().name}: {error.details()}", file=sys.stderr)
            return 2
    return 1 if failed else 0


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
