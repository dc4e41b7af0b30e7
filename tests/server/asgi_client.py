"""Speaks ASGI to the application, one message at a time: what a real server does, without a socket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

Headers = dict[str, str]


@dataclass
class Reply:
    """A response as far as it has come."""

    status: int = 0
    headers: Headers = field(default_factory=dict)
    body: bytes = b""
    done: bool = False

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def frames(self) -> list[Any]:
        """The contents of server-sent events; "[DONE]" as itself."""
        parts = self.body.decode().split("\n\n")
        assert parts.pop() == ""
        assert all(part.startswith("data: ") for part in parts)
        return [part[6:] if part == "data: [DONE]" else json.loads(part[6:]) for part in parts]


class Exchange:
    """One request in flight."""

    def __init__(
        self, app: Any, method: str, path: str, headers: Headers, pieces: Iterable[bytes], stay: bool = True
    ) -> None:
        self.reply = Reply()
        self._incoming: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._changed = asyncio.Event()
        parts = list(pieces) or [b""]
        for index, piece in enumerate(parts):
            more = index < len(parts) - 1
            self._incoming.put_nowait({"type": "http.request", "body": piece, "more_body": more})
        if not stay:
            self.disconnect()
        path, _, query = path.partition("?")
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": query.encode(),
            "root_path": "",
            "headers": [(key.lower().encode(), value.encode("latin-1")) for key, value in headers.items()],
            "client": ("test", 1),
            "server": ("test", 80),
        }
        self.task = asyncio.create_task(app(scope, self._incoming.get, self._send))

    def disconnect(self) -> None:
        self._incoming.put_nowait({"type": "http.disconnect"})

    @property
    def unread(self) -> int:
        """Messages that the application hasn't asked for."""
        return self._incoming.qsize()

    async def until(self, condition: Callable[[Reply], bool]) -> Reply:
        """Waits until the reply is such."""
        while not condition(self.reply):
            self._changed.clear()
            await asyncio.wait_for(self._changed.wait(), 20)
        return self.reply

    async def whole(self) -> Reply:
        await asyncio.wait_for(self.task, 30)
        assert self.reply.done
        return self.reply

    async def _send(self, message: dict[str, Any]) -> None:
        reply = self.reply
        if message["type"] == "http.response.start":
            assert not reply.status, "a response begins once"
            reply.status = message["status"]
            reply.headers = {key.decode(): value.decode() for key, value in message["headers"]}
        else:
            assert not reply.done, "nothing follows a response's end"
            reply.body += message.get("body", b"")
            reply.done = not message.get("more_body", False)
        self._changed.set()


class Client:
    """Requests to one application, from inside an event loop."""

    def __init__(self, app: Any, headers: Headers | None = None) -> None:
        self.app = app
        self.headers = headers or {}

    def begin(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        headers: Headers | None = None,
        pieces: Iterable[bytes] | None = None,
    ) -> Exchange:
        sent = dict(self.headers)
        if body is not None or pieces is not None:
            sent["content-type"] = "application/json"
        content = [json.dumps(body).encode()] if pieces is None and body is not None else pieces or []
        return Exchange(self.app, method, path, {**sent, **(headers or {})}, content)

    async def request(self, method: str, path: str, body: Any = None, **options: Any) -> Reply:
        return await self.begin(method, path, body, **options).whole()

    async def get(self, path: str, **options: Any) -> Reply:
        return await self.request("GET", path, **options)

    async def post(self, path: str, body: Any = None, **options: Any) -> Reply:
        return await self.request("POST", path, body, **options)
