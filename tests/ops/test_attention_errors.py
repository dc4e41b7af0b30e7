"""What paged_attention, append_kv and merge_attention refuse: each error names op, argument, what was
expected and what came, before anything is written."""

import inspect
import math
import re

import numpy as np
import pytest
from attention_cases import torch

import tokenstep as ts

R, HQ, HKV, D = 3, 4, 2, 16
BLOCKS, BLOCK_SIZE, COLUMNS = 8, 16, 2


def f32(*shape):
    return np.ones(shape, np.float32)


def i32(*shape):
    return np.zeros(shape, np.int32)


def rope(rows=64, half=8, **kwargs):
    return ts.Rope(f32(rows, half), f32(rows, half), **kwargs)


def attention_arguments():
    cache = (BLOCKS, BLOCK_SIZE, HKV, D)
    return {
        "q": f32(R, HQ, D), "k_cache": f32(*cache), "v_cache": f32(*cache), "block_table": i32(R, COLUMNS),
        "seq_lens": np.full(R, 20, np.int32), "k": f32(R, HKV, D), "v": f32(R, HKV, D), "rope": rope(),
        "out": f32(R, HQ, D), "max_query_len": 2,
    }  # fmt: skip


def append_arguments():
    a = attention_arguments()
    del a["out"], a["max_query_len"]
    return a


def merge_arguments():
    return {"outs": f32(2, R, HQ, D), "lses": f32(2, R, HQ)}


OPS = {
    "paged_attention": attention_arguments,
    "append_kv": append_arguments,
    "merge_attention": merge_arguments,
}


def refused(op, error, words, **changes):
    """The op refuses these arguments with these words, and writes to none of its arrays."""
    arguments = OPS[op]() | changes
    arrays = {n: a for n, a in arguments.items() if isinstance(a, np.ndarray)}
    before = {n: a.copy() for n, a in arrays.items()}
    with pytest.raises(error, match="^" + re.escape(f"tokenstep.{op}: {words}")):
        getattr(ts, op)(**arguments)
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, before[name])


def both(error, words, **changes):
    """Attention and the append refuse these."""
    refused("paged_attention", error, words, **changes)
    refused("append_kv", error, words, **changes)


@pytest.mark.parametrize("op", OPS)
def test_the_arguments_that_these_tests_start_from_are_accepted(op):
    getattr(ts, op)(**OPS[op]())


# ---- what is no array ------------------------------------------------------------------------------------
ARRAYS = {
    "paged_attention": ["q", "k_cache", "v_cache", "block_table", "seq_lens", "k", "v", "query_start",
                        "alibi_slopes", "sinks", "out", "status"],
    "append_kv": ["k", "v", "k_cache", "v_cache", "block_table", "seq_lens", "q", "query_start"],
    "merge_attention": ["outs", "lses"],
}  # fmt: skip
EVERY_ARRAY = [(op, name) for op, names in ARRAYS.items() for name in names]


@pytest.mark.parametrize(
    "value", [[1.0], (1,), 3, "text", b"12345678", object()], ids=lambda v: type(v).__name__
)
@pytest.mark.parametrize(("op", "name"), EVERY_ARRAY)
def test_what_is_no_array_is_refused_by_its_type(op, name, value):
    refused(op, TypeError, f"{name} is a {type(value).__name__}, expected an array", **{name: value})


REQUIRED = [
    (op, n)
    for op in OPS
    for n, p in inspect.signature(getattr(ts, op)).parameters.items()
    if p.default is inspect.Parameter.empty
]


@pytest.mark.parametrize(("op", "name"), REQUIRED)
def test_none_is_refused_where_an_array_is_needed(op, name):
    refused(op, TypeError, f"{name} is ", **{name: None})


def test_new_keys_and_values_come_together():
    refused("paged_attention", TypeError, "k is None, expected an array like v", k=None)
    refused("paged_attention", TypeError, "v is None, expected an array like k", v=None)
    refused("append_kv", TypeError, "v is None, expected an array like k", v=None)


@pytest.mark.parametrize(
    "value", [3, "yes", f32(64, 8), (f32(64, 8), f32(64, 8))], ids=lambda v: type(v).__name__
)
def test_a_rope_is_a_rope(value):
    article = "an" if type(value).__name__[0] in "aeiou" else "a"
    both(
        TypeError, f"rope is {article} {type(value).__name__}, expected a tokenstep.Rope or None", rope=value
    )


def test_the_tables_of_a_rope_are_arrays():
    both(TypeError, "rope.cos is a NoneType, expected an array", rope=ts.Rope(None, None))
    both(TypeError, "rope.sin is a list, expected an array", rope=ts.Rope(f32(64, 8), [1.0]))


# ---- dtypes ----------------------------------------------------------------------------------------------
FLOATS = "float32 or float16 or bfloat16"


@pytest.mark.parametrize("dtype", ["float64", "int32", "uint8"])
@pytest.mark.parametrize(
    ("op", "name", "expected"),
    [
        ("paged_attention", "q", FLOATS),
        ("append_kv", "k", FLOATS),
        ("merge_attention", "outs", FLOATS),
        ("paged_attention", "k_cache", "float32"),
        ("paged_attention", "v_cache", "float32"),
        ("paged_attention", "k", "float32"),
        ("append_kv", "v", "float32"),
        ("append_kv", "q", "float32"),
        ("paged_attention", "out", "float32"),
        ("merge_attention", "lses", "float32"),
    ],
)
def test_other_dtypes_of_values_are_refused(op, name, expected, dtype):
    changed = OPS[op]()[name].astype(dtype)
    refused(op, TypeError, f"{name} has dtype {dtype}, expected {expected}", **{name: changed})


@pytest.mark.parametrize("dtype", ["int64", "uint32", "float32"])
@pytest.mark.parametrize("name", ["block_table", "seq_lens", "query_start"])
def test_other_dtypes_of_indices_are_refused(name, dtype):
    array = {"query_start": np.arange(R + 1)}.get(name, attention_arguments().get(name)).astype(dtype)
    both(TypeError, f"{name} has dtype {dtype}, expected int32", **{name: array})


def test_other_dtypes_of_options_are_refused():
    for name in ("alibi_slopes", "sinks"):
        refused(
            "paged_attention", TypeError, f"{name} has dtype float64, expected float32", **{name: np.ones(HQ)}
        )
    refused(
        "paged_attention", TypeError, "status has dtype int64, expected int32", status=np.zeros(R, np.int64)
    )
    both(
        TypeError, "rope.cos has dtype float64, expected float32", rope=ts.Rope(np.ones((64, 8)), f32(64, 8))
    )
    both(
        TypeError,
        "rope.sin has dtype float16, expected float32",
        rope=ts.Rope(f32(64, 8), np.ones((64, 8), "f2")),
    )


def test_the_cache_has_the_dtype_of_the_queries():
    half = attention_arguments()["q"].astype(np.float16)
    refused("paged_attention", TypeError, "k_cache has dtype float32, expected float16", q=half)


# ---- quantised caches ------------------------------------------------------------------------------------
def int8_caches(**changes):
    """What makes the ops' caches int8 ones, with changes."""
    cache = np.zeros((BLOCKS, BLOCK_SIZE, HKV, D), np.int8)
    scales = {"k_scale": f32(HKV), "v_scale": f32(HKV)}
    return {"k_cache": cache, "v_cache": cache.copy()} | scales | changes


@pytest.mark.parametrize("op", ["paged_attention", "append_kv"])
def test_quantised_caches_that_these_tests_start_from_are_accepted(op):
    getattr(ts, op)(**OPS[op]() | int8_caches())


def test_keys_and_values_are_quantised_alike():
    words = "v_cache has dtype float32, expected int8"
    both(TypeError, words, **int8_caches(v_cache=f32(BLOCKS, BLOCK_SIZE, HKV, D)))
    fp8 = torch.zeros(BLOCKS, BLOCK_SIZE, HKV, D, dtype=torch.float8_e4m3fn)
    both(TypeError, "v_cache has dtype float8_e4m3, expected int8", **int8_caches(v_cache=fp8))
    words = "k_cache has dtype uint8, expected float32 or float8_e4m3 or int8"
    both(TypeError, words, k_cache=np.zeros((BLOCKS, BLOCK_SIZE, HKV, D), np.uint8))


SCALES = [
    (None, ValueError, "{} is None, expected float32 [num_kv_heads] for a cache of int8"),
    ([1.0, 1.0], TypeError, "{} is a list, expected an array"),
    (np.ones(HKV), TypeError, "{} has dtype float64, expected float32"),
    (f32(HQ), ValueError, "{} has shape [4], expected [2] = [num_kv_heads]"),
    (f32(1, HKV), ValueError, "{} has shape [1, 2], expected [2]"),
    (f32(2 * HKV)[::2], ValueError, "{} has stride 2 along axis 0, expected 1"),
    (np.float32([1, 0]), ValueError, "{}[1] = 0, expected a finite number above 0"),
    (np.float32([-0.5, 1]), ValueError, "{}[0] = -0.5, expected a finite number above 0"),
    (np.float32([1, np.inf]), ValueError, "{}[1] = inf, expected a finite number above 0"),
    (np.float32([np.nan, 1]), ValueError, "{}[0] = nan, expected a finite number above 0"),
]


@pytest.mark.parametrize("name", ["k_scale", "v_scale"])
@pytest.mark.parametrize(("scale", "error", "words"), SCALES)
def test_a_quantised_cache_has_a_positive_finite_scale_per_head(name, scale, error, words):
    both(error, words.format(name), **int8_caches(**{name: scale}))


@pytest.mark.parametrize("name", ["k_scale", "v_scale"])
def test_scales_need_a_quantised_cache(name):
    both(
        ValueError,
        f"{name} is given, expected None: only quantised caches have scales, not float32",
        **{name: f32(HKV)},
    )


# ---- shapes ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("head_dim", [0, 4, 12, 20, 264])
@pytest.mark.parametrize(
    ("op", "name"), [("paged_attention", "q"), ("append_kv", "k"), ("merge_attention", "outs")]
)
def test_head_sizes_that_are_no_multiple_of_eight_up_to_256_are_refused(op, name, head_dim):
    changed = f32(*OPS[op]()[name].shape[:-1], head_dim)
    refused(
        op,
        ValueError,
        f"{name} has head_dim {head_dim}, expected a multiple of 8 from 8 to 256",
        **{name: changed},
    )


ATTEND, APPEND, MERGE = OPS
SHAPES = [
    (ATTEND, "q", (R, D), "q has shape [3, 16], expected 3 dimensions"),
    (ATTEND, "q", (R, 5, D), "q has 5 heads, expected a multiple of the cache's 2"),
    (ATTEND, "q", (R, 0, D), "q has 0 heads, expected a multiple of the cache's 2"),
    (ATTEND, "q", (R + 1, HQ, D), "q has 4 rows for 3 sequences, expected one each"),
    (APPEND, "k", (R + 1, HKV, D), "k has 4 rows for 3 sequences, expected one each, or query_start"),
    (ATTEND, "k_cache", (BLOCKS, BLOCK_SIZE, D), "k_cache has shape [8, 16, 16], expected [any, any, any"),
    (ATTEND, "k_cache", (BLOCKS, BLOCK_SIZE, HKV, 24), "k_cache has shape [8, 16, 2, 24], expected [any"),
    (ATTEND, "v_cache", (BLOCKS, BLOCK_SIZE, 1, D), "v_cache has shape [8, 16, 1, 16], expected [8, 16"),
    (ATTEND, "v_cache", (BLOCKS, 1, HKV, D), "v_cache has shape [8, 1, 2, 16], expected [8, 16"),
    (ATTEND, "k", (R, HQ, D), "k has shape [3, 4, 16], expected [3, 2, 16] = [T, num_kv"),
    (ATTEND, "v", (R, HKV, 8), "v has shape [3, 2, 8], expected [3, 2, 16]"),
    (APPEND, "v", (R + 1, HKV, D), "v has shape [4, 2, 16], expected [3, 2, 16]"),
    (APPEND, "q", (R + 1, HQ, D), "q has shape [4, 4, 16], expected [3, any, 16] = [T"),
    (APPEND, "q", (R, 3, D), "q has 3 heads, expected a multiple of the cache's 2"),
    (ATTEND, "out", (R, HQ, 8), "out has shape [3, 4, 8], expected [3, 4, 16] = the shape of q"),
    (ATTEND, "alibi_slopes", (HKV,), "alibi_slopes has shape [2], expected [4] = [num_heads]"),
    (ATTEND, "sinks", (1, HQ), "sinks has shape [1, 4], expected [4] = [num_heads]"),
    (MERGE, "outs", (2, R, D), "outs has shape [2, 3, 16], expected 4 dimensions"),
    (MERGE, "lses", (R, HQ), "lses has shape [3, 4], expected [2, 3, 4] = [S, T, num"),
]  # fmt: skip


@pytest.mark.parametrize(("op", "name", "shape", "words"), SHAPES)
def test_wrong_shapes_are_refused(op, name, shape, words):
    refused(op, ValueError, words, **{name: f32(*shape)})


INDEX_SHAPES = [
    ("block_table", (R,), "block_table has shape [3], expected [3, any] = [len(seq_lens), max_blocks]"),
    ("block_table", (R + 1, 2), "block_table has shape [4, 2], expected [3, any]"),
    ("seq_lens", (R, 1), "seq_lens has shape [3, 1], expected 1 dimension"),
    ("query_start", (R,), "query_start has shape [3], expected [4] = [len(seq_lens) + 1]"),
]


@pytest.mark.parametrize(("name", "shape", "words"), INDEX_SHAPES)
def test_wrong_shapes_of_indices_are_refused(name, shape, words):
    both(ValueError, words, **{name: i32(*shape)})


def test_a_status_of_another_length_is_refused():
    refused(
        "paged_attention", ValueError, "status has shape [2], expected [3] = [len(seq_lens)]", status=i32(2)
    )


@pytest.mark.parametrize("shape", [(BLOCKS, 0, HKV, D), (BLOCKS, BLOCK_SIZE, 0, D)])
def test_blocks_have_slots_and_heads(shape):
    words = f"k_cache has shape {list(shape)}, expected block_size and num_kv_heads of at least 1"
    refused("paged_attention", ValueError, words, k_cache=f32(*shape), v_cache=f32(*shape))


@pytest.mark.parametrize(
    ("cos", "sin", "words"),
    [
        ((64, 9), (64, 9), "rope.cos has shape [64, 9], expected [max_position, rotary_dim / 2]"),
        ((64, 0), (64, 0), "rope.cos has shape [64, 0], expected [max_position, rotary_dim / 2]"),
        ((64,), (64,), "rope.cos has shape [64], expected 2 dimensions"),
        ((64, 8), (63, 8), "rope.sin has shape [63, 8], expected [64, 8] = the shape of rope.cos"),
        ((64, 8), (8, 64), "rope.sin has shape [8, 64], expected [64, 8]"),
    ],
)  # fmt: skip
def test_wrong_shapes_of_rope_tables_are_refused(cos, sin, words):
    both(ValueError, words, rope=ts.Rope(f32(*cos), f32(*sin)))


def test_sizes_beyond_32_bits_are_refused():
    cache = torch.zeros(1, 1, HKV, D).expand(1 << 31, BLOCK_SIZE, HKV, D)
    refused(
        "paged_attention", ValueError,
        "k_cache has shape [2147483648, 16, 2, 16], expected sizes below 2^31",
        k_cache=cache, v_cache=cache, k=None, v=None,
    )  # fmt: skip


# ---- strides ---------------------------------------------------------------------------------------------
def spread_last_axis(array):
    return np.repeat(array, 2, axis=-1)[..., ::2]


@pytest.mark.parametrize(
    ("op", "name"),
    [(op, n) for op in OPS for n in ("q", "k_cache", "v_cache", "k", "v", "out", "outs") if n in OPS[op]()],
)
def test_head_dim_is_contiguous(op, name):
    words = f"{name} has stride 2 along its last axis, expected 1 (a contiguous last axis)"
    refused(op, ValueError, words, **{name: spread_last_axis(OPS[op]()[name])})


def test_small_arrays_are_contiguous():
    both(
        ValueError,
        "block_table has stride 2 along its last axis",
        block_table=spread_last_axis(i32(R, COLUMNS)),
    )
    both(ValueError, "seq_lens has stride 2 along axis 0", seq_lens=np.full(2 * R, 20, np.int32)[::2])
    both(
        ValueError, "query_start has stride -1 along axis 0", query_start=np.arange(R, -1, -1, np.int32)[::-1]
    )
    both(
        ValueError,
        "rope.cos has stride 9 along axis 0, expected 8",
        rope=ts.Rope(f32(64, 9)[:, :8], f32(64, 8)),
    )
    for name in ("alibi_slopes", "sinks"):
        refused(
            "paged_attention", ValueError, f"{name} has stride 2 along axis 0", **{name: f32(2 * HQ)[::2]}
        )


WRITTEN = [("paged_attention", n) for n in ("k_cache", "v_cache", "out")] + [
    ("append_kv", n) for n in ("k_cache", "v_cache", "q")
]


@pytest.mark.parametrize(("op", "name"), WRITTEN)
def test_what_is_written_to_is_writable_and_has_distinct_elements(op, name):
    array = OPS[op]()[name]
    array.flags.writeable = False
    refused(op, ValueError, f"{name} is read-only, expected an array to write to", **{name: array})
    repeated = torch.ones(1, *array.shape[1:]).expand(*array.shape)
    words = f"{name} has stride 0 along axis 0, expected an array of distinct elements to write to"
    refused(op, ValueError, words, **{name: repeated})


def test_caches_that_are_only_read_may_be_read_only():
    arguments = attention_arguments() | {"k": None, "v": None}
    for name in ("q", "k_cache", "v_cache", "block_table", "seq_lens"):
        arguments[name].flags.writeable = False
    ts.paged_attention(**arguments)


# ---- numbers ---------------------------------------------------------------------------------------------
NUMBERS = [
    ("scale", math.nan, "scale = nan, expected a number that is finite in float32, or None"),
    ("scale", math.inf, "scale = inf, expected a number that is finite in float32, or None"),
    ("scale", 1e39, "scale = 1e+39, expected a number that is finite in float32, or None"),
    ("softcap", 0.0, "softcap = 0, expected softcap > 0 with scale / softcap finite, or None"),
    ("softcap", -1.0, "softcap = -1, expected softcap > 0 with scale / softcap finite, or None"),
    ("softcap", 1e-300, "softcap = 1e-300, expected softcap > 0"),
    ("softcap", 1e-45, "softcap = 1e-45, expected softcap > 0 with scale / softcap finite, or None"),
    ("softcap", math.nan, "softcap = nan, expected a number that is finite in float32, or None"),
    ("softcap", math.inf, "softcap = inf, expected a number that is finite in float32, or None"),
    ("window", 0, "window = 0, expected 1 ≤ window < 2^31"),
    ("window", -5, "window = -5, expected 1 ≤ window < 2^31"),
    ("window", 1 << 31, "window = 2147483648, expected 1 ≤ window < 2^31"),
    ("max_query_len", 0, "max_query_len = 0, expected 1 ≤ max_query_len < 2^31"),
    ("max_query_len", 1 << 70, f"max_query_len = {1 << 70}, expected 1 ≤ max_query_len < 2^31"),
]


@pytest.mark.parametrize(("name", "value", "words"), NUMBERS)
def test_numbers_out_of_range_are_refused(name, value, words):
    refused("paged_attention", ValueError, words, **{name: value})


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("scale", "1", "scale is a str, expected a number or None"),
        ("scale", 1j, "scale is a complex, expected a number or None"),
        ("softcap", [1.0], "softcap is a list, expected a number or None"),
        ("window", 3.0, "window is a float, expected an int"),
        ("window", "3", "window is a str, expected an int"),
        ("max_query_len", None, "max_query_len is None, expected an int"),
        ("max_query_len", 1.5, "max_query_len is a float, expected an int"),
        ("return_lse", None, "return_lse is None, expected a bool"),
        ("return_lse", 1, "return_lse is an int, expected a bool"),
        ("rope", rope(interleaved=None), "rope.interleaved is None, expected a bool"),
        ("rope", rope(interleaved=0), "rope.interleaved is an int, expected a bool"),
    ],
)
def test_what_is_no_number_is_refused_by_its_type(name, value, words):
    refused("paged_attention", TypeError, words, **{name: value})


@pytest.mark.parametrize(
    ("start", "words"),
    [
        ([-1, 1, 2, 3], "query_start[0] = -1, expected at least 0"),
        ([0, 2, 1, 3], "query_start[2] = 1, expected at least query_start[1] = 2"),
        ([0, 1, 2, 4], "query_start[3] = 4, expected at most 3 (the rows given)"),
        ([0, 1, 2, -(1 << 31)], "query_start[3] = -2147483648, expected at least query_start[2] = 2"),
    ],
)
def test_query_starts_that_are_no_partition_are_refused(start, words):
    both(ValueError, words, query_start=np.array(start, np.int32))


def test_more_queries_than_max_query_len_are_refused():
    start = np.array([0, 0, 3, 3], np.int32)
    words = "query_start gives sequence 1 3 queries, expected at most max_query_len = 2"
    refused("paged_attention", ValueError, words, query_start=start)
    ts.paged_attention(**attention_arguments() | {"query_start": start, "max_query_len": 3})
    ts.append_kv(**append_arguments() | {"query_start": start})


# ---- torch -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("op", "name"), EVERY_ARRAY)
def test_tensors_that_require_grad_are_refused(op, name):
    tensor = torch.ones(2, requires_grad=True)
    refused(op, TypeError, f"{name} requires grad, expected a tensor without it", **{name: tensor})


@pytest.mark.parametrize("op", OPS)
def test_meta_tensors_are_refused(op):
    name = next(iter(inspect.signature(getattr(ts, op)).parameters))
    refused(op, TypeError, name, **{name: torch.ones(2, 3, 4, 16, device="meta")})
