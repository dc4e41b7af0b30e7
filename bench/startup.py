"""From the command typed to the first token printed, and the most memory that takes.

Runs `tokenstep complete` in turn with the default and with dequantised weights, and beside it a process that
only imports what the command does: the time and memory of Python and torch alone. Files are in the system's
cache from the first, untimed round on.

    python bench/startup.py [--rounds N] [--model M] [--json FILE]
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from tokenstep.bench.report import Report
from tokenstep.bench.timer import Timing

PROMPT = "The capital of Germany is"
IMPORTS = "import sys, tokenstep.llm, tokenstep.cli.complete; sys.stdout.write('.')"
MIB = 2**20


def main() -> None:
    """Measure, print a table, and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    complete = [sys.executable, "-m", "tokenstep.cli.main", "complete", PROMPT, "--model", args.model]
    complete += ["--max-tokens", "1", "--temperature", "0"]
    commands = {
        "imports alone": [sys.executable, "-c", IMPORTS],
        "complete": complete,
        "complete, dequantised": [*complete, "--weights", "dequantised"],
    }
    times: dict[str, list[float]] = {name: [] for name in commands}
    peaks: dict[str, list[int]] = {name: [] for name in commands}
    for round_index in range(args.rounds + 1):
        for name, command in commands.items():
            seconds, peak = run(command)
            if round_index:
                times[name].append(seconds)
                peaks[name].append(peak)
    # Only now: what this process has held counts as held by those that it starts.
    held = {
        "imports alone": 0,
        "complete": bytes_held(args.model, "auto"),
        "complete, dequantised": bytes_held(args.model, "dequantised"),
    }
    report = Report("startup", {"model": args.model, "load_average": os.getloadavg()})
    base = statistics.median(peaks["imports alone"])
    print("| | first output, s | 20th percentile | peak, MiB | above imports | weights as held | ratio |")
    print("|---|---|---|---|---|---|---|")
    for name in commands:
        seconds, low = statistics.median(times[name]), sorted(times[name])[len(times[name]) // 5]
        peak, weights = statistics.median(peaks[name]), held[name]
        report.add(
            {"impl": name, "peak_bytes": int(peak), "weights_bytes": weights},
            Timing(seconds * 1e6, low * 1e6, args.rounds),
        )
        ratio = f"{(peak - base) / weights:.2f}" if weights else ""
        print(
            f"| {name} | {seconds:.2f} | {low:.2f} | {peak / MIB:.0f} | {(peak - base) / MIB:.0f}"
            f" | {weights / MIB:.0f} | {ratio} |"
        )
    if args.json:
        report.save(args.json)


def run(command: list[str]) -> tuple[float, int]:
    """Seconds from the start to the first byte of output, and the process's peak of resident bytes."""
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    first = process.stdout.read(1)
    seconds = time.perf_counter() - begin
    process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode or not first:
        raise RuntimeError(f"{command}: exit code {process.returncode}")
    return seconds, usage.ru_maxrss * 1024


def bytes_held(name: str, weights: str) -> int:
    """The matrices as the model holds them; a tied embedding counts once."""
    from tokenstep.models import load
    from tokenstep.models.packed_linear import PackedLinear, PackedWeight

    model = load(name, weights=weights).model
    projections = [model.head]
    for layer in model.layers:
        projections += [layer.qkv, layer.output, layer.gate_up, layer.down]
    matrices = [model.embedding] + [
        p.packed if isinstance(p, PackedLinear) else p.weight for p in projections
    ]
    sizes = {id(m): m.num_bytes if isinstance(m, PackedWeight) else m.nbytes for m in matrices}
    return sum(sizes.values())


if __name__ == "__main__":
    main()
