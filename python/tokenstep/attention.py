"""Attention over a paged KV cache, the append of new keys and values, and the merge of partial results.

Sources: FlashAttention-2 (Dao, arXiv 2307.08691) for the online softmax over tiles; PagedAttention (Kwon et
al., arXiv 2309.06180) for the cache in pages; RoFormer (Su et al., arXiv 2104.09864) for rotary positions;
StreamingLLM (Xiao et al., arXiv 2309.17453) for sinks, here one learned score per head; ALiBi (Press et al.,
arXiv 2108.12409).

Arrays are torch tensors, or whatever speaks DLPack (NumPy); results are of the kind of the first argument.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tokenstep import _native
from tokenstep._arrays import as_given

__all__ = ["Rope", "append_kv", "attention_workspace_bytes", "merge_attention", "paged_attention"]


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding, as tables of all positions.

    Attributes:
        cos: Cosines, float32 ``[max_position, rotary_dim / 2]``, contiguous. Dimensions from ``rotary_dim``
            on pass unrotated. Any scaling (YaRN, linear, llama3) is in the tables.
        sin: Sines, the same shape.
        interleaved: Rotate the pairs ``(2i, 2i + 1)`` (GPT-J, the original paper) instead of
            ``(i, i + rotary_dim / 2)`` (GPT-NeoX, Llama).
    """

    cos: Any
    sin: Any
    interleaved: bool = False


def paged_attention(
    q: Any,
    k_cache: Any,
    v_cache: Any,
    block_table: Any,
    seq_lens: Any,
    *,
    k: Any | None = None,
    v: Any | None = None,
    rope: Rope | None = None,
    query_start: Any | None = None,
    max_query_len: int = 1,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    alibi_slopes: Any | None = None,
    sinks: Any | None = None,
    k_scale: Any | None = None,
    v_scale: Any | None = None,
    out: Any | None = None,
    return_lse: bool = False,
    status: Any | None = None,
    workspace: Any | None = None,
) -> Any:
    """Causal attention of each sequence's last tokens over its keys and values in pages.

    The queries of a sequence are its last tokens: with ``n`` of them, query ``i`` stands at position
    ``seq_len - n + i`` and sees the keys up to there. A query's result has the same bits alone, in any batch,
    in one prefill or in chunks, whatever the block size, the cache's layout and the number of threads.

    Args:
        q: Queries ``[T, Hq, D]``, float32, float16 or bfloat16; D a multiple of 8 up to 256, contiguous.
        k_cache: Keys ``[num_blocks, block_size, Hkv, D]`` in any strides with D contiguous. Hq is a multiple
            of Hkv. In the dtype of q, or quantised: float8_e4m3 (torch's ``float8_e4m3fn``) or int8.
        v_cache: Values, the same shape and dtype.
        block_table: int32 ``[R, max_blocks]``: block ``i`` of a sequence holds its tokens from
            ``i * block_size`` on.
        seq_lens: int32 ``[R]``: all tokens of each sequence, new ones included. 0 gives zeros and lse -inf.
        k: New keys ``[T, Hkv, D]``, written to their pages first (rotated with ``rope``).
        v: New values ``[T, Hkv, D]``.
        rope: Rotates q (a copy) and k at their positions, in float32, rounded once.
        query_start: int32 ``[R + 1]``: rows ``query_start[r]`` to ``query_start[r + 1]`` of q belong to
            sequence ``r``. None: one row per sequence. Rows of no sequence give zeros.
        max_query_len: No sequence has more queries than this.
        scale: Factor of the scores; None: ``1 / sqrt(D)``.
        window: Keep the keys at positions > query position - window, itself included.
        softcap: ``softcap * tanh(score / softcap)``, after the scale.
        alibi_slopes: float32 ``[Hq]``: adds ``slope * (key position - query position)``.
        sinks: float32 ``[Hq]``: one more score per head, without a value.
        k_scale: float32 ``[Hkv]``, of a quantised cache only: a key is what the cache holds times its head's
            scale, finite and above 0. New keys are divided by it (after their rotation, in float32), rounded
            to nearest even and saturated: to ±448, or -128 … 127. NaN stays NaN in float8, and is 0 in int8.
        v_scale: The same, of the values.
        out: Where to write, like q in shape and type.
        return_lse: Also return the natural log-sum-exp of the scores, sinks included.
        status: int32 ``[R]`` to fill: 0, 1 (a block id out of range where a block is needed) or 2 (a bad
            length). A bad sequence gives zeros and lse -inf, and none of its new rows are appended; the
            others are unaffected.
        workspace: Memory of the CUDA kernel's own, of any dtype: :func:`attention_workspace_bytes`, zeroed
            once and left as found, for one call at a time. None: allocated in each call. Unused on the CPU.

    Returns:
        ``out [T, Hq, D]``, or ``(out, lse)`` with lse float32 ``[T, Hq]``.

    Raises:
        ValueError: An argument of the wrong shape or range, or, on the CPU without ``status``, a sequence
            with a bad block id or length. Nothing has been written then. On a GPU the host reads no
            lengths, no block ids and no ``query_start``: what is wrong with them shows in ``status`` alone.
        TypeError: An argument of the wrong type or dtype.
    """
    result = _native.module_for(q).paged_attention(
        q, k_cache, v_cache, block_table, seq_lens, k, v, rope, query_start, max_query_len, scale,
        window, softcap, alibi_slopes, sinks, k_scale, v_scale, out, return_lse, status,
        workspace,
    )  # fmt: skip
    return as_given(q, result)


def attention_workspace_bytes(device: int = 0) -> int:
    """Size of a ``workspace`` of :func:`paged_attention` on a GPU, whatever the sizes of the call.

    Args:
        device: Number of the GPU.

    Raises:
        RuntimeError: No GPU can be used here.
    """
    reason = _native.cuda_unusable_because()
    if _native.cuda is None or reason is not None:
        raise RuntimeError(f"tokenstep.attention_workspace_bytes: {reason}")
    return int(_native.cuda.attention_workspace_bytes(device))


def append_kv(
    k: Any,
    v: Any,
    k_cache: Any,
    v_cache: Any,
    block_table: Any,
    seq_lens: Any,
    *,
    q: Any | None = None,
    rope: Rope | None = None,
    query_start: Any | None = None,
    k_scale: Any | None = None,
    v_scale: Any | None = None,
    status: Any | None = None,
) -> None:
    """Writes new keys and values to their pages: the append of :func:`paged_attention`, bit for bit.

    Args:
        k: New keys ``[T, Hkv, D]``, the last tokens of their sequences; rotated with ``rope`` on the way.
        v: New values ``[T, Hkv, D]``.
        k_cache: Keys ``[num_blocks, block_size, Hkv, D]`` in any strides with D contiguous, in the dtype of
            k or quantised (float8_e4m3, int8).
        v_cache: Values, the same shape and dtype.
        block_table: int32 ``[R, max_blocks]``.
        seq_lens: int32 ``[R]``: all tokens of each sequence, the new ones included; 0: nothing to append.
        q: Queries ``[T, Hq, D]`` to rotate in place.
        rope: Rotates k and q at their positions.
        query_start: int32 ``[R + 1]``: rows of each sequence. None: one row per sequence.
        k_scale: float32 ``[Hkv]``, of a quantised cache only, as in :func:`paged_attention`.
        v_scale: The same, of the values.
        status: int32 ``[R]`` to fill, as in :func:`paged_attention`: of a bad sequence nothing is appended or
            rotated.

    Raises:
        ValueError: An argument of the wrong shape or range, or, on the CPU without ``status``, a sequence
            with a bad block id or length. Nothing has been written then.
        TypeError: An argument of the wrong type or dtype.
    """
    _native.module_for(k).append_kv(
        k, v, k_cache, v_cache, block_table, seq_lens, q, rope, query_start, k_scale, v_scale, status
    )


def merge_attention(outs: Any, lses: Any) -> tuple[Any, Any]:
    """Merges attention over S disjoint sets of keys (cascade attention, a shared prefix) into one over all.

    Args:
        outs: Results of each part, ``[S, T, Hq, D]``, float32, float16 or bfloat16, D contiguous.
        lses: Their log-sum-exps, float32 ``[S, T, Hq]``. Parts with -inf (no keys) are ignored; if all are,
            the result is zeros and -inf. A sink belongs to one part only.

    Returns:
        ``out [T, Hq, D]`` in the type of outs, and ``lse`` float32 ``[T, Hq]``.

    Raises:
        ValueError: Shapes that do not match.
        TypeError: An argument of the wrong type or dtype.
    """
    merged: tuple[Any, Any] = as_given(outs, _native.module_for(outs).merge_attention(outs, lses))
    return merged
