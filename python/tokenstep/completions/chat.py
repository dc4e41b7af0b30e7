"""Chat: a conversation is written down by the model's template and completed like any other prompt."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Generator, Mapping, Sequence
from typing import Any

from tokenstep.completions.chat_schema import (
    AssistantMessage,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatDelta,
    ChatLogprobs,
    ChatRequest,
)
from tokenstep.completions.errors import RequestError
from tokenstep.completions.prompts import check_length
from tokenstep.completions.run import Limits
from tokenstep.completions.sandbox import TemplateFailed, TemplateRefused, sandbox
from tokenstep.completions.schema import Completion, CompletionChoice, CompletionChunk, CompletionRequest
from tokenstep.completions.service import CompletionService


def render_chat(
    limits: Limits,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """The conversation as the model's template writes it; raises RequestError if it can't."""
    template = limits.tokenizer.chat_template
    if template is None:
        raise RequestError(
            f"messages: the model {limits.model_name!r} has no chat template", param="messages"
        )
    fields = {
        **template.special_tokens,
        "tools": None,
        "documents": None,
        **(variables or {}),
        "messages": list(messages),
        "add_generation_prompt": add_generation_prompt,
    }
    try:
        return sandbox.render(template.source, fields)
    except TemplateRefused as error:
        raise RequestError(f"messages: {error}", param="messages") from None
    except TemplateFailed as error:
        raise RequestError(
            f"messages: the model's chat template fails with these: {error}", param="messages"
        ) from None
    except (TypeError, ValueError, RecursionError) as error:  # of json
        raise RequestError(f"messages: expected what JSON can hold: {error}", param="messages") from None


def as_completion(request: ChatRequest, limits: Limits) -> CompletionRequest:
    """The completion that continues the conversation; raises RequestError if there can't be one."""
    text = render_chat(
        limits,
        [message.model_dump() for message in request.messages],
        add_generation_prompt=request.add_generation_prompt,
        variables=request.chat_template_kwargs,
    )
    check_length(text, "conversation", "messages", limits.tokenizer, limits.context)
    try:
        # the template has written the begin token, if there is one
        prompt = limits.tokenizer.encode(text, add_special_tokens=False)
    except ValueError as error:
        raise RequestError(f"messages: {error}", param="messages") from None
    if not prompt:
        raise RequestError("messages: the model's chat template writes nothing for these", param="messages")
    room = limits.context - len(prompt)
    if room < 1:
        raise RequestError(
            f"This model's maximum context length is {limits.context} tokens. However, the conversation has"
            f" {len(prompt)} tokens.",
            param="messages",
            code="context_length_exceeded",
        )
    return request.as_completion(prompt, room)


def chat(
    service: CompletionService, request: ChatRequest, on_piece: Callable[[], None] | None = None
) -> ChatCompletion:
    """The whole response; `on_piece` is called whenever there is something new."""
    return chat_completion(service.complete(as_completion(request, service.limits), on_piece))


def stream_chat(service: CompletionService, request: ChatRequest) -> Generator[ChatCompletionChunk]:
    """The response in chunks. A bad request raises here; closing or dropping the stream ends it."""
    chunks = service.stream(as_completion(request, service.limits))

    def convert() -> Generator[ChatCompletionChunk]:
        begun: set[int] = set()
        with contextlib.closing(chunks):
            for chunk in chunks:
                yield chat_chunk(chunk, begun)

    return convert()


async def chat_async(service: CompletionService, request: ChatRequest) -> ChatCompletion:
    """The whole response. Cancelling the task ends the request."""
    wanted = await asyncio.to_thread(as_completion, request, service.limits)
    return chat_completion(await service.complete_async(wanted))


async def chat_chunks(chunks: AsyncGenerator[CompletionChunk]) -> AsyncGenerator[ChatCompletionChunk]:
    """The chunks of a completion as those of a chat; closes `chunks` at its end."""
    begun: set[int] = set()
    async with contextlib.aclosing(chunks):
        async for chunk in chunks:
            yield chat_chunk(chunk, begun)


def chat_completion(completion: Completion) -> ChatCompletion:
    """A completion as the answer to a chat."""
    return ChatCompletion(
        **_frame(completion),
        choices=[
            ChatChoice(**_choice(choice), message=AssistantMessage(content=choice.text))
            for choice in completion.choices
        ],
        usage=completion.usage,
    )


def chat_chunk(chunk: CompletionChunk, begun: set[int]) -> ChatCompletionChunk:
    """A chunk of a completion as one of a chat; `begun` collects the choices whose role has been said."""
    choices = []
    for choice in chunk.choices:
        delta = ChatDelta(content=choice.text)
        if choice.index not in begun:
            begun.add(choice.index)
            delta.role = "assistant"
        choices.append(ChatChunkChoice(**_choice(choice), delta=delta))
    return ChatCompletionChunk(**_frame(chunk), choices=choices, usage=chunk.usage)


def _frame(response: Completion | CompletionChunk) -> dict[str, Any]:
    return {
        "id": "chat" + response.id,
        "created": response.created,
        "model": response.model,
        "system_fingerprint": response.system_fingerprint,
    }


def _choice(choice: CompletionChoice) -> dict[str, Any]:
    return {
        "index": choice.index,
        "logprobs": choice.logprobs and ChatLogprobs(content=choice.logprobs.content),
        "finish_reason": choice.finish_reason,
        "stop_reason": choice.stop_reason,
        "token_ids": choice.token_ids,
        "prompt_token_ids": choice.prompt_token_ids,
    }
