"""apply_logits: steps 0-8 alone, bit by bit against the reference, into new arrays, into ``out`` and in
place."""

import numpy as np
import pytest
from sample_cases import DTYPES, random_case, supported_isas

from tokenstep import _native
from tokenstep import sampling as ts
from tokenstep.reference import sampling as reference

DRAW = ("seed", "position", "substream", "logprobs", "logprobs_mode")


def editing(case):
    return {k: v for k, v in case.arguments.items() if k not in DRAW}


def same_bits(a, b):
    return np.array_equal(np.asarray(a).view(np.int32), np.asarray(b).view(np.int32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", [1, 2, 31, 33, 257, 1000, 4099, 32003])
def test_processed_logits_have_the_bits_of_the_reference_on_every_instruction_set(vocab_size, dtype):
    pytest.importorskip("torch")
    rng = np.random.default_rng([20, vocab_size])
    for _ in range(4):
        case = random_case(rng, dtype, vocab_size, max(2, min(64, 100_000 // vocab_size)))
        want, _ = reference.apply_logits(case.exact, **editing(case))
        for isa in supported_isas():
            _native.cpu.set_isa(isa)
            _native.cpu.set_num_threads(int(rng.integers(1, 4)))
            got = np.asarray(ts.apply_logits(case.logits, check=False, **editing(case)))
            assert got.dtype == np.float32
            rows = np.flatnonzero((got.view(np.int32) != want.view(np.int32)).any(axis=1))
            assert len(rows) == 0, f"{isa}, row {rows[0]}: {got[rows[0]]} but expected {want[rows[0]]}"


def test_drawing_from_processed_logits_draws_what_sample_draws():
    rng = np.random.default_rng(21)
    for _ in range(10):
        case = random_case(rng, "float32", 500, 64, kinds=("normal", "heavy_tails", "few_values", "wide"))
        drawing = {k: case.arguments[k] for k in ("seed", "position", "substream")}
        want = ts.sample(case.logits, check=False, **editing(case), **drawing)
        processed = ts.apply_logits(case.logits, check=False, **editing(case))
        got = ts.sample(processed, check=False, **drawing)
        finite = ~np.isposinf(processed).any(axis=1)  # an arg max that penalties made infinite is no logit
        assert finite.mean() > 0.5
        assert np.array_equal(got.tokens[finite], want.tokens[finite])
        assert np.array_equal(got.status[finite] > 0, want.status[finite] > 0)


def test_the_arguments_of_sample_are_taken_alike():
    x = np.random.default_rng(22).standard_normal((3, 40)).astype(np.float32)
    arguments = {"temperature": 0.5, "top_k": 7, "seed": 3, "position": 4, "substream": 5, "logprobs": 2}
    got = ts.apply_logits(x, logprobs_mode="processed", check=True, **arguments)
    assert same_bits(got, ts.apply_logits(x, temperature=0.5, top_k=7))


def test_a_greedy_row_keeps_its_arg_max_alone():
    x = np.array([[1.0, 4.0, 4.0, -1.0]], np.float32)
    out = ts.apply_logits(x, temperature=0, top_p=0.5, logit_bias={2: -1.0})
    assert out.tolist() == [[-np.inf, 4.0, -np.inf, -np.inf]]


def test_a_bad_row_is_all_minus_infinity_and_its_neighbours_are_not():
    x = np.zeros((4, 10), np.float32)
    x[1, 3], x[2] = np.nan, -np.inf
    out = ts.apply_logits(x, check=False)
    assert (out[1:3] == -np.inf).all()
    assert (out[[0, 3]] == 0).all()


def test_out_is_filled_and_returned():
    x = np.random.default_rng(23).standard_normal((5, 300)).astype(np.float16)
    want = ts.apply_logits(x, temperature=0.7, top_p=0.9)
    out = np.full((5, 300), 9, np.float32)
    assert ts.apply_logits(x, temperature=0.7, top_p=0.9, out=out) is out
    assert same_bits(out, want)


@pytest.mark.parametrize("vocab_size", [1, 31, 257, 5000])
def test_strided_out_is_written_only_where_its_rows_lie(vocab_size):
    x = np.random.default_rng(24).standard_normal((6, vocab_size)).astype(np.float32)
    want = ts.apply_logits(x, top_k=5, temperature=1.3)
    memory = np.full((13, vocab_size + 9), 7, np.float32)
    view = memory[1::2, 4 : 4 + vocab_size]
    ts.apply_logits(x, top_k=5, temperature=1.3, out=view)
    assert same_bits(view.copy(), want)
    view[:] = 7
    assert (memory == 7).all()


@pytest.mark.parametrize("vocab_size", [1, 33, 257, 5000, 70000])
def test_float32_logits_can_be_processed_in_place(vocab_size):
    rng = np.random.default_rng(25)
    for _ in range(5):
        case = random_case(rng, "float32", vocab_size, 6)
        want = ts.apply_logits(case.logits, check=False, **editing(case))
        x = case.logits.copy()
        ts.apply_logits(x, check=False, out=x, **editing(case))
        assert same_bits(x, want)
        wide = np.full((6, vocab_size + 3), np.nan, np.float32)
        wide[:, :vocab_size] = case.logits
        ts.apply_logits(wide[:, :vocab_size], check=False, out=wide[:, :vocab_size], **editing(case))
        assert same_bits(wide[:, :vocab_size].copy(), want)
        assert np.isnan(wide[:, vocab_size:]).all()


def test_outputs_are_of_the_kind_of_the_logits():
    torch = pytest.importorskip("torch")
    x = torch.randn(3, 20)
    assert type(ts.apply_logits(x)) is torch.Tensor
    assert type(ts.apply_logits(x.bfloat16())) is torch.Tensor
    assert ts.apply_logits(x.half()).dtype == torch.float32
    out = np.empty((3, 20), np.float32)
    assert ts.apply_logits(x, out=out) is out
    assert same_bits(out, ts.apply_logits(x))


def test_jax_arrays_give_jax_arrays():
    jax = pytest.importorskip("jax")
    x = np.random.default_rng(26).standard_normal((3, 50)).astype(np.float32)
    out = ts.sample(jax.numpy.asarray(x), seed=1, logprobs=2)
    want = ts.sample(x, seed=1, logprobs=2)
    for a, b in zip(out, want, strict=True):
        assert isinstance(a, jax.Array)
        assert np.array_equal(np.asarray(a), b)
    assert isinstance(ts.apply_logits(jax.numpy.asarray(x), top_k=3), jax.Array)
    assert isinstance(ts.sample(jax.numpy.asarray(x, jax.numpy.bfloat16), seed=1).tokens, jax.Array)
