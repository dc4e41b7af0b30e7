"""One-byte cache elements: float8_e4m3 by its definition, int8; encoded by a search for the nearest code."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["CODES", "decode", "encode", "quantise"]

Floats = NDArray[np.floating[Any]]


def _e4m3_value(code: int) -> float:
    exponent, fraction = code >> 3 & 15, code & 7
    if code & 0x7F == 0x7F:
        return float("nan")
    value = fraction * 2.0**-9 if exponent == 0 else (8 + fraction) * 2.0 ** (exponent - 10)
    return -value if code & 0x80 else value


CODES: dict[str, Floats] = {  # by dtype: the value of each code, codes counted as bytes
    "float8_e4m3": np.array([_e4m3_value(code) for code in range(256)]),
    "int8": np.arange(256, dtype=np.uint8).view(np.int8).astype(np.float64),
}


def decode(codes: NDArray[np.uint8], dtype: str) -> Floats:
    """The values of codes (bytes), float64."""
    return CODES[dtype][codes]


def encode(x: Floats, dtype: str) -> NDArray[np.uint8]:
    """The code (a byte) of the nearest value, of two the even one; saturating; NaN gives 0x7f, as int8 0."""
    signed = dtype == "int8"  # e4m3: sign and magnitude
    codes = np.arange(-128, 128).astype(np.uint8) if signed else np.arange(0x7F, dtype=np.uint8)
    values = CODES[dtype][codes]  # ascending
    nan = np.isnan(x)
    wide = np.where(nan, 0, x if signed else np.abs(x)).astype(np.float64).clip(values[0], values[-1])
    above = np.searchsorted(values[1:-1], wide) + 1
    to_low, to_high = wide - values[above - 1], values[above] - wide
    goes_up = (to_high < to_low) | ((to_high == to_low) & (codes[above] % 2 == 0))
    nearest = codes[np.where(goes_up, above, above - 1)]
    if signed:
        return np.where(nan, np.uint8(0), nearest)
    return np.where(nan, np.uint8(0x7F), nearest | np.where(np.signbit(x), np.uint8(0x80), np.uint8(0)))


def quantise(x: Floats, scale: Floats, dtype: str) -> NDArray[np.uint8]:
    """The codes of float32 ``x [..., heads, D]`` with ``scale [heads]``: the quotient in float32, rounded."""
    return encode(x.astype(np.float32) / scale.astype(np.float32)[:, None], dtype)
