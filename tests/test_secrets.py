"""Nothing secret is in the files of the repository."""

from __future__ import annotations

import math
import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

#: Things that are secret whatever stands around them.
KINDS = {
    "a private key": r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----\s+[A-Za-z0-9+/=]{40}",
    "a key of AWS": r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b",
    "a token of GitHub": r"\b(?:gh[pousr]_[A-Za-z0-9]{36}|github_pat_[A-Za-z0-9_]{60,})",
    "a token of Slack": r"\bxox[abprs]-[A-Za-z0-9-]{20,}",
    "a key of Google": r"\bAIza[A-Za-z0-9_-]{35}\b",
    "a token of a registry": r"\b(?:pypi-[A-Za-z0-9_-]{50,}|npm_[A-Za-z0-9]{36})",
    "a signed token": r"\beyJ[A-Za-z0-9_-]{15,}\.eyJ[A-Za-z0-9_-]{15,}\.[A-Za-z0-9_-]{20,}",
    "a password in an address": r"\b[a-z][a-z0-9+]{2,}://[^\s/:@\"'{}$<]+:(?P<value>[^\s/@\"'{}$<]{6,})@",
}
#: `password = "…"`: what looks random is secret.
NAMED = re.compile(
    r"(?i)(?:password|passwd|secret|token|api_?key|access_?key)\w*[\"']?\s*[:=]\s*[\"'](?P<value>[^\s\"']{12,})[\"']"
)
#: Bits a character, above which a text of its length is nobody's words.
RANDOM = 3.7
#: What people write where a password would stand.
WORDS = re.compile(r"(?i)password|secret|token|example|correct|horse|battery|0123456789|abcdef|[./]|\.\.\.|…|^scangraph")


def entropy(text: str) -> float:
    """Bits a character."""
    return -sum(n / len(text) * math.log2(n / len(text)) for n in Counter(text).values())


def findings(text: str) -> Iterator[str]:
    for kind, pattern in KINDS.items():
        for match in re.finditer(pattern, text):
            if not WORDS.search(match.groupdict().get("value") or ""):
                yield kind
    for match in NAMED.finditer(text):
        if not WORDS.search(match["value"]) and entropy(match["value"]) > RANDOM:
            yield f"what is called {match[0][:20]!r}"


def git(*words: str) -> bytes:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, check=True).stdout


@pytest.mark.parametrize(
    "text",
    [
        "-----BEGIN " + "PRIVATE KEY-----\n" + "MC4CAQAwBQYDK2VwBCIEIHVx" * 2,
        "aws = 'AKIA" + "Z7Q2M4X8C1V5B9N3'",
        "url = postgresql://scangraph:" + "hX8kQ2vL9p@db/scangraph",
        'password = "' + 'q7XkP0zLm3VbT9wR"',
        "SECRET_ACCESS_KEY: '" + "8sJd0Qm1Zx7Kp4Lr2Tn6'",
    ],
)
def test_a_secret_would_be_found(text: str) -> None:
    assert list(findings(text))


@pytest.mark.parametrize(
    "text",
    [
        'password = "a good long password"',
        "postgresql://user:password@host/name",
        'token="$TOKEN"',
        "secret: { file: secrets/x }",
    ],
)
def test_words_are_no_secrets(text: str) -> None:
    assert list(findings(text)) == []


def test_no_file_holds_one() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("this is no checkout")
    found = {}
    for name in git("ls-files", "-z").decode().split("\0"):
        path = ROOT / name
        if name and path.is_file() and path.suffix not in {".safetensors", ".png", ".gz", ".onnx", ".binpb"}:
            told = list(findings(path.read_text(errors="ignore")))
            if told and Path(name).name != "test_secrets.py":
                found[name] = told
    assert found == {}


def test_what_is_secret_is_ignored_by_git_and_by_images() -> None:
    for name in ("cluster/secrets/s3.json", ".scangraph/keys/key.pem", ".scangraph/admin-password"):
        assert subprocess.run(["git", "check-ignore", "-q", name], cwd=ROOT, check=False).returncode == 0, name
    ignored = (ROOT / "cluster/images/Dockerfile.dockerignore").read_text().split()
    assert {"cluster/secrets", ".scangraph"} <= set(ignored)
