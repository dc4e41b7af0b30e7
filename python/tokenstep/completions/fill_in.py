"""Fill-in-the-middle: a prompt that says what comes before and behind the text to be written.

Models mark the two with special tokens, each family with its own and in its own order (Bavarian et al.,
arXiv 2207.14255). Which one a model was trained with is seen from the names in its vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from tokenstep.completions.errors import RequestError
from tokenstep.models.tokenizer import Tokenizer

ANCHOR = "☺"
"""Joins no text behind it in one token: what is encoded behind it has no space put before it."""


class Part(Enum):
    """Where the two texts go in a style's order."""

    PREFIX = "prefix"
    SUFFIX = "suffix"


@dataclass(frozen=True)
class Style:
    """One family's way.

    Attributes:
        order: names of special tokens, and the two texts between them.
        others: names of further tokens that the middle can't contain and that end it, where they exist.
    """

    order: tuple[str | Part, ...]
    others: tuple[str, ...] = ()

    @property
    def markers(self) -> tuple[str, ...]:
        """The special tokens that a vocabulary must have."""
        return tuple(part for part in self.order if isinstance(part, str))


STYLES = {
    "StarCoder": Style(
        ("<fim_prefix>", Part.PREFIX, "<fim_suffix>", Part.SUFFIX, "<fim_middle>"),
        ("<fim_pad>", "<file_sep>", "<repo_name>", "<|endoftext|>"),
    ),
    "SantaCoder": Style(
        ("<fim-prefix>", Part.PREFIX, "<fim-suffix>", Part.SUFFIX, "<fim-middle>"),
        ("<fim-pad>", "<|endoftext|>"),
    ),
    "Qwen": Style(  # and CodeGemma
        ("<|fim_prefix|>", Part.PREFIX, "<|fim_suffix|>", Part.SUFFIX, "<|fim_middle|>"),
        ("<|fim_pad|>", "<|file_sep|>", "<|repo_name|>", "<|file_separator|>", "<|endoftext|>"),
    ),
    "CodeLlama": Style(("▁<PRE>", Part.PREFIX, "▁<SUF>", Part.SUFFIX, "▁<MID>"), ("▁<EOT>",)),
    "DeepSeek": Style(("<｜fim▁begin｜>", Part.PREFIX, "<｜fim▁hole｜>", Part.SUFFIX, "<｜fim▁end｜>")),
    "Codestral": Style(("[SUFFIX]", Part.SUFFIX, "[PREFIX]", Part.PREFIX), ("[MIDDLE]",)),
}


class FillIn:
    """Writes prompts in the style of one tokenizer.

    Args:
        tokenizer: of the model; raises RequestError if it knows no style.

    Attributes:
        style: the name of the style.
        end_ids: tokens that the middle can't contain: they end it.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        for name, style in STYLES.items():
            found = _find(tokenizer, style.markers)
            if len(found) == len(style.markers):
                self.style = name
                break
        else:
            raise RequestError(
                "suffix: this model can't fill in the middle: its tokenizer has no special tokens for it",
                param="suffix",
            )
        self._order = [part if isinstance(part, Part) else found[part] for part in style.order]
        self.end_ids = frozenset((found | _find(tokenizer, style.others)).values())

    def encode(self, prefix: str | Sequence[int], suffix: str, add_special_tokens: bool = True) -> list[int]:
        """The prompt whose continuation goes between the two.

        Args:
            prefix: what comes before, as text or as ids.
            suffix: what comes behind.
            add_special_tokens: put the model's begin token first, where it has one.

        Raises ValueError for a text with an unpaired surrogate.
        """
        texts = {
            Part.PREFIX: self._tokenizer.encode(prefix, False) if isinstance(prefix, str) else list(prefix),
            Part.SUFFIX: self._encode_inside(suffix),
        }
        ids = list(self._tokenizer.begin_ids) if add_special_tokens else []
        for part in self._order:
            ids += texts[part] if isinstance(part, Part) else [part]
        return ids

    def _encode_inside(self, text: str) -> list[int]:
        """`text` without the space that a SentencePiece tokenizer puts before a text of its own."""
        if not self._tokenizer.strips_first_space:
            return self._tokenizer.encode(text, False)
        anchor = self._tokenizer.encode(ANCHOR, False)
        return self._tokenizer.encode(ANCHOR + text, False)[len(anchor) :]


def _find(tokenizer: Tokenizer, names: Sequence[str]) -> dict[str, int]:
    """The ids of those that exist; files differ in how they write the space of ▁<PRE>."""
    found = {}
    for name in names:
        for spelling in (name, name.replace("▁", " "), name.lstrip("▁")):
            token = tokenizer.token_to_id(spelling)
            if token is not None:
                found[name] = token
                break
    return found
