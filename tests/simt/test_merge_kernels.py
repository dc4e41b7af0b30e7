"""merge_attention on the device: the CPU's bits of out, and its lse (the logarithm is the device's own)."""

import numpy as np
import pytest
from attention_cases import DTYPES, assert_same_bits, keep_strides, numbers, torch
from attention_merge_cases import arguments, random_parts
from device_arrays import moved

import tokenstep as ts


def merge(device, outs, lses):
    with device.active():
        return [
            a.cpu() if isinstance(a, torch.Tensor) else a
            for a in ts.merge_attention(moved(device, outs), moved(device, lses))
        ]


def assert_as_on_the_cpu(device, outs, lses):
    """Equal bits of out, and of lse in the emulator; on a GPU its logarithm may round otherwise."""
    got, want = merge(device, outs, lses), ts.merge_attention(outs, lses)
    assert_same_bits([got[0], want[1] if device.name == "cuda" else got[1]], want)
    np.testing.assert_allclose(numbers(got[1]), numbers(want[1]), rtol=2.0**-23)


SHAPES = [(1, 7, 3, 40), (2, 5, 8, 64), (5, 3, 3, 128), (9, 2, 1, 256), (3, 1, 2, 8)]


@pytest.mark.parametrize("spread", [1.0, 50.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_merge_as_on_the_cpu(device, dtype, shape, spread):
    assert_as_on_the_cpu(device, *arguments(*random_parts(dtype, shape, spread=spread), dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_without_keys_are_not_even_read(device, dtype):
    outs, lses = random_parts(dtype)
    want = merge(device, *arguments(outs, lses, dtype))
    outs[np.isneginf(lses)] = np.nan
    assert_same_bits(merge(device, *arguments(outs, lses, dtype)), want)
    assert np.isfinite(numbers(want[0])).all()


def test_inputs_may_have_any_strides_outside_the_last_axis(device):
    outs, lses = random_parts("float32", (4, 6, 3, 16))
    turned = np.ascontiguousarray(lses.T).T
    for first, width in (
        (4, 20),
        (5, 24),
        (0, 21),
    ):  # aligned to 16 bytes, and not: their begin, their strides
        wide = np.full((6, 3, 4, width), np.nan, np.float32)
        part = wide[..., first : first + 16]
        part[:] = outs.transpose(1, 2, 0, 3)
        assert_as_on_the_cpu(device, keep_strides(part.transpose(2, 0, 1, 3), "float32"), turned)


def test_lses_that_are_no_numbers_make_their_rows_none(device):
    outs, lses = random_parts("float32", (3, 2, 2, 8))
    lses[1, 0, 0], lses[2, 1, 1] = np.nan, np.inf
    got = merge(device, outs, lses)
    assert np.isnan(got[0][0, 0]).all()
    assert np.isnan(got[0][1, 1]).all()
    assert np.isfinite(got[0][0, 1]).all()


@pytest.mark.parametrize("shape", [(0, 2, 3, 8), (2, 0, 3, 8), (2, 3, 0, 8)], ids=str)
def test_empty_axes_are_accepted(device, shape):
    out, lse = merge(device, np.ones(shape, np.float32), np.ones(shape[:3], np.float32))
    assert tuple(out.shape) == shape[1:]
    assert (numbers(out) == 0).all()
    assert (numbers(lse) == -np.inf).all()
