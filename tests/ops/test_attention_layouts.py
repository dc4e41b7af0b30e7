"""Arrays in any layout that the contract allows give the same bits, in torch tensors and NumPy arrays alike,
each answered in its own kind."""

import numpy as np
import pytest
from attention_cases import (
    EVERY_CACHE,
    LAYOUTS,
    Heads,
    assert_same_bits,
    bits,
    keep_strides,
    paged,
    random_sequence,
    torch,
)

import tokenstep as ts

HEADS = Heads(6, 2, 72)
LENGTHS = [(300, 1), (70, 33), (0, 1), (1, 1), (40, 40)]


def sequences_of(dtype, lengths=LENGTHS, heads=HEADS, seed=0):
    rng = np.random.default_rng(seed)
    return [random_sequence(rng, dtype, heads, n, m) for n, m in lengths]


@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize("dtype", EVERY_CACHE)
def test_caches_of_any_strides_give_the_same_bits(dtype, layout):
    sequences = sequences_of(dtype)
    want = paged(sequences, dtype).attend(window=50)
    assert_same_bits(paged(sequences, dtype, layout=layout).attend(window=50), want)


def test_keys_and_values_may_have_different_strides():
    sequences = sequences_of("float32")
    nhd = paged(sequences, "float32", layout="NHD", rng=np.random.default_rng(1))
    hnd = paged(sequences, "float32", layout="HND", rng=np.random.default_rng(1))
    want = nhd.attend()
    nhd.arguments["v_cache"] = hnd.arguments["v_cache"]
    assert_same_bits(nhd.attend(), want)


def test_caches_may_run_backwards_or_repeat():
    batch = paged(sequences_of("float32"), "float32")
    want = batch.attend()
    for name in ("k_cache", "v_cache"):
        batch.arguments[name] = batch.arguments[name][::-1].copy()[::-1]
    assert_same_bits(batch.attend(), want)
    one = np.random.default_rng(2).standard_normal((1, 1, 1, 72)).astype(np.float32)
    for name in ("k_cache", "v_cache"):
        batch.arguments[name] = np.broadcast_to(one, batch.arguments[name].shape)
    repeated = batch.attend()
    for name in ("k_cache", "v_cache"):
        batch.arguments[name] = batch.arguments[name].copy()
    assert_same_bits(batch.attend(), repeated)


def strided(a, dtype):
    """The same rows of heads with space between rows and heads."""
    wide = np.full((a.shape[0], a.shape[1] + 2, a.shape[2] + 24), np.nan, np.float32)
    wide[:, 1 : a.shape[1] + 1, 8 : a.shape[2] + 8] = a
    return keep_strides(wide[:, 1 : a.shape[1] + 1, 8 : a.shape[2] + 8], dtype)


@pytest.mark.parametrize("dtype", EVERY_CACHE)
def test_queries_new_rows_and_out_may_be_strided(dtype):
    sequences = sequences_of(dtype)
    plain, apart = paged(sequences, dtype), paged(sequences, dtype)
    rng = np.random.default_rng(3)
    new = rng.standard_normal((2, sum(plain.counts), 2, 72)).astype(np.float32)
    want = plain.attend(**{n: strided(x, dtype) for n, x in zip("kv", new, strict=True)})
    apart.arguments["q"] = strided(apart.exact["q"], dtype)
    out = strided(np.zeros_like(apart.exact["q"]), dtype)
    got = apart.attend(**{n: keep_strides(x, dtype) for n, x in zip("kv", new, strict=True)}, out=out)
    assert got[0] is out
    assert_same_bits(got, want)


def test_what_lies_between_the_rows_of_out_is_not_written():
    batch = paged(sequences_of("float32"), "float32")
    wide = np.full((sum(batch.counts), 8, 96), 7, np.float32)
    batch.attend(out=wide[:, 1:7, 8:80])
    wide[:, 1:7, 8:80] = 7
    assert (wide == 7).all()


def test_queries_of_a_fused_projection_are_read_in_place():
    """q, k and v as torch splits them from one matrix product."""
    sequences = sequences_of("bfloat16")
    batch = paged(sequences, "bfloat16")
    q = batch.arguments["q"]
    fused = torch.randn(len(q), 10, 72, generator=torch.Generator().manual_seed(0)).bfloat16()
    fused[:, :6] = q
    batch.arguments["q"], k, v = fused.split([6, 2, 2], 1)
    got = batch.attend(k=k, v=v)
    batch.arguments["q"] = q
    assert_same_bits(got, batch.attend(k=k.contiguous(), v=v.contiguous()))


@pytest.mark.parametrize("columns", [0, 1, 7])
def test_tables_may_be_wider_than_needed_and_strided(columns):
    batch = paged(sequences_of("float32"), "float32")
    want = batch.attend()
    table = batch.arguments["block_table"]
    wide = np.full((len(table), table.shape[1] + columns + 5), -1, np.int32)
    wide[:, : table.shape[1]] = table
    batch.arguments["block_table"] = wide[:, : table.shape[1] + columns]
    assert_same_bits(batch.attend(), want)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_numpy_and_torch_give_the_same_bits_each_in_its_own_kind(dtype):
    sequences = sequences_of(dtype)
    options = {"alibi_slopes": np.float32([0, 0.1, 0.2, 0.3, 0.4, 0.5]), "sinks": np.zeros(6, np.float32)}
    from_numpy = paged(sequences, dtype).attend(**options)
    tensors = {n: torch.from_numpy(o) for n, o in options.items()}
    from_torch = paged(sequences, dtype, library="torch").attend(**tensors)
    assert [type(a) for a in from_numpy] == [np.ndarray] * 2
    assert [type(a) for a in from_torch] == [torch.Tensor] * 2
    assert from_numpy[0].dtype == dtype
    assert from_torch[0].dtype == getattr(torch, dtype)
    assert_same_bits(from_numpy, from_torch)


def test_kinds_may_be_mixed():
    batch = paged(sequences_of("float32"), "float32")
    want = batch.attend()
    for name in ("k_cache", "seq_lens"):
        batch.arguments[name] = torch.from_numpy(batch.arguments[name])
    assert_same_bits(batch.attend(), want)


class Borrowed:
    """An array library whose DLPack export is a copy that only the capsule keeps alive."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **kwargs):
        return self.array.copy().__dlpack__(**kwargs)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


def test_memory_that_only_its_dlpack_capsule_keeps_lives_until_the_op_is_done():
    batch = paged(sequences_of("float32"), "float32")
    cos, sin = np.random.default_rng(4).standard_normal((2, 400, 36)).astype(np.float32)
    slopes = np.float32([0, 0.1, 0.2, 0.3, 0.4, 0.5])
    want = batch.attend(rope=ts.Rope(cos, sin), alibi_slopes=slopes, sinks=slopes)
    for name in set(batch.arguments) - {"q", "max_query_len"}:
        batch.arguments[name] = Borrowed(batch.arguments[name])
    for _ in range(5):
        rope, options = ts.Rope(Borrowed(cos), Borrowed(sin)), Borrowed(slopes)
        assert_same_bits(batch.attend(rope=rope, alibi_slopes=options, sinks=options), want)


# ---- sizes of 0 and 1 ------------------------------------------------------------------------------------
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_no_sequences_and_no_queries_give_empty_results(library):
    kind = (
        np.zeros
        if library == "numpy"
        else lambda shape, dtype=np.float32: torch.from_numpy(np.zeros(shape, dtype))
    )
    cache, table, lengths = kind((3, 4, 2, 16), np.float32), kind((0, 5), np.int32), kind((0,), np.int32)
    out, lse = ts.paged_attention(kind((0, 4, 16), np.float32), cache, cache, table, lengths, return_lse=True)
    assert tuple(out.shape) == (0, 4, 16)
    assert tuple(lse.shape) == (0, 4)
    rows = kind((0, 2, 16), np.float32)
    ts.append_kv(rows, rows, cache, cache, table, lengths)
    out = ts.paged_attention(
        kind((0, 4, 16), np.float32), cache, cache, kind((2, 5), np.int32), kind((2,), np.int32),
        query_start=kind((3,), np.int32), k=rows, v=rows,
    )  # fmt: skip
    assert tuple(out.shape) == (0, 4, 16)


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("shape", [(0, 16, 2, 8), (1, 1, 1, 8)])
@pytest.mark.parametrize("columns", [0, 1])
def test_caches_without_blocks_and_tables_without_columns_serve_empty_sequences(shape, columns, library):
    convert = (lambda a: a) if library == "numpy" else torch.from_numpy
    cache = convert(np.zeros(shape, np.float32))
    q = convert(np.ones((2, 2, 8), np.float32))
    table, lengths = convert(np.zeros((2, columns), np.int32)), convert(np.zeros(2, np.int32))
    out, lse = ts.paged_attention(q, cache, cache, table, lengths, return_lse=True)
    assert (out == 0).all()
    assert (lse == -np.inf).all()


def test_rows_of_no_sequence_give_zeros():
    batch = paged(sequences_of("float32"), "float32")
    want_out, want_lse = batch.attend()
    q = batch.arguments["q"]
    gap = np.full((2, *q.shape[1:]), np.nan, np.float32)
    batch.arguments["q"] = np.concatenate([gap, q, gap])
    batch.arguments["query_start"] = batch.arguments["query_start"] + 2
    out, lse = batch.attend()
    inside = slice(2, 2 + len(q))
    assert_same_bits((out[inside], lse[inside]), (want_out, want_lse))
    for rows in (slice(0, 2), slice(-2, None)):
        assert (bits(out[rows]) == 0).all()
        assert (lse[rows] == -np.inf).all()


def test_sequences_without_queries_take_no_part():
    sequences = sequences_of("float32", [(50, 1), (80, 0), (33, 3), (0, 0)])
    batch = paged(sequences, "float32")
    out, lse = batch.attend()
    alone = paged([sequences[0], sequences[2]], "float32").attend()
    assert_same_bits((out, lse), alone)
