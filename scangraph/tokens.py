"""Bearer tokens: made and checked with an Ed25519 key that never leaves the service (RFC 8725, RFC 9068)."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import secrets
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, get_args

import jwt
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from scangraph.contracts.api import Role
from scangraph.contracts.errors import FatalError, Unauthenticated
from scangraph.settings import AuthSettings

_ALGORITHM = "EdDSA"
_TYPE = "at+jwt"
#: A token is some 500 bytes. Nobody's parser sees what is much longer.
_LONGEST = 4096
_LEEWAY_SECONDS = 5
_ROLES: tuple[str, ...] = get_args(Role)


class InvalidKey(FatalError):
    """A signing key that is none."""

    code, title = "invalid-signing-key", "The signing key cannot be used"
    template = "{path}: {reason}. It must be an Ed25519 private key in PEM, without a passphrase."


class Claims(NamedTuple):
    """What a token that was found good says."""

    account_id: str
    name: str
    role: Role
    epoch: int
    jti: str
    expires_at: datetime


class Tokens:
    """Makes and checks access tokens.

    Parameters
    ----------
    settings : AuthSettings
        Issuer, audience, lifetimes, and perhaps the key's file.
    keys_folder : Path
        Where keys are where the settings name none. The newest one (by name) signs, all of them are good for checking: to
        change the key, put another one there; to revoke all tokens of the old one, delete it.

    Raises
    ------
    InvalidKey
    """

    def __init__(self, settings: AuthSettings, keys_folder: Path) -> None:
        self._settings = settings
        files = [settings.signing_key] if settings.signing_key else _key_files(keys_folder)
        self._keys: dict[str, Ed25519PublicKey] = {}
        for file in files:
            self._private = _read_key(file)
            self._kid = _thumbprint(self._private.public_key())
            self._keys[self._kid] = self._private.public_key()

    def sign(self, account_id: str, name: str, role: Role, epoch: int, seconds: int | None = None) -> tuple[str, Claims]:
        """Make a token; `epoch` is the account's, which revokes all tokens when it grows."""
        moment = int(datetime.now(UTC).timestamp())
        expires = moment + (seconds or self._settings.access_seconds)
        jti = str(uuid.uuid4())
        claims = {
            "iss": self._settings.issuer,
            "aud": self._settings.audience,
            "sub": account_id,
            "client_id": account_id,
            "name": name,
            "role": role,
            "epoch": epoch,
            "jti": jti,
            "iat": moment,
            "nbf": moment,
            "exp": expires,
        }
        token = jwt.encode(claims, self._private, algorithm=_ALGORITHM, headers={"kid": self._kid, "typ": _TYPE})
        return token, Claims(account_id, name, role, epoch, jti, datetime.fromtimestamp(expires, UTC))

    def verify(self, token: str) -> Claims:
        """Check a token. Nothing in it chooses the algorithm, and only keys of ours are looked at.

        Raises
        ------
        Unauthenticated
        """
        if len(token) > _LONGEST:
            raise Unauthenticated(reason="The token is too long")
        try:
            head = jwt.get_unverified_header(token)
            key = self._keys.get(str(head.get("kid", "")))
            if key is None:
                raise Unauthenticated(reason="The token is not signed by this service")
            if str(head.get("typ", "")).lower().removeprefix("application/") != _TYPE:
                raise Unauthenticated(reason="It is no access token")
            claims = jwt.decode(
                token,
                key,
                algorithms=[_ALGORITHM],
                issuer=self._settings.issuer,
                audience=self._settings.audience,
                leeway=_LEEWAY_SECONDS,
                options={"require": ["iss", "aud", "sub", "exp", "iat", "nbf", "jti"]},
            )
            role, epoch = claims["role"], claims["epoch"]
            if role not in _ROLES or not isinstance(epoch, int):
                raise Unauthenticated(reason="The token is not valid")
            expires = datetime.fromtimestamp(int(claims["exp"]), UTC)
            return Claims(str(claims["sub"]), str(claims["name"]), role, epoch, str(claims["jti"]), expires)
        except jwt.ExpiredSignatureError:
            raise Unauthenticated(reason="The token has expired") from None
        except (jwt.InvalidTokenError, KeyError, ValueError, TypeError, OverflowError, RecursionError):
            # What exactly was wrong helps only whoever forges one.
            raise Unauthenticated(reason="The token is not valid") from None

    def jwks(self) -> dict[str, Any]:
        """Return the public keys (RFC 7517), for others that check our tokens."""
        return {"keys": [{**_jwk(key), "kid": kid, "use": "sig", "alg": _ALGORITHM} for kid, key in self._keys.items()]}


def _key_files(folder: Path) -> list[Path]:
    """Return the keys in a folder, the one that signs last; the first start makes one.

    Race: several replicas start at once. The key is written under another name and then linked, which fails where there is one:
    everybody ends with the same file.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
    except OSError as error:
        raise InvalidKey(path=str(folder), reason=error.strerror or "the folder cannot be used") from error
    if not (files := sorted(folder.glob("*.pem"))):
        pem = Ed25519PrivateKey.generate().private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        temporary = folder / f".{secrets.token_hex(8)}"
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(pem)
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(temporary, folder / "0001.pem")
        temporary.unlink()
        files = sorted(folder.glob("*.pem"))
    return files


def _read_key(path: Path) -> Ed25519PrivateKey:
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except OSError as error:
        raise InvalidKey(path=str(path), reason=error.strerror or "it cannot be read") from error
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise InvalidKey(path=str(path), reason="it cannot be understood") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise InvalidKey(path=str(path), reason="it is a key of another kind")
    return key


def _jwk(key: Ed25519PublicKey) -> dict[str, str]:
    raw = key.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
    return {"crv": "Ed25519", "kty": "OKP", "x": base64.urlsafe_b64encode(raw).rstrip(b"=").decode()}


def _thumbprint(key: Ed25519PublicKey) -> str:
    """Return the key's name (RFC 7638): the hash of its members in lexical order."""
    canonical = json.dumps(_jwk(key), sort_keys=True, separators=(",", ":")).encode()
    return base64.urlsafe_b64encode(hashlib.sha256(canonical).digest()).rstrip(b"=").decode()
