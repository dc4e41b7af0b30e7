"""Prompts in all their forms, how texts end, and what the response says about both."""

from __future__ import annotations

import copy
import time
from typing import Any

import numpy as np
import pytest
import torch
from real_model import FLOWERS, GERMANY, forward_logits, is_idle, only, texts

import tokenstep as ts
from tokenstep.completions.errors import GenerationError, RequestError
from tokenstep.completions.schema import CompletionChoice
from tokenstep.completions.service import CompletionService

IM_END = 2  # SmolLM2's end token, "<|im_end|>"
ENDOFTEXT = 0  # a control token that isn't an end token
GREEDY: dict[str, Any] = {"max_tokens": 12, "temperature": 0}


def test_the_capital_of_germany_is_berlin(greedy: CompletionChoice) -> None:
    assert greedy.text.startswith("The capital of Germany is Berlin.")


def test_one_prompt_or_many_as_text_or_as_ids(llm: ts.LLM, greedy: CompletionChoice) -> None:
    ids = greedy.prompt_token_ids
    assert ids == llm.tokenizer.encode(GERMANY)
    for prompt in (GERMANY, [GERMANY], ids, [ids], tuple(ids), np.array(ids)):
        assert texts(llm.complete(prompt, max_tokens=2, temperature=0)) == [" Berlin."]
    mixed = llm.complete([GERMANY, "1, 2, 3,", GERMANY], max_tokens=5, temperature=0)
    assert texts(mixed) == [" Berlin.\n\nThe", " 4, 5", " Berlin.\n\nThe"]
    assert [choice.index for choice in mixed.choices] == [0, 1, 2]


@pytest.mark.parametrize("prompt", [None, "", [""]])
def test_an_empty_prompt_is_the_begin_token(llm: ts.LLM, prompt: object) -> None:
    completion = llm.complete(prompt, max_tokens=2, temperature=0, return_token_ids=True)
    assert only(completion).prompt_token_ids == [llm.tokenizer.bos_token_id]
    assert completion.usage.prompt_tokens == 1


def test_special_tokens_written_in_a_prompt_are_those_tokens(llm: ts.LLM) -> None:
    chat = "<|im_start|>user\nHi<|im_end|>\n"
    choice = only(llm.complete(chat, max_tokens=1, temperature=0, return_token_ids=True, echo=True))
    assert choice.prompt_token_ids is not None
    assert choice.prompt_token_ids[0] == 1
    assert IM_END in choice.prompt_token_ids
    assert choice.text.startswith(chat)


def test_a_prompt_is_computed_in_pieces_or_at_once_with_the_same_result(llm: ts.LLM) -> None:
    ids = llm.tokenizer.encode("The quick brown fox jumps over the lazy dog. " * 60)[:550]
    assert len(ids) > llm.service.engine.config.prefill_tokens
    choice = only(llm.complete(ids, max_tokens=1, temperature=0, logprobs=0, return_token_ids=True))
    assert choice.token_ids is not None
    assert choice.logprobs is not None
    logits = forward_logits(llm, ids)[-1]
    assert choice.token_ids[0] == logits.argmax()
    expected = logits.max() - np.logaddexp.reduce(logits)
    assert choice.logprobs.token_logprobs[0] == pytest.approx(expected, abs=2e-4)


class TestEnds:
    @pytest.mark.parametrize("stop", ["lin", ".\n", "Berlin.\n\nThe", " ", "n.\n\nT"])
    def test_a_stop_string_ends_the_text_before_itself(
        self, llm: ts.LLM, greedy: CompletionChoice, stop: str
    ) -> None:
        text = greedy.text.removeprefix(GERMANY)
        choice = only(llm.complete(GERMANY, **GREEDY, stop=stop))
        assert choice.text == text[: text.index(stop)]
        assert (choice.finish_reason, choice.stop_reason) == ("stop", stop)
        assert is_idle(llm)

    def test_the_stop_that_is_complete_first_counts(self, llm: ts.LLM) -> None:
        choice = only(llm.complete(GERMANY, **GREEDY, stop=["United", "\n\nThe", "elsewhere"]))
        assert (choice.text, choice.stop_reason) == (" Berlin.", "\n\nThe")

    def test_a_stop_of_several_tokens_of_one_character_each(self, llm: ts.LLM) -> None:
        full = only(llm.complete(FLOWERS, max_tokens=14, temperature=0)).text
        emoji = full[2]
        choice = only(llm.complete(FLOWERS, max_tokens=14, temperature=0, stop=emoji))
        assert len(emoji.encode()) == 4
        assert (choice.text, choice.stop_reason) == (full[: full.index(emoji)], emoji)

    def test_a_stop_token_ends_the_text_before_itself(self, llm: ts.LLM, greedy: CompletionChoice) -> None:
        assert greedy.token_ids is not None
        token = greedy.token_ids[1]
        choice = only(llm.complete(GERMANY, **GREEDY, stop_token_ids=[5, token], return_token_ids=True))
        assert (choice.text, choice.stop_reason) == (" Berlin", token)
        assert choice.token_ids == greedy.token_ids[:2]

    def test_an_end_token_ends_the_text_unless_it_is_ignored(self, llm: ts.LLM) -> None:
        params = {"max_tokens": 4, "temperature": 0, "logit_bias": {str(IM_END): 100}}
        ended = only(llm.complete(GERMANY, **params, logprobs=0))
        assert (ended.text, ended.finish_reason, ended.stop_reason) == ("", "stop", None)
        assert ended.logprobs is not None
        assert ended.logprobs.tokens == ["<|im_end|>"]
        ignored = llm.complete(GERMANY, **params, ignore_eos=True, skip_special_tokens=False)
        assert (only(ignored).text, only(ignored).finish_reason) == ("<|im_end|>" * 4, "length")

    def test_before_min_tokens_nothing_ends_the_text(self, llm: ts.LLM) -> None:
        params = {"max_tokens": 6, "temperature": 0, "min_tokens": 3, "return_token_ids": True}
        end = only(llm.complete(GERMANY, **params, logit_bias={str(IM_END): 100}))
        assert end.token_ids == [IM_END] * 3
        stop = only(llm.complete(GERMANY, **{**params, "min_tokens": 4}, stop="\n"))
        assert (stop.text, stop.stop_reason) == (" Berlin.\n", "\n")

    def test_a_stop_that_is_a_special_token_ends_at_that_token(self, llm: ts.LLM) -> None:
        params = {"max_tokens": 4, "temperature": 0, "logit_bias": {str(ENDOFTEXT): 100}}
        choice = only(llm.complete(GERMANY, **params, stop="<|endoftext|>", return_token_ids=True))
        assert (choice.text, choice.stop_reason) == ("", "<|endoftext|>")
        assert choice.token_ids == [ENDOFTEXT]


class TestEcho:
    def test_the_prompt_alone(self, llm: ts.LLM) -> None:
        completion = llm.complete([GERMANY, FLOWERS], max_tokens=0, echo=True)
        assert texts(completion) == [GERMANY, FLOWERS]
        assert {choice.finish_reason for choice in completion.choices} == {"length"}
        assert completion.usage.completion_tokens == 0
        assert completion.prompt is not None
        assert [echoed.text for echoed in completion.prompt] == [GERMANY, FLOWERS]

    def test_the_prompt_before_every_choice(self, llm: ts.LLM) -> None:
        completion = llm.complete(GERMANY, max_tokens=3, n=2, seed=1, echo=True)
        plain = llm.complete(GERMANY, max_tokens=3, n=2, seed=1)
        assert texts(completion) == [GERMANY + text for text in texts(plain)]

    def test_ids_are_echoed_as_their_text(self, llm: ts.LLM) -> None:
        ids = llm.tokenizer.encode(FLOWERS)
        assert only(llm.complete(ids, max_tokens=0, echo=True)).text == FLOWERS
        assert only(llm.complete(ids[:-1], max_tokens=0, echo=True)).text.endswith("\ufffd")


class TestResponse:
    def test_it_says_what_it_is_and_where_it_came_from(self, llm: ts.LLM) -> None:
        completion = llm.complete(GERMANY, max_tokens=1)
        assert completion.id.startswith("cmpl-")
        assert completion.object == "text_completion"
        assert abs(completion.created - time.time()) < 60
        assert completion.model == "smollm2"
        assert completion.id != llm.complete(GERMANY, max_tokens=1, model="smollm2").id
        assert completion.system_fingerprint == llm.system_fingerprint
        assert f"tokenstep-{ts.__version__}-" in llm.system_fingerprint
        assert "-cpu-" in llm.system_fingerprint
        assert "-float32-" in llm.system_fingerprint

    def test_usage_counts_each_prompt_once_and_every_token(self, llm: ts.LLM) -> None:
        completion = llm.complete([GERMANY, "Hello"], max_tokens=3, n=2, ignore_eos=True, seed=2)
        usage = completion.usage
        assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (6, 12, 18)


class TestRefusals:
    @pytest.mark.parametrize(
        ("params", "message"),
        [
            ({"prompt": [49152]}, r"^prompt\[0\] = 49152, expected 0 ≤ token id < 49152"),
            ({"prompt": "a " * 9000}, "^This model's maximum context length is 8192 tokens"),
            ({"prompt": "a", "max_tokens": 8192}, r"8193 tokens \(1 in the prompt, 8192 in the completion\)"),
            ({"prompt": b"bytes"}, "^prompt = b'bytes': expected a string"),
            ({"prompt": {"a": 1}}, "^prompt = {'a': 1}: expected a string"),
            ({"prompt": 5}, "^prompt = 5: expected a string"),
            ({"prompt": ["a", 5]}, r"^prompt = \['a', 5\]: expected a string"),
            ({"prompt": "\ud800"}, "unpaired surrogates"),
            ({"temperature": "hot"}, "^temperature = 'hot': expected a valid number"),
            ({"logit_bias": {"49152": 1}}, "^logit_bias: key '49152', expected a token id < 49152"),
            ({"max_tokens": 0}, "^max_tokens = 0, expected at least 1 without echo"),
        ],
    )
    def test_the_error_names_the_parameter_and_nothing_is_left(
        self, llm: ts.LLM, params: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(RequestError, match=message):
            llm.complete(**{"prompt": GERMANY, **params})
        assert is_idle(llm)

    def test_an_unknown_parameter_is_a_type_error(self, llm: ts.LLM) -> None:
        with pytest.raises(TypeError, match="unknown parameter 'max_token'"):
            llm.complete(GERMANY, max_token=3)

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"device": "tpu"}, ValueError, "device = 'tpu', expected 'auto', 'cpu' or 'cuda'"),
            ({"device": "cuda:x"}, ValueError, "device = 'cuda:x'"),
            ({"dtype": "int8"}, ValueError, "dtype = 'int8'"),
            ({"max_batch": 0}, ValueError, "max_batch = 0, expected at least 1"),
            ({"model": "/nowhere/model.gguf"}, FileNotFoundError, "/nowhere/model.gguf"),
        ],
    )
    def test_a_model_that_cannot_be_had_is_refused(
        self, arguments: dict[str, Any], error: type[Exception], message: str
    ) -> None:
        with pytest.raises(error, match=message):
            ts.LLM(**arguments)

    def test_a_bad_request_does_not_disturb_one_that_runs(
        self, llm: ts.LLM, greedy: CompletionChoice, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = llm.service.engine.runner.model
        sound = model.logits

        def poisoned(hidden: torch.Tensor) -> torch.Tensor:
            logits = sound(hidden).clone()
            logits[1:, 5] = float("nan")
            return logits

        stream = llm.complete(GERMANY, max_tokens=60, temperature=0, stream=True)
        text = next(stream).choices[0].text
        with pytest.raises(RequestError):
            llm.complete([[5], [-1]])
        monkeypatch.setattr(model, "logits", poisoned)  # of all rows but the first, the stream's
        with pytest.raises(GenerationError, match=r"the model's logits contain NaN or \+inf"):
            llm.complete("Once upon", max_tokens=4)
        text += "".join(chunk.choices[0].text for chunk in stream)
        assert text.startswith(" Berlin.\n\nThe United")
        assert is_idle(llm)

    def test_a_closed_model_says_so(self, llm: ts.LLM) -> None:
        closed = copy.copy(llm)
        closed._service = CompletionService(
            llm.service.engine, llm.tokenizer, model_name="smollm2", system_fingerprint=""
        )
        stream = closed.complete(GERMANY, max_tokens=2, temperature=0, stream=True)
        text = next(stream).choices[0].text
        closed.close()
        with pytest.raises(RuntimeError, match="has been closed"):
            closed.complete(GERMANY)
        assert text + "".join(chunk.choices[0].text for chunk in stream) == " Berlin."
