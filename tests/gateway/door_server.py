"""A small application on a real Ray Serve with the door in its proxy; run in a process of its own by `test_door.py`.

Prints one line of JSON when it is up and ends when its standard input does.
"""

# Without `from __future__ import annotations`: the application is sent to the replica by value, and a name that only stands in
# the text of an annotation does not go along.
import asyncio
import hashlib
import json
import os
import sys
import tempfile
import warnings
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request, WebSocket
from fastapi.responses import Response, StreamingResponse

from deployments.gateway import problems


def build() -> Any:
    app = FastAPI()
    problems.install(app, 2**20, stall_seconds=2)

    @app.post("/sink")
    async def sink(request: Request, seconds_per_mb: float = 0) -> dict[str, Any]:
        problems.allow_body(request, 2**40)
        size, digest = 0, hashlib.sha256()
        async for piece in request.stream():
            digest.update(piece)
            size += len(piece)
            await asyncio.sleep(seconds_per_mb * len(piece) / 2**20)
        return {"size": size, "sha256": digest.hexdigest(), "pid": os.getpid()}

    @app.post("/echo")
    async def echo(body: dict[str, Any]) -> dict[str, Any]:
        return body

    @app.post("/ignore", status_code=204, response_class=Response)
    async def ignore() -> None:
        return None

    @app.get("/headers")
    async def headers(request: Request) -> dict[str, str]:
        return dict(request.headers)

    given = 0

    @app.get("/given")
    async def how_much() -> int:
        return given

    @app.get("/source")
    async def source(size: int) -> StreamingResponse:
        async def pieces() -> AsyncIterator[bytes]:
            nonlocal given
            given = 0
            for start in range(0, size, 2**20):
                given += 2**20
                yield bytes(min(2**20, size - start))

        return StreamingResponse(pieces(), headers={"Content-Length": str(size)})

    @app.post("/die")
    async def die(request: Request) -> None:
        problems.allow_body(request, 2**40)
        async for _ in request.stream():
            pass
        os._exit(1)

    @app.get("/sleep")
    async def sleep(seconds: float) -> dict[str, Any]:
        await asyncio.sleep(seconds)
        return {"pid": os.getpid()}

    @app.get("/refuse")
    async def refuse() -> None:
        raise RuntimeError("nobody foresaw this")

    @app.websocket("/ws")
    async def talk(socket: WebSocket) -> None:
        await socket.accept()
        async for text in socket.iter_text():
            await socket.send_text(text[::-1])

    return app


def main() -> None:
    os.environ["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"] = "deployments.gateway.door:middlewares"
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_AUTH_MODE"] = "disabled"
    warnings.simplefilter("ignore")
    import psutil
    import ray
    from ray import serve

    from scangraph.cluster import free_port

    class Service:
        pass

    port = free_port("127.0.0.1")
    with tempfile.TemporaryDirectory(prefix="door-", ignore_cleanup_errors=True) as folder:
        ray.init(
            address="local",
            num_cpus=2,
            object_store_memory=100 * 2**20,
            include_dashboard=False,
            log_to_driver=False,
            configure_logging=False,
            _temp_dir=folder,
        )
        serve.start(http_options={"host": "127.0.0.1", "port": port}, logging_config={"log_level": "WARNING"})
        app: Any = serve.deployment(serve.ingress(build)(Service))
        few = {"max_ongoing_requests": 1, "max_queued_requests": 1}
        serve.run(app.options(name="busy", ray_actor_options={"num_cpus": 0}, **few).bind(), name="busy", route_prefix="/busy")
        serve.run(app.options(name="mortal", ray_actor_options={"num_cpus": 0}).bind(), name="mortal", route_prefix="/mortal")
        serve.run(app.options(name="main", ray_actor_options={"num_cpus": 0}).bind(), name="main", route_prefix="/main")
        children = psutil.Process().children(recursive=True)
        pids = {
            "proxy": next(c.pid for c in children if "ProxyActor" in " ".join(c.cmdline())),
            "replica": next(c.pid for c in children if "ServeReplica:main" in " ".join(c.cmdline())),
        }
        print(json.dumps({"url": f"http://127.0.0.1:{port}", **pids}), flush=True)
        sys.stdin.read()
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    main()
