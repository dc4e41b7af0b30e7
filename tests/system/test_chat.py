"""Chat with the real model: in Python, on the command line, and with the unmodified `openai` client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from real_model import is_idle
from server_in_thread import server_in_thread

import tokenstep as ts
from tokenstep.cli.main import main
from tokenstep.completions.errors import RequestError

openai = pytest.importorskip("openai")

QUESTION = [{"role": "user", "content": "What is the capital of Germany?"}]
ANSWER = "The capital of Germany is Berlin."
GREEDY: dict[str, Any] = {"messages": QUESTION, "temperature": 0}


@pytest.fixture(scope="module")
def client(llm: ts.LLM) -> Iterator[Any]:
    with server_in_thread(llm.service) as address:
        yield openai.OpenAI(base_url=f"http://{address}/v1", api_key="none", max_retries=0)


def create(client: Any, **fields: Any) -> Any:
    return client.chat.completions.create(**{"model": "smollm2", **GREEDY, **fields})


def test_an_answer_ends_with_the_models_end_token(llm: ts.LLM) -> None:
    completion = llm.chat(**GREEDY, return_token_ids=True)
    (choice,) = completion.choices
    assert (choice.message.role, choice.message.content) == ("assistant", ANSWER)
    assert choice.finish_reason == "stop"
    prompt = llm.apply_chat_template(QUESTION)
    assert choice.prompt_token_ids == llm.tokenizer.encode(prompt, add_special_tokens=False)
    assert completion.usage.prompt_tokens == len(choice.prompt_token_ids)
    assert llm.complete(prompt, temperature=0, max_tokens=20).choices[0].text == ANSWER


def test_a_stream_is_the_same_answer_in_pieces(llm: ts.LLM) -> None:
    chunks = list(llm.chat(**GREEDY, stream=True, n=2))
    for index in range(2):
        deltas = [choice.delta for chunk in chunks for choice in chunk.choices if choice.index == index]
        assert "".join(delta.content for delta in deltas) == ANSWER
        assert [delta.role for delta in deltas] == ["assistant"] + [None] * (len(deltas) - 1)


def test_a_stream_that_is_dropped_frees_what_it_held(llm: ts.LLM) -> None:
    stream = llm.chat(QUESTION, stream=True, ignore_eos=True)
    next(stream)
    stream.close()
    assert is_idle(llm)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"messages": []}, "messages = []: List should have at least 1 item"),
        ({"messages": [{"content": "x"}]}, "messages[0].role is required"),
        ({"messages": [{"role": "", "content": "x"}]}, "messages[0].role = ''"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages: tokenstep.encode: text["),
        ({"messages": [{"role": "user", "content": "x", "odd": {1, 2}}]}, "messages: expected what JSON"),
        ({"tools": [{}]}, "tools is not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format: type = 'json_object'"),
        ({"top_logprobs": 2}, "top_logprobs is only allowed with logprobs"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens = 4, but max_tokens = 3"),
        ({"max_tokens": 0}, "max_tokens = 0: expected"),
        ({"max_tokens": 100_000}, "This model's maximum context length is"),
        (
            {"messages": [{"role": "user", "content": "word " * 9000}]},
            "This model's maximum context length is",
        ),
        (
            {"messages": [{"role": "user", "content": "word " * 400_000}]},
            "This model's maximum context length is 8192 tokens. However, the conversation has at least",
        ),
        ({"messages": [{"role": "user", "content": "x"}] * 20_000}, "messages = "),
        ({"stream_options": {"include_usage": True}}, "stream_options is only allowed"),
        ({"temperature": 3}, "temperature = 3"),
    ],
)
def test_a_wrong_request_is_named(llm: ts.LLM, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError) as caught:
        llm.chat(**{**GREEDY, **fields})
    assert caught.value.message.startswith(message)


def test_an_unknown_parameter_is_a_type_error(llm: ts.LLM) -> None:
    with pytest.raises(TypeError, match="unknown parameter 'echo'"):
        llm.chat(QUESTION, echo=True)


class TestOpenAIClient:
    def test_an_answer(self, client: Any) -> None:
        completion = create(client)
        assert completion.object == "chat.completion"
        assert completion.id.startswith("chatcmpl-")
        assert completion.system_fingerprint.startswith("tokenstep-")
        (choice,) = completion.choices
        assert (choice.message.role, choice.message.content, choice.finish_reason) == (
            "assistant",
            ANSWER,
            "stop",
        )
        assert completion.usage.total_tokens == completion.usage.prompt_tokens + 8

    def test_a_stream_with_usage(self, client: Any) -> None:
        *chunks, last = create(client, stream=True, stream_options={"include_usage": True})
        assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
        assert "".join(chunk.choices[0].delta.content for chunk in chunks) == ANSWER
        assert chunks[0].choices[0].delta.role == "assistant"
        assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "stop"
        assert last.choices == []
        assert last.usage.completion_tokens == 8
        assert all(chunk.usage is None for chunk in chunks)

    @pytest.mark.parametrize("stream", [False, True])
    def test_parameters_are_taken_together(self, client: Any, stream: bool) -> None:
        answer = create(
            client,
            temperature=1.0,
            top_p=0.9,
            presence_penalty=0.1,
            frequency_penalty=0.1,
            n=2,
            logit_bias={"30": -5},
            seed=7,
            stop=[" of"],
            user="somebody",
            max_tokens=4,
            extra_body={"top_k": 1, "min_p": 0.1, "repetition_penalty": 1.01, "stop_token_ids": [30]},
            stream=stream,
        )
        texts = ["", ""]
        for part in answer if stream else [answer]:
            for choice in part.choices:
                texts[choice.index] += (choice.delta if stream else choice.message).content
        assert texts == ["The capital"] * 2

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("fields", "texts"),
        [
            ({"max_tokens": 2}, ["The capital"]),
            ({"max_completion_tokens": 2}, ["The capital"]),
            ({"max_tokens": 2, "n": 2}, ["The capital"] * 2),
            ({"stop": "many"}, ["The capital of Ger"]),
            ({"stop": ["nothing", " of"]}, ["The capital"]),
            ({"temperature": 1.0, "top_p": 0.0}, ["The capital of"]),
            ({"temperature": 0.8, "seed": 7, "user": "somebody"}, None),
            ({"presence_penalty": 0.5, "frequency_penalty": -0.5}, None),
            ({"logit_bias": {"7777": 100}, "max_tokens": 1}, None),
            ({"response_format": {"type": "text"}, "tools": [], "logit_bias": None}, ["The capital of"]),
            ({"temperature": 1.0, "extra_body": {"top_k": 1}}, ["The capital of"]),
            ({"temperature": 1.0, "extra_body": {"min_p": 1.0}}, ["The capital of"]),
            ({"extra_body": {"repetition_penalty": 1.1, "min_tokens": 2}}, None),
            ({"extra_body": {"ignore_eos": True, "skip_special_tokens": False}}, ["The capital of"]),
            ({"extra_body": {"stop_token_ids": [3575]}}, ["The"]),
            ({"extra_body": {"add_generation_prompt": False}}, None),
            ({"extra_body": {"chat_template_kwargs": {"a": 1}, "log_prompt": True}}, ["The capital of"]),
            ({"extra_body": {"unheard_of": 1}, "user": None}, ["The capital of"]),
        ],
    )
    def test_every_parameter_is_taken_streamed_and_not(
        self, client: Any, fields: dict[str, Any], texts: list[str] | None
    ) -> None:
        if "stop" not in fields and "max_completion_tokens" not in fields:
            fields = {"max_tokens": 3, **fields}
        whole = [choice.message.content for choice in create(client, **fields).choices]
        assert all(whole)
        assert texts in (None, whole)
        pieces = [""] * fields.get("n", 1)
        for chunk in create(client, **fields, stream=True):
            for choice in chunk.choices:
                pieces[choice.index] += choice.delta.content
        assert all(pieces)
        assert texts in (None, pieces)

    @pytest.mark.parametrize("stream", [False, True])
    def test_log_probabilities_have_the_clients_form(self, client: Any, stream: bool) -> None:
        fields = {"logprobs": True, "top_logprobs": 2, "max_tokens": 3, "stream": stream}
        answer = create(client, **fields)
        parts = [chunk.choices[0].logprobs for chunk in answer] if stream else [answer.choices[0].logprobs]
        entries = [entry for part in parts for entry in part.content]
        assert [entry.token for entry in entries] == ["The", " capital", " of"]
        for entry in entries:
            assert bytes(entry.bytes).decode() == entry.token
            assert entry.top_logprobs[0].logprob == entry.logprob
            assert len(entry.top_logprobs) == 2

    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize(
        ("fields", "error", "status", "code"),
        [
            ({"temperature": 3}, "UnprocessableEntityError", 422, None),
            ({"messages": []}, "UnprocessableEntityError", 422, None),
            ({"tools": [{"type": "function"}]}, "UnprocessableEntityError", 422, None),
            ({"model": "gpt-4"}, "NotFoundError", 404, "model_not_found"),
            ({"max_tokens": 100_000}, "BadRequestError", 400, "context_length_exceeded"),
        ],
    )
    def test_errors_have_status_and_code(
        self, client: Any, fields: dict[str, Any], error: str, status: int, code: str | None, stream: bool
    ) -> None:
        with pytest.raises(getattr(openai, error)) as caught:
            create(client, **fields, stream=stream)
        assert (caught.value.status_code, caught.value.code) == (status, code)
        assert caught.value.body["message"]


class TestCommandLine:
    @pytest.fixture(autouse=True)
    def _loaded(self, llm: ts.LLM, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("tokenstep.llm.LLM", lambda *args, **options: llm)
        monkeypatch.setattr(llm, "close", lambda: None)

    def test_it_prints_the_answer(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["complete", "--chat", QUESTION[0]["content"], "--temperature", "0"]) == 0
        assert capsys.readouterr().out == ANSWER + "\n"

    def test_json_is_the_response_and_system_its_first_message(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        words = ["--system", "Say only yes.", "--json", "--logprobs", "1", "--max-tokens", "3"]
        assert main(["complete", "--chat", "Hello", *words, "--return-token-ids"]) == 0
        answer = json.loads(capsys.readouterr().out)
        assert answer["object"] == "chat.completion"
        assert len(answer["choices"][0]["logprobs"]["content"]) == 3
        assert answer["usage"]["prompt_tokens"] < 25  # without the template's own long system message

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--chat", "a", "b"], "--chat: expected one message, found 2"),
            (["--chat"], "--chat: expected one message, found 0"),
            (["--chat", "a", "--echo"], "--echo: not with --chat"),
            (["a", "--system", "b"], "--system: only with --chat"),
        ],
    )
    def test_wrong_usage_is_said(
        self, capsys: pytest.CaptureFixture[str], words: list[str], message: str
    ) -> None:
        assert main(["complete", *words]) == 2
        assert capsys.readouterr().err == f"tokenstep complete: {message}\n"
