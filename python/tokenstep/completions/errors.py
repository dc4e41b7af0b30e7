"""What a caller is told when a request can't be served."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the schema is checked where torch may be absent
    from tokenstep.engine import FailureKind


CODE_STATUS = {"model_not_found": 404, "adapter_not_found": 404, "context_length_exceeded": 400}
"""HTTP statuses of requests that are wrong in another way than being malformed or out of range."""


class RequestError(ValueError):
    """The request is wrong.

    Attributes:
        message: what is wrong, naming the parameter and its value.
        param: the parameter.
        code: a machine-readable reason such as `context_length_exceeded`, or None.
    """

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code


def status_of(error: RequestError, otherwise: int = 422) -> int:
    """The HTTP status of `error`; `otherwise` for what is malformed or out of range."""
    return CODE_STATUS.get(error.code or "", otherwise)


class GenerationError(RuntimeError):
    """The request was sound but its tokens can't be computed; the message says why.

    Attributes:
        kind: what it was: logits with NaN ("bad_logits"), every token banned ("no_token_left"), a step of
            the engine that failed ("broken_step"), an engine that was stopped ("stopped"), a process that
            was forked ("forked").
    """

    def __init__(self, message: str, kind: FailureKind) -> None:
        super().__init__(message)
        self.kind = kind
