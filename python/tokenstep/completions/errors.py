"""What a caller is told when a request can't be served."""

from __future__ import annotations


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


class GenerationError(RuntimeError):
    """The request was sound but its tokens can't be computed; the message says why."""
