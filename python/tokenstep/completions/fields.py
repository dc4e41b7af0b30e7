"""The fields that requests of both kinds have, and the types of their values."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from tokenstep.completions.errors import RequestError

logger = logging.getLogger("tokenstep.completions")

MAX_STOPS = 16
MAX_CHOICES = 128
MAX_LOGPROBS = 20
DEFAULT_MAX_TOKENS = 16
SMALLEST_FLOAT32 = 2.0**-149
LARGEST_FLOAT32 = (2.0 - 2.0**-23) * 2.0**127


def _no_bool(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("expected a number")
    return value


def _check_bias(value: dict[str, float | None]) -> dict[str, float | None]:
    for key, bias in value.items():
        if not (key.isascii() and key.isdecimal() and str(int(key)) == key):
            raise ValueError(f"key {key!r}, expected a token id")
        if bias is not None and not -100 <= bias <= 100:
            raise ValueError(f"{key!r}: {bias}, expected -100 to 100")
    return value


def _check_float32(value: float) -> float:
    if not SMALLEST_FLOAT32 <= value <= LARGEST_FLOAT32:
        raise ValueError("expected a number in the range of float32")
    return value


def _check_seed(value: int) -> int:
    if not -(2**63) <= value < 2**63:
        raise ValueError("expected a signed 64-bit integer")
    return value


def _check_stop(value: list[str]) -> list[str]:
    if "" in value:
        raise ValueError("the empty string can't be a stop")
    return value


def _text_keys(value: object) -> object:
    return {str(key): bias for key, bias in value.items()} if isinstance(value, Mapping) else value


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


Int = Annotated[int, BeforeValidator(_no_bool)]
Float = Annotated[float, BeforeValidator(_no_bool)]
Float32 = Annotated[Float, AfterValidator(_check_float32)]
Seed = Annotated[Int, AfterValidator(_check_seed)]
Stop = Annotated[
    list[str], BeforeValidator(_as_list), Field(max_length=MAX_STOPS), AfterValidator(_check_stop)
]
LogitBias = Annotated[dict[str, float | None], BeforeValidator(_text_keys), AfterValidator(_check_bias)]


def _without_nulls(data: Any) -> Any:
    if not isinstance(data, Mapping):
        return data
    return {key: value for key, value in data.items() if value is not None}


class StreamOptions(BaseModel):
    """What a stream carries beside the text. A null field has its default."""

    include_usage: bool = False
    continuous_usage_stats: bool = False

    _drop_nulls = model_validator(mode="before")(_without_nulls)


class GenerationRequest(BaseModel):
    """What is said of the text to generate, whatever it follows.

    A null field has its default; unknown fields are ignored with one warning in the log.
    """

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    model: str | None = Field(None, description="the model to use")
    max_tokens: Int = Field(DEFAULT_MAX_TOKENS, ge=0, description="tokens to generate at most")
    temperature: Float = Field(1.0, ge=0, le=2, description="0 takes the most likely token")
    top_p: Float = Field(1.0, ge=0, le=1, description="keep the most likely tokens up to this probability")
    top_k: Int = Field(0, ge=-1, description="keep this many of the most likely tokens; 0 or -1: all")
    min_p: Float = Field(0.0, ge=0, le=1, description="keep tokens this likely, relative to the most likely")
    repetition_penalty: Float32 = Field(
        1.0, gt=0, description="above 1: fewer tokens of prompt and output again"
    )
    presence_penalty: Float = Field(0.0, ge=-2, le=2, description="taken from tokens that are in the output")
    frequency_penalty: Float = Field(
        0.0, ge=-2, le=2, description="taken for each time a token is in the output"
    )
    logit_bias: LogitBias = Field({}, description="token id to a value from -100 to 100, added to its logit")
    n: Int = Field(1, ge=1, le=MAX_CHOICES, description="choices for each prompt")
    best_of: Int | None = Field(
        None, ge=1, le=MAX_CHOICES, description="generate so many, return the n likeliest"
    )
    seed: Seed | None = Field(None, description="the same seed gives the same tokens")
    stop: Stop = Field([], description="strings that end the text; they aren't part of it")
    stop_token_ids: list[Int] = Field([], description="token ids that end the text")
    min_tokens: Int = Field(0, ge=0, description="nothing ends the text before so many tokens")
    ignore_eos: bool = Field(False, description="go on after the model's end token")
    peft: str | None = Field(None, description="the adapter to use, by its name")
    stream: bool = Field(False, description="send the text as it is generated")
    stream_options: StreamOptions | None = Field(None, description="what a stream carries beside the text")
    return_token_ids: bool = Field(False, description="report token ids of prompt and text")
    skip_special_tokens: bool = Field(True, description="leave control tokens out of the text")
    log_prompt: bool = Field(False, description="write the prompt to the request log")
    user: str | None = Field(None, description="who asks, for the request log")

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls_and_unknown(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        if unknown := sorted(str(key) for key in data if key not in cls.model_fields):
            logger.warning("ignored unknown request fields: %s", ", ".join(unknown))
        return _without_nulls(data)

    @model_validator(mode="after")
    def _check_best_of_and_stream(self) -> Self:
        if self.best_of is not None and self.best_of < self.n:
            raise RequestError(f"best_of = {self.best_of}, expected at least n = {self.n}", param="best_of")
        if self.stream and (self.best_of or 0) > self.n:
            raise RequestError(
                f"best_of = {self.best_of}, expected n = {self.n} in a stream: the best are known at the end",
                param="best_of",
            )
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options is only allowed with stream = true", param="stream_options")
        return self

    @classmethod
    def parse(cls, data: Mapping[str, Any]) -> Self:
        """The request in `data`; raises RequestError naming the parameter, its value and what it may be."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            refusal = request_error(error)
        # not from inside: the error would hold pydantic's, which holds it, where no garbage collector looks
        raise refusal

    def given(self, field: str) -> bool:
        """Whether the caller set this field."""
        return field in self.model_fields_set


def request_error(error: ValidationError) -> RequestError:
    """The first thing that is wrong, as a caller is told."""
    first = error.errors(include_url=False)[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, RequestError):
        return RequestError(cause.message, param=cause.param, code=cause.code)
    param = str(first["loc"][0]) if first["loc"] else None
    if param is None:
        return RequestError(first["msg"])
    path = "".join(f"[{part!r}]" if isinstance(part, int) else f".{part}" for part in first["loc"])[1:]
    if first["type"] == "missing":
        return RequestError(f"{path} is required", param=param)
    value = repr(first["input"])
    shown = value if len(value) <= 60 else value[:57] + "…"
    message = first["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
    return RequestError(f"{path} = {shown}: {message}", param=param)
