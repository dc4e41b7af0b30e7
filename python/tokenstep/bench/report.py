"""Results of a benchmark: rows of times with the machine they came from; JSON to keep, Markdown to read."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tokenstep.bench.machine import describe_machine
from tokenstep.bench.timer import Timing

FLOOR, OURS = "floor", "tokenstep"
# What a comparison shows of a row, and all that is measured in one: the rest says which case it is.
COMPARED = ("median_us", "tokens_per_s", "ttft_median_ms", "tpot_median_ms", "first_token_s")
_MEASURED = re.compile(r"_(us|ms|s|mib)$|^(rounds|requests|all)$")


@dataclass
class Report:
    """Rows of one benchmark. A row is a case (its key fields), who ran it (``impl``) and its times."""

    bench: str
    settings: dict[str, Any]
    machine: dict[str, Any] = field(default_factory=describe_machine)
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, case: dict[str, Any], timing: Timing) -> None:
        """Append one row; ``case`` holds the key fields and ``impl``."""
        self.rows.append(case | {k: round(v, 2) for k, v in asdict(timing).items()})

    def cases(self) -> list[tuple[dict[str, Any], dict[str, float]]]:
        """(key fields, median microseconds by implementation), in the order measured."""
        grouped: dict[tuple[tuple[str, Any], ...], dict[str, float]] = {}
        for row in self.rows:
            key = tuple((k, v) for k, v in row.items() if k not in ("impl", "median_us", "p20_us", "rounds"))
            grouped.setdefault(key, {})[row["impl"]] = row["median_us"]
        return [(dict(key), times) for key, times in grouped.items()]

    def save(self, path: Path) -> None:
        """Write the report as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Report:
        """Read a report that ``save`` wrote."""
        return cls(**json.loads(path.read_text()))

    def markdown(self) -> str:
        """One table: times, how often the floor, and how many times faster than each peer."""
        cases = self.cases()
        if not cases:
            return "no results"
        keys = list(cases[0][0])
        peers = sorted({impl for _, times in cases for impl in times} - {FLOOR, OURS})
        header = [*keys, f"{OURS} µs", "floor µs", "× floor"]
        for peer in peers:
            header += [f"{peer} µs", f"{peer} / {OURS}"]
        lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
        for case, times in cases:
            cells = [str(case[k]) for k in keys]
            cells += [_time(times[OURS]), _time(times[FLOOR]), f"{times[OURS] / times[FLOOR]:.2f}"]
            for peer in peers:
                got = times.get(peer)
                cells += ["", ""] if got is None else [_time(got), f"{got / times[OURS]:.1f}"]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append(f"\nMedians on {_origin(self)}, torch {self.machine['torch']}.")
        if with_launches := self.settings.get("timed_with_launches"):
            lines.append(f"Timed with their launches, which no graph could hold: {', '.join(with_launches)}.")
        lines += [f"Refused by {who}: {why}" for who, why in self.settings.get("refused", {}).items()]
        return "\n".join(lines)

    def compared_with(self, old: Report) -> str:
        """One table: this run's medians beside those of an older run of the same cases, and their ratio.

        Raises:
            ValueError: The older run is of another benchmark.
        """
        if old.bench != self.bench:
            raise ValueError(f"results of bench {old.bench}, expected of bench {self.bench}")
        before = {_case(row): row for row in old.rows}
        names = dict.fromkeys(name for row in self.rows for name in row)
        columns = [name for name in names if not _MEASURED.search(name)]
        header = [*columns, "measure", "old", "new", "new / old"]
        lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
        unmatched = 0
        for row in self.rows:
            was = before.pop(_case(row), None)
            unmatched += was is None
            for name in COMPARED:
                if was is not None and row.get(name) and was.get(name):
                    cells = [str(row.get(column, "")) for column in columns]
                    cells += [name, f"{was[name]:g}", f"{row[name]:g}", f"{row[name] / was[name]:.2f}"]
                    lines.append("| " + " | ".join(cells) + " |")
        lines.append(f"\nOld: {_origin(old)}. New: {_origin(self)}.")
        if unmatched or before:
            lines.append(f"Cases of one run alone: {len(before)} old, {unmatched} new.")
        return "\n".join(lines)


def _case(row: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    """What tells a row's case from others, whatever order it was written in."""
    return tuple(sorted((name, str(value)) for name, value in row.items() if not _MEASURED.search(name)))


def _origin(report: Report) -> str:
    m = report.machine
    ran_on = report.settings.get("device") or f"{m['cpu']}, {m['cores']} cores ({m['isa']})"
    return f"{ran_on}, commit {m['commit']}, {m['date']}"


def _time(microseconds: float) -> str:
    return f"{microseconds:.0f}" if microseconds >= 100 else f"{microseconds:.1f}"
