"""A benchmark's report as a picture: bars beside the peers with the floor drawn in, or bandwidth reached."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from tokenstep.bench.report import FLOOR, OURS, Report

COLORS = {
    OURS: "#2f6db5",
    "torch": "#d98032",
    "transformers": "#8a8f98",
    "flashinfer": "#4c9a58",
    "fusedtok": "#a05ca8",
}


def plot(report: Report, path: Path) -> None:
    """Draw a report into an image file; its type follows the file's ending.

    Raises:
        ImportError: matplotlib is not installed (``pip install tokenstep[bench]``).
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    draw = {
        "sample": _plot_sample,
        "attention": _plot_attention,
        "serve": _plot_serve,
        "generate": _plot_generate,
        "integrations": _plot_integrations,
    }[report.bench]
    figure = draw(report, pyplot)
    m = report.machine
    figure.suptitle(
        f"tokenstep bench {report.bench}: {m['cpu']}, {m['cores']} cores ({m['isa']}), {m['date']}",
        fontsize=10,
    )
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _panels(
    report: Report, keys: tuple[str, ...]
) -> dict[tuple[Any, ...], list[tuple[dict[str, Any], dict[str, float]]]]:
    panels: dict[tuple[Any, ...], list[tuple[dict[str, Any], dict[str, float]]]] = {}
    for case, times in report.cases():
        panels.setdefault(tuple(case.get(k) for k in keys), []).append((case, times))
    return panels


def _ran_on(report: Report, threads: int | None) -> str:
    return str(report.settings["device"]) if threads is None else f"{threads} thread{'s' * (threads > 1)}"


def _plot_sample(report: Report, pyplot: Any) -> Any:
    panels = _panels(report, ("dtype", "batch", "threads"))
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(5.2 * columns, 3.4 * rows), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, ((dtype, batch, threads), cases) in zip(axes.flat, panels.items(), strict=False):
        impls = [i for i in COLORS if any(i in times for _, times in cases)]
        height = 0.8 / len(impls)
        for j, impl in enumerate(impls):
            for y, (_, times) in enumerate(cases):
                if impl in times:
                    label = impl if y == next(k for k, (_, t) in enumerate(cases) if impl in t) else None
                    axis.barh(y + j * height, times[impl] / 1e3, height, color=COLORS[impl], label=label)
        floor = [times[FLOOR] / 1e3 for _, times in cases]
        axis.axvline(
            sorted(floor)[len(floor) // 2], color="black", linestyle=":", label="one read of the logits"
        )
        axis.set_xscale("log")
        axis.set_yticks(
            [y + 0.4 - height / 2 for y in range(len(cases))], [case["mode"] for case, _ in cases], fontsize=8
        )
        axis.invert_yaxis()
        axis.set_xlabel("milliseconds a call")
        axis.set_title(f"{dtype}, batch {batch}, {_ran_on(report, threads)}", fontsize=9)
    axes.flat[0].legend(fontsize=7, loc="lower right")
    return figure


def _plot_attention(report: Report, pyplot: Any) -> Any:
    panels = _panels(report, ("model", "dtype", "cache", "threads"))
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(5.2 * columns, 3.4 * rows), squeeze=False, sharey=True
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, ((model, dtype, cache, threads), cases) in zip(axes.flat, panels.items(), strict=False):
        held = "" if cache in (None, dtype) else f" (cache {cache})"
        lines: dict[tuple[Any, ...], list[tuple[int, float]]] = {}
        for case, times in cases:
            for impl in COLORS:
                if impl in times:
                    line = (impl, case["batch"], case["block_size"], case.get("lengths", "equal"))
                    lines.setdefault(line, []).append((case["context"], 100 * times[FLOOR] / times[impl]))
        for (impl, batch, block_size, lengths), points in lines.items():
            style = "-" if block_size == max(case["block_size"] for case, _ in cases) else "--"
            marker = {1: "o", 8: "s", 32: "^"}.get(batch, "d")
            points.sort()
            label = f"{impl}, batch {batch}" + (f", block {block_size}" if impl == OURS else "")
            label += ", skewed" if lengths == "skewed" else ""
            contexts, percents = zip(*points, strict=True)
            axis.plot(contexts, percents, style, marker=marker, color=COLORS[impl], markersize=4, label=label)
        axis.axhline(100, color="black", linestyle=":", label="one read of K and V")
        axis.set_xscale("log", base=2)
        axis.set_ylim(0, None)
        axis.set_xlabel("context")
        axis.set_ylabel("% of read bandwidth")
        axis.set_title(f"{model}, {dtype}{held}, {_ran_on(report, threads)}", fontsize=9)
    axes.flat[0].legend(fontsize=6)
    return figure


def _plot_serve(report: Report, pyplot: Any) -> Any:
    panels = (
        ("tokens a second", {"tokens_per_s": "-"}),
        ("time to first token, ms", {"ttft_median_ms": "-", "ttft_p99_ms": "--"}),
        ("time per token, ms", {"tpot_median_ms": "-", "tpot_p99_ms": "--"}),
    )
    figure, axes = pyplot.subplots(1, len(panels), figsize=(5.2 * len(panels), 3.4))
    impls = list(dict.fromkeys(row["impl"] for row in report.rows))
    for axis, (title, columns) in zip(axes, panels, strict=True):
        for number, impl in enumerate(impls):
            rows = [row for row in report.rows if row["impl"] == impl]
            for column, style in columns.items():
                label = impl + (" (p99)" if style == "--" else "")
                color = COLORS.get(impl, f"C{number}")
                values = [row[column] for row in rows]
                axis.plot(
                    [row["concurrency"] for row in rows], values, style, marker="o", color=color, label=label
                )
        axis.set_xscale("log", base=2)
        axis.set_ylim(0, None)
        axis.set_xlabel("clients")
        axis.set_title(title, fontsize=9)
        axis.legend(fontsize=7)
    return figure


def _plot_generate(report: Report, pyplot: Any) -> Any:
    panels = (
        ("decode, greedy: tokens a second", "decode", "greedy", "batch"),
        ("decode, all sampling parameters", "decode", "all parameters", "batch"),
        ("prefill: tokens of the prompt a second", "prefill", "greedy", "prompt_tokens"),
    )
    figure, axes = pyplot.subplots(1, len(panels), figsize=(5.2 * len(panels), 3.6))
    impls = list(dict.fromkeys(row["impl"] for row in report.rows if row["measures"] != "start"))
    for axis, (title, measures, sampling, along) in zip(axes, panels, strict=True):
        rows = [row for row in report.rows if row["measures"] == measures and row["sampling"] == sampling]
        places = sorted({row[along] for row in rows})
        for number, impl in enumerate(impls):
            speeds = {row[along]: row["tokens_per_s"] for row in rows if row["impl"] == impl}
            width = 0.8 / len(impls)
            at = [place + number * width for place, value in enumerate(places) if value in speeds]
            heights = [speeds[value] for value in places if value in speeds]
            axis.bar(at, heights, width, label=impl, color=COLORS.get(impl, f"C{number}"))
        axis.set_xticks([place + 0.4 - 0.4 / len(impls) for place in range(len(places))], places)
        axis.set_xlabel("texts at a time" if along == "batch" else "tokens")
        axis.set_title(title, fontsize=9)
    axes[0].legend(fontsize=7)
    return figure


def _plot_integrations(report: Report, pyplot: Any) -> Any:
    panels = dict.fromkeys((row["engine"], row["measures"]) for row in report.rows)
    figure, axes = pyplot.subplots(1, len(panels), figsize=(5.2 * len(panels), 3.6), squeeze=False)
    for axis, (engine, measures) in zip(axes.flat, panels, strict=True):
        rows = [row for row in report.rows if (row["engine"], row["measures"]) == (engine, measures)]
        cases = list(dict.fromkeys((row["batch"], row["sampling"]) for row in rows))
        impls = list(dict.fromkeys(row["impl"] for row in rows))
        width = 0.8 / len(impls)
        for number, impl in enumerate(impls):
            of_impl = [row for row in rows if row["impl"] == impl]
            at = [cases.index((row["batch"], row["sampling"])) + number * width for row in of_impl]
            color = COLORS["transformers"] if impl == engine else f"C{number - 1}"
            axis.bar(at, [row["median_us"] / 1e3 for row in of_impl], width, label=impl, color=color)
        places = [place + 0.4 - width / 2 for place in range(len(cases))]
        axis.set_xticks(places, [f"batch {batch}\n{sampling}" for batch, sampling in cases], fontsize=7)
        axis.set_ylabel("milliseconds a step")
        axis.set_title(
            f"{engine}: {'sampling alone' if measures == 'sampling' else 'generation'}", fontsize=9
        )
        axis.legend(fontsize=6)
    return figure


def main() -> None:
    """``python -m tokenstep.bench.plot RESULTS.json PICTURE.png``: draws a report that was kept."""
    parser = argparse.ArgumentParser(description="Draw a report that tokenstep bench has written.")
    parser.add_argument("report", type=Path)
    parser.add_argument("picture", type=Path)
    args = parser.parse_args()
    plot(Report.load(args.report), args.picture)


if __name__ == "__main__":
    main()
