"""What sample, apply_logits and Sampler refuse: each error names the op, the argument and the row."""

import math
import re

import numpy as np
import pytest

from tokenstep import _native
from tokenstep import sampling as ts

INF, NAN = math.inf, math.nan
B, V = 4, 50


def logits():
    return np.random.default_rng(0).standard_normal((B, V)).astype(np.float32)


def per_row(value, row=2, other=1):
    return [value if b == row else other for b in range(B)]


def refused(error, words, **arguments):
    """Both functions refuse these arguments with the same words, and write nothing to ``out``."""
    with pytest.raises(error, match="^" + re.escape(f"tokenstep.sample: {words}")):
        ts.sample(logits(), check=False, **arguments)
    if not {"seed", "position", "substream", "logprobs", "logprobs_mode"} & set(arguments):
        out = np.full((B, V), 7, np.float32)
        with pytest.raises(error, match="^" + re.escape(f"tokenstep.apply_logits: {words}")):
            ts.apply_logits(logits(), check=False, out=out, **arguments)
        assert (out == 7).all()


NUMBERS = [
    ("temperature", -0.1, "a finite temperature ≥ 0"),
    ("temperature", -1e-45, "a finite temperature ≥ 0"),
    ("temperature", INF, "a finite temperature ≥ 0"),
    ("temperature", 1e39, "a finite temperature ≥ 0"),
    ("temperature", NAN, "a finite temperature ≥ 0"),
    ("top_p", 1.7, "0 ≤ top_p ≤ 1"),
    ("top_p", -0.01, "0 ≤ top_p ≤ 1"),
    ("top_p", NAN, "0 ≤ top_p ≤ 1"),
    ("min_p", 1.01, "0 ≤ min_p ≤ 1"),
    ("min_p", -1.0, "0 ≤ min_p ≤ 1"),
    ("min_p", NAN, "0 ≤ min_p ≤ 1"),
    ("repetition_penalty", 0.0, "a finite repetition_penalty > 0"),
    ("repetition_penalty", -2.0, "a finite repetition_penalty > 0"),
    ("repetition_penalty", 1e-50, "a finite repetition_penalty > 0"),
    ("repetition_penalty", INF, "a finite repetition_penalty > 0"),
    ("repetition_penalty", NAN, "a finite repetition_penalty > 0"),
    ("presence_penalty", NAN, "a finite number"),
    ("presence_penalty", -INF, "a finite number"),
    ("frequency_penalty", NAN, "a finite number"),
    ("frequency_penalty", INF, "a finite number"),
    ("seed", 1 << 64, "-2^63 ≤ seed < 2^64, or None"),
    ("seed", -(1 << 63) - 1, "-2^63 ≤ seed < 2^64, or None"),
    ("seed", 1 << 200, "-2^63 ≤ seed < 2^64, or None"),
    ("position", -1, "0 ≤ position < 2^64"),
    ("position", 1 << 64, "0 ≤ position < 2^64"),
    ("substream", -1, "0 ≤ substream < 2^32"),
    ("substream", 1 << 32, "0 ≤ substream < 2^32"),
]


@pytest.mark.parametrize(("name", "value", "expected"), NUMBERS)
def test_numbers_out_of_range_are_refused_for_all_rows_and_for_one(name, value, expected):
    with pytest.raises(ValueError, match=re.escape(f"expected {expected}")):
        ts.sample(logits(), **{name: value})
    refused(ValueError, f"{name} = ", **{name: value})
    refused(ValueError, f"{name}[2] = ", **{name: per_row(value)})
    if isinstance(value, float):
        refused(ValueError, f"{name}[2] = ", **{name: np.array(per_row(value))})


def test_the_message_shows_what_came_and_what_was_expected():
    refused(ValueError, "top_p[3] = 1.7, expected 0 ≤ top_p ≤ 1", top_p=[1, 1, 1, 1.7])


NAMES = (
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "top_k",
)
WHOLE = ("top_k", "position", "substream", "seed")


@pytest.mark.parametrize("name", [*NAMES, "position", "substream", "seed"])
def test_one_value_per_row_means_exactly_that_many(name):
    refused(ValueError, f"{name} has length 3, expected 4 (one per row)", **{name: [1] * 3})
    refused(ValueError, f"{name} has length 5, expected 4 (one per row)", **{name: np.ones(5, np.int64)})
    refused(ValueError, f"{name} has shape [4, 1], expected 1 dimension", **{name: np.ones((4, 1), np.int64)})


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", ["1", None, {}, 1j, b"1"])
def test_what_is_no_number_is_refused_by_its_type(name, value):
    refused(TypeError, f"{name} is ", **{name: value})
    refused(TypeError, f"{name}[2] is ", **{name: per_row(value)})


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("value", [1.0, 0.5, "1", NAN])
def test_whole_numbers_are_not_taken_from_floats(name, value):
    refused(TypeError, f"{name} is ", **{name: value})
    refused(TypeError, f"{name}[2] is ", **{name: per_row(value)})


@pytest.mark.parametrize("name", WHOLE)
def test_whole_numbers_are_not_taken_from_arrays_of_floats(name):
    refused(TypeError, f"{name} has dtype float32, expected", **{name: np.ones(B, np.float32)})


@pytest.mark.parametrize("name", ["temperature", "top_p"])
def test_arrays_of_other_dtypes_are_refused(name):
    refused(TypeError, f"{name} has dtype bool", **{name: np.ones(B, bool)})
    refused(TypeError, f"{name} has dtype complex64", **{name: np.ones(B, np.complex64)})


# ---- lists of ids -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["prompt_tokens", "output_tokens"])
def test_ids_outside_the_vocabulary_are_refused_with_row_and_place(name):
    for bad in (V, -1, 1 << 40, 1 << 80, -(1 << 80)):
        refused(ValueError, f"{name}[2][1] = ", **{name: per_row([3, bad], other=[1])})
    refused(ValueError, f"{name}[2][1] = 50, expected 0 ≤ id < 50", **{name: per_row([3, V], other=[])})
    for dtype in (np.int32, np.int64):
        ids = np.array([3, -1], dtype)
        refused(ValueError, f"{name}[2][1] = -1, expected 0 ≤ id < 50", **{name: per_row(ids, other=[1])})


@pytest.mark.parametrize("name", ["prompt_tokens", "output_tokens"])
def test_histories_are_one_sequence_of_whole_numbers_per_row(name):
    refused(ValueError, f"{name} has length 3, expected 4 (one per row)", **{name: [[1]] * 3})
    refused(TypeError, f"{name}[0] is an int, expected one id sequence per row", **{name: [1, 2, 3, 4]})
    refused(TypeError, f"{name} is an int", **{name: 5})
    refused(TypeError, f"{name} is a str", **{name: "1234"})
    refused(TypeError, f"{name} is a dict", **{name: {0: [1]}})
    refused(TypeError, f"{name}[2] is a str", **{name: per_row("12", other=[])})
    refused(TypeError, f"{name}[2] is an int", **{name: per_row(7, other=[])})
    refused(TypeError, f"{name}[2][0] is a float, expected an integer", **{name: per_row([1.0], other=[])})
    refused(TypeError, f"{name}[2][0] is None, expected an integer", **{name: per_row([None], other=[])})
    refused(TypeError, f"{name} has dtype float32", **{name: per_row(np.ones(2, np.float32), other=[])})
    refused(ValueError, f"{name}[2] has shape [1, 2]", **{name: per_row(np.ones((1, 2), int), other=[])})


def test_biases_are_dicts_of_ids_to_finite_values_or_minus_infinity():
    refused(ValueError, "logit_bias has length 3, expected 4", logit_bias=[{}] * 3)
    refused(TypeError, "logit_bias is a float", logit_bias=1.0)
    refused(TypeError, "logit_bias is a str", logit_bias="{}")
    refused(TypeError, "logit_bias[2] is a list", logit_bias=per_row([1], other=None))
    refused(ValueError, "logit_bias has the key 50, expected 0 ≤ id < 50", logit_bias={V: 1.0})
    refused(
        ValueError,
        "logit_bias[2] has the key -1, expected 0 ≤ id < 50",
        logit_bias=per_row({-1: 1.0}, other={}),
    )
    refused(TypeError, "logit_bias[2] has the key '3'", logit_bias=per_row({"3": 1.0}, other={}))
    refused(TypeError, "logit_bias[2] has the key 3.0", logit_bias=per_row({3.0: 1.0}, other={}))
    refused(TypeError, "logit_bias[2][3] is a str", logit_bias=per_row({3: "1"}, other={}))
    for bad in (NAN, INF, 1e39):
        refused(ValueError, "logit_bias[2][3] = ", logit_bias=per_row({3: bad}, other={}))
        refused(ValueError, "logit_bias[3] = ", logit_bias={3: bad})


# ---- arrays -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("array", "error", "words"),
    [
        (np.zeros((2, 3)), TypeError, "logits has dtype float64, expected float32 or float16 or bfloat16"),
        (np.zeros((2, 3), np.int32), TypeError, "logits has dtype int32"),
        (np.zeros(3, np.float32), ValueError, "logits has shape [3], expected 2 dimensions"),
        (np.zeros((1, 2, 3), np.float32), ValueError, "logits has shape [1, 2, 3], expected 2 dimensions"),
        (np.zeros((3, 4), np.float32).T, ValueError, "logits has stride 4 along its last axis"),
        (np.zeros((3, 8), np.float32)[:, ::2], ValueError, "logits has stride 2 along its last axis"),
        (np.zeros((3, 8), np.float32)[:, ::-1], ValueError, "logits has stride -1 along its last axis"),
        (
            np.zeros((2, 0), np.float32),
            ValueError,
            "logits has shape [2, 0], expected [B, V] with 1 ≤ V ≤ 262144",
        ),
        (
            np.zeros((1, (1 << 18) + 1), np.float32),
            ValueError,
            "logits has shape [1, 262145], expected [B, V]",
        ),
        ([[1.0, 2.0]], TypeError, "logits is a list, expected an array"),
        (None, TypeError, "logits is a NoneType, expected an array"),
        (b"1234", TypeError, "logits is a bytes, expected an array"),
    ],
)
def test_logits_of_the_wrong_kind_are_refused(array, error, words):
    for name, function in (("sample", ts.sample), ("apply_logits", ts.apply_logits)):
        with pytest.raises(error, match="^" + re.escape(f"tokenstep.{name}: {words}")):
            function(array)


def test_torch_logits_whose_memory_does_not_hold_their_values_are_refused():
    torch = pytest.importorskip("torch")
    for bad, words in (
        (torch.zeros(2, 3, requires_grad=True), "logits requires grad"),
        (torch.zeros(2, 3, device="meta"), "logits"),
        (torch.zeros(2, 3, dtype=torch.complex64).conj().imag, "logits is a negative view"),
        (torch.zeros(2, 3).to_sparse(), "logits"),
    ):
        with pytest.raises(TypeError, match="^" + re.escape(f"tokenstep.sample: {words}")):
            ts.sample(bad)


def test_logits_on_a_gpu_name_the_reason_why_there_is_no_cuda():
    class OnGpu:
        def __dlpack_device__(self):
            return (2, 0)

        def __dlpack__(self, **kwargs):
            raise BufferError("not here")

    if _native.cuda is not None:
        pytest.skip("this build has a CUDA module")
    for name, function in (("sample", ts.sample), ("apply_logits", ts.apply_logits)):
        words = f"tokenstep.{name}: logits is on a GPU, but {_native.cuda_absent_because}"
        with pytest.raises(RuntimeError, match="^" + re.escape(words)):
            function(OnGpu())


@pytest.mark.parametrize(
    ("mask", "error", "words"),
    [
        (
            np.zeros((B, 1), np.int32),
            ValueError,
            "token_bitmask has shape [4, 1], expected [4, 2] = [B, ceil(V / 32)]",
        ),
        (np.zeros((B, 3), np.int32), ValueError, "token_bitmask has shape [4, 3]"),
        (np.zeros((1, 2), np.int32), ValueError, "token_bitmask has shape [1, 2]"),
        (np.zeros(2, np.int32), ValueError, "token_bitmask has shape [2]"),
        (np.zeros((B, V), bool), TypeError, "token_bitmask has dtype bool, expected int32"),
        (np.zeros((B, 2), np.int64), TypeError, "token_bitmask has dtype int64, expected int32"),
        (np.zeros((2, B), np.int32).T, ValueError, "token_bitmask has stride 4 along its last axis"),
        ([[1, 2]] * B, TypeError, "token_bitmask is a list"),
    ],
)
def test_bitmasks_of_the_wrong_kind_are_refused(mask, error, words):
    refused(error, words, token_bitmask=mask)


def test_logprobs_are_none_or_0_to_20():
    refused(ValueError, "logprobs = 21, expected 0 ≤ logprobs ≤ 20, or None", logprobs=21)
    refused(ValueError, "logprobs = -1, expected 0 ≤ logprobs ≤ 20, or None", logprobs=-1)
    refused(TypeError, "logprobs is a float", logprobs=2.0)
    refused(TypeError, "logprobs is a str", logprobs="2")
    refused(ValueError, "logprobs_mode = 'cooked', expected 'raw' or 'processed'", logprobs_mode="cooked")
    refused(ValueError, "logprobs_mode = 3, expected 'raw' or 'processed'", logprobs_mode=3)


def test_parameters_are_checked_even_when_there_are_no_rows():
    torch = pytest.importorskip("torch")
    with pytest.raises(ValueError, match="top_p = 2"):
        ts.sample(torch.zeros(0, 5), top_p=2.0)


# ---- out of apply_logits ----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("out", "error", "words"),
    [
        (np.zeros((B, V), np.float16), TypeError, "out has dtype float16, expected float32"),
        (np.zeros((B, V + 1), np.float32), ValueError, "out has shape [4, 51], expected [4, 50] = [B, V]"),
        (np.zeros((V, B), np.float32).T, ValueError, "out has stride 4 along its last axis"),
        (np.broadcast_to(np.zeros(V, np.float32), (B, V)), ValueError, "out is read-only"),
        ([0.0], TypeError, "out is a list"),
    ],
)
def test_out_of_the_wrong_kind_is_refused(out, error, words):
    with pytest.raises(error, match="^" + re.escape(f"tokenstep.apply_logits: {words}")):
        ts.apply_logits(logits(), out=out)


def test_out_may_not_overlap_the_logits_except_in_place():
    memory = np.zeros((B + 1, V), np.float32)
    with pytest.raises(ValueError, match="out overlaps logits"):
        ts.apply_logits(memory[:B], out=memory[1:])
    torch = pytest.importorskip("torch")
    with pytest.raises(ValueError, match="out has overlapping rows"):
        ts.apply_logits(torch.zeros(B, V), out=torch.zeros(V).expand(B, V))


# ---- presets ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("value", ["llama", "", None, 3, b"vllm"])
def test_an_unknown_semantics_is_named_with_those_that_exist(value):
    words = f"semantics = {value!r}, expected 'tokenstep', 'vllm', 'transformers' or 'llama.cpp'"
    refused(ValueError, words, semantics=value)
    with pytest.raises(ValueError, match="^" + re.escape(f"tokenstep.Sampler: {words}")):
        ts.Sampler(1, V, semantics=value)


@pytest.mark.parametrize("semantics", ["tokenstep", "vllm", "transformers"])
def test_a_window_of_tokens_is_refused_where_penalties_have_none(semantics):
    words = "penalty_last_n = 5, expected None unless semantics = 'llama.cpp'"
    refused(ValueError, words, semantics=semantics, penalty_last_n=5)
    sampler = ts.Sampler(1, V, semantics=semantics)
    with pytest.raises(ValueError, match="^" + re.escape(f"tokenstep.Sampler.admit: {words}")):
        sampler.admit(0, ts.SamplingParams(penalty_last_n=5))


def test_a_window_of_tokens_out_of_range_is_refused_for_all_rows_and_for_one():
    given = {"semantics": "llama.cpp", "output_tokens": [[1]] * B}
    for value in (-2, (1 << 20) + 1):
        words = f"{value}, expected -1 ≤ penalty_last_n ≤ 2^20"
        refused(ValueError, f"penalty_last_n = {words}", penalty_last_n=value, **given)
        refused(ValueError, f"penalty_last_n[2] = {words}", penalty_last_n=per_row(value), **given)
    refused(TypeError, "penalty_last_n is ", penalty_last_n=1.5, **given)
    refused(ValueError, "penalty_last_n has length 3", penalty_last_n=[1] * 3, **given)
    sampler = ts.Sampler(1, V, semantics="llama.cpp")
    with pytest.raises(TypeError, match=r"tokenstep\.Sampler\.admit: penalty_last_n is .*a number"):
        sampler.admit(0, ts.SamplingParams(penalty_last_n=[5]))


# ---- Sampler ----------------------------------------------------------------------------------------------
def test_sizes_and_devices_of_a_sampler_are_checked():
    for sizes, words in (((0, 5), "max_rows = 0"), ((-1, 5), "max_rows = -1"), ((5, 0), "vocab_size = 0")):
        with pytest.raises(ValueError, match=f"tokenstep.Sampler: {words}"):
            ts.Sampler(*sizes)
    with pytest.raises(ValueError, match="vocab_size = 262145, expected 1 ≤ vocab_size ≤ 262144"):
        ts.Sampler(1, (1 << 18) + 1)
    with pytest.raises(ValueError, match="device = 'tpu', expected 'cpu' or 'cuda'"):
        ts.Sampler(1, 5, "tpu")
    if _native.cuda is None:
        for device in ("cuda", "cuda:1"):
            with pytest.raises(RuntimeError, match=re.escape(_native.cuda_absent_because)):
                ts.Sampler(1, 5, device)


def test_a_sampler_takes_a_torch_device():
    torch = pytest.importorskip("torch")
    assert ts.Sampler(2, 5, torch.device("cpu")).max_rows == 2


@pytest.mark.parametrize(("name", "value", "expected"), [n for n in NUMBERS if n[0] != "position"])
def test_a_row_whose_parameters_are_out_of_range_is_not_admitted(name, value, expected):
    sampler = ts.Sampler(2, V)
    sampler.admit(0, ts.SamplingParams(temperature=0))
    with pytest.raises(ValueError, match="^" + re.escape(f"tokenstep.Sampler.admit: {name} = ")):
        sampler.admit(0, ts.SamplingParams(**{name: value}))
    with pytest.raises(ValueError, match="^" + re.escape(f"tokenstep.Sampler.admit: {name} = ")):
        sampler.admit(1, ts.SamplingParams(**{name: value}))
    x = logits()
    assert sampler.step(x[:1]).tokens[0] == x[0].argmax(), "the row that was there is still there"
    with pytest.raises(ValueError, match=r"rows\[1\] = 1 was not admitted"):
        sampler.step(x[:2])


def test_a_row_with_bad_ids_or_biases_is_not_admitted():
    sampler = ts.Sampler(2, V)
    for arguments, words in (
        ((ts.SamplingParams(), [1, V]), "prompt_tokens[1] = 50, expected 0 ≤ id < 50"),
        ((ts.SamplingParams(), [], [-1]), "output_tokens[0] = -1, expected 0 ≤ id < 50"),
        ((ts.SamplingParams(logit_bias={V: 1.0}),), "logit_bias has the key 50"),
        ((ts.SamplingParams(logit_bias={1: NAN}),), "logit_bias[1] = nan"),
        ((ts.SamplingParams(logprobs=21),), "logprobs = 21"),
    ):
        with pytest.raises(ValueError, match="^" + re.escape(f"tokenstep.Sampler.admit: {words}")):
            sampler.admit(0, *arguments)
    for arguments, words in (
        ((ts.SamplingParams(), [[1]]), "prompt_tokens[0] is a list"),
        ((ts.SamplingParams(), "12"), "prompt_tokens is a str"),
        ((ts.SamplingParams(temperature=[1.0]),), "temperature is a list"),
        ((ts.SamplingParams(seed=1.5),), "seed is a float"),
        ((ts.SamplingParams(logit_bias=[{}]),), "logit_bias is a list"),
    ):
        with pytest.raises(TypeError, match="^" + re.escape(f"tokenstep.Sampler.admit: {words}")):
            sampler.admit(0, *arguments)


def test_rows_out_of_range_or_not_admitted_are_refused():
    sampler = ts.Sampler(3, V)
    for row in (-1, 3, 1 << 40):
        with pytest.raises(ValueError, match=f"tokenstep.Sampler.admit: row = {row}, expected 0 ≤ row < 3"):
            sampler.admit(row, ts.SamplingParams())
        with pytest.raises(ValueError, match=f"tokenstep.Sampler.release: row = {row}, expected 0 ≤ row < 3"):
            sampler.release(row)
    with pytest.raises(ValueError, match=r"tokenstep.Sampler.release: row = 1 was not admitted"):
        sampler.release(1)
    sampler.admit(1, ts.SamplingParams())
    sampler.release(1)
    with pytest.raises(ValueError, match=r"row = 1 was not admitted"):
        sampler.release(1)


@pytest.mark.parametrize(
    ("rows", "error", "words"),
    [
        (np.array([0, 3], np.int32), ValueError, "rows[1] = 3, expected 0 ≤ row < 3"),
        (np.array([-1, 0], np.int32), ValueError, "rows[0] = -1, expected 0 ≤ row < 3"),
        (np.array([1, 1], np.int32), ValueError, "rows[1] = 1 appears twice"),
        (np.array([1, 2], np.int32), ValueError, "rows[1] = 2 was not admitted"),
        (np.array([0], np.int32), ValueError, "rows has shape [1], expected [2]"),
        (np.array([0, 1], np.int64), TypeError, "rows has dtype int64, expected int32"),
        ([0, 1], TypeError, "rows is a list"),
    ],
)
def test_a_step_with_wrong_rows_draws_nothing(rows, error, words):
    sampler, twin = ts.Sampler(3, V), ts.Sampler(3, V)
    for s in (sampler, twin):
        s.admit(0, ts.SamplingParams(seed=1, repetition_penalty=2.0))
        s.admit(1, ts.SamplingParams(seed=2, repetition_penalty=2.0))
    x = logits()[:2]
    with pytest.raises(error, match="^" + re.escape(f"tokenstep.Sampler.step: {words}")):
        sampler.step(x, rows)
    for _ in range(4):
        assert np.array_equal(sampler.step(x).tokens, twin.step(x).tokens)


def test_a_step_with_wrong_logits_mask_or_out_draws_nothing():
    sampler, twin = ts.Sampler(2, V), ts.Sampler(2, V)
    for s in (sampler, twin):
        for row in range(2):
            s.admit(row, ts.SamplingParams(seed=row, frequency_penalty=2.0, logprobs=2))
    x = logits()[:2]
    new = sampler.step(x)
    twin.step(x)
    for arguments, words in (
        ((logits()[:, :-1],), "logits has shape [4, 49], expected [B, 50]"),
        ((logits(),), "logits has 4 rows, expected at most max_rows = 2"),
        ((x, None, np.zeros((2, 1), np.int32)), "token_bitmask has shape [2, 1]"),
        ((x, None, None, new._replace(logprobs=None)), "out[2] (logprobs) is None, expected an array"),
        ((x, None, None, new._replace(top_tokens=None)), "out[4] (top_tokens) is None"),
        (
            (x, None, None, new._replace(tokens=np.zeros(3, np.int64))),
            "out[0] (tokens) has shape [3], expected [2]",
        ),
        ((x, None, None, new._replace(top_tokens=np.zeros((2, 1), np.int64))), "out[4]"),
    ):
        with pytest.raises(ValueError, match="^" + re.escape(f"tokenstep.Sampler.step: {words}")):
            sampler.step(*arguments)
    for arguments, words in (
        ((x.astype(np.float64),), "logits has dtype float64"),
        ((x, None, None, new._replace(tokens=np.zeros(2, np.int32))), "out[0] (tokens) has dtype int32"),
        ((x, None, None, new[:3]), "out is not a tuple of 6"),
        ((x, None, None, new._replace(status=[0, 0])), "out[1] (status) is a list"),
    ):
        with pytest.raises(TypeError, match="^" + re.escape(f"tokenstep.Sampler.step: {words}")):
            sampler.step(*arguments)
    frozen = new.tokens.copy()
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        sampler.step(x, None, None, new._replace(tokens=frozen))
    for _ in range(4):
        assert np.array_equal(sampler.step(x).tokens, twin.step(x).tokens)
