"""Right kernels pass: what the emulator runs gives what CUDA's manual says, in every order of threads."""

import numpy as np
import pytest
from tokenstep._C_simt import testing

SEEDS = range(12)


def integers(*shape, low=-100, high=100, seed=0, dtype=np.int32):
    return np.random.default_rng(seed).integers(low, high, shape).astype(dtype)


# ---- the order of threads ----------------------------------------------------------------------------------
def arrivals(seed, blocks=4, threads=64):
    out = np.full(blocks * threads, -1, np.int32)
    testing.order_of_arrival(out, blocks, threads, seed)
    assert sorted(out) == list(range(blocks * threads))
    return out


def test_the_order_of_threads_depends_on_the_seed_and_on_nothing_else():
    assert all(np.array_equal(arrivals(seed), arrivals(seed)) for seed in SEEDS)
    assert len({arrivals(seed).tobytes() for seed in SEEDS}) == len(SEEDS)


def test_whole_warps_and_whole_blocks_are_sometimes_late():
    def latecomers(size):
        last = [arrivals(seed)[-size:] // size for seed in range(40)]
        return sum(len(set(group)) == 1 for group in last)

    assert latecomers(32) >= 5
    assert latecomers(64) >= 3


@pytest.mark.parametrize(
    ("grid", "block"), [((2, 3, 4), (5, 2, 3)), ((7, 1, 1), (1, 1, 33)), ((1, 1, 2), (8, 8, 2))]
)
def test_threads_know_where_they_are_in_three_dimensions(grid, block):
    out = np.empty((*grid[::-1], *block[::-1], 6), np.int32)
    testing.positions(out.reshape(-1), grid, block)
    for index in np.ndindex(out.shape[:-1]):
        assert tuple(out[index]) == (*index[2::-1], *index[:2:-1])


# ---- warps -------------------------------------------------------------------------------------------------
def expected_intrinsics(x, split, width, argument):
    """The 16 rows of `intrinsics`, for one warp that may be short of lanes."""
    lanes = range(len(x))
    rows = np.empty((16, len(x)), np.int64)
    unsigned = [int(v) & 0xFFFFFFFF for v in x]
    for lane in lanes:
        first, last = lane & ~(width - 1), lane | (width - 1)
        inside = [i for i in lanes if (i < split) == (lane < split)]
        values = [int(x[i]) for i in inside]
        bits = [unsigned[i] for i in inside]
        sources = [
            first | (argument & (width - 1)),
            lane - argument if lane - argument >= first else lane,
            lane + argument if lane + argument <= last else lane,
            lane ^ argument if lane ^ argument <= last else lane,
        ]
        rows[:4, lane] = [x[s] for s in sources] if split == 32 else x[lane]
        rows[4:, lane] = [
            sum(1 << i for i in inside if x[i] > 0),
            any(v > 90 for v in values),
            all(v > -90 for v in values),
            sum(1 << i for i in inside if int(x[i] / 8) == int(x[lane] / 8)),
            sum(values),
            min(values),
            max(values),
            min(bits),
            max(bits),
            np.bitwise_and.reduce(bits),
            np.bitwise_or.reduce(bits),
            np.bitwise_xor.reduce(bits),
        ]
    return rows.astype(np.uint64).astype(np.uint32).view(np.int32)


@pytest.mark.parametrize(
    ("split", "width", "argument"),
    [
        (32, 32, 0),
        (32, 32, 1),
        (32, 16, 5),
        (32, 8, 7),
        (32, 4, 3),
        (32, 32, 31),
        (16, 32, 0),
        (5, 32, 0),
        (31, 32, 0),
    ],
)
def test_warp_intrinsics_are_those_of_the_manual(split, width, argument):
    for seed in SEEDS:
        x = integers(96, seed=seed)
        out = np.empty((16, 96), np.int32)
        testing.intrinsics(x, out, 96, seed, split, width, argument)
        for warp in range(3):
            lanes = slice(32 * warp, 32 * warp + 32)
            assert np.array_equal(out[:, lanes], expected_intrinsics(x[lanes], split, width, argument))


def test_a_last_warp_may_be_short_of_lanes():
    x = integers(40)
    out = np.empty((16, 40), np.int32)
    testing.intrinsics(x, out, 40, 0, 32, 8, 3)
    assert np.array_equal(out[:, 32:], expected_intrinsics(x[32:], 32, 8, 3))


def test_barriers_count_votes():
    for seed in SEEDS:
        x = integers(160, seed=seed)
        out = np.empty((160, 3), np.int32)
        testing.block_votes(x, out, 160, seed)
        assert np.array_equal(out, np.tile([(x > 0).sum(), (x > 90).any(), (x > -90).all()], (160, 1)))


# ---- memory ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.int64])
@pytest.mark.parametrize("threads", [1, 33, 128])
def test_prefix_sums_in_shared_memory(dtype, threads):
    for seed in SEEDS:
        x = integers(threads, seed=seed, dtype=dtype)
        out = np.empty_like(x)
        testing.prefix_sums(x, out, threads, seed)
        assert np.array_equal(out, np.cumsum(x, dtype=dtype))


def test_atomics_on_shared_and_global_memory():
    for seed in SEEDS:
        x = integers(96, low=0, high=1 << 30, seed=seed, dtype=np.uint32)
        out, grid_sum = np.empty((3, 13), np.uint64), np.zeros(1, np.uint32)
        testing.atomics(x, out, grid_sum, 3, 96, seed)
        total, wide = int(x.sum(dtype=np.uint64)), 0x100000001
        assert grid_sum[0] == 3 * total % (1 << 32)
        expected = [total % (1 << 32), x.min(), x.max(), np.bitwise_and.reduce(x), np.bitwise_or.reduce(x)]
        expected += [np.bitwise_xor.reduce(x), 96 % 10, x.min(), x.max(), total * wide % (1 << 64)]
        expected += [int(x.max()) * wide, total, 96]
        assert [[int(v) for v in block] for block in out] == [[int(v) for v in expected]] * 3


def test_warps_meet_at_named_barriers():
    x = integers(5 * 64)
    for seed in SEEDS:
        out = np.empty_like(x)
        testing.producer_and_consumer(x, out, 128, 5, seed)
        assert np.array_equal(out.reshape(5, 64), x.reshape(5, 64)[:, ::-1])


@pytest.mark.parametrize("chunks", [0, 1, 2, 3, 9])
def test_copies_pass_through_a_ring_of_stages(chunks):
    x = integers(64, max(chunks, 1), 4)
    for seed in SEEDS:
        out = np.empty(64, np.int32)
        testing.ring_sum(x, out, 64, chunks, seed)
        assert np.array_equal(out, x.sum(axis=(1, 2)) if chunks else np.zeros(64, np.int32))


# ---- clusters and grids ------------------------------------------------------------------------------------
@pytest.mark.parametrize(("cluster", "threads"), [(1, 64), (2, 32), (4, 96), (8, 32)])
def test_blocks_of_a_cluster_read_each_other(cluster, threads):
    x = integers(8, threads, low=0)
    value = x.reshape(-1, cluster, threads)
    for _ in range(3):
        value = value.sum(axis=1, keepdims=True) % 1000 + np.arange(cluster)[None, :, None]
    for seed in SEEDS:
        out = np.empty_like(x)
        testing.cluster_sum(x, out, 8, threads, cluster, 3, seed)
        assert np.array_equal(out.reshape(value.shape), value)


@pytest.mark.parametrize("blocks", [1, 2, 7, 40])
def test_blocks_of_a_grid_meet_at_a_barrier_of_their_own(blocks):
    value = np.arange(blocks) + 1
    for _ in range(4):
        value = value.sum() % 1000 + np.arange(blocks)
    for seed in SEEDS:
        mail, out = np.empty(2 * blocks, np.int32), np.empty(blocks, np.int32)
        testing.grid_sums(mail, out, blocks, 4, seed)
        assert np.array_equal(out, value)


@pytest.mark.parametrize("together", [1, 3, 10])
def test_the_last_block_of_a_grid_sees_what_the_others_wrote(together):
    x = integers(10, 32)
    for seed in SEEDS:
        partial, out = np.empty(10, np.int32), np.empty(1, np.int32)
        testing.last_block_adds_up(x, partial, out, 10, together, seed)
        assert out[0] == x.sum()


# ---- tensor cores and 16-bit floats ------------------------------------------------------------------------
def bfloat16_bits(x):
    bits = x.astype(np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(x), 0x7FFF, rounded).astype(np.uint16)


def bfloat16_values(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


@pytest.mark.parametrize("transposed", [False, True], ids=["b_transposed", "b"])
@pytest.mark.parametrize("bfloat16", [False, True], ids=["float16", "bfloat16"])
def test_ldmatrix_and_mma_multiply_matrices(bfloat16, transposed):
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        a, b = rng.standard_normal((16, 16)), rng.standard_normal((16, 8))
        to_bits = bfloat16_bits if bfloat16 else lambda x: x.astype(np.float16).view(np.uint16)
        to_values = bfloat16_values if bfloat16 else lambda bits: bits.view(np.float16)
        a_bits, b_bits = to_bits(a), to_bits(b)
        c = np.empty((16, 8), np.float32)
        stored = np.ascontiguousarray(b_bits if transposed else b_bits.T)
        testing.matmul(a_bits.view(np.uint32), stored.view(np.uint32), c, bfloat16, transposed, seed)
        exact = to_values(a_bits).astype(np.float64) @ to_values(b_bits).astype(np.float64)
        np.testing.assert_allclose(c, exact, rtol=2**-23, atol=2**-23)


@pytest.mark.parametrize("bfloat16", [False, True], ids=["float16", "bfloat16"])
def test_sixteen_bit_floats_convert_and_compare_as_on_the_device(bfloat16):
    rng = np.random.default_rng(0)
    h = rng.permutation(1 << 16).astype(np.uint16)
    values = bfloat16_values(h) if bfloat16 else h.view(np.float16).astype(np.float32)
    x = rng.integers(0, 1 << 32, h.size, dtype=np.uint64).astype(np.uint32).view(np.float32)
    x[: h.size // 2] = rng.standard_normal(h.size // 2) * 2.0 ** rng.integers(-28, 18, h.size // 2)
    x[-h.size // 4 :].view(np.uint32)[:] = values[-h.size // 4 :].view(np.uint32) - 1  # next to what fits
    widened, narrowed, most = np.empty(h.size, np.float32), np.empty_like(h), np.empty_like(h)
    testing.halves(h.view(np.uint8), x, widened, narrowed.view(np.uint8), most.view(np.uint8), bfloat16)

    finite = ~np.isnan(values)
    assert np.array_equal(widened[finite].view(np.uint32), values[finite].view(np.uint32))
    assert np.isnan(widened[~finite]).all()
    with np.errstate(over="ignore"):
        nearest = bfloat16_bits(x) if bfloat16 else x.astype(np.float16).view(np.uint16)
    assert np.array_equal(narrowed, np.where(np.isnan(x), 0x7FFF, nearest))
    other = values[::-1]
    ordered = np.where(values == other, np.minimum(h, h[::-1]), np.where(values > other, h, h[::-1]))
    assert np.array_equal(most, np.where(np.isnan(values) | np.isnan(other), 0x7FFF, ordered))


# ---- launches that cannot be -------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("blocks", "threads", "cluster", "message"),
    [
        (1, 0, 1, "a block must have 1 to 1024 threads"),
        (1, 1025, 1, "a block must have 1 to 1024 threads"),
        (0, 32, 1, "the grid is empty"),
        (6, 32, 4, "not a multiple of the cluster"),
        (32, 32, 17, "a cluster must have 1 to 16 blocks"),
    ],
)
def test_a_launch_that_hardware_would_refuse_is_refused(blocks, threads, cluster, message):
    x = np.zeros(max(blocks * threads, 1), np.int32)
    with pytest.raises(RuntimeError, match=message):
        testing.cluster_sum(x, x.copy(), blocks, threads, cluster, 1, 0)
