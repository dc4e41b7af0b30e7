"""Which threads should the ops use beside torch: torch's own OpenMP workers, a pool of our own, or none?

Alternates a torch GEMM (the output layer of SmolLM2 at batch 16, whose workers then spin for a while) with a
sampler step on its logits, as a decode loop does, and times both parts for each choice.

    python bench/threads.py [--json FILE]
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch

import tokenstep as ts
from tokenstep._native import cpu
from tokenstep.bench.report import Report
from tokenstep.bench.timer import Timing

BATCH, HIDDEN, VOCAB = 16, 576, 49152
CHOICES = {"one thread": ("pool", 1), "own pool": ("pool", 0), "torch's OpenMP": ("openmp", 0)}


def main() -> None:
    """Measure, print a table, and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=150)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    threads = torch.get_num_threads()
    hidden, weight = torch.randn(BATCH, HIDDEN), torch.randn(VOCAB, HIDDEN) * 0.05
    sampler = ts.Sampler(BATCH, VOCAB, "cpu")
    for row in range(BATCH):
        sampler.admit(row, ts.SamplingParams(temperature=0.8, top_p=0.95, seed=row), [], [])
    times: dict[tuple[str, str], list[float]] = {}
    for round_index in range(args.rounds + 3):
        for name, (backend, count) in CHOICES.items():
            cpu.set_thread_backend(backend)
            cpu.set_num_threads(count or threads)
            start = time.perf_counter()
            logits = hidden @ weight.T
            middle = time.perf_counter()
            sampler.step(logits)
            end = time.perf_counter()
            if round_index >= 3:
                times.setdefault((name, "torch GEMM"), []).append((middle - start) * 1e6)
                times.setdefault((name, "sampler"), []).append((end - middle) * 1e6)
    report = Report("threads", {"batch": BATCH, "hidden": HIDDEN, "vocab_size": VOCAB, "threads": threads})
    print("| threads of the sampler | part | median µs | 20th percentile µs |\n|---|---|---|---|")
    for (name, part), samples in times.items():
        timing = Timing(statistics.median(samples), sorted(samples)[len(samples) // 5], len(samples))
        report.add({"choice": name, "part": part, "impl": "tokenstep"}, timing)
        print(f"| {name} | {part} | {timing.median_us:.0f} | {timing.p20_us:.0f} |")
    if args.json:
        report.save(args.json)


if __name__ == "__main__":
    main()
