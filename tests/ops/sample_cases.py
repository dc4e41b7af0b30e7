"""Random batches for the sampler's tests: rows of every shape, every parameter, and bitwise comparison."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tokenstep import _native
from tokenstep.reference import sampling as reference
from tokenstep.sampling import SamplingParams

ISAS = ("portable", "avx2", "avx512", "avx512_bf16")
DTYPES = ("float32", "float16", "bfloat16")
PRESETS = ("vllm", "transformers", "llama.cpp")
SHARED = ("logprobs", "logprobs_mode", "semantics")  # arguments that are one for all rows
ROW_KINDS = (
    "normal", "heavy_tails", "peaked", "flat", "uniform", "equal", "few_values", "signed_zeros", "subnormal",
    "neighbours", "some_banned", "wide", "huge", "sorted", "nan", "plus_inf", "all_banned",
)  # fmt: skip
RARE = ("nan", "plus_inf", "all_banned", "huge")


def supported_isas():
    """Instruction sets that this machine and build can run."""
    found = []
    for isa in ISAS:
        try:
            _native.cpu.set_isa(isa)
        except ValueError:
            continue
        found.append(isa)
    _native.cpu.set_isa("")
    return found


def row_of(rng, kind, n):
    """One row of logits, float64."""
    normal = rng.standard_normal(n)
    match kind:
        case "heavy_tails":
            return rng.standard_t(5, n) * rng.uniform(0.5, 4)
        case "peaked":
            normal[rng.integers(n)] += rng.uniform(10, 30)
            return normal * rng.uniform(0.5, 3)
        case "flat":
            return normal * 0.01
        case "uniform":
            return rng.random(n)
        case "equal":
            return np.full(n, rng.choice([1.25, -3.0, 0.0, 100.0]))
        case "few_values":
            return rng.integers(0, 3, n) * rng.choice([0.5, 5.0]) - 1
        case "signed_zeros":
            return np.where(np.arange(n) % 2, -0.0, 0.0) - (np.arange(n) % 7 == 0)
        case "subnormal":
            return rng.integers(-5, 6, n) * 1e-45 + (rng.random() < 0.5) * np.where(
                rng.random(n) < 0.5, 1e-38, 0
            )
        case "neighbours":  # one ulp of float32 apart
            return 1.0 + rng.integers(0, 4, n) * 2.0**-23 - (rng.random(n) < 0.5) * 1e-3
        case "some_banned":
            return np.where(rng.random(n) < rng.choice([0.1, 0.9]), -np.inf, normal * 2)
        case "wide":  # most tokens have the weight 0
            return normal * 40
        case "huge":
            return normal * rng.choice([1e30, 3e37])
        case "sorted":
            return np.sort(normal)[:: rng.choice([-1, 1])] * 3
        case "nan":
            normal[rng.integers(n)] = np.nan
            return normal
        case "plus_inf":
            normal[rng.integers(n)] = np.inf
            return normal
        case "all_banned":
            return np.full(n, -np.inf)
    return normal * rng.uniform(0.5, 4)


def array_of(values, dtype):
    """An array of this dtype, and the float32 values that it holds; bfloat16 is a torch tensor."""
    with np.errstate(over="ignore"):
        if dtype == "float16":
            half = np.clip(values, -65504, 65504, where=np.isfinite(values), out=values.copy()).astype(
                np.float16
            )
            return half, half.astype(np.float32)
        single = values.astype(np.float32)
    if dtype == "float32":
        return single, single
    import torch

    bits = (single.view(np.uint32) >> 16).astype(np.uint16) | np.where(np.isnan(single), 0x40, 0).astype(
        np.uint16
    )
    exact = (bits.astype(np.uint32) << 16).view(np.float32)
    return torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16), exact


@dataclass
class Case:
    """A batch: ``logits`` for the kernel, their float32 values ``exact`` for the reference, arguments."""

    logits: Any
    exact: np.ndarray
    arguments: dict[str, Any] = field(default_factory=dict)

    def expected(self):
        """The reference's result."""
        return reference.sample(self.exact, **self.arguments)

    def row(self, b):
        """The batch of row b alone."""
        alone = {k: v if k in SHARED or v is None else v[b : b + 1] for k, v in self.arguments.items()}
        return Case(self.logits[b : b + 1], self.exact[b : b + 1], alone)


def per_row(rng, n, common, rare=()):
    """n random values of ``common``, now and then of ``rare``; functions are called for their value."""
    choices = [rare if rare and rng.random() < 0.08 else common for _ in range(n)]
    picked = [c[int(rng.integers(len(c)))] for c in choices]
    return [p() if callable(p) else p for p in picked]


def history(rng, vocab_size, most):
    """Token ids with repetitions."""
    length = int(rng.integers(0, most + 1))
    pool = rng.integers(0, vocab_size, max(1, length // 2))
    return rng.choice(pool, length).tolist()


def bitmask(rng, num_rows, vocab_size):
    """Random masks of different density; one row in twenty allows nothing."""
    words = rng.integers(0, 1 << 32, (6, num_rows, (vocab_size + 31) // 32), dtype=np.uint64).astype(
        np.uint32
    )
    dense, sparse = words[0] | words[1] | words[2], words[0] & words[1] & words[2] & words[3] & words[4]
    kind = rng.integers(0, 20, num_rows)[:, None]
    mask = np.select(
        [kind < 10, kind < 15, kind < 17, kind < 19], [words[0], dense, sparse, ~np.uint32(0)], 0
    )
    return mask.astype(np.uint32).view(np.int32)


def random_case(rng, dtype, vocab_size, num_rows, kinds=None, semantics=None):
    """A batch in which every row has its own shape and parameters."""
    frequencies = np.array([0.15 if k in RARE else 1.0 for k in ROW_KINDS])
    drawn = rng.choice(kinds or ROW_KINDS, num_rows, p=None if kinds else frequencies / frequencies.sum())
    logits, exact = array_of(np.stack([row_of(rng, k, vocab_size) for k in drawn]), dtype)

    def few():
        return int(rng.integers(1, min(vocab_size, 100) + 1))

    def any_k():
        return int(rng.integers(1, vocab_size + 1))

    a: dict[str, Any] = {
        "temperature": per_row(
            rng,
            num_rows,
            [1.0, 1.0, 0.0, lambda: rng.uniform(0.3, 1.8), lambda: rng.uniform(0.3, 1.8), 1.5],
            [1e-6, 1e-5, 1.01e-5, 1e-3, 30.0, 1e20, 3e38, 1e-45],
        ),
        "top_k": per_row(
            rng, num_rows, [0, 0, 0, -1, few, any_k], [1, vocab_size, vocab_size + 1, vocab_size - 1]
        ),
        "top_p": per_row(
            rng,
            num_rows,
            [1.0, 1.0, lambda: rng.random(), lambda: rng.uniform(0.9, 1)],
            [0.0, 1e-9, 1 - 2**-24],
        ),
        "min_p": per_row(
            rng, num_rows, [0.0, 0.0, 0.0, lambda: 10 ** rng.uniform(-6, -1)], [1.0, 1e-40, 1 - 2**-24, 1e-12]
        ),
        "repetition_penalty": per_row(
            rng, num_rows, [1.0, 1.0, 1.2, 0.7], [lambda: 10 ** rng.uniform(-3, 3), 1e-40]
        ),
        "presence_penalty": per_row(rng, num_rows, [0.0, -0.4, lambda: rng.uniform(-2, 2)], [1e38]),
        "frequency_penalty": per_row(rng, num_rows, [0.0, 0.3, lambda: rng.uniform(-2, 2)], [-3e38, 3e38]),
        "seed": [int(s) for s in rng.integers(-(1 << 63), (1 << 63) - 1, num_rows)],
        "position": per_row(rng, num_rows, [0, 1, lambda: int(rng.integers(0, 1 << 63)), (1 << 64) - 1]),
        "substream": per_row(rng, num_rows, [0, lambda: int(rng.integers(0, 1 << 32))]),
    }
    if rng.random() < 0.7:
        most = min(300, 2 * vocab_size)
        a["prompt_tokens"] = [history(rng, vocab_size, most) for _ in range(num_rows)]
        a["output_tokens"] = [history(rng, vocab_size, most) for _ in range(num_rows)]
    if rng.random() < 0.5:
        most = min(vocab_size, 200)
        values = [-np.inf, -100.0, 1e-3, 3e38, -3e38]
        a["logit_bias"] = [
            {
                int(i): float(rng.choice(values) if rng.random() < 0.1 else rng.normal() * 3)
                for i in rng.integers(0, vocab_size, rng.integers(0, most + 1))
            }
            or None
            for _ in range(num_rows)
        ]
    if rng.random() < 0.4:
        a["token_bitmask"] = bitmask(rng, num_rows, vocab_size)
    if rng.random() < 0.8:
        a["logprobs"] = int(rng.choice([0, 1, 5, 20]))
        a["logprobs_mode"] = str(rng.choice(["raw", "processed"]))
    if semantics:
        a["semantics"] = semantics
        for b in np.flatnonzero(rng.random(num_rows) < 0.3):  # of these two the order is seen
            a["min_p"][b], a["top_p"][b] = 10 ** rng.uniform(-3, -0.1), rng.uniform(0.3, 1)
    if semantics == "llama.cpp" and rng.random() < 0.8:
        common = [-1, 64, lambda: int(rng.integers(0, 40))]
        a["penalty_last_n"] = per_row(rng, num_rows, common, [0, 1, 1 << 20])
    return Case(logits, exact, a)


def random_params(rng, vocab_size, semantics="tokenstep"):
    """SamplingParams of one request, most of them off."""

    def maybe(value, chance=0.5):
        return value if rng.random() < chance else None

    bias = {int(i): float(rng.normal() * 3) for i in rng.integers(0, vocab_size, rng.integers(0, 12))}
    chosen = {
        "temperature": maybe(rng.choice([0.0, 0.7, 1.5])),
        "top_k": maybe(int(rng.integers(0, vocab_size))),
        "top_p": maybe(rng.random()),
        "min_p": maybe(0.02, 0.3),
        "repetition_penalty": maybe(rng.choice([1.3, 0.8]), 0.4),
        "presence_penalty": maybe(rng.normal(), 0.4),
        "frequency_penalty": maybe(rng.normal(), 0.4),
        "logit_bias": maybe(bias),
        "substream": maybe(int(rng.integers(0, 1 << 32))),
        "logprobs": maybe(int(rng.integers(0, 6))),
    }
    if semantics == "llama.cpp":
        chosen["penalty_last_n"] = maybe(int(rng.integers(-1, 16)), 0.8)
    return SamplingParams(seed=int(rng.integers(-9, 9)), **{k: v for k, v in chosen.items() if v is not None})


def as_numpy(output):
    """The six outputs as NumPy arrays."""
    return [None if a is None else np.asarray(a) for a in output]


def same_floats(a, b):
    """Equal bits, any NaN being equal to any."""
    return np.where(np.isnan(a), np.isnan(b), a.view(np.int32) == b.view(np.int32))


def assert_same(got, want, context=""):
    """Equal tokens, status, ranks and ids, and equal bits of log probabilities."""
    names = ("tokens", "status", "logprobs", "ranks", "top_tokens", "top_logprobs")
    for name, a, b in zip(names, as_numpy(got), as_numpy(want), strict=True):
        assert (a is None) == (b is None), f"{context} {name}: {a} but expected {b}"
        if a is None:
            continue
        assert a.dtype == b.dtype, f"{context} {name}: {a.dtype} but expected {b.dtype}"
        assert a.shape == b.shape, f"{context} {name}: {a.shape} but expected {b.shape}"
        equal = same_floats(a, b) if a.dtype == np.float32 else a == b
        if not equal.all():
            row = int(np.argwhere(~equal)[0][0])
            raise AssertionError(f"{context} {name}, row {row}: {a[row]!r} but expected {b[row]!r}")
