"""merge_attention: attention over parts of the keys becomes attention over all of them."""

import numpy as np
import pytest
from attention_cases import (
    DTYPES,
    UNIT_ROUNDOFF,
    Heads,
    Sequence,
    as_argument,
    assert_same_bits,
    bits,
    numbers,
    paged,
    random_sequence,
    supported_isas,
    torch,
)
from attention_merge_cases import arguments, random_parts

import tokenstep as ts
from tokenstep import _native
from tokenstep.reference import attention as reference

HEADS = Heads(6, 2, 72)


def stack(arrays):
    return torch.stack(arrays) if isinstance(arrays[0], torch.Tensor) else np.stack(arrays)


def merged(parts):
    """The merge of (out, lse) pairs."""
    return ts.merge_attention(*(stack(x) for x in zip(*parts, strict=True)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cuts", [[100], [1, 2, 3], [0, 150, 150], [64, 299]], ids=str)
def test_parts_merge_to_attention_over_their_union(dtype, cuts):
    """Decoding over a shared prefix and what follows it; a sink belongs to one part, here the last."""
    s = random_sequence(np.random.default_rng(0), dtype, HEADS, 300)
    sinks = np.linspace(-1, 2, 6).astype(np.float32)
    parts = []
    for a, b in zip([0, *cuts], [*cuts, 300], strict=True):
        part = paged([Sequence(s.q, s.k[a:b], s.v[a:b])], dtype)
        parts.append(part.attend(sinks=as_argument(sinks, part) if b == 300 else None))
    out, lse = merged(parts)
    want_out, want_lse = paged([s], dtype).expected(sinks=sinks)
    # The parts were rounded to the dtype, and the result is rounded again.
    bound = 3 * UNIT_ROUNDOFF[dtype] * np.abs(s.v).max() + 2.0**-20
    assert np.abs(numbers(out) - want_out).max() <= bound
    assert np.abs(numbers(lse) - want_lse).max() <= 2.0**-19


@pytest.mark.parametrize("isa", supported_isas())
@pytest.mark.parametrize("spread", [1.0, 50.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_equals_the_reference_within_rounding(dtype, spread, isa):
    _native.cpu.set_isa(isa)
    outs, lses = random_parts(dtype, spread=spread)
    got_out, got_lse = ts.merge_attention(*arguments(outs, lses, dtype))
    want_out, want_lse = reference.merge_attention(outs, lses)
    np.testing.assert_allclose(numbers(got_out), want_out, rtol=1.01 * UNIT_ROUNDOFF[dtype], atol=2e-6)
    np.testing.assert_allclose(numbers(got_lse), want_lse, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_part_is_returned_bit_for_bit(dtype):
    outs, lses = random_parts(dtype, (1, 7, 3, 40))
    lses[0, 2] = -np.inf
    a, b = arguments(outs, lses, dtype)
    out, lse = ts.merge_attention(a, b)
    empty = np.isneginf(lses[0])
    assert_same_bits((out[~empty], lse), (a[0][~empty], b[0]))
    assert (numbers(out)[empty] == 0).all()


def test_parts_without_keys_are_not_even_read():
    outs, lses = random_parts("float32")
    want = ts.merge_attention(outs, lses)
    outs[np.isneginf(lses)] = np.nan
    assert_same_bits(ts.merge_attention(outs, lses), want)
    assert np.isfinite(want[0]).all()


def test_no_keys_at_all_give_zeros_and_minus_infinity():
    outs = np.full((3, 2, 4, 8), np.nan, np.float32)
    out, lse = ts.merge_attention(outs, np.full((3, 2, 4), -np.inf, np.float32))
    assert (bits(out) == 0).all()
    assert (lse == -np.inf).all()


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("shape", [(0, 2, 3, 8), (2, 0, 3, 8), (2, 3, 0, 8)])
def test_empty_axes_are_accepted(shape, library):
    convert = (lambda a: a) if library == "numpy" else torch.from_numpy
    out, lse = ts.merge_attention(
        convert(np.ones(shape, np.float32)), convert(np.ones(shape[:3], np.float32))
    )
    assert tuple(out.shape) == shape[1:]
    assert tuple(lse.shape) == shape[1:3]
    assert (out == 0).all()
    assert (lse == -np.inf).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_alone_and_on_many_threads_has_the_same_bits(dtype):
    a, b = arguments(*random_parts(dtype, (4, 300, 8, 64)), dtype)
    _native.cpu.set_num_threads(1)
    want = ts.merge_attention(a, b)
    _native.cpu.set_num_threads(5)
    assert_same_bits(ts.merge_attention(a, b), want)
    assert_same_bits(ts.merge_attention(a[:, 17:18], b[:, 17:18]), [x[17:18] for x in want])


def test_inputs_may_have_any_strides_outside_the_last_axis():
    outs, lses = random_parts("float32", (4, 6, 3, 16))
    want = ts.merge_attention(outs, lses)
    wide = np.full((6, 3, 4, 20), np.nan, np.float32)
    wide[..., :16] = outs.transpose(1, 2, 0, 3)
    turned = np.ascontiguousarray(lses.T).T
    assert_same_bits(ts.merge_attention(wide[..., :16].transpose(2, 0, 1, 3), turned), want)
    assert_same_bits(ts.merge_attention(outs[::-1].copy()[::-1], lses[::-1].copy()[::-1]), want)


def test_merging_in_two_steps_agrees_with_one():
    outs, lses = random_parts("float32")
    first = ts.merge_attention(outs[:2], lses[:2])
    rest = ts.merge_attention(outs[2:], lses[2:])
    for got, want in zip(merged([first, rest]), ts.merge_attention(outs, lses), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_results_are_of_the_kind_of_outs(dtype):
    outs, lses = arguments(*random_parts(dtype), dtype)
    for convert, kind in ((lambda a: a, np.ndarray), (torch.from_numpy, torch.Tensor)):
        out, lse = ts.merge_attention(convert(outs), convert(lses))
        assert type(out) is kind
        assert type(lse) is kind
        assert str(out.dtype).endswith(dtype)
        assert str(lse.dtype).endswith("float32")
