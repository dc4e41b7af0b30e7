"""append_kv and the append of paged_attention: rotation, rounding, pages; the same bits fused and apart."""

import numpy as np
import pytest
from attention_append_cases import Case, angles_of
from attention_cases import (
    DTYPES,
    EVERY_CACHE,
    QUANTISED,
    UNIT_ROUNDOFF,
    Heads,
    array_of,
    assert_same_bits,
    bits,
    cache_dtype,
    numbers,
    random_sequence,
    scales_of,
    supported_isas,
    torch,
)

import tokenstep as ts
from tokenstep import _native
from tokenstep.reference import attention as reference


@pytest.mark.parametrize("layout", ["NHD", "HND", "joint", "padded"])
@pytest.mark.parametrize("block_size", [1, 16, 17, 256])
@pytest.mark.parametrize("dtype", EVERY_CACHE)
def test_rows_are_written_to_their_slots_and_nowhere_else(dtype, block_size, layout):
    case = Case(dtype, block_size=block_size, layout=layout)
    want = [case.batch.exact[n].copy() for n in ("k_cache", "v_cache")]
    reference.append_kv(*case.stored(), *want, *case.where())
    case.append()
    for got, expected in zip(case.caches(), want, strict=True):
        np.testing.assert_array_equal(got, bits(array_of(expected, cache_dtype(dtype))[0]))


@pytest.mark.parametrize("isa", supported_isas())
@pytest.mark.parametrize("rotary_dim", [2, 6, 40, 80])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_and_queries_are_rotated_in_float32_and_rounded_once(dtype, interleaved, rotary_dim, isa):
    _native.cpu.set_isa(isa)
    case = Case(dtype)
    angles = angles_of(80, rotary_dim)
    q = case.batch.arguments["q"]
    exact_q = case.batch.exact["q"].astype(np.float64)
    case.append(q=q, rope=case.rope(angles, interleaved=interleaved))
    k_cache = numbers(case.batch.arguments["k_cache"])
    at = case.positions()
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    want_k = reference.rotate(case.k.astype(np.float64), at, cos, sin, interleaved)
    want_q = reference.rotate(exact_q, at, cos, sin, interleaved)
    table, lengths, start = case.where()
    rows = [(r, row, p) for r, row, p in reference.query_rows(lengths, start)]
    got_k = np.stack([k_cache[table[r, p // 16], p % 16] for r, _, p in rows])
    index = [row for _, row, _ in rows]
    # Half an ulp of the dtype, and three float32 roundings of numbers up to |a| + |b|.
    for got, want in ((got_k, want_k[index]), (numbers(q)[index], want_q[index])):
        half_ulp = UNIT_ROUNDOFF[dtype] * np.maximum(np.abs(want), 2.0**-14)
        assert (np.abs(got - want) <= half_ulp + 2.0**-23 * 8).all()
        np.testing.assert_array_equal(got[..., rotary_dim:], want[..., rotary_dim:])


@pytest.mark.parametrize("isa", supported_isas())
@pytest.mark.parametrize("rotary_dim", [6, 80])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", QUANTISED)
def test_keys_of_a_quantised_cache_are_rotated_and_divided_in_float32_and_rounded_once(
    dtype, interleaved, rotary_dim, isa
):
    _native.cpu.set_isa(isa)
    case = Case(dtype)
    case.append(rope=case.rope(angles_of(80, rotary_dim), interleaved=interleaved))
    angles = angles_of(80, rotary_dim)
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    case.k = reference.rotate(case.k, case.positions(), cos, sin, interleaved)
    want = case.batch.exact["k_cache"].copy()
    reference.append_kv(*case.stored()[:1] * 2, *[want] * 2, *case.where())
    np.testing.assert_array_equal(case.caches()[0], bits(array_of(want, cache_dtype(dtype))[0]))


@pytest.mark.parametrize("dtype", QUANTISED)
def test_what_is_beyond_a_quantised_cache_saturates_and_nan_stays_nan_where_there_is_one(dtype):
    case = Case(dtype, lengths=[(1, 1)])
    case.k[0, 0, :6] = case.v[0, 0, :6] = [np.nan, np.inf, -np.inf, 6e4, -6e4, 0]
    case.append()
    for cache in case.caches():
        codes = cache[case.where()[0][0, 0], 0, 0, :6].tolist()
        assert codes == ([0, 127, -128, 127, -128, 0] if "int8" in dtype else [0x7F, 0x7E, -2, 0x7E, -2, 0])


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rotation_has_the_same_bits_on_every_instruction_set(dtype, interleaved):
    found = []
    for isa in supported_isas():
        _native.cpu.set_isa(isa)
        case = Case(dtype)
        q = case.batch.arguments["q"]
        case.append(q=q, rope=case.rope(angles_of(80, 80), interleaved=interleaved))
        found.append([*case.caches(), bits(q)])
    for other in found[1:]:
        for a, b in zip(other, found[0], strict=True):
            np.testing.assert_array_equal(a, b)


def test_rotation_has_the_bits_of_transformers():
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    case = Case("float32", lengths=[(50, 50)])
    angles = angles_of(80, 80)
    q = case.batch.arguments["q"]
    want_q, want_k = torch.from_numpy(q.copy()), torch.from_numpy(case.k)
    at = torch.from_numpy(np.concatenate([angles, angles], 1)[case.positions()])
    want_q, want_k = llama.apply_rotary_pos_emb(
        want_q.transpose(0, 1)[None],
        want_k.transpose(0, 1)[None],
        at.cos().float()[None],
        at.sin().float()[None],
    )
    case.append(q=q, rope=case.rope(angles))
    assert (bits(q) == bits(want_q[0].transpose(0, 1))).all()
    table = case.where()[0]
    k_cache = case.batch.arguments["k_cache"]
    got_k = np.concatenate([k_cache[block] for block in table[0, :4]])[:50]
    assert (bits(got_k) == bits(want_k[0].transpose(0, 1))).all()


def test_interleaved_rotation_is_that_of_gptj():
    gptj = pytest.importorskip("transformers.models.gptj.modeling_gptj")
    case = Case("float32", lengths=[(50, 50)])
    angles = angles_of(80, 80)
    q = case.batch.arguments["q"]
    at = torch.from_numpy(angles[case.positions()])[None]
    want = gptj.apply_rotary_pos_emb(torch.from_numpy(q.copy())[None], at.sin().float(), at.cos().float())[0]
    case.append(q=q, rope=case.rope(angles, interleaved=True))
    assert (bits(q) == bits(want)).all()


# ---- fused -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("rope", [None, "neox", "interleaved", "partial"])
@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("dtype", EVERY_CACHE)
def test_attention_that_appends_equals_append_and_then_attention(dtype, threads, rope):
    _native.cpu.set_num_threads(threads)
    fused, apart = Case(dtype), Case(dtype)
    angles = angles_of(80, 30 if rope == "partial" else 80)
    options = {"rope": fused.rope(angles, interleaved=rope == "interleaved")} if rope else {}
    q_before = bits(fused.batch.arguments["q"]).copy()
    got = fused.batch.attend(k=fused.array(fused.k), v=fused.array(fused.v), **options)
    assert (bits(fused.batch.arguments["q"]) == q_before).all(), "the caller's q is left as it was"
    apart.append(q=apart.batch.arguments["q"], **options)
    assert_same_bits(got, apart.batch.attend())
    for a, b in zip(fused.caches(), apart.caches(), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_rotated_query_without_new_rows_sees_the_cache_as_it_is(dtype):
    case, turned = Case(dtype), Case(dtype)
    options = {"rope": case.rope(angles_of(80, 80))}
    for c in (case, turned):
        c.append()
    got = case.batch.attend(**options)
    turned.append(q=turned.batch.arguments["q"], rope=options["rope"])
    turned.append()  # k as it was, unrotated
    assert_same_bits(got, turned.batch.attend())


@pytest.mark.parametrize("dtype", EVERY_CACHE)
def test_tokens_appended_one_by_one_give_the_bits_of_a_prefill(dtype):
    """A sequence's life: a prefill at once, and the same tokens fed one at a time into another cache."""
    heads = Heads(4, 2, 64)
    rng = np.random.default_rng(7)
    s = random_sequence(rng, dtype, heads, 60, 60)
    angles = angles_of(64, 64)
    cos, sin = (torch.from_numpy(f(angles).astype(np.float32)) for f in (np.cos, np.sin))
    q, k, v = (torch.as_tensor(array_of(x, dtype)[0]) for x in (s.q, s.k, s.v))
    table = torch.tensor([[3, 0, 2, 1, -1]], dtype=torch.int32)
    scales = {n: torch.from_numpy(a) for n, a in scales_of(dtype, 2).items()}
    outs = []
    for step in (60, 1, 7):
        empty = torch.as_tensor(array_of(np.full((4, 16, 2, 64), np.nan), cache_dtype(dtype))[0])
        caches = [empty.clone(), empty.clone()]
        parts = []
        for i in range(0, 60, step):
            j = min(i + step, 60)
            out, lse = ts.paged_attention(
                q[i:j], *caches, table, torch.tensor([j], dtype=torch.int32),
                k=k[i:j], v=v[i:j], rope=ts.Rope(cos, sin), return_lse=True, **scales,
                query_start=torch.tensor([0, j - i], dtype=torch.int32), max_query_len=step,
            )  # fmt: skip
            parts.append((out, lse))
        outs.append([torch.cat(x) for x in zip(*parts, strict=True)] + caches)
    for other in outs[1:]:
        assert_same_bits(other[:2], outs[0][:2])
        for a, b in zip(other[2:], outs[0][2:], strict=True):
            np.testing.assert_array_equal(bits(a), bits(b))


def test_a_large_append_on_many_threads_has_the_same_bits():
    heads = Heads(8, 8, 64)
    found = []
    for threads in (1, 2, 7):
        _native.cpu.set_num_threads(threads)
        case = Case("float32", heads, [(700, 700), (300, 1), (256, 250)])
        q = case.batch.arguments["q"]
        case.append(q=q, rope=case.rope(angles_of(64, 64, 700)))
        found.append([*case.caches(), bits(q)])
    for other in found[1:]:
        for a, b in zip(other, found[0], strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_pass_bit_for_bit(dtype):
    """No NaN is made quiet, no zero loses its sign, on the way into the cache."""
    case = Case(dtype, lengths=[(1, 1)])
    k, v = case.array(case.k), case.array(case.v)
    patterns = {"float32": [0x7FA00001, -1, -0x80000000, 1], "float16": [0x7D01, -1, -0x8000, 1]}
    words = patterns.get(dtype, [0x7FA1, -1, -0x8000, 1])
    for a in (k, v):
        raw = a.view(torch.int16) if isinstance(a, torch.Tensor) else a.view(bits(a).dtype)
        raw[0, 0, : len(words)] = torch.tensor(words) if isinstance(a, torch.Tensor) else words
    case.array = lambda values: k if values is case.k else v
    case.append()
    block = case.where()[0][0, 0]
    for cache, rows in zip(case.caches(), (k, v), strict=True):
        np.testing.assert_array_equal(cache[block, 0], bits(rows)[0])
