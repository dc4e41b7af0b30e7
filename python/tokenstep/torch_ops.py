"""``torch.ops.tokenstep.*``: the ops as torch sees them, for ``torch.compile``, ``torch.export`` and FX.

Importing this module registers them, and has ``torch.compile`` put them in place of ``tokenstep.sample``,
``apply_logits``, ``paged_attention``, ``append_kv`` and ``merge_attention`` wherever a compiled function
calls these: no graph break, and no change in what they compute. Outside of a compiled function the functions
stay as they are, and the dispatcher is not on the way. ``torch.export`` runs Python code as it is: a module
to be exported calls the functions of this module, which take the same arguments.

    import tokenstep as ts
    import tokenstep.torch_ops

    @torch.compile(fullgraph=True)
    def attend(q, k, v, k_cache, v_cache, block_table, seq_lens):
        return ts.paged_attention(q, k_cache, v_cache, block_table, seq_lens, k=k, v=v)

In the graph every array is a torch tensor, token histories are tensors, one a row, and a seed of None is
fresh entropy at each run. A :class:`tokenstep.Sampler` keeps its state outside of any graph: call ``step``
after the compiled part, or capture both in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from tokenstep import attention, sampling
from tokenstep.attention import Rope
from tokenstep.sampling import Bias, LogprobsMode, SampleOutput

__all__ = ["append_kv", "apply_logits", "merge_attention", "paged_attention", "sample"]

_library: Any = torch.library.Library("tokenstep", "FRAGMENT")  # type: ignore[no-untyped-call]

_ROPE = "Tensor? rope_cos=None, Tensor? rope_sin=None, bool rope_interleaved=False"
_SCALES = "Tensor? k_scale=None, Tensor? v_scale=None"
_SCORES = (
    f"{_ROPE}, Tensor? query_start=None, SymInt max_query_len=1, float? scale=None, SymInt? window=None, "
    f"float? softcap=None, Tensor? alibi_slopes=None, Tensor? sinks=None, {_SCALES}, "
    "Tensor(c!)? status=None, Tensor(d!)? workspace=None"
)
_PARAMETERS = (
    "Tensor logits, *, Tensor? temperature=None, Tensor? top_k=None, Tensor? top_p=None, Tensor? min_p=None, "
    "Tensor? repetition_penalty=None, Tensor? presence_penalty=None, Tensor? frequency_penalty=None, "
    "Tensor[]? prompt_tokens=None, Tensor[]? output_tokens=None, int[]? bias_starts=None, int[] bias_ids=[], "
    "float[] bias_values=[], Tensor? token_bitmask=None, bool? check=None"
)


def _define(schema: str, **options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers the decorated function as what an op does, on CPU and CUDA tensors alike."""
    name = schema.partition("(")[0]

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        _library.define(schema, **options)
        for key in ("CPU", "CUDA"):
            _library.impl(name, function, key)
        return function

    return register


def _shapes_of(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers the decorated function as what an op gives for tensors without data."""
    register: Callable[[Callable[..., Any]], Callable[..., Any]]
    register = torch.library.register_fake(f"tokenstep::{name}", lib=_library)
    return register


# ---- attention ------------------------------------------------------------------------------------------
@_define(
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


@_define(
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


@_shapes_of("paged_attention")
@_shapes_of("append_and_attend")
def _attention_shapes(q: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)


@_define(
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


@_shapes_of("append_kv")
def _append_kv_shapes(*_: Any, **__: Any) -> None:
    return None


@_define("merge_attention(Tensor outs, Tensor lses) -> (Tensor out, Tensor lse)")
def _merge_attention(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    return attention.merge_attention(outs, lses)


@_shapes_of("merge_attention")
def _merge_attention_shapes(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    return outs.new_empty(outs.shape[1:]), lses.new_empty(lses.shape[1:])


def _rope(cos: Tensor | None, sin: Tensor | None, interleaved: bool) -> Rope | None:
    return None if cos is None else Rope(cos, sin, interleaved)


# ---- sampling -------------------------------------------------------------------------------------------
@_define(
    f"sample({_PARAMETERS}, Tensor? seed=None, Tensor? position=None, Tensor? substream=None, "
    "int? logprobs=None, str logprobs_mode='raw') -> (Tensor tokens, Tensor status, Tensor logprobs, "
    "Tensor ranks, Tensor top_tokens, Tensor top_logprobs)",
    tags=(torch.Tag.nondeterministic_seeded,),  # without a seed two equal calls are not one
)
def _sample(
    logits: Tensor,
    *,
    bias_starts: Sequence[int] | None = None,
    bias_ids: Sequence[int] = (),
    bias_values: Sequence[float] = (),
    **options: Any,
) -> tuple[Tensor, ...]:
    bias = _bias(bias_starts, bias_ids, bias_values)
    given = {name: value for name, value in options.items() if value is not None}
    out = sampling.sample(logits, logit_bias=bias, **given)
    return tuple(
        empty if field is None else field for field, empty in zip(out, _empty(logits, 0, 0), strict=True)
    )


@_shapes_of("sample")
def _sample_shapes(logits: Tensor, *, logprobs: int | None = None, **_: Any) -> tuple[Tensor, ...]:
    rows = logits.shape[0]
    tokens, status, *of_logprobs = _empty(logits, rows, logprobs or 0)
    return tokens, status, *(_empty(logits, 0, 0)[2:] if logprobs is None else of_logprobs)


def _empty(logits: Tensor, rows: int, top: int) -> tuple[Tensor, ...]:
    """Outputs of `sample` without content."""
    return (
        logits.new_empty(rows, dtype=torch.int64),
        logits.new_empty(rows, dtype=torch.int32),
        logits.new_empty(rows, dtype=torch.float32),
        logits.new_empty(rows, dtype=torch.int32),
        logits.new_empty(rows, top, dtype=torch.int64),
        logits.new_empty(rows, top, dtype=torch.float32),
    )


@_define(f"apply_logits({_PARAMETERS}) -> Tensor")
def _apply_logits(
    logits: Tensor,
    *,
    bias_starts: Sequence[int] | None = None,
    bias_ids: Sequence[int] = (),
    bias_values: Sequence[float] = (),
    **options: Any,
) -> Tensor:
    bias = _bias(bias_starts, bias_ids, bias_values)
    given = {name: value for name, value in options.items() if value is not None}
    edited: Tensor = sampling.apply_logits(logits, logit_bias=bias, **given)
    return edited


@_shapes_of("apply_logits")
def _apply_logits_shapes(logits: Tensor, **_: Any) -> Tensor:
    return logits.new_empty(logits.shape, dtype=torch.float32)


def _bias(starts: Sequence[int] | None, ids: Sequence[int], values: Sequence[float]) -> Bias:
    """Biases as `sample` takes them: of all rows, or row r's at starts[r] to starts[r + 1]."""
    pairs = list(zip(ids, values, strict=True))
    if starts is None:
        return dict(pairs) or None
    return [dict(pairs[begin:end]) for begin, end in pairwise(starts)]


# ---- the functions of tokenstep, by these ops -----------------------------------------------------------
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
    """:func:`tokenstep.paged_attention`, by the op of this name or, with k and v, ``append_and_attend``."""
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
    """:func:`tokenstep.append_kv`, by ``torch.ops.tokenstep.append_kv``."""
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
    """:func:`tokenstep.merge_attention`, by ``torch.ops.tokenstep.merge_attention``."""
    return torch.ops.tokenstep.merge_attention(outs, lses)  # type: ignore[no-any-return]


def sample(
    logits: Tensor,
    temperature: Any = 1.0,
    top_k: Any = 0,
    top_p: Any = 1.0,
    min_p: Any = 0.0,
    repetition_penalty: Any = 1.0,
    presence_penalty: Any = 0.0,
    frequency_penalty: Any = 0.0,
    prompt_tokens: Sequence[Any] | None = None,
    output_tokens: Sequence[Any] | None = None,
    logit_bias: Bias = None,
    token_bitmask: Tensor | None = None,
    seed: Any = None,
    position: Any = 0,
    substream: Any = 0,
    logprobs: int | None = None,
    logprobs_mode: LogprobsMode = "raw",
    check: bool | None = None,
) -> SampleOutput:
    """:func:`tokenstep.sample`, by ``torch.ops.tokenstep.sample``."""
    tokens, status, *of_logprobs = torch.ops.tokenstep.sample(
        logits,
        **_shared_options(
            logits,
            temperature,
            top_k,
            top_p,
            min_p,
            repetition_penalty,
            presence_penalty,
            frequency_penalty,
            prompt_tokens,
            output_tokens,
            logit_bias,
            token_bitmask,
            check,
        ),
        seed=_seeds(logits, seed),
        position=_per_row(logits, position, 0, torch.int64),
        substream=_per_row(logits, substream, 0, torch.int64),
        logprobs=logprobs,
        logprobs_mode=logprobs_mode,
    )
    if logprobs is None:
        return SampleOutput(tokens, status)
    return SampleOutput(tokens, status, *of_logprobs)


def apply_logits(
    logits: Tensor,
    temperature: Any = 1.0,
    top_k: Any = 0,
    top_p: Any = 1.0,
    min_p: Any = 0.0,
    repetition_penalty: Any = 1.0,
    presence_penalty: Any = 0.0,
    frequency_penalty: Any = 0.0,
    prompt_tokens: Sequence[Any] | None = None,
    output_tokens: Sequence[Any] | None = None,
    logit_bias: Bias = None,
    token_bitmask: Tensor | None = None,
    seed: Any = None,
    position: Any = 0,
    substream: Any = 0,
    logprobs: int | None = None,
    logprobs_mode: LogprobsMode = "raw",
    check: bool | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """:func:`tokenstep.apply_logits`, by ``torch.ops.tokenstep.apply_logits``."""
    del seed, position, substream, logprobs, logprobs_mode  # without effect there as well
    options = _shared_options(
        logits,
        temperature,
        top_k,
        top_p,
        min_p,
        repetition_penalty,
        presence_penalty,
        frequency_penalty,
        prompt_tokens,
        output_tokens,
        logit_bias,
        token_bitmask,
        check,
    )
    result: Tensor = torch.ops.tokenstep.apply_logits(logits, **options)
    return result if out is None else out.copy_(result)


def _shared_options(
    logits: Tensor,
    temperature: Any,
    top_k: Any,
    top_p: Any,
    min_p: Any,
    repetition_penalty: Any,
    presence_penalty: Any,
    frequency_penalty: Any,
    prompt_tokens: Sequence[Any] | None,
    output_tokens: Sequence[Any] | None,
    logit_bias: Bias,
    token_bitmask: Tensor | None,
    check: bool | None,
) -> dict[str, Any]:
    """Arguments of `sample` as both ops take them."""
    return {
        "temperature": _per_row(logits, temperature, 1.0, torch.float64),
        "top_k": _per_row(logits, top_k, 0, torch.int32),
        "top_p": _per_row(logits, top_p, 1.0, torch.float64),
        "min_p": _per_row(logits, min_p, 0.0, torch.float64),
        "repetition_penalty": _per_row(logits, repetition_penalty, 1.0, torch.float64),
        "presence_penalty": _per_row(logits, presence_penalty, 0.0, torch.float64),
        "frequency_penalty": _per_row(logits, frequency_penalty, 0.0, torch.float64),
        "prompt_tokens": _histories(prompt_tokens),
        "output_tokens": _histories(output_tokens),
        "token_bitmask": token_bitmask,
        "check": check,
    } | _bias_lists(logit_bias)


def _per_row(logits: Tensor, value: Any, off: float | None, dtype: torch.dtype) -> Tensor | None:
    """A value a row, as a tensor; None for one that is off."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, (int, float)):
        return None if value == off else torch.full((logits.shape[0],), value, dtype=dtype)
    return torch.tensor(value, dtype=dtype)


def _seeds(logits: Tensor, seed: Any) -> Tensor | None:
    """Seeds as int64; those from 2^63 on wrap around."""
    if seed is None or isinstance(seed, Tensor):
        return seed
    if isinstance(seed, int):
        return _per_row(logits, _wrapped(seed), None, torch.int64)
    return _per_row(logits, [_wrapped(of_row) for of_row in seed], None, torch.int64)


def _wrapped(seed: int) -> int:
    return seed - (1 << 64) if 1 << 63 <= seed < 1 << 64 else seed


def _histories(tokens: Sequence[Any] | None) -> list[Tensor] | None:
    if tokens is None:
        return None
    return [ids if isinstance(ids, Tensor) else torch.tensor(ids, dtype=torch.int64) for ids in tokens]


def _bias_lists(bias: Bias) -> dict[str, Any]:
    """The inverse of `_bias`."""
    if bias is None:
        return {}
    if isinstance(bias, Mapping):
        return {"bias_ids": list(bias.keys()), "bias_values": [float(value) for value in bias.values()]}
    starts, ids, values = [0], [], []
    for of_row in bias:
        for token, value in (of_row or {}).items():
            ids.append(token)
            values.append(float(value))
        starts.append(len(ids))
    return {"bias_starts": starts, "bias_ids": ids, "bias_values": values}


for _original, _by_ops in (
    (attention.paged_attention, paged_attention),
    (attention.append_kv, append_kv),
    (attention.merge_attention, merge_attention),
    (sampling.sample, sample),
    (sampling.apply_logits, apply_logits),
):
    torch.compiler.substitute_in_graph(_original)(_by_ops)
