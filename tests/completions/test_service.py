"""Requests through service and engine, over a model whose text is known beforehand."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from byte_tokenizer import BEGIN, END, WORDS, ByteTokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted_model import GREEDY, ScriptedModel, complete, is_idle, make_service, recite

from tokenstep.completions.schema import CompletionRequest
from tokenstep.completions.service import CompletionService

EURO = 256 + WORDS.index("€".encode()[:2])
EURO_REST = 256 + WORDS.index(b"\xac!")


def streamed(service: CompletionService, **fields: Any) -> dict[int, dict[str, Any]]:
    """What the chunks of each choice add up to."""
    request = CompletionRequest.parse({**GREEDY, **fields, "stream": True})
    whole: dict[int, dict[str, Any]] = {}
    for chunk in service.stream(request):
        for choice in chunk.model_dump()["choices"]:
            sofar = whole.setdefault(choice["index"], {"text": "", "logprobs": None, "token_ids": []})
            assert "finish_reason" not in sofar, "nothing follows the end"
            sofar["text"] += choice["text"]
            sofar["token_ids"] += choice.get("token_ids") or []
            if choice["logprobs"] is not None:
                found = sofar["logprobs"] or {key: [] for key in choice["logprobs"]}
                sofar["logprobs"] = {key: found[key] + value for key, value in choice["logprobs"].items()}
            if choice["finish_reason"]:
                sofar |= {key: choice[key] for key in ("finish_reason", "stop_reason")}
    return whole


def unstreamed(service: CompletionService, **fields: Any) -> dict[int, dict[str, Any]]:
    choices = complete(service, **fields).model_dump()["choices"]
    keys = ("text", "logprobs", "finish_reason", "stop_reason")
    return {
        choice["index"]: {key: choice[key] for key in keys} | {"token_ids": choice.get("token_ids") or []}
        for choice in choices
    }


def test_the_text_is_what_the_model_says() -> None:
    (choice,) = complete(make_service(recite("hello there!"))).choices
    assert (choice.text, choice.finish_reason, choice.stop_reason) == ("hello there!", "length", None)


@pytest.mark.parametrize("skip_special_tokens", [True, False])
def test_an_end_token_ends_the_text_and_is_not_in_it(skip_special_tokens: bool) -> None:
    service = make_service(recite([*b"bye", END, *b"more"]))
    completion = complete(service, skip_special_tokens=skip_special_tokens, return_token_ids=True, logprobs=0)
    (choice,) = completion.choices
    assert (choice.text, choice.finish_reason, choice.stop_reason) == ("bye", "stop", None)
    assert choice.token_ids == [*b"bye", END]
    assert choice.logprobs is not None
    assert choice.logprobs.tokens == ["b", "y", "e", "</s>"]
    assert completion.usage.completion_tokens == 4


@pytest.mark.parametrize(
    ("fields", "text", "reason"),
    [
        ({"stop": "o w"}, "hell", "o w"),
        ({"stop": ["world", "wor"]}, "hello ", "wor"),
        ({"stop": ["nothing", "h"]}, "", "h"),
        ({"stop_token_ids": [ord("w")]}, "hello ", ord("w")),
        ({"stop": "l", "min_tokens": 4}, "hel", "l"),
        ({"stop": "l", "min_tokens": 5}, "hello wor", "l"),
        ({"stop_token_ids": [ord("l")], "min_tokens": 5}, "hello wor", ord("l")),
        ({"stop": "</s>"}, "hello world", "</s>"),
        ({"ignore_eos": True, "stop": "</s>"}, "hello world", "</s>"),
        ({"ignore_eos": True, "stop_token_ids": [END]}, "hello world", END),
        ({"skip_special_tokens": False, "stop": "</s>"}, "hello world", "</s>"),
    ],
)
def test_stops_end_the_text_before_themselves(fields: dict[str, Any], text: str, reason: str | int) -> None:
    service = make_service(recite([*b"hello world", END, *b"tail"]))
    (choice,) = complete(service, max_tokens=16, **fields).choices
    assert (choice.text, choice.finish_reason, choice.stop_reason) == (text, "stop", reason)
    assert is_idle(service)


def test_ignore_eos_goes_on_and_shows_the_token_where_control_tokens_are_shown() -> None:
    service = make_service(recite([*b"a", END, *b"b", END, *b"cd"]))
    assert complete(service, max_tokens=6, ignore_eos=True).choices[0].text == "abcd"
    shown = complete(service, max_tokens=6, ignore_eos=True, skip_special_tokens=False)
    assert shown.choices[0].text == "a</s>b</s>cd"


@pytest.mark.parametrize("n", [1, 5])
def test_at_temperature_0_all_choices_are_one_computation(n: int) -> None:
    model = recite("all the same")
    completion = complete(make_service(model), n=n, logprobs=2)
    assert set(model.rows) == {1}
    assert [choice.index for choice in completion.choices] == list(range(n))
    assert {choice.text for choice in completion.choices} == {"all the same"}
    assert completion.usage.completion_tokens == 12 * n


def test_equal_choices_end_together_at_a_stop() -> None:
    service = make_service(recite("one. two. three."))
    completion = complete(service, n=3, stop=".", max_tokens=30)
    assert [choice.text for choice in completion.choices] == ["one"] * 3
    assert is_idle(service)


def test_choices_are_numbered_by_prompt_then_choice() -> None:
    model = ScriptedModel([])
    fields = {"prompt": [[BEGIN], [65, 66]], "temperature": 2.0, "seed": 4, "max_tokens": 6, "n": 3}
    choices = complete(make_service(model), **fields, return_token_ids=True).choices
    assert [choice.index for choice in choices] == list(range(6))
    assert [choice.prompt_token_ids for choice in choices] == [[BEGIN]] * 3 + [[65, 66]] * 3
    assert len({choice.text for choice in choices}) == 6
    first = complete(make_service(model), **{**fields, "n": 1}).choices
    assert [choice.text for choice in first] == [choices[0].text, choices[3].text]


def test_the_services_seed_is_for_requests_without_one() -> None:
    fields = {"temperature": 2.0, "max_tokens": 8}
    service = make_service(ScriptedModel([]), default_seed=4)
    seeded = complete(make_service(ScriptedModel([])), **fields, seed=4).choices
    assert complete(service, **fields).choices == complete(service, **fields, seed=None).choices == seeded
    assert complete(service, **fields, seed=5).choices != seeded
    unseeded = make_service(ScriptedModel([]))
    assert complete(unseeded, **fields).choices != complete(unseeded, **fields).choices


def test_best_of_returns_the_likeliest_first_and_counts_all() -> None:
    fields = {"temperature": 2.0, "seed": 4, "max_tokens": 6, "logprobs": 0}
    everything = complete(make_service(ScriptedModel([])), **fields, n=5).choices
    best = complete(make_service(ScriptedModel([])), **fields, n=2, best_of=5)
    means = {choice.text: sum(choice.logprobs.token_logprobs) / 6 for choice in everything if choice.logprobs}
    assert [choice.text for choice in best.choices] == sorted(means, key=means.__getitem__, reverse=True)[:2]
    assert [choice.index for choice in best.choices] == [0, 1]
    assert best.usage.completion_tokens == 30


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.lists(
        st.one_of(
            st.sampled_from([*b"stop", EURO, EURO_REST, END, 256 + WORDS.index(b"stop"), *"é日".encode()]),
            st.integers(0, BEGIN),
        ),
        min_size=1,
        max_size=12,
    ),
    fields=st.fixed_dictionaries(
        {
            "stop": st.lists(st.sampled_from(["stop", "top", "€", "ss", "</s>", "é"]), max_size=3),
            "logprobs": st.sampled_from([None, 0, 2]),
            "echo": st.booleans(),
            "prompt": st.sampled_from([[BEGIN], [*b"a"], [0xE2], "x"]),
            "skip_special_tokens": st.booleans(),
            "ignore_eos": st.booleans(),
            "return_token_ids": st.booleans(),
            "min_tokens": st.integers(0, 4),
            "n": st.integers(1, 2),
            "max_tokens": st.integers(1, 12),
        }
    ),
    strips_first_space=st.booleans(),
)
def test_a_stream_adds_up_to_the_whole_response(
    tokens: list[int], fields: dict[str, Any], strips_first_space: bool
) -> None:
    service = make_service(recite(tokens), strips_first_space=strips_first_space)
    assert streamed(service, **fields) == unstreamed(service, **fields)
    assert is_idle(service)


def cut(text: str, places: list[int]) -> list[bytes]:
    data = text.encode()
    bounds = sorted({0, len(data), *(place % (len(data) + 1) for place in places)})
    return [data[begin:end] for begin, end in pairwise(bounds)]


@settings(max_examples=80, deadline=None)
@given(
    text=st.text(alphabet="abé€😀", min_size=1, max_size=10),
    stops=st.lists(st.text(alphabet="abé€😀", min_size=1, max_size=3), max_size=3),
    cuts=st.tuples(*[st.lists(st.integers(0, 40), max_size=8)] * 2),
)
def test_text_does_not_depend_on_how_it_is_cut_into_tokens(
    text: str, stops: list[str], cuts: tuple[list[int], list[int]]
) -> None:
    results = []
    for places in cuts:
        tokens = cut(text, places)
        with pytest.MonkeyPatch.context() as patch:  # ids 0, 1, … are the pieces
            patch.setattr(
                ByteTokenizer, "token_bytes", lambda _, token, of=[*tokens, b""]: of[min(token, len(of) - 1)]
            )
            service = make_service(recite(range(len(tokens))))
            (choice,) = complete(service, stop=stops, max_tokens=len(tokens)).choices
        results.append((choice.text, choice.stop_reason))
    assert results[0] == results[1]


class TestEcho:
    def test_a_text_prompt_comes_back_to_the_letter(self) -> None:
        service = make_service(recite("!", prompt_length=6))
        completion = complete(service, prompt=" h€y", max_tokens=1, echo=True)
        assert completion.choices[0].text == " h€y!"
        assert completion.prompt is not None
        assert completion.prompt[0].text == " h€y"

    def test_a_character_begun_in_the_prompt_is_completed_by_the_text(self) -> None:
        service = make_service(recite([0x82, 0xAC], prompt_length=2))
        prompt = [ord("a"), 0xE2]
        assert complete(service, prompt=prompt, max_tokens=2, echo=True).choices[0].text == "a€"
        assert complete(service, prompt=prompt, max_tokens=2).choices[0].text == "€"
        alone = complete(service, prompt=prompt, max_tokens=0, echo=True).choices[0]
        assert (alone.text, alone.finish_reason) == ("a\ufffd", "length")

    def test_log_probabilities_begin_with_null_for_the_first_token(self) -> None:
        service = make_service(recite("!", prompt_length=3))
        (choice,) = complete(service, prompt="abc", max_tokens=1, echo=True, logprobs=2).choices
        found = choice.logprobs
        assert found is not None
        assert found.tokens == ["a", "b", "c", "!"]
        assert found.text_offset == [0, 1, 2, 3]
        assert found.token_logprobs[0] is None
        assert found.top_logprobs[0] is None
        assert [entry.token for entry in found.content] == ["b", "c", "!"]
        assert found.token_logprobs[1:] == [entry.logprob for entry in found.content]

    def test_loglikelihood_scores_the_prompt_without_echoing_it(self) -> None:
        service = make_service(recite("", prompt_length=3))
        completion = complete(service, prompt=["abc", "x"], max_tokens=0, loglikelihood=True)
        assert [choice.text for choice in completion.choices] == ["", ""]
        assert completion.prompt is not None
        first, second = (echoed.logprobs for echoed in completion.prompt)
        assert first is not None
        assert second is not None
        assert [value is None for value in first.token_logprobs] == [True, False, False]
        assert second.token_logprobs == [None]
        assert completion.usage.total_tokens == 4

    def test_a_stream_gives_the_prompts_on_its_last_frame(self) -> None:
        service = make_service(recite("hey"))
        fields = {**GREEDY, "max_tokens": 3, "n": 2, "echo": True, "stream": True}
        chunks = [chunk.model_dump() for chunk in service.stream(CompletionRequest.parse(fields))]
        assert ["prompt" in chunk for chunk in chunks] == [False] * (len(chunks) - 1) + [True]


class TestUsage:
    def test_each_prompt_counts_once_and_every_token_of_every_choice(self) -> None:
        service = make_service(ScriptedModel([]))
        completion = complete(service, prompt=["abc", "x"], n=2, max_tokens=3, temperature=1)
        usage = completion.usage.model_dump()
        assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (4, 12, 16)
        assert usage["prompt_tokens_details"] == {"audio_tokens": 0, "cached_tokens": 0}
        assert set(usage["completion_tokens_details"].values()) == {0}

    def test_it_comes_in_a_last_frame_without_choices_if_asked_for(self) -> None:
        service = make_service(recite("hey"))
        fields = {**GREEDY, "max_tokens": 3, "stream": True}
        request = CompletionRequest.parse({**fields, "stream_options": {"include_usage": True}})
        *chunks, last = service.stream(request)
        assert last.choices == []
        assert last.usage is not None
        assert last.usage.completion_tokens == 3
        assert all(chunk.usage is None for chunk in chunks)
        assert all(chunk.usage is None for chunk in service.stream(CompletionRequest.parse(fields)))

    def test_it_can_be_on_every_frame(self) -> None:
        service = make_service(recite("hey"))
        options = {"continuous_usage_stats": True}
        request = CompletionRequest.parse(
            {**GREEDY, "max_tokens": 3, "stream": True, "stream_options": options}
        )
        counts = [chunk.usage.completion_tokens for chunk in service.stream(request) if chunk.usage]
        assert counts == [1, 2, 3]

    def test_tokens_behind_a_stop_string_count_as_generated(self) -> None:
        service = make_service(recite("abcd"))
        completion = complete(service, stop="bc", n=2)
        assert completion.usage.completion_tokens == 6


def test_the_prompt_goes_to_the_request_log_only_if_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    service = make_service(recite("x"))
    with caplog.at_level("INFO", "tokenstep.requests"):
        complete(service, prompt="secret", max_tokens=1)
        assert "secret" not in caplog.text
        complete(service, prompt="known", max_tokens=1, log_prompt=True, user="me")
    assert "known" in caplog.text
    assert "'me'" in caplog.text
