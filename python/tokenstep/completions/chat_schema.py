"""The schema of chat completions: conversations in, messages out. What samples is as in `schema`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from tokenstep.completions.errors import RequestError
from tokenstep.completions.fields import MAX_LOGPROBS, GenerationRequest, Int
from tokenstep.completions.schema import Choice, CompletionRequest, Response, TokenLogprob, Usage

MAX_MESSAGES = 1 << 14


class ContentPart(BaseModel):
    """A piece of a message. There are no others than text."""

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """One message; other fields than these are the template's to use."""

    model_config = ConfigDict(extra="allow")

    role: str = Field(min_length=1)
    content: str | list[ContentPart] | None = None

    @field_validator("content")
    @classmethod
    def _join(cls, content: str | list[ContentPart] | None) -> str:
        if isinstance(content, list):
            return "\n".join(part.text for part in content)
        return content or ""


class ChatRequest(GenerationRequest):
    """A request to continue a conversation."""

    max_tokens: Int | None = Field(  # type: ignore[assignment]
        None, ge=1, description="tokens to generate at most; default: what the context has room for"
    )
    max_completion_tokens: Int | None = Field(None, ge=1, description="another name of max_tokens")
    messages: list[ChatMessage] = Field(
        min_length=1, max_length=MAX_MESSAGES, description="the conversation so far"
    )
    logprobs: bool = Field(False, description="report log probabilities")
    top_logprobs: Int | None = Field(
        None, ge=0, le=MAX_LOGPROBS, description="with so many of the most likely tokens"
    )
    add_generation_prompt: bool = Field(True, description="let the template begin the assistant's message")
    chat_template_kwargs: dict[str, Any] = Field({}, description="further variables for the template")
    tools: list[Any] = Field([], description="not supported: refused")
    functions: list[Any] = Field([], description="not supported: refused")
    response_format: dict[str, Any] = Field({"type": "text"}, description="any other than text is refused")

    @model_validator(mode="after")
    def _check_what_is_asked_for(self) -> ChatRequest:
        for name in ("tools", "functions"):
            if getattr(self, name):
                raise RequestError(f"{name} is not supported", param=name)
        if self.response_format.get("type") != "text":
            raise RequestError(
                f"response_format: type = {self.response_format.get('type')!r}, expected 'text'",
                param="response_format",
            )
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("top_logprobs is only allowed with logprobs = true", param="top_logprobs")
        if len({self.max_tokens, self.max_completion_tokens} - {None}) > 1:
            raise RequestError(
                f"max_completion_tokens = {self.max_completion_tokens}, but max_tokens = {self.max_tokens}",
                param="max_completion_tokens",
            )
        return self

    def as_completion(self, prompt: list[int], room: int) -> CompletionRequest:
        """The same as a completion of `prompt`, in whose context there is room for so many tokens."""
        names = GenerationRequest.model_fields.keys() & self.model_fields_set
        limit = self.max_tokens or self.max_completion_tokens
        return CompletionRequest.model_validate(
            {
                **{name: getattr(self, name) for name in names},
                "prompt": prompt,
                "max_tokens": limit or room,
                "logprobs": (self.top_logprobs or 0) if self.logprobs else None,
            }
        )


class ChatLogprobs(BaseModel):
    """Log probabilities of a message's tokens."""

    content: list[TokenLogprob]
    refusal: None = None


class AssistantMessage(BaseModel):
    """What the model has written."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(Choice):
    """One message."""

    logprobs: ChatLogprobs | None = None
    message: AssistantMessage


class ChatDelta(Response):
    """What is new in a message; `role` comes with its first piece."""

    role: Literal["assistant"] | None = None
    content: str

    @classmethod
    def optional(cls) -> frozenset[str]:
        """Fields that are only there once."""
        return frozenset({"role"})


class ChatChunkChoice(Choice):
    """A piece of one message."""

    logprobs: ChatLogprobs | None = None
    delta: ChatDelta


class _ChatFrame(BaseModel):
    model_config = ConfigDict(protected_namespaces=())

    id: str
    created: int
    model: str
    system_fingerprint: str


class ChatCompletion(_ChatFrame):
    """A whole response."""

    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]
    usage: Usage


class ChatCompletionChunk(_ChatFrame):
    """One frame of a stream."""

    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
