"""Attention of whole prompts on a GPU: torch's kernel for those that begin in a pass, ours for all others.

A long prompt of which nothing is in the cache attends to itself alone: a dense product, for which torch has
FlashAttention. Whatever continues what is cached needs pages. Our op appends keys and values in either case.
The choice follows shapes alone; with `batch_invariant` it isn't made.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenstep.attention import Rope, append_kv, paged_attention

SDPA_TOKENS = 128  # shorter prompts are better off together in one launch


class Span(NamedTuple):
    """A sequence that begins in a pass: its number, its first row, and the row behind its last."""

    sequence: int
    begin: int
    end: int


class FreshPrompts:
    """Attends for a pass in which long prompts begin.

    Args:
        spans: these prompts.
        seq_lens: int32 [R], of all sequences of the pass.
    """

    def __init__(self, spans: Sequence[Span], seq_lens: Tensor) -> None:
        self._spans = spans
        self._longest = max(span.end - span.begin for span in spans)
        self._has_others = len(spans) < len(seq_lens)
        self._other_lens = seq_lens.clone()  # with length 0 a sequence is left out
        for span in spans:
            self._other_lens.narrow(0, span.sequence, 1).fill_(0)

    @classmethod
    def of(cls, spans: Sequence[Span], seq_lens: Tensor) -> FreshPrompts | None:
        """Those that are long enough; None if there is none."""
        long = [span for span in spans if span.end - span.begin >= SDPA_TOKENS]
        return cls(long, seq_lens) if long else None

    def attend(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        block_table: Tensor,
        seq_lens: Tensor,
        *,
        k: Tensor,
        v: Tensor,
        rope: Rope,
        query_start: Tensor | None,
        max_query_len: int,
        scale: float,
        window: int | None,
        softcap: float | None,
        k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
        out: Tensor | None = None,
        workspace: Tensor | None = None,
    ) -> Tensor:
        """`paged_attention` with these arguments, up to rounding. q is rotated in place.

        Our kernel does all of it where torch's has no word for it: a soft cap, a window within a prompt, a
        quantised cache.
        """
        if softcap is not None or k_cache.dtype != q.dtype or (window or self._longest) < self._longest:
            attended = paged_attention(
                q, k_cache, v_cache, block_table, seq_lens, k=k, v=v, rope=rope, query_start=query_start,
                max_query_len=max_query_len, scale=scale, window=window, softcap=softcap, k_scale=k_scale,
                v_scale=v_scale, out=out, workspace=workspace,
            )  # fmt: skip
            return cast(Tensor, attended)
        append_kv(k, v, k_cache, v_cache, block_table, seq_lens, q=q, rope=rope, query_start=query_start)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
        if self._has_others:
            paged_attention(
                q, k_cache, v_cache, block_table, self._other_lens, query_start=query_start,
                max_query_len=max_query_len, scale=scale, window=window, out=out, workspace=workspace,
            )  # fmt: skip
        block_size = k_cache.shape[1]
        for sequence, begin, end in self._spans:
            length = end - begin
            blocks = block_table[sequence, : -(-length // block_size)]
            keys = k_cache.index_select(0, blocks).flatten(0, 1)[:length]  # rotated and rounded
            out[begin:end] = _attend_to_itself(q[begin:end], keys, v[begin:end], scale)
        return out


def _attend_to_itself(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention of one sequence: q [T, Hq, D], k and v [T, Hkv, D] to [T, Hq, D]."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
    return attended[0].transpose(0, 1)
