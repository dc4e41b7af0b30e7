"""Writes the README's table of results from the kept measurements, so that no number there is typed by hand.

python bench/readme.py            # writes
python bench/readme.py --check    # fails if the README says anything else
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from tokenstep.bench.report import FLOOR, OURS, Report

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results" / "cpu"
BEGIN, END = "<!-- results: bench/readme.py -->\n", "<!-- end of results -->\n"
BATCH, CONTEXT, BLOCK_SIZE = 16, 4096, 16


def table() -> str:
    """The Markdown between the markers."""
    sample, attention = (Report.load(RESULTS / f"{op}.json") for op in ("sample", "attention"))
    lines = [
        f"| sample: {BATCH} rows × {sample.settings['vocab_size']:,} float32 logits | µs | × one read of the "
        "logits | times faster than transformers |",
        "|---|---|---|---|",
    ]
    for case, times in _cases(sample, dtype="float32", batch=BATCH):
        peer = f"{times['transformers'] / times[OURS]:.0f}" if "transformers" in times else "–"
        lines.append(f"| {case['mode']} | {times[OURS]:,.0f} | {times[OURS] / times[FLOOR]:.2f} | {peer} |")
    lines += [
        "",
        f"| attention: one decode step, context {CONTEXT}, bfloat16, pages of {BLOCK_SIZE} | µs "
        "| % of read bandwidth | times faster than torch SDPA |",
        "|---|---|---|---|",
    ]
    for case, times in _cases(attention, dtype="bfloat16", context=CONTEXT, block_size=BLOCK_SIZE):
        lines.append(
            f"| {case['model']}, batch {case['batch']} | {times[OURS]:,.0f} "
            f"| {100 * times[FLOOR] / times[OURS]:.0f} | {times['torch'] / times[OURS]:.1f} |"
        )
    serve, generate = (Report.load(RESULTS / f"{name}.json") for name in ("serve", "generate"))
    lines += ["", *_serve_table(serve), "", *_generate_table(generate)]
    m = sample.machine
    origins = [
        f"{report.bench}: {report.machine['date']}, commit {report.machine['commit']}"
        for report in (sample, attention, serve, generate)
    ]
    lines += [
        "",
        f"Medians on {m['cpu']} with {m['cores']} cores ({m['isa']}, torch {m['torch']}), sample and "
        f"attention memory-cold; peers, floor and tokenstep in turn in the same run. {'; '.join(origins)}.",
    ]
    return "\n".join(lines) + "\n"


def _serve_table(serve: Report) -> list[str]:
    """Servers beside one another, a row for each number of clients."""
    peers = [name for name in serve.settings["models"] if name != OURS]
    shown = [OURS, *peers]
    lines = [
        f"| serve: SmolLM2-135M in bfloat16, {serve.settings['prompt_tokens']} prompt and "
        f"{serve.settings['output_tokens']} output tokens | "
        + " | ".join(f"{name}, tok/s | first token, ms" for name in shown)
        + " |",
        "|---" * (1 + 2 * len(shown)) + "|",
    ]
    for clients in sorted({row["concurrency"] for row in serve.rows}):
        found = {row["impl"]: row for row in serve.rows if row["concurrency"] == clients}
        numbers = [
            f"{found[name]['tokens_per_s']:.0f} | {found[name]['ttft_median_ms']:,.0f}" for name in shown
        ]
        lines.append(f"| {clients} client{'s' * (clients > 1)} | " + " | ".join(numbers) + " |")
    return lines


def _generate_table(report: Report) -> list[str]:
    """Engines beside one another: tokens a second by batch, prompts' tokens a second, seconds to start."""
    rows = [row for row in report.rows if row["measures"] != "start"]
    names = list(dict.fromkeys(row["impl"] for row in rows))
    found: dict[str, dict[str, str]] = {}
    for row in rows:
        case = f"{row['batch']} text{'s' * (row['batch'] > 1)}, {row['sampling']}"
        if row["measures"] == "prefill":
            case = f"prompt of {row['prompt_tokens']} tokens"
        found.setdefault(case, {})[row["impl"]] = f"{row['tokens_per_s']:,.0f}"
    starts = {row["impl"]: row for row in report.rows if row["measures"] == "start"}
    found["start to first token, s"] = {name: f"{starts[name]['first_token_s']:.1f}" for name in names}
    found["peak memory, MiB"] = {name: f"{starts[name]['peak_mib']:,.0f}" for name in names}
    lines = [
        f"| generate: SmolLM2-135M, {report.settings['threads']} threads, tok/s | "
        + " | ".join(names)
        + " |",
        "|---" * (1 + len(names)) + "|",
    ]
    for case, cells in found.items():
        lines.append(f"| {case} | " + " | ".join(cells.get(name, "") for name in names) + " |")
    return lines


def _cases(report: Report, **wanted: Any) -> list[tuple[dict[str, Any], dict[str, float]]]:
    """The cases with these values, with all threads."""
    threads = max(case["threads"] for case, _ in report.cases())
    wanted["threads"] = threads
    return [(case, times) for case, times in report.cases() if all(case[k] == v for k, v in wanted.items())]


def main() -> int:
    """Write or check; the exit code is 1 if the check fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    readme = ROOT / "README.md"
    text = readme.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    new = before + BEGIN + table() + END + after
    if args.check:
        if new != text:
            print(
                "README.md: its results are not those of bench/results: run python bench/readme.py",
                file=sys.stderr,
            )
        return int(new != text)
    readme.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
