"""Times of functions that enqueue GPU work: CUDA events around replays of a CUDA graph, without launches.

Functions that cannot be captured are timed as they are called, from an idle GPU until it is idle again.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

from tokenstep import _native
from tokenstep.bench.timer import Timing

CALLS_PER_GRAPH = 20
COPY_BYTES = 1 << 30


def measure_floors(budget_s: float) -> tuple[float, float]:
    """Microseconds of an empty launch, and bytes that a large copy reads and writes per microsecond."""
    import torch

    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    cuda = _native.cuda
    assert cuda is not None
    times, _ = time_on_gpu(
        {
            "empty": lambda: cuda.testing.launch_empty(source),
            "copy": lambda: target.copy_(source),
        },
        budget_s=budget_s,
    )
    return times["empty"].median_us, 2 * COPY_BYTES / times["copy"].median_us


def time_on_gpu(
    functions: Mapping[str, Callable[[], object]],
    *,
    min_rounds: int = 7,
    max_rounds: int = 100,
    budget_s: float = 1.0,
) -> tuple[dict[str, Timing], list[str]]:
    """Time each function once a round, in an order that rotates.

    Args:
        functions: What to time, by name; each call should find its input cold.
        min_rounds: Rounds that are run whatever they cost.
        max_rounds: Rounds after which the run ends early.
        budget_s: Wall time after which no further round begins, once ``min_rounds`` are done.

    Returns:
        Times of one call, and the names of functions that could not be captured: theirs include the launches.
    """
    rounds: dict[str, Callable[[], float]] = {}
    uncaptured = []
    for name, function in functions.items():
        graph = _captured(function)
        if graph is None:
            uncaptured.append(name)
        rounds[name] = _called(function) if graph is None else _replayed(graph)
        rounds[name]()
    samples: dict[str, list[float]] = {name: [] for name in rounds}
    names, end = list(rounds), time.perf_counter() + budget_s
    for index in range(max_rounds):
        if index >= min_rounds and time.perf_counter() > end:
            break
        shift = index % len(names)
        for name in names[shift:] + names[:shift]:
            samples[name].append(rounds[name]())
    return {name: _summary(values) for name, values in samples.items()}, uncaptured


def _captured(function: Callable[[], object]) -> Any:
    import torch

    stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for _ in range(CALLS_PER_GRAPH):
                function()
    except RuntimeError:  # it synchronises, copies to the host or allocates outside of torch
        torch.cuda.synchronize()
        return None
    return graph


def _replayed(graph: Any) -> Callable[[], float]:
    import torch

    event: Any = torch.cuda.Event
    begin, end = event(enable_timing=True), event(enable_timing=True)

    def once() -> float:
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1e3 / CALLS_PER_GRAPH

    return once


def _called(function: Callable[[], object]) -> Callable[[], float]:
    import torch

    def once() -> float:
        torch.cuda.synchronize()
        begin = time.perf_counter_ns()
        function()
        torch.cuda.synchronize()
        return (time.perf_counter_ns() - begin) / 1e3

    return once


def _summary(samples: list[float]) -> Timing:
    ordered = sorted(samples)
    return Timing(
        median_us=statistics.median(ordered), p20_us=ordered[len(ordered) // 5], rounds=len(ordered)
    )
