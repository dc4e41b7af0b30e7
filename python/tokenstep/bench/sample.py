"""``tokenstep bench sample``: raw logits to token, against one read of the logits, torch and transformers.

The rows look like a language model's: a normal body, and a head of 200 tokens that falls off as a power law.
They are cold: each call takes the next of several batches that together exceed the last-level cache. The
engine's form of the op is timed (``Sampler.step``, state prepared once), as a peer's processors are prepared
once as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

import tokenstep as ts
from tokenstep._native import cpu
from tokenstep.bench.report import Report
from tokenstep.bench.timer import interleave

COLD_BYTES = 256 << 20
HISTORY = 512


@dataclass(frozen=True)
class Mode:
    """A set of sampling parameters, and how the peers state it."""

    name: str
    params: dict[str, Any]
    processors: tuple[str, ...] = ()  # transformers' classes; () and sampled: softmax + multinomial alone
    history: bool = False
    logit_bias: dict[int, float] = field(default_factory=dict)


MODES = (
    Mode("greedy", {"temperature": 0.0}),
    Mode("temperature", {"temperature": 0.8}, ("temperature",)),
    Mode("top_k 50", {"temperature": 0.8, "top_k": 50}, ("temperature", "top_k")),
    Mode("min_p 0.05", {"temperature": 0.8, "min_p": 0.05}, ("temperature", "min_p")),
    Mode("top_p 0.95", {"temperature": 0.8, "top_p": 0.95}, ("temperature", "top_p")),
    Mode("temperature, logprobs", {"temperature": 0.8, "logprobs": 0}),
    Mode(
        "everything",
        {
            "temperature": 0.8,
            "top_k": 50,
            "top_p": 0.95,
            "min_p": 0.05,
            "repetition_penalty": 1.1,
            "frequency_penalty": 0.1,
            "presence_penalty": 0.1,
            "logprobs": 5,
        },
        ("repetition", "temperature", "top_k", "top_p", "min_p"),
        history=True,
        logit_bias={i * 97: 0.5 for i in range(300)},
    ),
)


def run(
    *,
    batches: list[int],
    vocab_size: int,
    dtypes: list[str],
    threads: list[int],
    peers: list[str],
    budget_s: float,
    progress: Callable[[str], None],
) -> Report:
    """Measure every mode at each batch size, dtype and thread count. Times are microseconds per call."""
    import torch

    report = Report("sample", {"vocab_size": vocab_size, "cold_bytes": COLD_BYTES, "history": HISTORY})
    for dtype in dtypes:
        for batch in batches:
            logits = cold_batches(batch, vocab_size, getattr(torch, dtype), "cpu")
            for count in threads:
                progress(f"sample: {dtype}, batch {batch}, {count} thread(s)")
                cpu.set_num_threads(count)
                torch.set_num_threads(count)
                for mode in MODES:
                    functions = _functions(mode, logits, peers)
                    for impl, timing in interleave(functions, budget_s=budget_s).items():
                        report.add(
                            {
                                "mode": mode.name,
                                "dtype": dtype,
                                "batch": batch,
                                "threads": count,
                                "impl": impl,
                            },
                            timing,
                        )
    return report


def cold_batches(batch: int, vocab_size: int, dtype: Any, device: str) -> list[Any]:
    """Copies of one batch of rows like a language model's, together larger than any cache."""
    import torch

    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(batch, vocab_size, generator=generator) * 2
    head = 17 - 1.5 * torch.log(1 + torch.arange(200.0)) + torch.randn(batch, 200, generator=generator) * 0.3
    rows.scatter_(1, torch.randint(0, vocab_size, (batch, 200), generator=generator), head)
    rows = rows.to(device, dtype)
    copies = max(2, COLD_BYTES // (rows.numel() * rows.element_size()))
    return [rows.clone() for _ in range(copies)]


def _functions(mode: Mode, logits: list[Any], peers: list[str]) -> dict[str, Callable[[], object]]:
    # Every implementation walks the same batches, each a step apart: no one finds a batch warm from another.
    def cursor(offset: int) -> Iterator[Any]:
        shift = offset * len(logits) // 4
        return cycle(logits[shift:] + logits[:shift])

    floor, ours, torch_rows, hf_rows = (cursor(i) for i in range(4))
    functions: dict[str, Callable[[], object]] = {"floor": lambda: cpu.testing.read_max(next(floor))}
    step = prepared_sampler(mode, logits[0].shape, "cpu").step
    functions["tokenstep"] = lambda: step(next(ours))
    if "torch" in peers and (torch_step := _torch(mode)) is not None:
        functions["torch"] = lambda: torch_step(next(torch_rows))
    if "transformers" in peers and (hf_step := _transformers(mode, logits[0].shape)) is not None:
        functions["transformers"] = lambda: hf_step(next(hf_rows))
    return functions


def _history(batch: int, vocab_size: int) -> Any:
    import torch

    return torch.randint(0, vocab_size, (batch, HISTORY), generator=torch.Generator().manual_seed(2))


def prepared_sampler(mode: Mode, shape: tuple[int, int], device: str) -> ts.Sampler:
    """A sampler with all rows admitted, as an engine has it before a step."""
    batch, vocab_size = shape
    sampler = ts.Sampler(batch, vocab_size, device)
    history = _history(batch, vocab_size).tolist() if mode.history else [[]] * batch
    bias = {i: v for i, v in mode.logit_bias.items() if i < vocab_size}
    for row in range(batch):
        params = ts.SamplingParams(**mode.params, logit_bias=bias or None, seed=row)
        sampler.admit(row, params, history[row], history[row][: HISTORY // 4])
    return sampler


def _torch(mode: Mode) -> Callable[[Any], object] | None:
    import torch

    if mode.name == "greedy":
        return lambda rows: rows.argmax(-1)
    if mode.name == "temperature":
        return lambda rows: torch.multinomial(torch.softmax(rows.float() / 0.8, -1), 1)
    return None


def _transformers(mode: Mode, shape: tuple[int, int]) -> Callable[[Any], object] | None:
    import torch

    if not mode.processors:
        return None
    try:
        import transformers as hf
    except ImportError:
        return None
    p = mode.params
    make: dict[str, Callable[[], Any]] = {
        "repetition": lambda: hf.RepetitionPenaltyLogitsProcessor(p["repetition_penalty"]),
        "temperature": lambda: hf.TemperatureLogitsWarper(p["temperature"]),
        "top_k": lambda: hf.TopKLogitsWarper(p["top_k"]),
        "top_p": lambda: hf.TopPLogitsWarper(p["top_p"]),
        "min_p": lambda: hf.MinPLogitsWarper(p["min_p"]),
    }
    processors = hf.LogitsProcessorList([make[name]() for name in mode.processors])
    history = _history(*shape)

    def step(rows: Any) -> object:
        scores = processors(history, rows.float())
        return torch.multinomial(torch.softmax(scores, -1), 1)

    return step
