"""semantics="vllm", "transformers", "llama.cpp": bit by bit against the reference, and what each means."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_cases import DTYPES, PRESETS, assert_same, random_case, same_floats, supported_isas

from tokenstep import _native
from tokenstep import sampling as ts
from tokenstep.reference import sampling as reference

DRAW = ("seed", "position", "substream", "logprobs", "logprobs_mode")


def check_rows(semantics, vocab_size, num_rows, seed):
    rng = np.random.default_rng([seed, vocab_size, PRESETS.index(semantics)])
    case = random_case(rng, DTYPES[int(rng.integers(3))], vocab_size, num_rows, semantics=semantics)
    want = case.expected()
    editing = {k: v for k, v in case.arguments.items() if k not in DRAW}
    processed, _ = reference.apply_logits(case.exact, **editing)
    for isa in supported_isas():
        _native.cpu.set_isa(isa)
        _native.cpu.set_num_threads(int(rng.integers(1, 4)))
        where = f"{semantics} V={vocab_size} {isa} seed {seed}:"
        assert_same(ts.sample(case.logits, check=False, **case.arguments), want, where)
        got = np.asarray(ts.apply_logits(case.logits, check=False, **editing))
        rows = np.flatnonzero(~same_floats(got, processed).all(axis=1))
        assert len(rows) == 0, f"{where} row {rows[:1]} of the processed logits"


@pytest.mark.parametrize("semantics", PRESETS)
@settings(max_examples=15, deadline=None)
@given(vocab_size=st.sampled_from([1, 2, 31, 33, 257, 1000, 4099]), seed=st.integers(0, 1 << 30))
def test_random_rows_equal_the_reference_on_every_instruction_set(semantics, vocab_size, seed):
    pytest.importorskip("torch")  # holds bfloat16
    check_rows(semantics, vocab_size, 24 if vocab_size < 2000 else 6, seed)


@pytest.mark.parametrize("semantics", PRESETS)
def test_rows_of_real_vocabularies_equal_the_reference(semantics):
    pytest.importorskip("torch")
    check_rows(semantics, 32003, 8, 1)


@pytest.mark.slow
@pytest.mark.parametrize("semantics", PRESETS)
@pytest.mark.parametrize("vocab_size", [1, 3, 33, 256, 257, 1000, 4099, 32003, 128256, 1 << 18])
def test_thousands_of_random_rows_equal_the_reference(semantics, vocab_size):
    pytest.importorskip("torch")
    batch = max(2, min(64, 400_000 // vocab_size))
    for seed in range(100 if vocab_size < 5000 else 12):
        check_rows(semantics, vocab_size, batch, 1000 + seed)


# ---- what each means --------------------------------------------------------------------------------------
def kept(logits, **arguments):
    """Ids that one row keeps."""
    out = ts.apply_logits(np.asarray([logits], np.float32), **arguments)
    return np.flatnonzero(np.isfinite(out[0])).tolist()


@pytest.mark.parametrize("semantics", ["vllm", "transformers"])
def test_top_k_keeps_whatever_equals_the_kth_value(semantics):
    assert kept([1, 2, 2, 2, 0], top_k=2, semantics=semantics) == [1, 2, 3]
    assert kept([1, 2, 2, 2, 0], top_k=4, semantics=semantics) == [0, 1, 2, 3]
    assert kept([0] * 5000, top_k=1, semantics=semantics) == list(range(5000))
    assert kept([1, 2, 2, 2, 0], top_k=2, semantics="llama.cpp") == [1, 2]


def test_ties_are_counted_after_the_temperature_where_it_comes_first():
    x = np.float32(1.9375) + np.array([0, 2**-23], np.float32)
    merged = 1.9  # dividing by it makes the two equal
    assert x[0] < x[1]
    assert x[0] / np.float32(merged) == x[1] / np.float32(merged)
    assert kept(x, top_k=1, temperature=merged, semantics="vllm") == [0, 1]
    assert kept(x, top_k=1, temperature=merged, semantics="llama.cpp") == [1]


@pytest.mark.parametrize(
    ("semantics", "ids"), [("tokenstep", [0]), ("vllm", [0]), ("transformers", [0, 1]), ("llama.cpp", [0, 1])]
)
def test_min_p_comes_before_or_after_top_p(semantics, ids):
    """Of 0.5, 0.3, 0.2 the first two make 0.6; without the third, which min-p drops, the first alone does."""
    assert kept(np.log([0.5, 0.3, 0.2]), top_p=0.6, min_p=0.5, semantics=semantics) == ids


@pytest.mark.parametrize(("semantics", "ids"), [("vllm", [0, 1, 2]), ("llama.cpp", [0, 1])])
def test_top_p_takes_a_share_of_tempered_weights_or_not(semantics, ids):
    assert kept(np.log([0.6, 0.25, 0.15]), top_p=0.8, temperature=5.0, semantics=semantics) == ids


def test_the_temperature_of_llama_cpp_changes_what_is_drawn_from_all_the_same():
    x = np.broadcast_to(np.log(np.array([0.6, 0.25, 0.15], np.float32)), (4000, 3))
    arguments = {"top_p": 0.8, "seed": 1, "position": np.arange(4000), "semantics": "llama.cpp"}
    shares = [0.6**0.2, 0.25**0.2]
    tokens = ts.sample(x, temperature=5.0, **arguments).tokens
    assert abs((tokens == 0).mean() - shares[0] / sum(shares)) < 0.03


def test_penalties_of_llama_cpp_count_the_last_tokens_of_prompt_and_output():
    history = {"prompt_tokens": [[0, 1, 1]], "output_tokens": [[1, 2]]}
    penalties = {"repetition_penalty": 2.0, "frequency_penalty": 0.5, "presence_penalty": 0.25}
    x = np.array([[4.0, 4.0, -4.0, 4.0]], np.float32)
    for last_n, want in {
        3: [4.0, 2 - (2 * 0.5 + 0.25), -8 - 0.75, 4.0],
        1: [4.0, 4.0, -8 - 0.75, 4.0],
        0: [4.0, 4.0, -4.0, 4.0],
        -1: [2 - 0.75, 2 - (3 * 0.5 + 0.25), -8 - 0.75, 4.0],
    }.items():
        out = ts.apply_logits(x, semantics="llama.cpp", penalty_last_n=last_n, **history, **penalties)
        assert out.tolist() == [want]
    long = {"prompt_tokens": [[3] + [0] * 63], "output_tokens": [[1]]}  # 3 is one too old for the default
    out = ts.apply_logits(x, semantics="llama.cpp", repetition_penalty=2.0, **long)
    assert out.tolist() == [[2.0, 2.0, -4.0, 4.0]]


@pytest.mark.parametrize(
    ("semantics", "temperature", "greedy"),
    [
        ("tokenstep", 9e-6, True), ("vllm", 9e-6, True), ("vllm", 1e-5, False), ("transformers", 0, True),
        ("transformers", 1e-6, False), ("llama.cpp", 0, True), ("llama.cpp", 1e-6, False),
    ],
)  # fmt: skip
def test_which_temperatures_are_greedy(semantics, temperature, greedy):
    x = np.ones((60, 3), np.float32)
    tokens = ts.sample(x, temperature, seed=1, position=np.arange(60), semantics=semantics).tokens
    assert (set(tokens.tolist()) == {0}) == greedy
