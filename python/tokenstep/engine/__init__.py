"""The engine: paged batches of sequences, from token ids to token ids."""

from tokenstep.engine.config import EngineConfig
from tokenstep.engine.engine import Engine
from tokenstep.engine.request import (
    FailureOutput,
    FinishReason,
    Output,
    PromptOutput,
    Request,
    TokenLogprobs,
    TokenOutput,
)

__all__ = [
    "Engine",
    "EngineConfig",
    "FailureOutput",
    "FinishReason",
    "Output",
    "PromptOutput",
    "Request",
    "TokenLogprobs",
    "TokenOutput",
]
