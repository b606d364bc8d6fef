"""Bearer tokens: good ones, forged ones, and keys."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed448, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from scangraph.contracts.errors import Unauthenticated
from scangraph.settings import AuthSettings
from scangraph.tokens import InvalidKey, Tokens

SETTINGS = AuthSettings(issuer="us", audience="ours")
PEM, PKCS8, OPEN = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data") / "keys"


@pytest.fixture(scope="module")
def tokens(keys: Path) -> Tokens:
    return Tokens(SETTINGS, keys)


@pytest.fixture(scope="module")
def key(tokens: Tokens, keys: Path) -> Ed25519PrivateKey:
    """The service's own key, to sign what it would not."""
    found = serialization.load_pem_private_key((keys / "0001.pem").read_bytes(), None)
    assert isinstance(found, Ed25519PrivateKey)
    return found


def save(key: Any, path: Path) -> Path:
    path.write_bytes(key.private_bytes(PEM, PKCS8, OPEN))
    return path


def b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def compact(header: Any, claims: Any, sign: Callable[[bytes], bytes]) -> str:
    parts = [part if isinstance(part, bytes) else json.dumps(part).encode() for part in (header, claims)]
    body = ".".join(b64(part) for part in parts)
    return f"{body}.{b64(sign(body.encode()))}"


def test_a_token_says_what_rfc_9068_wants(tokens: Tokens) -> None:
    token, made = tokens.sign("id-1", "ann", "editor", 3)
    assert tokens.verify(token) == made
    assert (made.account_id, made.name, made.role, made.epoch) == ("id-1", "ann", "editor", 3)
    header = jwt.get_unverified_header(token)
    assert header == {"alg": "EdDSA", "typ": "at+jwt", "kid": tokens.jwks()["keys"][0]["kid"]}
    claims = jwt.decode(token, options={"verify_signature": False})
    assert set(claims) == {"iss", "aud", "sub", "client_id", "name", "role", "epoch", "jti", "iat", "nbf", "exp"}
    assert (claims["iss"], claims["aud"], claims["exp"] - claims["iat"]) == ("us", "ours", 900)
    assert claims["jti"] != jwt.decode(tokens.sign("id-1", "ann", "editor", 3)[0], options={"verify_signature": False})["jti"]


def test_the_key_of_rfc_8037_has_the_name_that_it_has_there(tmp_path: Path) -> None:
    secret = base64.urlsafe_b64decode("nWGxne_9WmC6hEr0kuwsxERJxWl7MmkZcDusAxyuf2A=")
    file = save(Ed25519PrivateKey.from_private_bytes(secret), tmp_path / "mounted.pem")
    (public,) = Tokens(AuthSettings(signing_key=file), tmp_path / "none").jwks()["keys"]
    assert public == {
        "kty": "OKP",
        "crv": "Ed25519",
        "x": "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo",
        "kid": "kPrK_qmxVWaYVA9wwBF6Iuo3vVzz7TxHCTwXBygrS4k",
        "use": "sig",
        "alg": "EdDSA",
    }
    assert not (tmp_path / "none").exists()


def test_others_check_our_tokens_with_the_public_keys(tokens: Tokens) -> None:
    keys = jwt.PyJWKSet.from_dict(json.loads(json.dumps(tokens.jwks())))
    token, made = tokens.sign("id-1", "ann", "viewer", 0)
    key = keys[jwt.get_unverified_header(token)["kid"]]
    assert jwt.decode(token, key, algorithms=["EdDSA"], audience="ours", issuer="us")["sub"] == made.account_id
    assert all("d" not in public for public in tokens.jwks()["keys"])


def claims_of(**changes: Any) -> dict[str, Any]:
    moment = int(time.time())
    claims: dict[str, Any] = {"iss": "us", "aud": "ours", "sub": "id-1", "jti": "j", "iat": moment, "nbf": moment}
    claims |= {"exp": moment + 60, "name": "ann", "role": "admin", "epoch": 0, **changes}
    return {name: value for name, value in claims.items() if value is not None}


FORGED_CLAIMS = {
    "expired": {"exp": 1},
    "expired a while ago": {"exp": int(time.time()) - 10},
    "for ever": {"exp": None},
    "until the end of time": {"exp": 10**20},
    "not yet": {"nbf": int(time.time()) + 36_000},
    "from tomorrow": {"iat": int(time.time()) + 36_000},
    "another issuer": {"iss": "them"},
    "no issuer": {"iss": None},
    "another audience": {"aud": "theirs"},
    "no audience": {"aud": None},
    "no subject": {"sub": None},
    "a number as subject": {"sub": 7},
    "no name of its own": {"jti": None},
    "no start": {"nbf": None},
    "an unheard-of role": {"role": "god"},
    "no role": {"role": None},
    "many roles": {"role": ["admin"]},
    "an epoch in words": {"epoch": "0"},
    "no epoch": {"epoch": None},
}


def test_what_is_made_up_here_is_good_but_for_what_is_said(tokens: Tokens, key: Ed25519PrivateKey) -> None:
    header = {"alg": "EdDSA", "typ": "at+jwt", "kid": tokens.jwks()["keys"][0]["kid"]}
    assert tokens.verify(compact(header, claims_of(), key.sign)).role == "admin"
    assert tokens.verify(compact({**header, "typ": "application/at+jwt"}, claims_of(), key.sign)).role == "admin"


@pytest.mark.parametrize("claims", FORGED_CLAIMS.values(), ids=FORGED_CLAIMS)
def test_claims_that_are_refused(tokens: Tokens, key: Ed25519PrivateKey, claims: dict[str, Any]) -> None:
    header = {"alg": "EdDSA", "typ": "at+jwt", "kid": tokens.jwks()["keys"][0]["kid"]}
    with pytest.raises(Unauthenticated, match=r"^(The token is not valid|The token has expired)\."):
        tokens.verify(compact(header, claims_of(**claims), key.sign))


def forged(tokens: Tokens, key: Ed25519PrivateKey) -> dict[str, str]:
    """Tokens that look good, by what is wrong with them."""
    good = {"alg": "EdDSA", "typ": "at+jwt", "kid": tokens.jwks()["keys"][0]["kid"]}
    token, _ = tokens.sign("id-1", "ann", "viewer", 0)
    head, body, signature = token.split(".")
    other = Ed25519PrivateKey.generate()
    raw = key.public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
    pem = key.public_key().public_bytes(PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    their_jwk = json.loads(jwt.algorithms.OKPAlgorithm.to_jwk(other.public_key()))

    def hs256(secret: bytes) -> Callable[[bytes], bytes]:
        return lambda data: hmac.digest(secret, data, hashlib.sha256)

    def made(header: Any, sign: Callable[[bytes], bytes] = key.sign) -> str:
        return compact(header, claims_of(), sign)

    nested = b'{"a":' * 500 + b"1" + b"}" * 500
    return {
        "none": made({**good, "alg": "none"}, lambda _: b""),
        "None": made({**good, "alg": "None"}, lambda _: b""),
        "no signature": f"{head}.{body}.",
        "no algorithm": made({"typ": "at+jwt", "kid": good["kid"]}),
        "HS256 with the public key": made({**good, "alg": "HS256"}, hs256(pem)),
        "HS256 with the raw public key": made({**good, "alg": "HS256"}, hs256(raw)),
        "HS256 with nothing": made({**good, "alg": "HS256"}, hs256(b"")),
        "another key under our name": made(good, other.sign),
        "a key that it brings along": made({**good, "jwk": their_jwk}, other.sign),
        "a key of an unknown name": made({**good, "kid": "x"}, other.sign),
        "no key's name": made({"alg": "EdDSA", "typ": "at+jwt"}),
        "a path as the key's name": made({**good, "kid": "../../keys/0001.pem"}),
        "a list as the key's name": made({**good, "kid": [good["kid"]]}),
        "an id token": made({**good, "typ": "JWT"}),
        "no type": made({"alg": "EdDSA", "kid": good["kid"]}),
        "another signature": f"{head}.{body}.{b64(bytes(64))}",
        "a changed body": f"{head}.{b64(json.dumps(claims_of()).encode())}.{signature}",
        "a shortened signature": token[:-4],
        "two parts": f"{head}.{body}",
        "four parts": token + ".e30",
        "a list as the header": made([good]),
        "a list as the claims": compact(good, [1], key.sign),
        "a text as the header": made(b"kid"),
        "bytes as the claims": compact(good, b"\xff\xfe", key.sign),
        "detached": made({**good, "b64": False, "crit": ["b64"]}),
        "an extension that must be understood": made({**good, "crit": ["exp2"], "exp2": 1}),
        "a deep header": f"{b64(b'[' * 2900)}..",
        "deep claims": compact(good, nested[:2400], key.sign),
        "nothing": "",
        "dots": "..",
        "another alphabet": "é.ü.ß",
        "half a character": "\ud800.e30.e30",
        "NUL": "\0" * 10,
        "very long": token + "A" * 8192,
    }


def test_forged_tokens_are_refused_in_words_of_our_own(tokens: Tokens, key: Ed25519PrivateKey) -> None:
    allowed = {"The token is not valid", "The token is not signed by this service", "It is no access token"}
    allowed.add("The token is too long")
    for what, token in forged(tokens, key).items():
        with pytest.raises(Unauthenticated) as caught:
            print(what, tokens.verify(token))  # who reads the failure wants to know which
        assert caught.value.fields["reason"] in allowed, what
        assert caught.value.__cause__ is None, what


def test_the_newest_key_signs_and_the_older_ones_are_good_until_they_are_deleted(tmp_path: Path) -> None:
    before = Tokens(SETTINGS, tmp_path)
    old, _ = before.sign("id-1", "ann", "viewer", 0)
    save(Ed25519PrivateKey.generate(), tmp_path / "0002.pem")
    between = Tokens(SETTINGS, tmp_path)
    new, _ = between.sign("id-1", "ann", "viewer", 0)
    assert between.verify(old).name == between.verify(new).name == "ann"
    assert jwt.get_unverified_header(old)["kid"] != jwt.get_unverified_header(new)["kid"]
    assert {public["kid"] for public in between.jwks()["keys"]} == {jwt.get_unverified_header(t)["kid"] for t in (old, new)}
    (tmp_path / "0001.pem").unlink()
    after = Tokens(SETTINGS, tmp_path)
    assert after.verify(new).name == "ann"
    for refusing, token in ((after, old), (before, new)):
        with pytest.raises(Unauthenticated, match="not signed by this service"):
            refusing.verify(token)


def test_processes_that_start_at_once_agree_on_one_key_that_only_its_owner_reads(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from scangraph.settings import AuthSettings; from scangraph.tokens import Tokens\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "print(Tokens(AuthSettings(), Path(sys.argv[1])).jwks()['keys'][0]['kid'])"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "keys")]
    processes = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, umask=0) for _ in range(4)]
    for process in processes:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    names = {process.communicate(timeout=60)[0].strip() for process in processes}
    assert len(names) == 1
    assert [path.name for path in (tmp_path / "keys").iterdir()] == ["0001.pem"]
    assert (tmp_path / "keys").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "keys" / "0001.pem").stat().st_mode & 0o777 == 0o600


def test_keys_that_are_none(tmp_path: Path) -> None:
    locked = serialization.BestAvailableEncryption(b"secret")
    files = {
        "another kind": save(rsa.generate_private_key(65537, 2048), tmp_path / "rsa.pem"),
        "kind": save(ed448.Ed448PrivateKey.generate(), tmp_path / "ed448.pem"),
        "cannot be understood": tmp_path / "text.pem",
        "understood": tmp_path / "locked.pem",
        "No such file": tmp_path / "missing.pem",
    }
    files["cannot be understood"].write_text("-----BEGIN PRIVATE KEY-----\nno\n-----END PRIVATE KEY-----\n")
    files["understood"].write_bytes(Ed25519PrivateKey.generate().private_bytes(PEM, PKCS8, locked))
    for reason, file in files.items():
        with pytest.raises(InvalidKey, match=reason) as caught:
            Tokens(AuthSettings(signing_key=file), tmp_path)
        assert "PRIVATE" not in caught.value.detail
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidKey, match="File exists"):
        Tokens(AuthSettings(), tmp_path / "file")
