"""Why a request isn't taken in."""

from __future__ import annotations


class QueueFull(RuntimeError):
    """Too much is waiting already.

    Attributes:
        retry_after: seconds after which there is probably room, as far as can be told from the queue and the
            engine's recent speed.
    """

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class EngineStopped(RuntimeError):
    """The engine has been shut down, or is finishing what it has."""
