"""``tokenstep bench integrations``: other engines as they are, and with tokenstep inside.

Each variant of an engine runs in a process of its own, as in `tokenstep.bench.generate`, which says how they
take turns. Two things are measured: sampling alone, from a step's logits to its tokens, and generation from a
prompt's ids to the last token. An engine takes part by its entry in `INTEGRATIONS`.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenstep.bench.generate import KINDS, PARAMETERS, PROMPT_TOKENS, Case, Kind, measure, worker_options
from tokenstep.bench.peer_process import PeerProcess, interpreter_has
from tokenstep.bench.report import OURS, Report

SAMPLING: dict[str, dict[str, float] | None] = {
    "greedy": None,
    "all parameters": PARAMETERS,
    "logprobs 5": {"temperature": 0.8, "logprobs": 5},
}
"""Parameters by the name that a row has for them."""


@dataclass(frozen=True)
class Integration:
    """An engine that tokenstep works in.

    Attributes:
        kind: The file that drives it, the package that it needs, whether it reads the GGUF file.
        variants: Options for that file, by variant; the first is the engine as it is, under its own name.
        sampling: Of `SAMPLING`, what texts are generated with.
        samples_alone: The file can tell the time of sampling (its `Peer` has `sample`).
        max_batch: The most texts at once; None: any number.
    """

    kind: Kind
    variants: Mapping[str, Mapping[str, Any]]
    sampling: Sequence[str] = ("greedy", "all parameters")
    samples_alone: bool = True
    max_batch: int | None = None


INTEGRATIONS = {
    "transformers": Integration(
        KINDS["transformers"],
        {
            "transformers": {},
            OURS: {"sampler": "tokenstep"},
            f"{OURS} and its attention": {"sampler": "tokenstep", "attention": "tokenstep"},
        },
    ),
    "llama.cpp": Integration(
        Kind("llama_cpp_class", "llama_cpp", reads_gguf=True),
        {
            "llama.cpp": {"way": "chain"},
            OURS: {"way": "loop"},
            f"{OURS}, a processor": {"way": "processor"},
        },
        max_batch=1,
    ),
    "vllm-cpu": Integration(
        KINDS["vllm-cpu"],
        {
            "vllm-cpu": {"plugin": "0"},
            OURS: {"plugin": "sampler"},
            f"{OURS} and its attention": {"plugin": "sampler,attention"},
        },
        sampling=("greedy", "all parameters", "logprobs 5"),
        samples_alone=False,
    ),
}
"""By the name that ``--peer`` has for it."""


@dataclass(frozen=True)
class IntegrationCase(Case):
    """Texts of a batch, or the sampling of their tokens alone."""

    sampling: str = "greedy"
    alone: bool = False

    def fields(self) -> dict[str, Any]:
        """As a report has it."""
        return {
            "measures": "sampling" if self.alone else "generate",
            "batch": self.batch,
            "sampling": self.sampling,
        }

    def run(self, process: PeerProcess, seed: str) -> float:
        """Seconds that the process takes for it."""
        return process.generate(
            self.prompts(seed), self.output_tokens, SAMPLING[self.sampling], sampling_alone=self.alone
        )


class IntegrationReport(Report):
    """Rows of microseconds a step, of each engine and variant; `all` has those of each round."""

    def markdown(self) -> str:
        """A table for each engine and measure; behind a variant how many times as fast it is."""
        s, m = self.settings, self.machine
        tables = []
        for engine in dict.fromkeys(row["engine"] for row in self.rows):
            for measures, unit, scale in (("sampling", "µs of sampling", 1), ("generate", "ms", 1e3)):
                rows = [r for r in self.rows if (r["engine"], r["measures"]) == (engine, measures)]
                if rows:
                    tables.append(_table(f"{engine}: {unit} a step", rows, scale))
        lines = [f"- {name}: {of['version']}, {of['details']}" for name, of in s["engines"].items()]
        lines.append(
            f"\nMedians of {s['rounds']} rounds on {m['cpu']}, {m['cores']} cores ({m['isa']}),"
            f" {s['threads']} threads, prompts of {s['prompt_tokens']} and texts of {s['output_tokens']}"
            f" tokens, commit {m['commit']}, {m['date']}. In brackets: how many times as fast as the engine"
            " itself, the median of the ratios in each round."
        )
        return "\n\n".join([*tables, "\n".join(lines)])


def _table(title: str, rows: Sequence[Mapping[str, Any]], scale: float) -> str:
    names = list(dict.fromkeys(row["impl"] for row in rows))
    lines = [f"| {title} | " + " | ".join(names) + " |", "|---" * (1 + len(names)) + "|"]
    found: dict[str, dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(f"batch {row['batch']}, {row['sampling']}", {})[row["impl"]] = row
    for case, of_impl in found.items():
        itself = of_impl[names[0]]
        cells = []
        for row in (of_impl[name] for name in names if name in of_impl):
            ratio = statistics.median(a / b for a, b in zip(itself["all"], row["all"], strict=True))
            number = f"{row['median_us'] / scale:,.{0 if scale == 1 else 2}f}"
            cells.append(number if row is itself else f"{number} ({ratio:.2f}×)")
        lines.append(f"| {case} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def run(
    engines: Mapping[str, str],
    *,
    gguf: str,
    folder: str | None,
    batches: Sequence[int],
    output_tokens: int,
    rounds: int,
    threads: int,
    budget_s: float,
    progress: Callable[[str], None],
) -> IntegrationReport:
    """Measures every variant of `engines`, name to interpreter, one engine after the other.

    Args:
        engines: of `INTEGRATIONS`; each interpreter has the engine and tokenstep.
        gguf: the GGUF file, for engines that read it.
        folder: the same weights in bfloat16 for the others.
        batches: texts at once; an engine leaves out those beyond its most.
        output_tokens: of each text; so many steps are sampled alone, too.
        rounds: the most rounds of an engine.
        threads: of each variant.
        budget_s: of each engine, from when it has started; no round begins that would end later.
        progress: is told what happens.

    Raises:
        ValueError: an engine that can't take part here.
        PeerFailed: one that has ended.
    """
    check_engines(engines, folder)
    settings = {
        "parameters": PARAMETERS,
        "prompt_tokens": PROMPT_TOKENS,
        "output_tokens": output_tokens,
        "threads": threads,
        "rounds": rounds,
        "engines": {},
    }
    report = IntegrationReport("integrations", settings)
    for name, python in engines.items():
        integration = INTEGRATIONS[name]
        cases = [
            IntegrationCase(batch, PROMPT_TOKENS, output_tokens, sampling=sampling, alone=alone)
            for batch in batches
            if integration.max_batch is None or batch <= integration.max_batch
            for alone in ([True, False] if integration.samples_alone else [False])
            for sampling in (["all parameters"] if alone else integration.sampling)
        ]
        options = worker_options(cases, threads)
        options["model"] = gguf if integration.kind.reads_gguf else folder
        with contextlib.ExitStack() as stack:
            processes: dict[str, PeerProcess] = {}
            for variant, own in integration.variants.items():
                process = PeerProcess(variant, integration.kind.module, python, {**options, **own})
                processes[variant] = stack.enter_context(process)
                progress(f"{name}: {variant}: first token {process.first_token_s:.1f} s after its start")
                report.settings["engines"][name] = process.description
            seconds = measure(processes, cases, rounds, time.monotonic() + budget_s, progress)
        for case in cases:
            for variant in processes:
                steps = [round(1e6 * each / output_tokens, 2) for each in seconds[case, variant]]
                row = {"engine": name} | case.fields() | {"impl": variant}
                report.rows.append(row | {"median_us": round(statistics.median(steps), 2), "all": steps})
                report.settings["rounds"] = min(report.settings["rounds"], len(steps))
    return report


def check_engines(engines: Mapping[str, str], folder: str | None) -> None:
    """Raises ValueError for an engine that can't take part."""
    if not engines:
        raise ValueError("no engine to measure: see --peer and --folder")
    for name, python in engines.items():
        if name not in INTEGRATIONS:
            raise ValueError(f"{name!r}, expected of {', '.join(INTEGRATIONS)}")
        kind = INTEGRATIONS[name].kind
        if not kind.reads_gguf and folder is None:
            raise ValueError(
                f"{name} reads no GGUF: --folder must name the model in bfloat16 (bench/dequantise.py)"
            )
        for package in (kind.package, "tokenstep"):
            if not interpreter_has(python, package):
                raise ValueError(f"{name}: {python} has no package {package}")


def installed_engines(folder: str | None) -> list[str]:
    """The engines that this interpreter has, and that can take part."""
    return [
        name
        for name, integration in INTEGRATIONS.items()
        if (integration.kind.reads_gguf or folder is not None)
        and interpreter_has(sys.executable, integration.kind.package)
    ]
