"""Draws the plots of the kept measurements and writes their tables into pages: no number is typed by hand.

A block of a page lies between `<!-- results: NAME -->` and `<!-- end of results -->`.

    python bench/pages.py            # writes
    python bench/pages.py --check    # fails if a page or a plot says anything else
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

import tables
from tokenstep.bench.plot import PICTURES, digest, drawn_from, plot
from tokenstep.bench.report import Report

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
CPU = RESULTS / "cpu"
PAGES = (
    ROOT / "README.md",
    *(ROOT / "docs" / name for name in ("benchmarks.md", "generation.md", "torch.md")),
)
BLOCK = re.compile(r"(<!-- results: ([\w ]+) -->\n).*?(<!-- end of results -->)", re.DOTALL)


def picture(file: Path) -> Path:
    """Where the plot of a file of results is kept."""
    return file.with_suffix(".svg")


def shown(pattern: str, folder: Path = CPU) -> str:
    """Plot and tables of each file of results whose name fits."""
    return "\n\n".join(show(file) for file in sorted(folder.glob(pattern)))


def show(file: Path) -> str:
    """Plot and tables of one file."""
    report = Report.load(file)
    text = tables.TABLES.get(report.bench, tables.beside_peers)(report)
    kept = file.relative_to(ROOT).as_posix()
    text += f" ([{file.name}](../{kept}))"
    if report.bench in PICTURES:
        title, drawn = PICTURES[report.bench][0], picture(file).relative_to(ROOT).as_posix()
        text = f"[![{title}, {report.machine['date']}](../{drawn})](../{drawn})\n\n{text}"
    return text


def summary() -> str:
    """The README's tables."""
    shown_there = {
        "sample": tables.sample_in_short,
        "attention": tables.attention_in_short,
        "serve": tables.serve_in_short,
        "generate": tables.generate_in_short,
    }
    reports = {name: Report.load(CPU / f"{name}.json") for name in shown_there}
    inside = {file.stem: Report.load(file) for file in sorted(CPU.glob("integrations*.json"))}
    m = reports["sample"].machine
    origins = [
        f"{n}: {r.machine['date']}, commit {r.machine['commit']}" for n, r in (reports | inside).items()
    ]
    under = (
        f"Medians on {m['cpu']} with {m['cores']} cores ({m['isa']}, torch {m['torch']}), sample and"
        f" attention memory-cold; peers, floor and tokenstep in turn in the same run. {'; '.join(origins)}."
    )
    short = [make(reports[name]) for name, make in shown_there.items()]
    return "\n\n".join([*short, tables.integrations_in_short(inside.values()), under])


def calls() -> str:
    """What a call of each op costs."""
    report = Report.load(CPU / "overhead.json")
    return f"{tables.calls(report)}\n\n{tables.origin(report)}"


def aims() -> str:
    """How far the aims of generation on a CPU are reached."""
    return tables.aims(Report.load(CPU / "generate.json"))


def integrations() -> str:
    """Whatever was measured inside other engines."""
    return shown("integrations*.json") or "Not measured yet."


def gpus() -> str:
    """A part for each device that isn't a CPU."""
    folders = [folder for folder in sorted(RESULTS.iterdir()) if folder.is_dir() and folder != CPU]
    parts = [
        f"### {folder.name}\n\n{shown('*.json', folder)}" for folder in folders if any(folder.glob("*.json"))
    ]
    return "\n\n".join(parts) or "Not measured yet."


BLOCKS: dict[str, Callable[[], str]] = {
    "summary": summary,
    "sample": lambda: shown("sample*.json"),
    "attention": lambda: shown("attention*.json"),
    "generate": lambda: shown("generate*.json"),
    "serve": lambda: shown("serve*.json"),
    "overhead": lambda: shown("overhead*.json"),
    "threads": lambda: shown("threads*.json"),
    "calls": calls,
    "aims": aims,
    "integrations": integrations,
    "gpu": gpus,
}


def filled(text: str) -> str:
    """A page with its blocks as they should be."""
    return BLOCK.sub(lambda found: f"{found[1]}{BLOCKS[found[2]]()}\n{found[3]}", text)


def stale_pictures() -> list[Path]:
    """The files of results whose plot is missing or was drawn from others."""
    stale = []
    for file in sorted(RESULTS.rglob("*.json")):
        report = Report.load(file)
        kept = picture(file)
        if report.bench in PICTURES and not (kept.exists() and drawn_from(kept) == digest(report)):
            stale.append(file)
    return stale


def main() -> int:
    """Write or check; the exit code is 1 if the check fails."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--redraw", action="store_true", help="all plots, not only those of new results")
    args = parser.parse_args()
    texts = {page: page.read_text(encoding="utf-8") for page in PAGES}
    wrong = [page for page, text in texts.items() if filled(text) != text]
    drawn = sorted(RESULTS.rglob("*.json")) if args.redraw else stale_pictures()
    if args.check:
        for file in [*wrong, *map(picture, drawn)]:
            print(
                f"{file.relative_to(ROOT)} is not what bench/results says: run python bench/pages.py",
                file=sys.stderr,
            )
        return int(bool(wrong or drawn))
    for page in wrong:
        page.write_text(filled(texts[page]), encoding="utf-8")
    for file in drawn:
        report = Report.load(file)
        if report.bench in PICTURES:
            plot(report, picture(file))
    return 0


if __name__ == "__main__":
    sys.exit(main())
