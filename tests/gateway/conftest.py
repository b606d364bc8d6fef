"""The gateway alone: its real application under uvicorn on real records, and hands that do the executor's part."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from sqlalchemy import text, update
from sqlalchemy.ext.asyncio import create_async_engine

from deployments.gateway.app import build_app
from deployments.gateway.services import Services
from deployments.imageio.deployment import Imageio
from deployments.imageio.nifti import write_nifti
from deployments.nnunet.components import COMPONENTS as NNUNET
from deployments.postprocess.components import COMPONENTS as POSTPROCESS
from deployments.smoothing.components import COMPONENTS as SMOOTHING
from scangraph.contracts import LabelMap, Progress, StepSummary, label_table
from scangraph.contracts.api import Role
from scangraph.contracts.errors import NoSuch
from scangraph.contracts.pipelines import built_in_pipelines
from scangraph.settings import Settings, load_settings
from scangraph.storage import open_storage
from scangraph.store import accounts, executions, open_store
from scangraph.store.executions import Claim, NewFile
from scangraph.store.pipelines import sync_built_in
from scangraph.store.tables import Account, Execution
from scangraph.tokens import Tokens
from tests.conftest import constant_volume
from tests.postgres import postgres_server
from tests.s3 import in_own_place
from tests.servers import Loop

COMPONENTS = (*NNUNET, *POSTPROCESS, *SMOOTHING)
SUMMARY = StepSummary(1.5, 200.0, ("cut at the border",), {"model": {"id": "m", "version": "2"}})


@dataclass
class Gateway:
    """One or more replicas on one database, each with its own connection; and who works on what they accept."""

    settings: Settings
    replicas: int = 1
    urls: list[str] = field(default_factory=list)
    services: list[Services] = field(default_factory=list)
    woken: int = 0

    def __post_init__(self) -> None:
        self._thread = Loop()
        self._servers: list[tuple[uvicorn.Server, socket.socket, Any]] = []
        self._accounts: dict[str, Account] = {}
        for _ in range(self.replicas):
            self._start()

    def run(self, work: Any) -> Any:
        """Run a coroutine in the loop of the replicas."""
        return self._thread.run(work)

    @property
    def store(self) -> Any:
        return self.services[0].store

    def _start(self) -> None:
        services = self.run(self._open())
        self.services.append(services)
        listen = socket.socket()
        listen.bind(("127.0.0.1", 0))
        app = build_app(COMPONENTS, lambda: services, self.settings.gateway)
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off", timeout_graceful_shutdown=1))
        serving = asyncio.run_coroutine_threadsafe(server.serve(sockets=[listen]), self._thread.loop)
        self._servers.append((server, listen, serving))
        while not server.started:
            time.sleep(0.01)
        self.urls.append(f"http://127.0.0.1:{listen.getsockname()[1]}")

    async def _open(self) -> Services:
        settings = self.settings
        store = await open_store(settings.database)
        await sync_built_in(store, built_in_pipelines(COMPONENTS, {n: label.name for n, label in label_table().items()}))

        async def wake() -> None:
            self.woken += 1

        async def nothing() -> dict[str, Any]:
            return {}

        return Services(
            settings=settings,
            store=store,
            storage=open_storage(settings.storage, settings.storage_options, settings.files.link_endpoint),
            components={component.id: component for component in COMPONENTS},
            tokens=Tokens(settings.auth, settings.data / "keys"),
            gate=Imageio(settings.imageio, settings.storage, settings.storage_options),
            wake=wake,
            readiness=nothing,
            models=nothing,
        )

    def close(self) -> None:
        for server, listen, serving in self._servers:
            server.should_exit = True
            serving.result(30)
            listen.close()
        for services in self.services:
            self.run(services.store.close())
        self._thread.stop()

    # --- who asks ---

    def account(self, name: str, role: Role) -> Account:
        """Return an account, made where there is none."""
        if name not in self._accounts:
            try:
                self._accounts[name] = self.run(accounts.find_account(self.store, name))
            except NoSuch:
                self._accounts[name] = self.run(accounts.create_account(self.store, name, role, accounts.new_secret()))
                for services in self.services:
                    services.state.pop("standings", None)  # a replica knows its accounts for a second
        return self._accounts[name]

    def token(self, name: str = "ann", role: Role = "operator", seconds: int | None = None) -> str:
        account = self.account(name, role)
        token, _ = self.services[0].tokens.sign(account.id, name, role, account.token_epoch, seconds)
        return token

    @contextlib.contextmanager
    def client(self, name: str = "ann", role: Role = "operator", replica: int = 0) -> Iterator[httpx.Client]:
        headers = {"Authorization": f"Bearer {self.token(name, role)}"}
        with httpx.Client(base_url=self.urls[replica], headers=headers, timeout=60) as client:
            yield client

    def upload(self, client: httpx.Client, value: int = 1) -> str:
        """Upload a small CT, and return its id."""
        answer = client.post("/v1/files", files={"file": ("ct.nii.gz", write_nifti(constant_volume(value)))})
        assert answer.status_code == 201, answer.text
        return str(answer.json()["id"])

    def put(self, name: str, data: bytes) -> None:
        """Put something into the storage, as a backend does."""
        self.run(self.services[0].storage.write(name, data))

    # --- who works ---

    def claim(self, execution_id: str | None = None) -> Claim:
        """Begin to work on an execution, whatever else waits; or on the next."""

        async def take() -> Claim | None:
            async with self.store.write() as session:
                await session.execute(update(Execution).where(Execution.id == execution_id).values(queue_key=-time.time()))
            return await executions.claim(self.store, "hands", 600)

        claim: Claim | None = self.run(take())
        assert claim is not None
        assert execution_id in {None, claim.execution_id}
        return claim

    def step(self, claim: Claim, step_id: str, cached: bool = False) -> None:
        """Do one step."""
        self.run(executions.write_down(self.store, claim, [executions.StepStarted(step_id)]))
        self.run(executions.write_down(self.store, claim, [executions.StepFinished(step_id, SUMMARY, 1, "k", cached)]))

    def progress(self, claim: Claim, step_id: str, done: int, total: int = 10) -> None:
        self.run(
            executions.write_down(self.store, claim, [executions.StepProgress(step_id, Progress(done, total, "tiles"), 1)])
        )

    def complete(self, claim: Claim) -> None:
        """Do all steps, and write a result for each output."""
        for step in claim.spec.steps:
            self.step(claim, step.id)
        files = []
        for output in claim.spec.outputs:
            name = f"results/{claim.execution_id}/{output}.bin"
            self.put(name, output.encode())
            files.append(
                NewFile(output, name, f"{output}.bin", "nifti", "application/octet-stream", len(output), uuid.uuid4().hex * 2)
            )
        assert self.run(executions.complete(self.store, claim, files, None))

    def fail(self, claim: Claim, step_id: str) -> None:
        error = {"code": "out-of-memory", "status": 507, "title": "Not enough memory", "detail": "it took 9 GB"}
        self.run(executions.write_down(self.store, claim, [executions.StepStarted(step_id)]))
        self.run(executions.fail(self.store, claim, error, step_id))


@contextlib.contextmanager
def gateway_on(data: Path, replicas: int = 1, **settings: Any) -> Iterator[Gateway]:
    """Run a gateway until the block ends."""
    gateway = Gateway(in_own_place(load_settings(data=data, **{"gateway": {"poll_seconds": 0.05}, **settings})), replicas)
    try:
        yield gateway
    finally:
        gateway.close()


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """URL of a real server."""
    with postgres_server() as url:
        yield url


async def new_database(server: str) -> str:
    """Make an empty database, and return its URL."""
    name, engine = f"test_{uuid.uuid4().hex}", create_async_engine(f"{server}/postgres", isolation_level="AUTOCOMMIT")
    async with engine.connect() as connection:
        await connection.execute(text(f"CREATE DATABASE {name}"))
    await engine.dispose()
    return f"{server}/{name}"


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def gateway(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """Two replicas on one database, SQLite and PostgreSQL."""
    data, settings = tmp_path_factory.mktemp("gateway"), {}
    if request.param == "postgresql":
        settings["database_url"] = asyncio.run(new_database(request.getfixturevalue("postgres")))
    with gateway_on(data, replicas=2, **settings) as gateway:
        yield gateway


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[Callable[..., Gateway]]:
    """Give gateways with settings of their own."""
    with contextlib.ExitStack() as stack:
        yield lambda replicas=1, **settings: stack.enter_context(gateway_on(tmp_path, replicas, **settings))


def problem(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """Check that it is this problem."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = answer.json()
    assert (body["type"], body["status"]) == (f"urn:scangraph:problem:{code}", status)
    assert body["trace_id"]
    return body


def mask_bytes() -> bytes:
    """A small mask."""
    volume = constant_volume(2)
    return write_nifti(LabelMap(volume.array.astype("uint8"), volume.spacing_mm, labels=(2,)))
