"""A server over the scripted model, in this process; and what tests ask of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from scripted_model import ScriptedModel, make_service, recite

from tokenstep.completions.service import CompletionService
from tokenstep.server.app import create_app
from tokenstep.server.config import ServerConfig
from tokenstep.server.state import ServerState

MODEL = "scripted"
BODY: dict[str, Any] = {"model": MODEL, "prompt": [100], "temperature": 0, "max_tokens": 12}
COMPLETIONS = "/v1/completions"


@dataclass
class Served:
    """All layers of one server."""

    model: ScriptedModel
    service: CompletionService
    state: ServerState
    app: Any


def serve_model(
    model: ScriptedModel | str = "all the same", sizes: dict[str, int] | None = None, **options: Any
) -> Served:
    """An application over a model that recites; `sizes` are the engine's."""
    model = recite(model) if isinstance(model, str) else model
    service = make_service(model, **(sizes or {}))
    state = ServerState(ServerConfig(**options), service)
    return Served(model, service, state, create_app(state))


def body(**fields: Any) -> dict[str, Any]:
    return {**BODY, **fields}
