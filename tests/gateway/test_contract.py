"""The OpenAPI document is true: schemathesis asks what it allows and forbids, and looks whether each answer is described."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from deployments.imageio.nifti import write_nifti
from scangraph.settings import load_settings
from tests.conftest import constant_volume
from tests.servers import Server, serving

CHECKS = (
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    data = tmp_path_factory.mktemp("contract")
    made = load_settings(data=data, auth={"logins_per_minute": 10_000})
    with serving(made) as server:
        server.run(server.services.storage.write("ct.nii.gz", write_nifti(constant_volume(40))))
        server.account("root", "admin")
        yield server


@pytest.fixture(scope="module")
def token(server: Server) -> str:
    body = {"username": "root", "password": "correct horse root"}
    return str(httpx.post(f"{server.url}/v1/auth/login", json=body).json()["access_token"])


@pytest.fixture(scope="module")
def schema(server: Server, token: str) -> Any:
    found = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    # Logging out would end the tests' own token.
    return found.exclude(path="/v1/auth/logout")


@schemathesis.serializer("application/offset+octet-stream")
def as_bytes(ctx: Any, value: Any) -> Any:
    """A part of a resumable upload is just bytes."""
    return value if isinstance(value, bytes) else str(value).encode()


def checked(case: Any, response: Any) -> None:
    case.validate_response(response, checks=CHECKS)
    if response.status_code >= 400 and response.request.method != "HEAD" and "/uploads" not in case.operation.path:
        assert response.headers["content-type"][0].startswith("application/problem+json"), response.text


def each_operation(schema: Any, ask: Any, mode: GenerationMode, examples: int) -> None:
    """Ask every operation, and tell all that is wrong at the end."""
    faults = []
    for found in schema.get_all_operations():
        operation = found.ok()
        asked = given(case=operation.as_strategy(generation_mode=mode))(ask)
        some = settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
        try:
            some(asked)()
        except Unsatisfiable:
            continue  # it takes nothing that could be wrong
        except Exception as error:
            faults.append(f"{operation.method.upper()} {operation.path}: {error}")
    assert not faults, "\n\n".join(faults)


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_every_answer_is_described(schema: Any, token: str, mode: GenerationMode) -> None:
    def ask(case: Any) -> None:
        headers = {"Authorization": f"Bearer {token}", "Prefer": "wait=1"}
        checked(case, case.call(headers=headers, timeout=30))

    each_operation(schema, ask, mode, 15)


def test_nothing_is_given_to_strangers(schema: Any) -> None:
    open_to_all = {"/healthz", "/readyz", "/v1/auth/login", "/v1/auth/refresh", "/v1/jwks.json"}
    open_to_all |= {"/v1/auth/session", "/v1/auth/session/refresh"}  # which look at cookies only

    def ask(case: Any) -> None:
        response = case.call(headers={"Authorization": "Bearer nobody"}, timeout=30)
        assert response.status_code < 500
        if case.operation.path not in open_to_all:
            assert response.status_code in {401, 404, 405, 408, 412, 413, 415, 422}, response.text

    each_operation(schema, ask, GenerationMode.POSITIVE, 2)


def test_what_is_made_can_be_followed(schema: Any, token: str, server: Server, tmp_path: Path) -> None:
    """Stateful: ids from answers go into the next requests."""
    machine = schema.as_state_machine()

    class Workflow(machine):  # type: ignore[misc, valid-type]
        def get_call_kwargs(self, case: Any) -> dict[str, Any]:
            return {"headers": {"Authorization": f"Bearer {token}"}, "timeout": 30}

        def validate_response(self, response: Any, case: Any, **_: Any) -> None:
            checked(case, response)

    Workflow.run(
        settings=settings(
            max_examples=15, stateful_step_count=6, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
        )
    )
