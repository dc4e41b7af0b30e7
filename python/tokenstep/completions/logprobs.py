"""Log probabilities as the schema writes them: token texts, offsets, both forms."""

from __future__ import annotations

import codecs
import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tokenstep.completions.schema import Logprobs, TokenLogprob, TopLogprob
from tokenstep.engine import TokenLogprobs
from tokenstep.models.tokenizer import Tokenizer

LOWEST = -9999.0
"""Written for minus infinity, which JSON doesn't have."""


@dataclass(slots=True)
class Entry:
    """One token, its offset in code points, and its log probabilities: None for a prompt's first token."""

    token: int
    offset: int
    logprobs: TokenLogprobs | None


def finite(logprob: float) -> float:
    """A log probability as it is written."""
    return logprob if logprob > LOWEST else LOWEST


def token_text(data: bytes) -> str:
    r"""The text of a token of these bytes; `bytes:\xe2\x82` if they aren't whole characters."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        shown = (chr(byte) if 0x20 <= byte < 0x7F and byte != 0x5C else f"\\x{byte:02x}" for byte in data)
        return "bytes:" + "".join(shown)


class OffsetCounter:
    """Counts code points of token texts, control tokens included. A character counts when it is whole.

    Args:
        tokenizer: knows the bytes of each token.
        skip_special_tokens: as in the text that the offsets belong to: it decides which space is the first.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip_space = tokenizer.strips_first_space
        self.offset = 0

    def push(self, token: int) -> int:
        """The offset at which `token` begins."""
        begin = self.offset
        data = self._tokenizer.token_bytes(token)
        if (
            self._strip_space
            and data
            and not (self._skip_special_tokens and self._tokenizer.is_special(token))
        ):
            data = data.removeprefix(b" ")
            self._strip_space = False
        self.offset += len(self._utf8.decode(data))
        return begin

    def fork(self) -> OffsetCounter:
        """Another one that goes on from the same place."""
        twin = OffsetCounter(self._tokenizer, self._skip_special_tokens)
        twin._utf8.setstate(self._utf8.getstate())
        twin._strip_space = self._strip_space
        twin.offset = self.offset
        return twin


def prompt_entries(
    prompt: Sequence[int], logprobs: Sequence[TokenLogprobs], counter: OffsetCounter
) -> list[Entry]:
    """Entries of a prompt's tokens; `logprobs` has one for each but the first, `counter` is a new one."""
    return [
        Entry(token, counter.push(token), found)
        for token, found in zip(prompt, [None, *logprobs], strict=True)
    ]


def format_logprobs(entries: Iterable[Entry], tokenizer: Tokenizer) -> Logprobs:
    """`entries` in both forms of the schema."""
    formatted = Logprobs()
    for entry in entries:
        text, data = _spelling(tokenizer.token_bytes(entry.token))
        formatted.tokens.append(text)
        formatted.text_offset.append(entry.offset)
        found = entry.logprobs
        if found is None:
            formatted.token_logprobs.append(None)
            formatted.top_logprobs.append(None)
            continue
        logprob = finite(found.logprob)
        top: list[TopLogprob] = []
        best: dict[str, float] = {}
        for token, value in zip(found.top_ids, found.top_logprobs, strict=True):
            top_text, top_data = _spelling(tokenizer.token_bytes(token))
            written = finite(value)
            top.append(TopLogprob(top_text, written, top_data))
            best[top_text] = max(written, best.get(top_text, LOWEST))
        best[text] = max(logprob, best.get(text, LOWEST))
        formatted.token_logprobs.append(logprob)
        formatted.top_logprobs.append(best)
        formatted.content.append(TokenLogprob(text, logprob, data, top))
    return formatted


@functools.lru_cache(maxsize=1 << 16)
def _spelling(data: bytes) -> tuple[str, tuple[int, ...]]:
    """A token's text, and its bytes as the schema has them."""
    return token_text(data), tuple(data)
