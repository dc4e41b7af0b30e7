"""A step's logits to its tokens, with parameters and histories that stay in a :class:`tokenstep.Sampler`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch

from tokenstep.integrations.transformers.chain import SEMANTICS
from tokenstep.integrations.transformers.plan import Plan
from tokenstep.sampling import SampleOutput, Sampler

__all__ = ["Draw"]


class Draw:
    """From a step's logits to its tokens: transformers' processors that come first, the chain, the draw."""

    def __init__(self, plan: Plan, input_ids: torch.Tensor, seed: Any, *, scored: bool) -> None:
        """Nothing is admitted yet: the first logits tell the size of the vocabulary.

        Args:
            plan: What runs where.
            input_ids: The prompts, int64 ``[B, L]``.
            seed: One for all rows, one a row, or None.
            scored: Give the processed scores as well.
        """
        self._plan, self._prompts, self._scored = plan, input_ids, scored
        rows = len(input_ids)
        if seed is None:
            seed = int(torch.randint(-(1 << 63), (1 << 63) - 1, ()))
        if isinstance(seed, Sequence):
            if len(seed) != rows:
                raise ValueError(f"tokenstep.generate: seed has {len(seed)} entries for {rows} rows")
            self._seeds = [(value, 0) for value in seed]
        else:
            self._seeds = [(seed, row) for row in range(rows)]
        self._sampler: Sampler | None = None

    def __call__(self, logits: torch.Tensor, input_ids: torch.Tensor) -> tuple[SampleOutput, Any]:
        """Tokens int64 ``[B]`` with their status, and scores float32 ``[B, V]`` or None."""
        plan, scores = self._plan, None
        if plan.before or logits.dtype == torch.float64:
            logits = logits.to(torch.float32, copy=True)
        if plan.before:
            logits = plan.before(cast(Any, input_ids), logits)
        if self._scored:
            logits = scores = plan.chain.apply(logits, plan.seen(input_ids))
        if self._sampler is None:
            self._sampler = self._admitted(logits)
        return self._sampler.step(logits), scores

    def _admitted(self, logits: torch.Tensor) -> Sampler:
        """A sampler whose rows hold the parameters and prompts of all sequences."""
        plan = self._plan
        sampler = Sampler(logits.shape[0], logits.shape[1], logits.device, semantics=SEMANTICS)
        params = [plan.sampling_params(*seed, scored=self._scored) for seed in self._seeds]
        counted = params[0].repetition_penalty != 1
        prompts = plan.seen(self._prompts).cpu() if counted else [()] * len(params)
        for row, (own, prompt) in enumerate(zip(params, prompts, strict=True)):
            sampler.admit(row, own, prompt)
        return sampler
