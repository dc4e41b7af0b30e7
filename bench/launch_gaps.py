"""How much of a decode step a GPU waits: gaps between its kernels, from torch's profiler.

    python bench/launch_gaps.py --device cuda --shape Llama-3.1-8B [--batches 1,8,64] [--steps 24]

For each batch the engine decodes `--steps` tokens of as many sequences under the profiler, after as many to
warm up. Counted is from the first kernel of the first profiled step to the end of the last: the share in
which no kernel, copy or fill runs, the gaps of more than 10 µs, and kernels a step. On a CPU the same is
counted for torch's operations, ours not included, which shows no more than that the script works.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import tokenstep as ts
from tokenstep.bench.shapes import SHAPES, model_arguments
from tokenstep.engine import Engine, Request
from tokenstep.sampling import SamplingParams

PROMPT_TOKENS = 8
LONG_GAP_US = 10.0

Interval = tuple[float, float]


@dataclass(frozen=True)
class Gaps:
    """Of a span of time in which `count` intervals lie; in microseconds."""

    span_us: float
    idle_us: float
    long_gaps: int
    count: int


def gaps(intervals: Sequence[Interval]) -> Gaps:
    """What of the time from the first beginning to the last end none of `intervals` (begin, end) covers."""
    ordered = sorted(intervals)
    if not ordered:
        return Gaps(0.0, 0.0, 0, 0)
    first = reached = ordered[0][0]
    idle, long_gaps = 0.0, 0
    for begin, end in ordered:
        if begin > reached:
            idle += begin - reached
            long_gaps += begin - reached > LONG_GAP_US
        reached = max(reached, end)
    return Gaps(reached - first, idle, long_gaps, len(ordered))


def start(engine: Engine, batch: int, steps: int) -> list[Request]:
    """`batch` requests whose prompts are done, with `steps` tokens and more to come."""
    params = SamplingParams(temperature=1.0, top_p=0.95, seed=1)
    requests = [
        Request([1000 + row * PROMPT_TOKENS + i for i in range(PROMPT_TOKENS)], [params], steps)
        for row in range(batch)
    ]
    for request in requests:
        engine.add(request)
    return requests


def measure(engine: Engine, batch: int, steps: int, on_gpu: bool) -> Gaps:
    """The gaps of `steps` decode steps of `batch` sequences."""
    requests = start(engine, batch, 2 * steps + 8)
    for _ in range(steps):  # prompts, then warm decode steps
        engine.step()
    activities = [ProfilerActivity.CUDA] if on_gpu else [ProfilerActivity.CPU]
    with profile(activities=activities):  # beginning to profile takes time of its own, once
        engine.step()
    with profile(activities=activities) as profiler:
        for _ in range(steps):
            engine.step()
        if on_gpu:
            torch.cuda.synchronize()
    for request in requests:
        engine.cancel(request)
    engine.step()
    wanted = DeviceType.CUDA if on_gpu else DeviceType.CPU
    return gaps(
        [
            (event.time_range.start, event.time_range.end)
            for event in profiler.events()
            if event.device_type == wanted and event.cpu_parent is None
        ]
    )


def main() -> None:
    """The command: a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--shape", choices=tuple(SHAPES), help="random weights of this shape instead")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batches", default="1,8,64")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--batch-invariant", action="store_true")
    args = parser.parse_args()
    batches = [int(text) for text in args.batches.split(",")]
    with (
        model_arguments(args.model, args.shape) as model,
        ts.LLM(
            **model,
            device=args.device,
            dtype=args.dtype,
            max_batch=max(batches),
            kv_tokens=max(batches) * (PROMPT_TOKENS + 2 * args.steps + 32),
            batch_invariant=args.batch_invariant,
            progress=False,
        ) as llm,
    ):
        engine = llm.service.engine
        on_gpu = engine.runner.device.type == "cuda"
        print(f"| {args.shape or args.model} | step, ms | idle | gaps > 10 µs a step | kernels a step |")
        print("|---|---|---|---|---|")
        for batch in batches:
            found = measure(engine, batch, args.steps, on_gpu)
            print(
                f"| batch {batch} | {found.span_us / args.steps / 1e3:.2f} |"
                f" {100 * found.idle_us / found.span_us:.1f} % | {found.long_gaps / args.steps:.1f} |"
                f" {found.count / args.steps:.0f} |",
                flush=True,
            )
        print(f"\n{args.steps} steps each; {llm.system_fingerprint}")


if __name__ == "__main__":
    main()
