"""One choice while it is generated: tokens in, pieces of text with their log probabilities out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tokenstep.completions.logprobs import Entry, OffsetCounter
from tokenstep.completions.stream import IncrementalDetokenizer, StopChecker
from tokenstep.engine import FinishReason, TokenLogprobs


@dataclass(slots=True)
class Piece:
    """What one choice has to say since the last piece."""

    text: str = ""
    entries: list[Entry] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None

    def add(self, later: Piece) -> None:
        """Appends the piece that follows."""
        self.text += later.text
        self.entries += later.entries
        self.token_ids += later.token_ids
        self.finish_reason = later.finish_reason
        self.stop_reason = later.stop_reason


class ChoiceBuilder:
    """Follows one choice and releases its text as soon as no stop string can take it back.

    Args:
        detokenizer: stands at the end of the prompt.
        offsets: stands at the end of the prompt; None if nobody wants log probabilities.
        stops: the stop strings.
        min_tokens: stop strings that end in an earlier token than this one (counted from 1) don't count.
        stop_reasons: what to give as the reason for each token that ends the text.
    """

    def __init__(
        self,
        detokenizer: IncrementalDetokenizer,
        offsets: OffsetCounter | None,
        *,
        stops: Sequence[str],
        min_tokens: int,
        stop_reasons: Mapping[int, str | int | None],
    ) -> None:
        self._detokenizer = detokenizer
        self._offsets = offsets
        self._checker = StopChecker(stops)
        self._min_tokens = min_tokens
        self._stop_reasons = stop_reasons
        self._seen = 0  # characters of the text so far, those held back included
        self._released = 0
        self._waiting: list[
            tuple[int, bool, Entry]
        ] = []  # where the token begins, and whether it is in the text
        self.num_tokens = 0
        self.logprob_sum = 0.0
        self.finished = False

    def push(self, token: int, logprobs: TokenLogprobs | None, finish: FinishReason | None) -> Piece:
        """The piece that `token` sets free; the last one with `finish`, or when a stop string is complete."""
        self.num_tokens += 1
        ends = finish == "stop"
        if logprobs is not None:
            self.logprob_sum += logprobs.logprob
            if self._offsets is not None:
                shown = not ends and self._detokenizer.shows(token)
                self._waiting.append((self._seen, shown, Entry(token, self._offsets.push(token), logprobs)))
        text = "" if ends else self._detokenizer.push(token)
        if finish:
            text += self._detokenizer.flush()
        self._seen += len(text)
        released, stop = self._checker.push(text, self.num_tokens >= self._min_tokens)
        piece = Piece(released, token_ids=[token])
        if stop is not None:
            piece.finish_reason, piece.stop_reason = "stop", stop
        elif finish:
            piece.text += self._checker.flush()
            piece.finish_reason = finish
            piece.stop_reason = self._stop_reasons.get(token) if ends else None
        self.finished = piece.finish_reason is not None
        self._released += len(piece.text)
        if self._waiting:
            piece.entries = self._release_entries(everything=self.finished and stop is None)
        return piece

    def _release_entries(self, everything: bool) -> list[Entry]:
        """Entries of tokens that begin in the released text; one outside the text goes with what precedes."""
        count = 0
        for begin, shown, _ in self._waiting:
            if not (everything or begin < self._released or (begin == self._released and not shown)):
                break
            count += 1
        entries = [entry for _, _, entry in self._waiting[:count]]
        del self._waiting[:count]
        return entries
