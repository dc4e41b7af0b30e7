"""The ASGI application: routes, and the layers around them."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response

from tokenstep._version import __version__
from tokenstep.completions.chat_schema import ChatCompletionChunk
from tokenstep.completions.schema import CompletionChunk
from tokenstep.server.auth import PUBLIC_PATHS, KeyMiddleware
from tokenstep.server.chat import chat_router
from tokenstep.server.completions import completions_router
from tokenstep.server.context import ContextMiddleware, ErrorMiddleware
from tokenstep.server.errors import ApiError
from tokenstep.server.information import models_router, operations_router, tokenizer_router
from tokenstep.server.schema import (
    REFERENCES,
    DetokenizeRequest,
    HttpChatRequest,
    HttpCompletionRequest,
    TokenizeRequest,
    request_schema,
)
from tokenstep.server.state import ServerState

API_PREFIX = "/v1"
DESCRIPTION = "Completions with every sampling parameter. Every route under /v1 is there without it too."
CODES = {404: "not_found", 405: "method_not_allowed"}


def create_app(state: ServerState) -> FastAPI:
    """The application over `state`, whose service may come later."""
    config = state.config
    app = FastAPI(
        title="tokenstep",
        version=__version__,
        description=DESCRIPTION,
        redirect_slashes=False,
        separate_input_output_schemas=False,
        redoc_url=None,
    )
    for prefix, shown in ((API_PREFIX, True), ("", False)):
        app.include_router(completions_router(state), prefix=prefix, include_in_schema=shown)
        app.include_router(chat_router(state), prefix=prefix, include_in_schema=shown)
        app.include_router(models_router(state), prefix=prefix, include_in_schema=shown)
        app.include_router(tokenizer_router(state), prefix=prefix, include_in_schema=not shown)
    app.include_router(operations_router(state))

    @app.exception_handler(HTTPException)
    async def refuse(_: Request, error: HTTPException) -> Response:
        message = "there is no such path" if error.status_code == 404 else str(error.detail)
        return ApiError(
            error.status_code, message, code=CODES.get(error.status_code), headers=error.headers
        ).response()

    app.add_middleware(KeyMiddleware, keys=config.api_keys, protect_metrics=config.protect_metrics)
    app.add_middleware(ErrorMiddleware, validation_status=config.validation_status)
    if config.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.allowed_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id", "Retry-After"],
        )
    app.add_middleware(ContextMiddleware, state=state)
    app.openapi = lambda: _openapi(app, state)  # type: ignore[method-assign]
    return app


def _openapi(app: FastAPI, state: ServerState) -> dict[str, Any]:
    """FastAPI's description, with the bodies that the routes parse themselves, and the keys."""
    if app.openapi_schema:
        return app.openapi_schema
    schema = get_openapi(
        title=app.title,
        version=app.version,
        description=app.description,
        routes=app.routes,
        separate_input_output_schemas=False,
    )
    components = schema.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    for unused in ("HTTPValidationError", "ValidationError"):  # FastAPI's own form, of which nothing comes
        schemas.pop(unused, None)
    del schema["paths"][f"{API_PREFIX}/models/{{model}}"]["get"]["responses"]["422"]
    for request in (HttpCompletionRequest, HttpChatRequest):
        schemas[request.__name__] = written = request_schema(request)
        schemas |= written.pop("$defs", {})
    parsed_here: tuple[type[BaseModel], ...] = (
        TokenizeRequest,
        DetokenizeRequest,
        CompletionChunk,
        ChatCompletionChunk,
    )
    for model in parsed_here:
        written = model.model_json_schema(ref_template=REFERENCES)
        for name, definition in written.pop("$defs", {}).items():
            schemas.setdefault(name, definition)
        schemas[model.__name__] = written
    if state.config.api_keys:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        public = PUBLIC_PATHS - ({"/metrics"} if state.config.protect_metrics else set())
        for path, methods in schema["paths"].items():
            for operation in methods.values():
                operation["security"] = [] if path in public else [{"key": []}]
    app.openapi_schema = schema
    return schema
