"""A row's token and log probabilities are a function of that row alone, whatever runs it and wherever it
lies."""

import os
import subprocess
import sys

import numpy as np
import pytest
from sample_cases import DTYPES, Case, assert_same, random_case, supported_isas

from tokenstep import _native
from tokenstep import sampling as ts

SIZES = [33, 257, 4099, 128256]


def run(case):
    return ts.sample(case.logits, check=False, **case.arguments)


def cases(vocab_size, seed=0):
    pytest.importorskip("torch")
    rng = np.random.default_rng([seed, vocab_size])
    for dtype in DTYPES:
        yield random_case(rng, dtype, vocab_size, max(4, min(48, 200_000 // vocab_size)))


@pytest.mark.parametrize("vocab_size", SIZES)
def test_bits_are_the_same_on_every_instruction_set(vocab_size):
    for case in cases(vocab_size):
        _native.cpu.set_isa("portable")
        want = run(case)
        for isa in supported_isas():
            _native.cpu.set_isa(isa)
            assert_same(run(case), want, isa)


@pytest.mark.parametrize("backend", ["pool", "openmp"])
@pytest.mark.parametrize("vocab_size", SIZES)
def test_bits_are_the_same_for_any_number_of_threads(vocab_size, backend):
    for case in cases(vocab_size, 1):
        _native.cpu.set_num_threads(1)
        want = run(case)
        _native.cpu.set_thread_backend(backend)
        for threads in (2, 3, 5, 16):
            _native.cpu.set_num_threads(threads)
            assert_same(run(case), want, f"{threads} threads")


@pytest.mark.parametrize("vocab_size", SIZES)
def test_a_row_alone_gives_what_it_gives_in_a_batch(vocab_size):
    for case in cases(vocab_size, 2):
        batch = run(case)
        for b in range(len(case.exact)):
            assert_same(run(case.row(b)), [None if a is None else a[b : b + 1] for a in batch], f"row {b}")


@pytest.mark.parametrize("vocab_size", SIZES)
def test_rows_may_come_in_any_order(vocab_size):
    rng = np.random.default_rng(3)
    for case in cases(vocab_size, 3):
        order = rng.permutation(len(case.exact))
        shared = ("logprobs", "logprobs_mode")
        arguments = {
            k: v
            if k in shared or v is None
            else v[order]
            if isinstance(v, np.ndarray)
            else [v[i] for i in order]
            for k, v in case.arguments.items()
        }
        moved = run(Case(case.logits[order], case.exact[order], arguments))
        assert_same(moved, [None if a is None else a[order] for a in run(case)])


@pytest.mark.parametrize("padding", [1, 7, 64])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", [1, 33, 255, 4099])
def test_what_lies_between_strided_rows_is_never_read(dtype, vocab_size, padding):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng([4, vocab_size])
    case = random_case(rng, dtype, vocab_size, 16)
    want = run(case)
    tight = torch.as_tensor(case.logits)
    for poison in (float("nan"), float("inf"), 1e4):
        padded = torch.full((18, vocab_size + padding), poison, dtype=tight.dtype)
        padded[1:17, :vocab_size] = tight
        view = padded[1:17, :vocab_size]
        assert_same(ts.sample(view, check=False, **case.arguments), want, f"padding of {poison}")


@pytest.mark.parametrize("offset", range(1, 8))
def test_rows_may_begin_at_any_address(offset):
    case = random_case(np.random.default_rng(5), "float32", 300, 8)
    memory = np.full(8 * 300 + 16, np.nan, np.float32)
    memory[offset : offset + 2400] = case.logits.ravel()
    shifted = memory[offset : offset + 2400].reshape(8, 300)
    assert_same(ts.sample(shifted, check=False, **case.arguments), run(case))


def test_rows_may_be_repeated_or_run_backwards():
    case = random_case(np.random.default_rng(6), "float32", 1000, 8)
    assert_same(
        ts.sample(case.logits[::-1], check=False, seed=5, logprobs=3),
        ts.sample(case.logits[::-1].copy(), check=False, seed=5, logprobs=3),
    )
    same = np.broadcast_to(case.logits[0], (5, 1000))
    assert_same(
        ts.sample(same, check=False, seed=5, position=list(range(5))),
        ts.sample(same.copy(), check=False, seed=5, position=list(range(5))),
    )


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_numpy_and_torch_give_the_same_bits_each_in_its_own_kind(dtype):
    torch = pytest.importorskip("torch")
    case = random_case(np.random.default_rng(7), dtype, 500, 32)
    from_numpy = run(case)
    tensors = {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in case.arguments.items()}
    from_torch = ts.sample(torch.from_numpy(case.logits), check=False, **tensors)
    assert all(a is None or type(a) is np.ndarray for a in from_numpy)
    assert all(a is None or type(a) is torch.Tensor for a in from_torch)
    assert_same(from_torch, from_numpy)


def test_parameters_may_be_arrays_lists_or_numbers():
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(8).standard_normal((6, 400)).astype(np.float32)
    plain = {
        "temperature": 0.7,
        "top_k": 40,
        "top_p": 0.9,
        "min_p": 0.01,
        "seed": 11,
        "position": 3,
        "substream": 2,
    }
    want = ts.sample(x, **plain)
    integers = ("top_k", "seed", "position", "substream")
    assert_same(ts.sample(x, **{k: [v] * 6 for k, v in plain.items()}), want)
    assert_same(ts.sample(x, **{k: (v,) * 6 for k, v in plain.items()}), want)
    for dtype in (np.int32, np.int64, np.uint32, np.uint64):
        arrays = {k: np.full(6, v, dtype if k in integers else np.float32) for k, v in plain.items()}
        assert_same(ts.sample(x, **arrays), want)
    arrays = {k: np.full(12, v, np.int64 if k in integers else np.float64)[::2] for k, v in plain.items()}
    assert_same(ts.sample(x, **arrays), want)
    assert_same(ts.sample(x, **{k: torch.full((6,), v) for k, v in plain.items()}), want)
    assert_same(ts.sample(x, **{k: np.asarray(v)[()] for k, v in plain.items()}), want)
    assert_same(ts.sample(x, **{k: np.asarray(v) for k, v in plain.items()}), want)


def test_histories_may_be_lists_tuples_or_arrays():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(9)
    x = rng.standard_normal((4, 100)).astype(np.float32)
    ids = [rng.integers(0, 100, n).tolist() for n in (0, 1, 17, 300)]
    penalties = {"repetition_penalty": 1.3, "frequency_penalty": 0.4, "presence_penalty": 0.2, "seed": 1}

    def sample(prompt, output):
        return ts.sample(x, prompt_tokens=prompt, output_tokens=output, logprobs=2, **penalties)

    want = sample(ids, ids[::-1])
    assert_same(sample(tuple(map(tuple, ids)), [np.array(i, np.int32) for i in ids[::-1]]), want)
    assert_same(
        sample([torch.tensor(i, dtype=torch.int64) for i in ids], [tuple(i) for i in ids[::-1]]), want
    )


def test_flushing_subnormal_numbers_in_the_process_changes_no_bit():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(10)
    some = [random_case(rng, dtype, v, 24) for dtype in DTYPES for v in (33, 1000)]
    tiny = random_case(rng, "float32", 300, 48, kinds=("subnormal",))
    want = [run(c) for c in [*some, tiny]]
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush subnormal numbers")
    try:
        for threads in (1, 2):
            _native.cpu.set_num_threads(threads)
            got = [run(c) for c in [*some, tiny]]
            assert torch.tensor(1e-40) * 1 == 0, "the caller's setting must come back"
            for a, b in zip(got, want, strict=True):
                assert_same(a, b, f"{threads} threads")
    finally:
        torch.set_flush_denormal(False)


def test_a_process_without_torch_gives_the_same_bits():
    pytest.importorskip("torch")
    script = """
import numpy as np, sys
from tokenstep import _native, sampling as ts
_native.cpu.set_num_threads(2)
x = np.random.default_rng(0).standard_normal((16, 5000)).astype(np.float32)
out = ts.sample(x, top_p=0.9, temperature=0.8, seed=3, position=list(range(16)), logprobs=0)
assert "torch" not in sys.modules
print(out.tokens.tolist(), out.logprobs.view(np.int32).tolist())
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    told = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    x = np.random.default_rng(0).standard_normal((16, 5000)).astype(np.float32)
    out = ts.sample(x, top_p=0.9, temperature=0.8, seed=3, position=list(range(16)), logprobs=0)
    assert told.stdout.strip() == f"{out.tokens.tolist()} {out.logprobs.view(np.int32).tolist()}"


def test_log_probabilities_do_not_change_the_token():
    rng = np.random.default_rng(11)
    for vocab_size in (100, 5000, 50000):
        case = random_case(rng, "float32", vocab_size, 24)
        arguments = {k: v for k, v in case.arguments.items() if k not in ("logprobs", "logprobs_mode")}
        want = ts.sample(case.logits, check=False, **arguments).tokens
        for logprobs in (0, 7):
            for mode in ("raw", "processed"):
                got = ts.sample(case.logits, check=False, logprobs=logprobs, logprobs_mode=mode, **arguments)
                assert np.array_equal(got.tokens, want)


def test_parameters_that_change_nothing_change_no_bit():
    case = random_case(
        np.random.default_rng(12), "float32", 700, 32, kinds=("normal", "heavy_tails", "few_values")
    )
    want = ts.sample(case.logits, seed=9, position=range_list(32), logprobs=5)
    everything = ts.sample(
        case.logits,
        temperature=1.0,
        top_k=700,
        top_p=1.0,
        min_p=0.0,
        prompt_tokens=[[1, 2, 3]] * 32,
        output_tokens=[[4, 5, 5]] * 32,
        logit_bias={6: 0.0},
        token_bitmask=np.full((32, 22), -1, np.int32),
        seed=9,
        position=range_list(32),
        logprobs=5,
    )
    assert_same(everything, want)


def range_list(n):
    return list(range(n))
