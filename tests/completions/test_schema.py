"""The request: what is accepted, what is refused, and how that is said."""

from __future__ import annotations

import gc
import logging
import weakref
from typing import Any

import pytest

from tokenstep.completions.errors import RequestError
from tokenstep.completions.schema import Completion, CompletionChoice, CompletionRequest, StreamOptions, Usage

ACCEPTED = {
    "prompt": ["", "text", ["a", "b"], [1, 2], [[1], [2, 3]], ["", "b"]],
    "max_tokens": [1, 16, 100000],
    "temperature": [0, 2, 0.5, 1e-6],
    "top_p": [0, 1, 0.5],
    "top_k": [-1, 0, 1, 10**6],
    "min_p": [0, 1, 0.05],
    "repetition_penalty": [2e-45, 0.01, 1, 2, 5, 3.4e38],
    "presence_penalty": [-2, 2, 0],
    "frequency_penalty": [-2, 2, 0],
    "logit_bias": [{}, {"5": 1}, {"5": None}, {"0": -100, "7": 100.0}, {5: 1}],
    "n": [1, 128],
    "best_of": [1, 128],
    "seed": [0, -(2**63), 2**63 - 1],
    "stop": [[], "a", ["a"], ["a"] * 16],
    "stop_token_ids": [[], [1, 2]],
    "min_tokens": [0, 5],
    "logprobs": [0, 20],
}
REFUSED = {
    "prompt": [[], 5, [1, "a"], [1.5], [[1], "a"], {"a": 1}, [True], [["a"]], [None]],
    "max_tokens": [-1, 1.5, "many", True],
    "temperature": [-0.1, 2.1, float("nan"), float("inf"), "hot", False],
    "top_p": [-0.1, 1.1, float("nan")],
    "top_k": [-2, 1.5],
    "min_p": [-0.1, 1.1],
    "repetition_penalty": [0, -1, 1e-50, 1e39, float("inf")],
    "presence_penalty": [-2.1, 2.1],
    "frequency_penalty": [-2.1, 2.1],
    "logit_bias": [
        {"a": 1},
        {"-1": 1},
        {"01": 1},
        {"5": 101},
        {"5": -100.5},
        {"5": float("nan")},
        [1],
        {"²": 1},
    ],
    "n": [0, 129, True],
    "best_of": [0, 129],
    "seed": [2**63, -(2**63) - 1, 1.5, True],
    "stop": ["", ["a", ""], ["a"] * 17, [1], 5],
    "stop_token_ids": [5, ["a"]],
    "min_tokens": [-1],
    "logprobs": [-1, 21, True],
    "echo": ["perhaps", 5],
    "stream_options": [5],
}


def cases(table: dict[str, list[Any]]) -> list[tuple[str, Any]]:
    return [(field, value) for field, values in table.items() for value in values]


@pytest.mark.parametrize(("field", "value"), cases(ACCEPTED))
def test_values_in_range_are_accepted(field: str, value: object) -> None:
    CompletionRequest.parse({field: value})


@pytest.mark.parametrize(("field", "value"), cases(REFUSED))
def test_a_value_out_of_range_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(RequestError) as caught:
        CompletionRequest.parse({field: value})
    assert caught.value.param == field
    assert caught.value.message.startswith(field)


def test_the_error_shows_the_value_and_what_was_expected() -> None:
    with pytest.raises(RequestError, match=r"^temperature = 2\.5: expected less than or equal to 2$"):
        CompletionRequest.parse({"temperature": 2.5})
    with pytest.raises(RequestError, match=r"^logit_bias = .*: key 'cat', expected a token id$"):
        CompletionRequest.parse({"logit_bias": {"cat": 1}})
    with pytest.raises(RequestError, match=rf"^seed = {2**63}: expected a signed 64-bit integer$"):
        CompletionRequest.parse({"seed": 2**63})


@pytest.mark.parametrize("fields", [{"max_tokens": 0}, {"temperature": 3}, {"stop": ""}])
def test_a_refused_request_leaves_nothing_behind(fields: dict[str, Any]) -> None:
    class Caller:
        pass

    def refused() -> weakref.ref[Caller]:
        caller = Caller()  # lives in this frame, which the error's traceback holds
        with pytest.raises(RequestError):
            CompletionRequest.parse(fields)
        return weakref.ref(caller)

    found = refused()
    gc.collect()
    assert found() is None


@pytest.mark.parametrize("field", CompletionRequest.model_fields)
def test_null_means_the_default(field: str) -> None:
    request = CompletionRequest.parse({field: None})
    assert getattr(request, field) == getattr(CompletionRequest(), field)
    assert not request.given(field)


@pytest.mark.parametrize("field", StreamOptions.model_fields)
def test_null_means_the_default_in_stream_options_too(field: str) -> None:
    request = CompletionRequest.parse({"stream": True, "stream_options": {field: None}})
    assert request.stream_options == StreamOptions()


def test_unknown_fields_are_ignored_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        CompletionRequest.parse({"prompt": "a", "wisdom": 3, "speed": 1})
    assert [record.getMessage() for record in caplog.records] == [
        "ignored unknown request fields: speed, wisdom"
    ]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"n": 3, "best_of": 2}, "best_of"),
        ({"n": 1, "best_of": 2, "stream": True}, "best_of"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
    ],
)
def test_fields_that_do_not_fit_each_other_are_refused(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        CompletionRequest.parse(fields)
    assert caught.value.param == param


@pytest.mark.parametrize(
    "fields", [{"max_tokens": 0, "echo": True}, {"max_tokens": 0, "loglikelihood": True}]
)
def test_no_tokens_are_fine_where_the_prompt_is_wanted(fields: dict[str, Any]) -> None:
    assert CompletionRequest.parse(fields).max_tokens == 0


def test_fields_that_nobody_asked_for_are_left_out_of_the_response() -> None:
    completion = Completion(
        id="cmpl-1",
        created=1,
        model="m",
        system_fingerprint="f",
        choices=[CompletionChoice(index=0, text="a")],
        usage=Usage(prompt_tokens=1, completion_tokens=1, total_tokens=2),
    )
    dumped = completion.model_dump()
    assert "prompt" not in dumped
    assert dumped["choices"][0] == {
        "index": 0,
        "text": "a",
        "logprobs": None,
        "finish_reason": None,
        "stop_reason": None,
    }
    assert Completion.model_validate_json(completion.model_dump_json()) == completion
