"""Attention as ops: `paged_attention`, `append_and_attend`, `append_kv` and `merge_attention`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokenstep import attention
from tokenstep.attention import Rope
from tokenstep.torch_ops.library import define, shapes_of

_ROPE = "Tensor? rope_cos=None, Tensor? rope_sin=None, bool rope_interleaved=False"
_SCALES = "Tensor? k_scale=None, Tensor? v_scale=None"
_SCORES = (
    f"{_ROPE}, Tensor? query_start=None, SymInt max_query_len=1, float? scale=None, SymInt? window=None, "
    f"float? softcap=None, Tensor? alibi_slopes=None, Tensor? sinks=None, {_SCALES}, "
    "Tensor(c!)? status=None, Tensor(d!)? workspace=None"
)


@define(
    "paged_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_table, Tensor seq_lens, *, "
    f"{_SCORES}) -> (Tensor out, Tensor lse)"
)
def _paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    *,
    rope_cos: Tensor | None = None,
    rope_sin: Tensor | None = None,
    rope_interleaved: bool = False,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    rope = _rope(rope_cos, rope_sin, rope_interleaved)
    out, lse = attention.paged_attention(
        q, k_cache, v_cache, block_table, seq_lens, rope=rope, return_lse=True, **options
    )
    return out, lse


@define(
    "append_and_attend(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, "
    f"Tensor block_table, Tensor seq_lens, *, {_SCORES}) -> (Tensor out, Tensor lse)"
)
def _append_and_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    out, lse = _paged_attention(q, k_cache, v_cache, block_table, seq_lens, k=k, v=v, **options)
    return out, lse


@shapes_of("paged_attention")
@shapes_of("append_and_attend")
def _attention_shapes(q: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)


@define(
    "append_kv(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor block_table, "
    f"Tensor seq_lens, *, Tensor(c!)? q=None, {_ROPE}, Tensor? query_start=None, {_SCALES}, "
    "Tensor(d!)? status=None) -> ()"
)
def _append_kv(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    *,
    rope_cos: Tensor | None = None,
    rope_sin: Tensor | None = None,
    rope_interleaved: bool = False,
    **options: Any,
) -> None:
    rope = _rope(rope_cos, rope_sin, rope_interleaved)
    attention.append_kv(k, v, k_cache, v_cache, block_table, seq_lens, rope=rope, **options)


@shapes_of("append_kv")
def _append_kv_shapes(*_: Any, **__: Any) -> None:
    return None


@define("merge_attention(Tensor outs, Tensor lses) -> (Tensor out, Tensor lse)")
def _merge_attention(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    return attention.merge_attention(outs, lses)


@shapes_of("merge_attention")
def _merge_attention_shapes(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    return outs.new_empty(outs.shape[1:]), lses.new_empty(lses.shape[1:])


def _rope(cos: Tensor | None, sin: Tensor | None, interleaved: bool) -> Rope | None:
    return None if cos is None else Rope(cos, sin, interleaved)


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    *,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rope: Rope | None = None,
    query_start: Tensor | None = None,
    max_query_len: int = 1,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    out: Tensor | None = None,
    return_lse: bool = False,
    status: Tensor | None = None,
    workspace: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`tokenstep.paged_attention`, by the op of this name or, with k and v, ``append_and_attend``.

    Arguments, results and errors are the same; every array is a torch tensor. ``out`` is filled by a copy
    after the op.
    """
    options = {
        "rope_cos": None if rope is None else rope.cos,
        "rope_sin": None if rope is None else rope.sin,
        "rope_interleaved": False if rope is None else rope.interleaved,
        "query_start": query_start,
        "max_query_len": max_query_len,
        "scale": scale,
        "window": window,
        "softcap": softcap,
        "alibi_slopes": alibi_slopes,
        "sinks": sinks,
        "k_scale": k_scale,
        "v_scale": v_scale,
        "status": status,
        "workspace": workspace,
    }
    ops = torch.ops.tokenstep
    if k is None and v is None:
        result, lse = ops.paged_attention(q, k_cache, v_cache, block_table, seq_lens, **options)
    else:
        result, lse = ops.append_and_attend(q, k, v, k_cache, v_cache, block_table, seq_lens, **options)
    if out is not None:
        result = out.copy_(result)
    return (result, lse) if return_lse else result


def append_kv(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    *,
    q: Tensor | None = None,
    rope: Rope | None = None,
    query_start: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    status: Tensor | None = None,
) -> None:
    """:func:`tokenstep.append_kv`, by ``torch.ops.tokenstep.append_kv``.

    Arguments, results and errors are the same; every array is a torch tensor.
    """
    torch.ops.tokenstep.append_kv(
        k,
        v,
        k_cache,
        v_cache,
        block_table,
        seq_lens,
        q=q,
        rope_cos=None if rope is None else rope.cos,
        rope_sin=None if rope is None else rope.sin,
        rope_interleaved=False if rope is None else rope.interleaved,
        query_start=query_start,
        k_scale=k_scale,
        v_scale=v_scale,
        status=status,
    )


def merge_attention(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`tokenstep.merge_attention`, by ``torch.ops.tokenstep.merge_attention``.

    Arguments, results and errors are the same; every array is a torch tensor.
    """
    return torch.ops.tokenstep.merge_attention(outs, lses)  # type: ignore[no-any-return]
