"""Where each millisecond of a decode step goes: a table of self times by op, as Markdown.

Run as ``python bench/step_profile.py``. The functions that a step is made of are wrapped with a clock: a time
is that of whole calls, Python's share included, without that of the calls within that have a row of their
own. Greedy and sampled runs of all batches take turns, round after round; times are medians over all steps.
The clock itself costs about 0.5 µs a call. With ``--prefill`` it is prompts that are computed, and a time is
that of the whole prompt.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenstep.threads import let_idle_threads_sleep

let_idle_threads_sleep()  # before torch is imported

import torch  # noqa: E402

from tokenstep import LLM  # noqa: E402
from tokenstep.bench.generate import PARAMETERS, PROMPT_TOKENS, Case  # noqa: E402
from tokenstep.bench.machine import describe_machine  # noqa: E402
from tokenstep.engine import engine, loop, runner  # noqa: E402
from tokenstep.models import decoder, layers, packed_linear  # noqa: E402

PRODUCTS = "matrix products"
STEP = "schedule, lists, outputs"
OPS: tuple[tuple[str, Any, tuple[str, ...]], ...] = (
    (PRODUCTS, layers.Linear, ("__call__", "added_to")),
    (PRODUCTS, packed_linear.PackedLinear, ("__call__", "added_to")),
    ("norms", layers.RMSNorm, ("__call__",)),
    ("norms", layers.HeadNorm, ("__call__",)),
    ("gate", layers.Gate, ("__call__",)),
    ("attention", decoder, ("paged_attention",)),
    ("embedding, views", decoder.DecoderModel, ("forward", "logits")),
    ("sampler", runner.Sampler, ("step",)),
    ("batch to tensors, tokens to Python", runner.Runner, ("forward", "sample")),
    (STEP, engine.Engine, ("step",)),
    ("delivery, detokenising", loop.EngineLoop, ("_deliver", "_measure", "_wait_for_work")),
)
"""Row of the table, owner, functions."""


class StepClock:
    """Self times by row of each step of the engine's thread, in seconds."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self._row_times: dict[str, float] = defaultdict(float)
        self._inner = [0.0]  # of each open call: what the calls within have taken

    def wrapped(self, row: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, timed."""

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if threading.current_thread().name != "tokenstep-engine":
                return function(*args, **kwargs)
            self._inner.append(0.0)
            begin = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                took = time.perf_counter() - begin
                self._row_times[row] += took - self._inner.pop()
                self._inner[-1] += took

        return timed

    def end_step(self) -> None:
        """What has been timed since the last call was one step."""
        self.steps.append(dict(self._row_times))
        self._row_times.clear()


@contextmanager
def clock_on_ops() -> Iterator[StepClock]:
    """Wraps the functions of `OPS` for a while."""
    clock = StepClock()
    originals = [(owner, name, getattr(owner, name)) for _, owner, names in OPS for name in names]
    for row, owner, names in OPS:
        for name in names:
            setattr(owner, name, clock.wrapped(row, getattr(owner, name)))
    measure = loop.EngineLoop._measure

    def end_step(self: loop.EngineLoop, seconds: float, tokens: int) -> None:
        measure(self, seconds, tokens)
        clock.end_step()

    loop.EngineLoop._measure = end_step  # type: ignore[method-assign]
    try:
        yield clock
    finally:
        for owner, name, function in originals:
            setattr(owner, name, function)


def profile(llm: LLM, case: Case, seed: str) -> list[dict[str, float]]:
    """Self times of the decode steps of one request."""
    params = PARAMETERS if case.sampled else {"temperature": 0}
    with clock_on_ops() as clock:
        llm.complete(case.prompts(seed), max_tokens=case.output_tokens, ignore_eos=True, **params)
    if case.is_prefill:
        return [{row: sum(step.get(row, 0.0) for step in clock.steps) for row, _, _ in OPS}]
    return clock.steps[2:-1]  # without the prompts' step, the one that builds the batch, and the last


def table(columns: dict[str, list[dict[str, float]]], title: str) -> str:
    """Milliseconds by row and column."""
    rows = list(dict.fromkeys(row for row, _, _ in OPS))
    lines = [f"| {title} | " + " | ".join(columns) + " |", "|---" * (1 + len(columns)) + "|"]
    for row in rows:
        cells = [
            f"{1e3 * statistics.median(s.get(row, 0.0) for s in steps):.2f}" for steps in columns.values()
        ]
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    total = [f"{1e3 * statistics.median(sum(s.values()) for s in steps):.2f}" for steps in columns.values()]
    return "\n".join([*lines, "| **step** | " + " | ".join(total) + " |"])


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--weights", default="dequantised", help="as of tokenstep complete")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16, 32])
    parser.add_argument("--prefill", type=int, nargs="+", metavar="N", help="prompts of N tokens, one each")
    parser.add_argument("--output-tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-invariant", action="store_true")
    parser.add_argument("--threads", type=int, help="default: one a core")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    cases = {
        f"B = {batch}, {'all parameters' if sampled else 'greedy'}": Case(
            batch, PROMPT_TOKENS, args.output_tokens, sampled
        )
        for batch in args.batches
        for sampled in (False, True)
    }
    if args.prefill:
        cases = {f"{length} tokens": Case(1, length, 1) for length in args.prefill}
    longest = max(case.prompt_tokens + case.output_tokens for case in cases.values())
    llm = LLM(
        args.model,
        dtype=args.dtype,
        weights=args.weights,
        device="cpu",
        max_batch=max(args.batches),
        kv_tokens=max(case.batch for case in cases.values()) * (longest + 16),
        batch_invariant=args.batch_invariant,
        progress=False,
    )
    columns: dict[str, list[dict[str, float]]] = {name: [] for name in cases}
    for number in range(args.rounds):
        for name, case in cases.items():
            columns[name] += profile(llm, case, str(number))
        print(f"round {number + 1} of {args.rounds}", file=sys.stderr)
    print(table(columns, "ms a prompt" if args.prefill else "ms a step"))
    m = describe_machine()
    print(
        f"\n{Path(args.model).name}, {args.dtype}, contexts up to {longest}, medians of {args.rounds} rounds"
        f" on {m['cpu']}, {m['cores']} cores ({m['isa']}), {args.threads or m['cores']} threads,"
        f" torch {m['torch']}, commit {m['commit']}."
    )


if __name__ == "__main__":
    main()
