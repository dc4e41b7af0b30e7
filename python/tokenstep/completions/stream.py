"""From tokens to text as it comes: whole characters only, nothing that could still become a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from tokenstep.models.tokenizer import Tokenizer

_utf8_decoder = codecs.getincrementaldecoder("utf-8")


class IncrementalDetokenizer:
    """Turns tokens into text one by one. All pieces together are `Tokenizer.decode` of all tokens.

    Args:
        tokenizer: knows the bytes of each token.
        skip_special_tokens: control tokens add nothing.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._utf8 = _utf8_decoder("replace")
        self._strip_space = tokenizer.strips_first_space

    def push(self, token: int) -> str:
        """The characters that `token` completes; bytes that are no UTF-8 become U+FFFD."""
        if not self.shows(token):
            return ""
        data = self._tokenizer.token_bytes(token)
        if self._strip_space and data:
            data = data.removeprefix(b" ")
            self._strip_space = False
        return self._utf8.decode(data)

    def shows(self, token: int) -> bool:
        """Whether `token` is part of the text."""
        return not (self._skip_special_tokens and self._tokenizer.is_special(token))

    def flush(self) -> str:
        """U+FFFD for a character that was begun and never completed."""
        return self._utf8.decode(b"", final=True)

    def fork(self) -> IncrementalDetokenizer:
        """Another one that goes on from the same place."""
        twin = IncrementalDetokenizer(self._tokenizer, self._skip_special_tokens)
        twin._utf8.setstate(self._utf8.getstate())
        twin._strip_space = self._strip_space
        return twin


class StopChecker:
    """Finds stop strings in text that comes in pieces, and holds back only what could still become one.

    The stop that is complete first ends the text; of several that are complete at the same character, the
    longest. Each is followed by the automaton of Knuth, Morris and Pratt, so the work per character doesn't
    depend on a stop's length.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._patterns = [_Pattern(stop) for stop in stops]
        self._matched = [0] * len(stops)  # characters of each stop that the text ends with
        self._held = ""

    def push(self, text: str, may_stop: bool = True) -> tuple[str, str | None]:
        """The text that can go out now, and the stop string if one has ended it.

        Without `may_stop`, a stop that becomes complete is text like any other.
        """
        if not self._patterns:
            return text, None
        pending = self._held + text
        for end, char in enumerate(text, len(self._held) + 1):
            found = ""
            for index, pattern in enumerate(self._patterns):
                matched = pattern.advance(self._matched[index], char)
                if matched == len(pattern.text):
                    found = max(found, pattern.text, key=len)
                    matched = pattern.borders[-1]
                self._matched[index] = matched
            if found and may_stop:
                self._held = ""
                return pending[: end - len(found)], found
        release = len(pending) - max(self._matched)
        self._held = pending[release:]
        return pending[:release], None

    def flush(self) -> str:
        """What was held back, when the text ends otherwise."""
        held, self._held = self._held, ""
        return held


class _Pattern:
    """A stop string. borders[i]: length of the longest proper prefix of text[: i + 1] that also ends it."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.borders = [0]
        for char in text[1:]:
            self.borders.append(self.advance(self.borders[-1], char))

    def advance(self, matched: int, char: str) -> int:
        """Characters that match after `char`, if `matched` did before (fewer than all)."""
        while matched and self.text[matched] != char:
            matched = self.borders[matched - 1]
        return matched + 1 if self.text[matched] == char else 0
