// Transposes a square of kLanes x kLanes 32-bit elements held in registers, in log2(kLanes) exchanges between
// rows. For *_kernel.cpp files alone.
#pragma once
#include "cpu/attention_vec.h"

namespace tokenstep::cpu::TOKENSTEP_ISA_NAMESPACE {
namespace {

#if defined(__AVX512F__)
TOKENSTEP_VEC void transpose(__m512i (&row)[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {  // pairs of 32-bit elements
    t[i] = _mm512_unpacklo_epi32(row[i], row[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(row[i], row[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {  // 4 x 4 within each 128-bit lane
    row[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    row[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    row[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    row[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {  // then 4 x 4 of the 128-bit lanes
    const __m512i low = _mm512_shuffle_i32x4(row[i], row[i + 4], 0x88);
    const __m512i high = _mm512_shuffle_i32x4(row[i], row[i + 4], 0xdd);
    const __m512i low2 = _mm512_shuffle_i32x4(row[i + 8], row[i + 12], 0x88);
    const __m512i high2 = _mm512_shuffle_i32x4(row[i + 8], row[i + 12], 0xdd);
    t[i] = _mm512_shuffle_i32x4(low, low2, 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(high, high2, 0x88);
    t[i + 8] = _mm512_shuffle_i32x4(low, low2, 0xdd);
    t[i + 12] = _mm512_shuffle_i32x4(high, high2, 0xdd);
  }
  for (int i = 0; i < 16; ++i) row[i] = t[i];
}

TOKENSTEP_VEC void transpose(Floats (&row)[16]) {
  __m512i bits[16];
  for (int i = 0; i < 16; ++i) bits[i] = reinterpret_cast<__m512i>(row[i]);
  transpose(bits);
  for (int i = 0; i < 16; ++i) row[i] = reinterpret_cast<Floats>(bits[i]);
}
#else
TOKENSTEP_VEC void transpose(Floats (&row)[kLanes]) {
#if defined(__AVX2__)
  __m256 t[8], x[8];
  for (int i = 0; i < 8; ++i) x[i] = reinterpret_cast<__m256>(row[i]);
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(x[i], x[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(x[i], x[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    x[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    x[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    x[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    x[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    row[i] = reinterpret_cast<Floats>(_mm256_permute2f128_ps(x[i], x[i + 4], 0x20));
    row[i + 4] = reinterpret_cast<Floats>(_mm256_permute2f128_ps(x[i], x[i + 4], 0x31));
  }
#else
  float x[kLanes][kLanes];
  for (int i = 0; i < kLanes; ++i) store(x[i], row[i]);
  for (int i = 0; i < kLanes; ++i)
    for (int j = 0; j < kLanes; ++j) row[i][j] = x[j][i];
#endif
}
#endif

}  // namespace
}  // namespace tokenstep::cpu::TOKENSTEP_ISA_NAMESPACE
