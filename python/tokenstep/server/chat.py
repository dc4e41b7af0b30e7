"""POST /v1/chat/completions: a conversation in, a message or a stream of its pieces out."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from tokenstep.completions.chat import as_completion, chat_chunks, chat_completion
from tokenstep.completions.chat_schema import ChatCompletion, ChatCompletionChunk
from tokenstep.server.body import BodyParser
from tokenstep.server.completions import check_size, completion_chunks
from tokenstep.server.context import context_of
from tokenstep.server.disconnect import unless_disconnected
from tokenstep.server.errors import openapi_responses
from tokenstep.server.schema import HttpChatRequest, body_of
from tokenstep.server.sse import EventStream
from tokenstep.server.state import ServerState

STREAM = {
    "example": 'data: {"id": "chatcmpl-…", "choices": [{"index": 0, "delta": {"content": "Berlin"}}], …}\n\n'
    "data: [DONE]\n\n",
}


def chat_router(state: ServerState) -> APIRouter:
    """The route, for the app to put under its prefixes."""
    router = APIRouter()
    parser = BodyParser()

    @router.post(
        "/chat/completions",
        summary="Continue a conversation",
        response_class=Response,
        responses={
            200: {
                "model": ChatCompletion,
                "description": "The message; with stream = true ChatCompletionChunks as server-sent events",
                "content": {"text/event-stream": STREAM},
            },
            **openapi_responses(400, 401, 404, 408, 413, 415, 422, 429, 500, 503),
        },
        openapi_extra=body_of(HttpChatRequest),
    )
    async def create_chat_completion(request: Request) -> Response:
        service = state.require_service()
        service.loop.check_room()  # under too much load, a refusal must cost little
        asked = await parser.read(request, HttpChatRequest, state.config.max_body_bytes)
        wanted = await asyncio.to_thread(as_completion, asked, service.limits)
        check_size(wanted, state.config.max_choices)
        context = context_of(request.scope)
        if wanted.stream:
            merges_usage = state.config.usage_chunk == "last"
            chunks = chat_chunks(completion_chunks(service, wanted, context, merges_usage))

            async def first() -> ChatCompletionChunk | None:
                return await anext(chunks, None)

            return EventStream(await unless_disconnected(request.receive, first()), chunks)
        completion = await unless_disconnected(request.receive, service.complete_async(wanted))
        answer = chat_completion(completion)
        context.completion_id, context.usage = answer.id, answer.usage
        body = await asyncio.to_thread(answer.model_dump_json)
        return Response(body, media_type="application/json")

    return router
