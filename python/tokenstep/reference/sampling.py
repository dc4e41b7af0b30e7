"""Reference of the fused sampler: steps 0-10 of the sampling contract in NumPy, by sorting whole rows.

:func:`sample` and :func:`apply_logits` give the bits that the kernels must give. :func:`probabilities` is the
mathematical distribution in float64, without fixed-point weights, for statistics and for accuracy.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tokenstep.reference.numerics import (
    F32,
    F64,
    I64,
    draw_target,
    log_float,
    log_weight_sum,
    random_bits,
    top_p_target,
    weight,
)

Histories = Sequence[Sequence[int]] | None
Biases = Mapping[int, float] | Sequence[Mapping[int, float] | None] | None

SAMPLED, BAD_LOGIT, NO_TOKEN = 0, 1, 2


class Rules(NamedTuple):
    """What an engine means by the parameters, where it differs.

    greedy_below: a smaller temperature takes the arg max. divides: step 5 is x / T, not x * (1 / T).
    tempers_last: steps 6-8 cut, and ranks count, by the values of step 4. keeps_ties: top-k keeps whatever
    equals the k-th value. min_p_last: step 6 comes after step 8. counts_last: all penalties count the last
    penalty_last_n tokens of prompt and output together, and f * count + p is subtracted in one.
    """

    greedy_below: float = 1e-5
    divides: bool = False
    tempers_last: bool = False
    keeps_ties: bool = False
    min_p_last: bool = False
    counts_last: bool = False


RULES = {
    "tokenstep": Rules(),
    "vllm": Rules(divides=True, keeps_ties=True),
    "transformers": Rules(greedy_below=1e-45, divides=True, keeps_ties=True, min_p_last=True),
    "llama.cpp": Rules(
        greedy_below=1e-45, divides=True, tempers_last=True, min_p_last=True, counts_last=True
    ),
}
_INF = np.float32(np.inf)


class Result(NamedTuple):
    """What one step returns.

    tokens int64 [B], status int32 [B]; with log probabilities also logprobs float32 [B], ranks int32 [B],
    top_tokens int64 [B, N] and top_logprobs float32 [B, N], else None.
    """

    tokens: I64
    status: NDArray[np.int32]
    logprobs: F32 | None
    ranks: NDArray[np.int32] | None
    top_tokens: I64 | None
    top_logprobs: F32 | None


class Processed(NamedTuple):
    """Steps 0-8: values float32 [B, V] (a greedy row's after step 4), kept [B, V], greedy [B], status [B].

    Tokens are ordered by ``ranked`` [B, V]: the values, or where the temperature comes last those before it.
    """

    values: F32
    kept: NDArray[np.bool_]
    greedy: NDArray[np.bool_]
    status: NDArray[np.int32]
    ranked: F32


def allowed_by(token_bitmask: ArrayLike | None, num_rows: int, vocab_size: int) -> NDArray[np.bool_]:
    """Bit i % 32 of word i / 32 of each row: bool [B, V]."""
    if token_bitmask is None:
        return np.ones((num_rows, vocab_size), bool)
    words = np.ascontiguousarray(np.asarray(token_bitmask, np.int32)).astype("<i4")
    return np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")[:, :vocab_size].astype(bool)


def _row(lists: Histories, b: int) -> Sequence[int]:
    return [] if lists is None else lists[b]


def _bias(biases: Biases, b: int) -> Mapping[int, float]:
    if biases is None or isinstance(biases, Mapping):
        return biases or {}
    return biases[b] or {}


def edited(
    raw: F32,
    token_bitmask: ArrayLike | None,
    logit_bias: Biases,
    repetition_penalty: F32,
    presence_penalty: F32,
    frequency_penalty: F32,
    prompt_tokens: Histories,
    output_tokens: Histories,
    last_n: NDArray[np.int64] | None = None,
) -> F32:
    """Steps 1-4, one float32 operation at a time; with ``last_n`` [B] llama.cpp's penalties."""
    x = np.where(allowed_by(token_bitmask, *raw.shape), raw, -_INF)
    for b in range(len(x)):
        bias = _bias(logit_bias, b)
        if bias:
            ids = np.fromiter(bias.keys(), np.int64)
            x[b, ids] += np.fromiter(bias.values(), np.float64).astype(np.float32)
        if last_n is not None:
            _penalise_last(
                x[b],
                [*_row(prompt_tokens, b), *_row(output_tokens, b)],
                int(last_n[b]),
                repetition_penalty[b],
                presence_penalty[b],
                frequency_penalty[b],
            )
            continue
        output = Counter(map(int, _row(output_tokens, b)))
        seen = np.array(sorted({*map(int, _row(prompt_tokens, b)), *output}), np.int64)
        if len(seen):
            v = x[b, seen]
            x[b, seen] = np.where(v > 0, v / repetition_penalty[b], v * repetition_penalty[b])
        if output:
            ids = np.fromiter(output.keys(), np.int64)
            counts = np.fromiter(output.values(), np.int64).astype(np.float32)
            x[b, ids] -= frequency_penalty[b] * counts
            x[b, ids] -= presence_penalty[b]
    return np.where(np.isnan(x), -_INF, x)  # inf - inf: such a token is cut


def _penalise_last(
    x: F32,
    tokens: Sequence[int],
    last_n: int,
    repetition: np.float32,
    presence: np.float32,
    frequency: np.float32,
) -> None:
    """llama.cpp's penalties of one row, in place: they count its last ``last_n`` tokens, or all (-1)."""
    counted = tokens if last_n < 0 else tokens[max(0, len(tokens) - last_n) :]
    for i, count in Counter(map(int, counted)).items():
        x[i] = x[i] / repetition if x[i] > 0 else x[i] * repetition
        x[i] -= frequency * np.float32(count) + presence


def descending(values: F32) -> I64:
    """Ids of each row by (value descending, id ascending); -0 and +0 are equal."""
    return np.argsort(-values, axis=1, kind="stable")


def process(
    logits: ArrayLike,
    temperature: ArrayLike = 1.0,
    top_k: ArrayLike = 0,
    top_p: ArrayLike = 1.0,
    min_p: ArrayLike = 0.0,
    repetition_penalty: ArrayLike = 1.0,
    presence_penalty: ArrayLike = 0.0,
    frequency_penalty: ArrayLike = 0.0,
    prompt_tokens: Histories = None,
    output_tokens: Histories = None,
    logit_bias: Biases = None,
    token_bitmask: ArrayLike | None = None,
    semantics: str = "tokenstep",
    penalty_last_n: ArrayLike | None = None,
) -> Processed:
    """Steps 0-8 of rows of float32 or float16 logits [B, V] (bfloat16 comes as the float32 it equals)."""
    rules = RULES[semantics]
    raw = np.asarray(logits).astype(np.float32)
    num_rows, vocab_size = raw.shape

    def per_row(value: ArrayLike, dtype: type[Any] = np.float32) -> NDArray[Any]:
        return np.broadcast_to(np.asarray(value).astype(dtype), (num_rows,))

    t, p, m, k = per_row(temperature), per_row(top_p), per_row(min_p), per_row(top_k, np.int64)
    last_n = per_row(64 if penalty_last_n is None else penalty_last_n, np.int64)
    with np.errstate(invalid="ignore", over="ignore", under="ignore", divide="ignore"):
        bad = (np.isnan(raw) | (raw == _INF)).any(axis=1)
        x4 = edited(
            np.where(bad[:, None], np.float32(0), raw),
            token_bitmask,
            logit_bias,
            per_row(repetition_penalty),
            per_row(presence_penalty),
            per_row(frequency_penalty),
            prompt_tokens,
            output_tokens,
            last_n if rules.counts_last else None,
        )
        greedy = t < np.float32(rules.greedy_below)
        divisor = np.where(greedy, np.float32(1), t)[:, None]
        x5 = x4 / divisor if rules.divides else x4 * (np.float32(1) / divisor)
        greedy = greedy | (x5.max(axis=1) == _INF)
        values = np.where(greedy[:, None], x4, x5)
        nothing = values.max(axis=1) == -_INF
        status = np.where(bad, BAD_LOGIT, np.where(nothing, NO_TOKEN, SAMPLED)).astype(np.int32)

        # Each filter keeps a prefix of the order, so its length is all there is to know.
        ranked = x4 if rules.tempers_last else values
        x_max = ranked.max(axis=1)
        order = descending(ranked)
        in_order = np.take_along_axis(ranked, order, axis=1)
        threshold = np.minimum(x_max, x_max + log_float(np.where(m > 0, m, np.float32(1))))
        by_min_p = np.where(m > 0, (in_order >= threshold[:, None]).sum(axis=1), vocab_size)
        length = np.full(num_rows, vocab_size)
        if not rules.min_p_last:
            length = by_min_p
        by_top_k = np.where((k > 0) & (k < vocab_size), k, vocab_size)
        if rules.keeps_ties:
            kth = np.take_along_axis(in_order, by_top_k[:, None] - 1, axis=1)
            by_top_k = (in_order >= kth).sum(axis=1)
        length = np.minimum(length, by_top_k)
        nucleus = (p < 1) & ~greedy & (status == SAMPLED)
        if nucleus.any():
            running = np.cumsum(weight(in_order - x_max[:, None]), axis=1)
            for b in np.flatnonzero(nucleus):
                target = top_p_target(p[b], int(running[b, length[b] - 1]))
                length[b] = 1 + np.flatnonzero(running[b] >= target)[0]
        if rules.min_p_last:
            length = np.minimum(length, by_min_p)
        length = np.where(greedy, vocab_size, length)
    kept = np.empty(raw.shape, bool)
    np.put_along_axis(kept, order, np.arange(vocab_size) < length[:, None], axis=1)
    return Processed(values, kept, greedy, status, ranked)


def draw(
    processed: Processed, seeds: Sequence[int], positions: Sequence[int], substreams: Sequence[int]
) -> I64:
    """Step 9; the arg max of greedy rows; -1 for rows that cannot be sampled."""
    values, kept, greedy, status, _ = processed
    tokens: I64 = values.argmax(axis=1).astype(np.int64)  # the lowest id among equals
    tokens[status != SAMPLED] = -1
    rows = np.flatnonzero((status == SAMPLED) & ~greedy)
    x = values[rows]
    with np.errstate(over="ignore"):
        d = x - x.max(axis=1, keepdims=True)
    prefix = np.cumsum(np.where(kept[rows], weight(d), 0), axis=1)
    for b, sums in zip(rows.tolist(), prefix, strict=True):
        bits = random_bits(seeds[b], positions[b], substreams[b])
        tokens[b] = np.flatnonzero(sums > draw_target(bits, int(sums[-1])))[0]
    return tokens


def log_probabilities(values: F32) -> F32:
    """(x - x_max) - ln(sum of weights / 2^40) of each value of each row, float32 [B, V]."""
    x_max = values.max(axis=1, keepdims=True)
    with np.errstate(invalid="ignore", over="ignore"):
        d = np.where(values == x_max, np.float32(0), values - x_max)  # a maximum of +inf shares the mass too
    result: F32 = d - log_weight_sum(weight(d).sum(axis=1))[:, None]
    return result


def _row_list(value: Any, num_rows: int) -> list[int]:
    return [int(v) for v in value] if np.ndim(value) else [int(value)] * num_rows


def sample(
    logits: ArrayLike,
    temperature: ArrayLike = 1.0,
    top_k: ArrayLike = 0,
    top_p: ArrayLike = 1.0,
    min_p: ArrayLike = 0.0,
    repetition_penalty: ArrayLike = 1.0,
    presence_penalty: ArrayLike = 0.0,
    frequency_penalty: ArrayLike = 0.0,
    prompt_tokens: Histories = None,
    output_tokens: Histories = None,
    logit_bias: Biases = None,
    token_bitmask: ArrayLike | None = None,
    seed: int | Sequence[int] = 0,
    position: int | Sequence[int] = 0,
    substream: int | Sequence[int] = 0,
    logprobs: int | None = None,
    logprobs_mode: str = "raw",
    semantics: str = "tokenstep",
    penalty_last_n: ArrayLike | None = None,
) -> Result:
    """Steps 0-10. Never raises for a row that cannot be sampled; arguments are taken to be valid."""
    raw = np.asarray(logits).astype(np.float32)
    num_rows, vocab_size = raw.shape
    processed = process(
        raw,
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
        semantics,
        penalty_last_n,
    )
    tokens = draw(processed, *(_row_list(v, num_rows) for v in (seed, position, substream)))
    status = processed.status
    if logprobs is None:
        return Result(tokens, status, None, None, None, None)

    failed = status != SAMPLED
    distribution = ranked = raw
    if logprobs_mode == "processed":
        distribution = np.where(processed.kept, processed.values, -_INF)
        ranked = np.where(processed.kept, processed.ranked, -_INF)
    every = log_probabilities(np.where(failed[:, None], np.float32(0), distribution))
    order = descending(np.where(failed[:, None], np.float32(0), ranked))
    chosen = np.where(failed, 0, tokens)[:, None]
    own = np.take_along_axis(every, chosen, axis=1)[:, 0]
    ranks = 1 + (order == chosen).argmax(axis=1)

    top_tokens = np.full((num_rows, logprobs), -1, np.int64)
    top_logprobs = np.full((num_rows, logprobs), np.nan, np.float32)
    n = min(logprobs, vocab_size)  # places beyond the vocabulary stay -1 and NaN
    top_tokens[:, :n] = order[:, :n]
    top_logprobs[:, :n] = np.take_along_axis(every, order[:, :n], axis=1)
    own[failed], ranks[failed], top_tokens[failed], top_logprobs[failed] = np.nan, 0, -1, np.nan
    return Result(tokens, status, own, ranks.astype(np.int32), top_tokens, top_logprobs)


def apply_logits(logits: ArrayLike, *args: Any, **kwargs: Any) -> tuple[F32, NDArray[np.int32]]:
    """Steps 0-8 (arguments of :func:`process`): float32 [B, V] with -inf where cut, and status int32 [B].

    A greedy row keeps its arg max alone. A row with another status than 0 is all -inf.
    """
    values, kept, greedy, status, _ = process(logits, *args, **kwargs)
    arg_max = np.arange(values.shape[1]) == values.argmax(axis=1)[:, None]
    out = np.where(np.where(greedy[:, None], arg_max, kept), values, -_INF)
    out[status != SAMPLED] = -_INF
    return out, status


def probabilities(
    logits: ArrayLike,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    prompt_tokens: Sequence[int] = (),
    output_tokens: Sequence[int] = (),
    logit_bias: Mapping[int, float] | None = None,
    allowed: Sequence[int] | None = None,
) -> F64:
    """The distribution that one row [V] is drawn from, by its definition, in float64 [V]."""
    x = np.asarray(logits).astype(np.float64)
    if allowed is not None:
        x[np.setdiff1d(np.arange(len(x)), allowed)] = -np.inf
    for i, value in (logit_bias or {}).items():
        x[i] += value
    for i in {*prompt_tokens, *output_tokens}:
        x[i] = x[i] / repetition_penalty if x[i] > 0 else x[i] * repetition_penalty
    for i, count in Counter(output_tokens).items():
        x[i] -= frequency_penalty * count + presence_penalty
    if temperature < 1e-5:
        one: F64 = (np.arange(len(x)) == x.argmax()).astype(np.float64)
        return one
    p: F64 = np.exp((x - x.max()) / temperature)
    p[p < min_p] = 0.0
    order = np.argsort(-p, kind="stable")
    if 0 < top_k < len(p):
        p[order[top_k:]] = 0.0
    if top_p < 1.0:
        running = np.cumsum(p[order])
        p[order[1 + np.argmax(running >= top_p * running[-1]) :]] = 0.0
    p /= p.sum()
    return p
