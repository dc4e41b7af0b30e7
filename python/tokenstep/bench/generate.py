"""``tokenstep bench generate``: from prompt ids to text, beside other engines on the same weights.

Each implementation runs in a process of its own and sleeps (SIGSTOP) while others are measured. All get the
same random prompts, new ones each time so that no prefix cache helps, and generate exactly as many tokens as
they are told. Rounds are outermost: in each, every case is run by every implementation in turn.
"""

from __future__ import annotations

import contextlib
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from tokenstep.bench.peer_process import PeerProcess, first_output, interpreter_has
from tokenstep.bench.report import FLOOR, OURS, Report
from tokenstep.bench.weights_floor import decode_speed, measure_copy, read_seconds, weight_bytes

PARAMETERS = {
    "temperature": 0.8,
    "top_k": 50,
    "top_p": 0.95,
    "min_p": 0.05,
    "presence_penalty": 0.1,
    "frequency_penalty": 0.1,
    "repetition_penalty": 1.1,
}
"""All sampling parameters that the peers have too."""

TOKEN_IDS = range(1000, 20000)  # ordinary words in any vocabulary of this field
PROMPT_TOKENS = 8
FIRST_PROMPT = "The capital of Germany is"
QUICK_START_S = 15.0  # what starts within it is started STARTS times
STARTS = 3


@dataclass(frozen=True)
class Kind:
    """A peer: the file that drives it, the package that it needs, whether it reads the GGUF file.

    `devices` are those it runs on, `options` its own for `worker`; with `needs_name` it takes part only where
    it is named.
    """

    module: str
    package: str
    reads_gguf: bool
    devices: tuple[str, ...] = ("cpu",)
    options: Mapping[str, Any] = field(default_factory=dict)
    needs_name: bool = False


ANY_DEVICE = ("cpu", "cuda")
KINDS = {
    "tokenstep": Kind("tokenstep_llm", "tokenstep", True, ANY_DEVICE),
    "tokenstep-bf16": Kind("tokenstep_llm", "tokenstep", False, ANY_DEVICE),
    "llama.cpp": Kind("llama_cpp_python", "llama_cpp", True),
    "vllm-cpu": Kind("vllm_cpu", "vllm", False),
    "transformers": Kind("transformers_lm", "transformers", False, ANY_DEVICE),
    "transformers-compiled": Kind(
        "transformers_lm", "transformers", False, ANY_DEVICE, {"compiled": True}, needs_name=True
    ),
}
"""By name; a name may go on after another "-": llama.cpp-avx512 is a second build of llama.cpp."""


@dataclass(frozen=True)
class Case:
    """What is measured: `output_tokens` of each of `batch` prompts."""

    batch: int
    prompt_tokens: int
    output_tokens: int
    sampled: bool = False

    @property
    def is_prefill(self) -> bool:
        """Whether it is the prompt that takes the time."""
        return self.output_tokens == 1

    def tokens_per_s(self, seconds: float) -> float:
        """Tokens of the prompts where it is them that take the time, else generated tokens."""
        return self.batch * (self.prompt_tokens if self.is_prefill else self.output_tokens) / seconds

    def fields(self) -> dict[str, Any]:
        """As a report has it."""
        return {
            "measures": "prefill" if self.is_prefill else "decode",
            "batch": self.batch,
            "prompt_tokens": self.prompt_tokens,
            "output_tokens": self.output_tokens,
            "sampling": "all parameters" if self.sampled else "greedy",
        }

    def prompts(self, seed: str) -> list[list[int]]:
        """Random ids."""
        rng = random.Random(f"{seed} {self}")
        return [[rng.choice(TOKEN_IDS) for _ in range(self.prompt_tokens)] for _ in range(self.batch)]

    def warm_up(self) -> Case:
        """The same with few tokens."""
        return replace(self, output_tokens=min(4, self.output_tokens))

    def run(self, process: PeerProcess, seed: str) -> float:
        """Seconds that the process takes for it."""
        return process.generate(self.prompts(seed), self.output_tokens, PARAMETERS if self.sampled else None)


C = TypeVar("C", bound=Case)


class GenerateReport(Report):
    """Rows of three sorts, by `measures`: start, decode and prefill."""

    def of(self, measures: str) -> list[dict[str, Any]]:
        """The rows of one sort."""
        return [row for row in self.rows if row["measures"] == measures]

    def markdown(self) -> str:
        """Three tables; behind each speed how many times as fast as it tokenstep is on the same weights."""
        s, m = self.settings, self.machine
        lines = self._speeds("decode", f"tokens a second, {s['output_tokens']} of each text")
        lines += ["", *self._speeds("prefill", "tokens a second of the prompt"), "", *self._starts(), ""]
        lines += [f"- {name}: {peer['version']}, {peer['details']}" for name, peer in s["peers"].items()]
        lines.append(
            f"\nMedians of {s['rounds']} rounds on {s.get('gpu', m['cpu'])}, {m['cores']} cores ({m['isa']}),"
            f" {s['threads']} threads, torch {m['torch']}, commit {m['commit']}, {m['date']}."
        )
        if "copy_gb_per_s" in s:
            lines.append(
                f"The floor reads weights, keys and values once a step, at the {s['copy_gb_per_s']:,.0f} GB/s"
                " of a large copy; behind it the share that tokenstep reaches."
            )
        return "\n".join(lines)

    def _speeds(self, measures: str, title: str) -> list[str]:
        names = list(dict.fromkeys(row["impl"] for row in self.of(measures)))
        lines = [f"| {title} | " + " | ".join(names) + " |", "|---" * (1 + len(names)) + "|"]
        found: dict[str, dict[str, float]] = {}
        for row in self.of(measures):
            case = f"batch {row['batch']}, {row['sampling']}"
            case = f"{row['prompt_tokens']} tokens" if measures == "prefill" else case
            found.setdefault(case, {})[row["impl"]] = row["tokens_per_s"]
        for case, speeds in found.items():
            cells = [_speed(name, speeds) for name in names]
            lines.append(f"| {case} | " + " | ".join(cells) + " |")
        return lines

    def _starts(self) -> list[str]:
        lines = [
            "| | start to first token, s | peak memory at the first token, MiB | after all cases, MiB |",
            "|---|---|---|---|",
        ]
        for row in self.of("start"):
            after = "" if row["peak_mib"] is None else f"{row['peak_mib']:,.0f}"
            lines.append(
                f"| {row['impl']} | {row['first_token_s']:.1f} | {row['start_mib']:,.0f} | {after} |"
            )
        return lines


def same_weights_as(name: str) -> str:
    """Which of our runs has the weights of the peer `name`."""
    return OURS if kind_of(name).reads_gguf else f"{OURS}-bf16"


def kind_of(name: str) -> Kind:
    """The kind of peer that `name` means; raises ValueError for none."""
    for known in sorted(KINDS, key=len, reverse=True):
        if name == known or name.startswith(f"{known}-"):
            return KINDS[known]
    raise ValueError(f"{name!r}, expected of {', '.join(KINDS)}, or one of these with -SUFFIX")


def run(
    peers: Mapping[str, str],
    *,
    gguf: str | None,
    folder: str | None,
    device: str = "cpu",
    weights: str = "auto",
    batches: Sequence[int],
    prefills: Sequence[int],
    output_tokens: int,
    rounds: int,
    threads: int,
    budget_s: float,
    progress: Callable[[str], None],
) -> GenerateReport:
    """Measures tokenstep and `peers`, name to interpreter.

    Args:
        peers: as `kind_of` understands the names.
        gguf: the GGUF file, read by tokenstep and llama.cpp; None: without these.
        folder: the same weights in bfloat16 for the others, and for tokenstep once more; None: without these.
        device: "cpu" or "cuda". On a GPU the floor is measured too.
        weights: "auto", or "random": `folder` has a config and a tokenizer alone; the floor is measured too.
        batches: texts that are generated together.
        prefills: lengths of prompts whose first token is timed.
        output_tokens: tokens of each text.
        rounds: the most rounds.
        threads: of each implementation.
        budget_s: no round begins that would end later.
        progress: is told what happens.

    Raises:
        ValueError: a peer that can't take part here.
        PeerFailed: one that has ended.
    """
    deadline = time.monotonic() + budget_s
    ours = [name for name, source in ((OURS, gguf), (f"{OURS}-bf16", folder)) if source is not None]
    interpreters = dict.fromkeys(ours, sys.executable) | dict(peers)
    cases = [
        *(
            Case(batch, PROMPT_TOKENS, output_tokens, sampled)
            for batch in batches
            for sampled in (False, True)
        ),
        *(Case(1, length, 1) for length in prefills),
    ]
    options = worker_options(cases, threads, device, weights)
    check_peers(interpreters, gguf, folder, device)
    report = GenerateReport(
        "generate",
        {
            "output_tokens": output_tokens,
            "threads": threads,
            "parameters": PARAMETERS,
        },
    )
    if device == "cuda" or weights == "random":
        report.settings |= measure_copy(device)
    if gguf is not None:
        report.rows.append(_command_row(gguf, threads, device, progress))
    with contextlib.ExitStack() as stack:
        processes: dict[str, PeerProcess] = {}
        for name, python in interpreters.items():
            of_peer = {**options, **_weights(name, gguf, folder), **kind_of(name).options}
            starts = 1 if weights == "random" else STARTS  # there is no file whose reading takes time
            first, process = _started(name, python, of_peer, starts, progress)
            processes[name] = stack.enter_context(process)
            report.rows.append(_start_row(name, first, process.start_mib))
        if "copy_gb_per_s" not in report.settings:
            files = {name: _weights(name, gguf, folder)["model"] for name in processes}
            reads = {file: read_seconds(weight_bytes(Path(file)), threads) for file in set(files.values())}
            report.settings["weights_read_s"] = {name: round(reads[file], 6) for name, file in files.items()}
        seconds = measure(processes, cases, rounds, deadline, progress)
        own = processes[ours[-1]].description
        for case in cases:
            if "copy_gb_per_s" in report.settings and not case.is_prefill:
                context = case.prompt_tokens + case.output_tokens / 2  # of each text, on average
                speed = decode_speed(case.batch, context, own, report.settings["copy_gb_per_s"])
                report.rows.append(case.fields() | {"impl": FLOOR, "tokens_per_s": round(speed, 1)})
            for name in processes:
                speeds = [case.tokens_per_s(each) for each in seconds[case, name]]
                middle = round(statistics.median(speeds), 1)
                report.rows.append(case.fields() | {"impl": name, "tokens_per_s": middle, "all": speeds})
        report.settings["rounds"] = min(len(each) for each in seconds.values())
        report.settings["peers"] = {name: process.description for name, process in processes.items()}
        for row in report.of("start"):
            if row["impl"] in processes:
                row["peak_mib"] = round(processes[row["impl"]].peak_mib(), 1)
    return report


def worker_options(
    cases: Sequence[Case], threads: int, device: str = "cpu", weights: str = "auto"
) -> dict[str, Any]:
    """What `peers.worker` is told that is the same for every implementation."""
    first = Case(1, PROMPT_TOKENS, 1)
    return {
        "threads": threads,
        "max_batch": max(case.batch for case in cases),
        "max_length": max(case.prompt_tokens + case.output_tokens for case in cases),
        "first_prompt": first.prompts("first")[0],
        "lengths": _longest_by_prompt([first, *cases]),
        "device": device,
        "weights": weights,
    }


def _longest_by_prompt(cases: Sequence[Case]) -> dict[int, int]:
    """The most tokens of prompt and output for each length of prompt."""
    found: dict[int, int] = {}
    for case in cases:
        total = case.prompt_tokens + case.output_tokens
        found[case.prompt_tokens] = max(total, found.get(case.prompt_tokens, 0))
    return found


def check_peers(
    interpreters: Mapping[str, str], gguf: str | None, folder: str | None, device: str = "cpu"
) -> None:
    """Raises ValueError for a peer that can't take part."""
    if gguf is None and folder is None:
        raise ValueError("there is neither a GGUF file nor a folder")
    for name, python in interpreters.items():
        kind = kind_of(name)
        if device not in kind.devices:
            raise ValueError(f"{name} isn't measured on {device}, only on {', '.join(kind.devices)}")
        if kind.reads_gguf and gguf is None:
            raise ValueError(f"{name} reads a GGUF file: without --shape, --model names one")
        if not kind.reads_gguf and folder is None:
            raise ValueError(
                f"{name} reads no GGUF: --folder must name the model in bfloat16 (bench/dequantise.py)"
            )
        if not interpreter_has(python, kind.package):
            raise ValueError(f"{name}: {python} has no package {kind.package}")


def installed_peers(gguf: str | None, folder: str | None, device: str = "cpu") -> list[str]:
    """The peers that this interpreter has, and that can take part without being named."""
    return [
        name
        for name, kind in KINDS.items()
        if not name.startswith(OURS)
        and not kind.needs_name
        and device in kind.devices
        and (gguf if kind.reads_gguf else folder) is not None
        and interpreter_has(sys.executable, kind.package)
    ]


def _weights(name: str, gguf: str | None, folder: str | None) -> dict[str, str]:
    reads_gguf = kind_of(name).reads_gguf
    source = gguf if reads_gguf else folder
    assert source is not None  # check_peers has seen to it
    return {"model": source, "dtype": "auto" if reads_gguf else "bfloat16"}


def _started(
    name: str, python: str, options: Mapping[str, Any], starts: int, progress: Callable[[str], None]
) -> tuple[list[float], PeerProcess]:
    """Starts a peer, `starts` times if that is quick; how long each took, and the last process."""
    module = kind_of(name).module
    first: list[float] = []
    while True:
        process = PeerProcess(name, module, python, options)
        first.append(process.first_token_s)
        progress(f"{name}: first token {first[-1]:.1f} s after its start")
        if len(first) == starts or first[-1] > QUICK_START_S:
            return first, process
        process.close()


def _command_row(gguf: str, threads: int, device: str, progress: Callable[[str], None]) -> dict[str, Any]:
    """From `tokenstep complete` typed to the first token printed."""
    code = (
        f"import os; os.environ['OMP_NUM_THREADS'] = '{threads}'; from tokenstep.cli.main import main; main()"
    )
    arguments = [
        "complete",
        FIRST_PROMPT,
        "--model",
        gguf,
        "--device",
        device,
        "--max-tokens",
        "1",
        "--temperature",
        "0",
    ]
    taken = [first_output([sys.executable, "-c", code, *arguments]) for _ in range(STARTS)]
    first, memory = zip(*taken, strict=True)
    progress(f"tokenstep complete: first token {statistics.median(first):.1f} s after its start")
    return _start_row("tokenstep complete", first, max(memory))


def _start_row(name: str, first: Sequence[float], start_mib: float) -> dict[str, Any]:
    return {
        "measures": "start",
        "impl": name,
        "first_token_s": round(statistics.median(first), 2),
        "starts": len(first),
        "start_mib": round(start_mib, 1),
        "peak_mib": None,
    }


def measure(
    processes: Mapping[str, PeerProcess],
    cases: Sequence[C],
    rounds: int,
    deadline: float,
    progress: Callable[[str], None],
) -> dict[tuple[C, str], list[float]]:
    """Seconds of each case and peer, one a round; the first round warms up what it then measures."""
    seconds: dict[tuple[C, str], list[float]] = {(case, name): [] for case in cases for name in processes}
    for number in range(rounds):
        begin = time.monotonic()
        for case in cases:
            for name in _rotated(list(processes), number):
                if number == 0:
                    case.warm_up().run(processes[name], "warm-up")
                seconds[case, name].append(case.run(processes[name], f"round {number}"))
        took = time.monotonic() - begin
        progress(f"round {number + 1} took {took:.0f} s")
        if time.monotonic() + took > deadline:
            break
    return seconds


def _rotated(names: list[str], by: int) -> Iterator[str]:
    shift = by % len(names)
    yield from names[shift:] + names[:shift]


def _speed(name: str, speeds: Mapping[str, float]) -> str:
    if name not in speeds:
        return ""
    if name == FLOOR:
        best = max(speed for impl, speed in speeds.items() if impl.startswith(OURS))
        return f"{speeds[name]:,.0f} ({100 * best / speeds[name]:.0f} %)"
    ours = same_weights_as(name)
    if name.startswith(OURS) or ours not in speeds:
        return f"{speeds[name]:,.0f}"
    return f"{speeds[name]:,.0f} ({speeds[ours] / speeds[name]:.2f}×)"
