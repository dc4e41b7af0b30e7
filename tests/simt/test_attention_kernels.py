"""paged_attention() on the device: at most twice torch's own error, for all shapes and options."""

import numpy as np
import pytest
from attention_cases import (
    DTYPES,
    EVERY_CACHE,
    LAYOUTS,
    QUANTISED,
    Heads,
    assert_as_accurate_as_torch,
    random_sequence,
)
from attention_device import device_paged

HALVES = ["float16", "bfloat16"]
SLOPES = (2.0 ** -np.arange(1, 7)).astype(np.float32)
SINKS = np.float32([-3, 0, 1.5, 5, -50, 2])
OPTIONS = {"scale": 0.3, "window": 37, "softcap": 4.0, "alibi_slopes": SLOPES, "sinks": SINKS}


def check(device, dtype, heads, lengths, seed=0, spread=1.0, options=None, **how):
    rng = np.random.default_rng([80, seed, heads.head_dim])
    sequences = [random_sequence(rng, dtype, heads, n, m, spread) for n, m in lengths]
    batch = device_paged(device, sequences, dtype, {"seed": seed, "together": 2}, **how)
    assert_as_accurate_as_torch(batch, sequences, dtype, **(options or {}))


# ---- shapes -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("head_dim", [8, 24, 64, 72, 80, 96, 112, 120, 128, 136, 192, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_head_size(device, dtype, head_dim):
    check(device, dtype, Heads(3, 1, head_dim), [(150, 1), (17, 1), (1, 1), (40, 7)])


@pytest.mark.parametrize("head_dim", [8, 24, 64, 72, 128, 200])
@pytest.mark.parametrize("dtype", QUANTISED)
def test_every_head_size_of_quantised_caches(device, dtype, head_dim):
    check(device, dtype, Heads(6, 2, head_dim), [(150, 1), (17, 1), (40, 7)])


@pytest.mark.parametrize("group", [1, 4, 7, 8, 16, 33])
@pytest.mark.parametrize("dtype", [*HALVES, "bfloat16/float8_e4m3"])
def test_every_grouping_of_query_heads(device, dtype, group):
    check(device, dtype, Heads(2 * group, 2, 64), [(70, 1), (33, 2), (1, 1)])


@pytest.mark.parametrize("queries", range(1, 9))
@pytest.mark.parametrize("group", [1, 4, 8])
def test_up_to_eight_queries_a_sequence(device, group, queries):
    check(device, "bfloat16", Heads(group, 1, 64), [(300, queries), (queries, queries), (17, 1)])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("block_size", [1, 3, 16, 256])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16/int8"])
def test_every_layout_and_block_size(device, dtype, block_size, layout):
    check(device, dtype, Heads(4, 2, 64), [(50, 1), (33, 3), (0, 1)], block_size=block_size, layout=layout)


@pytest.mark.parametrize("dtype", EVERY_CACHE)
def test_ragged_lengths_at_the_edges_of_slices_chunks_and_blocks(device, dtype):
    edges = [0, 1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 0, 255, 256, 257]
    check(device, dtype, Heads(2, 1, 136), [(n, 1) for n in edges], block_size=17)


@pytest.mark.parametrize("dtype", [*DTYPES, "float16/float8_e4m3"])
def test_a_prefill_beside_decodes(device, dtype):
    check(device, dtype, Heads(8, 1, 64), [(90, 1), (70, 33), (40, 40), (0, 0), (600, 20)])


@pytest.mark.parametrize("spread", [0.1, 8.0])
@pytest.mark.parametrize("dtype", EVERY_CACHE)
def test_flat_and_sharp_weights(device, dtype, spread):
    check(device, dtype, Heads(4, 1, 128), [(600, 1), (17, 3)], spread=spread)


def test_more_sequences_than_threads_scan_at_once(device):
    lengths = [(n % 5, 1) for n in range(300)]
    check(device, "bfloat16", Heads(1, 1, 64), lengths)


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [64, 80, 96, 112, 128, 192, 256])
@pytest.mark.parametrize("group", [1, 4, 7, 8, 16])
@pytest.mark.parametrize("dtype", EVERY_CACHE)
def test_every_head_size_with_every_group_and_long_contexts(device, dtype, group, head_dim):
    heads = Heads(2 * group, 2, head_dim)
    for seed, block_size in enumerate((1, 3, 16, 256)):
        lengths = [(700, 1), (513, 3), (257, 1), (1, 1)]
        check(device, dtype, heads, lengths, seed, 2.0, block_size=block_size)


@pytest.mark.slow
@pytest.mark.parametrize("window", [None, 3000])
def test_more_chunks_than_lanes(device, window):
    """130 chunks and more: the last ones join the lanes of the first."""
    check(
        device, "bfloat16", Heads(1, 1, 136), [(128 * 129 + 30, 1)], options={"window": window}, block_size=64
    )


# ---- options ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", EVERY_CACHE)
def test_each_option(device, dtype, name):
    lengths = [(150, 1), (90, 9), (1, 1), (0, 1)]
    check(device, dtype, Heads(6, 2, 64), lengths, spread=2.0, options={name: OPTIONS[name]})


@pytest.mark.parametrize("dtype", EVERY_CACHE)
def test_all_options_together(device, dtype):
    check(device, dtype, Heads(6, 2, 80), [(300, 1), (90, 30), (33, 2), (0, 1)], spread=2.0, options=OPTIONS)


@pytest.mark.parametrize("window", [1, 2, 15, 16, 17, 64, 127, 128, 129])
def test_windows_at_the_edges_of_slices_and_chunks(device, window):
    lengths = [(300, 1), (150, 20)]
    check(device, "float16", Heads(2, 1, 136), lengths, options={"window": window})


@pytest.mark.parametrize("softcap", [0.01, 1.0, 50.0, 1e4])
def test_soft_caps_from_flat_to_none(device, softcap):
    check(device, "float32", Heads(4, 2, 64), [(90, 1), (33, 5)], spread=8.0, options={"softcap": softcap})
