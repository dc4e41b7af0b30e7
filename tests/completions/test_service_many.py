"""Many requests at once, and prompts that are only scored."""

from __future__ import annotations

import math
import threading
from typing import Any

import pytest
import torch
from byte_tokenizer import BEGIN
from scripted_model import GREEDY, ScriptedModel, complete, is_idle, make_service, recite

from tokenstep.completions.errors import GenerationError, RequestError
from tokenstep.completions.schema import CompletionRequest


def parse(**fields: Any) -> CompletionRequest:
    return CompletionRequest.parse({**GREEDY, **fields})


@pytest.mark.parametrize("bounds", [{}, {"max_waiting": 1}, {"max_waiting_tokens": 5, "max_batch": 1}])
def test_each_gets_what_it_would_get_alone_whatever_the_queue_takes(bounds: dict[str, int]) -> None:
    service = make_service(ScriptedModel([]), **bounds)
    fields = [
        {"temperature": 2.0, "seed": seed, "n": 1 + seed % 2, "max_tokens": seed} for seed in range(1, 9)
    ]
    together = service.complete_many([parse(**one) for one in fields])
    assert [completion.choices for completion in together] == [
        complete(service, **one).choices for one in fields
    ]
    assert len({completion.id for completion in together}) == 8
    assert is_idle(service)


def test_they_share_the_batch() -> None:
    model = recite("shared by all")
    model.hold_at = 2
    threading.Timer(0.2, model.gate.set).start()  # when all have come
    make_service(model).complete_many([parse()] * 6)
    assert max(model.rows) == 6


def test_a_wrong_one_is_refused_before_any_is_begun() -> None:
    service = make_service(recite("fine"))
    with pytest.raises(RequestError, match="maximum context length"):
        service.complete_many([parse(), parse(prompt=[65] * 100)])
    assert service.loop.stats().counters.steps == 0


def test_one_that_fails_ends_all_and_leaves_nothing_behind() -> None:
    model = recite("fine")
    model.poisoned_length = 20
    service = make_service(model)
    with pytest.raises(GenerationError, match="contain NaN"):
        service.complete_many([parse(max_tokens=18), parse(prompt=[65] * 18), parse(max_tokens=18)])
    assert is_idle(service)


def test_a_queue_that_others_fill_makes_it_wait() -> None:
    model = recite("others first")
    model.hold_at = 3
    service = make_service(model, max_batch=1, max_waiting=1)
    streams = [service.stream(parse(stream=True)) for _ in range(2)]
    next(streams[0])
    waiting = threading.Thread(target=lambda: list(streams[1]))
    waiting.start()
    threading.Timer(0.2, model.gate.set).start()
    assert len(service.complete_many([parse(), parse()])) == 2
    list(streams[0])
    waiting.join(20)
    assert is_idle(service)


def test_scores_are_log_probabilities_of_all_tokens_but_the_first() -> None:
    model = ScriptedModel([])
    prompts = [[1, 2, 3, 4], [BEGIN], [9, 8]]
    request = parse(prompt=prompts, max_tokens=0, loglikelihood=True)
    scores = make_service(model).score(request)
    for prompt, values in zip(prompts, scores, strict=True):
        expected = [
            float(model.logits_after(i).double().log_softmax(-1)[prompt[i]]) for i in range(1, len(prompt))
        ]
        assert values == pytest.approx(expected, abs=1e-5)


def test_an_impossible_token_scores_minus_infinity(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ScriptedModel([])
    sound = model.logits_after

    def without_token_3(length: int) -> torch.Tensor:
        logits = sound(length)
        logits[3] = -math.inf
        return logits

    monkeypatch.setattr(model, "logits_after", without_token_3)
    ((first, second),) = make_service(model).score(parse(prompt=[1, 3, 4], max_tokens=0, loglikelihood=True))
    assert first == -math.inf
    assert math.isfinite(second)
