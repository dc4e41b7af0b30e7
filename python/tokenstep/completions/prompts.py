"""Prompts as the engine wants them: token ids, with what is needed to go on from their end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tokenstep.completions.errors import RequestError
from tokenstep.completions.fill_in import FillIn
from tokenstep.completions.logprobs import OffsetCounter
from tokenstep.completions.schema import CompletionRequest
from tokenstep.completions.stream import IncrementalDetokenizer
from tokenstep.models.tokenizer import Tokenizer

MAX_PROMPTS = 1 << 16  # the prompt's index is 16 bits of the random numbers' counter


@dataclass(frozen=True)
class EncodedPrompt:
    """One prompt.

    Attributes:
        name: what errors call it: "prompt" or "prompt[3]".
        ids: token ids, at least one.
        text: what an echo shows before the generated text, without a character that the output may complete.
        whole_text: the same with U+FFFD for such a character.
        detokenizer: stands at the end of the prompt.
        offsets: stands at the end of the prompt; None if nobody wants log probabilities.
    """

    name: str
    ids: list[int]
    text: str
    whole_text: str
    detokenizer: IncrementalDetokenizer
    offsets: OffsetCounter | None


def check_length(text: str, name: str, param: str, tokenizer: Tokenizer, context: int) -> None:
    """Raises RequestError for a text that can't fit the context, before it costs the time to encode it."""
    if len(text) > context and (fewest := tokenizer.fewest_tokens(text)) > context:
        raise RequestError(
            f"This model's maximum context length is {context} tokens. However, the {name} has at least"
            f" {fewest} tokens.",
            param=param,
            code="context_length_exceeded",
        )


def encode_prompts(
    request: CompletionRequest, tokenizer: Tokenizer, vocab_size: int, fill_in: FillIn | None = None
) -> list[EncodedPrompt]:
    """The prompts of `request` in any of the four forms; raises RequestError naming the bad one.

    `fill_in` writes them for a request with `suffix`.
    """
    prompt = request.prompt
    if isinstance(prompt, str) or all(isinstance(item, int) for item in prompt):
        named: list[tuple[str, Any]] = [("prompt", prompt)]
    else:
        named = [(f"prompt[{index}]", item) for index, item in enumerate(prompt)]
    if len(named) > MAX_PROMPTS:
        raise RequestError(f"prompt: {len(named)} prompts, expected at most {MAX_PROMPTS}", param="prompt")
    return [_encode(item, name, request, tokenizer, vocab_size, fill_in) for name, item in named]


def _encode(
    prompt: str | list[int],
    name: str,
    request: CompletionRequest,
    tokenizer: Tokenizer,
    vocab_size: int,
    fill_in: FillIn | None,
) -> EncodedPrompt:
    if not (isinstance(prompt, str) or prompt):
        raise RequestError(f"{name} = [], expected at least one token id", param="prompt")
    if fill_in is not None:
        ids = _fill_in(prompt, name, request, fill_in)
    elif isinstance(prompt, str):
        ids = _text_to_ids(prompt, name, request, tokenizer)
    else:
        ids = prompt
    for index, token in enumerate(ids):
        if not 0 <= token < vocab_size:
            where = f"{name}[{index}]" if ids is prompt else f"token {index} of {name}"
            raise RequestError(f"{where} = {token}, expected 0 ≤ token id < {vocab_size}", param="prompt")
    text, detokenizer, offsets = _replay(ids, request, tokenizer)
    whole_text = text + detokenizer.fork().flush()
    if isinstance(prompt, str):  # an echo is to the letter, whatever the tokenizer makes of it
        text = whole_text = prompt
    return EncodedPrompt(name, ids, text, whole_text, detokenizer, offsets)


def _text_to_ids(text: str, name: str, request: CompletionRequest, tokenizer: Tokenizer) -> list[int]:
    try:
        ids = tokenizer.encode(text, request.add_special_tokens) if text else []
    except ValueError as error:
        raise RequestError(f"{name}: {error}", param="prompt") from None
    return ids or [_begin_token(name, tokenizer)]  # the model needs something to follow


def _fill_in(prompt: str | list[int], name: str, request: CompletionRequest, fill_in: FillIn) -> list[int]:
    try:
        return fill_in.encode(prompt, request.suffix or "", request.add_special_tokens)
    except ValueError as error:
        raise RequestError(f"{name} and suffix: {error}", param="prompt") from None


def _begin_token(name: str, tokenizer: Tokenizer) -> int:
    if tokenizer.bos_token_id is not None:
        return tokenizer.bos_token_id
    if tokenizer.eos_token_ids:
        return tokenizer.eos_token_ids[0]
    raise RequestError(
        f"{name} is empty and this model has no begin or end token to start from", param="prompt"
    )


def _replay(
    ids: list[int], request: CompletionRequest, tokenizer: Tokenizer
) -> tuple[str, IncrementalDetokenizer, OffsetCounter | None]:
    """The text of `ids`, and both counters at its end."""
    detokenizer = IncrementalDetokenizer(tokenizer, request.skip_special_tokens)
    text = "".join([detokenizer.push(token) for token in ids])
    if request.logprobs is None:
        return text, detokenizer, None
    offsets = OffsetCounter(tokenizer, request.skip_special_tokens)
    for token in ids:
        offsets.push(token)
    return text, detokenizer, offsets
