"""``tokenstep bench sample --device cuda``: the sampler on a GPU, against its floor and the peers there.

The rows and modes are those of the CPU's benchmark. The floor is what no implementation can beat: an empty
launch, and the bytes of the logits at the bandwidth of a large copy; both are measured in the same run.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle
from typing import Any

from tokenstep.bench.gpu_report import GpuBench
from tokenstep.bench.report import Report
from tokenstep.bench.sample import COLD_BYTES, HISTORY, MODES, Mode, cold_batches, prepared_sampler


def run(
    *,
    batches: list[int],
    vocab_size: int,
    dtypes: list[str],
    peers: list[str],
    budget_s: float,
    progress: Callable[[str], None],
) -> Report:
    """Measure every mode at each batch size and dtype. Times are microseconds of GPU time per call.

    Raises:
        RuntimeError: there is no GPU, or no CUDA module.
    """
    bench = GpuBench(
        "sample", {"vocab_size": vocab_size, "cold_bytes": COLD_BYTES, "history": HISTORY}, budget_s
    )
    import torch

    for dtype in dtypes:
        for batch in batches:
            progress(f"sample on {bench.report.settings['device']}: {dtype}, batch {batch}")
            logits = cold_batches(batch, vocab_size, getattr(torch, dtype), "cuda")
            size = logits[0].numel() * logits[0].element_size()
            for mode in MODES:
                case = {"mode": mode.name, "dtype": dtype, "batch": batch}
                bench.measure(case, size, _functions(mode, logits, peers))
    return bench.report


def _functions(mode: Mode, logits: list[Any], peers: list[str]) -> dict[str, Callable[[], object]]:
    # Every call takes the next of batches that together exceed the L2 cache.
    makers: dict[str, Callable[[Mode], Callable[[Any], object] | None]] = {
        "torch": _torch,
        "flashinfer": _flashinfer,
        "fusedtok": _fusedtok,
    }
    sampler = prepared_sampler(mode, logits[0].shape, "cuda")
    out = sampler.step(logits[0])
    steps: dict[str, Callable[[Any], object]] = {"tokenstep": lambda rows: sampler.step(rows, out=out)}
    for name in peers:
        if (step := makers[name](mode)) is not None:
            steps[name] = step
    functions: dict[str, Callable[[], object]] = {}
    for i, (name, step) in enumerate(steps.items()):
        shift = i * len(logits) // len(steps)
        rows = cycle(logits[shift:] + logits[:shift])
        functions[name] = lambda step=step, rows=rows: step(next(rows))  # type: ignore[misc]
    return functions


def _torch(mode: Mode) -> Callable[[Any], object] | None:
    import torch

    p = mode.params
    match mode.name:
        case "greedy":
            return lambda rows: rows.argmax(-1)
        case "temperature":
            return lambda rows: torch.multinomial(torch.softmax(rows.float() / p["temperature"], -1), 1)
        case "top_k 50":

            def top_k(rows: Any) -> object:
                values, ids = torch.topk(rows.float() / p["temperature"], p["top_k"], -1)
                return ids.gather(-1, torch.multinomial(torch.softmax(values, -1), 1))

            return top_k
        case "top_p 0.95":

            def top_p(rows: Any) -> object:
                probs, ids = torch.softmax(rows.float() / p["temperature"], -1).sort(-1, descending=True)
                kept = torch.where(probs.cumsum(-1) - probs < p["top_p"], probs, 0.0)
                return ids.gather(-1, torch.multinomial(kept, 1))

            return top_p
    return None


def _flashinfer(mode: Mode) -> Callable[[Any], object] | None:
    """FlashInfer's softmax with temperature, then its sampling from probabilities."""
    try:
        from flashinfer import cake_sampling, sampling
    except ImportError:
        return None
    p = mode.params

    def probs(rows: Any) -> Any:
        return sampling.softmax(rows.float(), p["temperature"])

    match mode.name:
        case "temperature":
            return lambda rows: sampling.sampling_from_probs(probs(rows))
        case "top_k 50":
            return lambda rows: cake_sampling.top_k_top_p_sampling_from_probs(probs(rows), p["top_k"], 1.0)
        case "min_p 0.05":
            return lambda rows: sampling.min_p_sampling_from_probs(probs(rows), p["min_p"])
        case "top_p 0.95":
            return lambda rows: sampling.top_p_sampling_from_probs(probs(rows), p["top_p"])
    return None


def _fusedtok(mode: Mode) -> Callable[[Any], object] | None:
    """Takes float32 logits, and returns the tokens on the host."""
    try:
        import fusedtok
    except ImportError:
        return None
    p = mode.params
    match mode.name:
        case "top_k 50":
            return lambda rows: fusedtok.sample_topk_batched(
                rows.float(), p["top_k"], temperature=p["temperature"]
            )
        case "min_p 0.05":
            return lambda rows: fusedtok.sample_minp_batched(
                rows.float(), p["min_p"], temperature=p["temperature"]
            )
    return None
