"""Append and rotation in the attention launch: the bits of the CPU in pages, of doing it first in results."""

import numpy as np
import pytest
from attention_append_cases import LENGTHS, Case, angles_of
from attention_cases import EVERY_CACHE, LAYOUTS, Heads, assert_same_bits, bits
from attention_device import on_device

HEADS = {"GQA": Heads(6, 2, 80), "wide": Heads(40, 1, 64)}


def attend_fused(device, case, division=None, **options):
    """Attention that appends the case's rows."""
    batch = on_device(device, case.batch, **(division or {}))
    return batch.attend(k=case.array(case.k), v=case.array(case.v), **options)


@pytest.mark.parametrize("rope", [None, "neox", "interleaved", "partial"])
@pytest.mark.parametrize(
    ("dtype", "heads"),
    [
        *((dtype, "GQA") for dtype in EVERY_CACHE),
        *((dtype, "wide") for dtype in ("float32", "bfloat16", "float16/float8_e4m3")),
    ],
)
def test_attention_that_appends_equals_append_and_then_attention(device, dtype, heads, rope):
    heads = HEADS[heads]
    fused, apart = Case(dtype, heads), Case(dtype, heads)
    angles = angles_of(heads.head_dim, 30 if rope == "partial" else heads.head_dim)
    options = {"rope": fused.rope(angles, interleaved=rope == "interleaved")} if rope else {}
    q_before = bits(fused.batch.arguments["q"]).copy()
    got = attend_fused(device, fused, {"seed": 3, "together": 4}, **options)
    assert (bits(fused.batch.arguments["q"]) == q_before).all(), "the caller's q is left as it was"
    apart.append(q=apart.batch.arguments["q"], **options)  # on the CPU
    for a, b in zip(fused.caches(), apart.caches(), strict=True):
        np.testing.assert_array_equal(a, b)
    assert_same_bits(got, on_device(device, apart.batch).attend())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("block_size", [1, 3, 16, 256])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16/float8_e4m3"])
def test_rows_are_written_to_their_slots_and_nowhere_else(device, dtype, block_size, layout):
    fused, apart = (Case(dtype, block_size=block_size, layout=layout) for _ in range(2))
    attend_fused(device, fused)
    apart.append()
    for a, b in zip(fused.caches(), apart.caches(), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("seed", range(3))
def test_new_tokens_of_several_chunks_and_tiles_are_written_once(device, seed):
    """Blocks of other tiles need what one of them writes: if they read it from its page, it is a race."""
    heads = Heads(16, 2, 136)
    lengths = [(300, 10), (257, 3), (140, 20), (129, 1)]
    fused, apart = Case("float16", heads, lengths), Case("float16", heads, lengths)
    division = {"seed": seed, "together": 6, "grid": 6, "slots": 16}
    got = attend_fused(device, fused, division)
    apart.append()
    for a, b in zip(fused.caches(), apart.caches(), strict=True):
        np.testing.assert_array_equal(a, b)
    assert_same_bits(got, on_device(device, apart.batch).attend())


@pytest.mark.parametrize("dtype", EVERY_CACHE)
def test_a_rotated_query_without_new_rows_sees_the_cache_as_it_is(device, dtype):
    case, turned = Case(dtype, lengths=LENGTHS[:3]), Case(dtype, lengths=LENGTHS[:3])
    options = {"rope": case.rope(angles_of(80, 80))}
    case.append()
    turned.append(q=turned.batch.arguments["q"], rope=options["rope"])
    turned.append()  # k as it was, unrotated
    got = on_device(device, case.batch).attend(**options)
    assert_same_bits(got, on_device(device, turned.batch).attend())
