"""What the pages and plots say is what the kept results say."""

from __future__ import annotations

import importlib
import sys
from itertools import combinations
from pathlib import Path

import pytest

from tokenstep.bench.plot import PICTURES, STYLE, digest, drawn_from, plot
from tokenstep.bench.report import FLOOR, OURS, Report

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "bench"))
pages = importlib.import_module("pages")
load = Report.load
RESULTS = sorted(pages.RESULTS.rglob("*.json"))
DRAWN = {load(file).bench: file for file in reversed(RESULTS)}  # one of each kind


@pytest.mark.parametrize("page", pages.PAGES, ids=lambda page: page.name)
def test_a_page_has_the_tables_that_the_results_give(page):
    text = page.read_text(encoding="utf-8")
    assert "<!-- results: " in text
    assert pages.filled(text) == text, "run python bench/pages.py"


def test_every_plot_was_drawn_from_the_results_beside_it():
    assert pages.stale_pictures() == [], "run python bench/pages.py"


@pytest.mark.parametrize("file", RESULTS, ids=lambda file: file.name)
def test_every_file_of_results_is_shown_with_its_machine_date_and_commit(file):
    [text] = [page.read_text(encoding="utf-8") for page in pages.PAGES if page.name == "benchmarks.md"]
    machine = load(file).machine
    [under] = [line for line in text.splitlines() if f"([{file.name}](" in line]
    assert all(str(machine[key]) in under for key in ("cpu", "isa", "date", "commit"))


def test_another_number_makes_a_page_and_a_plot_stale(tmp_path, monkeypatch):
    report = load(pages.CPU / "serve.json")
    kept = tmp_path / "serve.svg"
    plot(report, kept)
    assert drawn_from(kept) == digest(report)
    report.rows[0]["tokens_per_s"] += 100
    assert drawn_from(kept) != digest(report)
    [page] = [page for page in pages.PAGES if page.name == "benchmarks.md"]
    monkeypatch.setattr(
        pages.Report, "load", lambda file: report if file.name == "serve.json" else load(file)
    )
    assert pages.filled(page.read_text(encoding="utf-8")) != page.read_text(encoding="utf-8")


def illegible(figure):
    """Pairs of a figure's texts that lie on one another, and texts that are cut off."""
    figure.draw_without_rendering()
    texts = [*figure.texts, *figure.legends[0].get_texts()] if figure.legends else [*figure.texts]
    for axis in (axis for axis in figure.axes if axis.get_visible()):
        texts += [axis.title, axis.xaxis.label, axis.yaxis.label, *axis.texts]
        for labels, number, (low, high) in (
            (axis.get_xticklabels(), 0, sorted(axis.get_xlim())),
            (axis.get_yticklabels(), 1, sorted(axis.get_ylim())),
        ):
            texts += [t for t in labels if t.get_visible() and low <= t.get_position()[number] <= high]
    boxes = [(t.get_text(), t.get_window_extent().padded(-1)) for t in texts if t.get_text().strip()]
    cut = [
        t
        for t, box in boxes
        if box.x0 < 0 or box.y0 < 0 or box.x1 > figure.bbox.x1 or box.y1 > figure.bbox.y1
    ]
    return cut + [(a, b) for (a, one), (b, other) in combinations(boxes, 2) if one.overlaps(other)]


def legend(figure):
    return " ".join(text.get_text() for text in figure.legends[0].get_texts())


@pytest.fixture
def drawing():
    """Draws a report into a figure."""
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    with matplotlib.rc_context(STYLE):
        yield lambda report: PICTURES[report.bench][1](report, pyplot)
        pyplot.close("all")


@pytest.mark.parametrize("file", [f for bench, f in DRAWN.items() if bench in PICTURES], ids=lambda f: f.name)
def test_a_plot_names_what_it_shows_with_units_and_all_can_be_read(file, drawing):
    report = load(file)
    figure = drawing(report)
    axes = [axis for axis in figure.axes if axis.get_visible()]
    assert all(axis.get_title() and axis.has_data() for axis in axes)
    labels = " ".join(axis.get_title() + axis.get_ylabel() for axis in axes)
    assert any(unit in labels for unit in ("ms", "tok/s", "% of read bandwidth"))
    assert illegible(figure) == []
    if any(row["impl"] == FLOOR for row in report.rows):
        assert "one read of" in legend(figure)


@pytest.mark.parametrize(("name", "read"), [("generate", {OURS: 0.004}), ("serve", 0.004)])
def test_bars_show_the_floor_where_it_was_measured(name, read, drawing):
    report = load(pages.CPU / f"{name}.json")
    report.settings["weights_read_s"] = read
    assert "one read of the weights" in legend(drawing(report))


INSIDE = [
    {"engine": engine, "measures": measures, "batch": batch, "sampling": sampling, "impl": impl}
    | {"median_us": time, "all": [time]}
    for engine in ("transformers", "llama.cpp")
    for measures, sampling in (
        ("sampling", "all parameters"),
        ("generate", "greedy"),
        ("generate", "all parameters"),
    )
    for batch in (1, 16)
    for impl, time in ((engine, 3e4), (OURS, 1.5e4), (f"{OURS} and its attention", 1e4))
]


def test_other_engines_are_drawn_and_tabled_with_ours_inside_and_without(drawing):
    report = Report(
        "integrations", {"threads": 2}, machine=load(pages.CPU / "serve.json").machine, rows=INSIDE
    )
    figure = drawing(report)
    assert len(figure.axes) == 12
    assert illegible(figure) == []
    text = pages.tables.beside_peers(report)
    assert "| transformers, generate, 16, greedy | 30,000 | 15,000 | 10,000 | 2.00 | 3.00 |" in text
    assert report.machine["commit"] in text


def test_a_folder_of_another_machine_is_a_part_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "RESULTS", tmp_path)
    assert pages.gpus() == "Not measured yet."
    report = load(pages.CPU / "sample.json")
    report.settings["device"] = "A GPU"
    report.rows = [
        {k: v for k, v in row.items() if k != "threads"} for row in report.rows if row["threads"] == 2
    ]
    report.save(tmp_path / "a-gpu" / "sample.json")
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    text = pages.gpus()
    assert text.startswith("### a-gpu\n\n")
    assert "*A GPU, " in text
    assert "| float32 | 1 row: µs" in text


def test_a_benchmark_without_a_picture_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="no picture for bench nothing"):
        plot(Report("nothing", {}, machine={}), tmp_path / "x.svg")
