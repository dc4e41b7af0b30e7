"""``tokenstep bench attention``: decode over a paged cache, against one read of K and V and torch's SDPA.

The floor reads as many bytes as the cache holds for the batch. torch gets what it is best at: K and V
contiguous per sequence, every sequence equally long, no pages to follow, and in the dtype of the queries.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tokenstep as ts
from tokenstep._native import cpu
from tokenstep.bench.report import Report
from tokenstep.bench.timer import interleave

COLD_BYTES = 128 << 20


@dataclass(frozen=True)
class Heads:
    """The shape of a model's attention."""

    model: str
    num_heads: int
    num_kv_heads: int
    head_dim: int


CACHE_DTYPES = {"same": None, "float8_e4m3": "float8_e4m3fn", "int8": "int8"}  # their names in torch

HEADS = (
    Heads("SmolLM2-135M", 9, 3, 64),
    Heads("Llama-3.1-8B", 32, 8, 128),
    Heads("Llama-2-7B", 32, 32, 128),
)


def run(
    *,
    batches: list[int],
    contexts: list[int],
    block_sizes: list[int],
    dtypes: list[str],
    cache_dtypes: list[str],
    threads: list[int],
    peers: list[str],
    budget_s: float,
    progress: Callable[[str], None],
) -> Report:
    """Measure one decode step of one layer for every combination. Times are microseconds per call.

    A cache dtype is "float8_e4m3", "int8" or "same", that of the queries.
    """
    import torch

    report = Report("attention", {"cold_bytes": COLD_BYTES})
    cases = itertools.product(dtypes, cache_dtypes, HEADS, batches, contexts, block_sizes, threads)
    for dtype, cache_dtype, heads, batch, context, block_size, count in cases:
        case = {
            "model": heads.model,
            "dtype": dtype,
            "cache": dtype if cache_dtype == "same" else cache_dtype,
            "batch": batch,
            "context": context,
            "block_size": block_size,
            "threads": count,
        }
        progress(f"attention: {', '.join(f'{name} {value}' for name, value in case.items())}")
        cpu.set_num_threads(count)
        torch.set_num_threads(count)
        functions = _functions(
            heads, batch, context, block_size, getattr(torch, dtype), CACHE_DTYPES[cache_dtype], peers
        )
        for impl, timing in interleave(functions, budget_s=budget_s).items():
            report.add(case | {"impl": impl}, timing)
    return report


def _functions(
    heads: Heads,
    batch: int,
    context: int,
    block_size: int,
    dtype: Any,
    cache_dtype: str | None,
    peers: list[str],
) -> dict[str, Callable[[], object]]:
    import torch

    generator = torch.Generator().manual_seed(1)
    blocks_each = -(-context // block_size)
    kv_shape = (batch * blocks_each, block_size, heads.num_kv_heads, heads.head_dim)
    held = dtype if cache_dtype is None else getattr(torch, cache_dtype)
    read_bytes = 2 * batch * context * heads.num_kv_heads * heads.head_dim * held.itemsize
    copies = max(2, COLD_BYTES // read_bytes)
    unit = {None: 1.0, "int8": 4 / 127, "float8_e4m3fn": 4 / 448}[cache_dtype]

    def cache() -> Any:
        values = torch.randn(kv_shape, generator=generator) / unit
        return values.clamp(-4 / unit, 4 / unit).to(held)

    k_caches, v_caches = [cache() for _ in range(copies)], [cache() for _ in range(copies)]
    scales: dict[str, Any] = {}
    if cache_dtype is not None:
        scales = {name: torch.full((heads.num_kv_heads,), unit) for name in ("k_scale", "v_scale")}
    order = torch.randperm(batch * blocks_each, generator=generator).to(torch.int32)
    block_table = order.view(batch, blocks_each)
    seq_lens = torch.full((batch,), context, dtype=torch.int32)
    q = torch.randn(batch, heads.num_heads, heads.head_dim, generator=generator).to(dtype)
    out = torch.empty_like(q)
    calls = {name: _counter(copies) for name in ("floor", "tokenstep", "torch")}
    flat = [
        torch.empty(read_bytes // 4, dtype=torch.int32).random_(generator=generator) for _ in range(copies)
    ]

    def ours() -> object:
        i = calls["tokenstep"]()
        return ts.paged_attention(q, k_caches[i], v_caches[i], block_table, seq_lens, out=out, **scales)

    functions: dict[str, Callable[[], object]] = {
        "floor": lambda: cpu.testing.read_max(flat[calls["floor"]()]),
        "tokenstep": ours,
    }
    if "torch" in peers:
        dense = (batch, heads.num_kv_heads, context, heads.head_dim)
        keys = [torch.randn(dense, generator=generator).to(dtype) for _ in range(copies)]
        values = [torch.randn(dense, generator=generator).to(dtype) for _ in range(copies)]
        query = q.view(batch, heads.num_heads, 1, heads.head_dim)
        grouped = heads.num_heads != heads.num_kv_heads

        def sdpa() -> object:
            i = calls["torch"]()
            return torch.nn.functional.scaled_dot_product_attention(
                query, keys[i], values[i], enable_gqa=grouped
            )

        functions["torch"] = sdpa
    return functions


def _counter(n: int) -> Callable[[], int]:
    state = [0]

    def advance() -> int:
        state[0] = (state[0] + 1) % n
        return state[0]

    return advance
