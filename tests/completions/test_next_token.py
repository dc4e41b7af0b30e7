"""What the next token is drawn from, against the reference of the sampler."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from byte_tokenizer import BEGIN
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted_model import GREEDY, is_idle, make_service, recite

from tokenstep.completions.errors import GenerationError, RequestError
from tokenstep.completions.next_token import NextToken, next_token
from tokenstep.completions.schema import CompletionRequest
from tokenstep.engine import EngineStopped, Observer
from tokenstep.reference.sampling import probabilities, process

VOCAB = BEGIN + 1
MODEL = recite("")
SERVICE = make_service(MODEL)


def ask(service: Any = SERVICE, output: Sequence[int] = (), top: int = VOCAB, **fields: Any) -> NextToken:
    request = CompletionRequest.parse({**GREEDY, "prompt": [5, 9], "temperature": 1, **fields})
    return asyncio.run(next_token(service, request, output, top))


PARAMETERS = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0.0, 0.3, 1.0, 2.0]),
        "top_k": st.integers(-1, 60),
        "top_p": st.floats(0, 1),
        "min_p": st.floats(0, 1),
        "repetition_penalty": st.floats(0.5, 2),
        "presence_penalty": st.floats(-2, 2),
        "frequency_penalty": st.floats(-2, 2),
    },
)


@settings(max_examples=60, deadline=None)
@given(PARAMETERS, st.lists(st.integers(0, VOCAB - 1), max_size=4))
def test_each_token_is_cut_by_the_step_that_cuts_it(fields: dict[str, Any], output: list[int]) -> None:
    found = ask(output=output, **fields)
    logits = MODEL.logits_after(2 + len(output)).numpy()[None]
    histories = {"prompt_tokens": [[5, 9]], "output_tokens": [output]}
    names = ["temperature", "min_p", "top_k", "top_p"]
    edits = {name: value for name, value in fields.items() if name not in names[1:]}
    cut_by: dict[int, str] = {}
    for count, name in enumerate(names):
        given_now = {**edits, **{name: fields[name] for name in names[1 : count + 1] if name in fields}}
        step = process(logits, **given_now, **histories)
        kept = step.kept[0] if not step.greedy[0] else np.arange(VOCAB) == step.values[0].argmax()
        for token in np.flatnonzero(~kept).tolist():
            cut_by.setdefault(token, name)
        assert found.left[count].model_dump() == {"step": name, "tokens": VOCAB - len(cut_by)}
    assert {token.id: token.cut_by for token in found.tokens if token.cut_by} == cut_by

    model = probabilities(logits[0])
    adjusted = probabilities(logits[0], **edits, prompt_tokens=[5, 9], output_tokens=output)
    share = sum(token.adjusted_probability for token in found.tokens if token.cut_by is None)
    for token in found.tokens:
        assert token.model_probability == pytest.approx(model[token.id], abs=1e-6)
        assert token.adjusted_probability == pytest.approx(adjusted[token.id], abs=1e-6)
        expected = 0 if token.cut_by else token.adjusted_probability / share
        assert token.probability == pytest.approx(expected, abs=1e-9)
    for values in (
        [token.probability for token in found.tokens],
        [token.adjusted_probability for token in found.tokens],
        [token.model_probability for token in found.tokens],
    ):
        assert sum(values) == pytest.approx(1)
    assert [token.model_probability for token in found.tokens] == sorted(
        (token.model_probability for token in found.tokens), reverse=True
    )


def test_tokens_are_drawn_as_often_as_it_says() -> None:
    fields: dict[str, Any] = {"temperature": 0.8, "top_k": 5, "min_p": 0.02, "logit_bias": {"7": 1}}
    said = {token.id: token.probability for token in ask(**fields).tokens if token.probability}
    request = {**GREEDY, "prompt": [5, 9], "n": 100, "max_tokens": 1, "return_token_ids": True, **fields}
    count = 20
    drawn: Counter[int] = Counter()
    for seed in range(count):
        completion = SERVICE.complete(CompletionRequest.parse({**request, "seed": seed}))
        drawn.update((choice.token_ids or [])[0] for choice in completion.choices)
    assert set(drawn) <= set(said)
    total = 100 * count
    chi_square = sum((drawn[token] - total * p) ** 2 / (total * p) for token, p in said.items())
    assert chi_square < 25, "with four degrees of freedom, by chance once in 20,000 times"


def test_a_token_that_a_bias_makes_likely_is_among_the_few() -> None:
    plain, biased = (ask(top=3, logit_bias=bias) for bias in ({}, {"200": 20}))
    assert 200 not in [token.id for token in plain.tokens]
    (found,) = [token for token in biased.tokens if token.id == 200]
    assert found.adjusted_probability > 0.9 > 0.1 > found.model_probability
    assert len(biased.tokens) == 3


def test_fields_that_decide_how_long_a_text_is_have_no_say() -> None:
    expected = ask(top=4)
    fields = {"n": 5, "best_of": 9, "max_tokens": 10**6, "echo": True, "logprobs": 3, "stop": "x"}
    assert ask(top=4, **fields) == expected
    assert ask(top=4, stream=True, stream_options={"include_usage": True}) == expected


@pytest.mark.parametrize(
    ("fields", "output", "message"),
    [
        ({"prompt": ["a", "b"]}, [], "prompt: 2 prompts, expected one"),
        ({}, [5, VOCAB], f"output_tokens[1] = {VOCAB}, expected 0 ≤ token id < {VOCAB}"),
        ({}, [5] * 1000, "maximum context length"),
        ({"logit_bias": {"5000": 1}}, [], "logit_bias"),
    ],
)
def test_what_is_wrong_is_said(fields: dict[str, Any], output: list[int], message: str) -> None:
    with pytest.raises(RequestError) as caught:
        ask(output=output, **fields)
    assert message in str(caught.value)


def test_logits_that_are_no_numbers_are_an_error() -> None:
    model = recite("")
    model.poisoned_length = 3
    service = make_service(model)
    with pytest.raises(GenerationError, match="NaN") as caught:
        ask(service, output=[1])
    assert caught.value.kind == "bad_logits"
    assert ask(service).tokens


def test_it_ends_with_its_task_and_with_the_engine() -> None:
    class Counting(Observer):
        count = 0

        def cancelled(self) -> None:
            self.count += 1

    model = recite("held")
    model.hold_at = 2
    service = make_service(model, max_batch=1)
    service.loop.observer = observer = Counting()

    async def work() -> None:
        request = CompletionRequest.parse({**GREEDY, "prompt": [5, 9]})
        first, second = (asyncio.create_task(next_token(service, request, [], 5)) for _ in range(2))
        while service.loop.stats().waiting < 2:  # neither has been computed
            await asyncio.sleep(0.01)
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        model.gate.set()
        assert (await first).tokens

    asyncio.run(work())
    assert is_idle(service)
    assert observer.count == 1
    service.loop.close()
    with pytest.raises(EngineStopped):
        ask(service)
