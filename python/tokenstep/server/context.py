"""What wraps every request: its id, one line in the access log, its metrics, and an answer to any error."""

from __future__ import annotations

import logging
import re
import secrets
import time
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tokenstep.completions.schema import Usage
from tokenstep.server.auth import PUBLIC_PATHS, route_path
from tokenstep.server.errors import CLIENT_CLOSED, ClientDisconnected, as_api_error, internal_error
from tokenstep.server.state import ServerState

logger = logging.getLogger("tokenstep.server")
access_log = logging.getLogger("tokenstep.access")

SANE_ID = re.compile(r"[A-Za-z0-9._:\-]{1,128}")
MAX_PATH = 100  # characters in the log of a path that no route has
SCOPE_KEY = "tokenstep.context"
UNMATCHED = "unmatched"


@dataclass
class RequestContext:
    """What is known of one HTTP request.

    Attributes:
        id: from X-Request-Id, else made here.
        begin: seconds of the monotonic clock.
        completion_id: of the response, once there is one.
        usage: its tokens, once they are known.
        status: of the response, once it has begun.
    """

    id: str
    begin: float = field(default_factory=time.monotonic)
    completion_id: str | None = None
    usage: Usage | None = None
    status: int | None = None


def context_of(scope: Scope) -> RequestContext:
    """What `ContextMiddleware` knows of the request."""
    context: RequestContext = scope[SCOPE_KEY]
    return context


class ContextMiddleware:
    """The outermost layer: gives each request its id, its line in the log and its place in the metrics."""

    def __init__(self, app: ASGIApp, state: ServerState) -> None:
        self._app = app
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope["root_path"] = scope.get("root_path") or self._state.config.root_path
        context = scope[SCOPE_KEY] = RequestContext(_request_id(scope))
        counted = route_path(scope) not in PUBLIC_PATHS
        self._state.in_flight += counted
        try:
            await self._answer(scope, receive, send, context)
        finally:
            self._state.in_flight -= counted
            self._report(scope, context)

    async def _answer(self, scope: Scope, receive: Receive, send: Send, context: RequestContext) -> None:
        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                context.status = message["status"]
                headers = [*message.get("headers", []), (b"x-request-id", context.id.encode())]
                if self._state.phase == "draining" and b"connection" not in dict(headers):
                    headers.append((b"connection", b"close"))
                message = {**message, "headers": headers}
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except ClientDisconnected:
            context.status = CLIENT_CLOSED

    def _report(self, scope: Scope, context: RequestContext) -> None:
        seconds = time.monotonic() - context.begin
        route = getattr(scope.get("route"), "path", UNMATCHED)
        status = context.status or CLIENT_CLOSED
        self._state.metrics.http_request(scope["method"], route, status, seconds)
        if not self._state.config.access_log:
            return
        usage = context.usage
        access_log.info(
            "%s %s %s %s %d %s %.1f ms%s",
            context.id,
            _client(scope),
            scope["method"][:16],
            quote(scope["path"][:MAX_PATH]),
            status,
            f"{usage.prompt_tokens}+{usage.completion_tokens} tokens" if usage else "-",
            1000 * seconds,
            f" {context.completion_id}" if context.completion_id else "",
        )


class ErrorMiddleware:
    """Answers whatever is raised inside, foreseen or not."""

    def __init__(self, app: ASGIApp, validation_status: int) -> None:
        self._app = app
        self._validation_status = validation_status

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        try:
            await self._app(scope, receive, send)
        except ClientDisconnected:
            raise
        except Exception as error:
            known = as_api_error(error, self._validation_status)
            context = scope.get(SCOPE_KEY)
            if known is None:
                logger.exception("request %s has failed", context and context.id)
            if context is None or context.status is not None:  # too late to say it: the connection breaks off
                raise
            await (known or internal_error()).response()(scope, receive, send)


def _request_id(scope: Scope) -> str:
    given = _header(scope, b"x-request-id")
    return given if SANE_ID.fullmatch(given) else f"req-{secrets.token_hex(12)}"


def _header(scope: Scope, name: bytes) -> str:
    value: Any = next((value for key, value in scope["headers"] if key == name), b"")
    return str(value.decode("latin-1"))


def _client(scope: Scope) -> str:
    client = scope.get("client")
    return f"{client[0]}:{client[1]}" if client else "-"
