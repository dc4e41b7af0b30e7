"""transformers' chain of logits processors, as the fewest kernel calls that keep the same tokens.

Theirs works in the order repetition penalty, temperature, top-k, top-p, min-p and keeps every token tied with
the k-th. The kernel works in the order repetition penalty, temperature, min-p, top-k, top-p and keeps exactly
k. Each of the cuts keeps the largest values, so two differences remain:

- Ties at the k-th value: the threshold is found first (:func:`kth_largest`) and smaller values are banned.
- top-p together with min-p: top-p's share is one of all that top-k left, so min-p waits for a second call.

Everything else is one call of the kernel. Equal up to rounding: temperature is a multiplication by 1/T here
(1 ulp), top-p sums exact integers here and float32 probabilities there, and which of several equal values at
top-p's boundary survive is the lowest ids here, unspecified there (an unstable sort).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from tokenstep.sampling import apply_logits

__all__ = ["Chain", "kth_largest", "penalise_"]

_GROUP = 64  # values whose maximum stands for them while top-k looks for its threshold


@dataclass(frozen=True, slots=True)
class Chain:
    """One chain for all rows; a parameter at its default is off, as in :func:`tokenstep.sample`.

    Attributes:
        repetition_penalty: r > 0.
        temperature: T ≥ 1e-5: below, the kernel is greedy, which is not transformers' way.
        top_k: k > 0 keeps the k largest; 0 is off.
        top_p: In [0, 1].
        min_p: In [0, 1].
        keep_ties: top-k keeps all values equal to the k-th, as transformers does; False: exactly k, lowest
            ids first, which saves a pass over the logits.
    """

    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    keep_ties: bool = True

    @property
    def in_two_calls(self) -> bool:
        """Whether min-p must wait for a second call."""
        return self.top_p < 1 and self.min_p > 0

    @property
    def edits_first(self) -> bool:
        """Whether :meth:`edit_` has anything to do before the last call."""
        return self.in_two_calls or (self.top_k > 0 and self.keep_ties)

    def edit_(self, scores: torch.Tensor, seen: torch.Tensor) -> None:
        """All that comes before the last call of the kernel, in place.

        Args:
            scores: float32 ``[B, V]``, contiguous rows.
            seen: int64 ``[B, L]``: the ids of each row's history, repeated or not, in any order.
        """
        if not self.edits_first:
            return
        if self.repetition_penalty != 1:
            penalise_(scores, seen, self.repetition_penalty)
        top_k = self.top_k
        if top_k > 0 and self.keep_ties:
            scores.masked_fill_(scores < kth_largest(scores, top_k), -torch.inf)
            top_k = 0
        if self.in_two_calls:
            apply_logits(scores, temperature=self.temperature, top_k=top_k, top_p=self.top_p, out=scores)

    def last_call(self) -> dict[str, Any]:
        """Parameters of the last call, for :func:`tokenstep.apply_logits` or for SamplingParams."""
        if self.in_two_calls:
            return {"min_p": self.min_p}
        rest = {"temperature": self.temperature, "top_p": self.top_p, "min_p": self.min_p}
        if self.edits_first:
            return rest
        return rest | {"top_k": self.top_k, "repetition_penalty": self.repetition_penalty}

    def apply(self, scores: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        """The whole chain: new float32 ``[B, V]``, -inf where a token is cut; ``scores`` may be edited."""
        self.edit_(scores, seen)
        call = self.last_call()
        if call.get("repetition_penalty", 1) != 1:
            call["prompt_tokens"] = list(seen.cpu())
        result: torch.Tensor = apply_logits(scores, **call)
        return result


def penalise_(scores: torch.Tensor, seen: torch.Tensor, penalty: float) -> None:
    """Divides positive and multiplies other scores of the ids in ``seen [B, L]``, each once, in place."""
    x = scores.gather(1, seen)
    scores.scatter_(1, seen, torch.where(x < 0, x * penalty, x / penalty))


def kth_largest(scores: torch.Tensor, k: int) -> torch.Tensor:
    """The k-th largest value of each row, ``[B, 1]``; -inf if k is V or more.

    A value among the k largest lies in one of the k groups with the largest maxima (or equals the k-th),
    so only these are sorted: one pass over the row instead of torch.topk's several.
    """
    rows, vocab_size = scores.shape
    if k >= vocab_size:
        return scores.new_full((rows, 1), -torch.inf)
    num_groups = vocab_size // _GROUP
    if num_groups > 4 * k:  # else most groups would be sorted anyway
        groups = scores[:, : num_groups * _GROUP].reshape(rows, num_groups, _GROUP)
        best = groups.amax(-1).topk(k).indices
        chosen = groups.gather(1, best[..., None].expand(-1, -1, _GROUP)).flatten(1)
        scores = torch.cat([chosen, scores[:, num_groups * _GROUP :]], 1)
    return scores.topk(k).values[:, -1:]
