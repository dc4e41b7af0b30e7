"""Every sampling parameter has its effect on the real model's tokens."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from real_model import GERMANY, forward_logits, only, texts

import tokenstep as ts
from tokenstep.completions.schema import CompletionChoice

LOOP = "one two one two one two one two one two"


@pytest.fixture(scope="module")
def first_logprobs(llm: ts.LLM) -> dict[int, float]:
    """The 20 most likely first tokens after GERMANY with their log probabilities, best first."""
    found = only(llm.complete(GERMANY, max_tokens=1, logprobs=20, seed=0)).logprobs
    assert found is not None
    tokenizer = llm.tokenizer
    ids = [tokenizer.encode(top.token)[0] for top in found.content[0].top_logprobs]
    return dict(zip(ids, [top.logprob for top in found.content[0].top_logprobs], strict=True))


@pytest.fixture(scope="module")
def plain_loop(llm: ts.LLM) -> list[int]:
    """16 greedy tokens after LOOP."""
    completion = llm.complete(LOOP, temperature=0, return_token_ids=True)
    assert completion.usage.completion_tokens == 16  # the default of max_tokens
    assert only(completion).finish_reason == "length"
    assert only(completion).token_ids is not None
    return only(completion).token_ids or []


def draw(llm: ts.LLM, **params: Any) -> Counter[int]:
    """128 first tokens; the prompt is computed once for all of them."""
    completion = llm.complete(GERMANY, max_tokens=1, n=128, seed=5, return_token_ids=True, **params)
    return Counter(choice.token_ids[0] for choice in completion.choices if choice.token_ids)


def test_temperature_0_takes_the_most_likely_token(llm: ts.LLM, first_logprobs: dict[int, float]) -> None:
    assert set(draw(llm, temperature=0)) == {next(iter(first_logprobs))}


def test_temperature_flattens_the_distribution(llm: ts.LLM, first_logprobs: dict[int, float]) -> None:
    best = next(iter(first_logprobs))
    cold, usual, hot = (draw(llm, temperature=t) for t in (0.3, 1.0, 2.0))
    assert cold[best] > usual[best] > hot[best]
    assert len(cold) < len(usual) < len(hot)


def test_draws_follow_the_reported_probabilities(llm: ts.LLM, first_logprobs: dict[int, float]) -> None:
    drawn = draw(llm)
    for token, logprob in list(first_logprobs.items())[:5]:
        p = np.exp(logprob)
        assert abs(drawn[token] - 128 * p) < 5 * np.sqrt(128 * p * (1 - p))


@pytest.mark.parametrize("k", [1, 3])
def test_top_k_keeps_the_k_most_likely(llm: ts.LLM, first_logprobs: dict[int, float], k: int) -> None:
    assert set(draw(llm, top_k=k, temperature=2)) == set(list(first_logprobs)[:k])


@pytest.mark.parametrize("k", [0, -1])
def test_top_k_can_be_off(llm: ts.LLM, k: int) -> None:
    assert draw(llm, top_k=k) == draw(llm)


@pytest.mark.parametrize("p", [0.0, 0.3, 0.5])
def test_top_p_keeps_the_nucleus(llm: ts.LLM, first_logprobs: dict[int, float], p: float) -> None:
    sums = np.cumsum(np.exp(list(first_logprobs.values())))
    nucleus = list(first_logprobs)[: int(np.searchsorted(sums, p)) + 1]
    assert set(draw(llm, top_p=p)) == set(nucleus)


def test_min_p_keeps_what_is_likely_beside_the_best(llm: ts.LLM, first_logprobs: dict[int, float]) -> None:
    best = next(iter(first_logprobs.values()))
    kept = {token for token, logprob in first_logprobs.items() if logprob >= best + np.log(0.1)}
    assert set(draw(llm, min_p=0.1)) == kept
    assert set(draw(llm, min_p=1.0)) == {next(iter(first_logprobs))}


def test_logit_bias_forces_and_bans_tokens(llm: ts.LLM, first_logprobs: dict[int, float]) -> None:
    best, second = list(first_logprobs)[:2]
    assert set(draw(llm, logit_bias={"7777": 100})) == {7777}
    assert set(draw(llm, temperature=0, logit_bias={str(best): -100, "7777": None})) == {second}


@pytest.mark.parametrize(
    "params",
    [
        pytest.param({"repetition_penalty": 1.7}, marks=pytest.mark.slow),
        pytest.param({"repetition_penalty": 0.6}, marks=pytest.mark.slow),
        {"presence_penalty": 1.5},
        pytest.param({"presence_penalty": -2.0}, marks=pytest.mark.slow),
        pytest.param({"frequency_penalty": 0.4}, marks=pytest.mark.slow),
        {"logit_bias": {"282": 4.0, "28": -100, "5": None}},
        {
            "repetition_penalty": 1.2,
            "presence_penalty": 0.3,
            "frequency_penalty": 0.7,
            "logit_bias": {"827": 1.5},
        },
    ],
)
def test_penalties_and_biases_change_the_logits_as_defined(
    llm: ts.LLM, plain_loop: list[int], params: dict[str, Any]
) -> None:
    """Each token is the arg max of a plain forward pass's logits after the formulas, in float64."""
    bent = only(llm.complete(LOOP, max_tokens=8, temperature=0, return_token_ids=True, **params))
    assert bent.token_ids is not None
    assert bent.prompt_token_ids is not None
    assert bent.token_ids != plain_loop[:8]
    prompt, output = bent.prompt_token_ids, bent.token_ids
    raw = forward_logits(llm, prompt + output)[len(prompt) - 1 : -1]
    for position, (logits, token) in enumerate(zip(raw, output, strict=True)):
        for biased, bias in params.get("logit_bias", {}).items():
            logits[int(biased)] += bias or 0.0
        seen = list({*prompt, *output[:position]})
        penalty = params.get("repetition_penalty", 1.0)
        logits[seen] = np.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
        for drawn, count in Counter(output[:position]).items():
            logits[drawn] -= params.get("frequency_penalty", 0.0) * count + params.get(
                "presence_penalty", 0.0
            )
        assert logits[token] >= logits.max() - 1e-3


def test_max_tokens_is_16_unless_said(plain_loop: list[int]) -> None:
    assert len(plain_loop) == 16


PARAMS: dict[str, Any] = {"max_tokens": 8, "temperature": 1.0, "seed": 11}


class TestSeedsAndChoices:
    def test_choices_differ_and_the_first_is_that_of_n_1(self, llm: ts.LLM) -> None:
        several = texts(llm.complete(GERMANY, n=4, **PARAMS))
        assert len(set(several)) == 4
        assert several[0] == only(llm.complete(GERMANY, **PARAMS)).text

    def test_at_temperature_0_choices_are_equal(self, llm: ts.LLM, greedy: CompletionChoice) -> None:
        completion = llm.complete(GERMANY, n=3, max_tokens=12, temperature=0, echo=True)
        assert texts(completion) == [greedy.text] * 3
        assert completion.usage.completion_tokens == 36

    def test_a_seed_repeats_alone_and_among_others(self, llm: ts.LLM) -> None:
        alone = only(llm.complete(GERMANY, **PARAMS)).text
        assert only(llm.complete(GERMANY, **PARAMS)).text == alone
        others = llm.complete("Once upon a time", n=5, max_tokens=30, seed=3, stream=True)
        next(others)  # five rows are in the batch from here on
        assert only(llm.complete(GERMANY, **PARAMS)).text == alone
        others.close()

    def test_another_seed_gives_another_text_and_no_seed_a_new_one_each_time(self, llm: ts.LLM) -> None:
        params = {**PARAMS, "max_tokens": 4, "temperature": 1.5}
        seeds = [only(llm.complete(GERMANY, **{**params, "seed": seed})).text for seed in (1, -1, None, None)]
        assert len(set(seeds)) == 4

    def test_each_prompt_of_many_has_its_own_random_numbers(self, llm: ts.LLM) -> None:
        twice = texts(llm.complete([GERMANY, GERMANY], **PARAMS))
        assert twice[0] != twice[1]
        assert twice[0] == only(llm.complete(GERMANY, **PARAMS)).text
