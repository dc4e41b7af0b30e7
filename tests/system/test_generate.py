"""`generate` and `score` with the real model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from real_model import FLOWERS, GERMANY, forward_logits, is_idle, texts

import tokenstep as ts
from tokenstep.completions.errors import RequestError


def test_generate_gives_for_each_prompt_what_complete_gives(llm: ts.LLM) -> None:
    prompts = [GERMANY, llm.tokenizer.encode(FLOWERS), "1, 2, 3,"]
    params: list[dict[str, Any]] = [
        {"max_tokens": 4, "temperature": 0, "logprobs": 1},
        {"max_tokens": 3, "temperature": 0},
        {"max_tokens": 5, "n": 2, "temperature": 0, "stop": "6"},
    ]
    together = llm.generate(prompts, params)
    assert [texts(completion) for completion in together] == [
        texts(llm.complete(prompt, **one)) for prompt, one in zip(prompts, params, strict=True)
    ]
    assert [texts(c) for c in llm.generate([GERMANY] * 2, {"max_tokens": 2, "temperature": 0})] == [
        [" Berlin."]
    ] * 2
    assert llm.generate([]) == []
    assert is_idle(llm)


def test_generate_refuses_what_it_does_not_know(llm: ts.LLM) -> None:
    with pytest.raises(ValueError, match="params has 1 entries, expected one for each of 2 prompts"):
        llm.generate(["a", "b"], [{}])
    with pytest.raises(TypeError, match=r"LLM.generate: unknown parameter 'max_token'"):
        llm.generate(["a"], {"max_token": 3})
    with pytest.raises(RequestError, match="temperature = 3"):
        llm.generate(["a", "b"], [{}, {"temperature": 3}])


def test_scores_are_the_log_softmax_of_a_plain_forward_pass(llm: ts.LLM) -> None:
    ids = llm.tokenizer.encode("Berlin is in Germany")
    text, same, empty = llm.score(["Berlin is in Germany", "Berlin is in Germany", ""])
    logits = forward_logits(llm, ids)
    expected = [logits[i - 1, ids[i]] - np.logaddexp.reduce(logits[i - 1]) for i in range(1, len(ids))]
    assert text.dtype == np.float32
    assert text == pytest.approx(np.array(expected), abs=2e-4)
    assert same == pytest.approx(text, abs=2e-4)
    assert empty.shape == (0,)
    (by_ids,) = llm.score([ids])
    assert by_ids == pytest.approx(text, abs=2e-4)
    assert llm.score([]) == []


@pytest.mark.slow
def test_batch_invariant_the_real_model_gives_the_same_bits_under_any_load() -> None:
    params: dict[str, Any] = {"max_tokens": 36, "temperature": 1.0, "seed": 11, "logprobs": 5, "n": 2}
    long = "The quick brown fox jumps over the lazy dog. " * 6
    with ts.LLM("smollm2", dtype="bfloat16", batch_invariant=True, kv_tokens=256, progress=False) as llm:
        assert "-batch_invariant-" in llm.system_fingerprint
        alone = [llm.complete(prompt, **params).choices for prompt in (GERMANY, long)]
        many = [GERMANY, long, *(f"{i} bottles of beer on the" for i in range(6))]
        together = llm.generate(many, params)
        assert llm.service.loop.stats().counters.preemptions > 0
        assert [completion.choices for completion in together[:2]] == alone
        chunks = list(llm.complete(GERMANY, **params, stream=True))
        streamed = ["".join(c.choices[0].text for c in chunks if c.choices[0].index == i) for i in range(2)]
        assert streamed == [choice.text for choice in alone[0]]
