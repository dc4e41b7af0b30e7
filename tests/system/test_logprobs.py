"""Log probabilities as they are reported, against a plain forward pass of the model."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from real_model import FLOWERS, GERMANY, forward_logits, only

import tokenstep as ts
from tokenstep.completions.schema import CompletionChoice, Logprobs


def logprobs_of(choice: CompletionChoice) -> Logprobs:
    assert choice.logprobs is not None
    return choice.logprobs


@pytest.fixture(scope="module")
def expected(llm: ts.LLM, greedy: CompletionChoice) -> npt.NDArray[np.float64]:
    """log-softmax [tokens, V] in float64 at each place of the greedy text, the prompt's first token apart."""
    assert greedy.prompt_token_ids is not None
    assert greedy.token_ids is not None
    logits = forward_logits(llm, greedy.prompt_token_ids + greedy.token_ids)[:-1]
    shifted = logits - logits.max(axis=1, keepdims=True)
    result: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result


def test_values_are_those_of_a_plain_forward_pass(
    greedy: CompletionChoice, expected: npt.NDArray[np.float64]
) -> None:
    assert greedy.prompt_token_ids is not None
    assert greedy.token_ids is not None
    ids = greedy.prompt_token_ids + greedy.token_ids
    found = logprobs_of(greedy).token_logprobs
    assert found[0] is None
    np.testing.assert_allclose(found[1:], expected[range(len(ids) - 1), ids[1:]], atol=2e-4)


def test_the_top_ones_are_the_most_likely_in_order(
    greedy: CompletionChoice, expected: npt.NDArray[np.float64]
) -> None:
    for entry, row in zip(logprobs_of(greedy).content, expected, strict=True):
        values = [top.logprob for top in entry.top_logprobs]
        assert len(values) == 20
        assert values == sorted(values, reverse=True)
        np.testing.assert_allclose(values, np.sort(row)[::-1][:20], atol=2e-4)


def test_both_forms_have_the_same_tokens_and_the_same_floats(llm: ts.LLM, greedy: CompletionChoice) -> None:
    found = logprobs_of(greedy)
    ids = [*(greedy.prompt_token_ids or []), *(greedy.token_ids or [])]
    assert len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs) == len(ids)
    assert found.tokens == [llm.tokenizer.decode([token]) for token in ids]
    assert found.top_logprobs[0] is None
    for place, entry in enumerate(found.content, 1):
        best = found.top_logprobs[place]
        assert best is not None
        assert entry.token == found.tokens[place]
        assert entry.logprob == found.token_logprobs[place] == best[entry.token]
        in_top = [top.logprob for top in entry.top_logprobs if top.token == entry.token]
        assert in_top in ([], [entry.logprob])
        assert bytes(entry.bytes).decode() == entry.token


def test_offsets_count_from_the_start_of_the_prompt_with_or_without_echo(
    llm: ts.LLM, greedy: CompletionChoice
) -> None:
    found = logprobs_of(greedy)
    assert found.text_offset == [sum(map(len, found.tokens[:place])) for place in range(len(found.tokens))]
    bare = logprobs_of(only(llm.complete(GERMANY, max_tokens=12, temperature=0, logprobs=20)))
    assert bare.text_offset == found.text_offset[5:]
    assert bare.token_logprobs == pytest.approx(found.token_logprobs[5:], abs=1e-4)
    assert bare.text_offset[0] == len(GERMANY)


@pytest.mark.parametrize("top", [0, 1, 5, 20])
def test_as_many_as_asked_for_and_the_chosen_one(llm: ts.LLM, top: int) -> None:
    choice = only(llm.complete(GERMANY, max_tokens=3, temperature=2, seed=8, logprobs=top))
    for entry, best in zip(logprobs_of(choice).content, logprobs_of(choice).top_logprobs, strict=True):
        assert len(entry.top_logprobs) == top
        assert best is not None
        assert entry.token in best
        assert len(best) in (top, top + 1)


def test_the_distribution_is_the_models_whatever_the_parameters(
    llm: ts.LLM, greedy: CompletionChoice
) -> None:
    params = {"temperature": 1.9, "top_k": 5, "repetition_penalty": 1.5, "logit_bias": {"5": 3}, "seed": 0}
    choice = only(llm.complete(GERMANY, max_tokens=1, logprobs=20, **params))
    assert logprobs_of(choice).content[0].top_logprobs == pytest.approx(
        logprobs_of(greedy).content[4].top_logprobs
    ) or [top.logprob for top in logprobs_of(choice).content[0].top_logprobs] == pytest.approx(
        [top.logprob for top in logprobs_of(greedy).content[4].top_logprobs], abs=1e-4
    )


def test_parts_of_a_character_are_written_as_bytes_and_add_no_offset(llm: ts.LLM) -> None:
    choice = only(llm.complete(FLOWERS, max_tokens=8, temperature=0, logprobs=0))
    found = logprobs_of(choice)
    parts = [entry for entry in found.content if entry.token.startswith("bytes:")]
    assert len(parts) >= 4
    assert parts[0].token == "bytes: \\xf0\\x9f\\x98"
    assert bytes(parts[0].bytes) == b" \xf0\x9f\x98"
    data = b"".join(bytes(entry.bytes) for entry in found.content)
    assert choice.text == data.decode(errors="replace")
    seen = b"".join(bytes(entry.bytes) for entry in found.content[:-1])
    assert found.text_offset[-1] == len(FLOWERS) + len(seen.decode(errors="ignore"))


def test_tokens_behind_a_stop_have_no_entry(llm: ts.LLM) -> None:
    choice = only(llm.complete(GERMANY, max_tokens=12, temperature=0, logprobs=1, stop="\n\nThe"))
    assert logprobs_of(choice).tokens == [" Berlin", "."]


def test_log_probabilities_of_a_prompt_alone(llm: ts.LLM, greedy: CompletionChoice) -> None:
    expected = logprobs_of(greedy).token_logprobs[:5]
    echoed = llm.complete(GERMANY, max_tokens=0, echo=True, logprobs=20)
    assert logprobs_of(only(echoed)).token_logprobs == pytest.approx(expected, abs=1e-4)
    scored = llm.complete([GERMANY, "Hi"], max_tokens=0, loglikelihood=True)
    assert scored.prompt is not None
    assert scored.prompt[0].logprobs is not None
    assert scored.prompt[0].logprobs.token_logprobs == pytest.approx(expected, abs=1e-4)
    assert scored.choices[0].text == ""


def test_nobody_who_did_not_ask_gets_any(llm: ts.LLM) -> None:
    assert only(llm.complete(GERMANY, max_tokens=1)).logprobs is None
