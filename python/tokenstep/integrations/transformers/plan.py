"""Which of the processors that generate prepared become calls of the kernel, and which run as they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LogitsProcessorList
from transformers.generation import logits_process as theirs
from transformers.generation.configuration_utils import GenerationMode

from tokenstep.integrations.transformers.chain import Chain
from tokenstep.integrations.transformers.processor import seen_ids
from tokenstep.sampling import SamplingParams

__all__ = ["Plan", "Unsupported", "make_plan"]

# In this order the end of transformers' list becomes calls of the kernel: type, its attribute, the chain's.
_FUSED: tuple[tuple[type, str, str], ...] = (
    (theirs.RepetitionPenaltyLogitsProcessor, "penalty", "repetition_penalty"),
    (theirs.TemperatureLogitsWarper, "temperature", "temperature"),
    (theirs.TopKLogitsWarper, "top_k", "top_k"),
    (theirs.TopPLogitsWarper, "top_p", "top_p"),
    (theirs.MinPLogitsWarper, "min_p", "min_p"),
)
_PLACES = {kind: place for place, (kind, _, _) in enumerate(_FUSED)}


class Unsupported(Exception):
    """The call needs something that is not fused; the message names it."""


@dataclass(frozen=True)
class Plan:
    """How one call of generate turns scores into tokens.

    Attributes:
        before: transformers' own processors that come first; they run as they are.
        chain: What the kernel does.
        greedy: No draw: the largest score.
        ignore: Ids at the start of each row that the repetition penalty leaves alone (its left padding).
    """

    before: LogitsProcessorList
    chain: Chain
    greedy: bool
    ignore: int | torch.Tensor | None

    def sampling_params(self, seed: int, substream: int, *, scored: bool) -> SamplingParams:
        """Parameters of a row of the Sampler; ``scored``: its scores have been through the whole chain."""
        chain = Chain() if scored else self.chain
        if self.greedy:
            return SamplingParams(temperature=0.0, repetition_penalty=chain.repetition_penalty)
        return SamplingParams(**chain.parameters(), seed=seed, substream=substream)

    def seen(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The ids that the repetition penalty counts, int64 ``[B, L]``."""
        return seen_ids(input_ids, self.ignore)


def make_plan(processors: Sequence[Any], config: Any) -> Plan:
    """Splits the processors that generate prepared into those that run first and those that are fused.

    Args:
        processors: In the order in which transformers would run them.
        config: The prepared GenerationConfig.

    Raises:
        Unsupported: The mode does not sample token by token, or something must run between or behind the
            processors that are fused.
    """
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.SAMPLE, GenerationMode.GREEDY_SEARCH):
        raise Unsupported(mode.value)
    start, place = len(processors), len(_FUSED)
    while start > 0 and _place(processors[start - 1]) < place:
        start -= 1
        place = _place(processors[start])
    before, fused = list(processors[:start]), processors[start:]
    warpers = [i for i, p in enumerate(before) if isinstance(p, tuple(_PLACES)) and _PLACES[type(p)] > 0]
    if warpers:  # what stands behind the first of them, and is not one of them, keeps it from being fused
        names = [type(p).__name__ for p in before[warpers[0] :] if type(p) not in _PLACES]
        raise Unsupported(", ".join(names) or "processors with settings or in an order of their own")
    penalty = next((p for p in fused if type(p) is theirs.RepetitionPenaltyLogitsProcessor), None)
    values = {ours: getattr(p, name) for p in fused for kind, name, ours in _FUSED if type(p) is kind}
    return Plan(
        before=LogitsProcessorList(before),
        chain=Chain(**values),
        greedy=mode is GenerationMode.GREEDY_SEARCH,
        ignore=getattr(penalty, "prompt_ignore_length", None),
    )


def _place(processor: Any) -> int:
    """Place in the chain; beyond its end if the processor, or a setting of it, is not the chain's."""
    if getattr(processor, "filter_value", -torch.inf) != -torch.inf:
        return len(_FUSED)
    if getattr(processor, "min_tokens_to_keep", 1) != 1:
        return len(_FUSED)
    return _PLACES.get(type(processor), len(_FUSED))
