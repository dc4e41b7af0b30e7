"""Each parameter of the schema on its own, through the `openai` client, streamed and not.

A check says what the parameter changes, or that its neutral values change nothing.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from openai_answers import GERMANY, KEY, Asker
from running_server import RunningServer

from tokenstep.completions.schema import CompletionRequest

openai = pytest.importorskip("openai")

BERLIN = " Berlin.\n\n"
END, START = 2, 1  # <|im_end|>, <|im_start|>
DRAWN: dict[str, Any] = {"temperature": 1, "seed": 5}
ALWAYS_ENDS: dict[str, Any] = {"logit_bias": {str(END): 100}}

Check = Callable[[Asker, RunningServer], None]
CHECKS: dict[str, Check] = {}


def check(function: Check) -> Check:
    CHECKS[function.__name__.removeprefix("check_")] = function
    return function


def changes_nothing(ask: Asker, name: str, *values: Any, **fields: Any) -> None:
    """Neutral values give the tokens that its absence gives."""
    expected = ask(**DRAWN, **fields).texts
    for value in values:
        assert ask(**DRAWN, **fields, **{name: value}).texts == expected, value


@check
def check_model(ask: Asker, _: RunningServer) -> None:
    answer = ask(model="alias")
    assert (answer.model, answer.text) == ("smollm2", BERLIN)


@check
def check_prompt(ask: Asker, _: RunningServer) -> None:
    first, second = ask(prompt=[GERMANY, "1, 2, 3,"], max_tokens=2, return_token_ids=True).choices
    assert (first.text, second.text) == (" Berlin.", " 4")
    assert ask(prompt=first.prompt_token_ids, max_tokens=2).text == first.text
    ids = [first.prompt_token_ids, second.prompt_token_ids]
    assert ask(prompt=ids, max_tokens=2).texts == [first.text, second.text]
    empty, absent = (ask(prompt=prompt, max_tokens=1, return_token_ids=True) for prompt in ("", None))
    assert len(empty.choices[0].prompt_token_ids or []) == 1
    assert empty.choices == absent.choices


@check
def check_max_tokens(ask: Asker, _: RunningServer) -> None:
    answer = ask(max_tokens=2)
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (2, "length")
    assert ask(max_tokens=None).usage.completion_tokens == 16
    assert ask(max_tokens=0, echo=True).text == GERMANY


@check
def check_temperature(ask: Asker, _: RunningServer) -> None:
    assert ask(temperature=0, seed=1).text == ask(temperature=0, seed=2).text == BERLIN
    hot = ask(temperature=2, seed=1).text
    assert hot != ask(temperature=2, seed=2).text
    assert ask(temperature=None, seed=5).text == ask(temperature=1, seed=5).text


@check
def check_top_p(ask: Asker, _: RunningServer) -> None:
    assert ask(temperature=2, top_p=0).text == BERLIN
    changes_nothing(ask, "top_p", 1, None)


@check
def check_top_k(ask: Asker, _: RunningServer) -> None:
    assert ask(temperature=2, top_k=1).text == BERLIN
    changes_nothing(ask, "top_k", 0, -1, 10**6, None)


@check
def check_min_p(ask: Asker, _: RunningServer) -> None:
    assert ask(temperature=2, min_p=1).text == BERLIN
    changes_nothing(ask, "min_p", 0, None)


NA = 15486
REPEATS: dict[str, Any] = {"prompt": "na na na", "max_tokens": 4}


@check
def check_repetition_penalty(ask: Asker, _: RunningServer) -> None:
    assert ask(**REPEATS).text == " na na na na"
    assert " na" not in ask(**REPEATS, repetition_penalty=5).text, "the prompt counts"
    changes_nothing(ask, "repetition_penalty", 1, None)


def equals_biases(ask: Asker, name: str, value: float, taken: Callable[[int], float]) -> None:
    """Each token is what follows when `taken` of its count in the output is a bias against each."""
    close = {str(NA): -1.0}  # to what else might follow
    fields = {**REPEATS, "logit_bias": close, "return_token_ids": True}
    choice = ask(**fields, **{name: value}).choices[0]
    assert choice.token_ids != ask(**fields).choices[0].token_ids == [NA] * 4
    prompt = choice.prompt_token_ids or []
    for index, token in enumerate(choice.token_ids):
        before = choice.token_ids[:index]
        bias = {str(other): -taken(count) for other, count in Counter(before).items()}
        bias[str(NA)] = bias.get(str(NA), 0.0) + close[str(NA)]
        asked = {"prompt": prompt + before, "max_tokens": 1, "logit_bias": bias, "return_token_ids": True}
        assert ask(**asked).choices[0].token_ids == [token], index


@check
def check_presence_penalty(ask: Asker, _: RunningServer) -> None:
    equals_biases(ask, "presence_penalty", 2, lambda count: 2)
    changes_nothing(ask, "presence_penalty", 0, None)


@check
def check_frequency_penalty(ask: Asker, _: RunningServer) -> None:
    equals_biases(ask, "frequency_penalty", 2, lambda count: 2 * count)
    changes_nothing(ask, "frequency_penalty", 0, None)


@check
def check_logit_bias(ask: Asker, _: RunningServer) -> None:
    (greedy,) = ask(max_tokens=1, return_token_ids=True).choices[0].token_ids
    assert ask(max_tokens=1, return_token_ids=True, logit_bias={"7777": 100}).choices[0].token_ids == [7777]
    banned = ask(max_tokens=1, return_token_ids=True, logit_bias={str(greedy): -100})
    assert banned.choices[0].token_ids != [greedy]
    changes_nothing(ask, "logit_bias", {"7777": None}, {"7777": 0}, {}, None)


@check
def check_n(ask: Asker, _: RunningServer) -> None:
    assert ask(n=3).texts == [BERLIN] * 3
    drawn = ask(**DRAWN, n=3).texts
    assert len(set(drawn)) > 1
    assert ask(**DRAWN).texts == drawn[:1]


@check
def check_best_of(ask: Asker, _: RunningServer) -> None:
    if ask.stream:
        assert ask(**DRAWN, n=2, best_of=2).texts == ask(**DRAWN, n=2).texts
        with pytest.raises(openai.UnprocessableEntityError, match="best_of = 2"):
            ask(n=1, best_of=2)
        return
    ranked = ask(**DRAWN, n=3, best_of=3, logprobs=0).choices
    means = [sum(filter(None, choice.token_logprobs)) / len(choice.tokens) for choice in ranked]
    assert means == sorted(means, reverse=True)
    assert sorted(choice.text for choice in ranked) == sorted(ask(**DRAWN, n=3).texts)
    best = ask(**DRAWN, best_of=3)
    assert best.text == ranked[0].text
    assert best.usage.completion_tokens == 12


@check
def check_seed(ask: Asker, _: RunningServer) -> None:
    first, again, other = (ask(temperature=1.2, seed=seed).text for seed in (-1, -1, 2))
    assert first == again != other
    assert ask(temperature=1.2).text != ask(temperature=1.2).text, "without one, each request has its own"


@check
def check_stop(ask: Asker, _: RunningServer) -> None:
    for stop, text, reason in (
        ("lin", " Ber", "lin"),
        (["nothing", ".\n"], " Berlin", ".\n"),
        ("nothing", BERLIN, None),
        ([], BERLIN, None),
    ):
        choice = ask(stop=stop).choices[0]
        assert (choice.text, choice.stop_reason) == (text, reason)
        assert choice.finish_reason == ("stop" if reason else "length")
    ended = ask(stop="<|im_end|>", **ALWAYS_ENDS).choices[0]
    assert (ended.text, ended.finish_reason, ended.stop_reason) == ("", "stop", "<|im_end|>")


@check
def check_stop_token_ids(ask: Asker, _: RunningServer) -> None:
    choice = ask(stop_token_ids=[30]).choices[0]
    assert (choice.text, choice.finish_reason, choice.stop_reason) == (" Berlin", "stop", 30)


@check
def check_min_tokens(ask: Asker, _: RunningServer) -> None:
    assert ask(**ALWAYS_ENDS).usage.completion_tokens == 1
    answer = ask(**ALWAYS_ENDS, min_tokens=3)
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (3, "stop")
    assert ask(stop=["Ber", "."], min_tokens=2).choices[0].stop_reason == "."


@check
def check_ignore_eos(ask: Asker, _: RunningServer) -> None:
    ended, ignored = (ask(**ALWAYS_ENDS, ignore_eos=flag) for flag in (False, True))
    assert (ended.usage.completion_tokens, ended.choices[0].finish_reason) == (1, "stop")
    assert (ignored.usage.completion_tokens, ignored.choices[0].finish_reason) == (4, "length")
    assert ask(ignore_eos=True, stop="lin").choices[0].finish_reason == "stop"


@check
def check_echo(ask: Asker, _: RunningServer) -> None:
    answer = ask(echo=True)
    assert answer.text == GERMANY + BERLIN
    assert [echoed["text"] for echoed in answer.prompt] == [GERMANY]
    assert ask().prompt is None


@check
def check_logprobs(ask: Asker, _: RunningServer) -> None:
    choice = ask(logprobs=3, echo=True, max_tokens=2).choices[0]
    assert choice.tokens == ["The", " capital", " of", " Germany", " is", " Berlin", "."]
    assert choice.text_offset == [0, 3, 11, 14, 22, 25, 32]
    assert choice.token_logprobs[0] is choice.top_logprobs[0] is None
    entries = zip(choice.tokens, choice.token_logprobs, choice.top_logprobs, strict=True)
    for token, value, top in list(entries)[1:]:
        assert top is not None
        assert 3 <= len(top) <= 4
        assert top[token] == value
        assert sum(map(math.exp, top.values())) <= 1 + 1e-6
    assert max(top, key=top.__getitem__) == "."
    assert [len(top or {}) for top in ask(logprobs=0).choices[0].top_logprobs] == [1] * 4
    assert ask(logprobs=None).choices[0].tokens == []


@check
def check_loglikelihood(ask: Asker, _: RunningServer) -> None:
    answer = ask(loglikelihood=True, max_tokens=0)
    assert (answer.text, answer.usage.completion_tokens) == ("", 0)
    (scored,) = answer.prompt
    assert scored["logprobs"]["tokens"] == ["The", " capital", " of", " Germany", " is"]
    echoed = ask(echo=True, logprobs=0, max_tokens=1).choices[0].token_logprobs
    assert scored["logprobs"]["token_logprobs"] == pytest.approx(echoed[:5])


@check
def check_suffix(ask: Asker, _: RunningServer) -> None:
    with pytest.raises(openai.UnprocessableEntityError, match="suffix") as caught:
        ask(suffix=" is its capital.")
    assert caught.value.param == "suffix"
    assert ask(suffix=None).text == BERLIN


@check
def check_peft(ask: Asker, _: RunningServer) -> None:
    with pytest.raises(openai.NotFoundError, match="nowhere") as caught:
        ask(peft="nowhere")
    assert (caught.value.code, caught.value.param) == ("adapter_not_found", "peft")
    assert ask(peft=None).text == BERLIN


@check
def check_stream(ask: Asker, _: RunningServer) -> None:
    answer = ask(stream=ask.stream)
    assert answer.text == BERLIN
    assert len({frame.id for frame in answer.frames}) == 1
    assert len(answer.frames) == (5 if ask.stream else 1)
    finishes = [part.finish_reason for frame in answer.frames for part in frame.choices]
    assert finishes == [None] * (len(finishes) - 1) + ["length"]


@check
def check_stream_options(ask: Asker, _: RunningServer) -> None:
    if not ask.stream:
        with pytest.raises(openai.UnprocessableEntityError, match="stream_options"):
            ask(stream_options={"include_usage": True})
        return
    *frames, last = ask(stream_options={"include_usage": True}).frames
    assert (last.choices, last.usage.completion_tokens) == ([], 4)
    assert all(frame.usage is None for frame in frames)
    assert all(frame.usage is None for frame in ask(stream_options=None).frames)
    counts = [
        frame.usage.completion_tokens for frame in ask(stream_options={"continuous_usage_stats": True}).frames
    ]
    assert counts == [1, 2, 3, 4]


@check
def check_return_token_ids(ask: Asker, _: RunningServer) -> None:
    choice = ask(return_token_ids=True).choices[0]
    assert (len(choice.token_ids), len(choice.prompt_token_ids or [])) == (4, 5)
    assert choice.token_ids[1] == 30
    plain = ask().choices[0]
    assert (plain.token_ids, plain.prompt_token_ids) == ([], None)


@check
def check_add_special_tokens(ask: Asker, _: RunningServer) -> None:
    """This model has no begin token to put first: the ids are the same."""
    ids = [ask(add_special_tokens=flag, return_token_ids=True).choices[0] for flag in (True, False, None)]
    assert ids[0] == ids[1] == ids[2]
    assert START not in (ids[0].prompt_token_ids or [])


@check
def check_skip_special_tokens(ask: Asker, _: RunningServer) -> None:
    fields = {"logit_bias": {str(START): 100}, "max_tokens": 2}
    skipped, shown = (ask(**fields, skip_special_tokens=flag).text for flag in (True, False))
    assert (skipped, shown) == ("", "<|im_start|>" * 2)


def wait_for_line(server: RunningServer, *words: str) -> bool:
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        if any(all(word in line for word in words) for line in list(server.lines)):
            return True
        time.sleep(0.01)
    return False


@check
def check_log_prompt(ask: Asker, server: RunningServer) -> None:
    ask(prompt=f"Secret {ask.stream}", max_tokens=1)
    ask(prompt=f"Public {ask.stream}", max_tokens=1, log_prompt=True)
    assert wait_for_line(server, f"prompt='Public {ask.stream}'")
    assert f"Secret {ask.stream}" not in server.log


@check
def check_user(ask: Asker, server: RunningServer) -> None:
    answer = ask(user="somebody", max_tokens=1)
    assert wait_for_line(server, answer.frames[0].id, "user='somebody'")


def test_no_parameter_is_left_out() -> None:
    assert set(CHECKS) == set(CompletionRequest.model_fields)


@pytest.fixture(scope="module", params=[False, pytest.param(True, marks=pytest.mark.slow)])
def ask(request: pytest.FixtureRequest, smollm2_server: RunningServer) -> Asker:
    client = openai.OpenAI(base_url=smollm2_server.url + "/v1", api_key=KEY, max_retries=0)
    return Asker(client, request.param)


SLOW = {"top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"}
SLOW |= {"logit_bias", "best_of", "seed"}  # they take many requests


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in CHECKS]
)
def test_each_parameter_does_what_it_says(name: str, ask: Asker, smollm2_server: RunningServer) -> None:
    CHECKS[name](ask, smollm2_server)
