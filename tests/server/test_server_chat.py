"""POST /v1/chat/completions over a scripted model: responses, streams, errors, hostile bodies."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from asgi_client import Client, Reply
from byte_tokenizer import BEGIN
from scripted_model import ScriptedModel, is_idle
from served import Served, serve_model

from tokenstep.completions.chat_schema import ChatCompletion, ChatCompletionChunk
from tokenstep.models.chat_template import ChatTemplate

CHAT = "/v1/chat/completions"
TEMPLATE = (
    "{% if messages[0].role == 'nobody' %}{{ raise_exception('there is nobody') }}{% endif %}"
    "{% for m in messages %}{{ m.content }}{% endfor %}{{ kind }}{% if add_generation_prompt %}>{% endif %}"
)
MESSAGES = [{"role": "user", "content": "ab"}]  # three tokens with the template's own
BODY: dict[str, Any] = {"model": "scripted", "messages": MESSAGES, "temperature": 0, "max_tokens": 4}


def serve_chat(template: str | None = TEMPLATE, **options: Any) -> Served:
    served = serve_model(ScriptedModel([BEGIN, BEGIN, *b"an answer"]), **options)
    found = None if template is None else ChatTemplate(template, {})
    served.service.limits.tokenizer.chat_template = found
    return served


def post(served: Served, path: str = CHAT, **fields: Any) -> Reply:
    return asyncio.run(Client(served.app).post(path, {**BODY, **fields}))


@pytest.mark.parametrize("path", [CHAT, "/chat/completions"])
def test_an_answer_has_the_usual_form(path: str) -> None:
    served = serve_chat()
    reply = post(served, path, logprobs=True, top_logprobs=1, n=2)
    assert reply.status == 200
    answer = ChatCompletion.model_validate(reply.json())
    assert [choice.message.content for choice in answer.choices] == ["an a"] * 2
    assert reply.json()["choices"][0]["message"] == {"role": "assistant", "content": "an a", "refusal": None}
    assert answer.choices[0].logprobs is not None
    assert len(answer.choices[0].logprobs.content) == 4
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 8)
    assert is_idle(served.service)


@pytest.mark.parametrize("usage_chunk", ["extra", "last"])
def test_a_stream_says_the_role_once_and_its_usage_where_it_is_wanted(usage_chunk: Any) -> None:
    served = serve_chat(usage_chunk=usage_chunk)
    reply = post(served, stream=True, n=2, stream_options={"include_usage": True})
    *frames, done = reply.frames
    assert done == "[DONE]"
    chunks = [ChatCompletionChunk.model_validate(frame) for frame in frames]
    for index in range(2):
        choices = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
        assert "".join(choice.delta.content for choice in choices) == "an a"
        assert [choice.delta.role for choice in choices] == ["assistant", None, None, None]
        assert [choice.finish_reason for choice in choices] == [None, None, None, "length"]
    assert [chunk.usage is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert bool(chunks[-1].choices) == (usage_chunk == "last")


def test_text_parts_and_further_fields_reach_the_template() -> None:
    served = serve_chat("{% for m in messages %}{{ m.content }}{{ m.name }}{% endfor %}{{ kind }}")
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "user", "content": parts, "name": "x"}, {"role": "assistant", "content": None}]
    reply = post(served, messages=messages, chat_template_kwargs={"kind": "!"}, return_token_ids=True)
    assert bytes(reply.json()["choices"][0]["prompt_token_ids"]) == b"a\nbx!"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "status", "param", "message"),
    [
        ({"messages": [{"role": "nobody"}]}, 422, "messages", "messages: there is nobody"),
        (
            {"messages": [{"role": "user", "content": "x" * 1000}]},
            400,
            "messages",
            "the conversation has at least",
        ),
        ({"messages": None}, 422, "messages", "messages is required"),
        ({"messages": [{"role": "user", "content": 5}]}, 422, "messages", "messages[0].content"),
        ({"messages": [{"role": "u"}] * 20_000}, 422, "messages", "at most 16384"),
        (
            {"chat_template_kwargs": {"messages": 1, "kind": "x" * 100}},
            400,
            "messages",
            "maximum context length",
        ),
        ({"model": "other"}, 404, "model", "model = 'other'"),
        ({"peft": "../other"}, 404, "peft", "peft = '../other', expected none: no adapter is served"),
        ({"n": 128}, 413, None, "prompts × max(n, best_of) = 128"),
    ],
)
def test_errors_name_what_is_wrong_with_their_status(
    fields: dict[str, Any], status: int, param: str | None, message: str, stream: bool
) -> None:
    reply = post(serve_chat(max_choices=100), **fields, stream=stream)
    error = reply.json()["error"]
    assert (reply.status, error["param"]) == (status, param)
    assert message in error["message"]


def test_a_model_without_a_template_says_so() -> None:
    reply = post(serve_chat(None))
    assert (reply.status, reply.json()["error"]["param"]) == (422, "messages")
    assert reply.json()["error"]["message"] == "messages: the model 'scripted' has no chat template"


def test_deep_json_in_a_message_is_an_error_and_the_next_request_is_served() -> None:
    served = serve_chat("{{ messages[0].x | tojson }}")
    deep = b'{"model": "scripted", "messages": [{"role": "user", "x": ' + b"[" * 150 + b"]" * 150 + b"}]}"
    too_deep = deep.replace(b"[" * 150, b"[" * 100_000).replace(b"]" * 150, b"]" * 100_000)

    async def work() -> list[int]:
        client = Client(served.app)
        replies = [await client.post(CHAT, pieces=[content]) for content in (deep, too_deep)]
        return [reply.status for reply in replies]

    assert asyncio.run(work()) == [400, 422]  # 150 levels are more than the context's 64 tokens
    assert post(serve_chat()).status == 200
