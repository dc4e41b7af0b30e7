"""Where each millisecond of a decode step goes: self times by op, with our operations and with torch's.

Run as ``python bench/step_profile.py``; ``--write docs/generation.md`` puts the tables there. The functions
that a step is made of are wrapped with a clock: a time is that of whole calls, Python's share included,
without that of the calls within that have a row of their own. All cases take turns, round after round; times
are medians over all steps, of prompts over the rounds. The clock itself costs about 0.5 µs a call.
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
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402

from tokenstep import LLM, set_num_threads  # noqa: E402
from tokenstep.bench.generate import PARAMETERS, PROMPT_TOKENS, Case  # noqa: E402
from tokenstep.bench.machine import describe_machine  # noqa: E402
from tokenstep.engine import engine, loop, results, runner  # noqa: E402
from tokenstep.models import decoder, layers, packed_linear  # noqa: E402

BEGIN, END = "<!-- profile: bench/step_profile.py -->\n", "<!-- end of profile -->\n"
PRODUCTS = "matrix products"
OPS: tuple[tuple[str, Any, tuple[str, ...]], ...] = (
    (PRODUCTS, layers.Linear, ("__call__", "added_to")),
    (PRODUCTS, packed_linear.PackedLinear, ("__call__", "added_to")),
    ("norms", layers.RMSNorm, ("__call__",)),
    ("norms", layers.HeadNorm, ("__call__",)),
    ("gate", layers.Gate, ("__call__",)),
    ("attention", decoder, ("paged_attention",)),
    ("embedding, views", decoder.DecoderModel, ("forward", "logits")),
    ("sampler", runner.Sampler, ("step",)),
    ("batch to tensors, tokens to Python", runner.Runner, ("decode", "forward", "sample")),
    ("batch to tensors, tokens to Python", results.Unread, ("read",)),
    ("schedule, outputs", engine.Engine, ("step",)),
    ("delivery, detokenising", loop.EngineLoop, ("_deliver", "_measure", "_wait_for_work")),
)
"""Row of the table, owner, functions."""


class StepClock:
    """Self times by row of each step of the engine's thread, in seconds."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
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
            begin = self._now()
            try:
                return function(*args, **kwargs)
            finally:
                took = self._now() - begin
                self._row_times[row] += took - self._inner.pop()
                self._inner[-1] += took

        return timed

    def end_step(self) -> None:
        """What has been timed since the last call was one step."""
        self.steps.append(dict(self._row_times))
        self._row_times.clear()


@contextmanager
def clock_on_ops(now: Callable[[], float]) -> Iterator[StepClock]:
    """Wraps the functions of `OPS` for a while."""
    clock = StepClock(now)
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


class TorchOps:
    """What a step was made of before it had operations of its own, under the names of ours."""

    @staticmethod
    def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
        """Torch's fused norm; heads with a weight each are not measured here."""
        return F.rms_norm(x, (x.shape[-1],), weight, eps)

    @staticmethod
    def gate(gate_up: Tensor, activation: str, out: Tensor | None = None) -> Tensor:
        """Three calls of torch."""
        gate, up = gate_up.chunk(2, 1)
        return (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")) * up


def load(options: dict[str, Any], with_torch: bool) -> LLM:
    """The model; `with_torch`: with weights that torch multiplies."""
    packs = packed_linear.packs_bfloat16
    if with_torch:
        packed_linear.packs_bfloat16 = lambda: False
    try:
        return LLM(**options | ({"weights": "dequantised"} if with_torch else {}))
    finally:
        packed_linear.packs_bfloat16 = packs


def profile(
    llm: LLM, case: Case, seed: str, with_torch: bool, now: Callable[[], float]
) -> list[dict[str, float]]:
    """Self times of the decode steps of one request, or of its prompt, by the clock `now`."""
    params = PARAMETERS if case.sampled else {"temperature": 0}
    ours = layers.cpu  # type: ignore[attr-defined]
    if with_torch:
        layers.cpu = TorchOps  # type: ignore[attr-defined]
    try:
        with clock_on_ops(now) as clock:
            llm.complete(case.prompts(seed), max_tokens=case.output_tokens, ignore_eos=True, **params)
    finally:
        layers.cpu = ours  # type: ignore[attr-defined]
    if case.is_prefill:
        return [{row: sum(step.get(row, 0.0) for step in clock.steps) for row, _, _ in OPS}]
    return clock.steps[2:-1]  # without the prompts' step, the one that builds the batch, and the last


def table(title: str, columns: dict[str, list[dict[str, float]]]) -> str:
    """Milliseconds by row and column."""
    lines = [f"| {title} | " + " | ".join(columns) + " |", "|---" * (1 + len(columns)) + "|"]
    for row in dict.fromkeys(row for row, _, _ in OPS):
        cells = [f"{1e3 * statistics.median(step.get(row, 0.0) for step in c):.2f}" for c in columns.values()]
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    sums = [f"{1e3 * statistics.median(sum(step.values()) for step in c):.2f}" for c in columns.values()]
    return "\n".join([*lines, "| **all** | " + " | ".join(sums) + " |"])


def cases_of(args: argparse.Namespace) -> dict[str, Case]:
    """By the heads of their columns."""
    cases = {
        f"B = {batch}, {'sampled' if sampled else 'greedy'}": Case(
            batch, PROMPT_TOKENS, args.output_tokens, sampled
        )
        for batch in args.batches
        for sampled in (False, True)
    }
    return cases | {f"prompt of {length}": Case(1, length, 1) for length in args.prefills}


def main() -> None:
    """Measure, and print the tables or put them into a page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--weights", default="dequantised", help="as of tokenstep complete")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 4, 16, 32])
    parser.add_argument("--prefills", type=int, nargs="*", default=[512, 2048], metavar="N")
    parser.add_argument("--output-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="default: one a core")
    parser.add_argument(
        "--cpu-time", action="store_true", help="on one thread, its own time: other programs don't count"
    )
    parser.add_argument("--no-torch", action="store_true", help="ours alone")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="between its markers")
    args = parser.parse_args()
    now = time.thread_time if args.cpu_time else time.perf_counter
    if args.cpu_time:
        args.threads = 1
    if args.threads:
        torch.set_num_threads(args.threads)
        set_num_threads(args.threads)
    cases = cases_of(args)
    longest = max(case.prompt_tokens + case.output_tokens for case in cases.values())
    options = {
        "model": args.model,
        "dtype": args.dtype,
        "weights": args.weights,
        "device": "cpu",
        "max_batch": max(case.batch for case in cases.values()),
        "kv_tokens": sum(
            case.batch * (case.prompt_tokens + case.output_tokens + 16) for case in cases.values()
        ),
        "progress": False,
    }
    variants = {False: "ms with our operations"} | ({} if args.no_torch else {True: "ms with torch's"})
    models = {with_torch: load(options, with_torch) for with_torch in variants}
    found: dict[bool, dict[str, list[dict[str, float]]]] = {key: {} for key in variants}
    for number in range(args.rounds):
        for name, case in cases.items():
            for with_torch, llm in models.items():
                found[with_torch].setdefault(name, []).extend(
                    profile(llm, case, str(number), with_torch, now)
                )
        print(f"round {number + 1} of {args.rounds}", file=sys.stderr)
    tables = [table(title, found[with_torch]) for with_torch, title in variants.items()]
    m = describe_machine()
    threads = "CPU time of one thread" if args.cpu_time else f"{torch.get_num_threads()} threads"
    tables.append(
        f"`python bench/step_profile.py`: {Path(args.model).name}, {args.dtype}, contexts up to {longest},"
        f" medians of {args.rounds} rounds on {m['cpu']}, {m['cores']} cores ({m['isa']}),"
        f" {threads}, torch {m['torch']}, {m['date']}, commit {m['commit']}."
    )
    text = "\n\n".join(tables) + "\n"
    if args.write is None:
        print(text)
        return
    page = args.write.read_text()
    before, _, rest = page.partition(BEGIN)
    after = rest.partition(END)[2]
    args.write.write_text(before + BEGIN + text + END + after)


if __name__ == "__main__":
    main()
