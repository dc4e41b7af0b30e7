"""What a server is set up with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ServerConfig:
    """Options of one server.

    Attributes:
        host: the address to listen on.
        port: 0 takes a free one.
        api_keys: any of them opens the protected routes; none: everything is open.
        protect_metrics: /metrics wants a key as well.
        allowed_origins: web pages from there may call the server ("*": from anywhere).
        max_body_bytes: larger request bodies are refused.
        max_choices: the most choices of one request, prompts × max(n, best_of).
        validation_status: of a request that is malformed or out of range.
        usage_chunk: where a stream reports usage: in an "extra" last frame or in the "last" content frame.
        drain_seconds: how long requests in flight may go on after the first signal to stop.
        access_log: whether every request is logged.
        root_path: the prefix under which a proxy serves this.
        ssl_certfile: a certificate chain, to speak HTTPS; with `ssl_keyfile`.
        ssl_keyfile: its private key.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    protect_metrics: bool = False
    allowed_origins: tuple[str, ...] = ()
    max_body_bytes: int = 16 << 20
    max_choices: int = 2048
    validation_status: Literal[400, 422] = 422
    usage_chunk: Literal["extra", "last"] = "extra"
    drain_seconds: float = 30.0
    access_log: bool = True
    root_path: str = ""
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None
