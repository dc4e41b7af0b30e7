"""Scale, window, softcap, ALiBi and sinks, alone and together: what they do, and what they leave alone."""

import itertools

import numpy as np
import pytest
from attention_cases import (
    DTYPES,
    EVERY_CACHE,
    QUANTISED,
    Heads,
    Sequence,
    array_of,
    as_argument,
    assert_as_accurate_as_torch,
    assert_same_bits,
    numbers,
    paged,
    random_sequence,
    supported_isas,
)

from tokenstep import _native

HEADS = Heads(6, 2, 64)
LENGTHS = [(600, 1), (90, 30), (1, 1), (33, 2), (0, 1), (40, 40)]
SLOPES = (2.0 ** -np.arange(1, 7)).astype(np.float32)
SINKS = np.float32([-3, 0, 1.5, 5, -50, 2])
OPTIONS = {
    "scale": 0.3,
    "window": 37,
    "softcap": 4.0,
    "alibi_slopes": SLOPES,
    "sinks": SINKS,
}


def batch_of(dtype, heads=HEADS, lengths=LENGTHS, spread=2.0, seed=0, **how):
    rng = np.random.default_rng(seed)
    sequences = [random_sequence(rng, dtype, heads, n, m, spread) for n, m in lengths]
    return paged(sequences, dtype, **how), sequences


@pytest.mark.parametrize(
    "names", [n for k in range(1, 6) for n in itertools.combinations(OPTIONS, k)], ids="+".join
)
@pytest.mark.parametrize("dtype", [*DTYPES, "bfloat16/int8"])
def test_each_and_all_together_are_as_accurate_as_torch(dtype, names):
    batch, sequences = batch_of(dtype)
    assert_as_accurate_as_torch(batch, sequences, dtype, **{n: OPTIONS[n] for n in names})


@pytest.mark.parametrize("isa", supported_isas())
@pytest.mark.parametrize("dtype", EVERY_CACHE)
def test_all_together_on_every_instruction_set(dtype, isa):
    _native.cpu.set_isa(isa)
    batch, sequences = batch_of(dtype, Heads(6, 3, 80))
    assert_as_accurate_as_torch(batch, sequences, dtype, **OPTIONS)


@pytest.mark.parametrize("window", [1, 2, 31, 32, 33, 64, 127, 128, 129, 255, 256, 257, 511, 512, 513])
def test_windows_at_the_edges_of_tiles_and_chunks(window):
    batch, sequences = batch_of("float32", lengths=[(700, 1), (520, 60), (64, 64)])
    assert_as_accurate_as_torch(batch, sequences, "float32", window=window)


def test_a_window_of_one_gives_each_query_its_own_value():
    batch, sequences = batch_of("float32", lengths=[(300, 1), (70, 40)])
    out, _ = batch.attend(window=1)
    want = np.concatenate([np.repeat(s.v[len(s.k) - len(s.q) :], 3, axis=1) for s in sequences])
    np.testing.assert_array_equal(out, want)


@pytest.mark.parametrize("softcap", [0.01, 1.0, 30.0, 50.0, 1e4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_soft_caps_from_flat_to_none(dtype, softcap):
    batch, sequences = batch_of(dtype, spread=8.0)
    assert_as_accurate_as_torch(batch, sequences, dtype, softcap=softcap)


@pytest.mark.parametrize(
    ("options", "same"),
    [
        ({"window": 1 << 30}, {}),
        ({"window": 600}, {}),
        ({"alibi_slopes": np.zeros(6, np.float32)}, {}),
        ({"sinks": np.full(6, -np.inf, np.float32)}, {}),
        ({"scale": 64**-0.5}, {}),
        ({"scale": np.float32(0.125)}, {"scale": 0.125}),
        ({"window": np.int64(9)}, {"window": 9}),
        ({"softcap": 3}, {"softcap": 3.0}),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_options_that_change_nothing_change_no_bit(dtype, options, same):
    batch, _ = batch_of(dtype)
    options = {n: as_argument(o, batch) for n, o in options.items()}
    assert_same_bits(batch.attend(**options), batch.attend(**same))


def test_slopes_of_either_sign_favour_the_near_or_the_far():
    batch, sequences = batch_of("float32", spread=0.1)
    for slopes in (SLOPES, -SLOPES, SLOPES * [1, -1, 0, 2, 0, -2]):
        assert_as_accurate_as_torch(batch, sequences, "float32", alibi_slopes=slopes.astype(np.float32))


@pytest.mark.parametrize("sink", [-200.0, 0.0, 80.0, 1000.0])
def test_a_sink_of_any_size_takes_its_share(sink):
    batch, sequences = batch_of("float32")
    assert_as_accurate_as_torch(batch, sequences, "float32", sinks=np.full(6, sink, np.float32))


# ---- values that are not finite --------------------------------------------------------------------------
@pytest.mark.parametrize("isa", supported_isas())
@pytest.mark.parametrize(
    ("dtype", "poison"),
    [(dtype, poison) for dtype in DTYPES for poison in (np.nan, np.inf, -np.inf)]
    + [(dtype, np.nan) for dtype in QUANTISED if "float8" in dtype],
)
def test_what_a_query_must_not_see_cannot_harm_it(dtype, poison, isa):
    """Keys and values after a query, or before its window, may hold anything: a weight of 0 is not enough."""
    _native.cpu.set_isa(isa)
    rng = np.random.default_rng(4)
    s = random_sequence(rng, dtype, HEADS, 150, 70)
    k, v = s.k.copy(), s.v.copy()
    k[120], v[120] = poison, poison
    poisoned = paged([Sequence(s.q, k, v)], dtype)
    for window in (None, 20):
        got = [numbers(x) for x in poisoned.attend(window=window)]
        want = [numbers(x) for x in paged([s], dtype).attend(window=window)]
        first = 120 - 80  # the query at position 120
        last = first + window if window else 70
        for a, b in zip(got, want, strict=True):
            np.testing.assert_array_equal(a[:first], b[:first])
            np.testing.assert_array_equal(a[last:], b[last:])
        assert not np.isfinite(got[0][first:last]).all(axis=(1, 2)).any()


@pytest.mark.parametrize("isa", supported_isas())
@pytest.mark.parametrize("pattern", [0x7FC00000, 0x7FFFFFFF, -1, 0x7FA00001])
def test_a_nan_of_any_pattern_among_keys_or_values_shows(pattern, isa):
    _native.cpu.set_isa(isa)
    rng = np.random.default_rng(5)
    for part in ("k_cache", "v_cache"):
        batch = paged([random_sequence(rng, "float32", Heads(2, 2, 16), 100)], "float32")
        cache = batch.arguments[part]
        block, slot = batch.arguments["block_table"][0, 50 // 16], 50 % 16
        cache[block, slot, 0].view(np.int32)[3] = pattern
        out, lse = batch.attend()
        dims = slice(None) if part == "k_cache" else 3
        assert np.isnan(out[0, 0, dims]).all()
        assert np.isnan(lse[0, 0]) == (part == "k_cache")
        assert np.isfinite(out[0, 1]).all()


def test_scores_of_minus_infinity_have_no_weight():
    s = random_sequence(np.random.default_rng(6), "float32", Heads(1, 1, 8), 40)
    q, k = np.abs(s.q), s.k.copy()
    k[5], k[39] = -np.inf, -np.inf
    got = paged([Sequence(q, k, s.v)], "float32").attend()
    rest = [i for i in range(40) if i not in (5, 39)]
    want = paged([Sequence(q, k[rest], s.v[rest])], "float32").expected()
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_large_finite_values_do_not_overflow():
    s = random_sequence(np.random.default_rng(7), "float32", Heads(2, 1, 16), 500)
    batch = paged([Sequence(s.q * 1e15, s.k * 1e15, s.v * 1e37)], "float32")
    out, lse = batch.attend()
    want_out, want_lse = batch.expected()
    np.testing.assert_allclose(out, want_out, rtol=1e-5)
    np.testing.assert_allclose(lse, want_lse, rtol=1e-5)


def test_no_output_is_a_negative_zero():
    s = random_sequence(np.random.default_rng(8), "float32", HEADS, 80, 5)
    out, _ = paged([Sequence(s.q, s.k, np.full_like(s.v, -0.0))], "float32").attend()
    assert not np.signbit(out).any()


def test_half_precision_saturates_to_infinity_as_casts_do():
    values = np.full((1, 1, 8), 65504.0, np.float32)
    q = np.zeros((1, 1, 8), np.float32)
    out, _ = paged([Sequence(q, values * 0, values)], "float16").attend()
    assert (numbers(out) == 65504.0).all()
    assert array_of(values, "float16")[1].max() == 65504.0
