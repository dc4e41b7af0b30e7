"""What the plugin for vLLM gains: whole texts by vLLM as it is, with our sampler, and with our attention too.

Each variant is an engine in a process of its own, which sleeps while others are measured (`peer_process`);
all get the same random prompts, new ones in each round.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tokenstep.bench.generate import PARAMETERS, PROMPT_TOKENS, Case
from tokenstep.bench.peer_process import PeerProcess, interpreter_has
from tokenstep.bench.report import Report

VARIANTS = {"vllm": "0", "sampler": "sampler", "sampler and attention": "sampler,attention"}
"""What TOKENSTEP_VLLM says, by variant."""

SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "all parameters": PARAMETERS,
    "logprobs 5": {"temperature": 0.8, "logprobs": 5},
}
"""vLLM's SamplingParams, by case."""


class VllmReport(Report):
    """Rows of tokens a second."""

    def markdown(self) -> str:
        """One table: a line a case, a column a variant; behind ours how many times as fast as vLLM's own."""
        m, s = self.machine, self.settings
        names = list(dict.fromkeys(row["impl"] for row in self.rows))
        lines = ["| batch | sampling | " + " | ".join(names) + " |", "|---" * (2 + len(names)) + "|"]
        found: dict[tuple[int, str], dict[str, float]] = {}
        for row in self.rows:
            found.setdefault((row["batch"], row["sampling"]), {})[row["impl"]] = row["tokens_per_s"]
        for (batch, sampling), speeds in found.items():
            cells = [f"{speeds[n]:,.0f}" + ("" if n == "vllm" else f" ({speeds[n] / speeds['vllm']:.2f}×)")
                     for n in names]  # fmt: skip
            lines.append(f"| {batch} | {sampling} | " + " | ".join(cells) + " |")
        lines.append(
            f"\nTokens a second, {s['output_tokens']} of each text; medians of {s['rounds']} rounds on"
            f" {m['cpu']}, {m['cores']} cores ({m['isa']}), {s['threads']} threads, vLLM {s['vllm']}, commit"
            f" {m['commit']}, {m['date']}."
        )
        return "\n".join(lines)


def run(
    python: str,
    folder: str,
    *,
    variants: Mapping[str, str] = VARIANTS,
    batches: Sequence[int] = (1, 16, 32),
    samplings: Sequence[str] = tuple(SAMPLING),
    output_tokens: int = 64,
    rounds: int = 5,
    threads: int,
    progress: Callable[[str], None],
) -> VllmReport:
    """Measures.

    Args:
        python: an interpreter that has vLLM for the CPU, and tokenstep.
        folder: the model in bfloat16 (bench/dequantise.py).
        variants: what TOKENSTEP_VLLM says, by name; "vllm" is what others are compared with.
        batches: texts at once.
        samplings: names of `SAMPLING`.
        output_tokens: of each text.
        rounds: in each, every case is run by every variant in turn.
        threads: of each engine.
        progress: is told what happens.

    Raises:
        ValueError: an interpreter without vLLM or tokenstep.
        PeerFailed: an engine has ended.
    """
    for package in ("vllm", "tokenstep"):
        if not interpreter_has(python, package):
            raise ValueError(f"{python} has no package {package}")
    options = {
        "model": folder,
        "threads": threads,
        "max_batch": max(batches),
        "max_length": PROMPT_TOKENS + output_tokens,
        "first_prompt": Case(1, PROMPT_TOKENS, 1).prompts("first")[0],
    }
    cases = [(batch, name) for batch in batches for name in samplings]
    speeds: dict[tuple[int, str, str], list[float]] = {}
    report = VllmReport(
        "integrations vllm", {"output_tokens": output_tokens, "threads": threads, "rounds": rounds}
    )
    with contextlib.ExitStack() as stack:
        processes: dict[str, PeerProcess] = {}
        for name, choice in variants.items():
            process = PeerProcess(name, "vllm_cpu", python, options | {"plugin": choice})
            processes[name] = stack.enter_context(process)
            progress(f"{name}: first token {process.first_token_s:.0f} s after its start")
            report.settings["vllm"] = process.description["version"]
        order = list(processes)
        for number in range(rounds + 1):  # the first warms up: vLLM compiles at the first use of some of it
            for batch, sampling in cases:
                case = Case(batch, PROMPT_TOKENS, output_tokens if number else 4)
                told = []
                for name in order:
                    seconds = processes[name].generate(
                        case.prompts(f"round {number}"), case.output_tokens, SAMPLING[sampling]
                    )
                    speed = round(case.tokens_per_s(seconds), 1)
                    told.append(f"{name} {speed}")
                    if number:
                        speeds.setdefault((batch, sampling, name), []).append(speed)
                progress(f"round {number}, batch {batch}, {sampling}: {', '.join(told)} tokens/s")
            order.append(order.pop(0))
    for (batch, sampling, name), measured in speeds.items():
        row = {"batch": batch, "sampling": sampling, "impl": name}
        report.rows.append(row | {"tokens_per_s": round(statistics.median(measured), 1), "all": measured})
    return report
