"""What the schema promises, seen from outside: exact hold-back, order, counts, nulls."""

from __future__ import annotations

import codecs
import json
import math
from typing import Any

import pytest
from byte_tokenizer import BEGIN, END, ByteTokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted_model import CONFIDENCE, GREEDY, ScriptedModel, complete, make_service, recite

from tokenstep.completions.schema import CompletionChunk, CompletionRequest
from tokenstep.completions.service import CompletionService

STOPS = ["stop", "top", "opst", "é", "€s", "ss"]


def chunks(service: CompletionService, **fields: Any) -> list[CompletionChunk]:
    return list(service.stream(CompletionRequest.parse({**GREEDY, **fields, "stream": True})))


@settings(max_examples=60, deadline=None)
@given(
    pieces=st.lists(st.sampled_from(["s", "t", "o", "p", "é", "€", "st", "op"]), min_size=1, max_size=9),
    halves=st.lists(st.booleans(), min_size=9, max_size=9),
    stops=st.lists(st.sampled_from(STOPS), max_size=3),
)
def test_a_stream_holds_back_what_could_become_a_stop_or_a_character_and_nothing_else(
    pieces: list[str], halves: list[bool], stops: list[str]
) -> None:
    data = [piece.encode() for piece in pieces]
    tokens: list[bytes] = []  # characters of several bytes are cut in two where `halves` says so
    for piece, is_cut in zip(data, halves, strict=False):
        tokens += [piece[:1], piece[1:]] if is_cut and len(piece) > 1 else [piece]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            ByteTokenizer, "token_bytes", lambda _, token, of=[*tokens, b""]: of[min(token, len(of) - 1)]
        )
        service = make_service(recite(range(len(tokens))))
        found = chunks(service, stop=stops, max_tokens=len(tokens), return_token_ids=True)
    sent, bytes_so_far = "", b""
    for chunk in found:  # with token ids asked for, there is one for every token
        (choice,) = chunk.choices
        (token,) = choice.token_ids or [0]
        bytes_so_far += tokens[token]
        sent += choice.text
        text = codecs.getincrementaldecoder("utf-8")().decode(bytes_so_far)  # whole characters
        ended = min((end for stop in stops if (end := text.find(stop)) >= 0), default=None)
        if choice.finish_reason == "stop":
            assert ended is not None
            assert choice.stop_reason in stops
            assert text.startswith(sent)
            assert text[len(sent) :].startswith(str(choice.stop_reason))
            return
        assert ended is None
        if choice.finish_reason == "length":
            assert sent == bytes_so_far.decode("utf-8", "replace")
            return
        held = max(
            (size for stop in stops for size in range(len(stop)) if text.endswith(stop[:size])), default=0
        )
        assert sent == text[: len(text) - held]
    raise AssertionError("the stream has no end")


def test_the_choices_of_a_stream_carry_the_indexes_of_the_whole_response() -> None:
    fields = {"prompt": [[BEGIN], [65, 66]], "temperature": 2.0, "seed": 4, "max_tokens": 6, "n": 3}
    texts: dict[int, str] = {}
    service = make_service(ScriptedModel([]))
    for chunk in chunks(service, **fields):
        (choice,) = chunk.choices
        texts[choice.index] = texts.get(choice.index, "") + choice.text
    whole = complete(service, **fields).choices
    assert texts == {choice.index: choice.text for choice in whole}


@pytest.mark.parametrize("logprobs", [None, 2])
def test_best_of_ranks_by_the_mean_of_all_tokens_the_end_token_included(logprobs: int | None) -> None:
    fields = {"temperature": 2.0, "seed": 3, "max_tokens": 6, "return_token_ids": True}

    def service() -> CompletionService:
        model = ScriptedModel([65, 66, END])  # some choices end early, at the scripted end token
        return make_service(model)

    everything = complete(service(), **fields, n=8, logprobs=0).choices
    means = [
        sum(choice.logprobs.token_logprobs) / len(choice.logprobs.token_logprobs)
        for choice in everything
        if choice.logprobs
    ]
    assert len({len(choice.token_ids or []) for choice in everything}) > 1
    order = sorted(range(8), key=means.__getitem__, reverse=True)
    best = complete(service(), **fields, n=3, best_of=8, logprobs=logprobs)
    assert [choice.token_ids for choice in best.choices] == [everything[i].token_ids for i in order[:3]]
    assert [choice.index for choice in best.choices] == [0, 1, 2]
    assert all((choice.logprobs is None) == (logprobs is None) for choice in best.choices)
    assert best.usage.completion_tokens == sum(len(choice.token_ids or []) for choice in everything)


def test_best_of_is_chosen_for_each_prompt() -> None:
    fields = {
        "prompt": [[BEGIN], [65, 66]],
        "temperature": 2.0,
        "seed": 4,
        "max_tokens": 5,
        "ignore_eos": True,
    }
    best = complete(make_service(ScriptedModel([])), **fields, n=1, best_of=4, return_token_ids=True)
    assert [choice.index for choice in best.choices] == [0, 1]
    assert [choice.prompt_token_ids for choice in best.choices] == [[BEGIN], [65, 66]]
    assert best.usage.completion_tokens == 2 * 4 * 5


@pytest.mark.parametrize("stream", [False, True])
def test_usage_tells_what_the_prefix_cache_had(stream: bool) -> None:
    service = make_service(recite("fine", prompt_length=40))
    prompt = [65 + i % 20 for i in range(40)]

    def cached() -> int:
        fields = {"prompt": [prompt, [66]], "max_tokens": 2}
        if stream:
            usage = chunks(service, **fields, stream_options={"include_usage": True})[-1].usage
        else:
            usage = complete(service, **fields).usage
        assert usage is not None
        assert (usage.prompt_tokens, usage.total_tokens) == (41, 45)
        return usage.prompt_tokens_details.cached_tokens

    assert [cached(), cached()] == [0, 32]  # blocks of 16, of which the last token's is computed again


def test_the_fields_of_a_response_that_have_nothing_to_say_are_null() -> None:
    service = make_service(recite("ab"))
    (choice,) = json.loads(complete(service, max_tokens=2).model_dump_json())["choices"]
    assert choice == {
        "index": 0,
        "text": "ab",
        "logprobs": None,
        "finish_reason": "length",
        "stop_reason": None,
    }
    first, last = (json.loads(chunk.model_dump_json()) for chunk in chunks(service, max_tokens=2))
    assert first["choices"][0]["finish_reason"] is first["choices"][0]["stop_reason"] is None
    assert first["usage"] is last["usage"] is None
    assert last["choices"][0]["finish_reason"] == "length"


def test_every_log_probability_is_of_the_raw_distribution_and_the_same_float_everywhere() -> None:
    service = make_service(recite("abc"))
    bent = {"temperature": 0.3, "top_p": 0.5, "seed": 1, "logit_bias": {"100": 5}, "presence_penalty": 1}
    (choice,) = complete(service, **bent, max_tokens=3, logprobs=3).choices
    found = choice.logprobs
    assert found is not None
    others = sum(math.exp(math.sin(i * 0.7 + 1)) for i in range(BEGIN + 1) if i != ord("a"))
    assert found.token_logprobs[0] == pytest.approx(
        CONFIDENCE - math.log(math.exp(CONFIDENCE) + others), abs=1e-5
    )
    for token, value, top, entry in zip(
        found.tokens, found.token_logprobs, found.top_logprobs, found.content, strict=True
    ):
        assert top is not None
        assert value == top[token] == entry.logprob == entry.top_logprobs[0].logprob


@pytest.mark.parametrize("echo", [False, True])
def test_offsets_begin_behind_the_prompt_with_or_without_echo(echo: bool) -> None:
    service = make_service(recite([*"é".encode(), *b"x"], prompt_length=3))
    (choice,) = complete(service, prompt="h€"[1:], max_tokens=3, logprobs=0, echo=echo).choices
    assert choice.logprobs is not None
    assert choice.logprobs.text_offset == ([0, 0, 0] if echo else []) + [1, 1, 2]


def test_a_seeds_choices_do_not_depend_on_how_many_are_asked_for() -> None:
    fields = {"temperature": 2.0, "seed": -5, "max_tokens": 6}
    several = [choice.text for choice in complete(make_service(ScriptedModel([])), **fields, n=5).choices]
    for n in (1, 2, 4):
        choices = complete(make_service(ScriptedModel([])), **fields, n=n).choices
        assert [choice.text for choice in choices] == several[:n]
    assert len(set(several)) == 5
