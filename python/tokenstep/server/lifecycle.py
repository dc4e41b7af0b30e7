"""A server's life: the port opens, the model loads, requests are served; a signal drains, a second aborts."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType

import uvicorn

from tokenstep.completions.service import CompletionService
from tokenstep.server.app import create_app
from tokenstep.server.config import ServerConfig
from tokenstep.server.state import ServerState

logger = logging.getLogger("tokenstep.server")

POLL_SECONDS = 0.05
FAREWELL_SECONDS = 5.0  # at most, that requests which failed by an abort have to be answered
BACKLOG = 2048  # connections that wait to be accepted
INCOMPLETE = 1
SIGNALLED = 128  # plus the signal's number, as shells have it


def serve(config: ServerConfig, load: Callable[[], CompletionService]) -> int:
    """Serves until a signal comes; `load` runs in a thread once the port is open.

    Returns:
        The exit code: 0 if all requests in flight were finished, 1 if `drain_seconds` weren't enough, 128
        plus the signal's number if a second signal came.

    Raises:
        RuntimeError: the address can't be used.
        Exception: what `load` raises.
    """
    listener = _listen(config.host, config.port)
    with listener:
        logger.info("listening on %s", _url(listener, config.ssl_certfile is not None))
        return asyncio.run(_Lifecycle(config, load, listener).run())


class _Server(uvicorn.Server):
    """Leaves signals to the lifecycle."""

    on_signal: Callable[[int], None]

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.on_signal(sig)


class _Lifecycle:
    def __init__(
        self, config: ServerConfig, load: Callable[[], CompletionService], listener: socket.socket
    ) -> None:
        self._config = config
        self._load = load
        self._listener = listener
        self._state = ServerState(config)
        self._signals: list[int] = []
        self._load_error: BaseException | None = None
        self._changed = asyncio.Event()
        self._server = _Server(
            uvicorn.Config(
                create_app(self._state),
                log_config=None,
                access_log=False,
                lifespan="off",
                ws="none",
                server_header=False,
                proxy_headers=False,
                timeout_graceful_shutdown=int(FAREWELL_SECONDS),
                ssl_certfile=config.ssl_certfile,
                ssl_keyfile=config.ssl_keyfile,
            )
        )

    async def run(self) -> int:
        self._tasks = asyncio.get_running_loop()
        self._server.on_signal = self._take_signal
        serving = asyncio.create_task(self._server.serve(sockets=[self._listener]))
        loading = threading.Thread(target=self._load_in_thread, name="tokenstep-load", daemon=True)
        loading.start()
        stopping = asyncio.create_task(self._changed.wait())
        await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
        code = await self._drain() if self._load_error is None else INCOMPLETE
        self._server.should_exit = True
        await serving
        if self._load_error is not None:
            raise self._load_error
        if loading.is_alive():  # nothing can stop it, and an exit under its feet could crash
            logger.info("stopped while the model was being loaded")
            _flush()
            os._exit(code)
        return code

    def _take_signal(self, number: int) -> None:
        """Called between any two instructions of the main thread."""
        self._signals.append(number)
        self._tasks.call_soon_threadsafe(self._changed.set)

    def _load_in_thread(self) -> None:
        begin = time.monotonic()
        try:
            service = self._load()
        except BaseException as error:
            self._load_error = error
            self._tasks.call_soon_threadsafe(self._changed.set)
            return
        self._tasks.call_soon_threadsafe(self._be_ready, service, time.monotonic() - begin)

    def _be_ready(self, service: CompletionService, seconds: float) -> None:
        self._state.set_service(service)
        logger.info("%s is ready after %.1f s", service.limits.model_name, seconds)
        if self._signals:
            self._state.phase = "draining"

    async def _drain(self) -> int:
        """Lets requests in flight end, as far as time and a second signal allow; returns the exit code."""
        state, limit = self._state, self._config.drain_seconds
        state.phase = "draining"
        logger.info("shutting down: %d requests in flight have %g s", state.in_flight, limit)
        if state.service is not None:
            state.service.loop.close()
        await self._until_idle(limit, or_signalled=True)
        unfinished = state.in_flight
        if state.service is not None:
            await asyncio.to_thread(state.service.loop.abort)
        if not unfinished:
            logger.info("all requests were finished")
            return 0
        logger.warning("%d requests were aborted", unfinished)
        await self._until_idle(FAREWELL_SECONDS, or_signalled=False)
        return SIGNALLED + self._signals[1] if len(self._signals) > 1 else INCOMPLETE

    async def _until_idle(self, seconds: float, *, or_signalled: bool) -> None:
        deadline = time.monotonic() + seconds
        while self._state.in_flight and time.monotonic() < deadline:
            if or_signalled and len(self._signals) > 1:
                break
            await asyncio.sleep(POLL_SECONDS)


def _listen(host: str, port: int) -> socket.socket:
    """An open socket at this address; raises RuntimeError saying why there can't be one."""
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise RuntimeError(f"--host {host}: {error.strerror or error}") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise RuntimeError(f"can't listen on {host} port {port}: {error.strerror or error}") from None
    return listener


def _url(listener: socket.socket, secure: bool) -> str:
    """Where a browser finds it."""
    host, port = listener.getsockname()[:2]
    return f"http{'s' * secure}://{f'[{host}]' if ':' in host else host}:{port}"


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        if stream:
            stream.flush()
