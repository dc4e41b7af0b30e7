"""A query's bits on the device depend on its own sequence alone, however the launch is divided."""

import itertools

import numpy as np
import pytest
from attention_cases import DTYPES, EVERY_CACHE, Heads, assert_same_bits, bits, numbers, random_sequence
from attention_device import DIVISIONS, device_paged

import tokenstep as ts

HEADS = {"GQA": Heads(8, 2, 64), "MQA": Heads(7, 1, 80), "wide": Heads(40, 1, 64)}
LENGTHS = [(560, 1), (70, 19), (0, 1), (1, 1), (25, 25), (257, 1), (130, 2), (31, 1), (300, 5)]
OPTIONS = {
    "plain": {},
    "window": {"window": 100},
    "all": {"window": 150, "softcap": 5.0, "scale": 0.2, "alibi_slopes": True, "sinks": True},
}


NAN_CACHES = (*DTYPES, "float16/float8_e4m3", "bfloat16/float8_e4m3")

FAST = {
    ("bfloat16", "GQA", "all"),
    ("float16", "MQA", "window"),
    ("bfloat16", "wide", "plain"),
    ("float32", "GQA", "all"),
    ("bfloat16/float8_e4m3", "GQA", "all"),
    ("bfloat16/int8", "wide", "window"),
}
every_case = pytest.mark.parametrize(
    ("dtype", "heads", "options"),
    [
        pytest.param(*case, marks=[] if case in FAST else pytest.mark.slow)
        for case in itertools.product(EVERY_CACHE, HEADS, OPTIONS)
    ],
)


def sequences_of(dtype, heads, lengths=LENGTHS, seed=0):
    rng = np.random.default_rng([90, seed])
    return [random_sequence(rng, dtype, heads, n, m, 2.0) for n, m in lengths]


def run(device, sequences, dtype, heads, options="plain", division=None, **how):
    """The bits of (out, lse) of each sequence."""
    batch = device_paged(device, sequences, dtype, division, **how)
    arrays = {
        "alibi_slopes": np.linspace(0.5, 0.01, heads.num_heads),
        "sinks": np.linspace(-2, 3, heads.num_heads),
    }
    chosen = {n: arrays[n].astype(np.float32) if o is True else o for n, o in OPTIONS[options].items()}
    if not isinstance(batch.arguments["q"], np.ndarray):
        import torch

        chosen = {n: torch.from_numpy(o) if isinstance(o, np.ndarray) else o for n, o in chosen.items()}
    out, lse = batch.attend(**chosen)
    return list(zip(batch.split(bits(out)), batch.split(bits(lse)), strict=True))


def assert_equal(got, want, what):
    for a, b in zip(got, want, strict=True):
        assert np.array_equal(a, b), what


@every_case
def test_alone_and_in_any_batch_and_place(device, dtype, heads, options):
    heads = HEADS[heads]
    sequences = sequences_of(dtype, heads)
    together = run(device, sequences, dtype, heads, options, {"seed": 1, "together": 3})
    order = np.random.default_rng(1).permutation(len(sequences))
    shuffled = run(device, sequences, dtype, heads, options, {"seed": 2, "grid": 5}, order=order)
    for place, i in enumerate(order):
        assert_equal(shuffled[place], together[i], f"sequence {i}, now at {place}")
    for i in (0, 1, 6, 8):
        (alone,) = run(device, sequences[i : i + 1], dtype, heads, options)
        assert_equal(alone, together[i], f"sequence {i}, alone")


@pytest.mark.parametrize("division", DIVISIONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16/float8_e4m3"])
def test_for_any_number_of_blocks_stages_and_slots(device, dtype, division):
    heads = HEADS["GQA"]
    sequences = sequences_of(dtype, heads, [(560, 1), (1200, 2), (33, 1), (70, 20), (2100, 1)])
    want = run(device, sequences, dtype, heads)
    for seed in range(2):
        got = run(device, sequences, dtype, heads, division=DIVISIONS[division] | {"seed": seed})
        for i, (a, b) in enumerate(zip(got, want, strict=True)):
            assert_equal(a, b, f"sequence {i}, seed {seed}")


@pytest.mark.parametrize("layout", ["NHD", "HND", "joint", "padded"])
def test_for_any_block_size_and_layout(device, layout):
    heads = HEADS["GQA"]
    sequences = sequences_of("bfloat16", heads, LENGTHS[:4])
    want = run(device, sequences, "bfloat16", heads)
    for block_size in (1, 7, 16, 256):
        got = run(device, sequences, "bfloat16", heads, block_size=block_size, layout=layout)
        for a, b in zip(got, want, strict=True):
            assert_equal(a, b, f"blocks of {block_size}")


@every_case
def test_each_query_of_a_prefill_as_if_it_were_decoded(device, dtype, heads, options):
    heads = HEADS[heads]
    (sequence,) = sequences_of(dtype, heads, [(290, 40)])
    ((out, lse),) = run(device, [sequence], dtype, heads, options)
    pieces = [(0, 1), (13, 14), (14, 22), (39, 40)]
    alone = run(device, [sequence.last(*piece) for piece in pieces], dtype, heads, options)
    for (first, end), got in zip(pieces, alone, strict=True):
        assert_equal(got, (out[first:end], lse[first:end]), f"queries {first} to {end}")


@pytest.mark.parametrize(
    "length",
    [128 * 127 + 300, *(pytest.param(n, marks=pytest.mark.slow) for n in (128 * 128, 128 * 129 + 5))],
)
def test_each_query_around_the_last_lane_as_if_it_were_decoded(device, length):
    """Chunks 127 and 128 are the last lane and the first: their order must not depend on the tile."""
    heads = Heads(1, 1, 136)
    (sequence,) = sequences_of("bfloat16", heads, [(length, 140)])
    ((out, lse),) = run(device, [sequence], "bfloat16", heads, "all")  # 9 tiles: one block takes all lanes
    pieces = [(0, 1), (20, 28), (139, 140)]
    alone = run(device, [sequence.last(*piece) for piece in pieces], "bfloat16", heads, "all")
    for (first, end), got in zip(pieces, alone, strict=True):
        assert_equal(got, (out[first:end], lse[first:end]), f"queries {first} to {end}")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", NAN_CACHES)
def test_what_comes_after_a_query_cannot_harm_it(device, dtype, value):
    """Several positions share a tile and its keys: those that only the later ones see may hold anything."""
    heads = HEADS["GQA"]
    (sequence,) = sequences_of(dtype, heads, [(40, 8)])
    ((out, lse),) = run(device, [sequence], dtype, heads)
    sequence.k[37:], sequence.v[37:] = value, value
    ((got, got_lse),) = run(device, [sequence], dtype, heads)
    assert_equal((got[:5], got_lse[:5]), (out[:5], lse[:5]), "queries before it")


@pytest.mark.parametrize("dtype", NAN_CACHES)
def test_what_left_the_window_of_a_query_cannot_harm_it(device, dtype):
    heads = HEADS["MQA"]
    (sequence,) = sequences_of(dtype, heads, [(140, 8)])
    ((out, lse),) = run(device, [sequence], dtype, heads, "window")
    sequence.v[:36] = np.nan  # query 4 stands at 136: it sees 37 and later
    ((got, got_lse),) = run(device, [sequence], dtype, heads, "window")
    assert_equal((got[4:], got_lse[4:]), (out[4:], lse[4:]), "queries behind it")


@pytest.mark.parametrize("dtype", NAN_CACHES)
def test_a_seen_nan_gives_nan(device, dtype):
    heads = HEADS["GQA"]
    for where in ("k", "v"):
        (sequence,) = sequences_of(dtype, heads, [(40, 2)])
        getattr(sequence, where)[20] = np.nan
        batch = device_paged(device, [sequence], dtype)
        out, _ = batch.attend()
        assert np.isnan(numbers(out)).all()


# ---- the workspace ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("division", DIVISIONS)
def test_a_workspace_is_left_as_it_was_found(device, division):
    heads = HEADS["GQA"]
    sequences = sequences_of("float16", heads, [(560, 1), (1200, 2), (33, 1), (70, 20), (2100, 1)])
    batch = device_paged(device, sequences, "float16", DIVISIONS[division])
    want = batch.attend()
    batch.arguments["block_table"] = batch.arguments["block_table"].copy()
    batch.arguments["block_table"][3, 0] = 1 << 30  # a bad sequence too
    size = 1 << 25
    workspace = np.full(size, 0, np.uint8)
    for _ in range(2):
        got = batch.attend(workspace=workspace, status=np.zeros(5, np.int32))
        keep = np.r_[0:4, 24:25]
        assert_same_bits([x[keep] for x in got], [x[keep] for x in want])
    if device.name == "simt":
        slots = DIVISIONS[division].get("slots") or 128 + 4 * 8
        assert not workspace[: 32 + 8 * slots].any()


def test_a_workspace_that_is_too_small_is_refused(device):
    batch = device_paged(device, sequences_of("float16", HEADS["GQA"], [(5, 1)]), "float16")
    with pytest.raises(ValueError, match=r"workspace has 64 bytes at .*, expected at least"):
        batch.attend(workspace=np.zeros(64, np.uint8))


def test_no_sequences_at_all(device):
    caches = [device.array(np.zeros((1, 16, 2, 64), np.float32)) for _ in range(2)]
    table, lengths = np.zeros((0, 4), np.int32), np.zeros(0, np.int32)
    with device.active():
        out, lse = ts.paged_attention(
            device.array(np.zeros((0, 4, 64), np.float32)), *caches, device.array(table),
            device.array(lengths), return_lse=True,
        )  # fmt: skip
    assert tuple(out.shape) == (0, 4, 64)
    assert tuple(lse.shape) == (0, 4)
