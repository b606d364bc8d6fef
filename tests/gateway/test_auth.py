"""Logging in, staying in and being thrown out, over HTTP: two replicas on one database, SQLite and PostgreSQL."""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import jwt
import pytest

from deployments.gateway.auth import network
from scangraph.contracts.api import Role
from scangraph.store import accounts

#: What a replica may go on believing after another one knows better, and some time for a busy machine.
NOTICED_SECONDS = 3.0
WRONG = "Name or password is wrong, or the account is disabled. "


class User:
    """Somebody with a password."""

    def __init__(self, gateway: Any, role: Role = "operator") -> None:
        self.gateway, self.name, self.password = gateway, f"user-{uuid.uuid4().hex[:8]}", accounts.new_secret()
        self.id = gateway.run(accounts.create_account(gateway.store, self.name, role, self.password)).id

    def login(self, replica: int = 0) -> dict[str, Any]:
        answer = ask(self.gateway, "login", replica, username=self.name, password=self.password)
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found


def ask(gateway: Any, what: str, replica: int = 0, **body: Any) -> httpx.Response:
    return httpx.post(f"{gateway.urls[replica]}/v1/auth/{what}", json=body, timeout=60)


def refresh(gateway: Any, token: str, replica: int = 0) -> httpx.Response:
    return ask(gateway, "refresh", replica, refresh_token=token)


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def me(gateway: Any, tokens: dict[str, Any], replica: int = 0) -> httpx.Response:
    return httpx.get(f"{gateway.urls[replica]}/v1/auth/me", headers=bearer(tokens["access_token"]), timeout=60)


def refused(answer: httpx.Response, reason: str = "", status: int = 401, code: str = "unauthenticated") -> None:
    """Check that it is the problem that it must be."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["type"] == f"urn:scangraph:problem:{code}"
    assert reason in answer.json()["detail"]
    if status == 401:
        assert answer.headers["www-authenticate"].startswith("Bearer ")


def becomes(status: int, answer: Callable[[], httpx.Response]) -> None:
    end = time.monotonic() + NOTICED_SECONDS
    while (found := answer().status_code) != status:
        assert time.monotonic() < end, found
        time.sleep(0.05)


def test_name_and_password_give_a_token_that_every_replica_takes(gateway: Any) -> None:
    user = User(gateway, "editor")
    answer = ask(gateway, "login", username=user.name, password=user.password)
    tokens = answer.json()
    assert answer.headers["cache-control"] == "no-store"
    assert (tokens["token_type"], tokens["expires_in"], tokens["role"]) == ("Bearer", 900, "editor")
    becomes(200, lambda: me(gateway, tokens, 1))  # an account that was made a moment ago
    for replica in (0, 1):
        found = me(gateway, tokens, replica).json()
        assert (found["account_id"], found["name"], found["role"]) == (user.id, user.name, "editor")


def test_whoever_fails_is_not_told_why(gateway: Any) -> None:
    user, gone = User(gateway), User(gateway)
    gateway.run(accounts.set_enabled(gateway.store, gone.name, enabled=False))
    details = set()
    for name, password in (
        (user.name, "wrong"),
        ("nobody", user.password),
        (user.id, user.password),
        (gone.name, gone.password),
    ):
        answer = ask(gateway, "login", username=name, password=password)
        refused(answer, WRONG)
        details.add(answer.json()["detail"])
    assert len(details) == 1


def test_bodies_that_are_none(gateway: Any) -> None:
    bodies: tuple[dict[str, Any], ...] = (
        {},
        {"username": "a"},
        {"username": "a", "password": "b", "role": "admin"},
        {"username": [], "password": {}},
    )
    for body in bodies:
        refused(ask(gateway, "login", **body), status=422, code="invalid-request")
    for odd in (r"\u0000", r"a\u0000b", r"\ud800", r"\udbff\udfff", "' OR 1=1 --"):
        texts = ("login", f'{{"username": "{odd}", "password": "b"}}'), ("refresh", f'{{"refresh_token": "{odd}"}}')
        for what, text in (*texts, ("login", f'{{"username": "nobody", "password": "{odd}"}}')):
            headers = {"Content-Type": "application/json"}
            answer = httpx.post(f"{gateway.urls[0]}/v1/auth/{what}", content=text, headers=headers, timeout=60)
            assert answer.status_code in {401, 422}, (what, odd, answer.text)


def test_everything_but_the_door_itself_wants_a_token(gateway: Any) -> None:
    """As the document says it, and as it is."""
    with httpx.Client(base_url=gateway.urls[0], timeout=60) as client:
        document = client.get("/openapi.json").json()
        assert document["components"]["securitySchemes"]["bearer"]["scheme"] == "bearer"
        free = set()
        for path, operations in document["paths"].items():
            for method, operation in operations.items():
                if "security" not in operation:
                    free.add(operation["operationId"])
                    continue
                assert {"401", "503"} <= set(operation["responses"]), operation["operationId"]
                url = re.sub(r"\{[^}]*\}", "x", path)
                for headers in ({}, {"Authorization": "Basic YTpi"}, bearer("a.b.c"), {"Authorization": "Bearer"}):
                    answer = client.request(method, url, headers={"Tus-Resumable": "1.0.0", **headers})
                    assert answer.status_code == 401, (method, url, answer.text)
                    if method != "head":
                        refused(answer)
        sessions = {"begin_session", "session", "refresh_session", "end_session"}  # the page's own, see test_sessions.py
        assert free == {"login", "refresh", "jwks", "healthz", "readyz"} | sessions


def test_roles(gateway: Any) -> None:
    can: dict[Role, tuple[int, ...]] = {
        "viewer": (200, 403, 403),
        "operator": (200, 422, 403),
        "editor": (200, 422, 422),
        "admin": (200, 422, 422),
    }
    for role, expected in can.items():
        headers = bearer(User(gateway, role).login()["access_token"])
        with httpx.Client(base_url=gateway.urls[0], headers=headers, timeout=60) as client:
            answers = (
                client.get("/v1/executions"),
                client.post("/v1/executions", json={"odd": 1}),
                client.post("/v1/pipelines", json={"odd": 1}),
            )
        assert tuple(answer.status_code for answer in answers) == expected, role
        for answer in answers:
            if answer.status_code == 403:
                refused(answer, role, 403, "forbidden")


def test_a_refresh_token_is_good_once_on_all_replicas_together(gateway: Any) -> None:
    user = User(gateway)
    first, other = user.login(), user.login(1)
    second = refresh(gateway, first["refresh_token"], 1)
    assert second.headers["cache-control"] == "no-store"
    assert me(gateway, second.json(), 1).status_code == 200
    refused(refresh(gateway, first["refresh_token"]), "not good any more")
    refused(refresh(gateway, second.json()["refresh_token"]), "not good any more")  # one of the two was a thief
    assert refresh(gateway, other["refresh_token"]).status_code == 200
    refused(refresh(gateway, "made up"), "not good any more")


def test_of_many_refreshes_at_once_one_wins(gateway: Any) -> None:
    token = User(gateway).login()["refresh_token"]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda n: refresh(gateway, token, n % 2), range(8)))
    assert sorted(answer.status_code for answer in answers) == [200] + [401] * 7
    (won,) = (answer.json() for answer in answers if answer.status_code == 200)
    refused(refresh(gateway, won["refresh_token"]))


def test_logout_ends_the_token_at_once_here_and_soon_elsewhere(gateway: Any) -> None:
    user = User(gateway)
    tokens, others = user.login(), user.login()
    becomes(200, lambda: me(gateway, tokens, 1))
    headers = bearer(tokens["access_token"])
    with httpx.Client(base_url=gateway.urls[0], headers=headers, timeout=60) as client, ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(lambda: [client.get("/v1/auth/me") for _ in range(20)]) for _ in range(4)]
        assert client.post("/v1/auth/logout").status_code == 204
        refused(client.get("/v1/auth/me"), "The token was revoked")
        for future in asking:
            assert {answer.status_code for answer in future.result()} <= {200, 401}
        refused(client.get("/v1/auth/me"), "The token was revoked")
        refused(client.post("/v1/auth/logout"), "The token was revoked")
    becomes(401, lambda: me(gateway, tokens, 1))
    refused(refresh(gateway, tokens["refresh_token"], 1))
    assert me(gateway, others).status_code == 200  # another token lives until it expires,
    refused(refresh(gateway, others["refresh_token"]))  # but is not renewed


@pytest.mark.parametrize("change", ["disable", "role", "password", "remove"])
def test_what_the_admin_changes_ends_the_tokens_everywhere(gateway: Any, change: str) -> None:
    user = User(gateway, "editor")
    tokens = user.login()
    for replica in (0, 1):
        becomes(200, lambda replica=replica: me(gateway, tokens, replica))  # type: ignore[misc]
    work = {
        "disable": lambda: accounts.set_enabled(gateway.store, user.name, enabled=False),
        "role": lambda: accounts.set_role(gateway.store, user.name, "viewer"),
        "password": lambda: accounts.set_password(gateway.store, user.name, user.password),
        "remove": lambda: accounts.remove_account(gateway.store, user.name),
    }
    gateway.run(work[change]())
    for replica in (0, 1):
        becomes(401, lambda replica=replica: me(gateway, tokens, replica))  # type: ignore[misc]
    refused(refresh(gateway, tokens["refresh_token"]))
    if change == "disable":
        gateway.run(accounts.set_enabled(gateway.store, user.name, enabled=True))
    if change != "remove":
        again = user.login()
        assert again["role"] == ("viewer" if change == "role" else "editor")
        assert me(gateway, again).status_code == 200
        refused(me(gateway, tokens))
        refused(refresh(gateway, tokens["refresh_token"]))


def test_others_fetch_the_keys_and_check_our_tokens(gateway: Any) -> None:
    token = User(gateway).login()["access_token"]
    key = jwt.PyJWKClient(f"{gateway.urls[1]}/v1/jwks.json").get_signing_key_from_jwt(token)
    assert jwt.decode(token, key, algorithms=["EdDSA"], audience="scangraph", issuer="scangraph")["role"] == "operator"
    keys = httpx.get(f"{gateway.urls[0]}/v1/jwks.json").json()["keys"]
    assert all(set(public) == {"kty", "crv", "x", "kid", "use", "alg"} for public in keys)


def test_an_access_token_dies_by_itself_and_is_renewed(fresh: Any) -> None:
    gateway = fresh(auth={"access_seconds": 1})
    user = User(gateway)
    tokens = user.login()
    assert me(gateway, tokens).status_code == 200
    time.sleep(7.5)  # five of them for clocks that differ
    refused(me(gateway, tokens), "The token has expired")
    assert me(gateway, refresh(gateway, tokens["refresh_token"]).json()).status_code == 200


def test_too_many_failures_of_a_name(fresh: Any) -> None:
    gateway = fresh(auth={"logins_per_minute": 3})
    user, other = User(gateway), User(gateway)
    for _ in range(5):
        user.login()  # a success counts nothing
    for _ in range(3):
        refused(ask(gateway, "login", username=user.name, password="wrong"), WRONG)
    limited = ask(gateway, "login", username=user.name, password=user.password)
    refused(limited, "Too many failed logins", 429, "too-many-requests")
    assert 50 <= int(limited.headers["retry-after"]) <= 61
    other.login()


def test_many_guesses_at_once_are_no_more_than_one_after_the_other(fresh: Any) -> None:
    gateway = fresh(auth={"logins_per_minute": 3})
    user = User(gateway)
    with ThreadPoolExecutor(30) as pool:
        answers = list(pool.map(lambda n: ask(gateway, "login", username=user.name, password=f"guess {n}"), range(30)))
    looked_at = sum(answer.status_code == 401 for answer in answers)
    assert 3 <= looked_at <= 4  # two are looked at at once
    assert {answer.status_code for answer in answers} == {401, 429}


def test_too_many_failures_of_an_address_whatever_it_says_it_is(fresh: Any) -> None:
    gateway = fresh(auth={"logins_per_minute": 1})
    user = User(gateway)

    def fail(peer: str, n: int) -> int:
        with httpx.Client(transport=httpx.HTTPTransport(local_address=peer), timeout=60) as client:
            body, headers = {"username": f"nobody-{peer}-{n}", "password": "wrong"}, {"X-Forwarded-For": f"192.0.2.{n}"}
            return client.post(f"{gateway.urls[0]}/v1/auth/login", json=body, headers=headers).status_code

    assert [fail("127.0.0.2", n) for n in range(7)] == [401] * 5 + [429] * 2
    assert {fail("127.0.0.1", n) for n in range(6)} == {401}  # a reverse proxy on this machine
    user.login()


def test_what_counts_as_one_address() -> None:
    assert network("192.0.2.7") == "192.0.2.7" == network("::ffff:192.0.2.7")
    assert network("2001:db8::1") == network("2001:db8::ffff:1%eth0") == "2001:db8::/64"
    assert network("2001:db8:0:1::1") != network("2001:db8::1")
    assert network("") == network("unix") == ""
