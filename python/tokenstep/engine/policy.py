"""Who computes what in a step: pure functions of what there is and what is free.

Everything goes by arrival. What runs comes before what waits; what waits gets in only when everybody before
it is in; when blocks run out, the latest arrival gives up its own and waits again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Arrival = tuple[int, int]
"""A sequence's place in the order: its request's number, then its own among the request's."""


@dataclass(frozen=True, slots=True)
class TokenBudget:
    """Tokens that go through the model in one step.

    Attributes:
        prefill: where no sequence decodes.
        mixed: where some do, their own tokens included: so long does a decoding sequence wait for prompts.
    """

    prefill: int
    mixed: int


def share_tokens(uncomputed: Sequence[int], budget: TokenBudget) -> list[int]:
    """How many tokens each running sequence computes, given how many it has to; in order of arrival.

    A sequence with one token to compute decodes, and always gets it. The others share what is left, first
    come, first served; one token at least, so that prompts advance beside any number that decode.
    """
    decoding = sum(count == 1 for count in uncomputed)
    room = max(1, budget.mixed - decoding) if decoding else budget.prefill
    shares = []
    for count in uncomputed:
        share = count if count == 1 else min(count, room)
        room -= 0 if count == 1 else share
        shares.append(share)
    return shares


def room_for_prompts(uncomputed: Sequence[int], shares: Sequence[int], budget: TokenBudget) -> int:
    """Tokens that sequences may compute that get in now, beside those of `share_tokens`."""
    decoding = sum(count == 1 for count in uncomputed)
    total = max(decoding + 1, budget.mixed) if decoding else budget.prefill
    return max(0, total - sum(shares))


def may_enter(needed: int, missing: Sequence[int], free_blocks: int) -> bool:
    """Whether a sequence that needs `needed` blocks for all its tokens gets in.

    `missing`: what each running sequence lacks for the tokens it has. Beyond that, one block more must be
    free for each of them, lest the newcomer be thrown out in the next steps. Whoever is alone needs no such
    reserve.
    """
    return needed + sum(missing) + len(missing) <= free_blocks


def latest(arrivals: Sequence[Arrival]) -> int:
    """Whom to preempt: the index of the latest arrival."""
    return max(range(len(arrivals)), key=arrivals.__getitem__)
