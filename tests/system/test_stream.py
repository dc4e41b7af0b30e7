"""Streams add up to the whole response, come as they are generated, and leave nothing behind."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from real_model import FLOWERS, GERMANY, holds_something, is_idle, texts

import tokenstep as ts
from tokenstep.completions.schema import CompletionChunk


def added_up(chunks: list[CompletionChunk]) -> dict[int, dict[str, Any]]:
    """Text, log probabilities and ending of each choice."""
    whole: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        for choice in chunk.choices:
            sofar = whole.setdefault(choice.index, {"text": "", "tokens": [], "logprobs": [], "content": []})
            sofar["text"] += choice.text
            if choice.logprobs:
                sofar["tokens"] += choice.logprobs.tokens
                sofar["logprobs"] += choice.logprobs.token_logprobs
                sofar["content"] += choice.logprobs.content
            sofar |= {"finish": choice.finish_reason, "stop": choice.stop_reason}
    return whole


@pytest.mark.parametrize(
    ("prompt", "params"),
    [
        (GERMANY, {"seed": 4, "logprobs": 3}),
        (FLOWERS, {"temperature": 0, "logprobs": 2}),
        (FLOWERS, {"temperature": 0, "logprobs": 2, "echo": True, "stop": ["\U0001f339", "xyz"]}),
        (GERMANY, {"temperature": 0, "logprobs": 0, "stop": ["\n\nThe Unit", "ed Stat"]}),
        ([GERMANY, "Once upon"], {"seed": 5, "n": 2, "echo": True, "logprobs": 1}),
    ],
)
def test_a_stream_adds_up_to_the_whole_response(llm: ts.LLM, prompt: Any, params: dict[str, Any]) -> None:
    params = {"max_tokens": 8, **params}
    whole = llm.complete(prompt, **params)
    chunks = list(llm.complete(prompt, **params, stream=True))
    for choice in whole.choices:
        found = added_up(chunks)[choice.index]
        assert found["text"] == choice.text
        assert choice.logprobs is not None
        assert found["tokens"] == choice.logprobs.tokens
        assert found["logprobs"] == choice.logprobs.token_logprobs
        assert found["content"] == choice.logprobs.content
        assert (found["finish"], found["stop"]) == (choice.finish_reason, choice.stop_reason)
    assert is_idle(llm)


def test_text_comes_token_by_token_in_whole_characters(llm: ts.LLM) -> None:
    chunks = list(llm.complete(FLOWERS, max_tokens=9, temperature=0, ignore_eos=True, stream=True))
    pieces = [chunk.choices[0].text for chunk in chunks]
    assert len(pieces) >= 4
    assert not any("\ufffd" in piece for piece in pieces[:-1])
    steps = list(llm.complete(GERMANY, max_tokens=6, temperature=0, stream=True))
    assert [chunk.choices[0].text for chunk in steps] == [" Berlin", ".", "\n", "\n", "The", " United"]


def test_only_what_could_become_a_stop_is_held_back(llm: ts.LLM) -> None:
    chunks = llm.complete(GERMANY, max_tokens=6, temperature=0, stop="\n\nA", stream=True)
    assert [chunk.choices[0].text for chunk in chunks] == [" Berlin", ".", "\n\nThe", " United"]


def test_every_frame_carries_what_identifies_the_response(llm: ts.LLM) -> None:
    options = {"include_usage": True}
    chunks = list(llm.complete(GERMANY, max_tokens=3, seed=1, stream=True, stream_options=options))
    assert len({(chunk.id, chunk.created, chunk.model, chunk.system_fingerprint) for chunk in chunks}) == 1
    assert chunks[0].system_fingerprint == llm.system_fingerprint
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == (5, 3)


def test_a_dropped_stream_frees_its_blocks_and_rows(llm: ts.LLM) -> None:
    stream = llm.complete(GERMANY, max_tokens=200, n=3, stream=True)
    next(stream)
    assert holds_something(llm)
    stream.close()
    assert is_idle(llm)


def test_threads_share_the_batch_and_get_their_own_texts(llm: ts.LLM) -> None:
    prompts = [GERMANY, "1, 2, 3,", "Once upon a time", "The sun is"]
    alone = texts(llm.complete(prompts, max_tokens=4, temperature=0))
    found: dict[str, str] = {}

    def work(prompt: str) -> None:
        found[prompt] = texts(llm.complete(prompt, max_tokens=4, temperature=0))[0]

    threads = [threading.Thread(target=work, args=(prompt,)) for prompt in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert [found[prompt] for prompt in prompts] == alone
    assert is_idle(llm)
