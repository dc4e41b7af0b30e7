"""transformers' chain of logits processors, as one call of the kernel.

``semantics="transformers"`` of :func:`tokenstep.apply_logits` has their order (repetition penalty,
temperature, top-k, top-p, min-p), keeps every token tied with the k-th, and divides by the temperature. What
rounding may still change: top-p sums exact integers here and float32 probabilities there, and of several
equal values at top-p's boundary the lowest ids survive here; there it is unspecified (an unstable sort).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from tokenstep.sampling import Semantics, apply_logits

__all__ = ["SEMANTICS", "Chain"]

SEMANTICS: Semantics = "transformers"


@dataclass(frozen=True, slots=True)
class Chain:
    """One chain for all rows; a parameter at its default is off.

    Attributes:
        repetition_penalty: r > 0.
        temperature: T > 0.
        top_k: k > 0 keeps the k largest and whatever equals the k-th; 0 is off.
        top_p: In [0, 1].
        min_p: In [0, 1].
    """

    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def parameters(self) -> dict[str, Any]:
        """By name, for :func:`tokenstep.apply_logits` or for SamplingParams."""
        return asdict(self)

    def apply(self, scores: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        """The whole chain: new float32 ``[B, V]``, -inf where a token is cut.

        Args:
            scores: ``[B, V]``, float32, float16 or bfloat16.
            seen: int64 ``[B, L]``: the ids of each row's history, repeated or not, in any order.
        """
        history = list(seen.cpu()) if self.repetition_penalty != 1 else None
        result: torch.Tensor = apply_logits(
            scores, **self.parameters(), prompt_tokens=history, semantics=SEMANTICS
        )
        return result
