"""Wall-clock timing of several functions in turn, so that a busy moment of the machine hits all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """Times of one function over all rounds, in microseconds."""

    median_us: float
    p20_us: float  # a low percentile: what the function takes when nothing else runs
    rounds: int


def interleave(
    functions: Mapping[str, Callable[[], object]],
    *,
    min_rounds: int = 7,
    max_rounds: int = 200,
    budget_s: float = 2.0,
) -> dict[str, Timing]:
    """Time each function once a round, round after round, in an order that rotates.

    Args:
        functions: What to time, by name. Each is called twice first, untimed.
        min_rounds: Rounds that are run whatever they cost.
        max_rounds: Rounds after which the run ends early.
        budget_s: Wall time after which no further round begins, once ``min_rounds`` are done.
    """
    names = list(functions)
    for name in names:
        functions[name]()
        functions[name]()
    times: dict[str, list[float]] = {name: [] for name in names}
    end = time.perf_counter() + budget_s
    for round_index in range(max_rounds):
        if round_index >= min_rounds and time.perf_counter() > end:
            break
        shift = round_index % len(names)
        for name in names[shift:] + names[:shift]:
            begin = time.perf_counter_ns()
            functions[name]()
            times[name].append((time.perf_counter_ns() - begin) / 1e3)
    return {name: _summary(samples) for name, samples in times.items()}


def _summary(samples: list[float]) -> Timing:
    ordered = sorted(samples)
    return Timing(
        median_us=statistics.median(ordered),
        p20_us=ordered[len(ordered) // 5],
        rounds=len(ordered),
    )
