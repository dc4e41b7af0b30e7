"""One-byte cache elements: every code and every rounding decision, against the definition and torch."""

import numpy as np
import pytest

from tokenstep import _native
from tokenstep.reference import quantised

native = _native.cpu.testing


def encoded(x, dtype):
    """The codes of float32 values, as the kernels round them."""
    if dtype == "int8":
        out = np.empty(len(x), np.int8)
        native.int8_from_float(x, out)
        return out.view(np.uint8)
    out = np.empty(len(x), np.uint8)
    native.e4m3_from_float(x, out)
    return out


def halfway_and_next_to_it(dtype):
    """Every value of the dtype, points midway between neighbours, and the float32 on either side."""
    values = np.unique(quantised.CODES[dtype][np.isfinite(quantised.CODES[dtype])])
    points = np.concatenate([values, (values[1:] + values[:-1]) / 2]).astype(np.float32)
    return np.concatenate([points, np.nextafter(points, np.float32(np.inf)), np.nextafter(points, -np.inf)])


def wide_values():
    """Floats of every exponent and sign, and those that are no numbers."""
    rng = np.random.default_rng(0)
    random = rng.integers(0, 1 << 32, 200_000, dtype=np.uint32).view(np.float32)
    special = np.float32([0.0, -0.0, np.inf, -np.inf, np.nan, -np.nan, 1e-45, -1e-45, 464, 465, -3e38])
    return np.concatenate([random, special, rng.standard_normal(10_000).astype(np.float32) * 100])


def every_half():
    return np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)


@pytest.mark.parametrize("values", [halfway_and_next_to_it, lambda _: every_half(), lambda _: wide_values()])
@pytest.mark.parametrize("dtype", quantised.CODES)
def test_a_value_becomes_the_code_of_the_nearest_or_of_the_even_one(dtype, values):
    x = values(dtype)
    np.testing.assert_array_equal(encoded(x, dtype), quantised.encode(x, dtype))


def test_every_e4m3_code_has_the_value_of_its_definition_and_comes_back():
    codes = np.arange(256, dtype=np.uint8)
    got = np.empty(256, np.float32)
    native.float_from_e4m3(codes, got)
    want = quantised.CODES["float8_e4m3"].astype(np.float32)
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(np.signbit(got), codes >= 0x80)
    assert (encoded(got, "float8_e4m3")[~np.isnan(got)] == codes[~np.isnan(got)]).all()


def test_e4m3_is_that_of_torch_except_that_it_saturates():
    torch = pytest.importorskip("torch")
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    values = codes.view(torch.float8_e4m3fn).float().numpy()
    np.testing.assert_array_equal(values, quantised.CODES["float8_e4m3"].astype(np.float32))
    x = np.concatenate([every_half(), halfway_and_next_to_it("float8_e4m3"), wide_values()])
    x = x[np.abs(x) <= 448]
    want = torch.from_numpy(x).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    np.testing.assert_array_equal(encoded(x, "float8_e4m3"), want)


@pytest.mark.parametrize(
    ("dtype", "least", "greatest", "nan"), [("int8", 0x80, 0x7F, 0), ("float8_e4m3", 0xFE, 0x7E, 0x7F)]
)
def test_what_is_beyond_the_range_saturates_and_nan_has_its_code(dtype, least, greatest, nan):
    x = np.float32([1e9, np.inf, -1e9, -np.inf, np.nan, -np.nan])
    assert encoded(x, dtype).tolist() == [greatest, greatest, least, least, nan, nan]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", quantised.CODES)
def test_every_float32_becomes_the_nearest_code(dtype):
    for begin in range(0, 1 << 32, 1 << 24):
        x = np.arange(begin, begin + (1 << 24), dtype=np.uint32).view(np.float32)
        np.testing.assert_array_equal(encoded(x, dtype), quantised.encode(x, dtype))
