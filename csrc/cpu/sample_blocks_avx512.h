// Block kernels with AVX-512 (see sample_blocks.h and, for what each computes, sample_blocks_plain.h).
// Against the compiler's own vectors they win 2-3x where tokens are collected, and 1.2x on the sums.
#pragma once
#if defined(__GNUC__) && \
    !defined(__clang__)  // its own header warns of registers that it means to be undefined
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#else
#include <immintrin.h>
#endif

namespace tokenstep::cpu::TOKENSTEP_ISA_NAMESPACE {
namespace {

constexpr int kLanes = 16;

inline float max_of_block(const float* x, bool& bad) {
  __m512 a = _mm512_loadu_ps(x), b = _mm512_loadu_ps(x + kLanes);
  __mmask16 unordered = _mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q);  // one comparison checks two vectors for NaN
  for (int i = 2 * kLanes; i < kBlock; i += 2 * kLanes) {
    const __m512 c = _mm512_loadu_ps(x + i), d = _mm512_loadu_ps(x + i + kLanes);
    a = _mm512_max_ps(a, c);
    b = _mm512_max_ps(b, d);
    unordered |= _mm512_cmp_ps_mask(c, d, _CMP_UNORD_Q);
  }
  bad |= unordered != 0;
  return _mm512_reduce_max_ps(_mm512_max_ps(a, b));
}

inline __mmask16 mask_of_group(const uint32_t* words, int group) {
  return static_cast<__mmask16>(words[group / 2] >> (group % 2 * 16));
}

inline void mask_block(const float* x, const uint32_t* words, float* out) {
  for (int group = 0; group < kBlock / kLanes; ++group)
    _mm512_storeu_ps(
        out + group * kLanes,
        _mm512_mask_loadu_ps(_mm512_set1_ps(-kInfinity), mask_of_group(words, group), x + group * kLanes));
}

inline float max_of_allowed(const float* x, const uint32_t* words) {
  __m512 largest = _mm512_set1_ps(-kInfinity);
  for (int group = 0; group < kBlock / kLanes; ++group)
    largest = _mm512_mask_max_ps(largest, mask_of_group(words, group), largest,
                                 _mm512_loadu_ps(x + group * kLanes));
  return _mm512_reduce_max_ps(largest);
}

// weight_as_float() of sixteen tokens.
inline __m512 weights_as_floats(__m512 distance) {
  const __m512 magic = _mm512_set1_ps(12582912.0f + kWeightBits);
  const __m512 t = _mm512_max_ps(_mm512_mul_ps(distance, _mm512_set1_ps(kLog2E)), _mm512_set1_ps(-60.0f));
  const __m512 rounded = _mm512_add_ps(t, magic);
  const __m512 f = _mm512_sub_ps(t, _mm512_sub_ps(rounded, magic));
  __m512 p = _mm512_fmadd_ps(_mm512_set1_ps(0x1.5bba14p-10f), f, _mm512_set1_ps(0x1.3cea88p-7f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0x1.c6b752p-5f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0x1.ebf9bcp-3f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0x1.62e42ap-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
  return _mm512_castsi512_ps(
      _mm512_add_epi32(_mm512_castps_si512(p), _mm512_slli_epi32(_mm512_castps_si512(rounded), 23)));
}
template <bool kScaled>
inline __m512 load_distances(const float* x, __m512 scale, __m512 x_max) {
  const __m512 value = _mm512_loadu_ps(x);
  return _mm512_sub_ps(kScaled ? _mm512_mul_ps(value, scale) : value, x_max);
}
inline __m512i low_weights(__m512 w) { return _mm512_cvttps_epi64(_mm512_castps512_ps256(w)); }
inline __m512i high_weights(__m512 w) { return _mm512_cvttps_epi64(_mm512_extractf32x8_ps(w, 1)); }

template <bool kScaled>
inline uint64_t sum_of_weights(const float* x, float scale, float x_max, float log2_top,
                               const char* prefetch) {
  const __m512 scales = _mm512_set1_ps(scale), maxima = _mm512_set1_ps(x_max);
  __m512i sum = _mm512_setzero_si512();
  if (log2_top < kNarrowSumBelow) {  // 32-bit lanes suffice
#pragma GCC unroll 4
    for (int i = 0; i < kBlock; i += kLanes, prefetch += 64) {
      __builtin_prefetch(prefetch, 0, 2);
      sum = _mm512_add_epi32(
          sum, _mm512_cvttps_epi32(weights_as_floats(load_distances<kScaled>(x + i, scales, maxima))));
    }
    return static_cast<uint64_t>(
        _mm512_reduce_add_epi64(_mm512_add_epi64(_mm512_cvtepu32_epi64(_mm512_castsi512_si256(sum)),
                                                 _mm512_cvtepu32_epi64(_mm512_extracti64x4_epi64(sum, 1)))));
  }
#pragma GCC unroll 4
  for (int i = 0; i < kBlock; i += kLanes, prefetch += 64) {
    __builtin_prefetch(prefetch, 0, 2);
    const __m512 w = weights_as_floats(load_distances<kScaled>(x + i, scales, maxima));
    sum = _mm512_add_epi64(sum, _mm512_add_epi64(low_weights(w), high_weights(w)));
  }
  return static_cast<uint64_t>(_mm512_reduce_add_epi64(sum));
}
inline uint64_t sum_of_weights(const float* x, float scale, float x_max, float log2_top,
                               const char* prefetch) {
  return scale == 1.0f ? sum_of_weights<false>(x, scale, x_max, log2_top, prefetch)
                       : sum_of_weights<true>(x, scale, x_max, log2_top, prefetch);
}

inline uint64_t sum_of_weights_from(const float* x, float scale, float x_max, float least) {
  const __m512 scales = _mm512_set1_ps(scale), maxima = _mm512_set1_ps(x_max), bound = _mm512_set1_ps(least);
  __m512i sum = _mm512_setzero_si512();
  for (int i = 0; i < kBlock; i += kLanes) {
    const __m512 value = _mm512_mul_ps(_mm512_loadu_ps(x + i), scales);
    const __m512 w = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(value, bound, _CMP_GE_OQ),
                                         weights_as_floats(_mm512_sub_ps(value, maxima)));
    sum = _mm512_add_epi64(sum, _mm512_add_epi64(low_weights(w), high_weights(w)));
  }
  return static_cast<uint64_t>(_mm512_reduce_add_epi64(sum));
}

inline int collect_tokens(const float* x, float scale, float least, float most, int32_t first_id,
                          float* values, int32_t* ids, int count) {
  const __m512 scales = _mm512_set1_ps(scale), lower = _mm512_set1_ps(least), upper = _mm512_set1_ps(most);
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (int i = 0; i < kBlock; i += kLanes) {
    const __m512 value = _mm512_mul_ps(_mm512_loadu_ps(x + i), scales);
    const __mmask16 wanted =
        _mm512_mask_cmp_ps_mask(_mm512_cmp_ps_mask(value, lower, _CMP_GE_OQ), value, upper, _CMP_LE_OQ);
    if (!wanted) continue;  // the buffers have room for a whole vector more
    _mm512_storeu_ps(values + count, _mm512_maskz_compress_ps(wanted, value));
    _mm512_storeu_si512(ids + count, _mm512_maskz_compress_epi32(
                                         wanted, _mm512_add_epi32(_mm512_set1_epi32(first_id + i), lane)));
    count += __builtin_popcount(wanted);
  }
  return count;
}

inline int count_above(const float* x, float scale, float value) {
  const __m512 scales = _mm512_set1_ps(scale), bound = _mm512_set1_ps(value);
  int count = 0;
  for (int i = 0; i < kBlock; i += kLanes)
    count += __builtin_popcount(
        _mm512_cmp_ps_mask(_mm512_mul_ps(_mm512_loadu_ps(x + i), scales), bound, _CMP_GT_OQ));
  return count;
}

}  // namespace
}  // namespace tokenstep::cpu::TOKENSTEP_ISA_NAMESPACE
