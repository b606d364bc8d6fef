"""TLS at the edge: the proxy's configuration that is given, run by a real nginx in front of a real gateway, HTTP and gRPC."""

from __future__ import annotations

import hashlib
import http.client
import json
import shutil
import socket
import ssl
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import httpx
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from websockets.sync.client import connect

from deployments.imageio.nifti import write_nifti
from scangraph.cluster import free_port
from scangraph.contracts import Volume
from scangraph.imageflow.v1 import imageflow_pb2 as pb
from scangraph.imageflow.v1 import imageflow_pb2_grpc
from scangraph.settings import load_settings
from scangraph.store import audit
from tests.certificates import certificate
from tests.conftest import ROOT, constant_volume
from tests.gateway.rpc_server import RpcServer, chunks

NAME = "scangraph.example"
SHAPE = (220, 300, 300)
PIPELINE = "test-threshold"


@dataclass
class Edge:
    """A running proxy."""

    https: int
    http: int
    folder: Path
    trusted: ssl.SSLContext
    certificate: bytes

    @property
    def url(self) -> str:
        return f"https://{NAME}:{self.https}"

    def client(self, token: str | None = None) -> httpx.Client:
        """Return a client that finds the name here."""
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        transport = httpx.HTTPTransport(verify=self.trusted)
        address = f"https://127.0.0.1:{self.https}"
        client = httpx.Client(base_url=address, headers={**headers, "Host": NAME}, transport=transport, timeout=60)
        client.event_hooks["request"].append(lambda request: request.extensions.update(sni_hostname=NAME))
        return client


def put_together(folder: Path, http_port: int, grpc_port: int) -> tuple[int, int]:
    """Write nginx's configuration around the one that is given: other ports and folders, nothing else."""
    https, plain = free_port("127.0.0.1"), free_port("127.0.0.1")
    text = (ROOT / "cluster/edge/nginx.conf").read_text()
    changes = {
        "127.0.0.1:8000": f"127.0.0.1:{http_port}",
        "127.0.0.1:9000": f"127.0.0.1:{grpc_port}",
        "listen 80;": f"listen 127.0.0.1:{plain};",
        "listen 443 ssl http2;": f"listen 127.0.0.1:{https} ssl http2;",
        "/etc/ssl/scangraph": str(folder),
    }
    for old, new in changes.items():
        assert old in text, old
        text = text.replace(old, new)
    (folder / "scangraph.conf").write_text(text)
    temporary = "".join(f"{kind}_temp_path {folder}/{kind};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    (folder / "nginx.conf").write_text(
        f"daemon off;\npid {folder}/pid;\nerror_log {folder}/error.log;\nworker_processes 1;\nevents {{}}\n"
        f"http {{\n{temporary}include {folder}/scangraph.conf;\n}}\n"
    )
    return https, plain


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RpcServer]:
    server = RpcServer(load_settings(data=tmp_path_factory.mktemp("data")))
    yield server
    server.close()


@pytest.fixture(scope="module")
def edge(server: RpcServer) -> Iterator[Edge]:
    program = shutil.which("nginx") or "/usr/sbin/nginx"
    if not Path(program).exists():
        pytest.skip("nginx is not installed (Debian: apt-get install nginx-light)")
    with tempfile.TemporaryDirectory(prefix="edge-") as name:
        folder = Path(name)
        folder.chmod(0o755)  # its workers are others
        authority = certificate(folder, NAME)
        https, plain = put_together(folder, server.http.port, int(server.target.rpartition(":")[2]))
        command = [program, "-p", name, "-c", f"{name}/nginx.conf", "-e", f"{name}/error.log"]
        checked = subprocess.run([*command, "-t"], capture_output=True, text=True, check=False)
        assert checked.returncode == 0, checked.stderr
        assert "warn" not in checked.stderr, checked.stderr
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
            for _ in range(100):
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", https)) == 0:
                        break
                time.sleep(0.05)
            yield Edge(https, plain, folder, ssl.create_default_context(cafile=str(authority)), authority.read_bytes())
            process.terminate()
            process.wait(20)


@pytest.fixture(scope="module")
def token(server: RpcServer) -> str:
    return server.bearer()[0][1].removeprefix("Bearer ")


def test_http_goes_to_https_and_old_tls_is_refused(edge: Edge) -> None:
    answer = httpx.get(f"http://127.0.0.1:{edge.http}/v1/files?limit=3", headers={"Host": NAME})
    assert (answer.status_code, answer.headers["location"]) == (308, f"https://{NAME}/v1/files?limit=3")
    old = ssl.create_default_context()
    old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
    old.minimum_version = ssl.TLSVersion.TLSv1_2
    old.set_ciphers("AES128-SHA256")  # no forward secrecy
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    with socket.create_connection(("127.0.0.1", edge.https), timeout=10) as line, pytest.raises(ssl.SSLError):
        old.wrap_socket(line, server_hostname=NAME)


def test_large_files_go_through_and_nothing_stays(edge: Edge, token: str) -> None:
    noise = np.random.default_rng(1).integers(-1000, 1000, SHAPE).astype(np.int16)
    data = write_nifti(Volume(noise, (1.0, 1.0, 1.0)))
    assert len(data) > 20 * 2**20
    with edge.client(token) as client:
        answer = client.post("/v1/files", files={"file": ("ct.nii.gz", data)})
        assert answer.status_code == 201, answer.text
        assert answer.headers["strict-transport-security"].startswith("max-age=")
        assert "nginx/" not in answer.headers["server"]
        file = answer.json()["id"]
        got = client.get(f"/v1/files/{file}")
        assert hashlib.sha256(got.content).hexdigest() == hashlib.sha256(data).hexdigest()
        part = client.get(f"/v1/files/{file}", headers={"Range": "bytes=5-9"})
        assert (part.status_code, part.content) == (206, data[5:10])
        assert client.get("/metrics").status_code == 404
    kept = [path for path in edge.folder.rglob("*") if path.is_file() and path.stat().st_size > 2**20]
    assert kept == []


def test_a_refusal_comes_before_the_whole_was_sent(edge: Edge) -> None:
    """A client without a token announces a gigabyte, sends a little, and is told at once."""
    line = http.client.HTTPSConnection("127.0.0.1", edge.https, timeout=20, context=edge.trusted)
    with socket.create_connection(("127.0.0.1", edge.https), timeout=20) as plain:
        line.sock = edge.trusted.wrap_socket(plain, server_hostname=NAME)
        line.putrequest("POST", "/v1/files", skip_host=True)
        for name, value in {
            "Host": NAME,
            "Content-Length": str(2**30),
            "Content-Type": "multipart/form-data; boundary=x",
        }.items():
            line.putheader(name, value)
        line.endheaders()
        line.send(b"--x\r\n" + bytes(1000))
        answer = line.getresponse()
        assert answer.status == 401
        answer.close()
    line.close()


def test_where_a_request_came_from_is_the_proxys_word(edge: Edge, server: RpcServer, token: str) -> None:
    forged = {"X-Forwarded-For": "203.0.113.7", "X-Forwarded-Proto": "http", "Forwarded": "for=203.0.113.7"}
    with edge.client(token) as client:
        client.get("/v1/files", headers=forged, params={"kind": "forged"})
        sent = client.get("/v1/files/", headers=forged)  # a redirect of the application, with scheme and name
        assert sent.is_redirect
        assert sent.headers["location"].startswith(f"https://{NAME}")
    rows = server.http.run(audit.entries(server.http.services.store))
    assert {row.address for row in rows if row.door == "http"} == {"127.0.0.1"}


def test_websockets_stay(edge: Edge, token: str) -> None:
    line = socket.create_connection(("127.0.0.1", edge.https))
    with line, connect(f"wss://{NAME}:{edge.https}/v1/ws", sock=line, ssl=edge.trusted, server_hostname=NAME) as ws:
        ws.send(json.dumps({"type": "auth", "token": token}))
        assert json.loads(ws.recv(10))["type"] == "auth_ok"
        time.sleep(1)
        ws.send(json.dumps({"type": "ping"}))
        assert json.loads(ws.recv(10))["type"] == "pong"


def test_grpc_on_the_same_port(edge: Edge, token: str) -> None:
    credentials = grpc.ssl_channel_credentials(edge.certificate)
    options = [("grpc.ssl_target_name_override", NAME), ("grpc.default_authority", NAME)]
    with grpc.secure_channel(f"127.0.0.1:{edge.https}", credentials, options) as channel:
        health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=20)
        assert health.status == health_pb2.HealthCheckResponse.SERVING
        stub = imageflow_pb2_grpc.ImageProcessingServiceStub(channel)
        wish = pb.WatchRequest(execution_id="00000000-0000-0000-0000-000000000000")
        for metadata, code in (
            ([], grpc.StatusCode.UNAUTHENTICATED),
            ([("authorization", f"Bearer {token}")], grpc.StatusCode.NOT_FOUND),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                list(stub.WatchExecution(wish, metadata=metadata, timeout=20))
            assert caught.value.code() is code
        # Both ways at once: chunks go up while progress comes down.
        image = write_nifti(constant_volume(7))
        *_, last = stub.ProcessImageStream(chunks(image, 3, pipeline_id=PIPELINE), metadata=metadata, timeout=60)
        assert last.status == pb.STATUS_COMPLETED


def test_a_service_that_is_away_is_a_problem_with_a_time(edge: Edge, server: RpcServer) -> None:
    server.http.down()
    try:
        with edge.client() as client:
            answer = client.get("/v1/files")
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.json()["status"] == 503
    finally:
        server.http.up()
