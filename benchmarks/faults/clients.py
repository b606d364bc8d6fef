"""Clients that write down all they see, and the load that they bring."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import json
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import grpc
import httpx
import numpy as np
from grpc_health.v1 import health_pb2, health_pb2_grpc
from PIL import Image
from websockets.asyncio.client import connect
from websockets.exceptions import WebSocketException

from benchmarks.faults.checker import TERMINAL
from deployments.imageio.nifti import write_nifti
from scangraph.contracts import LabelMap
from scangraph.phantoms import make_phantom

#: Voxels of the fine mask along one of the coarse one's.
_FINER = 5


class Log:
    """Lines of JSON, on the disk before anything else happens.

    Parameters
    ----------
    path : Path
        Where; what is there stays.
    """

    def __init__(self, path: Path) -> None:
        self._path, self.lines = path, list[dict[str, Any]]()
        self._began = time.monotonic()

    def write(self, event: str, who: str, **said: Any) -> None:
        """Write a line."""
        line = {"at": round(time.monotonic() - self._began, 3), "event": event, "who": who, **said}
        self.lines.append(line)
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")


@dataclass(frozen=True)
class Work:
    """One execution that somebody wants: a pipeline on one of the inputs."""

    name: str
    pipeline: str
    port: str
    input: str
    parameters: dict[str, Any]


def mixture(organs: int, masks: int = 1, pictures: int = 1) -> list[Work]:
    """Return work for every kind of stage; parameters differ, so that nothing has another's result."""
    return [
        *(Work(f"organs-{n}", "organs", "image", "ct", {"step_size": round(0.9 - 0.02 * n, 2)}) for n in range(organs)),
        *(Work(f"skeleton-{n}", "postprocess-skeleton", "mask", "vessels", {"min_mm3": 5.0 + n}) for n in range(masks)),
        *(Work(f"surface-{n}", "smoothing-base", "mask", "vessels", {"min_volume_mm3": 5.0 + n}) for n in range(masks)),
        *(Work(f"picture-{n}", "image-resize", "image", "picture", {"width": 5000 + n}) for n in range(pictures)),
    ]


def inputs(seed: int) -> dict[str, bytes]:
    """Make somebody's inputs: a coarse synthetic CT, a mask of its vessels, and a picture. Other seeds, other bytes.

    `vessels` is the mask on a grid five times as fine, so that a stage is at work on it for long enough to be killed meanwhile.
    """
    coarse = make_phantom(seed, spacing_mm=(6.0, 5.0, 5.0))
    picture = io.BytesIO()
    mask = coarse.truth["vessels"]
    fine = np.kron(mask.array, np.ones((_FINER, _FINER, _FINER), np.uint8))
    z, y, x = mask.spacing_mm
    vessels = LabelMap(fine, (z / _FINER, y / _FINER, x / _FINER), mask.origin_mm, mask.direction, mask.labels)
    noise = np.random.default_rng(seed).integers(0, 256, (75, 100, 3), np.uint8)
    Image.fromarray(noise).resize((2000, 1500), Image.Resampling.BICUBIC).save(picture, "JPEG", quality=90)
    return {
        "ct.nii.gz": write_nifti(coarse.volumes["portal"]),
        "mask.nii.gz": write_nifti(mask),
        "vessels.nii.gz": write_nifti(vessels),
        "picture.jpg": picture.getvalue(),
    }


class Addressed(Protocol):
    """What clients must know of a service."""

    @property
    def url(self) -> str:
        """Its address."""


@dataclass
class Client:
    """Somebody with an account, who tries again until it works, and writes down what happens.

    Parameters
    ----------
    service : Addressed
        Whom it asks.
    name : str
        Its account.
    token : str
        Its bearer.
    content : dict of str to bytes
        Its inputs.
    log : Log
        Where it writes.
    run : str
        Sets the idempotency keys of this run apart.
    """

    service: Addressed
    name: str
    token: str
    content: dict[str, bytes]
    log: Log
    run: str
    files: dict[str, str] = field(default_factory=dict)
    ids: dict[str, str] = field(default_factory=dict)  # by name of the work
    works: dict[str, Work] = field(default_factory=dict)
    ended: dict[str, dict[str, Any]] = field(default_factory=dict)  # by execution id
    attempts: int = 0

    def http(self, seconds: float = 30) -> httpx.AsyncClient:
        """Return a client with connections of its own."""
        headers = {"Authorization": f"Bearer {self.token}"}
        return httpx.AsyncClient(base_url=self.service.url, headers=headers, timeout=seconds)

    async def ask(self, method: str, path: str, *, until: Iterable[int], **what: Any) -> httpx.Response:
        """Ask until it is answered like that, as a client does that the service promised to be back."""
        while True:
            try:
                async with self.http() as client:
                    answer = await client.request(method, path, **what)
                if answer.status_code in until:
                    return answer
                problem = answer.json().get("type", "") if "json" in answer.headers.get("content-type", "") else "no problem"
                self.log.write("refused", self.name, path=path, status=answer.status_code, problem=problem)
                if answer.status_code < 500 and answer.status_code != 429:
                    raise RuntimeError(f"{method} {path}: {answer.status_code} {answer.text}")
            except httpx.TransportError as error:
                self.log.write("unanswered", self.name, path=path, error=type(error).__name__)
            await asyncio.sleep(0.3)

    async def store(self, name: str) -> str:
        """Upload a file, and write down that it was accepted."""
        data = self.content[name]
        answer = await self.ask("POST", "/v1/files", until={201}, files={"file": (name, data)})
        file_id = str(answer.json()["id"])
        self.log.write("stored", self.name, file_id=file_id, sha256=hashlib.sha256(data).hexdigest())
        return file_id

    async def prepare(self) -> None:
        """Upload the inputs."""
        for name in self.content:
            self.files[name.partition(".")[0]] = await self.store(name)

    async def submit(self, work: Work) -> str:
        """Post an execution until it is accepted; the key makes that safe."""
        key = f"{self.run}-{work.name}"
        body = {"pipeline_id": work.pipeline, "inputs": {work.port: self.files[work.input]}, "parameters": work.parameters}
        self.log.write("sent", self.name, key=key, work=work.name)
        answer = await self.ask("POST", "/v1/executions", until={202}, json=body, headers={"Idempotency-Key": key})
        execution_id = str(answer.json()["execution_id"])
        self.log.write("acknowledged", self.name, key=key, work=work.name, execution_id=execution_id)
        self.ids[work.name], self.works[work.name] = execution_id, work
        return execution_id

    async def look(self, execution_id: str) -> dict[str, Any] | None:
        """Look at an execution, once; None where nobody answers."""
        try:
            async with self.http(10) as client:
                answer = await client.get(f"/v1/executions/{execution_id}")
        except httpx.TransportError:
            return None
        if answer.status_code == 404:
            self.log.write("refused", self.name, path="/v1/executions", status=404, problem="")
        return answer.json() if answer.status_code == 200 else None

    def note(self, found: dict[str, Any]) -> None:
        """Write down how an execution is, once it has ended."""
        self.attempts = max([self.attempts, *(step["attempts"] for step in found["steps"])])
        if found["status"] in TERMINAL and found["execution_id"] not in self.ended:
            self.ended[found["execution_id"]] = found
            self.log.write("seen", self.name, execution_id=found["execution_id"], status=found["status"])

    async def wait(self) -> None:
        """Wait until all have ended."""
        while missing := [one for one in self.ids.values() if one not in self.ended]:
            for found in await asyncio.gather(*(self.look(one) for one in missing[:8])):
                if found:
                    self.note(found)
            await asyncio.sleep(0.3)

    async def at_work(self, components: tuple[str, ...], seconds: float = 60) -> bool:
        """Wait until a step of one of these components runs; False where all ended before."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and (missing := [one for one in self.ids.values() if one not in self.ended]):
            for one in missing:
                found = await self.look(one)
                if found is None:
                    continue
                self.note(found)
                if any(step["status"] == "running" and step["component"].startswith(components) for step in found["steps"]):
                    return True
            await asyncio.sleep(0.02)
        return False

    async def review(self, others: Iterable[Client]) -> None:
        """Write down all that can be seen afterwards: states, histories, bytes, lists, and others' doors."""
        for name, work in self.works.items():
            await self.submit(work)  # the same key: the same execution
            execution_id = self.ids[name]
            answer = await self.ask("GET", f"/v1/executions/{execution_id}", until={200, 404})
            if answer.status_code != 200:
                continue
            found = answer.json()
            code, same = (found["error"] or {}).get("code"), found == self.ended.get(execution_id, found)
            self.log.write("found", self.name, execution_id=execution_id, status=found["status"], error=code, same=same)
            await self._read(work, found)
        await self._hear(list(self.ids.values()))
        for file_id in {line["file_id"] for line in self.log.lines if line["event"] == "stored" and line["who"] == self.name}:
            answer = await self.ask("GET", f"/v1/files/{file_id}", until={200, 404})
            self.log.write("fetched", self.name, file_id=file_id, sha256=hashlib.sha256(answer.content).hexdigest())
        await self._list()
        for other in others:
            for execution_id in list(other.ids.values())[:3]:
                await self._try(f"/v1/executions/{execution_id}", "execution")
                for file in other.ended.get(execution_id, {}).get("output_files", []):
                    await self._try(file["download_url"], "file")

    async def _read(self, work: Work, found: dict[str, Any]) -> None:
        files, declared = {}, {}
        for file in found["output_files"]:
            answer = await self.ask("GET", file["download_url"], until={200, 404})
            if file["name"] != "manifest":  # it tells times
                files[file["filename"]] = hashlib.sha256(answer.content).hexdigest()
                declared[file["filename"]] = file["sha256"]
        said = {"work": work.name, "files": files, "declared": declared}
        self.log.write("result", self.name, execution_id=found["execution_id"], **said)

    async def _hear(self, ids: list[str]) -> None:
        """Hear the whole history of executions, and whether anything comes after their ends."""
        told: dict[str, list[tuple[int, str]]] = {one: [] for one in ids}
        async with connect(self.service.url.replace("http", "ws") + "/v1/ws") as socket:
            await socket.send(json.dumps({"type": "auth", "token": self.token}))
            for one in ids:
                await socket.send(json.dumps({"type": "watch", "execution_id": one, "seq": 0}))
            with contextlib.suppress(TimeoutError, WebSocketException):
                while True:
                    open_ends = any(not some or some[-1][1] not in TERMINAL for some in told.values())
                    message = json.loads(await asyncio.wait_for(socket.recv(), 10 if open_ends else 1))
                    if "seq" in message and "status" in message and message["type"] != "watching":
                        told[message["execution_id"]].append((message["seq"], message["status"]))
        for one, some in told.items():
            self.log.write("events", self.name, execution_id=one, told=some)

    async def _list(self) -> None:
        ids, cursor = list[str](), None
        while True:
            params = {"limit": 200, **({"cursor": cursor} if cursor else {})}
            page = (await self.ask("GET", "/v1/executions", until={200}, params=params)).json()
            ids += [item["execution_id"] for item in page["items"]]
            if (cursor := page["next_cursor"]) is None:
                break
        self.log.write("listed", self.name, ids=ids)

    async def _try(self, path: str, what: str) -> None:
        async with self.http() as client:
            answer = await client.get(path)
        self.log.write("tried", self.name, what=what, status=answer.status_code)


class Pulse:
    """Asks again and again, on a new connection each time, and measures the longest silence.

    Parameters
    ----------
    client : Client
        Who asks.
    target : str
        Where the service speaks gRPC.
    """

    def __init__(self, client: Client, target: str) -> None:
        self._target = target
        self._client, self._tasks = client, list[asyncio.Task[None]]()
        self.longest = {"http": 0.0, "grpc": 0.0}
        self.asked, self.errors = 0, dict[str, int]()

    async def __aenter__(self) -> Pulse:
        self._tasks = [
            asyncio.create_task(self._beat("http", self._http)),
            asyncio.create_task(self._beat("grpc", self._grpc)),
        ]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _beat(self, kind: str, ask: Any) -> None:
        last = time.monotonic()
        while True:
            try:
                good = await ask()
            except Exception as error:  # whatever it is, it is no answer
                good = type(error).__name__
            now = time.monotonic()
            self.asked += 1
            if good is True:
                self.longest[kind], last = max(self.longest[kind], now - last), now
            else:
                self.errors[f"{kind} {good}"] = self.errors.get(f"{kind} {good}", 0) + 1
            await asyncio.sleep(0.2)

    async def _http(self) -> bool | str:
        async with self._client.http(5) as client:
            answer = await client.get("/v1/executions", params={"limit": 1})
        return answer.status_code == 200 or str(answer.status_code)

    async def _grpc(self) -> bool | str:
        async with grpc.aio.insecure_channel(self._target, [("grpc.use_local_subchannel_pool", 1)]) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=5)
        return answer.status == health_pb2.HealthCheckResponse.SERVING or "not serving"
