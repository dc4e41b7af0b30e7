"""Prompts whose continuation is known, and what tests do with a loaded model."""

from __future__ import annotations

import time

import numpy as np
import numpy.typing as npt

import tokenstep as ts
from tokenstep.completions.schema import Completion, CompletionChoice
from tokenstep.models import ForwardBatch, KVCache

GERMANY = "The capital of Germany is"
FLOWERS = "Emoji: 😀 😃 😄 😁"  # is followed by emoji, each of two or three tokens


def only(completion: Completion) -> CompletionChoice:
    (choice,) = completion.choices
    return choice


def texts(completion: Completion) -> list[str]:
    return [choice.text for choice in completion.choices]


def is_idle(llm: ts.LLM) -> bool:
    """Whether no block of the cache is held soon: what has been cancelled goes before the next step."""
    deadline = time.monotonic() + 10
    while holds_something(llm) and time.monotonic() < deadline:
        time.sleep(0.001)
    return not holds_something(llm)


def holds_something(llm: ts.LLM) -> bool:
    """Whether a block of the cache is held now, or a request open."""
    engine = llm.service.engine
    return engine.blocks.num_free < engine.blocks.num_blocks or engine.has_work


def forward_logits(llm: ts.LLM, ids: list[int]) -> npt.NDArray[np.float64]:
    """Logits [len(ids), V] of one pass over `ids`, with a cache of its own."""
    model = llm.service.engine.runner.model
    cache = KVCache.allocate(model.config, 1, len(ids), model.dtype)
    hidden = model.forward(ForwardBatch.of_prompt(ids), cache)
    logits: npt.NDArray[np.float64] = model.logits(hidden).double().numpy()
    return logits
