"""The sampler's numerics, version 1, in NumPy: the bits of ``csrc/common/numerics.h``, written another way.

NumPy has no fused multiply-add: :func:`fma` builds one out of float64 operations and is exact.
"""

from __future__ import annotations

from fractions import Fraction
from math import ceil, floor
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
U64 = NDArray[np.uint64]

NUMERICS_VERSION = 1
WEIGHT_BITS = 40
_MASK32 = (1 << 32) - 1
MASK64 = (1 << 64) - 1

_f = float.fromhex
_LOG2_E = np.float32(_f("0x1.715476p+0"))
_EXP2 = [
    _f(c)
    for c in ("0x1.5bba14p-10", "0x1.3cea88p-7", "0x1.c6b752p-5", "0x1.ebf9bcp-3", "0x1.62e42ap-1", "0x1p0")
]
_LOG1P = [
    _f(c)
    for c in (
        "-0x1.38b572p-4",
        "0x1.055b68p-3",
        "-0x1.0d8544p-3",
        "0x1.22da1ep-3",
        "-0x1.547244p-3",
        "0x1.99a008p-3",
        "-0x1.000226p-2",
        "0x1.555554p-2",
        "-0x1p-1",
    )
]
_LN2_HIGH, _LN2_LOW = _f("0x1.62e4p-1"), _f("0x1.7f7d1cp-20")


def fma(a: ArrayLike, b: ArrayLike, c: ArrayLike) -> F32:
    """Float32 a * b + c, rounded once to nearest even.

    The product of two float32 is exact in float64. The sum is rounded to odd (Boldo and Melquiond, Emulation
    of FMA and Correctly Rounded Sums: Proved Algorithms Using Rounding to Odd, 2008): its error, exact by
    Knuth's two-sum, tells on which side of the float64 sum the true value lies. 53 bits are at least 24 + 2:
    rounding this to float32 is the only rounding that shows.
    """
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        product = np.asarray(a, np.float32).astype(np.float64) * np.asarray(b, np.float32).astype(np.float64)
        addend = np.asarray(c, np.float32).astype(np.float64)
        total = np.atleast_1d(product + addend)
        virtual = total - product
        error = (product - (total - virtual)) + (addend - virtual)
        bits = total.view(np.int64)
        to_odd = np.isfinite(total) & (error != 0) & (bits % 2 == 0)
        away_from_zero = (error > 0) == (total > 0)
        odd = np.where(to_odd, bits + np.where(away_from_zero, 1, -1), bits).view(np.float64)
        result: F32 = odd.astype(np.float32).reshape(np.broadcast_shapes(product.shape, addend.shape))
    return result


def _horner(coefficients: list[float], x: F32) -> F32:
    result = np.broadcast_to(np.float32(coefficients[0]), x.shape)
    for c in coefficients[1:]:
        result = fma(result, x, np.float32(c))
    return result


def weight(d: ArrayLike) -> I64:
    """floor(2^40 * exp(d)) of float32 d <= 0, by a polynomial; 0 below 2^-41 of the maximum, and for NaN."""
    x = np.asarray(d, np.float32)
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        t = x * _LOG2_E
        t = np.where(t > -60, t, np.float32(-60))  # also NaN
        n = np.rint(t)  # ties to even
        power = _horner(_EXP2, t - n)
    scaled = np.ldexp(power.astype(np.float64), n.astype(np.int32) + WEIGHT_BITS)
    weights: I64 = np.floor(scaled).astype(np.int64)
    return weights


def _log1p(f: F32) -> F32:
    return fma(f * f, _horner(_LOG1P, f), f)


def _add_exponent(e: NDArray[Any], log_mantissa: F32) -> F32:
    exponent = e.astype(np.float32)
    return fma(exponent, np.float32(_LN2_HIGH), fma(exponent, np.float32(_LN2_LOW), log_mantissa))


def log_weight_sum(total: ArrayLike) -> F32:
    """ln(total / 2^40) of integers 2^40 <= total < 2^63, float32."""
    sums = np.asarray(total, np.int64)
    exponents, remainders = [], []
    for s in map(int, sums.ravel()):
        e = s.bit_length() - 1
        if s - (1 << e) > 0x6A09E667 * (1 << e >> 32):  # the mantissa is above sqrt 2: 2^(e + 1) is nearer
            e += 1
        exponents.append(e)
        remainders.append(s - (1 << e))
    e_array = np.array(exponents, np.int64).reshape(sums.shape)
    rounded = np.array(remainders, np.int64).reshape(sums.shape).astype(np.float32)
    f = np.ldexp(rounded, -e_array).astype(np.float32)
    return _add_exponent(e_array - WEIGHT_BITS, _log1p(f))


def log_float(x: ArrayLike) -> F32:
    """ln(x) of positive finite float32, float32."""
    mantissa, e = np.frexp(np.asarray(x, np.float32).astype(np.float64))  # [0.5, 1), exact
    mantissa, e = mantissa * 2, e - 1
    above = mantissa.astype(np.float32).view(np.uint32) > 0x3FB504F3  # sqrt 2
    mantissa, e = np.where(above, mantissa / 2, mantissa), np.where(above, e + 1, e)
    return _add_exponent(e, _log1p((mantissa - 1).astype(np.float32)))


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10 (Salmon, Moraes, Dror, Shaw: Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & _MASK32, (a >> 32) ^ c3 ^ k1, a & _MASK32
        k0, k1 = (k0 + 0x9E3779B9) & _MASK32, (k1 + 0xBB67AE85) & _MASK32
    return c0, c1, c2, c3


def random_bits(seed: int, position: int, substream: int) -> int:
    """The 64 random bits of one draw; a negative seed is taken as two's complement."""
    seed &= MASK64
    counter = (position & _MASK32, position >> 32, substream, 0)
    word0, word1, _, _ = philox4x32(counter, (seed & _MASK32, seed >> 32))
    return word1 << 32 | word0


def draw_target(bits: int, total: int) -> int:
    """floor(bits * total / 2^64)."""
    return bits * total >> 64


def top_p_target(top_p: float, total: int) -> int:
    """max(1, ceil(P * total / 2^32)), P = floor(float32(top_p) * 2^32)."""
    p = floor(Fraction(float(np.float32(top_p))) * 2**32)
    return max(1, ceil(Fraction(p * total, 2**32)))
