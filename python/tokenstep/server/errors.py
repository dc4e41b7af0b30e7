"""Errors as HTTP responses: each body says it in both forms, `error` and `detail`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError
from starlette.responses import JSONResponse

from tokenstep.completions.errors import GenerationError, RequestError, status_of
from tokenstep.completions.schema import request_error
from tokenstep.engine import EngineStopped, QueueFull

CLIENT_CLOSED = 499
"""In logs and metrics: the client went away before it had its response."""
RETRY_SECONDS = 1.0  # after which a server that loads or drains may have changed


class ErrorInfo(BaseModel):
    """The error as OpenAI's clients read it."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorDetail(BaseModel):
    """One thing that is wrong, as FastAPI's clients read it."""

    loc: list[str | int]
    msg: str
    type: str


class ErrorBody(BaseModel):
    """The body of every response that isn't a success."""

    error: ErrorInfo
    detail: list[ErrorDetail]


class ApiError(Exception):
    """An error with its status. `detail` defaults to the one thing that `message` says."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        detail: Sequence[ErrorDetail] = (),
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.headers = dict(headers or {})
        loc: list[str | int] = ["body", param] if param else []
        self.body = ErrorBody(
            error=ErrorInfo(message=message, type=kind, param=param, code=code),
            detail=list(detail) or [ErrorDetail(loc=loc, msg=message, type=code or kind)],
        )

    def response(self) -> JSONResponse:
        """The whole response."""
        return JSONResponse(self.body.model_dump(), self.status, self.headers)


class ClientDisconnected(Exception):
    """Nobody waits for the response any more."""


def unavailable(why: str, code: str) -> ApiError:
    """The server can't take requests now."""
    return ApiError(503, why, kind="service_unavailable", code=code, headers=_retry_after(RETRY_SECONDS))


def too_large(message: str) -> ApiError:
    """The request is larger than this server takes; the connection isn't used further."""
    return ApiError(413, message, code="request_too_large", headers={"Connection": "close"})


def as_api_error(error: Exception, validation_status: int) -> ApiError | None:
    """The response to an error of a completion; None for one that nobody foresaw."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ValidationError):
        return _from_validation(error, validation_status)
    if isinstance(error, RequestError):
        status = status_of(error, validation_status)
        return ApiError(status, error.message, code=error.code, param=error.param)
    if isinstance(error, QueueFull):
        return ApiError(
            429,
            str(error),
            kind="rate_limit_error",
            code="rate_limit_exceeded",
            headers=_retry_after(error.retry_after),
        )
    if isinstance(error, EngineStopped):
        return unavailable(str(error), "shutting_down")
    if isinstance(error, GenerationError):
        if error.kind in ("stopped", "forked"):
            return unavailable(str(error), "shutting_down")
        return ApiError(500, str(error), kind="server_error", code=error.kind)
    return None


def internal_error() -> ApiError:
    """What a client is told of an error that nobody foresaw; the log has the rest."""
    return ApiError(500, "internal error", kind="server_error", code="internal_error")


def _from_validation(error: ValidationError, status: int) -> ApiError:
    first = request_error(error)
    detail = [
        ErrorDetail(loc=["body", *found["loc"]], msg=found["msg"], type=found["type"])
        for found in error.errors(include_url=False, include_input=False, include_context=False)
    ]
    return ApiError(status, first.message, code=first.code, param=first.param, detail=detail)


def _retry_after(seconds: float) -> dict[str, str]:
    return {"Retry-After": str(math.ceil(seconds))}


def openapi_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What a route's documentation says of these."""
    return {status: {"model": ErrorBody, "description": DESCRIPTIONS[status]} for status in statuses}


DESCRIPTIONS = {
    400: "The prompt, or prompt and max_tokens, exceed the context",
    401: "No API key, or a wrong one",
    404: "No such model or adapter",
    405: "Not a method of this route",
    408: "The body came too slowly",
    413: "The request is too large",
    415: "The body isn't declared to be JSON",
    422: "Malformed or out of range (400 with --validation-status 400)",
    429: "The queue is full; Retry-After says when to come back",
    500: "The tokens can't be computed",
    503: "The server loads or shuts down",
}
