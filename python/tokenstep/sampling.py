"""Logits to token in one fused kernel: ``sample``, ``apply_logits`` and the engine's ``Sampler``.

Per row and in this order: bitmask, logit bias, repetition, frequency and presence penalties, temperature, min-p,
top-k, top-p, the draw, log probabilities. Weights are integers and the random bits are Philox4x32-10 (Salmon et al.,
SC 2011) of (seed, position, substream): the token of a row is a function of that row's inputs alone, the same bits on
every machine, for any number of threads and in any place of any batch. Nothing is computed in this file.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias, TypeVar

import numpy as np

from tokenstep import _native

__all__ = ["Array", "SampleOutput", "Sampler", "SamplingParams", "apply_logits", "sample"]


class Array(Protocol):
    """Anything that speaks DLPack: a torch tensor, a NumPy, CuPy or JAX array."""

    def __dlpack__(self, *, stream: Any = None) -> Any: ...
    def __dlpack_device__(self) -> tuple[Any, Any]: ...


Floats: TypeAlias = "float | Sequence[float] | Array"
Ints: TypeAlias = "int | Sequence[int] | Array"
Seeds: TypeAlias = "int | Sequence[int | None] | Array | None"
History: TypeAlias = "Sequence[Sequence[int]] | None"
Bias: TypeAlias = "Mapping[int, float] | Sequence[Mapping[int, float] | None] | None"
LogprobsMode: TypeAlias = Literal["raw", "processed"]

_A = TypeVar("_A", bound=Array)
_CUDA = 2  # DLPack's device type


class SampleOutput(NamedTuple):
    """What one step gives; each field is an array of the same kind and on the same device as the logits.

    Attributes:
        tokens: int64 [B]; -1 where a row could not be sampled.
        status: int32 [B]; 0 sampled, 1 NaN or +inf among the logits, 2 no token left with a finite value, 3 a
            parameter that only the device knew is out of range.
        logprobs: float32 [B], natural log probability of the token; None unless asked for.
        ranks: int32 [B], 1 is the most likely; None unless asked for.
        top_tokens: int64 [B, N], most likely first; None unless asked for.
        top_logprobs: float32 [B, N]; None unless asked for.
    """

    tokens: Any
    status: Any
    logprobs: Any = None
    ranks: Any = None
    top_tokens: Any = None
    top_logprobs: Any = None


def sample(
    logits: Array,
    temperature: Floats = 1.0,
    top_k: Ints = 0,
    top_p: Floats = 1.0,
    min_p: Floats = 0.0,
    repetition_penalty: Floats = 1.0,
    presence_penalty: Floats = 0.0,
    frequency_penalty: Floats = 0.0,
    prompt_tokens: History = None,
    output_tokens: History = None,
    logit_bias: Bias = None,
    token_bitmask: Array | None = None,
    seed: Seeds = None,
    position: Ints = 0,
    substream: Ints = 0,
    logprobs: int | None = None,
    logprobs_mode: LogprobsMode = "raw",
    check: bool | None = None,
) -> SampleOutput:
    """Draws one token per row of raw logits.

    Every per-row argument is a scalar for all rows, or one value a row (a sequence or an array of length B).

    Args:
        logits: float32, float16 or bfloat16 [B, V]; rows may be strided, the last axis is contiguous.
        temperature: below 1e-5 the row is greedy: the largest value, lowest id among equals.
        top_k: keeps exactly k tokens by (value descending, id ascending); 0 or -1 is off.
        top_p: keeps the shortest prefix of the same order with at least this share of the weight; 1 is off.
        min_p: keeps tokens at least min_p times as likely as the most likely one; 0 is off.
        repetition_penalty: divides positive and multiplies other logits of tokens in prompt or output; 1 is off.
        presence_penalty: subtracted once from tokens in the output.
        frequency_penalty: subtracted for each occurrence in the output.
        prompt_tokens: one sequence of token ids a row.
        output_tokens: one sequence of token ids a row.
        logit_bias: {id: value} for all rows, or one such dict or None a row; -inf bans a token.
        token_bitmask: int32 [B, ceil(V/32)]; bit i % 32 of word i / 32 allows token i (xgrammar's layout).
        seed: 64 bits; a negative int is taken as two's complement; None is fresh entropy, row by row.
        position: index of the output token, from 0.
        substream: 32 bits more that tell apart draws with the same seed and position.
        logprobs: None, or the number 0-20 of top log probabilities to return beside the token's own.
        logprobs_mode: "raw" is the log-softmax of the logits as given; "processed" that of what was drawn from.
        check: True raises for rows that cannot be sampled, False reports them in ``status`` alone; None raises on
            the CPU and does not synchronise on a GPU.

    Returns:
        SampleOutput: tokens int64 [B], status int32 [B] and, with ``logprobs``, the four others.

    Raises:
        TypeError: an argument is of the wrong kind, dtype or device; the message names it and the row.
        ValueError: a value is out of range or a shape wrong; or a row cannot be sampled (see ``check``).
        RuntimeError: the logits are on a GPU and this build or machine has no CUDA module.
    """
    try:
        out = SampleOutput._make(
            _native.cpu.sample(
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
                seed,
                position,
                substream,
                logprobs,
                logprobs_mode,
                check,
            )
        )
    except (TypeError, ValueError):
        _refuse_cuda("sample", logits)
        raise
    if type(out.tokens) is np.ndarray and not isinstance(logits, np.ndarray):
        return SampleOutput._make(None if a is None else _like(logits, a) for a in out)
    return out


def apply_logits(
    logits: _A,
    temperature: Floats = 1.0,
    top_k: Ints = 0,
    top_p: Floats = 1.0,
    min_p: Floats = 0.0,
    repetition_penalty: Floats = 1.0,
    presence_penalty: Floats = 0.0,
    frequency_penalty: Floats = 0.0,
    prompt_tokens: History = None,
    output_tokens: History = None,
    logit_bias: Bias = None,
    token_bitmask: Array | None = None,
    seed: Seeds = None,
    position: Ints = 0,
    substream: Ints = 0,
    logprobs: int | None = None,
    logprobs_mode: LogprobsMode = "raw",
    check: bool | None = None,
    out: _A | None = None,
) -> _A:
    """Everything of :func:`sample` but the draw, for engines that draw themselves.

    Args are those of :func:`sample`; seed, position, substream, logprobs and logprobs_mode have no effect here.

    Returns:
        float32 [B, V], ``out`` if given: the values after penalties and temperature, -inf where a token is cut. A
        greedy row keeps its arg max alone.

    Raises:
        TypeError: as :func:`sample`.
        ValueError: as :func:`sample`; nothing is written to ``out`` when an argument is wrong.
        RuntimeError: as :func:`sample`.
    """
    raise NotImplementedError


def _like(logits: Array, a: Any) -> Any:
    """A NumPy array as an array of the logits' library, without a copy where that library can."""
    namespace = getattr(logits, "__array_namespace__", None)
    library = namespace() if namespace else sys.modules[type(logits).__module__.partition(".")[0]]
    return library.from_dlpack(a)


def _refuse_cuda(op: str, logits: Array) -> None:
    """Raises RuntimeError if the logits are on a GPU that this build cannot use."""
    device = getattr(logits, "__dlpack_device__", None)
    if device is not None and device()[0] == _CUDA and _native.cuda is None:
        raise RuntimeError(f"tokenstep.{op}: logits is on a GPU, but {_native.cuda_absent_because}")
