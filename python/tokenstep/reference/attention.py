"""Paged attention, the append and the merge, in NumPy float64, token by token as the contract says."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["append_kv", "merge_attention", "paged_attention", "rotate"]

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.integer[Any]]


def rotate(x: Floats, positions: Ints, cos: Floats, sin: Floats, interleaved: bool = False) -> Floats:
    """RoPE of heads ``x [T, H, D]`` at ``positions [T]``, in the type of x; the rest of a head stays."""
    half = cos.shape[1]
    c, s = cos[positions][:, None, :].astype(x.dtype), sin[positions][:, None, :].astype(x.dtype)
    out = x.copy()
    first, second = (
        (slice(0, 2 * half, 2), slice(1, 2 * half, 2))
        if interleaved
        else (slice(0, half), slice(half, 2 * half))
    )
    a, b = x[..., first], x[..., second]
    out[..., first] = a * c - b * s
    out[..., second] = b * c + a * s
    return out


def query_rows(seq_lens: Ints, query_start: Ints | None) -> list[tuple[int, int, int]]:
    """``(sequence, row, position)`` of every query that has a place in its sequence."""
    starts = np.arange(len(seq_lens) + 1) if query_start is None else query_start
    rows = []
    for r, length in enumerate(seq_lens):
        count = int(starts[r + 1] - starts[r])
        if length > 0:
            rows += [(r, int(starts[r]) + i, int(length) - count + i) for i in range(count)]
    return rows


def append_kv(
    k: Floats,
    v: Floats,
    k_cache: Floats,
    v_cache: Floats,
    block_table: Ints,
    seq_lens: Ints,
    query_start: Ints | None = None,
) -> None:
    """Writes rows of ``k`` and ``v [T, Hkv, D]`` (already rotated) to their pages."""
    block_size = k_cache.shape[1]
    for r, row, position in query_rows(seq_lens, query_start):
        block = block_table[r, position // block_size]
        k_cache[block, position % block_size] = k[row]
        v_cache[block, position % block_size] = v[row]


def paged_attention(
    q: Floats,
    k_cache: Floats,
    v_cache: Floats,
    block_table: Ints,
    seq_lens: Ints,
    *,
    query_start: Ints | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    alibi_slopes: Floats | None = None,
    sinks: Floats | None = None,
    k_scale: Floats | None = None,
    v_scale: Floats | None = None,
) -> tuple[Floats, Floats]:
    """Attention of ``q [T, Hq, D]`` (already rotated) over the pages: ``out`` and ``lse`` in float64.

    Caches that are quantised come decoded, with their scales ``[Hkv]``.
    """
    num_heads, head_dim = q.shape[1:]
    block_size, num_kv_heads = k_cache.shape[1:3]
    group = num_heads // num_kv_heads
    out = np.zeros(q.shape, np.float64)
    lse = np.full(q.shape[:2], -np.inf)
    for r, row, position in query_rows(seq_lens, query_start):
        begin = 0 if window is None else max(0, position - window + 1)
        tokens = np.arange(begin, position + 1)
        blocks, slots = block_table[r, tokens // block_size], tokens % block_size
        for kv_head in range(num_kv_heads):
            heads = slice(kv_head * group, (kv_head + 1) * group)  # the query heads that share it
            keys = k_cache[blocks, slots, kv_head].astype(np.float64)
            values = v_cache[blocks, slots, kv_head].astype(np.float64)
            if k_scale is not None and v_scale is not None:
                keys, values = keys * np.float64(k_scale[kv_head]), values * np.float64(v_scale[kv_head])
            scores = q[row, heads].astype(np.float64) @ keys.T * (head_dim**-0.5 if scale is None else scale)
            if softcap is not None:
                scores = softcap * np.tanh(scores / softcap)
            if alibi_slopes is not None:
                scores = scores + alibi_slopes[heads, None].astype(np.float64) * (tokens - position)
            extra = np.full(group, -np.inf) if sinks is None else sinks[heads].astype(np.float64)
            top = np.maximum(scores.max(axis=1), extra)
            weights = np.exp(scores - top[:, None])
            total = weights.sum(axis=1) + np.exp(extra - top)
            out[row, heads] = weights @ values / total[:, None]
            lse[row, heads] = top + np.log(total)
    return out, lse


def merge_attention(outs: Floats, lses: Floats) -> tuple[Floats, Floats]:
    """``[S, T, Hq, D]`` and ``[S, T, Hq]`` over disjoint keys, merged in float64."""
    weights = np.zeros(lses.shape)
    top = lses.max(axis=0).astype(np.float64)
    seen = top > -np.inf
    weights[:, seen] = np.exp(lses[:, seen].astype(np.float64) - top[seen])
    total = weights.sum(axis=0)
    parts = np.where(weights[..., None] > 0, outs.astype(np.float64), 0.0)
    out = (weights[..., None] * parts).sum(axis=0) / np.where(seen, total, 1.0)[..., None]
    return out, np.where(seen, top + np.log(np.where(seen, total, 1.0)), -np.inf)
