"""POST /v1/next_token: what the token after a prompt and some output is drawn from."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from tokenstep.completions.next_token import NextToken, next_token
from tokenstep.server.body import BodyParser
from tokenstep.server.disconnect import unless_disconnected
from tokenstep.server.errors import openapi_responses
from tokenstep.server.schema import NextTokenRequest, body_of
from tokenstep.server.state import ServerState


def next_token_router(state: ServerState) -> APIRouter:
    """The route, for the app to put under its prefixes."""
    router = APIRouter()
    parser = BodyParser()

    @router.post(
        "/next_token",
        summary="Show what the next token is drawn from",
        response_model=NextToken,
        responses=openapi_responses(400, 401, 404, 408, 413, 415, 422, 429, 500, 503),
        openapi_extra=body_of(NextTokenRequest),
    )
    async def show_next_token(request: Request) -> Response:
        service = state.require_service()
        service.loop.check_room()
        wanted = await parser.read(request, NextTokenRequest, state.config.max_body_bytes)
        work = next_token(service, wanted, wanted.output_tokens, wanted.top)
        found = await unless_disconnected(request.receive, work)
        return Response(found.model_dump_json(), media_type="application/json")

    return router
