"""Sequences for the attention tests: dense values, the same in pages of any size and layout, and what torch
computes.

A dtype is that of queries, new rows and cache, or names two: "bfloat16/int8" has a cache of int8.
"""

from dataclasses import dataclass

import numpy as np
import pytest
import sample_cases
from sample_cases import DTYPES, supported_isas  # noqa: F401

import tokenstep as ts
from tokenstep.reference import attention as reference
from tokenstep.reference import quantised

torch = pytest.importorskip("torch")

LAYOUTS = ("NHD", "HND", "joint", "padded")
UNIT_ROUNDOFF = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
QUANTISED = ("float32/int8", "float16/float8_e4m3", "bfloat16/int8", "bfloat16/float8_e4m3")
EVERY_CACHE = (*DTYPES, *QUANTISED)


def row_dtype(dtype):
    """Of queries, new rows and results."""
    return dtype.partition("/")[0]


def cache_dtype(dtype):
    """Of the caches."""
    return dtype.rpartition("/")[2]


def scales_of(dtype, num_kv_heads):
    """``{"k_scale": …, "v_scale": …}`` for normal values, or nothing for a cache that is not quantised.

    The largest of them saturate, the smallest become subnormal."""
    if cache_dtype(dtype) not in quantised.CODES:
        return {}
    unit = 3.0 / np.nanmax(quantised.CODES[cache_dtype(dtype)])
    heads = np.arange(num_kv_heads)
    return {
        "k_scale": (unit * 1.1 ** (heads % 5)).astype(np.float32),
        "v_scale": (unit * 0.9 ** (heads % 7)).astype(np.float32),
    }


def array_of(values, dtype):
    """An array of this dtype, and the float32 values that it holds; bfloat16 and float8 are torch tensors.

    Of one byte, they are those of the nearest codes; int8 has 127 for NaN."""
    if dtype == "int8":
        codes = np.rint(np.where(np.isnan(values), 127, values)).astype(np.int8)
        return codes, codes.astype(np.float32)
    if dtype == "float8_e4m3":
        codes = torch.from_numpy(values).to(torch.float8_e4m3fn)
        return codes, codes.float().numpy()
    return sample_cases.array_of(values, row_dtype(dtype))


@dataclass(frozen=True)
class Heads:
    """Query heads, KV heads and the size of each."""

    num_heads: int
    num_kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class Sequence:
    """One sequence: float32 values that the dtype can hold, queries at its last positions."""

    q: np.ndarray  # [n, Hq, D]
    k: np.ndarray  # [length, Hkv, D]
    v: np.ndarray

    def last(self, first, end):
        """The sequence as it was when its newest queries were those of [first, end)."""
        length = len(self.k) - len(self.q) + end
        return Sequence(self.q[first:end], self.k[:length], self.v[:length])


def rounded(rng, shape, dtype, spread=1.0):
    """Normal values that the dtype can hold, as float32."""
    return array_of(rng.standard_normal(shape) * spread, dtype)[1]


def random_sequence(rng, dtype, heads, length, queries=1, spread=1.0):
    """A sequence of normal values; ``spread`` widens the queries and thus sharpens the weights."""
    shape = (length, heads.num_kv_heads, heads.head_dim)
    q = rounded(rng, (queries, heads.num_heads, heads.head_dim), dtype, spread)
    k, v = rounded(rng, shape, dtype), rounded(rng, shape, dtype)
    if scales := scales_of(dtype, heads.num_kv_heads):
        k, v = (
            codes_of(x, scale, dtype) * scale[:, None]
            for x, scale in zip((k, v), scales.values(), strict=True)
        )
    return Sequence(q, k, v)


def codes_of(x, scale, dtype):
    """What a quantised cache holds of rows ``[n, Hkv, D]``: the values of their codes, float32."""
    codes = quantised.quantise(x, scale, cache_dtype(dtype))
    return quantised.decode(codes, cache_dtype(dtype)).astype(np.float32)


def empty_caches(num_blocks, block_size, heads, layout):
    """Two float32 caches [num_blocks, block_size, Hkv, D], all NaN, with the strides of the layout."""
    hkv, d = heads.num_kv_heads, heads.head_dim
    nan = np.float32(np.nan)
    match layout:
        case "NHD":
            return tuple(np.full((num_blocks, block_size, hkv, d), nan) for _ in range(2))
        case "HND":
            both = np.full((2, num_blocks, hkv, block_size, d), nan)
            return tuple(cache.transpose(0, 2, 1, 3) for cache in both)
        case "joint":  # a block's keys and values side by side in one allocation
            both = np.full((num_blocks, 2, block_size, hkv, d), nan)
            return both[:, 0], both[:, 1]
    padded = np.full((2, num_blocks, block_size + 1, hkv + 2, d + 8), nan)
    return tuple(cache[:, :block_size, 1 : hkv + 1, :d] for cache in padded)


def keep_strides(values, dtype):
    """``array_of`` without its copy: an array of the dtype with the strides, in elements, of ``values``."""
    base = values
    while base.base is not None:
        base = base.base
    flat, _ = array_of(base.reshape(-1).view(np.float32), dtype)
    offset = (values.__array_interface__["data"][0] - base.__array_interface__["data"][0]) // 4
    strides = [s // 4 for s in values.strides]
    if isinstance(flat, torch.Tensor):
        return flat.as_strided(values.shape, strides, offset)
    byte_strides = [s * flat.itemsize for s in strides]
    return np.ndarray(values.shape, flat.dtype, flat, offset * flat.itemsize, byte_strides)


@dataclass
class Paged:
    """Sequences in pages. ``arguments`` are the kernel's, ``exact`` the same in float32 for the reference: of
    quantised caches the values of their codes."""

    arguments: dict
    exact: dict
    counts: list

    def attend(self, **options):
        """The kernel's ``out`` and ``lse``, as arrays."""
        return ts.paged_attention(**self.arguments, return_lse=True, **options)

    def expected(self, **options):
        """The reference's ``out`` and ``lse``, float64."""
        return reference.paged_attention(**self.exact, **options)

    def split(self, rows):
        """Rows by sequence."""
        return np.split(rows, np.cumsum(self.counts)[:-1])


def paged(sequences, dtype, block_size=16, layout="NHD", rng=None, library=None, order=None, extra_blocks=3):
    """Put sequences into pages in random order. Slots without a token are NaN, unused table entries are -1.

    ``library`` is "numpy" or "torch"; None: numpy where it has the dtype.
    """
    rng = rng or np.random.default_rng(99)
    order = range(len(sequences)) if order is None else order
    sequences = [sequences[i] for i in order]
    first = sequences[0]
    heads = Heads(first.q.shape[1], *first.k.shape[1:])
    lengths = [len(s.k) for s in sequences]
    blocks = [-(-n // block_size) for n in lengths]
    num_blocks = sum(blocks) + extra_blocks
    k_cache, v_cache = empty_caches(num_blocks, block_size, heads, layout)
    scales = scales_of(dtype, heads.num_kv_heads)
    ids = rng.permutation(num_blocks).astype(np.int32)
    table = np.full((len(sequences), max(blocks) + 1), -1, np.int32)
    for r, s in enumerate(sequences):
        k, v = s.k, s.v
        if scales:
            k, v = (
                array_of(x / scales[n][:, None], cache_dtype(dtype))[1]
                for n, x in (("k_scale", k), ("v_scale", v))
            )
        mine, ids = ids[: blocks[r]], ids[blocks[r] :]
        table[r, : blocks[r]] = mine
        for i, block in enumerate(mine):
            tokens = slice(i * block_size, min((i + 1) * block_size, lengths[r]))
            k_cache[block, : tokens.stop - tokens.start] = k[tokens]
            v_cache[block, : tokens.stop - tokens.start] = v[tokens]
    counts = [len(s.q) for s in sequences]
    q = np.concatenate([s.q for s in sequences])
    exact = {"q": q, "k_cache": k_cache, "v_cache": v_cache, "block_table": table}
    exact["seq_lens"] = np.array(lengths, np.int32)
    if any(n != 1 for n in counts):
        exact["query_start"] = np.cumsum([0, *counts]).astype(np.int32)
    arguments = exact | {"q": keep_strides(q, dtype)} | scales
    for name in ("k_cache", "v_cache"):
        arguments[name] = keep_strides(exact[name], cache_dtype(dtype))
    exact |= scales
    if "query_start" in exact:
        arguments["max_query_len"] = max(1, *counts)
    if library == "torch" or any(isinstance(a, torch.Tensor) for a in arguments.values()):
        arguments = {n: torch.from_numpy(a) if isinstance(a, np.ndarray) else a for n, a in arguments.items()}
    return Paged(arguments, exact, counts)


def numbers(a):
    """Values as float64."""
    return np.asarray(a.double() if isinstance(a, torch.Tensor) else a, np.float64)


def bits(a):
    """Bit patterns as a NumPy array of integers."""
    if isinstance(a, torch.Tensor):
        a = (a.view({1: torch.int8, 2: torch.int16, 4: torch.int32}[a.itemsize])).contiguous().numpy()
    return np.ascontiguousarray(a).view({1: np.int8, 2: np.int16, 4: np.int32}[a.dtype.itemsize])


def assert_same_bits(got, want, context=""):
    """Equal bits of (out, lse) pairs, any NaN included."""
    for name, a, b in zip(("out", "lse"), got, want, strict=True):
        differ = np.argwhere(bits(a) != bits(b))
        assert not len(differ), f"{context} {name} differs at {differ[0]} and {len(differ) - 1} other places"


def visible(sequence, window=None):
    """Which keys each query sees: bool [n, length]."""
    n, length = len(sequence.q), len(sequence.k)
    query, key = np.arange(length - n, length)[:, None], np.arange(length)[None, :]
    return (key <= query) & (key > query - (window or length))


def torch_attention(sequence, dtype, scale=None, window=None, softcap=None, alibi_slopes=None, sinks=None):
    """What torch computes in this dtype: its fused attention where that has the options, else its formula.

    The softmax is always in float32. Returns ``out [n, Hq, D]`` and ``lse [n, Hq]`` as float64.
    """
    q, k, v = (
        torch.from_numpy(x).to(getattr(torch, row_dtype(dtype))).transpose(0, 1)
        for x in (sequence.q, sequence.k, sequence.v)
    )
    group = q.shape[0] // k.shape[0]
    mask = torch.from_numpy(visible(sequence, window))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = (q @ k.repeat_interleave(group, 0).transpose(1, 2)).float() * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        n, length = mask.shape
        distance = torch.arange(length)[None, :] - torch.arange(length - n, length)[:, None]
        scores = scores + torch.as_tensor(alibi_slopes)[:, None, None] * distance
    scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        sink = torch.as_tensor(sinks)[:, None, None].expand(-1, len(mask), 1)
        scores = torch.cat([scores, sink], -1)
    lse = scores.logsumexp(-1).T
    if softcap is alibi_slopes is sinks is None:
        out = torch.nn.functional.scaled_dot_product_attention(
            q[None], k[None], v[None], attn_mask=mask, scale=scale, enable_gqa=True
        )[0]
    else:
        weights = scores.softmax(-1)[..., : len(sequence.k)].to(q.dtype)
        out = weights @ v.repeat_interleave(group, 0)
    return numbers(out.transpose(0, 1)), numbers(lse)


def error(got, want):
    """Root mean square and largest absolute error."""
    difference = np.abs(numbers(got) - want)
    return np.sqrt((difference**2).mean()), difference.max()


def assert_as_accurate_as_torch(batch, sequences, dtype, **options):
    """The kernel's error, of ``out`` and of ``lse``, is at most twice torch's own in this dtype."""
    out, lse = batch.attend(**{n: as_argument(o, batch) for n, o in options.items()})
    want_out, want_lse = batch.expected(**options)
    peers = [torch_attention(s, dtype, **options) for s in sequences if len(s.k)]
    seen = np.repeat([len(s.k) > 0 for s in sequences], batch.counts)
    for name, got, want, peer in (
        ("out", out, want_out, np.concatenate([p[0] for p in peers])),
        ("lse", lse, want_lse, np.concatenate([p[1] for p in peers])),
    ):
        ours, torchs = error(numbers(got)[seen], want[seen]), error(peer, want[seen])
        # lse is float32 whatever the dtype: half an ulp of it is rounding that nobody can avoid.
        floor = 2.0**-24 * np.abs(want[seen]).max() if name == "lse" else 0.0
        for which, a, b in zip(("rms", "largest"), ours, torchs, strict=True):
            assert a <= 2 * b + floor, f"{which} error of {name}: {a:.3g}, torch's {b:.3g}"
        unseen = numbers(got)[~seen]
        assert (unseen == (0.0 if name == "out" else -np.inf)).all()


def as_argument(option, batch):
    """Arrays among options in the kind of the batch's own."""
    if isinstance(option, np.ndarray) and isinstance(batch.arguments["q"], torch.Tensor):
        return torch.from_numpy(option)
    return option
