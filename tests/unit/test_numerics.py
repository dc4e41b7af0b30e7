"""The shared numerics (csrc/common/numerics.h): accuracy, order, published vectors, the reference's fma."""

import ctypes
import ctypes.util
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenstep import _native
from tokenstep.reference import numerics as reference

native = _native.cpu.testing
UINT32 = (1 << 32) - 1


def apply(function, x, dtype):
    out = np.empty(x.shape, dtype)
    function(x, out)
    return out


def same_bits(a, b):
    return np.array_equal(a.view(f"u{a.itemsize}"), b.view(f"u{b.itemsize}"))


def every_exponent(rng, n, low=1, high=0x7F800000):
    """Positive floats with uniformly random bits: every exponent, subnormal numbers too."""
    return rng.integers(low, high, n).astype(np.uint32).view(np.float32)


def nearest_float32(value: Fraction) -> float:
    """The float32 nearest to a fraction, ties to even, by comparing with its neighbours exactly."""
    guess = np.float32(float(value))
    around = [np.nextafter(guess, np.float32(-np.inf)), guess, np.nextafter(guess, np.float32(np.inf))]
    return min(around, key=lambda c: (abs(Fraction(float(c)) - value), int(c.view(np.uint32)) & 1))


# ---- fma ---------------------------------------------------------------------------------------------------
@given(
    st.integers(1 << 11, (1 << 12) - 1).map(lambda a: a | 1),
    st.integers(1 << 12, (1 << 13) - 1).map(lambda b: b | 1),
    st.sampled_from([-1.0, 1.0]),
    st.integers(-70, -1),
    st.integers(-40, 40),
)
def test_reference_fma_is_exact_where_two_roundings_would_differ(a, b, sign, exponent, scale):
    # An odd product of 25 bits is half way between two float32; c decides, though float64 sums may lose it.
    c = sign * 2.0**exponent
    exact = (a * b + Fraction(c)) * Fraction(2) ** scale
    got = reference.fma(np.float32(math.ldexp(a, scale)), np.float32(b), np.float32(math.ldexp(c, scale)))
    assert got == nearest_float32(exact)
    assert (
        reference.fma(-np.float32(math.ldexp(a, scale)), np.float32(b), np.float32(math.ldexp(-c, scale)))
        == -got
    )


def test_reference_fma_equals_the_c_library():
    name = ctypes.util.find_library("m")
    if name is None:
        pytest.skip("no C mathematics library")
    fmaf = ctypes.CDLL(name).fmaf
    fmaf.restype, fmaf.argtypes = ctypes.c_float, [ctypes.c_float] * 3
    rng = np.random.default_rng(1)
    n = 50_000
    a, b = (every_exponent(rng, n, 0x20000000, 0x5F000000) for _ in range(2))
    with np.errstate(over="ignore", under="ignore"):
        c = -(a * b) * (1 + rng.integers(-8, 9, n).astype(np.float32) * np.float32(2.0**-23))  # cancellation
    c[::2] = every_exponent(rng, len(c[::2]))
    want = np.array([fmaf(*t) for t in zip(a.tolist(), b.tolist(), c.tolist(), strict=True)], np.float32)
    got = reference.fma(a, b, c)
    assert same_bits(got[~np.isnan(want)], want[~np.isnan(want)])
    assert np.isnan(got[np.isnan(want)]).all()


# ---- weights -----------------------------------------------------------------------------------------------
def weight_inputs(n=400_000):
    rng = np.random.default_rng(2)
    edges = np.float32([0.0, -0.0, -np.inf, np.nan, -1e38, -28.5, -1e-45])
    return np.concatenate([edges, -rng.random(n).astype(np.float32) * 45, -every_exponent(rng, n)])


def test_weight_has_the_bits_of_the_reference():
    d = weight_inputs()
    assert np.array_equal(apply(native.weight, d, np.int64), reference.weight(d))


def test_weight_of_the_largest_token_is_two_to_the_forty():
    assert apply(native.weight, np.float32([0.0, -0.0]), np.int64).tolist() == [1 << 40] * 2


def test_weight_of_minus_infinity_and_nan_is_zero():
    assert apply(native.weight, np.float32([-np.inf, np.nan, -3e38, -29]), np.int64).tolist() == [0] * 4


def test_weight_is_within_2e_7_of_the_largest_weight():
    d = -np.random.default_rng(3).random(1_000_000).astype(np.float32) * np.float32(28)
    error = np.abs(apply(native.weight, d, np.int64) - np.exp(d.astype(np.float64)) * 2.0**40)
    assert error.max() <= 2e-7 * 2**40


def test_weight_is_accurate_relative_to_itself():
    # The polynomial and its rounding, the rounding of d * log2(e), and the truncation to an integer.
    d = -np.random.default_rng(3).random(1_000_000).astype(np.float32) * np.float32(28)
    want = np.exp(d.astype(np.float64)) * 2.0**40
    error = np.abs(apply(native.weight, d, np.int64) - want)
    assert (error <= want * (1.6e-7 + 8e-8 * np.abs(d)) + 1).all()


def rises(d):
    """Largest relative rise of the weight along descending d, and the last weight."""
    w = apply(native.weight, d, np.int64)
    return np.max(np.diff(w) / np.maximum(w[:-1], 1), initial=0.0), w


def test_weight_of_a_lower_value_is_never_more_than_a_rounding_higher():
    for row in (np.arange(90, 132)[:, None] << 23) + np.arange(-3000, 3000):
        assert rises(-row.astype(np.uint32).view(np.float32))[0] <= 2.0**-23
    exponent_changes = ((np.arange(0, 42) + 0.5) * math.log(2)).astype(np.float32).view(np.uint32)
    for row in exponent_changes[:, None] + np.arange(-3000, 3000):
        assert rises(-row.astype(np.uint32).view(np.float32))[0] <= 2.0**-23


@pytest.mark.slow
def test_weight_of_a_lower_value_is_never_more_than_a_rounding_higher_exhaustively():
    last = 1 << 40
    for part in np.array_split(np.arange(0, np.float32(30).view(np.uint32), dtype=np.uint32), 500):
        rise, w = rises(-part.view(np.float32))
        assert rise <= 2.0**-23
        assert w[0] <= last * (1 + 2.0**-23)
        last = w[-1]


# ---- logarithms --------------------------------------------------------------------------------------------
def weight_sums(n=200_000):
    rng = np.random.default_rng(4)
    sums = (1 << 40) + (rng.integers(0, 1 << 62, n) >> rng.integers(0, 62, n))
    edges = [
        1 << 40,
        (1 << 40) + 1,
        (1 << 58) - 1,
        (1 << 63) - 1,
        *(round(2**0.5 * 2**e) for e in range(40, 62)),
    ]
    return np.concatenate([np.array(edges, np.int64), sums])


def test_log_of_a_weight_sum_has_the_bits_of_the_reference():
    sums = weight_sums()
    assert same_bits(apply(native.log_weight_sum, sums, np.float32), reference.log_weight_sum(sums))


def test_log_of_a_weight_sum_is_accurate_relative_to_itself_even_near_one():
    sums = weight_sums()
    want = np.log1p((sums - (1 << 40)).astype(np.float64) / 2.0**40)
    got = apply(native.log_weight_sum, sums, np.float32).astype(np.float64)
    assert got[0] == 0.0
    assert (np.abs(got - want) <= 3e-7 * np.abs(want)).all()


def test_log_of_a_float_has_the_bits_of_the_reference():
    x = np.concatenate(
        [
            np.float32([1, 0.5, 1e-45, 3e38, 0.70710678, 1.4142135]),
            every_exponent(np.random.default_rng(5), 300_000),
        ]
    )
    assert same_bits(apply(native.log_float, x, np.float32), reference.log_float(x))


def test_log_of_a_float_is_accurate():
    x = every_exponent(np.random.default_rng(6), 500_000)
    x = np.concatenate([x, np.float32(1) - np.exp2(np.arange(-24, 0, dtype=np.float32)), np.float32([1])])
    want = np.log(x.astype(np.float64))
    got = apply(native.log_float, x, np.float32).astype(np.float64)
    assert (np.abs(got - want) <= 3e-7 * np.abs(want)).all()
    assert (np.diff(apply(native.log_float, np.sort(x), np.float32)) >= -1e-6).all()


# ---- order -------------------------------------------------------------------------------------------------
def test_ordered_bits_order_as_the_floats_do():
    x = every_exponent(np.random.default_rng(7), 50_000)
    x = np.sort(np.concatenate([x, -x, np.float32([np.inf, -np.inf, 1e-45, -1e-45, 0])]))
    bits = apply(native.ordered_bits, x, np.int64)
    assert np.array_equal(np.diff(bits) > 0, np.diff(x) > 0)
    assert bits.min() >= 0
    assert bits.max() <= UINT32


def test_ordered_bits_of_both_zeros_are_equal():
    a, b = apply(native.ordered_bits, np.float32([0.0, -0.0]), np.int64)
    assert a == b


# ---- random bits -------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # Random123, tests/kat_vectors, philox 4x32 10
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((UINT32,) * 4, (UINT32,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_vectors(counter, key, expected):
    assert native.philox4x32(*counter, *key) == expected
    assert reference.philox4x32(counter, key) == expected


def test_random_bits_are_words_one_and_zero_of_the_block_for_seed_position_substream():
    seed, position, substream = 0x299F31D0A4093822, 0x85A308D3243F6A88, 0x13198A2E
    words = native.philox4x32(0x243F6A88, 0x85A308D3, 0x13198A2E, 0, 0xA4093822, 0x299F31D0)
    assert native.random_bits(seed, position, substream) == words[1] << 32 | words[0]
    assert reference.random_bits(seed, position, substream) == words[1] << 32 | words[0]
    assert reference.random_bits(seed - (1 << 64), position, substream) == words[1] << 32 | words[0]


@given(st.integers(0, (1 << 64) - 1), st.integers(0, (1 << 64) - 1), st.integers(0, UINT32))
def test_random_bits_equal_the_reference(seed, position, substream):
    assert native.random_bits(seed, position, substream) == reference.random_bits(seed, position, substream)


# ---- targets -----------------------------------------------------------------------------------------------
TOTALS = st.integers(1 << 40, (1 << 58) - 1)


@given(st.integers(0, (1 << 64) - 1), TOTALS)
def test_draw_target_is_the_floor_of_the_exact_product(bits, total):
    assert native.draw_target(bits, total) == bits * total >> 64 < total


@given(st.floats(0, 1, width=32), TOTALS)
def test_top_p_target_is_the_ceiling_of_the_exact_product(top_p, total):
    exact = math.ceil(Fraction(math.floor(Fraction(top_p) * 2**32) * total, 2**32))
    assert native.top_p_target(top_p, total) == reference.top_p_target(top_p, total) == max(1, exact) <= total


@pytest.mark.parametrize("total", [1 << 40, (1 << 40) + 1, (1 << 58) - 1])
def test_top_p_target_at_its_ends(total):
    assert native.top_p_target(0.0, total) == 1
    assert native.top_p_target(1e-45, total) == 1
    assert native.top_p_target(1.0, total) == total
    below_one = float(np.nextafter(np.float32(1), np.float32(0)))
    assert native.top_p_target(below_one, total) < total


def test_the_version_of_the_numerics_is_the_reference_s():
    assert _native.cpu.numerics_version == reference.NUMERICS_VERSION
