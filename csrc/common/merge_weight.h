// The weight of a part in merge_attention, host and device, the same bits everywhere.
#pragma once
#include "common/numerics.h"

namespace tokenstep {

// e^(lse - max) for lse <= max in about 2 ulp: exactly 1 at max, exactly 0 below 2^-126; NaN stays. The
// quotient by ln 2 is rounded to an integer, and what remains is exact to the last bit but one (Cody and
// Waite).
TOKENSTEP_INLINE float merge_weight(float lse, float max) {
  const float x = sub(lse, max);
  const float clamped = x < -87.0f ? -87.0f : x;
  const float rounded =
      add(mul(clamped, 0x1.715476p+0f), 12582912.0f);  // 1.5 * 2^23: an integer in the low bits
  const float n = sub(rounded, 12582912.0f);
  const float rest = fma(n, -0x1.7f7d1cp-20f, fma(n, -0x1.62e4p-1f, clamped));
  const float power = float_from_bits((bits_of(rounded) << 23) + (127u << 23));
  return x < -87.0f ? 0.0f : mul(exp2_fraction(mul(rest, 0x1.715476p+0f)), power);
}

}  // namespace tokenstep
