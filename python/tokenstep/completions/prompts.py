"""Prompts as the engine wants them: token ids, with what is needed to go on from their end."""

from __future__ import annotations

from dataclasses import dataclass

from tokenstep.completions.errors import RequestError
from tokenstep.completions.logprobs import OffsetCounter
from tokenstep.completions.schema import CompletionRequest
from tokenstep.completions.stream import IncrementalDetokenizer
from tokenstep.models.tokenizer import Tokenizer

MAX_PROMPTS = 1 << 16  # the prompt's index is 16 bits of the random numbers' counter


@dataclass(frozen=True)
class EncodedPrompt:
    """One prompt.

    Attributes:
        ids: token ids, at least one.
        text: what an echo shows before the generated text, without a character that the output may complete.
        whole_text: the same with U+FFFD for such a character.
        detokenizer: stands at the end of the prompt.
        offsets: stands at the end of the prompt; None if nobody wants log probabilities.
    """

    ids: list[int]
    text: str
    whole_text: str
    detokenizer: IncrementalDetokenizer
    offsets: OffsetCounter | None


def encode_prompts(request: CompletionRequest, tokenizer: Tokenizer) -> list[EncodedPrompt]:
    """The prompts of `request` in any of the four forms; raises RequestError naming the bad one."""
    prompt = request.prompt
    if isinstance(prompt, str):
        return [_encode_text(prompt, "prompt", request, tokenizer)]
    if all(isinstance(item, int) for item in prompt):
        return [_encode_ids(prompt, "prompt", request, tokenizer)]
    if len(prompt) > MAX_PROMPTS:
        raise RequestError(f"prompt: {len(prompt)} prompts, expected at most {MAX_PROMPTS}", param="prompt")
    return [
        _encode_text(item, f"prompt[{index}]", request, tokenizer)
        if isinstance(item, str)
        else _encode_ids(item, f"prompt[{index}]", request, tokenizer)
        for index, item in enumerate(prompt)
    ]


def _encode_text(text: str, name: str, request: CompletionRequest, tokenizer: Tokenizer) -> EncodedPrompt:
    try:
        ids = tokenizer.encode(text, request.add_special_tokens) if text else []
    except ValueError as error:
        raise RequestError(f"{name}: {error}", param="prompt") from None
    if not ids:  # the model needs something to follow
        ids = [_begin_token(name, tokenizer)]
    detokenizer, offsets = _replay(ids, request, tokenizer)[1:]
    return EncodedPrompt(ids, text, text, detokenizer, offsets)


def _encode_ids(ids: object, name: str, request: CompletionRequest, tokenizer: Tokenizer) -> EncodedPrompt:
    assert isinstance(ids, list)
    if not ids:
        raise RequestError(f"{name} = [], expected at least one token id", param="prompt")
    for index, token in enumerate(ids):
        if not 0 <= token < tokenizer.vocab_size:
            raise RequestError(
                f"{name}[{index}] = {token}, expected 0 ≤ token id < {tokenizer.vocab_size}", param="prompt"
            )
    text, detokenizer, offsets = _replay(ids, request, tokenizer)
    return EncodedPrompt(ids, text, text + detokenizer.fork().flush(), detokenizer, offsets)


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
    offsets = OffsetCounter(tokenizer)
    for token in ids:
        offsets.push(token)
    return text, detokenizer, offsets
