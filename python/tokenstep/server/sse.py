"""A stream of chunks as server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tokenstep.completions.chat_schema import ChatCompletionChunk
from tokenstep.completions.schema import CompletionChunk
from tokenstep.server.disconnect import unless_disconnected
from tokenstep.server.errors import as_api_error, internal_error

logger = logging.getLogger("tokenstep.server")

DONE = b"data: [DONE]\n\n"
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # a proxy must not hold frames back
INLINE_ENTRIES = 64  # chunks with log probabilities of more tokens are written in a thread


Chunk = CompletionChunk | ChatCompletionChunk


class EventStream(Response):
    """Sends the chunks one by one, then `[DONE]`; closes `rest` when the client goes away.

    An error after the first byte is a frame like another.
    """

    media_type = "text/event-stream"

    def __init__(self, first: Chunk | None, rest: AsyncGenerator[Chunk]) -> None:
        super().__init__(headers=HEADERS)
        del self.headers["content-length"]
        self._first = first
        self._rest = rest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the whole response."""
        async with contextlib.aclosing(self._rest):
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await unless_disconnected(receive, self._send_all(send))

    async def _send_all(self, send: Send) -> None:
        try:
            if self._first is not None:
                await _send(send, await _encode(self._first))
            async for chunk in self._rest:
                await _send(send, await _encode(chunk))
        except Exception as error:
            known = as_api_error(error, 422)
            if known is None:
                logger.exception("a stream has failed")
            await _send(send, _frame((known or internal_error()).body.model_dump_json()))
        await send({"type": "http.response.body", "body": DONE, "more_body": False})


async def _encode(chunk: Chunk) -> bytes:
    entries = sum(len(choice.logprobs.content) for choice in chunk.choices if choice.logprobs)
    if entries > INLINE_ENTRIES or (isinstance(chunk, CompletionChunk) and chunk.prompt):
        return _frame(await asyncio.to_thread(chunk.model_dump_json))
    return _frame(chunk.model_dump_json())


def _frame(contents: str) -> bytes:
    return f"data: {contents}\n\n".encode()


async def _send(send: Send, frame: bytes) -> None:
    await send({"type": "http.response.body", "body": frame, "more_body": True})
