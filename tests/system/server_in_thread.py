"""A real HTTP server in a thread of this process, over a model that is loaded already."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from tokenstep.completions.service import CompletionService
from tokenstep.server.app import create_app
from tokenstep.server.config import ServerConfig
from tokenstep.server.state import ServerState


@contextmanager
def server_in_thread(service: CompletionService) -> Iterator[str]:
    """The address, as host:port."""
    app = create_app(ServerState(ServerConfig(), service))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    host, port = server.servers[0].sockets[0].getsockname()[:2]
    try:
        yield f"{host}:{port}"
    finally:
        server.should_exit = True
        thread.join(10)
