"""Arrays of JAX and CuPy: bits as from NumPy, results of their own kind, streams and devices respected.

CuPy runs on a GPU alone; what the binding asks of it is tested with a stand-in on the CPU.
"""

import contextlib
import importlib.util
import sys
import types
from pathlib import Path

import numpy as np
import pytest

import tokenstep as ts

EXAMPLES = Path(__file__).parents[2] / "examples"
RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(3, 500)).astype(np.float32) * 3
BITMASK = np.full((3, 16), -2, np.int32)
PAGES = RNG.normal(size=(2, 5, 4, 2, 16)).astype(np.float32)  # of keys, of values
QUERIES = RNG.normal(size=(3, 4, 16)).astype(np.float32)
TABLE = np.array([[4, 1], [0, 2], [3, 3]], np.int32)
LENGTHS = np.array([5, 8, 1], np.int32)
PAGED = (QUERIES, *PAGES, TABLE, LENGTHS)


def example(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sampler():
    made = ts.Sampler(3, 500)
    for row in range(3):
        made.admit(row, ts.SamplingParams(seed=row, top_k=20, logprobs=row), [1, 2])
    return made


OPS = {
    "sample": lambda x: ts.sample(x(LOGITS), 0.8, x(np.array([0, 5, 9], np.int32)), seed=7, logprobs=3,
                                  token_bitmask=x(BITMASK)),
    "sample float16": lambda x: ts.sample(x(LOGITS.astype(np.float16)), seed=7, top_p=0.9),
    "Sampler.step": lambda x: sampler().step(x(LOGITS), rows=x(np.array([2, 0, 1], np.int32))),
    "apply_logits": lambda x: (ts.apply_logits(x(LOGITS), top_k=9, min_p=0.1),),
    "paged_attention": lambda x: (ts.paged_attention(*map(x, PAGED)),),
    "paged_attention with lse": lambda x: ts.paged_attention(*map(x, PAGED), return_lse=True),
    "merge_attention": lambda x: ts.merge_attention(x(QUERIES[:, None]), x(QUERIES[:, None, :, 0])),
}  # fmt: skip


# ---- JAX --------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def jax():
    return pytest.importorskip("jax")


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_jax_arrays_give_the_bits_of_numpy_as_jax_arrays(jax, op):
    for ours, expected in zip(op(jax.numpy.asarray), op(np.asarray), strict=True):
        assert isinstance(ours, jax.Array) == (expected is not None)
        if expected is not None:
            np.testing.assert_array_equal(np.asarray(ours), expected)


def test_bfloat16_of_jax_is_read_as_that_of_torch(jax):
    torch = pytest.importorskip("torch")
    logits = torch.from_numpy(LOGITS).bfloat16()
    ours = ts.sample(jax.numpy.asarray(LOGITS, jax.numpy.bfloat16), seed=3).tokens
    assert ours.tolist() == ts.sample(logits, seed=3).tokens.tolist()


def test_nothing_is_written_into_an_immutable_array(jax):
    x = jax.numpy.asarray
    k_cache, v_cache, new = x(PAGES[0]), x(PAGES[1]), x(PAGES[0, 0, :3])
    with pytest.raises(ValueError, match=r"k_cache is a jaxlib.*, which is immutable"):
        ts.append_kv(new, new, k_cache, v_cache, x(TABLE), x(LENGTHS))
    with pytest.raises(ValueError, match=r"k_cache is a jaxlib.*, which is immutable"):
        ts.paged_attention(x(QUERIES), k_cache, v_cache, x(TABLE), x(LENGTHS), k=new, v=new)
    with pytest.raises(ValueError, match=r"out is a jaxlib.*, which is immutable"):
        ts.apply_logits(x(LOGITS), out=x(LOGITS))
    np.testing.assert_array_equal(k_cache, PAGES[0])


def test_sample_jax(jax, capsys):
    """The jitted loop gives what a loop over ts.sample gives, and its attention what softmax gives."""
    sample_jax = example("sample_jax")
    sample_jax.main()
    assert len(capsys.readouterr().out.splitlines()) == 5
    table, seeds = np.asarray(sample_jax.bigram_table()), np.array([5, 6, 7])
    texts = sample_jax.decode(table, np.array([0, 3, 8], np.int32), seeds, steps=8)
    last = np.array([0, 3, 8])
    for position in range(8):
        last = ts.sample(table[last], temperature=0.8, top_p=0.95, seed=seeds, position=position).tokens
        np.testing.assert_array_equal(texts[:, position], last)
    q, k, v = QUERIES[0, :1], PAGES[0, :2, :3, 0].reshape(6, 1, 16), PAGES[1, :2, :3, 0].reshape(6, 1, 16)
    weights = np.exp(k[:, 0] @ q[0] / 4)
    np.testing.assert_allclose(sample_jax.attend(q, k, v)[0], weights @ v[:, 0] / weights.sum(), rtol=1e-5)


# ---- CuPy -------------------------------------------------------------------------------------------------
@pytest.fixture
def cupy(monkeypatch):
    """A CuPy of NumPy arrays, whose stream is 77; ``asked`` is what the binding has called."""
    asked = []

    class ndarray:
        def __init__(self, values):
            self.values = np.array(values)
            self.dtype = self.values.dtype

        def __dlpack__(self, *, stream):
            asked.append(("stream", stream))
            return self.values.__dlpack__()

        def __dlpack_device__(self):
            return (1, 0)

    ndarray.__module__ = "cupy"

    def empty(shape, dtype):
        asked.append(("empty", shape, dtype))
        return ndarray(np.empty(shape, dtype))

    @contextlib.contextmanager
    def device(number):
        asked.append(("enter", number))
        try:
            yield
        finally:
            asked.append(("exit", number))

    cuda = types.ModuleType("cupy.cuda")
    cuda.Device = device
    cuda.stream = 77
    cuda.get_current_stream = lambda number: types.SimpleNamespace(ptr=cuda.stream)
    package = types.ModuleType("cupy")
    package.ndarray, package.empty, package.cuda, package.asked = ndarray, empty, cuda, asked
    monkeypatch.setitem(sys.modules, "cupy", package)
    monkeypatch.setitem(sys.modules, "cupy.cuda", cuda)
    return package


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_results_of_cupy_arrays_are_made_by_cupy(cupy, op):
    for ours, expected in zip(op(cupy.ndarray), op(np.asarray), strict=True):
        assert isinstance(ours, cupy.ndarray) == (expected is not None)
        if expected is not None:
            np.testing.assert_array_equal(ours.values, expected)
            assert ours.dtype == expected.dtype
    assert {call[1] for call in cupy.asked if call[0] == "stream"} == {77}
    made = [cupy.asked[i - 1 : i + 2] for i, call in enumerate(cupy.asked) if call[0] == "empty"]
    assert made
    assert all((before, after) == (("enter", 0), ("exit", 0)) for before, _, after in made)


def test_cupy_is_told_the_stream_of_the_launch_by_dlpacks_number(cupy):
    for stream, told in ((0, 1), (2, 2), (1 << 46, 1 << 46)):  # the default one, the thread's, a pointer
        cupy.cuda.stream = stream
        cupy.asked.clear()
        out = ts.SampleOutput(cupy.ndarray(np.empty(3, np.int64)), cupy.ndarray(np.empty(3, np.int32)))
        made = ts.Sampler(3, 500)
        for row in range(3):
            made.admit(row, ts.SamplingParams(temperature=0))
        assert made.step(cupy.ndarray(LOGITS), out=out) is out
        np.testing.assert_array_equal(out.tokens.values, LOGITS.argmax(1))
        assert set(cupy.asked) == {("stream", told)}


def test_an_error_of_cupys_allocator_leaves_the_device_and_comes_through(cupy):
    def full(shape, dtype):
        raise MemoryError("out of GPU memory")

    cupy.empty = full
    with pytest.raises(MemoryError, match="out of GPU memory"):
        ts.sample(cupy.ndarray(LOGITS))
    assert cupy.asked[-2:] == [("enter", 0), ("exit", 0)]


@pytest.mark.cuda
def test_sample_cupy():
    """On a GPU, in a stream of CuPy's own: tokens as from NumPy."""
    cp = pytest.importorskip("cupy")
    sample_cupy = example("sample_cupy")
    with cp.cuda.Stream(non_blocking=True):
        logits = cp.asarray(np.tile(LOGITS, (1, 64)))
        out = sample_cupy.in_one_call(logits)
        expected = ts.sample(cp.asnumpy(logits), temperature=0.7, top_p=0.9, seed=1, logprobs=2)
        for ours, of_numpy in zip(out, expected, strict=True):
            np.testing.assert_array_equal(cp.asnumpy(ours), of_numpy)
    texts = cp.asnumpy(sample_cupy.step_by_step(3, 4))
    assert texts.shape == (4, 3)
    assert ((texts >= 0) & (texts < sample_cupy.VOCAB_SIZE)).all()
