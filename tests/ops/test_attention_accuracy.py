"""Attention against the float64 reference: at most twice the error of torch's own computation in the same
dtype, for all shapes."""

import numpy as np
import pytest
from attention_cases import (
    DTYPES,
    EVERY_CACHE,
    UNIT_ROUNDOFF,
    Heads,
    assert_as_accurate_as_torch,
    numbers,
    paged,
    random_sequence,
    row_dtype,
    supported_isas,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tokenstep import _native

HEAD_DIMS = (8, 16, 24, 40, 64, 72, 80, 96, 112, 120, 128, 136, 192, 256)
GROUPS = {
    "MHA": Heads(4, 4, 64),
    "GQA 2": Heads(4, 2, 64),
    "GQA 3": Heads(9, 3, 64),
    "GQA 5": Heads(10, 2, 64),
    "GQA 7": Heads(14, 2, 64),
    "GQA 8": Heads(16, 2, 64),
    "MQA 71": Heads(71, 1, 64),
    "MQA 130": Heads(130, 1, 16),
}


def check(dtype, heads, lengths, block_size=16, spread=1.0, seed=0):
    rng = np.random.default_rng([seed, heads.head_dim, block_size])
    sequences = [random_sequence(rng, dtype, heads, n, m, spread) for n, m in lengths]
    assert_as_accurate_as_torch(paged(sequences, dtype, block_size), sequences, dtype)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", EVERY_CACHE)
def test_every_head_size(dtype, head_dim):
    check(dtype, Heads(6, 2, head_dim), [(300, 1), (17, 1), (64, 5), (40, 40), (1, 1)])


@pytest.mark.parametrize("spread", [0.1, 8.0])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", [*DTYPES, "bfloat16/float8_e4m3"])
def test_flat_and_sharp_weights(dtype, head_dim, spread):
    check(dtype, Heads(8, 2, head_dim), [(2100, 1), (17, 3), (300, 2)], spread=spread)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("dtype", EVERY_CACHE)
def test_every_grouping_of_query_heads(dtype, group):
    check(dtype, GROUPS[group], [(70, 1), (33, 4), (1, 1), (130, 20)])


@pytest.mark.parametrize("block_size", [1, 2, 16, 17, 256])
@pytest.mark.parametrize("dtype", EVERY_CACHE)
def test_ragged_lengths_at_the_edges_of_blocks(dtype, block_size):
    edges = [0, 1, 2, 15, 16, 17, 31, 32, 33, 255, 256, 257, 0, 511, 512, 513]
    check(dtype, Heads(4, 2, 64), [(n, 1) for n in edges], block_size)


@pytest.mark.parametrize("dtype", [*DTYPES, "bfloat16/int8"])
def test_eight_thousand_tokens(dtype):
    check(dtype, Heads(4, 2, 128), [(8192, 1), (8191, 2), (8193, 1)], block_size=17)


@pytest.mark.parametrize("dtype", EVERY_CACHE)
@pytest.mark.parametrize(
    "lengths", [[(200, 200)], [(200, 70), (64, 64), (1, 1), (90, 1), (513, 130)]], ids=str
)
def test_prefill_and_chunked_prefill(dtype, lengths):
    check(dtype, Heads(6, 2, 64), lengths)


@pytest.mark.parametrize("isa", supported_isas())
@pytest.mark.parametrize("dtype", EVERY_CACHE)
def test_every_instruction_set(dtype, isa):
    _native.cpu.set_isa(isa)
    for heads in (Heads(8, 2, 128), Heads(3, 1, 72)):
        check(dtype, heads, [(1100, 1), (90, 33), (1, 1), (0, 1)], spread=3.0)


@st.composite
def batches(draw):
    kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    heads = Heads(kv_heads * group, kv_heads, 8 * draw(st.integers(1, 32)))
    lengths = draw(
        st.lists(
            st.integers(0, 700).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, min(n, 40)))),
            min_size=1,
            max_size=4,
        )
    )
    return {
        "heads": heads,
        "lengths": lengths,
        "dtype": draw(st.sampled_from(EVERY_CACHE)),
        "block_size": draw(st.integers(1, 70)),
        "layout": draw(st.sampled_from(["NHD", "HND", "joint", "padded"])),
        "isa": draw(st.sampled_from(supported_isas())),
        "window": draw(st.none() | st.integers(1, 800)),
        "spread": draw(st.sampled_from([0.1, 1.0, 5.0])),
        "seed": draw(st.integers(0, 1 << 30)),
    }


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=batches())
def test_any_batch_is_within_the_rounding_of_its_dtype(case):
    """The bound: weights and outputs rounded to the dtype, and scores computed in float32."""
    rng = np.random.default_rng(case["seed"])
    dtype = case["dtype"]
    sequences = [random_sequence(rng, dtype, case["heads"], n, m, case["spread"]) for n, m in case["lengths"]]
    if not sum(len(s.q) for s in sequences):
        return
    _native.cpu.set_isa(case["isa"])
    batch = paged(sequences, dtype, case["block_size"], case["layout"], rng)
    out, lse = batch.attend(window=case["window"])
    want_out, want_lse = batch.expected(window=case["window"])
    largest_value = max((np.abs(s.v).max(initial=0) for s in sequences), default=0)
    largest_score = 5 * case["spread"] * np.sqrt(case["heads"].head_dim)
    single = 2.0**-24 * 8 * (1 + largest_score)
    assert np.abs(numbers(out) - want_out).max() <= largest_value * (
        2 * UNIT_ROUNDOFF[row_dtype(dtype)] + single
    )
    seen = np.isfinite(want_lse)
    assert (numbers(lse)[~seen] == -np.inf).all()
    assert np.abs(numbers(lse) - want_lse)[seen].max(initial=0) <= single
