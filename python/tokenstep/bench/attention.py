"""``tokenstep bench attention``: decode over a paged cache, against one read of K and V and torch's SDPA.

The floor reads as many bytes as the cache holds for the batch. torch gets what it is best at: K and V
contiguous per sequence, every sequence equally long, no pages to follow, and in the dtype of the queries.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from itertools import cycle
from typing import Any

import tokenstep as ts
from tokenstep._native import cpu
from tokenstep.bench.attention_inputs import COLD_BYTES, HEADS, Inputs, lengths_of, make_inputs
from tokenstep.bench.report import Report
from tokenstep.bench.timer import interleave

DEFAULT_MODELS = ["SmolLM2-135M", "Llama-3.1-8B", "Llama-2-7B"]


def run(
    *,
    models: list[str] | None,
    batches: list[int],
    contexts: list[int],
    lengths: list[str],
    block_sizes: list[int],
    dtypes: list[str],
    cache_dtypes: list[str],
    threads: list[int],
    peers: list[str],
    budget_s: float,
    progress: Callable[[str], None],
) -> Report:
    """Measure one decode step of one layer for every combination. Times are microseconds per call.

    Models are those of ``attention_inputs.HEADS``, lengths "equal" or "skewed", cache dtypes "same" (as the
    queries), "float8_e4m3" or "int8".
    """
    import torch

    report = Report("attention", {"cold_bytes": COLD_BYTES})
    for case, inputs in cases(
        "cpu", models or DEFAULT_MODELS, batches, contexts, lengths, block_sizes, dtypes, cache_dtypes
    ):
        for count in threads:
            case["threads"] = count
            progress(f"attention: {', '.join(f'{name} {value}' for name, value in case.items())}")
            cpu.set_num_threads(count)
            torch.set_num_threads(count)
            for impl, timing in interleave(_functions(inputs, peers), budget_s=budget_s).items():
                report.add(case | {"impl": impl}, timing)
    return report


def cases(
    device: str,
    models: list[str],
    batches: list[int],
    contexts: list[int],
    lengths: list[str],
    block_sizes: list[int],
    dtypes: list[str],
    cache_dtypes: list[str],
) -> Iterator[tuple[dict[str, Any], Inputs]]:
    """``(key fields, inputs)`` of every combination; the inputs are made when their turn comes."""
    for dtype, cache_dtype, model, batch, context, kind, block_size in itertools.product(
        dtypes, cache_dtypes, models, batches, contexts, lengths, block_sizes
    ):
        case = {
            "model": model,
            "dtype": dtype,
            "cache": dtype if cache_dtype == "same" else cache_dtype,
            "batch": batch,
            "context": context,
            "lengths": kind,
            "block_size": block_size,
        }
        if kind == "skewed" and batch == 1:
            continue
        of_batch = lengths_of(kind, batch, context)
        yield case, make_inputs(HEADS[model], of_batch, block_size, dtype, cache_dtype, device)


def _functions(inputs: Inputs, peers: list[str]) -> dict[str, Callable[[], object]]:
    import torch

    out = torch.empty_like(inputs.q)
    words = inputs.cache_bytes // 4
    copies = len(inputs.caches)
    flat = cycle([torch.randint(-(1 << 31), 1 << 31, (words,), dtype=torch.int32) for _ in range(copies)])
    caches = cycle(inputs.caches)

    def ours() -> object:
        return ts.paged_attention(
            inputs.q, *next(caches), inputs.block_table, inputs.seq_lens, out=out, **inputs.scales
        )

    functions: dict[str, Callable[[], object]] = {
        "floor": lambda: cpu.testing.read_max(next(flat)),
        "tokenstep": ours,
    }
    if "torch" in peers and (sdpa := dense_attention(inputs)) is not None:
        functions["torch"] = sdpa
    return functions


def dense_attention(inputs: Inputs) -> Callable[[], object] | None:
    """SDPA of torch over as many contiguous keys and values; None for sequences of several lengths."""
    import torch

    if len(set(inputs.lengths)) > 1:
        return None
    heads, batch = inputs.heads, len(inputs.lengths)
    shape = (batch, heads.num_kv_heads, inputs.lengths[0], heads.head_dim)
    query = inputs.q.view(batch, heads.num_heads, 1, heads.head_dim)
    dense = cycle(
        [(query.new_empty(shape).normal_(), query.new_empty(shape).normal_()) for _ in inputs.caches]
    )
    grouped = heads.num_heads != heads.num_kv_heads

    def sdpa() -> object:
        return torch.nn.functional.scaled_dot_product_attention(query, *next(dense), enable_gqa=grouped)

    return sdpa
