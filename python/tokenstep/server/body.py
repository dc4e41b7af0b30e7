"""Request bodies: read within limits, parsed where they hold nobody up."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterable
from typing import Any, TypeVar

from pydantic import BaseModel
from pydantic_core import from_json
from starlette.requests import ClientDisconnect, Request

from tokenstep.completions.errors import RequestError
from tokenstep.server.errors import ApiError, ClientDisconnected, too_large

logger = logging.getLogger("tokenstep.server")

BODY_SECONDS = 60.0  # in which a body must have come
DISCARD_SECONDS = 10.0  # in which the rest of a body that is too large must have come
INLINE_BYTES = 16 << 10  # larger bodies are parsed in a thread, so that the event loop doesn't wait
MAX_REMEMBERED = 1000  # unknown fields; a client can make up any number
MAX_SHOWN = 64  # characters of an unknown field's name

Model = TypeVar("Model", bound=BaseModel)


async def read_body(request: Request, limit: int) -> bytes:
    """The body, which must be declared as JSON and have at most `limit` bytes, whatever its head says."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json" and not media_type.endswith("+json"):
        # a browser sends other types from any page without asking whether it may
        raise ApiError(
            415,
            f"Content-Type = {media_type[:MAX_SHOWN]!r}, expected 'application/json'",
            code="unsupported_media_type",
        )
    declared = request.headers.get("content-length", "")
    pieces = request.stream()
    if declared.isdecimal() and int(declared[:20]) > limit:
        if "expect" not in request.headers:  # else it waits for us to want it
            await _discard(pieces, limit)
        raise _body_too_large(limit)
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for piece in pieces:
                body += piece
                if len(body) > limit:
                    await _discard(pieces, limit)
                    raise _body_too_large(limit)
    except TimeoutError:
        message = f"the body has not come within {BODY_SECONDS:.0f} seconds"
        raise ApiError(408, message, code="timeout", headers={"Connection": "close"}) from None
    except ClientDisconnect:
        raise ClientDisconnected from None
    return bytes(body)


class BodyParser:
    """Turns bodies into requests; warns once of each field that nobody knows."""

    def __init__(self) -> None:
        self._warned: set[str] = set()

    async def read(self, request: Request, model: type[Model], limit: int) -> Model:
        """The request in the body that is on its way; parsed in a thread if that could take long."""
        body = await read_body(request, limit)
        if len(body) <= INLINE_BYTES:
            return self.parse(model, body)
        return await asyncio.to_thread(self.parse, model, body)

    def parse(self, model: type[Model], body: bytes) -> Model:
        """The request in `body`; raises RequestError or pydantic's ValidationError."""
        try:
            data = from_json(body, allow_inf_nan=False)
        except ValueError as error:
            raise RequestError(f"the body is no JSON: {error}", code="invalid_json") from None
        if not isinstance(data, dict):
            raise RequestError("the body is no JSON object", code="invalid_json")
        return model.model_validate(self._known(model, data))

    def _known(self, model: type[BaseModel], data: dict[str, Any]) -> dict[str, Any]:
        for name in data.keys() - model.model_fields.keys() - self._warned:
            if len(self._warned) < MAX_REMEMBERED:
                self._warned.add(name)
                logger.warning("ignored unknown field %r", name[:MAX_SHOWN])
        return {name: value for name, value in data.items() if name in model.model_fields}


async def _discard(pieces: AsyncIterable[bytes], limit: int) -> None:
    """Reads on, up to `limit` bytes more.

    Who closes a connection on which bytes still come resets it, and the client may never see the answer.
    """
    count = 0
    with contextlib.suppress(TimeoutError, ClientDisconnect):
        async with asyncio.timeout(DISCARD_SECONDS):
            async for piece in pieces:
                count += len(piece)
                if count > limit:
                    break


def _body_too_large(limit: int) -> ApiError:
    return too_large(f"the body is larger than {limit} bytes")
