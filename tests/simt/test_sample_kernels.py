"""sample() on the device: the CPU's bits for any row, in any batch, with any number of blocks."""

import numpy as np
import pytest
from sample_cases import DTYPES, ROW_KINDS, array_of, assert_same, bitmask, random_case, row_of
from sample_device import GEOMETRIES, as_numpy, sample

from tokenstep import sampling as ts


def geometry_name(geometry):
    return f"{geometry[0]}{geometry[1]}"


every_geometry = pytest.mark.parametrize("geometry", GEOMETRIES, ids=geometry_name)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def check_cases(device, cases, **geometry):
    """Holds the device to the CPU; each case runs in another order of threads."""
    rows = 0
    for i, case in enumerate(cases):
        device.use(seed=i, **geometry)
        want = ts.sample(case.logits, check=False, **case.arguments)
        assert_same(sample(device, case.logits, case.arguments), want, f"case {i}, {case.logits.shape},")
        rows += len(want.tokens)
    return rows


def random_cases(dtype, seed, sizes, count, num_rows=4):
    """Batches in which every row has its own shape and parameters."""
    pytest.importorskip("torch")
    for i in range(count):
        rng = np.random.default_rng([30, seed, i])
        yield random_case(rng, dtype, int(rng.choice(sizes)), num_rows)


SMALL = (1, 2, 7, 31, 33, 257, 1000)


@every_dtype
@every_geometry
def test_rows_of_every_kind_equal_the_cpu(device, geometry, dtype):
    assert check_cases(device, random_cases(dtype, 0, SMALL, 14), geometry=geometry) == 56


@pytest.mark.slow
@every_dtype
@every_geometry
def test_thousands_of_rows_equal_the_cpu(device, geometry, dtype):
    rows = check_cases(device, random_cases(dtype, 1, SMALL, 70), geometry=geometry)
    rows += check_cases(device, random_cases(dtype, 2, (2050, 4099, 8192), 40), geometry=geometry)
    assert rows == 440  # of 5,280 in all


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@every_geometry
def test_blocks_of_512_threads_equal_the_cpu(device, geometry, dtype):
    check_cases(device, random_cases(dtype, 3, (1, 33, 1000, 8192), 12), geometry=geometry, threads=512)


LONG = {("solo", 1): 128256, ("cluster", 2): 128256, ("cluster", 8): 1 << 18, ("soft", 3): 1 << 18}


@every_dtype
@every_geometry
def test_rows_of_real_vocabularies_equal_the_cpu(device, geometry, dtype):
    check_cases(device, random_cases(dtype, 4, (LONG[geometry],), 1, num_rows=2), geometry=geometry)


@pytest.mark.slow
@every_dtype
@every_geometry
def test_the_largest_vocabulary_equals_the_cpu(device, geometry, dtype):
    check_cases(device, random_cases(dtype, 5, (1 << 18, 151936, 50257), 4), geometry=geometry)


# ---- ways through the kernel ------------------------------------------------------------------------------
WAYS = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.8},
    "top_k": {"top_k": 50},
    "large top_k": {"top_k": 1500},
    "top_p": {"top_p": 0.9},
    "wide top_p": {"top_p": 0.9999, "temperature": 2.0},
    "min_p": {"min_p": 0.05},
    "low min_p": {"min_p": 1e-6},
    "all": {"top_k": 40, "top_p": 0.9, "min_p": 0.01, "temperature": 0.7},
}


@every_geometry
@pytest.mark.parametrize("way", WAYS)
def test_each_way_through_the_kernel_equals_the_cpu_for_each_kind_of_row(device, geometry, way):
    rng = np.random.default_rng([31, list(WAYS).index(way)])
    values = np.stack([row_of(rng, kind, 3000) for kind in ROW_KINDS])
    logits, _ = array_of(values, "float32")
    arguments = {**WAYS[way], "seed": list(range(len(values))), "logprobs": 3, "logprobs_mode": "processed"}
    device.use(geometry)
    assert_same(sample(device, logits, arguments), ts.sample(logits, check=False, **arguments))


@every_geometry
def test_ties_across_blocks_are_cut_at_the_right_ids(device, geometry):
    logits = np.zeros((4, 6000), np.float32)
    logits[1, ::3] = 1.0
    logits[2, 5000:] = 2.0
    logits[3, :100] = -1.0
    arguments = {
        "top_k": [1000, 1500, 700, 5850],
        "top_p": [1.0, 0.5, 0.999, 0.25],
        "seed": 1,
        "position": [1, 2, 3, 4],
        "logprobs": 20,
    }
    device.use(geometry)
    for mode in ("raw", "processed"):
        want = ts.sample(logits, logprobs_mode=mode, **arguments)
        assert_same(sample(device, logits, {**arguments, "logprobs_mode": mode}), want, mode)


# ---- memory around the rows -------------------------------------------------------------------------------
@every_dtype
@pytest.mark.parametrize("vocab_size", [1, 3, 8, 250, 1001])
def test_rows_that_begin_anywhere_in_memory_read_nothing_around_them(device, dtype, vocab_size):
    """Full of NaN between the rows; the emulator ends a launch that touches it."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng([32, vocab_size])
    for offset in range(0, 9, 2 if vocab_size > 8 else 1):
        case = random_case(rng, dtype, vocab_size, 3, kinds=("normal", "peaked", "few_values"))
        tight = torch.as_tensor(case.logits)
        memory = torch.full((3, vocab_size + 17), float("nan"), dtype=tight.dtype)
        view = device_view(device, memory)[:, offset : offset + vocab_size]
        view.copy_(tight)
        device.use(("cluster", 2), seed=offset)
        with device.active():
            got = ts.sample(view, check=False, **on_torch(device, case.arguments))
        assert_same([as_numpy(a) for a in got], ts.sample(case.logits, check=False, **case.arguments))


def device_view(device, memory):
    return memory.cuda() if device.name == "cuda" else memory


def on_torch(device, arguments):
    return {k: device.array(v) if k == "token_bitmask" else v for k, v in arguments.items()}


def test_the_last_place_of_the_largest_vocabulary_is_reached_from_a_misaligned_row(device):
    torch = pytest.importorskip("torch")
    size = 1 << 18
    memory = torch.zeros(2 * size, dtype=torch.bfloat16)
    memory[3 + size - 1] = 9.0
    row = device_view(device, memory)[3 : 3 + size][None]
    arguments = [
        {"temperature": 0.0},
        {"temperature": 0.05},
        {"top_p": 0.9999, "temperature": 1.5, "seed": 3, "top_k": size - 1},
    ]
    for geometry in GEOMETRIES[:2]:
        device.use(geometry)
        for given in arguments:
            with device.active():
                got = ts.sample(row, check=False, **given)
            assert_same([as_numpy(a) for a in got], ts.sample(row.cpu(), check=False, **given))


def test_a_mask_in_strided_memory_is_read_where_its_rows_lie(device):
    rng = np.random.default_rng(33)
    logits = rng.standard_normal((3, 1000)).astype(np.float32)
    mask = bitmask(rng, 3, 1000)
    memory = np.zeros((3, 40), np.int32)
    memory[:, 5:37] = mask
    device.use(("cluster", 2))
    wide = device.array(memory)[:, 5:37]
    with device.active():
        got = ts.sample(device.array(logits), token_bitmask=wide, seed=1, check=False)
    assert_same([as_numpy(a) for a in got], ts.sample(logits, token_bitmask=mask, seed=1, check=False))


# ---- independence -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("order", ["reversed", "alone"])
def test_a_row_does_not_depend_on_its_place_or_its_neighbours(device, order):
    case = random_case(np.random.default_rng(34), "float32", 700, 8)
    want = ts.sample(case.logits, check=False, **case.arguments)
    device.use(("cluster", 3))
    if order == "alone":
        for b in range(8):
            row = case.row(b)
            got = sample(device, row.logits, row.arguments)
            assert_same(got, [None if a is None else np.asarray(a)[b : b + 1] for a in want], f"row {b}")
        return
    shared = ("logprobs", "logprobs_mode")
    backwards = {k: v if k in shared else v[::-1] for k, v in case.arguments.items()}
    backwards = {k: v.copy() if isinstance(v, np.ndarray) else v for k, v in backwards.items()}
    got = sample(device, case.logits[::-1].copy(), backwards)
    assert_same([None if a is None else a[::-1] for a in got], want)


def test_soft_groups_take_one_row_after_another(device):
    device.use(("soft", 3))
    case = random_case(np.random.default_rng(35), "bfloat16", 500, 13)
    assert_same(
        sample(device, case.logits, case.arguments), ts.sample(case.logits, check=False, **case.arguments)
    )


def test_the_geometry_is_a_function_of_sizes_and_uses_idle_multiprocessors(device):
    device.close()
    geometry = device.module.testing.sample_geometry
    few = geometry(128256, 2, 1)
    assert few[0] != "solo"
    assert few[1] > 1
    assert geometry(128256, 2, 100_000) == ("solo", 1, 100_000)
    assert geometry(1000, 2, 1) == ("solo", 1, 1)


# ---- what only the device knows ---------------------------------------------------------------------------
def test_parameters_in_arrays_on_the_device_mean_what_lists_mean(device):
    rng = np.random.default_rng(36)
    case = random_case(rng, "float32", 300, 6, kinds=("normal", "few_values"))
    names = {
        "temperature": np.float32, "top_k": np.int64, "top_p": np.float64, "min_p": np.float32,
        "repetition_penalty": np.float64, "presence_penalty": np.float32, "frequency_penalty": np.float64,
        "seed": np.int64, "substream": np.int64,
    }  # fmt: skip
    arrays = {k: device.array(np.array(case.arguments[k], dtype)) for k, dtype in names.items()}
    positions = np.array(case.arguments["position"], np.uint64)
    arrays["position"] = device.array(positions.view(np.int64) & np.int64(2**62 - 1))
    want = {**case.arguments, "position": [int(p) & (2**62 - 1) for p in positions]}
    device.use(("solo", 1))
    assert_same(
        sample(device, case.logits, {**case.arguments, **arrays}),
        ts.sample(case.logits, check=False, **want),
    )


OUT_OF_RANGE = {
    "temperature": -0.5,
    "top_p": 1.5,
    "min_p": -0.1,
    "repetition_penalty": 0.0,
    "presence_penalty": np.inf,
    "frequency_penalty": np.nan,
    "position": -1,
    "substream": 1 << 40,
}


@pytest.mark.parametrize("name", OUT_OF_RANGE)
def test_a_row_whose_parameter_is_out_of_range_on_the_device_has_status_3(device, name):
    logits = np.random.default_rng(37).standard_normal((3, 100)).astype(np.float32)
    is_float = isinstance(OUT_OF_RANGE[name], float)
    good = 1
    values = np.array([good, OUT_OF_RANGE[name], good], np.float32 if is_float else np.int64)
    device.use(("cluster", 2))
    tokens, status, logprobs, ranks, top_tokens, top_logprobs = sample(
        device, logits, {name: device.array(values), "seed": 5, "logprobs": 2}
    )
    want = ts.sample(logits, **{name: good}, seed=5, logprobs=2)
    assert status.tolist() == [0, 3, 0]
    assert tokens.tolist() == [want.tokens[0], -1, want.tokens[2]]
    assert np.isnan(logprobs[1])
    assert ranks[1] == 0
    assert top_tokens[1].tolist() == [-1, -1]
    assert np.isnan(top_logprobs[1]).all()
    assert np.array_equal(top_tokens[[0, 2]], want.top_tokens[[0, 2]])


def test_check_raises_for_a_bad_row_only_when_it_is_asked_to(device):
    logits = np.zeros((2, 10), np.float32)
    logits[1, 3] = np.nan
    with device.active():
        assert as_numpy(ts.sample(device.array(logits), seed=1).status).tolist() == [0, 1]
        with pytest.raises(ValueError, match=r"logits\[1\] holds NaN or \+inf \(status 1\)"):
            ts.sample(device.array(logits), seed=1, check=True)


def test_values_that_the_host_has_are_checked_before_anything_runs(device):
    logits = device.array(np.zeros((2, 10), np.float32))
    with device.active():
        with pytest.raises(ValueError, match=r"tokenstep.sample: top_p\[1\] = 1.7, expected 0 ≤ top_p ≤ 1"):
            ts.sample(logits, top_p=[1, 1.7])
        with pytest.raises(ValueError, match=r"prompt_tokens\[0\]\[0\] = 10, expected 0 ≤ id < 10"):
            ts.sample(logits, prompt_tokens=[[10], []])


def test_no_rows_give_empty_outputs(device):
    out = sample(device, np.zeros((0, 10), np.float32), {"logprobs": 2})
    assert [a.shape for a in out] == [(0,), (0,), (0,), (0,), (0, 2), (0, 2)]
