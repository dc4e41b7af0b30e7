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
@settings(max_examples=25, deadline=None)
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
