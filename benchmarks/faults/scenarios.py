"""The faults, one function each, and what is done around them.

Two accounts send executions of every stage and look at them until they have ended; meanwhile one function does harm. What both
saw is reviewed and checked (`benchmarks.faults.checker`).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import shutil
import socket
import sqlite3
import ssl
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import psutil

from benchmarks.faults.checker import Results, check, counts, results
from benchmarks.faults.clients import Client, Log, Pulse, Work, inputs, mixture
from benchmarks.faults.nodes import Node
from benchmarks.service import ROOT, ServiceProcess
from deployments.imageio.nifti import write_nifti
from scangraph.accounts_cli import local_token, with_store
from scangraph.contracts import LabelMap
from scangraph.handles import SERVICE_FILE
from scangraph.models import install_model
from scangraph.settings import Settings, load_settings
from scangraph.store import Store
from scangraph.store.accounts import create_account, new_secret
from scangraph.supervising import VITAL

#: What a deployment's components are called.
COMPONENTS = {
    "nnunet": ("inference/",),
    "smoothing": ("smoothing/",),
    "postprocess": ("postprocess/",),
    "imaging": ("image/",),
}
ACCOUNTS = {"alice": 4242, "bob": 4243}
#: Masks of 57 MB that each account works on at once; the store of these runs holds 512 MB.
_LARGE = 12
_MODEL = "totalseg-demo"


async def _add_account(name: str, store: Store, _: Settings) -> None:
    await create_account(store, name, "operator", new_secret(), "service")


@dataclass
class World:
    """A service with two accounts, and what is known of it.

    Parameters
    ----------
    data : Path
        An empty data folder.
    environment : dict, optional
        Settings of the service, as variables.
    on_two : bool
        Whether a second node joins.
    """

    data: Path
    environment: dict[str, str] = field(default_factory=dict)
    on_two: bool = False
    nodes: list[Node] = field(default_factory=list)
    service: ServiceProcess = field(init=False)
    quiet: Results = field(default_factory=dict)
    tokens: dict[str, str] = field(default_factory=dict)
    content: dict[str, dict[str, bytes]] = field(default_factory=dict)
    runs: int = 0

    def __post_init__(self) -> None:
        self.service = ServiceProcess(self.data, {**self.environment, **(_TWO if self.on_two else {})})

    def start(self) -> None:
        """Start the service, and make the accounts."""
        with ThreadPoolExecutor(1) as pool:
            started = pool.submit(self.service.start, 240)
            if self.on_two:  # it is not ready before
                self.nodes = [Node(self.service)]
                self.nodes[0].start()
            started.result()
        settings = load_settings(data=self.data)
        for name, seed in ACCOUNTS.items():
            with_store(self.data, partial(_add_account, name))
            self.tokens[name] = local_token(settings, name, 600)
            self.content[name] = inputs(seed)

    def stop(self) -> None:
        """Stop all of it."""
        self.service.stop()
        for node in self.nodes:
            node.kill()

    def forget(self) -> None:
        """Take away the results that the service kept, so that the same work is done again."""
        with contextlib.closing(sqlite3.connect(self.data / "scangraph.db", timeout=30)) as records, records:
            records.execute("DELETE FROM step_results")
        shutil.rmtree(self.data / "storage" / "steps", ignore_errors=True)

    async def ready(self, seconds: float = 120) -> bool:
        """Wait until every deployment has a replica and the service is ready; False if that takes longer."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            with contextlib.suppress(httpx.TransportError):
                async with httpx.AsyncClient(base_url=self.service.url, timeout=5) as client:
                    good = (await client.get("/readyz")).status_code == 200
                here = [*self.service.tree(), *(process for node in self.nodes for process in node.tree())]
                if good and all(self.service.matching(here, name) for name in (*COMPONENTS, "imageio", "executor")):
                    return True
            await asyncio.sleep(0.3)
        return False


@dataclass
class Scene:
    """A run: the world, who acts in it, and what the harm wants to tell."""

    world: World
    clients: list[Client]
    told: dict[str, Any] = field(default_factory=dict)

    @property
    def service(self) -> ServiceProcess:
        """The service."""
        return self.world.service

    async def at_work(self, deployment: str) -> bool:
        """Wait until one of the deployment's steps runs."""
        waits = [asyncio.create_task(client.at_work(COMPONENTS[deployment])) for client in self.clients]
        try:
            for wait in asyncio.as_completed(waits):
                if await wait:
                    return True
            return False
        finally:
            for task in waits:
                task.cancel()

    def kill(self, processes: Sequence[psutil.Process]) -> None:
        """SIGKILL, and note it."""
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
                self.told["killed"] = self.told.get("killed", 0) + 1
        assert processes, "there was nothing to kill"


Harm = Callable[[Scene], Coroutine[Any, Any, None]]


# --- harm ------------------------------------------------------------------------------------------------------------------


async def nothing(scene: Scene) -> None:
    """Do no harm: the run that others are compared with."""


def replica(deployment: str, more: Sequence[Work] = ()) -> Harm:
    """Kill a stage's replicas as soon as one of its steps runs; more work keeps one that is quick from having ended before."""

    async def harm(scene: Scene) -> None:
        await asyncio.gather(*(client.submit(work) for client in scene.clients for work in more))
        scene.told["at work"] = await scene.at_work(deployment)
        scene.kill(scene.service.processes(deployment))

    return harm


def soon(*names: str, seconds: float = 1.0) -> Harm:
    """Kill processes a while after all was accepted."""

    async def harm(scene: Scene) -> None:
        await asyncio.sleep(seconds)
        scene.kill([process for name in names for process in scene.service.processes(name)])

    return harm


async def imageio(scene: Scene) -> None:
    """Kill the gate twice, once while it has an upload to look into, once while it writes what was made."""
    name = "ct.nii.gz"
    uploads = [asyncio.create_task(client.store(name)) for client in scene.clients for _ in range(4)]
    await asyncio.sleep(0.05)
    scene.kill(scene.service.processes("imageio"))
    await asyncio.gather(*uploads)
    await scene.at_work("smoothing")
    scene.kill(scene.service.processes("imageio"))


async def head(scene: Scene) -> None:
    """Kill Ray's control store, which only the supervisor brings back."""
    await scene.at_work("nnunet")
    scene.kill([process for process in scene.service.tree() if process.name() == VITAL[0]])


async def everything(scene: Scene) -> None:
    """Kill all processes at once, the supervisor too, and start the service again."""
    await scene.at_work("nnunet")
    tree = scene.service.tree()
    scene.told["killed"] = len(tree)
    await asyncio.to_thread(scene.service.kill_everything)
    await asyncio.to_thread(scene.service.start, 180)


async def slow_loris(scene: Scene) -> None:
    """Hold 500 connections with half a request each for 20 s."""
    address = urlsplit(scene.service.url)
    held = [socket.create_connection((str(address.hostname), int(address.port or 0))) for _ in range(500)]
    try:
        for one in held:
            one.sendall(b"POST /v1/executions HTTP/1.1\r\nHost: x\r\nX-Slow: ")
        for _ in range(20):
            await asyncio.sleep(1)
            for one in held:
                with contextlib.suppress(OSError):
                    one.sendall(b"a")
    finally:
        closed = 0
        for one in held:
            one.settimeout(0.01)
            with contextlib.suppress(TimeoutError):
                try:
                    closed += one.recv(1) in {b"", b"H"}  # the end, or the answer that says so
                except ConnectionError:
                    closed += 1
            one.close()
        scene.told["half requests"] = f"{closed} of {len(held)} cut off after 20 s"


async def overload(scene: Scene) -> None:
    """Ask 2000 times at once, more than a replica may have at work."""
    client = scene.clients[0]
    answers: Counter[str] = Counter()
    # A client each: httpx's pool looks through all its connections whenever one of them ends, and with 2000 in one pool this
    # process, which also measures the silence, was busier than the service. One TLS context for all: each takes 20 ms to make.
    headers, context = {"Authorization": f"Bearer {client.token}"}, ssl.create_default_context()

    async def one() -> None:
        async with httpx.AsyncClient(base_url=client.service.url, headers=headers, timeout=60, verify=context) as alone:
            try:
                answer = await alone.get("/v1/executions", params={"limit": 100})
                told = " with Retry-After" if "retry-after" in answer.headers else ""
                answers[f"{answer.status_code}{told}"] += 1
            except httpx.TransportError as error:
                answers[type(error).__name__] += 1

    start = time.monotonic()
    await asyncio.gather(*(one() for _ in range(2000)))
    scene.told["all answered in s"] = round(time.monotonic() - start, 1)
    scene.told["answers"] = dict(answers)


async def queued(scene: Scene) -> None:
    """Send 1000 more executions at once; each is looked at afterwards as every other."""
    works = [Work(f"many-{n}", "postprocess-clean", "mask", "mask", {"min_mm3": 1 + n / 100}) for n in range(500)]
    gate = asyncio.Semaphore(16)

    async def one(client: Client, work: Work) -> None:
        async with gate:
            await client.submit(work)

    start = time.monotonic()
    await asyncio.gather(*(one(client, work) for client in scene.clients for work in works))
    scene.told["1000 accepted in s"] = round(time.monotonic() - start, 1)


async def redeploy(scene: Scene) -> None:
    """Deploy a new version of everything while it works."""
    await scene.at_work("nnunet")
    code, said = await deploy_again(scene.service)
    scene.told["redeployed"] = said or "all healthy"
    assert code == 0, said


async def broken_environment(scene: Scene) -> None:
    """Deploy two versions whose segmentation stage cannot start, then the good one again.

    The first interpreter ends at once, which is seen before anything is deployed. The second works until it is to be a
    replica, as if it were on a node that cannot be asked.
    """
    environments = load_settings().environments_dir
    folder, good = scene.world.data / "environments", environments / "nnunet" / "bin" / "python"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for there in environments.iterdir():
        if there.name != "nnunet":
            (folder / there.name).symlink_to(there)
    python = folder / "nnunet" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\necho 'this environment is broken' >&2\nexit 1\n")
    python.chmod(0o755)
    code, scene.told["refused"] = await deploy_again(scene.service, folder)
    assert code != 0, "a broken version was deployed"
    python.write_text(f'#!/bin/sh\ncase "$*" in *worker*) exit 1;; esac\nexec {good} "$@"\n')
    client = scene.clients[0]
    try:
        async with asyncio.timeout(45):
            code, said = await deploy_again(scene.service, folder)
    except TimeoutError:
        scene.told["second"] = "Serve waits for it"
    else:
        scene.told["second"] = said
        assert code != 0, "a broken version was deployed"
    await client.submit(Work("meanwhile", "organs", "image", "ct", {"step_size": 0.77}))
    scene.told["ready meanwhile"] = (await client.ask("GET", "/readyz", until={200, 503})).status_code == 200
    await client.wait()
    scene.told["meanwhile"] = client.ended[client.ids["meanwhile"]]["status"]
    code, said = await deploy_again(scene.service)
    assert code == 0, said


async def full_store(scene: Scene) -> None:
    """Work on three times as many bytes at once as the object store holds."""
    for client in scene.clients:
        for number in range(_LARGE):
            name = f"large-{number}"
            large = np.zeros((384, 384, 384), np.uint8)
            large[number : number + 40, 100:200, 100 : 200 + number] = 5
            data = write_nifti(LabelMap(large, (1.0, 1.0, 1.0), labels=(5,)))
            client.content[f"{name}.nii.gz"] = data
            client.files[name] = await client.store(f"{name}.nii.gz")
    for number in range(_LARGE):
        for client in scene.clients:
            await client.submit(Work(f"large-{number}", "postprocess-clean", "mask", f"large-{number}", {"min_mm3": 5}))
    spilled = 0.0
    while any(one not in client.ended for client in scene.clients for one in client.ids.values()):
        spilled = max(spilled, await asyncio.to_thread(_spilled_mb, scene.service))
        for client in scene.clients:
            for one in client.ids.values():
                if one not in client.ended and (found := await client.look(one)):
                    client.note(found)
        await asyncio.sleep(0.1)
    for client in scene.clients:
        for number in range(_LARGE):
            del client.content[f"large-{number}.nii.gz"]
    scene.told["most MB on disk"] = round(spilled)


def _spilled_mb(service: ServiceProcess) -> float:
    """Return what Ray has moved out of its store."""
    for process in service.tree():
        with contextlib.suppress(psutil.Error, OSError):
            for word in process.cmdline() if process.name() == "raylet" else ():
                if word.startswith("--session_dir="):
                    places = Path(word.partition("=")[2]).glob("ray_spilled_objects*/*")
                    return sum(file.stat().st_size for file in places) / 2**20
    return 0.0


async def model_update(scene: Scene) -> None:
    """Install new versions of the model of `organs` while it works; the weights stay, so the results must."""
    settings = load_settings(data=scene.world.data)
    parent, used = scene.world.data / "models", set[str]()
    parent.mkdir(exist_ok=True)
    client, numbers = scene.clients[0], range(6)
    with tempfile.TemporaryDirectory() as folder:
        for number in numbers:
            source = Path(folder) / str(number)
            shutil.copytree(settings.models_dir / _MODEL, source)
            manifest = source / "model.yaml"
            text = manifest.read_text()
            assert "version: 1.0.0" in text
            manifest.write_text(text.replace("version: 1.0.0", f"version: 2.0.{number}"))
            await asyncio.to_thread(install_model, source, parent)
            works = [Work(f"organs-{number}-{n}", "organs", "image", "ct", {"step_size": 0.9 - 0.01 * n}) for n in range(2)]
            for each in works:
                await client.submit(each)
            await asyncio.sleep(1)
    await client.wait()
    for name, one in client.ids.items():
        if name.startswith("organs-"):
            answer = await client.ask("GET", f"/v1/executions/{one}/provenance", until={200})
            used |= set(re.findall(rf'"{_MODEL}[^{{}}]*?"version": ?"([0-9.]+)"', answer.text))
    scene.told["installed"], scene.told["versions used"] = len(numbers), sorted(used)


async def deploy_again(service: ServiceProcess, *arguments: Path) -> tuple[int, str]:
    """Deploy once more, by a process of its own; return its exit code and what it says."""
    command = [sys.executable, "-m", "benchmarks.faults.redeploy", str(service.data), *map(str, arguments)]
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, env=service.environment, cwd=ROOT, stdout=pipe, stderr=pipe)
    try:
        said, complained = await process.communicate()
    finally:
        if process.returncode is None:  # nobody waits any more
            process.kill()
    code = await process.wait()
    return code, (said or (complained[-600:] if code else b"")).decode(errors="replace").strip()


async def node(scene: Scene) -> None:
    """Kill the second node with all that runs on it, a network at work too; a new one joins later."""
    (second,) = scene.world.nodes
    scene.told["at work there"] = await _computing(second.processes("nnunet"))
    scene.told["replicas there"] = [name for name in (*COMPONENTS, "imageio", "executor", "gateway") if second.processes(name)]
    scene.told["killed"] = await asyncio.to_thread(second.kill)
    await asyncio.sleep(5)
    await asyncio.to_thread(second.start)


async def _computing(processes: Sequence[psutil.Process], seconds: float = 60) -> bool:
    """Wait until they have taken 0.3 s of processor time more; False if that does not come."""

    def taken() -> float:
        return sum(sum(process.cpu_times()[:2]) for process in processes)

    before, end = taken(), time.monotonic() + seconds
    while time.monotonic() < end:
        if taken() - before >= 0.3:
            return True
        await asyncio.sleep(0.05)
    return False


async def _proxy_of(second: Node, seconds: float = 60) -> Sequence[psutil.Process]:
    """Return the node's proxy, for which one that has just joined takes its time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if there := second.processes("proxy"):
            return there
        await asyncio.sleep(0.3)
    raise AssertionError("there is no proxy on the second node")


async def proxy_of_two(scene: Scene) -> None:
    """Kill the first node's proxy, which speaks HTTP and gRPC, while the second node's goes on."""
    (second,) = scene.world.nodes
    await _proxy_of(second)
    await asyncio.sleep(0.5)
    scene.kill(scene.service.processes("proxy"))


async def second_proxy(scene: Scene) -> None:
    """Kill the second node's proxy."""
    (second,) = scene.world.nodes
    there = await _proxy_of(second)
    await asyncio.sleep(0.5)
    scene.kill(there)


_SURFACES = [Work(f"surface-more-{n}", "smoothing-base", "mask", "vessels", {"min_volume_mm3": 50.0 + n}) for n in range(8)]
SCENARIOS: dict[str, Harm] = {
    "quiet": nothing,
    **{name: replica(name) for name in COMPONENTS},
    "smoothing": replica("smoothing", _SURFACES),
    "imageio": imageio,
    "executor": soon("executor"),
    "gateway": soon("gateway", seconds=0.5),
    "controller": soon("controller"),
    "proxy": soon("proxy"),
    "head": head,
    "everything": everything,
    "slow-loris": slow_loris,
    "overload": overload,
    "queued": queued,
    "full-store": full_store,
    "redeploy": redeploy,
    "model-update": model_update,
    "broken-environment": broken_environment,
}
#: The same on two nodes.
ON_TWO: dict[str, Harm] = {"quiet": nothing, "node": node, "proxy-of-two": proxy_of_two, "second-proxy": second_proxy}
#: Settings by which the service needs two nodes, as either has room for one network only, and may lose one.
_TWO = {
    "SCANGRAPH_CPUS": "2",
    "SCANGRAPH_NNUNET__NUM_CPUS": "1.5",
    "SCANGRAPH_SMOOTHING__NUM_CPUS": "0.5",
    **{f"SCANGRAPH_{name}__{field}_REPLICAS": "2" for name in ("NNUNET", "GATEWAY") for field in ("MIN", "MAX")},
}


# --- around it -------------------------------------------------------------------------------------------------------------


async def run(world: World, name: str, works: Sequence[Work] | None = None, seconds: float = 220) -> dict[str, Any]:
    """Run a scenario; return its figures, with the checker's faults.

    Parameters
    ----------
    world : World
        A started one. Its first run is to be `quiet`: later ones are compared with it.
    name : str
        One of `SCENARIOS`, or of `ON_TWO` where there are two nodes.
    works : sequence of Work, optional
        What each account wants.
    seconds : float
        After that the clients give up, and what has not ended is lost.
    """
    if not await world.ready():
        return {"scenario": name, "faults": ["the service was not ready for it"]}
    world.forget()
    world.runs += 1
    log = Log(world.data / f"clients-{world.runs}-{name}.jsonl")
    label = f"{world.runs}-{name}"
    clients = [Client(world.service, who, token, world.content[who], log, label) for who, token in sorted(world.tokens.items())]
    for client in clients:
        await client.prepare()
    scene, start = Scene(world, clients), time.monotonic()
    wanted = works if works is not None else mixture(organs=2)
    gave_up = ""
    told = json.loads((world.data / SERVICE_FILE).read_text())
    async with Pulse(clients[0], told["grpc"]) as pulse:
        await asyncio.gather(*(client.submit(work) for client in clients for work in wanted))
        harm = asyncio.create_task((ON_TWO if world.on_two else SCENARIOS)[name](scene))
        try:
            async with asyncio.timeout(seconds):
                await harm
                await asyncio.gather(*(client.wait() for client in clients))
        except TimeoutError:
            gave_up = f"not ended after {seconds:.0f} s"
        except AssertionError as error:
            gave_up = str(error)
        took = time.monotonic() - start
        if not await world.ready():
            gave_up = gave_up or "the service did not become ready again"
        await asyncio.sleep(0.3)  # the pulse is heard again
    for client in clients:
        await client.review([other for other in clients if other is not client])
    if name == "quiet":
        world.quiet = results(log.lines)
    faults = check(log.lines, world.quiet)
    states = Counter(found["status"] for client in clients for found in client.ended.values())
    return {
        "scenario": name,
        **scene.told,
        "seconds": round(took, 1),
        "executions": sum(len(client.ids) for client in clients),
        "ended": dict(states),
        "most attempts": max(client.attempts for client in clients),
        "clients": counts(log.lines),
        "longest silence s": {kind: round(value, 1) for kind, value in pulse.longest.items()},
        "pulse errors": pulse.errors,
        "faults": [*faults, *([gave_up] if gave_up else [])],
    }
