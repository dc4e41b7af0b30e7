"""Batches whose last rows are still to be appended, for the tests of the append and of its fusion."""

import numpy as np
from attention_cases import (
    Heads,
    bits,
    cache_dtype,
    codes_of,
    keep_strides,
    paged,
    random_sequence,
    rounded,
    torch,
)

import tokenstep as ts
from tokenstep.reference import attention as reference

HEADS = Heads(6, 2, 80)
LENGTHS = [(300, 1), (70, 33), (0, 1), (1, 1), (40, 40), (90, 0), (17, 2)]


def angles_of(head_dim, rotary_dim, max_position=400, seed=0):
    """Random angles: tables need not come from a formula."""
    return np.random.default_rng(seed).uniform(-3, 3, (max_position, rotary_dim // 2))


class Case:
    """A batch whose last rows are still to be appended: their slots in the cache hold NaN."""

    def __init__(self, dtype, heads=HEADS, lengths=LENGTHS, layout="NHD", block_size=16, seed=0):
        rng = np.random.default_rng(seed)
        sequences = [random_sequence(rng, dtype, heads, n, m) for n, m in lengths]
        self.batch = paged(sequences, dtype, block_size, layout)
        self.dtype, self.count = dtype, sum(self.batch.counts)
        shape = (self.count, heads.num_kv_heads, heads.head_dim)
        self.k, self.v = rounded(rng, shape, dtype), rounded(rng, shape, dtype)
        for name in ("k_cache", "v_cache"):
            erase = np.full(shape, np.nan, np.float32)
            reference.append_kv(erase, erase, *[self.batch.exact[name]] * 2, *self.where())
            self.batch.arguments[name] = keep_strides(self.batch.exact[name], cache_dtype(dtype))
        self.scales = {n: a for n, a in self.batch.arguments.items() if n.endswith("_scale")}

    def where(self):
        exact = self.batch.exact
        return exact["block_table"], exact["seq_lens"], exact.get("query_start")

    def positions(self):
        """The position of each row in its sequence; 0 for rows of empty sequences."""
        found = np.zeros(self.count, np.int64)
        for _, row, position in reference.query_rows(self.where()[1], self.where()[2]):
            found[row] = position
        return found

    def array(self, values):
        return keep_strides(values.copy(), self.dtype)

    def append(self, call=ts.append_kv, **options):
        """Append the rows, by another function with the arguments of append_kv if one is given."""
        a = self.batch.arguments
        names = ("k_cache", "v_cache", "block_table", "seq_lens")
        start = {"query_start": a["query_start"]} if "query_start" in a else {}
        call(
            self.array(self.k), self.array(self.v), *(a[n] for n in names), **start, **self.scales, **options
        )

    def stored(self):
        """What the cache shall hold of the new rows, without rotation."""
        if not self.scales:
            return self.k, self.v
        scales = (self.batch.exact["k_scale"], self.batch.exact["v_scale"])
        return [codes_of(x, scale, self.dtype) for x, scale in zip((self.k, self.v), scales, strict=True)]

    def caches(self):
        return bits(self.batch.arguments["k_cache"]), bits(self.batch.arguments["v_cache"])

    def rope(self, angles, **kwargs):
        cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        if isinstance(self.batch.arguments["q"], torch.Tensor):
            cos, sin = torch.from_numpy(cos), torch.from_numpy(sin)
        return ts.Rope(cos, sin, **kwargs)
