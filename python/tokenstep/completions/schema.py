"""The completions schema: one request, one response, the chunks of a stream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from tokenstep.completions.errors import RequestError
from tokenstep.completions.fields import (
    DEFAULT_MAX_TOKENS,
    MAX_LOGPROBS,
    MAX_STOPS,
    GenerationRequest,
    Int,
    StreamOptions,
    request_error,
)

__all__ = [
    "DEFAULT_MAX_TOKENS",
    "MAX_STOPS",
    "Choice",
    "Completion",
    "CompletionChoice",
    "CompletionChunk",
    "CompletionRequest",
    "Logprobs",
    "PromptEcho",
    "PromptTokensDetails",
    "Response",
    "StreamOptions",
    "TokenLogprob",
    "TopLogprob",
    "Usage",
    "request_error",
]


def _check_prompt(value: object) -> object:
    items: list[Any] = value if isinstance(value, list) else [value]
    kinds = {type(item) for item in items}
    if isinstance(value, list) and not value:
        raise ValueError("expected at least one prompt")
    if kinds <= {str} or (isinstance(value, list) and kinds <= {int}):
        return value
    if kinds <= {list} and all(type(token) is int for ids in items for token in ids):
        return value
    raise ValueError(
        "expected a string, a list of strings, a list of token ids or a list of lists of token ids"
    )


Prompt = Annotated[str | list[str] | list[int] | list[list[int]], BeforeValidator(_check_prompt)]


class CompletionRequest(GenerationRequest):
    """A request to complete a prompt, or many."""

    prompt: Prompt = Field("", description="text, token ids, or a list of either")
    echo: bool = Field(False, description="put the prompt before the text")
    logprobs: Int | None = Field(
        None,
        ge=0,
        le=MAX_LOGPROBS,
        description="report log probabilities, with so many of the most likely tokens",
    )
    loglikelihood: bool = Field(False, description="report log probabilities of the prompt's tokens")
    suffix: str | None = Field(None, description="what follows the text: fill in the middle")
    add_special_tokens: bool = Field(True, description="put the model's begin token before a text prompt")

    @model_validator(mode="after")
    def _check_that_something_is_wanted(self) -> CompletionRequest:
        if not self.max_tokens and not (self.echo or self.loglikelihood):
            raise RequestError(
                "max_tokens = 0, expected at least 1 without echo or loglikelihood", param="max_tokens"
            )
        return self


class Response(BaseModel):
    """A part of a response. Leaves out the fields named in `optional` where they are None."""

    model_config = ConfigDict(protected_namespaces=())

    @model_serializer(mode="wrap")
    def _leave_out(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        contents: dict[str, Any] = serialize(self)
        return {
            key: value for key, value in contents.items() if value is not None or key not in self.optional()
        }

    @classmethod
    def optional(cls) -> frozenset[str]:
        """Fields that are only there when asked for."""
        return frozenset()


@dataclass(slots=True)
class TopLogprob:
    """One of the most likely tokens at a place. There may be 21 of these a token, so they are kept light."""

    token: str
    logprob: float
    bytes: tuple[int, ...]


@dataclass(slots=True)
class TokenLogprob(TopLogprob):
    """The token at a place, and the most likely ones."""

    top_logprobs: list[TopLogprob]


class Logprobs(BaseModel):
    """Log probabilities in both forms: parallel lists, and one entry a token in `content`."""

    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] = []
    text_offset: list[int] = []
    content: list[TokenLogprob] = []


class Choice(Response):
    """What every choice has, of a text or of a message."""

    index: int
    finish_reason: Literal["stop", "length"] | None = None
    stop_reason: str | int | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None

    @classmethod
    def optional(cls) -> frozenset[str]:
        """Fields that are only there when asked for."""
        return frozenset({"token_ids", "prompt_token_ids"})


class CompletionChoice(Choice):
    """One text, or a piece of one in a stream."""

    text: str
    logprobs: Logprobs | None = None


class PromptTokensDetails(BaseModel):
    """Of the prompt's tokens."""

    audio_tokens: int = 0
    cached_tokens: int = 0


class CompletionTokensDetails(BaseModel):
    """Of the generated tokens."""

    audio_tokens: int = 0
    reasoning_tokens: int = 0
    accepted_prediction_tokens: int = 0
    rejected_prediction_tokens: int = 0


class Usage(BaseModel):
    """Token counts: each prompt once, every token that was generated."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails = PromptTokensDetails()
    completion_tokens_details: CompletionTokensDetails = CompletionTokensDetails()


class PromptEcho(BaseModel):
    """A prompt as it was understood."""

    text: str
    logprobs: Logprobs | None = None


class _Frame(Response):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]


class Completion(_Frame):
    """A whole response."""

    usage: Usage
    prompt: list[PromptEcho] | None = None

    @classmethod
    def optional(cls) -> frozenset[str]:
        """Fields that are only there when asked for."""
        return frozenset({"prompt"})


class CompletionChunk(_Frame):
    """One frame of a stream."""

    usage: Usage | None = None
    prompt: list[PromptEcho] | None = None

    @classmethod
    def optional(cls) -> frozenset[str]:
        """Fields that are only there when asked for."""
        return frozenset({"prompt"})
