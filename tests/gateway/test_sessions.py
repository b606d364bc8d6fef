"""Signing in from a browser: the rules that cookies are looked at by, on two replicas, SQLite and PostgreSQL."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.cookies import SimpleCookie
from typing import Any

import httpx
import pytest
from websockets.sync.client import connect
from websockets.typing import Origin

from deployments.gateway.cookies import PAGE_HEADER
from tests.gateway.conftest import Gateway, problem
from tests.gateway.test_auth import User, bearer, becomes, refresh
from tests.gateway.test_live import address, closing, hear, say

PAGE = {PAGE_HEADER: "1"}
SESSION = "/v1/auth/session"


@contextlib.contextmanager
def browser(gateway: Gateway, replica: int = 0, user: User | None = None, **headers: str) -> Iterator[httpx.Client]:
    """Something that keeps cookies, signed in where there is a user."""
    with httpx.Client(base_url=gateway.urls[replica], headers=headers, timeout=60) as client:
        if user is not None:
            answer = client.post(SESSION, json={"username": user.name, "password": user.password}, headers=PAGE)
            assert answer.status_code == 200, answer.text
        yield client


def morsels(answer: httpx.Response) -> dict[str, Any]:
    """What an answer sets."""
    found: dict[str, Any] = {}
    for header in answer.headers.get_list("set-cookie"):
        found.update(SimpleCookie(header))
    return found


def port(gateway: Gateway, replica: int = 0) -> str:
    return gateway.urls[replica].rpartition(":")[2]


# --- what a browser is given -----------------------------------------------------------------------------------------------


def test_the_cookies_are_out_of_reach_and_open_what_a_bearer_opens(gateway: Gateway) -> None:
    user = User(gateway, "editor")
    with browser(gateway) as client:
        nobody = client.get(SESSION)
        assert (nobody.status_code, nobody.json()["account"], nobody.json()["renewable"]) == (200, None, False)
        answer = client.post(SESSION, json={"username": user.name, "password": user.password}, headers=PAGE)
        assert answer.headers["cache-control"] == "no-store"
        body = answer.json()
        assert (body["account"], body["account_id"], body["role"], body["renewable"]) == (user.name, user.id, "editor", True)
        assert "token" not in answer.text.replace("renewable", "")
        set_ = morsels(answer)
        assert set(set_) == {f"scangraph-{port(gateway)}-access", f"scangraph-{port(gateway)}-refresh"}
        for morsel in set_.values():
            assert (morsel["httponly"], morsel["secure"], morsel["samesite"], morsel["path"]) == (True, "", "strict", "/")
            assert morsel["domain"] == ""
        assert client.get("/v1/auth/me").json()["name"] == user.name
        assert client.get(SESSION).json() == body
        assert client.get("/v1/executions").status_code == 200
        problem(
            client.post("/v1/auth/session", json={"username": user.name, "password": "wrong"}, headers=PAGE),
            401,
            "unauthenticated",
        )


def test_over_tls_the_cookies_belong_to_this_host_alone(gateway: Gateway) -> None:
    """Of a proxy that ends TLS; this one is on this machine, and believed."""
    user, tls = User(gateway), {"X-Forwarded-Proto": "https", "Host": "ct.example"}
    with browser(gateway) as client:
        body = {"username": user.name, "password": user.password}
        answer = client.post(SESSION, json=body, headers={**PAGE, **tls, "Origin": "https://ct.example"})
        set_ = morsels(answer)
        assert set(set_) == {"__Host-scangraph-access", "__Host-scangraph-refresh"}
        for morsel in set_.values():
            assert (morsel["secure"], morsel["httponly"], morsel["path"], morsel["domain"]) == (True, True, "/", "")
        client.cookies.clear()
        sent = f"__Host-scangraph-access={set_['__Host-scangraph-access'].value}"
        assert client.get("/v1/auth/me", headers={"Cookie": sent, **tls}).status_code == 200
        # Whoever sits on the wire can set a cookie by http, of another name; and it is not looked at.
        plain = sent.removeprefix("__Host-")
        assert client.get("/v1/auth/me", headers={"Cookie": plain, **tls}).status_code == 401
        made = client.request("DELETE", "/v1/files/x", headers={"Cookie": sent, **tls, **PAGE, "Origin": "http://ct.example"})
        problem(made, 403, "cross-site-request")


def test_a_proxy_that_is_not_trusted_says_nothing(fresh: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "192.0.2.1")
    gateway = fresh()
    user = User(gateway)
    with browser(gateway) as client:
        body, headers = {"username": user.name, "password": user.password}, {**PAGE, "X-Forwarded-Proto": "https"}
        set_ = morsels(client.post(SESSION, json=body, headers=headers))
    assert set_
    assert all(not name.startswith("__Host-") and not morsel["secure"] for name, morsel in set_.items())


# --- whose page it is ------------------------------------------------------------------------------------------------------


def test_what_changes_something_must_come_from_our_page(gateway: Gateway) -> None:
    own = gateway.urls[0]
    foreign: tuple[dict[str, str], ...] = (
        {},
        {PAGE_HEADER: "0"},
        {**PAGE, "Origin": "https://evil.example"},
        {**PAGE, "Origin": "null"},
        {**PAGE, "Origin": "http://[broken"},
        {**PAGE, "Origin": own.replace(port(gateway), port(gateway, 1))},  # another service on this machine
        {**PAGE, "Sec-Fetch-Site": "cross-site"},
        {**PAGE, "Sec-Fetch-Site": "same-site", "Origin": own},
        {**PAGE, "Sec-Fetch-Site": "none"},
    )
    with browser(gateway, user=User(gateway)) as client:
        for headers in foreign:
            for method, path in (
                ("POST", "/v1/executions"),
                ("DELETE", "/v1/files/x"),
                ("PATCH", "/v1/uploads/x"),
                ("POST", "/v1/auth/logout"),
                ("POST", SESSION + "/refresh"),
                ("DELETE", SESSION),
            ):
                answer = client.request(method, path, headers={"Tus-Resumable": "1.0.0", **headers})
                problem(answer, 403, "cross-site-request")
            login = client.post(SESSION, json={"username": "a", "password": "b"}, headers=headers)
            problem(login, 403, "cross-site-request")  # nobody is signed in as somebody else, either
        assert client.get("/v1/auth/me").status_code == 200  # none of it did anything
        for headers in (PAGE, {**PAGE, "Origin": own}, {**PAGE, "Origin": own, "Sec-Fetch-Site": "same-origin"}):
            assert client.delete("/v1/files/x", headers=headers).status_code == 404


def test_an_origin_that_a_setting_names_is_ours(fresh: Any) -> None:
    gateway = fresh(gateway={"origins": ("https://ct.example",)})
    with browser(gateway, user=User(gateway)) as client:
        assert client.delete("/v1/files/x", headers={**PAGE, "Origin": "https://ct.example"}).status_code == 404
        problem(client.delete("/v1/files/x", headers={**PAGE, "Origin": "https://ct.example.org"}), 403, "cross-site-request")


def test_a_bearer_goes_before_the_cookie(gateway: Gateway) -> None:
    ann, bob = User(gateway), User(gateway)
    with browser(gateway, user=ann) as client:
        token = bob.login()["access_token"]
        assert client.get("/v1/auth/me", headers=bearer(token)).json()["name"] == bob.name
        assert client.delete("/v1/files/x", headers=bearer(token)).status_code == 404  # programs need no header of the page
        for broken in ({"Authorization": "Bearer"}, {"Authorization": "bearer"}, bearer("a.b.c")):
            problem(client.get("/v1/auth/me", headers=broken), 401, "unauthenticated")
        assert client.get("/v1/auth/me", headers={"Authorization": "Basic YTpi"}).json()["name"] == ann.name  # a proxy's


# --- going on, and the end -------------------------------------------------------------------------------------------------


def test_refreshing_rotates_both_and_the_tabs_do_not_throw_each_other_out(gateway: Gateway) -> None:
    with browser(gateway, user=User(gateway)) as client:
        old = dict(client.cookies)
        cookie = "; ".join(f"{name}={value}" for name, value in old.items())

        def tab(n: int) -> httpx.Response:
            headers = {**PAGE, "Cookie": cookie, "Host": gateway.urls[0].removeprefix("http://")}
            return httpx.post(f"{gateway.urls[n % 2]}{SESSION}/refresh", headers=headers, timeout=60)

        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(tab, range(4)))
        assert [answer.status_code for answer in answers] == [200] * 4, [answer.text for answer in answers]
        values = {morsel.value for answer in answers for morsel in morsels(answer).values()}
        assert len(values) == 8
        assert not values & set(old.values())
        assert client.post(SESSION + "/refresh", headers=PAGE).status_code == 200
        assert client.get("/v1/auth/me").status_code == 200
        # As a refresh token of a program it was used before, and whoever has it now is a thief: the chain ends.
        name = f"scangraph-{port(gateway)}-refresh"
        assert refresh(gateway, old[name]).status_code == 401
        ended = client.post(SESSION + "/refresh", headers=PAGE)
        problem(ended, 401, "unauthenticated")
        assert all(morsel["max-age"] == "0" for morsel in morsels(ended).values())
        assert not client.cookies
        problem(client.post(SESSION + "/refresh", headers=PAGE), 401, "unauthenticated")


def test_leaving_clears_the_cookies_and_ends_this_session_only(gateway: Gateway) -> None:
    user = User(gateway)
    elsewhere = user.login()
    with browser(gateway, user=user) as client:
        kept = dict(client.cookies)
        answer = client.delete(SESSION, headers=PAGE)
        assert (answer.status_code, answer.content) == (204, b"")
        assert len(morsels(answer)) == 2
        assert not client.cookies
        problem(client.get("/v1/auth/me"), 401, "unauthenticated")
        assert client.delete(SESSION, headers=PAGE).status_code == 204  # again: nothing to end
        client.cookies.update(kept)  # whoever had copied them
        problem(client.get("/v1/auth/me"), 401, "unauthenticated")
        assert client.get(SESSION).json()["account"] is None
        problem(client.post(SESSION + "/refresh", headers=PAGE), 401, "unauthenticated")
    cookies = {name.replace(port(gateway), port(gateway, 1)): value for name, value in kept.items()}
    with httpx.Client(base_url=gateway.urls[1], cookies=cookies, timeout=60) as other:
        becomes(401, lambda: other.get("/v1/auth/me"))
    assert refresh(gateway, elsewhere["refresh_token"]).status_code == 200


def test_an_access_cookie_dies_by_itself(fresh: Any) -> None:
    gateway = fresh(auth={"access_seconds": 1})
    with browser(gateway, user=User(gateway)) as client:
        access = client.cookies[f"scangraph-{port(gateway)}-access"]
        time.sleep(6.5)  # the clock's leeway is 5 s
        client.cookies.set(f"scangraph-{port(gateway)}-access", access)
        problem(client.get("/v1/auth/me"), 401, "unauthenticated")
        assert client.get(SESSION).json()["renewable"]
        assert client.post(SESSION + "/refresh", headers=PAGE).json()["account"]


# --- live ------------------------------------------------------------------------------------------------------------------


def test_a_websocket_takes_the_cookie_of_its_handshake(gateway: Gateway) -> None:
    user, own = User(gateway), Origin(gateway.urls[0])
    with browser(gateway, user=user) as client:
        headers = {"Cookie": "; ".join(f"{name}={value}" for name, value in client.cookies.items())}
        with connect(address(gateway), origin=own, additional_headers=headers) as socket:
            say(socket, type="auth")
            told = hear(socket)
            assert (told["type"], told["name"]) == ("auth_ok", user.name)
        with connect(address(gateway), additional_headers=headers) as socket:  # nobody says whose page it is
            say(socket, type="auth")
            assert closing(socket) == 4401
        with connect(address(gateway), origin=own) as socket:
            say(socket, type="auth")
            assert closing(socket) == 4401
        with connect(address(gateway), origin=own, additional_headers=headers) as socket:
            socket.send(json.dumps({"type": "auth", "token": "nobody's"}))  # a token that is no good is not replaced
            assert closing(socket) == 4401
        client.delete(SESSION, headers=PAGE)
        with connect(address(gateway), origin=own, additional_headers=headers) as socket:
            say(socket, type="auth")
            assert closing(socket) == 4401
