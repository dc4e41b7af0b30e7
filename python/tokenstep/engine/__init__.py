"""The engine: paged batches of sequences, from token ids to token ids."""

from tokenstep.engine.config import EngineConfig
from tokenstep.engine.engine import Engine
from tokenstep.engine.errors import EngineStopped, QueueFull
from tokenstep.engine.loop import EngineLoop, LoopState
from tokenstep.engine.request import (
    FailureKind,
    FailureOutput,
    FinishReason,
    Output,
    PromptOutput,
    Request,
    TokenLogprobs,
    TokenOutput,
)
from tokenstep.engine.stats import Counters, EngineStats, Observer

__all__ = [
    "Counters",
    "Engine",
    "EngineConfig",
    "EngineLoop",
    "EngineStats",
    "EngineStopped",
    "FailureKind",
    "FailureOutput",
    "FinishReason",
    "LoopState",
    "Observer",
    "Output",
    "PromptOutput",
    "QueueFull",
    "Request",
    "TokenLogprobs",
    "TokenOutput",
]
