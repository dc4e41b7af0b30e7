// One-byte cache elements, host and device: float8_e4m3 (e4m3fn: no infinities, largest 448, one NaN beside
// its sign; Micikevicius et al., FP8 Formats for Deep Learning, arXiv 2209.05433) and int8. A cached value is
// code * scale; quantising divides by the scale in float32 and rounds to nearest even. What is beyond the
// range saturates, as the conversions of PTX do (cvt.rn.satfinite.e4m3x2.f32, cvt.rni.sat.s8.f32): infinities
// too, int8 to -128 ... 127, and NaN becomes e4m3's NaN or 0.
#pragma once
#include <cstdint>

#include "common/numerics.h"

namespace tokenstep {

// ---- code -> float32, exact
// ---------------------------------------------------------------------------------------
TOKENSTEP_INLINE float float_from_e4m3(uint8_t code) {
  const uint32_t magnitude = code & 0x7fu, sign = (code & 0x80u) << 24;
  const uint32_t normal = (magnitude + (120u << 3)) << 20;
  const uint32_t subnormal = bits_of(mul(static_cast<float>(magnitude), 0x1p-9f));
  const uint32_t finite = magnitude < 8 ? subnormal : normal;
  return float_from_bits(sign | (magnitude == 0x7fu ? 0x7fc00000u : finite));
}
TOKENSTEP_INLINE float float_from_int8(int8_t code) { return static_cast<float>(code); }

// ---- float32 -> code
// ----------------------------------------------------------------------------------------------
TOKENSTEP_INLINE uint8_t e4m3_from_float(float x) {
  const uint32_t u = bits_of(x), magnitude = u & 0x7fffffffu, sign = u >> 24 & 0x80u;
  // Normal range: rebase the exponent, round 20 bits away. Below 2^-6: an addition aligns and rounds.
  const uint32_t normal = (magnitude + 0x7ffffu + (magnitude >> 20 & 1) - (120u << 23)) >> 20;
  const uint32_t tiny = bits_of(add(float_from_bits(magnitude), 0x1p14f)) - 0x46800000u;
  const uint32_t finite = magnitude < 0x3c800000u ? tiny : magnitude < 0x43e00000u ? normal : 0x7eu;
  return static_cast<uint8_t>(magnitude > 0x7f800000u ? 0x7fu : sign | finite);
}
TOKENSTEP_INLINE int8_t int8_from_float(float x) {
  const float low = x > -128.0f ? x : -128.0f, clamped = low < 127.0f ? low : 127.0f;
  const uint32_t rounded =
      bits_of(add(clamped, 12582912.0f)) - 0x4b400000u;  // 1.5 * 2^23: integers from there on
  return static_cast<int8_t>(x == x ? static_cast<int32_t>(rounded) : 0);
}

}  // namespace tokenstep
