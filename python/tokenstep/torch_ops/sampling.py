"""Sampling as ops: `sample` and `apply_logits`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from tokenstep import sampling
from tokenstep.sampling import Bias, LogprobsMode, SampleOutput
from tokenstep.torch_ops.library import define, shapes_of

_PARAMETERS = (
    "Tensor logits, *, Tensor? temperature=None, Tensor? top_k=None, Tensor? top_p=None, Tensor? min_p=None, "
    "Tensor? repetition_penalty=None, Tensor? presence_penalty=None, Tensor? frequency_penalty=None, "
    "Tensor[]? prompt_tokens=None, Tensor[]? output_tokens=None, int[]? bias_starts=None, int[] bias_ids=[], "
    "float[] bias_values=[], Tensor? token_bitmask=None, bool? check=None"
)
PER_ROW: dict[str, tuple[float, torch.dtype]] = {
    "temperature": (1.0, torch.float64),
    "top_k": (0, torch.int32),
    "top_p": (1.0, torch.float64),
    "min_p": (0.0, torch.float64),
    "repetition_penalty": (1.0, torch.float64),
    "presence_penalty": (0.0, torch.float64),
    "frequency_penalty": (0.0, torch.float64),
}
"""The values at which a parameter is off, and the type of its tensor."""


@define(
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


@shapes_of("sample")
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


@define(f"apply_logits({_PARAMETERS}) -> Tensor")
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


@shapes_of("apply_logits")
def _apply_logits_shapes(logits: Tensor, **_: Any) -> Tensor:
    return logits.new_empty(logits.shape, dtype=torch.float32)


def _bias(starts: Sequence[int] | None, ids: Sequence[int], values: Sequence[float]) -> Bias:
    """Biases as `sample` takes them: of all rows, or row r's at starts[r] to starts[r + 1]."""
    pairs = list(zip(ids, values, strict=True))
    if starts is None:
        return dict(pairs) or None
    return [dict(pairs[begin:end]) for begin, end in pairwise(starts)]


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
    """:func:`tokenstep.sample`, by ``torch.ops.tokenstep.sample``.

    Arguments, results and errors are the same; every array is a torch tensor. In a graph what changes from
    call to call must be a tensor: values for each row are of length B.
    """
    tokens, status, *of_logprobs = torch.ops.tokenstep.sample(
        logits,
        **_shared_options(
            logits,
            {
                "temperature": temperature,
                "top_k": top_k,
                "top_p": top_p,
                "min_p": min_p,
                "repetition_penalty": repetition_penalty,
                "presence_penalty": presence_penalty,
                "frequency_penalty": frequency_penalty,
            },
            prompt_tokens,
            output_tokens,
            logit_bias,
        ),
        token_bitmask=token_bitmask,
        check=check,
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
    """:func:`tokenstep.apply_logits`, by ``torch.ops.tokenstep.apply_logits``.

    Arguments, results and errors are the same; every array is a torch tensor. In a graph what changes from
    call to call must be a tensor: values for each row are of length B.
    """
    del seed, position, substream, logprobs, logprobs_mode  # without effect there as well
    options = _shared_options(
        logits,
        {
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "repetition_penalty": repetition_penalty,
            "presence_penalty": presence_penalty,
            "frequency_penalty": frequency_penalty,
        },
        prompt_tokens,
        output_tokens,
        logit_bias,
    )
    result: Tensor = torch.ops.tokenstep.apply_logits(
        logits, token_bitmask=token_bitmask, check=check, **options
    )
    return result if out is None else out.copy_(result)


def _shared_options(
    logits: Tensor,
    per_row: Mapping[str, Any],
    prompt_tokens: Sequence[Any] | None,
    output_tokens: Sequence[Any] | None,
    logit_bias: Bias,
) -> dict[str, Any]:
    """Arguments of both functions as their ops take them."""
    tensors = {name: _per_row(logits, value, *PER_ROW[name]) for name, value in per_row.items()}
    histories = {"prompt_tokens": _histories(prompt_tokens), "output_tokens": _histories(output_tokens)}
    return tensors | histories | _bias_lists(logit_bias)


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
