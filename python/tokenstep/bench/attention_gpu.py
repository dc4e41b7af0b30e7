"""``tokenstep bench attention --device cuda``: decode over a paged cache on a GPU, with its floor and peers.

The cases are those of the CPU's benchmark. The floor is what no implementation can beat: an empty launch, and
the bytes of keys, values, queries and results at the bandwidth of a large copy; both are measured in the same
run. Peers get their own layout, and FlashInfer's plan is made before the clock starts.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle
from typing import Any

import tokenstep as ts
from tokenstep.bench.attention import cases, dense_attention
from tokenstep.bench.attention_inputs import COLD_BYTES, HEADS, Inputs
from tokenstep.bench.gpu_report import GpuBench
from tokenstep.bench.report import OURS, Report

FLASHINFER_WORKSPACE_BYTES = 128 << 20


def run(
    *,
    models: list[str] | None,
    batches: list[int],
    contexts: list[int],
    lengths: list[str],
    block_sizes: list[int],
    dtypes: list[str],
    cache_dtypes: list[str],
    peers: list[str],
    budget_s: float,
    progress: Callable[[str], None],
) -> Report:
    """Measure one decode step of one layer for every combination. Times are microseconds of GPU time.

    Raises:
        RuntimeError: there is no GPU, or no CUDA module.
    """
    bench = GpuBench("attention", {"cold_bytes": COLD_BYTES, "refused": {}}, budget_s)
    for case, inputs in cases(
        "cuda", models or list(HEADS), batches, contexts, lengths, block_sizes, dtypes, cache_dtypes
    ):
        progress(f"attention on the GPU: {', '.join(f'{name} {value}' for name, value in case.items())}")
        functions, refused = usable(implementations(inputs, peers))
        bench.report.settings["refused"] |= {f"{name}: {case['model']}": why for name, why in refused.items()}
        if OURS in functions:
            bench.measure(case, inputs.moved_bytes, functions)
    return bench.report


def usable(
    functions: dict[str, Callable[[], object]],
) -> tuple[dict[str, Callable[[], object]], dict[str, str]]:
    """The functions that run on these inputs, and what the others say when they are called."""
    kept, refused = {}, {}
    for name, function in functions.items():
        try:
            function()
        except Exception as error:  # of another package: whatever it raises, the others are still measured
            refused[name] = f"{type(error).__name__}: {error}".splitlines()[0]
        else:
            kept[name] = function
    return kept, refused


def implementations(inputs: Inputs, peers: list[str]) -> dict[str, Callable[[], object]]:
    """Of tokenstep, and of the peers that are asked for, are installed and have such inputs."""
    import torch

    out = torch.empty_like(inputs.q)
    workspace = torch.zeros(workspace_bytes(inputs.q), dtype=torch.uint8, device=inputs.q.device)
    caches = cycle(inputs.caches)

    def ours() -> object:
        return ts.paged_attention(
            inputs.q, *next(caches), inputs.block_table, inputs.seq_lens,
            out=out, workspace=workspace, **inputs.scales,
        )  # fmt: skip

    makers = {"torch": dense_attention, "flashinfer": flashinfer_decode, "fusedtok": fusedtok_decode}
    functions: dict[str, Callable[[], object]] = {OURS: ours}
    for name in peers:
        if (function := makers[name](inputs)) is not None:
            functions[name] = function
    return functions


def workspace_bytes(q: Any) -> int:
    """Of a workspace for calls with these queries; none on the CPU."""
    return ts.attention_workspace_bytes(q.device.index) if q.is_cuda else 0


def flashinfer_decode(inputs: Inputs) -> Callable[[], object] | None:
    """FlashInfer's batch decode over the same pages, planned; None where it is absent."""
    try:
        import flashinfer
    except ImportError:
        return None
    import torch

    heads, block_size = inputs.heads, inputs.block_size
    blocks = [-(-length // block_size) for length in inputs.lengths]
    starts = torch.tensor([0, *blocks], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    last = [(length - 1) % block_size + 1 for length in inputs.lengths]
    ids = torch.cat([row[:n] for row, n in zip(inputs.block_table, blocks, strict=True)])
    memory = torch.zeros(FLASHINFER_WORKSPACE_BYTES, dtype=torch.uint8, device=inputs.q.device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        memory, "NHD", use_tensor_cores=heads.num_heads > heads.num_kv_heads
    )
    wrapper.plan(
        starts.to(inputs.q.device),
        ids,
        torch.tensor(last, dtype=torch.int32, device=inputs.q.device),
        heads.num_heads,
        heads.num_kv_heads,
        heads.head_dim,
        block_size,
        q_data_type=inputs.q.dtype,
        kv_data_type=inputs.caches[0][0].dtype,
    )
    caches = cycle(inputs.caches)
    return lambda: wrapper.run(inputs.q, next(caches))


def fusedtok_decode(inputs: Inputs) -> Callable[[], object] | None:
    """Paged decode of fusedtok, on pages [num_blocks, heads, block_size, D]; None where it is absent."""
    try:
        import fusedtok
    except ImportError:
        return None
    pools = cycle([tuple(c.transpose(1, 2).contiguous() for c in pair) for pair in inputs.caches])
    table = inputs.block_table.clamp(min=0)
    return lambda: fusedtok.attention_decode_paged(inputs.q, *next(pools), table, inputs.seq_lens)
