"""Whom to let in: a pure function of what waits and what is free."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Demand:
    """What a waiting request needs, in blocks.

    Attributes:
        prompt_blocks: still to be taken for its prompt.
        choice_blocks: for each choice, beyond those it shares with the prompt.
        choices: that have no row yet.
        spare_blocks: fewer if all these choices get in, as the last one inherits the prompt's unfilled block.
    """

    prompt_blocks: int
    choice_blocks: int
    choices: int
    spare_blocks: int = 0


def plan_admission(waiting: Iterable[Demand], free_rows: int, free_blocks: int) -> list[int]:
    """How many choices of each waiting request get in now, for a prefix of `waiting`.

    Strictly first come, first served: a request gets in only when all choices before it are in. A choice gets
    all blocks that it can ever need, so that nobody who is in ever waits for blocks.
    """
    grants: list[int] = []
    for demand in waiting:
        left = free_blocks - demand.prompt_blocks
        if left < 0:
            break
        wanted = demand.choices
        if demand.choices * demand.choice_blocks - demand.spare_blocks > left:
            wanted = left // demand.choice_blocks
        granted = min(wanted, free_rows)
        if demand.choices and not granted:
            break
        grants.append(granted)
        if granted < demand.choices:
            break
        free_rows -= granted
        free_blocks = left - (granted * demand.choice_blocks - demand.spare_blocks)
    return grants
