"""API keys: where they come from, and the layer that asks for them."""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Iterable
from pathlib import Path

from starlette.types import ASGIApp, Receive, Scope, Send

from tokenstep.server.errors import ApiError

ENVIRONMENT = "TOKENSTEP_API_KEY"
PUBLIC_PATHS = frozenset({"/health", "/", "/metrics"})


def collect_keys(given: Iterable[str], file: Path | None) -> tuple[str, ...]:
    """Keys of the command line, of the environment (separated by commas) and of a file (one a line).

    Raises ValueError for one that no header can carry, OSError for a file that can't be read.
    """
    keys = [*given, *os.environ.get(ENVIRONMENT, "").split(",")]
    if file is not None:
        lines = file.read_text(encoding="utf-8").splitlines()
        found = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
        if not found:
            raise ValueError(f"{file} has no API key")
        keys += found
    keys = [key.strip() for key in keys]
    for key in filter(None, keys):
        if not key.isascii() or not key.isprintable() or " " in key:
            raise ValueError("an API key has characters that are no visible ASCII")
    if any(not key for key in given):
        raise ValueError("an API key is empty")
    return tuple(dict.fromkeys(filter(None, keys)))


class KeyMiddleware:
    """Lets a request pass that has one of the keys as its bearer token, or wants a public path."""

    def __init__(self, app: ASGIApp, keys: Iterable[str], protect_metrics: bool) -> None:
        self._app = app
        self._digests = [_digest(key.encode()) for key in keys]
        self._public = PUBLIC_PATHS - ({"/metrics"} if protect_metrics else set())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        if scope["type"] == "http" and self._digests and route_path(scope) not in self._public:
            self._check(scope)
        await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        given = next((value for key, value in scope["headers"] if key == b"authorization"), b"")
        scheme, _, token = given.partition(b" ")
        digest = _digest(token.strip())
        matches = [hmac.compare_digest(digest, known) for known in self._digests]  # all, whichever fits
        if not any(matches) or scheme.lower() != b"bearer":
            raise ApiError(
                401,
                "expected an API key: Authorization: Bearer <key>" if not given else "the API key is wrong",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )


def route_path(scope: Scope) -> str:
    """The path as routes have it: without the prefix that a proxy may leave in front."""
    path: str = scope["path"]
    prefix: str = scope.get("root_path", "")
    return path.removeprefix(prefix) if prefix and path.startswith(f"{prefix}/") else path


def _digest(key: bytes) -> bytes:
    """All of one length, so that a comparison takes the same time."""
    return hashlib.sha256(key).digest()
