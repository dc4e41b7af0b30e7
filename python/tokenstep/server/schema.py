"""Requests and responses of the routes, beside what the completions schema has already."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from tokenstep.completions.chat_schema import ChatRequest
from tokenstep.completions.schema import MAX_STOPS, CompletionRequest

REFERENCES = "#/components/schemas/{model}"
TOKEN = {"type": "integer", "minimum": 0}
TOKENS = {"type": "array", "items": TOKEN, "minItems": 1}
TEXT = {"type": "string"}
STOP = {"type": "string", "minLength": 1}
NULL = {"type": "null"}
SAID_OTHERWISE: dict[str, list[dict[str, Any]]] = {
    "prompt": [
        TEXT,
        {"type": "array", "items": TEXT, "minItems": 1},
        TOKENS,
        {"type": "array", "items": TOKENS, "minItems": 1},
    ],
    "stop": [STOP, {"type": "array", "items": STOP, "maxItems": MAX_STOPS}],
    "stop_token_ids": [{"type": "array", "items": TOKEN}],
    "logit_bias": [
        {
            "type": "object",
            "propertyNames": {"pattern": "^(0|[1-9][0-9]*)$"},
            "additionalProperties": {"anyOf": [{"type": "number", "minimum": -100, "maximum": 100}, NULL]},
        }
    ],
    "seed": [{"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1}],
}
"""Fields whose checks pydantic can't write down, as JSON schema has them."""


class HttpCompletionRequest(CompletionRequest):
    """A request to complete a prompt, or many. Unknown fields are ignored; null means the default."""

    model: str = Field(description="the model to use: an id of /v1/models")


class HttpChatRequest(ChatRequest):
    """A request to continue a conversation. Unknown fields are ignored; null means the default."""

    model: str = Field(description="the model to use: an id of /v1/models")


EXAMPLES: dict[type[BaseModel], dict[str, Any]] = {
    HttpCompletionRequest: {
        "model": "smollm2",
        "prompt": "The capital of Germany is",
        "max_tokens": 8,
        "temperature": 0,
    },
    HttpChatRequest: {
        "model": "smollm2",
        "messages": [{"role": "user", "content": "What is the capital of Germany?"}],
        "temperature": 0,
    },
}


def request_schema(model: type[BaseModel]) -> dict[str, Any]:
    """The JSON schema of a request, with its definitions under "$defs"; null is allowed where it may be."""
    schema = model.model_json_schema(ref_template=REFERENCES)
    for name, written in schema["properties"].items():
        if name in schema["required"]:
            continue
        notes = {key: written.pop(key) for key in ("title", "description", "default") if key in written}
        forms = SAID_OTHERWISE.get(name) or written.get("anyOf") or [written]
        schema["properties"][name] = {**notes, "anyOf": [form for form in forms if form != NULL] + [NULL]}
    schema["examples"] = [EXAMPLES[model]]
    return schema


class TokenizeRequest(BaseModel):
    """A text to turn into token ids."""

    model: str | None = Field(None, description="an id of /v1/models")
    prompt: str
    add_special_tokens: bool = Field(True, description="put the model's begin token first")
    return_token_strs: bool | None = Field(False, description="report the tokens' names too")


class TokenizeResponse(BaseModel):
    """The ids, and how many would fit."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(BaseModel):
    """Token ids to turn into text."""

    model: str | None = Field(None, description="an id of /v1/models")
    tokens: list[Annotated[int, Field(ge=0)]]


class DetokenizeResponse(BaseModel):
    """The text, control tokens by their names."""

    prompt: str


class TokenizerInfo(BaseModel):
    """What a client needs to know of the tokenizer."""

    model_config = ConfigDict(protected_namespaces=())

    tokenizer_class: str
    vocab_size: int
    model_max_length: int
    add_bos_token: bool
    bos_token: str | None
    eos_token: str | None
    bos_token_id: int | None
    eos_token_id: int | None
    eos_token_ids: list[int]


class ModelCard(BaseModel):
    """One name by which the model can be asked for."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "tokenstep"
    root: str = Field(description="the id that responses name")
    parent: str | None = None
    max_model_len: int
    permission: list[dict[str, Any]] = []


class ModelList(BaseModel):
    """All names."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(BaseModel):
    """What the server is about: "ready", "loading", "draining", "stalled" or "stopped"."""

    status: str
