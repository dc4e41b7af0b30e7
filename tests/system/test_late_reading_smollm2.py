"""SmolLM2 whose tokens are read one step late gives the texts of one whose tokens are read at once."""

from __future__ import annotations

from typing import Any

import pytest

import tokenstep as ts
from tokenstep.completions.schema import CompletionRequest
from tokenstep.completions.service import CompletionService
from tokenstep.engine import Engine, EngineConfig

PROMPTS = [
    "The capital of Germany is",
    "Once upon a time",
    "def fibonacci(n):\n    ",
    "The three primary colours are red,",
    "Water boils at",
]
PARAMETERS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.8, "top_p": 0.95, "seed": 1, "logprobs": 3},
    {"temperature": 1.0, "repetition_penalty": 1.2, "frequency_penalty": 0.3, "seed": 2, "n": 3},
    {"temperature": 0.9, "seed": 3, "n": 2, "best_of": 3, "stop": [" the", "\n"]},
    {"temperature": 1.1, "seed": 4, "logit_bias": {"260": -4.0}, "stop": ["."], "logprobs": 1},
]


def completions(llm: ts.LLM, reads_late: bool, **sizes: Any) -> tuple[list[Any], Engine]:
    config = EngineConfig(**{"max_batch": 8, "kv_tokens": 1024, "reads_late": reads_late, **sizes})
    engine = Engine(llm.service.engine.runner.model, llm.tokenizer.vocab_size, config)
    service = CompletionService(engine, llm.tokenizer, model_name="smollm2", system_fingerprint="")
    requests = [
        CompletionRequest.parse({"prompt": PROMPTS[(i + j) % 5], "max_tokens": 24 + 3 * j, **PARAMETERS[i]})
        for i in range(5)
        for j in range(2)
    ]
    try:
        found = [(completion.choices, completion.usage) for completion in service.complete_many(requests)]
    finally:
        service.loop.abort()
    assert engine.blocks.num_free == engine.blocks.num_blocks
    return found, engine


@pytest.mark.slow
@pytest.mark.parametrize("kv_tokens", [1024, 96])
def test_the_same_texts_come_late_and_at_once(llm: ts.LLM, kv_tokens: int) -> None:
    late, engine = completions(llm, True, kv_tokens=kv_tokens, batch_invariant=True)
    assert any(size > 1 for size in engine.runner._steps)
    at_once, _ = completions(llm, False, kv_tokens=kv_tokens, batch_invariant=True)
    assert [choices for choices, _ in late] == [choices for choices, _ in at_once]
    assert [usage.completion_tokens for _, usage in late] == [usage.completion_tokens for _, usage in at_once]
