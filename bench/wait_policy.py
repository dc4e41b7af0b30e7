"""How long should torch's idle OpenMP workers spin, on free cores and where another program wants them?

Each round runs `tokenstep complete` (SmolLM2, greedy) once under each setting, alone and beside one busy
process a core, and takes the time per token that it reports.

    python bench/wait_policy.py [--rounds N] [--json FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tokenstep.bench.report import OURS, Report
from tokenstep.bench.timer import Timing
from tokenstep.threads import SPIN_COUNT

TOKENS = 48
SETTINGS = {
    "libgomp's default": {"GOMP_SPINCOUNT": "300000"},
    "tokenstep complete's": {"GOMP_SPINCOUNT": SPIN_COUNT},
    "passive": {"OMP_WAIT_POLICY": "passive"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}


def main() -> None:
    """Measure, print a table, and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    times: dict[tuple[str, int], list[float]] = {}
    for _ in range(args.rounds):
        for rivals in (0, cores):
            with busy_processes(rivals):
                for name, variables in SETTINGS.items():
                    times.setdefault((name, rivals), []).append(time_per_token(variables))
    report = Report("wait_policy", {"model": "smollm2", "tokens": TOKENS, "load_average": os.getloadavg()})
    print(
        "| idle threads | busy processes beside it | median ms a token | 20th percentile |\n|---|---|---|---|"
    )
    for (name, rivals), samples in times.items():
        timing = Timing(statistics.median(samples), sorted(samples)[len(samples) // 5], len(samples))
        report.add({"idle_threads": name, "rivals": rivals, "impl": OURS}, timing)
        print(f"| {name} | {rivals} | {timing.median_us / 1e3:.1f} | {timing.p20_us / 1e3:.1f} |")
    if args.json:
        report.save(args.json)


@contextlib.contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """So many processes that compute without pause."""
    rivals = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for rival in rivals:
            rival.kill()
            rival.wait()


def time_per_token(variables: dict[str, str]) -> float:
    """Microseconds per token of one run, the model's loading left out."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_"))}
    words = [
        "complete",
        "Once upon a time",
        "--temperature",
        "0",
        "--ignore-eos",
        "--max-tokens",
        str(TOKENS),
    ]
    result = subprocess.run(
        [sys.executable, "-m", "tokenstep.cli.main", *words],
        env={**inherited, **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    found = re.search(r"\(([\d.]+) tok/s\)", result.stderr)
    assert found is not None, result.stderr
    return 1e6 / float(found[1])


if __name__ == "__main__":
    main()
