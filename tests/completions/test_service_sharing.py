"""Requests beside each other: refused, dropped, failing, from many threads."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from byte_tokenizer import BEGIN, ByteTokenizer
from scripted_model import (
    CONTEXT,
    GREEDY,
    ScriptedModel,
    complete,
    holds_nothing,
    is_idle,
    make_service,
    recite,
)

from tokenstep.completions.errors import GenerationError, RequestError
from tokenstep.completions.schema import CompletionRequest


class TestRefusals:
    def refused(self, **fields: Any) -> RequestError:
        service = make_service(recite("fine"))
        with pytest.raises(RequestError) as caught:
            complete(service, **fields)
        assert is_idle(service)
        return caught.value

    @pytest.mark.parametrize("max_tokens", [None, 5, 0])
    def test_a_prompt_over_the_context_is_named(self, max_tokens: int | None) -> None:
        prompts = [[65], [65] * (CONTEXT + 1)]
        error = self.refused(prompt=prompts, max_tokens=max_tokens, echo=True)
        assert error.code == "context_length_exceeded"
        assert error.param == "prompt"
        assert error.message.startswith(f"This model's maximum context length is {CONTEXT} tokens.")
        assert f"({CONTEXT + 1} in the prompt[1], " in error.message

    def test_explicit_max_tokens_over_the_context_are_refused_and_the_default_is_cut(self) -> None:
        prompt = [65] * (CONTEXT - 2)
        assert self.refused(prompt=prompt, max_tokens=3).param == "max_tokens"
        completion = complete(make_service(recite("")), prompt=prompt, max_tokens=None)
        assert completion.usage.completion_tokens == 2

    def test_a_small_cache_is_given_as_the_reason(self) -> None:
        service = make_service(recite(""), kv_tokens=16)
        with pytest.raises(
            RequestError, match=r"length is 16 tokens \(what the KV cache holds: see kv_tokens\)"
        ):
            complete(service, max_tokens=16)

    @pytest.mark.parametrize(
        ("prompt", "named"),
        [
            ([], "prompt = []"),
            ([[65], []], "prompt[1] = []"),
            ([65, BEGIN + 1], f"prompt[1] = {BEGIN + 1}"),
            ([[65], [65, -1]], "prompt[1][1] = -1"),
        ],
    )
    def test_prompts_without_known_ids_are_refused(self, prompt: Any, named: str) -> None:
        assert self.refused(prompt=prompt).message.startswith(named)

    def test_a_text_whose_ids_the_model_lacks_is_refused(self) -> None:
        service = make_service(ScriptedModel([], vocab_size=100))
        with pytest.raises(RequestError, match=r"token 1 of prompt\[1\] = 195, expected 0 ≤ token id < 100"):
            complete(service, prompt=["abc", "aé"])
        with pytest.raises(RequestError, match=r"logit_bias: key '100', expected a token id < 100"):
            complete(service, prompt="a", logit_bias={"100": 1})

    @pytest.mark.parametrize(
        ("fields", "param"),
        [
            ({"logit_bias": {"5": 1, str(BEGIN + 1): 1}}, "logit_bias"),
            ({"stop_token_ids": [5, BEGIN + 1]}, "stop_token_ids"),
            ({"stop_token_ids": [-1]}, "stop_token_ids"),
            ({"model": "other"}, "model"),
            ({"suffix": "end"}, "suffix"),
            ({"peft": "adapter"}, "peft"),
        ],
    )
    def test_what_this_model_lacks_is_named(self, fields: dict[str, Any], param: str) -> None:
        error = self.refused(**fields)
        assert error.param == param
        assert error.code == {"model": "model_not_found", "peft": "adapter_not_found"}.get(param)

    @pytest.mark.parametrize("field", ["prompt", "suffix"])
    def test_a_text_far_over_the_context_is_refused_without_being_encoded(
        self, field: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delattr(ByteTokenizer, "encode")
        error = self.refused(**{field: "x" * 10_000})
        assert error.message == (
            "This model's maximum context length is 64 tokens."
            f" However, the {field} has at least 1666 tokens."
        )
        assert (error.param, error.code) == (field, "context_length_exceeded")


class TestSharing:
    def test_requests_of_many_threads_share_the_batch(self) -> None:
        model = recite("the same for every thread")
        service = make_service(model)
        texts: list[str] = []

        def work() -> None:
            texts.append(complete(service, max_tokens=25).choices[0].text)

        threads = [threading.Thread(target=work) for _ in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
        assert texts == ["the same for every thread"] * 12
        assert is_idle(service)

    def test_streams_that_are_read_in_turn_share_the_batch(self) -> None:
        model = recite("shared")
        model.hold_at = 3
        service = make_service(model)
        request = CompletionRequest.parse({**GREEDY, "max_tokens": 6, "stream": True})
        first, second = service.stream(request), service.stream(request)
        texts = [next(first).choices[0].text]
        threading.Timer(0.05, model.gate.set).start()  # when the second has come
        pairs = list(zip(first, second, strict=False))
        texts += [chunk.choices[0].text for chunk, _ in pairs]
        assert "".join(texts) == "shared"
        assert 2 in model.rows

    @pytest.mark.parametrize("drop", ["close", "collect"])
    def test_a_stream_that_is_dropped_frees_its_blocks_and_rows_before_the_next_step(self, drop: str) -> None:
        model = recite("never read to the end")
        model.hold_at = 5
        service = make_service(model)
        request = CompletionRequest.parse(
            {**GREEDY, "max_tokens": 20, "n": 2, "temperature": 1.0, "stream": True}
        )
        stream = service.stream(request)
        next(stream)
        assert not holds_nothing(service)
        if drop == "close":
            stream.close()
        del stream
        model.gate.set()
        assert is_idle(service)
        assert service.loop.stats().counters.generated_tokens < 20

    def test_a_stream_that_is_never_read_costs_nothing(self) -> None:
        service = make_service(recite("never read at all"))
        service.stream(CompletionRequest.parse({**GREEDY, "stream": True}))
        assert service.loop.stats().counters.steps == 0
        assert is_idle(service)

    def test_a_dropped_stream_does_not_disturb_another(self) -> None:
        model = recite("the other goes on", prompt_length=1)
        model.hold_at = 4
        service = make_service(model)
        request = CompletionRequest.parse({**GREEDY, "max_tokens": 17, "stream": True})
        dropped, kept = service.stream(request), service.stream(request)
        text = next(kept).choices[0].text
        threading.Timer(0.05, model.gate.set).start()
        next(dropped)
        dropped.close()
        text += "".join(chunk.choices[0].text for chunk in kept)
        assert text == "the other goes on"
        assert is_idle(service)

    def test_a_request_that_cannot_be_sampled_fails_alone(self) -> None:
        model = recite("unharmed text")
        model.poisoned_length = 20
        model.hold_at = 4
        service = make_service(model)
        fine = CompletionRequest.parse({**GREEDY, "max_tokens": 12, "stream": True})
        stream = service.stream(fine)
        text = next(stream).choices[0].text
        threading.Timer(0.05, model.gate.set).start()
        with pytest.raises(GenerationError, match="the model's logits contain NaN or \\+inf") as caught:
            complete(service, prompt=[65] * 18, max_tokens=5)
        assert caught.value.kind == "bad_logits"
        text += "".join(chunk.choices[0].text for chunk in stream)
        assert text == "unharmed tex"
        assert service.loop.stats().counters.failures == {"bad_logits": 1}
        assert is_idle(service)

    def test_after_a_failed_step_everybody_is_told_and_the_next_request_works(self) -> None:
        model = recite("works again")
        model.hold_at = 4
        service = make_service(model)
        stream = service.stream(CompletionRequest.parse({**GREEDY, "stream": True}))
        next(stream)
        model.broken = True
        model.gate.set()
        with pytest.raises(GenerationError, match="the engine's step has failed: the model is broken"):
            complete(service)
        assert is_idle(service)
        with pytest.raises(GenerationError, match="the model is broken"):
            list(stream)
        model.broken = False
        assert complete(service, max_tokens=11).choices[0].text == "works again"
        assert is_idle(service)
