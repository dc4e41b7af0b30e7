"""What all routes share: the service once it is there, and what the server is about."""

from __future__ import annotations

import time
from typing import Literal

from tokenstep.completions.service import CompletionService
from tokenstep.server.config import ServerConfig
from tokenstep.server.errors import unavailable
from tokenstep.server.metrics import Metrics

Phase = Literal["loading", "ready", "draining"]


class ServerState:
    """One server's state, changed in the event loop alone.

    Attributes:
        config: the options.
        service: None while the model loads.
        phase: what the server is about.
        started: when `service` came, in seconds since 1970.
        in_flight: requests that haven't been answered to the end.
        metrics: what /metrics shows.
    """

    def __init__(self, config: ServerConfig, service: CompletionService | None = None) -> None:
        self.config = config
        self.metrics = Metrics()
        self.service: CompletionService | None = None
        self.phase: Phase = "loading"
        self.started = 0
        self.in_flight = 0
        if service is not None:
            self.set_service(service)

    def set_service(self, service: CompletionService) -> None:
        """The model is there."""
        self.service = service
        self.started = int(time.time())
        self.phase = "ready"
        self.metrics.observe(service.loop)

    def require_service(self) -> CompletionService:
        """The service; raises ApiError while it can't be used."""
        if self.phase == "draining":
            raise unavailable("the server is shutting down", "shutting_down")
        if self.service is None:
            raise unavailable("the model is being loaded", "loading")
        return self.service

    def health(self) -> str:
        """The phase; "stalled" for an engine that makes no progress, "stopped" for one that has ended."""
        if self.phase != "ready" or self.service is None:
            return self.phase
        loop = self.service.loop
        if loop.is_healthy():
            return "ready"
        return "stopped" if loop.state == "stopped" else "stalled"
