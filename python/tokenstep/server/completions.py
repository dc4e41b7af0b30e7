"""POST /v1/completions: a body in, a completion or a stream of chunks out."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from tokenstep.completions.schema import Completion, CompletionChunk, CompletionRequest, StreamOptions
from tokenstep.completions.service import CompletionService
from tokenstep.server.body import BodyParser
from tokenstep.server.context import RequestContext, context_of
from tokenstep.server.disconnect import unless_disconnected
from tokenstep.server.errors import openapi_responses, too_large
from tokenstep.server.schema import HttpCompletionRequest, body_of
from tokenstep.server.sse import EventStream
from tokenstep.server.state import ServerState

STREAM = {  # without a schema: OpenAPI 3.1 has no words for the events of a stream
    "example": 'data: {"id": "cmpl-…", "choices": [{"index": 0, "text": " Berlin", …}], …}\n\n'
    "data: [DONE]\n\n",
}


def completions_router(state: ServerState) -> APIRouter:
    """The route, for the app to put under its prefixes."""
    router = APIRouter()
    parser = BodyParser()

    @router.post(
        "/completions",
        summary="Complete a prompt, or many",
        response_class=Response,
        responses={
            200: {
                "model": Completion,
                "description": "The completion; with stream = true CompletionChunks as server-sent events",
                "content": {"text/event-stream": STREAM},
            },
            **openapi_responses(400, 401, 404, 408, 413, 415, 422, 429, 500, 503),
        },
        openapi_extra=body_of(HttpCompletionRequest),
    )
    async def create_completion(request: Request) -> Response:
        service = state.require_service()
        service.loop.check_room()  # under too much load, a refusal must cost little
        wanted = await parser.read(request, HttpCompletionRequest, state.config.max_body_bytes)
        check_size(wanted, state.config.max_choices)
        context = context_of(request.scope)
        if wanted.stream:
            return await _stream(request, service, wanted, context, state.config.usage_chunk == "last")
        completion = await unless_disconnected(request.receive, service.complete_async(wanted))
        context.completion_id, context.usage = completion.id, completion.usage
        body = await asyncio.to_thread(completion.model_dump_json)
        return Response(body, media_type="application/json")

    return router


async def _stream(
    request: Request,
    service: CompletionService,
    wanted: HttpCompletionRequest,
    context: RequestContext,
    merges_usage: bool,
) -> EventStream:
    """The stream, once its first chunk is there: until then an error has its own status."""
    chunks = completion_chunks(service, wanted, context, merges_usage)

    async def first() -> CompletionChunk | None:
        return await anext(chunks, None)

    return EventStream(await unless_disconnected(request.receive, first()), chunks)


async def completion_chunks(
    service: CompletionService, wanted: CompletionRequest, context: RequestContext, merges_usage: bool
) -> AsyncGenerator[CompletionChunk]:
    """The chunks that the client asked for; the access log wants the usage in any case."""
    asked = wanted.stream_options or StreamOptions()
    options = StreamOptions(include_usage=True, continuous_usage_stats=asked.continuous_usage_stats)
    open_choices = num_prompts(wanted) * wanted.n
    last: CompletionChunk | None = None
    async with contextlib.aclosing(
        service.stream_async(wanted.model_copy(update={"stream_options": options}))
    ) as chunks:
        async for chunk in chunks:
            context.completion_id = chunk.id
            open_choices -= sum(choice.finish_reason is not None for choice in chunk.choices)
            if chunk.choices and not (merges_usage and asked.include_usage and not open_choices):
                yield chunk
            elif chunk.choices:
                last = chunk  # the usage is next
            else:
                context.usage = chunk.usage
                if last is not None:
                    last.usage = chunk.usage
                    yield last
                elif asked.include_usage:
                    yield chunk


def num_prompts(wanted: CompletionRequest) -> int:
    """How many prompts the request has."""
    prompt = wanted.prompt
    return 1 if isinstance(prompt, str) or isinstance(prompt[0], int) else len(prompt)


def check_size(wanted: CompletionRequest, max_choices: int) -> None:
    """Raises ApiError for more than `max_choices` choices."""
    choices = num_prompts(wanted) * max(wanted.n, wanted.best_of or 1)
    if choices > max_choices:
        raise too_large(f"prompts × max(n, best_of) = {choices}, expected at most {max_choices}")
