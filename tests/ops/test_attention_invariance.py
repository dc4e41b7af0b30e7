"""A query's bits are a function of the query, its keys and values, and the options: not of its batch, nor of
how its sequence came into the cache, nor of what runs it (on one instruction set)."""

import numpy as np
import pytest
from attention_cases import (
    DTYPES,
    EVERY_CACHE,
    Heads,
    Sequence,
    array_of,
    assert_same_bits,
    bits,
    paged,
    random_sequence,
    supported_isas,
    torch,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tokenstep as ts
from tokenstep import _native

HEADS = {
    "SmolLM2": Heads(9, 3, 64),
    "MHA": Heads(2, 2, 128),
    "MQA": Heads(7, 1, 80),
    "wide": Heads(66, 1, 40),
}
LENGTHS = [(1300, 1), (70, 33), (0, 1), (1, 1), (140, 140), (513, 1), (256, 2), (31, 1), (600, 20)]
OPTIONS = {
    "plain": {},
    "window": {"window": 100},
    "all": {"window": 300, "softcap": 5.0, "scale": 0.2, "alibi_slopes": True, "sinks": True},
}


def sequences_of(dtype, heads, lengths=LENGTHS, seed=0):
    rng = np.random.default_rng(seed)
    return [random_sequence(rng, dtype, heads, n, m, 2.0) for n, m in lengths]


def options_of(name, heads, batch):
    """Options with their arrays made for these heads, in the batch's kind."""
    arrays = {
        "alibi_slopes": np.linspace(0.5, 0.01, heads.num_heads),
        "sinks": np.linspace(-2, 3, heads.num_heads),
    }
    options = {n: arrays[n].astype(np.float32) if o is True else o for n, o in OPTIONS[name].items()}
    if isinstance(batch.arguments["q"], torch.Tensor):
        return {n: torch.from_numpy(o) if isinstance(o, np.ndarray) else o for n, o in options.items()}
    return options


def run(sequences, dtype, heads, options="plain", **how):
    """The bits of (out, lse) of each sequence."""
    batch = paged(sequences, dtype, **how)
    out, lse = batch.attend(**options_of(options, heads, batch))
    return list(zip(batch.split(bits(out)), batch.split(bits(lse)), strict=True))


def assert_all_same(got, want, context=""):
    """Equal bits of every sequence."""
    for r, (a, b) in enumerate(zip(got, want, strict=True)):
        assert_same_bits(a, b, f"{context} sequence {r}:")


every_case = pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
every_dtype = pytest.mark.parametrize("dtype", [*DTYPES, "bfloat16/float8_e4m3"])


@every_case
@every_dtype
@pytest.mark.parametrize("options", OPTIONS)
def test_a_sequence_alone_gives_what_it_gives_in_a_batch(dtype, heads, options):
    sequences = sequences_of(dtype, heads)
    batch = run(sequences, dtype, heads, options)
    for s, want in zip(sequences, batch, strict=True):
        assert_all_same(run([s], dtype, heads, options), [want])


@every_case
@every_dtype
def test_sequences_may_come_in_any_order(dtype, heads):
    sequences = sequences_of(dtype, heads)
    order = np.random.default_rng(1).permutation(len(sequences))
    want = run(sequences, dtype, heads)
    assert_all_same(run(sequences, dtype, heads, order=order), [want[i] for i in order])


@every_case
@every_dtype
@pytest.mark.parametrize("options", OPTIONS)
def test_a_query_alone_gives_what_it_gives_in_a_prefill(dtype, heads, options):
    s = random_sequence(np.random.default_rng(2), dtype, heads, 300, 190, 2.0)
    [(out, lse)] = run([s], dtype, heads, options)
    alone = run([s.last(i, i + 1) for i in range(190)], dtype, heads, options)
    assert_all_same(alone, [(out[i : i + 1], lse[i : i + 1]) for i in range(190)])


@every_case
@every_dtype
@pytest.mark.parametrize("size", [1, 3, 64, 100])
def test_a_prefill_in_chunks_gives_what_it_gives_at_once(dtype, heads, size):
    s = random_sequence(np.random.default_rng(3), dtype, heads, 200, 200, 2.0)
    [(out, lse)] = run([s], dtype, heads, "window")
    pieces = [(i, min(i + size, 200)) for i in range(0, 200, size)]
    got = [run([s.last(*piece)], dtype, heads, "window")[0] for piece in pieces]
    assert_all_same(got, [(out[a:b], lse[a:b]) for a, b in pieces])


@every_case
@every_dtype
def test_blocks_may_have_any_size_and_place(dtype, heads):
    sequences = sequences_of(dtype, heads)
    want = run(sequences, dtype, heads, "all")
    for block_size in (1, 7, 16, 17, 32, 256, 2000):
        got = run(
            sequences, dtype, heads, "all", block_size=block_size, rng=np.random.default_rng(block_size)
        )
        assert_all_same(got, want, f"blocks of {block_size}")


@pytest.mark.parametrize("layout", ["HND", "joint", "padded"])
@every_dtype
def test_layouts_do_not_matter(dtype, layout):
    heads = HEADS["MQA"]
    sequences = sequences_of(dtype, heads)
    assert_all_same(
        run(sequences, dtype, heads, layout=layout, block_size=17),
        run(sequences, dtype, heads, block_size=17),
    )


@pytest.mark.parametrize("backend", ["pool", "openmp"])
@every_case
@every_dtype
def test_the_number_of_threads_does_not_matter(dtype, heads, backend):
    sequences = sequences_of(dtype, heads)
    _native.cpu.set_num_threads(1)
    want = run(sequences, dtype, heads, "all")
    _native.cpu.set_thread_backend(backend)
    for threads in (2, 3, 5, 16):
        _native.cpu.set_num_threads(threads)
        assert_all_same(run(sequences, dtype, heads, "all"), want, f"{threads} threads")


@every_dtype
def test_a_long_sequence_alone_is_the_same_on_many_threads(dtype):
    """Its chunks are then spread over threads, and merged by whichever comes last."""
    heads = HEADS["SmolLM2"]
    s = random_sequence(np.random.default_rng(4), dtype, heads, 5000, 3)
    _native.cpu.set_num_threads(1)
    want = run([s], dtype, heads, "all")
    _native.cpu.set_num_threads(8)
    for _ in range(20):
        assert_all_same(run([s], dtype, heads, "all"), want)


@every_dtype
def test_later_tokens_do_not_change_earlier_queries(dtype):
    """What lies behind a query in its own block is as good as absent."""
    heads = HEADS["SmolLM2"]
    s = random_sequence(np.random.default_rng(5), dtype, heads, 100, 100)
    batch = paged([s], dtype)
    whole = batch.attend()
    first = paged([s.last(0, 60)], dtype)
    first.arguments["k_cache"], first.arguments["v_cache"] = (
        batch.arguments["k_cache"],
        batch.arguments["v_cache"],
    )
    first.arguments["block_table"] = batch.arguments["block_table"]
    assert_same_bits(first.attend(), [x[:60] for x in whole])


@every_dtype
def test_a_result_repeats(dtype):
    heads = HEADS["SmolLM2"]
    sequences = sequences_of(dtype, heads)
    want = run(sequences, dtype, heads, "all")
    for _ in range(3):
        assert_all_same(run(sequences, dtype, heads, "all"), want)


@pytest.mark.parametrize("dtype", EVERY_CACHE)
def test_the_instruction_sets_that_agree(dtype):
    """AVX2 and AVX-512 give the same bits; the bfloat16 products of AVX-512 BF16 have their own, and so has
    the portable code, without fused multiply-adds."""
    heads = HEADS["MQA"]
    sequences = sequences_of(dtype, heads)
    found = {}
    for isa in supported_isas():
        _native.cpu.set_isa(isa)
        found[isa] = run(sequences, dtype, heads, "all")
    if "avx512" in found:
        assert_all_same(found["avx512"], found["avx2"])
    if "avx512_bf16" in found and dtype != "bfloat16":
        assert_all_same(found["avx512_bf16"], found["avx512"])


@pytest.fixture
def flush_denormals():
    """Calls torch.set_flush_denormal for this thread, and undoes it."""
    yield torch.set_flush_denormal
    torch.set_flush_denormal(False)


@pytest.mark.parametrize("isa", supported_isas())
@pytest.mark.parametrize("dtype", DTYPES)
def test_flushing_of_subnormal_numbers_in_the_caller_changes_nothing(dtype, isa, flush_denormals):
    """torch sets it for the calling thread alone: threads that help would then differ from it."""
    _native.cpu.set_isa(isa)
    s = random_sequence(np.random.default_rng(6), dtype, Heads(4, 2, 64), 2500)
    smallest = 1e-5 if dtype == "float16" else 1e-38
    tiny = Sequence(s.q, s.k, array_of(s.v * smallest, dtype)[1])
    rope = ts.Rope(torch.full((2500, 32), 0.6), torch.full((2500, 32), 0.8))
    found = []
    for flush, threads in ((False, 1), (True, 1), (True, 4)):
        flush_denormals(False)  # for what makes the batch
        batch = paged([tiny], dtype, library="torch")
        new = torch.full((1, 2, 64), smallest / 50, dtype=getattr(torch, dtype))
        _native.cpu.set_num_threads(threads)
        assert flush_denormals(flush)
        out, lse = batch.attend(k=new, v=new, rope=rope)
        merged = ts.merge_attention(torch.stack([out, out]), torch.stack([lse, lse]))
        found.append([bits(x) for x in (out, lse, *merged, batch.arguments["k_cache"])])
    assert len(np.unique(found[0][0])) > 9, "the results are subnormal, not zeros"
    for other in found[1:]:
        for a, b in zip(other, found[0], strict=True):
            np.testing.assert_array_equal(a, b)


@st.composite
def two_ways(draw):
    """A sequence with queries, and a second way to compute some of them."""
    kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 20))
    length = draw(st.integers(1, 1200))
    queries = draw(st.integers(1, min(length, 60)))
    first = draw(st.integers(0, queries - 1))
    return {
        "heads": Heads(kv_heads * group, kv_heads, 8 * draw(st.integers(1, 32))),
        "length": length,
        "queries": queries,
        "part": (first, draw(st.integers(first + 1, queries))),
        "dtype": draw(st.sampled_from(EVERY_CACHE)),
        "isa": draw(st.sampled_from(supported_isas())),
        "block_sizes": (draw(st.integers(1, 300)), draw(st.integers(1, 300))),
        "layout": draw(st.sampled_from(["NHD", "HND", "joint", "padded"])),
        "threads": (draw(st.integers(1, 4)), draw(st.integers(1, 4))),
        "options": draw(st.sampled_from(sorted(OPTIONS))),
        "neighbours": draw(st.lists(st.integers(0, 300), max_size=3)),
        "seed": draw(st.integers(0, 1 << 30)),
    }


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=two_ways())
def test_any_two_ways_give_the_same_bits(case):
    rng, heads, dtype = np.random.default_rng(case["seed"]), case["heads"], case["dtype"]
    s = random_sequence(rng, dtype, heads, case["length"], case["queries"], 2.0)
    others = [random_sequence(rng, dtype, heads, n) for n in case["neighbours"]]
    _native.cpu.set_isa(case["isa"])
    a, b = case["part"]
    _native.cpu.set_num_threads(case["threads"][0])
    [(out, lse)] = run([s], dtype, heads, case["options"], block_size=case["block_sizes"][0])
    _native.cpu.set_num_threads(case["threads"][1])
    how = {"block_size": case["block_sizes"][1], "layout": case["layout"], "rng": rng}
    got = run([*others, s.last(a, b)], dtype, heads, case["options"], **how)
    assert_all_same(got[-1:], [(out[a:b], lse[a:b])])
